"""Paths of a folder that others may write to: whatever lies in a name's place, nothing outside is
touched.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from sam_poll.core.files import exists, move_new, rename, write_synced, write_whole
from sam_poll.core.safe_path import SafePath
from sam_poll.core.safe_root import check_trusted
from tests.conftest import wait_until


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def no_descriptor_left(root: SafePath) -> Iterator[None]:
    """What was opened in the block has been closed at its end, but for the root's own handles."""
    root.root.renew()
    before = names_in(Path("/proc/self/fd"))
    yield
    root.root.renew()
    assert len(names_in(Path("/proc/self/fd"))) <= len(before), "descriptors have been left open"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder with a file and a subfolder, beside the root."""
    folder = tmp_path / "outside"
    (folder / "inner").mkdir(parents=True)
    (folder / "secret").write_bytes(b"secret")
    (folder / "inner" / "deep").write_bytes(b"deep")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> SafePath:
    (tmp_path / "root").mkdir()
    path = SafePath.at(tmp_path / "root")
    path.names()  # its handle is open from now on
    return path


def state_of(folder: Path) -> list[tuple[object, ...]]:
    """All that can be told of a tree, but for the times of reading."""
    paths = [folder, *sorted(folder.rglob("*"))]
    stats = [(path, path.lstat()) for path in paths]
    return [
        (
            str(path),
            s.st_mode,
            s.st_uid,
            s.st_mtime_ns,
            s.st_ctime_ns,
            s.st_nlink,
            path.is_file() and path.read_bytes(),
        )
        for path, s in stats
    ]


ACTIONS: dict[str, Callable[[SafePath], object]] = {
    "open": lambda path: path.open().close(),
    "read_bytes": lambda path: path.read_bytes(),
    "create": lambda path: path.create().close(),
    "open_file": lambda path: os.close(path.open_file(os.O_RDWR | os.O_CREAT)),
    "open_own": lambda path: os.close(path.open_own()),
    "touch": lambda path: path.touch(),
    "unlink": lambda path: path.unlink(),
    "mkdir": lambda path: path.mkdir(),
    "mkdir with parents": lambda path: path.mkdir(parents=True, exist_ok=True),
    "rmdir": lambda path: path.rmdir(),
    "remove_tree": lambda path: path.remove_tree(),
    "names": lambda path: path.names(),
    "sync": lambda path: path.sync(),
    "lstat": lambda path: path.lstat(),
    "is_dir": lambda path: path.is_dir(),
    "is_file": lambda path: path.is_file(),
    "rename": lambda path: path.rename(path.with_name("renamed")),
    "link": lambda path: path.link(path.with_name("linked")),
    "write_synced": lambda path: write_synced(path, b"ours"),
    "write_whole": lambda path: write_whole(path, b"ours"),
    "move_new here": lambda path: move_new(_new(path.parent), path),
    "rename here": lambda path: rename(_new(path.parent), path),
    "exists": exists,
}


def done(action: Callable[[SafePath], object], path: SafePath) -> tuple[object, OSError | None]:
    """What an action returns, and what it raises."""
    try:
        return action(path), None
    except OSError as error:
        return None, error


def _new(folder: SafePath) -> SafePath:
    (folder / "new").touch()
    return folder / "new"


@pytest.mark.parametrize("action", sorted(ACTIONS))
@pytest.mark.parametrize("target", ["secret", "inner", "not-there"])
def test_a_link_in_a_names_place_leads_nowhere(
    action: str, target: str, root: SafePath, outside: Path
) -> None:
    (root.path / "x").symlink_to(outside / target)
    before = state_of(outside)
    with no_descriptor_left(root):
        found, error = done(ACTIONS[action], root / "x")
        assert not error or str(root) in str(error), "the error names the path"
        assert found not in (b"secret", ["deep"])
    assert state_of(outside) == before


@pytest.mark.parametrize("action", sorted(ACTIONS))
@pytest.mark.parametrize("depth", range(3))
def test_a_link_in_a_folders_place_leads_nowhere(
    action: str, depth: int, root: SafePath, outside: Path
) -> None:
    parts = ["a", "b", "c"]
    above = root.path.joinpath(*parts[:depth])
    above.mkdir(parents=True, exist_ok=True)
    outside.joinpath(*parts[depth + 1 :]).mkdir(parents=True, exist_ok=True)
    (above / parts[depth]).symlink_to(outside)
    before = state_of(outside)
    with no_descriptor_left(root):
        found, error = done(ACTIONS[action], root / "a" / "b" / "c" / "secret")
        assert not found
        assert error or action in ("is_dir", "is_file", "exists")
        if error:
            assert isinstance(error, NotADirectoryError)
            assert str(above / parts[depth]) in str(error), "the error names the link"
    assert state_of(outside) == before


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_a_second_name_of_another_file_is_never_written_into(
    action: str, root: SafePath, outside: Path
) -> None:
    os.link(outside / "secret", root.path / "x")
    before = state_of(outside / "inner")
    stamp = (outside / "secret").stat().st_mtime_ns
    _, error = done(ACTIONS[action], root / "x")
    assert error is None or error.errno in (errno.ENXIO, errno.EEXIST, errno.ENOTDIR)
    assert (outside / "secret").read_bytes() == b"secret"
    assert (outside / "secret").stat().st_mtime_ns == stamp
    assert state_of(outside / "inner") == before


@pytest.mark.parametrize("action", sorted(ACTIONS))
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_nothing_waits_for_the_other_end_of_a_pipe(action: str, kind: str, root: SafePath) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        if kind == "pipe":
            os.mkfifo(root.path / "x")
        else:
            listening.bind(f"/proc/self/fd/{os.open(root.path, os.O_RDONLY)}/x")
        ended = threading.Event()

        def act() -> None:
            with suppress(OSError):
                ACTIONS[action](root / "x")
            ended.set()

        threading.Thread(target=act, daemon=True).start()
        assert ended.wait(20)


@pytest.mark.parametrize("name", ["../outside", "a/../../x", "/etc/passwd", "a\0b", "..", "a/.."])
def test_a_name_that_leads_out_is_refused(name: str, root: SafePath) -> None:
    with pytest.raises(ValueError, match="not a name below"):
        root / name
    with pytest.raises(ValueError, match="not a name below"):
        (root / "a").with_name(name)


@pytest.mark.parametrize(
    ("name", "plain"), [("", ""), (".", ""), ("./a", "a"), ("a/./b", "a/b"), ("a//b/", "a/b")]
)
def test_one_path_has_one_name(name: str, plain: str, root: SafePath) -> None:
    assert root / name == (root / plain if plain else root)


def test_folders_are_never_writable_for_everybody_and_files_never_executable(
    root: SafePath,
) -> None:
    before = os.umask(0)
    try:
        (root / "a" / "b").mkdir(parents=True)
        (root / "f").touch()
        new = SafePath.at(root.path / "made" / "root")
        new.mkdir(parents=True)
    finally:
        os.umask(before)
    modes = {
        name: stat.S_IMODE((root.path / name).stat().st_mode)
        for name in ("a", "a/b", "f", "made", "made/root")
    }
    assert modes == {"a": 0o775, "a/b": 0o775, "f": 0o664, "made": 0o775, "made/root": 0o775}


def test_a_tree_is_removed_with_its_links_and_not_what_they_lead_to(
    root: SafePath, outside: Path
) -> None:
    tree = root.path / "tree"
    (tree / "a" / "b").mkdir(parents=True)
    (tree / "a" / "file").touch()
    (tree / "a" / "link").symlink_to(outside)
    (tree / "link").symlink_to(outside / "secret")
    os.mkfifo(tree / "a" / "b" / "pipe")
    before = state_of(outside)
    with no_descriptor_left(root):
        (root / "tree").remove_tree()
    assert not tree.exists()
    assert state_of(outside) == before


def test_a_very_deep_tree_is_removed_with_few_descriptors(root: SafePath) -> None:
    code = """
import os, resource, sys
from pathlib import Path
from sam_poll.core.safe_path import SafePath
os.chdir(sys.argv[1]); os.mkdir("deep"); os.chdir("deep")
for _ in range(3000):
    os.mkdir("d"); os.chdir("d"); open("f", "w").close()
os.chdir("/")
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
(SafePath.at(Path(sys.argv[1])) / "deep").remove_tree()
"""
    subprocess.run([sys.executable, "-c", code, str(root)], check=True, timeout=120)
    assert names_in(root.path) == []


def test_the_root_itself_is_not_removed_with_what_lies_in_it(root: SafePath) -> None:
    (root / "a").touch()
    with pytest.raises(OSError, match="busy"):
        root.remove_tree()
    assert root.names() == ["a"]


def test_a_file_of_our_own_keeps_its_content_and_takes_the_place_of_what_is_none(
    root: SafePath,
) -> None:
    (root.path / "x").write_bytes(b"kept")
    os.close((root / "x").open_own())
    assert (root / "x").read_bytes() == b"kept"
    (root.path / "y").symlink_to("x")
    (root / "y").touch()
    assert (root / "y").is_file()
    assert (root / "x").read_bytes() == b"kept"


def test_a_pickled_path_is_the_same_path(root: SafePath) -> None:
    path = root / "a" / "b"
    again = pickle.loads(pickle.dumps(path))
    assert again == path
    assert again.root is path.root


@pytest.mark.parametrize(
    "act", [lambda path: path.touch(), lambda path: path.mkdir(), lambda path: path.lstat()]
)
def test_a_path_longer_than_others_can_open_is_refused(
    act: Callable[[SafePath], object], root: SafePath
) -> None:
    path = root
    while len(str(path)) < 4200:
        path = path / ("d" * 200)
    with pytest.raises(OSError, match="too long"):
        act(path)
    (root / "short").touch()
    with pytest.raises(OSError, match="too long"):
        (root / "short").rename(path)


@pytest.mark.parametrize("old", ["moved", "removed"])
def test_a_root_that_is_replaced_is_found_at_once_where_something_is_missing(
    old: str, root: SafePath
) -> None:
    (root / "old").touch()
    if old == "moved":
        root.path.rename(root.path.with_name("aside"))
    else:
        (root / "old").unlink()
        root.path.rmdir()
    root.path.mkdir()
    (root.path / "new").touch()
    wait_until(lambda: exists(root / "new"))
    assert (root / "new").is_file()
    assert not exists(root / "old")


def test_a_root_that_becomes_a_link_is_not_followed(root: SafePath, outside: Path) -> None:
    (root / "a").touch()
    root.path.rename(root.path.with_name("aside"))
    root.path.symlink_to(outside)
    root.root.renew()
    before = state_of(outside)
    for name in sorted(ACTIONS):
        with pytest.raises(OSError, match="not followed"):
            raise_no(ACTIONS[name], root / "secret")
    assert not root.is_dir()
    assert state_of(outside) == before


def raise_no(action: Callable[[SafePath], object], path: SafePath) -> None:
    """A look that says no without raising counts as refused."""
    if not action(path):
        raise NotADirectoryError(errno.ENOTDIR, "not followed")


def test_a_folder_above_the_root_that_becomes_a_link_is_not_followed(
    tmp_path: Path, outside: Path
) -> None:
    (tmp_path / "share" / "inner").mkdir(parents=True)
    path = SafePath.at(tmp_path / "share" / "inner")
    path.names()
    (tmp_path / "share").rename(tmp_path / "aside")
    (tmp_path / "share").symlink_to(outside)
    path.root.renew()
    with pytest.raises(OSError, match="not followed"):
        path.names()
    with pytest.raises(OSError, match="not followed"):
        (path / "x").touch()


def test_a_link_above_the_root_is_followed_where_its_maker_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "real" / "in").mkdir(parents=True)
    (tmp_path / "way").symlink_to("real")
    (tmp_path / "real" / "up").symlink_to("../way/./in")
    path = SafePath.at(tmp_path / "way" / "up")
    (path / "x").touch()
    assert names_in(tmp_path / "real" / "in") == ["x"]
    assert path.root.real == (tmp_path / "real" / "in").resolve()


def test_links_that_lead_in_a_circle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="circular"):
        SafePath.at(tmp_path / "a").names()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make links of other users")
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
@pytest.mark.parametrize("hidden", [False, True], ids=["named", "behind a link of ours"])
def test_a_root_behind_a_link_of_another_user_is_refused(
    mode: int, hidden: bool, tmp_path: Path, outside: Path
) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    (tmp_path / "open" / "work").symlink_to(outside)
    os.chown(tmp_path / "open" / "work", 12345, 12345, follow_symlinks=False)
    folder = tmp_path / "open" / "work"
    if hidden:
        (tmp_path / "ours").symlink_to(folder)
        folder = tmp_path / "ours"
    path = SafePath.at(folder)
    before = state_of(outside)
    for act in (
        path.names,
        (path / "x").touch,
        path.mkdir,
        path.lstat,
        (path / "inner" / "deep").unlink,
    ):
        with pytest.raises(OSError, match="created by user 12345"):
            act()
    assert "user 12345" in (check_trusted(folder) or "")
    assert state_of(outside) == before
    (tmp_path / "open").chmod(0o755)
    assert check_trusted(folder) is None, "nobody else may write there"


def test_two_mounts_are_distinguished_only_after_both_are_opened_again(
    root: SafePath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rename that fails because one handle is of an older mount is tried again behind new
    handles.
    """
    other = SafePath.at(tmp_path / "other")
    other.mkdir()
    (root / "a").touch()
    other.names()
    tries = []
    really = os.rename

    def once_across_mounts(*args: object, **more: object) -> None:
        tries.append(args)
        if len(tries) == 1:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        really(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "rename", once_across_mounts)
    for path in (root, other):
        handle = path.root.handle()
        handle.since -= 0.5
    (root / "a").rename(other / "a")
    assert len(tries) == 2
    assert other.names() == ["a"]


def test_errors_name_both_paths(root: SafePath) -> None:
    with pytest.raises(FileNotFoundError) as told:
        (root / "not" / "there").rename(root / "new")
    assert (told.value.filename, told.value.filename2) == (f"{root}/not/there", f"{root}/new")
    (root / "a").touch()
    with pytest.raises(FileNotFoundError) as told:
        (root / "a").rename(root / "none" / "b")
    assert (told.value.filename, told.value.filename2) == (f"{root}/a", f"{root}/none/b")


def test_failures_leave_no_descriptor_open(root: SafePath, outside: Path) -> None:
    (root / "a" / "b").mkdir(parents=True)
    (root.path / "a" / "link").symlink_to(outside)
    os.mkfifo(root.path / "a" / "pipe")
    root.names()
    with no_descriptor_left(root):
        for _ in range(50):
            for action in ACTIONS.values():
                for name in ("a/link/secret", "a/pipe/x", "a/none/x"):
                    with suppress(OSError):
                        action(root / name)
        del action


def test_many_threads_may_use_one_root(root: SafePath) -> None:
    """Handles are renewed under the hands of others all the time."""
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            folder = root / f"t{number}"
            folder.mkdir(exist_ok=True)
            for i in range(150):
                path = folder / f"{i}"
                path.touch()
                root.root.renew()
                path.rename(folder / "moved")
                assert (folder / "moved").read_bytes() == b""
                (folder / "moved").unlink()
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    root.names()
    with no_descriptor_left(root):
        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_a_roots_device_is_known_while_another_thread_renews_its_handle(
    root: SafePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat = os.fstat

    def renewed_before(fd: int) -> os.stat_result:
        root.root.renew()
        return fstat(fd)

    monkeypatch.setattr(os, "fstat", renewed_before)
    assert root.root.device() == root.path.stat().st_dev


def test_a_folder_that_turns_into_a_link_and_back_never_leads_out(
    root: SafePath, outside: Path
) -> None:
    """All actions in a race with somebody who exchanges the folder for a link as fast as he can."""
    inside, link = root.path / "real", root.path / "link"
    inside.mkdir()
    link.symlink_to(outside)
    before = state_of(outside)
    over = threading.Event()

    def exchange() -> None:
        here = root.path / "here"
        while not over.is_set():
            for what in (inside, link):
                with suppress(OSError):
                    what.rename(here)
                with suppress(OSError):
                    here.rename(what)
                shutil.rmtree(here, ignore_errors=True)  # made by an action in between

    thread = threading.Thread(target=exchange)
    thread.start()
    met: set[type[BaseException] | None] = set()
    both = {NotADirectoryError, None}
    number = 0
    latest = time.monotonic() + 60
    try:
        while number < 3000 or (not both <= met and time.monotonic() < latest):
            action = list(ACTIONS.values())[number % len(ACTIONS)]
            number += 1
            try:
                action(root / "here" / "secret")
                met.add(None)
            except OSError as error:
                met.add(type(error))
    finally:
        over.set()
        thread.join()
    assert state_of(outside) == before
    assert both <= met, "both were met"


def test_a_folder_that_nobody_could_open_by_its_name_is_none_to_a_walk(root: SafePath) -> None:
    path = root
    while len(str(path)) < 4200:
        path = path / ("d" * 200)
    with pytest.raises(NotADirectoryError, match="too long"):
        path.names()


def test_a_folder_is_tested_without_leaving_a_name(tmp_path: Path) -> None:
    folder = SafePath.at(tmp_path)
    seen = tmp_path.stat().st_mtime_ns
    if not folder.create_unnamed():
        pytest.skip("this file system has no files without a name")
    assert (folder.names(), tmp_path.stat().st_mtime_ns) == ([], seen)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("link", "missing"):
        with pytest.raises(OSError, match=name):
            (folder / name).create_unnamed()


def test_a_file_stays_in_a_fenced_folder_that_another_process_renames_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "g1").mkdir(parents=True)
    (tmp_path / "work" / "g1" / "a.jpg").write_bytes(b"a")
    root = SafePath.at(tmp_path)
    rename = os.rename

    def after_take_over(*args: object, **more: object) -> None:
        monkeypatch.setattr(os, "rename", rename)
        rename(tmp_path / "work" / "g1", tmp_path / "work" / "g2")
        rename(*args, **more)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "rename", after_take_over)
    with pytest.raises(FileNotFoundError):
        ((root / "work").fenced("g1", exclusive=True) / "a.jpg").rename(root / "a.jpg")
    assert (tmp_path / "work" / "g2" / "a.jpg").read_bytes() == b"a"
    assert not (tmp_path / "a.jpg").exists()
