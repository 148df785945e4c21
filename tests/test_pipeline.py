"""The pipeline: bounded, batched, one thread at the device, and no job takes another with it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import pytest

from sam_poll import formats
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import DeviceError, InputError, SamPollError
from sam_poll.pipeline import Pipeline, Sizes
from sam_poll.types import Box, Document, Embedding, Job, Point, Prepared, Prompt, Result
from tests.conftest import picture_bytes, wait_until

ONE = (Prompt("dog", box=Box(5, 5, 40, 40)),)


class MemoryDoor:
    """A door of lists. `faults` are raised by the first deliveries."""

    def __init__(self, jobs: Sequence[Job], faults: Sequence[Exception] = ()) -> None:
        self.waiting, self.faults = list(jobs), list(faults)
        self.handed = 0
        self.delivered: dict[str, list[Document]] = {}
        self.rejected: dict[str, SamPollError] = {}
        self.released: list[str] = []
        self.lock = threading.Lock()

    def jobs(self, stop: threading.Event) -> Iterator[Job]:
        for job in self.waiting:
            if stop.is_set():
                return
            self.handed += 1
            yield job

    def deliver(self, job: Job, documents: Sequence[Document]) -> None:
        with self.lock:
            if self.faults:
                raise self.faults.pop(0)
            assert job.id not in self.delivered
            self.delivered[job.id] = list(documents)

    def reject(self, job: Job, error: SamPollError) -> None:
        self.rejected[job.id] = error

    def release(self, job: Job) -> None:
        self.released.append(job.id)


def job(name: str, seed: int = 0, prompts: Any = ONE, **more: Any) -> Job:
    return Job(name, f"{name}.jpg", picture_bytes(seed=seed), prompts, **more)


def run(door: MemoryDoor, engine: Any = None, stop: threading.Event | None = None, **more: Any) -> Pipeline:
    made = formats.load(["mask"], formats.FormatOptions())
    sizes = Sizes(**{k: more.pop(k) for k in list(more) if k in Sizes.__dataclass_fields__})
    pipeline = Pipeline(engine or FakeEngine(), made, sizes=sizes, **more)
    pipeline.run(door, stop or threading.Event())
    return pipeline


def test_every_job_gets_exactly_one_answer() -> None:
    door = MemoryDoor([job(f"j{n}", n) for n in range(300)])
    stats = run(door).stats.now()
    assert len(door.delivered) == 300
    assert (stats.answered, stats.rejected, stats.at_work) == (300, 0, 0)
    assert not door.rejected
    assert not door.released


def test_masks_come_in_the_prompts_order_with_their_labels() -> None:
    prompts = (
        Prompt("a", box=Box(2, 2, 20, 20)),
        Prompt("b", points=(Point(40, 30),)),
        Prompt("c", box=Box(30, 2, 60, 20)),
    )
    results: list[Result] = []
    run(MemoryDoor([job("j", prompts=prompts)]), on_result=results.append)
    (result,) = results
    assert [m.label for m in result.masks] == ["a", "b", "c"]
    assert [m.left < 25 for m in result.masks] == [True, False, False]
    assert set(result.timings) >= {"decode", "encode", "predict", "masks", "formats", "deliver", "total"}


def test_a_clipped_box_is_said_in_the_result() -> None:
    results: list[Result] = []
    run(MemoryDoor([job("j", prompts=(Prompt(box=Box(-2, 5, 30, 30)),))]), on_result=results.append)
    assert any("clipped" in note for note in results[0].notes)


def test_the_same_picture_is_encoded_once_as_long_as_it_is_remembered() -> None:
    engine = FakeEngine(batch=1)
    run(MemoryDoor([job(f"j{n}", seed=0) for n in range(10)]), engine)
    assert engine.calls["encode"] == 1
    engine = FakeEngine(batch=1)
    run(MemoryDoor([job(f"j{n}", seed=n % 2) for n in range(10)]), engine, cache_mib=0, decode_threads=1)
    assert engine.calls["encode"] == 10


class Batches(FakeEngine):
    """Remembers how many pictures came at once, and which threads came."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.sizes: list[int] = []
        self.threads: set[int] = set()

    def encode(self, pictures: Sequence[Prepared]) -> list[Embedding]:
        self.sizes.append(len(pictures))
        self.threads.add(threading.get_ident())
        return super().encode(pictures)


def test_what_is_ready_is_encoded_together_up_to_the_batch_size_by_one_thread() -> None:
    gate = threading.Event()
    engine = Batches(batch=4, gate=gate)
    door = MemoryDoor([job(f"j{n}", n) for n in range(24)])
    thread = threading.Thread(target=run, args=(door, engine), kwargs={"queue": 12})
    thread.start()
    wait_until(lambda: door.handed >= 16)
    gate.set()
    thread.join(60)
    assert len(door.delivered) == 24
    assert max(engine.sizes) == 4
    assert sum(engine.sizes) == 24
    assert len(engine.threads) == 1


def test_a_failing_batch_is_tried_picture_by_picture_and_only_the_culprit_is_rejected() -> None:
    class Picky(Batches):
        def encode(self, pictures: Sequence[Prepared]) -> list[Embedding]:
            made = super().encode(pictures)
            if any(p.pixels.mean() > 200 for p in pictures):
                raise ValueError("too bright")
            return made

    bright = cv2.imencode(".png", np.full((48, 64, 3), 250, np.uint8))[1].tobytes()
    jobs = [job(f"j{n}", n) for n in range(6)] + [Job("bright", "bright.png", bright, ONE)]
    door = MemoryDoor(jobs)
    run(door, Picky(batch=4))
    assert len(door.delivered) == 6
    assert list(door.rejected) == ["bright"]


def test_masks_are_the_same_batched_or_not() -> None:
    doors = []
    for batch in (1, 4):
        door = MemoryDoor([job(f"j{n}", n) for n in range(8)])
        run(door, FakeEngine(batch=batch))
        doors.append({name: [d.body for d in documents] for name, documents in door.delivered.items()})
    assert doors[0] == doors[1]


def test_no_more_jobs_are_taken_than_fit_between_the_doors() -> None:
    gate = threading.Event()
    door = MemoryDoor([job(f"j{n}", n) for n in range(200)])
    engine = FakeEngine(batch=1, gate=gate)
    sizes = {"decode_threads": 2, "finish_threads": 2, "queue": 3}
    thread = threading.Thread(target=run, args=(door, engine), kwargs=sizes)
    thread.start()
    wait_until(lambda: door.handed >= 8)
    assert door.handed <= 2 + 2 + 3 + 1 + 1
    gate.set()
    thread.join(60)
    assert len(door.delivered) == 200


def test_a_sick_share_is_tried_again_and_nothing_is_rejected() -> None:
    door = MemoryDoor([job("j")], faults=[OSError(28, "No space left on device"), OSError(5, "Input/output error")])
    assert run(door).stats.now().answered == 1
    assert not door.rejected


def test_stop_while_the_share_is_sick_gives_the_job_back() -> None:
    stop = threading.Event()
    door = MemoryDoor([job("j")], faults=[OSError(28, "No space left on device")] * 1000)
    thread = threading.Thread(target=run, args=(door, None, stop))
    thread.start()
    wait_until(lambda: len(door.faults) < 1000)
    stop.set()
    thread.join(30)
    assert door.released == ["j"]


def test_a_job_the_door_already_refuses_is_rejected_without_the_engine() -> None:
    engine = FakeEngine()
    door = MemoryDoor([job("j", fault=InputError("no"))])
    run(door, engine)
    assert door.rejected["j"].reason == "no"
    assert engine.calls["encode"] == 0


def test_a_prompt_outside_its_picture_is_rejected_with_the_place() -> None:
    door = MemoryDoor([job("j", prompts=(Prompt(points=(Point(500, 5),)),))])
    run(door)
    assert door.rejected["j"].place == "points[0].x"


@pytest.mark.parametrize("call", ["encode", "decode"])
def test_a_dead_device_ends_the_run_what_was_on_it_stays_claimed_and_the_rest_goes_back(call: Any) -> None:
    engine = FakeEngine(batch=2)
    engine.fail(call, DeviceError("CUDA error: unspecified launch failure"), at=3, times=1000)
    door = MemoryDoor([job(f"j{n}", n) for n in range(20)])
    with pytest.raises(DeviceError):
        run(door, engine)
    assert not door.rejected
    on_it = door.handed - len(door.delivered) - len(door.released)
    assert 1 <= on_it <= engine.batch
    assert door.handed < 20


def test_a_listener_that_fails_does_not_undo_the_answer() -> None:
    def listen(result: Result) -> None:
        raise RuntimeError("no")

    door = MemoryDoor([job("j")])
    assert run(door, on_result=listen).stats.now().answered == 1
    assert list(door.delivered) == ["j"]
