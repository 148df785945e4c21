"""Mosaics dropped on a share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_poll.core.types import AutomaticMaskRequest
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry
from sam_poll.mosaic import assembly
from sam_poll.mosaic import job as jobs
from sam_poll.mosaic.segment_tile import Labelled, Passes
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.pipeline.worker_pool import WorkerPool
from sam_poll.share import mosaic_workspace
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.source import FolderSource
from tests.conftest import Share
from tools import mosaics

SIDE, TILE = 400, 64  # 49 tiles


ASKED = {
    "tile": TILE,
    "padding": 16,
    "points_per_side": 4,
    "min_area": 20,
    "iou": 0.5,
    "stability": 0.5,
}


OPTIONS = assembly.MosaicOptions(
    TILE,
    16,
    Passes(AutomaticMaskRequest(points_per_side=4, min_area=20, iou=0.5, stability=0.5)),
    "fake",
)


NAMES = (".labels.geojson", ".labels.gpkg", ".labels.tif", ".stats.json")


def drop_mosaic(share: Share, stem: str = "ortho", seed: int = 1, **asked: Any) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    share.input.joinpath(stem).parent.mkdir(parents=True, exist_ok=True)
    mosaics.write(share.input / f"{stem}.tif", noise)
    share.drop(f"{stem}.json", {"mosaic": ASKED, **asked})


@dataclass
class Eyes:
    """A replacement of `label_window` that is fast, counts windows, and blocks where requested."""

    windows: int = 0
    stops_after: int | None = None
    waits: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)

    def __call__(self, engine: Any, pixels: Any, valid: Any, *_: Any, **__: Any) -> Labelled:
        if self.windows == self.stops_after:
            self.stopped.set()
            assert self.waits.wait(60)
        self.windows += 1
        bright = pixels[..., 0].reshape(-1).mean() > 0
        return Labelled((valid & bright).astype(np.uint16), np.array([0.5], np.float32))


@pytest.fixture
def eyes(monkeypatch: pytest.MonkeyPatch) -> Eyes:
    made = Eyes()
    monkeypatch.setattr(assembly, "label_window", made)
    return made


def pipeline(**more: Any) -> Pipeline:
    chosen = registry.load(["mask"], registry.FormatOptions())
    return Pipeline(FakeEngine(), chosen, tiled_jobs=partial(jobs.begin, model="fake"), **more)


def source(share: Share, **options: Any) -> FolderSource:
    made = FolderSource(
        share.layout,
        FolderOptions(**{"settle_s": 0.0, "mode": "poll", "rescan_s": 0.05, **options}),
    )
    made.device_count = 1
    return made


def drain(share: Share, **more: Any) -> Pipeline:
    made = pipeline(**more)
    with source(share, once=True) as opened:
        made.run(opened, threading.Event())
    return made


@contextmanager
def watching(
    share: Share, made: Pipeline | WorkerPool | None = None, **options: Any
) -> Iterator[threading.Event]:
    """Run a daemon in a thread until the end of the context; the event stops it."""
    stop, running = threading.Event(), made or pipeline()

    def watch() -> None:
        with source(share, **options) as opened:
            opened.device_count = running.device_count
            running.run(opened, stop)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join(60)
        assert not thread.is_alive()


def kept(share: Share) -> list[Path]:
    return list((share.work / mosaic_workspace.FOLDER).glob("*/*/tile-*.npz"))


def answered(share: Share, stem: str = "ortho") -> bool:
    return all((share.output / f"{stem}{name}").is_file() for name in NAMES)
