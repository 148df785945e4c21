"""A held path is logged once, retried after growing pauses.

Errors that need another user, a mount or an immutable file are caused by the system's own means,
and skipped where these are missing; the rules are also tested with errors injected into single
calls, which works everywhere.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sam_poll.cli.main import app
from sam_poll.core.errors import ClaimLostError, ShareError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.telemetry import Telemetry
from sam_poll.diagnostics import validate
from sam_poll.engines.fake import FakeEngine
from sam_poll.runtime.daemon import format_conflicts
from sam_poll.share.claims.model import list_work
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.path_holds import FIRST_S, LONGEST_S, PathHolds
from sam_poll.share.source import FolderSource
from sam_poll.share.status import retry, status
from tests.conftest import BOX, Daemon, Share, picture_bytes, wait_until

OTHER = 4321
FAST = {"settle_s": 0.0, "rescan_s": 0.02, "mode": "poll"}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let holds begin with a twentieth of a second."""
    monkeypatch.setattr("sam_poll.share.path_holds.FIRST_S", 0.05)


def refusing(
    monkeypatch: pytest.MonkeyPatch, call: str, error: int, concerns: Callable[[SafePath], bool]
) -> tuple[list[float], Callable[[], None]]:
    """Let a call of `SafePath` fail for some paths; return when it did, and what ends it."""
    really = getattr(SafePath, call)
    tries: list[float] = []
    mended = threading.Event()

    def refuse(self: SafePath, *args: Any, **more: Any) -> Any:
        if not mended.is_set() and concerns(self):
            tries.append(time.monotonic())
            raise OSError(error, os.strerror(error), str(self))
        return really(self, *args, **more)

    monkeypatch.setattr(SafePath, call, refuse)
    return tries, mended.set


def dropped(share: Share, name: str) -> None:
    """Let a pair appear whole while a daemon scans."""
    (share.input / name).parent.mkdir(parents=True, exist_ok=True)
    share.move_in(f"{name}.jpg", picture_bytes())
    share.move_in(f"{name}.json", BOX)


def said(logged: list[str], *words: str) -> list[str]:
    return [line for line in logged if all(word in line for word in words)]


# ── what cannot be claimed ──

ERRORS = [errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV, errno.EBUSY]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: errno.errorcode[error])
@pytest.mark.parametrize("which", ["bad/dog.jpg", "bad/dog.json"])
def test_a_file_that_cannot_be_moved_waits_in_its_place_while_all_others_are_answered(
    share: Share,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[str],
    short: None,
    error: int,
    which: str,
) -> None:
    tries, mend = refusing(
        monkeypatch, "rename", error, lambda p: p.root.path == share.input and p.rel == which
    )
    for name in ("bad/dog", "good/cat", "top"):
        share.pair(name)
    with Daemon(share, **FAST) as daemon:
        alarms = daemon.source._alarms
        wait_until(
            lambda: share.tree("done") == ["good/cat.jpg", "good/cat.json", "top.jpg", "top.json"]
        )
        dropped(share, "late")
        wait_until(lambda: "late.json" in share.tree("done"))
        wait_until(lambda: len(tries) >= 3)
        wait_until(lambda: share.tree("input") == ["bad/dog.jpg", "bad/dog.json"])
        assert not alarms.active()
        assert daemon.source.held == 1
        mend()
        wait_until(lambda: "bad/dog.json" in share.tree("done"))
        wait_until(lambda: daemon.source.held == 0)
    assert len(said(logged, "cannot be used", "/in/bad")) == 1
    assert list_work(share.layout.work).claims == []


def test_a_folder_whose_files_may_not_be_moved_is_tried_once_for_all_of_them(
    share: Share, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    tries, _ = refusing(
        monkeypatch,
        "rename",
        errno.EACCES,
        lambda p: p.root.path == share.input and p.rel.startswith("zeta/"),
    )
    for n in range(30):
        share.pair(f"zeta/dog{n}")
    share.pair("cat")
    with Daemon(share, **FAST) as daemon:
        wait_until(lambda: "cat.json" in share.tree("done"))
        scans = daemon.source.scans
        wait_until(lambda: daemon.source.scans > scans + 5)
        assert len(tries) == 1
    assert len(said(logged, "/in/zeta cannot be used")) == 1


def test_prompts_beside_one_that_cannot_be_moved_are_answered(
    share: Share, monkeypatch: pytest.MonkeyPatch, short: None
) -> None:
    refusing(monkeypatch, "rename", errno.EPERM, lambda p: str(p) == f"{share.input}/dog.left.json")
    share.pair("dog")
    share.drop("dog.left.json", BOX)
    with Daemon(share, **FAST):
        wait_until(lambda: share.tree("done") == ["dog.jpg", "dog.json"])
    assert share.tree("input") == ["dog.left.json"]


def test_an_error_of_the_whole_share_pauses_everything(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    _, mend = refusing(
        monkeypatch, "rename", errno.EROFS, lambda p: p.path == share.input / "dog.jpg"
    )
    monkeypatch.setattr(SafePath, "create_unnamed", lambda folder: False)
    _, mend_writes = refusing(
        monkeypatch, "create", errno.EROFS, lambda p: ".sam_poll-try" in p.name
    )
    with Daemon(share, **FAST) as daemon:
        alarms = daemon.source._alarms
        wait_until(lambda: "share" in alarms)
        assert daemon.source.held == 0
        mend()
        mend_writes()
        wait_until(lambda: "dog.json" in share.tree("done"))
        wait_until(lambda: "share" not in alarms)


@pytest.mark.parametrize("what", ["a file", "a link", "a folder"])
def test_a_foreign_file_with_the_name_of_a_claim_holds_that_picture_alone(
    share: Share, tmp_path: Path, logged: list[str], short: None, what: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (share.work / "cam1").mkdir(parents=True)
    place = share.work / "cam1/.dog.jpg"
    if what == "a file":
        place.write_text("mine")
    elif what == "a link":
        place.symlink_to(tmp_path / "elsewhere")
    else:
        (place / "mine").mkdir(parents=True)
    share.pair("cam1/dog")
    share.pair("cam2/cat")
    with Daemon(share, **FAST) as daemon:
        wait_until(lambda: "cam2/cat.json" in share.tree("done"))
        wait_until(lambda: said(logged, str(place), "cannot be used"))
        assert daemon.source.held == 1
        if what == "a folder":
            shutil.rmtree(place, ignore_errors=True)  # the daemon removes it, too, once it is empty
        else:
            place.unlink()
        wait_until(lambda: "cam1/dog.json" in share.tree("done"))
    assert len(said(logged, "WARNING", "cannot be used")) == 1
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_run_with_once_reports_what_it_cannot_claim_and_ends(
    share: Share, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    refusing(
        monkeypatch,
        "rename",
        errno.EXDEV,
        lambda p: p.root.path == share.input and p.rel.startswith("bad/"),
    )
    monkeypatch.setattr("sam_poll.runtime.builders.engine_of", lambda *args, **more: FakeEngine())
    for name in ("bad/dog", "bad/cat", "good"):
        share.pair(name)
    (share.output / "shut").parent.mkdir(exist_ok=True)
    (share.output / "shut").write_text("a file")
    share.pair("shut/dog")
    done = CliRunner().invoke(
        app, ["watch", str(share.input), "--once", "-f", "mask", "--log", "text"]
    )
    assert done.exit_code == 3, done.output
    assert share.tree("done") == ["good.jpg", "good.json"]
    assert share.tree("input") == [
        "bad/cat.jpg",
        "bad/cat.json",
        "bad/dog.jpg",
        "bad/dog.json",
        "shut/dog.jpg",
        "shut/dog.json",
    ]
    assert "/in/bad cannot be used" in done.output
    assert "/out/shut cannot be used" in done.output
    assert "2 paths could not be used" in done.output


# ── claims, strays, annotations ──


def test_a_claim_that_cannot_be_taken_over_is_retried_after_growing_pauses(
    share: Share, monkeypatch: pytest.MonkeyPatch, logged: list[str], short: None
) -> None:
    tries, mend = refusing(monkeypatch, "rename", errno.EACCES, lambda p: "@dead-1" in p.name)
    claim = share.work / ".dog.jpg/g1.a1.n1@dead-1-abcdef-0"
    claim.mkdir(parents=True)
    (claim / "dog.jpg").write_bytes(picture_bytes())
    (claim / "dog.json").write_text(json.dumps(BOX))
    share.pair("cat")
    with Daemon(share, lease_s=0.1, **FAST):
        wait_until(lambda: "cat.json" in share.tree("done"))
        wait_until(lambda: len(tries) >= 4)
        mend()
        wait_until(lambda: "dog.json" in share.tree("done"))
    assert len(said(logged, "WARNING", ".dog.jpg", "cannot be used")) == 1


def test_a_planted_claim_that_cannot_be_emptied_is_not_taken_over_in_a_loop(
    share: Share, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    planted = share.work / ".x.jpg/g1.a1.n1@dead-1-abcdef-0"
    (planted / ".kept").mkdir(parents=True)
    refusing(monkeypatch, "remove_tree", errno.EACCES, lambda p: p.name == ".kept")
    with Daemon(share, lease_s=0.1, **FAST) as daemon:
        wait_until(lambda: said(logged, "cannot be used", ".x.jpg"))
        scans = daemon.source.scans
        wait_until(lambda: daemon.source.scans > scans + 20)
    assert len(said(logged, "took over")) == 1


def test_half_a_claim_that_cannot_be_put_back_is_put_back_when_it_can(
    share: Share, monkeypatch: pytest.MonkeyPatch, logged: list[str], short: None
) -> None:
    tries, mend = refusing(
        monkeypatch,
        "rename",
        errno.EACCES,
        lambda p: (
            str(p) == f"{share.input}/bad/dog.json"
            or (p.name == "dog.jpg" and p.root.path == share.work)
        ),
    )
    share.pair("bad/dog")
    share.pair("good")
    with Daemon(share, **FAST) as daemon:
        wait_until(lambda: "good.json" in share.tree("done"))
        wait_until(lambda: len(tries) >= 4)
        scans, before = daemon.source.scans, len(tries)
        wait_until(lambda: daemon.source.scans > scans + 10)
        assert len(tries) < before + 10
        mend()
        wait_until(lambda: "bad/dog.json" in share.tree("done"))
    assert share.tree("input") == share.tree("failed") == []


def test_a_stray_that_cannot_be_put_back_is_held_and_starts_no_scan(
    share: Share, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    tries, _ = refusing(
        monkeypatch, "rename", errno.EPERM, lambda p: str(p) == f"{share.work}/dog.jpg"
    )
    share.work.mkdir()
    (share.work / "dog.jpg").write_bytes(b"x")
    (share.work / "cat.jpg").write_bytes(b"x")
    share.pair("good")
    with Daemon(share, settle_s=0.0, rescan_s=1000.0) as daemon:
        wait_until(lambda: "good.json" in share.tree("done"))
        wait_until(lambda: share.tree("input") == ["cat.jpg"])
        wait_until(lambda: daemon.source.held == 1)
        assert len(tries) == 1
    assert len(said(logged, "WARNING", "work/dog.jpg", "cannot be used")) == 1


def test_annotations_whose_prompts_cannot_be_written_stop_no_other_job(
    share: Share, monkeypatch: pytest.MonkeyPatch, logged: list[str], short: None
) -> None:
    tries, mend = refusing(
        monkeypatch,
        "rename",
        errno.EACCES,
        lambda p: p.root.path == share.work and "/.prompts/" in p.rel,
    )
    box = '<box label="dog" xtl="10" ytl="10" xbr="40" ybr="40" occluded="0" z_order="0"/>'
    image = f'<image id="0" name="cam1/dog.jpg" width="64" height="48">{box}</image>'
    share.drop("cam1/dog.jpg", picture_bytes())
    share.drop("annotations.xml", f"<annotations><version>1.1</version>{image}</annotations>")
    share.pair("good")
    with Daemon(share, **FAST):
        wait_until(lambda: "good.json" in share.tree("done"))
        wait_until(lambda: len(tries) >= 4)
        mend()
        wait_until(lambda: "cam1/dog.jpg" in share.tree("done"))


# ── answers that cannot be put away ──


@pytest.mark.parametrize("where", ["out", "done"])
@pytest.mark.parametrize("what", ["a file", "a link", "not writable"])
def test_an_unwritable_output_folder_holds_only_the_jobs_below_it(
    share: Share,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    logged: list[str],
    short: None,
    where: str,
    what: str,
) -> None:
    root = share.root / where
    place = root / "cam1"
    root.mkdir()
    (tmp_path / "elsewhere").mkdir()
    if what == "a file":
        place.write_text("a file")
        mend = place.unlink
    elif what == "a link":
        place.symlink_to(tmp_path / "elsewhere")
        mend = place.unlink
    else:
        monkeypatch.setattr(SafePath, "create_unnamed", lambda folder: False)
        mends = [
            refusing(
                monkeypatch,
                call,
                errno.EACCES,
                lambda p: p.root.path == place.parent and p.rel.startswith("cam1/"),
            )
            for call in ("create",)
        ]
        really = SafePath.rename
        shut = threading.Event()
        shut.set()

        def rename(self: SafePath, target: SafePath) -> None:
            if shut.is_set() and str(target).startswith(f"{place}/"):
                raise OSError(errno.EACCES, "Permission denied", str(self), None, str(target))
            really(self, target)

        def mend() -> None:
            shut.clear()
            for _, end in mends:
                end()

        monkeypatch.setattr(SafePath, "rename", rename)
    for n in range(12):
        share.pair(f"cam1/dog{n}", seed=n)
    share.pair("cam2/cat")
    share.pair("top")
    with Daemon(share, **FAST) as daemon:
        alarms = daemon.source._alarms
        wait_until(lambda: {"cam2/cat.json", "top.json"} <= set(share.tree("done")))
        wait_until(lambda: "path" in alarms)
        dropped(share, "cam2/late")
        wait_until(lambda: "cam2/late.json" in share.tree("done"))
        wait_until(lambda: daemon.pipeline.stats.now().at_work == 0)
        assert f"{place} cannot be used" in alarms.active()[0].message
        assert not {"share", "output"} & {alarm.kind for alarm in alarms.active()}
        mend()
        wait_until(lambda: len(share.tree("done")) == 30)
        wait_until(lambda: not alarms.active())
        wait_until(lambda: daemon.source.held == 0)
    assert len(share.tree("output")) == 15
    assert share.tree("work") == share.tree("input") == share.tree("failed") == []
    assert len(said(logged, "WARNING", f"{place} cannot be used")) == 1
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_message_on_blocked_output_folders_stays_the_same_while_they_are_tried_again(
    share: Share,
) -> None:
    holds = held(share)
    for folder in ("b", "a", "c"):
        (share.output / folder).write_text("a file")
        error = refusal(share.output / folder / "x.png", errno.ENOTDIR)
        claim = share.layout.work / folder / ".x.jpg"
        assert holds.failed_to_deliver(error, claim, [f"{folder}/x.jpg"], 0.0)
    said = holds.undelivered
    assert f"{share.output}/a cannot be used" in said
    assert "(and 2 more)" in said
    for second in range(1, 20):
        holds.refresh(float(second))
        assert holds.undelivered == said


def test_an_output_root_replaced_by_a_file_pauses_all_and_rejects_no_job(
    share: Share,
) -> None:
    share.output.write_text("a file")
    with pytest.raises(ShareError):
        share.run_once()
    share.output.unlink()
    with Daemon(share, **FAST) as daemon:
        wait_until(lambda: daemon.source.scans)
        shutil.rmtree(share.output)
        share.output.write_text("a file")
        dropped(share, "cam1/dog")
        dropped(share, "cat")
        wait_until(lambda: "output" in daemon.pipeline.telemetry.alarms)
        share.output.unlink()
        wait_until(lambda: len(share.tree("done")) == 4)
    assert share.tree("failed") == []


def test_one_output_that_cannot_be_replaced_holds_only_its_own_job(
    share: Share, monkeypatch: pytest.MonkeyPatch, short: None
) -> None:
    shut = threading.Event()
    shut.set()
    really = SafePath.rename

    def rename(self: SafePath, target: SafePath) -> None:
        if shut.is_set() and target.name == "dog.mask.png":
            raise OSError(errno.EPERM, "Operation not permitted", str(self), None, str(target))
        really(self, target)

    monkeypatch.setattr(SafePath, "rename", rename)
    share.pair("cam1/dog")
    share.pair("cam1/cat")
    with Daemon(share, **FAST) as daemon:
        wait_until(lambda: "cam1/cat.json" in share.tree("done"))
        wait_until(lambda: daemon.source.held == 1)
        shut.clear()
        wait_until(lambda: "cam1/dog.json" in share.tree("done"))
    assert share.tree("output") == ["cam1/cat.mask.png", "cam1/dog.mask.png"]


def test_an_answered_job_that_waits_for_done_is_not_run_again(
    share: Share, monkeypatch: pytest.MonkeyPatch, short: None, logged: list[str]
) -> None:
    share.done.mkdir()
    (share.done / "cam1").write_text("a file")
    share.pair("cam1/dog")
    with Daemon(share, **FAST) as daemon:
        wait_until(lambda: said(logged, "done/cam1 cannot be used"))
        wait_until(lambda: daemon.pipeline.stats.now().at_work == 0)
        (share.done / "cam1").unlink()
        wait_until(lambda: share.tree("done") == ["cam1/dog.jpg", "cam1/dog.json"])
    assert len(said(logged, "claimed cam1/dog.json")) == 1


def test_an_answered_job_of_a_dead_daemon_is_put_away_when_done_is_writable(
    share: Share, short: None, logged: list[str]
) -> None:
    share.done.mkdir()
    (share.done / "cam1").write_text("a file")
    share.pair("cam1/dog")
    share.run_once()
    share.pair("cam1/cat")
    assert share.tree("output") == ["cam1/dog.mask.png"]
    with Daemon(share, lease_s=0.1, **FAST) as daemon:
        wait_until(lambda: "path" in daemon.source._alarms)
        (share.done / "cam1").unlink()
        wait_until(lambda: "cam1/dog.json" in share.tree("done"))
        wait_until(lambda: "cam1/cat.json" in share.tree("done"))
        wait_until(lambda: "path" not in daemon.source._alarms)
    assert len(said(logged, "claimed cam1/dog.json")) == 1


def test_retry_names_a_job_that_cannot_be_put_back_and_goes_on(
    share: Share, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    for name in ("bad", "good"):
        share.pair(name, prompt="{")
    share.run_once()
    refusing(monkeypatch, "rename", errno.EPERM, lambda p: str(p) == f"{share.failed}/bad.jpg")
    assert retry(share.layout) == 1
    assert share.tree("input") == ["good.jpg", "good.json"]
    assert said(logged, "WARNING", "bad stays in failed/")


# ── the book ──


def refusal(path: Path, error: int = errno.EPERM) -> OSError:
    return OSError(error, os.strerror(error), str(path))


def held(share: Share, name: str = "dog.jpg") -> PathHolds:
    for folder in share.layout.folders.values():
        folder.mkdir(exist_ok=True)
    share.drop(name, b"x")
    return PathHolds(share.layout)


def test_pauses_double_up_to_five_minutes(share: Share) -> None:
    holds = held(share)
    now = 0.0
    pauses = []
    for _ in range(10):
        assert holds.failed_to_take(refusal(share.input / "dog.jpg"), ["dog.jpg"], now)
        assert holds.blocks("dog.jpg")
        pauses.append(holds.due - now)
        now = holds.due
        assert holds.refresh(now)
        assert not holds.blocks("dog.jpg")
    assert pauses == [min(FIRST_S * 2**n, LONGEST_S) for n in range(10)]


def test_a_hold_ends_when_what_it_is_on_changes_or_goes(share: Share) -> None:
    holds = held(share)
    path = share.input / "dog.jpg"
    for change in (lambda: path.chmod(0o600), lambda: path.write_bytes(b"longer"), path.unlink):
        assert holds.failed_to_take(refusal(path), ["dog.jpg"], 0.0)
        assert not holds.refresh(0.1)
        change()
        assert holds.refresh(0.2)
        assert not holds.blocks("dog.jpg")
        assert len(holds) == 0


def test_a_pause_that_ends_while_another_path_fails_is_reported_by_the_next_refresh(
    share: Share,
) -> None:
    holds = held(share)
    share.drop("cat.jpg", b"x")
    assert holds.failed_to_take(refusal(share.input / "dog.jpg"), ["dog.jpg"], 0.0)
    later = holds.due + 1.0
    assert holds.failed_to_take(refusal(share.input / "cat.jpg"), ["cat.jpg"], later)
    assert not holds.blocks("dog.jpg")
    assert holds.refresh(later)
    assert not holds.refresh(later)


def test_a_folders_hold_is_not_ended_by_files_that_come(share: Share) -> None:
    holds = held(share, "cam1/dog.jpg")
    assert holds.failed_to_take(
        refusal(share.input / "cam1/dog.jpg", errno.EACCES), ["cam1/dog.jpg"], 0.0
    )
    share.drop("cam1/cat.jpg", b"x")
    assert not holds.refresh(0.1)
    assert holds.blocks("cam1/cat.jpg")
    assert not holds.blocks("cam10/cat.jpg")
    (share.input / "cam1").chmod(0o700)
    assert holds.refresh(0.2)


@pytest.mark.parametrize(
    "error", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ENOTCONN]
)
def test_errors_of_the_share_as_a_whole_hold_no_path(share: Share, error: int) -> None:
    holds = held(share)
    assert not holds.failed_to_take(refusal(share.input / "dog.jpg", error), ["dog.jpg"], 0.0)
    assert len(holds) == 0


def test_report_of_many_paths_has_a_few_names_and_a_count(share: Share, logged: list[str]) -> None:
    holds = held(share)
    for n in range(50):
        share.drop(f"dog{n}.jpg", b"x")
        assert holds.failed_to_take(refusal(share.input / f"dog{n}.jpg"), [f"dog{n}.jpg"], 0.0)
    report = holds.report()
    assert (report["count"], len(report["paths"])) == (50, 5)
    assert len(said(logged, "cannot be used")) <= 21


def test_status_names_the_paths_that_wait_with_their_remedies(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, "rename", errno.EROFS, lambda p: str(p) == f"{share.input}/bad/dog.jpg")
    share.pair("bad/dog")
    with Daemon(share, lease_s=0.2, **FAST) as daemon:
        wait_until(lambda: daemon.source.held)
        wait_until(lambda: status(share.layout)["workers"][0].get("held"))
        (worker,) = status(share.layout)["workers"]
        assert worker["held"]["count"] == 1
        assert worker["held"]["paths"][0]["path"] == f"{share.input}/bad"
        shown = CliRunner().invoke(app, ["status", str(share.input)]).output
    assert (
        f"waits: {share.input}/bad: Read-only file system (mount the file system for writing"
        in shown
    )


def test_status_of_a_malformed_heartbeat_has_no_held_paths(share: Share) -> None:
    from sam_poll.runtime.console import held_lines

    for held in (None, 3, [], {"paths": 3}, {"paths": [3], "count": "x"}, {"count": float("nan")}):
        assert held_lines({"held": held}) == []


# ── each said as what it is ──


def test_a_full_disk_at_the_start_is_reported_as_such(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusing(monkeypatch, "create", errno.ENOSPC, lambda p: p.root.path == share.work)
    with pytest.raises(ShareError) as raised, FolderSource(share.layout):
        pass
    assert "No space left" in raised.value.reason
    assert raised.value.remedy == "free some space there"


@pytest.mark.parametrize("place", ["in", "work", "out"])
def test_a_folder_in_the_place_of_the_probe_is_no_error(share: Share, place: str) -> None:
    (share.root / place / ".sam_poll-probe" / "below").mkdir(parents=True)
    share.pair("dog")
    assert share.run_once().answered == 1


def test_a_deleted_work_folder_is_logged_as_such(share: Share, logged: list[str]) -> None:
    share.pair("dog")
    with FolderSource(share.layout, FolderOptions(**FAST)) as source:
        stop = threading.Event()
        jobs = source.jobs(stop)
        job = next(jobs)
        shutil.rmtree(share.work)
        with pytest.raises(ClaimLostError, match="deleted"):
            source.deliver(job, [])
        stop.set()
        jobs.close()
    assert len(said(logged, str(share.work), "was deleted")) == 1


def test_daemons_of_one_share_with_different_formats_log_a_warning(share: Share) -> None:
    signs = Telemetry()
    signs.formats = ("mask", "opex")
    with FolderSource(share.layout, FolderOptions(**FAST), state=signs.state) as source:
        assert format_conflicts(share.layout, "another", ["opex", "mask"]) == []
        assert format_conflicts(share.layout, source.worker, ["mask"]) == []
        (warning,) = format_conflicts(share.layout, "another", ["yolo"])
        assert source.worker in warning
        assert "mask, opex" in warning


# ── with the system's own means ──

as_root = pytest.mark.skipif(
    os.geteuid() != 0 or not shutil.which("setpriv"),
    reason="needs root and setpriv, to be two users",
)


@contextlib.contextmanager
def foreign_daemon(share: Share) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon as another user, over a fake engine."""
    code = (
        "import sys, threading; from pathlib import Path\n"
        "from tests.conftest import Share, make_pipeline\n"
        "from sam_poll.share.source import FolderSource\n"
        "from sam_poll.share.folder_options import FolderOptions\n"
        "layout = Share(Path(sys.argv[1])).layout\n"
        "with FolderSource(layout, FolderOptions(settle_s=0.0, rescan_s=0.05)) as source:\n"
        "    make_pipeline().run(source, threading.Event())\n"
    )
    drop = ["setpriv", "--reuid", str(OTHER), "--regid", str(OTHER), "--clear-groups"]
    log = (share.root.parent / "daemon.log").open("wb")
    process = subprocess.Popen(
        [*drop, sys.executable, "-c", code, str(share.root)], stdout=log, stderr=log
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        log.close()


def _opened_to_others(path: Path) -> None:
    """Let another user reach this folder."""
    for folder in (path, *path.parents):
        if folder.stat().st_mode & 0o5 != 0o5 and folder.stat().st_uid == os.geteuid():
            folder.chmod(folder.stat().st_mode | 0o5)


def _immutable(path: Path) -> bool:
    done = (
        subprocess.run(["chattr", "+i", str(path)], capture_output=True, check=False)
        if shutil.which("chattr")
        else None
    )
    return done is not None and done.returncode == 0


def _mounted(path: Path) -> bool:
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "mode=777", "none", str(path)],
        capture_output=True,
        check=False,
    )
    return done.returncode == 0


@as_root
def test_foreign_sticky_immutable_and_mounted_paths_do_not_delay_other_jobs(
    share: Share,
) -> None:
    _opened_to_others(share.root)
    names = ["foreign/dog", "sticky/dog", "immutable/dog", "mounted/dog"]
    for folder in share.layout.folders.values():
        folder.path.mkdir(exist_ok=True)
        os.chown(folder.path, OTHER, OTHER)
    (share.input / "mounted").mkdir()
    mounted = _mounted(share.input / "mounted")
    immutable = False
    try:
        for name in [*names, "good/dog", "dog"]:
            share.pair(name)
        for folder in ("good", "immutable", "sticky"):
            (share.input / folder).chmod(0o777)
        (share.input / "sticky").chmod(0o1777)
        immutable = _immutable(share.input / "immutable/dog.jpg")
        waits = {"foreign/dog", "sticky/dog"}
        waits |= {"immutable/dog"} if immutable else set()
        waits |= {"mounted/dog"} if mounted else set()
        free = {"good/dog", "dog", *names} - waits
        with foreign_daemon(share):
            wait_until(lambda: {f"{name}.json" for name in free} <= set(share.tree("done")))
            took = []
            for n in range(20):
                started = time.monotonic()
                dropped(share, f"late{n}")
                wait_until(lambda n=n: f"late{n}.json" in share.tree("done"))
                took.append(time.monotonic() - started)
            # Most of them: a busy machine may be slow once or twice.
            assert statistics.median(took) < FIRST_S
            for name in waits:
                wait_until(lambda name=name: name.split("/")[0] in _named(share))
                assert (share.input / f"{name}.jpg").exists()
            assert "alarm" not in _named(share)
    finally:
        if immutable:
            subprocess.run(["chattr", "-i", str(share.input / "immutable/dog.jpg")], check=False)
        if mounted:
            subprocess.run(["umount", "-l", str(share.input / "mounted")], check=False)
    missing = [word for word, there in (("chattr +i", immutable), ("mount", mounted)) if not there]
    if missing:
        pytest.skip(f"all else is right, but this machine lacks {' and '.join(missing)}")


def _named(share: Share) -> str:
    return (share.root.parent / "daemon.log").read_text()


@as_root
def test_folders_that_may_not_be_read_or_entered_wait_alone(share: Share) -> None:
    _opened_to_others(share.root)
    for folder in share.layout.folders.values():
        folder.path.mkdir(exist_ok=True)
        os.chown(folder.path, OTHER, OTHER)
    for name in ("closed/dog", "listed/dog", "good"):
        share.pair(name)
    (share.work / "private").mkdir(mode=0o700)
    (share.work / ".cat.jpg").mkdir(mode=0o700)
    (share.done / "shut").mkdir(mode=0o700)
    (share.input / "closed").chmod(0o700)
    (share.input / "listed").chmod(0o744)
    (share.input / "shut").mkdir(mode=0o777)
    (share.input / "shut").chmod(0o777)
    share.pair("shut/dog")
    share.pair("cat")
    with foreign_daemon(share):
        wait_until(lambda: "good.json" in share.tree("done"))
        dropped(share, "late")
        wait_until(lambda: "late.json" in share.tree("done"))
        for name in ("in/closed", "in/listed", "work/private", "work/.cat.jpg", "/shut"):
            wait_until(lambda name=name: name in _named(share))
        (share.done / "shut").chmod(0o777)
        wait_until(lambda: "shut/dog.json" in share.tree("done"))
    assert {"closed/dog.jpg", "listed/dog.jpg", "cat.jpg"} <= set(share.tree("input"))


def test_check_names_a_folder_that_may_not_be_read(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("closed/dog")
    really = SafePath.scandir

    def scandir(self: SafePath) -> Any:
        if self.rel == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return really(self)

    monkeypatch.setattr(SafePath, "scandir", scandir)
    (finding,) = validate.check([share.input])
    assert (finding.path, finding.error and finding.error.reason) == (
        share.input / "closed",
        "is not readable",
    )
