"""All work outside the network for one large picture on one core: the loop's and ours.

No network runs. Both get the same picture and the same small logits (the loop three of them, as the
predictor makes), so this measures only what surrounds a network, in CPU seconds of the whole
process.

Limitations: CPU seconds leave out waiting (for a flush to a slow disk), which is listed apart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from sam_poll.core.types import (
    AutomaticMaskRequest,
    FloatArray,
    InputTransform,
    Job,
    Logits,
    ModelInfo,
    OutputFile,
    Result,
    Size,
)
from sam_poll.diagnostics.bench import naive_loop
from sam_poll.diagnostics.bench.dataset import layout_in
from sam_poll.engines.base import resize_pixels
from sam_poll.formats import registry
from sam_poll.imaging import decode
from sam_poll.imaging import masks as geometry
from sam_poll.prompts import parser
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.source import FolderSource

STAGES = ("decode", "prepare", "masks", "contours, JSON", "PNG", "share")
SIDE = 1024  # what SAM2's encoder sees
_LOW = SIDE // 4  # side of the decoder's logits
_MODEL = ModelInfo("none", "sam2", SIDE, "cpu", "float32", "none")


class Clock:
    """CPU and wall seconds by stage."""

    def __init__(self) -> None:
        self.cpu = dict.fromkeys(STAGES, 0.0)
        self.wall = dict.fromkeys(STAGES, 0.0)

    def __call__(self, stage: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.cpu[stage] += time.process_time() - cpu
        self.wall[stage] += time.perf_counter() - wall
        return result


def blob() -> FloatArray:
    """Make logits like a trained network's of one object: a blob with an uneven edge.

    It covers a fifth of the picture.
    """
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:_LOW, 0:_LOW] / _LOW - 0.5
    uneven = cv2.resize(
        rng.standard_normal((40, 40)).astype(np.float32),
        (_LOW, _LOW),
        interpolation=cv2.INTER_CUBIC,
    )
    return np.asarray(10 * (1 - np.hypot(x, y) / 0.26) + uneven, dtype=np.float32)


class LoopSide:
    """The loop's stages."""

    def __init__(self) -> None:
        from sam2.utils.transforms import SAM2Transforms

        self._transforms = SAM2Transforms(resolution=SIDE, mask_threshold=0.0)
        self._low = torch.from_numpy(blob())[None, None].repeat(1, 3, 1, 1)

    @torch.inference_mode()
    def run(self, picture: Path, prompt: Path, out: Path) -> Clock:
        """One picture, its answer into the folder `out`."""
        clock, stem = Clock(), picture.stem
        rgb = clock("decode", lambda: naive_loop.read(picture))
        clock("prepare", lambda: self._transforms(rgb))
        masks = clock("masks", lambda: self._masks(rgb.shape[:2]))
        lines = clock("contours, JSON", lambda: naive_loop.lines_around(masks[0] > 0))
        objects = [{"score": 0.9, "polygon": line} for line in lines]
        clock("contours, JSON", lambda: naive_loop.write_json(objects, out / f"{stem}.json"))
        clock(
            "PNG",
            lambda: naive_loop.write_png(
                (masks[0] > 0).astype(np.uint8) * 255, out / f"{stem}.png"
            ),
        )
        return clock

    def _masks(self, shape: tuple[int, ...]) -> Any:
        """As SAM2ImagePredictor.predict ends: three masks at full size, cut, as float32 numpy."""
        found = self._transforms.postprocess_masks(self._low, shape) > 0
        return found.squeeze(0).float().detach().cpu().numpy()


class OurSide:
    """Our stages, through a folder door on a share of its own."""

    def __init__(self, root: Path) -> None:
        self._layout = layout_in(root)
        options = registry.FormatOptions()
        self._png, self._json = registry.load(["mask", "opex"], options)
        self._low = blob()
        self._source = FolderSource(self._layout, FolderOptions(mode="events"))
        self._source.__enter__()
        self._jobs: Generator[Job, None, None] = self._source.jobs(threading.Event())

    def run(self, picture: Path, prompt: Path, out: Path) -> Clock:
        """One pair, moved into the share and answered there; `out` is not used."""
        clock = Clock()
        picture.rename(self._layout.input.path / picture.name)
        prompt.rename(self._layout.input.path / prompt.name)
        job = clock("share", lambda: next(self._jobs))
        assert not isinstance(job.prompts, AutomaticMaskRequest)
        seen = clock(
            "decode", lambda: decode.decode(job.picture.read_bytes(), min_decode_side=SIDE)
        )
        prompts = parser.fit(job.prompts, seen.size)
        clock("prepare", lambda: resize_pixels(seen.pixels, Size(SIDE, SIDE)))
        logits = Logits(
            self._low, 0.9, InputTransform(seen.size, SIDE, Size(SIDE, SIDE), two_step=False)
        )
        mask = clock("masks", lambda: geometry.mask_of(logits, "object"))
        result = Result(job.id, job.name, seen.size, (mask,), prompts, _MODEL, picture=seen)
        documents: list[OutputFile] = [*clock("contours, JSON", lambda: self._json(result))]
        documents += clock("PNG", lambda: self._png(result))
        clock("share", lambda: self._source.deliver(job, documents))
        return clock

    def close(self) -> None:
        """Leaves the share."""
        with closing(self._jobs):
            pass
        self._source.__exit__(None, None, None)
