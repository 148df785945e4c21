"""Telling an error of one path from an error of the whole share, by a test write.

A file that cannot be moved, a folder of another user, a mount, or a link in the place of a folder
concerns one path. A share that is gone, read-only or full concerns every path. Where a test write
succeeds, the error concerns the path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from uuid import uuid4

from sam_poll.core.files import TEMP_PREFIX, remedy_of
from sam_poll.core.safe_path import SafePath
from sam_poll.share.claims.store import PATH_ERRORS
from sam_poll.share.layout import Layout

FOLDER_ERRORS = frozenset({errno.EACCES, errno.EROFS, errno.EXDEV, errno.ENOTDIR, errno.ELOOP})
"""Errors that concern the folder of the file that they name."""

_OBSTACLE_ERRORS = frozenset(
    {errno.EEXIST, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENOTEMPTY}
)
_PROOF_S = 1.0  # how long a successful test write counts
_RENAME = ""  # key of the test that renames from `work/` to `in/`; the others have a folder's path


class PathErrorClassifier:
    """Finds the path of the share that an OSError is about. Thread-safe."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._proved_at: dict[str, float] = {}

    def path_of(self, error: OSError) -> SafePath | None:
        """Return the path that an error is about; None where it is about the share as a whole."""
        if error.errno not in PATH_ERRORS:
            return None
        names = (error.filename, error.filename2)
        paths = [path for name in names if (path := self._in_share(name))]
        # Of the two paths of a rename, one is mostly in a claim, which is this daemon's own.
        paths.sort(key=lambda path: path.root.path == self._layout.work.root.path)
        return paths[0] if paths and self._share_works(paths[0], error) else None

    def _in_share(self, name: object) -> SafePath | None:
        for folder in self._layout.folders.values():
            if isinstance(name, str) and name.startswith(f"{folder}/"):
                return folder / name[len(str(folder)) + 1 :]
        return None

    def _share_works(self, where: SafePath, error: OSError) -> bool:
        """Return whether test writes succeed in `work/` and in the folder of `where`."""
        work, input_ = self._layout.work, self._layout.input
        root = SafePath(where.root)
        roots = {str(work): work}
        if root != input_:
            roots[str(root)] = root
        elif "/" not in where.rel and error.errno in FOLDER_ERRORS:
            # Only in this case: a write to `in/` causes a new listing of a folder that may be
            # large.
            roots[str(input_)] = input_
        now = time.monotonic()
        try:
            for name, folder in roots.items():
                if not self._is_proved(name, now):
                    _write_test_file(folder)
                    self._proved_at[name] = now
            if error.errno == errno.EXDEV and not self._is_proved(_RENAME, now):
                _write_test_file(work, move_to=input_)
                self._proved_at[_RENAME] = now
        except OSError:
            return False
        return True

    def _is_proved(self, name: str, now: float) -> bool:
        return now - self._proved_at.get(name, -_PROOF_S) < _PROOF_S


def write_error(folder: SafePath) -> OSError | None:
    """Return the error of a test write into a folder, which is created where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_test_file(folder)
    except OSError as error:
        return error
    return None


def _write_test_file(folder: SafePath, move_to: SafePath | None = None) -> None:
    """Create a file and remove it, after a rename into another folder (`move_to`).

    The file has no name where that is possible: a daemon that is killed here would leave a named
    one for ever, except in `work/`, where cleanup removes such names. Raises OSError.
    """
    if move_to is None and folder.create_unnamed():
        return
    probe = folder / f"{TEMP_PREFIX}try-{uuid4().hex[:12]}.tmp"
    probe.create().close()
    try:
        if move_to is not None:
            target = move_to / probe.name
            probe.rename(target)
            probe = target
    finally:
        with contextlib.suppress(FileNotFoundError):
            probe.unlink()


def path_remedy(error: OSError) -> str:
    """Return what a user can do about an error of one path."""
    user = f"user {os.geteuid()}"
    if error.errno == errno.EACCES:
        return f"let {user} read and write there (chown or chmod), or remove it"
    if error.errno == errno.EPERM:
        return (
            "it is immutable, or belongs to another user in a sticky folder: "
            f"chown it to {user}, `chattr -i` it, or remove it"
        )
    if error.errno == errno.EXDEV:
        return "it is on another mount: copy its files into the share, and unmount it"
    if error.errno == errno.EBUSY:
        return "it is a mount point, or in use by a server: unmount it, or close it there"
    if error.errno in _OBSTACLE_ERRORS:
        return "remove the file, link or foreign files that are in the place of a folder"
    return remedy_of(error)
