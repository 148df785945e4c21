"""The pipeline: bounded, batched, one thread at the device, and no job takes another with it."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sam_poll import bytesof, formats, pipeline
from sam_poll.alarms import Alarms
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import ChangedError, DeviceError, InputError, LostError, SamPollError, UnfinishedError
from sam_poll.pipeline import Pipeline, Sizes
from sam_poll.safe_path import SafePath
from sam_poll.stats import Pulse, Stats
from sam_poll.types import Box, Document, Embedding, Job, Picture, Point, Prepared, Prompt, Result
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
        self.troubles: list[OSError] = []
        self.deferred: dict[str, SamPollError] = {}
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

    def release(self, job: Job, trouble: OSError | None = None) -> None:
        with self.lock:
            self.released.append(job.id)
            if trouble:
                self.troubles.append(trouble)

    def defer(self, job: Job, error: SamPollError) -> None:
        self.deferred[job.id] = error


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


def test_what_the_formats_leave_out_is_logged_once(logged: list[str]) -> None:
    made = formats.load(["yolo", "coco"], formats.FormatOptions(coco="polygon", min_area_px=1e6))
    Pipeline(FakeEngine(), made).run(MemoryDoor([job("j")]), threading.Event())
    missing = [line for line in logged if "every part of it is below the minimum area" in line]
    assert len(missing) == 1


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


# ── batches ──


class Held(FakeEngine):
    """Remembers how many pictures each encode had; `ready` says when a picture (by its turn) may be prepared."""

    def __init__(self, ready: Callable[[int], bool], **more: Any) -> None:
        super().__init__(**more)
        self.ready, self.turns = ready, itertools.count(1)  # asked by several threads, each gets a turn of its own
        self.batches: list[int] = []

    def prepare(self, picture: Picture) -> Prepared:
        wait_until(partial(self.ready, next(self.turns)))
        return super().prepare(picture)

    def encode(self, pictures: Sequence[Prepared]) -> list[Embedding]:
        self.batches.append(len(pictures))
        return super().encode(pictures)


def test_the_device_waits_for_pictures_that_are_being_decoded() -> None:
    door = MemoryDoor([job(f"j{n}", n) for n in range(4)])
    engine = Held(lambda turn: door.handed == 4, batch=4)
    run(door, engine, decode_threads=1, batch_wait_s=60.0)
    assert engine.batches == [4]


def test_but_not_longer_than_it_may() -> None:
    door = MemoryDoor([job(f"j{n}", n) for n in range(2)])
    engine = Held(lambda turn: turn == 1 or bool(door.delivered), batch=4)  # whichever job comes first
    run(door, engine, decode_threads=2, batch_wait_s=0.01)
    assert engine.batches == [1, 1]


def test_and_not_at_all_for_pictures_that_nobody_decodes() -> None:
    door = MemoryDoor([job("j")])
    run(door, FakeEngine(batch=4), batch_wait_s=3600.0)
    assert list(door.delivered) == ["j"]


def test_a_cache_smaller_than_a_batch_costs_no_second_encoding() -> None:
    door = MemoryDoor([job(f"j{n}", n) for n in range(4)])
    engine = Held(lambda turn: door.handed == 4, batch=4)
    run(door, engine, decode_threads=1, batch_wait_s=60.0, cache_mib=0)
    assert len(engine.encoded) == 4


def test_prompts_for_one_picture_in_one_batch_encode_it_once() -> None:
    door = MemoryDoor([job(f"j{n}", n // 3) for n in range(6)])
    engine = Held(lambda turn: door.handed == 6, batch=6)
    run(door, engine, decode_threads=1, batch_wait_s=60.0)
    assert engine.batches == [2]


def test_an_engine_short_of_memory_takes_the_kept_embeddings_back() -> None:
    class Short(FakeEngine):
        let_go: Callable[[], bool]
        given: list[bool]

        def relieve_by(self, let_go: Callable[[], bool]) -> None:
            self.let_go, self.given = let_go, []

        def encode(self, pictures: Sequence[Prepared]) -> list[Embedding]:
            if self.encoded:
                self.given += [self.let_go(), self.let_go()]
            return super().encode(pictures)

    door = MemoryDoor([job("first", 1), job("second", 2), job("first again", 1)])
    engine = Short(batch=1)
    run(door, engine, decode_threads=1)
    assert len(door.delivered) == 3
    assert engine.given == [True, False, True, False]
    assert len(engine.encoded) == 3


# ── suspects ──


class Counting(FakeEngine):
    """Remembers how many jobs of its door were neither over nor waiting, at each decode."""

    def __init__(self, door: MemoryDoor, **more: Any) -> None:
        super().__init__(**more)
        self.door = door
        self.at_work: dict[str, list[int]] = {}

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Any]:
        over = len(self.door.delivered) + len(self.door.rejected) + len(self.door.released)
        self.at_work.setdefault(prompts[0].label, []).append(self.door.handed - over)
        return super().decode(embedding, prompts)


def test_a_suspect_runs_with_nothing_else_at_work_and_the_others_together() -> None:
    suspect = (Prompt("suspect", box=Box(5, 5, 40, 40)),)
    jobs = [job(f"j{n}", n) for n in range(10)]
    jobs += [job(f"s{n}", n, suspect, attempt=2) for n in range(3)]
    jobs += [job(f"k{n}", n) for n in range(10)]
    door = MemoryDoor(jobs)
    engine = Counting(door, batch=1)
    run(door, engine)
    assert len(door.delivered) == 23
    assert engine.at_work["suspect"] == [1, 1, 1]
    assert max(engine.at_work["dog"]) > 1


def test_while_a_suspect_runs_no_other_job_is_taken() -> None:
    gate = threading.Event()
    door = MemoryDoor([job("suspect", attempt=2)] + [job(f"j{n}", n) for n in range(5)])
    engine = FakeEngine(batch=1, gate=gate)
    intake = Pulse()
    thread = threading.Thread(target=run, args=(door, engine), kwargs={"intake": intake})
    thread.start()
    wait_until(lambda: engine.calls["encode"])
    beaten = intake._last
    wait_until(lambda: intake._last > beaten)  # the intake lives, and waits
    assert door.handed == 1
    gate.set()
    thread.join(60)
    assert len(door.delivered) == 6


def test_a_suspect_is_not_begun_beside_others_when_the_run_is_to_end() -> None:
    gate, stop = threading.Event(), threading.Event()
    door = MemoryDoor([job("j"), job("suspect", 1, attempt=2)])
    engine = Counting(door, batch=1, gate=gate)
    thread = threading.Thread(target=run, args=(door, engine, stop))
    thread.start()
    wait_until(lambda: door.handed == 2)
    stop.set()
    wait_until(lambda: door.released)
    gate.set()
    thread.join(60)
    assert door.released == ["suspect"]
    assert list(door.delivered) == ["j"]


# ── pictures that are not what they should be ──


def test_an_unfinished_picture_is_put_off_and_not_rejected() -> None:
    door = MemoryDoor([job("short", nbytes=10**6), job("other", sha256="0" * 64), job("good", 3)])
    stats = run(door).stats.now()
    assert sorted(door.deferred) == ["other", "short"]
    assert list(door.delivered) == ["good"]
    assert (stats.at_work, stats.rejected) == (0, 0)


def test_an_unfinished_picture_that_has_had_its_time_is_rejected() -> None:
    door = MemoryDoor([job("j", fault=UnfinishedError("is cut off"))])
    run(door)
    assert door.rejected["j"].reason == "is cut off"
    assert not door.deferred


def test_what_was_found_in_a_picture_that_changed_meanwhile_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dog.jpg"
    path.write_bytes(b"no picture at all")
    really = bytesof.read

    def read(picture: SafePath) -> Any:
        found = really(picture)
        path.write_bytes(picture_bytes())
        return found

    monkeypatch.setattr(bytesof, "read", read)
    door = MemoryDoor([Job("j", "j.jpg", SafePath.beside(path), ONE)])
    run(door)
    assert isinstance(door.deferred["j"], ChangedError)
    assert not door.rejected


def unreadable(monkeypatch: pytest.MonkeyPatch, works: Sequence[str] = ()) -> list[float]:
    """Pictures of other names cannot be read. Returns when each was tried."""
    tried: list[float] = []

    def read(path: SafePath) -> Any:
        tried.append(time.monotonic())
        if path.name in works:
            return picture_bytes(), None
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(bytesof, "read", read)
    monkeypatch.setattr(bytesof, "check_unchanged", lambda path, seen: None)
    return tried


def test_a_picture_that_cannot_be_read_goes_back_with_its_trouble_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unreadable(monkeypatch, works=["good.jpg"])
    jobs = [
        Job(f"{n}-{name}", "", SafePath.beside(Path(f"{name}.jpg")), ONE) for n in range(4) for name in ("bad", "good")
    ]
    door = MemoryDoor(jobs)
    stats = run(door, decode_threads=1).stats.now()
    assert len(door.delivered) == 4
    assert [trouble.errno for trouble in door.troubles] == [errno.EIO] * 4
    assert (stats.rejected, stats.at_work) == (0, 0)


def test_three_unreadable_pictures_in_a_row_pause_the_intake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "_SICK_S", 0.3)
    tried = unreadable(monkeypatch)
    door = MemoryDoor([Job(f"j{n}", "", SafePath.beside(Path("bad.jpg")), ONE) for n in range(20)])
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(door, None, stop), kwargs={"decode_threads": 1, "queue": 0})
    thread.start()
    wait_until(lambda: len(tried) > 9)
    handed = door.handed
    stop.set()
    thread.join(60)
    assert handed < 20
    assert max(after - before for before, after in pairwise(tried)) > 0.25
    assert len(door.released) == door.handed


# ── answers that cannot be put away ──


def test_while_an_answer_cannot_be_put_away_no_job_is_taken_and_one_alarm_tells(logged: list[str]) -> None:
    full = threading.Event()
    full.set()

    class Full(MemoryDoor):
        tries = 0

        def deliver(self, job: Job, documents: Sequence[Document]) -> None:
            if full.is_set():
                self.tries += 1
                raise OSError(errno.ENOSPC, "No space left on device", f"/share/out/{job.id}")
            super().deliver(job, documents)

    alarms = Alarms()
    door = Full([job(f"j{n}", n) for n in range(100)])
    thread = threading.Thread(target=run, args=(door, FakeEngine(batch=1)), kwargs={"alarms": alarms})
    thread.start()
    wait_until(lambda: door.tries >= 4)
    handed = door.handed
    tries = door.tries
    wait_until(lambda: door.tries >= tries + 2)
    assert door.handed == handed < 20
    assert "output" in alarms
    full.clear()
    thread.join(60)
    assert len(door.delivered) == 100
    assert "output" not in alarms
    assert sum("ERROR alarm (output)" in line for line in logged) == 1


@pytest.mark.parametrize("number", [errno.EISDIR, errno.ENAMETOOLONG, errno.EILSEQ, errno.ENOTDIR, errno.EEXIST])
def test_an_answer_that_can_have_no_such_name_is_a_refusal(number: int) -> None:
    door = MemoryDoor([job("j")], faults=[OSError(number, "no such name")])
    run(door)
    assert "cannot be written" in door.rejected["j"].reason
    assert not door.delivered


@pytest.mark.parametrize("number", [errno.EISDIR, errno.ENOTDIR, errno.ENOSPC])
def test_a_refusal_that_cannot_be_written_waits_until_it_can(number: int) -> None:
    faults = [OSError(number, "not now"), OSError(number, "not now")]

    class Refusing(MemoryDoor):
        def reject(self, job: Job, error: SamPollError) -> None:
            if faults:
                raise faults.pop()
            super().reject(job, error)

    door = Refusing([job("j", fault=InputError("no"))])
    alarms = Alarms()
    stats = run(door, alarms=alarms).stats.now()
    assert door.rejected["j"].reason == "no"
    assert (stats.rejected, stats.at_work) == (1, 0)
    assert not alarms.active()


@pytest.mark.parametrize("when", ["deliver", "reject", "release", "defer"])
def test_a_job_that_another_daemon_has_taken_over_is_let_go(when: str) -> None:
    class Lost(MemoryDoor):
        pass

    def lost(*args: Any) -> None:
        raise LostError("another daemon has taken it over")

    setattr(Lost, when, lost)
    more: dict[str, Any] = {"deliver": {}, "reject": {"fault": InputError("no")}, "defer": {"nbytes": 1}}.get(when, {})
    picture = (
        {"picture": SafePath.beside(Path("/nowhere/dog.jpg"))} if when == "release" else {"picture": picture_bytes()}
    )
    door = Lost([Job("j", "j.jpg", prompts=ONE, **picture, **more), job("k", 1)])
    stats = run(door).stats.now()
    assert stats.at_work == 0
    assert stats.released.get("lost", 0) == {"deliver": 2, "reject": 1}.get(when, 0)


def test_a_dead_device_is_told_by_its_code_in_the_counts() -> None:
    engine = FakeEngine(batch=1)
    engine.fail("encode", DeviceError("CUDA error"), times=1000)
    stats = Stats()
    with pytest.raises(DeviceError):
        run(MemoryDoor([job("j")]), engine, stats=stats)
    assert stats.now().released == {"device": 1}
    assert stats.now().at_work == 0


def test_pictures_that_are_gone_pause_nothing_however_many(tmp_path: Path) -> None:
    """They were taken over by another daemon, or taken away: neither is a sick share."""
    door = MemoryDoor([Job(f"j{n}", "", SafePath.at(tmp_path) / f"j{n}.jpg", ONE) for n in range(10)])
    done = run(door)
    assert len(door.troubles) == 10
    assert not done._is_sick()


def test_a_job_that_cannot_be_rejected_is_not_counted_as_rejected() -> None:
    class Broken(MemoryDoor):
        def reject(self, job: Job, error: SamPollError) -> None:
            raise RuntimeError("a bug")

    now = run(Broken([Job("a", "a.jpg", b"no picture", ONE)])).stats.now()
    assert (now.rejected, now.at_work, sum(now.released.values())) == (0, 0, 1)


def test_decoded_pictures_are_kept_only_for_a_format_that_draws_on_them() -> None:
    results: list[Result] = []
    for pixels in (True, False):
        run(MemoryDoor([job("j")]), pixels=pixels, on_result=results.append)
    kept, dropped = results
    assert kept.picture is not None
    assert dropped.picture is None
    assert kept.size == dropped.size


def test_a_result_tells_the_side_its_picture_was_encoded_at_whatever_the_step_is_now() -> None:
    class Changing(FakeEngine):
        def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Any]:
            found = super().decode(embedding, prompts)
            self.step = dataclasses.replace(self.step, side=512)
            return found

    results: list[Result] = []
    run(MemoryDoor([job("j")]), Changing(side=128), on_result=results.append)
    assert results[0].model.side == 128
