"""Which output formats there are, their settings, how one is made ready by its name, and which can be merged.

A format is a pure function from a `Result` to `Document`s: no I/O, no clock, so the same result gives the same bytes.
Each lives in its own module, imported when it is asked for; none knows another.

What can still go wrong here: a module named in REGISTRY that cannot be imported raises as Python does (it is our bug).
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeAlias, TypeVar, cast, get_args

import yaml

from sam_poll.errors import InputError, SettingsError
from sam_poll.types import Format, Mask, Result, Size
from sam_poll.yaml_lines import scalar

MaskForm = Literal["instances", "per-object"]
CvatForm = Literal["mask", "polygon"]
CocoForm = Literal["rle", "polygon"]
Documents: TypeAlias = Iterable[tuple[str, bytes]]  # file names and what is in the files
Piece = TypeVar("Piece")

REGISTRY: dict[str, str] = {
    "mask": "sam_poll.formats.mask:make",
    "opex": "sam_poll.formats.opex:make",
    "overlay": "sam_poll.formats.overlay:make",
    "cvat": "sam_poll.formats.cvat:make",
    "coco": "sam_poll.formats.coco:make",
    "yolo": "sam_poll.formats.yolo:make",
}

# What `merged` joins: the endings of the files that it needs, and who does it.
MERGES: dict[str, tuple[tuple[str, ...], str]] = {
    "cvat": ((".cvat.xml",), "sam_poll.formats.merge:merged_cvat"),
    "coco": ((".coco.json",), "sam_poll.formats.merge_coco:merged_coco"),
    "yolo": ((".yolo.txt", ".yolo.yaml"), "sam_poll.formats.merge_yolo:merged_yolo"),
}


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """The settings of all formats; each takes what it needs.

    `tolerance_px` is how far a simplified contour may lie from the true one, `min_area_px` the smallest contour worth
    writing (both in pixels of the full picture). `overlay_max_side` is the longest side of an overlay in pixels.
    Raises SettingsError for a value that cannot be meant.
    """

    tolerance_px: float = 1.0
    min_area_px: float = 16
    mask: MaskForm = "instances"
    cvat: CvatForm = "mask"
    coco: CocoForm = "rle"
    overlay_max_side: int = 2048

    def __post_init__(self) -> None:
        _one_of("mask", self.mask, get_args(MaskForm))
        _one_of("cvat", self.cvat, get_args(CvatForm))
        _one_of("coco", self.coco, get_args(CocoForm))
        for name, least in (("tolerance_px", 0), ("min_area_px", 0), ("overlay_max_side", 16)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise SettingsError(f"{value} is not a number of {least} or more", place=name)


def names() -> list[str]:
    """The formats there are, sorted."""
    return sorted(REGISTRY)


def load(wanted: Iterable[str], options: FormatOptions) -> list[Format]:
    """The formats of these names, in this order, each once. Raises SettingsError on an unknown name."""
    return [_load(name, options) for name in dict.fromkeys(wanted)]


def merged(name: str, documents: Documents) -> Iterator[bytes]:
    """The files of many pictures (whose names end as MERGES says) as one, in pieces to be written one after another;
    the first comes when all have been read. The same files give the same bytes in whatever order they come.

    Raises KeyError for a name that is not in MERGES, and InputError with the file's name as its place where one is
    broken or contradicts another.
    """
    return cast("Callable[[Documents], Iterator[bytes]]", _function(MERGES[name][1]))(documents)


@dataclass(slots=True)
class Gathered(Generic[Piece]):
    """What the files that are to be merged say of one picture: pieces, with the name of the file each is from."""

    size: Size
    source: str
    pieces: list[tuple[str, Piece]] = field(default_factory=list)

    def in_order(self) -> Iterator[Piece]:
        """The pieces in the order of their files' names; those of one file as they came."""
        return (piece for _, piece in sorted(self.pieces, key=lambda pair: pair[0]))


def gathered(images: dict[str, Gathered[Piece]], name: str, size: Size, file: str) -> Gathered[Piece]:
    """The place for this picture's pieces. InputError where another file gives the picture another size."""
    image = images.setdefault(name, Gathered(size, file))
    if image.size != size:
        was = f"{image.size.width}×{image.size.height} in {image.source}"
        raise InputError(f"image {name!r} is {size.width}×{size.height} here but {was}", place=file)
    return image


def size_of(name: str, entry: Mapping[str, Any]) -> Size:
    """A picture's size from `width` and `height` of what a file says of it. InputError, without a place, if it is not
    there."""
    width, height = entry.get("width"), entry.get("height")
    if type(width) is int and type(height) is int and width > 0 and height > 0:
        return Size(width, height)
    raise InputError(f"image {name!r} has no width and height in whole pixels")


def labels_of(result: Result) -> list[str]:
    """The labels asked for, each once, sorted: those of empty masks, too, so that classes do not depend on luck."""
    return sorted({named(mask.label) for mask in result.masks})


def named(label: str) -> str:
    """A label as formats write it that cannot do without one."""
    return label or "object"


def left_out(number: int, mask: Mask) -> str:
    """Say why the object of this number is not in a file: its mask is empty, or too small for a polygon."""
    why = "every part of it is below the minimum area" if mask.pixels.size else "its mask is empty"
    return f"object {number} ({mask.label}) is left out: {why}"


def yaml_of(facts: Mapping[str, Any]) -> str:
    """As YAML of which every reader makes the same: words that are numbers or truth values to some are quoted."""
    return yaml.dump(facts, Dumper=_Quoting, sort_keys=False, allow_unicode=True, width=1 << 20)


class _Quoting(yaml.SafeDumper):
    """PyYAML quotes what YAML 1.1 takes for something else; this one also what YAML 1.2 does (`1e3`)."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # In double quotes whatever cannot be seen is escaped; in single ones an odd line end would become a space.
    style = None if text.isprintable() and isinstance(scalar(text), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Quoting.add_representer(str, _quoted)


def published_score(score: float) -> float | None:
    """A predicted IoU as files hold it: an IoU lies in 0…1 though the network's guess at it may not; four digits.
    None when it is not a number at all."""
    return round(min(max(float(score), 0.0), 1.0), 4) if math.isfinite(score) else None


def paint_order(masks: Sequence[Mask]) -> list[int]:
    """The masks' indices in the order they are painted over one another: largest area first, so that the smaller lies
    on top; of equal areas the earlier first."""
    areas = [mask.area for mask in masks]
    return sorted(range(len(masks)), key=lambda index: -areas[index])


def _load(name: str, options: FormatOptions) -> Format:
    if name not in REGISTRY:
        raise SettingsError(f"there is no format {name!r}", place="formats", remedy=_hint(name, names()))
    return cast("Callable[[FormatOptions], Format]", _function(REGISTRY[name]))(options)


def _function(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _one_of(place: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise SettingsError(f"{value!r} is not possible", place=place, remedy=_hint(str(value), allowed))


def _hint(word: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word).lower(), allowed, n=1)
    return f"did you mean {near[0]!r}?" if near else "possible: " + ", ".join(allowed)
