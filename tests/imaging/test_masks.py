"""Masks equal the official libraries' interpolation; contours give their mask back."""

from __future__ import annotations

import tracemalloc

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_anything.utils.transforms import ResizeLongestSide

from sam_poll.core.types import BoolArray, InputTransform, Logits, Mask, Size
from sam_poll.imaging import contours as contours_module
from sam_poll.imaging.contours import HALF_LINE, STRAY, Contour, contours, rasterize
from sam_poll.imaging.masks import iou, mask_of, paste, tight, to_network
from tests.support.strategies import bitmaps, logits

often = settings(max_examples=150, deadline=None)


def official(given_logits: Logits) -> np.ndarray:
    """Full-size logits as segment-anything's postprocess_masks and sam2's transforms make them."""
    frame, values = given_logits.frame, torch.from_numpy(given_logits.pixels)[None, None]
    if frame.two_step:
        values = torch.nn.functional.interpolate(
            values, (frame.side, frame.side), mode="bilinear", align_corners=False
        )
        values = values[..., : frame.region.height, : frame.region.width]
    size = (frame.size.height, frame.size.width)
    return torch.nn.functional.interpolate(values, size, mode="bilinear", align_corners=False)[
        0, 0
    ].numpy()


def assert_equal_to_the_official_mask(given_logits: Logits) -> Mask:
    mask, expected = mask_of(given_logits, "x"), official(given_logits)
    differing = paste(mask, given_logits.frame.size) != (expected > 0)
    differing &= np.abs(expected) >= 1e-5
    assert differing.sum() <= 1e-6 * differing.size
    assert_tight(mask)
    return mask


def assert_tight(mask: Mask) -> None:
    if mask.area == 0:
        assert mask.pixels.shape == (0, 0)
        return
    for edge in (mask.pixels[0], mask.pixels[-1], mask.pixels[:, 0], mask.pixels[:, -1]):
        assert edge.any()


def frame_of(width: int, height: int, side: int, two_step: bool) -> InputTransform:
    size = Size(width, height)
    if not two_step:
        return InputTransform(size, side, Size(side, side), two_step=False)
    transform = ResizeLongestSide(side)
    region_height, region_width = transform.get_preprocess_shape(height, width, side)
    return InputTransform(size, side, Size(region_width, region_height), two_step=True)


# -- masks --------------------


@given(logits())
@often
def test_a_mask_equals_the_official_interpolation(given_logits: Logits) -> None:
    assert_equal_to_the_official_mask(given_logits)


@pytest.mark.parametrize("two_step", [False, True])
@pytest.mark.parametrize(
    ("width", "height"),
    [(1801, 1203), (479, 641), (200, 100), (1, 1), (1, 333), (2047, 3), (1024, 1024), (255, 257)],
)
def test_a_mask_equals_the_official_interpolation_at_the_real_sizes(
    width: int, height: int, two_step: bool
) -> None:
    values = np.random.default_rng(width).normal(size=(256, 256)).astype(np.float32) * 10
    mask = assert_equal_to_the_official_mask(
        Logits(values, 0.7, frame_of(width, height, 1024, two_step))
    )
    assert (mask.label, mask.score) == ("x", 0.7)


@pytest.mark.parametrize("two_step", [False, True])
def test_no_positive_logit_gives_an_empty_mask(two_step: bool) -> None:
    values = np.zeros((256, 256), np.float32)
    mask = mask_of(Logits(values, 0.1, frame_of(640, 480, 1024, two_step)), "nothing")
    assert mask.pixels.shape == (0, 0)
    assert (mask.left, mask.top, mask.area) == (0, 0, 0)


def test_positive_logits_in_the_padding_belong_to_no_mask() -> None:
    values = np.full((256, 256), -1, np.float32)
    values[200:] = 1
    assert mask_of(Logits(values, 0.1, frame_of(640, 240, 1024, two_step=True)), "x").area == 0


@pytest.mark.parametrize("two_step", [False, True])
def test_a_small_object_in_a_large_picture_costs_little_memory(two_step: bool) -> None:
    values = np.full((256, 256), -5, np.float32)
    values[90:100, 90:110] = 5
    given_logits = Logits(values, 0.9, frame_of(5184, 3888, 1024, two_step))
    tracemalloc.start()
    try:
        mask = mask_of(given_logits, "x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert mask.pixels.nbytes < 150_000
    assert peak < (
        25e6 if two_step else 1e6
    )  # SAM1's first step is 1024² float32, whatever the picture


def test_a_full_mask_of_twenty_megapixels_costs_its_own_size_and_some_rows() -> None:
    given_logits = Logits(
        np.ones((256, 256), np.float32), 0.9, frame_of(5184, 3888, 1024, two_step=False)
    )
    tracemalloc.start()
    try:
        mask = mask_of(given_logits, "x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert mask.pixels.all()
    assert peak < mask.pixels.nbytes + 4e6


@given(bitmaps())
@often
def test_a_frame_survives_being_cut_tight_and_pasted(bitmap: BoolArray) -> None:
    mask = tight(bitmap, "x", 0.5)
    assert_tight(mask)
    assert mask.area == bitmap.sum()
    assert np.array_equal(paste(mask, Size(bitmap.shape[1], bitmap.shape[0])), bitmap)


def test_a_tight_mask_does_not_keep_its_frame_alive() -> None:
    bitmap = np.zeros((100, 100), dtype=bool)
    bitmap[3:5, 3:5] = True
    pixels = tight(bitmap, "x", 0.5).pixels
    assert not np.shares_memory(pixels, bitmap)
    assert pixels.base is None


@given(bitmaps(30), bitmaps(30))
@often
def test_iou_of_crops_is_that_of_full_frames(a: BoolArray, b: BoolArray) -> None:
    frame_a, frame_b = np.zeros((2, 30, 30), dtype=bool)
    frame_a[: a.shape[0], : a.shape[1]] = a
    frame_b[: b.shape[0], : b.shape[1]] = b
    either = (frame_a | frame_b).sum()
    expected = (frame_a & frame_b).sum() / either if either else 1.0
    assert iou(tight(frame_a, "a", 1), tight(frame_b, "b", 1)) == pytest.approx(expected)


# -- coordinates --------------------


@pytest.mark.parametrize(("width", "height"), [(640, 480), (481, 639), (1800, 1200), (33, 1000)])
def test_points_are_scaled_as_the_official_predictors_do(width: int, height: int) -> None:
    points = np.array([[0, 0], [12.5, 7], [width, height]])
    sam1 = ResizeLongestSide(1024).apply_coords(points, (height, width))
    assert to_network(points, frame_of(width, height, 1024, two_step=True)) == pytest.approx(sam1)
    sam2 = points / [width, height] * 1024
    assert to_network(points, frame_of(width, height, 1024, two_step=False)) == pytest.approx(sam2)


# -- contours --------------------


def drawn_again(parts: list[Contour], bitmap: BoolArray) -> BoolArray:
    return rasterize(parts, Size(bitmap.shape[1], bitmap.shape[0]))


def overlap(a: BoolArray, b: BoolArray) -> float:
    either = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / either if either else 1.0


def without_specks(bitmap: BoolArray, min_area: int) -> BoolArray:
    """Drop the parts, then fill the holes, that are smaller than `min_area`."""
    out = bitmap.astype(np.uint8)
    for value, connectivity in ((1, 8), (0, 4)):
        padded = np.pad(
            (out == value).astype(np.uint8), 16, constant_values=1 - value
        )  # all outside is no hole
        _, numbers, stats, _ = cv2.connectedComponentsWithStats(padded, connectivity=connectivity)
        small = stats[:, cv2.CC_STAT_AREA] < min_area
        small[0] = False
        out[small[numbers][16:-16, 16:-16]] = 1 - value
    return out.astype(bool)


@given(bitmaps())
@often
def test_contours_drawn_again_give_the_mask_back(bitmap: BoolArray) -> None:
    bitmap = without_specks(bitmap, 16)
    parts = contours(tight(bitmap, "x", 1))
    assert overlap(drawn_again(parts, bitmap), bitmap) >= 0.98


@given(bitmaps(), st.sampled_from([0.5, 1.0, 2.0, 5.0, 40.0]))
@often
def test_whatever_the_tolerance_no_part_is_lost_and_the_promise_holds(
    bitmap: BoolArray, tolerance: float
) -> None:
    parts = contours(tight(bitmap, "x", 1), tolerance_px=tolerance, min_area_px=0)
    assert len(parts) == cv2.connectedComponents(bitmap.astype(np.uint8), connectivity=8)[0] - 1
    assert overlap(drawn_again(parts, bitmap), bitmap) >= 0.98


@given(bitmaps())
@often
def test_contours_without_tolerance_give_the_very_mask_back(bitmap: BoolArray) -> None:
    parts = contours(tight(bitmap, "x", 1), tolerance_px=0, min_area_px=0)
    assert np.array_equal(drawn_again(parts, bitmap), bitmap)


@given(bitmaps(), st.booleans())
@often
def test_areas_and_boxes_are_those_of_the_connected_parts(
    bitmap: BoolArray, simplified: bool
) -> None:
    found = contours(tight(bitmap, "x", 1), tolerance_px=float(simplified), min_area_px=0)
    stats = cv2.connectedComponentsWithStats(bitmap.astype(np.uint8), connectivity=8)[2][
        1:
    ].tolist()
    expected = sorted((area, x, y, x + width, y + height) for x, y, width, height, area in stats)
    assert sorted((p.area, p.box.x0, p.box.y0, p.box.x1, p.box.y1) for p in found) == expected
    assert [p.area for p in found] == sorted((p.area for p in found), reverse=True)


@given(bitmaps(), st.sampled_from([0.0, 1.0, 3.0]))
@often
def test_every_polygon_has_three_points_and_lies_in_the_picture(
    bitmap: BoolArray, tolerance: float
) -> None:
    height, width = bitmap.shape
    for part in contours(tight(bitmap, "x", 1), tolerance_px=tolerance, min_area_px=0):
        for polygon in (part.points, *part.holes):
            assert polygon.dtype == np.float64
            assert len(np.unique(polygon, axis=0)) >= 3
            assert polygon.min() >= 0
            assert (polygon < (width, height)).all()


@given(bitmaps(), st.sampled_from([0.5, 1.0, 3.0]))
@settings(max_examples=60, deadline=None)
def test_no_border_pixel_is_further_from_its_polygon_than_the_tolerance(
    bitmap: BoolArray, tolerance: float
) -> None:
    mask = tight(bitmap, "x", 1)
    exact = contours(mask, tolerance_px=0, min_area_px=0)
    simplified = {
        (part.area, part.box): part
        for part in contours(mask, tolerance_px=tolerance, min_area_px=0)
    }
    for part in exact:
        outline = simplified[part.area, part.box].points.astype(np.float32)
        for x, y in part.points.tolist():
            away = abs(cv2.pointPolygonTest(outline.reshape(-1, 1, 2), (x, y), True))
            assert away <= STRAY * tolerance + HALF_LINE


@given(bitmaps())
@settings(max_examples=50, deadline=None)
def test_the_same_mask_gives_the_same_contours(bitmap: BoolArray) -> None:
    first, second = (contours(tight(bitmap, "x", 1)) for _ in range(2))
    assert [part.points.tolist() for part in first] == [part.points.tolist() for part in second]


def ring(width: int = 41, outer: float = 18, inner: float = 9) -> BoolArray:
    y, x = np.mgrid[:width, :width]
    away = np.hypot(x - width // 2, y - width // 2)
    return (away <= outer) & (away >= inner)


def test_a_ring_is_one_part_with_one_hole_and_the_hole_stays_free() -> None:
    bitmap = ring()
    (part,) = contours(tight(bitmap, "x", 1))
    assert len(part.holes) == 1
    assert part.area == bitmap.sum()
    assert not drawn_again([part], bitmap)[20, 20]


def test_a_ring_in_a_ring_is_two_parts() -> None:
    bitmap = ring(81, 38, 30) | ring(81, 20, 10)
    outer, inner = contours(tight(bitmap, "x", 1))
    assert outer.area > inner.area
    assert (len(outer.holes), len(inner.holes)) == (1, 1)
    assert overlap(drawn_again([outer, inner], bitmap), bitmap) >= 0.98


def test_a_ring_one_pixel_wide_keeps_its_hole() -> None:
    bitmap = np.zeros((12, 12), dtype=bool)
    bitmap[2:10, 2:10] = True
    bitmap[3:9, 3:9] = False
    parts = contours(tight(bitmap, "x", 1))
    assert np.array_equal(drawn_again(parts, bitmap), bitmap)


def test_a_cut_off_ring_at_the_border_of_the_picture_has_no_hole() -> None:
    bitmap = ring()[:, 20:]
    (part,) = contours(tight(bitmap, "x", 1))
    assert part.holes == ()


def test_contours_are_in_pixels_of_the_full_picture() -> None:
    bitmap = np.zeros((50, 70), dtype=bool)
    bitmap[30:40, 50:65] = True
    (part,) = contours(tight(bitmap, "x", 1))
    assert sorted(part.points.tolist()) == [[50, 30], [50, 39], [64, 30], [64, 39]]
    assert (part.box.x0, part.box.y0, part.box.x1, part.box.y1) == (50, 30, 65, 40)


def test_specks_and_pinholes_are_missing_from_the_contours_but_not_from_the_mask() -> None:
    bitmap = np.zeros((40, 40), dtype=bool)
    bitmap[5:35, 5:35] = True
    bitmap[20, 20] = False
    bitmap[1:4, 1:4] = True
    mask = tight(bitmap, "x", 1)
    (part,) = contours(mask)
    assert part.holes == ()
    assert mask.area == bitmap.sum()
    assert part.area == 899  # the pinhole is not in it
    assert len(contours(mask, min_area_px=9)) == 2


@pytest.mark.parametrize("step", [(1, 0), (0, 1), (1, 1), (1, -1)])
@pytest.mark.parametrize("length", [1, 2, 20])
def test_a_straight_line_of_pixels_becomes_a_narrow_rectangle(
    step: tuple[int, int], length: int
) -> None:
    bitmap = np.zeros((24, 24), dtype=bool)
    for index in range(length):
        bitmap[(0 if step[1] >= 0 else 22) + index * step[1], index * step[0]] = True
    (part,) = contours(tight(bitmap, "x", 1), min_area_px=0)
    assert cv2.contourArea(part.points.astype(np.float32)) > 0
    assert np.array_equal(drawn_again([part], bitmap), bitmap)


def test_an_empty_mask_has_no_contours() -> None:
    assert contours(tight(np.zeros((5, 5), dtype=bool), "x", 1)) == []


def test_a_large_smooth_object_needs_few_points() -> None:
    (part,) = contours(tight(ring(1001, 480, 200), "x", 1))
    assert len(part.points) < 80


@settings(deadline=None, max_examples=100)
@given(bitmaps())
def test_many_holes_are_given_to_their_parts_as_few_are(bitmap: BoolArray) -> None:
    mask = tight(bitmap, "", 1.0)
    few = contours(mask, tolerance_px=0, min_area_px=0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(contours_module, "MANY_HOLES", 0)
        many = contours(mask, tolerance_px=0, min_area_px=0)
    assert sorted((part.area, str(part.box), len(part.holes)) for part in many) == sorted(
        (part.area, str(part.box), len(part.holes)) for part in few
    )
    size = Size(bitmap.shape[1], bitmap.shape[0])
    assert np.array_equal(rasterize(many, size), rasterize(few, size))
