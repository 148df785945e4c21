"""Dispatcher and worker: ownership of claims, attempts, lost messages, order, deferrals."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import Any

import pytest
from dramatiq.middleware import TimeLimitExceeded, raise_thread_exception

from sam_poll.core.errors import ClaimLostError, IncompleteFileError
from sam_poll.integrations.cluster.messages import FIRST, queue_names
from sam_poll.integrations.cluster.worker import ClusterWorkerSource
from sam_poll.share.claims.deferrals import Deferral, decode_note, encode_note
from sam_poll.share.claims.model import ClaimState
from sam_poll.share.claims.store import ClaimStore
from sam_poll.share.intake.stability import Signature
from tests.conftest import BOX, Daemon, Share, picture_bytes, wait_until
from tests.support.cluster_sources import (
    QUICK,
    Door,
    DramatiqWorker,
    Running,
    answered,
    connect,
    holds,
    watcher,
    wipe,
    worker,
)
from tests.support.rough_masks import mask_bytes
from tests.support.source_contract import DOCUMENTS, SourceContract


def move_in(share: Share, stem: str, seed: int = 0) -> None:
    """Move a pair into the input folder; each file is complete as soon as it can be seen."""
    (share.input / stem).parent.mkdir(parents=True, exist_ok=True)
    share.move_in(f"{stem}.jpg", picture_bytes(seed=seed))
    share.move_in(f"{stem}.json", BOX)


@contextmanager
def both(share: Share, server: Any, **options: Any) -> Iterator[tuple[Running, DramatiqWorker]]:
    with watcher(share, server, **options) as one, worker(share, server, **options) as other:
        yield one, other


class TestClusterWorkerSource(SourceContract):
    @pytest.fixture
    def source(self, share: Share, server: Any) -> Iterator[ClusterWorkerSource]:
        share.pair("a")
        share.pair("b")
        with watcher(share, server), Door(share, server) as source:
            self.share = share
            yield source

    def answers(self, source: ClusterWorkerSource) -> dict[str, bytes]:
        return {name: (self.share.output / name).read_bytes() for name in self.share.tree("output")}

    def refusals(self, source: ClusterWorkerSource) -> dict[str, str]:
        errors = [
            name[: -len(".error.json")]
            for name in self.share.tree("failed")
            if name.endswith(".error.json")
        ]
        return {name: self.share.error(name)["reason"] for name in errors}


# ── ownership ──


def test_pair_is_claimed_by_the_dispatcher_and_answered_by_a_worker(
    share: Share, server: Any
) -> None:
    with watcher(share, server) as one:
        move_in(share, "cam1/dog")
        wait_until(lambda: holds(share))
        assert holds(share) == [ClaimState(1, one.source.worker, attempt=0, prompts=1)]
        with Door(share, server) as source:
            (job,) = source.take()
            assert holds(share) == [ClaimState(2, source.worker, attempt=1, prompts=1)]
            assert (job.id, job.name, job.generation, job.attempt) == (
                "cam1/dog",
                "done/cam1/dog.jpg",
                2,
                1,
            )
            source.deliver(job, DOCUMENTS)
    assert share.tree("output") == ["cam1/dog.mask.png", "cam1/dog.opex.json"]
    assert share.tree("done") == ["cam1/dog.jpg", "cam1/dog.json"]
    assert holds(share) == []


def test_texts_are_answered_by_a_worker(share: Share, server: Any) -> None:
    with both(share, server):
        share.move_in("dog.jpg", picture_bytes())
        share.move_in("dog.json", {"text": ["a", "b"]})
        wait_until(lambda: share.tree("output"))
        share.move_in("cat.jpg", picture_bytes())
        share.move_in("cat.json", {"text": ["a", "a"]})
        wait_until(lambda: "cat.error.json" in share.tree("failed"))
    assert share.tree("output") == ["dog.mask.png"]
    assert share.error("cat")["place"] == "text[1]"


def test_a_mask_file_goes_with_its_claim_to_the_worker_and_is_waited_for(
    share: Share, server: Any
) -> None:
    with both(share, server, patience_s=60.0):
        share.move_in("dog.jpg", picture_bytes())
        share.move_in("dog.json", {"mask": "dog.rough.png"})
        share.move_in("cat.jpg", picture_bytes())
        share.move_in("cat.rough.png", mask_bytes()[:-20])
        share.move_in("cat.json", {"mask": "cat.rough.png"})
        share.move_in("dog.rough.png", mask_bytes())
        wait_until(lambda: share.tree("output") == ["dog.mask.png"])
        wait_until(lambda: not holds(share) and "cat.rough.png" in share.tree("input"))
        share.move_in("cat.rough.png", mask_bytes())
        wait_until(lambda: share.tree("output") == ["cat.mask.png", "dog.mask.png"])
    assert share.tree("done") == [
        *("cat.jpg", "cat.json", "cat.rough.png", "dog.jpg", "dog.json", "dog.rough.png"),
    ]


def test_prompts_of_one_picture_are_one_message_and_one_claim(share: Share, server: Any) -> None:
    share.drop("dog.jpg", picture_bytes())
    for name in ("dog.json", "dog.left.json", "dog.right.json"):
        share.drop(name, BOX)
    with watcher(share, server) as one, Door(share, server) as source:
        jobs = source.take(3)
        assert sorted(job.id for job in jobs) == ["dog", "dog.left", "dog.right"]
        assert one.sent - one.again == 1
        for job in jobs:
            source.deliver(job, DOCUMENTS)
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog.left.json", "dog.right.json"]


def test_later_prompt_joins_the_waiting_claim(share: Share, server: Any) -> None:
    with watcher(share, server) as one:
        move_in(share, "dog")
        wait_until(lambda: holds(share))
        share.move_in("dog.left.json", BOX)
        wait_until(lambda: "dog.left.json" in share.at_work())
        with Door(share, server) as source:
            assert sorted(job.id for job in source.take(2)) == ["dog", "dog.left"]
            assert one.sent - one.again == 1


def test_worker_that_lost_its_claim_cannot_end_it(share: Share, server: Any) -> None:
    share.pair("dog")
    with watcher(share, server), Door(share, server) as source:
        (job,) = source.take()
        claim = job.source_ref.claim
        claim.path.rename(claim.outer / str(ClaimState(9, "another", prompts=1)))
        with pytest.raises(ClaimLostError):
            source.deliver(job, DOCUMENTS)
    assert share.tree("output") == []


def test_message_of_a_past_generation_is_dropped(share: Share, server: Any) -> None:
    with Door(share, server) as source:
        share.drop("../work/.dog.jpg/g3.a0.n1@w-1-2-3/dog.jpg", picture_bytes())
        assert answered(source, (".dog.jpg", 2), (".gone.jpg", 1), ("../../x/.y", 1)) == []
        assert holds(share) == [ClaimState(3, "w-1-2-3", attempt=0, prompts=1)]


@pytest.mark.parametrize("attempt", [1, 2])
def test_message_of_a_running_job_takes_nothing_and_counts_no_attempt(
    share: Share, server: Any, attempt: int
) -> None:
    share.pair("dog")
    with watcher(share, server), ExitStack() as stack:
        for _ in range(attempt - 1):
            with Door(share, server) as source:
                source.take()  # and it dies
        runner = stack.enter_context(Door(share, server))
        (job,) = runner.take()
        thief = stack.enter_context(Door(share, server))  # only now, or it might get the message
        before = holds(share)
        assert [hold.attempt for hold in before] == [attempt]
        forged = [(".dog.jpg", generation) for generation in range(before[0].generation + 3)]
        assert answered(thief, *forged) == []
        assert answered(runner, *forged) == []  # nor from itself
        assert holds(share) == before
        runner.deliver(job, DOCUMENTS)
    assert share.tree("done") == ["dog.jpg", "dog.json"]
    assert share.tree("failed") == []


def test_message_that_comes_twice_is_one_job(share: Share, server: Any) -> None:
    with watcher(share, server):
        move_in(share, "dog")
        wait_until(lambda: holds(share))
        with Door(share, server) as source:
            (job,) = answered(source, *[(".dog.jpg", 1)] * 3)
            assert job.attempt == 1
            source.requeue(job)


def test_claim_of_a_dead_worker_is_sent_again_and_taken(share: Share, server: Any) -> None:
    share.pair("dog")
    with watcher(share, server) as one:
        with Door(share, server) as source:
            source.take()
        wait_until(lambda: holds(share)[0].worker == one.source.worker)
        assert holds(share)[0].attempt == 1  # it was run once, and waits again
        with Door(share, server) as source:
            (job,) = source.take()
            assert job.attempt == 2
            source.deliver(job, DOCUMENTS)


def test_claim_of_a_dead_worker_is_sent_again_also_while_the_queue_is_full(
    share: Share, server: Any
) -> None:
    for number in range(6):
        share.pair(f"dog{number}", seed=number)
    with watcher(share, server, ahead=2) as one:
        with Door(share, server, threads=1) as source:
            source.take()
            wait_until(lambda: len(holds(share)) >= 3)  # a worker may fetch one more message ahead
            wait_until(lambda: one.source.outboxes[False].is_full)
        wait_until(lambda: all(hold.worker == one.source.worker for hold in holds(share)))
        attempts = sorted(hold.attempt for hold in holds(share))
        assert attempts == [*[0] * (len(attempts) - 1), 1]


def test_call_that_meets_the_time_limit_ends_and_its_job_goes_on(
    share: Share, redis_only: Any, logged: list[str]
) -> None:
    share.pair("dog")
    with watcher(share, redis_only), Door(share, redis_only, threads=1) as source:
        (job,) = source.take()
        (thread,) = source.worker_threads
        raise_thread_exception(thread, TimeLimitExceeded)
        wait_until(lambda: any("takes long" in line for line in logged))
        assert [hold.attempt for hold in holds(share)] == [1]
        source.deliver(job, DOCUMENTS)
    assert share.tree("done") == ["dog.jpg", "dog.json"]


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


def test_message_without_a_claim_is_dropped_and_the_next_one_is_answered(
    share: Share, redis_only: Any, logged: list[str]
) -> None:
    with Door(share, redis_only) as source:
        (share.work / "file").write_text("")
        assert answered(source, *[(name, 1) for name in STRANGE_NAMES]) == []
        assert all(len(text) < 500 for text in logged)
        assert not source.alarms
    share.pair("dog")
    with both(share, redis_only) as (_, other):
        wait_until(lambda: share.tree("output") == ["dog.mask.png"])
        assert not other.alarms


def test_message_of_an_unreadable_path_is_dropped_without_an_alarm(
    share: Share, server: Any, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    with Door(share, server) as source:
        monkeypatch.setattr(
            "sam_poll.integrations.cluster.worker.claims_in",
            partial(_fail, OSError(errno.EACCES, "denied")),
        )
        assert answered(source, ("private/.dog.jpg", 1)) == []
        assert [alarm.kind for alarm in source._alarms.active()] == []
    assert len([text for text in logged if '"private/dog.jpg" cannot be looked at' in text]) == 1


def test_output_names_that_depend_on_other_files_are_the_same_for_a_worker(
    share: Share, server: Any
) -> None:
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


def test_waiting_is_not_an_attempt_also_when_dispatchers_die(share: Share, server: Any) -> None:
    share.pair("dog")
    for generation in range(1, 6):
        with watcher(share, server, attempts=1):
            wait_until(
                lambda n=generation: [(h.generation, h.attempt) for h in holds(share)] == [(n, 0)]
            )
    with both(share, server, attempts=1):
        wait_until(lambda: share.tree("output"))
    assert share.tree("failed") == []


def test_run_that_ended_its_worker_counts_as_an_attempt_and_the_last_is_poison(
    share: Share, server: Any
) -> None:
    share.pair("dog")
    with watcher(share, server, attempts=2):
        for attempt in (1, 2):
            with Door(share, server, attempts=2) as source:
                (job,) = source.take()
                assert job.attempt == attempt
        wait_until(lambda: share.tree("failed"))
        wait_until(lambda: not holds(share))
    assert share.error("dog")["code"] == "poison"
    assert share.tree("failed") == ["dog.error.json", "dog.jpg", "dog.json"]


def test_requeued_job_is_not_an_attempt(share: Share, server: Any) -> None:
    share.pair("dog")
    with watcher(share, server), Door(share, server) as source:
        for _ in range(4):
            (job,) = source.take()
            assert job.attempt == 1
            source.requeue(job)


# ── lost messages ──


def test_wiped_broker_loses_no_job(share: Share, server: Any) -> None:
    with watcher(share, server) as one:
        for number in range(5):
            move_in(share, f"dog{number}", seed=number)
        wait_until(lambda: one.sent == 5)
        wipe(server, one.source.share)
        with worker(share, server):
            wait_until(lambda: len(share.tree("output")) == 5)
        assert one.again >= 5  # a busy worker may have fetched some ahead
        assert all(job.attempt == 0 for job in holds(share))


@pytest.mark.slow
def test_unreachable_broker_raises_an_alarm_and_stops_claiming(share: Share, server: Any) -> None:
    with both(share, server) as (one, other):
        server.kill()
        wait_until(lambda: one.alarms and other.alarms)
        wait_until(lambda: all(outbox.is_full for outbox in one.source.outboxes.values()))
        move_in(share, "late")
        scans = one.source.scans
        wait_until(lambda: one.source.scans > scans + 2)
        assert holds(share) == []
        server.start()
        wait_until(lambda: share.tree("output") == ["late.mask.png"])
        wait_until(lambda: not one.alarms and not other.alarms)


def test_running_job_is_answered_without_the_broker(share: Share, redis_only: Any) -> None:
    share.pair("dog")
    with watcher(share, redis_only), Door(share, redis_only) as source:
        (job,) = source.take()
        redis_only.kill()
        source.deliver(job, DOCUMENTS)
        assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_plain_daemon_takes_over_from_an_ended_dispatcher(share: Share, redis_only: Any) -> None:
    with watcher(share, redis_only):
        move_in(share, "dog")
        wait_until(lambda: holds(share))
    assert holds(share)
    redis_only.kill()
    with Daemon(share, **QUICK):
        wait_until(lambda: share.tree("output") == ["dog.mask.png"])
    assert share.tree("done") == ["dog.jpg", "dog.json"]


# ── bounds and order ──


def test_ahead_limits_the_number_of_waiting_claims(share: Share, server: Any) -> None:
    for number in range(12):
        share.pair(f"dog{number:02}", seed=number)
    with watcher(share, server, ahead=4) as one:
        wait_until(lambda: len(holds(share)) == 4)
        scans = one.source.scans
        wait_until(lambda: one.source.scans > scans + 2)
        assert len(holds(share)) == 4
        with worker(share, server):
            wait_until(lambda: len(share.tree("output")) == 12)


def test_first_folder_does_not_wait_behind_the_others(share: Share, server: Any) -> None:
    for number in range(6):
        share.pair(f"archive/a{number}", seed=number)
    with (
        watcher(share, server, ahead=3, first=("live", "door*")) as one,
        closing(connect(server)) as broker,
    ):
        wait_until(lambda: len(holds(share)) == 3)
        for name in ("live/cam1/x", "doorbell/y"):
            move_in(share, name, seed=len(name))
        wait_until(lambda: len(holds(share)) == 5)
        urgent = queue_names(broker.prefix, one.source.share)[FIRST]
        with Door(share, server, threads=2) as source:
            jobs = source.take(2)  # whatever was fetched first
            wait_until(lambda: broker.length(urgent) == 0)
            while len(jobs) < 4:
                source.deliver(jobs[-2], DOCUMENTS)
                jobs += source.take(1)
            assert {job.id for job in jobs} >= {"live/cam1/x", "doorbell/y"}


# ── rejected and deferred jobs ──


def test_bad_prompt_is_rejected_without_a_worker(share: Share, server: Any) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.json", '{"box": ')
    share.drop("dog.good.json", BOX)
    with watcher(share, server):
        wait_until(lambda: "dog.error.json" in share.tree("failed"))
        with worker(share, server):
            wait_until(lambda: share.tree("output") == ["dog.good.mask.png"])
    assert share.tree("failed") == ["dog.error.json", "dog.json"]


def test_incomplete_picture_waits_in_the_input_folder_and_is_then_rejected(
    share: Share, server: Any
) -> None:
    share.drop("dog.jpg", picture_bytes()[:-200])
    share.drop("dog.json", BOX)
    with both(share, server, patience_s=1.0) as (one, _):
        wait_until(lambda: share.tree("failed"))
        assert one.sent - one.again == 1, "it was handed out again while it waited"
        wait_until(lambda: not holds(share))
    assert share.tree("failed") == ["dog.error.json", "dog.jpg", "dog.json"]
    assert share.error("dog")["code"] == "picture"


def test_incomplete_picture_that_is_completed_is_answered(share: Share, server: Any) -> None:
    share.drop("dog.jpg", picture_bytes()[:-200])
    for name in ("dog.json", "dog.left.json"):
        share.drop(name, BOX)
    with both(share, server, patience_s=30.0) as (one, _):
        wait_until(lambda: one.sent and not holds(share) and "dog.jpg" in share.tree("input"))
        share.move_in("dog.jpg", picture_bytes())
        wait_until(lambda: len(share.tree("output")) == 2)
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog.left.json"]


def test_unreadable_picture_is_not_sent_again_at_once(share: Share, server: Any) -> None:
    share.pair("dog")
    with watcher(share, server), Door(share, server) as source:
        (job,) = source.take()
        requeued = time.monotonic()
        source.requeue(job, OSError(errno.EIO, "bad sector"))
        (job,) = source.take()
        assert time.monotonic() - requeued >= 1.9  # see `unreadable_pictures`
        assert job.attempt == 1
        source.deliver(job, DOCUMENTS)


def test_job_whose_outputs_cannot_be_written_pauses_and_delays_no_other(
    share: Share, server: Any, logged: list[str]
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


def test_deferral_is_read_by_the_daemon_that_finds_the_claim(share: Share, server: Any) -> None:
    share.pair("dog")
    with Door(share, server) as source:
        with watcher(share, server):
            (job,) = source.take()
        source.defer(job, IncompleteFileError("is cut off", place="dog.jpg"))
    (hold,) = holds(share)
    assert hold.place == "input"
    with Daemon(share, **{**QUICK, "patience_s": 0.5}) as daemon:
        wait_until(lambda: "dog.error.json" in share.tree("failed"))
        assert daemon.source.recovered == 1
    assert share.error("dog")["reason"] == "is cut off"


def test_claim_that_could_not_be_put_back_is_started_again_by_its_worker(
    share: Share, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    with watcher(share, server), Door(share, server) as source:
        (job,) = source.take()
        with monkeypatch.context() as sick:
            sick.setattr(source._active, "end", partial(_fail, OSError(errno.EIO, "sick")))
            with pytest.raises(OSError, match="sick"):
                source.requeue(job)
        (again,) = source.take()
        assert (again.id, again.attempt) == ("dog", 1)
        source.deliver(again, DOCUMENTS)
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_share_error_at_the_start_of_a_claim_loses_no_job(
    share: Share, server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    with watcher(share, server), Door(share, server) as source:
        real, failed = source._factory.resume, []

        def once(*given: Any, **more: Any) -> Any:
            if not failed:
                failed.append(True)
                raise OSError(errno.EIO, "sick")
            return real(*given, **more)

        monkeypatch.setattr(source._factory, "resume", once)
        (job,) = source.take()
        assert failed
        source.deliver(job, DOCUMENTS)


def _fail(error: OSError, *given: Any, **more: Any) -> None:
    raise error


def test_failed_attempt_starts_the_job_again_and_counts(share: Share, server: Any) -> None:
    share.pair("dog")
    with watcher(share, server), Door(share, server) as source:
        (job,) = source.take()
        source.fail_attempt(job)
        (again,) = source.take()
        assert (again.id, again.attempt) == ("dog", 2)
        source.deliver(again, DOCUMENTS)


@pytest.mark.slow
def test_several_dispatchers_and_workers_share_the_work(share: Share, server: Any) -> None:
    for number in range(40):
        share.pair(f"dog{number:02}", seed=number)
    with ExitStack() as stack:
        watchers = [stack.enter_context(watcher(share, server, ahead=8)) for _ in range(2)]
        workers = [stack.enter_context(worker(share, server)) for _ in range(3)]
        wait_until(lambda: len(share.tree("output")) == 40)
        wait_until(lambda: not holds(share))
        assert all(one.telemetry.alarms.active() == [] for one in (*watchers, *workers))
    assert len(share.tree("done")) == 80


# ── notes ──


def test_note_of_a_claim_that_was_not_put_back_is_ignored(share: Share) -> None:
    share.drop("../work/.dog.jpg/g2.a1.n1@w-1-2-3/dog.jpg", picture_bytes())
    held = share.drop(
        "../work/.dog.jpg/g2.a1.n1@w-1-2-3/.held",
        encode_note([Deferral("dog.json", {}, 60.0, None)]).decode(),
    )
    claims = ClaimStore(share.layout, "heir-1-2-3", lambda: None)
    (found,) = claims.list_work().claims
    claim = claims.take_over(found)
    assert claim
    assert claims.note(claim) is None
    assert not held.exists()


def test_note_holds_the_deferrals_it_was_made_of() -> None:
    held = [
        Deferral(
            "dog.json", {"dog.jpg": Signature(1, 2, 3), "dog.json": Signature(4, 5, 6)}, 2.5, None
        ),
        Deferral(
            "straße.json", {}, 0.0, IncompleteFileError("is cut", place="dog.jpg", remedy=None)
        ),
    ]
    first, second = decode_note(encode_note(held))
    assert first == held[0]
    assert isinstance(second.error, IncompleteFileError)
    assert (second.error.reason, second.error.place, second.error.remedy) == (
        "is cut",
        "dog.jpg",
        None,
    )


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
def test_malformed_note_holds_no_deferral(note: bytes) -> None:
    assert list(decode_note(note)) == []
