"""The engines compared with the official predictors, on the same random weights.

Random weights give logits close to zero, which is the most sensitive case for a mask's edge. The
network is compared on the official predictor's own resized picture, where the logits must be exact.
The whole path, with the fast resize, is compared by the final masks at full size, which may differ
in 0.2 % of the pixels.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from sam2.build_sam import build_sam2
from sam2.sam2_image_predictor import SAM2ImagePredictor
from segment_anything import SamPredictor, build_sam_vit_b, sam_model_registry
from segment_anything.modeling import Sam

from sam_poll.core.types import Logits, Picture, Prompt, Size
from sam_poll.engines import edgetam, resolve, sam1, sam2, sam_hq
from sam_poll.engines.base import Features, TorchEngine
from sam_poll.engines.reference import EdgeTamPredictor
from sam_poll.engines.sam1 import Sam1Engine
from sam_poll.engines.sam2 import Sam2Engine
from sam_poll.imaging import masks as geometry
from sam_poll.imaging import rough_shapes
from tests.support.engine_contract import drawn
from tests.support.networks import (
    SMALL_TINY_VIT,
    official_square,
    shaken,
    small_edgetam,
    small_sam1,
    small_sam_hq,
    small_tiny_vit,
)
from tests.support.reference_cases import SIZES, prompts_for, rough_prompts_for

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

DIFFERENT = 0.002  # fraction of the pixels


def arguments(prompt: Prompt) -> dict[str, Any]:
    """Return the prompt as the arguments of both official predictors."""
    points, box = prompt.points, prompt.box
    return {
        "point_coords": np.array([(point.x, point.y) for point in points]) if points else None,
        "point_labels": np.array([point.label for point in points]) if points else None,
        "box": np.array([box.x0, box.y0, box.x1, box.y1]) if box else None,
        "multimask_output": prompt.ambiguous,
    }


class Answer(NamedTuple):
    """The official predictor's best mask at full size, its score, and its small logits."""

    mask: np.ndarray
    score: float
    logits: np.ndarray


def answers(predictor: Any, prompts: list[Prompt], **options: Any) -> list[Answer]:
    """Return the official predictor's answer to each prompt."""
    found = []
    for prompt in prompts:
        masks, scores, logits = predictor.predict(**arguments(prompt), **options)
        best = int(np.argmax(scores))
        found.append(Answer(masks[best] > 0, float(scores[best]), logits[best]))
    return found


def sam2_predictor(model: Any) -> SAM2ImagePredictor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the predictor uses torch.jit.script
        predictor = SAM2ImagePredictor(model)
    side = model.image_size  # the predictor sets the sizes of 1024 pixels
    predictor._bb_feat_sizes = [
        (side // 4, side // 4),
        (side // 8, side // 8),
        (side // 16, side // 16),
    ]
    return predictor


def sam2_pair_of(model: Any) -> tuple[Sam2Engine, SAM2ImagePredictor]:
    """Return engine and predictor with the same weights.

    The predictor gets a copy, because the engine changes how its modules compute.
    """
    predictor = sam2_predictor(copy.deepcopy(model).eval())
    return Sam2Engine(model), predictor


def exact(
    engine: TorchEngine, square: torch.Tensor, frame_of: Sequence[int], prompts: list[Prompt]
) -> list[Logits]:
    """Return the engine's answers on the official predictor's own input."""
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
        # In a picture of a few hundred pixels, one pixel is more than the fraction that may differ.
        assert (mask != answer.mask).sum() <= max(DIFFERENT * mask.size, 3)
        assert logits.score == pytest.approx(answer.score, abs=0.01)


def assert_same_logits(
    found: list[Logits], expected: list[Answer], tolerance: float = 1e-4
) -> None:
    for logits, answer in zip(found, expected, strict=True):
        # Networks with random weights may have tiny logits.
        atol = min(tolerance, 10 * tolerance * np.abs(answer.logits).max())
        np.testing.assert_allclose(logits.pixels.clip(-32, 32), answer.logits, atol=atol)
        assert logits.score == pytest.approx(answer.score, abs=tolerance)


# ── SAM2 ──


def small_sam2(side: int, seed: int = 0) -> Any:
    """Return the demo's architecture with random weights, at any side."""
    config = sam2.read_config(sam2.find_config(str(resolve("demo").config)))
    OmegaConf.update(config, "image_size", side)
    torch.manual_seed(seed)
    return sam2.build(config, "demo")


@pytest.fixture(scope="module", params=[256, 512])
def sam2_pair(request: pytest.FixtureRequest) -> tuple[Sam2Engine, SAM2ImagePredictor]:
    return sam2_pair_of(small_sam2(request.param, seed=request.param))


@pytest.mark.parametrize("size", SIZES)
def test_sam2_gives_the_official_logits_and_masks(
    sam2_pair: tuple[Any, Any], size: tuple[int, int]
) -> None:
    engine, predictor = sam2_pair
    pixels, prompts = drawn(*size), prompts_for(size)
    predictor.set_image(pixels)
    expected = answers(predictor, prompts)
    assert_same_logits(exact(engine, predictor._transforms(pixels)[None], size, prompts), expected)
    assert_same_masks(ours(engine, pixels, prompts), expected)


@pytest.mark.slow
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


def test_sam2_build_equals_the_official_one() -> None:
    official_model = build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu")
    ours = sam2.build(sam2.read_config(sam2.find_config("sam2.1_hiera_t")), "x").eval()
    shapes = [
        {key: value.shape for key, value in model.state_dict().items()}
        for model in (official_model, ours)
    ]
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
            {key: value for key, value in vars(module).items() if isinstance(value, plain)}
            for module in (own, other)
        ]
        assert settings[0] == settings[1], part
    assert ours.sam_mask_decoder.dynamic_multimask_via_stability is True


# ── SAM1 ──


@pytest.fixture(scope="module", params=[256, 400])
def sam1_pair(request: pytest.FixtureRequest) -> tuple[Sam1Engine, SamPredictor]:
    return sam1_pair_of(small_sam1(request.param))


def sam1_pair_of(model: Sam) -> tuple[Sam1Engine, SamPredictor]:
    """Return engine and predictor with the same weights; see `sam2_pair_of`."""
    predictor = SamPredictor(copy.deepcopy(model).eval())
    return Sam1Engine(model), predictor


@pytest.mark.parametrize("size", SIZES)
def test_sam1_gives_the_official_logits_and_masks(
    sam1_pair: tuple[Any, Any], size: tuple[int, int]
) -> None:
    engine, predictor = sam1_pair
    pixels, prompts = drawn(*size), prompts_for(size)
    predictor.set_image(pixels)
    expected = answers(predictor, prompts)
    assert_same_logits(exact(engine, official_square(predictor, pixels), size, prompts), expected)
    assert_same_masks(ours(engine, pixels, prompts), expected)


@pytest.mark.slow
def test_sam1_vit_b_at_full_size_gives_the_official_logits_and_masks() -> None:
    torch.manual_seed(5)
    model = shaken(build_sam_vit_b())
    # Three of the twelve blocks, one of them with global attention: the others take half a
    # minute and do not differ.
    model.image_encoder.blocks = model.image_encoder.blocks[:3]
    engine, predictor = sam1_pair_of(model)
    size = (641, 427)
    pixels, prompts = drawn(*size), prompts_for(size)[:4]
    predictor.set_image(pixels)
    expected, found = answers(predictor, prompts), ours(engine, pixels, prompts)
    assert_same_logits(
        found, expected, tolerance=0.02
    )  # another encode, for the exact path, would take seconds
    assert_same_masks(found, expected)


@pytest.mark.parametrize("size", SIZES)
def test_sam1_frame_equals_the_official_resize(size: tuple[int, int]) -> None:
    engine = Sam1Engine(small_sam1(256))
    height, width = SamPredictor(engine.model).transform.get_preprocess_shape(size[1], size[0], 256)
    frame = engine.frame_for(Size(*size), 256)
    assert frame.region == Size(width, height)
    assert frame.two_step


def test_sam1_build_equals_the_official_one() -> None:
    with torch.device("meta"):
        for name in ("vit_b", "vit_l", "vit_h"):
            expected = sam_model_registry[name]()
            ours = sam1.build(sam1.architecture(expected.state_dict()))
            assert repr(ours) == repr(expected)
            assert {key: value.shape for key, value in ours.state_dict().items()} == {
                key: value.shape for key, value in expected.state_dict().items()
            }
            for own, other in zip(
                ours.image_encoder.blocks, expected.image_encoder.blocks, strict=True
            ):
                assert own.window_size == other.window_size
                assert own.attn.num_heads == other.attn.num_heads
            assert ours.image_encoder.img_size == expected.image_encoder.img_size
            assert (
                vars(ours.prompt_encoder)["input_image_size"]
                == vars(expected.prompt_encoder)["input_image_size"]
            )


# ── SAM-HQ and MobileSAM ──


def hq_predictor(model: Any) -> Any:
    """Return the library's predictor of a copy of the model."""
    from segment_anything_hq import SamPredictor as HqPredictor

    return HqPredictor(copy.deepcopy(model).eval())


@pytest.mark.parametrize(("side", "hq_token_only"), [(256, False), (256, True), (400, False)])
def test_sam_hq_gives_the_librarys_logits_and_masks(side: int, hq_token_only: bool) -> None:
    model = small_sam_hq(side)
    predictor = hq_predictor(model)
    engine = sam_hq.SamHqEngine(model, hq_token_only=hq_token_only)
    for size in SIZES[1:4]:
        pixels, prompts = drawn(*size), prompts_for(size)
        predictor.set_image(pixels)
        expected = answers(predictor, prompts, hq_token_only=hq_token_only)
        square = official_square(predictor, pixels)
        assert_same_logits(exact(engine, square, size, prompts), expected)
        assert_same_masks(ours(engine, pixels, prompts), expected)


def test_sam_hq_takes_the_librarys_default_for_its_token() -> None:
    model = small_sam_hq(256)
    predictor, engine = hq_predictor(model), sam_hq.SamHqEngine(model)
    pixels, prompts = drawn(300, 200), prompts_for((300, 200))
    predictor.set_image(pixels)
    expected = answers(predictor, prompts)
    square = official_square(predictor, pixels)
    assert_same_logits(exact(engine, square, (300, 200), prompts), expected)


@pytest.mark.parametrize("hq", [False, True], ids=["mobile-sam", "sam-hq"])
def test_tiny_vit_gives_the_librarys_logits_and_masks(hq: bool) -> None:
    """At 1024 pixels, because the library has no other side for it."""
    model = small_tiny_vit(hq=hq)
    predictor = hq_predictor(model)
    engine = sam_hq.SamHqEngine(model) if hq else sam_hq.MobileSamEngine(model)
    size = (641, 427)
    pixels, prompts = drawn(*size), prompts_for(size)[::2]
    predictor.set_image(pixels)
    expected = answers(predictor, prompts)
    square = official_square(predictor, pixels)
    assert_same_logits(exact(engine, square, size, prompts), expected, tolerance=1e-3)
    assert_same_masks(ours(engine, pixels, prompts), expected)


@pytest.mark.parametrize(
    "name", ["sam_hq_vit_tiny", "sam_hq_vit_b", "sam_hq_vit_l", "sam_hq_vit_h", "mobile_sam"]
)
def test_sam_hq_build_equals_the_librarys(name: str) -> None:
    import segment_anything_hq as library

    registry, size = library.sam_model_registry, name.removeprefix("sam_hq_")
    if name == "mobile_sam":
        registry, size = library.sam_model_registry_baseline, "vit_tiny"
    # TinyViT cannot be built without weights.
    with torch.device("cpu" if size == "vit_tiny" else "meta"):
        expected = registry[size]()
        found = sam_hq.architecture(expected.state_dict())
        assert found.type == name
        made = sam_hq.build(found)
    assert repr(made) == repr(expected)
    shapes = [
        {key: value.shape for key, value in model.state_dict().items()}
        for model in (made, expected)
    ]
    assert shapes[0] == shapes[1]
    for own, other in zip(made.modules(), expected.modules(), strict=True):
        for setting in ("window_size", "num_heads", "input_resolution", "img_size", "scale"):
            assert getattr(own, setting, None) == getattr(other, setting, None)


def test_tiny_vits_architecture_is_read_from_its_weights() -> None:
    found = sam_hq.architecture(small_tiny_vit(hq=True).state_dict())
    assert found.tiny
    assert found.early_width == SMALL_TINY_VIT["embed_dims"][2]
    assert found.type == "sam_hq"
    expected = {**SMALL_TINY_VIT, "num_heads": [1, 2, 4, 10], "window_sizes": [1, 7, 14, 7]}
    assert found.encoder == expected


# ── EdgeTAM ──


@pytest.mark.parametrize("side", [256, 512])
def test_edgetam_gives_the_librarys_logits_and_masks(side: int) -> None:
    model = small_edgetam(side)
    predictor = EdgeTamPredictor(copy.deepcopy(model), torch.device("cpu"))
    engine = edgetam.EdgeTamEngine(model)
    for size in SIZES[1:3]:
        pixels, prompts = drawn(*size), prompts_for(size)
        predictor.set_image(pixels)
        expected = answers(predictor, prompts)
        assert_same_logits(exact(engine, predictor.square(pixels), size, prompts), expected)
        assert_same_masks(ours(engine, pixels, prompts), expected)


# ── rough shapes ──


def check_rough_shapes(
    engine: TorchEngine, predictor: Any, square_of: Callable[[np.ndarray], Any], **options: Any
) -> None:
    """Compare prompts with rough shapes: the official predictor takes them as `mask_input`."""
    for size in SIZES[:2]:
        pixels, prompts = drawn(*size), rough_prompts_for(size)
        predictor.set_image(pixels)
        square = square_of(pixels)
        frame = engine.frame_for(Size(*size), engine.step.side)
        expected = []
        for prompt in prompts:
            assert prompt.shape is not None
            plane = rough_shapes.mask_input(prompt.shape, frame, frame.side // 4)
            expected += answers(predictor, [prompt], mask_input=plane[None], **options)
        found = exact(engine, square, size, prompts)
        assert_same_masks(ours(engine, pixels, prompts), expected)
        without = exact(engine, square, size, [replace(prompt, shape=None) for prompt in prompts])
        for one, answer, other in zip(found, expected, without, strict=True):
            # Some of these networks have tiny logits.
            tolerance = 1e-3 * np.abs(answer.logits).max()
            np.testing.assert_allclose(one.pixels, answer.logits, atol=tolerance)
            # The shape counts: without it the answer is another.
            assert np.abs(one.pixels - other.pixels).max() > 20 * tolerance


def test_sam2_takes_rough_shapes_as_the_official_predictor_takes_mask_inputs(
    sam2_pair: tuple[Any, Any],
) -> None:
    engine, predictor = sam2_pair
    check_rough_shapes(engine, predictor, lambda pixels: predictor._transforms(pixels)[None])


def test_sam1_takes_rough_shapes_as_the_official_predictor_takes_mask_inputs() -> None:
    model = small_sam1(256)
    predictor = SamPredictor(copy.deepcopy(model).eval())
    check_rough_shapes(Sam1Engine(model), predictor, partial(official_square, predictor))


@pytest.mark.parametrize("hq_token_only", [False, True])
def test_sam_hq_takes_rough_shapes_as_the_librarys_predictor_takes_mask_inputs(
    hq_token_only: bool,
) -> None:
    model = small_sam_hq(256)
    predictor = hq_predictor(model)
    engine = sam_hq.SamHqEngine(model, hq_token_only=hq_token_only)
    square_of = partial(official_square, predictor)
    check_rough_shapes(engine, predictor, square_of, hq_token_only=hq_token_only)


def test_mobile_sam_takes_rough_shapes_as_the_librarys_predictor_takes_mask_inputs() -> None:
    model = small_tiny_vit(hq=False)
    predictor = hq_predictor(model)
    engine = sam_hq.MobileSamEngine(model)
    check_rough_shapes(engine, predictor, partial(official_square, predictor))


def test_edgetam_takes_rough_shapes_as_the_library_takes_mask_inputs() -> None:
    model = small_edgetam(256)
    predictor = EdgeTamPredictor(copy.deepcopy(model), torch.device("cpu"))
    check_rough_shapes(edgetam.EdgeTamEngine(model), predictor, predictor.square)
