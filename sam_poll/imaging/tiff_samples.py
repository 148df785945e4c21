"""Read the samples of TIFFs that no decoder accepts: five bands, planes of 16 bits, and the like.

A compression of plain bytes does not depend on what the samples mean. So the file gets a second
directory that declares its data as grey, each pixel of n samples as n grey pixels side by side,
which Pillow's libtiff decodes; samples in separate planes are declared plane by plane. The samples
are put in order here.

Limitations: all samples of a pixel are decoded; those that are not shown are discarded.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from sam_poll.core.errors import PictureError
from sam_poll.imaging.damage import SAVE_AGAIN
from sam_poll.imaging.headers import Header, tiff_directory
from sam_poll.imaging.pillow_decoder import decode_by_pillow

_WIDTH = 256
_HEIGHT = 257
_BITS = 258
_COMPRESSION = 259
_PHOTOMETRIC = 262
_FILL_ORDER = 266
_STRIPS = 273
_SAMPLES = 277
_STRIP_ROWS = 278
_STRIP_LENGTHS = 279
_PLANES = 284
_PREDICTOR = 317
_TILE_WIDTH = 322
_TILE_HEIGHT = 323
_TILES = 324
_TILE_LENGTHS = 325
# Compressions with predictors; libtiff ignores a predictor with any other.
_WITH_PREDICTOR = {5, 8, 32946, 34925, 50000}
_MIN_IS_BLACK = 1
_DIFFERENCES = 2
_LONG = 4
_PLAIN = 42
Samples = npt.NDArray[Any]


def read_samples(data: bytes, header: Header) -> Samples:
    """Read the samples that are shown: H×W×3 for colours, H×W for grey, not turned upright.

    The type is uint8 or uint16. `header` is of a TIFF whose `decoder` is `samples`. Raises
    PictureError for damaged data.
    """
    assert header.tiff is not None
    directory = tiff_directory(data)[0]
    tags = {number: tag.values(data) for number, tag in directory.items() if tag.number}
    shown = 1 if header.mode == "grey" else 3
    if header.tiff.planes:
        planes = [
            _decoded(data, header, _of_plane(tags, number, header.tiff.samples), 1)
            for number in range(shown)
        ]
        samples = np.concatenate(planes, axis=2)
    else:
        samples = _decoded(data, header, tags, header.tiff.samples)[..., :shown]
    if shown == 1:
        samples = samples[..., 0]
        # White is zero. Not applied to 16 bits, as in Pillow and CVAT.
        if tags.get(_PHOTOMETRIC) == (0,) and samples.dtype == np.uint8:
            samples = 255 - samples
    return np.ascontiguousarray(samples)


def _of_plane(
    tags: dict[int, tuple[int, ...]], number: int, planes: int
) -> dict[int, tuple[int, ...]]:
    """Return the tags with the strips or tiles of one plane, counted from the first plane's."""
    changed = dict(tags)
    for tag in (_STRIPS, _STRIP_LENGTHS, _TILES, _TILE_LENGTHS):
        if tag in tags:
            each = len(tags[tag]) // planes
            changed[tag] = tags[tag][number * each : (number + 1) * each]
    return changed


def _decoded(
    data: bytes, header: Header, tags: dict[int, tuple[int, ...]], samples: int
) -> Samples:
    """Decode the strips or tiles that `tags` name: H×W×`samples`."""
    size = header.stored
    grey = np.array(decode_by_pillow(_declared_grey(data, header, tags, samples), header))
    grey = grey.astype(grey.dtype.newbyteorder("="), copy=False)
    if grey.shape != (size.height, size.width * samples) or grey.dtype not in (np.uint8, np.uint16):
        what = f"{size.width} × {size.height} pixels of {samples} samples"
        raise PictureError(f"the TIFF's data are not {what}", remedy=SAVE_AGAIN)
    pixels = grey.reshape(size.height, size.width, samples)
    predicted = header.tiff is not None and header.tiff.compression in _WITH_PREDICTOR
    if predicted and tags.get(_PREDICTOR) == (_DIFFERENCES,):
        step = tags[_TILE_WIDTH][0] if _TILE_WIDTH in tags else size.width
        for left in range(0, size.width, step):
            part = pixels[:, left : left + step]
            np.cumsum(part, axis=1, dtype=pixels.dtype, out=part)
    return pixels


def _declared_grey(
    data: bytes, header: Header, tags: dict[int, tuple[int, ...]], samples: int
) -> bytes:
    """Append a directory that declares the data as grey and `samples` times as wide."""
    size = header.stored
    declared = {
        _WIDTH: (size.width * samples,),
        _HEIGHT: (size.height,),
        _BITS: (header.bits,),
        _COMPRESSION: tags.get(_COMPRESSION, (1,)),
        _PHOTOMETRIC: (_MIN_IS_BLACK,),
        _SAMPLES: (1,),
        _PLANES: (1,),
    }
    kept = (_FILL_ORDER, _STRIPS, _STRIP_LENGTHS, _STRIP_ROWS, _TILE_HEIGHT, _TILES, _TILE_LENGTHS)
    declared |= {tag: tags[tag] for tag in kept if tag in tags}
    if _TILE_WIDTH in tags:
        declared[_TILE_WIDTH] = (tags[_TILE_WIDTH][0] * samples,)
    return _with_directory(data, declared)


def _with_directory(data: bytes, tags: dict[int, tuple[int, ...]]) -> bytes:
    """Append a directory of these tags, and let the file's header point to it.

    It is a classic directory, also in a BigTIFF: Pillow does not read big-endian BigTIFFs, and no
    picture here is larger than 4 GiB.
    """
    order = "<" if data[:2] == b"II" else ">"
    whole, lines = bytearray(data), []
    whole += bytes(len(data) % 2)
    try:
        for tag, numbers in sorted(tags.items()):
            packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
            place = packed
            if len(numbers) > 1:
                place = struct.pack(order + "I", len(whole))
                whole += packed
            lines.append(struct.pack(order + "HHI", tag, _LONG, len(numbers)) + place)
        struct.pack_into(order + "HI", whole, 2, _PLAIN, len(whole))
    except struct.error as error:
        raise PictureError(
            "the TIFF's directory contains impossible numbers", remedy=SAVE_AGAIN
        ) from error
    return bytes(whole + struct.pack(order + "H", len(lines)) + b"".join(lines) + bytes(4))
