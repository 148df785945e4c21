"""The stream entries that a worker works on."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from sam_poll.integrations.redis.messages import RedisRequest


@dataclass(eq=False)
class HeldEntry:
    """An entry that this worker works on.

    `tried`: its answer was sent, and the connection broke before the reply came. `lost`: another
    worker has taken it over.
    """

    entry_id: str
    attempt: int
    request: RedisRequest
    tried: bool = False
    lost: bool = False


class HeldEntries:
    """The entries that this worker works on, by id. Thread-safe."""

    def __init__(self) -> None:
        self._entries: dict[str, HeldEntry] = {}
        self._lock = threading.Lock()

    def __contains__(self, entry_id: str) -> bool:
        with self._lock:
            return entry_id in self._entries

    def add(self, entry: HeldEntry) -> None:
        """Add an entry."""
        with self._lock:
            self._entries[entry.entry_id] = entry

    def remove(self, entry: HeldEntry) -> None:
        """Remove an entry, if it is there."""
        with self._lock:
            self._entries.pop(entry.entry_id, None)

    def ids(self) -> list[str]:
        """Return the ids of all entries."""
        with self._lock:
            return list(self._entries)

    def mark_lost(self, entry_id: str) -> None:
        """Record that another worker has taken an entry over."""
        with self._lock:
            entry = self._entries.get(entry_id)
        if entry:
            entry.lost = True
