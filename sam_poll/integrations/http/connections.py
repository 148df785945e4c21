"""A protocol for uvicorn that closes unused connections.

These are connections beyond a maximum number, those on which no request arrives, and those whose
answer is not read. uvicorn waits for all three without a limit. Requests that are being worked on
have a timeout of their own (`app`).

Limitations: a client that opens connections faster than they are closed keeps others out. A limit
for each client address is a reverse proxy's task.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 512  # half of the 1,024 files that a process may usually have open
PATIENCE_S = 30.0


class Connection(H11Protocol):
    """One client's connection.

    It is closed at once if there are more than `most`, and after `patience_s` seconds in which no
    request has begun or no more of an answer was read.
    """

    patience_s: ClassVar[float] = PATIENCE_S

    def __init__(self, *args: Any, most: int = MAX_CONNECTIONS, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._most = most
        self._idle_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Start to wait for the first request."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
            return
        self._start_idle_timer(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timers."""
        for timer in (self._idle_timer, self._write_timer):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Start to wait for the next request."""
        answered = self.cycle
        super().on_response_complete()
        self._start_idle_timer(answered)

    def _start_idle_timer(self, answered: object) -> None:
        """`answered` is the request (uvicorn's `cycle`) that was answered last."""
        if self._idle_timer:
            self._idle_timer.cancel()
        self._idle_timer = self.loop.call_later(self.patience_s, self._close_idle, answered)

    def _close_idle(self, answered: object) -> None:
        if self.cycle is answered:  # not even the head of another request has arrived since
            self.transport.abort()

    def pause_writing(self) -> None:
        """Start to wait for the client to read: the network's buffers are full."""
        super().pause_writing()
        self._write_timer = self.loop.call_later(self.patience_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop to wait: the client has read more of the answer."""
        if self._write_timer:
            self._write_timer.cancel()
        super().resume_writing()
