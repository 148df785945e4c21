"""`sam-poll mosaic` and its flags; what it does is in `mosaic`.

Nothing heavy is imported at the top, so that `--help` answers at once. What can still go wrong here: nothing of its
own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam_poll.errors import ShareError, UsageError
from sam_poll.given import Device, Model, ModelCfg
from sam_poll.reporting import reports

if TYPE_CHECKING:
    from sam_poll.mosaic.run import OnStep, Step
    from sam_poll.safe_path import SafePath

STAGES = {"tiles": "segmenting", "seams": "joining", "slivers": "merging", "labels": "writing", "polygons": "tracing"}


@reports
def mosaic(
    picture: Annotated[Path, typer.Argument(metavar="IMAGE", help="GeoTIFF, PNG, JPEG, JPEG 2000, BMP or WebP.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the labels.")],
    tile: Annotated[int, typer.Option("--tile", min=64, help="Side of a tile, a multiple of 16 pixels.")] = 1024,
    padding: Annotated[int, typer.Option("--padding", min=8, help="Pixels seen around each tile.")] = 128,
    passes: Annotated[int, typer.Option("--passes", min=1, max=20, help="At most so many passes over a tile.")] = 1,
    target_coverage: Annotated[
        float, typer.Option("--target-coverage", min=0, max=1, help="Further passes end at this part of a tile.")
    ] = 0.95,
    points_per_side: Annotated[
        int, typer.Option("--points-per-side", min=1, max=256, help="Clicks a side of the first pass's grid.")
    ] = 32,
    min_area: Annotated[int, typer.Option("--min-area", min=1, help="Pixels of the smallest object.")] = 100,
    iou: Annotated[float, typer.Option("--iou", min=0, max=1, help="Least predicted IoU of a mask.")] = 0.8,
    stability: Annotated[float, typer.Option("--stability", min=0, max=1, help="Least stability of a mask.")] = 0.9,
    config: Annotated[Path | None, typer.Option("-c", "--config", help="Settings file, for the model.")] = None,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    devices: Annotated[
        str | None, typer.Option("--devices", help="Several, `cuda:0,cuda:1`, that take tiles side by side; auto: all.")
    ] = None,
    log_level: Annotated[str, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.")] = "WARNING",
) -> None:
    """Segment a picture larger than memory, tile by tile, into one label raster and polygons.

    Killed and started again with the same flags, it goes on behind the last finished tile. Started a second time while
    it runs, here or on another machine, both take tiles.
    """
    _check(tile, padding)
    from sam_poll import app, console, engines, settings
    from sam_poll.types import Everything

    try:
        from sam_poll.mosaic.crew import Hand, crew
        from sam_poll.mosaic.passes import Passes
        from sam_poll.mosaic.run import Wish
        from sam_poll.mosaic.run import mosaic as run
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed", remedy="install the extra `geo`: pip install 'sam_poll[geo]'"
        ) from None
    except ImportError as error:  # a library of the system that a wheel links to
        raise UsageError(f"the extra `geo` cannot be used: {error}", remedy=app.MISSING) from None
    console.set_up_log("text", log_level.upper())
    several = devices and [name.strip() for name in devices.split(",")]
    flags: dict[str, Any] = {"model": model, "model_cfg": model_cfg, "device": device}
    flags["devices"] = devices if several == ["auto"] else several
    chosen = settings.load(config, flags={key: value for key, value in flags.items() if value is not None})
    first = Everything(points_per_side=points_per_side, min_area=min_area, iou=iou, stability=stability)
    name = engines.identity(engines.resolve(chosen.model, config=chosen.model_cfg))
    wish = Wish(tile, padding, Passes(first, passes, target_coverage), name)
    names = app.devices_of(chosen)
    env = app.env_of(names)
    os.environ.update(env)  # this process is one of them
    source, place = _safely(picture, output)
    hands = [Hand(name, source, place, wish, partial(app.engine_of, chosen, device=name)) for name in names[1:]]
    with crew(hands, env), _shown() as on_step, _kept():
        stats = run(source, place, wish, partial(app.engine_of, chosen, device=names[0]), on_step)
    objects, tiles = console.count(stats["labels"], "object"), console.count(stats["tiles"], "tile")
    typer.echo(f"{objects} in {tiles}, {stats['coverage']:.1%} of the picture covered, written to {output}")


def _safely(picture: Path, output: Path) -> tuple[SafePath, SafePath]:
    """Return the picture, where the name leads to, and the output folder."""
    from sam_poll.safe_path import SafePath

    return SafePath.beside(Path(os.path.realpath(picture))), SafePath.at(output)


def _check(tile: int, padding: int) -> None:
    from sam_poll.prompt_forms import TILE_UNIT

    if tile % TILE_UNIT:
        nearest = tile // TILE_UNIT * TILE_UNIT
        raise UsageError(f"{tile} is no multiple of {TILE_UNIT}", place="--tile", remedy=f"take {nearest}")
    if padding > tile:
        raise UsageError("it is wider than a tile", place="--padding", remedy=f"take {tile} or less")


@contextmanager
def _kept() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # the disk is full, the share away
        raise ShareError(
            error.strerror or str(error),
            place=str(error.filename) if error.filename else None,
            remedy="mend that, and start it again with the same flags: finished tiles are kept",
        ) from error


@contextmanager
def _shown() -> Iterator[OnStep]:
    """A bar on a terminal: tiles, coverage, time left. Elsewhere a log line (INFO) for each tenth."""
    from loguru import logger
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from sam_poll.console import error_console

    console = error_console()
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[coverage]:.1%} covered"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def on_step(step: Step) -> None:
            if step.stage not in tasks:
                # tiles of an earlier run are done at once and say nothing about the time left
                tasks[step.stage] = progress.add_task(STAGES[step.stage], total=step.total, coverage=step.coverage)
            if step.stage == "tiles" and not step.fresh:
                progress.reset(tasks[step.stage], total=step.total, completed=step.done, coverage=step.coverage)
            else:
                progress.update(tasks[step.stage], completed=step.done, coverage=step.coverage)
            if step.stage != "tiles":
                if not step.done:
                    logger.info("{} …", STAGES[step.stage])
            elif step.done * 10 // step.total != (step.done - 1) * 10 // step.total:
                logger.info("{}: {} of {} tiles, {:.1%} covered", *_told(step))

        yield on_step


def _told(step: Step) -> tuple[str, int, int, float]:
    return STAGES[step.stage], step.done, step.total, step.coverage
