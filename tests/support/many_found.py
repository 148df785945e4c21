"""A process that finds 200 objects, each nearly as large as its picture of 20 megapixels.

    python -m tests.support.many_found FORMAT …

The network is a stand-in: it gives the masks that SAM 3 would, at SAM 3's low resolution. Prints as
JSON the pixels of each mask's box, the bytes of each output, the milliseconds of each stage, and
the memory in MiB at the peak beyond what the process had when the network was there.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from sam_poll.core.protocols import Embedding
from sam_poll.core.types import ConceptRequest, Exemplar, InputTransform, Job, PackedMask, Result
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry
from sam_poll.imaging.automatic_masks import pack
from sam_poll.pipeline.pipeline import Pipeline
from tests.support.pipelines import MemorySource

OBJECTS = 200
WIDTH, HEIGHT = 5184, 3888
_SIDE = 288  # of SAM 3's masks


class FindsMany(FakeEngine):
    """Finds objects that fill the picture, but for a margin of their own."""

    def find(
        self,
        embedding: Embedding,
        texts: Sequence[str],
        exemplars: Sequence[Exemplar],
        *,
        threshold: float,
        most: int,
    ) -> list[list[PackedMask]]:
        """Return the objects for each text, best first."""
        return [[_mask(number, embedding.frame) for number in range(OBJECTS)] for _ in texts]


def _mask(number: int, frame: InputTransform) -> PackedMask:
    """A frame-filling object with a wavy outline."""
    x = np.arange(_SIDE, dtype=np.float32)
    margin = 1 + number % 5 + np.sin(x / 9 + number)
    from_sides = np.minimum(x, _SIDE - 1 - x)
    plane = np.minimum(from_sides[:, None] - margin, from_sides - margin[:, None])
    packed = pack(plane.astype(np.float32), 0.9 - number / 1000, 1.0, frame)
    assert packed is not None
    return packed


def _peak_mib() -> float:
    """The most memory that this process has had; not that of the one that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def _picture() -> bytes:
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    pixels = np.empty((HEIGHT, WIDTH, 3), np.uint8)
    for channel in range(3):
        pixels[..., channel] = (rows % 256).astype(np.uint8) * channel + (columns % 256).astype(
            np.uint8
        )
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def main() -> None:
    """Run the job and print what it took."""
    cv2.setNumThreads(1)
    formats = registry.load(sys.argv[1:], registry.FormatOptions())
    results: list[Result] = []
    pipeline = Pipeline(FindsMany(side=_SIDE), formats, on_result=results.append)
    before = _peak_mib()
    request = ConceptRequest(("thing",), max_objects=OBJECTS)
    source = MemorySource([Job("j", "j.jpg", _picture(), request)])
    pipeline.run(source, threading.Event())
    peak = _peak_mib() - before
    (result,) = results
    boxes = [mask.pixels.size for mask in result.masks]
    outputs = {document.suffix: len(document.body) for document in source.delivered["j"]}
    ms = {stage: round(time) for stage, time in result.timings.items()}
    sys.stdout.write(json.dumps({"boxes": boxes, "outputs": outputs, "mib": peak, "ms": ms}))


if __name__ == "__main__":
    main()
