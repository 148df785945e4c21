"""Text made safe for a terminal, a log or a file name."""

from __future__ import annotations

import os
from collections.abc import Sequence

_MAX_LISTED = 5


def cut(name: str, nbytes: int) -> str:
    """Return as many whole characters of a name as fit into `nbytes` bytes."""
    while len(os.fsencode(name)) > nbytes:
        name = name[:-1]
    return name


def shown(name: object) -> str:
    """Return a file name safe for a log or a message, with unprintable characters escaped."""
    text = str(name)
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


def listed(names: Sequence[str]) -> str:
    """Return the first names for a message, and how many more there are."""
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(shown(name) for name in names[:_MAX_LISTED]) + more
