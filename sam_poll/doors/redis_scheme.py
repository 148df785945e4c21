"""Tell whether a server speaks TLS, so that `redis://` and `rediss://` taken for each other are told at once.

A plain Redis server takes the first bytes of a TLS handshake for half a line, and waits for the rest of it. So where
the handshake fails the server is asked in plain text, too.

Limitations: what answers neither is only known to be silent.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import ssl

_PLAIN_S = 2.0  # for the answer to one word
_TLS_ALERT = b"\x15"  # how a TLS server answers plain text, if it does not just hang up


class Speech(enum.Enum):
    """What a server has been found to speak."""

    TLS = "TLS"
    PLAIN = "plain"
    SILENT = "silent"
    """It takes connections, and answers nothing in time."""
    UNKNOWN = "unknown"
    """It cannot be reached, or hangs up."""


def spoken(host: str, port: int, limit_s: float) -> Speech:
    """Ask the server at `host` and `port`, within `limit_s` seconds for a handshake. No secret is sent."""
    tls = _tls(host, port, limit_s)
    if tls is Speech.TLS:
        return tls
    plain = _plain(host, port)
    return plain if plain is Speech.PLAIN else tls


def _tls(host: str, port: int, limit_s: float) -> Speech:
    # Whose certificate it is does not matter here: nothing is sent, and the real connection verifies it.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout=limit_s) as opened,
            context.wrap_socket(opened, server_hostname=host),
        ):
            return Speech.TLS
    except TimeoutError:
        return Speech.SILENT
    except (OSError, ValueError):  # ValueError: no name that TLS knows
        return Speech.UNKNOWN


def _plain(host: str, port: int) -> Speech:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=_PLAIN_S) as opened:
        opened.sendall(b"PING\r\n")
        answer = opened.recv(16)
        if answer and not answer.startswith(_TLS_ALERT):
            return Speech.PLAIN
    return Speech.UNKNOWN
