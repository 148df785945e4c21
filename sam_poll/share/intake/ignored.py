"""Folders and files in `in/` that are ignored: those of servers and systems, and `watch.ignore`.

Limitations: a server's own folder whose name is not known here is read as jobs, until
`watch.ignore` names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache

# Synology, QNAP, NetApp, Windows, ext4; compared without regard to case. Those that begin with a
# dot (.Trash-1000, .snapshot, .recycle) are passed over as all dotfiles are.
SYSTEM_FOLDERS = frozenset(
    {
        "@eadir",
        "#recycle",
        "#snapshot",
        "@recycle",
        "@recently-snapshot",
        "~snapshot",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "lost+found",
    }
)


@dataclass(frozen=True)
class Ignored:
    """Decide which paths relative to `in/`, with `/`, are ignored.

    Patterns are those of fnmatch. One without `/` is for the names of folders and files at any
    depth, one with `/` for whole paths.
    """

    patterns: tuple[str, ...] = ()

    def folder(self, path: str) -> bool:
        """Return whether a folder is ignored, with everything below it.

        Its parents are not checked.
        """
        name = path[path.rfind("/") + 1 :]
        return name.lower() in SYSTEM_FOLDERS or (bool(self.patterns) and self.file(path))

    def file(self, path: str) -> bool:
        """Return whether a file matches a pattern. Its folders are not checked."""
        names, paths = _compiled(self.patterns)
        return names.match(path[path.rfind("/") + 1 :]) is not None or paths.match(path) is not None

    def covers(self, path: str) -> bool:
        """Return whether a file is ignored, by itself or through one of its folders."""
        folders = [path[: at.start()] for at in re.finditer("/", path)]
        return any(map(self.folder, folders)) or self.file(path)


SYSTEM_ONLY = Ignored()


@lru_cache(maxsize=8)
def _compiled(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return the pattern for names, and the one for whole paths."""
    stripped = [pattern.rstrip("/") for pattern in patterns]
    names = [pattern for pattern in stripped if "/" not in pattern]
    paths = [pattern.removeprefix("./").lstrip("/") for pattern in stripped if "/" in pattern]
    return _any_of(names), _any_of(paths)


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    """Return what matches any of the patterns; without patterns it matches nothing."""
    return re.compile("|".join(map(translate, patterns)) or r"(?!)", re.DOTALL)
