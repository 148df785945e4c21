"""Drawn mosaics with known truth: large pictures of shapes on flat ground, many of which cross the
seams of tiles.

Shapes stand one in each cell of a grid whose pitch divides no tile, shifted within it, so none
covers another. The same seed and arguments give the same mosaic. `compare` measures labels against
the truth, or against other labels.

Limitations: a whole mosaic is drawn in memory, six bytes a pixel.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin

PITCH = 620  # pixels from shape to shape
RADIUS = (
    190.0,
    270.0,
)  # about what the bundled model was trained on, when it sees windows of 768 to 1280 pixels
HOLE = 0.45  # a ring's hole, in parts of its radius
CRS, METRE = "EPSG:32633", 0.1  # UTM, 10 cm a pixel
KINDS = (
    "ellipse",
    "rectangle",
)  # of which the benchmark's mosaic is made; `ring` as well, if asked for


@dataclass(frozen=True, slots=True, eq=False)
class Mosaic:
    """`pixels` uint8 H×W×3; `truth` uint16 H×W, 0 is ground."""

    pixels: npt.NDArray[np.uint8]
    truth: npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Match:
    """What became of one shape: the IoU with the label that fits it best, which that is (0: none),
    and how many labels have at least a twentieth of it."""

    iou: float
    label: int
    labels: int


def draw(
    seed: int, side: int, kinds: tuple[str, ...] = KINDS, radius: tuple[float, float] = RADIUS
) -> Mosaic:
    """A square mosaic of `side` pixels; shapes stay inside it. `radius`: how far they reach, at
    least and at most.
    """
    rng = np.random.default_rng(seed)
    ground = rng.integers(60, 196, 3)
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[:] = ground
    truth = np.zeros((side, side), np.uint16)
    number = 0
    for row in range(side // PITCH):
        for column in range(side // PITCH):
            reach = rng.uniform(*radius)
            slack = PITCH / 2 - reach
            centre = (np.array([column, row]) + 0.5) * PITCH + rng.uniform(-slack, slack, 2)
            kind = str(rng.choice(kinds))
            outline = _outline(kind, rng, reach)
            holes = [HOLE * outline] if kind == "ring" else []
            contours = [np.rint(line + centre).astype(np.int32) for line in (outline, *holes)]
            colour = _colour(rng, ground)
            number += 1
            cv2.fillPoly(pixels, contours, colour.tolist(), lineType=cv2.LINE_AA)
            cv2.fillPoly(truth, contours, number)
    for start in range(0, side, 512):  # in strips: noise as float32 would take more than the mosaic
        strip = pixels[start : start + 512]
        strip[:] = np.clip(
            strip + rng.normal(0, 3, strip.shape[:2]).astype(np.float32)[..., None], 0, 255
        )
    return Mosaic(pixels, truth)


def _outline(kind: str, rng: np.random.Generator, reach: float) -> npt.NDArray[np.float64]:
    turn = rng.uniform(0, np.pi)
    around = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    ratio = rng.uniform(0.6, 1)
    if kind in ("ellipse", "ring"):
        angles = np.linspace(0, 2 * np.pi, 256, endpoint=False)
        points = reach * np.stack([np.cos(angles), ratio * np.sin(angles)], 1)
    else:
        points = (
            reach
            / np.hypot(1, ratio)
            * np.array([[-1, -ratio], [1, -ratio], [1, ratio], [-1, ratio]])
        )
    return np.asarray(points @ around)


def _colour(rng: np.random.Generator, ground: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Unlike the ground's: at least 90 away in one channel."""
    while True:
        colour = rng.integers(10, 246, 3)
        if np.abs(colour - ground).max() >= 90:
            return colour


def write(
    path: Path, pixels: npt.NDArray[np.uint8], *, georeferenced: bool = True, **more: object
) -> None:
    """RGB as a tiled GeoTIFF, in UTM at 10 cm a pixel."""
    placed = (
        {"crs": CRS, "transform": from_origin(400_000, 5_000_000, METRE, METRE)}
        if georeferenced
        else {}
    )
    height, width = pixels.shape[:2]
    profile = {
        "driver": "GTiff",
        "dtype": "uint8",
        "count": 3,
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", width=width, height=height, **profile, **placed, **more
        ) as file:
            file.write(np.moveaxis(pixels, 2, 0))


def read(path: Path) -> npt.NDArray[np.uint32]:
    """The labels of a mosaic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as file:
            return np.asarray(file.read(1))


def compare(
    shapes: npt.NDArray[np.unsignedinteger], labels: npt.NDArray[np.unsignedinteger]
) -> dict[int, Match]:
    """Each shape of the one map (0 is none) with what the other makes of it."""
    keys, counts = np.unique(
        (shapes.astype(np.uint64) << np.uint64(32)) | labels, return_counts=True
    )
    both = {(int(k) >> 32, int(k) & 0xFFFFFFFF): int(n) for k, n in zip(keys, counts, strict=True)}
    of_shape: dict[int, int] = {}
    of_label: dict[int, int] = {}
    for (shape, label), count in both.items():
        of_shape[shape] = of_shape.get(shape, 0) + count
        of_label[label] = of_label.get(label, 0) + count
    found = {shape: Match(0.0, 0, 0) for shape in of_shape if shape}
    for (shape, label), count in both.items():
        if shape and label:
            known = found[shape]
            iou = count / (of_shape[shape] + of_label[label] - count)
            best = (iou, label) if iou > known.iou else (known.iou, known.label)
            found[shape] = Match(*best, known.labels + (count >= of_shape[shape] / 20))
    return found


def crossing(truth: npt.NDArray[np.unsignedinteger], tile: int) -> set[int]:
    """The shapes that lie in more than one tile."""
    height, width = truth.shape
    found: set[int] = set()
    for seam in range(tile, width, tile):
        found |= set(np.unique(truth[:, seam - 1][truth[:, seam - 1] == truth[:, seam]]).tolist())
    for seam in range(tile, height, tile):
        found |= set(np.unique(truth[seam - 1][truth[seam - 1] == truth[seam]]).tolist())
    return found - {0}
