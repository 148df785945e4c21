"""Check that an AVIF or a HEIC is complete.

Both are HEIF files (ISO/IEC 23008-12): boxes, one of which lists items, with the place of each in
the file (`iloc`) and its kind (`iinf`). Pillow and pillow-heif read and decode the picture. But
they make a picture of a file with a hole of zeros, without an error, so the items are looked up
here: neither AV1's nor HEVC's compressed data contain 512 zeros in a row.

Limitations: of an animated AVIF only the items are checked for holes, not the further frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sam_poll.core.errors import PictureError
from sam_poll.imaging.damage import HOLE, SAVE_AGAIN, cut_off, damaged, hole_at, too_many

# Major brands of files with pictures; `avis`, `hevc`, `hevx`, `msf1`: with a sequence, too
BRANDS = frozenset(b"avif avis heic heix heim heis hevc hevx hevm hevs mif1 mif2 msf1 miaf".split())
_CODED = {b"av01": "AVIF", b"hvc1": "HEIC"}
_MAX_PARTS = 100_000  # boxes and places; 268 megapixels in tiles of 512 × 512 are a thousand
_DAMAGED = "the picture is damaged: its list of items cannot be read"


@dataclass(frozen=True, slots=True)
class Item:
    """A part of an item: the item's kind, with start and end of the part in the file."""

    kind: bytes
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Box:
    """A box: its name, with start and end of its body."""

    name: bytes
    start: int
    end: int


class _Reader:
    """Reads big-endian numbers from `start` on, not beyond `end`."""

    def __init__(self, data: bytes, start: int, end: int) -> None:
        self.at = start
        self._data = data
        self._end = min(end, len(data))

    def number(self, length: int) -> int:
        """Read a number of so many bytes; raises where the file, or the box, has fewer."""
        self.at += length
        if self.at > self._end:
            raise damaged(self._data, _DAMAGED)
        return int.from_bytes(self._data[self.at - length : self.at], "big")


def is_heif(data: bytes) -> bool:
    """Return whether a file begins as an AVIF or a HEIC does, as far as it is there."""
    if len(data) >= 12:
        return data[4:8] == b"ftyp" and data[8:12] in BRANDS
    return data[:3] == bytes(len(data[:3])) and b"ftyp".startswith(data[4:8])


def read_items(data: bytes) -> list[Item]:
    """Return the items of a HEIF, in the order of the file's list.

    Raises IncompleteFileError where a part of the file is missing, and PictureError where the list
    is damaged.
    """
    tables: dict[bytes, _Box] = {}
    for box in _boxes(data, 0, len(data)):
        if box.end > len(data) and box.name in (b"ftyp", b"meta", b"mdat", b"moov"):
            raise cut_off(f"it has {len(data):,} bytes of {box.end:,}")
        if box.name == b"meta":
            tables = {inner.name: inner for inner in _boxes(data, box.start + 4, box.end)}
            break
    if b"iloc" not in tables or b"iinf" not in tables:
        raise _without_items(data, tables)
    kinds = _kinds(data, tables[b"iinf"])
    items = [Item(kinds.get(of, b""), *place) for of, place in _places(data, tables[b"iloc"])]
    end = max((item.end for item in items), default=0)
    if end > len(data):
        raise cut_off(f"it has {len(data):,} bytes of {end:,}")
    return items


def format_of(items: list[Item]) -> str:
    """Return AVIF or HEIC. Raises PictureError for pictures that are coded in another way."""
    kinds = {item.kind for item in items}
    for kind, name in _CODED.items():
        if kind in kinds:
            return name
    coded = ", ".join(sorted(kind.decode("latin-1") for kind in kinds if kind.isalnum()))
    raise PictureError(
        f"a HEIF without a picture in AV1 or HEVC cannot be read (its items: {coded or 'none'})",
        remedy=SAVE_AGAIN,
    )


def check_holes(data: bytes) -> None:
    """Raise IncompleteFileError where a part of the compressed data is zeros."""
    for item in read_items(data):
        at = data.find(HOLE, item.start, item.end) if item.kind in _CODED else -1
        if at >= 0:
            raise hole_at(at)


def _without_items(data: bytes, tables: dict[bytes, _Box]) -> PictureError:
    if tables:
        return damaged(data, _DAMAGED)
    at = data.find(HOLE)
    return hole_at(at) if at >= 0 else cut_off("the list of its items is missing")


def _boxes(data: bytes, at: int, end: int) -> Iterator[_Box]:
    """Yield the boxes of a file or of a box, up to bytes that cannot begin one."""
    for _ in range(_MAX_PARTS):
        if at + 8 > end:
            return
        reader = _Reader(data, at, len(data))
        length, name = reader.number(4), data[at + 4 : at + 8]
        reader.at = at + 8
        if length == 1:
            length = reader.number(8)
        elif length == 0:  # up to the end
            length = end - at
        if at + length < reader.at or name == bytes(4):
            return
        yield _Box(name, reader.at, at + length)
        at += length
    raise too_many("boxes")


def _kinds(data: bytes, table: _Box) -> dict[int, bytes]:
    """Return the kind of each item (`iinf`)."""
    header = 8 if _Reader(data, table.start, table.end).number(1) else 6
    kinds: dict[int, bytes] = {}
    for box in _boxes(data, table.start + header, table.end):
        reader = _Reader(data, box.start, box.end)
        version = reader.number(1)
        reader.number(3)
        if box.name == b"infe" and version >= 2:
            item = reader.number(4 if version > 2 else 2)
            reader.number(2)
            kinds[item] = reader.number(4).to_bytes(4, "big")
    return kinds


def _places(data: bytes, table: _Box) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield the number of an item with start and end of each of its parts in the file (`iloc`)."""
    reader = _Reader(data, table.start, table.end)
    version = reader.number(1)
    reader.number(3)
    sizes = reader.number(2)
    of_offset = sizes >> 12
    of_length = sizes >> 8 & 15
    of_base = sizes >> 4 & 15
    of_index = sizes & 15 if version else 0
    of_item = 4 if version > 1 else 2
    left = _MAX_PARTS
    for _ in range(reader.number(of_item)):
        item = reader.number(of_item)
        in_file = not version or reader.number(2) & 15 == 0
        reader.number(2)
        base = reader.number(of_base)
        for _ in range(reader.number(2)):
            left -= 1
            if left < 0:
                raise too_many("items")
            reader.number(of_index)
            start = base + reader.number(of_offset)
            length = reader.number(of_length)
            if in_file:
                yield item, (start, start + length if length else len(data))
