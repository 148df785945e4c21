"""The forms of prompt files as pydantic models, and the JSON Schema made from them.

The models validate one file by itself; `parser` does the rest: from bytes to models, and against
the picture. An optional key is `… | None` here, and null itself is refused by `parser`.

Limitations: a rule between keys that is added to a model but not to its `json_schema_extra` makes
the schema more lenient than `parse`, never stricter.
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
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    TypeAdapter,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema, core_schema

from sam_poll.core.types import (
    AutomaticMaskRequest,
    Box,
    ConceptRequest,
    Exemplar,
    MaskFile,
    Mosaic,
    Point,
    Polygon,
    Prompt,
    RunLengths,
    Size,
)
from sam_poll.core.validation import describe_value, validation_error
from sam_poll.prompts import mask_files, run_lengths

TILE_UNIT = 16  # the sides of a TIFF's blocks are multiples of it
MAX_LABEL = 200  # characters; CVAT itself allows 64
MAX_CORNERS = 10_000  # of a polygon
MAX_NOTES, MAX_NOTE = 100, 1000  # of a file; characters of each

# Characters that XML 1.0 cannot hold, or that break a line in a log
_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff"
_LABEL = rf"^[^{_CONTROL}]*[^\s{_CONTROL}][^{_CONTROL}]*$"
_FILE_NAME = rf"^[^/\\{_CONTROL}]+$"


def _whole(value: object) -> object:
    """Accept 1.0 as a whole number, as JSON and the schema's `integer` do."""
    return int(value) if type(value) is float and value.is_integer() else value


WholeNumber = Annotated[int, BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _check_sign(value: object) -> object:
    """Accept 0 and 1 but not booleans, which Python and pydantic take for numbers."""
    value = _whole(value)
    if type(value) is not int:
        raise validation_error(
            f"not 0 or 1: it is {describe_value(value)}", "1: on the object. 0: not on it"
        )
    return value


def check_label(text: str) -> str:
    """Return the label unchanged; raises PydanticCustomError for a blank or multi-line one."""
    if re.search(_LABEL, text) is None or text.endswith("\n"):
        raise validation_error(
            "is blank or holds control characters", "use a plain name on one line"
        )
    return text


def _check_file_name(text: str) -> str:
    if re.search(_FILE_NAME, text) is None or text in (".", "..") or text.endswith("\n"):
        raise validation_error(
            "is not a plain file name",
            "name a picture in the prompt's own folder, without / and \\",
        )
    if len(text.encode("utf-8")) > 255:
        raise validation_error(
            "is longer than a file name can be (255 bytes)",
            "name a picture in the prompt's own folder",
        )
    return text


def _check_sha256(text: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{64}", text) is None:
        raise validation_error(
            "is not a SHA-256: 64 hexadecimal digits", "`sha256sum PICTURE` prints it"
        )
    return text.lower()


Label = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_LABEL,
        json_schema_extra={"pattern": _LABEL},
        description="What it is.",
    ),
    AfterValidator(check_label),
]
FileName = Annotated[
    str,
    Field(
        json_schema_extra={"pattern": _FILE_NAME, "maxLength": 255, "not": {"enum": [".", ".."]}}
    ),
    AfterValidator(_check_file_name),
]
Note = Annotated[
    str,
    Field(min_length=1, max_length=MAX_NOTE, json_schema_extra={"pattern": _LABEL}),
    AfterValidator(check_label),
]
Sha256 = Annotated[
    str, Field(json_schema_extra={"pattern": "^[0-9a-fA-F]{64}$"}), AfterValidator(_check_sha256)
]


class PointForm(_Form):
    """A click, in pixels of the upright picture from its upper left corner."""

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
                raise validation_error(
                    f"has no {size}: {low} and {high} are both {a:g}", "give two opposite corners"
                )
            if a > b:
                raise validation_error(
                    f"is inside out: {low} {a:g} is beyond {high} {b:g}",
                    f"are {low} and {high} swapped?",
                )
        return self


_PAIRS = "write [[x, y], [x, y], …] in pixels of the picture, one pair for each corner"


def _check_pair(value: object) -> object:
    if not isinstance(value, list) or len(value) != 2:
        number = f" of {len(value)}" if isinstance(value, list) else ""
        raise validation_error(
            f"not a pair of numbers: it is {describe_value(value)}{number}", _PAIRS
        )
    return value


Corner = Annotated[list[float], Field(min_length=2, max_length=2), BeforeValidator(_check_pair)]


def _check_corners(corners: list[list[float]]) -> list[list[float]]:
    """Refuse corners that all lie on one line."""
    (x0, y0), *others = corners
    sides = [(x - x0, y - y0) for x, y in others if (x, y) != (x0, y0)]
    if not any(sides[0][0] * dy - sides[0][1] * dx for dx, dy in sides[1:]):
        raise validation_error("has no inside: all corners lie on one line", _PAIRS)
    return corners


_RUN_LENGTHS = (
    'give COCO\'s run lengths of the whole picture, {"size": [height, width], "counts": …}, '
    "as pycocotools and this program's `.coco.json` have them"
)


def _check_counts(value: object) -> tuple[int, ...]:
    """Accept COCO's run lengths as text or as a list of whole numbers."""
    if isinstance(value, str):
        try:
            return tuple(run_lengths.counts_of(value).tolist())
        except ValueError as error:
            raise validation_error(str(error), _RUN_LENGTHS) from None
    if not isinstance(value, list):
        raise validation_error(
            f"neither a text nor a list of numbers: it is {describe_value(value)}", _RUN_LENGTHS
        )
    if not value:
        raise validation_error("are empty", _RUN_LENGTHS)
    for index, number in enumerate(value):
        if type(_whole(number)) is not int:
            reason = f"not a whole number: it is {describe_value(number)}"
            raise validation_error(reason, _RUN_LENGTHS, key=index)
        if number < 0:
            raise validation_error("is negative", _RUN_LENGTHS, key=index)
    return tuple(map(int, value))


Counts = Annotated[
    tuple[int, ...],
    PlainValidator(_check_counts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": "^[0-o]+$"},
                {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
            ]
        }
    ),
]


class MaskForm(_Form):
    """A mask of the whole picture: COCO's run lengths, compressed (a text) or not (a list)."""

    size: Annotated[list[Positive], Field(min_length=2, max_length=2)] = Field(
        description="Height and width of the picture, in this order."
    )
    counts: Counts = Field(
        description="Lengths of the runs of pixels outside and inside, in turn, column by column."
    )

    @model_validator(mode="after")
    def _fills_the_picture(self) -> MaskForm:
        height, width = self.size
        if min(self.counts) < 0:
            raise validation_error("hold a negative run length", _RUN_LENGTHS, key="counts")
        total = sum(self.counts)
        if total != height * width:
            raise validation_error(
                f"are run lengths of {total:,} pixels, and {width}×{height} has {height * width:,}",
                "size is height, then width; write the mask again where both are right",
                key="counts",
            )
        if not sum(self.counts[1::2]):
            raise validation_error(
                "mark no pixel: the mask is empty", "mark the object", key="counts"
            )
        return self

    def run_lengths(self) -> RunLengths:
        height, width = self.size
        return RunLengths(Size(width, height), self.counts)


MASK_FILES = "mask_files"
"""Key of the validation context: whether a mask may be a file beside the picture."""
_MASK_FILE = rf"^[^./\\{_CONTROL}][^/\\{_CONTROL}]*\.[Rr][Oo][Uu][Gg][Hh]\.[Pp][Nn][Gg]$"


class _RunLengthsOrFile:
    """A mask: run lengths, or the name of a mask file where the context permits it."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.with_info_wrap_validator_function(_check_mask, handler(source))

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        file = {
            "type": "string",
            "pattern": _MASK_FILE,
            "maxLength": 255,
            "description": "In the folder of a share: a mask file beside the picture.",
        }
        return {"anyOf": [handler(core), file]}


def _check_mask(
    value: object,
    check_run_lengths: core_schema.ValidatorFunctionWrapHandler,
    info: core_schema.ValidationInfo,
) -> object:
    if isinstance(value, dict):
        return check_run_lengths(value)
    if not isinstance(value, str):
        raise validation_error(f"not run lengths: it is {describe_value(value)}", _RUN_LENGTHS)
    if not (info.context and info.context.get(MASK_FILES)):
        raise validation_error(
            f"not run lengths: it is {describe_value(value)}",
            f"{_RUN_LENGTHS}; a file with a mask is read only beside a picture in the input folder",
        )
    if (
        re.search(_FILE_NAME, value) is None
        or value.startswith(".")
        or not mask_files.is_mask_file(value)
        or len(value.encode("utf-8")) > 255
    ):
        raise validation_error(
            f"not the name of a mask file: it is {describe_value(value)}",
            f"name a file beside the picture that ends in {mask_files.ENDING}, without / and \\; "
            "for dog.jpg dog.rough.png",
        )
    return value


def _needs_foreground(schema: dict[str, Any]) -> None:
    """Add the rules between keys to the schema; `_makes_sense` below checks the same."""
    background = {"properties": {"label": {"const": 0}}, "required": ["label"]}
    clicked = {"required": ["points"], "properties": {"points": {"contains": {"not": background}}}}
    areas = [{"required": [key]} for key in _AREAS]
    schema["anyOf"] = [*areas, clicked]
    schema["not"] = {
        "anyOf": [{"required": ["box", "extreme_points"]}, {"required": ["polygon", "mask"]}]
    }


# The keys of an object that say where it is, so that its points may all be beside it
_AREAS = ("box", "extreme_points", "polygon", "mask")


class ObjectForm(_Form):
    """One object: points, a box (or its four extreme points), a rough shape, or these together."""

    model_config = ConfigDict(json_schema_extra=_needs_foreground)

    label: Label = "object"
    points: list[PointForm] = Field(
        default=[], description="Clicks, at least one of them on the object or a box."
    )
    box: BoxForm | None = None
    extreme_points: Annotated[list[ExtremePointForm], Field(min_length=4, max_length=4)] | None = (
        Field(
            default=None,
            description="The leftmost, topmost, rightmost and lowest point of the object, "
            "in any order.",
        )
    )
    polygon: (
        Annotated[
            list[Corner],
            Field(min_length=3, max_length=MAX_CORNERS),
            AfterValidator(_check_corners),
        ]
        | None
    ) = Field(default=None, description="A rough outline of the object: its corners [x, y].")
    mask: Annotated[MaskForm, _RunLengthsOrFile()] | None = Field(
        default=None, description="A rough mask of the object."
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> ObjectForm:
        if self.box is not None and self.extreme_points is not None:
            remedy = "give one of the two: extreme points stand for a box"
            raise validation_error("stands beside box", remedy, key="extreme_points")
        if self.polygon is not None and self.mask is not None:
            remedy = "give one of the two, or two objects"
            raise validation_error("stands beside mask", remedy, key="polygon")
        has_area = any(getattr(self, key) is not None for key in _AREAS)
        if not has_area and not any(p.label for p in self.points):
            if self.points:
                remedy = "add a point with label 1, or a box"
                raise validation_error(
                    "has no foreground point: all labels are 0", remedy, key="points"
                )
            raise validation_error(
                "requests nothing", "give points, box, extreme_points, polygon or mask"
            )
        self._spanned()
        return self

    def _spanned(self) -> Box | None:
        """Return the box, or the one spanned by the extreme points.

        The extreme points themselves are not used as clicks: SAM was trained with clicks well
        inside an object, and a click on the outline, a pixel or two off, selects the wrong side of
        it as often as the right one.
        """
        if self.box is not None:
            return Box(self.box.x0, self.box.y0, self.box.x1, self.box.y1)
        if self.extreme_points is None:
            return None
        xs, ys = [p.x for p in self.extreme_points], [p.y for p in self.extreme_points]
        box = Box(min(xs), min(ys), max(xs), max(ys))
        if box.x0 == box.x1 or box.y0 == box.y1:
            remedy = "give the object's leftmost, topmost, rightmost and lowest point"
            raise validation_error(
                "lie on one line, which spans no box", remedy, key="extreme_points"
            )
        return box

    def prompt(self) -> Prompt:
        points = tuple(Point(p.x, p.y, p.label) for p in self.points)
        notes = (
            ("box spanned by the four extreme points",) if self.extreme_points is not None else ()
        )
        return Prompt(self.label, points, self._spanned(), notes, self._shape(), self._mask_file())

    def _shape(self) -> Polygon | RunLengths | None:
        if self.polygon is not None:
            return Polygon(tuple((x, y) for x, y in self.polygon))
        return self.mask.run_lengths() if isinstance(self.mask, MaskForm) else None

    def _mask_file(self) -> MaskFile | None:
        name: object = self.mask  # a text where the validator has accepted a file
        return MaskFile(name) if isinstance(name, str) else None


def _check_texts(value: object) -> tuple[str, ...]:
    """Accept a text, or a list of different ones, by the rules of labels, which they become."""
    if isinstance(value, str):
        return (_check_text(value, None),)
    if not isinstance(value, list):
        raise validation_error(
            f"neither a text nor a list of texts: it is {describe_value(value)}",
            'write "dog", or ["dog", "yellow bus"]',
        )
    if not value:
        raise validation_error("has no text", "name what to find")
    texts = tuple(_check_text(text, index) for index, text in enumerate(value))
    for index, text in enumerate(texts):
        if text in texts[:index]:
            raise validation_error("given twice", "keep one of them", key=index)
    return texts


def _check_text(text: object, index: int | None) -> str:
    remedy = "name what to find in a few words on one line"
    if not isinstance(text, str):
        raise validation_error(f"not a text: it is {describe_value(text)}", remedy, key=index)
    if not text.strip():
        raise validation_error("is empty", remedy, key=index)
    if len(text) > MAX_LABEL:
        raise validation_error(f"is longer than {MAX_LABEL} characters", remedy, key=index)
    if re.search(_LABEL, text) is None or text.endswith("\n"):
        raise validation_error("holds control characters", remedy, key=index)
    return text


_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_LABEL, "pattern": _LABEL}
Texts = Annotated[
    tuple[str, ...],
    PlainValidator(_check_texts),
    WithJsonSchema(
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1, "uniqueItems": True},
            ]
        }
    ),
]


class ExemplarForm(_Form):
    """A box around an object that is of the kind to find, or that looks like it and is not."""

    box: BoxForm
    label: Annotated[Literal[0, 1], BeforeValidator(_check_sign)] = Field(
        default=1, description="1: of the kind to find (the default). 0: not of it."
    )

    def exemplar(self) -> Exemplar:
        return Exemplar(Box(self.box.x0, self.box.y0, self.box.x1, self.box.y1), self.label)


LowestIou = Annotated[float, Field(ge=0, le=1, description="Lowest predicted IoU kept.")]
LowestStability = Annotated[float, Field(ge=0, le=1, description="Lowest stability score kept.")]


class EverythingForm(_Form):
    """How to segment everything: a grid of points, and which of the masks to keep."""

    points_per_side: WholeNumber = Field(
        default=AutomaticMaskRequest().points_per_side,
        ge=1,
        le=128,
        description="Grid points a side.",
    )
    min_area: WholeNumber = Field(
        default=AutomaticMaskRequest().min_area, ge=0, description="Smallest mask kept, in pixels."
    )
    iou: LowestIou = AutomaticMaskRequest().iou
    stability: LowestStability = AutomaticMaskRequest().stability
    crops: WholeNumber = Field(
        default=AutomaticMaskRequest().crops,
        ge=0,
        le=4,
        description="Extra layers of enlarged crops.",
    )


# The options of a mosaic that a text goes without: they are for the clicks of everything mode.
CLICK_OPTIONS = ("passes", "target_coverage", "points_per_side", "iou", "stability")
NO_CLICKS = "is for everything mode, which clicks; a text needs no clicks"


def _texts_without_clicks(schema: dict[str, Any]) -> None:
    """Add the rules between keys to the schema; `MosaicForm._fits` checks the same."""
    schema["not"] = {"anyOf": [{"required": ["text", key]} for key in CLICK_OPTIONS]}
    schema["dependentRequired"] = {"threshold": ["text"]}


class MosaicForm(_Form):
    """How to segment a picture larger than memory: tiles, and the options for each."""

    model_config = ConfigDict(json_schema_extra=_texts_without_clicks)

    tile: Annotated[int, Field(ge=64, le=4096, multiple_of=TILE_UNIT), BeforeValidator(_whole)] = (
        Field(default=Mosaic().tile, description="Side of a tile, in pixels.")
    )
    padding: WholeNumber = Field(
        default=Mosaic().padding, ge=8, le=4096, description="Pixels seen around each tile."
    )
    passes: WholeNumber = Field(
        default=Mosaic().passes, ge=1, le=20, description="At most so many passes over a tile."
    )
    target_coverage: float = Field(
        default=Mosaic().target_coverage,
        ge=0,
        le=1,
        description="Further passes end at this part of a tile.",
    )
    points_per_side: WholeNumber = Field(
        default=AutomaticMaskRequest().points_per_side,
        ge=1,
        le=256,
        description="Grid points a side.",
    )
    min_area: WholeNumber = Field(
        default=AutomaticMaskRequest().min_area, ge=1, description="Smallest object, in pixels."
    )
    iou: LowestIou = AutomaticMaskRequest().iou
    stability: LowestStability = AutomaticMaskRequest().stability
    text: Texts | None = Field(
        default=None, description="Find the objects of these texts, instead of everything (SAM 3)."
    )
    threshold: float | None = Field(
        default=None, ge=0, le=1, description="Found objects with a higher score are kept (0.5)."
    )

    @model_validator(mode="after")
    def _fits(self) -> MosaicForm:
        if self.padding > self.tile:
            raise validation_error(
                "is wider than a tile", f"take {self.tile} or less", key="padding"
            )
        if self.text is None and self.threshold is not None:
            remedy = "name what to find with text; everything mode has iou and stability"
            raise validation_error("goes with text", remedy, key="threshold")
        for key in CLICK_OPTIONS:
            if self.text is not None and key in self.model_fields_set:
                raise validation_error(NO_CLICKS, "leave it out; text has threshold", key=key)
        return self

    def mosaic(self) -> Mosaic:
        first = AutomaticMaskRequest(self.points_per_side, self.min_area, self.iou, self.stability)
        concept = None
        if self.text is not None:
            threshold = ConceptRequest().threshold if self.threshold is None else self.threshold
            concept = ConceptRequest(self.text, threshold=threshold)
        return Mosaic(first, self.tile, self.padding, self.passes, self.target_coverage, concept)


class _TrueOrOptions:
    """Adds `true`, for all options at their defaults, to the schema."""

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"const": True}, handler(core)]}


def _true_is_defaults(value: object) -> object:
    if value is True:
        return {}
    if not isinstance(value, dict):
        raise validation_error(
            f"is neither true nor an object with options: it is {describe_value(value)}"
        )
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
        description="The plain file name of the picture, where several share the prompt's stem "
        "(dog.jpg, dog.png).",
    )
    image_sha256: Sha256 | None = Field(
        default=None,
        description="SHA-256 of the picture's file: a picture that does not match is not used.",
    )
    image_bytes: Positive | None = Field(
        default=None, description="Length of the picture's file: it is complete when it has it."
    )
    image_size: SizeForm | None = Field(
        default=None,
        description="Size of the picture that the coordinates belong to: "
        "one of another size is refused.",
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
    """A picture larger than memory: segment all there is, or find by text, tile by tile."""

    mosaic: Annotated[MosaicForm, BeforeValidator(_true_is_defaults), _TrueOrOptions()]


def _describes_a_kind(schema: dict[str, Any]) -> None:
    """Add the rules between keys to the schema; `ConceptFile._makes_sense` checks the same."""
    unlike = {"properties": {"label": {"const": 0}}, "required": ["label"]}
    alike = {"required": ["exemplars"], "properties": {"exemplars": {"contains": {"not": unlike}}}}
    several = {"properties": {"text": {"type": "array", "minItems": 2}}}
    schema["anyOf"] = [{"required": ["text"]}, alike]
    schema["not"] = {
        "anyOf": [
            {"required": ["text", "label"]},
            {"required": ["text", "exemplars"], **several},
        ]
    }


class ConceptFile(FileForm):
    """Find all objects of a kind: words, boxes around exemplars, or both (SAM 3)."""

    model_config = ConfigDict(json_schema_extra=_describes_a_kind)

    text: Texts | None = Field(
        default=None, description="What to find, in a few words; or a list of such texts."
    )
    exemplars: Annotated[list[ExemplarForm], Field(min_length=1)] | None = Field(
        default=None, description="Objects in the picture that are of the kind, or are not."
    )
    label: Label | None = Field(
        default=None, description="Label of what exemplars without a text find (object)."
    )
    threshold: float = Field(
        default=ConceptRequest().threshold,
        ge=0,
        le=1,
        description="Objects with a higher score are kept.",
    )
    max_objects: WholeNumber = Field(
        default=ConceptRequest().max_objects,
        ge=1,
        description="At most so many objects of each text, the best ones.",
    )

    @model_validator(mode="after")
    def _makes_sense(self) -> ConceptFile:
        if self.text is not None and self.label is not None:
            remedy = "leave label out: each object is labelled with its text"
            raise validation_error("stands beside text", remedy, key="label")
        if self.exemplars is None:
            return self
        if self.text is not None and len(self.text) > 1:
            remedy = "give one text, and a file for each of the others"
            raise validation_error("go with several texts", remedy, key="exemplars")
        if self.text is None and not any(entry.label for entry in self.exemplars):
            remedy = "add an exemplar with label 1, or a text"
            raise validation_error(
                "have none of the kind to find: all labels are 0", remedy, key="exemplars"
            )
        return self

    def request(self) -> ConceptRequest:
        return ConceptRequest(
            self.text or (),
            tuple(entry.exemplar() for entry in self.exemplars or ()),
            ConceptRequest().label if self.label is None else self.label,
            self.threshold,
            self.max_objects,
        )


FORMS: dict[str, type[FileForm]] = {
    "objects": ObjectsFile,
    "text": ConceptFile,
    "exemplars": ConceptFile,
    "everything": EverythingFile,
    "mosaic": MosaicFile,
}
_FILES = OneObjectFile | ObjectsFile | ConceptFile | EverythingFile | MosaicFile
_KEYS = {
    **OneObjectFile.model_fields,
    **ObjectsFile.model_fields,
    **ConceptFile.model_fields,
    **EverythingFile.model_fields,
    **MosaicFile.model_fields,
}
# The keys allowed in an object, by the object's own key, for suggestions
KNOWN_KEYS: dict[str, Sequence[str]] = {
    "": tuple(_KEYS),
    "objects": tuple(ObjectForm.model_fields),
    "points": tuple(PointForm.model_fields),
    "extreme_points": tuple(ExtremePointForm.model_fields),
    "box": tuple(BoxForm.model_fields),
    "mask": tuple(MaskForm.model_fields),
    "exemplars": tuple(ExemplarForm.model_fields),
    "everything": tuple(EverythingForm.model_fields),
    "mosaic": tuple(MosaicForm.model_fields),
    "image_size": tuple(SizeForm.model_fields),
}


# ── the schema ──

_EXAMPLES: tuple[dict[str, Any], ...] = (
    {"points": [{"x": 10, "y": 100, "label": 1}]},
    {"box": {"x0": 10, "y0": 90, "x1": 200, "y1": 150}},
    {"objects": [{"label": "dog", "box": {"x0": 10, "y0": 90, "x1": 200, "y1": 150}}]},
    {"polygon": [[10, 90], [200, 90], [200, 150], [10, 150]]},
    {"mask": {"size": [4, 3], "counts": [4, 3, 5]}},
    {"mask": "dog.rough.png"},
    {"text": ["dog", "yellow bus"], "threshold": 0.5},
    {"everything": True},
    {"mosaic": {"tile": 1024, "padding": 128}},
)


def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of prompt files, made from the models that `parse` uses.

    Everything that `parse` accepts is valid against it. `parse` refuses more: contradicting values
    (an inside-out box), duplicate keys, too long file names, and mask files without `mask_files`.
    """
    body = TypeAdapter(_FILES).json_schema()
    head = {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "Prompt file of sam_poll",
        "description": "What to segment in a picture: one object, many objects, all objects of a "
        "kind, or everything, maybe tile by tile.",
        "examples": list(_EXAMPLES),
    }
    return {**head, **_without_null(body)}


def _without_null(part: Any) -> Any:
    """Remove null from a schema: `| None` in the models means that a key may be left out."""
    if isinstance(part, list):
        return [_without_null(v) for v in part if v != {"type": "null"}]
    if not isinstance(part, dict):
        return part
    reduced = {k: _without_null(v) for k, v in part.items() if (k, v) != ("default", None)}
    branches = reduced.get("anyOf", ())
    if len(branches) == 1:
        del reduced["anyOf"]
        reduced = {**branches[0], **reduced}
    return reduced
