"""The channel between a worker process and its parent: pickled messages over a socket pair.

Only a process and the child it has started hold the two ends, so no other process can send a
pickle.

The other side may end at any moment; sending then does nothing, and receiving raises EOFError.
"""

from __future__ import annotations

import pickle
import threading
from multiprocessing.connection import Connection

from sam_poll.pipeline.messages import Message


class Channel:
    """One end of the channel. Any thread may send; one thread receives."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Send a message; it is dropped if the other side has ended."""
        with self._lock:
            try:
                self._connection.send(message)
            except (OSError, ValueError):  # the other end, or this one, is closed
                return

    def receive(self) -> Message:
        """Return the next message. Raises EOFError when the other side has ended."""
        try:
            message: Message = self._connection.recv()
        except (OSError, EOFError) as error:
            raise EOFError from error
        return message

    def close(self) -> None:
        """Close this end."""
        with self._lock:
            self._connection.close()


def picklable(error: Exception) -> Exception:
    """Return `error` if it can be pickled, else a RuntimeError with the same text."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  our own bytes
    except Exception:  # noqa: BLE001  whatever it is made of, its text can be sent
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
