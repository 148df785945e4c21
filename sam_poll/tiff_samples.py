"""Samples of TIFFs that no decoder takes for a picture: five bands, planes of 16 bits, Zstandard with any of these.

A compression of plain bytes does not care what the samples mean. So the file gets a second directory that declares its
data as grey, each pixel of n samples as n grey pixels beside each other, which Pillow's libtiff decodes whatever they
are; what has a plane of its own is declared plane by plane. The samples are put in order here.

Limitations: all samples of a pixel are decoded, and those that are not shown are thrown away.
"""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from sam_poll.errors import PictureError
from sam_poll.headers import SAVE_AGAIN, Header, not_decodable, tiff_directory
from sam_poll.tiff_kinds import PILLOW_ONLY

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIPS, _SAMPLES, _STRIP_ROWS, _STRIP_LENGTHS, _PLANES, _PREDICTOR = 273, 277, 278, 279, 284, 317
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_LENGTHS = 322, 323, 324, 325
_PREDICTED = {5, 8, 32946, 34925, 50000}  # compressions with predictors; libtiff ignores one beside any other
_MIN_IS_BLACK, _DIFFERENCES, _LONG, _PLAIN = 1, 2, 4, 42
Samples = npt.NDArray[Any]


def read_samples(data: bytes, header: Header) -> Samples:
    """Read the samples that are shown: H×W×3 for colours, H×W for grey, uint8 or uint16, not turned upright.

    `header` is of a TIFF whose `decoder` is `samples`. Raises PictureError for damaged data.
    """
    assert header.tiff is not None
    tags = {tag: found.values(data) for tag, found in tiff_directory(data)[0].items() if found.number}
    shown = 1 if header.mode == "grey" else 3
    if header.tiff.planes:
        planes = [_decoded(data, header, _of_plane(tags, number, header.tiff.samples), 1) for number in range(shown)]
        samples = np.concatenate(planes, axis=2)
    else:
        samples = _decoded(data, header, tags, header.tiff.samples)[..., :shown]
    if shown == 1:
        samples = samples[..., 0]
        if tags.get(_PHOTOMETRIC) == (0,) and samples.dtype == np.uint8:  # not with 16 bits, as in Pillow and CVAT
            samples = 255 - samples
    return np.ascontiguousarray(samples)


def decoded_by_pillow(data: bytes, header: Header) -> Any:
    """Decode a TIFF by Pillow, whatever its size: a PIL image.

    Raises PictureError for damaged data, and for a compression that this build of Pillow was made without.
    """
    from PIL import TiffImagePlugin  # seldom needed

    try:
        image = TiffImagePlugin.TiffImageFile(io.BytesIO(data))  # `Image.open` has a pixel limit of its own
        image.load()
    except (ArithmeticError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error) as error:
        _check_build(header)
        raise not_decodable(data, header, "the picture is damaged or of a kind that cannot be decoded") from error
    return image


def _check_build(header: Header) -> None:
    """Try whether this build of Pillow knows the file's compression at all. PictureError where it does not."""
    from PIL import Image

    if header.tiff is None or header.tiff.compression not in PILLOW_ONLY:
        return
    try:
        Image.new("L", (1, 1)).save(io.BytesIO(), "TIFF", compression=PILLOW_ONLY[header.tiff.compression])
    except OSError as error:
        raise PictureError(
            f"the TIFF has {header.tiff.compressed} compression, which this build of Pillow cannot read",
            remedy="install Pillow's own wheel (pip install --force-reinstall 'pillow>=12'), or save the picture with "
            "deflate compression",
        ) from error


def _of_plane(tags: dict[int, tuple[int, ...]], number: int, planes: int) -> dict[int, tuple[int, ...]]:
    """The tags with the strips or tiles of one plane: all of the first plane come first, and so on."""
    changed = dict(tags)
    for tag in (_STRIPS, _STRIP_LENGTHS, _TILES, _TILE_LENGTHS):
        if tag in tags:
            each = len(tags[tag]) // planes
            changed[tag] = tags[tag][number * each : (number + 1) * each]
    return changed


def _decoded(data: bytes, header: Header, tags: dict[int, tuple[int, ...]], samples: int) -> Samples:
    """H×W×`samples` of the strips or tiles that `tags` name."""
    size = header.stored
    image = decoded_by_pillow(_declared_grey(data, header, tags, samples), header)
    grey = np.array(image)
    grey = grey.astype(grey.dtype.newbyteorder("="), copy=False)
    if grey.shape != (size.height, size.width * samples) or grey.dtype not in (np.uint8, np.uint16):
        what = f"{size.width} × {size.height} pixels of {samples} samples"
        raise PictureError(f"the TIFF's data are not {what}", remedy=SAVE_AGAIN)
    pixels = grey.reshape(size.height, size.width, samples)
    if tags.get(_PREDICTOR) == (_DIFFERENCES,) and header.tiff and header.tiff.compression in _PREDICTED:
        step = tags[_TILE_WIDTH][0] if _TILE_WIDTH in tags else size.width
        for left in range(0, size.width, step):
            part = pixels[:, left : left + step]
            np.cumsum(part, axis=1, dtype=pixels.dtype, out=part)
    return pixels


def _declared_grey(data: bytes, header: Header, tags: dict[int, tuple[int, ...]], samples: int) -> bytes:
    """The file with another directory at its end, which calls the data grey and `samples` times as wide."""
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
    """The file, whose header points to a new directory of these tags, appended to it. It is a plain directory, of a
    BigTIFF, too: Pillow does not read those of big-endian ones, and no picture here is larger than 4 GiB."""
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
        raise PictureError("the TIFF's directory holds impossible numbers", remedy=SAVE_AGAIN) from error
    return bytes(whole + struct.pack(order + "H", len(lines)) + b"".join(lines) + bytes(4))
