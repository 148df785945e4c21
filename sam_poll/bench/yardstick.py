"""The yardstick: what a script does that calls the official predictor picture by picture, as their examples show it.

Open the picture with Pillow, `set_image`, `predict` for each box, the first of its three masks, contours with
scikit-image, a PNG and a JSON. On a GPU in the precision of the two projects' own READMEs (SAM2 in bfloat16). Nothing
of ours is in it but the loading of the weights.

What can still go wrong here: it does not check, flush or clean up anything, which makes it a little faster.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from skimage import measure

from sam_poll.engines.official import Official

Rgb = npt.NDArray[np.uint8]


class Loop:
    """The loop with a loaded predictor."""

    def __init__(self, path: Path, config: str | None, device: str) -> None:
        self._official = Official(path, config, device)

    def __call__(self, picture: Path, prompt: Path, out: Path) -> None:
        """Answers one pair into the folder `out`."""
        boxes = [np.array(list(o["box"].values())) for o in json.loads(prompt.read_bytes())["objects"]]
        with torch.inference_mode(), self._official.autocast():
            rgb = read(picture)
            self._official.predictor.set_image(rgb)
            labels = np.zeros(rgb.shape[:2], np.uint8)
            objects: list[dict[str, Any]] = []
            for number, box in enumerate(boxes, 1):
                masks, scores, _ = self._official.predictor.predict(box=box)
                mask = masks[0] > 0
                labels[mask] = 255 if len(boxes) == 1 else number
                objects += [{"score": float(scores[0]), "polygon": line} for line in lines_around(mask)]
        write_png(labels, out / f"{picture.stem}.png")
        write_json(objects, out / f"{picture.stem}.json")


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
