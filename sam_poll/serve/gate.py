"""What every request passes before it is looked at: host and origin, the token, a place, the length of its body.

What can still go wrong here: without TLS (a proxy's business) everybody on the way can read the token.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import stat
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from loguru import logger
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sam_poll.errors import SettingsError
from sam_poll.fs import shown
from sam_poll.serve.callers import Callers
from sam_poll.serve.door import HttpDoor
from sam_poll.serve.refusals import FramingError, LengthError, RefusalError, StrangerError, response

TOKEN = "SAM_POLL_SERVE_TOKEN"  # noqa: S105  the variable's name
LEAST_TOKEN = 16  # characters; shorter ones can be tried out
FREE = ("/health", "/openapi.json")
_MAX_BYTES = 4096


class Gate:
    """Wraps the server's application. HEAD is answered as GET, by a server that leaves the body out."""

    def __init__(self, app: ASGIApp, door: HttpDoor, callers: Callers, *, token: str | None, body_bytes: int) -> None:
        self._app, self._door, self._callers, self._body_bytes = app, door, callers, body_bytes
        self._token = _digest(token) if token is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        try:
            check_framing(scope)
            self._callers.check(scope)
            self._check(scope)
            with self._door.place() if scope["method"] == "POST" else nullcontext():
                await self._app(scope, _counted(receive, self._body_bytes), send)
        except RefusalError as error:  # the application answers its own
            await response(error)(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = {name: value for name, value in scope["headers"] if name in (b"authorization", b"content-length")}
        if self._token is not None and scope["path"] not in FREE:
            sent = _sent(headers.get(b"authorization", b""))
            if sent is None or not hmac.compare_digest(_digest(sent), self._token):
                reason = "there is no token" if sent is None else "it is another token"
                raise StrangerError(reason, place="Authorization", remedy="Authorization: Bearer TOKEN")
        length = headers.get(b"content-length", b"")
        if length.isdigit() and (len(length) > 18 or int(length) > self._body_bytes):
            raise too_long(self._body_bytes)


def check_framing(scope: Scope) -> None:
    """Refuse a request of which two servers may think that it ends in different places. FramingError.

    What follows then is a request to one of them, and part of a body to the other.
    """
    headers = {name for name, _ in scope["headers"]}
    if b"transfer-encoding" not in headers:
        return
    if b"content-length" in headers:
        reason = "both Content-Length and Transfer-Encoding say where the body ends"
        raise FramingError(reason, place="Transfer-Encoding", remedy="send one of them")
    if scope["http_version"] == "1.0":
        raise FramingError("HTTP/1.0 knows no Transfer-Encoding", place="Transfer-Encoding", remedy="send HTTP/1.1")


def too_long(limit: int) -> LengthError:
    """For a body of more bytes."""
    reason = f"the body has more than {limit:,} bytes"
    return LengthError(reason, place="body", remedy="a smaller file; the limit is serve.body_mib")


def _counted(receive: Receive, limit: int) -> Receive:
    """A body whose length nobody has promised is counted as it comes."""
    total = 0

    async def counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit:
            raise too_long(limit)
        return message

    return counted


def _digest(token: str) -> bytes:
    """Of equal length for all: comparing tells nothing of that either."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _sent(header: bytes) -> str | None:
    """The token: `Bearer TOKEN`, or the password of `Basic`, which is all that an address (`http://:TOKEN@host/`) can
    say."""
    kind, _, value = header.decode("latin-1").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, ValueError):
            return None
    return None


def token_of(file: Path | None, env: Mapping[str, str]) -> str | None:
    """The token of `file`, or else of the environment; None where there is none. SettingsError for one of no use."""
    place = f"serve.token_file, {shown(file)}" if file is not None else f"environment, {TOKEN}"
    if file is not None:
        try:
            with file.open("rb") as opened:
                text = opened.read(_MAX_BYTES).decode("utf-8").strip()
            if file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
                logger.warning("{} can be read by others: `chmod 600` keeps it yours", shown(file))
        except OSError as error:
            raise SettingsError(f"cannot be read: {error.strerror}", place=place) from None
        except UnicodeDecodeError:
            raise SettingsError("is not text", place=place, remedy="one line with the token") from None
    elif env.get(TOKEN):
        text = env[TOKEN].strip()
    else:
        return None
    if len(text) < LEAST_TOKEN or not (text.isascii() and text.isprintable()) or " " in text:
        reason = f"not a token: at least {LEAST_TOKEN} ASCII characters without spaces"
        raise SettingsError(reason, place=place, remedy="`openssl rand -hex 32` makes one")
    return text
