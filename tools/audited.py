"""Which paths an audit event of Python is about, also where a file is named relative to a folder's
descriptor.

Limitations: a folder that was moved after it was opened appears under its new name.
"""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Any

# event → for each path in it: its place among the arguments, and that of its folder's descriptor
_FOLDERS = {
    "os.rename": ((0, 2), (1, 3)),
    "os.link": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.remove": ((0, 1),),
    "os.rmdir": ((0, 1),),
    "os.utime": ((0, 3),),
}
_opening = threading.local()
_really_open = os.open


def _open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
    """As `os.open`, whose audit event does not tell the folder."""
    _opening.dir_fd = dir_fd
    try:
        return _really_open(path, flags, mode, dir_fd=dir_fd)
    finally:
        _opening.dir_fd = None


def begin() -> None:
    """From now on `paths` knows the folders of opened files, too."""
    os.open = _open


def paths(event: str, args: tuple[Any, ...]) -> list[str]:
    """Return the absolute paths that an event is about; none where it is about a descriptor that is
    not a folder's.
    """
    places = _FOLDERS.get(event, ((0, None),))
    found = []
    for place, folder in places:
        fd = (
            getattr(_opening, "dir_fd", None)
            if event == "open"
            else folder is not None and args[folder]
        )
        path = _absolute(
            args[place], fd if isinstance(fd, int) and not isinstance(fd, bool) else -1
        )
        if path:
            found.append(path)
    return found


def _absolute(path: Any, fd: int) -> str | None:
    with contextlib.suppress(OSError, TypeError):
        if isinstance(path, int):
            return os.readlink(f"/proc/self/fd/{path}")  # noqa: PTH115
        name = os.fsdecode(path)
        folder = os.readlink(f"/proc/self/fd/{fd}") if fd >= 0 else os.getcwd()  # noqa: PTH109, PTH115
        return os.path.normpath(os.path.join(folder, name))
    return None
