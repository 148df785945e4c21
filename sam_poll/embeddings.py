"""The last pictures' embeddings, by content: ten prompts for one picture cost one encoding. Device thread only.

What can still go wrong here: they lie on the device, where they take room until it runs out (`let_go`).
"""

from __future__ import annotations

from collections import OrderedDict

from sam_poll.types import Embedding


class Embeddings:
    """Keeps at most `limit_bytes`, but always the last. Keys are a picture's digest and the side it is made at."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._bytes = limit_bytes, 0
        self._kept: OrderedDict[tuple[str, int], Embedding] = OrderedDict()

    def get(self, key: tuple[str, int]) -> Embedding | None:
        """None where it is not known (any more)."""
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: tuple[str, int], embedding: Embedding) -> None:
        """Remember one; the least recently used go."""
        before = self._kept.pop(key, None)
        self._bytes += embedding.nbytes - (before.nbytes if before else 0)
        self._kept[key] = embedding
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def let_go(self) -> bool:
        """Forget all. False: there was nothing to forget."""
        held = bool(self._kept)
        self._kept.clear()
        self._bytes = 0
        return held
