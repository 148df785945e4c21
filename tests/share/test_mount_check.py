"""Whether the share is mounted and usable: checked at the start, and by a sentinel ever after."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import threading
from typing import Any

import pytest

from sam_poll.core.errors import ShareError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.safe_root import Root
from sam_poll.share import mount_check
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.layout import Layout
from sam_poll.share.mount_check import SENTINEL, Sentinel, check_folders, world_writable_warning
from sam_poll.share.source import FolderSource
from tests.conftest import Daemon, Share, wait_until


@pytest.fixture
def layout(share: Share) -> Layout:
    """A share's folders, checked."""
    check_folders(share.layout)
    return share.layout


def mounted_elsewhere(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    """Let `in/` be on another file system from now on."""
    really = Root.device

    def device(self: Root) -> int:
        return really(self) + (self is layout.input.root)

    monkeypatch.setattr(Root, "device", device)


def test_check_folders_leaves_nothing_but_the_folders(share: Share) -> None:
    check_folders(share.layout)
    assert all(folder.is_dir() for folder in share.layout.folders.values())
    assert [p for p in share.root.rglob("*") if p.is_file()] == []


def test_a_check_that_fails_leaves_no_file(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    really = SafePath.create

    def created_then_failed(self: SafePath) -> None:
        really(self).close()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(SafePath, "create", created_then_failed)
    with pytest.raises(ShareError, match="Input/output error"):
        check_folders(share.layout)
    assert [p for p in share.root.rglob("*") if p.is_file()] == []


def test_check_folders_of_many_daemons_at_the_same_time(share: Share) -> None:
    faults: list[Exception] = []
    start = threading.Barrier(6)

    def proving() -> None:
        start.wait()
        try:
            for _ in range(10):
                check_folders(share.layout)
        except ShareError as error:
            faults.append(error)

    threads = [threading.Thread(target=proving) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def test_a_rename_refused_between_two_mounts_of_one_disk_names_both_folders(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = SafePath.rename

    def rename(self: SafePath, target: SafePath) -> None:
        if target.parent == share.layout.done:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        really(self, target)

    monkeypatch.setattr(SafePath, "rename", rename)
    with pytest.raises(
        ShareError, match="`output` and `done` are on different file systems"
    ) as raised:
        check_folders(share.layout)
    assert str(share.done) in (raised.value.place or "")
    assert "one mount" in (raised.value.remedy or "")
    assert [p for p in share.root.rglob("*") if p.is_file()] == []


def test_the_owners_sentinel_is_required_before_any_folder_is_created(share: Share) -> None:
    with pytest.raises(ShareError, match="sentinel is missing") as raised:
        check_folders(share.layout, share.root / "mounted")
    assert raised.value.exit_code == 75
    assert not share.work.exists()
    with (
        pytest.raises(ShareError, match="sentinel is missing"),
        FolderSource(share.layout, FolderOptions(sentinel=share.root / "mounted")),
    ):
        pass
    (share.root / "mounted").touch()
    check_folders(share.layout, share.root / "mounted")


def test_a_share_with_its_sentinel_passes_the_check(layout: Layout) -> None:
    first = Sentinel(layout)
    for _ in range(3):
        first.check()
    Sentinel(layout).check()
    first.check()
    assert [p.name for p in layout.work.path.iterdir()] == [SENTINEL]


def test_a_bare_mountpoint_is_not_taken_for_the_share(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentinel = Sentinel(layout)
    aside = layout.work.path.with_name("aside")
    layout.work.path.rename(aside)
    layout.work.path.mkdir()
    with monkeypatch.context() as patch:
        mounted_elsewhere(patch, layout)
        with pytest.raises(OSError, match="not there") as raised:
            sentinel.check()
        assert raised.value.errno == errno.ESTALE
        assert list(layout.work.path.iterdir()) == []
    layout.work.path.rmdir()
    aside.rename(layout.work.path)
    sentinel.check()


def test_a_mountpoint_without_any_folders_is_not_taken_for_the_share(layout: Layout) -> None:
    sentinel = Sentinel(layout)
    layout.input.path.parent.rename(layout.input.path.parent.with_name("unmounted"))
    layout.input.path.parent.mkdir()
    with pytest.raises(FileNotFoundError):
        sentinel.check()
    assert list(layout.input.path.parent.iterdir()) == []


def test_a_share_mounted_again_is_the_same_share(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network share may have another device number each time it is mounted."""
    sentinel = Sentinel(layout)
    mounted_elsewhere(monkeypatch, layout)
    sentinel.check()
    (layout.work.path / SENTINEL).unlink()
    sentinel.check()  # its new number is the known one now
    assert (layout.work.path / SENTINEL).exists()


def test_another_share_in_its_place_is_an_error(layout: Layout) -> None:
    sentinel = Sentinel(layout)
    number = (layout.work.path / SENTINEL).read_text()
    (layout.work.path / SENTINEL).write_text("another\n")
    with pytest.raises(OSError, match="another share") as raised:
        sentinel.check()
    assert raised.value.filename == str(layout.work.path / SENTINEL)
    (layout.work.path / SENTINEL).write_text(number)
    sentinel.check()


def test_a_deleted_work_folder_is_created_again_and_logged_once(
    layout: Layout, logged: list[str]
) -> None:
    sentinel = Sentinel(layout)
    (layout.work.path / SENTINEL).unlink()
    layout.work.path.rmdir()
    for _ in range(3):
        sentinel.check()
    assert (layout.work.path / SENTINEL).exists()
    assert sum("created again" in line for line in logged) == 1


@pytest.mark.parametrize("links", [True, False])
def test_daemons_that_start_together_make_one_sentinel(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:

        def link(*args: Any) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(SafePath, "link", link)
    for _ in range(20):
        made: list[Sentinel] = []
        start = threading.Barrier(4)

        def make(made: list[Sentinel] = made, start: threading.Barrier = start) -> None:
            start.wait()
            made.append(Sentinel(layout))

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for sentinel in made:
            sentinel.check()
        assert [p.name for p in layout.work.path.iterdir()] == [SENTINEL]
        (layout.work.path / SENTINEL).unlink()


def test_a_sentinel_never_takes_the_place_of_another(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = SafePath.create
    others: list[Sentinel] = []

    def and_then_the_other_one(self: SafePath) -> Any:
        made = really(self)
        if not others:
            others.append(None)  # type: ignore[arg-type]
            others[0] = Sentinel(layout)
        return made

    def rename(self: SafePath, target: SafePath) -> None:
        raise AssertionError("the other one's sentinel was overwritten")

    monkeypatch.setattr(SafePath, "create", and_then_the_other_one)
    monkeypatch.setattr(SafePath, "rename", rename)
    mine = Sentinel(layout)
    for sentinel in (mine, others[0]):
        sentinel.check()


def test_a_sentinel_that_a_power_failure_left_empty_is_written_again(layout: Layout) -> None:
    (layout.work.path / SENTINEL).write_bytes(b"")
    Sentinel(layout).check()
    assert (layout.work.path / SENTINEL).read_bytes()


def test_nothing_is_claimed_while_the_owners_sentinel_is_missing(
    share: Share, logged: list[str]
) -> None:
    users = share.root / "mounted"
    users.touch()
    with Daemon(share, sentinel=users, settle_s=0.0, rescan_s=0.02) as daemon:
        wait_until(lambda: daemon.source.scans > 0)
        users.unlink()
        wait_until(lambda: "share" in daemon.source._alarms)
        share.pair("dog")
        assert "sentinel is missing" in daemon.source._alarms.active()[0].message
        scans = daemon.source.scans
        users.touch()
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)
        assert daemon.source.scans > scans
        wait_until(lambda: "share" not in daemon.source._alarms)
    assert sum("alarm (share): " in line for line in logged) == 1


def test_nothing_is_read_and_nothing_written_while_the_share_is_away(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    with FolderSource(
        share.layout, FolderOptions(settle_s=0.0, mode="poll", rescan_s=0.01)
    ) as source:
        aside = share.root / "aside"
        share.work.rename(aside)
        share.work.mkdir()
        mounted_elsewhere(monkeypatch, share.layout)
        stop = threading.Event()
        thread = threading.Thread(target=lambda: list(source.jobs(stop)))
        thread.start()
        wait_until(lambda: "share" in source._alarms)
        stop.set()
        thread.join(30)
        assert source.scans == 0
        assert list(share.work.iterdir()) == []
        share.work.rmdir()
        aside.rename(share.work)
    assert share.tree("input") == ["dog.jpg", "dog.json"]


@pytest.mark.parametrize("name", ["input", "work", "output"])
def test_a_file_in_the_place_of_a_folder_is_said_to_be_one(share: Share, name: str) -> None:
    folder = share.layout.folders[name].path
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("a file")
    with pytest.raises(ShareError, match=f"`{name}` cannot be used: it is not a folder") as raised:
        check_folders(share.layout)
    assert raised.value.place == str(folder)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EROFS, "for writing"), (errno.EACCES, f"user {os.getuid()}")]
)
def test_an_unusable_folder_is_named_with_the_remedy(
    share: Share, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def create(self: SafePath) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(SafePath, "create", create)
    with pytest.raises(ShareError, match="`input` cannot be used: ") as raised:
        check_folders(share.layout)
    assert raised.value.place == str(share.input)
    assert remedy in (raised.value.remedy or "")


def test_an_unreadable_folder_is_an_error_at_the_start(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    really = SafePath.scandir

    def scandir(self: SafePath) -> Any:
        if self == share.layout.input:
            raise PermissionError(errno.EACCES, "Permission denied")
        return really(self)

    monkeypatch.setattr(SafePath, "scandir", scandir)
    with pytest.raises(ShareError, match="`input` cannot be used: Permission denied"):
        check_folders(share.layout)


def test_a_probe_that_vanishes_each_time_is_an_error_after_some_retries(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def rename(self: SafePath, target: SafePath) -> None:
        tries.append(target)
        raise FileNotFoundError(errno.ENOENT, "No such file")

    monkeypatch.setattr(SafePath, "rename", rename)
    monkeypatch.setattr(mount_check.time, "sleep", lambda seconds: None)
    with pytest.raises(ShareError):
        check_folders(share.layout)
    assert len(tries) > 5


OWN = ["work", "out", "done", "failed"]


@pytest.mark.parametrize("umask", [0, 0o022, 0o002, 0o077])
def test_the_daemons_own_folders_are_created_writable_for_their_owner_only(
    umask: int, share: Share
) -> None:
    before = os.umask(umask)
    try:
        share.pair("cam1/dog")
        share.pair("cam1/cat", prompt={"box": {}})
        share.run_once()
    finally:
        os.umask(before)
    made = [
        path
        for name in OWN
        for path in (share.root / name, *(share.root / name).rglob("*"))
        if path.is_dir()
    ]
    assert share.root / "done" / "cam1" in made
    assert {stat.S_IMODE(path.stat().st_mode) for path in made} == {0o775 & ~umask}


@pytest.mark.parametrize("name", OWN)
def test_a_world_writable_folder_is_named_once_with_the_remedy(
    name: str, share: Share, logged: list[str]
) -> None:
    check_folders(share.layout)
    assert world_writable_warning(share.layout) is None
    (share.root / name).chmod(0o1777)
    share.pair("dog")
    share.run_once()
    (line,) = [line for line in logged if "may write to" in line]
    assert line.startswith("WARNING")
    assert f"chmod o-w {share.root / name}`" in line
    assert len(share.tree("output")) == 1, "it is no reason to stop"


def test_a_world_writable_folder_above_is_named_unless_it_is_sticky(
    share: Share,
) -> None:
    check_folders(share.layout)
    share.input.chmod(0o777)
    share.root.chmod(0o1777)
    assert world_writable_warning(share.layout) is None
    share.root.chmod(0o777)
    warning = world_writable_warning(share.layout)
    assert warning
    assert f"write to {share.root}," in warning.message
    assert f"chmod o-w {share.root}`" in warning.remedy
