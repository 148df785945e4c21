"""Middleware of the page: host, origin, login, session cookie, CSRF token, security headers.

The page changes things on the share, and every web page in the same browser can send requests to
it. So each change needs the page's own origin, its cookie (SameSite=Strict, HttpOnly) and a token
that only the page itself knows.

Limitations: without TLS, which is a reverse proxy's task, token and cookie can be read on the
network.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import quote

from starlette.datastructures import FormData, Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sam_poll.core.errors import SamPollError
from sam_poll.integrations.http import auth
from sam_poll.integrations.http.errors import (
    OriginError,
    RefusalError,
    TooManyRequestsError,
    UnauthorizedError,
    response,
)
from sam_poll.integrations.http.origin_check import Callers

PREFIX = "/ui"
"""All addresses of the page begin with it."""
LOGIN = f"{PREFIX}/login"
LOGOUT = f"{PREFIX}/logout"
RETRY = f"{PREFIX}/retry"
DOCTOR = f"{PREFIX}/doctor"
PREVIEW = "/preview"
"""The end of the addresses that ask for masks: a POST that changes nothing."""
CSRF_HEADER = "x-csrf-token"
SESSION_S = 7 * 24 * 3600
"""Time after which a browser must log in again."""

MOST_CHANGES = 16
"""Requests with a body that are answered at once: each may hold `serve.body_mib` in memory."""

_FREE = (LOGIN, f"{PREFIX}/static/")
# Forms that work before the page's scripts are there; no header can be sent with them. All but the
# first have the token in a field, see `check_form`.
_OWN_FORMS = (LOGIN, LOGOUT, RETRY, DOCTOR)
_CHANGING = ("POST", "PUT", "PATCH", "DELETE")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # With `no-referrer` browsers would send `Origin: null` with the page's own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class ReadOnlyError(RefusalError):
    """A change of a page that was started with `--read-only`."""

    code, status = "read_only", 403


@dataclass(frozen=True, slots=True)
class Session:
    """One browser's session. `csrf` must come back with each change."""

    cookie: str
    csrf: str


class Sessions:
    """Makes and checks session cookies: `issued.random.signature`, nothing is stored.

    `token`: the one that users log in with; None: everybody who reaches the server has a session.
    Sessions of a server with a token outlive a restart, and end when the token changes.
    """

    def __init__(self, token: str | None, clock: Callable[[], float] = time.time) -> None:
        self._token = None if token is None else auth.digest_of(token)
        seed = secrets.token_bytes(32) if self._token is None else b"session " + self._token
        self._key = hashlib.sha256(seed).digest()
        self._clock = clock

    @property
    def need_login(self) -> bool:
        """Whether users log in."""
        return self._token is not None

    def accepts(self, token: str) -> bool:
        """Return whether this is the token."""
        return self._token is not None and hmac.compare_digest(auth.digest_of(token), self._token)

    def new(self) -> Session:
        """Return a new session."""
        return self._session(f"{int(self._clock())}.{secrets.token_urlsafe(18)}")

    def check(self, cookie: str) -> Session | None:
        """Return the session of a cookie; None where it is not valid any more."""
        body, _, _ = cookie.rpartition(".")
        session = self._session(body)
        if not hmac.compare_digest(session.cookie.encode(), cookie.encode("utf-8", "replace")):
            return None
        issued = int(body.partition(".")[0])
        return session if self._clock() - issued < SESSION_S else None

    @staticmethod
    def set_cookie(name: str, session: Session) -> str:
        """Return the header `Set-Cookie` of a session."""
        return f"{name}={session.cookie}; Path=/; Max-Age={SESSION_S}; HttpOnly; SameSite=Strict"

    def _session(self, body: str) -> Session:
        return Session(f"{body}.{self._sign('cookie', body)}", self._sign("csrf", body))

    def _sign(self, purpose: str, body: str) -> str:
        text = f"{purpose} {body}".encode("utf-8", "replace")
        return hmac.new(self._key, text, hashlib.sha256).hexdigest()


async def check_form(request: Request) -> FormData:
    """Return the form that came with a change. Raises OriginError, see `check_csrf`.

    Scripts send the CSRF token in the header, a browser without them in the field `csrf`.
    """
    form = await request.form()
    # The field first: a part of the page that has been loaded again has a newer one than the page.
    sent = form.get("csrf") or request.headers.get(CSRF_HEADER, "")
    check_csrf(request.state.session, str(sent), place="csrf")
    return form


def check_csrf(session: Session, sent: str, *, place: str) -> None:
    """Raise OriginError unless the CSRF token that came with a change is the session's.

    `place`: the header or the field that it came in.
    """
    if not hmac.compare_digest(sent.encode("utf-8", "replace"), session.csrf.encode()):
        raise OriginError(
            "the request does not come from this page, or the page is out of date",
            place=place,
            remedy="reload the page and try again",
        )


class UiAccess:
    """ASGI middleware before the pages.

    `cookie_name` has the port in it: browsers send cookies to all ports of a host. `read_only`:
    changes are refused.
    """

    def __init__(
        self,
        app: ASGIApp,
        callers: Callers,
        sessions: Sessions,
        *,
        body_bytes: int,
        cookie_name: str,
        read_only: bool,
    ) -> None:
        self._app = app
        self._callers = callers
        self._sessions = sessions
        self._body_bytes = body_bytes
        self._cookie_name = cookie_name
        self._read_only = read_only
        self._changes = 0  # requests with a body that are being answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and pass it on or refuse it (ASGI)."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        try:
            answer = self._check(scope)
        except SamPollError as error:
            answer = response(error)
        guarded = self._guarded(scope, send)
        if answer is not None:
            await answer(scope, receive, guarded)
            return
        is_change = scope["method"] in _CHANGING
        self._changes += is_change
        try:
            await self._app(scope, auth.limited(receive, self._body_bytes), guarded)
        except RefusalError as error:  # the body is too long
            await response(error)(scope, receive, guarded)
        finally:
            self._changes -= is_change

    def _check(self, scope: Scope) -> Response | None:
        """Return a redirect to the login page, or None. Raises RefusalError."""
        auth.check_framing(scope)
        self._callers.check(scope)
        auth.check_length(scope, self._body_bytes)
        session = self._session_of(scope)
        path = scope["path"]
        is_free = path == _FREE[0] or path.startswith(_FREE[1])
        is_change = scope["method"] in _CHANGING
        if session is None and self._sessions.need_login and not is_free:
            return self._to_login(scope, is_change=is_change)
        scope.setdefault("state", {})
        scope["state"]["is_new"] = session is None and not self._sessions.need_login
        session = session or self._sessions.new()
        scope["state"]["session"] = session
        if is_change and path not in _OWN_FORMS:
            check_csrf(session, Headers(scope=scope).get(CSRF_HEADER, ""), place=CSRF_HEADER)
        changes_nothing = path.endswith(PREVIEW) or path in (LOGIN, LOGOUT)
        if is_change and self._read_only and not changes_nothing:
            raise ReadOnlyError(
                "this page only shows", remedy="start it without --read-only to change things"
            )
        if is_change and self._changes >= MOST_CHANGES:
            raise TooManyRequestsError(
                f"{MOST_CHANGES} changes are being made", remedy="try again", wait_s=1.0
            )
        return None

    def _session_of(self, scope: Scope) -> Session | None:
        jar: SimpleCookie = SimpleCookie()
        try:
            jar.load(Headers(scope=scope).get("cookie", ""))
        except CookieError:
            return None
        found = jar.get(self._cookie_name)
        return self._sessions.check(found.value) if found else None

    def _to_login(self, scope: Scope, *, is_change: bool) -> Response:
        headers = Headers(scope=scope)
        if scope["path"] == LOGOUT:
            return RedirectResponse(LOGIN, 303)
        if is_change or headers.get("hx-request") or "text/html" not in headers.get("accept", ""):
            # htmx follows this header; a script shows the reason.
            raised = UnauthorizedError("the session is over", remedy="log in again")
            answer = response(raised)
            answer.headers["HX-Redirect"] = LOGIN
            return answer
        return RedirectResponse(f"{LOGIN}?next={quote(scope['path'])}", 303)

    def _guarded(self, scope: Scope, send: Send) -> Send:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                is_static = scope["path"].startswith(_FREE[1])
                headers.setdefault("Cache-Control", "no-cache" if is_static else "no-store")
                state = scope.get("state", {})
                if state.get("is_new") and message["status"] < 400:
                    headers.append(
                        "Set-Cookie", self._sessions.set_cookie(self._cookie_name, state["session"])
                    )
            await send(message)

        return send_guarded


def cookie_name(port: int) -> str:
    """Return the name of the session cookie of the server on a port."""
    return f"sam_poll_ui_{port}"
