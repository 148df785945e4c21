"""`python -m benchmarks.first_click`: a first click in CVAT's editor, cold and warm.

The Nuclio function `sam2` is called as Nuclio calls it: by a service that has not seen the picture
(cold), once more (second), and by another service that finds its embedding on the disk (warm).
`--photos` are JPEGs; each round changes their comment, so that the bytes are new and the pixels are
not. A model that is not downloaded gets random weights, which take the same time.

Limitations: CVAT's server, which reads the picture and sends it, is not measured.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from loguru import logger

from sam_poll.diagnostics.bench.checkpoints import weights_for
from sam_poll.imaging import headers
from sam_poll.integrations.nuclio.handler import Service

_SOI = b"\xff\xd8"


class _Log:
    def __getattr__(self, _: str) -> Any:
        return lambda *given: None


def new_bytes(jpeg: bytes, number: int) -> bytes:
    """Return a JPEG with another comment and the same pixels."""
    text = f"picture {number}".encode()
    return _SOI + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + jpeg[2:]


def click(service: Service, picture: bytes) -> tuple[float, float]:
    """Return wall and processor seconds of one request with one click in the middle."""
    size = headers.read_header(picture, max_pixels=1 << 30).size
    request = {
        "image": base64.b64encode(picture).decode(),
        "pos_points": [[size.width // 2, size.height // 2]],
        "neg_points": [],
        "obj_bbox": None,
    }
    context = SimpleNamespace(logger=_Log(), Response=lambda **given: SimpleNamespace(**given))
    event = SimpleNamespace(
        body=json.dumps(request).encode(), headers={"User-Agent": "CVAT/2.73.0"}
    )
    wall, cpu = time.perf_counter(), time.process_time()
    answer = service.interact(context, event)
    seconds = time.perf_counter() - wall, time.process_time() - cpu
    assert answer.status_code == 200, answer.body
    return seconds


def measure(pictures: Sequence[bytes], env: dict[str, str]) -> dict[str, list[tuple[float, float]]]:
    """Return the seconds of clicks by kind; the kinds take turns, picture by picture."""
    found: dict[str, list[tuple[float, float]]] = {"cold": [], "second": [], "warm": []}
    # What the first service has written, the second one, whose memory is empty, finds.
    first, second = (Service.open(_Log(), env) for _ in range(2))
    for picture in pictures:
        found["cold"].append(click(first, picture))
        found["second"].append(click(first, picture))
        found["warm"].append(click(second, picture))
    return found


def main() -> None:
    """Print one line for each kind of click."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--photos", type=Path, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    logger.remove()
    with tempfile.TemporaryDirectory() as folder:
        weights = weights_for(given.model, Path(folder))
        env = {
            **os.environ,
            "SAM_POLL_MODEL": str(weights.path),
            "SAM_POLL_CACHE__DISK_MIB": "4096",
            "SAM_POLL_CACHE__FOLDER": f"{folder}/embeddings",
        }
        if weights.config:
            env["SAM_POLL_MODEL_CFG"] = weights.config
        photos = [path.read_bytes() for path in given.photos]
        pictures = [new_bytes(photo, number) for number in range(given.rounds) for photo in photos]
        found = measure(pictures, env)
        files = [path.stat().st_size for path in Path(folder, "embeddings").iterdir()]
    kind = "random weights" if weights.random else "its own weights"
    print(f"{given.model}, {kind}; {len(pictures)} pictures; {max(files) / 1e6:.1f} MB a file")
    print("| click | p50, ms | from – to | processor, ms |\n|---|---|---|---|")
    for name, seconds in found.items():
        wall, cpu = ([1000 * one[kind] for one in seconds] for kind in (0, 1))
        middle, used = statistics.median(wall), statistics.median(cpu)
        print(f"| {name} | {middle:.0f} | {min(wall):.0f} – {max(wall):.0f} | {used:.0f} |")


if __name__ == "__main__":
    main()
