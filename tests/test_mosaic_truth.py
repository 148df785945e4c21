"""Mosaics of drawn shapes with the bundled model: shapes over seams are one, however the picture is cut.

The bundled model errs here and there; these are the rules on a mosaic that it sees well, so that what goes wrong is the
cutting's fault. How well it does on many shapes is measured by `benchmarks.mosaic`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from sam_poll.mosaic import run
from sam_poll.mosaic.passes import Passes
from sam_poll.mosaic.run import Wish, mosaic
from sam_poll.types import Everything
from tests.test_oom import demo
from tools import mosaics

SIDE, SEED = 1500, 3
TILES = (512, 1024, 2048)  # of the last there is one: no tiling
ASKED = Everything(points_per_side=8, min_area=100, iou=0.8, stability=0.7)

Made = dict[int, tuple[npt.NDArray[np.uint32], dict[str, int]]]


@pytest.fixture(scope="module")
def truth() -> mosaics.Mosaic:
    return mosaics.draw(SEED, SIDE, ("ellipse",))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, truth: mosaics.Mosaic) -> Made:
    folder = tmp_path_factory.mktemp("truth")
    mosaics.write(folder / "a.tif", truth.pixels)
    engine = demo()

    def by(tile: int) -> tuple[npt.NDArray[np.uint32], dict[str, int]]:
        out: Path = folder / str(tile)
        stats = mosaic(folder / "a.tif", out, Wish(tile, 128, Passes(ASKED), "demo"), lambda: engine)
        return mosaics.read(out / run.RASTER), stats

    return {tile: by(tile) for tile in TILES}


@pytest.mark.parametrize("tile", TILES)
def test_each_shape_is_one_label_also_over_seams(made: Made, truth: mosaics.Mosaic, tile: int) -> None:
    labels, stats = made[tile]
    found = mosaics.compare(truth.truth, labels)
    assert len(mosaics.crossing(truth.truth, tile)) >= {512: 4, 1024: 3, 2048: 0}[tile]
    assert all(match.labels == 1 for match in found.values())
    assert stats["labels"] == len(found) == len({match.label for match in found.values()})
    assert (stats["joins"] > 0) == (tile < SIDE)


@pytest.mark.parametrize("tile", TILES)
def test_labels_fit_what_was_drawn(made: Made, truth: mosaics.Mosaic, tile: int) -> None:
    labels, _ = made[tile]
    assert np.mean([match.iou for match in mosaics.compare(truth.truth, labels).values()]) >= 0.95
    assert np.mean(labels[truth.truth > 0] > 0) >= 0.96
    assert np.mean(labels[truth.truth == 0] > 0) <= 0.02


@pytest.mark.parametrize(("one", "other"), [(512, 1024), (512, 2048), (1024, 2048)])
def test_however_it_is_cut_the_labels_are_the_same(made: Made, one: int, other: int) -> None:
    found = mosaics.compare(made[one][0], made[other][0])
    assert min(match.iou for match in found.values()) >= 0.95
