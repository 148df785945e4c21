"""What the mergers of all formats share: the names, pieces and sizes of the pictures."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Generic, TypeVar

from sam_poll.core.errors import InputError, UsageError
from sam_poll.core.types import Size

Piece = TypeVar("Piece")


@dataclass(slots=True)
class PictureParts(Generic[Piece]):
    """The pieces of one picture, each with the name of its file.

    `source` is the file that first stated the picture's size.
    """

    size: Size
    source: str
    pieces: list[tuple[str, Piece]] = field(default_factory=list)

    def in_order(self) -> Iterator[Piece]:
        """Iterate over the pieces in the order of their files' names, within a file as added."""
        return (piece for _, piece in sorted(self.pieces, key=lambda pair: pair[0]))


def parts_of(
    images: dict[str, PictureParts[Piece]], name: str, size: Size, file: str
) -> PictureParts[Piece]:
    """Return the entry of this picture in `images`, created if missing.

    Raises InputError where another file states another size for the picture.
    """
    image = images.setdefault(name, PictureParts(size, file))
    if image.size != size:
        was = f"{image.size.width}×{image.size.height} in {image.source}"
        raise InputError(f"image {name!r} is {size.width}×{size.height} here but {was}", place=file)
    return image


def size_of(name: str, entry: Mapping[str, Any]) -> Size:
    """Return a picture's size from the keys `width` and `height` of a file's entry.

    Raises InputError, without a place, where they are missing or invalid.
    """
    width, height = entry.get("width"), entry.get("height")
    if type(width) is int and type(height) is int and width > 0 and height > 0:
        return Size(width, height)
    raise InputError(f"image {name!r} has no width and height in whole pixels")


def share_prefix(folder: str) -> str:
    """Return what is put before the pictures' names if their share is this folder of CVAT's share.

    It is empty, or ends with a slash. Raises UsageError if the folder is not below the share.
    """
    parts = PurePosixPath(folder.strip("/")).parts
    if ".." in parts:
        raise UsageError("leads out of the share", place="--share-prefix")
    return "".join(f"{part}/" for part in parts)


def refuse_shared_stems(images: Mapping[str, PictureParts[Any]], program: str) -> None:
    """Raise InputError if the names of two pictures differ in their extensions only.

    `program` is what cannot tell them apart.
    """
    first: dict[str, str] = {}
    for name in sorted(images):
        other = first.setdefault(posixpath.splitext(name)[0], name)
        if other != name:
            raise InputError(
                f"for {program}, image {name!r} is the same as {other!r}: "
                "only their extensions differ",
                place=images[name].source,
                remedy="rename one of the pictures",
            )
