"""The watcher's and the worker's door: who owns a claim, what counts as an attempt, what nobody may lose."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sam_poll.doors.claims import Claims, Hold, listing
from sam_poll.doors.cluster_line import REST, Line, Word
from sam_poll.doors.cluster_watcher import WatcherDoor
from sam_poll.doors.cluster_worker import WorkerDoor
from sam_poll.doors.held import Held, note_of, noted
from sam_poll.doors.scan import Manners
from sam_poll.doors.settle import Signature
from sam_poll.errors import LostError, UnfinishedError
from sam_poll.health import Signs
from sam_poll.stats import Pulse
from sam_poll.types import Job
from tests.conftest import BOX, Daemon, Share, make_pipeline, picture_bytes, wait_until
from tests.door_contract import DOCUMENTS, DoorContract
from tests.redis_server import Server

QUICK: dict[str, Any] = {"quiet_s": 0.0, "rescan_s": 0.1, "lease_s": 2.0}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "redis") as made:
        yield made


def line_of(server: Server, signs: Signs) -> Any:
    return lambda share: Line(server.link(signs.alarms), share, 2.0)


class Running:
    """A door that runs in a thread of this process."""

    def __init__(self, door: Any, run: Any, signs: Signs) -> None:
        self.door, self.signs, self.stop = door, signs, threading.Event()
        self._run, self.error = run, None
        self._thread = threading.Thread(target=self._go, name="running")
        self.ready = threading.Event()

    def _go(self) -> None:
        try:
            with self.door:
                self.ready.set()
                self._run(self.door, self.stop)
        except BaseException as error:  # noqa: BLE001
            self.error = error

    @property
    def alarms(self) -> list[str]:
        return [alarm.kind for alarm in self.signs.alarms.active()]

    def __enter__(self) -> Running:
        self._thread.start()
        wait_until(lambda: self.ready.is_set() or self.error)
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "it did not stop"
        if self.error:
            raise self.error


def watcher(share: Share, server: Server, ahead: int = 64, first: tuple[str, ...] = (), **manners: Any) -> Running:
    signs = Signs()
    told = Manners(**{**QUICK, **manners})
    door = WatcherDoor(share.layout, told, line_of(server, signs), ahead, first, alarms=signs.alarms)
    return Running(door, WatcherDoor.run, signs)


def worker_door(share: Share, server: Server, signs: Signs | None = None, **manners: Any) -> WorkerDoor:
    signs = signs or Signs()
    return WorkerDoor(share.layout, Manners(**{**QUICK, **manners}), line=line_of(server, signs), alarms=signs.alarms)


def worker(share: Share, server: Server, engine: Any = None, **manners: Any) -> Running:
    signs = Signs()
    pipeline = make_pipeline(engine)
    made = Running(worker_door(share, server, signs, **manners), pipeline.run, signs)
    made.pipeline = pipeline  # type: ignore[attr-defined]
    return made


def move_in(share: Share, stem: str, seed: int = 0) -> None:
    """A pair, each file whole in the moment it is seen, for those who look while it comes."""
    (share.input / stem).parent.mkdir(parents=True, exist_ok=True)
    share.move_in(f"{stem}.jpg", picture_bytes(seed=seed))
    share.move_in(f"{stem}.json", BOX)


def holds(share: Share) -> list[Hold]:
    return [found.hold for found in listing(share.layout.work).claims if found.hold]


def take(door: WorkerDoor, count: int = 1) -> list[Job]:
    """So many jobs; the door is left open."""
    jobs: list[Job] = []
    stop = threading.Event()
    threading.Timer(30.0, stop.set).start()
    for job in door.jobs(stop):
        jobs.append(job)
        if len(jobs) == count:
            break
    stop.set()
    assert len(jobs) == count, "no job came"
    return jobs


@contextmanager
def both(share: Share, server: Server, **manners: Any) -> Iterator[tuple[Running, Running]]:
    with watcher(share, server, **manners) as one, worker(share, server, **manners) as other:
        yield one, other


class TestWorkerDoor(DoorContract):
    @pytest.fixture
    def door(self, share: Share, server: Server) -> Iterator[WorkerDoor]:
        share.pair("a")
        share.pair("b")
        with watcher(share, server), worker_door(share, server) as door:
            self.share = share
            yield door

    def answers(self, door: WorkerDoor) -> dict[str, bytes]:
        return {name: (self.share.output / name).read_bytes() for name in self.share.tree("output")}

    def refusals(self, door: WorkerDoor) -> dict[str, str]:
        errors = [name[: -len(".error.json")] for name in self.share.tree("failed") if name.endswith(".error.json")]
        return {name: self.share.error(name)["reason"] for name in errors}


# ── who owns a claim ──


def test_a_pair_is_claimed_by_the_watcher_and_answered_by_a_worker(share: Share, server: Server) -> None:
    with watcher(share, server) as one:
        move_in(share, "cam1/dog")
        wait_until(lambda: holds(share))
        assert holds(share) == [Hold(1, one.door.worker, attempt=0, prompts=1)]
        with worker_door(share, server) as door:
            (job,) = take(door)
            assert holds(share) == [Hold(2, door.worker, attempt=1, prompts=1)]
            assert (job.id, job.name, job.generation, job.attempt) == ("cam1/dog", "done/cam1/dog.jpg", 2, 1)
            door.deliver(job, DOCUMENTS)
    assert share.tree("output") == ["cam1/dog.mask.png", "cam1/dog.opex.json"]
    assert share.tree("done") == ["cam1/dog.jpg", "cam1/dog.json"]
    assert holds(share) == []


def test_siblings_are_one_message_and_come_together(share: Share, server: Server) -> None:
    share.drop("dog.jpg", picture_bytes())
    for name in ("dog.json", "dog.left.json", "dog.right.json"):
        share.drop(name, BOX)
    with watcher(share, server) as one, worker_door(share, server) as door:
        jobs = take(door, 3)
        assert sorted(job.id for job in jobs) == ["dog", "dog.left", "dog.right"]
        assert one.door.sender.sent == 1
        for job in jobs:
            door.deliver(job, DOCUMENTS)
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog.left.json", "dog.right.json"]


def test_a_prompt_that_comes_later_joins_the_claim_that_waits(share: Share, server: Server) -> None:
    with watcher(share, server) as one:
        move_in(share, "dog")
        wait_until(lambda: holds(share))
        share.move_in("dog.left.json", BOX)
        wait_until(lambda: "dog.left.json" in share.at_work())
        with worker_door(share, server) as door:
            assert sorted(job.id for job in take(door, 2)) == ["dog", "dog.left"]
            assert one.door.sender.sent == 1


def test_a_worker_that_has_lost_its_claim_cannot_end_it(share: Share, server: Server) -> None:
    share.pair("dog")
    with watcher(share, server), worker_door(share, server) as door:
        (job,) = take(door)
        claim = job.origin.claim
        claim.path.rename(claim.outer / str(Hold(9, "another", prompts=1)))
        with pytest.raises(LostError):
            door.deliver(job, DOCUMENTS)
    assert share.tree("output") == []


def test_a_message_of_a_generation_that_is_gone_is_dropped(share: Share, server: Server) -> None:
    with worker_door(share, server) as door:
        sender = Line(server.link(), door.share, 2.0)
        share.drop("../work/.dog.jpg/g3.a0.n1@w-1-2-3/dog.jpg", picture_bytes())
        numbers = [sender.send(Word(claim, n)) for claim, n in ((".dog.jpg", 2), (".gone.jpg", 1), ("../../x/.y", 1))]
        stop = threading.Event()
        thread = threading.Thread(target=lambda: list(door.jobs(stop)))
        thread.start()
        wait_until(lambda: not sender.known([(REST, number) for number in numbers]))
        stop.set()
        thread.join(30)
        assert door.dropped == 3
        assert holds(share) == [Hold(3, "w-1-2-3", attempt=0, prompts=1)]


def taken_of(door: WorkerDoor, *words: Word) -> list[Job]:
    """The jobs that a worker makes of these messages."""
    sender = Line(door.line.link, door.share, 2.0)
    numbers = [(REST, sender.send(word)) for word in words]
    jobs: list[Job] = []
    stop = threading.Event()
    thread = threading.Thread(target=lambda: jobs.extend(door.jobs(stop)))
    thread.start()
    wait_until(lambda: not sender.known(numbers) or not thread.is_alive())
    stop.set()
    thread.join(30)
    assert not sender.known(numbers), "a message has ended the worker"
    return jobs


@pytest.mark.parametrize("attempt", [1, 2])
def test_a_message_of_what_a_living_worker_runs_takes_nothing_and_counts_nothing(
    share: Share, server: Server, attempt: int
) -> None:
    share.pair("dog")
    with watcher(share, server), ExitStack() as stack:
        for _ in range(attempt - 1):
            with worker_door(share, server) as door:
                take(door)  # and it dies
        runner, thief = (stack.enter_context(worker_door(share, server)) for _ in range(2))
        (job,) = take(runner)
        before = holds(share)
        assert [hold.attempt for hold in before] == [attempt]
        forged = [Word(".dog.jpg", generation) for generation in range(before[0].generation + 3)]
        assert taken_of(thief, *forged) == []
        assert taken_of(runner, *forged) == []  # nor from itself
        assert holds(share) == before
        runner.deliver(job, DOCUMENTS)
    assert share.tree("done") == ["dog.jpg", "dog.json"]
    assert share.tree("failed") == []


def test_a_message_that_comes_twice_is_one_job(share: Share, server: Server) -> None:
    with watcher(share, server):
        move_in(share, "dog")
        wait_until(lambda: holds(share))
        with worker_door(share, server) as door:
            (job,) = taken_of(door, *[Word(".dog.jpg", 1)] * 3)
            assert job.attempt == 1
            door.release(job)


def test_what_a_dead_workers_watcher_hands_out_again_is_taken(share: Share, server: Server) -> None:
    share.pair("dog")
    with watcher(share, server) as one:
        with worker_door(share, server) as door:
            take(door)
        wait_until(lambda: holds(share)[0].worker == one.door.worker)
        assert holds(share)[0].attempt == 1  # it was run once, and waits again
        with worker_door(share, server) as door:
            (job,) = take(door)
            assert job.attempt == 2
            door.deliver(job, DOCUMENTS)


STRANGE_NAMES = [
    "\ud800/.dog.jpg",
    "." + "x" * 3000,
    "/".join(["a" * 200] * 15) + "/.dog.jpg",
    "a/" * 1900 + ".dog.jpg",
    "../in/.dog.jpg",
    "/etc/.dog.jpg",
    ".dog.jpg/.dog.jpg",
    "file/.dog.jpg",
    ".dog\0.jpg",
    ".dog\n.jpg",
    "",
]


@pytest.mark.parametrize("name", STRANGE_NAMES, ids=range(len(STRANGE_NAMES)))
def test_a_message_that_names_no_claim_is_dropped_and_the_next_one_is_answered(
    share: Share, server: Server, name: str, logged: list[str]
) -> None:
    share.pair("dog")
    with watcher(share, server) as one:
        wait_until(lambda: holds(share))
        (share.work / "file").write_text("")
        with worker_door(share, server) as door:
            taken_of(door, Word(name, 1))
            assert door.dropped == 1
            assert len([text for text in logged if "dropped" in text]) <= 1
            assert all(len(text) < 500 for text in logged if "dropped" in text)
        assert not one.alarms
        with worker(share, server) as other:
            wait_until(lambda: share.tree("output") == ["dog.mask.png"])
            assert not other.alarms


def test_a_name_that_the_share_does_not_take_is_dropped_and_is_no_sick_share(
    share: Share, server: Server, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    with worker_door(share, server) as door:
        monkeypatch.setattr("sam_poll.doors.cluster_worker.claims_in", partial(_fail, OSError(errno.EACCES, "denied")))
        taken_of(door, Word("private/.dog.jpg", 1))
        assert door.dropped == 1
        assert [alarm.kind for alarm in door._alarms.active()] == []
    assert len([text for text in logged if "private/dog.jpg cannot be looked at" in text]) == 1


def test_names_that_depend_on_their_neighbours_are_the_same_for_a_worker(share: Share, server: Server) -> None:
    for name in ("dog.jpg", "dog.png"):
        share.drop(name, picture_bytes(name[-4:]))
        share.drop(f"{name}.json", BOX)
    with watcher(share, server):
        wait_until(lambda: len(holds(share)) == 2)
        with worker(share, server):
            wait_until(lambda: len(share.tree("output")) == 2)
    alone = Share(share.root / "alone")
    for name in ("dog.jpg", "dog.png"):
        alone.drop(name, picture_bytes(name[-4:]))
        alone.drop(f"{name}.json", BOX)
    alone.run_once()
    assert share.tree("output") == alone.tree("output")
    assert share.tree("done") == alone.tree("done")


# ── attempts ──


def test_waiting_is_no_attempt_however_many_watchers_die(share: Share, server: Server) -> None:
    share.pair("dog")
    for generation in range(1, 6):
        with watcher(share, server, attempts=1):
            wait_until(lambda n=generation: [(h.generation, h.attempt) for h in holds(share)] == [(n, 0)])
    with both(share, server, attempts=1):
        wait_until(lambda: share.tree("output"))
    assert share.tree("failed") == []


def test_a_run_that_ended_its_worker_counts_and_the_last_one_is_a_refusal(share: Share, server: Server) -> None:
    share.pair("dog")
    with watcher(share, server, attempts=2):
        for attempt in (1, 2):
            with worker_door(share, server, attempts=2) as door:
                (job,) = take(door)
                assert job.attempt == attempt
        wait_until(lambda: share.tree("failed"))
        wait_until(lambda: not holds(share))
    assert share.error("dog")["code"] == "poison"
    assert share.tree("failed") == ["dog.error.json", "dog.jpg", "dog.json"]


def test_what_goes_back_to_in_is_no_attempt(share: Share, server: Server) -> None:
    share.pair("dog")
    with watcher(share, server), worker_door(share, server) as door:
        for _ in range(4):
            (job,) = take(door)
            assert job.attempt == 1
            door.release(job)


# ── what the line forgets ──


def test_a_wiped_redis_loses_nothing(share: Share, server: Server) -> None:
    with watcher(share, server) as one:
        for number in range(5):
            move_in(share, f"dog{number}", seed=number)
        wait_until(lambda: one.door.sender.sent == 5)
        server.client.flushall()
        with worker(share, server):
            wait_until(lambda: len(share.tree("output")) == 5)
        assert one.door.sender.again == 5
        assert all(job.attempt == 0 for job in holds(share))


def test_redis_away_is_an_alarm_and_nothing_more_is_claimed(share: Share, server: Server) -> None:
    with both(share, server) as (one, other):
        server.kill()
        wait_until(lambda: "redis" in one.alarms and "redis" in other.alarms)
        move_in(share, "late")
        scans = one.door.scans
        wait_until(lambda: one.door.scans > scans + 2)
        assert holds(share) == []
        server.start()
        wait_until(lambda: share.tree("output") == ["late.mask.png"])
        wait_until(lambda: not one.alarms and not other.alarms)


def test_what_is_at_work_is_answered_without_redis(share: Share, server: Server) -> None:
    share.pair("dog")
    with watcher(share, server), worker_door(share, server) as door:
        (job,) = take(door)
        server.kill()
        door.deliver(job, DOCUMENTS)
        assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_a_plain_daemon_goes_on_where_a_watcher_has_ended(share: Share, server: Server) -> None:
    with watcher(share, server):
        move_in(share, "dog")
        wait_until(lambda: holds(share))
    assert holds(share)
    server.kill()
    with Daemon(share, **QUICK):
        wait_until(lambda: share.tree("output") == ["dog.mask.png"])
    assert share.tree("done") == ["dog.jpg", "dog.json"]


# ── bounds and order ──


def test_no_more_is_claimed_than_may_wait(share: Share, server: Server) -> None:
    for number in range(12):
        share.pair(f"dog{number:02}", seed=number)
    with watcher(share, server, ahead=4) as one:
        wait_until(lambda: len(holds(share)) == 4)
        scans = one.door.scans
        wait_until(lambda: one.door.scans > scans + 2)
        assert len(holds(share)) == 4
        with worker(share, server):
            wait_until(lambda: len(share.tree("output")) == 12)


def test_a_first_folder_does_not_wait_behind_the_others(share: Share, server: Server) -> None:
    for number in range(6):
        share.pair(f"archive/a{number}", seed=number)
    with watcher(share, server, ahead=3, first=("live", "door*")):
        wait_until(lambda: len(holds(share)) == 3)
        for name in ("live/cam1/x", "doorbell/y"):
            move_in(share, name, seed=len(name))
        wait_until(lambda: len(holds(share)) == 5)
        with worker_door(share, server) as door:
            jobs = take(door, 3)
            assert {job.id for job in jobs[:2]} == {"live/cam1/x", "doorbell/y"}
            assert jobs[2].id.startswith("archive/")


# ── refusals, and what is to wait ──


def test_what_needs_no_network_is_refused_without_a_worker(share: Share, server: Server) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.json", '{"box": ')
    share.drop("dog.good.json", BOX)
    with watcher(share, server):
        wait_until(lambda: "dog.error.json" in share.tree("failed"))
        with worker(share, server):
            wait_until(lambda: share.tree("output") == ["dog.good.mask.png"])
    assert share.tree("failed") == ["dog.error.json", "dog.json"]


def test_a_cut_picture_waits_in_in_and_is_refused_when_it_stays_so(share: Share, server: Server) -> None:
    share.drop("dog.jpg", picture_bytes()[:-200])
    share.drop("dog.json", BOX)
    with both(share, server, patience_s=1.0) as (one, _):
        wait_until(lambda: share.tree("failed"))
        assert one.door.sender.sent == 1, "it was handed out again while it waited"
        wait_until(lambda: not holds(share))
    assert share.tree("failed") == ["dog.error.json", "dog.jpg", "dog.json"]
    assert share.error("dog")["code"] == "picture"


def test_a_cut_picture_that_is_mended_is_answered(share: Share, server: Server) -> None:
    share.drop("dog.jpg", picture_bytes()[:-200])
    for name in ("dog.json", "dog.left.json"):
        share.drop(name, BOX)
    with both(share, server, patience_s=30.0) as (one, _):
        wait_until(lambda: one.door.sender.sent == 1 and not holds(share) and "dog.jpg" in share.tree("input"))
        share.move_in("dog.jpg", picture_bytes())
        wait_until(lambda: len(share.tree("output")) == 2)
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog.left.json"]


def test_a_picture_that_cannot_be_read_is_not_offered_again_at_once(share: Share, server: Server) -> None:
    share.pair("dog")
    with watcher(share, server) as one, worker_door(share, server) as door:
        (job,) = take(door)
        door.release(job, OSError(errno.EIO, "bad sector"))
        scans = one.door.scans
        wait_until(lambda: share.tree("input") == ["dog.jpg", "dog.json"])
        wait_until(lambda: one.door.scans > scans + 3)
        assert one.door.sender.sent == 1
        (job,) = take(door)  # 2 s later
        assert job.attempt == 1
        door.deliver(job, DOCUMENTS)


def test_a_job_whose_answer_has_no_place_goes_back_with_a_pause_and_holds_up_no_other(
    share: Share, server: Server, logged: list[str]
) -> None:
    share.output.mkdir()
    (share.output / "cam1").write_text("a file")
    with both(share, server):
        move_in(share, "cam1/dog")
        move_in(share, "cat")
        wait_until(lambda: "cat.json" in share.tree("done"))
        wait_until(lambda: share.tree("input") == ["cam1/dog.jpg", "cam1/dog.json"])
        for n in range(5):
            move_in(share, f"late{n}")
            wait_until(lambda n=n: f"late{n}.json" in share.tree("done"))
        assert sum("cannot be put away" in line for line in logged) <= 2
        (share.output / "cam1").unlink()
        wait_until(lambda: "cam1/dog.json" in share.tree("done"))


def test_what_was_to_wait_is_known_to_whoever_finds_it(share: Share, server: Server) -> None:
    share.pair("dog")
    with worker_door(share, server) as door:
        with watcher(share, server):
            (job,) = take(door)
        door.defer(job, UnfinishedError("is cut off", place="dog.jpg"))
    (hold,) = holds(share)
    assert hold.place == "input"
    with Daemon(share, **{**QUICK, "patience_s": 0.5}) as daemon:
        wait_until(lambda: share.tree("failed") or share.tree("output"))
        assert daemon.door.recovered == 1
    assert share.error("dog")["reason"] == "is cut off"


def test_a_claim_that_could_not_be_given_back_is_begun_again_by_the_worker_itself(
    share: Share, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    with watcher(share, server), worker_door(share, server) as door:
        (job,) = take(door)
        with monkeypatch.context() as sick:
            sick.setattr(door._desk, "end", partial(_fail, OSError(errno.EIO, "sick")))
            with pytest.raises(OSError, match="sick"):
                door.release(job)
        (again,) = take(door)
        assert (again.id, again.attempt) == ("dog", 1)
        door.deliver(again, DOCUMENTS)
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_a_share_that_is_sick_where_a_claim_is_begun_costs_a_pause_and_no_job(
    share: Share, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    with watcher(share, server), worker_door(share, server) as door:
        real, failed = door._desk.resume, []

        def once(*given: Any, **more: Any) -> Any:
            if not failed:
                failed.append(True)
                raise OSError(errno.EIO, "sick")
            return real(*given, **more)

        monkeypatch.setattr(door._desk, "resume", once)
        (job,) = take(door)
        assert failed
        door.deliver(job, DOCUMENTS)


def _fail(error: OSError, *given: Any, **more: Any) -> None:
    raise error


def test_a_job_whose_process_has_ended_is_begun_again_and_counts(share: Share, server: Server) -> None:
    share.pair("dog")
    with watcher(share, server), worker_door(share, server) as door:
        (job,) = take(door)
        door.abandon(job)
        (again,) = take(door)
        assert (again.id, again.attempt) == ("dog", 2)
        door.deliver(again, DOCUMENTS)


def test_several_watchers_and_workers_share_the_work(share: Share, server: Server) -> None:
    for number in range(40):
        share.pair(f"dog{number:02}", seed=number)
    with ExitStack() as stack:
        watchers = [stack.enter_context(watcher(share, server, ahead=8)) for _ in range(2)]
        workers = [stack.enter_context(worker(share, server)) for _ in range(3)]
        wait_until(lambda: len(share.tree("output")) == 40)
        wait_until(lambda: not holds(share))
        assert all(one.signs.alarms.active() == [] for one in (*watchers, *workers))
    assert len(share.tree("done")) == 80


def test_what_waits_is_looked_after_and_that_can_be_seen(share: Share, server: Server) -> None:
    pulse = Pulse()
    door = WatcherDoor(share.layout, Manners(**QUICK), line_of(server, Signs()), 8, (), sending=pulse)
    with Running(door, WatcherDoor.run, Signs()):
        pulse.beat(ago=1000.0)
        wait_until(lambda: pulse.age < 100)


# ── notes ──


def test_a_note_of_a_claim_that_was_not_given_back_after_all_is_not_believed(share: Share) -> None:
    share.drop("../work/.dog.jpg/g2.a1.n1@w-1-2-3/dog.jpg", picture_bytes())
    held = share.drop("../work/.dog.jpg/g2.a1.n1@w-1-2-3/.held", note_of([Held("dog.json", {}, 60.0, None)]).decode())
    claims = Claims(share.layout, "heir-1-2-3", lambda: None)
    (found,) = claims.listing().claims
    claim = claims.take_over(found)
    assert claim
    assert claims.note(claim) is None
    assert not held.exists()


def test_a_note_says_what_it_was_made_of() -> None:
    held = [
        Held("dog.json", {"dog.jpg": Signature(1, 2, 3), "dog.json": Signature(4, 5, 6)}, 2.5, None),
        Held("straße.json", {}, 0.0, UnfinishedError("is cut", place="dog.jpg", remedy=None)),
    ]
    first, second = noted(note_of(held))
    assert first == held[0]
    assert isinstance(second.error, UnfinishedError)
    assert (second.error.reason, second.error.place, second.error.remedy) == ("is cut", "dog.jpg", None)


@pytest.mark.parametrize(
    "note",
    [
        b"",
        b"nonsense",
        b"[1]",
        b'{"a": 1}',
        b'[{"job": "x"}]',
        b"\xff",
        b'[{"job":1,"seen":[],"seconds":1,"error":null}]',
        b"[" * 100_000,
        b'[{"job":"x","seen":{"a":[Infinity,1,1]},"seconds":1,"error":null}]',
    ],
)
def test_a_note_that_makes_no_sense_is_nobodys(note: bytes) -> None:
    assert list(noted(note)) == []
