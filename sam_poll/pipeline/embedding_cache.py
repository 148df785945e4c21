"""Cache of embeddings by picture content.

Ten prompts for one picture cost one decoding and one encoding.
The embeddings are in device memory and are evicted when it runs short. Jobs in progress hold
theirs a little longer.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple, TypeAlias

from sam_poll.core.protocols import Embedding

Key: TypeAlias = tuple[str, int]  # a picture's digest, and the side of the encoder's input


class CachedEmbedding(NamedTuple):
    """A picture's embedding, and the notes of its decoding (`Picture.notes`)."""

    embedding: Embedding
    notes: tuple[str, ...]


class EmbeddingCache:
    """Least-recently-used cache of at most `limit_bytes`; the last embedding is always kept.

    Thread-safe.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._bytes = 0
        self._kept: OrderedDict[Key, CachedEmbedding] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Key) -> CachedEmbedding | None:
        """Return the embedding of `key`, or None where it is not cached."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Key, embedding: Embedding, notes: tuple[str, ...] = ()) -> None:
        """Add an embedding, and drop the least recently used ones beyond the limit."""
        with self._lock:
            replaced = self._kept.pop(key, None)
            self._bytes += embedding.nbytes
            if replaced:
                self._bytes -= replaced.embedding.nbytes
            self._kept[key] = CachedEmbedding(embedding, notes)
            while self._bytes > self._limit and len(self._kept) > 1:
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= dropped.embedding.nbytes

    def evict(self) -> bool:
        """Drop all embeddings. Returns whether there were any."""
        with self._lock:
            held = bool(self._kept)
            self._kept.clear()
            self._bytes = 0
            return held
