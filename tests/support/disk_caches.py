"""Disk caches of embeddings: small embeddings, and what is in a folder of them.

`python -m tests.support.disk_caches FOLDER LIMIT_BYTES FIRST COUNT` is one of several processes
that share a folder: it writes embeddings and reads them back, until it has done COUNT.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import ModelInfo, PackedEmbedding, PackedLevel, Size
from sam_poll.pipeline.disk_cache import DiskCache, EmbeddingKey

SIZE = Size(640, 480)
VALUES = 512
NETWORK = "net@1234"


def cache_of(folder: Path, limit_bytes: int = 1 << 30, network: str = NETWORK) -> DiskCache:
    return DiskCache(SafePath.at(folder), limit_bytes, network)


def embedding_of(number: int, values: int = VALUES) -> PackedEmbedding:
    """Return an embedding that is known by its content."""
    data = np.full(values, number, np.float16)
    level = PackedLevel(data.data.cast("B"), "float16", "float32", (1, values // 4, 2, 2))
    return PackedEmbedding(SIZE, 256, "float32", (level,))


NETWORK_NOW = ModelInfo("net", "sam2", 256, "cpu", "float32")


def key_of(cache: DiskCache, number: int) -> EmbeddingKey:
    return cache.key(f"picture {number}", NETWORK_NOW)


def put(cache: DiskCache, number: int) -> int:
    return cache.write(key_of(cache, number), embedding_of(number), [f"note {number}"])


def number_in(cache: DiskCache, number: int) -> int | None:
    """Return what the file of an embedding has as its content; None where there is no file."""
    found = cache.read(key_of(cache, number))
    if found is None:
        return None
    packed, notes = found
    values = np.frombuffer(packed.levels[0].data, np.float16)
    assert len(values) == VALUES
    assert (values == values[0]).all()
    assert notes == (f"note {values[0]:.0f}",)
    return int(values[0])


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> None:
    folder, limit, first, count = sys.argv[1:]
    cache = cache_of(Path(folder), int(limit))
    for number in range(int(first), int(first) + int(count)):
        put(cache, number)
        for earlier in range(max(0, number - 5), number + 1):
            assert number_in(cache, earlier) in (earlier, None)


if __name__ == "__main__":
    main()
