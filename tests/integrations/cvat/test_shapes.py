"""Tests of masks as shapes of CVAT's API, and of the fingerprints of shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cvat_sdk.masks import decode_mask
from hypothesis import given
from hypothesis import strategies as st

from sam_poll.core.errors import CvatError
from sam_poll.core.types import BoolArray, Mask, Size
from sam_poll.formats.cvat import flat
from sam_poll.imaging import masks
from sam_poll.integrations.cvat import shapes
from sam_poll.integrations.cvat.shapes import Label, ServerShapes

SIZE = Size(24, 18)


@st.composite
def bitmaps(draw: st.DrawFn) -> BoolArray:
    """Generate frames with at least one set pixel: noise, rings, single pixels, borders."""
    bits = draw(
        st.lists(
            st.booleans(), min_size=SIZE.width * SIZE.height, max_size=SIZE.width * SIZE.height
        )
    )
    pixels = np.array(bits, bool).reshape(SIZE.height, SIZE.width)
    left, top = draw(st.integers(0, SIZE.width - 1)), draw(st.integers(0, SIZE.height - 1))
    pixels[:top] = pixels[:, :left] = False
    pixels[top, left] = True
    return pixels


def rectangle(points: list[float], **more: Any) -> dict[str, Any]:
    return {"id": 1, "type": "rectangle", "frame": 0, "label_id": 1, "points": points, **more}


@given(bitmaps())
def test_a_mask_comes_back_from_its_flat_form_pixel_for_pixel(pixels: BoolArray) -> None:
    mask = masks.tight(pixels, "dog", 0.5)
    back = shapes.mask_of(flat(mask), "dog", 0.5)
    assert np.array_equal(masks.paste(back, SIZE), pixels)


@given(bitmaps())
def test_the_sdk_reads_the_flat_form_as_the_same_mask(pixels: BoolArray) -> None:
    points = flat(masks.tight(pixels, "dog", 0.5))
    assert np.array_equal(
        decode_mask(points, image_width=SIZE.width, image_height=SIZE.height), pixels
    )


@pytest.mark.parametrize(
    "wrong", [[0, 4, 0, 0, 2, 2], [0, 9, 2, 2, 0, 0], [-1, 10, 0, 0, 2, 2], [0, 0, 2, 2]]
)
def test_run_lengths_that_do_not_fill_their_box_are_refused(wrong: list[int]) -> None:
    with pytest.raises(CvatError, match="run lengths"):
        shapes.mask_of(wrong, "dog", 0.5)


@given(bitmaps())
def test_a_rectangle_has_edges_around_the_first_and_last_pixels(pixels: BoolArray) -> None:
    mask = masks.tight(pixels, "dog", 0.5)
    ((left, top, right, bottom),) = shapes.points_of(
        mask, "rectangle", (), tolerance_px=1, min_area_px=16
    )
    assert not np.delete(pixels, np.s_[int(left) : int(right)], axis=1).any()
    assert not np.delete(pixels, np.s_[int(top) : int(bottom)], axis=0).any()
    assert pixels[:, int(left)].any()
    assert pixels[:, int(right) - 1].any()
    assert pixels[int(top)].any()
    assert pixels[int(bottom) - 1].any()


@given(bitmaps())
def test_every_non_empty_mask_has_a_polygon_inside_the_picture(pixels: BoolArray) -> None:
    mask = masks.tight(pixels, "dog", 0.5)
    polygons = shapes.points_of(mask, "polygon", (), tolerance_px=1, min_area_px=16)
    assert polygons
    for points in polygons:
        assert len(points) >= 6
        assert len(points) % 2 == 0
        assert 0 <= min(points[::2]) <= max(points[::2]) <= SIZE.width
        assert 0 <= min(points[1::2]) <= max(points[1::2]) <= SIZE.height


@given(st.lists(st.floats(0, 5000), min_size=4, max_size=4))
def test_a_fingerprint_is_the_same_after_the_server_has_rounded_the_shape(
    points: list[float],
) -> None:
    sent = [round(value, 2) for value in points]
    assert shapes.fingerprint(rectangle(sent)) == shapes.fingerprint(
        rectangle([float(f"{value:.2f}") for value in sent])
    )
    assert shapes.fingerprint(rectangle(sent)) == shapes.fingerprint(
        rectangle(sent, id=77, group=3, z_order=5, source="manual")
    )


@pytest.mark.parametrize(
    "other",
    [
        {"frame": 1},
        {"label_id": 2},
        {"type": "polyline"},
        {"rotation": 30.0},
        {"points": [1, 2, 3, 4.01]},
        {"points": [1, 2, 3, 4, 0, 0]},
    ],
)
def test_another_frame_label_type_rotation_or_point_gives_another_fingerprint(
    other: dict[str, Any],
) -> None:
    assert shapes.fingerprint(rectangle([1, 2, 3, 4])) != shapes.fingerprint(
        {**rectangle([1, 2, 3, 4]), **other}
    )


def test_only_shapes_made_by_a_program_count_as_duplicates() -> None:
    one = rectangle([1, 2, 3, 4], source="auto")
    drawn = rectangle([5, 6, 7, 8], source="manual")
    placed = ServerShapes(
        [{**one, "id": n} for n in (9, 4, 6)] + [{**drawn, "id": n} for n in (1, 2)]
    )
    assert placed.duplicates([shapes.fingerprint(one), shapes.fingerprint(drawn)]) == {6, 9}
    assert placed.duplicates([]) == set()


def test_a_video_has_a_frame_for_each_of_its_pictures_and_deleted_ones_are_left_out() -> None:
    video = {
        "size": 4,
        "frames": [{"name": "v.mp4", "width": 8, "height": 6}],
        "deleted_frames": [2],
    }
    frames = shapes.frames_of(video)
    assert sorted(frames) == [0, 1, 3]
    assert frames[3].size == Size(8, 6)
    assert len({frame.name for frame in frames.values()}) == 3


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.15.0", False),
        ("2.56.1", False),
        ("2.57.0", True),
        ("2.73.0", True),
        ("3.0.0", True),
        ("2.57.0-dev", True),
        ("?", False),
        ("", False),
    ],
)
def test_shapes_have_a_score_of_their_own_from_2_57_on(version: str, expected: bool) -> None:
    assert shapes.has_native_score(version) == expected


def test_a_new_label_has_the_attribute_only_where_shapes_have_no_score_of_their_own() -> None:
    (attribute,) = shapes.new_label("dog", native_score=False)["attributes"]
    assert (attribute["name"], attribute["input_type"]) == ("score", "text")
    # CVAT's COCO export fails on a score that is not a number.
    assert (attribute["values"], attribute["default_value"]) == (["1"], "1")
    assert shapes.new_label("dog", native_score=True) == {"name": "dog", "attributes": []}


@pytest.mark.parametrize(
    ("native_score", "with_attribute", "score", "own", "attribute"),
    [
        (False, False, 0.98765, None, []),
        (False, True, 0.98765, None, ["0.9877"]),
        (True, False, 0.98765, 0.9877, []),
        (True, True, 0.98765, 0.9877, ["0.9877"]),
        (True, True, 1.02, 1.0, ["1.0"]),
        (True, True, float("nan"), None, []),
        (True, True, None, None, []),
    ],
)
def test_a_score_is_written_where_the_server_keeps_it(
    native_score: bool,
    with_attribute: bool,
    score: float | None,
    own: float | None,
    attribute: list[str],
) -> None:
    attributes = [{"id": 7, "name": "score", "input_type": "text", "values": ["1"]}]
    entry = {"id": 1, "name": "dog", "attributes": attributes if with_attribute else []}
    label = shapes.labels_of([entry], native_score=native_score)[1]
    assert label.keeps_score == (native_score or with_attribute)
    made = shapes.entry(0, label, "rectangle", [1, 1, 9, 9], score)
    assert made.get("score") == own
    assert [a["value"] for a in made["attributes"]] == attribute


def test_labels_of_a_skeletons_parts_are_left_out() -> None:
    entries = [
        {"id": 1, "name": "dog", "type": "mask"},
        {"id": 2, "name": "nose", "has_parent": True},
    ]
    assert shapes.labels_of(entries) == {1: Label(1, "dog", "mask")}
    assert shapes.labels_of(entries)[1].allows("mask")
    assert not shapes.labels_of(entries)[1].allows("polygon")


@pytest.mark.parametrize(
    "entry",
    [
        rectangle([1, 2, 3]),
        rectangle([1, 2, 3, 4], label_id=9),
        rectangle([1, 2, 3, 4], outside=True),
        {**rectangle([1, 2, 3, 4]), "type": "ellipse"},
        {**rectangle([]), "type": "points"},
    ],
)
def test_only_boxes_and_points_of_known_labels_are_prompts(
    entry: dict[str, Any],
) -> None:
    assert shapes.prompt_shape(entry, {1: Label(1, "dog", "any")}, SIZE) is None


def test_a_score_that_is_not_a_number_is_not_written() -> None:
    label = Label(1, "dog", "any", score=shapes.Attribute(5))
    mask = Mask("dog", float("nan"), 0, 0, np.ones((1, 1), bool))
    assert shapes.entry(0, label, "mask", flat(mask), mask.score)["attributes"] == []


@pytest.mark.parametrize(
    ("entry", "box"),
    [
        ({"type": "rectangle", "points": [5, 6, 15, 26]}, (5, 6, 15, 26)),
        ({"type": "rectangle", "points": [5, 6, 15, 26], "rotation": 90.0}, (0, 11, 20, 21)),
        ({"type": "ellipse", "points": [10, 20, 14, 13]}, (6, 13, 14, 27)),
        ({"type": "polygon", "points": [1, 2, 9, 4, 3, 8]}, (1, 2, 9, 8)),
        ({"type": "mask", "points": [0, 6, 4, 5, 6, 6]}, (4, 5, 7, 7)),
        ({"type": "polyline", "points": [1, 2, 9, 4, 3, 8]}, None),
        ({"type": "points", "points": [1, 2]}, None),
        ({"type": "rectangle", "points": [5, 6, 5, 26]}, None),
        ({"type": "rectangle", "points": [5, 6, 15, 26], "outside": True}, None),
        ({"type": "skeleton", "points": []}, None),
    ],
)
def test_the_box_around_a_shape_is_upright(
    entry: dict[str, Any], box: tuple[float, ...] | None
) -> None:
    around = shapes.box_around(entry)
    corners = around and (around.x0, around.y0, around.x1, around.y1)
    assert corners == (box and pytest.approx(box))
