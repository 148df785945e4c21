"""Turns pydantic's validation errors into our reason, place and remedy, for prompt files and settings alike.

Pydantic finds what is wrong; its own words (`Input should be a valid number [type=float_type …]`, links) are for
programmers. Knows only `errors`' three words, does no I/O.

What can still go wrong here: an error type of a future pydantic that the table does not know is shown in pydantic's
own sentence, without its link.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

Loc: TypeAlias = tuple[str | int, ...]

_SHOWN = 40  # characters of a user's text that are repeated back; enough to recognise it, short enough for one line

_EXPECTED = {
    "float_type": "a number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "string_unicode": "a text that can be written as UTF-8",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "path_type": "a path",
    "dict_type": "an object with keys",
    "model_type": "an object with keys",
    "model_attributes_type": "an object with keys",
    "none_required": "null",
}
_BOUNDS = {
    "greater_than": "must be more than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "too_short": "has {actual_length} entries, needs at least {min_length}",
    "too_long": "has {actual_length} entries, at most {max_length} are allowed",
    "string_too_short": "is empty",
    "string_too_long": "is longer than {max_length} characters",
}


@dataclass(frozen=True, slots=True)
class Complaint:
    """One thing that is wrong: `loc` is the way to it (`("objects", 2, "box", "x1")`)."""

    loc: Loc
    reason: str
    remedy: str | None = None


def refuse(reason: str, remedy: str | None = None, *, key: str | None = None) -> PydanticCustomError:
    """What our own validators raise, so that reason and remedy travel through pydantic unchanged. `key`: which key of
    the object that was validated is to blame."""
    return PydanticCustomError("refused", "{reason}", {"reason": reason, "remedy": remedy, "key": key})


def place(loc: Loc) -> str:
    """`("objects", 2, "box", "x1")` as `objects[2].box.x1`; odd keys in quotes and shortened."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,60}", part):
            text += f".{part}" if text else part
        else:
            text += f"[{quoted(part)}]"
    return text


def quoted(text: str) -> str:
    """A user's text on one line, in double quotes, shortened, with nothing a terminal or a log would act upon."""
    short = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in short)
    return f'"{safe}"'


def show(value: object) -> str:
    """What a value is, in words: `the text "10"`, `true`, `a list`."""
    if isinstance(value, str):
        return f"the text {quoted(value)}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (int, float)):
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, (list, tuple)):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known key that `key` was probably meant to be, if one is near."""
    folded = {k.casefold(): k for k in known}
    found = difflib.get_close_matches(key[:100].casefold(), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def complaints(error: ValidationError, data: object, known: Callable[[Loc], Sequence[str]]) -> list[Complaint]:
    """All of a validation's errors in our words, one for each place.

    `data` is what was validated; `known` gives the keys allowed in the object at a place, for suggestions.
    """
    by_place: dict[Loc, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_place.setdefault(_real_loc(detail, data), []).append(detail)
    for loc, details in list(by_place.items()):
        # A list has too few entries only because one of them is wrong, which is told already.
        inside = any(other[: len(loc)] == loc and len(other) > len(loc) for other in by_place)
        if inside and all(detail["type"] == "too_short" for detail in details):
            del by_place[loc]
    return [_complaint(loc, details, known) for loc, details in by_place.items()]


def _real_loc(detail: ErrorDetails, data: Any) -> Loc:
    """The part of an error's location that exists in the data: pydantic appends the names of union branches."""
    loc = detail["loc"]
    if detail["type"] == "missing":
        return loc
    for depth, part in enumerate(loc):
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return loc[:depth]
    return loc


def _complaint(loc: Loc, details: list[ErrorDetails], known: Callable[[Loc], Sequence[str]]) -> Complaint:
    for detail in details:  # a broken bound or rule says more than "not of this type, not of that type"
        kind, context = detail["type"], detail.get("ctx", {})
        if kind == "refused":
            key = context["key"]
            return Complaint((*loc, key) if key else loc, str(context["reason"]), context["remedy"])
        if kind == "extra_forbidden":
            return unknown_key(loc, known(loc[:-1]))
        if kind == "missing":
            return Complaint(loc, "missing")
        if kind in _BOUNDS:
            return Complaint(loc, _BOUNDS[kind].format(**context))
    expected = [_expected(detail) for detail in details]
    value = details[0]["input"]
    remedy = None
    if isinstance(value, str) and any(e.endswith("number") for e in expected) and _is_number(value):
        remedy = "write the number without quotes"
    return Complaint(loc, f"not {' or '.join(dict.fromkeys(expected))}: it is {show(value)}", remedy)


def unknown_key(loc: Loc, known: Sequence[str]) -> Complaint:
    """The complaint about a key nobody knows, with the one that was probably meant."""
    guess = nearest(str(loc[-1]), known)
    remedy = f"did you mean {guess}?" if guess else f"known here: {', '.join(known)}" if known else None
    return Complaint(loc, "unknown key", remedy)


def _expected(detail: ErrorDetails) -> str:
    if detail["type"] == "literal_error":
        return re.sub(r"'([^']*)'", r"\1", str(detail["ctx"]["expected"]))
    return _EXPECTED.get(detail["type"], f"accepted ({detail['msg']})")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
