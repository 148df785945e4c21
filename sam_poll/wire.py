"""What the processes of a fleet say to each other, over a pair of sockets: tuples, pickled, in order.

Only a process and the one it has started hold the two ends, so that nobody else can put a pickle in.

What can still go wrong here: the other side ends at any moment; sending then does nothing, receiving says EOFError.
"""

from __future__ import annotations

import pickle
import threading
from multiprocessing.connection import Connection
from typing import Any


class Wire:
    """One end. Any thread may send; one receives."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, *message: Any) -> None:
        """Say something; whoever listens no more is not told."""
        with self._lock:
            try:
                self._connection.send(message)
            except (OSError, ValueError):  # gone, or closed here
                return

    def receive(self) -> tuple[Any, ...]:
        """The next message. EOFError: the other side has ended."""
        try:
            message: tuple[Any, ...] = self._connection.recv()
        except (OSError, EOFError) as error:
            raise EOFError from error
        return message

    def close(self) -> None:
        """Hear and say no more."""
        with self._lock:
            self._connection.close()


def portable(error: Exception) -> Exception:
    """The error itself where it can travel, else one that says the same."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  our own bytes
    except Exception:  # noqa: BLE001  whatever it is made of, its words can travel
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
