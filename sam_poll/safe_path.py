"""Paths below a directory that others may write to: no symbolic link below it is ever followed.

A `SafePath` is a root directory and a name below it. Each operation walks from a handle of the root, one component at a
time (`openat` with `O_NOFOLLOW | O_DIRECTORY`), and acts on the last name relative to the handle of its folder. A link
that somebody plants, at any moment, is met as a link: it is listed, renamed and removed as one, and opened never. Files
are opened without waiting for the other end of a pipe, and only regular ones.

`SafePath` offers the part of pathlib's interface that is needed, and deliberately has no `__fspath__`: a path of the
share cannot be given to `open`, `os` or a library by mistake. A library that opens by name gets `/dev/fd/N` of an open
file to read, and a private folder of this machine to write in.

What can still go wrong here: whoever may write to a folder may always move, exchange and forge what lies in it. A
folder that is moved while a file in it is opened is still the folder that it was. Hard links cannot be told from files
when they are read; the kernel (`fs.protected_hardlinks`) lets nobody make them of files that he may not write to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from sam_poll.safe_root import FOLDER, Root, in_the_way, inner

T = TypeVar("T")

FOLDER_MODE = 0o775  # less the umask: never writable for everybody
FILE_MODE = 0o664
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LONGEST = 4095  # bytes; Linux' PATH_MAX less its end: what we make, others must be able to open
_GONE = {errno.ENOENT, errno.ESTALE, errno.EXDEV}
_NOT_OURS = {errno.ELOOP, errno.ENXIO}  # a link; a pipe, a socket, a second name of another file
_DEEPEST = 64  # folders in each other that are emptied at once, each with a descriptor
_NEEDED = {os.open, os.stat, os.mkdir, os.rename, os.link, os.unlink, os.rmdir}
SUPPORTED = os.supports_dir_fd >= _NEEDED and os.scandir in os.supports_fd
"""Whether this platform can act relative to directory handles at all."""


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
        if ".." in rel or "//" in f"/{rel}/" or "/./" in f"/{rel}/" or "\0" in rel:
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
        return self._do(_lstat) if self.rel else self.root.lstat()

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

    def holds_any(self, names: Sequence[str]) -> bool:
        """Return whether one of these names is taken in the folder; no where there is no folder. Raises OSError."""

        def taken(folder: int, _: str) -> bool:
            for name in names:
                try:
                    os.stat(name, dir_fd=folder, follow_symlinks=False)
                except FileNotFoundError:
                    continue
                return True
            return False

        try:
            return bool(names) and (self / names[0])._do(taken)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
                return False
            raise

    # ── files ──

    def open(self) -> BinaryIO:
        """Open a regular file for reading. Raises OSError; ENXIO, ELOOP and such where it is something else."""
        return os.fdopen(self.open_file(os.O_RDONLY), "rb")

    def open_file(self, flags: int) -> int:
        """Open a regular file, or with `os.O_CREAT` make one, and return its descriptor.

        A file that has further names is opened for reading only: somebody may have linked one from elsewhere. Raises
        OSError; ENXIO, ELOOP and such where it is something else.
        """

        def opened(folder: int, name: str) -> int:
            fd = os.open(name, flags | _FILE, FILE_MODE, dir_fd=folder)
            try:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise OSError(errno.ENXIO, "it is not a file", str(self))
                if flags & os.O_ACCMODE != os.O_RDONLY and found.st_nlink > 1:
                    raise OSError(errno.ENXIO, "it is a second name of another file", str(self))
            except OSError:
                os.close(fd)
                raise
            return fd

        return self._do(opened)

    def open_own(self) -> int:
        """Open a file that only we make, or make it, for reading and writing; return its descriptor. Raises OSError.

        Its content stays. What is no file of its own, such as a link or a pipe, is removed first.
        """
        try:
            return self.open_file(os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
        self.unlink(missing_ok=True)
        return self.open_file(os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def read_bytes(self, most: int = -1) -> bytes:
        """Return a regular file's content, of a long one the first `most` bytes. Raises OSError."""
        with self.open() as file:
            return file.read(most)

    def create(self) -> BinaryIO:
        """Make a new file and open it for writing. Raises OSError; FileExistsError where the name is taken."""
        return os.fdopen(self.open_file(os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")

    def touch(self) -> None:
        """Make an empty file, or give one the present time, as `open_own`. Raises OSError."""
        fd = self.open_own()
        try:
            os.utime(fd)
        finally:
            os.close(fd)

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
                real = SafePath(Root(Path("/")), str(self.root.real)[1:])
                if self.root.path.is_symlink():
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))
                real.mkdir(parents=parents)
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
        if not self.rel:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))

        def removed(folder: int, name: str) -> None:
            try:
                fd = os.open(name, os.O_RDONLY | FOLDER, dir_fd=folder)
            except OSError as error:
                raise in_the_way(error, str(self)) from None
            try:
                while _emptied(fd, fd, 0):
                    pass
            finally:
                os.close(fd)
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
        target._check_length()

        def acted(here: int, name: str) -> None:
            target._walked(lambda there, other: act(here, name, there, other))

        self._do(acted, other=target)

    # ── the walk ──

    def _do(self, act: Callable[[int, str], T], other: SafePath | None = None) -> T:
        """Act on the last name, relative to its folder's handle; errors name the whole path."""
        self._check_length()
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
            error.__context__ = None  # or who keeps the error keeps the frames of the walk, and what they have open
            raise error.with_traceback(None) from None

    def _check_length(self) -> None:
        if len(self.rel) > _LONGEST // 8 and len(os.fsencode(str(self))) > _LONGEST:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(self))

    def _walked(self, act: Callable[[int, str], T]) -> T:
        folder, _, name = self.rel.rpartition("/")
        if self._kept is None or len(folder) <= len(self._kept):
            handle = self.root.folder(folder)  # the reference keeps it open
            return act(handle.fd, name or ".")
        handle = self.root.folder(self._kept)
        for each in folder[len(self._kept) :].lstrip("/").split("/"):
            handle = inner(handle.fd, each, f"{self.root.path}/{folder}")
        return act(handle.fd, name)

    def _open_folder(self) -> int:
        """Raises OSError; NotADirectoryError also for what nobody could open by its name: a walk passes it over."""

        def opened(folder: int, name: str) -> int:
            try:
                return os.open(name, os.O_RDONLY | FOLDER, dir_fd=folder)
            except OSError as error:
                raise in_the_way(error, str(self)) from None

        try:
            self._check_length()
        except OSError as error:
            raise NotADirectoryError(error.errno, error.strerror, str(self)) from None
        return self._do(opened)


def _checked(rel: str) -> str:
    parts = [part for part in rel.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in rel or rel.startswith("/"):
        raise ValueError(f"{rel!r} is no name below a folder")
    return "/".join(parts)


def _unpickled(root: Path, rel: str, kept: str | None) -> SafePath:
    return SafePath(Root.of(root), rel, kept)


def _emptied(folder: int, top: int, depth: int) -> bool:
    """Remove all that lies in a folder; of links the links. Returns whether something is left in `top`.

    What lies very deep is moved up to `top` instead: each level takes a descriptor.
    """
    moved = False
    with os.scandir(folder) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_dir in found:
        with contextlib.suppress(FileNotFoundError):  # somebody else was quicker
            if not is_dir:
                os.unlink(name, dir_fd=folder)
            elif depth == _DEEPEST:
                os.rename(name, uuid.uuid4().hex, src_dir_fd=folder, dst_dir_fd=top)
                moved = True
            else:
                inner = os.open(name, os.O_RDONLY | FOLDER, dir_fd=folder)
                try:
                    moved = _emptied(inner, top, depth + 1) or moved
                finally:
                    os.close(inner)
                os.rmdir(name, dir_fd=folder)
    return moved


def _lstat(folder: int, name: str) -> os.stat_result:
    return os.stat(name, dir_fd=folder, follow_symlinks=False)


def _unlink(folder: int, name: str) -> None:
    os.unlink(name, dir_fd=folder)


def _mkdir(folder: int, name: str) -> None:
    os.mkdir(name, FOLDER_MODE, dir_fd=folder)


def _rmdir(folder: int, name: str) -> None:
    os.rmdir(name, dir_fd=folder)
