"""Pictures of drawn regions, and a simulated network that labels them without errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pyogrio
from typer.testing import CliRunner

from sam_poll.cli.main import app
from sam_poll.core.types import AutomaticMaskRequest, Size
from sam_poll.mosaic import run
from sam_poll.mosaic.run import MosaicOptions
from sam_poll.mosaic.segment_tile import Labelled, Passes

ASKED = AutomaticMaskRequest(points_per_side=4, min_area=20, iou=0.5, stability=0.5)


OPTIONS = MosaicOptions(128, 32, Passes(ASKED), "fake")


def blobs(seed: int, size: Size, cells: float = 60) -> npt.NDArray[np.uint16]:
    """Return regions of all shapes, with holes and islands and the ground (0); each 4-connected."""
    rng = np.random.default_rng(seed)
    shape = max(2, int(size.height / cells) + 2), max(2, int(size.width / cells) + 2)
    field = cv2.resize(
        rng.normal(0, 1, shape).astype(np.float32), size, interpolation=cv2.INTER_CUBIC
    )
    high = cv2.connectedComponents((field > 0.3).astype(np.uint8), connectivity=4)[1]
    low = cv2.connectedComponents((field < -0.3).astype(np.uint8), connectivity=4)[1]
    return np.where(high > 0, high, np.where(low > 0, low + high.max(), 0)).astype(np.uint16)


def shown(truth: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """Return a picture with the labels in red and green and with varying blue."""
    blue = np.indices(truth.shape).sum(0) % 2 + 1
    return np.stack([truth & 255, truth >> 8, blue], 2).astype(np.uint8)


def sees(pixels: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_]) -> Labelled:
    """Return the labels of a network without errors: one per connected region of a window."""
    truth = pixels[..., 0].astype(np.int32) + 256 * pixels[..., 1].astype(np.int32)
    numbers, count = np.zeros(truth.shape, np.uint16), 0
    for label in np.unique(truth[truth > 0])[::-1]:
        pieces, parts = cv2.connectedComponents((truth == label).astype(np.uint8), connectivity=4)
        numbers[parts > 0] = parts[parts > 0] + count
        count += pieces - 1
    return Labelled(np.where(valid, numbers, 0).astype(np.uint16), np.full(count, 0.75, np.float32))


class Eyes:
    """A replacement of `label_window` that counts the windows."""

    def __init__(self) -> None:
        self.windows = 0

    def __call__(
        self, engine: Any, pixels: Any, valid: Any, options: Any, core: Any, on_step: Any
    ) -> Labelled:
        self.windows += 1
        return sees(pixels, valid)


def files(output: Path) -> dict[str, bytes]:
    """Return the contents of outputs; of a GeoPackage, which contains the time, only the rows."""
    found = {path.name: path.read_bytes() for path in output.iterdir()}
    _, _, geometry, fields = pyogrio.raw.read(output / run.GEOPACKAGE)
    found[run.GEOPACKAGE] = b"".join(geometry) + b"".join(
        repr(field.tolist()).encode() for field in fields
    )
    return found


def invoke(*words: str) -> Any:
    return CliRunner().invoke(app, ["mosaic", *words])
