"""Helper processes of one mosaic: all compute tiles, none is required, none outlives the first."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from loguru import logger
from typer.testing import CliRunner

from sam_poll.cli.main import app
from sam_poll.core.errors import ModelError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import AutomaticMaskRequest
from sam_poll.engines.fake import FakeEngine
from sam_poll.mosaic import run
from sam_poll.mosaic.assembly import MosaicOptions
from sam_poll.mosaic.helpers import HelperSpec, run_helpers
from sam_poll.mosaic.segment_tile import Passes
from sam_poll.mosaic.tile_store import FOLDER
from tests.conftest import wait_until
from tests.support.mosaic_paths import mosaic
from tests.support.paths import ROOT
from tools import mosaics

OPTIONS = MosaicOptions(
    64,
    16,
    Passes(AutomaticMaskRequest(points_per_side=4, min_area=20, iou=0.5, stability=0.5)),
    "fake",
)
FLAGS = [
    "--tile",
    "64",
    "--padding",
    "16",
    "-m",
    "fake",
    "--stability",
    "0.5",
    "--points-per-side",
    "4",
]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    mosaics.write(
        tmp_path / "a.tif", np.random.default_rng(1).integers(0, 255, (400, 400, 3), np.uint8)
    )
    return tmp_path / "a.tif"


def no_network() -> FakeEngine:
    raise ModelError("its weights are gone", remedy="bring them back")


def env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


@contextmanager
def warnings() -> Iterator[list[str]]:
    said: list[str] = []
    sink = logger.add(lambda message: said.append(str(message)), level="WARNING")
    try:
        yield said
    finally:
        logger.remove(sink)


def tiles(output: Path) -> int:
    return len(list((output / FOLDER).glob("*/*.npz")))


@pytest.mark.slow
def test_helper_process_computes_the_remaining_tiles(picture: Path) -> None:
    out = picture.parent / "out"
    with (
        warnings() as said,
        run_helpers(
            [HelperSpec("cpu", SafePath.beside(picture), SafePath.at(out), OPTIONS, FakeEngine)],
            env(),
        ),
    ):
        wait_until(lambda: tiles(out) == 49, 60)
    expected = mosaic(picture, picture.parent / "alone", OPTIONS, FakeEngine)
    assert mosaic(picture, out, OPTIONS, no_network) == expected, (
        "a tile was left, or made otherwise"
    )
    assert (out / run.RASTER).read_bytes() == (picture.parent / "alone" / run.RASTER).read_bytes()
    assert not said


@pytest.mark.slow
def test_helper_process_that_fails_is_logged_and_others_compute_its_tiles(picture: Path) -> None:
    helper = HelperSpec(
        "cuda:1", SafePath.beside(picture), SafePath.at(picture.parent / "out"), OPTIONS, no_network
    )
    with warnings() as said, run_helpers([helper], env()):
        wait_until(lambda: said, 60)
        assert mosaic(picture, picture.parent / "out", OPTIONS, FakeEngine)["tiles"] == 49
    [line] = said
    assert "cuda:1" in line
    assert "its weights are gone (bring them back)" in line
    assert "other processes compute its tiles" in line


@pytest.mark.slow
def test_command_with_several_devices_gives_the_result_of_one(picture: Path) -> None:
    for name, devices in (("one", "cpu"), ("two", "cpu, cpu")):
        words = [
            "mosaic",
            str(picture),
            "-o",
            str(picture.parent / name),
            *FLAGS,
            "--devices",
            devices,
        ]
        assert CliRunner().invoke(app, words, env=env()).exit_code == 0
    assert (picture.parent / "one" / run.RASTER).read_bytes() == (
        picture.parent / "two" / run.RASTER
    ).read_bytes()


def children(parent: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(words[1]) == parent:
            found.append(int(path.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_helper_processes_end_with_the_first(picture: Path, blow: signal.Signals) -> None:
    mosaics.write(picture, np.random.default_rng(1).integers(0, 255, (3000, 3000, 3), np.uint8))
    out = picture.parent / "out"
    words = [
        sys.executable,
        "-m",
        "sam_poll",
        "mosaic",
        str(picture),
        "-o",
        str(out),
        *FLAGS,
        "--devices",
        "cpu,cpu",
    ]
    first = subprocess.Popen(words, env=env(), start_new_session=True)
    try:
        wait_until(lambda: tiles(out) >= 3 and children(first.pid), 60)
        others = children(first.pid)
        first.send_signal(blow)
        first.wait(60)
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in others), 60)
    finally:
        first.kill()
    assert tiles(out) < 2209
