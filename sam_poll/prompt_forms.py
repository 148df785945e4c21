"""What a prompt file may say: its forms as pydantic models, and the JSON Schema made from them.

The models check one file for itself; what lies between bytes and models, and the picture, is for `prompts`. A key that
may be left out is `… | None` here, and null itself is refused by `prompts`.

What can still go wrong here: a rule between keys that is added to a model and not to its `json_schema_extra` makes the
schema laxer than `parse`, never stricter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    TypeAdapter,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema

from sam_poll.complaints import refuse, show
from sam_poll.types import Box, Everything, Mosaic, Point, Prompt, Size

TILE_UNIT = 16  # the sides of a TIFF's blocks are multiples of it
MAX_LABEL = 200  # characters; CVAT itself allows 64
MAX_NOTES, MAX_NOTE = 100, 1000  # of a file; characters of each

_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff"  # what XML 1.0 cannot hold, and what breaks a line in a log
_LABEL = rf"^[^{_CONTROL}]*[^\s{_CONTROL}][^{_CONTROL}]*$"
_FILE_NAME = rf"^[^/\\{_CONTROL}]+$"


def _whole(value: object) -> object:
    """JSON knows one kind of number: 1.0 is a whole number, as the schema's `integer` has it."""
    return int(value) if type(value) is float and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _check_sign(value: object) -> object:
    """Python's `True == 1`, and so pydantic's, is not JSON's."""
    value = _whole(value)
    if type(value) is not int:
        raise refuse(f"not 0 or 1: it is {show(value)}", "1: on the object. 0: not on it")
    return value


def check_label(text: str) -> str:
    """The label as it is; PydanticCustomError for one that is blank or would break a line of a log."""
    if re.search(_LABEL, text) is None or text.endswith("\n"):
        raise refuse("is blank or holds control characters", "use a plain name on one line")
    return text


def _check_file_name(text: str) -> str:
    if re.search(_FILE_NAME, text) is None or text in (".", "..") or text.endswith("\n"):
        raise refuse("is not a plain file name", "name a picture in the prompt's own folder, without / and \\")
    if len(text.encode("utf-8")) > 255:
        raise refuse("is longer than a file name can be (255 bytes)", "name a picture in the prompt's own folder")
    return text


def _check_sha256(text: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{64}", text) is None:
        raise refuse("is not a SHA-256: 64 hexadecimal digits", "`sha256sum PICTURE` prints it")
    return text.lower()


Label = Annotated[
    str,
    Field(min_length=1, max_length=MAX_LABEL, json_schema_extra={"pattern": _LABEL}, description="What it is."),
    AfterValidator(check_label),
]
FileName = Annotated[
    str,
    Field(json_schema_extra={"pattern": _FILE_NAME, "maxLength": 255, "not": {"enum": [".", ".."]}}),
    AfterValidator(_check_file_name),
]
Note = Annotated[
    str, Field(min_length=1, max_length=MAX_NOTE, json_schema_extra={"pattern": _LABEL}), AfterValidator(check_label)
]
Sha256 = Annotated[str, Field(json_schema_extra={"pattern": "^[0-9a-fA-F]{64}$"}), AfterValidator(_check_sha256)]


class PointForm(_Form):
    """A click: x to the right and y down, in pixels of the upright picture, from its upper left corner."""

    x: float
    y: float
    label: Annotated[Literal[0, 1], BeforeValidator(_check_sign)] = Field(
        default=1, description="1: on the object (the default). 0: not on it."
    )


class ExtremePointForm(_Form):
    """A point on the object's outline."""

    x: float
    y: float


class BoxForm(_Form):
    """A rectangle around the object: x0 < x1, y0 < y1. A full-frame box is 0, 0, width, height."""

    x0: float
    y0: float
    x1: float
    y1: float

    @model_validator(mode="after")
    def _has_an_inside(self) -> BoxForm:
        for low, high, size in (("x0", "x1", "width"), ("y0", "y1", "height")):
            a, b = getattr(self, low), getattr(self, high)
            if a == b:
                raise refuse(f"has no {size}: {low} and {high} are both {a:g}", "give two opposite corners")
            if a > b:
                raise refuse(f"is inside out: {low} {a:g} is beyond {high} {b:g}", f"are {low} and {high} swapped?")
        return self


def _needs_foreground(schema: dict[str, Any]) -> None:
    """The rules between keys, for the schema: `_makes_sense` below says the same to the reader."""
    background = {"properties": {"label": {"const": 0}}, "required": ["label"]}
    clicked = {"required": ["points"], "properties": {"points": {"contains": {"not": background}}}}
    schema["anyOf"] = [{"required": ["box"]}, {"required": ["extreme_points"]}, clicked]
    schema["not"] = {"required": ["box", "extreme_points"]}


class ObjectForm(_Form):
    """One object: points, a box (or its four extreme points), or points and box together, refining one object."""

    model_config = ConfigDict(json_schema_extra=_needs_foreground)

    label: Label = "object"
    points: list[PointForm] = Field(default=[], description="Clicks, at least one of them on the object or a box.")
    box: BoxForm | None = None
    extreme_points: Annotated[list[ExtremePointForm], Field(min_length=4, max_length=4)] | None = Field(
        default=None,
        description="The leftmost, topmost, rightmost and lowest point of the object, in any order.",
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> ObjectForm:
        if self.box is not None and self.extreme_points is not None:
            remedy = "give one of the two: extreme points stand for a box"
            raise refuse("stands beside box", remedy, key="extreme_points")
        if self.box is None and self.extreme_points is None and not any(p.label for p in self.points):
            if self.points:
                remedy = "add a point with label 1, or a box"
                raise refuse("has no foreground point: all labels are 0", remedy, key="points")
            raise refuse("asks for nothing", "give points, box or extreme_points")
        self._spanned()
        return self

    def _spanned(self) -> Box | None:
        """The box, or the one that the extreme points span.

        The extreme points themselves are not handed on as clicks: SAM was trained with clicks well inside an object,
        and a click on the outline, a pixel or two off, asks for the wrong side of it as often as for the right one.
        """
        if self.box is not None:
            return Box(self.box.x0, self.box.y0, self.box.x1, self.box.y1)
        if self.extreme_points is None:
            return None
        xs, ys = [p.x for p in self.extreme_points], [p.y for p in self.extreme_points]
        box = Box(min(xs), min(ys), max(xs), max(ys))
        if box.x0 == box.x1 or box.y0 == box.y1:
            remedy = "give the object's leftmost, topmost, rightmost and lowest point"
            raise refuse("lie on one line, which spans no box", remedy, key="extreme_points")
        return box

    def prompt(self) -> Prompt:
        points = tuple(Point(p.x, p.y, p.label) for p in self.points)
        notes = ("box spanned by the four extreme points",) if self.extreme_points is not None else ()
        return Prompt(self.label, points, self._spanned(), notes)


class EverythingForm(_Form):
    """How to segment everything: a grid of points, and which of the masks to keep."""

    points_per_side: Whole = Field(
        default=Everything().points_per_side, ge=1, le=128, description="Grid points a side."
    )
    min_area: Whole = Field(default=Everything().min_area, ge=0, description="Smallest mask kept, in pixels.")
    iou: float = Field(default=Everything().iou, ge=0, le=1, description="Lowest predicted IoU kept.")
    stability: float = Field(default=Everything().stability, ge=0, le=1, description="Lowest stability score kept.")
    crops: Whole = Field(default=Everything().crops, ge=0, le=4, description="Extra layers of enlarged crops.")


class MosaicForm(_Form):
    """How to segment a picture larger than memory: tiles, and what is asked of each."""

    tile: Annotated[int, Field(ge=64, le=4096, multiple_of=TILE_UNIT), BeforeValidator(_whole)] = Field(
        default=Mosaic().tile, description="Side of a tile, in pixels."
    )
    padding: Whole = Field(default=Mosaic().padding, ge=8, le=4096, description="Pixels seen around each tile.")
    passes: Whole = Field(default=Mosaic().passes, ge=1, le=20, description="At most so many passes over a tile.")
    target_coverage: float = Field(
        default=Mosaic().target_coverage, ge=0, le=1, description="Further passes end at this part of a tile."
    )
    points_per_side: Whole = Field(
        default=Everything().points_per_side, ge=1, le=256, description="Grid points a side."
    )
    min_area: Whole = Field(default=Everything().min_area, ge=1, description="Smallest object, in pixels.")
    iou: float = Field(default=Everything().iou, ge=0, le=1, description="Lowest predicted IoU kept.")
    stability: float = Field(default=Everything().stability, ge=0, le=1, description="Lowest stability score kept.")

    @model_validator(mode="after")
    def _fits(self) -> MosaicForm:
        if self.padding > self.tile:
            raise refuse("is wider than a tile", f"take {self.tile} or less", key="padding")
        return self

    def mosaic(self) -> Mosaic:
        first = Everything(self.points_per_side, self.min_area, self.iou, self.stability)
        return Mosaic(first, self.tile, self.padding, self.passes, self.target_coverage)


class _TrueOrOptions:
    """`true` stands for all options at their defaults."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"const": True}, handler(core)]}


def _true_is_defaults(value: object) -> object:
    if value is True:
        return {}
    if not isinstance(value, dict):
        raise refuse(f"is neither true nor an object with options: it is {show(value)}")
    return value


class SizeForm(_Form):
    """A picture's width and height in pixels, upright."""

    width: Positive
    height: Positive

    def size(self) -> Size:
        return Size(self.width, self.height)


class FileForm(_Form):
    """What every prompt file may say about its picture."""

    image: FileName | None = Field(
        default=None,
        description="The plain file name of the picture, where several share the prompt's stem (dog.jpg, dog.png).",
    )
    image_sha256: Sha256 | None = Field(
        default=None,
        description="SHA-256 of the picture's file: a picture that does not match is not the one meant.",
    )
    image_bytes: Positive | None = Field(
        default=None, description="Length of the picture's file: it is complete when it has it."
    )
    image_size: SizeForm | None = Field(
        default=None, description="Size of the picture that the coordinates belong to: one of another size is refused."
    )


class OneObjectFile(FileForm, ObjectForm):
    """One object; Waikato's two prompt forms are this."""


class ObjectsFile(FileForm):
    """Many objects, one mask each."""

    objects: list[ObjectForm] = Field(min_length=1)
    notes: Annotated[list[Note], Field(max_length=MAX_NOTES)] = Field(
        default=[], description="Remarks on how the file was made, which the answer's notes repeat."
    )


class EverythingFile(FileForm):
    """No prompt: segment all there is."""

    everything: Annotated[EverythingForm, BeforeValidator(_true_is_defaults), _TrueOrOptions()]


class MosaicFile(FileForm):
    """No prompt, and a picture larger than memory: segment all there is, tile by tile."""

    mosaic: Annotated[MosaicForm, BeforeValidator(_true_is_defaults), _TrueOrOptions()]


FORMS: dict[str, type[FileForm]] = {"objects": ObjectsFile, "everything": EverythingFile, "mosaic": MosaicFile}
_FILES = OneObjectFile | ObjectsFile | EverythingFile | MosaicFile
_KEYS = {
    **OneObjectFile.model_fields,
    **ObjectsFile.model_fields,
    **EverythingFile.model_fields,
    **MosaicFile.model_fields,
}
# The keys allowed in an object by the name it has, for suggestions.
KNOWN_KEYS: dict[str, Sequence[str]] = {
    "": tuple(_KEYS),
    "objects": tuple(ObjectForm.model_fields),
    "points": tuple(PointForm.model_fields),
    "extreme_points": tuple(ExtremePointForm.model_fields),
    "box": tuple(BoxForm.model_fields),
    "everything": tuple(EverythingForm.model_fields),
    "mosaic": tuple(MosaicForm.model_fields),
    "image_size": tuple(SizeForm.model_fields),
}


# ── the schema ──

_EXAMPLES: tuple[dict[str, Any], ...] = (
    {"points": [{"x": 10, "y": 100, "label": 1}]},
    {"box": {"x0": 10, "y0": 90, "x1": 200, "y1": 150}},
    {"objects": [{"label": "dog", "box": {"x0": 10, "y0": 90, "x1": 200, "y1": 150}}]},
    {"everything": True},
    {"mosaic": {"tile": 1024, "padding": 128}},
)


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of prompt files, made from the same models that `parse` uses.

    All that `parse` accepts is valid against it. `parse` refuses more: what lies between values (an inside-out box),
    duplicate keys, and the picture's file name by its length.
    """
    made = TypeAdapter(_FILES).json_schema()
    head = {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "Prompt file of sam_poll",
        "description": "What to segment in a picture: one object, many objects, or everything, maybe tile by tile.",
        "examples": list(_EXAMPLES),
    }
    return {**head, **_without_null(made)}


def _without_null(part: Any) -> Any:
    """`| None` in our models means that a key may be left out; null itself is refused."""
    if isinstance(part, list):
        return [_without_null(v) for v in part if v != {"type": "null"}]
    if not isinstance(part, dict):
        return part
    made = {k: _without_null(v) for k, v in part.items() if (k, v) != ("default", None)}
    branches = made.get("anyOf", ())
    if len(branches) == 1:
        del made["anyOf"]
        made = {**branches[0], **made}
    return made
