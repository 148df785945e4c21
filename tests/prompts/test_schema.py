"""`sam-poll schema` and the parser agree: what one accepts the other does, but for rules that no
schema can state.
"""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sam_poll.core.errors import PromptError
from sam_poll.core.types import AutomaticMaskRequest, Size
from sam_poll.prompts import parser
from sam_poll.prompts.schema import KNOWN_KEYS

VALIDATOR = jsonschema.Draft202012Validator(parser.schema())

UNSAYABLE = {
    r"is inside out|has no (width|height)": "x0 < x1 compares two values of one object",
    r"lie on one line": "it takes the least and the greatest of four values",
    r"is wider than a tile": "padding ≤ tile compares two values",
    r"longer than a file name can be": "maxLength counts characters, a file name has 255 bytes",
    r"not the name of a mask file": "the same, and in Python $ matches before a final line break",
    r"it is -?inf": "JSON has no largest number, and doubles have",
    r"half a surrogate pair": "a schema is about texts, and half a pair is none",
    r"run length|cut off: the last|number larger than any|mark no pixel": "that is about several "
    "numbers together",
    r"holds control characters|not a plain file name": "in Python $ matches before a final line "
    "break",
}
"""Reasons for which the parser refuses what the schema accepts, and why the schema cannot say so.
"""

NUMBERS = st.integers(-5, 5) | st.sampled_from(
    [0.5, 1.0, 2.0, -0.0, 64.0, 1e3, 10**20, 10**400, 1e300, 0.25, 128]
)
ODD = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.sampled_from(
        ["", " ", "a", "1", "..", "a/b", "a\n", "\ud800", "ü" * 128, "x" * 256, "ab" * 32]
    )
    | st.sampled_from(["[]", "{}", "[1]"]).map(json.loads)
)
POINT = st.fixed_dictionaries(
    {"x": NUMBERS, "y": NUMBERS}, optional={"label": st.sampled_from([0, 1, 0.0, 1.0])}
)
BOX = st.fixed_dictionaries({"x0": st.just(1), "y0": st.just(1.0), "x1": NUMBERS, "y1": st.just(9)})
CORNERS = st.lists(st.lists(NUMBERS, min_size=2, max_size=2), min_size=2, max_size=5)
MASK = st.fixed_dictionaries(
    {
        "size": st.sampled_from([[4, 3], [3.0, 4]]),
        "counts": st.sampled_from(["43", "435", [4, 3, 5], [12], "", [], [0, 12.0], "4~"]),
    }
) | st.sampled_from(
    [
        "dog.rough.png",
        "ü.ROUGH.Png",
        "rough.png",
        ".rough.png",
        ".a.rough.png",
        "a/b.rough.png",
        "a.rough.png\n",
        "ü" * 124 + ".rough.png",
        "a\\.rough.png",
        "a..rough.png",
    ]
)
OBJECT = {
    "label": st.sampled_from(["dog", "a b", "ü"]),
    "points": st.lists(POINT, max_size=3),
    "box": BOX,
    "extreme_points": st.lists(
        st.fixed_dictionaries({"x": NUMBERS, "y": NUMBERS}), min_size=4, max_size=4
    ),
    "polygon": CORNERS,
    "mask": MASK,
}
FILE = {
    "image": st.sampled_from(["a.jpg", ".hidden", "ü.png"]),
    "image_sha256": st.just("ab" * 32),
    "image_bytes": st.sampled_from([1, 7.0, 10**20]),
    "image_size": st.fixed_dictionaries(
        {"width": st.sampled_from([1, 640.0]), "height": st.just(480)}
    ),
}
OPTIONS = {"points_per_side": NUMBERS, "min_area": NUMBERS, "iou": NUMBERS, "stability": NUMBERS}
TILES = {"tile": NUMBERS, "padding": NUMBERS, "passes": NUMBERS, "target_coverage": NUMBERS}
NOTES = st.lists(st.sampled_from(["a note", "x" * 1000]), max_size=2)
EVERYTHING = st.just(True) | st.fixed_dictionaries({}, optional={**OPTIONS, "crops": NUMBERS})
TEXT = st.sampled_from(["dog", "a b", "ü", "", "x" * 201, "a\n"])
MOSAIC = (
    st.just(True)
    | st.fixed_dictionaries({}, optional={**OPTIONS, **TILES})
    | st.fixed_dictionaries(
        {"text": TEXT | st.lists(TEXT, max_size=3)},
        optional={"threshold": NUMBERS, **TILES, **OPTIONS},
    )
)
EXEMPLAR = st.fixed_dictionaries({"box": BOX}, optional={"label": st.sampled_from([0, 1, 1.0])})
CONCEPT = {
    "text": TEXT | st.lists(TEXT, max_size=3),
    "exemplars": st.lists(EXEMPLAR, max_size=2),
    "label": st.just("dog"),
    "threshold": NUMBERS,
    "max_objects": NUMBERS,
}
WHOLE = (
    st.fixed_dictionaries({}, optional={**OBJECT, **FILE})
    | st.fixed_dictionaries(
        {"objects": st.lists(st.fixed_dictionaries({}, optional=OBJECT), max_size=3)},
        optional={**FILE, "notes": NOTES},
    )
    | st.fixed_dictionaries({}, optional={**CONCEPT, **FILE})
    | st.fixed_dictionaries({"everything": EVERYTHING}, optional=FILE)
    | st.fixed_dictionaries({"mosaic": MOSAIC}, optional=FILE)
)
KEYS = st.sampled_from(sorted({key for keys in KNOWN_KEYS.values() for key in keys} | {"x9"}))


def places(tree: Any) -> list[tuple[Any, Any]]:
    """All (container, key) of a document."""
    found: list[tuple[Any, Any]] = []
    pending = [tree]
    while pending:
        here = pending.pop()
        for key in (
            here if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        ):
            found.append((here, key))
            pending.append(here[key])
    return found


@st.composite
def near_the_schema(draw: st.DrawFn) -> Any:
    """A document of one of the forms, with up to three changes anywhere."""
    tree = copy.deepcopy(draw(WHOLE))
    for _ in range(draw(st.integers(0, 3))):
        there = places(tree)
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "add" or not there:
            objects = [tree, *(c[k] for c, k in there if isinstance(c[k], dict))]
            draw(st.sampled_from(objects))[draw(KEYS)] = draw(ODD)
            continue
        container, key = draw(st.sampled_from(there))
        if change == "remove":
            del container[key]
        else:
            container[key] = draw(ODD)
    return tree


@pytest.mark.slow
@given(near_the_schema())
@settings(deadline=None, max_examples=600)
@example({"points": [{"x": 1, "y": 2, "label": 1.0}]})
@example({"points": [{"x": 1, "y": 2, "label": 0.0}]})
@example({"everything": {"points_per_side": 8.0, "crops": 1.5}})
@example({"mosaic": {"tile": 512.0, "padding": 8.0}})
@example({"mosaic": {"text": ["dog", "cat"], "threshold": 0, "min_area": 1, "tile": 64}})
@example({"mosaic": {"text": "dog", "passes": 1}})
@example({"mosaic": {"threshold": 0.5}})
@example({"text": ["dog", "cat"], "threshold": 0, "max_objects": 1.0})
@example({"text": "dog", "exemplars": [{"box": {"x0": 1, "y0": 1, "x1": 2, "y1": 2}}]})
@example({"text": ["a", "b"], "exemplars": [{"box": {"x0": 1, "y0": 1, "x1": 2, "y1": 2}}]})
@example({"points": [{"x": 1, "y": 2}], "label": ""})
@example({"polygon": [[1, 2], [5, 2], [3, 4.5]], "points": [{"x": 1, "y": 2, "label": 0}]})
@example({"mask": {"size": [4, 3.0], "counts": [4, 3, 5]}})
@example({"mask": {"size": [4, 3], "counts": "435"}, "box": {"x0": 1, "y0": 1, "x1": 2, "y1": 2}})
@example({"points": [{"x": 1, "y": 2}], "image": ".."})
@example({"points": [{"x": 1, "y": 2}], "notes": ["only where there are objects"]})
def test_the_parser_accepts_what_the_schema_accepts_and_nothing_else(tree: Any) -> None:
    text = json.dumps(tree)
    valid = VALIDATOR.is_valid(json.loads(text))
    try:
        parser.parse(text.encode("utf-8"), mask_files=True)
    except PromptError as error:
        reasons = error.reason
        assert not valid or any(re.search(pattern, reasons) for pattern in UNSAYABLE), reasons
        return
    assert valid


def test_whole_numbers_may_be_written_with_a_point() -> None:
    (prompt,) = parser.parse(
        b'{"points": [{"x": 9, "y": 9, "label": 1.0}, {"x": 9, "y": 9, "label": 0.0}]}'
    ).prompts  # type: ignore[misc]
    assert [(point.label, type(point.label)) for point in prompt.points] == [(1, int), (0, int)]
    asked = parser.parse(
        b'{"everything": {"points_per_side": 8.0, "min_area": 1e2, "crops": 1.0}}'
    ).prompts
    assert asked == AutomaticMaskRequest(points_per_side=8, min_area=100, crops=1)
    size = parser.parse(
        b'{"image_size": {"width": 64.0, "height": 48}, "points": [{"x": 9, "y": 9}]}'
    ).image_size
    assert size == Size(64, 48)


@pytest.mark.parametrize("number", ["1.5", "true", '"1"', "1e999"])
def test_what_is_no_whole_number_is_refused(number: str) -> None:
    with pytest.raises(PromptError):
        parser.parse(f'{{"everything": {{"crops": {number}}}}}'.encode())
