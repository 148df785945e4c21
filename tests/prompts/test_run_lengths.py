"""COCO's run lengths are read and written as pycocotools does."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sam_poll.core.types import Box, RunLengths, Size
from sam_poll.prompts import run_lengths


def masks() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    noise = [random.random(shape) < 0.3 for shape in ((7, 5), (40, 61), (1, 9), (9, 1))]
    blocks = np.zeros((300, 200), dtype=bool)
    blocks[20:280, 3:190] = True
    blocks[100:110] = False
    full = np.ones((6, 4), dtype=bool)
    return [*noise, blocks, full]


def counts_of(pixels: np.ndarray) -> list[int]:
    """Run lengths, counted one by one."""
    counts = []
    inside = False
    run = 0
    for pixel in pixels.T.ravel():
        if pixel != inside:
            counts.append(run)
            inside, run = bool(pixel), 0
        run += 1
    return [*counts, run]


@pytest.mark.parametrize("pixels", masks(), ids=lambda pixels: "x".join(map(str, pixels.shape)))
def test_text_bounds_and_runs_are_pycocotools(pixels: np.ndarray) -> None:
    height, width = pixels.shape
    packed = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    text = packed["counts"].decode()
    counts = run_lengths.counts_of(text)
    assert counts.tolist() == counts_of(pixels)
    mask = RunLengths(Size(width, height), tuple(counts.tolist()))
    assert run_lengths.text_of(mask) == text
    left, top, box_width, box_height = coco_mask.toBbox(packed)
    bounds = run_lengths.bounds(mask)
    assert bounds == Box(left, top, left + box_width, top + box_height)
    starts, ends = run_lengths.inside(mask)
    assert (ends - starts).sum() == pixels.sum()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("05~", "byte 3 "),
        ("05 ", "byte 3 "),
        ("ü", "byte 1 "),
        ("05P", "cut off"),
        ("ooooooooo0", "larger than any picture"),
    ],
)
def test_other_text_is_refused_with_its_place(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        run_lengths.counts_of(text)
