"""The Nuclio function without a network of its own: it forwards requests to a SAM server.

`SAM_URI` names the server, `SAM_TIMEOUT_S` is the timeout. Only the standard library is used, so
that the function's image needs no torch. The request's `User-Agent`, which names CVAT's version, is
passed on, so that the server can answer in the form for it. The server's status, body and content
type are passed on unchanged; if the server cannot be reached, the answer is 502, if it is too slow
504, with the reason and the remedy as JSON.

Limitations: a server's answer 200 is passed on without a check that CVAT understands it.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from sam_poll.core.errors import InputError, SamPollError, SettingsError
from sam_poll.integrations.nuclio import answer_form, errors

URI = "SAM_URI"
TIMEOUT_S = "SAM_TIMEOUT_S"
# Below the function's own `eventTimeout` of 30 s, because this reason says more than Nuclio's.
DEFAULT_TIMEOUT_S = 25.0
_MAX_TIMEOUT_S = 3600.0
_CHUNK = 1 << 20  # bytes
_UNREACHABLE_REMEDY = (
    "is the server running, and does this container reach it? `localhost` is the container itself: "
    "Docker's host is the gateway of the container's network (`docker network inspect cvat_cvat`), "
    "with Docker Desktop `host.docker.internal`"
)


class _TimeoutError(SamPollError):
    """The server has not answered in full before the timeout."""


class _Answer(NamedTuple):
    status: int
    content_type: str
    body: bytes


@dataclass(frozen=True)
class Remote:
    """Forwards events to the server at `uri`; `timeout_s` is for the whole of a request."""

    uri: SplitResult
    timeout_s: float = DEFAULT_TIMEOUT_S

    @classmethod
    def open(cls, logger: Any, env: Mapping[str, str] = os.environ) -> Remote:
        """Return the server of `SAM_URI` and `SAM_TIMEOUT_S`.

        Raises SettingsError, which is logged too.
        """
        try:
            remote = cls(_uri(env.get(URI, "")), _timeout(env.get(TIMEOUT_S, "")))
        except SettingsError as error:
            logger.error(f"the function cannot start: {error}")
            raise
        logger.info(f"forwarding requests to {remote.place}, timeout {remote.timeout_s:g} s")
        return remote

    @property
    def place(self) -> str:
        """Return the server's address without user and password."""
        host = self.uri.netloc.rpartition("@")[2]
        return f"{self.uri.scheme}://{host}{self.uri.path}"

    def forward(self, context: Any, event: Any) -> Any:
        """Return the server's answer to the event's body."""
        try:
            answer = self._request(_bytes(event.body), answer_form.user_agent(event))
        except InputError as error:
            return self._failed(context, 400, error)
        except _TimeoutError as error:
            return self._failed(context, 504, error)
        except TimeoutError:
            detail = f"no answer within {self.timeout_s:g} s"
            return self._failed(context, 504, self._unreachable(detail))
        except (OSError, http.client.HTTPException) as error:
            detail = f"{type(error).__name__}: {error}"
            return self._failed(context, 502, self._unreachable(detail))
        if answer.status >= 400:
            text = answer.body[:500].decode("utf-8", "replace")
            context.logger.error(f"{self.place} answered {answer.status}: {text}")
        try:
            body: str | bytes = answer.body.decode("utf-8")
        except UnicodeDecodeError:
            body = answer.body
        return context.Response(
            body=body, headers={}, content_type=answer.content_type, status_code=answer.status
        )

    def _unreachable(self, detail: str) -> SamPollError:
        reason = f"the SAM server cannot be reached: {detail}"
        return SamPollError(reason, place=self.place, remedy=_UNREACHABLE_REMEDY)

    def _request(self, body: bytes, agent: str) -> _Answer:
        """Send one POST request. Redirects are not followed: a POST would lose its body."""
        deadline = time.monotonic() + self.timeout_s
        connection = self._connection()
        try:
            path = (self.uri.path or "/") + (f"?{self.uri.query}" if self.uri.query else "")
            headers = {"Content-Type": "application/json", **self._authorization()}
            if agent:
                headers["User-Agent"] = agent
            connection.request("POST", path, body, headers)
            self._limit(connection, deadline)
            response = connection.getresponse()
            chunks = []
            while chunk := response.read1(_CHUNK):
                chunks.append(chunk)
                self._limit(connection, deadline)
            received = b"".join(chunks)
            if response.length:  # bytes of the announced length that did not come
                raise http.client.IncompleteRead(received, response.length)
            content_type = response.headers.get("Content-Type", "application/json")
            return _Answer(response.status, content_type, received)
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self.uri.hostname or "", self.uri.port
        if self.uri.scheme == "https":
            return http.client.HTTPSConnection(host, port, timeout=self.timeout_s)
        return http.client.HTTPConnection(host, port, timeout=self.timeout_s)

    def _authorization(self) -> dict[str, str]:
        """Return user and password of `SAM_URI` as the header of HTTP's basic authentication."""
        if self.uri.username is None:
            return {}
        pair = f"{unquote(self.uri.username)}:{unquote(self.uri.password or '')}".encode()
        return {"Authorization": f"Basic {base64.b64encode(pair).decode('ascii')}"}

    def _limit(self, connection: http.client.HTTPConnection, deadline: float) -> None:
        """Set the connection's timeout to what is left until the deadline.

        Without this, a server that sends a byte now and then would never time out.
        """
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise _TimeoutError(
                f"the SAM server has not answered in full within {self.timeout_s:g} s",
                place=self.place,
                remedy=f"raise {TIMEOUT_S} and the function's eventTimeout",
            )
        if connection.sock:
            connection.sock.settimeout(left_s)

    def _failed(self, context: Any, status: int, error: SamPollError) -> Any:
        context.logger.error(str(error))
        return errors.response(context, status, error)


def _bytes(body: Any) -> bytes:
    """Return an event's body as bytes; Nuclio may have parsed it. Raises InputError if empty."""
    if isinstance(body, (bytes, bytearray)):
        return bytes(body)
    if isinstance(body, str):
        return body.encode()
    if body is None:
        raise InputError("the request is empty", place="body", remedy='send {"image": base64, …}')
    return json.dumps(body).encode()


def _uri(text: str) -> SplitResult:
    remedy = f"set {URI} to http://HOST:PORT/PATH of the SAM server"
    if not text.strip():
        raise SettingsError("no SAM server is given", place=URI, remedy=remedy)
    try:
        uri = urlsplit(text.strip())
        has_port = uri.port is None or uri.port > 0
        is_valid = uri.scheme in ("http", "https") and bool(uri.hostname) and has_port
    except ValueError:
        is_valid = False
    if not is_valid:
        raise SettingsError("not the address of a server", place=URI, remedy=remedy)
    return uri


def _timeout(text: str) -> float:
    try:
        seconds = float(text) if text.strip() else DEFAULT_TIMEOUT_S
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= _MAX_TIMEOUT_S:
        raise SettingsError(
            f"{text!r} is not a number of seconds up to {_MAX_TIMEOUT_S:g}",
            place=TIMEOUT_S,
            remedy="for example 25",
        )
    return seconds
