"""Several processes behind one door: each job ends once, whichever of them dies."""

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

from sam_poll import errors, formats
from sam_poll.alarms import Alarms
from sam_poll.doors.folder import FolderDoor
from sam_poll.doors.scan import Manners
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import DeviceError, ModelError, SamPollError
from sam_poll.fleet import Fleet, Post
from sam_poll.member import Equipment, FarDoor
from sam_poll.pipeline import Sizes
from sam_poll.stats import Pulse, Stats
from sam_poll.types import Document, Embedding, Job, Prepared, Prompt
from sam_poll.wire import portable
from tests.conftest import BOX, Share, wait_until

ROOT = Path(__file__).parent.parent


def labelled(label: str) -> dict[str, Any]:
    return {"objects": [{"label": label, **BOX}]}


# ── what the processes are made of (they import this file) ──


class Trapped(FakeEngine):
    """Does what a job's label says, in the process that runs it. `once` is a file that says it was done."""

    def __init__(self, once: Path | None = None) -> None:
        super().__init__()
        self.once = once

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Any]:
        label = prompts[0].label
        if label.startswith("once ") and self.once:
            if self.once.exists():
                label = ""
            else:
                self.once.touch()
        if label.endswith("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if label.endswith("device"):
            raise DeviceError("the device failed: injected")
        return super().decode(embedding, prompts)


class Gated(FakeEngine):
    """Encodes while a file is not there."""

    def __init__(self, gate: Path) -> None:
        super().__init__()
        self.path = gate

    def encode(self, pictures: Sequence[Prepared]) -> list[Embedding]:
        wait_until(lambda: not self.path.exists(), 60)
        return super().encode(pictures)


def equipped(engine: type[FakeEngine] = FakeEngine, *arguments: Any) -> Equipment:
    return engine(*arguments), formats.load(["mask"], formats.FormatOptions()), Sizes()


def unloadable() -> Equipment:
    raise ModelError("no such weights", place="here", remedy="download them")


@contextmanager
def fleet_of(equip: Any, count: int = 2, **more: Any) -> Iterator[Fleet]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    posts = [Post(f"cpu #{n}", equip, env, "DEBUG") for n in range(count)]
    with Fleet(posts, more.pop("stop", threading.Event()), **{"pause_s": 0.01, **more}) as fleet:
        yield fleet


def pids(fleet: Fleet) -> list[int]:
    return [m.process.pid for m in fleet._members if m.process]


def drain(share: Share, fleet: Fleet, **manners: Any) -> None:
    """Answer what is there."""
    made = Manners(**{"quiet_s": 0.0, "once": True, "events": False, "rescan_s": 0.1, **manners})
    with FolderDoor(share.layout, made) as door:
        fleet.run(door, threading.Event())


@contextmanager
def watching(share: Share, fleet: Fleet, **more: Any) -> Iterator[FolderDoor]:
    """The fleet at work in a thread, until the end of the block."""
    stop = threading.Event()
    with FolderDoor(share.layout, Manners(quiet_s=0.0, events=False, rescan_s=0.1), **more) as door:
        thread = threading.Thread(target=fleet.run, args=(door, stop))
        thread.start()
        try:
            yield door
        finally:
            stop.set()
            thread.join(60)
            assert not thread.is_alive()


# ── answers ──


def test_two_processes_answer_every_job_once_and_as_one_would(share: Share, tmp_path: Path) -> None:
    alone = Share(tmp_path / "alone")
    for where in (share, alone):
        for number in range(30):
            where.pair(f"p{number:02}", seed=number)
    with fleet_of(equipped) as fleet:
        drain(share, fleet)
        assert fleet.stats.now().answered == 30
        assert fleet.stats.now().at_work == 0
        assert "cpu #0, cpu #1" in fleet.info.device
    alone.run_once()
    names = share.tree("output")
    assert names == alone.tree("output")
    assert [(share.output / n).read_bytes() for n in names] == [
        (alone.layout.output.path / n).read_bytes() for n in names
    ]
    assert (share.tree("input"), share.tree("work")) == ([], [])


def test_both_of_them_work(share: Share, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    for number in range(30):
        share.pair(f"p{number:02}", seed=number)
    with fleet_of(partial(equipped, Gated, gate)) as fleet, watching(share, fleet):
        wait_until(lambda: all(len(m.jobs) > 1 for m in fleet._members))
        gate.unlink()
        wait_until(lambda: fleet.stats.now().answered == 30)
        assert all(m.answered for m in fleet._members)


def test_bad_jobs_are_rejected_with_their_reasons_as_by_one_process(share: Share) -> None:
    share.pair("good")
    share.drop("cut.jpg", b"\xff\xd8\xff\xe0")
    share.drop("cut.json", BOX)
    share.pair("odd", prompt={"box": {"x0": 1000, "y0": 1000, "x1": 1100, "y1": 1100}})
    with fleet_of(equipped) as fleet:
        drain(share, fleet)
        assert (fleet.stats.now().answered, fleet.stats.now().rejected) == (1, 2)
    assert share.error("odd")["code"] == "prompt"
    assert share.error("cut")["code"] == "picture"


# ── processes that end ──


def test_a_killed_process_is_replaced_and_its_jobs_are_answered(share: Share, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    for number in range(20):
        share.pair(f"p{number:02}", seed=number)
    with fleet_of(partial(equipped, Gated, gate)) as fleet, watching(share, fleet):
        first = pids(fleet)
        wait_until(lambda: all(len(m.begun) > 1 for m in fleet._members))
        os.kill(first[0], signal.SIGKILL)
        wait_until(lambda: pids(fleet)[0] != first[0])
        gate.unlink()
        wait_until(lambda: fleet.stats.now().answered == 20)
        assert pids(fleet)[1] == first[1]
        assert sum(fleet.stats.now().released.values()) > 0
        assert fleet.stats.now().at_work == 0
    assert len(share.tree("output")) == 20
    assert share.tree("failed") == []


def test_a_picture_that_ends_every_process_is_rejected_as_poison_and_the_others_are_answered(share: Share) -> None:
    share.pair("bad", prompt=labelled("crash"))
    for number in range(12):
        share.pair(f"p{number:02}", seed=number)
    with fleet_of(equipped_with_traps) as fleet:
        drain(share, fleet, attempts=2)
    assert share.error("bad")["code"] == "poison"
    assert len(share.tree("output")) == 12
    assert share.tree("work") == []


def equipped_with_traps() -> Equipment:
    return equipped(Trapped)


def test_a_device_that_fails_once_gets_a_new_process_and_the_job_is_answered(
    share: Share, tmp_path: Path, logged: list[str]
) -> None:
    share.pair("dog", prompt=labelled("once device"))
    with fleet_of(partial(equipped, Trapped, tmp_path / "done")) as fleet:
        drain(share, fleet)
        assert fleet.stats.now().answered == 1
        assert fleet.stats.now().released == {"device": 1}
    assert share.tree("output") == ["dog.mask.png"]
    assert any("injected" in line and "the next one starts" in line for line in logged)


def test_a_device_that_ends_every_process_ends_the_run_and_nothing_is_lost(share: Share) -> None:
    for number in range(8):
        share.pair(f"p{number}", prompt=labelled("device"), seed=number)
    with fleet_of(equipped_with_traps) as fleet, pytest.raises(DeviceError, match="processes in a row"):
        drain(share, fleet, attempts=100)
    kept = [name for name in share.tree("input") + list(share.at_work()) if name.endswith(".json")]
    assert sorted(kept) == [f"p{n}.json" for n in range(8)]
    assert share.tree("failed") == []


def test_a_model_that_cannot_be_loaded_is_told_as_by_one_process() -> None:
    with pytest.raises(ModelError, match="no such weights") as caught, fleet_of(unloadable):
        pass
    assert (caught.value.place, caught.value.remedy) == ("here", "download them")


def test_a_process_that_does_not_even_start_is_told() -> None:
    command = [sys.executable, "-c", "raise SystemExit(9)"]
    with pytest.raises(DeviceError, match="ended with 9"), fleet_of(equipped, command=command):
        pass


def test_a_process_that_cannot_be_started_any_more_is_given_up_however_much_the_last_one_did() -> None:
    fleet = Fleet([Post("a", equipped, {})], threading.Event(), command=["/not/there"], pause_s=0.0)
    fleet._ready, fleet._members[0].answered = True, 5
    keeper = threading.Thread(target=fleet._keep, args=fleet._members, daemon=True)
    keeper.start()
    try:
        wait_until(lambda: not keeper.is_alive(), 20)
        assert isinstance(fleet._fatal, DeviceError)
    finally:
        fleet._ending = True


# ── stop ──


def test_what_a_process_has_not_taken_up_at_the_end_goes_back_also_to_a_sick_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    door = FarDoor(Recorder(), threading.Event())  # type: ignore[arg-type]
    back: list[Any] = []

    def release(job: Job) -> None:
        back.append(job.origin)
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(door, "release", release)
    for number in range(3):
        door._inbox.put(Job(f"j{number}", "x", b"", (Prompt(),), origin=number))
    jobs = door.jobs(threading.Event())
    assert next(jobs).origin == 0
    jobs.close()
    assert back == [1, 2]


def test_stop_finishes_what_is_at_work_and_ends_the_processes(share: Share, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    for number in range(40):
        share.pair(f"p{number:02}", seed=number)
    with fleet_of(partial(equipped, Gated, gate)) as fleet:
        with watching(share, fleet):
            wait_until(lambda: all(m.begun for m in fleet._members))
            gate.unlink()
            wait_until(lambda: fleet.stats.now().answered)
        assert all(m.process and m.process.returncode == 0 for m in fleet._members)
    answered = len(share.tree("output"))
    assert len([n for n in share.tree("input") if n.endswith(".json")]) == 40 - answered
    assert share.tree("work") == []


def test_a_stop_does_not_wait_for_a_process_that_is_being_started(share: Share, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    share.pair("dog", prompt=labelled("once crash"))
    with fleet_of(partial(slow_to_come_back, gate), count=1) as fleet:
        with watching(share, fleet):
            wait_until(lambda: fleet._members[0].process and gate.exists() and not fleet._members[0].info)
            again = pids(fleet)
            wait_until(lambda: pids(fleet) != again)
        assert fleet.stats.now().at_work == 0
    assert [name for name in [*share.tree("input"), *share.at_work()] if name.endswith(".json")] == ["dog.json"]


def slow_to_come_back(gate: Path) -> Equipment:
    """Ready at once the first time, and not for an hour the second."""
    if gate.exists():
        threading.Event().wait(3600)
    gate.touch()
    return equipped(Trapped, gate.with_name("once"))


def test_a_process_that_hangs_is_killed_at_the_end_and_its_jobs_go_back_unblamed(share: Share, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    gate.touch()
    share.pair("dog")
    with fleet_of(partial(equipped, Gated, gate), count=1, drain_s=-4.9) as fleet:
        with watching(share, fleet):
            wait_until(lambda: fleet._members[0].begun)
        assert share.tree("input") == ["dog.jpg", "dog.json"]
        assert fleet.stats.now().at_work == 0


def test_the_processes_end_with_the_one_that_started_them(share: Share) -> None:
    command = [sys.executable, "-m", "sam_poll", "watch", str(share.input), "-m", "fake", "--log", "text"]
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


def test_an_answer_counts_even_if_its_process_does_not_live_to_count_it(share: Share) -> None:
    class Door:
        def deliver(self, *_: Any) -> None: ...
        def reject(self, *_: Any) -> None: ...
        def abandon(self, *_: Any) -> None: ...

    fleet = Fleet([Post("a", equipped, {})], threading.Event())
    (member,) = fleet._members
    fleet._door, member.wire = Door(), Recorder()  # type: ignore[assignment]
    for name in ("delivered", "rejected", "neither"):
        member.wants = True
        fleet.stats.took()
        assert fleet._placed(Job(name, name, b"", (Prompt(),)))
    fleet._call(member, 1, "deliver", ([],))
    fleet._call(member, 2, "reject", (errors.PromptError("odd"),))
    fleet._on_begun(member, 3)
    member.ooms = 3
    member.process = subprocess.Popen([sys.executable, "-c", ""])
    fleet._bury(member)
    now = fleet.stats.now()
    assert (now.answered, now.rejected, now.released, now.at_work) == (1, 1, {"device": 1}, 0)
    assert fleet.ooms == 3  # a counter that others watch does not go back with a new process
    assert now.reasons == {"prompt": 1}


class Quick(ThreadPoolExecutor):
    """Is done before it has said so, unless it is kept waiting."""

    def submit(self, act: Any, *arguments: Any) -> Future[None]:  # type: ignore[override]
        begun = super().submit(act, *arguments)
        wait([begun], 0.2)
        return begun


def test_of_a_job_that_is_over_nothing_is_kept_and_its_process_alone_hears_of_it() -> None:
    class Door:
        def deliver(self, *_: Any) -> None:
            member.wire = later  # type: ignore[assignment]

    fleet = Fleet([Post("a", equipped, {})], threading.Event())
    (member,) = fleet._members
    first, later = Recorder(), Recorder()
    fleet._door, fleet._writers = Door(), Quick(1)  # type: ignore[assignment]
    member.wire, member.wants = first, True  # type: ignore[assignment]
    assert fleet._placed(Job("dog", "dog", b"", (Prompt(),)))
    fleet._on_begun(member, 1)
    fleet._on_call(member, 1, "deliver", ([],))
    fleet._writers.shutdown()
    fleet._on_count(member, "answered", ("dog", 1, {}))
    assert not any([member.jobs, member.begun, member.calls, member.ended])
    assert (first.sent[-1], later.sent) == (("reply", 1, None), [])


# ── trouble and signs of life ──


def test_a_sick_share_is_one_alarm_and_the_answers_wait(
    share: Share, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    full = threading.Event()
    full.set()
    deliver = FolderDoor.deliver

    def refusing(self: FolderDoor, job: Job, documents: Sequence[Document]) -> None:
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        deliver(self, job, documents)

    monkeypatch.setattr(FolderDoor, "deliver", refusing)
    for number in range(6):
        share.pair(f"p{number}", seed=number)
    alarms = Alarms()
    with fleet_of(equipped, alarms=alarms) as fleet, watching(share, fleet, alarms=alarms):
        wait_until(lambda: "output" in alarms)
        assert "No space left" in alarms.active()[0].message
        full.clear()
        wait_until(lambda: fleet.stats.now().answered == 6)
        wait_until(lambda: "output" not in alarms)
    assert len(share.tree("output")) == 6


def test_the_fleet_is_as_old_as_its_slowest_process() -> None:
    pulse = Pulse()
    fleet = Fleet([Post("a", equipped, {}), Post("b", equipped, {})], threading.Event(), device=pulse)
    info = FakeEngine().info
    one, two = fleet._members
    for member in (one, two):
        fleet._on_ready(member, info)
    fleet._on_beat(two, 100.0, info, 1)
    fleet._on_beat(one, 1.0, info, 2)
    assert 100 <= pulse.age < 1000
    assert fleet.ooms == 3


class Recorder:
    """A wire that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[Any, ...]] = []

    def send(self, *message: Any) -> None:
        self.sent.append(message)

    def close(self) -> None: ...


def test_a_pictures_further_prompts_go_to_the_process_that_knows_it() -> None:
    fleet = Fleet([Post("a", equipped, {}), Post("b", equipped, {})], threading.Event(), stats=Stats())
    wires = [Recorder(), Recorder()]
    for member, wire in zip(fleet._members, wires, strict=True):
        member.wire = wire  # type: ignore[assignment]
    for number, (name, who_wants) in enumerate([("x", [1]), ("y", [0]), ("x", [0, 1]), ("y", [0, 1]), ("x", [0])]):
        for index, member in enumerate(fleet._members):
            member.wants = index in who_wants
        assert fleet._placed(Job(f"j{number}", "picture.jpg", name.encode(), (Prompt(),)))  # bytes: by what they are
    given = [[message[1].id for message in wire.sent] for wire in wires]
    assert given == [["j1", "j3", "j4"], ["j0", "j2"]]


# ── errors on the way ──


def kinds(base: type[SamPollError] = SamPollError) -> Iterator[type[SamPollError]]:
    yield base
    for kind in base.__subclasses__():
        yield from kinds(kind)


@pytest.mark.parametrize(
    "kind", sorted({k for k in kinds() if k.__module__ == errors.__name__}, key=lambda k: k.__name__)
)
def test_our_errors_travel_whole(kind: type[SamPollError]) -> None:
    error = kind("a reason", place="a place", remedy="a remedy")
    assert portable(error) is error
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (copy.reason, copy.place, copy.remedy, str(copy)) == (error.reason, error.place, error.remedy, str(error))


def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    class Local(Exception):
        """Nobody else can import it."""

    told = portable(Local("what happened"))
    assert type(told) is RuntimeError
    assert "what happened" in str(told)


# ── the door's part ──


def test_a_job_that_ended_its_process_is_offered_again_as_a_further_attempt(share: Share) -> None:
    share.pair("dog")
    with FolderDoor(share.layout, Manners(quiet_s=0.0, rescan_s=0.1, events=False)) as door:
        jobs = door.jobs(threading.Event())
        attempts = []
        for _ in range(3):
            job = next(jobs)
            attempts.append(job.attempt)
            door.abandon(job)
        assert attempts == [1, 2, 3]
        door.release(next(jobs))
        assert next(jobs).attempt == 1
