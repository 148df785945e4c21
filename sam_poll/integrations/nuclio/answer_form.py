"""Which form an interactor's answer has: `mask`, the whole picture, or `shapes`, run lengths.

CVAT's server passes the answer on unchanged, and its browser client converts it. Clients since 2.60
take both forms, older ones only `mask`. A request tells the version by its `User-Agent`, for
instance `CVAT/2.73.0 python-requests/2.32.4`, which Nuclio's dashboard passes on to the function.

Only the standard library is used, since the function that forwards requests has nothing else.

Limitations: where something between CVAT and the function replaces that header, the form is `mask`,
unless the setting names another one.
"""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

from sam_poll.core.errors import SamPollError, SettingsError

AUTO = "auto"  # the setting that leaves the form to the request
_SHAPES_SINCE = (2, 60)
_CVAT = re.compile(r"CVAT/(\d{1,6})\.(\d{1,6})\b", re.ASCII)


class AnswerForm(Enum):
    """The form of an interactor's answer."""

    MASK = "mask"
    SHAPES = "shapes"


WORDS = (AUTO, *(form.value for form in AnswerForm))


def form_for(user_agent: str, setting: AnswerForm | None = None) -> AnswerForm:
    """Return the form for a request with this `User-Agent`; `setting` overrides it."""
    if setting is not None:
        return setting
    version = _CVAT.match(user_agent)
    if version and (int(version[1]), int(version[2])) >= _SHAPES_SINCE:
        return AnswerForm.SHAPES
    return AnswerForm.MASK


def parse_setting(
    word: str, place: str, error: type[SamPollError] = SettingsError
) -> AnswerForm | None:
    """Return the form that a word names; None for `auto`. Raises `error` for any other word."""
    if word not in WORDS:
        reason = f"{word[:40]!r} is no form of an answer"
        raise error(reason, place=place, remedy=f"there are: {', '.join(WORDS)}")
    return None if word == AUTO else AnswerForm(word)


def user_agent(event: Any) -> str:
    """Return the `User-Agent` of a Nuclio event's request; "" without a plain one.

    Names and values of headers are bytes where Nuclio is configured not to decode them.
    """
    for key, value in event.headers.items():
        if _text(key).lower() == "user-agent":
            agent = _text(value)
            return agent if agent.isascii() and agent.isprintable() else ""
    return ""


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)
