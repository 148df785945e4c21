"""Automatic masks, computed by the book."""

from __future__ import annotations

import tracemalloc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

from sam_poll.core.types import (
    AutomaticMaskRequest,
    BoolArray,
    FloatArray,
    Mask,
    Picture,
    Size,
)
from sam_poll.engines.base import TorchEngine
from sam_poll.imaging import masks
from tests.support.failing_engine import demo
from tools import scenes


@pytest.fixture(scope="module")
def engine() -> TorchEngine:
    return demo()


def of(pixels: Any, digest: str = "x") -> Picture:
    return Picture(pixels, Size(pixels.shape[1], pixels.shape[0]), digest)


def encoded(engine: Any, picture: Picture) -> Any:
    [embedding] = engine.encode([engine.prepare(picture)])
    return embedding


def field(seed: int, height: int, width: int, cells: int, shift: float) -> FloatArray:
    """Logits with smooth parts, specks and steep edges."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.normal(shift, 3, (1, 1, cells, cells)).astype(np.float32))
    plane = F.interpolate(coarse, (height, width), mode="bicubic")[0, 0].numpy()
    return np.ascontiguousarray(plane + random.normal(0, 0.3, plane.shape).astype(np.float32))


def generator(model: Any, asked: AutomaticMaskRequest) -> SAM2AutomaticMaskGenerator:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit.script, which it uses
        made = SAM2AutomaticMaskGenerator(
            model,
            points_per_side=asked.points_per_side,
            pred_iou_thresh=asked.iou,
            stability_score_thresh=asked.stability,
            crop_n_layers=asked.crops,
        )
    side = model.image_size
    made.predictor._bb_feat_sizes = [
        (side // 4, side // 4),
        (side // 8, side // 8),
        (side // 16, side // 16),
    ]
    return made


def full_frames(found: list[Mask], size: Size) -> list[BoolArray]:
    return [masks.paste(mask, size) for mask in found]


def found_again(some: list[BoolArray], among: list[BoolArray], least: float = 0.95) -> int:
    return sum(
        max((scenes.iou(one, other) for other in among), default=0.0) >= least for one in some
    )


def expected_of(made: Any, pixels: Any) -> list[BoolArray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [np.asarray(found["segmentation"], dtype=bool) for found in made.generate(pixels)]


def peak_of(run: Callable[[], Any]) -> int:
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
