"""CVAT's XML: its export `CVAT for images 1.1`, which is also its import format `CVAT 1.1`.

Boxes, also rotated ones, and points are read; other shapes are counted. A point that is not on its
object has one of `NEGATIVE_LABELS`, or a ticked checkbox attribute `negative`. The file is read in
one pass without building a tree.

Limitations: a box on the wrong picture cannot be detected. Labels are not checked.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal

from sam_poll.core import xml_reader
from sam_poll.core.errors import IncompletePromptError, InputError, PromptError
from sam_poll.core.types import Size
from sam_poll.core.validation import quoted
from sam_poll.prompts import foreign_formats
from sam_poll.prompts.importers.common import (
    MAX_IMAGES,
    MAX_SHAPES,
    counted,
    each_once,
    image_place,
    number,
    whole,
)
from sam_poll.prompts.importers.shapes import (
    NEGATIVE_ATTRIBUTE,
    Annotated,
    Shape,
    box_shape,
    faulty,
    is_negative_label,
)

VERSION = "1.1"
MAX_DEPTH = 64  # levels; a task's description has 7, a skeleton 5
EXPORT = "in CVAT: Actions → Export task dataset → `CVAT for images 1.1`"

_LEFT_OUT = frozenset({"cuboid", "ellipse", "mask", "polygon", "polyline", "skeleton", "tag"})
_TICKED = {"true": True, "false": False, "": False}


def read(data: bytes) -> list[Annotated]:
    """Return the pictures of an XML file, in its order, also those without shapes.

    Raises PromptError, with the place (`image "dog.jpg", box 3`) and the remedy, for an invalid
    file; IncompletePromptError where the end of the file is missing. A shape with invalid
    coordinates, and an inside-out box, are not errors here: only their own object is refused later.
    """
    try:
        pictures: list[Annotated] = xml_reader.parse(data, _Reader())
    except IncompletePromptError as error:
        raise IncompletePromptError(error.reason, place="the XML file", remedy=EXPORT) from None
    except PromptError:
        raise
    except InputError as error:
        raise PromptError(error.reason, place="the XML file", remedy=EXPORT) from None
    return each_once(pictures)


class _Reader:
    """A parser's target that collects the pictures while the file is parsed."""

    def __init__(self) -> None:
        self._depth = 0
        self._pictures: list[Annotated] = []
        self._shapes: list[Shape] = []
        self._left_out: Counter[str] = Counter()
        self._numbers: Counter[str] = Counter()
        self._total = 0
        self._image: dict[str, str] | None = None  # the attributes of the open <image>
        self._name = ""
        self._size: Size | None = None
        self._shape: tuple[str, dict[str, str]] | None = None  # the open shape: tag, attributes
        self._negative: bool | None = None
        self._text: list[str] | None = None
        self._version: str | None = None
        self._labels: dict[str, str] = {}

    # ── the parser calls these ──

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        if self._depth == 1:
            self._begin_file(tag)
        elif self._depth == 2:
            self._begin_part(tag, attributes)
        elif self._depth == 3 and self._image is not None:
            self._begin_shape(tag, attributes)
        elif (
            self._depth == 4
            and self._shape
            and tag == "attribute"
            and attributes.get("name") == NEGATIVE_ATTRIBUTE
        ):
            self._text = []
        elif self._depth > MAX_DEPTH:
            raise PromptError(
                "is nested deeper than any CVAT file", place="the XML file", remedy=EXPORT
            )

    def data(self, text: str) -> None:
        if self._text is not None:
            self._text.append(text)

    def end(self, tag: str) -> None:
        if self._depth == 4 and self._text is not None:
            self._end_attribute("".join(self._text).strip())
            self._text = None
        elif self._depth == 3 and self._shape is not None:
            self._end_shape(*self._shape)
            self._shape = None
        elif self._depth == 2:
            self._end_part(tag)
        self._depth -= 1

    def close(self) -> list[Annotated]:
        if self._version != VERSION:
            version = quoted(self._version)[1:-1] if self._version else "unknown"
            reason = f"is CVAT XML version {version}, not {VERSION}"
            raise PromptError(reason, place="the XML file", remedy=EXPORT)
        return self._pictures

    # ── what the elements mean ──

    def _begin_file(self, tag: str) -> None:
        if tag == "annotation":
            raise foreign_formats.VOC.refusal("the XML file", "a `CVAT for images` file")
        if tag != "annotations":
            reason = f"is not a CVAT file: its root is <{quoted(tag)[1:-1]}>, not <annotations>"
            raise PromptError(reason, place="the XML file", remedy=EXPORT)

    def _begin_part(self, tag: str, attributes: dict[str, str]) -> None:
        if tag == "version":
            self._text = []
        elif tag == "image":
            self._begin_image(attributes)
        elif tag == "track":
            raise PromptError(
                "is a `CVAT for video` file: it has tracks", place="the XML file", remedy=EXPORT
            )
        elif tag != "meta":
            reason = f"<{quoted(tag)[1:-1]}> does not belong into annotations of images"
            raise PromptError(reason, place="the XML file", remedy=EXPORT)

    def _begin_image(self, attributes: dict[str, str]) -> None:
        if len(self._pictures) >= MAX_IMAGES:
            raise PromptError(
                f"has more than {MAX_IMAGES:,} images",
                place="the XML file",
                remedy="export fewer tasks",
            )
        self._name = attributes.get("name", "")
        if not self._name:
            raise PromptError(
                "has no name", place=f"image {len(self._pictures) + 1}", remedy=EXPORT
            )
        self._image = attributes
        self._shapes = []
        self._size = None
        self._left_out = Counter()
        self._numbers = Counter()
        sides = [attributes.get(key) for key in ("width", "height")]
        if sides != [None, None]:
            with self._placing():
                width, height = (
                    whole(v, k, least=1) for k, v in zip(("width", "height"), sides, strict=True)
                )
            self._size = Size(width, height)

    def _begin_shape(self, tag: str, attributes: dict[str, str]) -> None:
        self._total += 1
        if self._total > MAX_SHAPES:
            raise PromptError(
                f"has more than {MAX_SHAPES:,} shapes",
                place="the XML file",
                remedy="export fewer tasks",
            )
        if tag in ("box", "points"):
            self._numbers[tag] += 1
            self._shape, self._negative = (tag, attributes), None
        elif tag in _LEFT_OUT:
            self._left_out[tag] += 1
        else:
            reason = f"<{quoted(tag)[1:-1]}> does not belong into an <image>"
            raise PromptError(reason, place=image_place(self._name), remedy=EXPORT)

    def _end_attribute(self, text: str) -> None:
        if self._shape is None:
            return
        self._negative = _TICKED.get(text.lower())
        if self._negative is None:
            reason = (
                f"its attribute `{NEGATIVE_ATTRIBUTE}` is neither true nor false: {quoted(text)}"
            )
            with self._placing():
                raise PromptError(reason, remedy="make the attribute a checkbox")

    def _end_shape(self, tag: str, given: dict[str, str]) -> None:
        label = given.get("label", "")
        with self._placing():
            if not label:
                raise PromptError("has no label", remedy=EXPORT)
            # One string for all shapes of a label: there may be millions.
            label = self._labels.setdefault(label, label)
            group = whole(given.get("group_id", "0"), "group_id")
            more: dict[str, Any] = {"group": group, "negative": bool(self._negative)}
            if tag == "points":
                more["negative"] = bool(self._negative) or is_negative_label(label)
            try:
                self._shapes.append(self._made(tag, given, label, more))
            except PromptError as error:
                shape = f"{tag} {self._numbers[tag]}"
                error.place = f"{shape}, {error.place}" if error.place else shape
                kind: Literal["box", "points"] = "box" if tag == "box" else "points"
                self._shapes.append(faulty(kind, label, error, **more))

    def _made(self, tag: str, given: dict[str, str], label: str, more: dict[str, Any]) -> Shape:
        if tag == "points":
            return Shape("points", label, _points(given), **more)
        x0, y0, x1, y1 = (number(given.get(key), key) for key in ("xtl", "ytl", "xbr", "ybr"))
        turn = number(given.get("rotation", "0"), "rotation")
        return box_shape((x0, y0, x1, y1), label, rotation=turn, size=self._size, **more)

    @contextlib.contextmanager
    def _placing(self) -> Iterator[None]:
        """Prefix the place of errors with the current picture and shape."""
        try:
            yield
        except PromptError as error:
            shape = [f"{self._shape[0]} {self._numbers[self._shape[0]]}"] if self._shape else []
            error.place = ", ".join(
                [image_place(self._name), *shape, *([error.place] if error.place else [])]
            )
            raise

    def _end_part(self, tag: str) -> None:
        if tag == "version" and self._text is not None:
            self._version, self._text = "".join(self._text).strip(), None
        elif tag == "image":
            self._pictures.append(
                Annotated(self._name, self._size, tuple(self._shapes), counted(self._left_out))
            )
            self._image = None


def _points(given: dict[str, str]) -> tuple[tuple[float, float], ...]:
    points = []
    for index, pair in enumerate(given.get("points", "").split(";"), start=1):
        at = f"point {index}"
        halves = pair.split(",")
        if len(halves) != 2:
            raise PromptError(f"is not x,y: {quoted(pair)}", place=at, remedy=EXPORT)
        points.append((number(halves[0], at), number(halves[1], at)))
    return tuple(points)
