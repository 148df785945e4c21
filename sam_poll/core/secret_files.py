"""Read secrets (passwords, tokens, URLs with passwords) from files, and keep them out of texts."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, quote_plus

from loguru import logger

from sam_poll.core.errors import SettingsError
from sam_poll.core.text import shown

MAX_BYTES = 64 << 10
"""Bytes that are read of a file."""


def read_secret(file: Path, *, place: str, remedy: str) -> str:
    """Return the one line of text in `file`, without white space around it.

    A file that other users can read is accepted with a warning in the log.

    `place` names the setting or flag and the file in errors; `remedy` says what the file must hold.
    No error holds any of the file's content.

    Raises SettingsError: the file cannot be read, is empty, or does not hold exactly one line of
    text.
    """
    try:
        with file.open("rb") as opened:
            text = opened.read(MAX_BYTES).decode("utf-8").strip()
            mode = os.fstat(opened.fileno()).st_mode
    except OSError as error:
        raise SettingsError(
            f"cannot be read: {error.strerror}",
            place=place,
            remedy="check its path and its permissions",
        ) from None
    except UnicodeDecodeError:
        raise SettingsError("is not text", place=place, remedy=remedy) from None
    if not text:
        raise SettingsError("is empty", place=place, remedy=remedy)
    if not text.isprintable():  # line breaks are not printable
        raise SettingsError(
            "holds more than one line, or control characters", place=place, remedy=remedy
        )
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning("{} can be read by other users; run `chmod 600` on it", shown(file))
    return text


def redact(text: str, secrets: Iterable[str]) -> str:
    """Return the text with each secret replaced by an ellipsis; empty ones are passed over.

    Each is also replaced in the forms that it has in JSON and in a URL, as a server may quote it.
    """
    for secret in filter(None, secrets):
        for form in (secret, json.dumps(secret)[1:-1], quote(secret), quote_plus(secret)):
            text = text.replace(form, "…")
    return text
