"""Paths below a directory that others may write to, used without following symbolic links.

A `SafePath` is a root directory and a name below it. Each operation starts at a handle of the root,
opens one component at a time (`openat` with `O_NOFOLLOW | O_DIRECTORY`), and acts on the last name
relative to the handle of its folder. A symbolic link, whenever it was planted, is listed, renamed
and removed as a link, and never opened. Files are opened without waiting for the other end of a
pipe, and only regular ones.

`SafePath` offers the part of pathlib's interface that is needed, and deliberately has no
`__fspath__`: a path of the share cannot be passed to `open`, `os` or a library by mistake. A
library that opens files by name gets `/dev/fd/N` of an open file to read, and a private local
folder to write in.

Limitations: any user with write permission on a folder can move, exchange and forge its files. A
folder that is moved while a file in it is opened is still used. Hard links cannot be told from
files when they are read; the kernel (`fs.protected_hardlinks`) does not let a user link files that
the user cannot write to.
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

from sam_poll.core.safe_root import FOLDER, Root, not_a_folder, open_subfolder

T = TypeVar("T")

FOLDER_MODE = 0o775  # less the umask: never writable for other users
FILE_MODE = 0o664
_FILE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LONGEST = 4095  # bytes; Linux' PATH_MAX less its end: what we make, others must be able to open
_GONE = {errno.ENOENT, errno.ESTALE, errno.EXDEV}
_NOT_OURS = {errno.ELOOP, errno.ENXIO}  # a link; a pipe, a socket, a second name of another file
_NO_UNNAMED_FILES = {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS}
_DEEPEST = 64  # folders in each other that are emptied at once, each with a descriptor
_WITH_DIR_FD = {os.open, os.stat, os.mkdir, os.rename, os.link, os.unlink, os.rmdir}
SUPPORTED = os.supports_dir_fd >= _WITH_DIR_FD and os.scandir in os.supports_fd
"""Whether this platform supports operations relative to directory handles."""


class SafePath:
    """A name below a root directory (see the module).

    `rel` is the path below the root, with `/`; "" for the root itself.
    """

    __slots__ = ("__weakref__", "_exclusive", "_kept", "rel", "root")

    def __init__(
        self, root: Root, rel: str = "", kept: str | None = None, exclusive: bool = False
    ) -> None:
        """Create a path.

        `kept` is the part of `rel` whose folder handles may be cached; None: all of it.
        `exclusive`: see `fenced`.
        """
        self._exclusive = exclusive
        self.root = root
        self.rel = rel
        self._kept = kept

    @classmethod
    def at(cls, folder: Path) -> SafePath:
        """Return the path of a trusted directory."""
        return cls(Root.of(folder))

    @classmethod
    def beside(cls, file: Path) -> SafePath:
        """Return the path of a file in a trusted directory, such as one that the user has named."""
        return cls.at(file.parent) / file.name

    # ── names ──

    def __truediv__(self, rel: str) -> SafePath:
        """Return the path of a name below this folder.

        Raises ValueError for a name that leads out of the root.
        """
        if ".." in rel or "//" in f"/{rel}/" or "/./" in f"/{rel}/" or "\0" in rel:
            rel = _checked(rel)
            if not rel:
                return self
        return SafePath(
            self.root, f"{self.rel}/{rel}" if self.rel else rel, self._kept, self._exclusive
        )

    def fenced(self, name: str, *, exclusive: bool = False) -> SafePath:
        """Return the path of a subfolder whose handle is never cached.

        It is opened for each operation. After a rename of such a folder, no process reaches it by
        its old name any more. With `exclusive`, not even a process that has opened the folder just
        before that rename can rename a file out of it.
        """
        rel = f"{self.rel}/{name}" if self.rel else name
        return SafePath(self.root, rel, self.rel, exclusive)

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
        """The folder of this path; of the root, the root itself."""
        return SafePath(
            self.root, self.rel[: max(self.rel.rfind("/"), 0)], self._kept, self._exclusive
        )

    def with_name(self, name: str) -> SafePath:
        return self.parent / name

    def below(self, folder: SafePath) -> str:
        """Return the path relative to one of its parent folders, with `/`.

        Raises ValueError where `folder` is not one of them.
        """
        if self.root.path != folder.root.path or not (self.rel + "/").startswith(
            folder.rel + "/" * bool(folder.rel)
        ):
            raise ValueError(f"{self} is not below {folder}")
        return self.rel[len(folder.rel) :].lstrip("/")

    @property
    def path(self) -> Path:
        """The plain path, for messages and comparisons only; never for opening the file."""
        return self.root.path / self.rel

    def __str__(self) -> str:
        return f"{self.root.path}/{self.rel}" if self.rel else str(self.root.path)

    def __repr__(self) -> str:
        return f"SafePath({str(self.root.path)!r}, {self.rel!r})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, SafePath)
            and self.rel == other.rel
            and self.root.path == other.root.path
        )

    def __lt__(self, other: SafePath) -> bool:
        return str(self) < str(other)

    def __hash__(self) -> int:
        return hash((self.rel, self.root.path))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, (self.root.path, self.rel, self._kept, self._exclusive)

    # ── inspecting ──

    def lstat(self) -> os.stat_result:
        """Return the status of a name, of a link as a link; of the root, that of its path now.

        Raises OSError.
        """
        return self._do(_lstat) if self.rel else self.root.lstat()

    def is_dir(self) -> bool:
        """Return whether the path is a folder, not a link. Raises OSError but for "not there"."""
        return self._is(stat.S_ISDIR)

    def is_file(self) -> bool:
        """Return whether the path is a regular file, not a link.

        Raises OSError but for "not there".
        """
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
        """Iterate over the folder's entries, as `os.scandir`.

        The entries may be used inside the `with` block only.
        """
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
        """Return whether one of these names exists in the folder; False where there is no folder.

        Raises OSError.
        """

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
        """Open a regular file for reading.

        Raises OSError; ENXIO, ELOOP and the like where it is not a regular file.
        """
        return os.fdopen(self.open_file(os.O_RDONLY), "rb")

    def open_file(self, flags: int) -> int:
        """Open a regular file, or with `os.O_CREAT` create one, and return its descriptor.

        A file with several hard links is opened for reading only, since one of them may be planted.
        Raises OSError; ENXIO, ELOOP and the like where it is not a regular file.
        """

        def opened(folder: int, name: str) -> int:
            fd = os.open(name, flags | _FILE, FILE_MODE, dir_fd=folder)
            try:
                status = os.fstat(fd)
                if not stat.S_ISREG(status.st_mode):
                    raise OSError(errno.ENXIO, "it is not a file", str(self))
                if flags & os.O_ACCMODE != os.O_RDONLY and status.st_nlink > 1:
                    raise OSError(errno.ENXIO, "it is a second name of another file", str(self))
            except OSError:
                os.close(fd)
                raise
            return fd

        return self._do(opened)

    def open_own(self) -> int:
        """Open a file that only this program writes for reading and writing; return its descriptor.

        It is created where it is missing; its content is kept. Anything else of that name, such as
        a link or a pipe, is removed first. Raises OSError.
        """
        try:
            return self.open_file(os.O_RDWR | os.O_CREAT)
        except OSError as error:
            if error.errno not in _NOT_OURS:
                raise
        self.unlink(missing_ok=True)
        return self.open_file(os.O_RDWR | os.O_CREAT | os.O_EXCL)

    def read_bytes(self, most: int = -1) -> bytes:
        """Return a regular file's content, at most the first `most` bytes. Raises OSError."""
        with self.open() as file:
            return file.read(most)

    def create(self) -> BinaryIO:
        """Create a file and open it for writing.

        Raises OSError; FileExistsError where the name exists.
        """
        return os.fdopen(self.open_file(os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb")

    def create_unnamed(self) -> bool:
        """Create a file without a name in this folder, which disappears at once.

        Returns False where the platform or file system has no such files. Raises OSError.
        """
        if not hasattr(os, "O_TMPFILE"):
            return False
        folder = self._open_folder()
        try:
            flags = os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC
            os.close(os.open(".", flags, FILE_MODE, dir_fd=folder))
        except OSError as error:
            if error.errno in _NO_UNNAMED_FILES:
                return False
            error.filename = str(self)
            raise
        finally:
            os.close(folder)
        return True

    def touch(self) -> None:
        """Create an empty file, or set a file's time to now, as `open_own`. Raises OSError."""
        fd = self.open_own()
        try:
            os.utime(fd)
        finally:
            os.close(fd)

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove a file or a link. Raises OSError."""
        try:
            self._do(_unlink)
        except FileNotFoundError:
            if not missing_ok:
                raise

    # ── folders ──

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Create a folder. Raises OSError.

        FileExistsError also with `exist_ok` where a link or a file has the name.
        """
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
        """Remove a folder with its content. Raises OSError.

        Links in it are removed, not followed.
        """
        if not self.rel:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(self))

        def removed(folder: int, name: str) -> None:
            try:
                fd = os.open(name, os.O_RDONLY | FOLDER, dir_fd=folder)
            except OSError as error:
                raise not_a_folder(error, str(self)) from None
            try:
                while _emptied(fd, fd, 0):
                    pass
            finally:
                os.close(fd)
            os.rmdir(name, dir_fd=folder)

        self._do(removed)
        self.root.forget(self.rel)

    def sync(self) -> None:
        """Flush a folder's entries to disk. Raises OSError."""
        fd = self._open_folder()
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    # ── moving ──

    def rename(self, target: SafePath) -> None:
        """Rename to `target`, replacing a file of that name. Raises OSError.

        A file of an exclusively fenced folder is renamed only while that folder has its name: if
        another process renames the folder between opening it and renaming the file, the file is
        moved back. Raises FileNotFoundError then, too.
        """

        def renamed(here: int, name: str, there: int, other: str) -> None:
            os.rename(name, other, src_dir_fd=here, dst_dir_fd=there)
            if self._exclusive and not self._is_folder(here):
                with contextlib.suppress(OSError):
                    os.rename(other, name, src_dir_fd=there, dst_dir_fd=here)
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))

        self._both(target, renamed)
        self.root.forget(self.rel)

    def link(self, target: SafePath) -> None:
        """Create a hard link `target` to a file. Raises OSError."""

        def linked(here: int, name: str, there: int, other: str) -> None:
            os.link(name, other, src_dir_fd=here, dst_dir_fd=there, follow_symlinks=False)

        self._both(target, linked)

    def _both(self, target: SafePath, act: Callable[[int, str, int, str], None]) -> None:
        target._check_length()

        def acted(here: int, name: str) -> None:
            target._walked(lambda there, other: act(here, name, there, other))

        self._do(acted, other=target)

    # ── resolving ──

    def _do(self, act: Callable[[int, str], T], other: SafePath | None = None) -> T:
        """Act on the last name, relative to its folder's handle; errors name the whole path.

        An error that a cached handle may have caused leads to a second try with new handles.
        """
        self._check_length()
        try:
            try:
                return self._walked(act)
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                outdated = self.root.outdated(self.rel)
                # Checked for both paths, or the two might be on different mounts.
                if other and other.root.outdated(other.rel):
                    outdated = True
                if not outdated:
                    raise
                return self._walked(act)
        except OSError as error:
            if error.filename is None or not str(error.filename).startswith("/"):
                error.filename = str(self)
                if other:
                    error.filename2 = str(other)
            # A stored error would otherwise keep the frames above, and their open handles, alive.
            error.__context__ = None
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
            handle = open_subfolder(handle.fd, each, f"{self.root.path}/{folder}")
        return act(handle.fd, name)

    def _is_folder(self, handle: int) -> bool:
        """Return whether an open folder is still the one at this path's folder name.

        True as well where that cannot be found out, for example on a disk error.
        """
        try:
            return self._walked(lambda now, _: os.path.samestat(os.fstat(now), os.fstat(handle)))
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)

    def _open_folder(self) -> int:
        """Open this folder. Raises OSError.

        NotADirectoryError also for a path too long to be opened by name, which scans pass over.
        """

        def opened(folder: int, name: str) -> int:
            try:
                return os.open(name, os.O_RDONLY | FOLDER, dir_fd=folder)
            except OSError as error:
                raise not_a_folder(error, str(self)) from None

        try:
            self._check_length()
        except OSError as error:
            raise NotADirectoryError(error.errno, error.strerror, str(self)) from None
        return self._do(opened)


def _checked(rel: str) -> str:
    parts = [part for part in rel.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in rel or rel.startswith("/"):
        raise ValueError(f"{rel!r} is not a name below a folder")
    return "/".join(parts)


def _unpickled(root: Path, rel: str, kept: str | None, exclusive: bool) -> SafePath:
    return SafePath(Root.of(root), rel, kept, exclusive)


def _emptied(folder: int, top: int, depth: int) -> bool:
    """Remove a folder's content; return whether something is left in `top`.

    Links are removed, not followed. What is nested too deep is moved up to `top` instead: each
    level takes a descriptor.
    """
    moved = False
    with os.scandir(folder) as entries:
        listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_dir in listed:
        with contextlib.suppress(FileNotFoundError):  # removed by another process meanwhile
            if not is_dir:
                os.unlink(name, dir_fd=folder)
            elif depth == _DEEPEST:
                os.rename(name, uuid.uuid4().hex, src_dir_fd=folder, dst_dir_fd=top)
                moved = True
            else:
                subfolder = os.open(name, os.O_RDONLY | FOLDER, dir_fd=folder)
                try:
                    moved = _emptied(subfolder, top, depth + 1) or moved
                finally:
                    os.close(subfolder)
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
