"""Detect whether a server uses TLS, to report a wrong `redis://` or `rediss://` at once.

A Redis server without TLS takes the first bytes of a TLS handshake for half a line of text, and
waits for the rest of it. So when the handshake fails, the server is sent a command in plain text,
too.

Limitations: a server that answers neither is only known to be silent.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import ssl

_PLAIN_S = 2.0  # timeout for the reply to one command
_TLS_ALERT = (
    b"\x15"  # first byte of a TLS server's reply to plain text, if it does not just hang up
)


class Protocol(enum.Enum):
    """How a server talks to its clients."""

    TLS = "TLS"
    PLAIN = "plain"
    SILENT = "silent"
    """It accepts connections, and does not reply in time."""
    UNKNOWN = "unknown"
    """It cannot be reached, or closes the connection."""


def detect_protocol(host: str, port: int, limit_s: float) -> Protocol:
    """Connect to `host`:`port` and return what the server uses. Sends no secret.

    `limit_s`: timeout of the TLS handshake in seconds.
    """
    tls = _try_tls(host, port, limit_s)
    if tls is Protocol.TLS:
        return tls
    plain = _try_plain(host, port)
    return plain if plain is Protocol.PLAIN else tls


def _try_tls(host: str, port: int, limit_s: float) -> Protocol:
    # The certificate does not matter here: nothing is sent, and the real connection verifies it.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        with (
            socket.create_connection((host, port), timeout=limit_s) as opened,
            context.wrap_socket(opened, server_hostname=host),
        ):
            return Protocol.TLS
    except TimeoutError:
        return Protocol.SILENT
    except (OSError, ValueError):  # ValueError: TLS does not accept the host name
        return Protocol.UNKNOWN


def _try_plain(host: str, port: int) -> Protocol:
    with (
        contextlib.suppress(OSError),
        socket.create_connection((host, port), timeout=_PLAIN_S) as opened,
    ):
        opened.sendall(b"PING\r\n")
        reply = opened.recv(16)
        if reply and not reply.startswith(_TLS_ALERT):
            return Protocol.PLAIN
    return Protocol.UNKNOWN
