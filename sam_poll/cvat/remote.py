"""The Nuclio function that has no network of its own: it hands each request on to a SAM server and its answer back.

`SAM_URI` names the server, `SAM_TIMEOUT_S` how long it may take. Standard library only, so that its image needs no
torch. The server's status, words and kind of content are passed on as they are; where it cannot be asked, the answer is
502 (unreachable) or 504 (too slow), with the reason and the remedy as JSON.

What can still go wrong here: the server answers 200 with something that CVAT does not understand; that is not looked
at.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from sam_poll.cvat import refusal
from sam_poll.errors import InputError, SamPollError, SettingsError

URI = "SAM_URI"
TIMEOUT_S = "SAM_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 25.0  # below the 30 s that the function has (`eventTimeout`): its reason is better than Nuclio's
_PIECE = 1 << 20
_REACH = (
    "is the server running, and does this container reach it? `localhost` is the container itself: from inside Docker "
    "the host is `host.docker.internal`"
)


class _SlowError(SamPollError):
    """The server has had its time."""


@dataclass(frozen=True)
class Remote:
    """Hands events on to the server at `uri`; `timeout_s` is for all of a request together."""

    uri: SplitResult
    timeout_s: float = DEFAULT_TIMEOUT_S

    @classmethod
    def open(cls, logger: Any, env: Mapping[str, str] = os.environ) -> Remote:
        """As `SAM_URI` and `SAM_TIMEOUT_S` say. SettingsError, which is logged, too."""
        try:
            made = cls(_uri(env.get(URI, "")), _timeout(env.get(TIMEOUT_S, "")))
        except SettingsError as error:
            logger.error(f"the function cannot start: {error}")
            raise
        logger.info(f"requests go to {made.place}, {made.timeout_s:g} s at most")
        return made

    @property
    def place(self) -> str:
        """Where the server is, without a password."""
        host = self.uri.netloc.rpartition("@")[2]
        return f"{self.uri.scheme}://{host}{self.uri.path}"

    def forward(self, context: Any, event: Any) -> Any:
        """The server's answer to the event's body."""
        try:
            status, kind, body = self._ask(_bytes(event.body))
        except InputError as error:
            return self._failed(context, 400, error)
        except _SlowError as error:
            return self._failed(context, 504, error)
        except (OSError, http.client.HTTPException) as error:
            slow = isinstance(error, (socket.timeout, TimeoutError))
            said = f"no answer within {self.timeout_s:g} s" if slow else f"{type(error).__name__}: {error}"
            told = SamPollError(f"the SAM server cannot be asked: {said}", place=self.place, remedy=_REACH)
            return self._failed(context, 504 if slow else 502, told)
        if status >= 400:
            context.logger.error(f"{self.place} answered {status}: {body[:500].decode('utf-8', 'replace')}")
        try:
            words: str | bytes = body.decode("utf-8")
        except UnicodeDecodeError:
            words = body
        return context.Response(body=words, headers={}, content_type=kind, status_code=status)

    def _ask(self, body: bytes) -> tuple[int, str, bytes]:
        """Status, content type, body. Redirections are not followed: a POST would lose its body."""
        deadline = time.monotonic() + self.timeout_s
        kind = http.client.HTTPSConnection if self.uri.scheme == "https" else http.client.HTTPConnection
        connection = kind(self.uri.hostname or "", self.uri.port, timeout=self.timeout_s)
        try:
            path = (self.uri.path or "/") + (f"?{self.uri.query}" if self.uri.query else "")
            connection.request("POST", path, body, {"Content-Type": "application/json", **self._login()})
            _hurry(connection, deadline, self)
            answer = connection.getresponse()
            pieces = []
            while piece := answer.read1(_PIECE):
                pieces.append(piece)
                _hurry(connection, deadline, self)
            whole = b"".join(pieces)
            if answer.length:  # bytes that were promised and did not come
                raise http.client.IncompleteRead(whole, answer.length)
            return answer.status, answer.headers.get("Content-Type", "application/json"), whole
        finally:
            connection.close()

    def _login(self) -> dict[str, str]:
        """What stands before an @ in `SAM_URI`, as HTTP's basic authorization."""
        if self.uri.username is None:
            return {}
        pair = f"{unquote(self.uri.username)}:{unquote(self.uri.password or '')}".encode()
        return {"Authorization": f"Basic {base64.b64encode(pair).decode('ascii')}"}

    def _failed(self, context: Any, status: int, error: SamPollError) -> Any:
        context.logger.error(str(error))
        return refusal.response(context, status, error)


def _hurry(connection: http.client.HTTPConnection, deadline: float, remote: Remote) -> None:
    """A server that sends a byte now and then has no more time than one that sends none."""
    left = deadline - time.monotonic()
    if left <= 0:
        reason = f"the SAM server has not answered in full within {remote.timeout_s:g} s"
        raise _SlowError(reason, place=remote.place, remedy=f"raise {TIMEOUT_S} and the function's eventTimeout")
    if connection.sock:
        connection.sock.settimeout(left)


def _bytes(body: Any) -> bytes:
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
        raise SettingsError("no SAM server is named", place=URI, remedy=remedy)
    try:
        uri = urlsplit(text.strip())
        sound = uri.scheme in ("http", "https") and bool(uri.hostname) and (uri.port is None or uri.port > 0)
    except ValueError:
        sound = False
    if not sound:
        raise SettingsError("not the address of a server", place=URI, remedy=remedy)
    return uri


def _timeout(text: str) -> float:
    try:
        seconds = float(text) if text.strip() else DEFAULT_TIMEOUT_S
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise SettingsError(f"{text!r} is not a number of seconds", place=TIMEOUT_S, remedy="25, for instance")
    return seconds
