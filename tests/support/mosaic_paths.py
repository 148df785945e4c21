"""Mosaics of pictures that a test names by plain paths, as the command line does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sam_poll.core.protocols import Engine
from sam_poll.core.safe_path import SafePath
from sam_poll.mosaic import raster, run
from sam_poll.mosaic.assembly import MosaicAssembly
from sam_poll.mosaic.run import MosaicOptions, OnStep
from sam_poll.mosaic.tile_store import FOLDER, TileStore


def mosaic(
    picture: Path,
    output: Path,
    options: MosaicOptions,
    engine: Callable[[], Engine],
    on_tile: OnStep = lambda _: None,
) -> dict[str, Any]:
    """Run `run.mosaic` on plain paths."""
    return run.mosaic(SafePath.beside(picture), SafePath.at(output), options, engine, on_tile)


def help_with(
    picture: Path, output: Path, options: MosaicOptions, engine: Callable[[], Engine]
) -> None:
    """Run `run.help_with` on plain paths."""
    run.help_with(SafePath.beside(picture), SafePath.at(output), options, engine)


def opened(picture: Path) -> AbstractContextManager[raster.Raster]:
    """Open a picture by its plain path."""
    return raster.opened(SafePath.beside(picture))


def state_of(output: Path, job: dict[str, Any]) -> TileStore:
    """Return the finished tiles in an output folder."""
    return TileStore(SafePath.at(output) / FOLDER, job)


def assembly_of(
    opened_picture: raster.Raster, picture: Path, options: MosaicOptions, output: Path
) -> MosaicAssembly:
    """Return the mosaic in an output folder."""
    return MosaicAssembly(
        opened_picture,
        SafePath.beside(picture),
        options,
        SafePath.at(output) / FOLDER,
        lambda _: None,
    )
