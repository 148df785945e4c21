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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NoReturn

from pydantic import ValidationError

from sam_poll.complaints import Complaint, Loc, complaints, place, quoted, show
from sam_poll.errors import PromptError
from sam_poll.prompt_forms import FORMS, KNOWN_KEYS, EverythingFile, FileForm, ObjectsFile, OneObjectFile, schema
from sam_poll.types import Box, Everything, Prompt, Size

__all__ = ["MAX_BYTES", "MAX_PROMPTS", "PromptFile", "as_dict", "as_document", "fit", "parse", "schema"]

MAX_BYTES = 4 * 1024 * 1024  # 10,000 prompts, indented and labelled, take about 2.5 MB
MAX_PROMPTS = 10_000  # points and boxes of all objects together
MAX_DEPTH = 16  # the deepest valid file has 5 levels
OVERHANG = 0.1  # how far a box may reach over an edge and be clipped, as a share of that side (see `fit`)

_SHAPES = ("points", "box", "extreme_points")


@dataclass(frozen=True, slots=True)
class PromptFile:
    """A prompt file, read. `image` is the plain name of its picture where the file gives one; `image_sha256` (lower
    case hex) and `image_bytes` describe that picture's file, so that a half-copied one can be told."""

    prompts: tuple[Prompt, ...] | Everything
    image: str | None = None
    image_sha256: str | None = None
    image_bytes: int | None = None


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
        problems += complaints(error, document, lambda loc: KNOWN_KEYS.get(_group(loc), ()))
    if problems:
        _raise(problems)
    return PromptFile(_prompts(read), read.image, read.image_sha256, read.image_bytes)


def _prompts(read: FileForm) -> tuple[Prompt, ...] | Everything:
    if isinstance(read, EverythingFile):
        return Everything(**read.everything.model_dump())
    if isinstance(read, ObjectsFile):
        return tuple(entry.prompt() for entry in read.objects)
    assert isinstance(read, OneObjectFile)  # the three forms are all there are
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
        said = error.msg[:1].lower() + error.msg[1:]
        reason = "something follows the end of the JSON" if said == "extra data" else f"not JSON: {said}"
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


def _form(document: Mapping[str, Any]) -> type[FileForm]:
    given = [key for key in ("objects", "everything") if key in document]
    single = [key for key in ("label", *_SHAPES) if key in document]
    if len(given) == 2 or (given and single):
        raise PromptError(
            f"several forms at once: {', '.join(given + single)}",
            remedy="put points, box and label into the entries of objects, and everything into a file of its own",
        )
    return FORMS[given[0]] if given else OneObjectFile


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
