"""The yardstick: what a script does that calls the official predictor picture by picture, as their examples show it.

Open the picture with Pillow, `set_image`, `predict` for each box, the first of its three masks, contours with
scikit-image, a PNG and a JSON. On a GPU in the precision of the two projects' own READMEs (SAM2 in bfloat16). Nothing
of ours is in it but the loading of the weights.

What can still go wrong here: it does not check, flush or clean up anything, which makes it a little faster.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from skimage import measure

from sam_poll.engines import checkpoint

Rgb = npt.NDArray[np.uint8]


class Loop:
    """The loop with a loaded predictor."""

    def __init__(self, path: Path, config: str | None, device: str) -> None:
        weights = checkpoint.read(path)
        self._family = checkpoint.family_of(weights, str(path))
        self._device = torch.device(device)
        self._predictor = (_sam1 if self._family == "sam1" else _sam2)(weights, str(path), config, self._device)

    def __call__(self, picture: Path, prompt: Path, out: Path) -> None:
        """Answers one pair into the folder `out`."""
        boxes = [np.array(list(o["box"].values())) for o in json.loads(prompt.read_bytes())["objects"]]
        with torch.inference_mode(), self._autocast():
            rgb = read(picture)
            self._predictor.set_image(rgb)
            labels = np.zeros(rgb.shape[:2], np.uint8)
            objects: list[dict[str, Any]] = []
            for number, box in enumerate(boxes, 1):
                masks, scores, _ = self._predictor.predict(box=box)
                mask = masks[0] > 0
                labels[mask] = 255 if len(boxes) == 1 else number
                objects += [{"score": float(scores[0]), "polygon": line} for line in lines_around(mask)]
        write_png(labels, out / f"{picture.stem}.png")
        write_json(objects, out / f"{picture.stem}.json")

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._family == "sam2" and self._device.type == "cuda":
            return torch.autocast("cuda", dtype=torch.bfloat16)
        return contextlib.nullcontext()


def read(picture: Path) -> Rgb:
    """H×W×3 uint8."""
    return np.array(Image.open(picture).convert("RGB"))


def lines_around(mask: npt.NDArray[np.bool_]) -> list[list[list[float]]]:
    """All contours, holes too, every point of them (x, y)."""
    return [line[:, ::-1].tolist() for line in measure.find_contours(mask.astype(float), 0.5)]


def write_png(labels: Rgb, path: Path) -> None:
    """An 8-bit PNG."""
    Image.fromarray(labels).save(path)


def write_json(objects: Sequence[dict[str, Any]], path: Path) -> None:
    """The objects as they are."""
    path.write_text(json.dumps({"objects": objects}))


def _sam2(weights: dict[str, Any], place: str, config: str | None, device: torch.device) -> Any:
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    from sam_poll.engines import sam2

    path = sam2.find_config(config or checkpoint.sam2_config_of(weights, place))
    model = sam2.build(sam2.read_config(path), str(path))
    checkpoint.fill(model, weights, place=place, config=str(path))
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
