"""Ending jobs: none is lost when it cannot be answered, rejected or put back now.

Each error is injected into a real call at the critical moment, and removed again; the share's
content is examined.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sam_poll.core.alarms import Alarms
from sam_poll.core.errors import ClaimLostError, IncompleteFileError, InputError, PutOffError
from sam_poll.core.files import AtomicFiles
from sam_poll.core.types import OutputFile
from sam_poll.imaging import source_file
from sam_poll.share.claims.model import list_work
from sam_poll.share.claims.store import ClaimStore
from sam_poll.share.intake.scanner import Scanner
from tests.conftest import BOX, Daemon, Share, picture_bytes, wait_until
from tests.support.share_sources import ANSWER, failing, next_job_of, open_source
from tests.support.trees import trees


def unreadable(monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[[], None]:
    """Let reading this picture fail until the returned function is called."""
    failing_now = threading.Event()
    failing_now.set()
    original = source_file.read

    def read(path: Path) -> Any:
        if failing_now.is_set() and path.name == name:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path)

    monkeypatch.setattr(source_file, "read", read)
    return failing_now.clear


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the pauses of held jobs as requested; the holds last a fiftieth of that."""
    pauses: list[float] = []
    original = Scanner.hold

    def hold(self: Scanner, job: str, signatures: Any, seconds: float, error: Any = None) -> None:
        pauses.append(seconds)
        original(self, job, signatures, seconds / 50, error)

    monkeypatch.setattr(Scanner, "hold", hold)
    return pauses


def _unlinked(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:  # claimed in this moment
        return False
    return True


def test_a_job_that_cannot_be_put_back_now_is_not_forgotten(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    with open_source(share) as source, next_job_of(source) as next_job:
        job = next_job()
        with monkeypatch.context() as patch:
            patch.setattr(ClaimStore, "_leave", failing(100, ClaimStore._leave))
            with pytest.raises(OSError, match="Input/output"):
                source.requeue(job)
        again = next_job()
        assert (again.id, again.attempt) == ("dog", 1)
        source.deliver(again, ANSWER)
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_a_deferred_job_that_cannot_be_put_back_now_is_not_forgotten(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    share.run_once()
    share.drop("dog.again.json", BOX)
    with open_source(share, lone_s=0.0) as source, next_job_of(source) as next_job:
        job = next_job()
        with monkeypatch.context() as patch:
            patch.setattr(ClaimStore, "_leave", failing(100, ClaimStore._leave))
            with pytest.raises(OSError, match="Input/output"):
                source.defer(job, IncompleteFileError("is cut off"))
        source.deliver(next_job(), ANSWER)
    assert share.tree("input") == share.tree("work") == []


@pytest.mark.parametrize("replaced", ["dog.jpg", "dog.json"])
def test_a_job_that_was_put_back_is_offered_again_at_once_when_a_file_of_it_changes(
    share: Share, replaced: str
) -> None:
    share.pair("dog")
    with open_source(share, patience_s=1000.0) as source, next_job_of(source) as next_job:
        source.defer(next_job(), IncompleteFileError("is cut off"))
        assert source._scanner.scan(time.monotonic(), []) == []
        share.drop(
            replaced, picture_bytes(seed=2) if replaced == "dog.jpg" else {**BOX, "label": "dog"}
        )
        assert next_job().error is None


def test_prompts_of_one_picture_are_put_back_each_with_its_own_reason(share: Share) -> None:
    share.pair("dog")
    share.drop("dog.left.json", BOX)
    error = IncompleteFileError("is not the one")
    with open_source(share, patience_s=0.2) as source, next_job_of(source) as next_job:
        jobs = {job.id: job for job in (next_job(), next_job())}
        source.defer(jobs["dog"], error)
        source.requeue(jobs["dog.left"])
        jobs = {job.id: job for job in (next_job(), next_job())}
        assert jobs["dog.left"].error is None
        assert jobs["dog"].error in (None, error)


@pytest.mark.parametrize("end", ["deliver", "reject", "requeue", "requeue unread", "defer"])
def test_the_previous_owner_of_a_claim_gets_an_error_and_changes_nothing(
    share: Share, end: str
) -> None:
    share.pair("dog")
    with open_source(share) as source, next_job_of(source) as next_job:
        job = next_job()
        (found,) = list_work(share.layout.work)[0]
        heir = ClaimStore(share.layout, "heir-1", lambda: None)
        claim = heir.take_over(found)
        assert claim
        before = trees(share)
        with pytest.raises(ClaimLostError):
            {
                "deliver": lambda: source.deliver(job, ANSWER),
                "reject": lambda: source.reject(job, InputError("no")),
                "requeue": lambda: source.requeue(job),
                "requeue unread": lambda: source.requeue(job, OSError(errno.ESTALE, "stale")),
                "defer": lambda: source.defer(job, IncompleteFileError("is cut off")),
            }[end]()
        assert not source._alarms.active()
        assert trees(share) == before
        assert list(share.output.iterdir()) == []
        heir.close(claim, "input", "")
        source.deliver(next_job(), ANSWER)  # the source goes on
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_a_job_whose_output_files_were_removed_begins_again(share: Share) -> None:
    share.pair("dog")
    with open_source(share) as source, next_job_of(source) as next_job:
        made = share.layout.work / ".made.tif"
        answer = [OutputFile(".tif", "image/tiff", b"", made)]
        with pytest.raises(PutOffError, match="begins again"):
            source.deliver(next_job(), answer)
        assert not source._alarms.active()
        made.path.write_bytes(b"answer")
        source.deliver(next_job(), answer)
    assert share.tree("output") == ["dog.tif"]
    assert share.tree("done") == ["dog.jpg", "dog.json"]


@pytest.mark.parametrize(
    "end", ["it can be read", "taken away", "its prompt is taken away", "its picture is taken"]
)
def test_an_unreadable_picture_is_retried_while_others_are_answered(
    share: Share, monkeypatch: pytest.MonkeyPatch, patient: list[float], end: str
) -> None:
    mend = unreadable(monkeypatch, "bad.jpg")
    share.pair("bad")
    with Daemon(share, settle_s=0.0, rescan_s=0.02, mode="poll") as daemon:
        wait_until(lambda: len(patient) >= 3)
        assert patient[:3] == [2.0, 4.0, 8.0]
        assert "read" in daemon.source._alarms
        share.move_in("good.jpg", picture_bytes(seed=2))
        share.move_in("good.json", BOX)
        wait_until(lambda: "good.jpg" in share.tree("done"))
        assert "read" in daemon.source._alarms
        if end == "it can be read":
            mend()
            wait_until(lambda: "bad.jpg" in share.tree("done"))
        else:
            names = {
                "taken away": ["bad.jpg", "bad.json"],
                "its prompt is taken away": ["bad.json"],
            }
            for name in names.get(end, ["bad.jpg"]):
                wait_until(lambda name=name: _unlinked(share.input / name))
        wait_until(lambda: "read" not in daemon.source._alarms)
    assert daemon.pipeline.stats.now().rejected == 0
    assert len(daemon.source._unreadable) == 0


def test_a_picture_removed_while_it_is_read_is_rejected(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = source_file.read

    def read(path: Path) -> Any:
        path.unlink()
        return original(path)

    monkeypatch.setattr(source_file, "read", read)
    share.pair("dog")
    share.run_once()
    assert "vanished" in share.error("dog")["reason"]
    assert share.tree("failed") == ["dog.error.json", "dog.json"]


def test_a_cut_off_picture_that_is_completed_in_time_is_answered(share: Share) -> None:
    body = picture_bytes()
    path = share.drop("dog.jpg", body[: len(body) // 2])
    share.drop("dog.json", BOX)
    with Daemon(share, settle_s=0.0, rescan_s=0.02, patience_s=1000.0, mode="poll") as daemon:
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
    with Daemon(
        share, settle_s=0.0, rescan_s=0.02, patience_s=1000.0 if grows else 0.2, mode="poll"
    ) as daemon:
        if grows:
            wait_until(lambda: daemon.source._scanner._deferred)
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
    writer = path.open("r+b")  # the writer goes on, wherever the file is moved to
    original = source_file.read
    last = picture_bytes(".png", width=80, seed=2)

    def read(path: Path) -> Any:
        found = original(path)
        if not writer.closed:
            writer.truncate(0)
            writer.write(last)
            writer.close()
        return found

    monkeypatch.setattr(source_file, "read", read)
    with Daemon(share, settle_s=0.0, rescan_s=0.02, mode="poll") as daemon:
        wait_until(lambda: daemon.pipeline.stats.now().answered)
    assert (share.done / "dog.jpg").read_bytes() == last
    assert daemon.pipeline.stats.now().released
    assert share.tree("failed") == []


def test_on_a_full_disk_no_further_jobs_are_claimed_and_all_go_on_when_there_is_room(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = threading.Event()
    full.set()
    tries = []
    original = AtomicFiles.write

    def write(self: AtomicFiles, path: Path, body: bytes) -> None:
        if full.is_set():
            tries.append(path)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(self, path, body)

    monkeypatch.setattr(AtomicFiles, "write", write)
    alarms = Alarms()
    for n in range(40):
        share.pair(f"dog{n:02}", seed=n)
    with Daemon(share, alarms=alarms, settle_s=0.0, rescan_s=0.02) as daemon:
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


def test_an_answer_whose_name_is_a_folder_is_rejected(share: Share) -> None:
    share.pair("dog")
    (share.output / "dog.mask.png").mkdir(parents=True)
    assert share.run_once().rejected == 1
    assert "cannot be written" in share.error("dog")["reason"]
    assert share.tree("failed") == ["dog.error.json", "dog.jpg", "dog.json"]
    assert [p.name for p in share.output.iterdir()] == ["dog.mask.png"]


def test_a_job_that_cannot_be_rejected_now_is_rejected_when_it_can(
    share: Share, logged: list[str]
) -> None:
    share.pair("cam1/dog", prompt="{")
    share.failed.mkdir()
    (share.failed / "cam1").write_text("a file")
    with Daemon(share, settle_s=0.0, rescan_s=0.02):
        wait_until(lambda: any(f"{share.failed}/cam1 cannot be used" in line for line in logged))
        (share.failed / "cam1").unlink()
        wait_until(lambda: share.tree("work") == [])
    assert share.tree("failed") == ["cam1/dog.error.json", "cam1/dog.jpg", "cam1/dog.json"]
