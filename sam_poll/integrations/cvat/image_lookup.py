"""Which picture of a folder an annotation file means by a name. Pure: it gets a list of paths.

Limitations: a picture that was renamed, while another one now has its old name, is not detected.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable

from sam_poll.core.errors import PictureError
from sam_poll.imaging.decode import is_picture

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MAX_NAME = 4096  # characters


class Pictures:
    """The pictures below a folder, by their paths relative to it, with `/`.

    Only these are ever found, whatever a name contains. Paths that begin with `fallback_prefix`
    (copies that an earlier run has made) are found only if no other picture matches.
    """

    def __init__(self, paths: Iterable[str], fallback_prefix: str | None = None) -> None:
        self.paths = frozenset(paths)
        self._fallback_prefix = fallback_prefix
        self._by_stem: dict[str, list[str]] = {}
        self._by_name: dict[str, list[str]] = {}
        for path in sorted(self.paths):
            stem = posixpath.splitext(path)[0]
            self._by_stem.setdefault(stem, []).append(path)
            for name in (posixpath.basename(path), posixpath.basename(stem)):
                self._by_name.setdefault(name, []).append(path)

    def find(self, names: Iterable[str]) -> str:
        """Return the path of the picture that the first matching name refers to.

        A name matches the picture at its path; else the one whose path ends with the whole name;
        else, with leading folders removed one by one, the picture at what remains
        (`done/cam1/dog.jpg` → `cam1/dog.jpg` → `dog.jpg`). A name without a picture's ending
        matches by the stem.

        Raises PictureError if no name matches, or if one matches several pictures.
        """
        for name in list(names):
            parts = _parts(name)
            whole = "/".join(parts)
            matches = self._at(whole) or self._ending_with(whole)
            for start in range(1, len(parts)):
                matches = matches or self._at("/".join(parts[start:]))
            if len(matches) > 1:
                listed = ", ".join(matches[:3]) + (" …" if len(matches) > 3 else "")
                raise PictureError(
                    f"matches {len(matches)} pictures: {listed}",
                    remedy="give a folder by --images in which it matches only one",
                )
            if matches:
                return matches[0]
        raise PictureError(
            "does not exist", remedy="name the folder that the names are relative to by --images"
        )

    def _at(self, path: str) -> list[str]:
        if path in self.paths:
            return [path]
        return [] if is_picture(path) else self._by_stem.get(path, [])

    def _ending_with(self, path: str) -> list[str]:
        candidates = self._by_name.get(posixpath.basename(path), [])
        if is_picture(path):
            matches = [other for other in candidates if other.endswith(f"/{path}")]
        else:
            matches = [
                other for other in candidates if posixpath.splitext(other)[0].endswith(f"/{path}")
            ]
        prefix = self._fallback_prefix
        preferred = [other for other in matches if prefix is None or not other.startswith(prefix)]
        return preferred or matches


def _parts(name: str) -> list[str]:
    """Return a name's folders and file. Raises PictureError if it could lead out of the folder."""
    if _CONTROL.search(name) or len(name) > _MAX_NAME:
        raise PictureError(
            f"its name contains control characters, or more than {_MAX_NAME} characters",
            remedy="rename it",
        )
    # Windows writes paths with \. A picture with \ in its name could not be named by a prompt
    # here anyway.
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts:
        raise PictureError("its name leads out of its folder", remedy="name it without ..")
    if not parts:
        raise PictureError("has no name", remedy="export the annotations again")
    return parts
