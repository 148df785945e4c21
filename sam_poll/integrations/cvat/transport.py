"""One request to a CVAT server: sent by `httpx`, retried if it reads, reported if it fails.

`cvat_sdk` is not used here: its models refuse every field that a server of another version has
added, and check each of the millions of run lengths of a large task. Requests that read are
retried, with growing delays; requests that write never are, because the server may have carried out
a write whose answer was lost.

Limitations: the timeout is for silence, so a server that answers slowly but steadily has no limit.
A proxy that answers in the server's place cannot be told from the server. Proxies of the
environment (HTTPS_PROXY) are not used.
"""

from __future__ import annotations

import json
import re
import ssl
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from loguru import logger

from sam_poll import __version__
from sam_poll.core.errors import CvatError, ExitCode
from sam_poll.core.text import shown
from sam_poll.integrations.cvat.credentials import Credentials

_MAX_QUOTED = 200  # characters of a server's own text in an error
_MAX_DELAY_S = 60.0
_LOGIN = "/api/auth/login"
_ACCESS_TOKENS = (2, 47)  # the first version of the server with personal access tokens
_KINDS = {
    401: ExitCode.CVAT_UNAUTHORIZED,
    403: ExitCode.CVAT_FORBIDDEN,
    404: ExitCode.CVAT_NOT_FOUND,
    409: ExitCode.CVAT_CONFLICT,
}
_REASONS = {
    ExitCode.CVAT_UNAUTHORIZED: "authentication failed",
    ExitCode.CVAT_FORBIDDEN: "this account has no permission for the request",
    ExitCode.CVAT_NOT_FOUND: "not found on the server",
    ExitCode.CVAT_CONFLICT: "the server is busy with another operation on the same object",
    ExitCode.CVAT_SERVER: "the server failed",
    ExitCode.CVAT_REFUSED: "the server refused the request",
}
_REMEDIES = {
    ExitCode.CVAT_UNAUTHORIZED: "check that the token, or user and password, is of this server",
    ExitCode.CVAT_FORBIDDEN: "get more rights there (a token may be read-only), "
    "name the organization with --org, or use another account",
    ExitCode.CVAT_NOT_FOUND: "check the number; a task of an organization needs --org",
    ExitCode.CVAT_CONFLICT: "wait until that has ended, and run the same command again",
    ExitCode.CVAT_SERVER: "check the server's log, and run the same command again",
    ExitCode.CVAT_REFUSED: "check the server's message",
    ExitCode.CVAT_TIMEOUT: "run the same command again, or with a larger --timeout",
    ExitCode.CVAT_UNREACHABLE: "check the address, and the network",
}


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """Timeouts and delays in seconds.

    `connect_s` and `read_s` limit how long a request may be silent; `retry_delays_s` are the delays
    before each retry of a request that reads; `poll_s` is the delay between two requests for
    the state of an import.
    """

    connect_s: float = 10.0
    read_s: float = 120.0
    retry_delays_s: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    poll_s: float = 2.0


class RequestFailedError(CvatError):
    """A request that failed.

    `transient`: the same request may succeed later, and a write may have been carried out.
    `too_large`: a request with less in it may succeed (HTTP 413).
    `retry_after_s`: the delay that the server asks for.
    """

    def __init__(
        self,
        reason: str,
        kind: ExitCode,
        *,
        transient: bool = False,
        too_large: bool = False,
        retry_after_s: float = 0.0,
        place: str | None = None,
        remedy: str | None = None,
    ):
        super().__init__(reason, kind, place=place, remedy=remedy)
        self.transient = transient
        self.too_large = too_large
        self.retry_after_s = retry_after_s


class Transport:
    """Sends requests with the credentials, timeouts and errors that all of them share.

    `place` names the request in errors, `path` is that of the API, and further arguments go into
    the query.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        limits: RequestLimits,
        organization: str | None = None,
    ) -> None:
        import httpx

        self.limits = limits
        self._credentials = credentials
        headers = {
            "Accept": "application/vnd.cvat+json",
            "Content-Type": "application/json",
            "User-Agent": f"sam_poll/{__version__}",
        }
        if organization is not None:
            headers["X-Organization"] = organization
        # No redirect is followed: it would carry the credentials to whatever host it names.
        self._http = httpx.Client(
            base_url=address,
            headers=headers,
            timeout=httpx.Timeout(limits.read_s, connect=limits.connect_s),
            verify=ssl.create_default_context(),
            trust_env=False,
        )
        weakref.finalize(self, self._http.close)

    def read_json(self, place: str, path: str, *, tries: int | None = None, **query: Any) -> Any:
        """Return the JSON of a path; a transient failure is retried, up to `tries` tries."""
        return self._retry(
            lambda: self._parse_json(place, self._send(place, "GET", path, query)), tries
        )

    def read_bytes(self, place: str, path: str, *, tries: int | None = None, **query: Any) -> bytes:
        """Return the bytes of a path; a transient failure is retried, up to `tries` tries."""
        return self._retry(lambda: self._send(place, "GET", path, query), tries)

    def write(self, place: str, method: str, path: str, content: Any, **query: Any) -> Any:
        """Send JSON that changes something, once, and return the answer's JSON or None.

        Raises RequestFailedError; if it is `transient`, the change may have been made.
        """
        body = self._send(place, method, path, query, content)
        return self._parse_json(place, body) if body else None

    def write_nothing(self, place: str, method: str, path: str, content: Any, **query: Any) -> None:
        """Send JSON that changes nothing, as `write` does; a transient failure is retried."""
        self._retry(lambda: self.write(place, method, path, content, **query), None)

    def wait_before_retry(self, retries: int, failure: RequestFailedError) -> bool:
        """Wait before the next retry; `retries` is the number of earlier ones.

        Returns False at once if the failure is permanent or all retries are used up.
        """
        if not failure.transient or retries >= len(self.limits.retry_delays_s):
            return False
        delay_s = max(self.limits.retry_delays_s[retries], failure.retry_after_s)
        delay_s = min(delay_s, _MAX_DELAY_S)
        logger.debug("{}; retry in {:g} s", failure, delay_s)
        threading.Event().wait(delay_s)
        return True

    def login(self, server: str) -> None:
        """Log in to a server of this version.

        A token is only set here; the first request proves whether it is valid.
        """
        if self._credentials.user:
            self._retry(self._log_in, None)
            return
        # Servers before 2.47 know no access tokens, but each of their users has an API key.
        kind = "Token" if _is_before(server, _ACCESS_TOKENS) else "Bearer"
        if not fits_header(self._credentials.token):
            unauthorized = ExitCode.CVAT_UNAUTHORIZED
            reason = "the token has characters that no token has"
            raise RequestFailedError(
                reason, unauthorized, place="login", remedy=_REMEDIES[unauthorized]
            )
        self._http.headers["Authorization"] = f"{kind} {self._credentials.token}"

    def _log_in(self) -> None:
        content = {"username": self._credentials.user, "password": self._credentials.password}
        answer = self._exchange("login", "POST", _LOGIN, {}, content)
        del content  # a traceback may show it
        if isinstance(answer, RequestFailedError):
            raise answer
        # The session is in the client's cookies; Django wants proof that they were not sent by
        # another site's page.
        self._http.headers["X-CSRFToken"] = self._csrf_token()
        url = self._http.base_url
        self._http.headers["Origin"] = f"{url.scheme}://{url.netloc.decode('ascii')}"

    def _csrf_token(self) -> str:
        """Return the token that the server compares with its cookie, or an empty text."""
        cookies = [one for one in self._http.cookies.jar if one.name == "csrftoken"]
        # That of the shortest path is sent last, and Django takes the last.
        value = min(cookies, key=lambda one: len(one.path)).value if cookies else None
        return value if value and fits_header(value) else ""

    def _retry(self, request: Callable[[], Any], tries: int | None) -> Any:
        retries = 0
        while True:
            try:
                return request()
            except RequestFailedError as failure:
                last = tries is not None and retries + 1 >= tries
                if last or not self.wait_before_retry(retries, failure):
                    raise
            retries += 1

    def _send(
        self, place: str, method: str, path: str, query: dict[str, Any], content: Any = None
    ) -> bytes:
        answer = self._exchange(place, method, path, query, content)
        if isinstance(answer, RequestFailedError):
            raise answer
        return answer

    def _exchange(
        self, place: str, method: str, path: str, query: dict[str, Any], content: Any
    ) -> bytes | RequestFailedError:
        """Send a request and return the answer's body, or its failure.

        The failure is raised elsewhere: the exception that is caught here holds what was sent, and
        the credentials with it.
        """
        import httpx

        body = None if content is None else json.dumps(content)
        try:
            response = self._http.request(method, path, params=query, content=body)
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            return self._connection_error(place, error)
        status = response.status_code
        if path == _LOGIN and status == 400:  # CVAT answers a wrong password with "bad request"
            status = 401
        if 200 <= status <= 299:
            return response.content
        return self._http_error(place, status, response.content, response.headers)

    def _parse_json(self, place: str, body: bytes) -> Any:
        try:
            return json.loads(body)
        except ValueError:
            if body.lstrip()[:1] in (b"{", b"["):
                failure = _cut_off(place)
            else:
                reason = f"the address answers, but is not a CVAT server: {self._quote(body)!r}"
                kind = ExitCode.CVAT_UNREACHABLE
                failure = RequestFailedError(reason, kind, place=place, remedy=_REMEDIES[kind])
        # Raised outside of `except`: the caught exception holds the answer.
        raise failure

    def _http_error(
        self, place: str, status: int, body: bytes, headers: Mapping[str, str]
    ) -> RequestFailedError:
        """Return the error for an answer with this HTTP status."""
        kind = _KINDS.get(status, ExitCode.CVAT_SERVER if status >= 500 else ExitCode.CVAT_REFUSED)
        message = self._quote(body)
        reason = f"{_REASONS[kind]} (HTTP {status}{': ' + message if message else ''})"
        remedy = _REMEDIES.get(kind)
        if 300 <= status <= 399:
            location = shown(headers.get("Location", ""))[:_MAX_QUOTED]
            reason = f"the server redirects to another address (HTTP {status}: {location})"
            remedy = "give that address"
        if status == 413:
            remedy = (
                "a proxy in front of CVAT refuses requests of this size: "
                "raise its limit (nginx: client_max_body_size)"
            )
        retry_after = headers.get("Retry-After", "")
        return RequestFailedError(
            reason,
            kind,
            transient=status >= 500 or status == 429,
            too_large=status == 413,
            retry_after_s=float(retry_after) if retry_after.isdecimal() else 0.0,
            place=place,
            remedy=remedy,
        )

    def _connection_error(self, place: str, error: Exception) -> RequestFailedError:
        """Return the error for what httpx raised."""
        import httpx

        for cause in _causes(error):
            if isinstance(cause, ssl.SSLError):
                return self._tls_error(place, cause)
        if isinstance(error, httpx.ConnectTimeout):
            return _timeout(place, self.limits.connect_s)
        if isinstance(error, httpx.TimeoutException):
            return _timeout(place, self.limits.read_s)
        if isinstance(error, httpx.ConnectError):
            reason = f"the server cannot be reached: {shown(str(error))[:_MAX_QUOTED]}"
            kind = ExitCode.CVAT_UNREACHABLE
            return RequestFailedError(
                reason, kind, transient=True, place=place, remedy=_REMEDIES[kind]
            )
        if isinstance(error, (httpx.NetworkError, httpx.RemoteProtocolError, httpx.DecodingError)):
            return _cut_off(place)
        reason = f"the request cannot be sent: {type(error).__name__}: {self._quote(str(error))}"
        return RequestFailedError(
            reason, ExitCode.CVAT_REFUSED, place=place, remedy="check the address"
        )

    def _tls_error(self, place: str, error: Exception) -> RequestFailedError:
        remedy = "let SSL_CERT_FILE name the file with its certificate authority"
        if "WRONG_VERSION_NUMBER" in str(error):
            remedy = "the server does not use HTTPS there: check the address, or give http://"
        detail = self._quote(str(error))
        reason = f"TLS failed, or the server's certificate is not trusted: {detail}"
        return RequestFailedError(reason, ExitCode.CVAT_UNREACHABLE, place=place, remedy=remedy)

    def _quote(self, message: Any) -> str:
        """Return a server's message, short, in one line, and without the credentials."""
        text = message.decode("utf-8", "replace") if isinstance(message, bytes) else str(message)
        text = " ".join(self._credentials.redact(text).split())
        if text[:1] == "<":
            return "a web page"
        return shown(text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 1] + "…")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def fits_header(text: str) -> bool:
    """Return whether a text can be the value of a header. The errors of httpx would quote it."""
    return text.isascii() and text.isprintable() and text == text.strip()


def _is_before(server: str, version: tuple[int, int]) -> bool:
    """Return whether a server's version (`2.46.1`) is older than another; unknown ones are not."""
    numbers = re.match(r"(\d+)\.(\d+)", server)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < version


def _cut_off(place: str) -> RequestFailedError:
    return RequestFailedError(
        "the connection was closed before the answer was complete",
        ExitCode.CVAT_UNREACHABLE,
        transient=True,
        place=place,
        remedy="run the same command again",
    )


def _timeout(place: str, limit_s: float) -> RequestFailedError:
    kind = ExitCode.CVAT_TIMEOUT
    return RequestFailedError(
        f"the server did not answer within {limit_s:g} s",
        kind,
        transient=True,
        place=place,
        remedy=_REMEDIES[kind],
    )
