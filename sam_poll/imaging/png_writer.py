"""Write grey PNGs of masks, which are mostly zero: only the rows with set pixels are compressed.

Compressing a zero costs as much as any other byte, and a mask of 20 megapixels has 20 MB of them.
The rows above and below the objects are written as copies of one block that was compressed once;
the rows between are compressed by ISA-L where the package `isal` (extra `fast`) is installed and
they are long, else by zlib. The result is an ordinary PNG (W3C, "Portable Network Graphics", 3rd
edition; RFC 1950 and 1951 for its stream).

Limitations: a mask whose objects reach from top to bottom gains nothing from its ground. The pixels
are always the same; the bytes are those of the installed library, and ISA-L's may differ from one
run to the next.
"""

from __future__ import annotations

import struct
import zlib
from functools import cache

import numpy as np
import numpy.typing as npt

try:
    from isal import isal_zlib
except ImportError:
    HAS_ISAL = False
else:
    HAS_ISAL = True

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_RAW = -15  # a raw deflate stream: separately compressed pieces can be concatenated
_PIECE = 1 << 20
_ADLER = 65521
_LONG = 1 << 16
"""Bytes from which ISA-L saves time that can be noticed; zlib takes less than a millisecond."""


def encode(frame: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> bytes:
    """Return a grey PNG, 8 or 16 bits, of an H×W array.

    The same array gives the same bytes with the same version of zlib, if ISA-L is not installed or
    has less than `_LONG` bytes to compress.
    """
    height, width = frame.shape
    depth = 8 * frame.itemsize
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    chunks = (_chunk(b"IHDR", header), _chunk(b"IDAT", _stream(frame)), _chunk(b"IEND", b""))
    return _SIGNATURE + b"".join(chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return (
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", _crc32(body, _crc32(kind)))
    )


def _stream(frame: npt.NDArray[np.uint8] | npt.NDArray[np.uint16]) -> bytes:
    """Return the pixels as a zlib stream; each row begins with 0, for "not filtered"."""
    height, width = frame.shape
    stride = 1 + width * frame.itemsize
    rows = np.flatnonzero(frame.any(axis=1))
    top, end = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (height, height)
    middle = np.zeros((end - top, stride), np.uint8)
    middle[:, 1:] = np.ascontiguousarray(frame[top:end], frame.dtype.newbyteorder(">")).view(
        np.uint8
    )
    check = _adler_of_zeros(
        _adler32(middle.data, _adler_of_zeros(1, top * stride)), (height - end) * stride
    )
    return b"".join(
        (
            b"\x78\x01",
            _zeros(top * stride),
            _packed(middle.data),
            _zeros((height - end) * stride),
            b"\x03\x00",  # an empty last block
            struct.pack(">I", check),
        )
    )


def _zeros(count: int) -> bytes:
    pieces, rest = divmod(count, _PIECE)
    return _piece() * pieces + _packed(bytes(rest))


@cache
def _piece() -> bytes:
    return _packed(bytes(_PIECE))


def _packed(data: bytes | memoryview) -> bytes:
    """Return a piece of a deflate stream that ends at a whole byte.

    ISA-L at level 1: measured at 20 megapixels, it takes a third to a seventh of zlib's time; a
    ragged mask becomes 1.8 times as long, others as long as with zlib. Without it, run lengths
    only: masks contain hardly anything else, and it takes a third of the time of zlib's level 1.

    ISA-L was seen to compress one piece in two ways within one process, both right (isal
    1.9.1), which neither garbage in its memory nor threads brought about again.
    """
    if HAS_ISAL and memoryview(data).nbytes >= _LONG:
        fast = isal_zlib.compressobj(1, isal_zlib.DEFLATED, _RAW)
        return fast.compress(data) + fast.flush(isal_zlib.Z_FULL_FLUSH)
    packer = zlib.compressobj(1, zlib.DEFLATED, _RAW, 9, zlib.Z_RLE)
    return packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH)


def _crc32(data: bytes, check: int = 0) -> int:
    return isal_zlib.crc32(data, check) if HAS_ISAL else zlib.crc32(data, check)


def _adler32(data: memoryview, check: int) -> int:
    return isal_zlib.adler32(data, check) if HAS_ISAL else zlib.adler32(data, check)


def _adler_of_zeros(check: int, count: int) -> int:
    """Return the Adler-32 after `count` more zeros (RFC 1950).

    The first sum stays; the second grows by the first each time.
    """
    low, high = check & 0xFFFF, check >> 16
    return ((high + count * low) % _ADLER) << 16 | low
