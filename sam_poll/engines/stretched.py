"""The base of engines that stretch a picture to the network's square: SAM2 and its kin.

It also normalises the colours as they do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sam_poll.core.types import InputTransform, ModelInput, Size
from sam_poll.engines.base import TorchEngine

# Mean and standard deviation of ImageNet's colours (RGB, 0 to 1), from sam2.utils.transforms.
MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)


class StretchingEngine(TorchEngine):
    """An engine whose input is the whole picture, both sides scaled to the network's."""

    def frame_for(self, size: Size, side: int) -> InputTransform:
        """Stretch the whole picture to the square, as SAM2Transforms does."""
        return InputTransform(size=size, side=side, region=Size(side, side), two_step=False)

    def _set_side(self, side: int) -> None:
        mean = torch.tensor(MEAN, device=self.device) * 255
        deviation = torch.tensor(DEVIATION, device=self.device) * 255
        self._mean = mean.view(1, 3, 1, 1)
        self._deviation = deviation.view(1, 3, 1, 1)

    def _square(self, pictures: Sequence[ModelInput]) -> Tensor:
        pixels = self._upload(np.stack([picture.pixels for picture in pictures]))  # n×side×side×3
        return (pixels.permute(0, 3, 1, 2).float() - self._mean) / self._deviation
