"""Many found objects, each nearly as large as a large picture, fit in memory."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.many_found import HEIGHT, OBJECTS, WIDTH
from tests.support.paths import ROOT

LIMIT_MIB = 1536


def test_200_objects_as_large_as_20_megapixels_take_1_5_gb_beside_the_model() -> None:
    """In a process of its own, whose peak is nothing else's.

    The masks alone, one byte a pixel, would take 4 GB.
    """
    line = [sys.executable, "-m", "tests.support.many_found", "mask", "opex"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    boxes = told["boxes"]
    assert len(boxes) == OBJECTS
    assert min(boxes) > 0.9 * WIDTH * HEIGHT, "objects that are nearly as large as the picture"
    assert sum(boxes) > 2 * LIMIT_MIB << 20, "a test that full-size masks would not pass"
    assert list(told["outputs"]) == [".mask.png", ".opex.json"]
    assert told["mib"] < LIMIT_MIB
