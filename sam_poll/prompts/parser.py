"""Read prompt files: bytes to prompts, or an error with place, reason and remedy.

Does no I/O. `parse` reads a file without its picture, `fit` then checks the prompts against the
picture's size. Anything that is not understood is refused, never guessed. The forms are in
`schema`.

Limitations: a prompt can be well-formed, inside its picture and still point at the wrong object;
that cannot be detected here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from pydantic import ValidationError

from sam_poll.core.errors import IncompletePromptError, PromptError
from sam_poll.core.types import (
    AutomaticMaskRequest,
    Box,
    ConceptRequest,
    Mosaic,
    Point,
    Polygon,
    Prompt,
    Request,
    RunLengths,
    Size,
)
from sam_poll.core.validation import Loc, ValidationIssue, complaints, describe_value, place, quoted
from sam_poll.prompts import foreign_formats, run_lengths
from sam_poll.prompts.schema import (
    FORMS,
    KNOWN_KEYS,
    MASK_FILES,
    ConceptFile,
    EverythingFile,
    FileForm,
    MosaicFile,
    ObjectsFile,
    OneObjectFile,
    schema,
)

__all__ = [
    "MAX_BYTES",
    "MAX_PROMPTS",
    "PromptFile",
    "as_dict",
    "as_document",
    "check_size",
    "concept_of",
    "fit",
    "fit_request",
    "parse",
    "schema",
    "shape_of",
]

MAX_BYTES = 4 * 1024 * 1024  # 10,000 prompts, indented and labelled, take about 2.5 MB
MAX_PROMPTS = 10_000  # points, boxes and texts of a file together
MAX_DEPTH = 16  # the deepest valid file has 5 levels
SEE = "docs/prompts.md shows what a prompt file may say; `sam-poll check` tries one"
# How far a box may reach over an edge and be clipped, as a share of that side (see `fit`)
OVERHANG = 0.1

TOP = "top level"  # the place of errors of the file's outermost object
_UTF8 = "save it as UTF-8"
_DEEP = f"nested more than {MAX_DEPTH} levels deep"
_MEND = "correct it there; JSON requires double quotes, no comments, no comma after the last entry"
_COPY = "write it again, or copy it again; it may have been cut off on its way"

_PIXELS = "coordinates are pixels of the upright picture at its full size"

# What Python's json leaves over of a truncated number
_CUT_NUMBER = re.compile(r"-|\.|(\.[0-9]+)?[eE][+-]?")
_CUT_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{0,4})?$")
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")

_SHAPES = ("points", "box", "extreme_points", "polygon", "mask")


@dataclass(frozen=True, slots=True)
class PromptFile:
    """The content of a prompt file.

    `image` is the plain name of its picture where the file states one; `image_sha256` (lower case
    hex) and `image_bytes` describe that picture's file, so that an incomplete copy is detected;
    `image_size` is the size of the picture that the coordinates refer to.
    """

    prompts: Request
    image: str | None = None
    image_sha256: str | None = None
    image_bytes: int | None = None
    image_size: Size | None = None


# ── reading ──


def parse(
    data: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_prompts: int = MAX_PROMPTS,
    mask_files: bool = False,
) -> PromptFile:
    """Read a prompt file.

    `mask_files`: a mask may be the name of a file beside the picture (`Prompt.mask_file`), which
    the caller finds and reads.

    Raises PromptError, and nothing else, for anything that is not one; IncompletePromptError for a
    text that could become one with more text at its end. The first problem is the reason, followed
    by the number of further ones; reason, place and remedy are always set.
    """
    document = _load(_decode(data, max_bytes))
    kind = foreign_formats.of_json(document)
    if kind:
        raise kind.refusal(TOP)
    if not isinstance(document, _Object):
        raise PromptError(
            f"not a JSON object {{ … }}: it is {describe_value(document)}", place=TOP, remedy=SEE
        )
    problems = _json_issues(document, max_prompts)
    form = _form(document)
    try:
        read = form.model_validate(document, context={MASK_FILES: mask_files})
    except ValidationError as error:
        problems += complaints(error, document, lambda loc: KNOWN_KEYS.get(_group(loc), ()))
    if problems:
        _raise(problems)
    size = read.image_size.size() if read.image_size else None
    return PromptFile(_prompts(read), read.image, read.image_sha256, read.image_bytes, size)


def encoded(document: object, place: str = TOP) -> bytes:
    """Return decoded JSON, such as a part of a request, as the content of a prompt file.

    Raises PromptError where it is nested too deep, which decoding does not find at every depth.
    """
    try:
        return json.dumps(document).encode("ascii")
    except RecursionError:
        raise PromptError("nested too deep", place=place, remedy=SEE) from None


def concept_of(texts: Iterable[str], threshold: float | None = None) -> ConceptRequest:
    """Return the request for texts from elsewhere than a file, by the rules of prompt files.

    `threshold` None: the default. Raises PromptError; the place is `text[1]` or `threshold`.
    """
    document: dict[str, object] = {"text": list(texts)}
    if threshold is not None:
        document["threshold"] = threshold
    request = parse(encoded(document)).prompts
    assert isinstance(request, ConceptRequest)
    return request


def shape_of(document: Mapping[str, Any]) -> Polygon | RunLengths:
    """Return the rough shape in a document with the key `polygon` or `mask`. Raises PromptError."""
    prompts = parse(encoded(document)).prompts
    assert isinstance(prompts, tuple)
    shape = prompts[0].shape
    assert shape is not None
    return shape


def _prompts(read: FileForm) -> Request:
    if isinstance(read, EverythingFile):
        return AutomaticMaskRequest(**read.everything.model_dump())
    if isinstance(read, MosaicFile):
        return read.mosaic.mosaic()
    if isinstance(read, ConceptFile):
        return read.request()
    if isinstance(read, ObjectsFile):
        first, *others = (entry.prompt() for entry in read.objects)
        return (replace(first, notes=(*read.notes, *first.notes)), *others)
    assert isinstance(read, OneObjectFile)  # these forms are all there are
    return (read.prompt(),)


def _group(loc: Loc) -> str:
    return next((part for part in reversed(loc) if isinstance(part, str)), "")


def _raise(problems: Sequence[ValidationIssue]) -> NoReturn:
    first, more = problems[0], len(problems) - 1
    reason = first.reason
    if more:
        reason += f"; and {more} more problem{'s' if more > 1 else ''}"
    raise PromptError(reason, place=place(first.loc) or TOP, remedy=first.remedy or SEE)


def _decode(data: bytes, max_bytes: int) -> str:
    """Return the file's text. Raises PromptError where it is too long, empty, or not UTF-8."""
    if len(data) > max_bytes:
        kind = foreign_formats.of_text(data[: 1 << 20].decode("utf-8", "replace"))
        if kind:
            raise kind.refusal(TOP)
        raise PromptError(
            f"the file is larger than {max_bytes:,} bytes",
            place=f"byte {max_bytes:,}",
            remedy="split it into several",
        )
    written = data.rstrip(b"\0")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in written[:4]:
        raise PromptError("the file is UTF-16 or UTF-32, not UTF-8", place="line 1", remedy=_UTF8)
    # Windows creates a copied file at its full length, and fills it afterwards.
    if len(written) < len(data):
        raise IncompletePromptError(
            "the file ends in zero bytes", place=f"byte {len(written):,}", remedy=_COPY
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        if error.reason == "unexpected end of data":
            raise IncompletePromptError(
                "the file ends within a character", place=f"line {line}", remedy=_COPY
            ) from None
        reason = f"not UTF-8: byte 0x{data[error.start]:02x}, maybe of Latin-1 or Windows-1252"
        raise PromptError(reason, place=f"line {line}", remedy=_UTF8) from None
    if not text.strip():
        raise IncompletePromptError("the file is empty", place="line 1", remedy=_COPY)
    return text


class _Object(dict[str, Any]):
    """A JSON object that records the keys that were given twice."""

    repeated: Sequence[str] = ()


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    parsed = _Object(pairs)
    if len(parsed) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        parsed.repeated = [key for key, times in counts.items() if times > 1]
    return parsed


def _integer(text: str) -> int | float:
    """Convert long integers to float, whose number of digits is not limited.

    Pydantic then reports that infinity is not a finite number.
    """
    return int(text) if len(text) <= 18 else float(text)


def _load(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        kind = foreign_formats.of_xml(text.encode()) if text.lstrip().startswith("<") else None
        if kind:
            raise kind.refusal("line 1") from None
        message = re.sub(r"(:| starting| at)* *$", "", error.msg[:1].lower() + error.msg[1:])
        reason = f"not JSON: {message}"
        if message == "extra data":
            reason = "something follows the end of the JSON"
        where = f"line {error.lineno}, column {error.colno}"
        if _ends_too_early(text, message, error.pos):
            raise IncompletePromptError(reason, place=where, remedy=_COPY) from None
        raise PromptError(reason, place=where, remedy=_MEND) from None
    except RecursionError:
        raise PromptError(_DEEP, place=_deep_place(text), remedy=SEE) from None


def _ends_too_early(text: str, message: str, position: int) -> bool:
    """Return whether more text at the end could still make the text valid JSON.

    That is so where the error is at the end, or in a word, a number or an escape that is cut off.
    """
    rest = text[position:].rstrip()
    if not rest or message.startswith("unterminated"):
        return True
    if message.startswith("invalid \\"):
        return _CUT_ESCAPE.search(text) is not None
    return _CUT_NUMBER.fullmatch(rest) is not None or any(word.startswith(rest) for word in _WORDS)


def _deep_place(text: str) -> str:
    """Return the position where a text is nested deeper than any valid one."""
    depth, at = 0, 0
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"|[][{}]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token[0], 0)
        at = token.start()
        if depth > MAX_DEPTH:
            break
    return f"line {text.count(chr(10), 0, at) + 1}, column {at - text.rfind(chr(10), 0, at)}"


def _json_issues(document: _Object, max_prompts: int) -> list[ValidationIssue]:
    """Return problems that pydantic does not see: keys given twice, nulls.

    Raises at once where checking further could be costly.
    """
    issues: list[ValidationIssue] = []
    count = _count(document)
    if count > max_prompts:
        raise PromptError(
            f"{count} points, boxes and texts; at most {max_prompts} are allowed",
            place=next((key for key in (*FORMS, "points") if key in document), TOP),
            remedy="split it into several files for the same picture",
        )
    nodes, most = 0, 16 * max_prompts + 1000  # a valid prompt has up to 7 values
    stack: list[tuple[Loc, Any]] = [((), document)]
    while stack:
        loc, value = stack.pop()
        nodes += len(value) if isinstance(value, (dict, list)) else 0
        # Before the values are visited: a list of a million lists is refused at once.
        if nodes > most:
            raise PromptError(
                f"more than {most} values, more than any valid file has", place=TOP, remedy=SEE
            )
        if len(loc) > MAX_DEPTH:
            raise PromptError(_DEEP, place=place(loc[:4]) + "…", remedy=SEE)
        if isinstance(value, _Object):
            issues += _object_issues(loc, value)
            stack += [((*loc, key), v) for key, v in reversed(value.items())]
        elif isinstance(value, list):
            stack += [((*loc, index), v) for index, v in reversed(list(enumerate(value)))]
    return issues


def _object_issues(loc: Loc, value: _Object) -> list[ValidationIssue]:
    """Return the repeated keys and nulls of one object; raises for lone surrogates."""
    texts = ((k, t) for k, v in value.items() for t in (k, v) if isinstance(t, str))
    for name, text in texts:
        if re.search("[\ud800-\udfff]", text):
            where = place(loc if text is name else (*loc, name)) or TOP
            reason = f"half a surrogate pair in {quoted(text)}"
            raise PromptError(reason, place=where, remedy="write the character itself, in UTF-8")
    repeated = [
        ValidationIssue((*loc, key), "given twice", "keep one of them") for key in value.repeated
    ]
    nulls = [
        ValidationIssue((*loc, k), "is null", "leave the key out")
        for k, v in value.items()
        if v is None
    ]
    return repeated + nulls


def _count(document: Mapping[str, Any]) -> int:
    """Return the number of points, boxes and texts of a file.

    Values of a wrong type count as none and are refused later.
    """
    objects = document.get("objects")
    total = 0
    for entry in [document, *(objects if isinstance(objects, list) else [])]:
        if isinstance(entry, dict):
            points = entry.get("points")
            total += len(points) if isinstance(points, list) else 0
            total += sum(key in entry for key in _SHAPES if key != "points")
    mosaic = document.get("mosaic")
    lists = [document.get(key) for key in ("text", "exemplars")]
    lists.append(mosaic.get("text") if isinstance(mosaic, dict) else None)
    return total + sum(len(value) for value in lists if isinstance(value, list))


def _form(document: Mapping[str, Any]) -> type[FileForm]:
    given = [key for key in FORMS if key in document]
    forms = list(dict.fromkeys(FORMS[key] for key in given))
    own = set(forms[0].model_fields) if forms else set()
    single = [key for key in ("label", *_SHAPES) if key in document and key not in own]
    if len(forms) > 1 or (forms and single):
        raise PromptError(
            f"several forms at once: {', '.join(given + single)}",
            place=(given + single)[-1],
            remedy="put points, box and label into the entries of objects; "
            "text, exemplars, everything and mosaic need a file of their own",
        )
    return forms[0] if forms else OneObjectFile


# ── against the picture ──


def fit(prompts: Sequence[Prompt], size: Size) -> tuple[Prompt, ...]:
    """Return the prompts as they apply to a picture of `size`. Raises PromptError.

    Points must be in the picture, its edges included (0 ≤ x ≤ width, 0 ≤ y ≤ height): coordinates
    are those of edges, as in CVAT and COCO, so a full-frame box is 0, 0, width, height. A box may
    reach over an edge by `OVERHANG` of that side and is clipped, which `Prompt.notes` states:
    people and detectors overshoot where the picture cuts an object off. Coordinates farther out are
    most likely those of another picture or scale, which clipping would hide; they are refused. So
    are boxes, and points without a box, whose coordinates are all between 0 and 1 on a picture
    larger than two pixels: these are normalised. Polygons are checked as boxes are; a mask must
    have the picture's size. An object with a rough shape and no box gets the box around the shape.
    The place is `objects[i]…` with several prompts,
    and the key alone with one.
    """
    problems: list[ValidationIssue] = []
    fitted = []
    for index, prompt in enumerate(prompts):
        loc: Loc = ("objects", index) if len(prompts) > 1 else ()
        problems += _points_outside(prompt, size, loc)
        box, notes = prompt.box, prompt.notes
        shape_problems = list(_shape_outside(prompt.shape, size, loc))
        problems += shape_problems
        if box is not None:
            problems += _box_outside(box, size, (*loc, "box"))
            box = _clip(box, size)
            notes += _clipped("box", prompt.box, box)
        elif prompt.shape and not shape_problems:
            around = _bounds(prompt.shape)
            box = _clip(around, size)
            notes += _clipped("the polygon's box", around, box)
        if prompt.box is not None or not isinstance(prompt.shape, RunLengths):
            key = "box" if prompt.box is not None else "polygon"
            problems += _fractions(prompt.points, box, size, loc, key)
        fitted.append(replace(prompt, box=box, notes=notes))
    if problems:
        _raise(problems)
    return tuple(fitted)


def fit_request(request: Request, size: Size) -> Request:
    """Return a request as it applies to a picture of `size`. Raises PromptError.

    Prompts and the boxes of exemplars are checked and clipped as by `fit`; other requests have no
    coordinates.
    """
    if isinstance(request, tuple):
        return fit(request, size)
    if not isinstance(request, ConceptRequest):
        return request
    problems: list[ValidationIssue] = []
    fitted = []
    notes = request.notes
    for index, exemplar in enumerate(request.exemplars):
        loc: Loc = ("exemplars", index)
        box = _clip(exemplar.box, size)
        problems += _box_outside(exemplar.box, size, (*loc, "box"))
        problems += _fractions((), box, size, loc)
        notes += _clipped(f"{place(loc)}.box", exemplar.box, box)
        fitted.append(replace(exemplar, box=box))
    if problems:
        _raise(problems)
    return replace(request, exemplars=tuple(fitted), notes=notes)


def check_size(stated: Size | None, size: Size, stored: Callable[[], Size] | None = None) -> None:
    """Check the size that a prompt was made for (None: not stated) against that of its picture.

    `stored` returns the picture's size in its file, before it is turned by its EXIF orientation; it
    is called only where the sizes differ. Raises PromptError then: coordinates of another size
    point at other objects.
    """
    if stated is None or stated == size:
        return
    was = f"{stated.width}×{stated.height}"
    reason = f"the picture is {size.width}×{size.height}, but the prompt was made for {was}"
    remedy = "give the picture that it was made for, or make a new prompt for this one"
    if stored is not None and stated == stored():
        reason += ", which is the picture's size before its EXIF turn"
        remedy = (
            "make the prompt on the upright picture, "
            f"or save the picture without EXIF orientation as {was}"
        )
    raise PromptError(reason, place="image_size", remedy=remedy)


def _fractions(
    points: Sequence[Point], box: Box | None, size: Size, loc: Loc, key: str = "box"
) -> Iterator[ValidationIssue]:
    """Yield an issue where coordinates are fractions of the picture's sides, not pixels.

    `key` is that of what the box is about.
    """
    if max(size) <= 2:
        return
    normalised = False
    if box is not None:
        normalised = all(0 <= value <= 1 for value in (box.x0, box.y0, box.x1, box.y1))
    elif points:
        key = "points"
        normalised = all(0 < value < 1 for point in points for value in (point.x, point.y))
    if normalised:
        reason = (
            "has normalised coordinates: all lie between 0 and 1, "
            f"on a picture of {size.width}×{size.height}"
        )
        remedy = f"{_PIXELS}: multiply x by {size.width} and y by {size.height}"
        yield ValidationIssue((*loc, key), reason, remedy)


def _points_outside(prompt: Prompt, size: Size, loc: Loc) -> Iterator[ValidationIssue]:
    for index, point in enumerate(prompt.points):
        for axis, value, side in (("x", point.x, size.width), ("y", point.y, size.height)):
            if not 0 <= value <= side:
                yield _outside((*loc, "points", index, axis), value, size)


def _box_outside(box: Box, size: Size, loc: Loc) -> Iterator[ValidationIssue]:
    ends = zip(
        ("x0", "y0", "x1", "y1"), (box.x0, box.y0, box.x1, box.y1), (*size, *size), strict=True
    )
    far = [
        (key, value)
        for key, value, side in ends
        if not -OVERHANG * side <= value <= (1 + OVERHANG) * side
    ]
    if far:
        yield from (_outside((*loc, key), value, size) for key, value in far)
    elif box.x0 >= box.x1 or box.y0 >= box.y1:
        yield ValidationIssue(
            loc, "is empty or inside out: x0 < x1 and y0 < y1 must hold", "swap or part its sides"
        )
    elif box.x1 <= 0 or box.y1 <= 0 or box.x0 >= size.width or box.y0 >= size.height:
        yield ValidationIssue(
            loc, f"is beside the picture, which is {size.width}×{size.height}", _PIXELS
        )


def _bounds(shape: Polygon | RunLengths) -> Box:
    if isinstance(shape, RunLengths):
        return run_lengths.bounds(shape)
    xs, ys = zip(*shape.points, strict=True)
    return Box(min(xs), min(ys), max(xs), max(ys))


def _shape_outside(
    shape: Polygon | RunLengths | None, size: Size, loc: Loc
) -> Iterator[ValidationIssue]:
    """Yield what is wrong with a rough shape in a picture of `size`.

    A polygon may reach over an edge as far as a box; a mask must have the picture's size.
    """
    if isinstance(shape, RunLengths):
        if shape.size != size:
            yield ValidationIssue(
                (*loc, "mask", "size"),
                f"the mask is {shape.size.width}×{shape.size.height}, "
                f"but the picture is {size.width}×{size.height}",
                "make the mask at the full size of the upright picture; size is height, then width",
            )
    elif shape:
        far = [
            ((*loc, "polygon", index, axis), value)
            for index, corner in enumerate(shape.points)
            for axis, (value, side) in enumerate(zip(corner, size, strict=True))
            if not -OVERHANG * side <= value <= (1 + OVERHANG) * side
        ]
        if far:
            yield from (_outside(where, value, size) for where, value in far)
        else:
            yield from _box_outside(_bounds(shape), size, (*loc, "polygon"))


def _outside(loc: Loc, value: float, size: Size) -> ValidationIssue:
    reason = f"{value:g} is outside the picture, which is {size.width}×{size.height}"
    return ValidationIssue(loc, reason, _PIXELS)


def _clip(box: Box, size: Size) -> Box:
    return Box(max(box.x0, 0), max(box.y0, 0), min(box.x1, size.width), min(box.y1, size.height))


def _clipped(name: str, requested: Box | None, used: Box) -> tuple[str, ...]:
    changed = [
        f"{key} {getattr(requested, key):g} → {getattr(used, key):g}"
        for key in ("x0", "y0", "x1", "y1")
        if getattr(requested, key) != getattr(used, key)
    ]
    return (f"{name} clipped to the picture: {', '.join(changed)}",) if changed else ()


# ── writing ──


def as_dict(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as an entry of `objects`: label, points, box, shape, as far as it has them.

    Notes are left out.
    """
    entry: dict[str, Any] = {"label": prompt.label}
    if prompt.points:
        entry["points"] = [{"x": p.x, "y": p.y, "label": p.label} for p in prompt.points]
    if prompt.box is not None:
        entry["box"] = asdict(prompt.box)
    if isinstance(prompt.shape, Polygon):
        entry["polygon"] = [list(corner) for corner in prompt.shape.points]
    elif prompt.shape:
        width, height = prompt.shape.size
        entry["mask"] = {"size": [height, width], "counts": run_lengths.text_of(prompt.shape)}
    elif prompt.mask_file:
        entry["mask"] = prompt.mask_file.name
    return entry


def as_document(prompts: Request) -> dict[str, Any]:
    """Return a prompt file, ready for `json.dumps`.

    `parse` reads it back as the same prompts, without their notes.
    """
    if isinstance(prompts, AutomaticMaskRequest):
        return {"everything": asdict(prompts)}
    if isinstance(prompts, ConceptRequest):
        return _concept_document(prompts)
    if isinstance(prompts, Mosaic):
        return {"mosaic": _mosaic_options(prompts)}
    return {"objects": [as_dict(prompt) for prompt in prompts]}


def _mosaic_options(request: Mosaic) -> dict[str, Any]:
    if request.concept:
        return {
            "text": list(request.concept.texts),
            "threshold": request.concept.threshold,
            "tile": request.tile,
            "padding": request.padding,
            "min_area": request.first.min_area,
        }
    flat = {**asdict(request), **asdict(request.first)}
    return {key: value for key, value in flat.items() if key not in ("first", "crops", "concept")}


def _concept_document(request: ConceptRequest) -> dict[str, Any]:
    document: dict[str, Any] = {}
    if request.texts:
        document["text"] = list(request.texts)
    else:
        document["label"] = request.label
    if request.exemplars:
        document["exemplars"] = [asdict(exemplar) for exemplar in request.exemplars]
    return {**document, "threshold": request.threshold, "max_objects": request.max_objects}
