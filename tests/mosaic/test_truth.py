"""Mosaics of drawn shapes with the bundled model: a shape is one label for any tile size.

The bundled model makes errors of its own. These tests use mosaics that it segments well, so that
errors come from the division into tiles. With seeds 1 to 6 and these three tile sizes, all shapes
of all kinds are one label each; the results agree to 0.95 on 4 of 6 with ellipses and 5 of 6 with
rectangles, and on those used here to 0.969. The smaller rings are in the network's input, the worse
it segments them, so they are compared in tiles only. `python -m benchmarks.mosaic --alone` measures
its quality for each kind without tiles, and without `--alone` for many shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import AutomaticMaskRequest
from sam_poll.mosaic import assembly, run
from sam_poll.mosaic.run import MosaicOptions
from sam_poll.mosaic.segment_tile import Passes
from tests.support.failing_engine import demo
from tests.support.mosaic_paths import assembly_of, mosaic, opened
from tools import mosaics

SIDE = 1500
TILES = (512, 1024, 2048)  # with the last there is one tile
ASKED = AutomaticMaskRequest(points_per_side=8, min_area=100, iou=0.8, stability=0.7)
AGREED = FITS = 0.96
SCENES = {
    ("ellipse", 3): TILES,
    ("ellipse", 5): TILES,
    ("rectangle", 3): TILES,
    ("rectangle", 5): TILES,
    ("ring", 3): TILES[:2],
}


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """A drawn mosaic, and its labels and stats by tile size."""

    truth: npt.NDArray[np.uint16]
    labels: dict[int, npt.NDArray[np.uint32]]
    stats: dict[int, dict[str, int]]


@pytest.fixture(scope="module", params=SCENES, ids=lambda scene: f"{scene[0]}s-{scene[1]}")
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    kind, seed = request.param
    folder: Path = tmp_path_factory.mktemp("truth")
    drawn, engine = mosaics.draw(seed, SIDE, (kind,)), demo()
    mosaics.write(folder / "a.tif", drawn.pixels)
    made = Scene(drawn.truth, {}, {})
    for tile in SCENES[kind, seed]:
        out = folder / str(tile)
        made.stats[tile] = mosaic(
            folder / "a.tif", out, MosaicOptions(tile, 128, Passes(ASKED), "demo"), lambda: engine
        )
        made.labels[tile] = mosaics.read(out / run.RASTER)
    return made


@pytest.mark.slow
def test_shapes_are_one_label_each_also_over_seams(scene: Scene) -> None:
    for tile, labels in scene.labels.items():
        found, stats = mosaics.compare(scene.truth, labels), scene.stats[tile]
        assert len(mosaics.crossing(scene.truth, tile)) >= {512: 3, 1024: 2, 2048: 0}[tile]
        assert all(match.labels == 1 for match in found.values()), tile
        assert stats["labels"] == len(found) == len({match.label for match in found.values()}), tile
        assert (stats["joins"] > 0) == (tile < SIDE)


def test_labels_fit_what_was_drawn(scene: Scene) -> None:
    for tile, labels in scene.labels.items():
        found = mosaics.compare(scene.truth, labels)
        assert np.mean([match.iou for match in found.values()]) >= FITS, tile
        assert np.mean(labels[scene.truth > 0] > 0) >= 0.985, tile
        assert np.mean(labels[scene.truth == 0] > 0) <= 0.01, tile


def test_labels_are_the_same_for_any_tile_size(scene: Scene) -> None:
    for one, other in combinations(scene.labels.values(), 2):
        for found in (mosaics.compare(one, other), mosaics.compare(other, one)):
            assert min(match.iou for match in found.values()) >= AGREED


@pytest.mark.slow
def test_neighbour_fill_labels_more_of_a_shape_that_one_window_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, engine = (
        mosaics.draw(6, SIDE, ("ellipse",)),
        demo(),
    )  # a mosaic that the model segments badly
    mosaics.write(tmp_path / "a.tif", drawn.pixels)
    options = MosaicOptions(512, 128, Passes(ASKED), "demo")
    with opened(tmp_path / "a.tif") as source:
        made = assembly_of(source, tmp_path / "a.tif", options, tmp_path)
        while made.take(lambda: engine) is assembly.Taken.TILE:
            pass
        stats = []
        covered = []
        ious = []
        for lending in (assembly.NeighbourFill, lambda state, *_: state):
            monkeypatch.setattr(assembly, "NeighbourFill", lending)
            place = tmp_path / f"put-together-{len(stats)}"
            place.mkdir()
            stats.append(made.write_outputs(SafePath.at(place)))
            labels = mosaics.read(place / run.RASTER)
            covered.append(np.mean(labels[drawn.truth > 0] > 0))
            ious.append(
                np.mean([match.iou for match in mosaics.compare(drawn.truth, labels).values()])
            )
    assert covered[0] >= covered[1] + 0.005
    assert ious[0] >= ious[1] + 0.003
    assert stats[0]["labels"] == stats[1]["labels"] == 4
