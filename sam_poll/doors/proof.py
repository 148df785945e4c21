"""Whether the share is there and can be used: the folders proved at the start, the sentinel ever after.

A share that is unmounted leaves its bare mountpoint, which looks like an empty share, or like an old one. The sentinel
is a file in `work/` with a number in it: where it is missing, nothing is read and nothing is written.

What can still go wrong here: the proof is of the moment it was made. At the very first start there is no sentinel yet,
and a bare mountpoint is taken for a new share; who mounts at boot names a file of the share as `sentinel`.
"""

from __future__ import annotations

import contextlib
import errno
import random
import stat
import time
from pathlib import Path
from uuid import uuid4

from loguru import logger

from sam_poll.doors.layout import Layout
from sam_poll.errors import ShareError
from sam_poll.fs import TEMP_PREFIX, exists, remedy_of
from sam_poll.safe_path import SUPPORTED
from sam_poll.safe_root import check_trusted

SENTINEL = TEMP_PREFIX + "share"
PROBE = TEMP_PREFIX + "probe"
_TRIES = 20
_WRITTEN_S = 1.0


def prove(layout: Layout, sentinel: Path | None = None) -> None:
    """Make the folders where they are missing and prove by a real rename that a file can travel through them.

    Device numbers are not enough: two bind mounts of one disk have the same number and still refuse a rename.
    ShareError says which two folders do not fit and what to do, or that the `sentinel` is missing.
    """
    if sentinel and not sentinel.exists():
        raise ShareError(
            "the share is not there: its sentinel is missing",
            place=str(sentinel),
            remedy="mount the share; on a new one make the file once, with touch",
        )
    if not SUPPORTED:
        raise ShareError(
            "this platform cannot open files relative to a folder, so that a planted link could lead out of the share",
            place=str(layout.input),
            remedy="run it on Linux or another system with openat",
        )
    if not layout.input.path.parent.is_dir():
        raise ShareError(
            "the share is not there",
            place=str(layout.input),
            remedy=f"mount it, or `mkdir -p {layout.input}`",
        )
    for name, folder in layout.folders.items():
        planted = check_trusted(folder.path)
        if planted:
            raise ShareError(
                f"`{name}` cannot be trusted: {planted}",
                place=str(folder),
                remedy="remove the link, or name in the settings the folder that it leads to",
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with folder.scandir() as entries:  # what may be written into may not always be read
                next(entries, None)
        except OSError as error:
            raise unusable(name, folder, error) from error
    try:
        _travel_at_last(layout, PROBE)
    except ShareError:
        # Its usual name may be taken by what cannot be removed: a folder, or somebody else's file. A name of its own
        # tells whether it is that; it is not the usual one, because a daemon that dies meanwhile leaves the file.
        _travel_at_last(layout, f"{PROBE}-{uuid4().hex[:12]}")


def _travel_at_last(layout: Layout, name: str) -> None:
    for patience in range(_TRIES, -1, -1):
        try:
            _travel(layout, name)
            return
        except (FileNotFoundError, FileExistsError) as error:  # another daemon proves the same folders just now
            if not patience:
                raise unusable("input", layout.input, error) from error
            time.sleep(random.uniform(0.001, 0.05))  # noqa: S311


def _travel(layout: Layout, probe_name: str) -> None:
    """Rename one new file through all folders, over what an earlier one has left there."""
    names = list(layout.folders.items())
    here_name, here = names[0]
    probe = here / probe_name
    try:
        probe.unlink(missing_ok=True)
        probe.create().close()
    except FileExistsError:
        raise
    except OSError as error:
        raise unusable(here_name, here, error) from error
    try:
        for name, folder in names[1:]:
            try:
                probe.rename(folder / probe_name)
                probe = folder / probe_name
            except FileNotFoundError:
                raise
            except OSError as error:
                if error.errno == errno.EXDEV:
                    raise ShareError(
                        f"`{here_name}` and `{name}` are on different file systems: renaming between them fails",
                        place=f"{here} → {folder}",
                        remedy="put all five folders on one mount (in Docker: mount their parent, not each of them)",
                    ) from error
                raise unusable(name, folder, error) from error
            here_name, here = name, folder
    finally:
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()


def open_to_all(layout: Layout) -> tuple[str, str] | None:
    """What to say, and what to do, where everybody may write to one of the daemon's own folders. None: nobody may.

    Who may write to the folder that they lie in may exchange them, unless it has the sticky bit. Whose the files in
    them are is not judged: network shares may tell one owner for all.
    """
    own = [layout.work, layout.output, layout.done, layout.failed]
    found = [folder.path for folder in own if folder.is_dir() and folder.lstat().st_mode & stat.S_IWOTH]
    for above in dict.fromkeys(folder.root.real.parent for folder in own):
        with contextlib.suppress(OSError):
            if above.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
                found.append(above)
    if not found:
        return None
    names = " ".join(map(str, found))
    what = f"everybody may write to {names}: others may take, exchange or forge jobs and answers"
    return what, f"`chmod o-w {names}`; who drops files needs to write to {layout.input} only (docs/operations.md)"


def unusable(name: str, folder: object, error: OSError) -> ShareError:
    """What to say of a folder, or a file in it, that the system does not let us use."""
    reason = f"`{name}` cannot be used: {error.strerror or error}"
    return ShareError(reason, place=str(folder), remedy=remedy_of(error))


class Sentinel:
    """Tells the share from the place it is mounted at. Made after `prove`."""

    def __init__(self, layout: Layout, users: Path | None = None) -> None:
        """`users` is a further file that must be there, made by the share's owner. OSError."""
        self._layout, self._users = layout, users
        self._path = layout.work / SENTINEL
        self._number = self._read() or self._make()
        self._device = layout.input.lstat().st_dev

    def check(self) -> None:
        """OSError when the share is not there, or another one lies in its place."""
        if self._users and not self._users.exists():
            raise OSError(errno.ESTALE, "the share is not there, its sentinel is missing", str(self._users))
        for folder in self._layout.folders.values():
            folder.root.renew()  # what was mounted, or made, in a folder's place meanwhile is used from now on
        number = self._read()
        if number is None and self._layout.input.lstat().st_dev == self._device:
            # Unmounting changes the device. It is the same: somebody has deleted work/, or what is in it.
            self._say_deleted()
            self._layout.work.mkdir(exist_ok=True)
            number = self._number = self._make()
        if number is None:
            raise OSError(errno.ESTALE, "the share is not there", str(self._path))
        if number != self._number:
            raise OSError(errno.ESTALE, "another share lies here than at the start; restart to use it", str(self._path))
        self._device = self._layout.input.lstat().st_dev

    def _say_deleted(self) -> None:
        if exists(self._layout.work):
            logger.warning("{} was deleted; it is made anew", self._path)
        else:
            what = "the folder, and with it all files of jobs that were at work, was deleted; it is made anew"
            logger.warning("{}: {}", self._layout.work, what)

    @property
    def number(self) -> str:
        """What tells this share from others."""
        return self._number

    def _read(self) -> str | None:
        try:
            return self._path.read_bytes(100).decode("ascii", "replace").strip() or None
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):  # a link or a pipe is not ours
                return None
            raise

    def _make(self) -> str:
        """Whole before it has its name; the first of several daemons wins."""
        number = uuid4().hex
        temporary = self._path.with_name(f"{SENTINEL}-{number}.tmp")
        text = f"{number}\n".encode()
        with temporary.create() as file:
            file.write(text)
        try:
            temporary.link(self._path)
        except FileExistsError:
            pass
        except OSError:  # no hard links on this share
            with contextlib.suppress(FileExistsError), self._path.create() as file:
                file.write(text)
        deadline = time.monotonic() + _WRITTEN_S
        while self._read() is None and time.monotonic() < deadline:
            time.sleep(0.01)  # who has made it is just writing it
        if self._read() is None:  # a power cut has left it empty
            temporary.rename(self._path)
        temporary.unlink(missing_ok=True)
        return self._read() or number
