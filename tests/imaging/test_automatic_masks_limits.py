"""Everything mode where it could break: which points are clicked, tiny and wide pictures, ties,
edges, many objects.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from segment_anything.utils import amg
from torch import Tensor

from sam_poll.core.protocols import Embedding
from sam_poll.core.types import (
    AutomaticMaskRequest,
    Box,
    InputTransform,
    Mask,
    ModelInput,
    PackedMask,
    Picture,
    Size,
)
from sam_poll.engines.base import Features, TorchEngine
from sam_poll.engines.fake import FakeEngine
from sam_poll.engines.kernels.mask_filter import filter_masks
from sam_poll.imaging import automatic_masks
from tests.support.automatic_masks import (
    encoded,
    expected_of,
    field,
    found_again,
    full_frames,
    generator,
    of,
    peak_of,
)
from tests.support.failing_engine import demo
from tools import scenes, train_demo


@pytest.fixture(scope="module")
def network() -> TorchEngine:
    return demo()


class Clicked(FakeEngine):
    """Remembers the clicks, and in a picture of which size they were."""

    def __init__(self) -> None:
        super().__init__()
        self.clicks: list[tuple[Size, float, float]] = []

    def candidates(
        self,
        embedding: Embedding,
        points: Sequence[tuple[float, float]],
        *,
        iou: float,
        stability: float,
    ) -> list[PackedMask]:
        self.clicks += [(embedding.frame.size, x, y) for x, y in points]
        return super().candidates(embedding, points, iou=iou, stability=stability)


# ── which points ──


@pytest.mark.parametrize("crops", [0, 1])
def test_only_wanted_points_are_clicked_and_they_are_given_in_the_pictures_pixels(
    crops: int,
) -> None:
    picture = of(np.zeros((400, 600, 3), np.uint8))
    engine = Clicked()
    asked = AutomaticMaskRequest(4, 0, crops=crops)
    embedding = encoded(engine, picture)
    found = automatic_masks.segment(
        engine, embedding, asked, picture=picture, wanted=lambda x, y: x > 500
    )
    whole = [(x, y) for size, x, y in engine.clicks if size == picture.size]
    assert whole == [(x, y) for x, y in automatic_masks.grid(4, picture.size) if x > 500]
    assert len(engine.clicks) == (12 if crops else 4), (
        "and one of four columns in two of the four crops"
    )
    assert found
    engine.clicks.clear()
    assert (
        automatic_masks.segment(
            engine, embedding, asked, picture=picture, wanted=lambda x, y: False
        )
        == []
    )
    assert engine.clicks == []


# ── what the libraries' generators find ──


class AsTheirs:
    """An engine whose pictures are reduced as the library's predictor does, so that only the steps
    after it differ.
    """

    def __init__(self, engine: TorchEngine, predictor: Any) -> None:
        self.engine, self.predictor = engine, predictor
        self.info, self.candidates = engine.info, engine.candidates

    def prepare(self, picture: Picture) -> ModelInput:
        frame = self.engine.frame_for(picture.size, self.engine.step.side)
        return ModelInput(picture.pixels, frame, picture.digest)

    def encode(self, pictures: Sequence[ModelInput]) -> list[Features]:
        [picture] = pictures
        with torch.inference_mode():
            square = self.predictor._transforms(np.ascontiguousarray(picture.pixels))[None]
            return [Features(picture.frame, *self.engine._encode(square))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "size", "difficulty", "radius", "points", "crops"),
    [
        (1003, (253, 215), 0.154, (12, 60), 12, 0),  # candidates close to the least stability
        (779, (64, 48), 0.2, (5, 12), 8, 0),  # boxes of few pixels, just about the same
        (2000, (232, 351), 0.394, (12, 60), 5, 1),  # one ends 21 pixels before its crop does
        (
            2006,
            (203, 455),
            0.335,
            (12, 60),
            5,
            1,
        ),  # one has nearly the same box as one that its crop cuts off
    ],
)
def test_in_each_scene_the_generators_objects_are_found_and_no_others(
    seed: int,
    size: tuple[int, int],
    difficulty: float,
    radius: tuple[int, int],
    points: int,
    crops: int,
    network: TorchEngine,
) -> None:
    asked = AutomaticMaskRequest(points, 0, 0.8, 0.7, crops)
    scene = scenes.draw(
        seed, size, difficulty, count=(3, 9 if min(size) > 100 else 5), radius=radius
    )
    made = generator(train_demo.build(weights=train_demo.DEMO / "demo.pt").eval(), asked)
    theirs = expected_of(made, scene.pixels)
    engine: Any = AsTheirs(network, made.predictor)
    picture = of(scene.pixels)
    found = automatic_masks.segment(engine, encoded(engine, picture), asked, picture=picture)
    ours = full_frames(automatic_masks.masks(found, asked), scene.size)
    assert len(theirs) >= 3
    assert found_again(theirs, ours) >= 0.95 * len(theirs)
    assert found_again(ours, theirs) >= 0.95 * len(ours)


def counted(plane: Tensor, frame: InputTransform) -> float:
    if frame.two_step:
        side = (frame.side, frame.side)
        plane = F.interpolate(plane[None, None], side, mode="bilinear", align_corners=False)[0, 0]
        plane = plane[: frame.region.height, : frame.region.width]
    size = (frame.size.height, frame.size.width)
    large = F.interpolate(plane[None, None], size, mode="bilinear", align_corners=False)
    return float(amg.calculate_stability_score(large[0], 0.0, 1.0)[0].nan_to_num(0))


@pytest.mark.parametrize("size", [Size(60, 40), Size(5, 4), Size(1, 1), Size(300, 20)])
@pytest.mark.parametrize("padded", [True, False])
def test_stability_close_to_the_threshold_is_that_of_the_pixels(size: Size, padded: bool) -> None:
    planes = torch.from_numpy(np.stack([8 * field(seed, 64, 64, 4, -3.0) for seed in range(100)]))
    region = (
        Size(*(max(1, int(length * 256 / max(size) + 0.5)) for length in size))
        if padded
        else Size(256, 256)
    )
    frame = InputTransform(size, 256, region, two_step=padded)
    expected = [counted(plane, frame) for plane in planes]
    threshold = float(np.median(expected)) - 1e-4
    _, scores, _ = filter_masks(planes, torch.arange(100.0) + 1, frame, 0, threshold)
    assert scores.tolist() == [
        1.0 + index for index, value in enumerate(expected) if value >= threshold
    ]


def candidate(box: tuple[int, int, int, int], score: float, size: Size) -> PackedMask:
    frame = InputTransform(size, 64, Size(64, 64), False)
    return PackedMask(
        Box(*box),
        score,
        1.0,
        frame,
        Size(16, 16),
        (0, 0, 1, 1),
        np.zeros(1, np.uint8),
        np.zeros(0, np.float32),
        size,
    )


def edges() -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(
        st.sampled_from([0, 5, 19, 20, 21, 22, 60]),
        st.sampled_from([100, 178, 179, 180, 181, 195, 200]),
    )


@given(edges(), edges(), st.sampled_from([(0, 0), (100, 0), (400, 200), (30, 15)]))
def test_a_mask_is_cut_off_by_its_crop_where_it_is_for_the_libraries(
    across: tuple[int, int], down: tuple[int, int], corner: tuple[int, int]
) -> None:
    crop = (*corner, corner[0] + 200, corner[1] + 200)
    last = torch.tensor([[across[0], down[0], across[1] - 1, down[1] - 1]])
    [cut_off] = amg.is_box_near_crop_edge(last, list(crop), [0, 0, 600, 400]).tolist()
    placed = automatic_masks._placed(
        candidate((across[0], down[0], across[1], down[1]), 0.9, Size(200, 200)),
        crop,
        Size(600, 400),
    )
    assert (placed is None) == cut_off


def test_a_mask_that_its_crop_cuts_off_takes_no_other_with_it() -> None:
    class Two(FakeEngine):
        def candidates(
            self, embedding: Any, points: Any, *, iou: float, stability: float
        ) -> list[PackedMask]:
            width, height = embedding.frame.size
            if width == 600:
                return []
            right, bottom = width - 30, height - 30
            return [
                candidate((30, 30, width, bottom), 0.95, embedding.frame.size),
                candidate((30, 30, right, bottom), 0.9, embedding.frame.size),
            ]

    picture, engine = of(np.zeros((400, 600, 3), np.uint8)), Two()
    found = automatic_masks.segment(
        engine, encoded(engine, picture), AutomaticMaskRequest(1, 0, crops=1), picture=picture
    )
    # On the right the surer one touches the picture's own edge, and stays.
    assert sorted(one.score for one in found) == [0.9, 0.9, 0.95, 0.95]


# ── much at once ──


def test_tens_of_thousands_of_objects_side_by_side_are_separated_in_seconds() -> None:
    random = np.random.default_rng(0)
    low = random.integers(0, 5000, (20_000, 2))
    boxes = np.concatenate([low, low + random.integers(20, 60, (20_000, 2))], axis=1).astype(
        np.float64
    )
    started = time.process_time()
    kept = automatic_masks.distinct(boxes, range(len(boxes)))
    assert time.process_time() - started < 5, "each with each takes 17 s"
    assert 19_000 < len(kept) < 20_000


def test_what_cannot_be_made_less_is_not_looked_at_again_after_each_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Dots(FakeEngine):
        def candidates(
            self, embedding: Any, points: Any, *, iou: float, stability: float
        ) -> list[PackedMask]:
            size = embedding.frame.size
            return [
                candidate((int(x), int(y), int(x) + 1, int(y) + 1), 0.9, size) for x, y in points
            ]

    looks: list[int] = []
    real = automatic_masks._best
    monkeypatch.setattr(automatic_masks, "ROOM_BYTES", 1)
    monkeypatch.setattr(
        automatic_masks, "_best", lambda found: looks.append(len(found)) or real(found)
    )
    picture, engine = of(np.zeros((640, 640, 3), np.uint8)), Dots()
    found = automatic_masks.segment(engine, encoded(engine, picture), AutomaticMaskRequest(64, 0))
    assert len(found) == 64 * 64
    assert len(looks) <= 12, "of 256 calls"


def test_cleaning_a_mask_takes_six_bytes_a_pixel() -> None:
    pixels = np.ones((1500, 2000), bool)
    pixels[:50, :50] = pixels[1000:1005, 1000:1005] = False
    pixels[5:8, 5:8] = True
    mask = Mask("x", 0.5, 0, 0, pixels)
    cleaned: list[Mask] = []
    assert (
        peak_of(lambda: cleaned.append(automatic_masks._clean(mask, Size(2000, 1500), 100)[0]))
        < 6.5 * pixels.size
    )
    assert cleaned[0].area == pixels.size - 50 * 50


# ── tiny and wide ──


@pytest.mark.parametrize(
    "size", [Size(1, 1), Size(3, 2), Size(16, 16), Size(1, 3000), Size(5000, 20)]
)
def test_the_masks_of_a_picture_of_any_shape_lie_in_it_and_none_is_empty(
    size: Size, network: TorchEngine
) -> None:
    engine, asked = network, AutomaticMaskRequest(3, 0, 0, 0, crops=1)
    pixels = np.random.default_rng(1).integers(0, 255, (size.height, size.width, 3), dtype=np.uint8)
    found = automatic_masks.segment(engine, encoded(engine, of(pixels)), asked, picture=of(pixels))
    for mask in automatic_masks.masks(found, asked):
        height, width = mask.pixels.shape
        assert mask.area > 0
        assert 0 <= mask.left < mask.left + width <= size.width
        assert 0 <= mask.top < mask.top + height <= size.height
    assert not automatic_masks.masks(
        found, AutomaticMaskRequest(3, min_area=size.width * size.height + 1)
    )


@pytest.mark.parametrize("box", [(0, 0, 1, 1), (3, 4, 30, 5), (3, 4, 4, 50)])
def test_of_masks_of_the_same_line_of_pixels_one_stays(box: tuple[int, int, int, int]) -> None:
    found = [candidate(box, score, Size(100, 100)) for score in (0.8, 0.9, 0.7)]
    assert [one.score for one in automatic_masks._best(found)] == [0.9]
