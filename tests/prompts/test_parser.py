"""Prompt files: every form is read, everything else is refused with its place, and nothing else
escapes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_poll.core.errors import IncompletePromptError, PromptError
from sam_poll.core.types import (
    AutomaticMaskRequest,
    Box,
    ConceptRequest,
    Exemplar,
    MaskFile,
    Point,
    Polygon,
    Prompt,
    RunLengths,
    Size,
)
from sam_poll.prompts import parser
from sam_poll.prompts.parser import PromptFile, as_dict, as_document, fit, fit_request, parse
from sam_poll.prompts.schema import KNOWN_KEYS
from tests.support.paths import ROOT

EXAMPLES = sorted((ROOT / "examples" / "prompts").iterdir())
BLOCKS = re.findall(
    r"^```(json|json-refused)\n(.*?)^```",
    (ROOT / "docs" / "prompts.md").read_text("utf-8"),
    re.S | re.M,
)
VALIDATOR = jsonschema.Draft202012Validator(parser.schema())
SIZE = Size(640, 480)
BOX = {"x0": 1, "y0": 2, "x1": 3, "y1": 4}
POINTS = [{"x": 1, "y": 2}]


def read(document: object) -> PromptFile:
    return parse(json.dumps(document).encode())


def refusal(data: object, **limits: int) -> PromptError:
    raw = (
        data
        if isinstance(data, bytes)
        else data.encode()
        if isinstance(data, str)
        else json.dumps(data).encode()
    )
    with pytest.raises(PromptError) as caught:
        parse(raw, **limits)
    said = str(caught.value)
    assert "pydantic" not in said
    assert "type=" not in said
    assert "Input should" not in said
    assert said.isprintable()
    assert caught.value.place
    assert caught.value.remedy
    return caught.value


# ── the forms ──


def test_waikatos_points_are_one_object() -> None:
    read_file = read({"points": [{"x": 10, "y": 100, "label": 1}, {"x": 3.5, "y": 4, "label": 0}]})
    assert read_file == PromptFile((Prompt("object", (Point(10, 100, 1), Point(3.5, 4, 0))),))


def test_waikatos_box_is_one_object() -> None:
    assert read({"box": {"x0": 10, "y0": 90, "x1": 200, "y1": 150}}).prompts == (
        Prompt(box=Box(10, 90, 200, 150)),
    )


def test_points_and_box_together_refine_one_object() -> None:
    (prompt,) = read(
        {"points": [{"x": 1, "y": 2}], "box": {"x0": 0, "y0": 0, "x1": 5, "y1": 5}}
    ).prompts
    assert prompt == Prompt("object", (Point(1, 2),), Box(0, 0, 5, 5))


def test_a_point_without_a_label_is_foreground() -> None:
    assert read({"points": [{"x": 1, "y": 2}]}).prompts == (Prompt(points=(Point(1, 2, 1),)),)


def test_a_single_object_may_carry_a_label() -> None:
    assert read({"label": "dog", "points": [{"x": 1, "y": 2}]}).prompts[0].label == "dog"


def test_objects_keep_their_order_and_labels() -> None:
    read_file = read(
        {
            "objects": [
                {"label": "b", "points": [{"x": 1, "y": 2}]},
                {"label": "a", "points": [{"x": 1, "y": 2}]},
            ]
        }
    )
    assert [p.label for p in read_file.prompts] == ["b", "a"]


def test_extreme_points_span_the_box_and_are_no_clicks() -> None:
    corners = [{"x": 5, "y": 1}, {"x": 9, "y": 4}, {"x": 6, "y": 8}, {"x": 2, "y": 3}]
    (prompt,) = read({"extreme_points": corners, "points": [{"x": 5, "y": 5}]}).prompts
    assert prompt.box == Box(2, 1, 9, 8)
    assert prompt.points == (Point(5, 5),)
    assert prompt.notes


def test_only_negative_points_are_fine_inside_a_box() -> None:
    (prompt,) = read(
        {"box": {"x0": 0, "y0": 0, "x1": 5, "y1": 5}, "points": [{"x": 1, "y": 1, "label": 0}]}
    ).prompts
    assert prompt.points == (Point(1, 1, 0),)


CORNERS = [[5, 1], [9, 4], [2.5, 8]]
MASK = {"size": [4, 3], "counts": [5, 2, 5]}


def test_a_polygon_and_a_mask_are_rough_shapes_alone_or_beside_others() -> None:
    (prompt,) = read({"polygon": CORNERS}).prompts
    assert prompt == Prompt(shape=Polygon(((5, 1), (9, 4), (2.5, 8))))
    mask = RunLengths(Size(3, 4), (5, 2, 5))
    for counts in ([5, 2, 5], [5.0, 2, 5], "525"):
        (prompt,) = read({"mask": {"size": [4, 3], "counts": counts}, "label": "a"}).prompts
        assert prompt == Prompt("a", shape=mask)
    beside = {"box": BOX, "points": [{"x": 1, "y": 1, "label": 0}]}
    (prompt,) = read({"mask": MASK, **beside}).prompts
    assert prompt == Prompt("object", (Point(1, 1, 0),), Box(**BOX), shape=mask)
    assert not prompt.ambiguous
    one, other = read({"objects": [{"polygon": CORNERS}, {"mask": MASK}]}).prompts
    assert (one.shape, other.shape) == (Polygon(((5, 1), (9, 4), (2.5, 8))), mask)


@pytest.mark.parametrize(
    ("document", "where", "reason"),
    [
        ({"polygon": [[1, 2], [3, 4]]}, "polygon", "has 2 entries, needs at least 3"),
        ({"polygon": [[1, 2], [3, 4], [5, 6]]}, "polygon", "lie on one line"),
        ({"polygon": [[1, 2], [1, 2], [1, 2]]}, "polygon", "lie on one line"),
        ({"polygon": [[1, 2, 3, 4, 5, 6]]}, "polygon[0]", "not a pair of numbers"),
        ({"polygon": [1, 2, 3, 4, 5, 6]}, "polygon[0]", "not a pair of numbers: it is 1"),
        ({"polygon": [[1, 2], [3, "4"], [5, 7]]}, "polygon[1][1]", "not a number"),
        ({"polygon": CORNERS, "mask": MASK}, "polygon", "stands beside mask"),
        ({"polygon": CORNERS, "text": "dog"}, "polygon", "several forms at once"),
        ({"mask": "rough.png"}, "mask", 'not run lengths: it is the text "rough.png"'),
        ({"mask": {"size": [4, 3]}}, "mask.counts", "missing"),
        ({"mask": {**MASK, "size": [3, 5]}}, "mask.counts", "of 12 pixels, and 5×3 has 15"),
        ({"mask": {**MASK, "size": [4]}}, "mask.size", "needs at least 2"),
        ({"mask": {**MASK, "counts": "52~"}}, "mask.counts", "byte 3"),
        ({"mask": {**MASK, "counts": "5P"}}, "mask.counts", "cut off"),
        ({"mask": {**MASK, "counts": [12]}}, "mask.counts", "the mask is empty"),
        ({"mask": {**MASK, "counts": [0, 5, -1, 8]}}, "mask.counts[2]", "negative"),
        ({"mask": {**MASK, "counts": [5, 2.5, 5]}}, "mask.counts[1]", "not a whole number"),
        ({"mask": {**MASK, "counts": 7}}, "mask.counts", "neither a text nor a list"),
        ({"objects": [{"label": "a"}]}, "objects[0]", "polygon or mask"),
        (
            {"objects": [{"polygon": CORNERS}, {"mask": {**MASK, "sizes": 1}}]},
            "objects[1].mask.sizes",
            "unknown key",
        ),
    ],
)
def test_a_rough_shape_that_cannot_be_used_is_refused_with_its_place(
    document: dict[str, Any], where: str, reason: str
) -> None:
    error = refusal(document)
    assert error.place == where
    assert reason in f"{error.reason} {error.remedy}"
    assert error.remedy


def test_a_mask_may_be_a_file_only_where_the_caller_reads_it() -> None:
    data = b'{"mask": "dog.rough.png", "label": "dog"}'
    assert parse(data, mask_files=True).prompts == (
        Prompt("dog", mask_file=MaskFile("dog.rough.png")),
    )
    error = refusal(data)
    assert (error.place, error.reason) == (
        "mask",
        'not run lengths: it is the text "dog.rough.png"',
    )
    assert "read only beside a picture in the input folder" in str(error.remedy)
    (prompt,) = parse(data, mask_files=True).prompts  # type: ignore[misc]
    assert as_dict(prompt) == {"label": "dog", "mask": "dog.rough.png"}
    assert fit([prompt], SIZE) == (prompt,)


@pytest.mark.parametrize(
    "name",
    [
        "dog.png",
        "rough.png",
        ".rough.png",
        ".dog.rough.png",
        "a/dog.rough.png",
        "..\\dog.rough.png",
        "dog.rough.png\n",
        "dog.rough.png/..",
        "ü" * 124 + ".rough.png",
        "",
    ],
)
def test_only_plain_names_that_end_as_mask_files_do_are_mask_files(name: str) -> None:
    with pytest.raises(PromptError) as caught:
        parse(json.dumps({"objects": [{"box": BOX}, {"mask": name}]}).encode(), mask_files=True)
    assert caught.value.place == "objects[1].mask"
    assert "ends in .rough.png" in str(caught.value.remedy)


def test_a_rough_shape_gets_the_box_around_it_unless_it_has_one() -> None:
    polygon = Polygon(((5, 1), (645, 4), (2.5, 8)))
    (used,) = fit([Prompt(shape=polygon)], SIZE)
    assert used.box == Box(2.5, 1, 640, 8)
    assert used.notes == ("the polygon's box clipped to the picture: x1 645 → 640",)
    assert used.shape == polygon
    height = SIZE[1]
    mask = RunLengths(Size(*SIZE), (3 * height + 5, 7, (640 - 3) * height - 12))
    assert fit([Prompt(shape=mask)], SIZE)[0].box == Box(3, 5, 4, 12)
    corner = RunLengths(Size(*SIZE), (0, 1, 640 * height - 1))
    assert fit([Prompt(shape=corner)], SIZE)[0].box == Box(0, 0, 1, 1)
    box = Box(1, 1, 9, 9)
    assert fit([Prompt(box=box, shape=polygon)], SIZE) == (Prompt(box=box, shape=polygon),)
    # It fits again, unchanged.
    assert fit([used], SIZE) == (used,)


@pytest.mark.parametrize(
    ("shape", "where", "reason"),
    [
        (Polygon(((5, 1), (9, 4), (2, 580))), "polygon[2][1]", "580 is outside the picture"),
        (Polygon(((-50, 1), (-20, 4), (-30, 80))), "polygon", "is beside the picture"),
        (Polygon(((0.1, 0.2), (0.5, 0.3), (0.4, 0.9))), "polygon", "normalised coordinates"),
        (RunLengths(Size(480, 640), (0, 480 * 640)), "mask.size", "the mask is 480×640"),
        (RunLengths(Size(10**12, 10**12), (0, 10**24)), "mask.size", "but the picture is 640×480"),
    ],
)
def test_a_rough_shape_that_does_not_fit_the_picture_is_refused(
    shape: Polygon | RunLengths, where: str, reason: str
) -> None:
    for prompts, place in (([Prompt(shape=shape)], where), ([Prompt(shape=shape)] * 2, None)):
        with pytest.raises(PromptError) as caught:
            fit(prompts, SIZE)
        assert caught.value.place == (place or f"objects[0].{where}")
        assert reason in caught.value.reason
        assert caught.value.remedy


def test_rough_shapes_are_written_and_read_back() -> None:
    mask = RunLengths(Size(3, 4), (5, 2, 5))
    prompts = (Prompt("a", shape=mask), Prompt("b", shape=Polygon(((5, 1), (9, 4), (2.5, 8)))))
    assert read(as_document(prompts)).prompts == prompts


def test_a_text_finds_all_objects_of_a_kind() -> None:
    assert read({"text": "dog"}).prompts == ConceptRequest(("dog",))
    request = read({"text": ["dog", "yellow bus"], "threshold": 0.3, "max_objects": 7}).prompts
    assert request == ConceptRequest(("dog", "yellow bus"), threshold=0.3, max_objects=7)


def test_exemplars_go_with_a_text_or_stand_alone_with_a_label() -> None:
    like, unlike = {"box": BOX}, {"box": BOX, "label": 0}
    box = Box(**BOX)
    asked = read({"text": "dog", "exemplars": [like, unlike]}).prompts
    assert asked == ConceptRequest(("dog",), (Exemplar(box), Exemplar(box, 0)))
    assert read({"exemplars": [like]}).prompts == ConceptRequest((), (Exemplar(box),))
    assert read({"exemplars": [like], "label": "cat"}).prompts.label == "cat"
    assert read({"text": "dog", "exemplars": [unlike]}).prompts.exemplars == (Exemplar(box, 0),)


@pytest.mark.parametrize(
    ("document", "where", "reason"),
    [
        ({"text": ""}, "text", "is empty"),
        ({"text": ["dog", " "]}, "text[1]", "is empty"),
        ({"text": ["dog", 5]}, "text[1]", "not a text: it is 5"),
        ({"text": ["dog", "cat", "dog"]}, "text[2]", "given twice"),
        ({"text": []}, "text", "has no text"),
        ({"text": {"a": 1}}, "text", "neither a text nor a list"),
        ({"text": "a\nb"}, "text", "control characters"),
        ({"text": "x" * 201}, "text", "longer than 200 characters"),
        ({"text": "dog", "threshold": -0.1}, "threshold", "at least 0"),
        ({"text": "dog", "threshold": 1.01}, "threshold", "at most 1"),
        ({"text": "dog", "max_objects": 0}, "max_objects", "at least 1"),
        ({"text": "dog", "label": "cat"}, "label", "stands beside text"),
        ({"text": "dog", "exemplars": []}, "exemplars", "needs at least 1"),
        ({"text": "dog", "exemplars": [{"label": 1}]}, "exemplars[0].box", "missing"),
        ({"text": ["a", "b"], "exemplars": [{"box": BOX}]}, "exemplars", "several texts"),
        ({"exemplars": [{"box": BOX, "label": 0}]}, "exemplars", "all labels are 0"),
        ({"text": "dog", "points": POINTS}, "points", "several forms at once"),
        ({"text": "dog", "everything": True}, "everything", "several forms at once"),
        ({"threshold": 0.5}, "threshold", "unknown key"),
    ],
)
def test_a_text_or_exemplar_that_cannot_be_used_is_refused_with_its_place(
    document: dict[str, Any], where: str, reason: str
) -> None:
    error = refusal(document)
    assert error.place == where
    assert reason in error.reason


def test_a_mosaic_may_be_of_texts() -> None:
    asked = read({"mosaic": {"text": "tree", "tile": 512, "min_area": 9}}).prompts
    assert (asked.tile, asked.first.min_area) == (512, 9)
    assert asked.concept == ConceptRequest(("tree",))
    several = read({"mosaic": {"text": ["tree", "car"], "threshold": 0.3}}).prompts
    assert several.concept == ConceptRequest(("tree", "car"), threshold=0.3)
    for one in (asked, several):
        assert read(as_document(one)).prompts == one
    assert read({"mosaic": True}).prompts.concept is None


@pytest.mark.parametrize(
    ("options", "where", "reason"),
    [
        ({"text": "tree", "passes": 2}, "mosaic.passes", "needs no clicks"),
        ({"text": "tree", "target_coverage": 0.9}, "mosaic.target_coverage", "needs no clicks"),
        ({"text": "tree", "points_per_side": 8}, "mosaic.points_per_side", "needs no clicks"),
        ({"text": "tree", "iou": 0.8}, "mosaic.iou", "needs no clicks"),
        ({"text": "tree", "stability": 0.9}, "mosaic.stability", "needs no clicks"),
        ({"threshold": 0.5}, "mosaic.threshold", "goes with text"),
        ({"text": ["tree", ""]}, "mosaic.text[1]", "is empty"),
        ({"text": "tree", "threshold": 2}, "mosaic.threshold", "at most 1"),
        ({"text": "tree", "max_objects": 5}, "mosaic.max_objects", "unknown key"),
        ({"text": "tree", "exemplars": []}, "mosaic.exemplars", "unknown key"),
    ],
)
def test_a_mosaic_of_texts_is_refused_with_options_that_it_goes_without(
    options: dict[str, Any], where: str, reason: str
) -> None:
    error = refusal({"mosaic": options})
    assert error.place == where
    assert reason in error.reason


def test_texts_of_a_mosaic_count_as_prompts() -> None:
    texts = {"mosaic": {"text": [f"text {number}" for number in range(4)]}}
    assert "4 points, boxes and texts" in refusal(texts, max_prompts=3).reason


def test_texts_and_exemplars_count_as_prompts() -> None:
    texts = {"text": [f"text {number}" for number in range(4)]}
    assert "4 points, boxes and texts" in refusal(texts, max_prompts=3).reason
    exemplars = {"exemplars": [{"box": BOX}] * 4}
    assert refusal(exemplars, max_prompts=3).place == "exemplars"


def test_exemplars_are_clipped_to_the_picture_or_refused_with_their_place() -> None:
    box = {"x0": 600, "y0": 90, "x1": 650, "y1": 150}
    fitted = fit_request(read({"exemplars": [{"box": BOX}, {"box": box}]}).prompts, SIZE)
    assert isinstance(fitted, ConceptRequest)
    assert [exemplar.box for exemplar in fitted.exemplars] == [Box(**BOX), Box(600, 90, 640, 150)]
    assert fitted.notes == ("exemplars[1].box clipped to the picture: x1 650 → 640",)
    with pytest.raises(PromptError) as caught:
        fit_request(read({"exemplars": [{"box": {**box, "x1": 900}}]}).prompts, SIZE)
    assert caught.value.place == "exemplars[0].box.x1"
    parts = {"x0": 0.1, "y0": 0.1, "x1": 0.5, "y1": 0.6}
    with pytest.raises(PromptError, match="normalised"):
        fit_request(read({"exemplars": [{"box": parts}]}).prompts, SIZE)


def test_everything_true_means_the_defaults() -> None:
    assert read({"everything": True}).prompts == AutomaticMaskRequest()


def test_everything_takes_options() -> None:
    options = {"points_per_side": 8, "min_area": 0, "iou": 0.5, "stability": 1, "crops": 1}
    assert read({"everything": options}).prompts == AutomaticMaskRequest(8, 0, 0.5, 1.0, 1)


def test_a_file_may_name_its_picture_and_its_bytes() -> None:
    said = {
        "image": "dog ü.png",
        "image_sha256": "AB" * 32,
        "image_bytes": 12,
        "points": [{"x": 1, "y": 2}],
    }
    read_file = read(said)
    assert (read_file.image, read_file.image_sha256, read_file.image_bytes) == (
        "dog ü.png",
        "ab" * 32,
        12,
    )


def test_a_byte_order_mark_is_no_obstacle() -> None:
    text = '{"label": "Hündchen", "points": [{"x": 1, "y": 2}]}'
    assert parse(b"\xef\xbb\xbf" + text.encode()) == parse(text.encode())
    assert parse(text.encode()).prompts[0].label == "Hündchen"


# ── what is refused ──


@pytest.mark.parametrize(
    ("document", "where", "reason"),
    [
        ({"box": BOX | {"x1": "10"}}, "box.x1", 'not a number: it is the text "10"'),
        ({"box": BOX | {"x1": True}}, "box.x1", "not a number: it is true"),
        ({"box": BOX | {"x1": [1]}}, "box.x1", "not a number: it is a list"),
        ({"box": BOX | {"x1": {}}}, "box.x1", "not a number: it is an object"),
        (
            {"objects": [{"box": BOX}, {"box": BOX}, {"box": BOX | {"x1": "n"}}]},
            "objects[2].box.x1",
            "not a number",
        ),
        ({"box": {"x0": 1, "y0": 2, "x1": 3}}, "box.y1", "missing"),
        ({"box": [1, 2, 3, 4]}, "box", "not an object"),
        ({"box": BOX | {"x0": 9}}, "box", "inside out: x0 9 is beyond x1 3"),
        ({"box": BOX | {"y0": 4}}, "box", "has no height"),
        ({"box": None}, "box", "is null"),
        ({"points": {"x": 1, "y": 2}}, "points", "not a list"),
        ({"points": [[1, 2]]}, "points[0]", "not an object"),
        ({"points": [{"x": 1}]}, "points[0].y", "missing"),
        ({"points": [{"x": 1, "y": 2, "label": 2}]}, "points[0].label", "not 0 or 1: it is 2"),
        (
            {"points": [{"x": 1, "y": 2, "label": True}]},
            "points[0].label",
            "not 0 or 1: it is true",
        ),
        ({"points": [{"x": 1, "y": 2, "label": "1"}]}, "points[0].label", "not 0 or 1"),
        ({"points": [{"x": 1, "y": 2, "label": 0}]}, "points", "no foreground point"),
        (
            {"objects": [{"points": [{"x": 1, "y": 2, "label": 0}]}]},
            "objects[0].points",
            "no foreground point",
        ),
        ({"points": []}, "top level", "requests nothing"),
        ({}, "top level", "requests nothing"),
        ({"label": "dog"}, "top level", "requests nothing"),
        ({"objects": []}, "objects", "needs at least 1"),
        ({"objects": {}}, "objects", "not a list"),
        ({"objects": [1]}, "objects[0]", "not an object"),
        ({"objects": [{"box": BOX}], "box": BOX}, "box", "several forms at once: objects, box"),
        (
            {"objects": [{"box": BOX}], "label": "dog"},
            "label",
            "several forms at once: objects, label",
        ),
        (
            {"everything": True, "points": POINTS},
            "points",
            "several forms at once: everything, points",
        ),
        (
            {"everything": True, "objects": []},
            "everything",
            "several forms at once: objects, everything",
        ),
        ({"everything": False}, "everything", "neither true nor"),
        ({"everything": 1}, "everything", "neither true nor"),
        ({"everything": {"iou": 1.5}}, "everything.iou", "at most 1"),
        ({"everything": {"points_per_side": 0}}, "everything.points_per_side", "at least 1"),
        ({"everything": {"crops": 1.5}}, "everything.crops", "not a whole number"),
        ({"box": BOX, "extreme_points": POINTS * 4}, "extreme_points", "stands beside box"),
        ({"extreme_points": POINTS * 3}, "extreme_points", "has 3 entries, needs at least 4"),
        ({"extreme_points": POINTS * 5}, "extreme_points", "at most 4"),
        ({"extreme_points": POINTS * 4}, "extreme_points", "on one line"),
        ({"box": BOX, "label": ""}, "label", "is empty"),
        ({"box": BOX, "label": "  "}, "label", "blank"),
        ({"box": BOX, "label": "a\nb"}, "label", "control characters"),
        ({"box": BOX, "label": "a\n"}, "label", "control characters"),
        ({"box": BOX, "label": "a\u2028b"}, "label", "control characters"),
        ({"box": BOX, "label": "x" * 201}, "label", "longer than 200"),
        ({"box": BOX, "label": 5}, "label", "not a text: it is 5"),
        ({"box": BOX, "label": "\ud800"}, "label", "surrogate"),
        ({"box": BOX, "\ud800": 1}, "top level", "surrogate"),
        ({"box": BOX, "image": "../dog.jpg"}, "image", "not a plain file name"),
        ({"box": BOX, "image": "a\\dog.jpg"}, "image", "not a plain file name"),
        ({"box": BOX, "image": ".."}, "image", "not a plain file name"),
        ({"box": BOX, "image": "a\0"}, "image", "not a plain file name"),
        ({"box": BOX, "image": ""}, "image", "not a plain file name"),
        ({"box": BOX, "image": "ü" * 128}, "image", "255 bytes"),
        ({"box": BOX, "image_sha256": "abc"}, "image_sha256", "64 hexadecimal"),
        ({"box": BOX, "image_bytes": 0}, "image_bytes", "at least 1"),
        ([], "top level", "it is a list"),
        (5, "top level", "it is 5"),
        (None, "top level", "it is null"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_place(
    document: object, where: str | None, reason: str
) -> None:
    error = refusal(document)
    assert error.place == where
    assert reason in error.reason


@pytest.mark.parametrize(
    "number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000, "-" + "9" * 5000]
)
def test_a_number_that_is_not_finite_is_refused(number: str) -> None:
    error = refusal(f'{{"points": [{{"x": {number}, "y": 2}}]}}')
    assert error.place == "points[0].x"
    assert error.reason.startswith("not a finite number")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("bbox", "box"),
        ("point", "points"),
        ("Box", "box"),
        ("object", "objects"),
        ("extremepoints", "extreme_points"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_known_one(key: str, meant: str) -> None:
    error = refusal({"box": BOX, key: 1})
    assert (error.place, error.reason, error.remedy) == (
        key,
        "unknown key",
        f"did you mean {meant}?",
    )


def test_an_unknown_key_like_no_other_is_answered_with_the_known_ones() -> None:
    assert refusal({"points": [{"x": 1, "y": 2, "qqqq": 3}]}).remedy == "known here: x, y, label"


def test_a_key_given_twice_is_refused_wherever_it_is() -> None:
    error = refusal('{"objects": [{"box": {"x0": 1, "x0": 1, "y0": 2, "x1": 3, "y1": 4}}]}')
    assert (error.place, error.reason) == ("objects[0].box.x0", "given twice")


def test_a_swapped_box_has_a_question_as_its_remedy() -> None:
    assert refusal({"box": BOX | {"x0": 9}}).remedy == "are x0 and x1 swapped?"


def test_a_quoted_number_is_answered_with_what_to_do() -> None:
    assert refusal({"box": BOX | {"x0": "9"}}).remedy == "write the number without quotes"


def test_the_first_problem_is_the_reason_and_the_others_are_counted() -> None:
    error = refusal({"box": {"x0": "a", "y0": "b", "x1": 3, "y1": None}})
    assert error.reason.endswith("; and 3 more problems")
    assert refusal({"box": BOX, "a": 1, "b": 2}).reason.endswith("; and 1 more problem")


@pytest.mark.parametrize(
    ("data", "where", "reason"),
    [
        (b"", None, "empty"),
        (b" \n", None, "empty"),
        (b"\xef\xbb\xbf", None, "empty"),
        (b"{\n  'box': 1}", "line 2, column 3", "not JSON"),
        (b'{"everything": true,}', "line 1, column 20", "not JSON"),
        (b'{"everything": true} {}', "line 1, column 22", "something follows"),
        (b'{"everything": true', "line 1, column 20", "not JSON"),
        ('{"label": "é"}'.encode("latin-1"), "line 1", "Latin-1"),
        (b'{\n"label": "\xe9"}', "line 2", "not UTF-8: byte 0xe9"),
        ('{"everything": true}'.encode("utf-16"), None, "UTF-16"),
        ('{"everything": true}'.encode("utf-16-be"), None, "UTF-16"),
        ('{"everything": true}'.encode("utf-32"), None, "UTF-32"),
        (b"[" * 100_000, "line 1, column 17", "nested more than 16 levels deep"),
        (b'["[[[[",\n' + b"[" * 100_000, "line 2, column 16", "nested more than 16 levels deep"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, "a.a.a.a…", "nested more than 16 levels deep"),
    ],
)
def test_a_file_that_is_not_json_in_utf8_is_refused_with_line_and_column(
    data: bytes, where: str | None, reason: str
) -> None:
    error = refusal(data)
    assert reason in error.reason
    if where:
        assert error.place is not None
        assert error.place.startswith(where) or error.place.split(",")[0] == where.split(",")[0]


def test_too_many_bytes_are_refused_before_they_are_read() -> None:
    assert "larger than 10 bytes" in refusal(b"\xff" * 11, max_bytes=10).reason


def test_ten_thousand_prompts_are_allowed_and_one_more_is_not() -> None:
    assert len(read({"objects": [{"box": BOX}] * 10_000}).prompts) == 10_000
    many = [{"box": BOX, "points": POINTS * 3}] * 2_500
    assert len(read({"objects": many}).prompts) == 2_500
    assert "10001 points, boxes and texts" in refusal({"objects": [*many, {"box": BOX}]}).reason
    assert "4 points, boxes and texts" in refusal({"points": POINTS * 4}, max_prompts=3).reason


def test_a_file_full_of_mistakes_is_refused_without_listing_them_all() -> None:
    junk = {"objects": [{str(key): 1 for key in range(20)}] * 9_999}
    assert "more than any valid file has" in refusal(junk).reason


def test_odd_keys_are_shown_safely() -> None:
    error = refusal({"box": BOX, "\x1b[31m" + "x" * 500: 1})
    assert error.place is not None
    assert error.place.isprintable()
    assert len(error.place) < 80


# ── nothing but PromptError ──

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)
KEYS = st.sampled_from([*KNOWN_KEYS[""], *KNOWN_KEYS["box"], *KNOWN_KEYS["points"], "x9"])
NEAR_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.floats()
    | st.sampled_from(["a", "", "\n", "\ud800", ".."]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=25,
)
NUMBERS = st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False, width=32)


def _points(label: st.SearchStrategy[int]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"x": NUMBERS, "y": NUMBERS}, optional={"label": label})


@st.composite
def _boxes(draw: st.DrawFn) -> dict[str, float]:
    xs = sorted(draw(st.lists(st.integers(-999, 999), min_size=2, max_size=2, unique=True)))
    ys = sorted(draw(st.lists(st.integers(-999, 999), min_size=2, max_size=2, unique=True)))
    return {"x0": xs[0], "y0": ys[0], "x1": xs[1], "y1": ys[1]}


@st.composite
def _objects(draw: st.DrawFn) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if draw(st.booleans()):
        made["label"] = draw(st.text(st.characters(categories=("L", "N")), min_size=1, max_size=9))
    if draw(st.booleans()):
        made["box"] = draw(_boxes())
        made["points"] = draw(st.lists(_points(st.sampled_from([0, 1])), max_size=3))
    else:
        made["points"] = draw(st.lists(_points(st.just(1)), min_size=1, max_size=3))
    return made


VALID = (
    _objects()
    | st.fixed_dictionaries(
        {"objects": st.lists(_objects(), min_size=1, max_size=4)},
        optional={"image": st.just("a.jpg")},
    )
    | st.just({"text": "dog"})
    | st.fixed_dictionaries(
        {"text": st.just(["dog", "yellow bus"])},
        optional={"threshold": st.floats(0, 1), "max_objects": st.integers(1, 300)},
    )
    | st.just({"label": "cat", "exemplars": [{"box": BOX}, {"box": BOX, "label": 0}]})
    | st.just({"everything": True})
    | st.fixed_dictionaries(
        {
            "everything": st.fixed_dictionaries(
                {}, optional={"iou": st.floats(0, 1), "crops": st.just(1)}
            )
        }
    )
)


def only_prompt_errors(data: bytes) -> None:
    said = "read"
    try:
        parse(data)
    except PromptError as error:
        said = str(error)
    assert said.isprintable()


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_no_bytes_bring_anything_but_a_prompt_error(data: bytes) -> None:
    only_prompt_errors(data)


@pytest.mark.slow
@given(JSON | NEAR_JSON)
@settings(deadline=None, max_examples=400)
def test_no_json_brings_anything_but_a_prompt_error(tree: object) -> None:
    only_prompt_errors(json.dumps(tree).encode())


@pytest.mark.slow
@given(VALID, st.integers(0, 10_000), st.binary(max_size=3), st.integers(0, 5))
@settings(deadline=None, max_examples=300)
def test_no_damaged_file_brings_anything_but_a_prompt_error(
    tree: object, at: int, new: bytes, cut: int
) -> None:
    data = json.dumps(tree).encode()
    at %= len(data)
    only_prompt_errors(data[:at] + new + data[at + cut :])


# ── the schema ──


@pytest.mark.slow
@given(VALID)
@settings(deadline=None, max_examples=200)
def test_every_well_made_file_is_read_and_fits_the_schema(tree: object) -> None:
    read(tree)
    VALIDATOR.validate(tree)


@pytest.mark.slow
@given(NEAR_JSON | VALID)
@settings(deadline=None, max_examples=400)
def test_what_the_schema_refuses_is_refused(tree: object) -> None:
    try:
        read(tree)
    except PromptError:
        return
    VALIDATOR.validate(tree)


@pytest.mark.parametrize(
    "document",
    [
        {"box": BOX | {"x2": 1}},
        {"box": BOX | {"x1": "1"}},
        {"box": None},
        {"points": [{"x": 1, "y": 2, "label": 0}]},
        {"points": []},
        {"objects": []},
        {"objects": [{"box": BOX}], "box": BOX},
        {"everything": False},
        {"everything": {"crops": 9}},
        {"box": BOX, "extreme_points": POINTS * 4},
        {"extreme_points": POINTS * 3},
        {"box": BOX, "label": " "},
        {"box": BOX, "label": "a\u2028"},
        {"box": BOX, "image": "a/b"},
        {"box": BOX, "image_sha256": "x"},
        {},
    ],
)
def test_the_schema_knows_the_rules_between_keys_too(document: object) -> None:
    assert not VALIDATOR.is_valid(document)
    refusal(document)


def test_the_schema_is_a_valid_2020_12_schema_whose_examples_hold() -> None:
    made = parser.schema()
    jsonschema.Draft202012Validator.check_schema(made)
    assert made["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert made["title"]
    assert made["description"]
    for example in made["examples"]:
        VALIDATOR.validate(example)
        parse(json.dumps(example).encode(), mask_files=True)


# ── examples and docs ──


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_example_file_is_read_and_fits_the_schema(path: Path) -> None:
    parse(path.read_bytes(), mask_files=True)
    VALIDATOR.validate(json.loads(path.read_bytes()))


def test_the_examples_show_every_form() -> None:
    keys = {key for path in EXAMPLES for key in json.loads(path.read_bytes())}
    assert keys >= {"points", "box", "objects", "extreme_points", "everything", "label", "image"}
    assert len([path for path in EXAMPLES if path.suffix == ".prompt"]) == 2


@pytest.mark.parametrize(
    ("kind", "text"), BLOCKS, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(BLOCKS)]
)
def test_the_docs_match_the_parser(kind: str, text: str) -> None:
    if kind == "json":
        parse(text.encode(), mask_files=True)
        VALIDATOR.validate(json.loads(text))
    else:
        refusal(text)


def test_the_docs_name_every_key() -> None:
    text = (ROOT / "docs" / "prompts.md").read_text("utf-8")
    for key in {key for keys in KNOWN_KEYS.values() for key in keys}:
        assert f'"{key}"' in text or f"`{key}`" in text, key
    assert {kind for kind, _ in BLOCKS} == {"json", "json-refused"}


# ── against the picture ──


def test_prompts_inside_the_picture_stay_as_they_are() -> None:
    prompt = Prompt("a", (Point(0, 0), Point(640, 480, 0)), Box(0, 0, 640, 480))
    assert fit([prompt], SIZE) == (prompt,)


@pytest.mark.parametrize(
    ("point", "axis"), [((-0.1, 5), "x"), ((640.5, 5), "x"), ((5, -1), "y"), ((5, 481), "y")]
)
def test_a_point_outside_the_picture_is_refused_with_the_pictures_size(
    point: tuple[float, float], axis: str
) -> None:
    with pytest.raises(PromptError) as caught:
        fit([Prompt(points=(Point(1, 1), Point(*point)))], SIZE)
    assert caught.value.place == f"points[1].{axis}"
    assert "640×480" in caught.value.reason


def test_a_box_a_little_over_the_edge_is_clipped_and_said() -> None:
    (used,) = fit([Prompt(box=Box(-64, 10, 650.5, 480))], SIZE)
    assert used.box == Box(0, 10, 640, 480)
    assert used.notes == ("box clipped to the picture: x0 -64 → 0, x1 650.5 → 640",)


def test_clipping_keeps_the_notes_that_were_there() -> None:
    (used,) = fit([Prompt(box=Box(-1, 0, 5, 5), notes=("first",))], SIZE)
    assert used.notes[0] == "first"
    assert len(used.notes) == 2


@pytest.mark.parametrize(
    ("box", "key"),
    [
        ((-65, 0, 5, 5), "x0"),
        ((0, 0, 705, 5), "x1"),
        ((0, -49, 5, 5), "y0"),
        ((0, 0, 5, 529), "y1"),
    ],
)
def test_a_box_far_over_the_edge_is_refused(box: tuple[float, ...], key: str) -> None:
    with pytest.raises(PromptError) as caught:
        fit([Prompt(box=Box(0, 0, 5, 5)), Prompt(box=Box(*box))], SIZE)
    assert caught.value.place == f"objects[1].box.{key}"
    assert "640×480" in caught.value.reason


@pytest.mark.parametrize(
    "box", [(-20, 5, 0, 9), (640, 5, 660, 9), (5, -20, 9, -1), (5, 480, 9, 490)]
)
def test_a_box_of_which_nothing_is_left_is_refused(box: tuple[float, ...]) -> None:
    with pytest.raises(PromptError, match="beside the picture"):
        fit([Prompt(box=Box(*box))], SIZE)


def test_a_prompt_made_elsewhere_with_nonsense_numbers_is_refused_too() -> None:
    nan = float("nan")
    for prompt in (
        Prompt(box=Box(nan, 0, 1, 1)),
        Prompt(points=(Point(nan, 1),)),
        Prompt(box=Box(5, 5, 5, 9)),
    ):
        with pytest.raises(PromptError):
            fit([prompt], SIZE)


@pytest.mark.slow
@given(st.lists(_objects(), min_size=1, max_size=3))
@settings(deadline=None, max_examples=200)
def test_what_fits_lies_inside_and_fits_again_unchanged(objects: list[dict[str, Any]]) -> None:
    asked = read({"objects": objects}).prompts
    assert isinstance(asked, tuple)
    try:
        used = fit(asked, SIZE)
    except PromptError:
        return
    for prompt in used:
        if prompt.box is not None:
            assert 0 <= prompt.box.x0 < prompt.box.x1 <= 640
            assert 0 <= prompt.box.y0 < prompt.box.y1 <= 480
    assert fit(used, SIZE) == used


# ── writing ──


@given(VALID)
@settings(deadline=None, max_examples=200)
def test_prompts_written_are_read_back_the_same(tree: object) -> None:
    asked = read(tree).prompts
    assert read(as_document(asked)).prompts == asked


def test_a_prompt_is_written_as_an_entry_of_objects() -> None:
    prompt = Prompt("dog", (Point(1, 2, 0),), Box(0, 0, 5, 5), ("a note",))
    assert as_dict(prompt) == {
        "label": "dog",
        "points": [{"x": 1, "y": 2, "label": 0}],
        "box": {"x0": 0, "y0": 0, "x1": 5, "y1": 5},
    }


# ── not all there ──

WHOLE = [
    (
        '{"label": "d\\u00fcr \\ud83d\\ude00 é", '
        '"box": {"x0": -1.5e-3, "y0": 0.25E+2, "x1": 370, "y1": 3e2}}'
    ).encode(),
    b'\xef\xbb\xbf{"everything": {"points_per_side": 4}, "x": [true, false, null, NaN, -Infinity]}',
    b'  {"points": [{"x": 250, "y": 190.5, "label": 1}]}',
]


@pytest.mark.parametrize("whole", WHOLE)
def test_a_file_that_is_cut_off_anywhere_may_still_grow(whole: bytes) -> None:
    for length in range(len(whole)):
        with pytest.raises(IncompletePromptError):
            parse(whole[:length])


@pytest.mark.parametrize("whole", WHOLE)
def test_a_file_that_has_its_length_before_its_content_may_still_be_filled(whole: bytes) -> None:
    for length in range(len(whole)):
        with pytest.raises(IncompletePromptError):
            parse(whole[:length].ljust(len(whole), b"\0"))


@pytest.mark.parametrize(
    "wrong",
    [
        '{"a": 1,}',
        "{'a': 1}",
        '{"a": 1} x',
        '{"a": tru }',
        '{"a": "b" "c"',
        '{"a": "\\x',
        '{"a": "\\u12"}',
        '{"a" 1',
        "5",
    ],
)
def test_a_mistake_in_the_middle_is_not_mended_by_what_may_follow(wrong: str) -> None:
    assert type(refusal(wrong)) is PromptError
