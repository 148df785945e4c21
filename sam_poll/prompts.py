"""What a prompt file says: bytes in, prompts out, or a refusal that names the place, the reason and the remedy.

Pure: no I/O. `parse` reads a file without its picture, `fit` then holds the prompts against the picture's size. What is
not understood is refused, never guessed. The forms themselves are in `prompt_forms`.

What can still go wrong here: a prompt can be well-formed, inside its picture and still point at the wrong thing;
nothing here can see that.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from pydantic import ValidationError

from sam_poll import foreign
from sam_poll.complaints import Complaint, Loc, complaints, place, quoted, show
from sam_poll.errors import IncompletePromptError, PromptError
from sam_poll.prompt_forms import (
    FORMS,
    KNOWN_KEYS,
    EverythingFile,
    FileForm,
    MosaicFile,
    ObjectsFile,
    OneObjectFile,
    schema,
)
from sam_poll.types import Box, Everything, Mosaic, Point, Prompt, Size, Wanted

__all__ = ["MAX_BYTES", "MAX_PROMPTS", "PromptFile", "as_dict", "as_document", "check_size", "fit", "parse", "schema"]

MAX_BYTES = 4 * 1024 * 1024  # 10,000 prompts, indented and labelled, take about 2.5 MB
MAX_PROMPTS = 10_000  # points and boxes of all objects together
MAX_DEPTH = 16  # the deepest valid file has 5 levels
SEE = "docs/prompts.md shows what a prompt file may say; `sam-poll check` tries one"
OVERHANG = 0.1  # how far a box may reach over an edge and be clipped, as a share of that side (see `fit`)

TOP = "top level"  # the place of what concerns the file's outermost object
_UTF8 = "save it as UTF-8"
_DEEP = f"nested more than {MAX_DEPTH} levels deep"
_MEND = "mend it there; JSON wants double quotes, no comments, and no comma after the last entry"
_COPY = "write it anew, or copy it again; it may have been cut off on its way"

_PIXELS = "coordinates are pixels of the upright picture at its full size"

_CUT_NUMBER = re.compile(r"-|\.|(\.[0-9]+)?[eE][+-]?")  # what json leaves over of a number that is cut off
_CUT_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{0,4})?$")
_WORDS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")

_SHAPES = ("points", "box", "extreme_points")


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A prompt file, read. `image` is the plain name of its picture where the file gives one; `image_sha256` (lower
    case hex) and `image_bytes` describe that picture's file, so that a half-copied one can be told; `image_size` is the
    size of the picture that the coordinates belong to."""

    prompts: Wanted
    image: str | None = None
    image_sha256: str | None = None
    image_bytes: int | None = None
    image_size: Size | None = None


# ── reading ──


def parse(data: bytes, *, max_bytes: int = MAX_BYTES, max_prompts: int = MAX_PROMPTS) -> PromptFile:
    """Reads a prompt file. Raises PromptError, and nothing else, for anything that is not one; IncompletePromptError
    for what could become one if more were written behind its end.

    The first problem is the reason; how many more there are is said behind it. Reason, place and remedy are all given.
    """
    document = _load(_decode(data, max_bytes))
    kind = foreign.of_json(document)
    if kind:
        raise kind.refusal(TOP)
    if not isinstance(document, _Object):
        raise PromptError(f"not a JSON object {{ … }}: it is {show(document)}", place=TOP, remedy=SEE)
    problems = _blemishes(document, max_prompts)
    form = _form(document)
    try:
        read = form.model_validate(document)
    except ValidationError as error:
        problems += complaints(error, document, lambda loc: KNOWN_KEYS.get(_group(loc), ()))
    if problems:
        _raise(problems)
    size = read.image_size.size() if read.image_size else None
    return PromptFile(_prompts(read), read.image, read.image_sha256, read.image_bytes, size)


def _prompts(read: FileForm) -> Wanted:
    if isinstance(read, EverythingFile):
        return Everything(**read.everything.model_dump())
    if isinstance(read, MosaicFile):
        return read.mosaic.mosaic()
    if isinstance(read, ObjectsFile):
        first, *others = (entry.prompt() for entry in read.objects)
        return (replace(first, notes=(*read.notes, *first.notes)), *others)
    assert isinstance(read, OneObjectFile)  # these forms are all there are
    return (read.prompt(),)


def _group(loc: Loc) -> str:
    return next((part for part in reversed(loc) if isinstance(part, str)), "")


def _raise(problems: Sequence[Complaint]) -> NoReturn:
    first, more = problems[0], len(problems) - 1
    reason = first.reason + (f"; and {more} more problem{'s' if more > 1 else ''}" if more else "")
    raise PromptError(reason, place=place(first.loc) or TOP, remedy=first.remedy or SEE)


def _decode(data: bytes, max_bytes: int) -> str:
    if len(data) > max_bytes:
        kind = foreign.of_text(data[: 1 << 20].decode("utf-8", "replace"))
        if kind:
            raise kind.refusal(TOP)
        raise PromptError(
            f"the file is larger than {max_bytes:,} bytes", place=f"byte {max_bytes:,}", remedy="split it into several"
        )
    written = data.rstrip(b"\0")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in written[:4]:
        raise PromptError("the file is UTF-16 or UTF-32, not UTF-8", place="line 1", remedy=_UTF8)
    if len(written) < len(data):  # Windows makes a file as long as it is going to be, and fills it then
        raise IncompletePromptError("the file ends in zero bytes", place=f"byte {len(written):,}", remedy=_COPY)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        if error.reason == "unexpected end of data":
            raise IncompletePromptError(
                "the file ends within a character", place=f"line {line}", remedy=_COPY
            ) from None
        reason = f"not UTF-8: byte 0x{data[error.start]:02x}, as Latin-1 or Windows-1252 would have it"
        raise PromptError(reason, place=f"line {line}", remedy=_UTF8) from None
    if not text.strip():
        raise IncompletePromptError("the file is empty", place="line 1", remedy=_COPY)
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
        kind = foreign.of_xml(text.encode()) if text.lstrip().startswith("<") else None
        if kind:
            raise kind.refusal("line 1") from None
        said = re.sub(r"(:| starting| at)* *$", "", error.msg[:1].lower() + error.msg[1:])
        reason = "something follows the end of the JSON" if said == "extra data" else f"not JSON: {said}"
        where = f"line {error.lineno}, column {error.colno}"
        if _ends_too_early(text, said, error.pos):
            raise IncompletePromptError(reason, place=where, remedy=_COPY) from None
        raise PromptError(reason, place=where, remedy=_MEND) from None
    except RecursionError:
        raise PromptError(_DEEP, place=_deep_place(text), remedy=SEE) from None


def _ends_too_early(text: str, said: str, position: int) -> bool:
    """Whether more text behind the end could still make JSON of it: the error is at the end, or in a word, a number or
    an escape that the end cuts off."""
    rest = text[position:].rstrip()
    if not rest or said.startswith("unterminated"):
        return True
    if said.startswith("invalid \\"):
        return _CUT_ESCAPE.search(text) is not None
    return _CUT_NUMBER.fullmatch(rest) is not None or any(word.startswith(rest) for word in _WORDS)


def _deep_place(text: str) -> str:
    """Where a text is nested deeper than any valid one."""
    depth, at = 0, 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[][{}]', text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        at = found.start()
        if depth > MAX_DEPTH:
            break
    return f"line {text.count(chr(10), 0, at) + 1}, column {at - text.rfind(chr(10), 0, at)}"


def _blemishes(document: _Object, max_prompts: int) -> list[Complaint]:
    """What pydantic would not see: keys given twice, nulls. Raises at once where looking further could be costly."""
    found: list[Complaint] = []
    count = _count(document)
    if count > max_prompts:
        raise PromptError(
            f"{count} points and boxes; at most {max_prompts} are allowed",
            place="objects" if "objects" in document else "points",
            remedy="split it into several files for the same picture",
        )
    nodes, most = 0, 16 * max_prompts + 1000  # a valid prompt has up to 7 values
    stack: list[tuple[Loc, Any]] = [((), document)]
    while stack:
        loc, value = stack.pop()
        nodes += len(value) if isinstance(value, (dict, list)) else 0
        if nodes > most:  # before they are taken apart: a list of a million lists is refused at its first sight
            raise PromptError(f"more than {most} values, more than any valid file has", place=TOP, remedy=SEE)
        if len(loc) > MAX_DEPTH:
            raise PromptError(_DEEP, place=place(loc[:4]) + "…", remedy=SEE)
        if isinstance(value, _Object):
            for name, text in ((k, t) for k, v in value.items() for t in (k, v) if isinstance(t, str)):
                if re.search("[\ud800-\udfff]", text):
                    where = place(loc if text is name else (*loc, name)) or TOP
                    reason = f"half a surrogate pair in {quoted(text)}"
                    raise PromptError(reason, place=where, remedy="write the character itself, in UTF-8")
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


def _form(document: Mapping[str, Any]) -> type[FileForm]:
    given = [key for key in FORMS if key in document]
    single = [key for key in ("label", *_SHAPES) if key in document]
    if len(given) > 1 or (given and single):
        raise PromptError(
            f"several forms at once: {', '.join(given + single)}",
            place=(given + single)[-1],
            remedy="put points, box and label into the entries of objects; everything and mosaic want their own file",
        )
    return FORMS[given[0]] if given else OneObjectFile


# ── against the picture ──


def fit(prompts: Sequence[Prompt], size: Size) -> tuple[Prompt, ...]:
    """The prompts as they apply to a picture of `size`; raises PromptError for those that do not.

    Points must lie on the picture, its edges included (0 ≤ x ≤ width, 0 ≤ y ≤ height): coordinates are those of
    edges, as in CVAT and COCO, so a full-frame box is 0, 0, width, height, and a click may sit on its rim.
    A box may reach over an edge by `OVERHANG` of that side and is clipped, which `Prompt.notes` says: people and
    detectors overshoot where the picture cuts an object off. Farther out, the coordinates are most likely those of
    another picture or scale, and clipping would hide that. So are boxes, and points alone, whose coordinates all lie
    between 0 and 1 on a picture that is larger than two pixels: they are parts of the picture's sides.
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
        problems += _fractions(prompt.points, box, size, loc)
        fitted.append(replace(prompt, box=box, notes=notes))
    if problems:
        _raise(problems)
    return tuple(fitted)


def check_size(stated: Size | None, size: Size, stored: Callable[[], Size] | None = None) -> None:
    """Compare the size that a prompt was made for (None: it does not say) with that of its picture.

    `stored` gives the picture's size in its file, before it is turned as its EXIF orientation says; it is called only
    where the sizes differ. PromptError then: coordinates of another size point at other things.
    """
    if stated is None or stated == size:
        return
    was = f"{stated.width}×{stated.height}"
    reason = f"the picture is {size.width}×{size.height}, but the prompt was made for {was}"
    remedy = "give the picture that it was made for, or make the prompt anew on this one"
    if stored is not None and stated == stored():
        reason += ", which is the picture's size before its EXIF turn"
        remedy = f"make the prompt on the upright picture, or save the picture without EXIF orientation as {was}"
    raise PromptError(reason, place="image_size", remedy=remedy)


def _fractions(points: Sequence[Point], box: Box | None, size: Size, loc: Loc) -> Iterator[Complaint]:
    """Coordinates that are parts of the picture's sides instead of pixels."""
    if max(size) <= 2:
        return
    key, found = "", False
    if box is not None:
        key, found = "box", all(0 <= value <= 1 for value in (box.x0, box.y0, box.x1, box.y1))
    elif points:
        key, found = "points", all(0 < value < 1 for point in points for value in (point.x, point.y))
    if found:
        reason = f"has normalised coordinates: all lie between 0 and 1, on a picture of {size.width}×{size.height}"
        yield Complaint((*loc, key), reason, f"{_PIXELS}: multiply x by {size.width} and y by {size.height}")


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
        yield Complaint(loc, "is empty or inside out: x0 < x1 and y0 < y1 must hold", "swap or part its sides")
    elif box.x1 <= 0 or box.y1 <= 0 or box.x0 >= size.width or box.y0 >= size.height:
        yield Complaint(loc, f"lies beside the picture, which is {size.width}×{size.height}", _PIXELS)


def _outside(loc: Loc, value: float, size: Size) -> Complaint:
    reason = f"{value:g} lies outside the picture, which is {size.width}×{size.height}"
    return Complaint(loc, reason, _PIXELS)


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


def as_document(prompts: Sequence[Prompt] | Everything | Mosaic) -> dict[str, Any]:
    """A whole prompt file, ready for `json.dumps`: `parse` reads it back as the same prompts, but for their notes."""
    if isinstance(prompts, Everything):
        return {"everything": asdict(prompts)}
    if isinstance(prompts, Mosaic):
        flat = {**asdict(prompts), **asdict(prompts.first)}
        return {"mosaic": {key: value for key, value in flat.items() if key not in ("first", "crops")}}
    return {"objects": [as_dict(prompt) for prompt in prompts]}
