"""The table of output formats: their names, modules, files and options.

This is the only place that lists the formats: command-line help, settings, HTTP and error messages
take the names from here. A new format needs its module, an entry in `REGISTRY`, a section in
docs/formats.md and a test; the suffixes of its files follow the rule of `core.protocols.Format`. A
format is a pure function from a `Result` to `OutputFile`s; its module
is imported when it is used. This module itself imports nothing heavy, for `sam-poll --help`.

Limitations: an error while importing a format's module is a bug and is raised unchanged.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

from sam_poll.core.errors import SettingsError

if TYPE_CHECKING:  # these import numpy
    from sam_poll.core.protocols import Format

MaskForm = Literal["instances", "per-object"]
CvatForm = Literal["mask", "polygon"]
CocoForm = Literal["rle", "polygon"]
Documents: TypeAlias = Iterable[tuple[str, bytes]]
"""Names and contents of files."""


@dataclass(frozen=True, slots=True)
class FormatSpec:
    """An entry of the registry.

    `maker` is the function (`module:name`) that returns the `Format` for given `FormatOptions`.
    `files` are the suffixes of a job's output files, with their media types. `splitting_option`
    names an option and the value with which the format writes a file for each object instead.
    `draws`: the format needs the decoded picture. `merger` is the function that joins the files of
    many jobs; None: there is none.
    """

    maker: str
    files: Mapping[str, str]
    splitting_option: tuple[str, str] | None = None
    draws: bool = False
    merger: str | None = None


REGISTRY: dict[str, FormatSpec] = {
    "mask": FormatSpec(
        "sam_poll.formats.mask:make",
        {".mask.png": "image/png"},
        splitting_option=("mask", "per-object"),
    ),
    "opex": FormatSpec("sam_poll.formats.opex:make", {".opex.json": "application/json"}),
    "overlay": FormatSpec(
        "sam_poll.formats.overlay:make", {".overlay.jpg": "image/jpeg"}, draws=True
    ),
    "cvat": FormatSpec(
        "sam_poll.formats.cvat:make",
        {".cvat.xml": "application/xml"},
        merger="sam_poll.formats.merge.cvat:merged_cvat",
    ),
    "coco": FormatSpec(
        "sam_poll.formats.coco:make",
        {".coco.json": "application/json"},
        merger="sam_poll.formats.merge.coco:merged_coco",
    ),
    "yolo": FormatSpec(
        "sam_poll.formats.yolo:make",
        {".yolo.txt": "text/plain", ".yolo.yaml": "application/yaml"},
        merger="sam_poll.formats.merge.yolo:merged_yolo",
    ),
}


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """The options of all formats; each format uses its own.

    `tolerance_px` is the maximum distance of a simplified contour from the exact one,
    `min_area_px` the area of the smallest contour written, both in pixels of the full picture.
    `overlay_max_side` is the longest side of an overlay in pixels. Raises SettingsError for an
    invalid value.
    """

    tolerance_px: float = 1.0
    min_area_px: float = 16
    mask: MaskForm = "instances"
    cvat: CvatForm = "mask"
    coco: CocoForm = "rle"
    overlay_max_side: int = 2048

    def __post_init__(self) -> None:
        _check_choice("mask", self.mask, get_args(MaskForm))
        _check_choice("cvat", self.cvat, get_args(CvatForm))
        _check_choice("coco", self.coco, get_args(CocoForm))
        for name, least in (("tolerance_px", 0), ("min_area_px", 0), ("overlay_max_side", 16)):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise SettingsError(f"{value} is not a number of {least} or more", place=name)


def names() -> list[str]:
    """Return the names of all formats, sorted."""
    return sorted(REGISTRY)


def mergeable() -> list[str]:
    """Return the names of the formats whose files can be merged, sorted."""
    return [name for name in names() if REGISTRY[name].merger]


def suffixes(name: str) -> tuple[str, ...]:
    """Return the suffixes of a format's output files. Raises KeyError for an unknown name."""
    return tuple(REGISTRY[name].files)


def media_types() -> list[str]:
    """Return the media types of the formats of one file each, in the order of the registry."""
    alone = [spec.files.values() for spec in REGISTRY.values() if len(spec.files) == 1]
    return list(dict.fromkeys(media_type for (media_type,) in alone))


def draws(wanted: Iterable[str]) -> bool:
    """Return whether one of these formats needs the decoded picture; other names are ignored."""
    return any(name in REGISTRY and REGISTRY[name].draws for name in wanted)


def writes_several(name: str, options: Any) -> bool:
    """Return whether a format may write more than one file for a job.

    `options` is anything with the attributes of `FormatOptions`, such as the settings.
    """
    spec = REGISTRY[name]
    if len(spec.files) > 1:
        return True
    if spec.splitting_option is None:
        return False
    option, value = spec.splitting_option
    return bool(getattr(options, option) == value)


def load(wanted: Iterable[str], options: FormatOptions) -> list[Format]:
    """Return the formats of these names, in this order, each once.

    Raises SettingsError for an unknown name.
    """
    return [_load(name, options) for name in dict.fromkeys(wanted)]


def merged(name: str, documents: Documents, prefix: str = "") -> Iterator[bytes]:
    """Join the files of many jobs into one file; yields it in pieces, after all files are read.

    The files' names end with the format's suffixes; `prefix` is put before the pictures' names. The
    same files give the same bytes in any order. Raises KeyError for a format that cannot be merged,
    and InputError with the file's name as its place where a file is invalid or contradicts another.
    """
    merger = REGISTRY[name].merger
    if merger is None:
        raise KeyError(name)
    merge = cast("Callable[[Documents, str], Iterator[bytes]]", _imported(merger))
    return merge(documents, prefix)


def _load(name: str, options: FormatOptions) -> Format:
    if name not in REGISTRY:
        raise SettingsError(
            f"there is no format {name!r}", place="formats", remedy=_suggestion(name, names())
        )
    maker = cast("Callable[[FormatOptions], Format]", _imported(REGISTRY[name].maker))
    return maker(options)


def _imported(reference: str) -> Any:
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def _check_choice(place: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise SettingsError(
            f"{value!r} is not possible", place=place, remedy=_suggestion(str(value), allowed)
        )


def _suggestion(word: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word).lower(), allowed, n=1)
    return f"did you mean {near[0]!r}?" if near else "possible: " + ", ".join(allowed)
