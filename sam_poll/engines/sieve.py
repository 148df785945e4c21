"""Which of the many masks of a grid of points are worth keeping: decided on the device, where they are.

What can still go wrong here: areas are measured on a few lines of each row of the plane, which differs from counting
the enlarged mask's pixels, by some hundredths for an object of a few hundred. Whoever is that close to the threshold is
counted, but in pictures of more than `COUNTED` pixels, where it is a thousandth or two: there a candidate may be kept
that the libraries drop, or the other way round.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sam_poll.types import Frame

OFFSET = 1.0  # stability_score_offset of the libraries' automatic mask generators
LINES = 512  # a plane is read on so many lines. Planes of 64: with 64 a score strays by 0.01, with 512 by 0.001
AT_ONCE = 1 << 20  # numbers worked on at a time: 4 MiB of float32, some eight times over, within `estimate.MARGIN_MIB`
COUNTED = 4 * AT_ONCE  # the largest picture whose pixels are counted, one mask at a time: 20 MiB
# How far a score measured between pixels may be from one counted in them: at least, and for an area of one pixel. It
# falls with the area to the power of 3/4, as the pixels on an outline, each of them off by chance, do beside the area.
DOUBT, DOUBT_PX = 0.003, 8.0


def sieved(logits: Tensor, scores: Tensor, frame: Frame, iou: float, stability: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of n×h×w logits and n predicted IoUs those that reach `iou` and `stability`, in order: m×h×w and m float32, and
    their stability scores, m float32. A threshold of 0 lets all pass."""
    scores = scores.float()
    if iou > 0:
        good = (scores >= iou).nonzero()[:, 0]
        logits, scores = logits[good], scores[good]
    logits = logits.float()
    inner, outer = _areas(logits, frame)
    steady = _ratio(inner, outer)
    if stability > 0:
        if frame.size.width * frame.size.height <= COUNTED:
            close = ((steady - stability).abs() <= _doubt(outer, logits, frame)).nonzero()[:, 0]
            steady[close] = _counted(logits, close, frame)
        good = (steady >= stability).nonzero()[:, 0]
        logits, scores, steady = logits[good], scores[good], steady[good]
    return logits, scores, steady


def stability_of(logits: Tensor, frame: Frame) -> Tensor:
    """The stability score of each of n×h×w logits, n float32: the area where the enlarged logits are above `OFFSET`
    by that where they are above -`OFFSET`. 0 where both are empty."""
    return _ratio(*_areas(logits, frame))


def _ratio(inner: Tensor, outer: Tensor) -> Tensor:
    return inner / outer.clamp_min(1e-6)


def _areas(logits: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
    """How much of each plane lies above `OFFSET`, and above -`OFFSET`: n float32 each, in pixels of the plane's
    enlargement to `LINES`."""
    height, width = logits.shape[-2:]
    times = _times(height)
    rows = frame.region.height * height * times / frame.side
    columns = frame.region.width * width / frame.side
    some = max(1, AT_ONCE // (height * width * times))
    areas = [
        torch.stack([_area(lines, above, rows, columns) for above in (OFFSET, -OFFSET)])
        for lines in (_lines(planes, times) for planes in logits.split(some))
    ]
    inner, outer = torch.cat(areas, dim=1) if areas else logits.new_zeros(2, 0)
    return inner, outer


def _times(height: int) -> int:
    return max(1, -(-LINES // height))


def _doubt(areas: Tensor, logits: Tensor, frame: Frame) -> Tensor:
    """How far from the counted score that of each of `_areas` may be."""
    height, width = logits.shape[-2:]
    rows, columns = frame.region.height * height * _times(height), frame.region.width * width
    pixels = areas * (frame.size.height * frame.size.width * frame.side**2 / (rows * columns))
    return (DOUBT_PX * pixels.clamp_min(1).pow(-0.75)).clamp_min(DOUBT)


def _counted(logits: Tensor, which: Tensor, frame: Frame) -> Tensor:
    """The stability scores of some of n×h×w logits, counted in the pixels of the enlarged mask, as the libraries do."""
    size, side = (frame.size.height, frame.size.width), (frame.side, frame.side)
    some = max(1, AT_ONCE // max(size[0] * size[1], frame.two_step * frame.side**2))
    scores = []
    for planes in (logits[part, None] for part in which.split(some)):
        if frame.two_step:
            planes = F.interpolate(planes, side, mode="bilinear", align_corners=False)
            planes = planes[..., : frame.region.height, : frame.region.width]
        planes = F.interpolate(planes, size, mode="bilinear", align_corners=False)
        inner, outer = ((planes > above).sum((1, 2, 3)).float() for above in (OFFSET, -OFFSET))
        scores.append(_ratio(inner, outer))
    return torch.cat(scores) if scores else logits.new_zeros(0)


def _lines(planes: Tensor, times: int) -> Tensor:
    """Each plane with `times` as many rows, as the mask's own enlargement would give them."""
    if times == 1:
        return planes
    size = (planes.shape[-2] * times, planes.shape[-1])
    return F.interpolate(planes[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def _area(lines: Tensor, above: float, rows: float, columns: float) -> Tensor:
    """How much of each plane lies above a value, in its own pixels: exact along a row, whose values run straight from
    one pixel's centre to the next. Only the first `rows` and `columns` count, which may end within a pixel."""
    height, width = lines.shape[-2:]
    near, far = lines[..., :-1], lines[..., 1:]
    high, low = torch.maximum(near, far), torch.minimum(near, far)
    part = ((high - above) / (high - low).clamp_min(1e-6)).clamp_(0, 1)
    ends = (torch.arange(width, device=lines.device) + 0.5).clamp_(max=columns)
    outer = max(0.0, columns - (width - 0.5))
    total = part @ (ends[1:] - ends[:-1])
    total += 0.5 * (lines[..., 0] > above) + outer * (lines[..., -1] > above)
    return total @ (rows - torch.arange(height, device=lines.device)).clamp_(0, 1)
