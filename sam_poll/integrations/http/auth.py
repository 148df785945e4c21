"""Middleware that checks requests before their body is read: framing, host, origin, token, length.

It also takes a place in the queue for each request, and counts the bytes of bodies.

Limitations: without TLS, which is a reverse proxy's task, the token can be read on the network.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sam_poll.core.errors import SettingsError
from sam_poll.core.secret_files import read_secret
from sam_poll.core.text import shown
from sam_poll.integrations.http.errors import (
    FramingError,
    PayloadTooLargeError,
    RefusalError,
    UnauthorizedError,
    response,
)
from sam_poll.integrations.http.origin_check import Callers
from sam_poll.integrations.http.source import HttpSource

TOKEN = "SAM_POLL_SERVE_TOKEN"  # noqa: S105  the variable's name
LEAST_TOKEN = 16
"""Minimum length of a token in characters. Shorter ones can be guessed."""
FREE = ("/health", "/openapi.json")
"""Paths that need no token."""

_LENGTH_DIGITS = 18  # more than any body that could be meant, and int() of them stays cheap


class AuthMiddleware:
    """ASGI middleware before the server's application.

    HEAD is passed on as GET; the HTTP library leaves the body out.
    """

    def __init__(
        self,
        app: ASGIApp,
        source: HttpSource,
        callers: Callers,
        *,
        token: str | None,
        body_bytes: int,
    ) -> None:
        self._app = app
        self._source = source
        self._callers = callers
        self._body_bytes = body_bytes
        self._token = digest_of(token) if token is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and pass it on or refuse it (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        try:
            check_framing(scope)
            self._callers.check(scope)
            self._check_token(scope)
            check_length(scope, self._body_bytes)
            with self._source.place() if scope["method"] == "POST" else nullcontext():
                await self._app(scope, limited(receive, self._body_bytes), send)
        except RefusalError as error:  # the application answers its own errors
            await response(error)(scope, receive, send)

    def _check_token(self, scope: Scope) -> None:
        if self._token is None or scope["path"] in FREE:
            return
        token = _bearer_token(_header(scope, b"authorization"))
        if token is None:
            raise _unauthorized("there is no token")
        if not hmac.compare_digest(digest_of(token), self._token):
            raise _unauthorized("the token is wrong")


def check_length(scope: Scope, limit: int) -> None:
    """Raise PayloadTooLargeError for a request that states a body of more than `limit` bytes."""
    length = _header(scope, b"content-length")
    too_many_digits = len(length) > _LENGTH_DIGITS
    if length.isdigit() and (too_many_digits or int(length) > limit):
        raise too_long(limit)


def _header(scope: Scope, name: bytes) -> bytes:
    """Return the last value of a header, or b""."""
    return dict(scope["headers"]).get(name, b"")


def _unauthorized(reason: str) -> UnauthorizedError:
    return UnauthorizedError(
        reason, place="Authorization", remedy="send the header Authorization: Bearer TOKEN"
    )


def check_framing(scope: Scope) -> None:
    """Raise FramingError for a request whose end two servers may see in different places.

    What follows after the first end is a request to one of them, and part of the body to the other
    (request smuggling).
    """
    headers = {name for name, _ in scope["headers"]}
    if b"transfer-encoding" not in headers:
        return
    if b"content-length" in headers:
        raise FramingError(
            "both Content-Length and Transfer-Encoding say where the body ends",
            place="Transfer-Encoding",
            remedy="send one of them",
        )
    if scope["http_version"] == "1.0":
        raise FramingError(
            "HTTP/1.0 does not have Transfer-Encoding",
            place="Transfer-Encoding",
            remedy="send HTTP/1.1",
        )


def too_long(limit: int) -> PayloadTooLargeError:
    """Return the error for a body of more than `limit` bytes."""
    return PayloadTooLargeError(
        f"the body has more than {limit:,} bytes",
        place="body",
        remedy="send a smaller file, or raise serve.body_mib",
    )


def limited(receive: Receive, limit: int) -> Receive:
    """Count the bytes of a body as they arrive: its Content-Length may be missing."""
    total = 0

    async def receive_counted() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit:
            raise too_long(limit)
        return message

    return receive_counted


def digest_of(token: str) -> bytes:
    """Return a digest to compare tokens by: all have one length, so that no length leaks."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def _bearer_token(header: bytes) -> str | None:
    """Return the token of a header `Authorization`, or None.

    The token is that of `Bearer TOKEN`, or the password of `Basic`, for programs that can only be
    given a URL (`http://:TOKEN@host/`).
    """
    scheme, _, value = header.decode("latin-1").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, ValueError):
            return None
    return None


def read_token(file: Path | None, env: Mapping[str, str]) -> str | None:
    """Return the token of `file`, or else of the environment; None if there is neither.

    Raises SettingsError if the file cannot be read, or if the token is too short or has characters
    that cannot be sent.
    """
    remedy = "write one line with the token; `openssl rand -hex 32` makes one"
    if file is not None:
        place = f"serve.token_file, {shown(file)}"
        token = read_secret(file, place=place, remedy=remedy)
    elif env.get(TOKEN):
        place = f"environment, {TOKEN}"
        token = env[TOKEN].strip()
    else:
        return None
    if len(token) < LEAST_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise SettingsError(
            f"not a token: at least {LEAST_TOKEN} ASCII characters without spaces",
            place=place,
            remedy="`openssl rand -hex 32` makes one",
        )
    return token
