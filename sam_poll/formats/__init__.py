"""Which output formats there are, their settings, and how one is made ready by its name.

A format is a pure function from a `Result` to `Document`s: no I/O, no clock, so the same result gives the same bytes.
Each lives in its own module, imported when it is asked for; none knows another.

What can still go wrong here: a module named in REGISTRY that cannot be imported raises as Python does (it is our bug).
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

from sam_poll.errors import SettingsError
from sam_poll.types import Format, Mask

MaskForm = Literal["instances", "per-object"]
CvatForm = Literal["mask"]

REGISTRY: dict[str, str] = {
    "mask": "sam_poll.formats.mask:make",
    "opex": "sam_poll.formats.opex:make",
    "overlay": "sam_poll.formats.overlay:make",
    "cvat": "sam_poll.formats.cvat:make",
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
    overlay_max_side: int = 2048

    def __post_init__(self) -> None:
        _one_of("mask", self.mask, get_args(MaskForm))
        _one_of("cvat", self.cvat, get_args(CvatForm))
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
    module, _, factory = REGISTRY[name].partition(":")
    make = cast(Callable[[FormatOptions], Format], getattr(importlib.import_module(module), factory))
    return make(options)


def _one_of(place: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise SettingsError(f"{value!r} is not possible", place=place, remedy=_hint(str(value), allowed))


def _hint(word: str, allowed: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word).lower(), allowed, n=1)
    return f"did you mean {near[0]!r}?" if near else "possible: " + ", ".join(allowed)
