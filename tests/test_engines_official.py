"""Our engines against the official predictors on the same random weights, which give logits close to zero: the harshest
case for a mask, whose edge is where they cross it.

The network's path is compared on the official predictor's own resized picture, where it must be exact; the whole path,
fast resize included, by the final masks at full size, which may differ in 0.2 % of the pixels.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor
from segment_anything import SamPredictor, build_sam_vit_b, sam_model_registry
from segment_anything.modeling import Sam

from sam_poll import geometry
from sam_poll.engines import resolve, sam1, sam2
from sam_poll.engines.base import Features, TorchEngine
from sam_poll.engines.sam1 import Sam1Engine
from sam_poll.engines.sam2 import Sam2Engine
from sam_poll.types import Box, Logits, Picture, Point, Prompt, Size
from tests.engine_contract import drawn
from tests.test_engines import SMALL_SAM1

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

SIZES = [(641, 427), (427, 641), (1500, 1001), (33, 21), (640, 640), (301, 900)]
DIFFERENT = 0.002  # part of the pixels


def prompts_for(size: tuple[int, int]) -> list[Prompt]:
    """One of each form, placed by the picture's size, off the pixel grid."""
    width, height = size

    def point(x: float, y: float, label: int = 1) -> Point:
        return Point(x * width, y * height, label)

    box = Box(0.21 * width, 0.13 * height, 0.83 * width, 0.77 * height)
    return [
        Prompt(points=(point(0.5, 0.5),)),
        Prompt(points=(point(0.9, 0.2),)),
        Prompt(points=(point(0.4, 0.5), point(0.6, 0.45), point(0.1, 0.9, 0))),
        Prompt(box=box),
        Prompt(box=Box(0, 0, width, height)),
        Prompt(points=(point(0.5, 0.4), point(0.3, 0.3, 0)), box=box),
    ]


def arguments(prompt: Prompt) -> dict[str, Any]:
    """The prompt as both official predictors take it."""
    points, box = prompt.points, prompt.box
    return {
        "point_coords": np.array([(point.x, point.y) for point in points]) if points else None,
        "point_labels": np.array([point.label for point in points]) if points else None,
        "box": np.array([box.x0, box.y0, box.x1, box.y1]) if box else None,
        "multimask_output": prompt.ambiguous,
    }


class Answer(NamedTuple):
    """The official predictor's best mask by predicted IoU: at full size, its score, its small logits."""

    mask: np.ndarray
    score: float
    logits: np.ndarray


def answers(predictor: Any, prompts: list[Prompt]) -> list[Answer]:
    """What the official predictor makes of each prompt."""
    found = []
    for prompt in prompts:
        masks, scores, logits = predictor.predict(**arguments(prompt))
        best = int(np.argmax(scores))
        found.append(Answer(masks[best] > 0, float(scores[best]), logits[best]))
    return found


def sam2_predictor(model: Any) -> SAM2ImagePredictor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit.script, which it uses
        predictor = SAM2ImagePredictor(model)
    side = model.image_size  # the predictor knows the sizes of 1024 only
    predictor._bb_feat_sizes = [(side // 4, side // 4), (side // 8, side // 8), (side // 16, side // 16)]
    return predictor


def sam2_pair_of(model: Any) -> tuple[Sam2Engine, SAM2ImagePredictor]:
    """Both on the same weights; the official one on a copy, because the engine changes how its modules compute."""
    predictor = sam2_predictor(copy.deepcopy(model).eval())
    return Sam2Engine(model), predictor


def exact(engine: TorchEngine, square: torch.Tensor, frame_of: Sequence[int], prompts: list[Prompt]) -> list[Logits]:
    """Our network on the official predictor's own input."""
    with torch.inference_mode():
        image, high_res = engine._encode(square)
    frame = engine.frame_for(Size(*frame_of), engine.step.side)
    return engine.decode(Features(frame, image, high_res), prompts)


def ours(engine: TorchEngine, pixels: np.ndarray, prompts: list[Prompt]) -> list[Logits]:
    height, width = pixels.shape[:2]
    [embedding] = engine.encode([engine.prepare(Picture(pixels, Size(width, height), "x"))])
    return engine.decode(embedding, prompts)


def assert_same_masks(found: list[Logits], expected: list[Answer]) -> None:
    for logits, answer in zip(found, expected, strict=True):
        mask = geometry.paste(geometry.mask_of(logits, "x"), logits.frame.size)
        assert mask.shape == answer.mask.shape
        # In a picture of a few hundred pixels, a single one is more than the part that may differ.
        assert (mask != answer.mask).sum() <= max(DIFFERENT * mask.size, 3)
        assert logits.score == pytest.approx(answer.score, abs=0.01)


def assert_same_logits(found: list[Logits], expected: list[Answer], tolerance: float = 1e-4) -> None:
    for logits, answer in zip(found, expected, strict=True):
        np.testing.assert_allclose(logits.pixels.clip(-32, 32), answer.logits, atol=tolerance)
        assert logits.score == pytest.approx(answer.score, abs=tolerance)


# -- SAM2 --------------------------------------------------------------------------------------------------------------


def small_sam2(side: int, seed: int = 0) -> Any:
    """The demo's architecture with random weights, at any side."""
    config = sam2.read_config(sam2.find_config(str(resolve("demo").config)))
    OmegaConf.update(config, "image_size", side)
    torch.manual_seed(seed)
    return sam2.build(config, "demo")


@pytest.fixture(scope="module", params=[256, 512])
def sam2_pair(request: pytest.FixtureRequest) -> tuple[Sam2Engine, SAM2ImagePredictor]:
    return sam2_pair_of(small_sam2(request.param, seed=request.param))


@pytest.mark.parametrize("size", SIZES)
def test_sam2_gives_the_official_logits_and_masks(sam2_pair: tuple[Any, Any], size: tuple[int, int]) -> None:
    engine, predictor = sam2_pair
    pixels, prompts = drawn(*size), prompts_for(size)
    predictor.set_image(pixels)
    expected = answers(predictor, prompts)
    assert_same_logits(exact(engine, predictor._transforms(pixels)[None], size, prompts), expected)
    assert_same_masks(ours(engine, pixels, prompts), expected)


def test_sam2_tiny_at_full_size_gives_the_official_logits_and_masks() -> None:
    torch.manual_seed(3)
    model = build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu")
    engine, predictor = sam2_pair_of(model)
    size = (1283, 641)
    pixels, prompts = drawn(*size), prompts_for(size)
    predictor.set_image(pixels)
    expected = answers(predictor, prompts)
    assert_same_logits(exact(engine, predictor._transforms(pixels)[None], size, prompts), expected)
    assert_same_masks(ours(engine, pixels, prompts), expected)


def test_our_build_of_sam2_is_the_official_one() -> None:
    official_model = build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu")
    ours = sam2.build(sam2.read_config(sam2.find_config("sam2.1_hiera_t")), "x").eval()
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (official_model, ours)]
    assert shapes[0] == shapes[1]
    assert repr(ours) == repr(official_model)
    plain = (bool, int, float, str, tuple, list)
    for part in (
        "",
        "sam_mask_decoder",
        "sam_prompt_encoder",
        "image_encoder",
        "image_encoder.trunk",
        "image_encoder.neck",
    ):
        own, other = ours.get_submodule(part), official_model.get_submodule(part)
        settings = [
            {key: value for key, value in vars(module).items() if isinstance(value, plain)} for module in (own, other)
        ]
        assert settings[0] == settings[1], part
    assert ours.sam_mask_decoder.dynamic_multimask_via_stability is True


# -- SAM1 --------------------------------------------------------------------------------------------------------------


def shaken(model: Sam, seed: int = 0) -> Sam:
    """Positions are zeros in a new Sam: give them values, or the test could not tell whether they are used."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weights in model.image_encoder.named_parameters():
            if "pos" in name:
                weights.normal_(std=0.5)
    return model


def small_sam1(side: int) -> Sam:
    torch.manual_seed(side)
    return shaken(sam1.build({**SMALL_SAM1, "img_size": side, "window_size": 5}))


@pytest.fixture(scope="module", params=[256, 400])
def sam1_pair(request: pytest.FixtureRequest) -> tuple[Sam1Engine, SamPredictor]:
    return sam1_pair_of(small_sam1(request.param))


def sam1_pair_of(model: Sam) -> tuple[Sam1Engine, SamPredictor]:
    """Both on the same weights; the official one on a copy: see `sam2_pair_of`."""
    predictor = SamPredictor(copy.deepcopy(model).eval())
    return Sam1Engine(model), predictor


def official_square(predictor: SamPredictor, pixels: np.ndarray) -> torch.Tensor:
    resized = torch.as_tensor(predictor.transform.apply_image(pixels)).permute(2, 0, 1)[None]
    return predictor.model.preprocess(resized)


@pytest.mark.parametrize("size", SIZES)
def test_sam1_gives_the_official_logits_and_masks(sam1_pair: tuple[Any, Any], size: tuple[int, int]) -> None:
    engine, predictor = sam1_pair
    pixels, prompts = drawn(*size), prompts_for(size)
    predictor.set_image(pixels)
    expected = answers(predictor, prompts)
    assert_same_logits(exact(engine, official_square(predictor, pixels), size, prompts), expected)
    assert_same_masks(ours(engine, pixels, prompts), expected)


def test_sam1_vit_b_at_full_size_gives_the_official_logits_and_masks() -> None:
    torch.manual_seed(5)
    model = shaken(build_sam_vit_b())
    # Three of its twelve blocks, one of them with global attention: the others cost half a minute and are no different.
    model.image_encoder.blocks = model.image_encoder.blocks[:3]
    engine, predictor = sam1_pair_of(model)
    size = (641, 427)
    pixels, prompts = drawn(*size), prompts_for(size)[:4]
    predictor.set_image(pixels)
    expected, found = answers(predictor, prompts), ours(engine, pixels, prompts)
    assert_same_logits(found, expected, tolerance=0.02)  # one more encode, for the exact path, would cost seconds
    assert_same_masks(found, expected)


@pytest.mark.parametrize("size", SIZES)
def test_sam1_frames_are_those_of_the_official_resize(size: tuple[int, int]) -> None:
    engine = Sam1Engine(small_sam1(256))
    height, width = SamPredictor(engine.model).transform.get_preprocess_shape(size[1], size[0], 256)
    frame = engine.frame_for(Size(*size), 256)
    assert frame.region == Size(width, height)
    assert frame.two_step


def test_our_build_of_sam1_is_the_official_one() -> None:
    with torch.device("meta"):
        for name in ("vit_b", "vit_l", "vit_h"):
            expected = sam_model_registry[name]()
            ours = sam1.build(sam1.architecture(expected.state_dict()))
            assert repr(ours) == repr(expected)
            assert {key: value.shape for key, value in ours.state_dict().items()} == {
                key: value.shape for key, value in expected.state_dict().items()
            }
            for own, other in zip(ours.image_encoder.blocks, expected.image_encoder.blocks, strict=True):
                assert own.window_size == other.window_size
                assert own.attn.num_heads == other.attn.num_heads
            assert ours.image_encoder.img_size == expected.image_encoder.img_size
            assert vars(ours.prompt_encoder)["input_image_size"] == vars(expected.prompt_encoder)["input_image_size"]
