"""The pipeline: bounded, batched, one device thread, and one job's error ends no other job."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sam_poll.core.alarms import Alarms
from sam_poll.core.errors import (
    ClaimLostError,
    DeviceError,
    FileChangedError,
    IncompleteFileError,
    InputError,
    SamPollError,
)
from sam_poll.core.protocols import Embedding
from sam_poll.core.safe_path import SafePath
from sam_poll.core.stats import LoopHeartbeat, Stats
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import Box, Job, ModelInput, OutputFile, Picture, Point, Prompt, Result
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry
from sam_poll.imaging import source_file
from sam_poll.pipeline import run_context
from sam_poll.pipeline.pipeline import Pipeline
from tests.conftest import picture_bytes, wait_until
from tests.support.pipelines import ONE, MemorySource, job, run


@pytest.mark.slow
def test_every_job_gets_exactly_one_answer() -> None:
    source = MemorySource([job(f"j{n}", n) for n in range(300)])
    stats = run(source).stats.now()
    assert len(source.delivered) == 300
    assert (stats.answered, stats.rejected, stats.at_work) == (300, 0, 0)
    assert not source.rejected
    assert not source.released


def test_masks_come_in_the_prompts_order_with_their_labels() -> None:
    prompts = (
        Prompt("a", box=Box(2, 2, 20, 20)),
        Prompt("b", points=(Point(40, 30),)),
        Prompt("c", box=Box(30, 2, 60, 20)),
    )
    results: list[Result] = []
    run(MemorySource([job("j", prompts=prompts)]), on_result=results.append)
    (result,) = results
    assert [m.label for m in result.masks] == ["a", "b", "c"]
    assert [m.left < 25 for m in result.masks] == [True, False, False]
    assert set(result.timings) >= {
        "decode",
        "encode",
        "predict",
        "masks",
        "formats",
        "deliver",
        "total",
    }


def test_a_clipped_box_is_a_note_of_the_result() -> None:
    results: list[Result] = []
    run(
        MemorySource([job("j", prompts=(Prompt(box=Box(-2, 5, 30, 30)),))]),
        on_result=results.append,
    )
    assert any("clipped" in note for note in results[0].notes)


def test_objects_that_the_formats_leave_out_are_logged_once(logged: list[str]) -> None:
    made = registry.load(["yolo", "coco"], registry.FormatOptions(coco="polygon", min_area_px=1e6))
    Pipeline(FakeEngine(), made).run(MemorySource([job("j")]), threading.Event())
    missing = [line for line in logged if "every part of it is below the minimum area" in line]
    assert len(missing) == 1


def test_a_picture_is_encoded_once_while_its_embedding_is_cached() -> None:
    engine = FakeEngine(batch=1)
    run(MemorySource([job(f"j{n}", seed=0) for n in range(10)]), engine)
    assert engine.calls["encode"] == 1
    engine = FakeEngine(batch=1)
    run(
        MemorySource([job(f"j{n}", seed=n % 2) for n in range(10)]),
        engine,
        cache_mib=0,
        decode_threads=1,
    )
    assert engine.calls["encode"] == 10


class Batches(FakeEngine):
    """Records how many pictures were encoded at once, and by which threads."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.sizes: list[int] = []
        self.threads: set[int] = set()

    def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
        self.sizes.append(len(pictures))
        self.threads.add(threading.get_ident())
        return super().encode(pictures)


def test_ready_pictures_are_encoded_together_up_to_the_batch_size_by_one_thread() -> None:
    gate = threading.Event()
    engine = Batches(batch=4, gate=gate)
    source = MemorySource([job(f"j{n}", n) for n in range(24)])
    thread = threading.Thread(target=run, args=(source, engine), kwargs={"queue": 12})
    thread.start()
    wait_until(lambda: source.handed >= 16)
    gate.set()
    thread.join(60)
    assert len(source.delivered) == 24
    assert max(engine.sizes) == 4
    assert sum(engine.sizes) == 24
    assert len(engine.threads) == 1


def test_a_failing_batch_is_retried_picture_by_picture_and_only_the_culprit_is_rejected() -> None:
    class Picky(Batches):
        def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
            made = super().encode(pictures)
            if any(p.pixels.mean() > 200 for p in pictures):
                raise ValueError("too bright")
            return made

    bright = cv2.imencode(".png", np.full((48, 64, 3), 250, np.uint8))[1].tobytes()
    jobs = [job(f"j{n}", n) for n in range(6)] + [Job("bright", "bright.png", bright, ONE)]
    source = MemorySource(jobs)
    run(source, Picky(batch=4))
    assert len(source.delivered) == 6
    assert list(source.rejected) == ["bright"]


def test_masks_are_the_same_batched_or_not() -> None:
    sources = []
    for batch in (1, 4):
        source = MemorySource([job(f"j{n}", n) for n in range(8)])
        run(source, FakeEngine(batch=batch))
        sources.append(
            {name: [d.body for d in documents] for name, documents in source.delivered.items()}
        )
    assert sources[0] == sources[1]


def test_the_number_of_jobs_in_progress_is_bounded() -> None:
    gate = threading.Event()
    source = MemorySource([job(f"j{n}", n) for n in range(200)])
    engine = FakeEngine(batch=1, gate=gate)
    sizes = {"decode_threads": 2, "finish_threads": 2, "queue": 3}
    thread = threading.Thread(target=run, args=(source, engine), kwargs=sizes)
    thread.start()
    wait_until(lambda: source.handed >= 8)
    assert source.handed <= 2 + 2 + 3 + 1 + 1
    gate.set()
    thread.join(60)
    assert len(source.delivered) == 200


def test_delivery_is_retried_while_the_share_fails_and_nothing_is_rejected() -> None:
    source = MemorySource(
        [job("j")],
        faults=[OSError(28, "No space left on device"), OSError(5, "Input/output error")],
    )
    assert run(source).stats.now().answered == 1
    assert not source.rejected


def test_a_stop_while_the_share_fails_requeues_the_job() -> None:
    stop = threading.Event()
    source = MemorySource([job("j")], faults=[OSError(28, "No space left on device")] * 1000)
    thread = threading.Thread(target=run, args=(source, None, stop))
    thread.start()
    wait_until(lambda: len(source.faults) < 1000)
    stop.set()
    thread.join(30)
    assert source.released == ["j"]


def test_a_job_that_its_source_refuses_is_rejected_without_the_engine() -> None:
    engine = FakeEngine()
    source = MemorySource([job("j", error=InputError("no"))])
    run(source, engine)
    assert source.rejected["j"].reason == "no"
    assert engine.calls["encode"] == 0


def test_a_prompt_outside_its_picture_is_rejected_with_the_place() -> None:
    source = MemorySource([job("j", prompts=(Prompt(points=(Point(500, 5),)),))])
    run(source)
    assert source.rejected["j"].place == "points[0].x"


@pytest.mark.parametrize("call", ["encode", "decode"])
def test_a_failed_device_ends_the_run_its_jobs_stay_claimed_and_the_others_are_requeued(
    call: Any,
) -> None:
    engine = FakeEngine(batch=2)
    engine.fail(call, DeviceError("CUDA error: unspecified launch failure"), at=3, times=1000)
    source = MemorySource([job(f"j{n}", n) for n in range(20)])
    with pytest.raises(DeviceError):
        run(source, engine)
    assert not source.rejected
    on_it = source.handed - len(source.delivered) - len(source.released)
    assert 1 <= on_it <= engine.batch
    assert source.handed < 20


def test_a_listener_that_fails_does_not_undo_the_answer() -> None:
    def listen(result: Result) -> None:
        raise RuntimeError("no")

    source = MemorySource([job("j")])
    assert run(source, on_result=listen).stats.now().answered == 1
    assert list(source.delivered) == ["j"]


# ── batches ──


class Held(FakeEngine):
    """Records the size of each batch; `ready`: whether the picture of a turn may be prepared."""

    def __init__(self, ready: Callable[[int], bool], **more: Any) -> None:
        super().__init__(**more)
        self.ready, self.turns = (
            ready,
            itertools.count(1),
        )  # asked by several threads, each gets a turn of its own
        self.batches: list[int] = []

    def prepare(self, picture: Picture) -> ModelInput:
        wait_until(partial(self.ready, next(self.turns)))
        return super().prepare(picture)

    def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
        self.batches.append(len(pictures))
        return super().encode(pictures)


def test_the_device_waits_for_pictures_that_are_being_decoded() -> None:
    source = MemorySource([job(f"j{n}", n) for n in range(4)])
    engine = Held(lambda turn: source.handed == 4, batch=4)
    run(source, engine, decode_threads=1, batch_wait_s=60.0)
    assert engine.batches == [4]


def test_the_device_waits_no_longer_than_batch_wait_s() -> None:
    source = MemorySource([job(f"j{n}", n) for n in range(2)])
    engine = Held(
        lambda turn: turn == 1 or bool(source.delivered), batch=4
    )  # whichever job comes first
    run(source, engine, decode_threads=2, batch_wait_s=0.01)
    assert engine.batches == [1, 1]


def test_the_device_does_not_wait_while_no_picture_is_being_decoded() -> None:
    source = MemorySource([job("j")])
    run(source, FakeEngine(batch=4), batch_wait_s=3600.0)
    assert list(source.delivered) == ["j"]


def test_a_cache_smaller_than_a_batch_costs_no_second_encoding() -> None:
    source = MemorySource([job(f"j{n}", n) for n in range(4)])
    engine = Held(lambda turn: source.handed == 4, batch=4)
    run(source, engine, decode_threads=1, batch_wait_s=60.0, cache_mib=0)
    assert len(engine.encoded) == 4


def test_prompts_for_one_picture_in_one_batch_encode_it_once() -> None:
    source = MemorySource([job(f"j{n}", n // 3) for n in range(6)])
    engine = Held(lambda turn: source.handed == 6, batch=6)
    run(source, engine, decode_threads=1, batch_wait_s=60.0)
    assert engine.batches == [2]


def test_an_engine_short_of_memory_evicts_the_cached_embeddings() -> None:
    class Short(FakeEngine):
        evict: Callable[[], bool]
        given: list[bool]

        def on_memory_pressure(self, evict: Callable[[], bool]) -> None:
            self.evict, self.given = evict, []

        def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
            if self.encoded:
                self.given += [self.evict(), self.evict()]
            return super().encode(pictures)

    source = MemorySource([job("first", 1), job("second", 2), job("first again", 1)])
    engine = Short(batch=1)
    run(source, engine, decode_threads=1)
    assert len(source.delivered) == 3
    assert engine.given == [True, False, True, False]
    assert len(engine.encoded) == 3


# ── suspects ──


class Counting(FakeEngine):
    """Records how many jobs of its source are in progress, at each decode."""

    def __init__(self, source: MemorySource, **more: Any) -> None:
        super().__init__(**more)
        self.source = source
        self.in_progress: dict[str, list[int]] = {}

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Any]:
        over = len(self.source.delivered) + len(self.source.rejected) + len(self.source.released)
        self.in_progress.setdefault(prompts[0].label, []).append(self.source.handed - over)
        return super().decode(embedding, prompts)


class CountedHeartbeat(LoopHeartbeat):
    """Counts its beats."""

    beats = 0

    def beat(self, ago: float = 0.0) -> None:
        super().beat(ago)
        self.beats += 1


def test_a_suspect_runs_alone_and_the_others_together() -> None:
    suspect = (Prompt("suspect", box=Box(5, 5, 40, 40)),)
    jobs = [job(f"j{n}", n) for n in range(10)]
    jobs += [job(f"s{n}", n, suspect, attempt=2) for n in range(3)]
    jobs += [job(f"k{n}", n) for n in range(10)]
    source = MemorySource(jobs)
    engine = Counting(source, batch=1)
    run(source, engine)
    assert len(source.delivered) == 23
    assert engine.in_progress["suspect"] == [1, 1, 1]
    assert max(engine.in_progress["dog"]) > 1


def test_while_a_suspect_runs_no_other_job_is_taken() -> None:
    gate = threading.Event()
    source = MemorySource([job("suspect", attempt=2)] + [job(f"j{n}", n) for n in range(5)])
    engine = FakeEngine(batch=1, gate=gate)
    intake = CountedHeartbeat()
    more = {"telemetry": Telemetry(intake=intake)}
    thread = threading.Thread(target=run, args=(source, engine), kwargs=more)
    thread.start()
    wait_until(lambda: engine.calls["encode"])
    beats = intake.beats
    wait_until(lambda: intake.beats > beats)  # the intake runs, and waits
    assert source.handed == 1
    gate.set()
    thread.join(60)
    assert len(source.delivered) == 6


def test_a_suspect_is_requeued_when_the_run_ends_before_it_is_alone() -> None:
    gate, stop = threading.Event(), threading.Event()
    source = MemorySource([job("j"), job("suspect", 1, attempt=2)])
    engine = Counting(source, batch=1, gate=gate)
    thread = threading.Thread(target=run, args=(source, engine, stop))
    thread.start()
    wait_until(lambda: source.handed == 2)
    stop.set()
    wait_until(lambda: source.released)
    gate.set()
    thread.join(60)
    assert source.released == ["suspect"]
    assert list(source.delivered) == ["j"]


# ── pictures that are incomplete or cannot be read ──


def test_an_incomplete_picture_is_deferred_and_not_rejected() -> None:
    source = MemorySource(
        [job("short", nbytes=10**6), job("other", sha256="0" * 64), job("good", 3)]
    )
    stats = run(source).stats.now()
    assert sorted(source.deferred) == ["other", "short"]
    assert list(source.delivered) == ["good"]
    assert (stats.at_work, stats.rejected) == (0, 0)


def test_an_incomplete_picture_that_has_had_its_time_is_rejected() -> None:
    source = MemorySource([job("j", error=IncompleteFileError("is cut off"))])
    run(source)
    assert source.rejected["j"].reason == "is cut off"
    assert not source.deferred


def test_an_error_in_a_picture_that_changes_while_it_is_read_defers_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "dog.jpg"
    path.write_bytes(b"no picture at all")
    really = source_file.read

    def read(picture: SafePath) -> Any:
        found = really(picture)
        path.write_bytes(picture_bytes())
        return found

    monkeypatch.setattr(source_file, "read", read)
    source = MemorySource([Job("j", "j.jpg", SafePath.beside(path), ONE)])
    run(source)
    assert isinstance(source.deferred["j"], FileChangedError)
    assert not source.rejected


def unreadable(monkeypatch: pytest.MonkeyPatch, works: Sequence[str] = ()) -> list[float]:
    """Pictures of other names cannot be read. Returns when each was tried."""
    tried: list[float] = []

    def read(path: SafePath) -> Any:
        tried.append(time.monotonic())
        if path.name in works:
            return picture_bytes(), None
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(source_file, "read", read)
    monkeypatch.setattr(source_file, "check_unchanged", lambda path, seen: None)
    return tried


def test_a_picture_that_cannot_be_read_is_requeued_with_its_error_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unreadable(monkeypatch, works=["good.jpg"])
    jobs = [
        Job(f"{n}-{name}", "", SafePath.beside(Path(f"{name}.jpg")), ONE)
        for n in range(4)
        for name in ("bad", "good")
    ]
    source = MemorySource(jobs)
    stats = run(source, decode_threads=1).stats.now()
    assert len(source.delivered) == 4
    assert [trouble.errno for trouble in source.troubles] == [errno.EIO] * 4
    assert (stats.rejected, stats.at_work) == (0, 0)


def test_help_that_comes_too_late_is_no_warning_and_requeues_no_job(
    tmp_path: Path, logged: list[str]
) -> None:
    late = Job("big", "", SafePath.beside(tmp_path / "gone.jpg"), ONE, is_helper=True)
    source = MemorySource([late])
    run(source)
    assert source.released == ["big"]
    assert not any("big" in line for line in logged if "WARNING" in line)


def test_three_unreadable_pictures_in_a_row_pause_the_intake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(run_context, "_PAUSE_S", 0.3)
    tried = unreadable(monkeypatch)
    source = MemorySource(
        [Job(f"j{n}", "", SafePath.beside(Path("bad.jpg")), ONE) for n in range(20)]
    )
    stop = threading.Event()
    thread = threading.Thread(
        target=run, args=(source, None, stop), kwargs={"decode_threads": 1, "queue": 0}
    )
    thread.start()
    wait_until(lambda: len(tried) > 9)
    handed = source.handed
    stop.set()
    thread.join(60)
    assert handed < 20
    assert max(after - before for before, after in pairwise(tried)) > 0.25
    assert len(source.released) == source.handed


# ── outputs that cannot be written ──


def test_while_an_output_cannot_be_written_no_job_is_taken_and_there_is_one_alarm(
    logged: list[str],
) -> None:
    full = threading.Event()
    full.set()

    class Full(MemorySource):
        tries = 0

        def deliver(self, job: Job, documents: Sequence[OutputFile]) -> None:
            if full.is_set():
                self.tries += 1
                raise OSError(errno.ENOSPC, "No space left on device", f"/share/out/{job.id}")
            super().deliver(job, documents)

    alarms = Alarms()
    source = Full([job(f"j{n}", n) for n in range(100)])
    thread = threading.Thread(
        target=run,
        args=(source, FakeEngine(batch=1)),
        kwargs={"telemetry": Telemetry(alarms=alarms)},
    )
    thread.start()
    wait_until(lambda: source.tries >= 4)
    handed = source.handed
    tries = source.tries
    wait_until(lambda: source.tries >= tries + 2)
    assert source.handed == handed < 20
    assert "output" in alarms
    full.clear()
    thread.join(60)
    assert len(source.delivered) == 100
    assert "output" not in alarms
    assert sum("ERROR alarm (output)" in line for line in logged) == 1


@pytest.mark.parametrize(
    "number", [errno.EISDIR, errno.ENAMETOOLONG, errno.EILSEQ, errno.ENOTDIR, errno.EEXIST]
)
def test_an_output_that_cannot_have_its_name_rejects_the_job(number: int) -> None:
    source = MemorySource([job("j")], faults=[OSError(number, "no such name")])
    run(source)
    assert "cannot be written" in source.rejected["j"].reason
    assert not source.delivered


@pytest.mark.parametrize("number", [errno.EISDIR, errno.ENOTDIR, errno.ENOSPC])
def test_a_rejection_that_cannot_be_written_is_retried(number: int) -> None:
    faults = [OSError(number, "not now"), OSError(number, "not now")]

    class Refusing(MemorySource):
        def reject(self, job: Job, error: SamPollError) -> None:
            if faults:
                raise faults.pop()
            super().reject(job, error)

    source = Refusing([job("j", error=InputError("no"))])
    alarms = Alarms()
    stats = run(source, telemetry=Telemetry(alarms=alarms)).stats.now()
    assert source.rejected["j"].reason == "no"
    assert (stats.rejected, stats.at_work) == (1, 0)
    assert not alarms.active()


@pytest.mark.parametrize("when", ["deliver", "reject", "requeue", "defer"])
def test_a_job_that_another_daemon_has_taken_over_is_dropped(when: str) -> None:
    class Lost(MemorySource):
        pass

    def lost(*args: Any) -> None:
        raise ClaimLostError("another daemon has taken it over")

    setattr(Lost, when, lost)
    more: dict[str, Any] = {
        "deliver": {},
        "reject": {"error": InputError("no")},
        "defer": {"nbytes": 1},
    }.get(when, {})
    picture = (
        {"picture": SafePath.beside(Path("/nowhere/dog.jpg"))}
        if when == "requeue"
        else {"picture": picture_bytes()}
    )
    source = Lost([Job("j", "j.jpg", prompts=ONE, **picture, **more), job("k", 1)])
    stats = run(source).stats.now()
    assert stats.at_work == 0
    assert stats.released.get("lost", 0) == {"deliver": 2, "reject": 1}.get(when, 0)


def test_a_failed_device_is_counted_by_its_code() -> None:
    engine = FakeEngine(batch=1)
    engine.fail("encode", DeviceError("CUDA error"), times=1000)
    stats = Stats()
    with pytest.raises(DeviceError):
        run(MemorySource([job("j")]), engine, telemetry=Telemetry(stats=stats))
    assert stats.now().released == {"device": 1}
    assert stats.now().at_work == 0


def test_pictures_that_are_gone_do_not_pause_the_intake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were taken over by another daemon, or taken away: neither is the share's failure."""
    failures: list[int] = []
    monkeypatch.setattr(run_context.ReadFailures, "add", lambda self: failures.append(1))
    source = MemorySource(
        [Job(f"j{n}", "", SafePath.at(tmp_path) / f"j{n}.jpg", ONE) for n in range(10)]
    )
    run(source)
    assert len(source.troubles) == 10
    assert not failures


def test_a_job_that_cannot_be_rejected_is_not_counted_as_rejected() -> None:
    class Broken(MemorySource):
        def reject(self, job: Job, error: SamPollError) -> None:
            raise RuntimeError("a bug")

    now = run(Broken([Job("a", "a.jpg", b"no picture", ONE)])).stats.now()
    assert (now.rejected, now.at_work, sum(now.released.values())) == (0, 0, 1)


def test_decoded_pictures_are_kept_only_for_a_format_that_draws_on_them() -> None:
    results: list[Result] = []
    for pixels in (True, False):
        run(MemorySource([job("j")]), pixels=pixels, on_result=results.append)
    kept, dropped = results
    assert kept.picture is not None
    assert dropped.picture is None
    assert kept.size == dropped.size


def test_a_result_has_the_side_at_which_its_picture_was_encoded() -> None:
    class Changing(FakeEngine):
        def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Any]:
            found = super().decode(embedding, prompts)
            self.step = dataclasses.replace(self.step, side=512)
            return found

    results: list[Result] = []
    run(MemorySource([job("j")]), Changing(side=128), on_result=results.append)
    assert results[0].model.side == 128
