"""Connect to a Redis server, and translate errors of its client library into this project's.

Limitations: a server that is frozen, not gone, is noticed only after `_ANSWER_S`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from sam_poll.core.alarms import Alarms
from sam_poll.core.errors import SettingsError, ShareError
from sam_poll.core.text import shown
from sam_poll.integrations.redis.scheme import Protocol, detect_protocol
from sam_poll.integrations.server import (
    ServerConnection,
    ServerKind,
    ServerUnavailableError,
    ServerUrl,
)

try:
    import redis
    from redis import exceptions
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ModuleNotFoundError as missing:
    raise SettingsError(
        f"Redis needs the package redis ({missing})",
        place="redis",
        remedy="pip install 'sam_poll[redis]'",
    ) from None

URL = "SAM_POLL_REDIS_URL"
"""Environment variable with the server's URL."""
DEFAULT = "redis://localhost:6379/0"
ALARM = "redis"
"""Kind of the alarm that is active while the server cannot be used."""
MAX_BYTES = 500 << 20
"""Maximum size of one value. Redis closes the connection of a client that sends more than 512 MiB
(`proto-max-bulk-len`)."""

URL_FORM = (
    "redis://[user:password@]host[:port][/number]; "
    "in a password @ : / ? # % are written %40 %3A %2F %3F %23 %25"
)
DEFAULT_PORTS = {"redis": 6379, "rediss": 6379, "unix": 0}
_CONNECT_S = 5.0
_ANSWER_S = 30.0
_HEALTH_CHECK_S = 15
_DENIED = (
    exceptions.AuthenticationError,
    exceptions.AuthorizationError,
    exceptions.NoPermissionError,
)
_KIND = ServerKind("a Redis server", URL_FORM, DEFAULT_PORTS, [URL], DEFAULT)
find_url = _KIND.find
T = TypeVar("T")


class RedisUnavailableError(ServerUnavailableError):
    """Redis is unreachable, full, or refuses a command.

    `errno` is the kind of the reason: ENOTCONN unreachable, EACCES access refused, ENOSPC
    memory full, EIO a command refused. `denied`: authentication or authorization failed, which no
    retry mends. `no_group`: the server no longer knows the consumer group.
    """

    def __init__(
        self, number: int, text: str, *, denied: bool = False, no_group: bool = False
    ) -> None:
        super().__init__(number, text)
        self.denied = denied
        self.no_group = no_group


def password_from_env(env: Mapping[str, str], name: str) -> str:
    """Return the password in the environment variable `name`.

    SettingsError if it is missing or empty.
    """
    password = env.get(name, "")
    if not password:
        raise SettingsError(
            "holds no password",
            place=f"environment, {shown(name)}",
            remedy="set the variable, or name another one",
        )
    return password


def parse_url(url: str, place: str, password: str | None = None) -> ServerUrl:
    """Parse a URL; `password` is for a URL without one. Raises SettingsError with `place`."""
    return replace(_KIND.parse(url, place), password=password or None)


class RedisConnection(ServerConnection):
    """A client of one server.

    Thread-safe. Its alarm `redis` is active while the server cannot be used.
    """

    alarm = ALARM
    errors = (exceptions.RedisError, OSError)

    def __init__(self, address: ServerUrl, alarms: Alarms | None = None) -> None:
        super().__init__(address, alarms)
        options: dict[str, Any] = {"password": address.password} if address.password else {}
        if not address.url.startswith("unix:"):
            options |= {"socket_keepalive": True, "socket_connect_timeout": _CONNECT_S}
        try:
            self.client: Any = redis.Redis.from_url(
                address.url,
                **options,
                socket_timeout=_ANSWER_S,
                health_check_interval=_HEALTH_CHECK_S,
                client_name="sam_poll",
                protocol=2,  # replies to protocol 3 have another shape
                # No hidden retries: what a reply means depends on whether the call was tried
                # before.
                retry=Retry(NoBackoff(), 0),
            )
            # Connects to nothing, but checks the options of the URL.
            self.client.connection_pool.make_connection()
        except (TypeError, ValueError, exceptions.RedisError, OSError) as error:
            raise SettingsError(
                address.redact(f"its options cannot be used: {error}"),
                place=address.shown,
                remedy="docs/redis.md lists the options after the ?",
            ) from None

    def prove(self, first: Callable[[], object] | None = None) -> None:
        """Check that the server answers, and do `first` (a further check, or a preparation).

        Raises ShareError if the server is unreachable or full, SettingsError if it refuses access
        or a command, or if the URL's scheme is the wrong one.
        """
        if self.address.url.startswith("rediss:"):
            self._require_tls()
        try:
            self.call(lambda client: client.ping())
            if first:
                first()
        except RedisUnavailableError as error:
            self.close()
            raise self._startup_error(error) from None
        except SettingsError:
            self.close()
            raise

    def _startup_error(self, error: RedisUnavailableError) -> SettingsError | ShareError:
        """Return the error that ends a command which cannot use the server from the start."""
        reason, place = str(error.strerror), self.address.shown
        if error.denied:
            remedy = "correct user and password of the URL, or the server's ACL"
            return SettingsError(reason, place=place, remedy=remedy)
        if error.errno == errno.EIO:
            return SettingsError(reason, place=place)
        without_tls = self.address.url.startswith("redis:")
        if error.errno == errno.ENOTCONN and without_tls and self._protocol() is Protocol.TLS:
            return SettingsError(
                "the server expects TLS, which redis:// does not use",
                place=place,
                remedy="write rediss://, or name the server's port without TLS",
            )
        remedy = f"start it, or name another server: --url, --url-file, {URL}"
        if "certificate" in reason.lower():
            remedy = (
                "append ?ssl_ca_certs=FILE to the URL, "
                "with the certificate authority of the server's certificate"
            )
        if error.errno == errno.ENOSPC:
            remedy = "read and delete answers, or raise maxmemory"
        return ShareError(reason, place=place, remedy=remedy)

    def _protocol(self) -> Protocol:
        options = self.client.get_connection_kwargs()
        host, port = options.get("host", "localhost"), int(options.get("port", 6379))
        return detect_protocol(host, port, _CONNECT_S)

    def _require_tls(self) -> None:
        """Fail within seconds where the library would fail after `_ANSWER_S`, without the cause."""
        protocol = self._protocol()
        if protocol is Protocol.PLAIN:
            raise SettingsError(
                "the server does not use TLS, which rediss:// requires",
                place=self.address.shown,
                remedy="write redis://, or name the server's TLS port",
            )
        if protocol is Protocol.SILENT:
            raise ShareError(
                f"the server does not answer: no TLS handshake within {_CONNECT_S:g} s",
                place=self.address.shown,
                remedy="restart the server; if it does not use TLS, write redis://",
            )

    def call(self, command: Callable[[Any], T]) -> T:
        """Return `command(client)`. Raises RedisUnavailableError, and no error of the library."""
        with self.translated_errors():
            return command(self.client)

    def unavailable(self, error: Exception) -> RedisUnavailableError:
        """Return the error of this project for one of the library, or of the network."""
        message = self.address.redact(shown(error))
        if isinstance(error, _DENIED) or message.startswith(("NOAUTH", "WRONGPASS", "NOPERM")):
            return RedisUnavailableError(
                errno.EACCES, f"Redis refuses access: {message}", denied=True
            )
        full = message.startswith(("OOM", "command not allowed when used"))
        if full or isinstance(error, exceptions.OutOfMemoryError):
            return RedisUnavailableError(errno.ENOSPC, "the memory of Redis is full (maxmemory)")
        if isinstance(error, exceptions.ResponseError):
            return RedisUnavailableError(
                errno.EIO, f"Redis refuses the command: {message}", no_group="NOGROUP" in message
            )
        return RedisUnavailableError(errno.ENOTCONN, f"Redis is unreachable: {message}")

    def close(self) -> None:
        """Close all connections. A later call makes a new one."""
        with suppress(OSError), self.translated_errors():
            self.client.close()
