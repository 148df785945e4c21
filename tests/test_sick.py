"""The folder door among sick surroundings and other daemons: everything waits or goes on by itself, nothing is blamed.

Each fault is let out of a real call at the moment that matters, and taken back; what is looked at is the share.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from sam_poll import bytesof
from sam_poll.alarms import Alarms
from sam_poll.doors import janitor, lease, report, scan
from sam_poll.doors.claims import Claims, listing
from sam_poll.doors.desk import Desk
from sam_poll.doors.folder import FolderDoor
from sam_poll.doors.proof import SENTINEL
from sam_poll.doors.report import status
from sam_poll.doors.scan import Manners, Scanner
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import DeviceError, InputError, LostError, UnfinishedError
from sam_poll.fs import Whole
from sam_poll.types import Document, Job
from tests.conftest import BOX, Daemon, Share, make_pipeline, picture_bytes, wait_until
from tests.test_claims import trees

ANSWER = [Document(".txt", "text/plain", b"answer")]
EIO = OSError(errno.EIO, "Input/output error")
ELSEWHERE = "other-1-abcdef-0"  # a daemon's name whose lock nobody here can ask


@contextmanager
def opened(share: Share, **manners: Any) -> Iterator[FolderDoor]:
    """A door that drains without waiting for anything."""
    with FolderDoor(share.layout, Manners(**{"quiet_s": 0.0, "events": False, "rescan_s": 0.02, **manners})) as door:
        yield door


@contextmanager
def asked(door: FolderDoor) -> Iterator[Callable[[], Job]]:
    """Asks a door for its next job, for at most 10 s."""
    stop = threading.Event()
    alarm = threading.Timer(10, stop.set)
    alarm.start()
    jobs = door.jobs(stop)

    def ask() -> Job:
        job = next(jobs, None)
        assert job, "no job came"
        return job

    try:
        yield ask
    finally:
        stop.set()
        alarm.cancel()
        alarm.join()
        jobs.close()


def left_by(share: Share, worker: str, name: str, *prompts: str, hold: str = "g1.a1.n1") -> Path:
    """Move a picture and prompts out of `in/` into the claim of another daemon."""
    path = share.work / f".{name}" / f"{hold}@{worker}"
    path.mkdir(parents=True)
    for file in (name, *prompts):
        if (share.input / file).exists():
            (share.input / file).rename(path / file)
    return path


def failing(times: int, really: Callable[..., Any], error: OSError = EIO) -> Callable[..., Any]:
    """A function that fails some times before it works."""
    left = [times]

    def call(*args: Any, **more: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(error.errno, error.strerror)
        return really(*args, **more)

    return call


def dead_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other daemon counts as dead."""

    def dead(self: lease.Watch, worker: str, now: float) -> bool:
        return True

    monkeypatch.setattr(lease.Watch, "dead", dead)


# ── what was claimed is never forgotten ──


def test_a_job_that_cannot_be_put_back_now_is_not_forgotten(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    share.pair("dog")
    with opened(share) as door, asked(door) as ask:
        job = ask()
        with monkeypatch.context() as patch:
            patch.setattr(Claims, "_leave", failing(100, Claims._leave))
            with pytest.raises(OSError, match="Input/output"):
                door.release(job)
        again = ask()
        assert (again.id, again.attempt) == ("dog", 1)
        door.deliver(again, ANSWER)
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_a_deferred_job_that_cannot_be_put_back_now_is_not_forgotten(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    share.run_once()
    share.drop("dog.again.json", BOX)
    with opened(share, lone_s=0.0) as door, asked(door) as ask:
        job = ask()
        with monkeypatch.context() as patch:
            patch.setattr(Claims, "_leave", failing(100, Claims._leave))
            with pytest.raises(OSError, match="Input/output"):
                door.defer(job, UnfinishedError("is cut off"))
        door.deliver(ask(), ANSWER)
    assert share.tree("input") == share.tree("work") == []


@pytest.mark.parametrize("where", ["_reread", "_job", "_has_work"])
def test_a_share_that_is_sick_while_a_claim_is_taken_over_costs_no_job_and_no_attempt(
    share: Share, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    share.pair("dog")
    with opened(share, attempts=1) as door:
        left_by(share, ELSEWHERE, "dog.jpg", "dog.json", hold="g1.a0.n1")
        dead_at_once(monkeypatch)
        monkeypatch.setattr(Desk, where, failing(2, getattr(Desk, where)))
        with asked(door) as ask:
            job = ask()
            assert (job.fault, job.attempt) == (None, 1)
            door.deliver(job, ANSWER)
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_a_share_that_is_sick_while_a_job_is_made_costs_no_job(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    share.drop("dog.jpg", picture_bytes())
    for n in range(3):
        share.drop(f"dog.{n}.json", BOX)
    calls = []
    really = Desk._identity

    def sick_once(self: Desk, *args: Any) -> str:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return really(self, *args)

    monkeypatch.setattr(Desk, "_identity", sick_once)
    with opened(share) as door, asked(door) as ask:
        for _ in range(3):
            door.deliver(ask(), ANSWER)
    assert len(share.tree("done")) == 4


def test_a_further_prompt_whose_job_cannot_be_made_now_is_not_forgotten(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    with opened(share) as door, asked(door) as ask:
        first = ask()
        share.drop("dog.left.json", BOX)
        monkeypatch.setattr(Desk, "_identity", failing(1, Desk._identity))
        second = ask()
        ids = {second.id}
        door.deliver(second, ANSWER)
        with suppress(LostError):
            door.deliver(first, ANSWER)
        while share.tree("done") != ["dog.jpg", "dog.json", "dog.left.json"]:
            again = ask()
            ids.add(again.id)
            door.deliver(again, ANSWER)
    assert share.tree("output") == ["dog.left.txt", "dog.txt"]


def test_names_of_any_length_end_in_an_answer_or_a_reason(share: Share) -> None:
    name = "x" * 251 + ".jpg"  # with `.jpeg` it would be too long even to be asked for
    for number in (1, 2, 3):
        share.drop(name, picture_bytes(seed=number))
        share.drop("a.json", {**BOX, "image": name})
        assert share.run_once().answered == 1
    assert len(share.tree("done")) == 6
    for _ in range(3):
        share.pair("x" * 250)
        assert share.run_once().rejected == 1
    assert len(share.tree("failed")) == 9
    assert share.tree("input") == share.tree("work") == []


# ── whose picture ──


def test_a_lone_prompt_at_work_elsewhere_is_not_taken_for_a_picture(share: Share) -> None:
    share.pair("dog")
    share.run_once()
    with opened(share) as door:
        share.drop("dog.json", BOX)
        left_by(share, ELSEWHERE, "dog.json")
        share.pair("dog", seed=2)
        with asked(door) as ask:
            job = ask()
    assert job.fault is None
    assert job.name == "done/dog~2.jpg"


def test_a_prompt_whose_picture_has_just_ended_is_answered_for_that_picture(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        share.pair("dog", seed=seed)
        share.run_once()
    share.drop("dog.left.json", BOX)
    monkeypatch.setattr(Desk, "pictures", lambda self, told=["dog.jpg"]: [told.pop()] if told else [])
    with opened(share, lone_s=0.0) as door, asked(door) as ask:
        assert ask().name == "done/dog~2.jpg"


def test_a_prompt_that_promises_too_much_does_not_take_others_with_it(share: Share) -> None:
    share.pair("dog", prompt={**BOX, "image_bytes": 10**6})
    with opened(share, patience_s=1000.0) as door:
        assert door._desk.claim(door._scanner.scan(time.monotonic(), [])) == []  # left alone until it has grown
        share.drop("dog.good.json", BOX)
        (ready,) = door._scanner.scan(time.monotonic(), [])
    assert (ready.prompt, ready.fault) == ("dog.good.json", None)


@pytest.mark.parametrize("replaced", ["dog.jpg", "dog.json"])
def test_a_job_that_was_put_back_is_offered_again_at_once_when_a_file_of_it_changes(
    share: Share, replaced: str
) -> None:
    share.pair("dog")
    with opened(share, patience_s=1000.0) as door, asked(door) as ask:
        door.defer(ask(), UnfinishedError("is cut off"))
        assert door._scanner.scan(time.monotonic(), []) == []
        share.drop(replaced, picture_bytes(seed=2) if replaced == "dog.jpg" else {**BOX, "label": "dog"})
        assert ask().fault is None


def test_prompts_of_one_picture_are_put_back_each_with_its_own_reason(share: Share) -> None:
    share.pair("dog")
    share.drop("dog.left.json", BOX)
    error = UnfinishedError("is not the one")
    with opened(share, patience_s=0.2) as door, asked(door) as ask:
        jobs = {job.id: job for job in (ask(), ask())}
        door.defer(jobs["dog"], error)
        door.release(jobs["dog.left"])
        jobs = {job.id: job for job in (ask(), ask())}
        assert jobs["dog.left"].fault is None
        assert jobs["dog"].fault in (None, error)


# ── poison ──


@pytest.mark.parametrize("lone", [False, True])
def test_of_a_job_that_has_ended_the_daemon_too_often_nothing_is_read(
    share: Share, monkeypatch: pytest.MonkeyPatch, lone: bool
) -> None:
    share.pair("dog")
    if lone:
        share.run_once()
        share.drop("dog.again.json", BOX)
    with opened(share, attempts=3) as door:
        if lone:
            left_by(share, ELSEWHERE, "dog.again.json", hold="g3.a3.n1")
        else:
            left_by(share, ELSEWHERE, "dog.jpg", "dog.json", hold="g3.a3.n1")
        dead_at_once(monkeypatch)

        def never(*args: Any) -> None:
            raise AssertionError("it was read")

        monkeypatch.setattr(Scanner, "read", never)
        monkeypatch.setattr(bytesof, "read", never)
        stop = threading.Event()
        pipeline = make_pipeline()
        thread = threading.Thread(target=pipeline.run, args=(door, stop))
        thread.start()
        wait_until(lambda: pipeline.stats.now().rejected)
        stop.set()
        thread.join(30)
    error = share.error("dog.again" if lone else "dog")
    assert (error["code"], error["attempt"]) == ("poison", 4)
    assert error["place"] == ("dog.again.json" if lone else "dog.jpg")
    assert "3 times" in error["reason"]
    assert "sam-poll retry" in error["remedy"]
    assert share.tree("failed")[-1] == ("dog.again.json" if lone else "dog.json")
    assert share.tree("work") == []


def test_a_job_is_not_given_up_before_its_last_attempt(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    share.pair("dog")
    with opened(share, attempts=3) as door:
        left_by(share, ELSEWHERE, "dog.jpg", "dog.json", hold="g2.a2.n1")
        dead_at_once(monkeypatch)
        with asked(door) as ask:
            job = ask()
            assert (job.fault, job.attempt, job.generation) == (None, 3, 3)


# ── fenced ──


@pytest.mark.parametrize("end", ["deliver", "reject", "release", "defer"])
def test_an_owner_that_was_taken_over_is_told_so_and_changes_nothing(share: Share, end: str) -> None:
    share.pair("dog")
    with opened(share) as door, asked(door) as ask:
        job = ask()
        (found,) = listing(share.layout.work)[0]
        heir = Claims(share.layout, "heir-1", lambda: None)
        claim = heir.take_over(found)
        assert claim
        before = trees(share)
        with pytest.raises(LostError):
            {
                "deliver": lambda: door.deliver(job, ANSWER),
                "reject": lambda: door.reject(job, InputError("no")),
                "release": lambda: door.release(job),
                "defer": lambda: door.defer(job, UnfinishedError("is cut off")),
            }[end]()
        assert trees(share) == before
        assert list(share.output.iterdir()) == []
        heir.close(claim, "input", "")
        door.deliver(ask(), ANSWER)  # and it goes on with whatever comes
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_a_further_prompt_for_a_claim_that_was_lost_ends_nothing(share: Share) -> None:
    share.pair("dog")
    with opened(share) as door, asked(door) as ask:
        ask()
        (found,) = listing(share.layout.work)[0]
        assert Claims(share.layout, ELSEWHERE, lambda: None).take_over(found)
        share.drop("dog.left.json", BOX)
        share.pair("zebra")
        assert ask().id == "zebra"
    assert share.tree("input") == ["dog.left.json"]


# ── who is dead ──


def test_jobs_that_a_dead_device_left_are_taken_up_at_once_on_the_same_machine(share: Share) -> None:
    if lease.boot() == "0":
        pytest.skip("this machine does not tell its kernels apart")
    share.pair("dog")
    engine = FakeEngine()
    engine.fail("encode", DeviceError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(DeviceError):
        share.run_once(engine, lease_s=1000.0)
    assert sorted(share.at_work()) == ["dog.jpg", "dog.json"]
    with opened(share, lease_s=1000.0) as door, asked(door) as ask:
        job = ask()
        assert (job.attempt, job.generation, door.recovered) == (2, 2, 1)
        door.deliver(job, ANSWER)
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_jobs_of_a_daemon_whose_lock_nobody_can_ask_are_taken_up_after_a_lease(share: Share) -> None:
    share.pair("dog")
    with opened(share, lease_s=1000.0) as door:
        left_by(share, ELSEWHERE, "dog.jpg", "dog.json")
        (share.work / f"{lease.PREFIX}{ELSEWHERE}{lease.ENDING}").write_text("{}")
        door._look_at_work(now=5000.0)
        assert (door._abandoned, door.orphans) == ([], 0)
        door._look_at_work(now=5999.0)
        assert door._abandoned == []
        door._look_at_work(now=6001.0)
        assert [found.label for found in door._abandoned] == ["dog.jpg"]
        assert door.orphans == 1


def test_several_daemons_drain_one_share_together_and_answer_each_pair_once(share: Share) -> None:
    for n in range(300):
        share.pair(f"cam{n % 4}/dog{n:03}", seed=n % 7)
    answered: list[int] = []

    def drain() -> None:
        answered.append(share.run_once(FakeEngine(side=32), rescan_s=0.1).answered)

    threads = [threading.Thread(target=drain) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(answered) == 300
    assert all(answered)
    assert len(share.tree("done")) == 600
    assert len(share.tree("output")) == 300
    assert share.tree("input") == share.tree("work") == share.tree("failed") == []
    assert listing(share.layout.work)[0] == []


# ── pictures that cannot be read now ──


def unreadable(monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[], None]:
    """Reading this picture fails until the returned function is called; only then."""
    sick = threading.Event()
    sick.set()
    really = bytesof.read

    def read(path: Path) -> Any:
        if sick.is_set() and path.name == name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return really(path)

    monkeypatch.setattr(bytesof, "read", read)
    return sick.clear


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses of held jobs, as they were asked for; they are a fiftieth as long."""
    told: list[float] = []
    really = Scanner.hold

    def hold(self: Scanner, job: str, signatures: Any, seconds: float, error: Any = None) -> None:
        told.append(seconds)
        really(self, job, signatures, seconds / 50, error)

    monkeypatch.setattr(Scanner, "hold", hold)
    return told


@pytest.mark.parametrize("end", ["it can be read", "taken away", "its prompt is taken away", "its picture is taken"])
def test_a_picture_that_cannot_be_read_is_tried_again_and_again_while_others_go_on(
    share: Share, monkeypatch: pytest.MonkeyPatch, patient: list[float], end: str
) -> None:
    mend = unreadable(monkeypatch, "bad.jpg")
    share.pair("bad")
    with Daemon(share, quiet_s=0.0, rescan_s=0.02, events=False) as daemon:
        wait_until(lambda: len(patient) >= 3)
        assert patient[:3] == [2.0, 4.0, 8.0]
        assert "read" in daemon.door._alarms
        share.move_in("good.jpg", picture_bytes(seed=2))
        share.move_in("good.json", BOX)
        wait_until(lambda: "good.jpg" in share.tree("done"))
        assert "read" in daemon.door._alarms
        if end == "it can be read":
            mend()
            wait_until(lambda: "bad.jpg" in share.tree("done"))
        else:
            names = {"taken away": ["bad.jpg", "bad.json"], "its prompt is taken away": ["bad.json"]}
            for name in names.get(end, ["bad.jpg"]):
                wait_until(lambda name=name: _unlinked(share.input / name))
        wait_until(lambda: "read" not in daemon.door._alarms)
    assert daemon.pipeline.stats.now().rejected == 0
    assert daemon.door._unread == {}


def _unlinked(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:  # at work in this moment
        return False
    return True


def test_a_picture_that_was_taken_away_while_it_was_read_ends_in_a_reason(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = bytesof.read

    def read(path: Path) -> Any:
        path.unlink()
        return really(path)

    monkeypatch.setattr(bytesof, "read", read)
    share.pair("dog")
    share.run_once()
    assert "vanished" in share.error("dog")["reason"]
    assert share.tree("failed") == ["dog.error.json", "dog.json"]


# ── pictures that are not complete ──


def test_a_cut_off_picture_that_is_completed_in_time_is_answered(share: Share) -> None:
    body = picture_bytes()
    path = share.drop("dog.jpg", body[: len(body) // 2])
    share.drop("dog.json", BOX)
    with Daemon(share, quiet_s=0.0, rescan_s=0.02, patience_s=1000.0, events=False) as daemon:
        wait_until(lambda: daemon.pipeline.stats.now().released)
        wait_until(lambda: share.tree("input") == ["dog.jpg", "dog.json"])
        with path.open("ab") as file:
            file.write(body[len(body) // 2 :])
        wait_until(lambda: share.tree("done") == ["dog.jpg", "dog.json"])
    assert share.tree("failed") == []


@pytest.mark.parametrize("grows", [True, False])
def test_a_picture_shorter_than_its_prompt_says_is_left_alone_until_it_has_grown_or_patience_ends(
    share: Share, grows: bool
) -> None:
    body = picture_bytes()
    path = share.drop("dog.jpg", body[:100])
    share.drop("dog.json", {**BOX, "image_bytes": len(body)})
    with Daemon(share, quiet_s=0.0, rescan_s=0.02, patience_s=1000.0 if grows else 0.2, events=False) as daemon:
        if grows:
            wait_until(lambda: daemon.door._scanner._holds)
            assert daemon.pipeline.stats.now().at_work == 0
            path.write_bytes(body)
            wait_until(lambda: share.tree("done") == ["dog.jpg", "dog.json"])
        else:
            wait_until(lambda: "dog.error.json" in share.tree("failed"))
            assert "image_bytes" in share.error("dog")["reason"]
            assert "100 bytes" in share.error("dog")["reason"]


def test_a_picture_changed_while_it_was_read_is_answered_as_it_is_in_the_end(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = share.drop("dog.jpg", picture_bytes(".png", seed=1))
    share.drop("dog.json", BOX)
    writer = path.open("r+b")  # whoever holds it writes on, wherever the file is moved to
    really = bytesof.read
    last = picture_bytes(".png", width=80, seed=2)

    def read(path: Path) -> Any:
        found = really(path)
        if not writer.closed:
            writer.truncate(0)
            writer.write(last)
            writer.close()
        return found

    monkeypatch.setattr(bytesof, "read", read)
    with Daemon(share, quiet_s=0.0, rescan_s=0.02, events=False) as daemon:
        wait_until(lambda: daemon.pipeline.stats.now().answered)
    assert (share.done / "dog.jpg").read_bytes() == last
    assert daemon.pipeline.stats.now().released
    assert share.tree("failed") == []


# ── answers that cannot be written ──


def test_on_a_full_disk_no_further_jobs_are_claimed_and_all_go_on_when_there_is_room(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = threading.Event()
    full.set()
    tries = []
    really = Whole.write

    def write(self: Whole, path: Path, body: bytes) -> None:
        if full.is_set():
            tries.append(path)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        really(self, path, body)

    monkeypatch.setattr(Whole, "write", write)
    alarms = Alarms()
    for n in range(40):
        share.pair(f"dog{n:02}", seed=n)
    with Daemon(share, alarms=alarms, quiet_s=0.0, rescan_s=0.02) as daemon:
        wait_until(lambda: "output" in alarms)
        wait_until(lambda: len(tries) > 4)
        claimed = len(share.at_work())
        assert claimed < 60
        tried = len(tries)
        wait_until(lambda: len(tries) > tried + 2)
        assert len(share.at_work()) == claimed
        assert len(alarms.active()) == 1
        full.clear()
        wait_until(lambda: daemon.pipeline.stats.now().answered == 40)
        wait_until(lambda: "output" not in alarms)
    assert share.tree("failed") == []


def test_an_answer_whose_name_is_a_folder_is_a_refusal_with_a_reason(share: Share) -> None:
    share.pair("dog")
    (share.output / "dog.mask.png").mkdir(parents=True)
    assert share.run_once().rejected == 1
    assert "cannot be written" in share.error("dog")["reason"]
    assert share.tree("failed") == ["dog.error.json", "dog.jpg", "dog.json"]
    assert [p.name for p in share.output.iterdir()] == ["dog.mask.png"]


def test_a_job_that_cannot_be_rejected_now_is_rejected_when_it_can(share: Share, logged: list[str]) -> None:
    share.pair("cam1/dog", prompt="{")
    share.failed.mkdir()
    (share.failed / "cam1").write_text("a file")
    with Daemon(share, quiet_s=0.0, rescan_s=0.02):
        wait_until(lambda: any(f"{share.failed}/cam1 cannot be used" in line for line in logged))
        (share.failed / "cam1").unlink()
        wait_until(lambda: share.tree("work") == [])
    assert share.tree("failed") == ["cam1/dog.error.json", "cam1/dog.jpg", "cam1/dog.json"]


# ── status ──


def test_status_counts_the_files_in_claims_and_lists_the_daemons(share: Share) -> None:
    share.pair("cam1/dog")
    share.pair("cat")
    with opened(share) as door, asked(door) as ask:
        jobs = [ask(), ask()]
        seen = status(share.layout)
        assert seen["work"] == {"pictures": 2, "prompts": 2, "other": 0}
        assert [(w["worker"], w["pid"], w["alive"]) for w in seen["workers"]] == [(door.worker, os.getpid(), True)]
        for job in jobs:
            door.release(job)
    assert status(share.layout)["workers"] == []


def test_status_survives_claims_that_end_while_it_counts(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    share.pair("dog")
    really = report.walk
    with opened(share) as door, asked(door) as ask:
        job = ask()

        def and_then_it_ends(root: Path, *more: Any, **named: Any) -> Any:
            if root.name.startswith("g1."):
                door.deliver(job, ANSWER)
            return really(root, *more, **named)

        monkeypatch.setattr(report, "walk", and_then_it_ends)
        assert status(share.layout)["work"] == {"pictures": 0, "prompts": 0, "other": 0}


# ── the janitor ──


def test_strays_go_back_those_of_one_stem_under_one_name(share: Share) -> None:
    with opened(share):
        share.drop("cam1/dog.jpg", b"newer")
        for name in ("cam1/dog.jpg", "cam1/dog.left.json", "cat.jpg"):
            path = share.work / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"stray")
        assert janitor.put_back(share.layout, listing(share.layout.work)[1]) == 3
    assert share.tree("input") == ["cam1/dog.jpg", "cam1/dog.left~2.json", "cam1/dog~2.jpg", "cat.jpg"]


def test_what_systems_leave_in_hidden_files_is_no_stray(share: Share) -> None:
    with opened(share) as door:
        for name in (".nfs0000000000a1b2c3", ".DS_Store"):  # the first of them cannot even be renamed
            (share.work / name).write_bytes(b"")
        door._look_at_work(0.0)
        assert door.orphans == 0
    assert share.tree("input") == []


def test_two_janitors_that_put_the_same_file_back_do_not_trip_over_each_other(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(share):
        (share.work / "dog.jpg").write_bytes(b"stray")
        really = janitor.free_suffix

        def and_then_the_other_one(paths: list[Path]) -> str:
            suffix = really(paths)
            (share.work / "dog.jpg").rename(share.input / "dog.jpg")
            return suffix

        monkeypatch.setattr(janitor, "free_suffix", and_then_the_other_one)
        assert janitor.put_back(share.layout, ["dog.jpg"]) == 0
    assert share.tree("input") == ["dog.jpg"]


def test_the_janitor_sweeps_empty_folders_halves_and_dead_daemons_files_after_a_lease(share: Share) -> None:
    work = share.work
    with opened(share, lease_s=100.0) as door:
        (work / "cam1" / "deep").mkdir(parents=True)
        (work / ".bare.jpg").mkdir()
        half, dead = work / f"{SENTINEL}-x.tmp", work / f"{lease.PREFIX}{ELSEWHERE}{lease.ENDING}"
        half.write_bytes(b"")
        dead.write_bytes(b"{}")
        (work / f"{lease.PREFIX}a-folder{lease.ENDING}" / "below").mkdir(parents=True)  # a joke that stops nothing
        door._look_at_work(1000.0)
        assert not (work / ".bare.jpg").exists()
        assert all(p.exists() for p in (half, dead, work / "cam1" / "deep"))
        door._look_at_work(1099.0)
        assert all(p.exists() for p in (half, dead, work / "cam1" / "deep"))
        door._look_at_work(1101.0)
        assert not any(p.exists() for p in (half, dead, work / "cam1" / "deep"))
        door._look_at_work(1102.0)
        door._look_at_work(1203.0)
        assert not (work / "cam1").exists()
        assert door._life.path.path.exists()
        assert door._lives._seen.keys() <= {"a-folder"}


def test_what_lies_in_a_claim_of_a_daemon_that_lives_is_left_alone(share: Share) -> None:
    share.pair("dog")
    with opened(share, lease_s=1000.0) as door:
        path = left_by(share, ELSEWHERE, "dog.jpg", "dog.json")
        before = trees(share)
        for now in (0.0, 900.0):
            door._look_at_work(now)
        assert trees(share).keys() == before.keys()
        assert len(list(path.iterdir())) == 2


# ── one trouble, one line ──


def test_a_share_that_stays_away_is_told_once(share: Share, logged: list[str]) -> None:
    with Daemon(share, quiet_s=0.0, rescan_s=0.02) as daemon:
        wait_until(lambda: daemon.door.scans > 0)
        share.input.rename(share.root / "gone")
        wait_until(lambda: "share" in daemon.door._alarms)
        scans = daemon.door.scans
        (share.root / "gone").rename(share.input)
        wait_until(lambda: daemon.door.scans > scans)
        wait_until(lambda: "share" not in daemon.door._alarms)
    assert sum("alarm (share): " in line for line in logged) == 1


@pytest.mark.parametrize("lone", [True, False])
def test_a_prompt_on_a_bad_sector_is_held_and_the_others_go_on(
    share: Share, monkeypatch: pytest.MonkeyPatch, lone: bool, logged: list[str]
) -> None:
    really = Scanner.read
    sick = [True]

    def read(scanner: Scanner, prompt: Path) -> Any:
        if prompt.name == "bad.json" and sick:
            raise OSError(errno.EIO, "Input/output error", str(prompt))
        return really(scanner, prompt)

    monkeypatch.setattr(Scanner, "read", read)
    monkeypatch.setattr(scan, "_UNREAD_S", 0.2)
    if lone:
        share.drop("bad.json", BOX)
    else:
        share.pair("bad")
    with Daemon(share, quiet_s=0.0, rescan_s=0.2) as daemon:
        wait_until(lambda: any("bad.json cannot be read" in line for line in logged))
        share.move_in("good.jpg", picture_bytes(seed=2))
        share.move_in("good.json", BOX)
        wait_until(lambda: "good.json" in share.tree("done"))
        assert "share" not in daemon.door._alarms
        sick.clear()
        if lone:
            share.drop("bad.jpg", picture_bytes())
        wait_until(lambda: "bad.json" in share.tree("done"))


def test_a_prompt_that_another_daemon_takes_while_it_is_read_raises_no_alarm(
    share: Share, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    really = Scanner.read

    def read(scanner: Scanner, prompt: Path) -> Any:
        prompt.unlink(missing_ok=True)
        return really(scanner, prompt)

    monkeypatch.setattr(Scanner, "read", read)
    share.drop("gone.json", BOX)
    share.run_once()
    assert not [line for line in logged if "alarm" in line or "cannot be read" in line]


def test_a_look_asks_once_for_each_daemons_sign_of_life_however_much_it_holds(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(6):
        share.pair(f"dog{n}")
    asked: list[str] = []
    really = lease.Watch._look
    with FolderDoor(share.layout, Manners(quiet_s=0.0, events=False)) as holder:
        jobs = holder.jobs(threading.Event())
        held = [next(jobs) for _ in range(6)]
        with FolderDoor(share.layout, Manners(quiet_s=0.0, events=False)) as other:
            monkeypatch.setattr(lease.Watch, "_look", lambda w, name: asked.append(name) or really(w, name))
            other._look_at_work(0.0)
        monkeypatch.undo()
        for job in held:
            holder.release(job)
        jobs.close()
    assert asked == [holder.worker]
