"""Kinds of files by their names: prompts, and temporary files of copying tools and editors."""

from __future__ import annotations

import posixpath

PROMPT_ENDINGS = frozenset({".json", ".prompt"})


_TEMPORARY_ENDINGS = frozenset(
    {
        ".part",
        ".partial",
        ".tmp",
        ".temp",
        ".crdownload",
        ".download",
        ".filepart",
        ".swp",
        ".opdownload",
        ".!sync",
    }
)


_TEMPORARY_STARTS = (".", "~$", "~syncthing~", "._")


def is_temporary(name: str) -> bool:
    """Return whether a name is one that copying tools and editors use while they write.

    These are `.part`, `.tmp`, `.crdownload`, `~$…`, `.~lock…`, dotfiles, rsync's
    `.dog.jpg.Ab12Cd`, Syncthing's `~syncthing~…` and `.syncthing.….tmp`, `dog.jpg~`, and an
    editor's `#dog.json#`; but not `#12 kitchen.jpg`.
    """
    lower = name.lower()
    if lower.startswith(_TEMPORARY_STARTS) or lower.endswith("~"):
        return True
    if lower.startswith("#") and lower.endswith("#"):
        return True
    return posixpath.splitext(lower)[1] in _TEMPORARY_ENDINGS
