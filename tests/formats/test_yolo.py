"""YOLO segmentation: lines and what they are of; read back by drawing, from the text alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from sam_poll.core.types import Mask, Result, Size
from sam_poll.core.yaml_reader import read_yaml
from sam_poll.formats.registry import FormatOptions
from sam_poll.formats.yolo import digits, make
from tests.support.results import disc, filled, frames, mask_of, rectangle, result_of

SIZE = Size(60, 40)


def written(result: Result, **options: Any) -> tuple[list[str], dict[str, Any]]:
    text, facts = make(FormatOptions(**options))(result)
    assert (text.suffix, facts.suffix) == (".yolo.txt", ".yolo.yaml")
    assert text.body == b"" or text.body.endswith(b"\n")
    return text.body.decode("ascii").splitlines(), yaml.safe_load(facts.body)


def points(line: str, size: Size) -> list[tuple[float, float]]:
    values = [float(word) for word in line.split()[1:]]
    return [
        (x * size.width, y * size.height) for x, y in zip(values[::2], values[1::2], strict=True)
    ]


def drawn(lines: list[str], size: Size) -> list[np.ndarray]:
    """By a reader that draws the border, and by one that asks for the pixel's centre."""
    image, centres = Image.new("L", size), np.zeros((size.height, size.width), bool)
    for line in lines:
        ImageDraw.Draw(image).polygon(points(line, size), fill=1, outline=1)
        flat = [value for point in points(line, size) for value in point]
        centres |= (
            coco_mask.decode(coco_mask.frPyObjects([flat], size.height, size.width))[..., 0] > 0
        )
    return [np.asarray(image) > 0, centres]


@settings(deadline=None, max_examples=200)
@given(frames())
@example(np.ones((1, 1), bool))
@example(np.ones((1, 24), bool))
def test_without_simplification_the_filled_mask_comes_back_exactly(frame: np.ndarray) -> None:
    size = Size(frame.shape[1], frame.shape[0])
    lines, _ = written(result_of(size, [mask_of(frame)]), tolerance_px=0, min_area_px=0)
    for again in drawn(lines, size):
        assert np.array_equal(again, filled(frame))


@pytest.mark.parametrize("width", [99_999, 100_000, 3_000_000])
def test_a_point_is_off_by_a_twentieth_of_a_pixel_at_most_in_pictures_of_any_width(
    width: int,
) -> None:
    size = Size(width, 4)
    mask = Mask("far", 0.9, width - 7, 0, np.ones((4, 7), bool))
    (line,), _ = written(result_of(size, [mask]))
    wanted = {(x, y) for x in (width - 6.75, width - 0.25) for y in (0.25, 3.75)}
    for x, y in points(line, size):
        assert min(max(abs(x - a), abs(y - b)) for a, b in wanted) <= 0.05
    assert digits(Size(5184, 3888)) == 6


def test_classes_are_the_labels_sorted_by_name_those_of_empty_masks_too() -> None:
    masks = [
        rectangle(SIZE, 1, 1, 9, 9, label="wheel"),
        rectangle(SIZE, 5, 5, 5, 5, label="bolt"),
        rectangle(SIZE, 11, 1, 19, 9, label="car"),
    ]
    lines, facts = written(result_of(SIZE, masks))
    assert facts == {
        "image": "done/cam1/dog.jpg",
        "width": 60,
        "height": 40,
        "names": {0: "bolt", 1: "car", 2: "wheel"},
        "notes": "object 2 (bolt) is left out: its mask is empty",
    }
    assert [line.split()[0] for line in lines] == ["2", "1"]


def test_each_part_has_a_line_the_largest_first() -> None:
    frame = np.zeros((40, 60), bool)
    frame[2:8, 2:8] = frame[20:35, 20:50] = True
    lines, _ = written(result_of(SIZE, [mask_of(frame)]))
    assert [min(points(line, SIZE)) for line in lines] == [
        pytest.approx((20.25, 20.25)),
        pytest.approx((2.25, 2.25)),
    ]


def test_all_values_lie_within_0_and_1_at_the_picture_s_edges() -> None:
    lines, _ = written(result_of(SIZE, [disc(SIZE, 0, 0, 100), rectangle(SIZE, 0, 0, 60, 40)]))
    assert len(lines) == 2
    assert all(0 <= float(word) <= 1 for line in lines for word in line.split()[1:])


def test_a_picture_without_objects_has_an_empty_file_and_is_still_named() -> None:
    lines, facts = written(result_of(SIZE, []))
    assert lines == []
    assert facts["names"] == {}
    assert facts["image"] == "done/cam1/dog.jpg"


def test_a_file_left_empty_for_a_tiny_object_carries_a_note() -> None:
    result = result_of(
        SIZE, [rectangle(SIZE, 1, 1, 3, 3, label="speck")], notes=("read at half its size",)
    )
    lines, facts = written(result)
    assert lines == []
    missing = "object 1 (speck) is left out: every part of it is below the minimum area"
    assert facts["notes"] == f"read at half its size; {missing}"
    assert [note for document in make(FormatOptions())(result) for note in document.notes] == [
        missing
    ]


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(), min_size=1), st.text(st.characters(), min_size=1))
@example("Tür 漢字 😀", "done/Größe/ä ö.jpg")
@example("yes", "1e3")
@example("a: b # c\n'\"", "\x00\x85\udc80\ufeff")
def test_any_label_and_any_name_come_back(label: str, name: str) -> None:
    result = result_of(SIZE, [rectangle(SIZE, 1, 1, 9, 9, label=label)], name=name)
    _, facts = make(FormatOptions())(result)
    for read in (yaml.safe_load(facts.body), read_yaml(facts.body.decode())[0]):
        assert read["image"] == name
        assert list(read["names"].values()) == [label]
