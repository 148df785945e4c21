"""SAM 3: the contract of engines, the library's own answers, and folders that are refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Sam3Model, Sam3Processor, Sam3TrackerModel

from sam_poll.core.errors import ExitCode, ModelError, PromptError
from sam_poll.core.protocols import Engine
from sam_poll.core.types import Box, ConceptRequest, Exemplar, Point, Polygon, Prompt
from sam_poll.engines import catalog, checkpoint, hub, identity, load, resolve, sam3
from sam_poll.engines.memory.adaptive import AdaptiveEngine
from sam_poll.engines.memory.plan import MemoryPlan, MemoryStep, ladder
from sam_poll.engines.reference import ReferencePredictor
from sam_poll.imaging import found_objects, masks, rough_shapes
from tests.support import tiny_sam3
from tests.support.commands import Run
from tests.support.engine_contract import EngineContract, picture
from tests.support.failing_engine import Failing

SIZE = (400, 300)
ROUGH = [
    Polygon(((30, 40), (280, 60), (150, 190))),
    Polygon(((200, 50), (280, 60), (290, 190), (210, 180))),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sam3.save(tmp_path_factory.mktemp("models") / "tiny", scale=100)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> AdaptiveEngine:
    engine = load(resolve(str(folder)), device="cpu", max_batch=2)
    assert isinstance(engine, AdaptiveEngine)
    return engine


@pytest.fixture(scope="module")
def bare(folder: Path) -> sam3.Sam3Engine:
    return sam3.Sam3Engine(sam3.read(folder))


class TestSam3(EngineContract):
    @pytest.fixture
    def engine(self, loaded: Engine) -> Engine:
        return loaded


def find(
    engine: Engine, texts: Sequence[str], exemplars: Sequence[Exemplar] = (), **more: Any
) -> list[list[Any]]:
    [embedding] = engine.encode([engine.prepare(picture(*SIZE))])
    options = {"threshold": 0.0, "most": 100, **more}
    return engine.find(embedding, texts, exemplars, **options)


# ── the library's own answers ──


@pytest.mark.parametrize(
    ("texts", "exemplars"),
    [
        (["dog"], []),
        (["dog", "yellow bus", "a"], []),
        (["dog"], [Exemplar(Box(40, 30, 200, 150)), Exemplar(Box(5, 5, 60, 60), 0)]),
        ([""], [Exemplar(Box(40, 30, 200, 150))]),
    ],
    ids=["text", "texts", "text and exemplars", "exemplars"],
)
def test_objects_masks_and_scores_are_those_of_the_librarys_post_processing(
    folder: Path, bare: sam3.Sam3Engine, texts: list[str], exemplars: list[Exemplar]
) -> None:
    detector = Sam3Model.from_pretrained(folder).eval()
    processor = Sam3Processor.from_pretrained(folder)
    source = picture(*SIZE)
    prepared = bare.prepare(source)
    boxes: dict[str, Any] = {}
    if exemplars:
        corners = [[b.x0, b.y0, b.x1, b.y1] for b in (one.box for one in exemplars)]
        boxes = {"input_boxes": [corners], "input_boxes_labels": [[e.label for e in exemplars]]}
    for text, found in zip(texts, find(bare, texts, exemplars), strict=True):
        inputs = processor(images=source.pixels, text=text or None, return_tensors="pt", **boxes)
        sizes = inputs.pop("original_sizes").tolist()
        # The same pixels: this program resizes pictures in another way.
        inputs["pixel_values"] = bare._square([prepared])
        with torch.inference_mode():
            output = detector(**inputs)
        [expected] = processor.post_process_instance_segmentation(output, 0.0, 0.5, sizes)
        order = expected["scores"].argsort(descending=True, stable=True)
        scores = expected["scores"][order].tolist()
        assert len(found) == len(scores) == tiny_sam3.QUERIES
        assert [one.score for one in found] == pytest.approx(scores, abs=1e-5)
        for one, truth in zip(found, expected["masks"][order].bool().numpy(), strict=True):
            mask = masks.mask_of(found_objects.unpacked(one), text)
            ours = masks.paste(mask, source.size)
            assert (ours & truth).sum() / (ours | truth).sum() >= 0.995


def test_points_and_boxes_are_answered_by_the_tracker(folder: Path, bare: sam3.Sam3Engine) -> None:
    tracker = Sam3TrackerModel.from_pretrained(folder).eval()
    # As many levels as it uses: else it adds its embedding of "no memory" to the one it drops.
    tracker.vision_encoder.neck.fpn_layers = tracker.vision_encoder.neck.fpn_layers[: sam3.LEVELS]
    source = picture(*SIZE)
    prepared = bare.prepare(source)
    [embedding] = bare.encode([prepared])
    scale = np.array([tiny_sam3.SIDE / SIZE[0], tiny_sam3.SIDE / SIZE[1]])
    point, box = np.array([50.0, 40.0]) * scale, np.array([[20, 30], [300, 200]]) * scale
    cases: list[tuple[Prompt, dict[str, Any]]] = [
        (
            Prompt(points=(Point(50, 40),)),
            {
                "input_points": torch.tensor([[[point.tolist()]]]).float(),
                "input_labels": torch.tensor([[[1]]]),
                "multimask_output": True,
            },
        ),
        (
            Prompt(box=Box(20, 30, 300, 200)),
            {
                "input_boxes": torch.tensor([[box.ravel().tolist()]]).float(),
                "multimask_output": False,
            },
        ),
        *(
            (
                Prompt(box=Box(20, 30, 300, 200), shape=shape),
                {
                    "input_boxes": torch.tensor([[box.ravel().tolist()]]).float(),
                    "input_masks": torch.from_numpy(
                        rough_shapes.mask_input(shape, prepared.frame, 4 * (tiny_sam3.SIDE // 14))
                    )[None, None],
                    "multimask_output": False,
                },
            )
            for shape in ROUGH
        ),
    ]
    together = bare.decode(embedding, [prompt for prompt, _ in cases])
    for (prompt, arguments), batched in zip(cases, together, strict=True):
        with torch.inference_mode():
            output = tracker(pixel_values=bare._square([prepared]), **arguments)
        best = int(output.iou_scores[0, 0].argmax())
        [logits] = bare.decode(embedding, [prompt])
        assert logits.score == pytest.approx(float(output.iou_scores[0, 0, best]), abs=1e-5)
        expected = output.pred_masks[0, 0, best].numpy()
        tolerance = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(logits.pixels, expected, atol=tolerance)
        np.testing.assert_allclose(batched.pixels, expected, atol=tolerance)


def test_the_reference_predictor_is_the_librarys_tracker(
    folder: Path, bare: sam3.Sam3Engine
) -> None:
    source = picture(*SIZE)
    reference = ReferencePredictor(folder, None, "cpu")
    assert reference.family == "sam3"
    [embedding] = bare.encode([bare.prepare(source)])
    for prompt in (Prompt(box=Box(20, 30, 300, 200)), Prompt(points=(Point(50, 40),))):
        mask, score = reference(source.pixels, prompt)
        [logits] = bare.decode(embedding, [prompt])
        # The library resizes pictures in another way, and random weights have logits around zero.
        assert logits.score == pytest.approx(score, abs=0.01)
        ours = masks.paste(masks.mask_of(logits, "x"), source.size)
        assert (ours != mask).mean() < 0.05


# ── what is computed, and how often ──


def test_several_texts_in_one_call_are_each_text_alone(bare: sam3.Sam3Engine) -> None:
    texts = ["dog", "yellow bus", "person in red"]
    exemplars = [Exemplar(Box(40, 30, 200, 150))]
    together = find(bare, texts, exemplars)
    alone = [found for text in texts for found in find(bare, [text], exemplars)]
    for some, others in zip(together, alone, strict=True):
        assert [one.score for one in some] == pytest.approx([o.score for o in others], abs=1e-5)
    assert together[0][0].score != pytest.approx(together[1][0].score, abs=1e-6)


def test_a_picture_is_encoded_once_and_a_text_once(
    bare: sam3.Sam3Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name, module in (
        ("image", bare.model.image_encoder),
        ("text", bare.model.detector.text_encoder),
    ):
        forward = module.forward
        monkeypatch.setattr(
            module,
            "forward",
            lambda *a, name=name, forward=forward, **k: (calls.append(name), forward(*a, **k))[1],
        )
    [embedding] = bare.encode([bare.prepare(picture(*SIZE))])
    [other] = bare.encode([bare.prepare(picture(*SIZE, seed=1))])
    for one in (embedding, other):
        for _ in range(2):
            bare.find(one, ["lamp", "tree"], [], threshold=0.5, most=3)
    assert calls == ["image", "image", "text", "text"]


def test_exemplars_change_what_is_found_and_alone_stand_for_the_text_visual(
    bare: sam3.Sam3Engine,
) -> None:
    like = [Exemplar(Box(40, 30, 200, 150))]
    unlike = [Exemplar(Box(40, 30, 200, 150), 0)]
    found = [find(bare, ["dog"], some)[0][0].score for some in ((), like, unlike)]
    assert len({round(score, 6) for score in found}) == 3
    [alone], [named] = find(bare, [""], like), find(bare, ["visual"], like)
    assert [one.score for one in alone] == [one.score for one in named]


def test_objects_exceed_the_threshold_come_best_first_and_are_at_most_so_many(
    bare: sam3.Sam3Engine,
) -> None:
    [everything] = find(bare, ["dog"])
    scores = [one.score for one in everything]
    assert scores == sorted(scores, reverse=True)
    assert [one.score for one in find(bare, ["dog"], most=3)[0]] == scores[:3]
    some = find(bare, ["dog"], threshold=scores[4])[0]
    assert [one.score for one in some] == scores[:4]
    assert find(bare, ["dog"], threshold=1.0) == [[]]


def test_a_text_of_more_tokens_than_the_network_takes_is_refused(bare: sam3.Sam3Engine) -> None:
    # The tokenizer has a token for each letter; two more mark the ends.
    bare.check_concept(ConceptRequest(("a", "a" * 30)))
    with pytest.raises(PromptError) as caught:
        bare.check_concept(ConceptRequest(("a", "a" * 31)))
    assert caught.value.place == "text[1]"
    assert "33 tokens, the model takes 32" in caught.value.reason


# ── precision and memory ──


@pytest.mark.slow
def test_half_precision_is_close_and_float32_comes_back_exactly(folder: Path) -> None:
    engine = sam3.Sam3Engine(sam3.read(folder), weights=sam3.reader(folder))
    exemplars = [Exemplar(Box(40, 30, 200, 150))]
    whole = find(engine, ["dog"], exemplars)[0]
    [embedding] = engine.encode([engine.prepare(picture(*SIZE))])
    engine.apply(MemoryStep("bfloat16", 2, 1, tiny_sam3.SIDE, "cpu"))
    [half_embedding] = engine.encode([engine.prepare(picture(*SIZE))])
    assert half_embedding.nbytes == embedding.nbytes // 2
    half = find(engine, ["dog", "cat"], exemplars)[0]
    assert half[0].score == pytest.approx(whole[0].score, abs=0.02)
    assert len(engine.decode(half_embedding, [Prompt(points=(Point(50, 40),))])) == 1
    # The positions in the image encoder are fractions that bfloat16 cannot hold.
    layer = engine.model.image_encoder.backbone.layers[0]
    assert layer.position_ids.dtype == torch.float32
    assert layer.attention.q_proj.weight.dtype == torch.bfloat16
    engine.apply(MemoryStep("float32", 2, 1, tiny_sam3.SIDE, "cpu"))
    again = find(engine, ["dog"], exemplars)[0]
    assert [one.score for one in again] == [one.score for one in whole]


def test_the_ladder_has_no_smaller_sides(loaded: AdaptiveEngine) -> None:
    first = MemoryStep("float32", 64, 8, 1008, "cuda:0")
    plan = loaded.plan
    assert plan._min_side == tiny_sam3.SIDE
    steps = ladder(first, min_side=1008, half="float16")
    assert {step.side for step in steps} == {1008}
    assert steps[-1].device == "cpu"
    assert any(step.prompts_per_call == 1 for step in steps)


@pytest.mark.parametrize("place", ["_detect", "_text_features", "_exemplars"])
def test_out_of_memory_gives_the_same_answer_with_fewer_texts_a_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    engine = sam3.Sam3Engine(sam3.read(folder))
    first = MemoryStep("float32", 4, 1, tiny_sam3.SIDE, "cpu")
    adaptive = AdaptiveEngine(engine, MemoryPlan(first, min_side=tiny_sam3.SIDE))
    texts = ["dog", "cat", "yellow bus", "lamp", "tree"]
    expected = find(adaptive, texts)
    engine._texts.clear()
    failing = Failing(monkeypatch, engine, place, times=1)
    found = find(adaptive, texts)
    assert failing.left == 0
    assert adaptive.ooms == 1
    assert (engine.step.prompts_per_call, engine.step.batch) == (1, 1)
    for some, others in zip(found, expected, strict=True):
        assert [one.score for one in some] == pytest.approx([o.score for o in others], abs=1e-5)


# ── folders ──


def test_a_folder_is_a_model_with_a_fingerprint_of_its_files(folder: Path, tmp_path: Path) -> None:
    spec = resolve(str(folder))
    assert (spec.name, spec.checkpoint) == ("tiny", folder)
    assert checkpoint.family_of_folder(folder) == "sam3"
    name, _, fingerprint = identity(spec).partition("@")
    assert name == "tiny"
    assert len(fingerprint) == 16
    other = tiny_sam3.save(tmp_path / "tiny", seed=1)
    assert identity(resolve(str(other))) not in (identity(spec), "tiny")


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("detector_model.text_encoder.text_model.", "detector_model.text_model.", "text_encoder"),
        ("detector_model.vision_encoder.backbone.", "backbone.", "vision_encoder.backbone"),
        ("tracker_model.mask_decoder.", "tracker_model.decoder.", "mask_decoder"),
        ("tracker_neck.", "tracker_model.neck.", "vision_encoder.neck"),
    ],
)
def test_renamed_weights_refuse_the_model_and_are_named(
    tmp_path: Path, old: str, new: str, named: str
) -> None:
    tiny_sam3.rename(tiny_sam3.save(tmp_path), old, new)
    with pytest.raises(ModelError, match="the weights do not fit") as caught:
        sam3.read(tmp_path)
    assert named in caught.value.reason
    assert "missing" in caught.value.reason
    assert caught.value.place == str(tmp_path)
    assert caught.value.remedy


def test_weights_of_another_size_and_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    folder = tiny_sam3.save(tmp_path / "tiny")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_queries": 10', '"num_queries": 12'))
    with pytest.raises(ModelError):
        sam3.read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        sam3.read(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError) as caught:
        load(resolve(str(tmp_path / "empty")), device="cpu")
    assert "config.json" in str(caught.value)


# ── the hub ──


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, without a token, and without the network."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "hub"


def test_a_model_of_the_hub_is_loaded_from_the_hubs_cache(hub_cache: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub_cache / "models--facebook--sam3"
    tiny_sam3.save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    spec = resolve("facebook/sam3")
    assert spec.family == "sam3"
    assert identity(spec) == f"facebook/sam3@{commit[:16]}"
    engine = load(spec, device="cpu", warmup=False)
    assert engine.info.name == "facebook/sam3"
    assert find(engine, ["dog"])


def test_without_a_token_nothing_is_downloaded_and_the_remedy_is_named(hub_cache: Path) -> None:
    with pytest.raises(ModelError, match="accepted its licence, and there is no token") as caught:
        catalog.download("facebook/sam3")
    assert "HF_TOKEN" in str(caught.value.remedy)
    assert "https://huggingface.co/facebook/sam3" in str(caught.value.remedy)
    with pytest.raises(ModelError, match="sam-poll models download facebook/sam3"):
        load(resolve("facebook/sam3"), device="cpu")


def test_the_licence_and_its_limits_are_named_by_list_and_by_the_first_download(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    listed = Run("models", "list")
    (row,) = [line for line in listed.out.splitlines() if line.startswith("facebook/sam3 ")]
    assert "SAM License" in row
    assert "forbids military use" in listed.err
    refused = Run("models", "download", "facebook/sam3")
    assert refused.code == ExitCode.MODEL
    assert refused.err.count("forbids military use") == 1
    assert "HF_TOKEN" in refused.err
    assert hub.MODELS["facebook/sam3"].gated
