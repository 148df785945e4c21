"""The baseline: a script that calls the official predictor picture by picture.

It follows the projects' examples: open the picture with Pillow, `set_image`, `predict` for each
box, the first of its three masks, contours with scikit-image, a PNG and a JSON. On a GPU it uses
the precision of the two projects' READMEs (SAM 2 in bfloat16). Of our code it uses only the loading
of the weights.

Limitations: it does not check or clean up anything, and flushes its files only where that is
requested, which makes it a little faster.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from skimage import measure

from sam_poll.engines.reference import ReferencePredictor

Rgb = npt.NDArray[np.uint8]


class NaiveLoop:
    """The loop with a loaded predictor."""

    def __init__(self, path: Path, config: str | None, device: str) -> None:
        self._official = ReferencePredictor(path, config, device)

    def __call__(self, picture: Path, prompt: Path, out: Path, *, flush: bool = False) -> None:
        """Answers one pair into the folder `out`; with `flush`, the files are on the disk then."""
        boxes = [
            np.array(list(o["box"].values())) for o in json.loads(prompt.read_bytes())["objects"]
        ]
        with torch.inference_mode(), self._official.autocast():
            rgb = read(picture)
            self._official.predictor.set_image(rgb)
            labels = np.zeros(rgb.shape[:2], np.uint8)
            objects: list[dict[str, Any]] = []
            for number, box in enumerate(boxes, 1):
                masks, scores, _ = self._official.predictor.predict(box=box)
                mask = masks[0] > 0
                labels[mask] = 255 if len(boxes) == 1 else number
                objects += [
                    {"score": float(scores[0]), "polygon": line} for line in lines_around(mask)
                ]
        files = out / f"{picture.stem}.png", out / f"{picture.stem}.json"
        write_png(labels, files[0])
        write_json(objects, files[1])
        if flush:
            for file in files:
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())


def read(picture: Path) -> Rgb:
    """H×W×3 uint8."""
    return np.array(Image.open(picture).convert("RGB"))


def lines_around(mask: npt.NDArray[np.bool_]) -> list[list[list[float]]]:
    """All contours, holes too, every point of them (x, y)."""
    return [line[:, ::-1].tolist() for line in measure.find_contours(mask.astype(float), 0.5)]


def write_png(labels: Rgb, path: Path) -> None:
    """Write an 8-bit PNG."""
    Image.fromarray(labels).save(path)


def write_json(objects: Sequence[dict[str, Any]], path: Path) -> None:
    """Write the objects as JSON."""
    path.write_text(json.dumps({"objects": objects}))
