"""Claims and files in `work/` that other daemons left: taken over, put back or swept."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from sam_poll.core.errors import DeviceError
from sam_poll.engines.fake import FakeEngine
from sam_poll.share.claims import cleanup, heartbeat, liveness
from sam_poll.share.claims.model import list_work
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.mount_check import SENTINEL
from sam_poll.share.source import FolderSource
from tests.conftest import BOX, Daemon, Share, picture_bytes, wait_until
from tests.support.share_sources import (
    ANSWER,
    ELSEWHERE,
    claim_left_by,
    let_others_look_dead,
    next_job_of,
    open_source,
)
from tests.support.trees import trees


def test_jobs_left_by_a_device_error_are_taken_over_at_once_on_the_same_machine(
    share: Share,
) -> None:
    if heartbeat.boot_id() == "0":
        pytest.skip("this machine does not tell its kernels apart")
    share.pair("dog")
    engine = FakeEngine()
    engine.fail("encode", DeviceError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(DeviceError):
        share.run_once(engine, lease_s=1000.0)
    assert sorted(share.at_work()) == ["dog.jpg", "dog.json"]
    with open_source(share, lease_s=1000.0) as source, next_job_of(source) as next_job:
        job = next_job()
        assert (job.attempt, job.generation, source.recovered) == (2, 2, 1)
        source.deliver(job, ANSWER)
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_jobs_of_a_daemon_on_another_machine_are_taken_over_after_a_lease(
    share: Share,
) -> None:
    share.pair("dog")
    with open_source(share, lease_s=1000.0) as source:
        claim_left_by(share, ELSEWHERE, "dog.jpg", "dog.json")
        (share.work / f"{heartbeat.PREFIX}{ELSEWHERE}{heartbeat.ENDING}").write_text("{}")
        source._recovery.survey(now=5000.0)
        assert (source._recovery.abandoned, source.orphans) == ([], 0)
        source._recovery.survey(now=5999.0)
        assert source._recovery.abandoned == []
        source._recovery.survey(now=6001.0)
        assert [found.label for found in source._recovery.abandoned] == ["dog.jpg"]
        assert source.orphans == 1


def drained(share: Share, **options: Any) -> int:
    """Drain the share, within at most 30 s, and return how many paths could not be used."""
    stop = threading.Event()
    alarm = threading.Timer(30, stop.set)
    alarm.start()
    with open_source(share, once=True, **options) as source:
        for job in source.jobs(stop):
            source.deliver(job, ANSWER)
        alarm.cancel()
        assert not stop.is_set(), "it goes on for ever"
        return source.held


def test_once_ends_although_prompts_wait_for_a_claim_that_cannot_be_removed(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.drop("dog.json", BOX)
    share.pair("good", seed=2)
    claim = claim_left_by(share, ELSEWHERE, "dog.jpg")
    let_others_look_dead(monkeypatch)
    rmdir = os.rmdir

    def mounted(name: str, *args: Any, **more: Any) -> None:
        if name.startswith("g2."):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        rmdir(name, *args, **more)

    monkeypatch.setattr(os, "rmdir", mounted)
    assert drained(share) == 1
    assert share.tree("input") == ["dog.json"]
    assert share.tree("done") == ["good.jpg", "good.json"]
    monkeypatch.setattr(os, "rmdir", rmdir)
    assert drained(share) == 0
    assert not claim.parent.exists()


def test_a_file_that_comes_into_a_claim_while_it_is_removed_is_moved_on_by_the_next_scan(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon that it was taken over from has just moved it back; no path is at fault."""
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.json", BOX)
    claim = claim_left_by(share, ELSEWHERE, "dog.jpg", hold="g1.a1.n2")
    (claim / "dog.jpg").rename(share.root / "dog.jpg")
    let_others_look_dead(monkeypatch)
    rmdir = os.rmdir

    def moved_back_before(name: str, *args: Any, **more: Any) -> None:
        (heirs,) = claim.parent.iterdir()
        if (share.root / "dog.jpg").exists():
            (share.root / "dog.jpg").rename(heirs / "dog.jpg")
        monkeypatch.setattr(os, "rmdir", rmdir)
        rmdir(name, *args, **more)

    monkeypatch.setattr(os, "rmdir", moved_back_before)
    assert drained(share) == 0
    assert share.tree("done") == ["dog.jpg", "dog.json"]
    assert share.tree("input") == share.tree("work") == []


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
    assert list_work(share.layout.work)[0] == []


def test_strays_go_back_those_of_one_stem_under_one_name(share: Share) -> None:
    with open_source(share):
        share.drop("cam1/dog.jpg", b"newer")
        for name in ("cam1/dog.jpg", "cam1/dog.left.json", "cat.jpg"):
            path = share.work / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"stray")
        assert cleanup.return_strays(share.layout, list_work(share.layout.work)[1]) == 3
    assert share.tree("input") == [
        "cam1/dog.jpg",
        "cam1/dog.left~2.json",
        "cam1/dog~2.jpg",
        "cat.jpg",
    ]


def test_hidden_files_are_no_strays(share: Share) -> None:
    with open_source(share) as source:
        for name in (
            ".nfs0000000000a1b2c3",
            ".DS_Store",
        ):  # the first of them cannot even be renamed
            (share.work / name).write_bytes(b"")
        source._recovery.survey(0.0)
        assert source.orphans == 0
    assert share.tree("input") == []


def test_cleanup_by_two_daemons_of_the_same_file_raises_no_error(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_source(share):
        (share.work / "dog.jpg").write_bytes(b"stray")
        original = cleanup.free_suffix

        def and_then_the_other_one(paths: list[Path]) -> str:
            suffix = original(paths)
            (share.work / "dog.jpg").rename(share.input / "dog.jpg")
            return suffix

        monkeypatch.setattr(cleanup, "free_suffix", and_then_the_other_one)
        assert cleanup.return_strays(share.layout, ["dog.jpg"]) == 0
    assert share.tree("input") == ["dog.jpg"]


def test_cleanup_removes_empty_folders_partial_files_and_dead_daemons_files_after_a_lease(
    share: Share,
) -> None:
    work = share.work
    with open_source(share, lease_s=100.0) as source:
        (work / "cam1" / "deep").mkdir(parents=True)
        (work / ".bare.jpg").mkdir()
        half, dead = (
            work / f"{SENTINEL}-x.tmp",
            work / f"{heartbeat.PREFIX}{ELSEWHERE}{heartbeat.ENDING}",
        )
        half.write_bytes(b"")
        dead.write_bytes(b"{}")
        (work / f"{heartbeat.PREFIX}a-folder{heartbeat.ENDING}" / "below").mkdir(
            parents=True
        )  # a folder with this name stops nothing
        source._recovery.survey(1000.0)
        assert not (work / ".bare.jpg").exists()
        assert all(p.exists() for p in (half, dead, work / "cam1" / "deep"))
        source._recovery.survey(1099.0)
        assert all(p.exists() for p in (half, dead, work / "cam1" / "deep"))
        source._recovery.survey(1101.0)
        assert not any(p.exists() for p in (half, dead, work / "cam1" / "deep"))
        source._recovery.survey(1102.0)
        source._recovery.survey(1203.0)
        assert not (work / "cam1").exists()
        assert source._heartbeat.path.path.exists()
        assert source._recovery._liveness._seen.keys() <= {"a-folder"}


def test_files_in_a_claim_of_a_living_daemon_are_left_alone(share: Share) -> None:
    share.pair("dog")
    with open_source(share, lease_s=1000.0) as source:
        path = claim_left_by(share, ELSEWHERE, "dog.jpg", "dog.json")
        before = trees(share)
        for now in (0.0, 900.0):
            source._recovery.survey(now)
        assert trees(share).keys() == before.keys()
        assert len(list(path.iterdir())) == 2


def test_an_absent_share_is_reported_once(share: Share, logged: list[str]) -> None:
    with Daemon(share, settle_s=0.0, rescan_s=0.02) as daemon:
        wait_until(lambda: daemon.source.scans > 0)
        share.input.rename(share.root / "gone")
        wait_until(lambda: "share" in daemon.source._alarms)
        scans = daemon.source.scans
        (share.root / "gone").rename(share.input)
        wait_until(lambda: daemon.source.scans > scans)
        wait_until(lambda: "share" not in daemon.source._alarms)
    assert sum("alarm (share): " in line for line in logged) == 1


def test_a_survey_reads_each_daemons_heartbeat_once_however_many_claims_it_holds(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(6):
        share.pair(f"dog{n}")
    read: list[str] = []
    original = liveness.LivenessTracker._observe
    with FolderSource(share.layout, FolderOptions(settle_s=0.0, mode="poll")) as holder:
        jobs = holder.jobs(threading.Event())
        held = [next(jobs) for _ in range(6)]
        with FolderSource(share.layout, FolderOptions(settle_s=0.0, mode="poll")) as other:
            monkeypatch.setattr(
                liveness.LivenessTracker,
                "_observe",
                lambda w, name: read.append(name) or original(w, name),
            )
            other._recovery.survey(0.0)
        monkeypatch.undo()
        for job in held:
            holder.requeue(job)
        jobs.close()
    assert read == [holder.worker]
