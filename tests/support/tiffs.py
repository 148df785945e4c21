"""TIFFs of any number of samples, in strips or tiles, pixel by pixel or in planes: what Pillow does
not write.
"""

from __future__ import annotations

import io
import lzma
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from PIL import Image


def zstandard(raw: bytes) -> bytes:
    """Compressed by Pillow, and taken out of its TIFF."""
    out = io.BytesIO()
    Image.frombytes("L", (len(raw), 1), raw).save(out, "TIFF", compression="zstd")
    with Image.open(out) as image:
        tags: Any = image.tag_v2  # type: ignore[attr-defined]  # a TIFF's
        start, length = int(tags[273][0]), int(tags[279][0])
    return out.getvalue()[start : start + length]


PACKERS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "none": (1, bytes),
    "deflate": (8, zlib.compress),
    "LZMA": (34925, partial(lzma.compress, preset=0)),
    "Zstandard": (50000, zstandard),
}


def tiff_of(
    samples: np.ndarray,
    photometric: int,
    *,
    packer: str = "none",
    planes: bool = False,
    tile: tuple[int, int] | None = None,
    rows: int = 7,
    differences: bool = False,
    order: str = "<",
    extra: tuple[int, ...] = (),
    **tags: tuple[int, ...],
) -> bytes:
    """A TIFF of H×W×n samples (uint8 or uint16).

    It has strips of `rows` lines, or tiles of `tile` (width, height). `differences` is TIFF's
    predictor 2, which is ignored beside no compression; `order` is `<` or `>`, and `tags`
    (`t258=(8,)`) replace its own.
    """
    height, width, count = samples.shape
    number, pack = PACKERS[packer]
    parts = [samples[..., n : n + 1] for n in range(count)] if planes else [samples]
    blocks = [block for part in parts for block in _blocks(part, tile, rows)]
    packed = [pack(_raw(block, differences and packer != "none", order)) for block in blocks]
    starts = np.cumsum([8, *map(len, packed)]).tolist()
    entries = {
        256: (width,), 257: (height,), 258: (samples.dtype.itemsize * 8,) * count,
        259: (number,), 262: (photometric,),
        277: (count,), 284: (2 if planes else 1,), 317: (2 if differences else 1,),
    }  # fmt: skip
    lengths = tuple(map(len, packed))
    if tile:
        entries |= {322: (tile[0],), 323: (tile[1],), 324: tuple(starts[:-1]), 325: lengths}
    else:
        entries |= {273: tuple(starts[:-1]), 278: (rows,), 279: lengths}
    if extra:
        entries[338] = extra
    entries |= {int(name[1:]): values for name, values in tags.items()}
    return _file(b"".join(packed), entries, order)


def _blocks(part: np.ndarray, tile: tuple[int, int] | None, rows: int) -> Iterator[np.ndarray]:
    height, width = part.shape[:2]
    if tile is None:
        yield from (part[y : y + rows] for y in range(0, height, rows))
        return
    across, down = tile
    padded = np.pad(part, ((0, -height % down), (0, -width % across), (0, 0)))
    for y in range(0, height, down):
        yield from (padded[y : y + down, x : x + across] for x in range(0, width, across))


def _raw(block: np.ndarray, differences: bool, order: str) -> bytes:
    if differences:
        block = np.diff(block, axis=1, prepend=np.zeros_like(block[:, :1]))
    return block.astype(block.dtype.newbyteorder(order)).tobytes()


def _file(data: bytes, entries: dict[int, tuple[int, ...]], order: str) -> bytes:
    body = bytearray(
        (b"II*\0" if order == "<" else b"MM\0*") + bytes(4) + data + bytes(len(data) % 2)
    )
    lines = []
    for tag, values in sorted(entries.items()):
        kind, letter = (4, "I") if max(values) > 65_535 or tag in (273, 324) else (3, "H")
        packed = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(packed) > 4:
            lines.append(struct.pack(order + "HHII", tag, kind, len(values), len(body)))
            body += packed + bytes(len(packed) % 2)
        else:
            lines.append(
                struct.pack(order + "HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
            )
    struct.pack_into(order + "I", body, 4, len(body))
    return bytes(body) + struct.pack(order + "H", len(lines)) + b"".join(lines) + bytes(4)
