"""Worker pools: each job ends once, whichever worker dies."""

from __future__ import annotations

import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sam_poll.core import errors
from sam_poll.core.alarms import Alarms
from sam_poll.core.errors import DeviceError, ModelError, SamPollError
from sam_poll.core.protocols import Embedding
from sam_poll.core.stats import LoopHeartbeat
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import Job, ModelInput, OutputFile, Prompt
from sam_poll.engines.fake import FakeEngine
from sam_poll.pipeline.channel import picklable
from sam_poll.pipeline.messages import (
    Beat,
    Deliver,
    JobAnswered,
    JobStarted,
    Message,
    Ready,
    Reject,
    Reply,
)
from sam_poll.pipeline.worker_pool import WorkerPool, WorkerSpec
from sam_poll.pipeline.worker_process import ParentSourceProxy, WorkerSetup
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.source import FolderSource
from tests.conftest import BOX, Share, wait_until
from tests.support.commands import watch_command
from tests.support.worker_pools import ROOT, Trapped, drain, equipped, pool_of


def labelled(label: str) -> dict[str, Any]:
    return {"objects": [{"label": label, **BOX}]}


# ── setups of the workers (their processes import this file) ──


class Gated(FakeEngine):
    """Encodes only while the file `gate` is not there."""

    def __init__(self, gate: Path) -> None:
        super().__init__()
        self.path = gate

    def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
        wait_until(lambda: not self.path.exists(), 60)
        return super().encode(pictures)


def unloadable() -> WorkerSetup:
    raise ModelError("no such weights", place="here", remedy="download them")


def pids(pool: WorkerPool) -> list[int]:
    return [h.process.pid for h in pool._handles if h.process]


@contextmanager
def watching(share: Share, pool: WorkerPool, **more: Any) -> Iterator[FolderSource]:
    """Run the pool on the share in a thread, until the end of the block."""
    stop = threading.Event()
    with FolderSource(
        share.layout, FolderOptions(settle_s=0.0, mode="poll", rescan_s=0.1), **more
    ) as source:
        thread = threading.Thread(target=pool.run, args=(source, stop))
        thread.start()
        try:
            yield source
        finally:
            stop.set()
            thread.join(60)
            assert not thread.is_alive()


# ── answers ──


@pytest.mark.slow
def test_two_workers_answer_every_job_once_with_the_outputs_of_one_pipeline(
    share: Share, tmp_path: Path
) -> None:
    alone = Share(tmp_path / "alone")
    for where in (share, alone):
        for number in range(30):
            where.pair(f"p{number:02}", seed=number)
    with pool_of(equipped) as pool:
        drain(share, pool)
        assert pool.stats.now().answered == 30
        assert pool.stats.now().at_work == 0
        assert "cpu #0, cpu #1" in pool.info.device
    alone.run_once()
    names = share.tree("output")
    assert names == alone.tree("output")
    assert [(share.output / n).read_bytes() for n in names] == [
        (alone.layout.output.path / n).read_bytes() for n in names
    ]
    assert (share.tree("input"), share.tree("work")) == ([], [])


@pytest.mark.slow
def test_both_workers_get_jobs(share: Share, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    for number in range(30):
        share.pair(f"p{number:02}", seed=number)
    with pool_of(partial(equipped, Gated, gate)) as pool, watching(share, pool):
        wait_until(lambda: all(len(h.jobs) > 1 for h in pool._handles))
        gate.unlink()
        wait_until(lambda: pool.stats.now().answered == 30)
        assert all(h.answered for h in pool._handles)


@pytest.mark.slow
def test_bad_jobs_are_rejected_with_the_codes_that_one_pipeline_gives(share: Share) -> None:
    share.pair("good")
    share.drop("cut.jpg", b"\xff\xd8\xff\xe0")
    share.drop("cut.json", BOX)
    share.pair("odd", prompt={"box": {"x0": 1000, "y0": 1000, "x1": 1100, "y1": 1100}})
    with pool_of(equipped) as pool:
        drain(share, pool)
        assert (pool.stats.now().answered, pool.stats.now().rejected) == (1, 2)
    assert share.error("odd")["code"] == "prompt"
    assert share.error("cut")["code"] == "picture"


# ── workers that die ──


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_jobs_are_answered(
    share: Share, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    for number in range(20):
        share.pair(f"p{number:02}", seed=number)
    with pool_of(partial(equipped, Gated, gate)) as pool, watching(share, pool):
        first = pids(pool)
        wait_until(lambda: all(len(h.started) > 1 for h in pool._handles))
        os.kill(first[0], signal.SIGKILL)
        wait_until(lambda: pids(pool)[0] != first[0])
        gate.unlink()
        wait_until(lambda: pool.stats.now().answered == 20)
        assert pids(pool)[1] == first[1]
        assert sum(pool.stats.now().released.values()) > 0
        assert pool.stats.now().at_work == 0
    assert len(share.tree("output")) == 20
    assert share.tree("failed") == []


@pytest.mark.slow
def test_a_job_that_kills_every_worker_is_rejected_as_poison_and_the_others_are_answered(
    share: Share,
) -> None:
    share.pair("bad", prompt=labelled("crash"))
    for number in range(12):
        share.pair(f"p{number:02}", seed=number)
    with pool_of(equipped_with_traps) as pool:
        drain(share, pool, attempts=2)
    assert share.error("bad")["code"] == "poison"
    assert len(share.tree("output")) == 12
    assert share.tree("work") == []


def equipped_with_traps() -> WorkerSetup:
    return equipped(Trapped)


@pytest.mark.slow
def test_a_device_that_fails_once_gets_a_new_worker_and_the_job_is_answered(
    share: Share, tmp_path: Path, logged: list[str]
) -> None:
    share.pair("dog", prompt=labelled("once device"))
    with pool_of(partial(equipped, Trapped, tmp_path / "done")) as pool:
        drain(share, pool)
        assert pool.stats.now().answered == 1
        assert pool.stats.now().released == {"device": 1}
    assert share.tree("output") == ["dog.mask.png"]
    assert any("injected" in line and "the next one starts" in line for line in logged)


@pytest.mark.slow
def test_a_device_whose_workers_keep_dying_ends_the_run_and_no_job_is_lost(share: Share) -> None:
    for number in range(8):
        share.pair(f"p{number}", prompt=labelled("device"), seed=number)
    with (
        pool_of(equipped_with_traps) as pool,
        pytest.raises(DeviceError, match="processes in a row"),
    ):
        drain(share, pool, attempts=100)
    kept = [name for name in share.tree("input") + list(share.at_work()) if name.endswith(".json")]
    assert sorted(kept) == [f"p{n}.json" for n in range(8)]
    assert share.tree("failed") == []


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_raises_its_error_on_entering() -> None:
    with pytest.raises(ModelError, match="no such weights") as caught, pool_of(unloadable):
        pass
    assert (caught.value.place, caught.value.remedy) == ("here", "download them")


def test_a_worker_that_dies_at_its_start_raises_device_error_on_entering() -> None:
    command = [sys.executable, "-c", "raise SystemExit(9)"]
    with pytest.raises(DeviceError, match="ended with 9"), pool_of(equipped, command=command):
        pass


def test_a_worker_that_cannot_be_started_any_more_is_given_up() -> None:
    pool = WorkerPool(
        [WorkerSpec("a", equipped, {})], threading.Event(), command=["/not/there"], pause_s=0.0
    )
    state, (supervisor,) = pool._state, pool._supervisors
    state.ready, state.handles[0].answered = True, 5
    supervisor.start()
    try:
        wait_until(lambda: not supervisor.is_alive())
        assert isinstance(state.fatal, DeviceError)
    finally:
        state.ending = True


# ── stop ──


def test_jobs_that_a_worker_has_not_begun_at_the_end_are_requeued_although_the_share_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = ParentSourceProxy(Recorder(), threading.Event())  # type: ignore[arg-type]
    back: list[Any] = []

    def requeue(job: Job) -> None:
        back.append(job.source_ref)
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(source, "requeue", requeue)
    for number in range(3):
        source._inbox.put(Job(f"j{number}", "x", b"", (Prompt(),), source_ref=number))
    jobs = source.jobs(threading.Event())
    assert next(jobs).source_ref == 0
    jobs.close()
    assert back == [1, 2]


@pytest.mark.slow
def test_stop_finishes_the_jobs_in_progress_and_ends_the_workers(
    share: Share, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    for number in range(40):
        share.pair(f"p{number:02}", seed=number)
    with pool_of(partial(equipped, Gated, gate)) as pool:
        with watching(share, pool):
            wait_until(lambda: all(h.started for h in pool._handles))
            gate.unlink()
            wait_until(lambda: pool.stats.now().answered)
        assert all(h.process and h.process.returncode == 0 for h in pool._handles)
    answered = len(share.tree("output"))
    assert len([n for n in share.tree("input") if n.endswith(".json")]) == 40 - answered
    assert share.tree("work") == []


def test_a_stop_does_not_wait_for_a_worker_that_is_being_started(
    share: Share, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    share.pair("dog", prompt=labelled("once crash"))
    with pool_of(partial(slow_to_come_back, gate), count=1) as pool:
        with watching(share, pool):
            wait_until(
                lambda: pool._handles[0].process and gate.exists() and not pool._handles[0].info
            )
            again = pids(pool)
            wait_until(lambda: pids(pool) != again)
        assert pool.stats.now().at_work == 0
    assert [
        name for name in [*share.tree("input"), *share.at_work()] if name.endswith(".json")
    ] == ["dog.json"]


def slow_to_come_back(gate: Path) -> WorkerSetup:
    """Ready at once the first time, and not for an hour the second."""
    if gate.exists():
        threading.Event().wait(3600)
    gate.touch()
    return equipped(Trapped, gate.with_name("once"))


def test_a_worker_that_hangs_is_killed_at_the_end_and_its_jobs_are_requeued_without_an_attempt(
    share: Share, tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    share.pair("dog")
    with pool_of(partial(equipped, Gated, gate), count=1, drain_s=-4.9) as pool:
        with watching(share, pool):
            wait_until(lambda: pool._handles[0].started)
        assert share.tree("input") == ["dog.jpg", "dog.json"]
        assert pool.stats.now().at_work == 0


def test_the_workers_end_with_their_parent(share: Share) -> None:
    command = watch_command(share)
    env = {**os.environ, "SAM_POLL_DEVICES": "cpu,cpu", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as daemon:
        try:
            assert daemon.stderr
            assert any("watching" in line for line in daemon.stderr)
            children = Path(f"/proc/{daemon.pid}/task/{daemon.pid}/children").parent.parent
            listed = [c.read_text().split() for c in children.glob("*/children")]
            started = [int(pid) for pids in listed for pid in pids]
            assert len(started) == 2
        finally:
            daemon.kill()
    wait_until(lambda: not any(alive(pid) for pid in started))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_an_answer_is_counted_even_if_its_worker_dies_before_counting_it(share: Share) -> None:
    class Source:
        def deliver(self, *_: Any) -> None: ...
        def reject(self, *_: Any) -> None: ...
        def fail_attempt(self, *_: Any) -> None: ...

    pool = WorkerPool([WorkerSpec("a", equipped, {})], threading.Event())
    (handle,), (supervisor,) = pool._handles, pool._supervisors
    pool._state.source, handle.channel = Source(), Recorder()  # type: ignore[assignment]
    for name in ("delivered", "rejected", "neither"):
        handle.wants_job = True
        pool.stats.started()
        assert pool._assign(Job(name, name, b"", (Prompt(),)))
    supervisor._call_source(Deliver(1, []))
    supervisor._call_source(Reject(2, errors.PromptError("odd")))
    supervisor._receive(JobStarted(3))
    handle.ooms = 3
    handle.process = subprocess.Popen([sys.executable, "-c", ""])
    supervisor._reap()
    now = pool.stats.now()
    assert (now.answered, now.rejected, now.released, now.at_work) == (1, 1, {"device": 1}, 0)
    assert pool.ooms == 3  # a counter that others watch does not go back with a new process
    assert now.reasons == {"prompt": 1}


class Quick(ThreadPoolExecutor):
    """Waits until the call is done before it returns, unless the call is blocked."""

    def submit(self, act: Any, *arguments: Any) -> Future[None]:  # type: ignore[override]
        begun = super().submit(act, *arguments)
        wait([begun], 0.2)
        return begun


def test_an_ended_job_leaves_no_state_and_only_its_own_worker_gets_the_reply() -> None:
    class Source:
        def deliver(self, *_: Any) -> None:
            handle.channel = later  # type: ignore[assignment]

    pool = WorkerPool([WorkerSpec("a", equipped, {})], threading.Event())
    (handle,), (supervisor,) = pool._handles, pool._supervisors
    first, later = Recorder(), Recorder()
    pool._state.source, pool._state.writers = Source(), Quick(1)  # type: ignore[assignment]
    handle.channel, handle.wants_job = first, True  # type: ignore[assignment]
    assert pool._assign(Job("dog", "dog", b"", (Prompt(),)))
    supervisor._receive(JobStarted(1))
    supervisor._receive(Deliver(1, []))
    pool._state.writers.shutdown()
    supervisor._receive(JobAnswered("dog", 1, {}))
    assert not any([handle.jobs, handle.started, handle.calls, handle.ended_uncounted])
    assert (first.sent[-1], later.sent) == (Reply(1, None), [])


# ── alarms and heartbeats ──


@pytest.mark.slow
def test_a_share_that_fails_is_one_alarm_and_the_outputs_wait(
    share: Share, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    full = threading.Event()
    full.set()
    deliver = FolderSource.deliver

    def refusing(self: FolderSource, job: Job, documents: Sequence[OutputFile]) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        deliver(self, job, documents)

    monkeypatch.setattr(FolderSource, "deliver", refusing)
    for number in range(6):
        share.pair(f"p{number}", seed=number)
    alarms = Alarms()
    with (
        pool_of(equipped, telemetry=Telemetry(alarms=alarms)) as pool,
        watching(share, pool, alarms=alarms),
    ):
        wait_until(lambda: "output" in alarms)
        assert "No space left" in alarms.active()[0].message
        full.clear()
        wait_until(lambda: pool.stats.now().answered == 6)
        wait_until(lambda: "output" not in alarms)
    assert len(share.tree("output")) == 6


def test_the_pools_heartbeat_is_as_old_as_that_of_its_slowest_worker() -> None:
    pulse = LoopHeartbeat()
    pool = WorkerPool(
        [WorkerSpec("a", equipped, {}), WorkerSpec("b", equipped, {})],
        threading.Event(),
        telemetry=Telemetry(device=pulse),
    )
    info = FakeEngine().info
    one, two = pool._supervisors
    for supervisor in (one, two):
        supervisor._receive(Ready(info))
    two._receive(Beat(100.0, info, 1))
    one._receive(Beat(1.0, info, 2))
    assert 100 <= pulse.age < 1000
    assert pool.ooms == 3


class Recorder:
    """A channel that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Message) -> None:
        self.sent.append(message)

    def close(self) -> None: ...


def test_further_prompts_of_a_picture_go_to_the_worker_that_has_its_embedding() -> None:
    pool = WorkerPool(
        [WorkerSpec("a", equipped, {}), WorkerSpec("b", equipped, {})],
        threading.Event(),
    )
    channels = [Recorder(), Recorder()]
    for handle, channel in zip(pool._handles, channels, strict=True):
        handle.channel = channel  # type: ignore[assignment]
    for number, (name, free) in enumerate(
        [("x", [1]), ("y", [0]), ("x", [0, 1]), ("y", [0, 1]), ("x", [0])]
    ):
        for index, handle in enumerate(pool._handles):
            handle.wants_job = index in free
        assert pool._assign(
            Job(f"j{number}", "picture.jpg", name.encode(), (Prompt(),))
        )  # bytes: by what they are
    given = [[message.job.id for message in channel.sent] for channel in channels]
    assert given == [["j1", "j3", "j4"], ["j0", "j2"]]


# ── errors on the way ──


def kinds(base: type[SamPollError] = SamPollError) -> Iterator[type[SamPollError]]:
    yield base
    for kind in base.__subclasses__():
        yield from kinds(kind)


@pytest.mark.parametrize(
    "kind",
    sorted({k for k in kinds() if k.__module__ == errors.__name__}, key=lambda k: k.__name__),
)
def test_errors_of_this_program_are_pickled_whole(kind: type[SamPollError]) -> None:
    error = kind("a reason", place="a place", remedy="a remedy")
    assert picklable(error) is error
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.reason, copy.place, copy.remedy, str(copy)) == (
        error.reason,
        error.place,
        error.remedy,
        str(error),
    )


def test_an_error_that_cannot_be_pickled_is_replaced_by_one_with_its_text() -> None:
    class Local(Exception):
        """Nobody else can import it."""

    copy = picklable(Local("what happened"))
    assert type(copy) is RuntimeError
    assert "what happened" in str(copy)


# ── attempts ──


def test_a_job_whose_worker_died_is_offered_again_as_a_further_attempt(share: Share) -> None:
    share.pair("dog")
    with FolderSource(
        share.layout, FolderOptions(settle_s=0.0, rescan_s=0.1, mode="poll")
    ) as source:
        jobs = source.jobs(threading.Event())
        attempts = []
        for _ in range(3):
            job = next(jobs)
            attempts.append(job.attempt)
            source.fail_attempt(job)
        assert attempts == [1, 2, 3]
        source.requeue(next(jobs))
        assert next(jobs).attempt == 1
