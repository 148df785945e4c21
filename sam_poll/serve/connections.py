"""Connections that nobody uses are ended: too many of them, one without a request, one whose answer is not taken.

uvicorn waits for all three as long as the other side likes. What is inside has a time of its own (`web`).

What can still go wrong here: who opens connections faster than they are ended keeps the others out. So much for each
address is a proxy's business.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 512  # half of the 1,024 files that a process may usually have open
PATIENCE_S = 30.0


class Connection(H11Protocol):
    """One caller's. Not kept beyond `most` of them, and cut after `patience_s` in which no request has begun, or
    nothing more of an answer was taken."""

    patience_s: ClassVar[float] = PATIENCE_S

    def __init__(self, *given: Any, most: int = MOST, **more: Any) -> None:
        super().__init__(*given, **more)
        self._most = most
        self._silent: asyncio.TimerHandle | None = None
        self._untaken: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begins to wait for a request."""
        super().connection_made(transport)
        if len(self.connections) > self._most:
            transport.abort()
            return
        self._expect(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        for timer in (self._silent, self._untaken):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        answered = self.cycle
        super().on_response_complete()
        self._expect(answered)

    def _expect(self, answered: object) -> None:
        if self._silent:
            self._silent.cancel()
        self._silent = self.loop.call_later(self.patience_s, self._cut_silent, answered)

    def _cut_silent(self, answered: object) -> None:
        if self.cycle is answered:  # not even a request's head has come since
            self.transport.abort()

    def pause_writing(self) -> None:
        """More of an answer is here than the network takes."""
        super().pause_writing()
        self._untaken = self.loop.call_later(self.patience_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It takes more."""
        if self._untaken:
            self._untaken.cancel()
        super().resume_writing()
