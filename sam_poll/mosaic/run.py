"""A mosaic from start to finish: its tiles, then labels.tif, the polygons and stats.json.

A mosaic continues where an earlier run ended. Outputs are written in the folder of the `TileStore`
and renamed to their final names when all are complete: stats.json last, then the folder is
removed. A process that starts the same mosaic meanwhile computes tiles of it, too, and returns the
same result.

Limitations: the outputs are renamed one by one. If the process is killed in between, new outputs
are beside older ones until the mosaic is started again; stats.json is then that of another job.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from loguru import logger

from sam_poll.core.errors import UsageError
from sam_poll.core.files import exists, read_json, sync_folder, write_whole
from sam_poll.core.protocols import Engine
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.mosaic import labels
from sam_poll.mosaic.assembly import (
    GEOJSON,
    GEOPACKAGE,
    LONG_S,
    RASTER,
    STATS,
    MosaicAssembly,
    MosaicOptions,
    OnStep,
    Step,
    Taken,
    job_of,
)
from sam_poll.mosaic.raster import opened
from sam_poll.mosaic.tile_store import FOLDER, POLL_S, clear_after

_END = "end"  # name of the lock of the process that writes the outputs
__all__ = [
    "GEOJSON",
    "GEOPACKAGE",
    "RASTER",
    "STATS",
    "MosaicOptions",
    "OnStep",
    "Step",
    "help_with",
    "mosaic",
]


def mosaic(
    picture: SafePath,
    output: SafePath,
    options: MosaicOptions,
    engine: Callable[[], Engine],
    on_tile: OnStep = lambda _: None,
) -> dict[str, Any]:
    """Write labels.tif, labels.gpkg, labels.geojson and stats.json of a picture.

    Returns the content of stats.json. `engine` is called only when there is a tile to compute;
    tiles that were finished before are not computed again. With texts it is called before the
    first tile, too, so that the network checks them. `on_tile` is called with the progress.
    Raises PictureError, PromptError, UsageError, ShareError, OSError, and the engine's errors.
    """
    _renew_roots(picture, output)
    _check_output(picture, output)
    engine = _once(engine)
    with opened(picture) as source:
        job = job_of(picture, source, options)
        stats = _finished(output, job)
        if stats is None:

            def report(step: Step) -> None:
                on_tile(step)
                if step.stage != "tiles":
                    assembly.tiles.beat(_END)

            _check_texts(options, engine)
            output.mkdir(parents=True, exist_ok=True)
            for note in source.notes():
                logger.warning("{}: {}", shown(picture), note)
            assembly = MosaicAssembly(source, picture, options, output / FOLDER, report)
            try:
                return _run(assembly, output, engine)
            except FileNotFoundError:  # the folder is gone: another process may have finished
                stats = _finished(output, job)
                if stats is None:
                    raise
        # The process that finished the mosaic may have been killed before it removed the folder.
        clear_after(output / FOLDER, job)
        return stats


def help_with(
    picture: SafePath, output: SafePath, options: MosaicOptions, engine: Callable[[], Engine]
) -> None:
    """Compute tiles of a mosaic whose outputs another process writes, until none is left.

    The arguments and errors are those of `mosaic`.
    """
    _renew_roots(picture, output)
    with opened(picture) as source:
        if _finished(output, job_of(picture, source, options)) is not None:
            return
        engine = _once(engine)
        _check_texts(options, engine)
        assembly = MosaicAssembly(source, picture, options, output / FOLDER, lambda _: None)
        with contextlib.suppress(FileNotFoundError):  # another process has finished the mosaic
            while assembly.take(engine) is Taken.TILE:
                pass


def _renew_roots(*paths: SafePath) -> None:
    """Open the folders that have these names now: those of an earlier call may be renamed."""
    for path in paths:
        path.root.renew()


def _check_texts(options: MosaicOptions, engine: Callable[[], Engine]) -> None:
    """Raise PromptError for texts that the network cannot take, before anything is written."""
    if options.concept:
        engine().check_concept(options.concept)


def _check_output(picture: SafePath, output: SafePath) -> None:
    """Raise UsageError for an output folder that cannot be used."""
    remedy = "choose another folder"
    try:
        str(output).encode()
    except UnicodeError:
        raise UsageError(
            "its name is not valid UTF-8, which GDAL requires",
            place=shown(output),
            remedy=remedy,
        ) from None
    if not str(output).isprintable():
        raise UsageError(
            "its name contains line breaks or other control characters",
            place=shown(output),
            remedy=remedy,
        )
    for name in (RASTER, GEOPACKAGE, GEOJSON, STATS):
        if exists(output / name) and os.path.samestat((output / name).lstat(), picture.lstat()):
            raise UsageError(
                f"{name} would overwrite the picture", place=str(output), remedy=remedy
            )


def _run(
    assembly: MosaicAssembly, output: SafePath, engine: Callable[[], Engine]
) -> dict[str, Any]:
    """Compute the remaining tiles, then write the outputs, unless another process does."""
    while (taken := assembly.take(engine)) is not Taken.NONE:
        if taken is Taken.WAIT:
            time.sleep(POLL_S)
    tiles = assembly.tiles
    last_heartbeat = 0
    last_change = time.monotonic()
    while True:
        with tiles.held(_END) as locked:
            now = time.monotonic()
            heartbeat = tiles.beaten_ns(_END)
            if last_heartbeat != heartbeat:
                last_heartbeat = heartbeat
                last_change = now
            # Without a heartbeat the holder of the lock hangs. The outputs are then written
            # beside its own.
            if locked or now - last_change > LONG_S:
                # An earlier holder of the lock may have finished, or ended before that.
                stats = _finished(output, assembly.job)
                if not stats:
                    stats = _write_outputs(assembly, output, tiles.fresh(alone=locked))
                tiles.clear()
                return stats
        time.sleep(POLL_S)


def _write_outputs(
    assembly: MosaicAssembly, output: SafePath, temporary: SafePath
) -> dict[str, Any]:
    """Write the outputs into a temporary folder and rename them to their final names."""
    stats = assembly.write_outputs(temporary)
    for name in (RASTER, GEOPACKAGE, GEOJSON):
        labels.replace_output(temporary / name, output / name)
    sync_folder(output)
    write_whole(output / STATS, json.dumps(stats, indent=2).encode())
    return stats


def _once(engine: Callable[[], Engine]) -> Callable[[], Engine]:
    """Return a function that calls `engine` at its first call only, and returns its engine."""
    loaded: list[Engine] = []

    def get() -> Engine:
        if not loaded:
            loaded.append(engine())
        return loaded[0]

    return get


def _finished(output: SafePath, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the content of stats.json if the mosaic of this job is finished, else None."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        stats = read_json(output / STATS)
        if isinstance(stats, dict) and stats.get("job") == job:
            complete = all((output / name).is_file() for name in (RASTER, GEOPACKAGE, GEOJSON))
            return stats if complete else None
    return None
