"""Masks become the shapes that CVAT's API takes, pixel for pixel, and shapes are known again by what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_poll import geometry
from sam_poll.cvat import shapes
from sam_poll.cvat.shapes import Label, Placed
from sam_poll.errors import CvatError
from sam_poll.formats.cvat import flat
from sam_poll.types import Bitmap, Mask, Size

SIZE = Size(24, 18)


@st.composite
def bitmaps(draw: st.DrawFn) -> Bitmap:
    """Full frames with at least one set pixel: noise, rings, single pixels, borders and all."""
    bits = draw(st.lists(st.booleans(), min_size=SIZE.width * SIZE.height, max_size=SIZE.width * SIZE.height))
    pixels = np.array(bits, bool).reshape(SIZE.height, SIZE.width)
    left, top = draw(st.integers(0, SIZE.width - 1)), draw(st.integers(0, SIZE.height - 1))
    pixels[:top] = pixels[:, :left] = False
    pixels[top, left] = True
    return pixels


def rectangle(points: list[float], **more: Any) -> dict[str, Any]:
    return {"id": 1, "type": "rectangle", "frame": 0, "label_id": 1, "points": points, **more}


@given(bitmaps())
def test_a_mask_comes_back_from_its_flat_form_pixel_for_pixel(pixels: Bitmap) -> None:
    mask = geometry.tight(pixels, "dog", 0.5)
    back = shapes.unflat(flat(mask), "dog", 0.5)
    assert np.array_equal(geometry.paste(back, SIZE), pixels)


@given(bitmaps())
def test_the_sdk_reads_our_flat_form_as_the_same_mask(pixels: Bitmap) -> None:
    from cvat_sdk.masks import decode_mask

    points = flat(geometry.tight(pixels, "dog", 0.5))
    assert np.array_equal(decode_mask(points, image_width=SIZE.width, image_height=SIZE.height), pixels)


@pytest.mark.parametrize("wrong", [[0, 4, 0, 0, 2, 2], [0, 9, 2, 2, 0, 0], [-1, 10, 0, 0, 2, 2], [0, 0, 2, 2]])
def test_run_lengths_that_do_not_fill_their_box_are_refused(wrong: list[int]) -> None:
    with pytest.raises(CvatError, match="run lengths"):
        shapes.unflat(wrong, "dog", 0.5)


@given(bitmaps())
def test_a_rectangle_has_edges_around_the_first_and_last_pixels(pixels: Bitmap) -> None:
    mask = geometry.tight(pixels, "dog", 0.5)
    ((left, top, right, bottom),) = shapes.points_of(mask, "rectangle", (), tolerance_px=1, min_area_px=16)
    assert not np.delete(pixels, np.s_[int(left) : int(right)], axis=1).any()
    assert not np.delete(pixels, np.s_[int(top) : int(bottom)], axis=0).any()
    assert pixels[:, int(left)].any()
    assert pixels[:, int(right) - 1].any()
    assert pixels[int(top)].any()
    assert pixels[int(bottom) - 1].any()


@given(bitmaps())
def test_every_mask_that_is_not_empty_has_a_polygon_inside_the_picture(pixels: Bitmap) -> None:
    mask = geometry.tight(pixels, "dog", 0.5)
    polygons = shapes.points_of(mask, "polygon", (), tolerance_px=1, min_area_px=16)
    assert polygons
    for points in polygons:
        assert len(points) >= 6
        assert len(points) % 2 == 0
        assert 0 <= min(points[::2]) <= max(points[::2]) <= SIZE.width
        assert 0 <= min(points[1::2]) <= max(points[1::2]) <= SIZE.height


@given(st.lists(st.floats(0, 5000), min_size=4, max_size=4))
def test_a_shape_is_known_again_after_a_server_has_rounded_it_to_hundredths(points: list[float]) -> None:
    sent = [round(value, 2) for value in points]
    assert shapes.sign(rectangle(sent)) == shapes.sign(rectangle([float(f"{value:.2f}") for value in sent]))
    assert shapes.sign(rectangle(sent)) == shapes.sign(rectangle(sent, id=77, group=3, z_order=5, source="manual"))


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
def test_another_frame_label_type_turn_or_point_is_another_shape(other: dict[str, Any]) -> None:
    assert shapes.sign(rectangle([1, 2, 3, 4])) != shapes.sign({**rectangle([1, 2, 3, 4]), **other})


def test_only_what_a_program_made_counts_as_a_double() -> None:
    one = rectangle([1, 2, 3, 4], source="auto")
    drawn = rectangle([5, 6, 7, 8], source="manual")
    placed = Placed([{**one, "id": n} for n in (9, 4, 6)] + [{**drawn, "id": n} for n in (1, 2)])
    assert placed.doubles([shapes.sign(one), shapes.sign(drawn)]) == {6, 9}
    assert placed.doubles([]) == set()


def test_a_video_has_a_frame_for_each_of_its_pictures_and_deleted_ones_are_left_out() -> None:
    video = {"size": 4, "frames": [{"name": "v.mp4", "width": 8, "height": 6}], "deleted_frames": [2]}
    frames = shapes.frames_of(video)
    assert sorted(frames) == [0, 1, 3]
    assert frames[3].size == Size(8, 6)
    assert len({frame.name for frame in frames.values()}) == 3


def test_the_parts_of_a_skeleton_are_no_labels() -> None:
    entries = [{"id": 1, "name": "dog", "type": "mask"}, {"id": 2, "name": "nose", "has_parent": True}]
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
def test_what_is_neither_a_box_nor_points_of_a_known_label_is_not_asked_with(entry: dict[str, Any]) -> None:
    assert shapes.asking(entry, {1: Label(1, "dog", "any")}, SIZE) is None


def test_an_object_with_a_score_that_is_no_number_has_none() -> None:
    label = Label(1, "dog", "any", score=shapes.Attribute(5))
    mask = Mask("dog", float("nan"), 0, 0, np.ones((1, 1), bool))
    assert shapes.entry(0, label, "mask", flat(mask), mask.score)["attributes"] == []
