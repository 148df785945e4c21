"""Server-sent events: an open page hears that the share has changed, and asks for what it shows.

Limitations: a browser opens six connections to one server at most, and each visible page has one.
Hidden pages close theirs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from sam_poll.integrations.ui.share_index import ShareIndex

MEDIA_TYPE = "text/event-stream"
_TICK_S = 0.5
_PING_TICKS = 10  # tells both ends that the connection is alive: page.js waits for it


async def events(
    index: ShareIndex, is_stopping: Callable[[], bool], seen: int = 0
) -> AsyncIterator[bytes]:
    """Yield the event `changed` whenever there is a new view, and `ping`, until the server stops.

    `seen`: the version of the view that the page shows.
    """
    yield b"retry: 2000\n\n"
    ticks = 0
    while not is_stopping():
        version = index.view().version
        if version != seen:
            seen = version
            yield f"event: changed\ndata: {version}\n\n".encode("ascii")
        ticks += 1
        if ticks % _PING_TICKS == 0:
            yield b"event: ping\ndata:\n\n"
        await asyncio.sleep(_TICK_S)
