"""Convert pydantic's validation errors to reason, place and remedy, for prompt files and settings.

Pydantic's own messages (`Input should be a valid number [type=float_type …]`, links) are meant for
programmers. Does no I/O.

Limitations: an error type of a later pydantic version that is missing in the tables here is shown
in pydantic's words, without its link.
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

# Maximum number of characters of a user's text in a message: enough to recognise it on one line
_SHOWN = 40

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
class ValidationIssue:
    """One problem; `loc` is the path to it (`("objects", 2, "box", "x1")`)."""

    loc: Loc
    reason: str
    remedy: str | None = None


def validation_error(
    reason: str, remedy: str | None = None, *, key: str | int | None = None
) -> PydanticCustomError:
    """Return the error for a validator to raise, with reason and remedy.

    `key` is the invalid key of the validated object, or the index in the validated list, where the
    object or list itself is not meant.
    """
    return PydanticCustomError(
        "refused", "{reason}", {"reason": reason, "remedy": remedy, "key": key}
    )


def place(loc: Loc) -> str:
    """Format a location: `("objects", 2, "box", "x1")` as `objects[2].box.x1`.

    Unusual keys are quoted and shortened.
    """
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
    """Return a user's text on one line, in double quotes, shortened, control characters escaped."""
    short = text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
    safe = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in short
    )
    return f'"{safe}"'


def describe_value(value: object) -> str:
    """Describe a value in words: `the text "10"`, `true`, `a list`."""
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
    """Return the known key most similar to `key`; None when none is similar."""
    folded = {k.casefold(): k for k in known}
    matches = difflib.get_close_matches(key[:100].casefold(), folded, n=1, cutoff=0.6)
    return folded[matches[0]] if matches else None


def complaints(
    error: ValidationError, data: object, known: Callable[[Loc], Sequence[str]]
) -> list[ValidationIssue]:
    """Convert a validation error to issues, one for each place.

    `data` is what was validated; `known` returns the keys allowed in the object at a place, for
    suggestions.
    """
    by_place: dict[Loc, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        by_place.setdefault(_real_loc(detail, data), []).append(detail)
    for loc, details in list(by_place.items()):
        # A list has too few entries because one of them is invalid, which is reported already.
        inside = any(other[: len(loc)] == loc and len(other) > len(loc) for other in by_place)
        if inside and all(detail["type"] == "too_short" for detail in details):
            del by_place[loc]
    return [_issue(loc, details, known) for loc, details in by_place.items()]


def _real_loc(detail: ErrorDetails, data: Any) -> Loc:
    """Return the part of an error's location that exists in the data.

    Pydantic appends the names of union branches.
    """
    loc = detail["loc"]
    if detail["type"] == "missing":
        return loc
    for depth, part in enumerate(loc):
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return loc[:depth]
    return loc


def _issue(
    loc: Loc, details: list[ErrorDetails], known: Callable[[Loc], Sequence[str]]
) -> ValidationIssue:
    # A violated bound or rule says more than "not of this type, not of that type".
    for detail in details:
        kind, context = detail["type"], detail.get("ctx", {})
        if kind == "refused":
            key = context["key"]
            return ValidationIssue(
                loc if key is None else (*loc, key), str(context["reason"]), context["remedy"]
            )
        if kind == "extra_forbidden":
            return unknown_key(loc, known(loc[:-1]))
        if kind == "missing":
            return ValidationIssue(loc, "missing")
        if kind in _BOUNDS:
            return ValidationIssue(loc, _BOUNDS[kind].format(**context))
    expected = [_expected(detail) for detail in details]
    value = details[0]["input"]
    remedy = None
    if isinstance(value, str) and any(e.endswith("number") for e in expected) and _is_number(value):
        remedy = "write the number without quotes"
    return ValidationIssue(
        loc, f"not {' or '.join(dict.fromkeys(expected))}: it is {describe_value(value)}", remedy
    )


def unknown_key(loc: Loc, known: Sequence[str]) -> ValidationIssue:
    """Return the issue of an unknown key, with the most similar known one."""
    guess = nearest(str(loc[-1]), known)
    remedy = None
    if guess:
        remedy = f"did you mean {guess}?"
    elif known:
        remedy = f"known here: {', '.join(known)}"
    return ValidationIssue(loc, "unknown key", remedy)


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
