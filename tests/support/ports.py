"""Free ports of this machine, for servers of tests.

Two test processes never choose the same one: a port is only taken seconds later, when its server
has started. None is of those that the kernel gives to clients, which may take a port while its
server restarts, or even connect to themselves.
"""

from __future__ import annotations

import os
import random
import socket
from contextlib import ExitStack, suppress

_FIRST = 20_000  # Linux gives clients those from 32,768
_FOR_EACH = 1_000
_PROCESSES = 12
_choice = random.SystemRandom()  # `random` itself is seeded alike in all test processes


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 on which nothing listens, no two alike."""
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % _PROCESSES
    found: list[int] = []
    with ExitStack() as held:
        while len(found) < count:
            port = _FIRST + _FOR_EACH * number + _choice.randrange(_FOR_EACH)
            with suppress(OSError):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
                found.append(port)
    return found


def free_port() -> int:
    """Return one such port."""
    return free_ports(1)[0]
