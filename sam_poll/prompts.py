"""What a prompt file says: bytes in, prompts out, or a refusal that names the place, the reason and the remedy.

Pure: no I/O. `parse` reads a file without its picture, `fit` then holds the prompts against the picture's size, and
`schema` publishes the same rules as JSON Schema. What is not understood is refused, never guessed.

What can still go wrong here: a prompt can be well-formed, inside its picture and still point at the wrong thing;
nothing here can see that.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, NoReturn

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema

from sam_poll.complaints import Complaint, Loc, complaints, place, quoted, refuse, show
from sam_poll.errors import PromptError
from sam_poll.types import Box, Everything, Point, Prompt, Size

MAX_BYTES = 4 * 1024 * 1024  # 10,000 prompts, indented and labelled, take about 2.5 MB
MAX_PROMPTS = 10_000  # points and boxes of all objects together
MAX_LABEL = 200  # characters; CVAT itself allows 64
MAX_DEPTH = 16  # the deepest valid file has 5 levels
OVERHANG = 0.1  # how far a box may reach over an edge and be clipped, as a share of that side (see `fit`)

_CONTROL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ufffe\uffff"  # what XML 1.0 cannot hold, and what breaks a line in a log
_LABEL = rf"^[^{_CONTROL}]*[^\s{_CONTROL}][^{_CONTROL}]*$"
_FILE_NAME = rf"^[^/\\{_CONTROL}]+$"
_SHAPES = ("points", "box", "extreme_points")
_NAMES = ("image", "image_sha256", "image_bytes")


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A prompt file, read. `image` is the plain name of its picture where the file gives one; `image_sha256` (lower
    case hex) and `image_bytes` describe that picture's file, so that a half-copied one can be told."""

    prompts: tuple[Prompt, ...] | Everything
    image: str | None = None
    image_sha256: str | None = None
    image_bytes: int | None = None


# ── the forms, as pydantic models: what they say is also what the schema says ──


class _Form(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


def _check_sign(value: object) -> object:
    """Python's `True == 1`, and so pydantic's, is not JSON's."""
    if type(value) is not int:
        raise refuse(f"not 0 or 1: it is {show(value)}")
    return value


def _check_label(text: str) -> str:
    if re.search(_LABEL, text) is None or text.endswith("\n"):
        raise refuse("is blank or holds control characters", "use a plain name on one line")
    return text


def _check_file_name(text: str) -> str:
    if re.search(_FILE_NAME, text) is None or text in (".", "..") or text.endswith("\n"):
        raise refuse("is not a plain file name", "name a picture in the prompt's own folder, without / and \\")
    if len(text.encode("utf-8")) > 255:
        raise refuse("is longer than a file name can be (255 bytes)")
    return text


def _check_sha256(text: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{64}", text) is None:
        raise refuse("is not a SHA-256: 64 hexadecimal digits")
    return text.lower()


Label = Annotated[
    str,
    Field(min_length=1, max_length=MAX_LABEL, json_schema_extra={"pattern": _LABEL}, description="What it is."),
    AfterValidator(_check_label),
]
FileName = Annotated[str, Field(json_schema_extra={"pattern": _FILE_NAME}), AfterValidator(_check_file_name)]
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
                raise refuse(f"has no {size}: {low} and {high} are both {a:g}")
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
            raise refuse("has both box and extreme_points", "give one of the two: extreme points stand for a box")
        if self.box is None and self.extreme_points is None and not any(p.label for p in self.points):
            if self.points:
                raise refuse("has no foreground point: all labels are 0", "add a point with label 1, or a box")
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
            raise refuse("has extreme points on one line, which span no box")
        return box

    def prompt(self) -> Prompt:
        points = tuple(Point(p.x, p.y, p.label) for p in self.points)
        notes = ("box spanned by the four extreme points",) if self.extreme_points is not None else ()
        return Prompt(self.label, points, self._spanned(), notes)


class EverythingForm(_Form):
    """How to segment everything: a grid of points, and which of the masks to keep."""

    points_per_side: int = Field(default=Everything().points_per_side, ge=1, le=128, description="Grid points a side.")
    min_area: int = Field(default=Everything().min_area, ge=0, description="Smallest mask kept, in pixels.")
    iou: float = Field(default=Everything().iou, ge=0, le=1, description="Lowest predicted IoU kept.")
    stability: float = Field(default=Everything().stability, ge=0, le=1, description="Lowest stability score kept.")
    crops: int = Field(default=Everything().crops, ge=0, le=4, description="Extra layers of enlarged crops.")


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


class _FileForm(_Form):
    """What every prompt file may say about its picture."""

    image: FileName | None = Field(
        default=None,
        description="The plain file name of the picture, where several share the prompt's stem (dog.jpg, dog.png).",
    )
    image_sha256: Sha256 | None = Field(
        default=None,
        description="SHA-256 of the picture's file: a picture that does not match is not the one meant.",
    )
    image_bytes: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="Length of the picture's file: it is complete when it has it."
    )


class OneObjectFile(_FileForm, ObjectForm):
    """One object; Waikato's two prompt forms are this."""


class ObjectsFile(_FileForm):
    """Many objects, one mask each."""

    objects: list[ObjectForm] = Field(min_length=1)


class EverythingFile(_FileForm):
    """No prompt: segment all there is."""

    everything: Annotated[EverythingForm, BeforeValidator(_true_is_defaults), _TrueOrOptions()]


_FORMS: dict[str, type[_FileForm]] = {"objects": ObjectsFile, "everything": EverythingFile}
_KNOWN: dict[str, Sequence[str]] = {
    "": tuple({**OneObjectFile.model_fields, **ObjectsFile.model_fields, **EverythingFile.model_fields}),
    "objects": tuple(ObjectForm.model_fields),
    "points": tuple(PointForm.model_fields),
    "extreme_points": tuple(ExtremePointForm.model_fields),
    "box": tuple(BoxForm.model_fields),
    "everything": tuple(EverythingForm.model_fields),
}


# ── reading ──


def parse(data: bytes, *, max_bytes: int = MAX_BYTES, max_prompts: int = MAX_PROMPTS) -> PromptFile:
    """Reads a prompt file. Raises PromptError, and nothing else, for anything that is not one.

    The first problem is the reason; how many more there are is said behind it.
    """
    document = _load(_decode(data, max_bytes))
    if not isinstance(document, _Object):
        raise PromptError(f"not a JSON object {{ … }}: it is {show(document)}", remedy="see docs/prompts.md")
    problems = _blemishes(document, max_prompts)
    form = _form(document)
    try:
        read = form.model_validate(document)
    except ValidationError as error:
        problems += complaints(error, document, lambda loc: _KNOWN.get(_group(loc), ()))
    if problems:
        _raise(problems)
    return PromptFile(_prompts(read), read.image, read.image_sha256, read.image_bytes)


def _prompts(read: _FileForm) -> tuple[Prompt, ...] | Everything:
    if isinstance(read, EverythingFile):
        return Everything(**read.everything.model_dump())
    if isinstance(read, ObjectsFile):
        return tuple(entry.prompt() for entry in read.objects)
    assert isinstance(read, OneObjectFile)  # noqa: S101 - for mypy; the three forms are all there are
    return (read.prompt(),)


def _group(loc: Loc) -> str:
    return next((part for part in reversed(loc) if isinstance(part, str)), "")


def _raise(problems: Sequence[Complaint]) -> NoReturn:
    first, more = problems[0], len(problems) - 1
    reason = first.reason + (f"; and {more} more problem{'s' if more > 1 else ''}" if more else "")
    raise PromptError(reason, place=place(first.loc) or None, remedy=first.remedy)


def _decode(data: bytes, max_bytes: int) -> str:
    if len(data) > max_bytes:
        raise PromptError(f"the file is larger than {max_bytes} bytes ({len(data)})", remedy="split it")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise PromptError("the file is UTF-16 or UTF-32, not UTF-8", remedy="save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        reason = f"not UTF-8: byte 0x{data[error.start]:02x}, as Latin-1 or Windows-1252 would have it"
        raise PromptError(reason, place=f"line {line}", remedy="save it as UTF-8") from None
    if not text.strip():
        raise PromptError("the file is empty")
    return text


class _Object(dict[str, Any]):
    """A JSON object that remembers which of its keys came twice."""

    repeated: Sequence[str] = ()


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    made = _Object(pairs)
    if len(made) < len(pairs):
        made.repeated = [key for key, times in Counter(key for key, _ in pairs).items() if times > 1]
    return made


def _integer(text: str) -> int | float:
    """Long ones as float, which has no limit of digits: pydantic then says that infinity is not a finite number."""
    return int(text) if len(text) <= 18 else float(text)


def _load(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        reason = (
            "something follows the end of the JSON"
            if error.msg == "Extra data"
            else f"not JSON: {error.msg[:1].lower()}{error.msg[1:]}"
        )
        raise PromptError(reason, place=f"line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise PromptError("nested too deeply") from None


def _blemishes(document: _Object, max_prompts: int) -> list[Complaint]:
    """What pydantic would not see: keys given twice, nulls. Raises at once where looking further could be costly."""
    found: list[Complaint] = []
    count = _count(document)
    if count > max_prompts:
        raise PromptError(f"{count} points and boxes; at most {max_prompts} are allowed", remedy="split the file")
    nodes, most = 0, 16 * max_prompts + 1000  # a valid prompt has up to 7 values
    stack: list[tuple[Loc, Any]] = [((), document)]
    while stack:
        loc, value = stack.pop()
        nodes += 1
        if nodes > most:
            raise PromptError(f"more than {most} values, more than any valid prompt file has")
        if len(loc) > MAX_DEPTH:
            raise PromptError("nested too deeply")
        if isinstance(value, _Object):
            for key in (*value, *(v for v in value.values() if isinstance(v, str))):
                if re.search("[\ud800-\udfff]", key):
                    raise PromptError(f"half a surrogate pair in {quoted(key)}", place=place(loc) or None)
            found += [Complaint((*loc, key), "given twice", "keep one of them") for key in value.repeated]
            found += [Complaint((*loc, k), "is null", "leave the key out") for k, v in value.items() if v is None]
            stack += [((*loc, key), v) for key, v in reversed(value.items())]
        elif isinstance(value, list):
            stack += [((*loc, index), v) for index, v in reversed(list(enumerate(value)))]
    return found


def _count(document: Mapping[str, Any]) -> int:
    """Points and boxes of all objects; what is not of the right type counts as none and is refused later."""
    objects = document.get("objects")
    total = 0
    for entry in [document, *(objects if isinstance(objects, list) else [])]:
        if isinstance(entry, dict):
            points = entry.get("points")
            total += (len(points) if isinstance(points, list) else 0) + ("box" in entry) + ("extreme_points" in entry)
    return total


def _form(document: Mapping[str, Any]) -> type[_FileForm]:
    given = [key for key in ("objects", "everything") if key in document]
    single = [key for key in ("label", *_SHAPES) if key in document]
    if len(given) == 2 or (given and single):
        raise PromptError(
            f"several forms at once: {', '.join(given + single)}",
            remedy="put points, box and label into the entries of objects, and everything into a file of its own",
        )
    return _FORMS[given[0]] if given else OneObjectFile


# ── against the picture ──


def fit(prompts: Sequence[Prompt], size: Size) -> tuple[Prompt, ...]:
    """The prompts as they apply to a picture of `size`; raises PromptError for those that do not.

    Points must lie on the picture, its edges included (0 ≤ x ≤ width, 0 ≤ y ≤ height): coordinates are those of
    edges, as in CVAT and COCO, so a full-frame box is 0, 0, width, height, and a click may sit on its rim.
    A box may reach over an edge by `OVERHANG` of that side and is clipped, which `Prompt.notes` says: people and
    detectors overshoot where the picture cuts an object off. Farther out, the coordinates are most likely those of
    another picture or scale, and clipping would hide that.
    The place is `objects[i]…` where there are several prompts, and the key alone where there is one.
    """
    problems: list[Complaint] = []
    fitted = []
    for index, prompt in enumerate(prompts):
        loc: Loc = ("objects", index) if len(prompts) > 1 else ()
        problems += _points_outside(prompt, size, loc)
        box, notes = prompt.box, prompt.notes
        if box is not None:
            problems += _box_outside(box, size, (*loc, "box"))
            box = Box(max(box.x0, 0), max(box.y0, 0), min(box.x1, size.width), min(box.y1, size.height))
            notes += _clipped(prompt.box, box)
        fitted.append(replace(prompt, box=box, notes=notes))
    if problems:
        _raise(problems)
    return tuple(fitted)


def _points_outside(prompt: Prompt, size: Size, loc: Loc) -> Iterator[Complaint]:
    for index, point in enumerate(prompt.points):
        for axis, value, side in (("x", point.x, size.width), ("y", point.y, size.height)):
            if not 0 <= value <= side:
                yield _outside((*loc, "points", index, axis), value, size)


def _box_outside(box: Box, size: Size, loc: Loc) -> Iterator[Complaint]:
    ends = zip(("x0", "y0", "x1", "y1"), (box.x0, box.y0, box.x1, box.y1), (*size, *size), strict=True)
    far = [(key, value) for key, value, side in ends if not -OVERHANG * side <= value <= (1 + OVERHANG) * side]
    if far:
        yield from (_outside((*loc, key), value, size) for key, value in far)
    elif box.x0 >= box.x1 or box.y0 >= box.y1:
        yield Complaint(loc, "is empty or inside out: x0 < x1 and y0 < y1 must hold")
    elif box.x1 <= 0 or box.y1 <= 0 or box.x0 >= size.width or box.y0 >= size.height:
        yield Complaint(loc, f"lies beside the picture, which is {size.width}×{size.height}")


def _outside(loc: Loc, value: float, size: Size) -> Complaint:
    reason = f"{value:g} lies outside the picture, which is {size.width}×{size.height}"
    return Complaint(loc, reason, "coordinates are pixels of the upright picture at its full size")


def _clipped(asked: Box | None, used: Box) -> tuple[str, ...]:
    changed = [
        f"{key} {getattr(asked, key):g} → {getattr(used, key):g}"
        for key in ("x0", "y0", "x1", "y1")
        if getattr(asked, key) != getattr(used, key)
    ]
    return (f"box clipped to the picture: {', '.join(changed)}",) if changed else ()


# ── writing ──


def as_dict(prompt: Prompt) -> dict[str, Any]:
    """A prompt as one entry of `objects`: label, points, box, as far as it has them. Notes are left out."""
    made: dict[str, Any] = {"label": prompt.label}
    if prompt.points:
        made["points"] = [{"x": p.x, "y": p.y, "label": p.label} for p in prompt.points]
    if prompt.box is not None:
        made["box"] = {"x0": prompt.box.x0, "y0": prompt.box.y0, "x1": prompt.box.x1, "y1": prompt.box.y1}
    return made


def as_document(prompts: Sequence[Prompt] | Everything) -> dict[str, Any]:
    """A whole prompt file, ready for `json.dumps`: `parse` reads it back as the same prompts, but for their notes."""
    if isinstance(prompts, Everything):
        return {"everything": asdict(prompts)}
    return {"objects": [as_dict(prompt) for prompt in prompts]}


# ── the schema ──

_EXAMPLES: tuple[dict[str, Any], ...] = (
    {"points": [{"x": 10, "y": 100, "label": 1}]},
    {"box": {"x0": 10, "y0": 90, "x1": 200, "y1": 150}},
    {"objects": [{"label": "dog", "box": {"x0": 10, "y0": 90, "x1": 200, "y1": 150}}]},
    {"everything": True},
)


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of prompt files, made from the same models that `parse` uses.

    All that `parse` accepts is valid against it. `parse` refuses more: what lies between values (an inside-out box),
    duplicate keys, and the picture's file name by its length.
    """
    made = TypeAdapter(OneObjectFile | ObjectsFile | EverythingFile).json_schema()
    head = {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "Prompt file of sam_poll",
        "description": "What to segment in a picture: one object, many objects, or everything.",
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
