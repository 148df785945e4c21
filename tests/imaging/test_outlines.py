"""Outlines: polygons for readers that fill areas, drawn again by three of them that share nothing
with us.
"""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from pycocotools import mask as coco

from sam_poll.core.types import Mask, Size
from sam_poll.imaging import outlines as outlines_module
from sam_poll.imaging.contours import Polygon
from sam_poll.imaging.outlines import outlines
from tests.support.results import disc, filled, frames, mask_of, rectangle

SIZE = Size(120, 90)


def by_coco(polygon: Polygon, size: Size) -> np.ndarray:
    return (
        coco.decode(coco.frPyObjects([polygon.ravel().tolist()], size.height, size.width))[..., 0]
        > 0
    )


def by_pillow(polygon: Polygon, size: Size) -> np.ndarray:
    image = Image.new("L", size)
    ImageDraw.Draw(image).polygon([(x, y) for x, y in polygon.tolist()], fill=1, outline=1)
    return np.asarray(image) > 0


def by_opencv(polygon: Polygon, size: Size) -> np.ndarray:
    """As training code for YOLO does it: fractions cut off, border drawn."""
    frame = np.zeros((size.height, size.width), np.uint8)
    cv2.fillPoly(frame, [polygon.astype(np.int32)], 1)
    return frame > 0


READERS = [by_coco, by_pillow, by_opencv]


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.count_nonzero(one & other) / np.count_nonzero(one | other))


@settings(deadline=None, max_examples=200)
@given(frames())
@example(np.ones((1, 1), bool))
@example(np.ones((1, 7), bool))
@example(np.eye(6, dtype=bool))
@example(~np.eye(6, dtype=bool))
def test_without_simplification_every_reader_fills_exactly_the_parts_without_their_holes(
    frame: np.ndarray,
) -> None:
    size = Size(frame.shape[1], frame.shape[0])
    polygons = outlines(mask_of(frame), tolerance_px=0, min_area_px=0)
    for read in READERS:
        drawn = np.zeros_like(frame)
        for polygon in polygons:
            drawn |= read(polygon, size)
        assert np.array_equal(drawn, filled(frame)), read.__name__


@settings(deadline=None, max_examples=200)
@given(frames(), st.floats(0, 9))
def test_whatever_the_tolerance_polygons_have_three_points_and_lie_within_the_picture(
    frame: np.ndarray, tolerance: float
) -> None:
    for polygon in outlines(mask_of(frame), tolerance_px=tolerance, min_area_px=0):
        assert polygon.dtype == np.float64
        assert polygon.shape[0] >= 3
        assert polygon.min() >= 0
        assert (polygon <= (frame.shape[1], frame.shape[0])).all()


@settings(deadline=None, max_examples=100)
@given(frames(), st.sampled_from([0.5, 1.0, 3.0, 20.0]))
def test_a_simplified_part_keeps_the_promised_iou(frame: np.ndarray, tolerance: float) -> None:
    count, numbers = cv2.connectedComponents(filled(frame).view(np.uint8), connectivity=8)
    polygons = outlines(mask_of(frame), tolerance_px=tolerance, min_area_px=0)
    assert len(polygons) == count - 1
    for polygon in polygons:
        drawn = by_coco(polygon, Size(frame.shape[1], frame.shape[0]))
        (number,) = set(np.unique(numbers[drawn])) - {0}
        assert iou(drawn, numbers == number) >= 0.98


@pytest.mark.parametrize("radius", [4, 9, 20, 40])
def test_the_default_tolerance_takes_fewer_points_and_keeps_the_promise(radius: float) -> None:
    ring = disc(SIZE, 50, 45, radius, hole=radius / 2)
    (exact,), (simple,) = outlines(ring, tolerance_px=0), outlines(ring)
    assert len(simple) < 0.8 * len(exact)
    whole = disc(SIZE, 50, 45, radius)
    assert iou(by_coco(simple, SIZE), by_coco(exact, SIZE)) >= 0.98
    assert np.count_nonzero(by_coco(exact, SIZE)) == whole.area


def test_a_rectangle_is_four_points_a_quarter_of_a_pixel_inside_its_edge() -> None:
    (polygon,) = outlines(rectangle(SIZE, 60, 30, 110, 80))
    assert sorted(map(tuple, polygon.tolist())) == [
        (60.25, 30.25),
        (60.25, 79.75),
        (109.75, 30.25),
        (109.75, 79.75),
    ]


def test_parts_come_largest_first_and_those_below_the_minimum_not_at_all() -> None:
    frame = np.zeros((40, 60), bool)
    frame[2:5, 2:5] = frame[10:20, 2:12] = frame[10:20, 30:40] = frame[30, 50] = True
    corners = [
        tuple(np.floor(polygon.min(axis=0)).astype(int))
        for polygon in outlines(mask_of(frame), min_area_px=9)
    ]
    assert corners == [(2, 10), (30, 10), (2, 2)]


def test_an_empty_mask_has_no_outline() -> None:
    assert outlines(Mask("", 0.9, 0, 0, np.zeros((0, 0), bool))) == []


def test_an_outline_costs_memory_by_its_border_and_not_by_the_picture() -> None:
    far = rectangle(Size(60_000, 2), 59_000, 0, 59_900, 2)
    tracemalloc.start()
    (polygon,) = outlines(far)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert polygon[:, 0].min() == 59_000.25
    assert peak < 2_000_000


@settings(deadline=None, max_examples=100)
@given(
    frames(), st.sampled_from([0.25, 1.0, 3.0]), st.sampled_from([1, 40]), st.sampled_from([1, 3])
)
def test_parts_worked_on_together_become_what_each_becomes_alone(
    frame: np.ndarray, tolerance: float, at_once: int, compared: int
) -> None:
    together = outlines(mask_of(frame), tolerance_px=tolerance, min_area_px=0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(outlines_module, "AT_ONCE", at_once)
        patched.setattr(outlines_module, "COMPARED", compared)
        apart = outlines(mask_of(frame), tolerance_px=tolerance, min_area_px=0)
    assert len(together) == len(apart)
    assert all(map(np.array_equal, together, apart))


def test_outlines_of_noise_ask_the_readers_a_few_times_and_not_for_each_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noise = mask_of(np.random.default_rng(0).random((200, 200)) < 0.2)
    asked = []
    fill = coco.frPyObjects
    monkeypatch.setattr(coco, "frPyObjects", lambda *given: asked.append(None) or fill(*given))
    assert len(outlines(noise, min_area_px=4)) > 500
    assert len(asked) < 20
