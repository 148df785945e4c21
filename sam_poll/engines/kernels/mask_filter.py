"""Selection of the masks of a grid of points by predicted IoU and stability, on the device.

Limitations: areas are measured on a few lines of each row of the logits, which differs from
counting the pixels of the enlarged mask, by some hundredths for an object of a few hundred pixels.
Masks whose score is that close to the threshold are counted exactly, except in pictures of more
than `COUNTED` pixels, where the difference is one or two thousandths. There a mask may be kept that
the libraries drop, or the other way round.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sam_poll.core.types import InputTransform

OFFSET = 1.0  # `stability_score_offset` of the libraries' automatic mask generators
# Lines on which the area of a mask's logits is measured. For logits of 64×64 (measured): with 64
# lines a score is off by up to 0.01, with 512 by 0.001.
LINES = 512
# Numbers processed at a time: 4 MiB of float32, in about eight copies, which
# `estimate.MARGIN_MIB` covers.
AT_ONCE = 1 << 20
COUNTED = 4 * AT_ONCE  # pixels of the largest picture whose masks are counted: 20 MiB for each mask
# Largest deviation of a measured stability score from a counted one: the minimum, and the value for
# an area of one pixel. The deviation falls with the area to the power of 3/4: the pixels on the
# outline, whose number grows with the square root of the area, are each off by chance, so that
# their sum grows with the fourth root, and the sum is divided by the area.
DOUBT = 0.003
DOUBT_PX = 8.0


class SelectedMasks(NamedTuple):
    """Masks that have passed `filter_masks`."""

    logits: Tensor
    scores: Tensor
    stabilities: Tensor


def filter_masks(
    logits: Tensor, scores: Tensor, frame: InputTransform, iou: float, stability: float
) -> SelectedMasks:
    """Return the masks whose predicted IoU reaches `iou` and whose stability reaches `stability`.

    `logits` is n×h×w, `scores` the n predicted IoUs. Returns the m masks that pass, in order: their
    logits (m×h×w), predicted IoUs (m) and stability scores (m), all float32. A threshold of 0 lets
    all pass.

    A stability score is the area where the enlarged logits are above `OFFSET`, divided by the area
    where they are above -`OFFSET`; 0 where both are empty (segment_anything's
    `calculate_stability_score`).
    """
    scores = scores.float()
    if iou > 0:
        passing = (scores >= iou).nonzero()[:, 0]
        logits, scores = logits[passing], scores[passing]
    logits = logits.float()
    inner, outer = _areas(logits, frame)
    stabilities = _ratio(inner, outer)
    if stability > 0:
        if frame.size.width * frame.size.height <= COUNTED:
            distance = (stabilities - stability).abs()
            close = (distance <= _max_deviation(outer, logits, frame)).nonzero()[:, 0]
            stabilities[close] = _counted(logits, close, frame)
        passing = (stabilities >= stability).nonzero()[:, 0]
        logits, scores = logits[passing], scores[passing]
        stabilities = stabilities[passing]
    return SelectedMasks(logits, scores, stabilities)


def _ratio(inner: Tensor, outer: Tensor) -> Tensor:
    return inner / outer.clamp_min(1e-6)


def _areas(logits: Tensor, frame: InputTransform) -> tuple[Tensor, Tensor]:
    """Return the area of each mask above `OFFSET`, and above -`OFFSET`: n float32 each.

    The unit is a pixel of the logits with their rows repeated up to `LINES` lines.
    """
    height, width = logits.shape[-2:]
    times = _lines_per_row(height)
    rows = frame.region.height * height * times / frame.side
    columns = frame.region.width * width / frame.side
    masks_at_once = max(1, AT_ONCE // (height * width * times))
    areas = [
        torch.stack([_area(lines, above, rows, columns) for above in (OFFSET, -OFFSET)])
        for lines in (_lines(planes, times) for planes in logits.split(masks_at_once))
    ]
    inner, outer = torch.cat(areas, dim=1) if areas else logits.new_zeros(2, 0)
    return inner, outer


def _lines_per_row(height: int) -> int:
    return max(1, -(-LINES // height))  # rounded up


def _max_deviation(areas: Tensor, logits: Tensor, frame: InputTransform) -> Tensor:
    """Return how far the score of each of `areas` may be from the counted score."""
    height, width = logits.shape[-2:]
    rows = frame.region.height * height * _lines_per_row(height)
    columns = frame.region.width * width
    pixels = areas * (frame.size.height * frame.size.width * frame.side**2 / (rows * columns))
    return (DOUBT_PX * pixels.clamp_min(1).pow(-0.75)).clamp_min(DOUBT)


def _counted(logits: Tensor, which: Tensor, frame: InputTransform) -> Tensor:
    """Return the stability scores of the masks with the indices `which`.

    They are counted in the pixels of the enlarged mask, as the libraries do.
    """
    size = (frame.size.height, frame.size.width)
    side = (frame.side, frame.side)
    masks_at_once = max(1, AT_ONCE // max(size[0] * size[1], frame.two_step * frame.side**2))
    scores = []
    for planes in (logits[part, None] for part in which.split(masks_at_once)):
        if frame.two_step:
            planes = F.interpolate(planes, side, mode="bilinear", align_corners=False)
            planes = planes[..., : frame.region.height, : frame.region.width]
        planes = F.interpolate(planes, size, mode="bilinear", align_corners=False)
        inner, outer = ((planes > above).sum((1, 2, 3)).float() for above in (OFFSET, -OFFSET))
        scores.append(_ratio(inner, outer))
    return torch.cat(scores) if scores else logits.new_zeros(0)


def _lines(planes: Tensor, times: int) -> Tensor:
    """Return the logits with `times` as many rows, interpolated as the enlargement of a mask is."""
    if times == 1:
        return planes
    size = (planes.shape[-2] * times, planes.shape[-1])
    return F.interpolate(planes[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def _area(lines: Tensor, above: float, rows: float, columns: float) -> Tensor:
    """Return the area of each plane above a value, in pixels of the plane.

    The area is exact along a row, where values are linear between the centres of two pixels. Only
    the first `rows` and `columns` count, which may end within a pixel.
    """
    height, width = lines.shape[-2:]
    near, far = lines[..., :-1], lines[..., 1:]
    high, low = torch.maximum(near, far), torch.minimum(near, far)
    part = ((high - above) / (high - low).clamp_min(1e-6)).clamp_(0, 1)
    ends = (torch.arange(width, device=lines.device) + 0.5).clamp_(max=columns)
    outer = max(0.0, columns - (width - 0.5))
    total = part @ (ends[1:] - ends[:-1])
    total += 0.5 * (lines[..., 0] > above) + outer * (lines[..., -1] > above)
    return total @ (rows - torch.arange(height, device=lines.device)).clamp_(0, 1)
