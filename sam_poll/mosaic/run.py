"""A mosaic from beginning to end, taken up where it was left: tiles, then labels.tif, polygons, stats.json in place.

Outputs are made in the state folder and renamed to their place when all are whole; stats.json comes last, then the
state folder goes. Whoever begins the same mosaic meanwhile takes tiles of it, too, and ends with the same answer.

What can still go wrong here: the outputs are renamed one by one; killed in between, new ones lie beside older ones
until it is started again. That stats.json is of another job tells.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from loguru import logger

from sam_poll.errors import UsageError
from sam_poll.fs import exists, read_json, shown, sync_folder, write_whole
from sam_poll.mosaic import labels
from sam_poll.mosaic.source import opened
from sam_poll.mosaic.state import FOLDER, POLL_S, clear_after
from sam_poll.mosaic.work import GEOJSON, GEOPACKAGE, LONG_S, RASTER, STATS, OnStep, Step, Taken, Wish, Work, job_of
from sam_poll.safe_path import SafePath
from sam_poll.types import Engine

_END = "end"  # whose lock says who puts all together
__all__ = ["GEOJSON", "GEOPACKAGE", "RASTER", "STATS", "OnStep", "Step", "Wish", "lend_a_hand", "mosaic"]


def mosaic(
    picture: SafePath, output: SafePath, wish: Wish, engine: Callable[[], Engine], on_step: OnStep = lambda _: None
) -> dict[str, Any]:
    """Write labels.tif, labels.gpkg, labels.geojson and stats.json of a picture; returns what is in the last.

    `engine` is called when there is a tile to compute. What was finished before is not done again. PictureError,
    UsageError, ShareError, OSError, and what the engine raises.
    """
    _look_anew(picture, output)
    _check_place(picture, output)
    output.mkdir(parents=True, exist_ok=True)
    with opened(picture) as source:
        job = job_of(picture, source, wish)
        if (found := _finished(output, job)) is None:

            def told(step: Step) -> None:
                on_step(step)
                if step.stage != "tiles":
                    work.state.beat(_END)

            for note in source.notes():
                logger.warning("{}: {}", shown(picture), note)
            work = Work(source, picture, wish, output / FOLDER, told)
            try:
                return _made(work, output, _once(engine))
            except FileNotFoundError:
                if (found := _finished(output, job)) is None:
                    raise
        clear_after(output / FOLDER, job)  # who finished it may have ended before it was all gone
        return found


def lend_a_hand(picture: SafePath, output: SafePath, wish: Wish, engine: Callable[[], Engine]) -> None:
    """Take tiles of a mosaic that somebody else will put together, as long as there are any. As `mosaic`."""
    _look_anew(picture, output)
    with opened(picture) as source:
        if _finished(output, job_of(picture, source, wish)) is not None:
            return
        work, engine = Work(source, picture, wish, output / FOLDER, lambda _: None), _once(engine)
        with contextlib.suppress(FileNotFoundError):  # it is finished
            while work.take(engine) is Taken.TILE:
                pass


def _look_anew(*paths: SafePath) -> None:
    """Use the folders that have the names now, and not those of an earlier call that have been renamed since."""
    for path in paths:
        path.root.renew()


def _check_place(picture: SafePath, output: SafePath) -> None:
    try:
        str(output).encode()
    except UnicodeError:
        raise UsageError(
            "its name is no UTF-8, and GDAL writes no other", place=shown(output), remedy="take another folder"
        ) from None
    if not str(output).isprintable():
        raise UsageError("its name holds line breaks or the like", place=shown(output), remedy="take another folder")
    for name in (RASTER, GEOPACKAGE, GEOJSON, STATS):
        if exists(output / name) and os.path.samestat((output / name).lstat(), picture.lstat()):
            raise UsageError(f"{name} would overwrite the picture", place=str(output), remedy="take another folder")


def _made(work: Work, output: SafePath, engine: Callable[[], Engine]) -> dict[str, Any]:
    while (taken := work.take(engine)) is not Taken.NONE:
        if taken is Taken.WAIT:
            time.sleep(POLL_S)
    state, seen, since = work.state, 0, time.monotonic()
    while True:
        with state.held(_END) as ours:
            now, beaten = time.monotonic(), state.beaten_ns(_END)
            if seen != beaten:
                seen, since = beaten, now
            if ours or now - since > LONG_S:  # whoever has it hangs; what we make lies beside
                # whoever had it before has finished, or has ended before
                whole = _finished(output, work.job) or _put_together(work, output, state.fresh(alone=ours))
                state.clear()
                return whole
        time.sleep(POLL_S)


def _put_together(work: Work, output: SafePath, made: SafePath) -> dict[str, Any]:
    whole = work.put_together(made)
    for name in (RASTER, GEOPACKAGE, GEOJSON):
        labels.put(made / name, output / name)
    sync_folder(output)
    write_whole(output / STATS, json.dumps(whole, indent=2).encode())
    return whole


def _once(engine: Callable[[], Engine]) -> Callable[[], Engine]:
    made: list[Engine] = []

    def get() -> Engine:
        if not made:
            made.append(engine())
        return made[0]

    return get


def _finished(output: SafePath, job: Mapping[str, Any]) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError, ValueError):
        found = read_json(output / STATS)
        if isinstance(found, dict) and found.get("job") == job:
            complete = all((output / name).is_file() for name in (RASTER, GEOPACKAGE, GEOJSON))
            return found if complete else None
    return None
