"""Synchronous predictions: the pipeline's answers, cached pictures, one thread on the device."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch

from sam_poll import engines
from sam_poll.config import settings
from sam_poll.core.errors import (
    DeviceError,
    DeviceOutOfMemoryError,
    InputError,
    PictureError,
    PromptError,
)
from sam_poll.core.protocols import Engine
from sam_poll.core.types import AutomaticMaskRequest, Box, Point, Prompt, Size
from sam_poll.engines import sam1, sam_hq
from sam_poll.engines.fake import FakeEngine
from sam_poll.engines.memory.plan import MemoryStep, cpu_step
from sam_poll.engines.sam1 import Sam1Engine
from sam_poll.imaging import masks as geometry
from sam_poll.pipeline.predictor import PICTURES, Predictor, PreparedImage
from sam_poll.runtime import builders
from tests.conftest import Share, picture_bytes
from tests.support.networks import small_sam_hq, small_tiny_vit
from tools import scenes

CLICK = (Prompt(points=(Point(20, 20),)),)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return engines.load(engines.resolve("demo"), device="cpu", precision="float32")


@pytest.fixture(scope="module")
def scene() -> scenes.Scene:
    return scenes.draw(41, difficulty=0, count=(2, 2), kinds=["ellipse", "rectangle"])


def side_of(known: PreparedImage) -> int | None:
    return known.prepared and known.prepared.frame.side


def test_the_predictor_answers_what_the_pipeline_answers(
    engine: Engine, scene: scenes.Scene, share: Share
) -> None:
    jpeg = cv2.imencode(".jpg", scene.pixels[..., ::-1])[1].tobytes()
    boxes = [scenes.box_of(mask) for mask in scene.masks]
    asked = {"objects": [{"box": {"x0": b.x0, "y0": b.y0, "x1": b.x1, "y1": b.y1}} for b in boxes]}
    share.drop("scene.jpg", jpeg)
    share.drop("scene.json", json.dumps(asked))
    share.run_once(engine)
    written = cv2.imread(str(share.output / "scene.mask.png"), cv2.IMREAD_UNCHANGED)
    predictor = Predictor(engine)
    masks = predictor.predict(predictor.embed(jpeg), [Prompt(box=box) for box in boxes])
    for number, mask in enumerate(masks, 1):
        np.testing.assert_array_equal(geometry.paste(mask, scene.size), written == number)


def test_a_file_and_its_pixels_get_the_same_masks(engine: Engine, scene: scenes.Scene) -> None:
    predictor, asked = Predictor(engine), [Prompt(box=scenes.box_of(scene.mask(1)))]
    png = cv2.imencode(".png", scene.pixels[..., ::-1])[1].tobytes()
    (first,), (second,) = (
        predictor.predict(predictor.embed(given), asked) for given in (png, scene.pixels)
    )
    assert (first.left, first.top, first.score) == (second.left, second.top, second.score)
    np.testing.assert_array_equal(first.pixels, second.pixels)


def test_labels_and_order_are_those_of_the_prompts() -> None:
    predictor = Predictor(FakeEngine())
    asked = [
        Prompt("dog", points=(Point(20, 20),)),
        Prompt("cat", box=Box(1, 1, 9, 9)),
        Prompt("cow", points=(Point(5, 5),)),
    ]
    assert [mask.label for mask in predictor.predict(predictor.embed(picture_bytes()), asked)] == [
        "dog",
        "cat",
        "cow",
    ]


def test_the_same_content_is_decoded_and_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, decoded = FakeEngine(), []
    predictor = Predictor(engine)
    read = predictor._read
    monkeypatch.setattr(predictor, "_read", lambda *given: decoded.append(1) or read(*given))
    data, pixels = picture_bytes(), np.zeros((48, 64, 3), np.uint8)
    for given in (data, bytes(bytearray(data)), pixels, pixels.copy()):
        predictor.embed(given)
    assert (len(decoded), engine.calls["encode"]) == (2, 2)


def test_pixels_of_another_shape_are_another_picture() -> None:
    engine = FakeEngine()
    predictor = Predictor(engine)
    sizes = [
        predictor.embed(np.zeros(shape, np.uint8)).size for shape in ((48, 64, 3), (64, 48, 3))
    ]
    assert sizes == [Size(64, 48), Size(48, 64)]
    assert engine.calls["encode"] == 2


def test_an_evicted_embedding_is_made_again_without_the_file() -> None:
    engine = FakeEngine()
    predictor = Predictor(engine)
    known = predictor.embed(picture_bytes())
    assert predictor._embeddings.evict()
    assert len(predictor.predict(known, CLICK)) == 1
    assert engine.calls["encode"] == 2


def test_memory_for_pictures_and_embeddings_is_bounded() -> None:
    predictor = Predictor(FakeEngine(), cache_mib=0)
    for seed in range(PICTURES + 5):
        predictor.embed(picture_bytes(seed=seed))
    assert len(predictor._pictures) == PICTURES
    assert len(predictor._embeddings._kept) == 1


def test_a_picture_prepared_for_a_smaller_side_is_prepared_again_when_memory_is_back() -> None:
    engine = FakeEngine(side=128)
    predictor = Predictor(engine)
    data = picture_bytes()
    assert side_of(predictor.embed(data)) == 128
    engine.step = FakeEngine(side=256).step
    assert side_of(predictor.embed(data)) == 256


class Watched(FakeEngine):
    """Tells when two are on the device at once."""

    def __init__(self) -> None:
        super().__init__()
        self.here, self.together = threading.Lock(), 0

    def decode(self, *given: object, **more: object) -> object:  # type: ignore[override]
        if not self.here.acquire(blocking=False):
            self.together += 1
            return super().decode(*given, **more)  # type: ignore[arg-type]
        try:
            return super().decode(*given, **more)  # type: ignore[arg-type]
        finally:
            self.here.release()


def test_one_thread_at_a_time_uses_the_device_and_each_gets_its_own_answer() -> None:
    engine = Watched()
    predictor = Predictor(engine)
    pictures = [picture_bytes(seed=seed) for seed in range(3)]

    def ask(number: int) -> tuple[int, int]:
        known = predictor.embed(pictures[number % 3])
        (mask,) = predictor.predict(
            known, [Prompt(box=Box(number, number, number + 10, number + 10))]
        )
        return mask.left, mask.top

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(30))) == [(number, number) for number in range(30)]
    assert engine.together == 0


def test_after_a_device_failure_every_call_raises_it_again() -> None:
    engine = FakeEngine()
    predictor = Predictor(engine)
    known = predictor.embed(picture_bytes())
    engine.fail("decode", DeviceError("CUDA error"))
    for _ in range(2):
        with pytest.raises(DeviceError, match="CUDA error"):
            predictor.predict(known, CLICK)
    with pytest.raises(DeviceError):
        predictor.embed(picture_bytes(seed=1))
    assert engine.calls == {"encode": 1, "decode": 1}


def test_another_error_does_not_affect_the_next_call() -> None:
    engine = FakeEngine()
    predictor = Predictor(engine)
    engine.fail("encode", DeviceOutOfMemoryError("out of memory"))
    with pytest.raises(DeviceOutOfMemoryError):
        predictor.embed(picture_bytes())
    known = predictor.embed(picture_bytes())
    with pytest.raises(PromptError):
        predictor.predict(known, [Prompt(points=(Point(5000, 1),))])
    assert len(predictor.predict(known, CLICK)) == 1


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((40, 40, 3), np.uint8),
    ],
)
def test_arrays_that_are_not_rgb_or_too_large_raise_picture_error(pixels: np.ndarray) -> None:
    with pytest.raises(PictureError):
        Predictor(FakeEngine(), max_pixels=1000).embed(pixels)


@pytest.mark.slow
def test_automatic_masks_find_each_shape_once(engine: Engine, scene: scenes.Scene) -> None:
    predictor = Predictor(engine)
    masks = predictor.everything(
        predictor.embed(scene.pixels), AutomaticMaskRequest(points_per_side=12), "thing"
    )
    assert {mask.label for mask in masks} == {"thing"}
    for truth in scene.masks:
        assert max(scenes.iou(geometry.paste(mask, scene.size), truth) for mask in masks) > 0.8


# ── SAM1's embedding ──


@pytest.fixture(scope="module")
def small_sam1() -> Sam1Engine:
    """SAM1 with the smallest possible encoder: side 1024, an embedding of 256 × 64 × 64."""
    torch.manual_seed(0)
    parameters = {
        "depth": 1,
        "embed_dim": 32,
        "img_size": 1024,
        "mlp_ratio": 1.0,
        "num_heads": 1,
        "patch_size": 16,
    }
    more = {"global_attn_indexes": [], "window_size": 8, "out_chans": 256}
    return Sam1Engine(sam1.build({**parameters, **more}), cpu_step(1024))


def test_the_embedding_is_what_the_library_computes(small_sam1: Sam1Engine) -> None:
    from segment_anything import SamPredictor

    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    predictor = Predictor(small_sam1)
    made = predictor.image_embedding(predictor.embed(pixels))
    assert (made.shape, made.dtype) == ((1, 256, 64, 64), np.float32)
    assert made.flags.c_contiguous
    official = SamPredictor(small_sam1.model)
    official.set_image(pixels)
    expected = official.get_image_embedding().cpu().numpy()
    assert np.abs(made - expected).mean() < 0.02 * np.abs(expected).mean()


def test_sam2_embeddings_are_not_handed_out(engine: Engine, scene: scenes.Scene) -> None:
    predictor = Predictor(engine)
    with pytest.raises(InputError, match="SAM2"):
        predictor.image_embedding(predictor.embed(scene.pixels))


def test_mobile_sams_embeddings_are_handed_out_and_sam_hqs_are_not() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    mobile = Predictor(sam_hq.MobileSamEngine(small_tiny_vit(hq=False)))
    assert mobile.image_embedding(mobile.embed(pixels)).shape == (1, 256, 64, 64)
    hq = Predictor(sam_hq.SamHqEngine(small_sam_hq(128)))
    with pytest.raises(InputError, match="early feature map") as refused:
        hq.image_embedding(hq.embed(pixels))
    assert "mobile_sam" in str(refused.value.remedy)


def test_an_embedding_of_a_smaller_side_raises_device_out_of_memory_error() -> None:
    predictor = Predictor(FakeEngine(side=512))
    with pytest.raises(DeviceOutOfMemoryError, match="512"):
        predictor.image_embedding(predictor.embed(picture_bytes()))


# ── from settings ──


def test_a_predictor_is_made_from_settings_as_the_daemon_is() -> None:
    made = builders.predictor_of(
        settings.load(None, flags={"model": "fake", "limits": {"picture_mpx": 0.001}}, env={})
    )
    assert made.info.family == "fake"
    with pytest.raises(PictureError):
        made.embed(picture_bytes())


def test_the_pipeline_decodes_at_the_same_scale(share: Share) -> None:
    seen: list[tuple[int, ...]] = []

    class Seeing(FakeEngine):
        def prepare(self, picture):  # type: ignore[no-untyped-def]
            seen.append(picture.pixels.shape)
            return super().prepare(picture)

    data = picture_bytes(width=2048, height=1536)
    share.drop("a.jpg", data)
    share.drop("a.json", json.dumps({"points": [{"x": 20, "y": 20}]}))
    share.run_once(Seeing())
    Predictor(Seeing()).embed(data)
    assert seen == [(384, 512, 3)] * 2


# ── on a card ──


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_card_answers_what_the_cpu_answers_from_any_thread(
    precision: str, engine: Engine, scene: scenes.Scene
) -> None:
    card = Predictor(engines.load(engines.resolve("demo"), device="cuda", precision=precision))
    cpu, asked = Predictor(engine), [Prompt(box=scenes.box_of(mask)) for mask in scene.masks]
    expected = cpu.predict(cpu.embed(scene.pixels), asked)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: card.predict(card.embed(scene.pixels), asked), range(8)):
            assert all(
                geometry.iou(one, other) > 0.97 for one, other in zip(found, expected, strict=True)
            )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_an_embedding_leaves_the_card_as_float32() -> None:
    parameters = {
        "depth": 1,
        "embed_dim": 32,
        "img_size": 1024,
        "mlp_ratio": 1.0,
        "num_heads": 1,
        "patch_size": 16,
    }
    more = {"global_attn_indexes": [], "window_size": 8, "out_chans": 256}
    step = MemoryStep("float16", 64, 1, 1024, "cuda:0")
    predictor = Predictor(Sam1Engine(sam1.build({**parameters, **more}), step))
    made = predictor.image_embedding(predictor.embed(np.zeros((48, 64, 3), np.uint8)))
    assert (made.shape, made.dtype) == ((1, 256, 64, 64), np.float32)
    assert np.isfinite(made).all()
