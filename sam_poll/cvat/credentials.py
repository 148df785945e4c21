"""Who we are to a CVAT server: a token, or a user and a password, out of the environment or a file.

Never off the command line, where every user of the machine can read them, and never shown: their `repr` is empty, and
`hidden` takes them out of any text before it is printed. What can still go wrong here: a token that its file's other
readers can use; that is said, not refused.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, quote_plus

from loguru import logger

from sam_poll.errors import SettingsError, UsageError
from sam_poll.fs import shown

TOKEN, USER, PASSWORD = "CVAT_ACCESS_TOKEN", "CVAT_USERNAME", "CVAT_PASSWORD"
CLI_PASSWORD = "PASS"  # noqa: S105  a name, not a value
"""Where they are looked for. The first and the last are the names that CVAT's own `cvat-cli` reads."""

_MAX_BYTES = 64 << 10
_FORM = "a token, or user:password, in one line"


@dataclass(frozen=True, slots=True)
class Credentials:
    """A personal access token, or a user with a password; the other is empty."""

    token: str = field(default="", repr=False)
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    def hidden(self, text: str) -> str:
        """The text without any of our secrets: a server may quote what it was sent."""
        for secret in (self.token, self.password):
            for form in (secret, json.dumps(secret)[1:-1], quote(secret), quote_plus(secret)) if secret else ():
                text = text.replace(form, "…")
        return text


def find(environment: Mapping[str, str], file: Path | None = None) -> Credentials:
    """The credentials of `file` where one is given, else those of the environment. SettingsError without any."""
    if file is not None:
        return _of_file(file)
    if token := environment.get(TOKEN, "").strip():
        return Credentials(token=token)
    user, password = environment.get(USER, ""), environment.get(PASSWORD, "")
    password = password or (environment.get(CLI_PASSWORD, "") if user else "")
    if user and password:
        return Credentials(user=user, password=password)
    half = f"{USER} is set, {PASSWORD} is not" if user else f"{PASSWORD} is set, {USER} is not" if password else ""
    raise SettingsError(
        half or "there are no credentials for the CVAT server",
        place="environment",
        remedy=f"set {TOKEN}, or {USER} and {PASSWORD}, or give --token-file",
    )


def host_of(host: str | None) -> str:
    """The server's address as given, without a slash at its end. UsageError where it is none, or holds a password."""
    if not host or not host.strip():
        raise UsageError("no CVAT server is named", place="--host", remedy="give --host, or set CVAT_HOST")
    address = host.strip().rstrip("/")
    if "@" in address:
        raise UsageError(
            "the address holds a user or a password, which others can read on a command line",
            place="--host",
            remedy=f"set {TOKEN}, or {USER} and {PASSWORD}, or give --token-file",
        )
    return address if "://" in address else f"https://{address}"


def _of_file(file: Path) -> Credentials:
    try:
        with file.open("rb") as opened:
            text = opened.read(_MAX_BYTES).decode("utf-8").strip()
        others = file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH)
    except OSError as error:
        raise SettingsError(f"cannot be read: {error.strerror}", place=_place(file)) from None
    except UnicodeDecodeError:
        raise SettingsError("is not text", place=_place(file), remedy=_FORM) from None
    if not text or "\n" in text or not text.isprintable():
        reason = "is empty" if not text else "holds more than one line"
        raise SettingsError(reason, place=_place(file), remedy=_FORM)
    if others:
        logger.warning("{} can be read by others: `chmod 600` keeps it yours", shown(file))
    user, colon, password = text.partition(":")
    if not colon:
        return Credentials(token=text)
    if not user or not password:
        raise SettingsError("lacks the user or the password", place=_place(file), remedy="user:password")
    return Credentials(user=user, password=password)


def _place(file: Path) -> str:
    return f"--token-file {shown(file)}"
