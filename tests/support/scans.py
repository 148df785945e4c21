"""Scans with a clock that the test moves."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake import scanner as scan
from sam_poll.share.intake.scanner import Scanner
from tests.conftest import Share


class Clock:
    """A clock that a test moves; with `step` it also moves at each look at it."""

    def __init__(self, step: float = 0.0) -> None:
        self.now, self.step = 1000.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


class Quiet:
    """In the watcher's place: a scanner that relies on events, of which none comes."""

    stale = False

    def __init__(self, *_: object) -> None: ...

    def watch(self, folders: set[Path]) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "Watcher", Quiet)


def scanner_of(share: Share, clock: Clock, **options: object) -> Scanner:
    return Scanner(
        share.layout, FolderOptions(**{"settle_s": 2.0, **options}), threading.Event(), clock
    )  # type: ignore[arg-type]
