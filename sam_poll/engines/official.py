"""The two projects' own predictors on a checkpoint of ours, to compare with: `SamPredictor`, `SAM2ImagePredictor`.

What can still go wrong here: they enlarge float32 masks to the picture on the device, so that a picture or a card that
is fine for us may be too much for them.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sam_poll.engines import checkpoint
from sam_poll.types import Pixels, Prompt


class Official:
    """The official predictor of a checkpoint, in the precision of its own README (SAM2 on a card: bfloat16)."""

    def __init__(self, path: Path, config: str | None, device: str) -> None:
        """ModelError, as `engines.load`."""
        weights = checkpoint.read(path)
        self.family = checkpoint.family_of(weights, str(path))
        self._device = torch.device(device)
        self.predictor = (_sam1 if self.family == "sam1" else _sam2)(weights, str(path), config, self._device)
        """The library's own object."""

    @property
    def precision(self) -> str:
        """A torch dtype's name."""
        return "bfloat16" if self.family == "sam2" and self._device.type == "cuda" else "float32"

    @torch.inference_mode()
    def __call__(self, pixels: Pixels, prompt: Prompt) -> tuple[npt.NDArray[np.bool_], float]:
        """The best mask of upright RGB (uint8, H×W×3) by predicted IoU: bool H×W, and that IoU."""
        with self.autocast():
            self.predictor.set_image(pixels)
            masks, scores, _ = self.predictor.predict(**arguments(prompt))
        best = int(np.argmax(scores))
        return masks[best] > 0, float(scores[best])

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The precision, as long as this is entered."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=getattr(torch, self.precision))


def arguments(prompt: Prompt) -> dict[str, Any]:
    """A prompt as both predictors take it."""
    points, box = prompt.points, prompt.box
    return {
        "point_coords": np.array([(point.x, point.y) for point in points]) if points else None,
        "point_labels": np.array([point.label for point in points]) if points else None,
        "box": np.array([box.x0, box.y0, box.x1, box.y1]) if box else None,
        "multimask_output": prompt.ambiguous,
    }


def _sam2(weights: dict[str, Any], place: str, config: str | None, device: torch.device) -> Any:
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    from sam_poll.engines import sam2

    path = sam2.find_config(config or checkpoint.sam2_config_of(weights, place))
    model = sam2.build(sam2.read_config(path), str(path))
    checkpoint.fill(model, weights, place=place, config=str(path))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script, which it uses
        predictor = SAM2ImagePredictor(model.to(device).eval())
    side = model.image_size  # the predictor knows the sizes of 1024 only
    predictor._bb_feat_sizes = [(side // 4, side // 4), (side // 8, side // 8), (side // 16, side // 16)]
    return predictor


def _sam1(weights: dict[str, Any], place: str, config: str | None, device: torch.device) -> Any:
    from segment_anything import SamPredictor

    from sam_poll.engines import sam1

    model = sam1.build(sam1.architecture(weights))
    checkpoint.fill(model, weights, place=place, config="read from its weights")
    return SamPredictor(model.to(device).eval())
