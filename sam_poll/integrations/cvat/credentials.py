"""The credentials for a CVAT server: a token, or user and password, from the environment or a file.

They are never taken from the command line, where every user of the machine can read them, and never
shown: their `repr` is empty, and `redact` removes them from any text before it is printed.

Limitations: a token file that other users can read is only warned about, not refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from sam_poll.core.errors import SettingsError, UsageError
from sam_poll.core.secret_files import read_secret, redact
from sam_poll.core.text import shown

# Environment variables. `cvat-cli` reads the first and the last of them, too.
TOKEN = "CVAT_ACCESS_TOKEN"  # noqa: S105  a name, not a value
USER = "CVAT_USERNAME"
PASSWORD = "CVAT_PASSWORD"  # noqa: S105
CLI_PASSWORD = "PASS"  # noqa: S105

# The first part of the paths of CVAT's pages, and of its API.
_PAGES = (
    *("tasks", "jobs", "projects", "cloudstorages", "models", "requests", "analytics"),
    *("organization", "organizations", "invitations", "profile", "auth", "admin", "api"),
)
_FORM = "a token, or user:password, in one line"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A personal access token, or a user with a password; what is not given is empty."""

    token: str = field(default="", repr=False)
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    def redact(self, text: str) -> str:
        """Return the text without the secrets, which a server may quote from a request."""
        return redact(text, (self.token, self.password))


def find(environment: Mapping[str, str], file: Path | None = None) -> Credentials:
    """Return the credentials from `file` if it is given, else from the environment.

    Raises SettingsError if there are none.
    """
    if file is not None:
        return _read_file(file)
    if token := environment.get(TOKEN, "").strip():
        return Credentials(token=token)
    user, password = environment.get(USER, ""), environment.get(PASSWORD, "")
    password = password or (environment.get(CLI_PASSWORD, "") if user else "")
    if user and password:
        return Credentials(user=user, password=password)
    if user:
        reason = f"{USER} is set, {PASSWORD} is not"
    elif password:
        reason = f"{PASSWORD} is set, {USER} is not"
    else:
        reason = "there are no credentials for the CVAT server"
    raise SettingsError(
        reason,
        place="environment",
        remedy=f"set {TOKEN}, or {USER} and {PASSWORD}, or give --token-file",
    )


def host_of(host: str | None) -> str:
    """Return the server's address, without a slash at its end; `https://` is the default.

    An address copied from a browser (`https://cvat.example.org/tasks/7/jobs/12?frame=3`) is cut
    before the page's path.

    Raises UsageError if there is no address, if it has no host name or an impossible port, or if it
    contains a user or a password.
    """
    if not host or not host.strip():
        raise UsageError(
            "no CVAT server is given", place="--host", remedy="give --host, or set CVAT_HOST"
        )
    if "@" in host:
        raise UsageError(
            "the address contains a user or a password, which others can read on a command line",
            place="--host",
            remedy=f"set {TOKEN}, or {USER} and {PASSWORD}, or give --token-file",
        )
    address = re.split(r"[?#]", host.strip(), maxsplit=1)[0]
    if "://" not in address:
        address = f"https://{address}"
    if not _has_host(address):
        raise UsageError(
            f"{shown(host)!r} is no address of a server",
            place="--host",
            remedy="for example https://cvat.example.org, or http://localhost:8080",
        )
    address = address.rstrip("/")
    return re.sub(rf"(?<=[^/])/(?:{'|'.join(_PAGES)})(?:/.*)?$", "", address)


def _has_host(address: str) -> bool:
    """Return whether an address has a host name, and no port or one that exists."""
    try:
        parts = urlsplit(address)
        return bool(parts.hostname) and parts.port != 0 and address.isprintable()
    except ValueError:  # no number, or above 65535
        return False


def _read_file(file: Path) -> Credentials:
    text = read_secret(file, place=_place(file), remedy=_FORM)
    user, colon, password = text.partition(":")
    if not colon:
        return Credentials(token=text)
    if not user or not password:
        raise SettingsError(
            "has no user or no password", place=_place(file), remedy="user:password"
        )
    return Credentials(user=user, password=password)


def _place(file: Path) -> str:
    return f"--token-file {shown(file)}"
