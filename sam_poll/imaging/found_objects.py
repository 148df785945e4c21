"""Concept requests: all objects of a kind, named by words or shown by exemplars.

An engine's `find` returns the objects of each text, packed as the masks of everything mode are
(`automatic_masks.pack`), so memory does not grow with the picture until `masks` unpacks them.
Objects of one text are thinned by the network alone, and objects of several texts are all kept.

Limitations: where the masks of two texts' objects are nearly the same, a note says so; which of the
two texts is right is not decided.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sam_poll.core.protocols import Embedding, Engine
from sam_poll.core.types import BoolArray, ConceptRequest, Mask, PackedMask
from sam_poll.core.validation import quoted
from sam_poll.imaging import masks as geometry
from sam_poll.imaging.automatic_masks import unpacked

# Texts passed to the engine in one call; between two calls heartbeats and stop signals are handled.
# On a CPU a text of SAM 3 takes some seconds.
TEXTS_A_CALL, CPU_TEXTS_A_CALL = 8, 1
# IoU above which the masks of two texts' objects are noted as nearly the same.
SAME_MASK = 0.9
# Bytes of masks at full resolution, one a pixel, beyond which those above the second number are
# packed. At 20 megapixels, 200 masks as large as the picture take 1.0 GB instead of 4.0.
ROOM_BYTES, SMALL_BYTES = 512 << 20, 1 << 20
_MOST_NOTED = 20  # pairs with nearly the same mask, each a note


@dataclass(frozen=True, slots=True, eq=False)
class FoundObject:
    """An object found by a concept request, and the label that it gets."""

    label: str
    packed: PackedMask


@dataclass(frozen=True, slots=True, eq=False)
class FoundObjects:
    """All objects found by a concept request, best first, and notes for the result."""

    objects: tuple[FoundObject, ...]
    notes: tuple[str, ...]


# ── on the device thread ──


def search(
    engine: Engine,
    embedding: Embedding,
    request: ConceptRequest,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> FoundObjects:
    """Find the objects of a request, which must fit the picture, in an encoded picture.

    `on_step` is called before each call of the network; an error it raises ends the work. Raises
    PromptError where the engine cannot take the request.
    """
    engine.check_concept(request)
    # An empty text stands for exemplars alone.
    texts = list(request.texts) or [""]
    at_once = CPU_TEXTS_A_CALL if engine.info.device == "cpu" else TEXTS_A_CALL
    objects: list[FoundObject] = []
    notes: list[str] = []
    for start in range(0, len(texts), at_once):
        on_step()
        some = texts[start : start + at_once]
        # One more than allowed, to know whether there are more.
        found = engine.find(
            embedding,
            some,
            request.exemplars,
            threshold=request.threshold,
            most=request.max_objects + 1,
        )
        for text, masks in zip(some, found, strict=True):
            label = text or request.label
            kept = masks[: request.max_objects]
            objects += [FoundObject(label, mask) for mask in kept]
            notes += _count_notes(text, request, len(masks))
    objects.sort(key=lambda found: -found.packed.score)
    return FoundObjects(tuple(objects), tuple(notes))


def _count_notes(text: str, request: ConceptRequest, count: int) -> Iterator[str]:
    what = quoted(text) if text else "the exemplars"
    if not count:
        yield (
            f"nothing found for {what}: no object has a score above the threshold "
            f"of {request.threshold:g}"
        )
    elif count > request.max_objects:
        yield (
            f"more than {request.max_objects} objects found for {what}; "
            "the best are kept (max_objects)"
        )


# ── on the finish pool ──


def masks(
    found: Sequence[FoundObject], *, on_step: Callable[[], None] = lambda: None
) -> list[Mask]:
    """Return the masks of found objects at full resolution, in their order.

    `on_step` is called before each mask; an error it raises ends the work. Their memory is limited
    as by `within_room`.
    """

    def made() -> Iterator[Mask]:
        for one in found:
            on_step()
            yield geometry.mask_of(unpacked(one.packed), one.label)

    return within_room(made())


def within_room(made: Iterable[Mask]) -> list[Mask]:
    """Return masks so that many large ones fit in memory.

    Large masks beyond `ROOM_BYTES` in all are kept with one bit a pixel, and unpacked whenever they
    are read.
    """
    kept: list[Mask] = []
    room = ROOM_BYTES
    for mask in made:
        if mask.pixels.nbytes > max(room, SMALL_BYTES):
            kept.append(PackedBitsMask(mask))
        else:
            room -= mask.pixels.nbytes
            kept.append(mask)
    return kept


class PackedBitsMask(Mask):
    """A mask that keeps one bit a pixel. `pixels` is a new array at each access."""

    __slots__ = ("_area", "_bits", "_shape")
    _area: int
    _bits: npt.NDArray[np.uint8]
    _shape: tuple[int, int]

    def __init__(self, mask: Mask) -> None:
        height, width = mask.pixels.shape
        values = {
            "label": mask.label,
            "score": mask.score,
            "left": mask.left,
            "top": mask.top,
            "_area": mask.area,
            "_bits": np.packbits(mask.pixels),
            "_shape": (height, width),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the base class is frozen

    @property
    def pixels(self) -> BoolArray:
        """The mask's pixels, bool h×w."""
        height, width = self._shape
        bits = np.unpackbits(self._bits, count=height * width)
        return bits.view(bool).reshape(height, width)

    @property
    def area(self) -> int:
        """Number of set pixels."""
        return self._area


def notes_on_same_masks(found: Sequence[FoundObject]) -> tuple[str, ...]:
    """Return a note for each pair of objects of two labels whose masks are nearly the same.

    The masks are compared at the network's low resolution. After `_MOST_NOTED` pairs the rest is
    left out.
    """
    small = [_low_resolution(one) for one in found]
    areas = np.array([mask.area for mask in small])
    crops = np.array([one.packed.crop for one in found]).reshape(-1, 4)
    low, high = crops[:, :2], crops[:, :2] + crops[:, 2:]
    notes: list[str] = []
    for index, mask in enumerate(small):
        sides = np.minimum(high[:index], high[index]) - np.maximum(low[:index], low[index])
        smaller = np.minimum(areas[:index], areas[index])
        larger = np.maximum(areas[:index], areas[index])
        # Two masks have no more in common than their boxes have, or the smaller one has pixels.
        common = np.minimum(sides.clip(0).prod(axis=1), smaller)
        like = common > SAME_MASK * larger
        for other in map(int, np.flatnonzero(like)):
            if mask.label == small[other].label:
                continue
            same = geometry.iou(small[other], mask)
            if same > SAME_MASK:
                notes.append(
                    f"objects {other + 1} ({small[other].label}) and {index + 1} ({mask.label}) "
                    f"have nearly the same mask (IoU {same:.2f})"
                )
            if len(notes) == _MOST_NOTED:
                return (*notes, "further objects may have nearly the same mask, too")
    return tuple(notes)


def _low_resolution(found: FoundObject) -> Mask:
    """Return an object's mask in pixels of the network's low resolution."""
    packed = found.packed
    left, top, width, height = packed.crop
    inside = np.unpackbits(packed.inside, count=width * height).reshape(height, width).view(bool)
    return Mask(found.label, packed.score, left, top, inside)
