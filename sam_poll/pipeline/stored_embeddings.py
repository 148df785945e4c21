"""What the stages of the pipeline, and the predictor, do with the disk cache of embeddings."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from loguru import logger

from sam_poll.core.errors import SamPollError
from sam_poll.core.files import remedy_of
from sam_poll.core.protocols import Embedding, Engine
from sam_poll.core.stats import CacheEvent
from sam_poll.core.text import shown
from sam_poll.core.types import ModelInfo, PackedEmbedding
from sam_poll.pipeline.disk_cache import DamagedFileError, DiskCache, EmbeddingKey
from sam_poll.pipeline.embedding_cache import CachedEmbedding


class StoredEmbedding(NamedTuple):
    """An embedding of this engine that is, or is to be, on the disk.

    `packed` is None where it is there already.
    """

    key: EmbeddingKey
    cached: CachedEmbedding
    packed: PackedEmbedding | None = None


class StoredEmbeddings:
    """Finds and keeps the embeddings of one engine in a disk cache. Without one it does nothing.

    No error of the disk reaches a job: its picture is then encoded. It is logged once, until the
    disk works again. `count` is called with each event.
    """

    def __init__(
        self, engine: Engine, disk: DiskCache | None, count: Callable[[CacheEvent, int], None]
    ) -> None:
        self._engine = engine
        self._disk = disk
        self._count = count
        self._lock = threading.Lock()
        self._failing = False

    @property
    def enabled(self) -> bool:
        """Whether there is a disk cache."""
        return self._disk is not None

    def find(self, picture: str, info: ModelInfo, max_pixels: int) -> StoredEmbedding | None:
        """Return the embedding of a picture, by its digest, at the precision and side of `info`.

        On any thread. A picture of more than `max_pixels` is not found, so that it is decoded, and
        refused.
        """
        if self._disk is None:
            return None
        key = self._disk.key(picture, info)
        try:
            found = self._disk.read(key)
        except DamagedFileError as error:
            logger.warning("{} is damaged ({}): it is computed again", self._place(key), error)
            self._count("damaged", 1)
            return None
        except OSError as error:
            self._fail(error)
            return None
        embedding = self._engine.unpack(found[0]) if found else None
        if found is None or embedding is None or math.prod(embedding.frame.size) > max_pixels:
            self._count("miss", 1)
            return None
        self._count("hit", 1)
        return StoredEmbedding(key, CachedEmbedding(embedding, found[1]))

    def take(self, picture: str, embedding: Embedding, notes: Sequence[str]) -> StoredEmbedding:
        """Return a new embedding as it is to be written, and as it will be read. Device thread.

        It is to be used as it will be read, so that the answer is the same with and without the
        file.
        """
        assert self._disk is not None
        packed = self._engine.pack(embedding)
        read = self._engine.unpack(packed) or embedding
        # The engine may be on another step by now.
        info = replace(self._engine.info, precision=packed.precision, side=packed.side)
        key = self._disk.key(picture, info)
        return StoredEmbedding(key, CachedEmbedding(read, tuple(notes)), packed)

    def keep(self, stored: StoredEmbedding) -> bool:
        """Write an embedding, unless it is on the disk already; return whether it is there."""
        if self._disk is None or stored.packed is None:
            return self._disk is not None
        try:
            removed = self._disk.write(stored.key, stored.packed, stored.cached.notes)
        except ValueError as error:
            self._complain(f"{error}, cache.disk_mib: no embedding is kept")
            return False
        except OSError as error:
            self._fail(error)
            return False
        self._failing = False
        self._count("written", 1)
        if removed:
            self._count("removed", removed)
        return True

    def _fail(self, error: OSError) -> None:
        self._count("failed", 1)
        reason = f"embeddings cannot be kept: {error.strerror or error}"
        assert self._disk is not None
        place = shown(str(self._disk.folder))
        self._complain(str(SamPollError(reason, place=place, remedy=remedy_of(error))))

    def _complain(self, message: str) -> None:
        with self._lock:
            is_known, self._failing = self._failing, True
        if not is_known:
            logger.warning("{}", message)

    def _place(self, key: EmbeddingKey) -> str:
        assert self._disk is not None
        return shown(str(self._disk.folder / key.name))
