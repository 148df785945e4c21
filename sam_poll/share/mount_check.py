"""Checking that the share is mounted and usable: its folders at the start, its sentinel ever after.

A share that is unmounted leaves its bare mountpoint, which looks like an empty share, or like an
old one. The sentinel is a file in `work/` that contains a number: where it is missing, nothing is
read and nothing is written.

Limitations: the check of the folders is of the moment it was made. At the very first start there is
no sentinel yet, and a bare mountpoint is taken for a new share; where shares are mounted at boot,
name a file of the share as `sentinel` in the settings.
"""

from __future__ import annotations

import contextlib
import errno
import random
import stat
import time
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

from loguru import logger

from sam_poll.core.errors import ShareError
from sam_poll.core.files import TEMP_PREFIX, exists, remedy_of
from sam_poll.core.safe_path import SUPPORTED, SafePath
from sam_poll.core.safe_root import check_trusted
from sam_poll.share.layout import Layout

SENTINEL = TEMP_PREFIX + "share"
PROBE = TEMP_PREFIX + "probe"
_MAX_RETRIES = 20
_WRITTEN_S = 1.0  # how long another daemon may take to write the sentinel


class FolderWarning(NamedTuple):
    """What is wrong, and what to do."""

    message: str
    remedy: str


def check_folders(layout: Layout, sentinel: Path | None = None) -> None:
    """Create missing folders and check, by renaming a file through all of them, that they fit.

    Device numbers are not enough: two bind mounts of one disk have the same number and still refuse
    a rename. Raises ShareError, which says which two folders do not fit and what to do, or that the
    `sentinel` is missing.
    """
    if sentinel and not sentinel.exists():
        raise ShareError(
            "the share is not there: its sentinel is missing",
            place=str(sentinel),
            remedy="mount the share; on a new one create the file once, with touch",
        )
    if not SUPPORTED:
        raise ShareError(
            "this platform cannot open files relative to a folder, "
            "so that a planted link could lead out of the share",
            place=str(layout.input),
            remedy="run sam-poll on Linux or another system with openat",
        )
    if not layout.input.path.parent.is_dir():
        raise ShareError(
            "the share is not there",
            place=str(layout.input),
            remedy=f"mount it, or `mkdir -p {layout.input}`",
        )
    for name, folder in layout.folders.items():
        _check_folder(name, folder)
    try:
        _rename_through_with_retries(layout, PROBE)
    except ShareError:
        # A folder or a foreign file that cannot be removed may have the probe's usual name; a
        # unique name tells whether that is so. It is not used at first, because a daemon that dies
        # in between leaves the file.
        _rename_through_with_retries(layout, f"{PROBE}-{uuid4().hex[:12]}")


def _check_folder(name: str, folder: SafePath) -> None:
    planted = check_trusted(folder.path)
    if planted:
        raise ShareError(
            f"`{name}` cannot be trusted: {planted}",
            place=str(folder),
            remedy="remove the link, or name in the settings the folder that it leads to",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with folder.scandir() as entries:  # a writable folder is not always readable
            next(entries, None)
    except FileExistsError as error:
        raise ShareError(
            f"`{name}` cannot be used: it is not a folder",
            place=str(folder),
            remedy="name a folder, or remove what is in its place",
        ) from error
    except OSError as error:
        raise unusable_error(name, folder, error) from error


def _rename_through_with_retries(layout: Layout, probe_name: str) -> None:
    for retries_left in range(_MAX_RETRIES, -1, -1):
        try:
            _rename_through(layout, probe_name)
            return
        except (FileNotFoundError, FileExistsError) as error:
            # Another daemon checks the same folders now.
            if not retries_left:
                raise unusable_error("input", layout.input, error) from error
            time.sleep(random.uniform(0.001, 0.05))  # noqa: S311


def _rename_through(layout: Layout, probe_name: str) -> None:
    """Rename one new file through all folders, over what an earlier check has left there."""
    names = list(layout.folders.items())
    here_name, here = names[0]
    probe = here / probe_name
    try:
        probe.unlink(missing_ok=True)
        probe.create().close()
    except FileExistsError:
        raise
    except OSError as error:
        with contextlib.suppress(OSError):
            probe.unlink()  # the error may have come after the file was there
        raise unusable_error(here_name, here, error) from error
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
                        f"`{here_name}` and `{name}` are on different file systems: "
                        "renaming between them fails",
                        place=f"{here} → {folder}",
                        remedy="put all five folders on one mount "
                        "(in Docker: mount their parent, not each of them)",
                    ) from error
                raise unusable_error(name, folder, error) from error
            here_name, here = name, folder
    finally:
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()


def world_writable_warning(layout: Layout) -> FolderWarning | None:
    """Return a warning where every user may write to one of the daemon's own folders.

    A user who may write to the folder above them may exchange them, unless it has the sticky bit.
    Owners of the files in them are not examined: network shares may report one owner for all.
    """
    own = [layout.work, layout.output, layout.done, layout.failed]
    paths = [
        folder.path for folder in own if folder.is_dir() and folder.lstat().st_mode & stat.S_IWOTH
    ]
    for above in dict.fromkeys(folder.root.real.parent for folder in own):
        with contextlib.suppress(OSError):
            if above.stat().st_mode & (stat.S_IWOTH | stat.S_ISVTX) == stat.S_IWOTH:
                paths.append(above)
    if not paths:
        return None
    names = " ".join(map(str, paths))
    return FolderWarning(
        f"every user may write to {names}, and so take, exchange or forge jobs and answers",
        f"`chmod o-w {names}`; users who drop files need write access to {layout.input} only "
        "(docs/operations.md)",
    )


def unusable_error(name: str, folder: object, error: OSError) -> ShareError:
    """Return the error for a folder, or a file in it, that the system does not let us use."""
    reason = f"`{name}` cannot be used: {error.strerror or error}"
    return ShareError(reason, place=str(folder), remedy=remedy_of(error))


class Sentinel:
    """Tells the share from its bare mountpoint, and from other shares.

    Created after `check_folders`. `users_file` is a further file that must exist, created by the
    share's owner. Raises OSError.
    """

    def __init__(self, layout: Layout, users_file: Path | None = None) -> None:
        self._layout = layout
        self._users_file = users_file
        self._path = layout.work / SENTINEL
        self._number = self._read() or self._create()
        self._device = layout.input.root.device()

    @property
    def number(self) -> str:
        """Return the number that identifies this share."""
        return self._number

    def check(self) -> None:
        """Raise OSError when the share is not mounted, or another share is in its place."""
        if self._users_file and not self._users_file.exists():
            raise OSError(
                errno.ESTALE,
                "the share is not there, its sentinel is missing",
                str(self._users_file),
            )
        for folder in self._layout.folders.values():
            # From now on, use what has been mounted or created in the folder's place meanwhile.
            folder.root.refresh()
        number = self._read()
        device = self._layout.input.root.device()
        if number is None and device == self._device:
            # An unmount would change the device: a user has deleted work/, or its content.
            self._log_deleted()
            self._layout.work.mkdir(exist_ok=True)
            number = self._number = self._create()
        if number is None:
            raise OSError(errno.ESTALE, "the share is not there", str(self._path))
        if number != self._number:
            raise OSError(
                errno.ESTALE,
                "another share is mounted here than at the start; restart to use it",
                str(self._path),
            )
        self._device = device

    def _log_deleted(self) -> None:
        if exists(self._layout.work):
            logger.warning("{} was deleted; it is created again", self._path)
        else:
            logger.warning(
                "{}: the folder, and with it the files of all claimed jobs, "
                "was deleted; it is created again",
                self._layout.work,
            )

    def _read(self) -> str | None:
        try:
            return self._path.read_bytes(100).decode("ascii", "replace").strip() or None
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
                return None  # a link or a pipe is not a sentinel
            raise

    def _create(self) -> str:
        """Create the sentinel, complete before it has its name; the first daemon wins."""
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
            time.sleep(0.01)  # another daemon has created it and is writing it
        if self._read() is None:  # a power failure has left it empty
            temporary.rename(self._path)
        temporary.unlink(missing_ok=True)
        return self._read() or number
