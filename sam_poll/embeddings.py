"""The last pictures' embeddings, by content: ten prompts for one picture cost one decoding and one encoding.

What can still go wrong here: they lie on the device, where they take room until it runs out (`let_go`), and those that
jobs at work have taken with them stay a little longer.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple, TypeAlias

from sam_poll.types import Embedding

Key: TypeAlias = tuple[str, int]  # a picture's digest, and the side of the encoder's input


class Kept(NamedTuple):
    """A picture's embedding, and what its decoding had to say (`Picture.notes`)."""

    embedding: Embedding
    notes: tuple[str, ...]


class Embeddings:
    """Keeps at most `limit_bytes`, but always the last. From any thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._bytes = limit_bytes, 0
        self._kept: OrderedDict[Key, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> Kept | None:
        """None where it is not known (any more)."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Key, embedding: Embedding, notes: tuple[str, ...] = ()) -> None:
        """Remember one; the least recently used go."""
        with self._lock:
            before = self._kept.pop(key, None)
            self._bytes += embedding.nbytes - (before.embedding.nbytes if before else 0)
            self._kept[key] = Kept(embedding, notes)
            while self._bytes > self._limit and len(self._kept) > 1:
                self._bytes -= self._kept.popitem(last=False)[1].embedding.nbytes

    def let_go(self) -> bool:
        """Forget all. False: there was nothing to forget."""
        with self._lock:
            held = bool(self._kept)
            self._kept.clear()
            self._bytes = 0
            return held
