"""Names of the share in addresses: base64, because a file's name may be any bytes.

A path comes back as it was, also one with line breaks, or with bytes that are not UTF-8. Whatever
an address says stays below one of the five folders.
"""

from __future__ import annotations

import base64
import binascii
import os

from sam_poll.core.safe_path import SafePath
from sam_poll.integrations.http.errors import NotFoundError

_LONGEST = 8192  # characters; twice what a path may have


def encode(path: str) -> str:
    """Return a path as a part of an address."""
    return base64.urlsafe_b64encode(os.fsencode(path)).decode("ascii").rstrip("=")


def decode(text: str) -> str:
    """Return the path that `encode` was given. Raises NotFoundError."""
    try:
        if len(text) > _LONGEST:
            raise ValueError
        data = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (ValueError, binascii.Error):
        raise not_found() from None
    return os.fsdecode(data)


def below(folder: SafePath, path: str) -> SafePath:
    """Return a path below one of the five folders.

    Raises NotFoundError for a path that leads elsewhere, or to a hidden file or folder: those are
    the daemons' own.
    """
    if not path or any(part.startswith(".") for part in path.split("/")):
        raise not_found()
    try:
        return folder / path
    except ValueError:
        raise not_found() from None


def not_found(
    reason: str = "there is no such page, or its file has moved meanwhile",
) -> NotFoundError:
    """Return the error for an address that leads nowhere."""
    return NotFoundError(reason, remedy="go back to the overview")
