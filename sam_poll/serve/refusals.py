"""How the server says no: an HTTP status, and the reason, place and remedy as JSON, as in the folder's error files.

What can still go wrong here: nothing; these are words.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import ClassVar

from starlette.responses import Response

from sam_poll.errors import InputError, SamPollError, TooLargeError, UnforeseenError

GONE = 499  # nobody hears it; for the log, as nginx has it
LONGEST_WAIT_S = 60.0


class RefusalError(SamPollError):
    """A refusal that is HTTP's own. `wait_s`: when it is worth asking again."""

    code: ClassVar[str] = "http"
    status: ClassVar[int] = 500

    def __init__(
        self, reason: str, *, place: str | None = None, remedy: str | None = None, wait_s: float | None = None
    ) -> None:
        super().__init__(reason, place=place, remedy=remedy)
        self.wait_s = wait_s


class MalformedError(RefusalError):
    """The body is not what its kind should be."""

    code, status = "body", 400


class FramingError(RefusalError):
    """It is not clear where the request ends."""

    code, status = "framing", 400


class StrangerError(RefusalError):
    """The token is missing or another one."""

    code, status = "token", 401


class OriginError(RefusalError):
    """A web page of another origin asks."""

    code, status = "origin", 403


class AddressError(RefusalError):
    """There is nothing at this address."""

    code, status = "address", 404


class MethodError(RefusalError):
    """It is not asked this way."""

    code, status = "method", 405


class SlowError(RefusalError):
    """The request itself does not come."""

    code, status = "slow", 408


class LengthError(RefusalError):
    """The body is longer than may be."""

    code, status = "length", 413


class KindError(RefusalError):
    """The body is of a kind that is not read here."""

    code, status = "kind", 415


class HostError(RefusalError):
    """The request is for a server of another name."""

    code, status = "host", 421


class FullError(RefusalError):
    """All places are taken."""

    code, status = "full", 429


class UnavailableError(RefusalError):
    """Not now: loading, stopping, or too slow today."""

    code, status = "unavailable", 503


def status_of(error: SamPollError) -> int:
    """The request's fault is 422, ours 500; a refusal of HTTP's own has its own."""
    if isinstance(error, RefusalError):
        return error.status
    ours = isinstance(error, (TooLargeError, UnforeseenError)) or not isinstance(error, InputError)
    return 500 if ours else 422


def response(error: SamPollError, headers: Mapping[str, str] | None = None) -> Response:
    """`{"code", "reason", "place", "remedy"}`, the last two null where they are not known."""
    words = {"code": error.code, "reason": error.reason, "place": error.place, "remedy": error.remedy}
    headers = dict(headers or {})
    if isinstance(error, StrangerError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, FramingError):  # what follows on this connection may be anything
        headers["Connection"] = "close"
    wait_s = getattr(error, "wait_s", None)
    if wait_s is not None:
        headers["Retry-After"] = str(math.ceil(min(max(wait_s, 1.0), LONGEST_WAIT_S)))
    # As ASCII: half a surrogate pair of the request may be quoted in it.
    body = json.dumps(words).encode("ascii")
    return Response(body, status_of(error), headers, "application/json")
