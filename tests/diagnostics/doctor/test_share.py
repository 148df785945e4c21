"""The doctor's looks at a share: each thing broken once. Nothing on it may change, and nothing may
hang.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from sam_poll.config.settings import Settings, load
from sam_poll.core.errors import ExitCode, ShareError
from sam_poll.core.safe_path import SafePath
from sam_poll.diagnostics.doctor import inotify, share
from sam_poll.diagnostics.doctor.findings import exit_code
from sam_poll.runtime.builders import layout_of
from sam_poll.share.mount_check import SENTINEL, check_folders
from tests.conftest import Share
from tests.support.findings import about, the


@pytest.fixture
def proved(share: Share) -> Share:
    """A share with all its folders."""
    check_folders(share.layout)
    return share


def settings_for(place: Share, **flags: Any) -> Settings:
    return load(None, env={}, flags={"input": place.layout.input.path, "model": "demo", **flags})


def test_a_share_as_it_should_be_has_only_good_findings(proved: Share) -> None:
    found = share.check(settings_for(proved))
    assert {f.level for f in found if f.name not in ("inotify", "free space")} == {"ok"}
    names = [
        "folders",
        "file system",
        "new files",
        "inotify",
        "rename",
        "free space",
        "clock",
        "daemons",
    ]
    assert [f.name for f in found] == names


def test_a_share_is_named_by_its_input_folder_or_the_one_above(proved: Share) -> None:
    assert share.input_of(proved.root) == proved.layout.input.path
    assert share.input_of(proved.layout.input.path) == proved.layout.input.path
    assert share.input_of(proved.root / "nothing") == proved.root / "nothing"


def test_folders_that_are_missing_are_not_made(tmp_path: Path) -> None:
    bare = Share(tmp_path / "bare")
    found = share.check(settings_for(bare))
    assert [p.name for p in bare.root.iterdir()] == ["in"]
    assert list(bare.layout.input.path.iterdir()) == []
    assert "work, output, done, failed" in the(found, "folders").what.replace("not made yet: ", "")
    assert {f.level for f in found if f.name in ("folders", "rename")} == {"ok"}


def refuse(
    monkeypatch: pytest.MonkeyPatch, method: str, number: int, where: Callable[[SafePath], bool]
) -> None:
    """`SafePath.method` fails with this errno for some paths."""
    real = getattr(SafePath, method)

    def refusing(self: SafePath, *arguments: Any, **keywords: Any) -> Any:
        if where(self):
            raise OSError(number, os.strerror(number), str(self))
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(SafePath, method, refusing)


def test_a_share_that_cannot_be_written_to_is_a_problem(
    proved: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "create", errno.EROFS, lambda path: path.parent == proved.layout.input)
    found = share.check(settings_for(proved))
    problem = the(found, "rename")
    assert (problem.exit_code, problem.where) == (ExitCode.SHARE, str(proved.layout.input.path))
    assert "Read-only" in problem.what
    assert about(found, "daemons"), "the looks after it are still made"


def test_a_mount_without_writing_is_named(proved: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    class ReadOnly:
        f_flag = os.ST_RDONLY
        f_files = 1
        f_favail = 1

    monkeypatch.setattr(
        os, "statvfs", lambda path: ReadOnly if path == proved.layout.output.path else real(path)
    )
    problem = the(share.check(settings_for(proved)), "file system")
    assert problem.exit_code is ExitCode.SHARE
    assert "read-only: output" in problem.what


def test_folders_on_different_file_systems_are_a_problem(
    proved: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "rename", errno.EXDEV, lambda path: path.parent == proved.layout.output)
    problem = the(share.check(settings_for(proved)), "rename")
    assert problem.exit_code is ExitCode.SHARE
    assert "different file systems" in problem.what
    assert "one mount" in (problem.remedy or "")


def test_a_share_that_hangs_is_a_problem_and_nothing_further_is_looked_at(
    proved: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever = threading.Event()
    monkeypatch.setattr(share, "file_system", lambda _: forever.wait())
    found = share.check(settings_for(proved), limit_s=0.3)
    forever.set()
    assert [(f.name, f.level) for f in found] == [("folders", "ok"), ("file system", "problem")]
    assert "hangs" in found[-1].what
    assert found[-1].exit_code is ExitCode.SHARE


@pytest.mark.parametrize(
    ("kind", "mode", "level", "words"),
    [
        ("ext4", "auto", "ok", "events of ext4"),
        ("nfs4", "auto", "ok", "polling, a scan every 10 s: nfs4 sends no events"),
        ("ext4", "poll", "ok", "polling, a scan every 10 s: watch.mode says so"),
        ("cifs", "events", "warning", "events, but cifs has none"),
    ],
)
def test_how_new_files_are_noticed_is_told_with_the_reason(
    proved: Share, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str, level: str, words: str
) -> None:
    monkeypatch.setattr(share, "file_system", lambda _: kind)
    monkeypatch.setattr("sam_poll.runtime.builders.file_system", lambda _: kind)
    found = the(share.check(settings_for(proved, **{"watch.mode": mode})), "new files")
    assert found.level == level
    assert words in found.what


def test_inotify_that_is_used_up_is_a_warning_with_the_sysctl(
    proved: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inotify, "read", lambda: inotify.Inotify(8192, 128, 9, 128))
    found = the(share.check(settings_for(proved, **{"watch.mode": "events"})), "inotify")
    assert found.level == "warning"
    assert "sysctl -w fs.inotify.max_user_instances=256;" in (found.remedy or "")
    both = inotify.finding(inotify.Inotify(10, 10, 10, 10), 10)
    assert "fs.inotify.max_user_instances=20 fs.inotify.max_user_watches=20" in (both.remedy or "")


@pytest.mark.parametrize(("used", "level"), [(8128, "ok"), (8129, "warning"), (9000, "warning")])
def test_too_few_watches_for_one_more_daemon_are_a_warning(used: int, level: str) -> None:
    found = inotify.finding(inotify.Inotify(8192, 128, used, 9), 10)
    assert found.level == level
    assert ("few left" in found.what) == (used == 8129)


def test_inotify_is_counted_for_this_user_only(tmp_path: Path) -> None:
    limits = tmp_path / "sys" / "fs" / "inotify"
    limits.mkdir(parents=True)
    (limits / "max_user_watches").write_text("100\n")
    (limits / "max_user_instances").write_text("7\n")
    for process, target in (
        ("12", "anon_inode:inotify"),
        ("13", "/dev/null"),
        ("self", "anon_inode:inotify"),
    ):
        (tmp_path / process / "fd").mkdir(parents=True)
        (tmp_path / process / "fdinfo").mkdir()
        (tmp_path / process / "fd" / "3").symlink_to(target)
        (tmp_path / process / "fdinfo" / "3").write_text(
            "pos: 0\ninotify wd:2 ino:1\ninotify wd:1 ino:2\n"
        )
    assert inotify.read(tmp_path, os.getuid()) == inotify.Inotify(100, 7, 2, 1)
    assert inotify.read(tmp_path, os.getuid() + 1) == inotify.Inotify(100, 7, 0, 0)
    assert inotify.read(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("free", "level"), [(0, "problem"), (500 * 2**20, "warning"), (50 * 2**30, "ok")]
)
def test_little_space_is_a_warning_and_none_a_problem(
    proved: Share, monkeypatch: pytest.MonkeyPatch, free: int, level: str
) -> None:
    real = shutil.disk_usage(proved.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=free))
    (found,) = {f.level for f in about(share.check(settings_for(proved)), "free space")}
    assert found == level


@pytest.mark.parametrize(
    ("ahead", "words"), [(3600, "3,600 s ahead of"), (-3600, "3,600 s behind")]
)
def test_a_clock_that_is_wrong_is_a_warning(
    proved: Share, monkeypatch: pytest.MonkeyPatch, ahead: int, words: str
) -> None:
    real = time.time
    monkeypatch.setattr(share.time, "time", lambda: real() - ahead)
    found = the(share.check(settings_for(proved)), "clock")
    assert found.level == "warning"
    assert words in found.what
    assert proved.tree("input") == []


def test_daemons_at_work_are_counted_and_their_alarms_told(
    proved: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    alarm = {"kind": "output", "message": "disk full\x1b[2J", "seconds": 3}
    said = {
        "a": {"worker": "a", "alive": True, "lease_s": 60.0, "alarms": [alarm]},
        "b": {"worker": "b", "alive": True, "lease_s": 30},
        "c": {"worker": "c", "alive": False},
    }
    monkeypatch.setattr(
        share.liveness, "heartbeat_files", lambda _: [(name, proved.root) for name in said]
    )
    monkeypatch.setattr(share.liveness, "read_heartbeat", lambda name, *_: said[name])
    counted, alarmed, leased = about(share.check(settings_for(proved)), "daemons")
    assert counted.what == "2 daemons running, 1 dead"
    assert (alarmed.level, alarmed.where) == ("warning", "a")
    assert "\x1b" not in alarmed.what
    assert (leased.level, leased.where) == ("warning", "b")


# ── what the daemon would say of the same share ──


def verdicts(settings: Settings) -> tuple[bool, bool]:
    """Whether the doctor has no problem with the share, and whether the daemon's own proof has
    none. In this order: the proof makes folders."""
    healthy = exit_code(share.check(settings)) is ExitCode.OK
    try:
        check_folders(layout_of(settings), settings.sentinel)
    except ShareError:
        return healthy, False
    return healthy, True


def bare(root: Path) -> dict[str, Any]:
    (root / "in").mkdir()
    return {}


def nothing_yet(root: Path) -> dict[str, Any]:
    return {}


def root_away(root: Path) -> dict[str, Any]:
    root.rmdir()
    return {}


def file_as_work(root: Path) -> dict[str, Any]:
    (root / "work").write_bytes(b"")
    return bare(root)


def link_to_nothing(root: Path) -> dict[str, Any]:
    (root / "done").symlink_to(root / "nowhere")
    return bare(root)


def file_as_input(root: Path) -> dict[str, Any]:
    (root / "in").write_bytes(b"")
    return {}


def file_above(root: Path) -> dict[str, Any]:
    (root / "file").write_bytes(b"")
    return {**bare(root), "output": root / "file" / "deep" / "out"}


def sentinel_away(root: Path) -> dict[str, Any]:
    return {**bare(root), "sentinel": root / "mounted"}


def sentinel_there(root: Path) -> dict[str, Any]:
    (root / "mounted").write_bytes(b"")
    return {**bare(root), "sentinel": root / "mounted"}


@pytest.mark.parametrize(
    ("make", "starts"),
    [
        (bare, True),
        (nothing_yet, True),
        (sentinel_there, True),
        (root_away, False),
        (file_as_work, False),
        (link_to_nothing, False),
        (file_as_input, False),
        (file_above, False),
        (sentinel_away, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_share_is_healthy_where_a_daemon_would_start_and_only_there(
    tmp_path: Path, make: Callable[[Path], dict[str, Any]], starts: bool
) -> None:
    root = tmp_path / "share"
    root.mkdir()
    settings = load(None, env={}, flags={"input": root / "in", "model": "demo", **make(root)})
    assert verdicts(settings) == (starts, starts)


def test_every_problem_of_a_share_has_a_remedy_and_a_place(tmp_path: Path) -> None:
    for make in (
        root_away,
        file_as_work,
        link_to_nothing,
        file_as_input,
        file_above,
        sentinel_away,
    ):
        root = tmp_path / make.__name__
        root.mkdir()
        found = share.check(
            load(None, env={}, flags={"input": root / "in", "model": "demo", **make(root)})
        )
        problems = [f for f in found if f.level == "problem"]
        assert problems
        assert all(f.remedy and f.where for f in problems)


def test_folders_that_would_come_to_lie_on_another_file_system_are_a_problem(
    tmp_path: Path,
) -> None:
    if tmp_path.stat().st_dev == Path("/dev/shm").stat().st_dev:
        pytest.skip("there is no second file system here")
    (tmp_path / "in").mkdir()
    flags = {"input": tmp_path / "in", "work": Path("/dev/shm/sam_poll-not-made"), "model": "demo"}
    problem = the(share.check(load(None, env={}, flags=flags)), "rename")
    assert (problem.level, problem.exit_code) == ("problem", ExitCode.SHARE)
    assert "`work`" in problem.what
    assert not Path("/dev/shm/sam_poll-not-made").exists()


def test_an_input_that_is_not_there_yet_is_a_warning_because_it_may_be_a_mountpoint(
    tmp_path: Path,
) -> None:
    found = the(share.check(load(None, env={}, flags={"input": tmp_path / "in"})), "folders")
    assert (found.level, found.where) == ("warning", str(tmp_path / "in"))
    assert not (tmp_path / "in").exists()


def test_a_share_that_hangs_while_its_name_is_looked_at_is_told_as_one_that_hangs(
    proved: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    forever = threading.Event()
    monkeypatch.setattr(share, "_below", lambda _: forever.wait())
    try:
        assert share.input_of(proved.root, limit_s=0.3) == proved.root
    finally:
        forever.set()


def test_a_proof_in_the_same_moment_leaves_the_clocks_probe_alone(
    proved: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, proofs = SafePath.create, iter([True])

    def made_beside_a_proof(self: SafePath) -> BinaryIO:
        file = real(self)
        if next(proofs, False):
            check_folders(proved.layout)
        return file

    monkeypatch.setattr(SafePath, "create", made_beside_a_proof)
    (found,) = share._clock(proved.layout)
    assert found.level == "ok"
    assert proved.tree("input") == []


def test_a_sentinel_of_another_user_that_may_not_be_read_is_a_problem(
    proved: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "read_bytes", errno.EACCES, lambda path: path.name == SENTINEL)
    problem = the(share.check(settings_for(proved)), "rename")
    assert (problem.level, problem.where) == ("problem", str(proved.layout.work.path / SENTINEL))
    assert "runs as user" in (problem.remedy or "")


def test_a_folder_that_this_user_may_not_read_is_a_problem_though_a_file_travels_through_it(
    proved: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != proved.layout.input.path and real(path, mode)
    )
    problem = the(share.check(settings_for(proved)), "input")
    assert (problem.exit_code, problem.where) == (ExitCode.SHARE, str(proved.layout.input.path))


def test_a_folder_that_may_not_be_written_to_is_a_problem_before_the_others_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare(tmp_path)
    real = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: path != tmp_path / "in" and real(path, mode)
    )
    found = share.check(load(None, env={}, flags={"input": tmp_path / "in", "model": "demo"}))
    assert [f.name for f in found if f.level == "problem"] == ["input"]


def test_where_no_file_can_be_written_the_clock_is_not_asked(
    proved: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, "create", errno.EROFS, lambda path: True)
    found = share.check(settings_for(proved))
    assert [f.name for f in found if f.level == "problem"] == ["rename"]
    assert not about(found, "clock")


def test_folders_that_everybody_may_write_to_are_found(proved: Share) -> None:
    for name in ("in", "work", "done"):
        (proved.root / name).chmod(0o777)
    found = the(share.check(settings_for(proved)), "rights")
    assert found.level == "warning"
    assert f"{proved.root}/work {proved.root}/done`" in (found.remedy or "")
    assert f"{proved.root}/in " in (found.remedy or "")
