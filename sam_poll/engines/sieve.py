"""Which of the many masks of a grid of points are worth keeping: decided on the device, where they are.

What can still go wrong here: areas are counted on a few lines of each row of the plane; where an object is a few pixels
of the decoder's low resolution, its stability differs from the full-size one by some hundredths.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sam_poll.types import Frame

OFFSET = 1.0  # stability_score_offset of the libraries' automatic mask generators
LINES = 512  # a plane is read on so many lines. Planes of 64: with 64 a score strays by 0.01, with 512 by 0.001
AT_ONCE = 1 << 20  # numbers worked on at a time: 4 MiB of float32, some eight times over, within `estimate.MARGIN_MIB`


def sieved(logits: Tensor, scores: Tensor, frame: Frame, iou: float, stability: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of n×h×w logits and n predicted IoUs those that reach `iou` and `stability`, in order: m×h×w and m float32, and
    their stability scores, m float32. A threshold of 0 lets all pass."""
    scores = scores.float()
    if iou > 0:
        good = (scores >= iou).nonzero()[:, 0]
        logits, scores = logits[good], scores[good]
    logits = logits.float()
    steady = stability_of(logits, frame)
    if stability > 0:
        good = (steady >= stability).nonzero()[:, 0]
        logits, scores, steady = logits[good], scores[good], steady[good]
    return logits, scores, steady


def stability_of(logits: Tensor, frame: Frame) -> Tensor:
    """The stability score of each of n×h×w logits, n float32: the area where the enlarged logits are above `OFFSET`
    by that where they are above -`OFFSET`. 0 where both are empty."""
    height, width = logits.shape[-2:]
    times = max(1, -(-LINES // height))
    rows = frame.region.height * height * times / frame.side
    columns = frame.region.width * width / frame.side
    some = max(1, AT_ONCE // (height * width * times))
    scores = [
        _area(lines, OFFSET, rows, columns) / _area(lines, -OFFSET, rows, columns).clamp_min(1e-6)
        for lines in (_lines(planes, times) for planes in logits.split(some))
    ]
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
