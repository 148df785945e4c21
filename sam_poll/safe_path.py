"""Paths below a directory that others may write to: no symbolic link below it is ever followed.

A `SafePath` is a root directory and a name below it. Each operation walks from a handle of the root, one component at a
time (`openat` with `O_NOFOLLOW | O_DIRECTORY`), and acts on the last name relative to the handle of its folder. A link
that somebody plants, at any moment, is met as a link: it is listed, renamed and removed as one, and opened never. Files
are opened without waiting for the other end of a pipe, and only regular ones.

`SafePath` offers the part of pathlib's interface that is needed, and deliberately has no `__fspath__`: a path of the
share cannot be given to `open`, `os` or a library by mistake. A library that opens by name gets `/dev/fd/N` of an open
file to read, and a private folder of this machine to write in.

What can still go wrong here: the root itself, and what lies above it, are trusted as they are named when it is first
used; `check_trusted` refuses links there that another user may have planted. A folder that is moved while a file in it
is opened is still the folder that it was.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")

FOLDER_MODE = 0o775  # less the umask: never writable for everybody
FILE_MODE = 0o664
_FOLDER = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PASS = _FOLDER | getattr(os, "O_PATH", os.O_RDONLY)  # to walk through: needs no permission to list
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_RENEW_S = 1.0  # the longest that a handle is used
_MOST_FOLDERS = 64
_FRESH_S = 0.05  # where something is missing behind an older one, it is looked for again behind a new one
_LONGEST = 4095  # bytes; Linux' PATH_MAX less its end: what we make, others must be able to open
_GONE = {errno.ENOENT, errno.ESTALE, errno.EXDEV}
_IN_THE_WAY = "a link or a file is in a folder's place; links are not followed"
_NEEDED = {os.open, os.stat, os.mkdir, os.rename, os.link, os.unlink, os.rmdir}
SUPPORTED = os.supports_dir_fd >= _NEEDED and os.scandir in os.supports_fd
"""Whether this platform can act relative to directory handles at all."""
_roots: weakref.WeakValueDictionary[str, Root] = weakref.WeakValueDictionary()


class _Handle:
    """A directory's descriptor, closed with the last reference: no thread loses the one that it is using.

    `folders` are handles of folders that lie in it, by their paths: a job's files are touched many times in a moment.
    """

    __slots__ = ("fd", "folders", "since")

    def __init__(self, path: Path | str, within: int | None = None) -> None:
        self.fd = -1
        self.fd = os.open(path, _PASS if within is not None else os.O_RDONLY | _FOLDER, dir_fd=within)
        self.folders: dict[str, _Handle] = {}
        self.since = time.monotonic()

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class Root:
    """A directory that is trusted as it is named, and its handle. `Root.of(path)` is the same object while it is used.

    A link in the place of the directory is resolved once, at the beginning. The handle is opened again every second: a
    share may be mounted anew, or a folder replaced, and nothing about two mounts of one disk tells them apart.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._real: Path | None = None
        self._handle: _Handle | None = None

    @staticmethod
    def of(path: Path) -> Root:
        """Return the root of this directory, which need not exist yet."""
        path = path.absolute()
        return _roots.setdefault(str(path), Root(path))

    @property
    def real(self) -> Path:
        """The directory without links in its path, as it was when the root was first used."""
        if self._real is None:
            self._real = Path(os.path.realpath(self.path))
        return self._real

    def handle(self, younger_than_s: float = _RENEW_S) -> _Handle:
        """Return a handle of the directory that is not older than this. Raises OSError."""
        handle = self._handle
        if handle is None or time.monotonic() - handle.since >= younger_than_s:
            handle = self._handle = _Handle(self.real)
        return handle

    def folder(self, rel: str) -> _Handle:
        """Return a handle of a folder below the directory, opened within the last second. Raises OSError."""
        root = self.handle()
        if not rel:
            return root
        known = root.folders.get(rel)
        if known:
            return known
        handle, end = root, 0
        while end < len(rel):
            start, end = end, rel.find("/", end + 1)
            end = len(rel) if end < 0 else end
            known = root.folders.get(rel[:end])
            if known is None:
                try:
                    known = _Handle(rel[start:end].lstrip("/"), within=handle.fd)
                except OSError as error:
                    raise _in_the_way(error, f"{self.path}/{rel[:end]}") from None
                if len(root.folders) >= _MOST_FOLDERS:
                    root.folders.clear()
                root.folders[rel[:end]] = known
            handle = known
        return handle

    def outdated(self, rel: str) -> bool:
        """Return whether what was opened on the way to a path is opened again next time: a folder that is gone, and
        whose name another one may have now; or the directory itself, where its handle is not quite new. Raises OSError.
        """
        before = self._handle
        while before and rel:
            rel = rel.rpartition("/")[0]
            known = before.folders.get(rel)
            if known and not os.fstat(known.fd).st_nlink:
                before.folders.clear()
                return True
        return self.handle(_FRESH_S) is not before

    def forget(self, rel: str) -> None:
        """Open a folder again next time, and what lies in it: it is removed, or renamed."""
        handle = self._handle
        if handle and handle.folders.pop(rel, None):
            for inner in [path for path in handle.folders.copy() if path.startswith(rel + "/")]:
                handle.folders.pop(inner, None)

    def renew(self) -> None:
        """Have the next operation open the directory that lies there then."""
        self._handle = None


class SafePath:
    """A name below a root; see the module. `rel` is its path below the root, with `/`, "" for the root itself."""

    __slots__ = ("__weakref__", "_kept", "rel", "root")

    def __init__(self, root: Root, rel: str = "", kept: str | None = None) -> None:
        """`kept`: the part of `rel` whose folders may be known from a moment ago; None: all of them."""
        self.root, self.rel, self._kept = root, rel, kept

    @classmethod
    def at(cls, folder: Path) -> SafePath:
        """Return the path of a trusted directory itself."""
        return cls(Root.of(folder))

    @classmethod
    def beside(cls, file: Path) -> SafePath:
        """Return the path of a file in a trusted directory: of one that a user has named, or of our own files."""
        return cls.at(file.parent) / file.name

    # ── names ──

    def __truediv__(self, rel: str) -> SafePath:
        """Raises ValueError for a name that would lead out of the root."""
        if ".." in rel or "//" in rel or rel[:1] in ("/", "") or rel.endswith("/") or "\0" in rel or rel == ".":
            rel = _checked(rel)
            if not rel:
                return self
        return SafePath(self.root, f"{self.rel}/{rel}" if self.rel else rel, self._kept)

    def fenced(self, name: str) -> SafePath:
        """Return the path of a folder in this one that is opened by its name each time that something in it is touched.

        Who renames such a folder can be sure that nobody finds it by its old name any more.
        """
        return SafePath(self.root, f"{self.rel}/{name}" if self.rel else name, self.rel)

    @property
    def name(self) -> str:
        return self.rel[self.rel.rfind("/") + 1 :] if self.rel else self.root.path.name

    @property
    def stem(self) -> str:
        return os.path.splitext(self.name)[0]

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1]

    @property
    def parent(self) -> SafePath:
        """The folder that it lies in; the root's is the root."""
        return SafePath(self.root, self.rel[: max(self.rel.rfind("/"), 0)], self._kept)

    def with_name(self, name: str) -> SafePath:
        return self.parent / name

    def below(self, folder: SafePath) -> str:
        """Return the path relative to a folder that it lies in, with `/`. Raises ValueError."""
        if self.root.path != folder.root.path or not (self.rel + "/").startswith(folder.rel + "/" * bool(folder.rel)):
            raise ValueError(f"{self} does not lie in {folder}")
        return self.rel[len(folder.rel) :].lstrip("/")

    @property
    def path(self) -> Path:
        """The plain path: to be shown, compared or told to others, never to be opened."""
        return self.root.path / self.rel

    def __str__(self) -> str:
        return f"{self.root.path}/{self.rel}" if self.rel else str(self.root.path)

    def __repr__(self) -> str:
        return f"SafePath({str(self.root.path)!r}, {self.rel!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SafePath) and self.rel == other.rel and self.root.path == other.root.path

    def __lt__(self, other: SafePath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash((self.rel, self.root.path))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.root.path, self.rel, self._kept)

    # ── looking ──

    def lstat(self) -> os.stat_result:
        """Return what a name is, a link as a link; of the root, what lies in its place now. Raises OSError."""
        if not self.rel:
            return self.root.real.lstat()
        return self._do(_lstat)

    def is_dir(self) -> bool:
        """Return whether it is a folder, and no link to one. Raises OSError other than "not there"."""
        return self._is(stat.S_ISDIR)

    def is_file(self) -> bool:
        """Return whether it is a regular file, and no link to one. Raises OSError other than "not there"."""
        return self._is(stat.S_ISREG)

    def _is(self, kind: Callable[[int], bool]) -> bool:
        try:
            return kind(self.lstat().st_mode)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                return False
            raise

    @contextmanager
    def scandir(self) -> Iterator[Iterator[os.DirEntry[str]]]:
        """Open the folder and iterate over its entries, as `os.scandir`; they may be looked at within the `with`."""
        fd = self._open_folder()
        try:
            with os.scandir(fd) as entries:
                yield entries
        finally:
            os.close(fd)

    def names(self) -> list[str]:
        """Return the names in the folder. Raises OSError."""
        with self.scandir() as entries:
            return [entry.name for entry in entries]

    # ── files ──

    def open(self) -> BinaryIO:
        """Open a regular file for reading. Raises OSError; ENXIO, ELOOP and such where it is something else."""
        return os.fdopen(self.open_file(os.O_RDONLY), "rb")

    def open_file(self, flags: int) -> int:
        """Open a regular file, or with `os.O_CREAT` make one, and return its descriptor. Raises OSError."""

        def opened(folder: int, name: str) -> int:
            fd = os.open(name, flags | _FILE, FILE_MODE, dir_fd=folder)
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                os.close(fd)
                raise OSError(errno.ENXIO, "it is not a file", str(self))
            return fd

        return self._do(opened)

    def read_bytes(self, most: int = -1) -> bytes:
        """Return a regular file's content, of a long one the first `most` bytes. Raises OSError."""
        with self.open() as file:
            return file.read(most)

    def create(self) -> BinaryIO:
        """Make a new file and open it for writing. Raises OSError; FileExistsError where the name is taken."""
        return os.fdopen(self.open_file(os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")

    def touch(self) -> None:
        """Make an empty file, or give one the present time. Raises OSError."""
        try:
            self.create().close()
        except FileExistsError:
            self._do(_utime)

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove a file, or a link. Raises OSError."""
        try:
            self._do(_unlink)
        except FileNotFoundError:
            if not missing_ok:
                raise

    # ── folders ──

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Make a folder. Raises OSError; FileExistsError with `exist_ok` also where a link or a file has the name."""
        try:
            if self.rel:
                self._do(_mkdir)
            else:
                self.root.path.mkdir(FOLDER_MODE, parents=parents, exist_ok=exist_ok)
        except FileExistsError:
            if not exist_ok or not self.is_dir():
                raise
        except FileNotFoundError:
            if not parents or not self.rel:
                raise
            self.parent.mkdir(parents=True, exist_ok=True)
            self.mkdir(exist_ok=exist_ok)

    def rmdir(self) -> None:
        """Remove an empty folder. Raises OSError."""
        self._do(_rmdir)
        self.root.forget(self.rel)

    def remove_tree(self) -> None:
        """Remove a folder with all that lies in it; of links the links. Raises OSError."""

        def removed(folder: int, name: str) -> None:
            for _, folders, files, inside in os.fwalk(name, topdown=False, dir_fd=folder, onerror=_raised):
                for each in files:
                    os.unlink(each, dir_fd=inside)
                for each in folders:
                    if stat.S_ISLNK(os.stat(each, dir_fd=inside, follow_symlinks=False).st_mode):
                        os.unlink(each, dir_fd=inside)
                    else:
                        os.rmdir(each, dir_fd=inside)
            if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self))
            os.rmdir(name, dir_fd=folder)

        self._do(removed)
        self.root.forget(self.rel)

    def sync(self) -> None:
        """Flush a folder's names to the disk. Raises OSError."""
        fd = self._open_folder()
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    # ── moving ──

    def rename(self, target: SafePath) -> None:
        """Rename, over a file that has the name. Raises OSError."""
        self._both(target, lambda here, name, there, other: os.rename(name, other, src_dir_fd=here, dst_dir_fd=there))
        self.root.forget(self.rel)

    def link(self, target: SafePath) -> None:
        """Give a file a second name, `target`. Raises OSError."""

        def linked(here: int, name: str, there: int, other: str) -> None:
            os.link(name, other, src_dir_fd=here, dst_dir_fd=there, follow_symlinks=False)

        self._both(target, linked)

    def _both(self, target: SafePath, act: Callable[[int, str, int, str], None]) -> None:
        self._do(lambda here, name: target._do(lambda there, other: act(here, name, there, other)), other=target)

    # ── the walk ──

    def _do(self, act: Callable[[int, str], T], other: SafePath | None = None) -> T:
        """Act on the last name, relative to its folder's handle; errors name the whole path."""
        if len(self.rel) > _LONGEST // 8 and len(os.fsencode(str(self))) > _LONGEST:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(self))
        try:
            try:
                return self._walked(act)
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                outdated = self.root.outdated(self.rel)
                if other and other.root.outdated(other.rel):  # of both, or the two might lie on different mounts
                    outdated = True
                if not outdated:
                    raise
                return self._walked(act)
        except OSError as error:
            if error.filename is None or not str(error.filename).startswith("/"):
                error.filename = str(self)
                if other:
                    error.filename2 = str(other)
            raise

    def _walked(self, act: Callable[[int, str], T]) -> T:
        folder, _, name = self.rel.rpartition("/")
        if self._kept is None or len(folder) <= len(self._kept):
            handle = self.root.folder(folder)  # the reference keeps it open
            return act(handle.fd, name or ".")
        handle = self.root.folder(self._kept)
        for each in folder[len(self._kept) :].lstrip("/").split("/"):
            try:
                handle = _Handle(each, within=handle.fd)
            except OSError as error:
                raise _in_the_way(error, f"{self.root.path}/{folder}") from None
        return act(handle.fd, name)

    def _open_folder(self) -> int:
        def opened(folder: int, name: str) -> int:
            try:
                return os.open(name, os.O_RDONLY | _FOLDER, dir_fd=folder)
            except OSError as error:
                raise _in_the_way(error, str(self)) from None

        return self._do(opened)


def check_trusted(folder: Path) -> str | None:
    """Say which link in a directory's path another user may have planted: one that is neither root's nor ours, in a
    folder that everybody may write to. None: there is none."""
    for path in (folder.absolute(), *folder.absolute().parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found, around = path.lstat(), path.parent.stat()
            foreign = found.st_uid not in (0, os.geteuid(), around.st_uid)
            if stat.S_ISLNK(found.st_mode) and foreign and around.st_mode & stat.S_IWOTH:
                return f"{path} is a link that user {found.st_uid} has made in a folder that everybody may write to"
    return None


def _in_the_way(error: OSError, way: str) -> OSError:
    """Say what is wrong where a folder cannot be opened because it is none."""
    if error.errno not in (errno.ENOTDIR, errno.ELOOP):
        return error
    return NotADirectoryError(errno.ENOTDIR, _IN_THE_WAY, way)


def _checked(rel: str) -> str:
    parts = [part for part in rel.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in rel or rel.startswith("/"):
        raise ValueError(f"{rel!r} is no name below a folder")
    return "/".join(parts)


def _unpickled(root: Path, rel: str, kept: str | None) -> SafePath:
    return SafePath(Root.of(root), rel, kept)


def _raised(error: OSError) -> None:
    raise error


def _lstat(folder: int, name: str) -> os.stat_result:
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def _utime(folder: int, name: str) -> None:
    os.utime(name, dir_fd=folder, follow_symlinks=False)


def _unlink(folder: int, name: str) -> None:
    os.unlink(name, dir_fd=folder)


def _mkdir(folder: int, name: str) -> None:
    os.mkdir(name, FOLDER_MODE, dir_fd=folder)


def _rmdir(folder: int, name: str) -> None:
    os.rmdir(name, dir_fd=folder)
