"""Decode a picture's file that comes as base64 text, bare or as a data URL (`data:image/png;base64,…`).

What the data URL says of the picture's kind is not believed: the file's own bytes tell it.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from sam_poll.complaints import quoted
from sam_poll.errors import PictureError

_REMEDY = "send the picture's file, whole, in base64"
_DATA_URL = "data:image/png;base64,…, or the base64 alone"
_LONGEST_HEAD = 256  # characters before the comma; what browsers and libraries write has less than 40
_WORD = r"[a-z0-9!#$&^_.+-]+"
# RFC 2397: a media type, parameters, and the word that says how the rest is written.
_HEAD = re.compile(rf"data:({_WORD}/{_WORD})?(;{_WORD}=[^;,]*)*(;base64)?", re.IGNORECASE | re.ASCII)
_UNKNOWN = "application/octet-stream"  # browsers say so of endings that they do not know


def picture_file(text: Any, place: str) -> bytes:
    """Return the bytes that `text` holds. PictureError, at `place`, where there are none."""
    if text is None or text == "":
        raise PictureError("there is no picture", place=place, remedy=_REMEDY)
    if not isinstance(text, str):
        raise PictureError("not a text of base64", place=place, remedy=_REMEDY)
    try:
        data = base64.b64decode("".join(_without_head(text, place).split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: letters that are not ASCII
        raise PictureError(f"not base64: {error}", place=place, remedy=_REMEDY) from None
    if not data:
        raise PictureError("there is no picture", place=place, remedy=_REMEDY)
    return data


def _without_head(text: str, place: str) -> str:
    """What follows the head of a data URL; without one, the text itself."""
    text = text.lstrip()
    if text[:5].lower() != "data:":
        return text
    head, comma, _ = text[: _LONGEST_HEAD + 1].partition(",")
    found = _HEAD.fullmatch(head)
    if not comma or not found:
        raise PictureError(f"not a data URL: {quoted(head)}", place=place, remedy=_DATA_URL)
    kind, _, in_base64 = found.groups()
    if not in_base64:
        raise PictureError(f"a data URL that is not in base64: {quoted(head)}", place=place, remedy=_DATA_URL)
    if kind and not kind.lower().startswith("image/") and kind.lower() != _UNKNOWN:
        raise PictureError(f"a data URL of no picture, but of {quoted(kind)}", place=place, remedy=_DATA_URL)
    return text[len(head) + 1 :]
