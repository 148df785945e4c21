"""OPEX files: loaded with the `opex` library, and held against the masks they came from."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import opex
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam_poll.core.types import Box, Mask, Point, Prompt, Result, Size
from sam_poll.formats.opex import make, predictions
from sam_poll.formats.registry import FormatOptions
from tests.support.results import disc, frames, mask_of, rectangle, result_of

SIZE = Size(120, 90)
EXACT = FormatOptions(tolerance_px=0, min_area_px=0)


def written(result: Result, options: FormatOptions = EXACT) -> dict[str, Any]:
    (document,) = make(options)(result)
    assert (document.suffix, document.media_type) == (".opex.json", "application/json")
    loaded = opex.ObjectPredictions.from_json_string(document.body.decode("utf-8"))
    read: dict[str, Any] = json.loads(document.body)
    assert len(loaded.objects) == len(read["objects"])
    return read


def redrawn(objects: list[dict[str, Any]], size: Size) -> np.ndarray:
    """The union of the objects' polygons, holes cut out, read from the file alone."""
    frame = np.zeros((size.height, size.width), np.uint8)
    for entry in objects:
        polygons = [entry["polygon"]["points"], *json.loads(entry["meta"]["holes"])]
        cv2.fillPoly(frame, [np.array(points, np.int32) for points in polygons], 1)
    return frame.astype(bool)


def test_an_object_states_its_label_its_position_and_its_prompt() -> None:
    prompt = Prompt(
        "Tür",
        points=(Point(20.5, 15), Point(1, 2, 0)),
        box=Box(10, 12, 40.25, 30),
        notes=("clipped",),
    )
    read = written(
        result_of(
            SIZE, [rectangle(SIZE, 10, 12, 40, 30, label="Tür", score=0.934567)], prompts=[prompt]
        )
    )
    (entry,) = read["objects"]
    assert entry["label"] == "Tür"
    assert entry["score"] == 0.9346
    assert entry["bbox"] == {"top": 12, "left": 10, "bottom": 29, "right": 39}
    assert sorted(entry["polygon"]["points"]) == [[10, 12], [10, 29], [39, 12], [39, 29]]
    meta = entry["meta"]
    assert (meta["object"], meta["area"], meta["holes"], meta["notes"]) == (
        "1",
        "540",
        "[]",
        "clipped",
    )
    assert json.loads(meta["prompt"]) == {
        "label": "Tür",
        "points": [{"x": 20.5, "y": 15, "label": 1}, {"x": 1, "y": 2, "label": 0}],
        "box": {"x0": 10, "y0": 12, "x1": 40.25, "y1": 30},
    }


def test_the_file_says_picture_model_and_notes_but_no_time() -> None:
    read = written(
        result_of(SIZE, [], notes=("box clipped", "first page used"), timings={"encode": 3.5})
    )
    assert list(read) == ["id", "objects", "meta"]
    assert read["id"] == "cam1/dog"
    assert read["meta"] == {
        "image": "done/cam1/dog.jpg",
        "width": "120",
        "height": "90",
        "model": "demo",
        "family": "sam2",
        "device": "cpu",
        "precision": "float32",
        "step": "float32 256",
        "side": "256",
        "notes": "box clipped; first page used",
    }


def test_the_peak_memory_is_written_in_whole_mib_where_it_is_known() -> None:
    result = result_of(SIZE, [])
    measured = replace(result, model=replace(result.model, peak_mib=812.61))
    assert written(measured)["meta"]["peak_mib"] == "813"
    assert "peak_mib" not in written(result)["meta"]


def test_a_time_that_is_handed_in_is_written_first() -> None:
    (document,) = predictions(result_of(SIZE, []), EXACT, timestamp="2024-02-29T12:00:00Z")
    loaded = opex.ObjectPredictions.from_json_string(document.body.decode())
    assert loaded.timestamp == "2024-02-29T12:00:00Z"
    assert next(iter(json.loads(document.body))) == "timestamp"


def test_each_connected_part_is_one_object_with_the_number_of_its_mask() -> None:
    frame = np.zeros((90, 120), bool)
    frame[5:25, 5:25] = frame[40:80, 60:110] = True
    read = written(result_of(SIZE, [disc(SIZE, 30, 60, 9, label="one"), mask_of(frame, "two")]))
    assert [(o["label"], o["meta"]["object"]) for o in read["objects"]] == [
        ("one", "1"),
        ("two", "2"),
        ("two", "2"),
    ]


def test_a_hole_is_no_object_but_stands_in_meta() -> None:
    ring = disc(SIZE, 60, 45, 30, hole=12)
    (entry,) = written(result_of(SIZE, [ring]))["objects"]
    assert len(json.loads(entry["meta"]["holes"])) == 1
    assert np.array_equal(redrawn([entry], SIZE), np.pad(ring.pixels, pads(ring, SIZE)))


def pads(mask: Mask, size: Size) -> tuple[tuple[int, int], tuple[int, int]]:
    height, width = mask.pixels.shape
    return (mask.top, size.height - mask.top - height), (mask.left, size.width - mask.left - width)


@settings(deadline=None, max_examples=100)
@given(frames())
def test_without_simplification_the_file_draws_the_mask_again_exactly(frame: np.ndarray) -> None:
    size = Size(frame.shape[1], frame.shape[0])
    objects = written(result_of(size, [mask_of(frame)]))["objects"]
    assert np.array_equal(redrawn(objects, size), frame)
    assert bool(objects) == bool(frame.any())
    for entry in objects:
        box, points = entry["bbox"], np.array(entry["polygon"]["points"])
        assert [box["left"], box["top"]] == points.min(axis=0).tolist()
        assert [box["right"], box["bottom"]] == points.max(axis=0).tolist()


def test_at_the_default_tolerance_the_file_draws_the_mask_again_closely() -> None:
    for mask in (
        disc(SIZE, 60, 45, 40, hole=15),
        rectangle(SIZE, 0, 0, 120, 90),
        disc(SIZE, 0, 0, 50),
    ):
        whole = np.pad(mask.pixels, pads(mask, SIZE))
        again = redrawn(written(result_of(SIZE, [mask]), FormatOptions())["objects"], SIZE)
        assert np.count_nonzero(whole & again) / np.count_nonzero(whole | again) >= 0.98


def test_a_mask_that_is_empty_or_too_small_gives_a_note_instead_of_an_object() -> None:
    empty, dot = (
        rectangle(SIZE, 3, 3, 3, 3, label="cat"),
        rectangle(SIZE, 50, 50, 53, 53, label="dot"),
    )
    read = written(result_of(SIZE, [empty, dot]), FormatOptions(min_area_px=16))
    assert read["objects"] == []
    assert read["meta"]["notes"] == (
        "object 1 (cat) has no contour: its mask is empty; "
        "object 2 (dot) has no contour: every part of it is below the minimum area"
    )


@pytest.mark.parametrize(
    ("score", "read"), [(1.03, 1.0), (-0.2, 0.0), (math.nan, None), (-math.inf, None)]
)
def test_a_score_outside_what_opex_takes_is_clipped_or_left_out(
    score: float, read: float | None
) -> None:
    (entry,) = written(result_of(SIZE, [rectangle(SIZE, 1, 1, 9, 9, score=score)]))["objects"]
    assert entry.get("score") == read


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters()))
def test_any_label_is_valid_json_in_utf8(label: str) -> None:
    result = result_of(
        SIZE,
        [rectangle(SIZE, 1, 1, 9, 9, label=label)],
        prompts=[Prompt(label, box=Box(1, 1, 9, 9))],
    )
    (entry,) = written(result)["objects"]
    assert entry["label"] == (label or "object")
    assert json.loads(entry["meta"]["prompt"])["label"] == label


def test_umlauts_are_written_as_themselves() -> None:
    (document,) = make(EXACT)(result_of(SIZE, [rectangle(SIZE, 1, 1, 9, 9, label="Tür")]))
    assert "Tür".encode() in document.body
