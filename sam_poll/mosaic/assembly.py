"""The computation of one mosaic: its tiles, shared with other processes, then the outputs.

A finished tile is a file in the folder of the `TileStore`. The outputs are computed from these
files and are the same in every run.

Limitations: tiles that were computed on different steps of the memory ladder, or on different
devices, differ slightly.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import chain
from typing import Any

import numpy as np

from sam_poll.core.errors import InputError
from sam_poll.core.protocols import Engine
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import BoolArray, ConceptRequest, RgbArray
from sam_poll.core.validation import quoted
from sam_poll.mosaic import labels, polygons
from sam_poll.mosaic.grid import BAND, Tile, TileGrid
from sam_poll.mosaic.neighbour_fill import NeighbourFill
from sam_poll.mosaic.raster import WindowedRaster
from sam_poll.mosaic.segment_tile import Labelled, Passes, label_texts, label_window
from sam_poll.mosaic.tile_store import How, TileLayer, TileResult, TileStore

RASTER = "labels.tif"
GEOPACKAGE = "labels.gpkg"
GEOJSON = "labels.geojson"
STATS = "stats.json"
# A tile that another process has locked is computed here as well, because that process may hang,
# after this many seconds and this many times the longest time that a tile took here.
LONG_S = 60.0
LONG = 3


@dataclass(frozen=True, slots=True)
class MosaicOptions:
    """The division of the picture into tiles, and what is done with each tile.

    `tile` and `padding` are in pixels; `model` names the weights and is only compared with that of
    an earlier run. With `concept` the objects of its texts are found, and of `passes` only
    `first.min_area` applies. The names of the fields are part of job.json and stats.json.
    """

    tile: int
    padding: int
    passes: Passes
    model: str
    concept: ConceptRequest | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """The progress of a mosaic.

    `done` of `total` tiles are finished in a stage (`tiles`, `seams`, `slivers`, `labels`,
    `polygons`). `coverage` is that of the tiles finished so far. `fresh` is whether the tile has
    just been computed by this process.
    """

    stage: str
    done: int
    total: int
    coverage: float
    fresh: bool = True


OnStep = Callable[[Step], None]


class Taken(Enum):
    """The result of `MosaicAssembly.take`."""

    TILE = "a tile was computed"
    WAIT = "other processes are computing the remaining tiles"
    NONE = "all tiles are finished"


class MosaicAssembly:
    """One mosaic as this process sees it.

    `job` is what its tiles depend on, as JSON values. `on_tile` is called for each tile in each
    stage, `on_step` also within a tile; their exceptions end the work. `how` is that of
    `TileStore`.
    """

    def __init__(
        self,
        source: WindowedRaster,
        picture: SafePath,
        options: MosaicOptions,
        folder: SafePath,
        on_tile: OnStep,
        *,
        how: How = "refuse",
        on_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.source = source
        self.options = options
        self._on_tile = on_tile
        self._on_step = on_step
        self.grid = TileGrid(source.size, options.tile, options.padding)
        self.job = job_of(picture, source, options)
        self.tiles = TileStore(folder, self.job, how)
        # One for each layer of labels; an empty text stands for everything.
        self._texts = options.concept.texts if options.concept else ("",)
        # Tiles that are not known to be finished, in order.
        self._unfinished = dict.fromkeys(range(len(self.grid)))
        self._covered_px = 0
        self._valid_px = 0
        self._waiting_since: float | None = None
        self._longest_s = 0.0

    # ── tiles ──

    def count_finished(self) -> None:
        """Count the tiles that are finished already. Raises OSError.

        `take` counts them, too, but on the device thread, where reading them may cost seconds.
        """
        for number in [number for number in self._unfinished if self.tiles.has(number)]:
            self._count(number, fresh=False)

    def take(self, engine: Callable[[], Engine]) -> Taken:
        """Compute the first tile that is neither finished nor locked by another process.

        `engine` is called only when there is a tile to compute. Raises PictureError, OSError, the
        engine's errors, and FileNotFoundError where another process has finished the mosaic.
        """
        for number in tuple(self._unfinished):
            if self.tiles.has(number):
                self._count(number, fresh=False)
                continue
            with self.tiles.held(number) as locked:
                if not (locked or self._waited_long()):
                    continue
                fresh = not self.tiles.has(number)
                if fresh:
                    self._compute(self.grid[number], engine)
            self._count(number, fresh=fresh)
            if fresh:
                return Taken.TILE
        if self._unfinished and self._waiting_since is None:
            self._waiting_since = time.monotonic()
        return Taken.WAIT if self._unfinished else Taken.NONE

    def _waited_long(self) -> bool:
        limit_s = max(LONG_S, LONG * self._longest_s)
        return self._waiting_since is not None and time.monotonic() - self._waiting_since > limit_s

    def _compute(self, tile: Tile, engine: Callable[[], Engine]) -> None:
        """Segment a tile and store it. A tile without data, or of one colour, is skipped."""
        started = time.monotonic()
        pixels, valid = self.source.read(tile.window)
        core = tile.core.within(tile.window)
        skipped = not valid[core].any() or bool((pixels == pixels[0, 0]).all())
        if skipped:
            empty = Labelled(np.zeros(valid.shape, np.uint16), np.zeros(0, np.float32))
            labelled = [empty] * len(self._texts)
        else:
            try:
                labelled = self._label(engine(), pixels, valid, core)
            except InputError as error:
                error.place = error.place or f"tile {tile.number} at {tile.core.x0}, {tile.core.y0}"
                raise
        layers = [_tile_result(self.grid, tile, one, valid, skipped=skipped) for one in labelled]
        self.tiles.keep(tile.number, *layers)
        self._waiting_since = None
        self._longest_s = max(self._longest_s, time.monotonic() - started)

    def _label(
        self, engine: Engine, pixels: RgbArray, valid: BoolArray, core: tuple[slice, slice]
    ) -> list[Labelled]:
        """Return the labels of a window, one for each layer."""
        options = self.options
        if options.concept:
            return label_texts(engine, pixels, valid, options.concept, on_step=self._on_step)
        return [label_window(engine, pixels, valid, options.passes, core, on_step=self._on_step)]

    def _count(self, number: int, *, fresh: bool) -> None:
        """Count a finished tile and report the progress."""
        covered_px, valid_px = self.tiles.covered(number)
        del self._unfinished[number]
        self._covered_px += covered_px
        self._valid_px += valid_px
        total = len(self.grid)
        self._on_tile(Step("tiles", total - len(self._unfinished), total, self._coverage, fresh))

    @property
    def _coverage(self) -> float:
        """The fraction of the valid pixels of the finished tiles that have a label."""
        return self._covered_px / self._valid_px if self._valid_px else 0.0

    # ── outputs ──

    def write_outputs(self, folder: SafePath) -> dict[str, Any]:
        """Write labels.tif, labels.gpkg and labels.geojson into a folder.

        Returns the content of stats.json. Raises OSError.
        """
        grid = self.grid
        source = self.source
        joined = self._joined()
        layers = [one.layer for one in joined]
        labelled_px = labels.write(folder / RASTER, source, grid, layers, self._report("labels"))
        fields = (*polygons.FIELDS, polygons.CLASS) if self.options.concept else polygons.FIELDS
        shapes = chain.from_iterable(
            polygons.shapes(grid, layer, source.transform, self._report("polygons", index), text)
            for index, (layer, text) in enumerate(zip(layers, self._texts, strict=True))
        )
        polygons.write(folder, (GEOPACKAGE, GEOJSON), source, shapes, fields)
        for name in (RASTER, GEOPACKAGE, GEOJSON):
            _flush(folder / name)
        tables = layers[0].tables  # the counts of valid pixels and skipped tiles are those of all
        stats: dict[str, Any] = {
            "width": grid.size.width,
            "height": grid.size.height,
            "crs": source.crs.to_string() if source.crs else None,
            "transform": list(source.transform)[:6],
            "nodata": _json_number(source.nodata),
            "tiles": len(grid),
            "tiles_skipped": tables.skipped,
            "valid_px": tables.valid,
            "labelled_px": labelled_px,
            "coverage": round(labelled_px / tables.valid, 6) if tables.valid else 0.0,
            "labels_before": sum(int(np.count_nonzero(one.tables.areas)) for one in layers),
            "joins": sum(one.joins for one in joined),
            "slivers_merged": sum(one.slivers.merged for one in joined),
            "slivers_dropped": sum(one.slivers.dropped for one in joined),
            "labels": sum(len(one.final) for one in layers),
            "notes": source.notes(),
            "job": self.job,
        }
        if self.options.concept:
            counts = [len(one.final) for one in layers]
            stats["classes"] = dict(zip(self._texts, counts, strict=True))
            stats["notes"] = [*source.notes(), *_notes_on(self._texts, counts)]
        return stats

    def _joined(self) -> list[_JoinedLayer]:
        """Return the layers, with their labels joined over the seams and slivers merged."""
        grid = self.grid
        min_area = self.options.passes.first.min_area
        fills = [
            NeighbourFill(TileLayer(self.tiles, index), grid, min_area)
            for index in range(len(self._texts))
        ]
        tables = [labels.tables(tiles, grid) for tiles in fills]
        joins = [
            labels.join_labels(tiles, grid, one, self._report("seams", index))
            for index, (tiles, one) in enumerate(zip(fills, tables, strict=True))
        ]
        joined: list[_JoinedLayer] = []
        before = 0
        for index, (tiles, one, (sets, count)) in enumerate(zip(fills, tables, joins, strict=True)):
            on_tile = self._report("slivers", index)
            slivers = labels.merge_slivers(tiles, grid, one, sets, min_area, on_tile)
            final = labels.number_labels(grid, one, slivers.representatives)
            joined.append(_JoinedLayer(labels.Layer(tiles, one, final, before), count, slivers))
            before += len(final)
        return joined

    def _report(self, stage: str, layer: int = 0) -> labels.OnTile:
        """Return a function that reports the progress of a stage, by the number of a tile."""
        tiles = len(self.grid)
        # The raster is written from all layers at once.
        total = tiles if stage == "labels" else tiles * len(self._texts)

        def report(number: int) -> None:
            self._on_tile(Step(stage, layer * tiles + number, total, self._coverage))

        return report


@dataclass(frozen=True, slots=True, eq=False)
class _JoinedLayer:
    """A layer of the mosaic's labels, how many joins were made, and what became of slivers."""

    layer: labels.Layer
    joins: int
    slivers: labels.MergedSlivers


def _notes_on(texts: Sequence[str], counts: Sequence[int]) -> Iterator[str]:
    """Yield a note for each text of which no object was found."""
    for text, count in zip(texts, counts, strict=True):
        if not count:
            yield f"nothing found for {quoted(text)}"


def job_of(picture: SafePath, source: WindowedRaster, options: MosaicOptions) -> dict[str, Any]:
    """Return what the tiles depend on, as JSON values: picture, options, files beside it."""
    status = picture.lstat()
    job: dict[str, Any] = {
        "picture": picture.name,
        "bytes": status.st_size,
        "changed_ns": status.st_mtime_ns,
        **_options(options),
        "width": source.size.width,
        "height": source.size.height,
    }
    if source.beside:
        job["beside"] = source.beside
    job["band"] = BAND
    # Through JSON, so that it equals the one that is read from job.json or stats.json.
    return dict(json.loads(json.dumps(job)))


def _options(options: MosaicOptions) -> dict[str, Any]:
    """Return what the tiles depend on among the options."""
    values = asdict(options)
    concept = values.pop("concept")
    if concept:
        del values["passes"]
        values["text"] = concept["texts"]
        values["threshold"] = concept["threshold"]
        values["min_area"] = options.passes.first.min_area
    return values


def _tile_result(
    grid: TileGrid, tile: Tile, result: Labelled, valid: BoolArray, *, skipped: bool
) -> TileResult:
    core = tile.core.within(tile.window)
    numbers = result.numbers[core]
    bands = {
        side: result.numbers[area.within(tile.window)]
        for side, area in grid.bands(tile.number).items()
    }
    counts = np.bincount(numbers.ravel(), minlength=len(result.scores) + 1)
    areas = counts[1:].astype(np.int64)  # without the pixels that have no label
    valid_px = int(np.count_nonzero(valid[core]))
    return TileResult(numbers, bands, result.scores, areas, valid_px, skipped)


def _flush(path: SafePath) -> None:
    with path.open() as file:
        os.fsync(file.fileno())


def _json_number(value: float | None) -> float | str | None:
    """Return the value, as a string where it is NaN or infinite, which JSON cannot represent."""
    return value if value is None or np.isfinite(value) else str(value)
