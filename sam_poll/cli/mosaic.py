"""The command `sam-poll mosaic` and its flags; the package `mosaic` does the work.

No large library is imported at the top, so that `--help` answers at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam_poll.cli.error_handling import reports
from sam_poll.cli.options import Device, Model, ModelCfg
from sam_poll.core.errors import ShareError, UsageError

if TYPE_CHECKING:
    from sam_poll.core.safe_path import SafePath
    from sam_poll.mosaic.run import OnStep, Step

STAGES = {
    "tiles": "segmenting",
    "seams": "joining",
    "slivers": "merging",
    "labels": "writing",
    "polygons": "tracing",
}


# The flags that a text goes without, with their parameters.
CLICK_FLAGS = {
    "passes": "--passes",
    "target_coverage": "--target-coverage",
    "points_per_side": "--points-per-side",
    "iou": "--iou",
    "stability": "--stability",
}


@reports
def mosaic(
    context: typer.Context,
    picture: Annotated[
        Path, typer.Argument(metavar="IMAGE", help="GeoTIFF, PNG, JPEG, JPEG 2000, BMP or WebP.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the labels.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", help="What to find, instead of everything (SAM 3); may be repeated."
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", help="Score above which --text keeps objects (0.5)."),
    ] = None,
    tile: Annotated[
        int, typer.Option("--tile", min=64, help="Side of a tile, a multiple of 16 pixels.")
    ] = 1024,
    padding: Annotated[
        int, typer.Option("--padding", min=8, help="Margin around each tile, in pixels.")
    ] = 128,
    passes: Annotated[
        int, typer.Option("--passes", min=1, max=20, help="Maximum number of passes over a tile.")
    ] = 1,
    target_coverage: Annotated[
        float,
        typer.Option(
            "--target-coverage",
            min=0,
            max=1,
            help="Labelled fraction of a tile at which further passes end.",
        ),
    ] = 0.95,
    points_per_side: Annotated[
        int,
        typer.Option(
            "--points-per-side",
            min=1,
            max=256,
            help="Points along each side of the first pass's grid.",
        ),
    ] = 32,
    min_area: Annotated[
        int, typer.Option("--min-area", min=1, help="Minimum size of an object, in pixels.")
    ] = 100,
    iou: Annotated[
        float, typer.Option("--iou", min=0, max=1, help="Minimum predicted IoU of a mask.")
    ] = 0.8,
    stability: Annotated[
        float, typer.Option("--stability", min=0, max=1, help="Minimum stability score of a mask.")
    ] = 0.9,
    config: Annotated[
        Path | None, typer.Option("-c", "--config", help="Settings file, for the model.")
    ] = None,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    devices: Annotated[
        str | None,
        typer.Option(
            "--devices",
            help="Devices that compute tiles in parallel, `cuda:0,cuda:1`, or `auto` for all.",
        ),
    ] = None,
    log_level: Annotated[
        str, typer.Option("--log-level", help="Minimum level: DEBUG, INFO, WARNING or ERROR.")
    ] = "WARNING",
) -> None:
    """Segment a picture larger than memory, tile by tile, into one label raster and polygons.

    Everything in it, or with --text all objects of a kind.

    If it is killed and started again with the same flags, it continues after the last finished
    tile. If it is started a second time while it runs, here or on another machine, both processes
    compute tiles.
    """
    _check(tile, padding)
    _check_text_flags(context, bool(text), threshold)
    from sam_poll import engines
    from sam_poll.cli.prompt_flags import texts_flag
    from sam_poll.config import settings
    from sam_poll.core.types import AutomaticMaskRequest
    from sam_poll.runtime import builders, console

    try:
        from sam_poll.mosaic.helpers import HelperSpec, run_helpers
        from sam_poll.mosaic.run import MosaicOptions
        from sam_poll.mosaic.run import mosaic as run
        from sam_poll.mosaic.segment_tile import Passes
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed",
            remedy="install the extra `geo`: pip install 'sam_poll[geo]'",
        ) from None
    except ImportError as error:  # a system library that a wheel links to is missing
        raise UsageError(
            f"the extra `geo` cannot be used: {error}", remedy=builders.MISSING
        ) from None
    device_list = devices and [name.strip() for name in devices.split(",")]
    flags: dict[str, Any] = {"model": model, "model_cfg": model_cfg, "device": device}
    flags["devices"] = devices if device_list == ["auto"] else device_list
    chosen = settings.load(config, flags={**flags, "log_level": log_level.upper()})
    console.set_up_log("text", chosen.log_level)
    first = AutomaticMaskRequest(
        points_per_side=points_per_side, min_area=min_area, iou=iou, stability=stability
    )
    weights = engines.identity(engines.resolve(chosen.model, config=chosen.model_cfg))
    concept = texts_flag(text, threshold) if text else None
    options = MosaicOptions(tile, padding, Passes(first, passes, target_coverage), weights, concept)
    device_names = builders.devices_of(chosen)
    env = builders.worker_environment(device_names)
    os.environ.update(env)  # for the first device, which this process uses
    source, target = _safe_paths(picture, output)
    helpers = [
        HelperSpec(name, source, target, options, partial(builders.engine_of, chosen, device=name))
        for name in device_names[1:]
    ]
    load_engine = partial(builders.engine_of, chosen, device=device_names[0])
    with run_helpers(helpers, env), _progress() as on_tile, _os_errors():
        stats = run(source, target, options, load_engine, on_tile)
    objects = console.count(stats["labels"], "object")
    tiles = console.count(stats["tiles"], "tile")
    typer.echo(
        f"{objects} in {tiles}, {stats['coverage']:.1%} of the picture covered, written to {output}"
    )


def _safe_paths(picture: Path, output: Path) -> tuple[SafePath, SafePath]:
    """Return the picture, with links resolved, and the output folder."""
    from sam_poll.core.safe_path import SafePath

    return SafePath.beside(Path(os.path.realpath(picture))), SafePath.at(output)


def _check(tile: int, padding: int) -> None:
    """Raise UsageError for sizes that cannot be used."""
    from sam_poll.prompts.schema import TILE_UNIT

    if tile % TILE_UNIT:
        lower = tile // TILE_UNIT * TILE_UNIT
        raise UsageError(
            f"{tile} is not a multiple of {TILE_UNIT}", place="--tile", remedy=f"use {lower}"
        )
    if padding > tile:
        raise UsageError(
            "the padding is larger than a tile",
            place="--padding",
            remedy=f"use {tile} or less",
        )


def _check_text_flags(context: typer.Context, has_text: bool, threshold: float | None) -> None:
    """Raise UsageError for flags that do not go with `--text`, or not without it."""
    from sam_poll.prompts.schema import NO_CLICKS

    if threshold is not None and not has_text:
        raise UsageError("--threshold goes with --text", remedy="name what to find with --text")
    for name, flag in CLICK_FLAGS.items():
        source = context.get_parameter_source(name)
        if has_text and source is not None and source.name != "DEFAULT":
            raise UsageError(NO_CLICKS, place=flag, remedy="leave it out; --text has --threshold")


@contextmanager
def _os_errors() -> Iterator[None]:
    """Turn an OSError, such as a full disk or an absent share, into a ShareError with a remedy."""
    try:
        yield
    except OSError as error:
        raise ShareError(
            error.strerror or str(error),
            place=str(error.filename) if error.filename else None,
            remedy="remove the cause and start again with the same flags: finished tiles are kept",
        ) from error


@contextmanager
def _progress() -> Iterator[OnStep]:
    """Yield a function that shows the progress.

    On a terminal it is a bar with tiles, coverage and time left; elsewhere log lines (INFO), one
    for each tenth of the tiles.
    """
    from loguru import logger
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from sam_poll.runtime.console import error_console

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

        def on_tile(step: Step) -> None:
            if step.stage not in tasks:
                tasks[step.stage] = progress.add_task(
                    STAGES[step.stage], total=step.total, coverage=step.coverage
                )
            if step.stage == "tiles" and not step.fresh:
                # Tiles of an earlier run must not count for the estimate of the time left.
                progress.reset(
                    tasks[step.stage], total=step.total, completed=step.done, coverage=step.coverage
                )
            else:
                progress.update(tasks[step.stage], completed=step.done, coverage=step.coverage)
            if step.stage != "tiles":
                if not step.done:
                    logger.info("{} …", STAGES[step.stage])
            elif step.done * 10 // step.total != (step.done - 1) * 10 // step.total:
                logger.info(
                    "{}: {} of {} tiles, {:.1%} covered",
                    STAGES[step.stage],
                    step.done,
                    step.total,
                    step.coverage,
                )

        yield on_tile
