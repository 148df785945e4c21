"""The official predictors, for comparisons.

They are `SamPredictor` of segment_anything and of segment_anything_hq, `SAM2ImagePredictor`, and
for EdgeTAM the model of transformers with its processor.

Limitations: they enlarge float32 masks to the picture's size on the device. A picture that the
engines of this project process may need too much memory here.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sam_poll.core.types import Prompt, RgbArray
from sam_poll.engines import checkpoint


class ReferencePredictor:
    """The official predictor of a checkpoint, in the precision that its README recommends.

    That is bfloat16 for SAM2 on a GPU, else float32. `predictor` is the library's own object.
    `hq_token_only` is an argument of the predictor of SAM-HQ.
    """

    def __init__(
        self, path: Path, config: str | None, device: str, *, hq_token_only: bool = False
    ) -> None:
        """Load the checkpoint. Raises ModelError, as `engines.load`."""
        self._device = torch.device(device)
        if path.is_dir():
            self.family = checkpoint.family_of_folder(path)
            predictor = Sam3Predictor if self.family == "sam3" else EdgeTamPredictor
            self.predictor: Any = predictor(path, self._device)
            self._options = {}
            return
        weights = checkpoint.read(path)
        self.family = checkpoint.family_of(weights, str(path))
        self._options = {"hq_token_only": hq_token_only} if self.family == "sam-hq" else {}
        if self.family == "sam1":
            self.predictor = _sam1(weights, str(path), self._device)
        elif self.family == "sam2":
            self.predictor = _sam2(weights, str(path), config, self._device)
        else:
            self.predictor = _sam_hq(weights, str(path), self._device)

    @property
    def precision(self) -> str:
        """Return the name of the torch dtype that the predictor runs in."""
        return "bfloat16" if self.family == "sam2" and self._device.type == "cuda" else "float32"

    def __call__(self, pixels: RgbArray, prompt: Prompt) -> tuple[npt.NDArray[np.bool_], float]:
        """Return the best mask by predicted IoU (bool, H×W) and that IoU.

        `pixels` is an upright RGB picture, uint8, H×W×3.
        """
        (mask,) = self.masks(pixels, [prompt])
        return mask

    @torch.inference_mode()
    def masks(
        self, pixels: RgbArray, prompts: Iterable[Prompt]
    ) -> list[tuple[npt.NDArray[np.bool_], float]]:
        """Return what a call returns for each of the prompts; the picture is encoded once."""
        found = []
        with self.autocast():
            self.predictor.set_image(pixels)
            for prompt in prompts:
                masks, scores, _ = self.predictor.predict(**arguments(prompt), **self._options)
                best = int(np.argmax(scores))
                found.append((masks[best] > 0, float(scores[best])))
        return found

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context that runs torch in `precision`."""
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=getattr(torch, self.precision))


def arguments(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as the keyword arguments of the predictors' `predict`."""
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
        warnings.simplefilter("ignore")  # the predictor uses the deprecated torch.jit.script
        predictor = SAM2ImagePredictor(model.to(device).eval())
    side = model.image_size
    # The predictor sets these sizes for an input of 1024 pixels, whatever the model's side.
    predictor._bb_feat_sizes = [
        (side // 4, side // 4),
        (side // 8, side // 8),
        (side // 16, side // 16),
    ]
    return predictor


def _sam1(weights: dict[str, Any], place: str, device: torch.device) -> Any:
    from segment_anything import SamPredictor

    from sam_poll.engines import sam1

    model = sam1.build(sam1.architecture(weights))
    checkpoint.fill(model, weights, place=place)
    return SamPredictor(model.to(device).eval())


def _sam_hq(weights: dict[str, Any], place: str, device: torch.device) -> Any:
    from sam_poll.engines import sam_hq

    model = sam_hq.build(sam_hq.architecture(weights))
    checkpoint.fill(model, weights, place=place)
    # TinyViT derives its attention biases from the weights in evaluation mode.
    return sam_hq.library.SamPredictor(model.to(device).train().eval())


class EdgeTamPredictor:
    """EdgeTAM as transformers documents it, with the methods of the other predictors."""

    def __init__(self, model: Path | Any, device: torch.device) -> None:
        """Load the folder `model`, or take an `EdgeTamModel`. Raises ModelError."""
        from transformers import Sam2ImageProcessor, Sam2Processor

        from sam_poll.engines import edgetam

        network = edgetam.read(model) if isinstance(model, Path) else model
        self._device = device
        self._model = network.to(device).eval()
        side = network.image_size
        self._processor = Sam2Processor(Sam2ImageProcessor(size={"height": side, "width": side}))
        self._size: list[Any] = []
        self._embeddings: Any = None

    def square(self, pixels: RgbArray) -> torch.Tensor:
        """Return the network's input for a picture: 1×3×side×side, float32."""
        inputs = self._processor(images=pixels, return_tensors="pt")
        return inputs["pixel_values"].to(self._device)

    def set_image(self, pixels: RgbArray) -> None:
        """Encode a picture, uint8, H×W×3."""
        self._size = [list(pixels.shape[:2])]
        self._embeddings = self._model.get_image_embeddings(self.square(pixels))

    @torch.inference_mode()
    def predict(
        self,
        point_coords: Any = None,
        point_labels: Any = None,
        box: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
    ) -> tuple[Any, Any, Any]:
        """Return masks (m×H×W), predicted IoUs (m), and logits at low resolution (m×h×w)."""
        inputs = self._processor(
            original_sizes=self._size,
            input_points=None if point_coords is None else [[point_coords.tolist()]],
            input_labels=None if point_labels is None else [[point_labels.tolist()]],
            input_boxes=None if box is None else [[box.tolist()]],
            return_tensors="pt",
        )
        given = {
            key: value.to(self._device) for key, value in inputs.items() if key.startswith("input_")
        }
        output = self._model(
            image_embeddings=self._embeddings,
            input_masks=None if mask_input is None else torch.from_numpy(mask_input)[None],
            multimask_output=multimask_output,
            **given,
        )
        masks = self._processor.post_process_masks(output.pred_masks, self._size)[0]
        tensors = (masks[0], output.iou_scores[0, 0], output.pred_masks[0, 0])
        return tuple(tensor.cpu().numpy() for tensor in tensors)  # type: ignore[return-value]


class Sam3Predictor(EdgeTamPredictor):
    """The tracker of SAM 3, for points and boxes, as transformers documents it."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Load the tracker in `folder`. Raises ModelError."""
        from transformers import Sam3ImageProcessor, Sam3TrackerProcessor

        from sam_poll.engines import sam3

        self._device = device
        self._model = sam3.read_tracker(folder).to(device).eval()
        side = self._model.config.prompt_encoder_config.image_size
        self._processor = Sam3TrackerProcessor(
            Sam3ImageProcessor(size={"height": side, "width": side})
        )
        self._size = []
        self._embeddings = None
