"""Embeddings on a disk: a picture that was encoded once costs the decoder only, after restarts too.

One file for each embedding, in one folder that several processes, also of several machines, may
share. Its name is a digest of all that the embedding depends on (`EmbeddingKey`). A file is written
under a temporary name and renamed, and ends with a checksum of its content: it is whole, or it is
not used. Its time of modification is that of its last use; the files that were not used for the
longest time are removed to make room.

    bytes       content
    25          `sam_poll embedding 1`, a line feed, and the header's length, 4 bytes
    …           the header: JSON, see `_head`
    …           the tensors, one after the other, in half precision
    4           CRC-32 of everything before; numbers are little endian

Limitations: each process measures the folder from time to time only. Where more than four processes
write at the same moment, the folder may exceed its limit by 1/64, or one file, for each further
one, until the next measurement. Files are not flushed to the disk: after a power cut some may be
damaged, and are computed again. A user who may write to the folder can exchange embeddings.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import struct
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from sam_poll.core.files import TEMP_PREFIX, parse_json
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import ModelInfo, PackedEmbedding, PackedLevel, Size

# Raised whenever the same picture and network give another embedding than before.
FORMAT = 1
_MAGIC = f"sam_poll embedding {FORMAT}\n".encode()
_LENGTH = struct.Struct("<I")
_CHECK = struct.Struct("<I")
_NAME = re.compile(r"[0-9a-f]{32}\.embedding")
_ITEM_BYTES = {"float16": 2, "bfloat16": 2}
_MAX_BYTES = 256 << 20  # of a file; SAM 2 at 1024 pixels takes 8.4 MB
# A process measures the folder again after it has written this part of the limit, or this time.
_UNMEASURED = 1 / 64
_MEASURE_S = 60.0
# Above `_FULL` the folder is trimmed. The rest is for what four processes write between two
# measurements.
_FULL = 1 - 4 * _UNMEASURED
_TRIMMED = _FULL - 4 * _UNMEASURED
_ABANDONED_S = 3600.0  # age of a temporary file whose writer has died
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class EmbeddingKey:
    """All that an embedding depends on.

    `picture` is the digest of its bytes, `network` the identity of the weights, `runtime` the
    library that ran the encoder, `precision` that of the network, `side` that of the encoder's
    input in pixels.
    """

    picture: str
    network: str
    runtime: str
    precision: str
    side: int

    @property
    def name(self) -> str:
        """Name of the embedding's file."""
        text = json.dumps([FORMAT, *asdict(self).values()])
        return f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.embedding"


class DamagedFileError(Exception):
    """A file of the cache is not what was written."""


class _File(NamedTuple):
    used: float
    nbytes: int
    name: str


class DiskCache:
    """The files of embeddings in one folder. Thread-safe.

    - `folder`: is created where it is missing.
    - `limit_bytes`: the size that all files together are kept below.
    - `network`: identity of the weights.
    """

    def __init__(
        self,
        folder: SafePath,
        limit_bytes: int,
        network: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self._limit = limit_bytes
        self._network = network
        self._clock = clock
        self._lock = threading.Lock()
        self._measured_at = -math.inf
        self._written = 0  # bytes, by this process, since then

    def key(self, picture: str, info: ModelInfo) -> EmbeddingKey:
        """Return the key of the embedding that a network, as `info` says that it runs, makes.

        `picture` is the digest of the picture's bytes.
        """
        return EmbeddingKey(picture, self._network, info.runtime, info.precision, info.side)

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name. Raises OSError."""
        return (self.folder / name).is_file()

    def read(self, key: EmbeddingKey) -> tuple[PackedEmbedding, tuple[str, ...]] | None:
        """Return an embedding and the notes of its picture, and mark it as used; None: not there.

        Raises OSError, and DamagedFileError for a file that is not what was written.
        """
        try:
            with (self.folder / key.name).open() as file:
                nbytes = os.fstat(file.fileno()).st_size
                if nbytes > _MAX_BYTES:
                    raise DamagedFileError(f"{nbytes} bytes are too many")
                body = bytearray(nbytes)
                if file.readinto(body) != nbytes:  # type: ignore[attr-defined]
                    raise DamagedFileError("it is cut off")
                found = _parsed(body, key)
                with contextlib.suppress(OSError):  # a file of another user, or a read-only mount
                    os.utime(file.fileno())
                return found
        except FileNotFoundError:
            return None

    def write(self, key: EmbeddingKey, packed: PackedEmbedding, notes: Sequence[str]) -> int:
        """Write an embedding. Returns how many others were removed to make room. Raises OSError.

        ValueError where it alone is larger than the limit.
        """
        head, data = _head(key, packed, notes), [level.data for level in packed.levels]
        check = zlib.crc32(head)
        for tensor in data:
            check = zlib.crc32(tensor, check)
        nbytes = len(head) + sum(map(len, data)) + _CHECK.size
        if nbytes > self._limit:
            raise ValueError(f"an embedding of {nbytes / 2**20:.1f} MiB is larger than the limit")
        self.folder.mkdir(parents=True, exist_ok=True)
        removed = self._make_room(nbytes)
        unique = f"{os.getpid()}-{threading.get_ident()}-{next(_serial)}"
        temporary = self.folder / f"{TEMP_PREFIX}{unique}.tmp"
        try:
            with temporary.create() as file:
                file.write(head)
                for tensor in data:
                    file.write(tensor)
                file.write(_CHECK.pack(check))
            temporary.rename(self.folder / key.name)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        return removed

    # ── room ──

    def _make_room(self, nbytes: int) -> int:
        """Count a file that is to be written; remove others where the folder is full.

        Returns how many were removed. Raises OSError.
        """
        with self._lock:
            self._written += nbytes
            age_s = self._clock() - self._measured_at
            if age_s < _MEASURE_S and self._written <= self._limit * _UNMEASURED:
                return 0
            files = sorted(self._measure())
            held = sum(file.nbytes for file in files) + nbytes
            removed = 0
            if held > self._limit * _FULL:
                for file in files:
                    if held <= self._limit * _TRIMMED:
                        break
                    (self.folder / file.name).unlink(missing_ok=True)
                    held -= file.nbytes
                    removed += 1
            self._measured_at, self._written = self._clock(), nbytes
            return removed

    def _measure(self) -> list[_File]:
        """Return all embeddings; remove temporary files whose writers have died."""
        files = []
        with self.folder.scandir() as entries:
            for entry in entries:
                is_temporary = entry.name.startswith(TEMP_PREFIX)
                if not is_temporary and not _NAME.fullmatch(entry.name):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # removed, or renamed, by another process
                    continue
                if not is_temporary:
                    files.append(_File(status.st_mtime, status.st_size, entry.name))
                elif time.time() - status.st_mtime > _ABANDONED_S:
                    with contextlib.suppress(OSError):
                        (self.folder / entry.name).unlink()
        return files


# ── the file ──


def _head(key: EmbeddingKey, packed: PackedEmbedding, notes: Sequence[str]) -> bytes:
    levels = [
        {"dtype": level.dtype, "computed": level.computed, "shape": level.shape}
        for level in packed.levels
    ]
    header = {"key": asdict(key), "size": packed.size, "notes": list(notes), "levels": levels}
    text = json.dumps(header, separators=(",", ":")).encode()
    return _MAGIC + _LENGTH.pack(len(text)) + text


def _parsed(body: bytearray, key: EmbeddingKey) -> tuple[PackedEmbedding, tuple[str, ...]]:
    """Return the content of a file. Raises DamagedFileError."""
    view = memoryview(body)
    start = len(_MAGIC) + _LENGTH.size
    if len(body) < start + _CHECK.size or view[: len(_MAGIC)] != _MAGIC:
        raise DamagedFileError("it is no embedding")
    content = view[: -_CHECK.size]
    if _CHECK.unpack(view[-_CHECK.size :])[0] != zlib.crc32(content):
        raise DamagedFileError("its checksum is wrong")
    data = start + _LENGTH.unpack_from(body, len(_MAGIC))[0]
    try:
        return _embedding(parse_json(bytes(content[start:data])), content[data:], key)
    except (ValueError, OverflowError, TypeError, KeyError, AttributeError) as error:
        raise DamagedFileError(f"its header is wrong: {error!r}") from None


def _embedding(
    header: Any, data: memoryview, key: EmbeddingKey
) -> tuple[PackedEmbedding, tuple[str, ...]]:
    """Return the embedding of a parsed header. Raises ValueError and the like where it is wrong."""
    if header["key"] != asdict(key):
        raise ValueError("another embedding")
    width, height = map(int, header["size"])
    levels = []
    for entry in header["levels"]:
        shape = tuple(map(int, entry["shape"]))
        nbytes = math.prod(shape) * _ITEM_BYTES[entry["dtype"]]
        if min(shape) < 1 or min(width, height) < 1 or nbytes > len(data):
            raise ValueError("sizes that are not possible")
        levels.append(PackedLevel(data[:nbytes], entry["dtype"], str(entry["computed"]), shape))
        data = data[nbytes:]
    if len(data):
        raise ValueError("more data than its tensors have")
    packed = PackedEmbedding(Size(width, height), key.side, key.precision, tuple(levels))
    return packed, tuple(map(str, header["notes"]))
