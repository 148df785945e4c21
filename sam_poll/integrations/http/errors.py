"""Errors of HTTP requests: each has a status, and goes out as JSON with the error file's keys.

docs/serve.md has the table of statuses, codes and the inputs that lead to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import ClassVar

from starlette.responses import Response

from sam_poll.core.errors import DeviceOutOfMemoryError, InputError, InternalError, SamPollError

CLIENT_CLOSED = 499
"""nginx's status for a request whose client disconnected. No client receives it."""
LONGEST_WAIT_S = 60.0
"""Maximum of `Retry-After`."""


class RefusalError(SamPollError):
    """An error with an HTTP status of its own. `wait_s`: seconds for the header `Retry-After`."""

    code: ClassVar[str] = "http"
    status: ClassVar[int] = 500

    def __init__(
        self,
        reason: str,
        *,
        place: str | None = None,
        remedy: str | None = None,
        wait_s: float | None = None,
    ) -> None:
        super().__init__(reason, place=place, remedy=remedy)
        self.wait_s = wait_s


class BadRequestError(RefusalError):
    """The body does not have the form that its content type says."""

    code, status = "body", 400


class FramingError(RefusalError):
    """The headers leave open where the request ends."""

    code, status = "framing", 400


class UnauthorizedError(RefusalError):
    """The token is missing or wrong."""

    code, status = "token", 401


class OriginError(RefusalError):
    """The request comes from a web page of another origin, which is not in `serve.origins`."""

    code, status = "origin", 403


class NotFoundError(RefusalError):
    """There is no such path."""

    code, status = "address", 404


class MethodError(RefusalError):
    """The path does not have this method."""

    code, status = "method", 405


class RequestTimeoutError(RefusalError):
    """The body was not complete in time."""

    code, status = "slow", 408


class PayloadTooLargeError(RefusalError):
    """The body is longer than `serve.body_mib`."""

    code, status = "length", 413


class UnsupportedMediaTypeError(RefusalError):
    """The content type is neither JSON nor a form."""

    code, status = "kind", 415


class HostError(RefusalError):
    """The header `Host` names another server."""

    code, status = "host", 421


class TooManyRequestsError(RefusalError):
    """As many requests as `serve.queue` allows are being answered."""

    code, status = "full", 429


class UnavailableError(RefusalError):
    """The model is being loaded, the server is stopping, or the answer was not ready in time."""

    code, status = "unavailable", 503


def status_of(error: SamPollError) -> int:
    """Return the HTTP status of an error.

    422 for what the request's content causes, 500 for what the server causes; errors that are
    HTTP's own have their own.
    """
    if isinstance(error, RefusalError):
        return error.status
    if isinstance(error, (DeviceOutOfMemoryError, InternalError)):  # kinds of InputError
        return 500
    return 422 if isinstance(error, InputError) else 500


def response(error: SamPollError, headers: Mapping[str, str] | None = None) -> Response:
    """Return the response of an error: `{"code", "reason", "place", "remedy"}`.

    `place` and `remedy` are null where they are not known. `headers` are added to the error's own.
    """
    fields = {
        "code": error.code,
        "reason": error.reason,
        "place": error.place,
        "remedy": error.remedy,
    }
    headers = dict(headers or {})
    if isinstance(error, UnauthorizedError):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, FramingError):  # the bytes that follow may be anything
        headers["Connection"] = "close"
    wait_s = getattr(error, "wait_s", None)
    if wait_s is not None:
        headers["Retry-After"] = str(math.ceil(min(max(wait_s, 1.0), LONGEST_WAIT_S)))
    # ASCII, because the reason may quote half a surrogate pair of the request.
    body = json.dumps(fields).encode("ascii")
    return Response(body, status_of(error), headers, "application/json")
