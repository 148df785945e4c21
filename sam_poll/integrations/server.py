"""A server that jobs come through: its URL, its errors, and the alarm while it cannot be used.

A URL may hold a password: the `repr` of `ServerUrl` is without it, `shown` is the URL without user
and password, and errors quote a client library only after `ServerUrl.redact`, because the library
may repeat what it was given.

Limitations: a password that is an ordinary word is blanked out wherever that word occurs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from loguru import logger

from sam_poll.core.alarms import Alarms
from sam_poll.core.errors import SettingsError
from sam_poll.core.secret_files import read_secret, redact
from sam_poll.core.text import shown

_SECRET_OPTIONS = ("password", "ssl_password")


class ServerUnavailableError(OSError):
    """A server is unreachable, full, or refuses access: a fault of the surroundings, not of a job.

    `strerror` is the reason.
    """


@dataclass(frozen=True, slots=True)
class ServerUrl:
    """A server's URL, and a password for a URL that has none.

    `shown` is the URL without user, password and options, for logs and errors.
    """

    url: str = field(repr=False)
    shown: str
    password: str | None = field(default=None, repr=False)

    def redact(self, text: str) -> str:
        """Return the text with each password of this URL replaced by an ellipsis."""
        parts = urlsplit(self.url)
        query = dict(parse_qsl(parts.query))
        secrets = [
            unquote(parts.password or ""),
            self.password or "",
            *(query.get(name, "") for name in _SECRET_OPTIONS),
        ]
        return redact(text, secrets)


@dataclass(frozen=True, slots=True)
class ServerKind:
    """The servers that a command can use.

    - `name`: what the server is, and `form`: what its URL looks like, for errors.
    - `ports`: default ports by scheme.
    - `variables`: names of the environment variables with the URL; the first one that is set
      counts. Without any it is `default`.
    """

    name: str
    form: str
    ports: Mapping[str, int]
    variables: Sequence[str]
    default: str

    def parse(self, url: str, place: str) -> ServerUrl:
        """Parse a URL.

        Raises SettingsError with `place`, and never with the URL: a password may be anywhere in one
        that is malformed.
        """
        try:
            display = _without_secrets(urlsplit(url), self.ports)
        except ValueError:
            display = None
        if display is None or not url.isprintable():
            raise SettingsError(f"is not a URL of {self.name}", place=place, remedy=self.form)
        return ServerUrl(url, display)

    def find(
        self, env: Mapping[str, str], url: str | None = None, file: Path | None = None
    ) -> ServerUrl:
        """Return the server of `--url`, of `--url-file`, or of the environment; else the default.

        Raises SettingsError, which never quotes the URL: both flags are given, the file cannot be
        read, or its content is not a URL.
        """
        if url is not None and file is not None:
            raise SettingsError(
                "--url and --url-file are both given",
                place="command line",
                remedy="give one of the two",
            )
        if url is not None:
            address = self.parse(url, "--url")
            if address.redact(address.url) != address.url:
                logger.warning(
                    "other users can read the password of --url in the list of processes; "
                    "use --url-file or {} instead",
                    self.variables[0],
                )
            return address
        if file is not None:
            place = f"--url-file {shown(file)}"
            return self.parse(read_secret(file, place=place, remedy=self.form), place)
        for variable in self.variables:
            if env.get(variable, "").strip():
                return self.parse(env[variable].strip(), f"environment, {variable}")
        return self.parse(self.default, "default")


def _without_secrets(parts: SplitResult, ports: Mapping[str, int]) -> str | None:
    """Return the URL without user, password and options, or None for a malformed one.

    A password whose special characters are not escaped ends up in the host, the port or the path;
    so anything unusual there counts as malformed.
    """
    if parts.scheme not in ports or parts.fragment:
        return None
    if parts.scheme == "unix":
        return f"unix://{parts.path}" if parts.path else None
    name = parts.path.strip("/")
    usual = not set(name) & set("/@:")  # a virtual host of RabbitMQ
    if parts.scheme.startswith("redis"):
        name = name or "0"
        usual = name.isdecimal()
    if not usual or not parts.hostname or any(c.isspace() for c in parts.netloc):
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or ports[parts.scheme]}/{unquote(name)}"


class ServerConnection:
    """What is known of one server. Its alarm is active while the server cannot be used.

    Subclasses name the kind of the alarm, and the errors of their client library and the network.
    """

    alarm: str
    errors: tuple[type[Exception], ...]

    def __init__(self, address: ServerUrl, alarms: Alarms | None = None) -> None:
        self.address = address
        self.alarms = alarms or Alarms()

    def prove(self) -> None:
        """Check that the server answers.

        Raises ShareError if it is unreachable, SettingsError if it refuses access.
        """
        raise NotImplementedError

    def unavailable(self, error: Exception) -> ServerUnavailableError:
        """Return the error of this project for one of the library, or of the network."""
        raise NotImplementedError

    @contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Turn errors of the library, and of the network, into ServerUnavailableError."""
        try:
            yield
        except self.errors as error:
            if isinstance(error, ServerUnavailableError):
                raise
            raise self.unavailable(error) from None

    def report_unavailable(self, error: OSError) -> None:
        """Raise the alarm."""
        self.alarms.raise_(self.alarm, f"{self.address.shown}: {error.strerror or error}")

    def report_available(self, before: float = math.inf) -> None:
        """Clear the alarm, unless it began after `before`, the monotonic time of a request."""
        if all(one.kind != self.alarm or one.started <= before for one in self.alarms.active()):
            self.alarms.clear(self.alarm)
