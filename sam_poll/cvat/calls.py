"""One request to a CVAT server: sent through `cvat_sdk`, answered, or told in one line why not.

The SDK knows the paths, makes ourselves known and carries; its models are left out on both ways, because they refuse
whatever a server of another version adds, and look at each of the millions of run lengths of a large task. Its own
repetitions are switched off: reading is tried again here, with growing pauses; writing never is, because a failed write
may have been done.

What can still go wrong here: a server that answers slowly but steadily has no limit, only one that falls silent. A
proxy that answers in a server's place is not told from it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loguru import logger

from sam_poll.cvat.credentials import Credentials
from sam_poll.errors import CvatError, ExitCode
from sam_poll.fs import shown

WORDS = 200  # characters of a server's own words in an error
_LONGEST_WAIT_S = 60.0
_KINDS = {
    401: ExitCode.CVAT_UNAUTHORIZED,
    403: ExitCode.CVAT_FORBIDDEN,
    404: ExitCode.CVAT_NOT_FOUND,
    409: ExitCode.CVAT_CONFLICT,
}
_REASONS = {
    ExitCode.CVAT_UNAUTHORIZED: "the server does not know us",
    ExitCode.CVAT_FORBIDDEN: "the server does not allow it",
    ExitCode.CVAT_NOT_FOUND: "the server has no such thing",
    ExitCode.CVAT_CONFLICT: "something else is being done to it on the server",
    ExitCode.CVAT_SERVER: "the server failed",
    ExitCode.CVAT_REFUSED: "the server does not accept it",
}
_REMEDIES = {
    ExitCode.CVAT_UNAUTHORIZED: "look at the token, or at user and password, and whether they are of this server",
    ExitCode.CVAT_FORBIDDEN: "ask for more rights there, name the organization with --org, or use another account",
    ExitCode.CVAT_NOT_FOUND: "look at the number; what lies in an organization needs --org",
    ExitCode.CVAT_CONFLICT: "wait until that has ended, and run the same command again",
    ExitCode.CVAT_SERVER: "look at the server's log, and run the same command again",
    ExitCode.CVAT_REFUSED: "look at what it says; cvat-sdk should be of the server's version",
    ExitCode.CVAT_TIMEOUT: "run the same command again, or with a larger --timeout",
    ExitCode.CVAT_UNREACHABLE: "look at the address, and at the network",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a request may be silent, in seconds, the pauses before reading is tried again, and those between looks
    at what a server works on."""

    connect_s: float = 10.0
    read_s: float = 120.0
    pauses_s: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    poll_s: float = 2.0


class FailedError(CvatError):
    """A request that failed. `transient`: another time it may not, and a write may even have been done.
    `after_s`: when the server wants to be asked again."""

    def __init__(self, reason: str, kind: ExitCode, *, transient: bool = False, after_s: float = 0.0, **more: Any):
        super().__init__(reason, kind, **more)
        self.transient, self.after_s = transient, after_s


class Calls:
    """Requests with the credentials, the time limits and the errors that all of them have."""

    def __init__(self, client: Any, credentials: Credentials, limits: Limits) -> None:
        self.client, self.limits = client, limits
        self._credentials = credentials

    def read(self, what: str, endpoint: Any, *, tries: int | None = None, **params: Any) -> Any:
        """The JSON that an endpoint answers with; tried again where that may help. `what` is the error's place."""
        return self._again(lambda: self._json(what, self._send(what, endpoint, params)), tries)

    def read_bytes(self, what: str, endpoint: Any, **params: Any) -> bytes:
        """The bytes that an endpoint answers with; tried again where that may help."""
        return self._again(lambda: self._send(what, endpoint, params), None)

    def write(self, what: str, endpoint: Any, **params: Any) -> Any:
        """Sent once. FailedError with `transient`: it may have been done."""
        body = self._send(what, endpoint, params)
        return self._json(what, body) if body else None

    def pause(self, number: int, failure: FailedError) -> bool:
        """Wait before something is tried again for the `number`-th time (from 0); False: often enough."""
        if not failure.transient or number >= len(self.limits.pauses_s):
            return False
        wait_s = min(max(self.limits.pauses_s[number], failure.after_s), _LONGEST_WAIT_S)
        logger.debug("{}; tried again in {:g} s", failure, wait_s)
        threading.Event().wait(wait_s)
        return True

    def login(self) -> None:
        """Make ourselves known. A token is not looked at before the first request."""
        who = self._credentials
        if who.user:
            self._again(lambda: self._log_in(who), None)
            return
        try:
            from cvat_sdk.core.client import AccessTokenCredentials
        except ImportError:  # before 2.47 there were no such tokens, but each user had a key
            self.client.api_client.set_default_header("Authorization", f"Token {who.token}")
        else:
            self.client.login(AccessTokenCredentials(who.token))

    def _log_in(self, who: Credentials) -> None:
        from cvat_sdk.api_client.exceptions import ApiException

        failure: FailedError
        try:
            self.client.login((who.user, who.password))
            return
        except ApiException as error:
            status = int(error.status or 0)
            # a wrong password is a bad request to CVAT
            failure = self._refusal(
                "login", 401 if status == 400 else status, error.body or "", dict(error.headers or {})
            )
        except Exception as error:  # noqa: BLE001  whatever the SDK's libraries raise
            failure = self._trouble("login", error)
        raise failure

    def _again(self, ask: Callable[[], Any], tries: int | None) -> Any:
        number = 0
        while True:
            try:
                return ask()
            except FailedError as failure:
                if (tries is not None and number + 1 >= tries) or not self.pause(number, failure):
                    raise
            number += 1

    def _send(self, what: str, endpoint: Any, params: dict[str, Any]) -> bytes:
        failure: FailedError
        try:
            response = self._call(endpoint, dict(params))
            body = bytes(response.data)
            status, headers = int(response.status), dict(response.headers)
            failure = self._refusal(what, status, body, headers)
            if 200 <= status <= 299:
                promised = _header(headers, "Content-Length")
                if not promised.isdecimal() or _header(headers, "Content-Encoding") or len(body) >= int(promised):
                    return body
                failure = _broken(what)
        except Exception as error:  # noqa: BLE001  whatever the SDK's libraries raise
            failure = self._trouble(what, error)
        raise failure  # outside of the `except`, whose exception may hold what was sent

    def _call(self, endpoint: Any, params: dict[str, Any]) -> Any:
        """`body` is the body, what the path names goes into it, the rest is the query."""
        body, path = params.pop("body", None), endpoint.path
        named = {key: params.pop(key) for key in list(params) if f"{{{key}}}" in path}
        _, response = self.client.api_client.call_api(
            path,
            endpoint.settings["http_method"],
            path_params=named,
            query_params=list(params.items()),
            header_params={"Accept": "application/vnd.cvat+json", "Content-Type": "application/json"},
            body=body,
            auth_settings=endpoint.settings["auth"],
            _parse_response=False,
            _check_status=False,
        )
        return response

    def _json(self, what: str, body: bytes) -> Any:
        try:
            return json.loads(body)
        except ValueError:
            if body.lstrip()[:1] in (b"{", b"["):
                failure = _broken(what)
            else:
                reason = f"something answers there, but not a CVAT server: {self._words(body)!r}"
                remedy = _REMEDIES[ExitCode.CVAT_UNREACHABLE]
                failure = FailedError(reason, ExitCode.CVAT_UNREACHABLE, place=what, remedy=remedy)
        raise failure

    def _refusal(self, what: str, status: int, body: Any, headers: dict[str, str]) -> FailedError:
        kind = _KINDS.get(status, ExitCode.CVAT_SERVER if status >= 500 else ExitCode.CVAT_REFUSED)
        words = self._words(body)
        reason = f"{_REASONS[kind]} (HTTP {status}{': ' + words if words else ''})"
        remedy = _REMEDIES.get(kind)
        if 300 <= status <= 399:
            elsewhere = shown(_header(headers, "Location"))[:WORDS]
            reason, remedy = f"the server is somewhere else (HTTP {status}: {elsewhere})", "give that address"
        if status == 413:
            remedy = "a proxy before CVAT takes no requests of this size: raise its limit (nginx: client_max_body_size)"
        after = _header(headers, "Retry-After")
        return FailedError(
            reason,
            kind,
            transient=status >= 500 or status == 429,
            after_s=float(after) if after.isdecimal() else 0.0,
            place=what,
            remedy=remedy,
        )

    def _trouble(self, what: str, error: Exception) -> FailedError:
        """What urllib3 or the SDK raised, in our words."""
        from urllib3 import exceptions as u

        cause: BaseException = error
        while isinstance(cause, u.MaxRetryError) and cause.reason is not None:
            cause = cause.reason
        if isinstance(cause, u.SSLError):
            remedy = "let SSL_CERT_FILE name the file with its certificate authority"
            if "WRONG_VERSION_NUMBER" in str(cause):
                remedy = "it does not speak HTTPS there: look at the address, or give it with http://"
            reason = f"the server cannot be trusted: {self._words(str(cause))}"
            return FailedError(reason, ExitCode.CVAT_UNREACHABLE, place=what, remedy=remedy)
        if isinstance(cause, (u.ConnectTimeoutError, u.ReadTimeoutError)) and not isinstance(
            cause, u.NewConnectionError
        ):
            silent = self.limits.connect_s if isinstance(cause, u.ConnectTimeoutError) else self.limits.read_s
            reason, kind = f"the server was silent for {silent:g} s", ExitCode.CVAT_TIMEOUT
            return FailedError(reason, kind, transient=True, place=what, remedy=_REMEDIES[kind])
        if isinstance(cause, u.NewConnectionError):
            reason, kind = f"the server cannot be reached: {_cause(cause)}", ExitCode.CVAT_UNREACHABLE
            return FailedError(reason, kind, transient=True, place=what, remedy=_REMEDIES[kind])
        if isinstance(cause, (u.ProtocolError, u.DecodeError, u.IncompleteRead, ConnectionError)):
            return _broken(what)
        reason = f"the request did not get through: {type(cause).__name__}: {self._words(str(cause))}"
        return FailedError(
            reason, ExitCode.CVAT_REFUSED, place=what, remedy="cvat-sdk should be of the server's version"
        )

    def _words(self, said: Any) -> str:
        """What the server said, short, in one line, and without our secrets."""
        text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
        text = " ".join(self._credentials.hidden(text).split())
        if text[:1] == "<":
            return "a web page"
        return shown(text if len(text) <= WORDS else text[: WORDS - 1] + "…")


def _header(headers: dict[str, str], name: str) -> str:
    return next((str(value) for key, value in headers.items() if key.lower() == name.lower()), "")


def _broken(what: str) -> FailedError:
    kind = ExitCode.CVAT_UNREACHABLE
    reason = "the connection broke off before the answer was whole"
    return FailedError(reason, kind, transient=True, place=what, remedy="run the same command again")


def _cause(error: BaseException) -> str:
    """`[Errno 111] Connection refused` of urllib3's long sentence."""
    return shown(str(error).rpartition(": ")[2])[:WORDS]
