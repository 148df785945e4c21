"""One mosaic at work: its tiles one after the other, beside others who take some of them; then all of it put together.

A finished tile is a file in the state folder. What comes after the last tile is made anew from these files, the same
every time.

What can still go wrong here: tiles made on one step of the memory ladder, or on one device, differ a little from those
made on another.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import numpy as np

from sam_poll.errors import InputError
from sam_poll.mosaic import labels, polygons
from sam_poll.mosaic.lent import Lent
from sam_poll.mosaic.passes import Labelled, Passes, labelled
from sam_poll.mosaic.source import Windows
from sam_poll.mosaic.state import Done, How, State
from sam_poll.mosaic.tiles import BAND, Cut, Tile
from sam_poll.safe_path import SafePath
from sam_poll.types import Bitmap, Engine

RASTER, GEOPACKAGE, GEOJSON, STATS = "labels.tif", "labels.gpkg", "labels.geojson", "stats.json"
LONG_S = 60.0  # after which a tile that somebody else has taken is made here as well, for that one may hang
LONG = 3  # … and not before this many times the longest that one took here


@dataclass(frozen=True, slots=True)
class Wish:
    """How the picture is cut, and what is asked of each tile. `model` is only compared with an earlier run's."""

    tile: int
    padding: int
    passes: Passes
    model: str


@dataclass(frozen=True, slots=True)
class Step:
    """How far it is: `done` of `total` tiles in a stage (`tiles`, `seams`, `slivers`, `labels`, `polygons`);
    `coverage` is that of the tiles finished so far; `fresh` says whether a tile was computed now, and here."""

    stage: str
    done: int
    total: int
    coverage: float
    fresh: bool = True


OnStep = Callable[[Step], None]


class Taken(Enum):
    """What became of asking for a tile."""

    TILE = "made"
    WAIT = "others are at what is left"
    NONE = "all are done"


class Work:
    """The tiles of one mosaic as they are seen from here. `job` says what they depend on, as JSON has it.

    `on_step` is told of each tile in each stage, `between` is called within a tile, too; what they raise ends the work.
    `how` is the state's.
    """

    def __init__(
        self,
        source: Windows,
        picture: SafePath,
        wish: Wish,
        folder: SafePath,
        on_step: OnStep,
        *,
        how: How = "refuse",
        between: Callable[[], None] = lambda: None,
    ) -> None:
        self.source, self.wish, self._on_step, self._between = source, wish, on_step, between
        self.cut = Cut(source.size, wish.tile, wish.padding)
        self.job = job_of(picture, source, wish)
        self.state = State(folder, self.job, how)
        self._left = dict.fromkeys(range(len(self.cut)))
        self._covered = self._valid = 0
        self._waits_since: float | None = None
        self._longest_s = 0.0

    # ── tiles ──

    def look(self) -> None:
        """Count what is done already, which `take` does as well, where some seconds matter to nobody. OSError."""
        for number in [number for number in self._left if self.state.has(number)]:
            self._count(number, fresh=False)

    def take(self, engine: Callable[[], Engine]) -> Taken:
        """Make the first tile that is not made, and that nobody else is at. `engine` is called when there is one for
        it. PictureError, OSError, what the engine raises; FileNotFoundError where somebody has finished it all."""
        for number in tuple(self._left):
            if self.state.has(number):
                self._count(number, fresh=False)
                continue
            with self.state.held(number) as ours:
                if not (ours or self._waited_long()):
                    continue
                fresh = not self.state.has(number)
                if fresh:
                    self._make(self.cut[number], engine)
            self._count(number, fresh=fresh)
            if fresh:
                return Taken.TILE
        if self._left and self._waits_since is None:
            self._waits_since = time.monotonic()
        return Taken.WAIT if self._left else Taken.NONE

    def _waited_long(self) -> bool:
        long = max(LONG_S, LONG * self._longest_s)
        return self._waits_since is not None and time.monotonic() - self._waits_since > long

    def _make(self, tile: Tile, engine: Callable[[], Engine]) -> None:
        started = time.monotonic()
        pixels, there = self.source.read(tile.window)
        core = tile.core.within(tile.window)
        skipped = not there[core].any() or bool((pixels == pixels[0, 0]).all())
        if skipped:
            found = Labelled(np.zeros(there.shape, np.uint16), np.zeros(0, np.float32))
        else:
            try:
                found = labelled(engine(), pixels, there, self.wish.passes, core, between=self._between)
            except InputError as error:
                error.place = error.place or f"tile {tile.number} at {tile.core.x0}, {tile.core.y0}"
                raise
        self.state.keep(tile.number, _done(self.cut, tile, found, there, skipped=skipped))
        self._waits_since, self._longest_s = None, max(self._longest_s, time.monotonic() - started)

    def _count(self, number: int, *, fresh: bool) -> None:
        _, areas, valid, _ = self.state.table(number)
        del self._left[number]
        self._covered, self._valid = self._covered + int(areas.sum()), self._valid + valid
        done, total = len(self.cut) - len(self._left), len(self.cut)
        self._on_step(Step("tiles", done, total, self._covered / self._valid if self._valid else 0.0, fresh))

    # ── what comes after the last tile ──

    def put_together(self, folder: SafePath) -> dict[str, Any]:
        """Write labels.tif, labels.gpkg and labels.geojson into a folder; what stats.json is to say. OSError."""
        cut, source, least = self.cut, self.source, self.wish.passes.first.min_area
        state = Lent(self.state, cut, least)
        known = labels.tables(state, cut)
        covered = int(known.areas.sum()) / known.valid if known.valid else 0.0

        def at(stage: str) -> Callable[[int], None]:
            return lambda number: self._on_step(Step(stage, number, len(cut), covered))

        sets, joins = labels.joined(state, cut, known, at("seams"))
        stands, merged, dropped = labels.merged(state, cut, known, sets, least, at("slivers"))
        final = labels.finals(state, cut, known, stands)
        labels.write(folder / RASTER, source, state, cut, known, final, at("labels"))
        found = polygons.shapes(state, cut, known, final, source.transform, at("polygons"))
        polygons.write(folder, (GEOPACKAGE, GEOJSON), source, found)
        for name in (RASTER, GEOPACKAGE, GEOJSON):
            _flush(folder / name)
        return {
            "width": cut.size.width,
            "height": cut.size.height,
            "crs": source.crs.to_string() if source.crs else None,
            "transform": list(source.transform)[:6],
            "nodata": _number(source.nodata),
            "tiles": len(cut),
            "tiles_skipped": known.skipped,
            "valid_px": known.valid,
            "labelled_px": int(final.areas.sum()),
            "coverage": round(int(final.areas.sum()) / known.valid, 6) if known.valid else 0.0,
            "labels_before": int(np.count_nonzero(known.areas)),
            "joins": joins,
            "slivers_merged": merged,
            "slivers_dropped": dropped,
            "labels": len(final),
            "notes": source.notes(),
            "job": self.job,
        }


def job_of(picture: SafePath, source: Windows, wish: Wish) -> dict[str, Any]:
    """What the tiles depend on, as JSON has it."""
    about = picture.lstat()
    made = {"picture": picture.name, "bytes": about.st_size, "changed_ns": about.st_mtime_ns, **asdict(wish)}
    size = {"width": source.size.width, "height": source.size.height}
    beside = {"beside": source.beside} if source.beside else {}
    return dict(json.loads(json.dumps({**made, **size, **beside, "band": BAND})))


def _done(cut: Cut, tile: Tile, found: Labelled, valid: Bitmap, *, skipped: bool) -> Done:
    core = tile.core.within(tile.window)
    bands = {side: found.numbers[area.within(tile.window)] for side, area in cut.bands(tile.number).items()}
    areas = np.bincount(found.numbers[core].ravel(), minlength=len(found.scores) + 1)[1:].astype(np.int64)
    return Done(found.numbers[core], bands, found.scores, areas, int(np.count_nonzero(valid[core])), skipped)


def _flush(path: SafePath) -> None:
    with path.open() as file:
        os.fsync(file.fileno())


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN."""
    return value if value is None or np.isfinite(value) else str(value)
