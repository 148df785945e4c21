"""Read a picture's header before anything is decoded, and check that the file is complete.

Returns the size for the pixel limit, the orientation (EXIF, else XMP, as CVAT and Pillow read
them), and the kind. Missing data is told from damaged data: a truncated file, or one with a hole of
zeros, may still be arriving (`IncompleteFileError`). Does no I/O. The work of each reader is
bounded by the length of the file and by `_MAX_PARTS`.

Limitations: a hole is detected only where zeros cannot be valid: in the compressed data of a JPEG,
GIF, AVIF or HEIC, in a PNG by its checksums. In a BMP, an uncompressed TIFF or a lossy WebP zeros
may be pixels. An AVIF whose coded picture is larger than the file states is decoded before it is
scaled to that size; libavif decodes at most 2²⁸ pixels.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sam_poll.core.errors import IncompleteFileError, PictureError
from sam_poll.core.types import Size
from sam_poll.imaging import heif
from sam_poll.imaging.damage import COPY_AGAIN, HOLE, SAVE_AGAIN, cut_off, hole_at, too_many
from sam_poll.imaging.pillow_decoder import open_by_pillow
from sam_poll.imaging.tiff_kinds import Decoder, TiffKind, decoder_for, several_bands

DEFAULT_MAX_PIXELS = 2**28  # 268 megapixels, 0.8 GB as RGB

FORMATS: dict[str, tuple[str, ...]] = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "WebP": (".webp",),
    "AVIF": (".avif",),
    "HEIC": (".heic", ".heif", ".hif"),
}
"""The formats that are read, with their file extensions."""

READABLE = f"{', '.join(list(FORMATS)[:-1])} and {list(FORMATS)[-1]} can be read"

# Chunks, segments, strips; 268 megapixels of 16-bit RGB in chunks of 8 KiB are 200,000
_MAX_PARTS = 1_000_000
# Sub-blocks of a GIF have up to 255 bytes; the largest file that is read has 8 million of them.
_MAX_SUB_BLOCKS = 10_000_000
_SAMPLES = 8  # samples per pixel that the pixel limit allows, where all of them are decoded
_MAX_SCANS = 100  # of a JPEG; encoders write about ten, and each is a pass over the whole picture


@dataclass(frozen=True, slots=True)
class Header:
    """A picture's header.

    `size` is upright, `stored` as in the file. `orientation` is EXIF's 1–8. `format` is one of
    `FORMATS`; `mode` is grey, rgb, palette, cmyk, ycbcr or lab, `alpha` apart; `bits` are per
    sample. `several` is set where only the first of several frames or pages is read; `frames` is
    their number where it is known. `tiff` describes the samples of a TIFF. `decoder` is the library
    that decodes the file.
    """

    size: Size
    stored: Size
    orientation: int
    format: str
    mode: str
    bits: int = 8
    alpha: bool = False
    several: bool = False
    tiff: TiffKind | None = None
    decoder: Decoder = "opencv"
    frames: int = 1


def read_header(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Header:
    """Read a picture's header, without decoding the picture.

    Raises IncompleteFileError for an empty or truncated file; PictureError for a file that is not a
    picture, has no pixels, has more than `max_pixels`, cannot be shown in 8 bits (floating-point,
    32-bit or signed samples), or is a TIFF of a kind that cannot be decoded.
    """
    header = _reader(data)(data)
    width, height = header.size
    if width <= 0 or height <= 0:
        raise PictureError(f"the picture has no pixels ({width} × {height})", remedy=SAVE_AGAIN)
    if (
        header.tiff
        and header.decoder == "samples"
        and width * height * header.tiff.samples > max_pixels * _SAMPLES
    ):
        raise PictureError(
            f"the picture has {width} × {height} pixels of {header.tiff.samples} samples, "
            f"more than the limit of {max_pixels * _SAMPLES:,} samples",
            remedy="keep the samples to be shown: gdal_translate -b 1 -b 2 -b 3 IN OUT.tif",
        )
    if width * height > max_pixels:
        raise PictureError(
            f"the picture has {width} × {height} = {width * height:,} pixels, "
            f"more than the limit of {max_pixels:,}",
            remedy="make it smaller, raise the pixel limit, or request a mosaic, "
            "which is read in tiles",
        )
    return header


def for_decoder(data: bytes, header: Header) -> bytes:
    """Return the file for the decoder: complete, and without parts that could disturb it.

    Parts are left out or changed that would turn or mask the picture, or make a library write to
    stderr. Raises IncompleteFileError where a part is missing, PictureError where it is damaged.
    """
    if header.format == "JPEG":
        _check_jpeg(data)
    elif header.format == "PNG":
        return _bare_png(data, header)
    elif header.format == "TIFF":
        return _plain_tiff(data)
    elif header.format == "GIF":
        return _first_frame_of_gif(data, header)
    elif header.format in ("AVIF", "HEIC"):
        heif.check_holes(data)
    return data


# -- headers --------------------

_FOREIGN = (  # how other files begin that are often taken for pictures
    (re.compile(rb"....ftyp", re.DOTALL), "a video"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "a JPEG 2000"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "a JPEG XL"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"8BPS"), "a Photoshop document"),
    (re.compile(rb"PK\x03\x04"), "a ZIP archive"),
    (re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|head)", re.IGNORECASE), "an HTML page"),
    (re.compile(rb"(\xef\xbb\xbf)?\s*<(\?xml|svg)", re.IGNORECASE), "XML or SVG"),
    (re.compile(rb"(\xef\xbb\xbf)?\s*[{\[]"), "JSON"),
)


def _reader(data: bytes) -> Callable[[bytes], Header]:
    if not data:
        raise IncompleteFileError("the file is empty", remedy=COPY_AGAIN)
    for begin, reader in _READERS.items():
        if data.startswith(begin) and (reader is not _webp or data[8:12] == b"WEBP"):
            return reader
    if heif.is_heif(data):
        return _heif
    if data.startswith(bytes(16)):
        raise hole_at(0)
    if len(data) < 12 and any(begin.startswith(data[: len(begin)]) for begin in _READERS):
        raise cut_off("the file ends inside its header")
    instead = next((name for pattern, name in _FOREIGN if pattern.match(data)), None)
    what = f"not a picture that can be read, but {instead}" if instead else "not a picture"
    raise PictureError(f"the file is {what}", remedy=READABLE)


def _read(layout: str, data: bytes, at: int) -> tuple[Any, ...]:
    try:
        return struct.unpack_from(layout, data, at)
    except (struct.error, OverflowError) as error:
        raise cut_off("the file ends inside its header") from error


def _upright(stored: Size, orientation: int) -> Size:
    return Size(stored.height, stored.width) if orientation > 4 else stored


def _jpeg(data: bytes) -> Header:
    orientation: int | None = None
    by_xmp: int | None = None
    for marker, start, end in _segments(data):
        body = data[start : start + 29] if marker == 0xE1 else b""
        if body.startswith(b"Exif\0"):
            orientation = orientation or _exif_orientation(data[start + 6 : end])
        elif body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            by_xmp = by_xmp or _xmp_orientation(data[start:end])
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            bits, height, width, samples = _read(">BHHB", data, start)
            if bits != 8:
                raise PictureError(f"a JPEG of {bits} bits cannot be read", remedy=SAVE_AGAIN)
            stored, turn = Size(width, height), orientation or by_xmp or 1
            mode = {1: "grey", 3: "rgb", 4: "cmyk"}.get(samples, f"{samples} samples")
            return Header(_upright(stored, turn), stored, turn, "JPEG", mode)
    raise cut_off("the JPEG holds no picture")


class _Segment(NamedTuple):
    """A JPEG's marker, with start and end of its body."""

    marker: int
    start: int
    end: int


def _segments(data: bytes) -> Iterator[_Segment]:
    """Yield a JPEG's segments up to its end marker.

    Raises IncompleteFileError where the end marker is missing.
    """
    at = 2
    marks: npt.NDArray[np.int64] | None = None
    parts = 0
    while (at := data.find(b"\xff", at)) >= 0:
        parts += 1
        if parts > _MAX_PARTS:
            raise too_many("parts")
        while data[at : at + 1] == b"\xff":
            at += 1
        (marker,) = _read("B", data, at)
        at += 1
        if marker <= 0x01 or 0xD0 <= marker <= 0xD8:
            continue
        if marker == 0xD9:
            yield _Segment(marker, at, at)
            return
        (length,) = _read(">H", data, at)
        yield _Segment(marker, at + 2, at + length)
        at += max(length, 2)
        if marker == 0xDA:
            marks = _marks(data, at) if marks is None else marks
            following = np.searchsorted(marks, at)
            at = int(marks[following]) if following < len(marks) else len(data)
    raise cut_off("the JPEG's end marker is missing")


def _marks(data: bytes, at: int) -> npt.NDArray[np.int64]:
    """Return the positions from `at` on of 0xFF bytes that end a scan.

    Excluded are stuffing (0xFF 0x00), fill bytes and restart markers.
    """
    codes = np.frombuffer(data, dtype=np.uint8)
    places: npt.NDArray[np.int64] = at + np.flatnonzero(codes[at:-1] == 0xFF)
    following = codes[places + 1]
    is_restart = (following >= 0xD0) & (following <= 0xD7)
    ends: npt.NDArray[np.int64] = places[(following != 0) & (following != 0xFF) & ~is_restart]
    return ends


def _check_jpeg(data: bytes) -> None:
    """Check that the file is complete up to its end marker, and has a plausible number of scans."""
    codes: dict[int, int] = {}
    progressive = False
    scans = 0
    scan: tuple[int, int] | None = None
    for marker, start, end in _segments(data):
        hole = data.find(HOLE, scan[1], start) if scan else -1
        if scan and hole >= 0 and _never_zero(data[slice(*scan)], codes, progressive):
            raise hole_at(hole)
        scan = (start, end) if marker == 0xDA else None
        if marker == 0xC4:
            codes.update(_codes_of_zeros(data[start:end]))
        elif marker in (0xC0, 0xC1, 0xC2):
            progressive = marker == 0xC2
        scans += marker == 0xDA
        if scans > _MAX_SCANS:
            raise too_many("scans")


def _codes_of_zeros(tables: bytes) -> Iterator[tuple[int, int]]:
    """Yield each Huffman table of a segment: its name, and the symbol of a row of zero bits."""
    at = 0
    while at + 17 < len(tables):
        yield tables[at], tables[at + 17]
        at += 17 + sum(tables[at + 1 : at + 17])


def _never_zero(scan: bytes, codes: dict[int, int], progressive: bool) -> bool:
    """Return whether a scan with this header cannot contain 512 zero bytes in a row.

    They would be 20 blocks of one coefficient 63 times over, unless zeros mean "end of block", as
    in a blank page with tables made for it.
    """
    if len(scan) < 4 or len(scan) < 4 + 2 * scan[0]:
        return False
    tables = [codes.get(0x10 | scan[2 + 2 * n] & 0x0F, 0) for n in range(scan[0])]
    if progressive and scan[-3] == 0:
        return False  # differences of brightness from block to block: zero where nothing changes
    return any(code & 0x0F for code in tables)


_PNG_MODES = {0: "grey", 2: "rgb", 3: "palette", 4: "grey", 6: "rgb"}
_PNG_NEEDED = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


class _Chunk(NamedTuple):
    """A PNG's chunk: its name, with start and end of its body."""

    name: bytes
    start: int
    end: int


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """Yield a PNG's chunks. Raises IncompleteFileError where the last one is missing."""
    at = 8
    name = b""
    parts = 0
    while name != b"IEND":
        if at >= len(data):
            raise cut_off("the PNG's end (IEND) is missing")
        length, name = _read(">I4s", data, at)
        parts += 1
        if parts > _MAX_PARTS:
            raise too_many("chunks")
        if name == bytes(4):
            raise hole_at(at)
        if not name.isalpha():
            raise PictureError(
                f"the PNG is damaged: there is no chunk where one should begin, at byte {at:,}",
                remedy=COPY_AGAIN,
            )
        if at + 12 + length > len(data):
            raise cut_off(f"the PNG's last chunk needs {at + 12 + length - len(data):,} bytes more")
        yield _Chunk(name, at + 8, at + 8 + length)
        at += 12 + length


def _png(data: bytes) -> Header:
    begin, width, height, bits, colour = _read(">4sIIBB", data, 12)
    if begin != b"IHDR":
        raise PictureError("the PNG does not begin with its header", remedy=SAVE_AGAIN)
    orientation: int | None = None
    by_xmp: int | None = None
    several = False
    for name, start, end in _chunks(data):
        if name == b"eXIf":
            orientation = _exif_orientation(data[start:end])
        elif name == b"iTXt" and data.startswith(b"XML:com.adobe.xmp\0", start):
            by_xmp = _xmp_orientation(data[start:end])
        elif name == b"acTL":
            several = _read(">I", data, start)[0] > 1
    stored, turn = Size(width, height), orientation or by_xmp or 1
    mode = _PNG_MODES.get(colour, "unknown")
    return Header(
        _upright(stored, turn), stored, turn, "PNG", mode, bits, colour in (4, 6), several
    )


def transparent_grey(data: bytes, header: Header) -> int | None:
    """Return which value of a grey PNG's samples is transparent, as OpenCV decodes them, or None.

    OpenCV knows such a value (tRNS) for colours and palettes only. Samples of less than 8 bits are
    decoded to 0…255.
    """
    if header.format != "PNG" or header.mode != "grey" or header.alpha:
        return None
    for name, start, end in _chunks(data):
        if name == b"tRNS" and end - start == 2:
            highest = (1 << header.bits) - 1
            value = int.from_bytes(data[start:end], "big") & highest
            return value * max(1, 255 // highest)
    return None


def _bare_png(data: bytes, header: Header) -> bytes:
    """Return the PNG with only the chunks that its pixels need.

    libpng writes to stderr about invalid extra chunks, and decompresses them. The needed chunks and
    their checksums are verified here, because libpng would write about them too.
    """
    parts, names = [data[:8]], set()
    for name, start, end in _chunks(data):
        if name not in _PNG_NEEDED:
            continue
        if zlib.crc32(memoryview(data)[start - 4 : end]) != _read(">I", data, end)[0]:
            if (hole := data.find(HOLE, start, end)) >= 0:
                raise hole_at(hole)
            raise PictureError(
                f"the PNG is damaged: a wrong checksum in {name.decode()}", remedy=COPY_AGAIN
            )
        names.add(name)
        parts.append(data[start - 8 : end + 4])
    if b"IDAT" not in names or (header.mode == "palette" and b"PLTE" not in names):
        raise PictureError(
            "the PNG is damaged: its pixels or its palette are missing", remedy=COPY_AGAIN
        )
    return b"".join(parts)


def _bmp(data: bytes) -> Header:
    (begin, kind) = _read("<II", data, 10)
    if kind == 12:
        width, height, _, bits = _read("<HHHH", data, 18)
        packing = 0
    else:
        width, height, _, bits, packing = _read("<iiHHI", data, 18)
    height = abs(height)
    need = (
        begin + (width * bits + 31) // 32 * 4 * height
        if packing in (0, 3, 6)
        else _read("<I", data, 2)[0]
    )
    if width > 0 and len(data) < need:
        raise cut_off(f"the BMP has {len(data):,} bytes of {need:,}")
    stored = Size(width, height)
    return Header(stored, stored, 1, "BMP", "palette" if bits <= 8 else "rgb", min(bits, 8))


def _webp(data: bytes) -> Header:
    (length,) = _read("<I", data, 4)
    if len(data) < 8 + length:
        raise cut_off(f"the WebP has {len(data):,} bytes of {8 + length:,}")
    stored: Size | None = None
    several = False
    orientation: int | None = None
    by_xmp: int | None = None
    at, parts = 12, 0
    while at + 8 <= min(len(data), 8 + length):
        parts += 1
        if parts > _MAX_PARTS:
            raise too_many("chunks")
        name, size = _read("<4sI", data, at)
        body = at + 8
        if name == b"VP8X" and stored is None:  # the first of these three counts, as in libwebp
            flags, a, b, c, d, e, f = _read("<B3x6B", data, body)
            stored = Size(1 + a + (b << 8) + (c << 16), 1 + d + (e << 8) + (f << 16))
            several = bool(flags & 2)
        elif name == b"VP8 " and stored is None:
            width, height = _read("<HH", data, body + 6)
            stored = Size(width & 0x3FFF, height & 0x3FFF)
        elif name == b"VP8L" and stored is None:
            (packed,) = _read("<I", data, body + 1)
            stored = Size((packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1)
        elif name == b"EXIF":
            orientation = _exif_orientation(data[body : body + size].removeprefix(b"Exif\0\0"))
        elif name == b"XMP ":
            by_xmp = _xmp_orientation(data[body : body + size])
        at = body + size + size % 2
    if stored is None:
        raise PictureError("the WebP holds no picture", remedy=SAVE_AGAIN)
    turn = orientation or by_xmp or 1
    return Header(_upright(stored, turn), stored, turn, "WebP", "rgb", several=several)


def _heif(data: bytes) -> Header:
    kind = heif.format_of(heif.read_items(data))
    image = open_by_pillow(data, kind)
    stored = Size(*image.size)
    frames = image.n_frames
    turn = 1
    if kind == "AVIF":  # libheif turns a HEIC itself
        exif, xmp = image.info.get("exif", b""), image.info.get("xmp", b"")
        turn = _exif_orientation(exif.removeprefix(b"Exif\0\0")) or _xmp_orientation(xmp) or 1
    return Header(
        _upright(stored, turn),
        stored,
        turn,
        kind,
        "rgb",
        several=frames > 1,
        decoder="pillow",
        frames=frames if kind == "AVIF" else 1,
    )


@dataclass(frozen=True, slots=True)
class _GifBlock:
    """A block of a GIF: an image (`label` 0x2C) or an extension, from `start` to `end`."""

    label: int
    start: int
    end: int


_GIF_IMAGE = 0x2C
_GIF_EXTENSION = 0x21
_GIF_END = 0x3B
_GIF_CONTROL = 0xF9
_GIF_SCREEN_END = 13


def _gif_table(flags: int) -> int:
    """Return the length in bytes of a GIF's colour table."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _gif_blocks(data: bytes) -> Iterator[_GifBlock]:
    """Iterate over a GIF's blocks; raises where one is damaged or the end marker is missing."""
    at = _GIF_SCREEN_END + _gif_table(_read("B", data, 10)[0])
    left = _MAX_SUB_BLOCKS
    while (introducer := _gif_byte(data, at)) != _GIF_END:
        if introducer == _GIF_IMAGE:
            label, body = introducer, at + 11 + _gif_table(_gif_byte(data, at + 9))
        elif introducer == _GIF_EXTENSION:
            label, body = _gif_byte(data, at + 1), at + 2
        else:
            raise _no_gif_block(data, at)
        while length := _gif_byte(data, body):
            body += 1 + length
            left -= 1
        left -= 1
        if left < 0:
            raise too_many("blocks")
        yield _GifBlock(label, at, body + 1)
        at = body + 1


def _gif_byte(data: bytes, at: int) -> int:
    if at >= len(data):
        raise cut_off("the GIF's end marker is missing")
    return data[at]


def _no_gif_block(data: bytes, at: int) -> PictureError:
    if data.startswith(bytes(16), at):
        return hole_at(at)
    return PictureError(
        f"the GIF is damaged: there is no block where one should begin, at byte {at:,}",
        remedy=COPY_AGAIN,
    )


def _gif(data: bytes) -> Header:
    """Read a GIF's header. Its size is that of the screen, or what the first frame needs of it."""
    width, height = _read("<HH", data, 6)
    frames = 0
    for block in _gif_blocks(data):
        if block.label != _GIF_IMAGE:
            continue
        frames += 1
        if frames == 1:
            left, top, across, down = _read("<HHHH", data, block.start + 1)
            width, height = max(width, left + across), max(height, top + down)
    if not frames:
        raise PictureError("the GIF holds no picture", remedy=SAVE_AGAIN)
    size = Size(width, height)
    return Header(
        size, size, 1, "GIF", "palette", several=frames > 1, decoder="pillow", frames=frames
    )


def _first_frame_of_gif(data: bytes, header: Header) -> bytes:
    """Return a GIF with the first frame only, on a screen that holds it, without other extensions.

    Pillow would enlarge the screen by itself only within its own pixel limit.
    """
    control = b""
    for block in _gif_blocks(data):
        body = data[block.start : block.end]
        if block.label == _GIF_IMAGE:
            begin = _GIF_SCREEN_END + _gif_table(data[10])
            screen = data[:6] + struct.pack("<HH", *header.stored) + data[10:begin]
            return b"".join((screen, control, body, bytes([_GIF_END])))
        if block.label == _GIF_CONTROL and len(body) == 8:
            control = body
    raise AssertionError("its header was read")


# -- TIFF, and EXIF, which is one --------------------

_TIFF_MODES = {0: "grey", 1: "grey", 2: "rgb", 3: "palette", 5: "cmyk", 6: "ycbcr", 8: "lab"}
# Struct characters by the field type of a TIFF tag
_WHOLE_NUMBERS = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 16: "Q", 17: "q"}
_ORIENTATION = 274
_EXTRA_SAMPLES = 338


@dataclass(frozen=True, slots=True)
class TiffTag:
    """A whole-number tag of a TIFF directory.

    It has `number` values of the struct layout `layout`, at the position `place`.
    """

    number: int
    layout: str
    place: int

    def values(self, data: bytes) -> tuple[int, ...]:
        if self.number > _MAX_PARTS:
            raise too_many("strips")
        return _read(f"{self.layout[0]}{self.number}{self.layout[1]}", data, self.place)


def tiff_directory(data: bytes) -> tuple[dict[int, TiffTag], int]:
    """Return the whole-number tags of a TIFF's first directory and the next one's position.

    The position is 0 if there is none.
    """
    order = "<" if data[:2] == b"II" else ">"
    big = _read(order + "H", data, 2)[0] == 43
    (at,) = _read(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = _read(order + ("Q" if big else "H"), data, at)
    at += 8 if big else 2
    if count > _MAX_PARTS:
        raise too_many("tags")
    entry, inline = (20, 8) if big else (12, 4)
    if at + count * entry > len(data):
        raise cut_off("the TIFF's directory is missing")
    tags: dict[int, TiffTag] = {}
    seen: set[int] = set()
    for place in range(at, at + count * entry, entry):
        tag, kind, number = _read(order + ("HHQ" if big else "HHI"), data, place)
        letter = _WHOLE_NUMBERS.get(kind)
        if tag in seen:
            # libtiff uses the first of equal tags, so that one must be checked against the limits.
            continue
        seen.add(tag)
        if letter is None:
            continue
        value = place + entry - inline
        if number * struct.calcsize("<" + letter) > inline:
            (value,) = _read(order + ("Q" if big else "I"), data, value)
        tags[tag] = TiffTag(number, order + letter, value)
    (following,) = _read(order + ("Q" if big else "I"), data, at + count * entry)
    return tags, following


def _tiff(data: bytes) -> Header:
    tags, following = tiff_directory(data)

    def values(tag: int, *default: int) -> tuple[int, ...]:
        return (tag in tags and tags[tag].values(data)) or default

    def first(tag: int, default: int) -> int:
        return values(tag, default)[0]

    bits, numbers = max(values(258, 1)), first(339, 1)
    if numbers not in (1, 4) or bits > 16:
        what = {2: "signed", 3: "floating-point"}.get(
            numbers, "complex" if numbers > 4 else "whole-number"
        )
        raise PictureError(
            f"a TIFF of {bits}-bit {what} samples cannot be shown in 8 bits", remedy=SAVE_AGAIN
        )
    places, lengths = values(273) or values(324), values(279) or values(325)
    end = max((place + length for place, length in zip(places, lengths, strict=False)), default=0)
    if end > len(data):
        raise cut_off(f"the TIFF has {len(data):,} bytes of {end:,}")
    stored, turn = Size(first(256, 0), first(257, 0)), _valid(first(_ORIENTATION, 1))
    mode, samples = _TIFF_MODES.get(first(262, 1), "unknown"), first(277, 1)
    alphas = sum(extra in (1, 2) for extra in values(_EXTRA_SAMPLES))
    planes = samples > 1 and first(284, 1) == 2
    kind = TiffKind(mode, values(258, 1), samples, alphas, first(259, 1), planes, 324 in tags)
    decoder, alpha = decoder_for(kind), kind.extra > 0
    mode = "rgb" if several_bands(kind) else mode
    return Header(
        _upright(stored, turn),
        stored,
        turn,
        "TIFF",
        mode,
        bits,
        alpha,
        following != 0,
        kind,
        decoder,
    )


def _plain_tiff(data: bytes) -> bytes:
    """Return the TIFF declared as upright, with transparency already multiplied into the colours.

    Otherwise libtiff multiplies it in (unless ExtraSamples is 1), where CVAT shows the plain
    colours; and OpenCV 4 and 5 turn it differently.
    """
    tags = tiff_directory(data)[0]
    changes = [tags[name] for name in (_ORIENTATION, _EXTRA_SAMPLES) if name in tags]
    if not changes:
        return data
    changed = bytearray(data)
    for tag in changes:
        if tag.number == 1:  # a single value is stored in the directory itself
            struct.pack_into(tag.layout, changed, tag.place, 1)
    return bytes(changed)


def _valid(orientation: int) -> int:
    return orientation if 1 <= orientation <= 8 else 1


def _exif_orientation(block: bytes) -> int | None:
    """Return the orientation of an EXIF block; None where it has none or is invalid."""
    if block[:4] not in (b"II*\0", b"MM\0*"):
        return None
    try:
        tag = tiff_directory(block)[0].get(_ORIENTATION)
        return _valid(tag.values(block)[0]) if tag and tag.number else None
    except PictureError:
        return None


def _xmp_orientation(packet: bytes) -> int | None:
    match = re.search(rb'tiff:Orientation(?:="|>)([0-9])', packet)
    return _valid(int(match[1])) if match else None


_READERS: dict[bytes, Callable[[bytes], Header]] = {
    b"\xff\xd8": _jpeg,
    b"\x89PNG\r\n\x1a\n": _png,
    b"II*\0": _tiff,
    b"MM\0*": _tiff,
    b"II+\0": _tiff,
    b"MM\0+": _tiff,
    b"BM": _bmp,
    b"RIFF": _webp,
    b"GIF87a": _gif,
    b"GIF89a": _gif,
}
