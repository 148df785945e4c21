"""Rough shapes become the mask input that the official predictors take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from sam_poll.core.types import Box, InputTransform, Mask, Polygon, RunLengths, Size
from sam_poll.imaging.masks import column_runs
from sam_poll.imaging.rough_shapes import INSIDE, mask_input
from sam_poll.prompts import run_lengths

SIZES = [(641, 427), (427, 641), (1500, 1001), (33, 21)]
OUTLINE = ((0.2, 0.1), (0.85, 0.25), (0.6, 0.5), (0.7, 0.9), (0.15, 0.75))


def stretched(size: tuple[int, int], side: int = 256) -> InputTransform:
    return InputTransform(Size(*size), side, Size(side, side), two_step=False)


def padded(size: tuple[int, int], side: int = 256) -> InputTransform:
    scale = side / max(size)
    width, height = (max(1, int(length * scale + 0.5)) for length in size)
    return InputTransform(Size(*size), side, Size(width, height), two_step=True)


def polygon(size: tuple[int, int]) -> Polygon:
    return Polygon(tuple((x * size[0], y * size[1]) for x, y in OUTLINE))


def bitmap(shape: Polygon, size: tuple[int, int]) -> np.ndarray:
    """The pixels whose centre is inside, by the even-odd rule."""
    width, height = size
    x, y = np.arange(width) + 0.5, (np.arange(height) + 0.5)[:, None]
    inside = np.zeros((height, width), dtype=bool)
    for (ax, ay), (bx, by) in zip(shape.points, shape.points[1:] + shape.points[:1], strict=True):
        if ay != by:
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return inside


def runs_of(pixels: np.ndarray) -> RunLengths:
    height, width = pixels.shape
    size = Size(width, height)
    return RunLengths(size, tuple(column_runs(Mask("x", 1.0, 0, 0, pixels), size)))


def official(pixels: np.ndarray, frame: InputTransform, side: int) -> np.ndarray:
    """Resize and pad as the networks do, then 20 × mask - 10, then to a quarter (SAM2Base)."""
    mask = torch.from_numpy(pixels).float()[None, None]
    region = (frame.region.height, frame.region.width)
    mask = interpolate(mask, size=region, mode="bilinear", antialias=True)
    square = torch.zeros(1, 1, frame.side, frame.side)
    square[..., : region[0], : region[1]] = (mask >= 0.5).float()
    logits = interpolate(square * 20 - 10, size=(side, side), mode="bilinear", antialias=True)
    return logits[0, 0].numpy()


@pytest.mark.parametrize("frame_of", [stretched, padded])
@pytest.mark.parametrize("size", SIZES)
def test_shapes_become_the_logits_that_sam2_makes_of_masks(
    frame_of: type, size: tuple[int, int]
) -> None:
    frame, shape = frame_of(size), polygon(size)
    pixels = bitmap(shape, size)
    expected = official(pixels, frame, 64)
    for one in (shape, runs_of(pixels)):
        logits = mask_input(one, frame, 64)
        assert logits.shape == (64, 64)
        assert logits.dtype == np.float32
        assert (logits.min(), logits.max()) == (-INSIDE, INSIDE)
        # Another filter differs along the outline only; a picture of 33 pixels has few of them.
        close = 1.0 if min(size) > 100 else 2.0
        assert np.abs(logits - expected).mean() < close
        assert ((logits > 0) != (expected > 0)).mean() < 0.04


def test_padding_is_outside() -> None:
    frame = padded((640, 320))
    logits = mask_input(Polygon(((0, 0), (640, 0), (640, 320), (0, 320))), frame, 64)
    assert (logits[:32] == INSIDE).all()
    assert (logits[33:] == -INSIDE).all()


def test_polygons_beyond_the_picture_end_at_its_edge() -> None:
    frame = padded((640, 320))
    logits = mask_input(Polygon(((-60, -30), (700, -30), (700, 350), (-60, 350))), frame, 64)
    assert (logits[33:] == -INSIDE).all()


def test_a_mask_input_of_another_share_of_the_side_fits() -> None:
    """SAM 3 has 1008 pixels, and a mask input of 288."""
    frame = stretched((640, 480), 1008)
    logits = mask_input(polygon((640, 480)), frame, 288)
    expected = official(bitmap(polygon((640, 480)), (640, 480)), frame, 288)
    assert ((logits > 0) != (expected > 0)).mean() < 0.02


@pytest.mark.parametrize("at", [(0, 0), (2311, 1703), (3999, 2999)])
def test_a_shape_smaller_than_any_cell_is_inside_somewhere(at: tuple[int, int]) -> None:
    x, y = at
    pixels = np.zeros((3000, 4000), dtype=bool)
    pixels[y, x] = True
    for shape in (runs_of(pixels), Polygon(((x, y), (x + 1, y), (x + 1, y + 1)))):
        logits = mask_input(shape, stretched((4000, 3000)), 64)
        row, column = np.unravel_index(logits.argmax(), logits.shape)
        assert logits.max() == INSIDE
        assert (column, row) == pytest.approx((x * 64 // 4000, y * 64 // 3000), abs=1)


def test_run_lengths_of_a_huge_picture_take_little_memory() -> None:
    import tracemalloc

    size = Size(100_000, 100_000)
    mask = RunLengths(size, (10**9, 9 * 10**9))
    tracemalloc.start()
    logits = mask_input(mask, stretched(size), 64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (logits[:, 7:] == INSIDE).all()
    assert peak < 16 << 20
    assert run_lengths.bounds(mask) == Box(10_000, 0, 100_000, 100_000)
