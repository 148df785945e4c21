"""Mosaics of pictures that a test names by plain paths, as the command line does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from sam_poll.mosaic import run, source
from sam_poll.mosaic.run import OnStep, Wish
from sam_poll.mosaic.state import FOLDER, State
from sam_poll.mosaic.work import Work
from sam_poll.safe_path import SafePath
from sam_poll.types import Engine


def mosaic(
    picture: Path, output: Path, wish: Wish, engine: Callable[[], Engine], on_step: OnStep = lambda _: None
) -> dict[str, Any]:
    """Run `run.mosaic` on plain paths."""
    return run.mosaic(SafePath.beside(picture), SafePath.at(output), wish, engine, on_step)


def lend_a_hand(picture: Path, output: Path, wish: Wish, engine: Callable[[], Engine]) -> None:
    """Run `run.lend_a_hand` on plain paths."""
    run.lend_a_hand(SafePath.beside(picture), SafePath.at(output), wish, engine)


def opened(picture: Path) -> AbstractContextManager[source.Source]:
    """Open a picture by its plain path."""
    return source.opened(SafePath.beside(picture))


def state_of(output: Path, job: dict[str, Any]) -> State:
    """Return the finished tiles that lie in an output folder."""
    return State(SafePath.at(output) / FOLDER, job)


def work_of(opened_picture: source.Source, picture: Path, wish: Wish, output: Path) -> Work:
    """Return the mosaic that is at work in an output folder."""
    return Work(opened_picture, SafePath.beside(picture), wish, SafePath.at(output) / FOLDER, lambda _: None)
