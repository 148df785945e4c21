"""The way to a Redis server: where it is, who we are to it, and what its failures mean to a pipeline.

An address may hold a password: its `repr` is empty, `shown` is without it, and no error of ours carries one of the
library's, which may quote what it was given.

What can still go wrong here: a password that is also an ordinary word is blanked out of other texts, too; a server
that is frozen, not gone, is noticed only after `_ANSWER_S`.
"""

from __future__ import annotations

import errno
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import SplitResult, parse_qsl, quote, quote_plus, unquote, urlsplit

from loguru import logger

from sam_poll.alarms import Alarms
from sam_poll.doors.redis_scheme import Speech, spoken
from sam_poll.errors import SettingsError, ShareError
from sam_poll.fs import shown

try:
    import redis
    from redis import exceptions
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ModuleNotFoundError as missing:
    raise SettingsError(
        f"Redis needs the package redis ({missing})", place="redis", remedy="pip install 'sam_poll[redis]'"
    ) from None

URL = "SAM_POLL_REDIS_URL"
"""The environment variable that names the server."""
DEFAULT = "redis://localhost:6379/0"
ALARM = "redis"
MAX_BYTES = 500 << 20  # of one value: Redis refuses more than 512 MB (proto-max-bulk-len) by closing the connection

_FORM = "redis://[user:password@]host[:port][/number]; in a password @ : / ? # % are written %40 %3A %2F %3F %23 %25"
_SCHEMES = {"redis": 6379, "rediss": 6379, "unix": 0}
_SECRETS = ("password", "ssl_password")
_CONNECT_S = 5.0
_ANSWER_S = 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_FILE_BYTES = 64 << 10
_DENIED = (exceptions.AuthenticationError, exceptions.AuthorizationError, exceptions.NoPermissionError)
T = TypeVar("T")


class Trouble(OSError):  # noqa: N818  the surroundings', nobody has made an error
    """Redis is away, full or refuses us: the surroundings' fault, not the job's. `strerror` says which way.

    `denied`: it does not know us, or does not let us; a wait alone does not help. `no_group`: it has lost the group.
    """

    def __init__(self, number: int, text: str, *, denied: bool = False, no_group: bool = False) -> None:
        super().__init__(number, text)
        self.denied, self.no_group = denied, no_group


@dataclass(frozen=True, slots=True)
class Address:
    """A server's URL, and a password beside it where it has none of its own. Made by `find` or `of`."""

    url: str = field(repr=False)
    shown: str
    password: str | None = field(default=None, repr=False)

    def hidden(self, text: str) -> str:
        """The text without any of our secrets."""
        parts = urlsplit(self.url)
        query = dict(parse_qsl(parts.query))
        secrets = [unquote(parts.password or ""), self.password or "", *(query.get(name, "") for name in _SECRETS)]
        for secret in secrets:
            for form in (secret, quote(secret), quote_plus(secret)) if secret else ():
                text = text.replace(form, "…")
        return text


def find(env: Mapping[str, str], url: str | None = None, file: Path | None = None) -> Address:
    """The server of `--url`, of the file of `--url-file`, or of the environment; none of them: the one on this
    machine. SettingsError, which never quotes it, where it is no URL."""
    if url is not None and file is not None:
        raise SettingsError("--url and --url-file are both given", place="command line", remedy="give one of the two")
    if url is not None:
        made = of(url, "--url")
        if made.hidden(made.url) != made.url:
            logger.warning(
                "others can read the password of --url in the list of processes; --url-file and {} hide it", URL
            )
        return made
    if file is not None:
        return of(_of_file(file), f"--url-file {shown(file)}")
    return of(env.get(URL, "").strip() or DEFAULT, f"environment, {URL}")


def secret(env: Mapping[str, str], name: str) -> str:
    """What the variable `name` holds. SettingsError where it holds nothing."""
    if not (found := env.get(name, "")):
        raise SettingsError("holds no password", place=f"environment, {shown(name)}")
    return found


def of(url: str, place: str, password: str | None = None) -> Address:
    """An address of a URL. SettingsError names `place`, and never the URL: a password may be anywhere in it."""
    try:
        parts = urlsplit(url)
        name = _name(parts)
    except ValueError:
        name = None
    if name is None or not url.isprintable():
        raise SettingsError("is no URL of a Redis server", place=place, remedy=_FORM)
    return Address(url, name, password or None)


def _name(parts: SplitResult) -> str | None:
    """The URL without user, password and options; None where something is odd, as it is when a password was not
    written as URLs want it and has been taken for a host, a port or a path."""
    if parts.scheme not in _SCHEMES or parts.fragment:
        return None
    if parts.scheme == "unix":
        return f"unix://{parts.path}" if parts.path else None
    number = parts.path.strip("/") or "0"
    if not parts.hostname or not number.isdecimal() or any(c.isspace() for c in parts.netloc):
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or _SCHEMES[parts.scheme]}/{number}"


def _of_file(file: Path) -> str:
    place = f"--url-file {shown(file)}"
    try:
        with file.open("rb") as opened:
            text = opened.read(_FILE_BYTES).decode("utf-8").strip()
        others = file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
    except OSError as error:
        raise SettingsError(f"cannot be read: {error.strerror}", place=place) from None
    except UnicodeDecodeError:
        raise SettingsError("is not text", place=place, remedy=_FORM) from None
    if others:
        logger.warning("{} can be read by others: `chmod 600` keeps it yours", shown(file))
    return text


class Link:
    """A server, and whether it answers. Thread-safe; the alarm `redis` lasts as long as it does not."""

    def __init__(self, address: Address, alarms: Alarms | None = None) -> None:
        self.address, self.alarms = address, alarms or Alarms()
        given: dict[str, Any] = {"password": address.password} if address.password else {}
        if not address.url.startswith("unix:"):
            given |= {"socket_keepalive": True, "socket_connect_timeout": _CONNECT_S}
        try:
            self.client: Any = redis.Redis.from_url(
                address.url,
                **given,
                socket_timeout=_ANSWER_S,
                health_check_interval=15,
                client_name="sam_poll",
                protocol=2,  # what newer releases answer in another shape
                # Whether a call was tried before decides what its answer means: nobody tries again unseen.
                retry=Retry(NoBackoff(), 0),
            )
            self.client.connection_pool.make_connection()  # connects to nothing, but reads the options
        except (TypeError, ValueError, exceptions.RedisError, OSError) as error:
            reason = address.hidden(f"its options cannot be used: {error}")
            raise SettingsError(
                reason, place=address.shown, remedy="docs/redis.md lists what may follow the ?"
            ) from None

    def prove(self, first: Callable[[], object] | None = None) -> None:
        """Ask once, and do `first`. ShareError where nobody answers, SettingsError where we, or it, are refused, or the
        URL's scheme is the wrong one."""
        if self.address.url.startswith("rediss:"):
            self._check_tls()
        try:
            self.ask(lambda client: client.ping())
            if first:
                first()
        except Trouble as error:
            if error.denied:
                remedy = "mend user and password of the URL, or the server's ACL"
                raise SettingsError(str(error.strerror), place=self.address.shown, remedy=remedy) from None
            if error.errno == errno.EIO:
                raise SettingsError(str(error.strerror), place=self.address.shown) from None
            if error.errno == errno.ENOTCONN and self.address.url.startswith("redis:"):
                self._check_no_tls()
            remedy = f"start it, or name another one: --url, --url-file, {URL}"
            if "certificate" in str(error.strerror).lower():
                remedy = "?ssl_ca_certs=FILE behind the URL names who vouches for the server's certificate"
            if error.errno == errno.ENOSPC:
                remedy = "read and delete answers, or raise maxmemory"
            raise ShareError(str(error.strerror), place=self.address.shown, remedy=remedy) from None

    def _spoken(self) -> Speech:
        given = self.client.get_connection_kwargs()
        return spoken(given.get("host", "localhost"), int(given.get("port", 6379)), _CONNECT_S)

    def _check_tls(self) -> None:
        """Find out now what the library would find out after `_ANSWER_S`, and not name."""
        found = self._spoken()
        if found is Speech.PLAIN:
            reason, remedy = "the server speaks no TLS, which rediss:// wants", "write redis://, or name its TLS port"
            raise SettingsError(reason, place=self.address.shown, remedy=remedy)
        if found is Speech.SILENT:
            reason = f"the server does not answer: no TLS handshake within {_CONNECT_S:g} s"
            remedy = "start it again; if it speaks no TLS, write redis://"
            raise ShareError(reason, place=self.address.shown, remedy=remedy)

    def _check_no_tls(self) -> None:
        if self._spoken() is Speech.TLS:
            reason, remedy = "the server speaks TLS, and redis:// does not", "write rediss://, or name its plain port"
            raise SettingsError(reason, place=self.address.shown, remedy=remedy)

    def ask(self, call: Callable[[Any], T]) -> T:
        """Do something with the client. Trouble, and nothing else, where the server does not do it."""
        with self.told():
            return call(self.client)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Turns the library's errors into Trouble."""
        try:
            yield
        except (exceptions.RedisError, OSError) as error:
            if isinstance(error, Trouble):
                raise
            raise self._trouble(error) from None

    def _trouble(self, error: Exception) -> Trouble:
        said = self.address.hidden(shown(error))
        if isinstance(error, _DENIED) or said.startswith(("NOAUTH", "WRONGPASS", "NOPERM")):
            return Trouble(errno.EACCES, f"Redis does not let us in: {said}", denied=True)
        if isinstance(error, exceptions.OutOfMemoryError) or said.startswith(("OOM", "command not allowed when used")):
            return Trouble(errno.ENOSPC, "the memory of Redis is full (maxmemory)")
        if isinstance(error, exceptions.ResponseError):
            return Trouble(errno.EIO, f"Redis refuses: {said}", no_group="NOGROUP" in said)
        return Trouble(errno.ENOTCONN, f"Redis is away: {said}")

    def away(self, error: OSError) -> None:
        """It does not answer: raise the alarm."""
        self.alarms.raise_(ALARM, f"{self.address.shown}: {error.strerror or error}")

    def here(self) -> None:
        """It answers: the alarm is over."""
        self.alarms.clear(ALARM)

    def close(self) -> None:
        """Close the connections that nobody uses."""
        with self.told():
            self.client.close()


class Pauses:
    """Growing pauses between tries, 0.5 to 30 s."""

    def __init__(self) -> None:
        self._next = _FIRST_PAUSE_S

    def wait(self, stop: threading.Event) -> None:
        """The next one; ends early with `stop`."""
        stop.wait(self._next)
        self._next = min(self._next * 2, _LONGEST_PAUSE_S)

    def over(self) -> None:
        """It has worked: the next pause is short again."""
        self._next = _FIRST_PAUSE_S
