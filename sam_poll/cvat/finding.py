"""Which picture of a folder an annotation file means by a name. Pure: a listing comes in.

What can still go wrong here: a picture that was renamed, with another one now under its old name.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable

from sam_poll.errors import PictureError
from sam_poll.images import is_picture

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class Pictures:
    """The pictures below a folder by their paths, relative to it, with `/`. Nothing but these is ever found, whatever
    a name says. `second`: paths that begin so count only where no other fits (copies of an earlier run)."""

    def __init__(self, paths: Iterable[str], second: str | None = None) -> None:
        self.paths = frozenset(paths)
        self._second = second
        self._by_stem: dict[str, list[str]] = {}
        self._by_name: dict[str, list[str]] = {}
        for path in sorted(self.paths):
            stem = posixpath.splitext(path)[0]
            self._by_stem.setdefault(stem, []).append(path)
            for name in (posixpath.basename(path), posixpath.basename(stem)):
                self._by_name.setdefault(name, []).append(path)

    def find(self, names: Iterable[str]) -> str:
        """The picture meant by the first of the names that fits one.

        A name fits the picture at its path; else the one whose path ends with all of it; else, its leading folders cut
        one after another, the picture at what is left (`done/cam1/dog.jpg` → `cam1/dog.jpg` → `dog.jpg`). A name
        without a picture's ending fits by the stem. PictureError: none fits, or several do.
        """
        tried = list(names)
        for name in tried:
            parts = _parts(name)
            whole = "/".join(parts)
            fitting = self._at(whole) or self._ending_with(whole)
            for cut in range(1, len(parts)):
                fitting = fitting or self._at("/".join(parts[cut:]))
            if len(fitting) > 1:
                raise PictureError(
                    f"may be {len(fitting)} pictures: {', '.join(fitting[:3])}{' …' if len(fitting) > 3 else ''}",
                    remedy="name a folder by --images in which it is one",
                )
            if fitting:
                return fitting[0]
        raise PictureError("is not there", remedy="name the folder that the names are relative to by --images")

    def _at(self, path: str) -> list[str]:
        if path in self.paths:
            return [path]
        return [] if is_picture(path) else self._by_stem.get(path, [])

    def _ending_with(self, path: str) -> list[str]:
        same = self._by_name.get(posixpath.basename(path), [])
        if is_picture(path):
            found = [other for other in same if other.endswith(f"/{path}")]
        else:
            found = [other for other in same if posixpath.splitext(other)[0].endswith(f"/{path}")]
        first = [other for other in found if self._second is None or not other.startswith(self._second)]
        return first or found


def _parts(name: str) -> list[str]:
    """A name's folders and file. PictureError where it could mean something outside."""
    if _CONTROL.search(name) or len(name) > 4096:
        raise PictureError("its name holds control characters, or is endless", remedy="rename it")
    # On Windows paths are written so; here no picture with such a name could be named by a prompt.
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts:
        raise PictureError("its name leads out of its folder", remedy="name it without ..")
    if not parts:
        raise PictureError("has no name", remedy="export the annotations again")
    return parts
