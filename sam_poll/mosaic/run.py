"""A mosaic from beginning to end: tiles, seams, labels.tif, polygons, stats.json; begun anew where it was left.

A finished tile is a file in the state folder. What comes after the last tile is made anew from these files, the same
every time, and renamed to its place when it is whole; stats.json comes last, then the state folder goes.

What can still go wrong here: tiles begun on one step of the memory ladder and finished on another differ a little from
those of a run that was not stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sam_poll.errors import InputError
from sam_poll.fs import sync_folder, write_whole
from sam_poll.mosaic import labels, polygons
from sam_poll.mosaic.passes import Labelled, Passes, labelled
from sam_poll.mosaic.source import Source, opened
from sam_poll.mosaic.state import Done, State
from sam_poll.mosaic.tiles import Cut, Tile
from sam_poll.types import Bitmap, Engine

RASTER, GEOPACKAGE, GEOJSON, STATS = "labels.tif", "labels.gpkg", "labels.geojson", "stats.json"


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
    `coverage` is that of the tiles finished so far; `fresh` says whether a tile was computed now."""

    stage: str
    done: int
    total: int
    coverage: float
    fresh: bool = True


OnStep = Callable[[Step], None]


def mosaic(
    picture: Path, output: Path, wish: Wish, engine: Callable[[], Engine], on_step: OnStep = lambda _: None
) -> dict[str, Any]:
    """Write labels.tif, labels.gpkg, labels.geojson and stats.json of a picture; returns what is in the last.

    `engine` is called when there is a tile to compute. What was finished before is not done again. PictureError,
    UsageError, ShareError, OSError, and what the engine raises.
    """
    output.mkdir(parents=True, exist_ok=True)
    with opened(picture) as source:
        job = _job(picture, source, wish)
        state, stats = State(output), output / STATS
        if (found := _finished(stats, job)) is not None:
            if state.folder.is_dir():
                with state.held(job):
                    state.clear()
            return found
        cut = Cut(source.size, wish.tile, wish.padding)
        with state.held(job):
            _tiles(source, state, cut, wish, engine, on_step)
            made = _put_together(source, state, cut, wish, on_step)
            for name in (RASTER, GEOPACKAGE, GEOJSON):
                (state.folder / name).replace(output / name)
            sync_folder(output)
            whole = {**made, "job": job}
            write_whole(stats, json.dumps(whole, indent=2).encode())
            state.clear()
    return whole


def _job(picture: Path, source: Source, wish: Wish) -> dict[str, Any]:
    """What the tiles depend on, as JSON has it."""
    about = picture.stat()
    made = {"picture": picture.name, "bytes": about.st_size, "changed_ns": about.st_mtime_ns, **asdict(wish)}
    return dict(json.loads(json.dumps({**made, "width": source.size.width, "height": source.size.height})))


def _finished(stats: Path, job: Mapping[str, Any]) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        found = json.loads(stats.read_bytes())
        if isinstance(found, dict) and found.get("job") == job:
            complete = all((stats.parent / name).is_file() for name in (RASTER, GEOPACKAGE, GEOJSON))
            return found if complete else None
    return None


# ── tiles ──


def _tiles(source: Source, state: State, cut: Cut, wish: Wish, engine: Callable[[], Engine], on_step: OnStep) -> None:
    loaded: Engine | None = None
    covered = valid = 0
    for tile in cut:
        fresh = not state.has(tile.number)
        if fresh:
            pixels, there = source.read(tile.window)
            core = tile.core.within(tile.window)
            if not there[core].any() or bool((pixels == pixels[0, 0]).all()):
                found = Labelled(np.zeros(there.shape, np.uint16), np.zeros(0, np.float32))
                state.keep(tile.number, _done(cut, tile, found, there, skipped=True))
            else:
                loaded = loaded or engine()
                try:
                    found = labelled(loaded, pixels, there, wish.passes, core)
                except InputError as error:
                    error.place = error.place or f"tile {tile.number} at {tile.core.x0}, {tile.core.y0}"
                    raise
                state.keep(tile.number, _done(cut, tile, found, there, skipped=False))
        _, areas, there_px, _ = state.table(tile.number)
        covered, valid = covered + int(areas.sum()), valid + there_px
        on_step(Step("tiles", tile.number + 1, len(cut), covered / valid if valid else 0.0, fresh))


def _done(cut: Cut, tile: Tile, found: Labelled, valid: Bitmap, *, skipped: bool) -> Done:
    core = tile.core.within(tile.window)
    bands = {side: found.numbers[area.within(tile.window)] for side, area in cut.bands(tile.number).items()}
    areas = np.bincount(found.numbers[core].ravel(), minlength=len(found.scores) + 1)[1:].astype(np.int64)
    return Done(found.numbers[core], bands, found.scores, areas, int(np.count_nonzero(valid[core])), skipped)


# ── what comes after the last tile ──


def _put_together(source: Source, state: State, cut: Cut, wish: Wish, on_step: OnStep) -> dict[str, Any]:
    known = labels.tables(state, cut)
    covered = int(known.areas.sum()) / known.valid if known.valid else 0.0

    def at(stage: str) -> Callable[[int], None]:
        return lambda number: on_step(Step(stage, number, len(cut), covered))

    sets, joins = labels.joined(state, cut, known, at("seams"))
    stands, merged, dropped = labels.merged(state, cut, known, sets, wish.passes.first.min_area, at("slivers"))
    final = labels.finals(state, cut, known, stands)
    labels.write(state.folder / RASTER, source, state, cut, known, final, at("labels"))
    found = polygons.shapes(state, cut, known, final, source.transform, at("polygons"))
    polygons.write(state.folder, (GEOPACKAGE, GEOJSON), source, found)
    for name in (RASTER, GEOPACKAGE, GEOJSON):
        _flush(state.folder / name)
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
    }


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN."""
    return value if value is None or np.isfinite(value) else str(value)
