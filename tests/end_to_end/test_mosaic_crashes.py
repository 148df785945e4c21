"""A daemon that dies, sleeps too long, or meets a full or failing disk at any step of a mosaic:
nothing is lost, nothing answered twice, and what is in `out/` is what an undisturbed daemon
makes."""

from __future__ import annotations

import errno
import os
import sys
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_poll.core.errors import ShareError
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry
from sam_poll.mosaic import assembly, job, tile_store
from sam_poll.pipeline import completion
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.share import source
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.mount_check import PROBE
from sam_poll.share.source import FolderSource
from tests.conftest import BOX, Share
from tests.support import crashes
from tests.support.crashes import (
    PARTS,
    PROCESSES,
    OthersLookDead,
    before_step,
    parts,
    picture_of,
)
from tests.support.mosaic_jobs import NAMES
from tools import mosaics

SIDE, TILE = 112, 64  # four tiles
ASKED = {
    "tile": TILE,
    "padding": 16,
    "points_per_side": 3,
    "min_area": 20,
    "iou": 0.5,
    "stability": 0.5,
}
STEPS = (*crashes.STEPS, "fsync")


@pytest.fixture(autouse=True)
def _more_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crashes, "STEPS", STEPS)
    monkeypatch.setattr(tile_store, "BEGIN_S", 0.1)
    monkeypatch.setattr(assembly, "LONG_S", 0.1)


def fill(share: Share) -> None:
    """A mosaic, and an ordinary prompt for the same picture."""
    drop_mosaic(share, "cam1/ortho", 2)
    share.drop("cam1/ortho.box.json", BOX)


def drop_mosaic(share: Share, stem: str, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    (share.input / stem).parent.mkdir(parents=True, exist_ok=True)
    mosaics.write(share.input / f"{stem}.tif", noise)
    os.utime(share.input / f"{stem}.tif", (seed, seed))  # stats.json tells it
    share.drop(f"{stem}.json", {"mosaic": ASKED})


def run(share: Share, **options: Any) -> Pipeline:
    """Drain the share."""
    chosen = registry.load(["mask"], registry.FormatOptions())
    made = Pipeline(FakeEngine(), chosen, tiled_jobs=partial(job.begin, model="fake"))
    chosen_manners = FolderOptions(
        **{"settle_s": 0.0, "once": True, "mode": "poll", "rescan_s": 0.1, **options}
    )
    with FolderSource(share.layout, chosen_manners) as job_source:
        job_source.device_count = made.device_count
        made.run(job_source, threading.Event())
    return made


def seen(share: Share) -> dict[str, Any]:
    """What the share looks like, without times."""
    found = picture_of(share)
    bodies = found["bodies"]
    assert isinstance(bodies, dict)
    for name in [name for name in bodies if name.endswith(".gpkg")]:
        bodies[name] = len(bodies[name])  # it holds the time at which it was written
    return {
        **{key: _without_probes(value) for key, value in found.items()},
        "scratch": scratch(share),
    }


def _without_probes(found: Any) -> Any:
    """A daemon that dies while it proves the folders leaves an empty, hidden file."""
    if isinstance(found, dict):
        return {name: body for name, body in found.items() if PROBE not in name}
    return [name for name in found if PROBE not in str(name)]


def scratch(share: Share) -> list[str]:
    return [str(path) for path in (share.work / ".sam_poll-mosaic").rglob("*")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], int]:
    """An undisturbed share's picture, and how many steps it took."""
    share = Share(tmp_path_factory.mktemp("undisturbed") / "share")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crashes, "STEPS", STEPS)
        fill(share)
        with before_step(-1, lambda: None) as count:
            run(share)
    return seen(share), count[0]


def test_the_undisturbed_share_has_the_answers(expected: tuple[dict[str, Any], int]) -> None:
    found, steps = expected
    assert (
        found["input"]
        == found["work"]
        == found["claims"]
        == found["scratch"]
        == found["failed"]
        == []
    )
    assert found["output"] == ["cam1/ortho.box.mask.png", *(f"cam1/ortho{name}" for name in NAMES)]
    assert steps > 60


def die_before(number: int, root: Path) -> None:
    """A daemon, in a process of its own, that is gone before this step."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    crashes.STEPS = STEPS
    with before_step(number, lambda: os._exit(9)):
        run(Share(root))


@pytest.mark.slow
@pytest.mark.parametrize("part", parts(0))
def test_a_daemon_may_die_before_any_step_of_a_mosaic(
    part: int, expected: tuple[dict[str, Any], int], tmp_path: Path
) -> None:
    found, steps = expected
    died = 0
    for number in range(part, steps + PARTS, PARTS):
        share = Share(tmp_path / f"{number}" / "share")
        fill(share)
        child = PROCESSES.Process(target=die_before, args=(number, share.root))
        child.start()
        child.join(60)
        died += child.exitcode == 9
        run(share)
        assert {**seen(share), "scratch": []} == found, f"after dying before step {number}"
    assert died


@pytest.mark.slow
@pytest.mark.parametrize("part", parts(1))
def test_a_daemon_may_sleep_before_any_step_of_a_mosaic_while_another_one_does_its_work(
    part: int, expected: tuple[dict[str, Any], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, steps = expected
    slept = 0

    def others_work() -> None:
        """Another daemon, to which everybody else looks dead."""
        nonlocal slept
        slept += 1
        with monkeypatch.context() as patch:
            patch.setattr(source, "LivenessTracker", OthersLookDead)
            run(share, attempts=1000)

    for number in range(part, steps, PARTS):
        share = Share(tmp_path / f"{number}" / "share")
        fill(share)
        with before_step(number, others_work):
            run(share, attempts=1000)
        run(share)
        assert {**seen(share), "scratch": []} == found, f"after sleeping before step {number}"
    assert slept


@pytest.mark.slow
@pytest.mark.parametrize("part", parts(2))
def test_any_step_of_a_mosaic_may_fail_once(
    part: int, expected: tuple[dict[str, Any], int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, steps = expected
    monkeypatch.setattr(completion, "_PAUSE_S", 0.01)
    failed = 0

    def fail() -> None:
        nonlocal failed
        failed += 1
        code = errno.EIO if number // PARTS % 2 else errno.ENOSPC
        raise OSError(code, os.strerror(code))

    for number in range(part, steps, PARTS):
        share = Share(tmp_path / f"{number}" / "share")
        fill(share)
        with (
            suppress(ShareError, OSError),
            before_step(number, fail),
        ):  # it may fail before it has begun
            run(share)
        run(share)
        assert {**seen(share), "scratch": []} == found, f"after step {number} failed"
    assert failed
