"""Engines: the contract, loading, errors of broken models, hangs, devices and precisions."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sam_poll.core.errors import ExitCode, ModelError
from sam_poll.core.protocols import Engine
from sam_poll.core.types import Box, Point, Prompt
from sam_poll.engines import (
    ModelSpec,
    checkpoint,
    devices,
    edgetam,
    load,
    resolve,
    sam1,
    sam2,
    sam_hq,
)
from sam_poll.engines.catalog import MODELS
from sam_poll.engines.fake import FakeEngine
from sam_poll.engines.memory.plan import MemoryStep, cpu_step
from sam_poll.imaging import masks
from tests.support.engine_contract import EngineContract, picture
from tests.support.networks import SMALL_SAM1, small_edgetam, small_sam_hq, small_tiny_vit


@pytest.fixture(scope="module")
def demo() -> Engine:
    return load(resolve("demo"), device="cpu", max_batch=3)


@pytest.fixture(scope="module")
def sam1_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("sam1") / "small_sam.pth"
    torch.save(sam1.build(SMALL_SAM1).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def small_sam1(sam1_file: Path) -> Engine:
    return load(resolve(str(sam1_file)), device="cpu", max_batch=2)


@pytest.fixture(scope="module")
def small_hq() -> Engine:
    return sam_hq.SamHqEngine(small_sam_hq(128), MemoryStep("float32", 4, 2, 128, "cpu"))


@pytest.fixture(scope="module")
def tiny_hq() -> Engine:
    return sam_hq.SamHqEngine(small_tiny_vit(hq=True), MemoryStep("float32", 4, 2, 128, "cpu"))


@pytest.fixture(scope="module")
def mobile_sam() -> Engine:
    return sam_hq.MobileSamEngine(small_tiny_vit(hq=False), MemoryStep("float32", 4, 2, 128, "cpu"))


@pytest.fixture(scope="module")
def small_edge() -> Engine:
    return edgetam.EdgeTamEngine(small_edgetam(256), MemoryStep("float32", 4, 2, 128, "cpu"))


class TestEdgeTam(EngineContract):
    @pytest.fixture
    def engine(self, small_edge: Engine) -> Engine:
        return small_edge


class TestFake(EngineContract):
    @pytest.fixture
    def engine(self) -> Engine:
        return load(resolve("fake"))


class TestSam2(EngineContract):
    @pytest.fixture
    def engine(self, demo: Engine) -> Engine:
        return demo


class TestSam1(EngineContract):
    @pytest.fixture
    def engine(self, small_sam1: Engine) -> Engine:
        return small_sam1


class TestSamHq(EngineContract):
    @pytest.fixture
    def engine(self, small_hq: Engine) -> Engine:
        return small_hq


class TestSamHqWithTinyViT(EngineContract):
    @pytest.fixture
    def engine(self, tiny_hq: Engine) -> Engine:
        return tiny_hq


class TestMobileSam(EngineContract):
    @pytest.fixture
    def engine(self, mobile_sam: Engine) -> Engine:
        return mobile_sam


# ── the fake engine ──


def test_fake_engine_draws_boxes_as_ellipses_and_points_as_discs() -> None:
    engine = FakeEngine()
    [embedding] = engine.encode([engine.prepare(picture(400, 300))])
    box, point, ring = (
        masks.mask_of(logits, "x")
        for logits in engine.decode(
            embedding,
            [
                Prompt(box=Box(100, 50, 300, 250)),
                Prompt(points=(Point(200, 150),)),
                Prompt(points=(Point(200, 150, label=0),), box=Box(100, 50, 300, 250)),
            ],
        )
    )
    assert box.area == pytest.approx(np.pi * 100 * 100, rel=0.01)
    assert (box.left, box.top, *box.pixels.shape) == pytest.approx((100, 50, 200, 200), abs=2)
    assert point.area == pytest.approx(np.pi * (300 / 8) ** 2, rel=0.02)
    assert ring.area == pytest.approx(box.area - point.area, rel=0.02)


def test_fake_engine_raises_an_injected_error_at_the_requested_call() -> None:
    engine = FakeEngine()
    prepared = engine.prepare(picture())
    engine.fail("encode", MemoryError("ordered"), at=2, times=2)
    outcomes = []
    for _ in range(4):
        try:
            outcomes.append(len(engine.encode([prepared])))
        except MemoryError:
            outcomes.append("fault")
    assert outcomes == [1, "fault", "fault", 1]


def test_fake_engine_and_package_work_without_torch() -> None:
    script = """
import sys
from sam_poll.engines import load, resolve
assert load(resolve("fake")).info.family == "fake"
assert "torch" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ── loading ──


def test_load_logs_each_stage() -> None:
    stages: list[str] = []
    load(resolve("demo"), device="cpu", on_stage=lambda name: nullcontext(stages.append(name)))
    assert stages == ["import", "read", "config", "build", "to device", "warm-up"]


def test_demo_model_segments_the_object_of_the_prompt(demo: Engine) -> None:
    flat = np.full((200, 300, 3), (90, 120, 80), np.uint8)
    y, x = np.mgrid[:200, :300]
    truth = np.hypot((x - 150) / 80, (y - 100) / 60) < 1
    flat[truth] = (200, 60, 50)
    source = picture(300, 200)
    [embedding] = demo.encode([demo.prepare(type(source)(flat, source.size, "x"))])
    [logits] = demo.decode(embedding, [Prompt(box=Box(70, 40, 230, 160))])
    found = masks.paste(masks.mask_of(logits, "x"), source.size)
    assert (found & truth).sum() / (found | truth).sum() > 0.9


@pytest.mark.slow
def test_load_leaves_threads_and_environment_unchanged() -> None:
    script = """
import os, threading
import torch
before = torch.get_num_threads(), dict(os.environ), threading.active_count()
from sam_poll.engines import load, resolve
load(resolve("demo"), device="cpu")
after = torch.get_num_threads(), dict(os.environ), threading.active_count()
threads = [
    {key: value for key, value in state[1].items() if "THREADS" in key} for state in (before, after)
]
assert (before[0], before[2]) == (after[0], after[2])  # no watchdog is left waiting
assert threads[0] == threads[1]
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, stderr=subprocess.DEVNULL, timeout=90
    )


@pytest.mark.slow
def test_load_that_hangs_names_the_stage_dumps_stacks_and_exits() -> None:
    script = """
import threading
from sam_poll.engines import checkpoint, load, resolve

def read_from_a_dead_share(path):
    threading.Event().wait(120)

checkpoint.read = read_from_a_dead_share
import torch
import sam_poll.engines.sam2
load(resolve("demo"), device="cpu", load_timeout_s=1.0)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=90
    )
    assert ended.returncode == ExitCode.MODEL
    assert "loading demo hangs in stage `read`" in ended.stderr
    assert "read_from_a_dead_share" in ended.stderr


@pytest.mark.slow
def test_load_that_hangs_with_the_gil_exits_too() -> None:
    script = """
import itertools
from sam_poll.engines import checkpoint, load, loader, resolve
checkpoint.read = lambda path: sum(itertools.repeat(0, 10**15))
loader.BACKSTOP_S = 0.5
import torch
import sam_poll.engines.sam2
load(resolve("demo"), device="cpu", load_timeout_s=0.5)
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=90
    )
    assert ended.returncode != 0
    assert "<string>" in ended.stderr


def test_load_accepts_a_yaml_outside_the_package(tmp_path: Path) -> None:
    demo = resolve("demo")
    assert demo.checkpoint is not None
    assert demo.config is not None
    own = tmp_path / "my config.yaml"
    own.write_text(Path(demo.config).read_text().replace("image_size: 256", "image_size: 320"))
    engine = load(resolve(str(demo.checkpoint), config=str(own)), device="cpu", warmup=False)
    assert engine.info.side == 320
    assert engine.info.name == "demo"


@pytest.mark.parametrize(
    "name",
    [
        "configs/sam2.1/sam2.1_hiera_t.yaml",
        "sam2.1_hiera_t.yaml",
        "sam2.1_hiera_t",
        "configs/sam2.1/sam2.1_hiera_t",
    ],
)
def test_find_config_accepts_all_names_of_packaged_yamls(name: str) -> None:
    assert sam2.find_config(name).parts[-3:] == ("configs", "sam2.1", "sam2.1_hiera_t.yaml")


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.config])
def test_config_of_published_weights_is_derived_from_them(name: str) -> None:
    config = str(MODELS[name].config)
    weights = sam2.build(sam2.read_config(sam2.find_config(config)), config).state_dict()
    assert checkpoint.family_of(weights, "x") == "sam2"
    assert checkpoint.sam2_config_of(weights, "x") == config


def test_find_config_lists_the_packaged_yamls_for_an_unknown_name() -> None:
    with pytest.raises(ModelError, match=r"sam2\.1_hiera_b\+"):
        sam2.find_config("sam2.1_hiera_x.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "model: 3",
        "a: [",
        "model: {_target_: no.such.Thing}",
        "model: {_target_: os.getcwd, x: 1}",
    ],
)
def test_config_that_builds_nothing_is_refused_with_its_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ModelError, match="config") as caught:
        sam2.build(sam2.read_config(path), str(path))
    assert caught.value.place == str(path)


def spec_of(path: Path, **fields: Any) -> ModelSpec:
    return ModelSpec(path.stem, checkpoint=path, **fields)


def bad_files(folder: Path) -> dict[str, Path]:
    """Return a broken checkpoint for each reason."""
    good = resolve("demo").checkpoint
    assert good is not None
    body = good.read_bytes()
    contents = {
        "empty": b"",
        "web page": b"\n<!DOCTYPE html><html><body>Sign in</body></html>",
        "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "truncated": body[: len(body) // 2],
        "cannot be read": b"\x00\x01\x02 nothing of torch's" * 50,
    }
    paths = {}
    for number, (reason, content) in enumerate(contents.items()):
        paths[reason] = folder / f"{number}.pt"
        paths[reason].write_bytes(content)
    return paths


@pytest.mark.parametrize(
    "reason", ["empty", "web page", "LFS pointer", "truncated", "cannot be read"]
)
def test_checkpoint_that_is_broken_is_refused_with_the_reason(tmp_path: Path, reason: str) -> None:
    path = bad_files(tmp_path)[reason]
    with pytest.raises(ModelError, match=reason) as caught:
        load(spec_of(path), device="cpu")
    assert caught.value.place == str(path)
    assert caught.value.remedy


def test_checkpoint_that_could_run_code_is_refused_without_advice_to_load_it(
    tmp_path: Path,
) -> None:
    torch.save(
        {"model": {"a": torch.zeros(1)}, "optimizer": spec_of(tmp_path)}, tmp_path / "training.pt"
    )
    with pytest.raises(ModelError, match="more than weights") as caught:
        load(spec_of(tmp_path / "training.pt"), device="cpu")
    assert "weights_only" not in str(caught.value)
    assert "state_dict" in str(caught.value.remedy)


def test_checkpoint_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load(spec_of(tmp_path / "none.pt"), device="cpu")


def test_load_of_a_model_not_downloaded_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"sam-poll models download sam2\.1_hiera_tiny"):
        load(resolve("sam2.1_hiera_tiny", cache_dir=tmp_path), device="cpu")


class Code:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("was_run"),))


def test_checkpoint_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Code()}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="cannot be read"):
        load(spec_of(tmp_path / "evil.pt"), device="cpu")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    "content", [[1, 2], {"model": {}}, {"epoch": 3, "model": {"a": 1}}, {"a": torch.zeros(1)}]
)
def test_checkpoint_of_other_content_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ModelError, match=r"no state dict|not the weights of SAM1, SAM2"):
        load(spec_of(tmp_path / "x.pt"), device="cpu")


def test_checkpoint_that_does_not_fit_the_config_names_some_keys() -> None:
    demo = resolve("demo")
    assert demo.checkpoint is not None
    with pytest.raises(ModelError, match=r"missing .*image_encoder\.trunk.* more") as caught:
        load(resolve(str(demo.checkpoint), config="sam2.1_hiera_t"), device="cpu")
    assert len(str(caught.value)) < 1500
    assert "name the config" in caught.value.remedy


def test_checkpoint_of_an_unknown_sam2_size_requires_a_config() -> None:
    demo = resolve("demo")
    with pytest.raises(ModelError, match="MODEL_CFG"):
        load(resolve(str(demo.checkpoint)), device="cpu")


def test_load_refuses_a_wrong_family_and_a_wrong_type(sam1_file: Path) -> None:
    with pytest.raises(ModelError, match="sam2 was requested, but these are weights of sam1"):
        load(resolve(str(sam1_file), config="sam2.1_hiera_t"), device="cpu")
    with pytest.raises(
        ModelError, match="vit_b was requested, but the weights are none of the published"
    ):
        load(resolve(str(sam1_file), model_type="vit_b"), device="cpu")
    with pytest.raises(ModelError, match="no model type `vit_x`"):
        load(resolve(str(sam1_file), model_type="vit_x"), device="cpu")


@pytest.fixture(scope="module")
def hq_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of SAM-HQ, of SAM-HQ with TinyViT, and of MobileSAM."""
    models = {
        "vit": small_sam_hq(128),
        "tiny": small_tiny_vit(hq=True),
        "mobile": small_tiny_vit(hq=False),
    }
    folder = tmp_path_factory.mktemp("hq")
    for name, model in models.items():
        torch.save(model.state_dict(), folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in models}


@pytest.mark.parametrize(
    ("name", "family"), [("vit", "sam-hq"), ("tiny", "sam-hq"), ("mobile", "mobile-sam")]
)
def test_checkpoint_by_path_is_told_apart_by_its_weights(
    hq_files: dict[str, Path], name: str, family: str
) -> None:
    engine = load(resolve(str(hq_files[name])), device="cpu", warmup=False)
    assert engine.info.family == family
    assert not engine.info.stretches


def test_loaded_tiny_vit_uses_the_attention_biases_of_its_checkpoint(
    hq_files: dict[str, Path],
) -> None:
    engine = load(resolve(str(hq_files["mobile"])), device="cpu", warmup=False)
    own = sam_hq.MobileSamEngine(small_tiny_vit(hq=False))
    for each in (engine.engine, own):  # type: ignore[attr-defined]
        each.apply(cpu_step(128))
    results = [
        each.decode(each.encode([each.prepare(picture())])[0], [Prompt(points=(Point(30, 40),))])
        for each in (engine.engine, own)  # type: ignore[attr-defined]
    ]
    np.testing.assert_array_equal(results[0][0].pixels, results[1][0].pixels)


def test_tiny_vit_back_in_float32_is_as_before(hq_files: dict[str, Path]) -> None:
    engine = load(resolve(str(hq_files["tiny"])), device="cpu", warmup=False).engine  # type: ignore[attr-defined]
    half = MemoryStep("bfloat16", 1, 1, 128, "cpu")

    def logits() -> np.ndarray:
        [embedding] = engine.encode([engine.prepare(picture())])
        [answer] = engine.decode(embedding, [Prompt(box=Box(10, 20, 90, 70))])
        return answer.pixels

    engine.apply(cpu_step(128))
    before = logits()
    engine.apply(half)
    rounded = logits()
    assert np.abs(rounded - before).max() > 0
    engine.apply(cpu_step(128))
    np.testing.assert_array_equal(logits(), before)


def test_hq_token_only_reaches_the_network(hq_files: dict[str, Path]) -> None:
    def logits(hq_token_only: bool) -> np.ndarray:
        spec = resolve(str(hq_files["vit"]))
        engine = load(spec, device="cpu", warmup=False, hq_token_only=hq_token_only)
        [embedding] = engine.encode([engine.prepare(picture())])
        [answer] = engine.decode(embedding, [Prompt(box=Box(10, 20, 90, 70))])
        return answer.pixels

    assert np.abs(logits(True) - logits(False)).max() > 0


def test_weights_that_do_not_fit_sam_hq_are_refused(
    tmp_path: Path, hq_files: dict[str, Path]
) -> None:
    weights = torch.load(hq_files["vit"], weights_only=True)
    del weights["mask_decoder.hf_mlp.layers.0.weight"]
    weights["mask_decoder.hf_mlp.layers.0.renamed"] = torch.zeros(1)
    torch.save(weights, tmp_path / "x.pth")
    matching = r"missing mask_decoder\.hf_mlp.*; unknown .*renamed"
    with pytest.raises(ModelError, match=matching) as caught:
        load(resolve(str(tmp_path / "x.pth")), device="cpu")
    assert "config" not in caught.value.remedy  # the family has none


def test_family_of_a_model_type_is_checked(hq_files: dict[str, Path], sam1_file: Path) -> None:
    any_size = resolve(str(hq_files["vit"]), model_type="sam_hq")
    assert load(any_size, device="cpu", warmup=False).info.family == "sam-hq"
    spec = resolve(str(hq_files["vit"]), model_type="sam_hq_vit_b")
    with pytest.raises(ModelError, match="sam_hq_vit_b was requested, but the weights are sam_hq"):
        load(spec, device="cpu")
    with pytest.raises(ModelError, match="sam-hq was requested, but these are weights of sam1"):
        load(resolve(str(sam1_file), model_type="sam_hq_vit_b"), device="cpu")
    with pytest.raises(ModelError, match="sam1 was requested, but these are weights of sam-hq"):
        load(resolve(str(hq_files["vit"]), model_type="vit_b"), device="cpu")


@pytest.mark.parametrize("package", ["segment_anything_hq", "timm"])
def test_missing_package_of_sam_hq_is_named_with_its_command(
    hq_files: dict[str, Path], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "segment_anything_hq" or name == "sam_poll.engines.sam_hq":
            monkeypatch.delitem(sys.modules, name)
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModelError, match=package) as caught:
        load(resolve(str(hq_files["mobile"])), device="cpu")
    assert "pip install 'sam_poll[hq]'" in str(caught.value)


@pytest.mark.parametrize("key", ["model", None])
def test_checkpoint_may_be_bare_or_below_model(
    tmp_path: Path, sam1_file: Path, key: str | None
) -> None:
    weights = torch.load(sam1_file, weights_only=True)
    path = tmp_path / "x.pt"
    torch.save({key: weights} if key else weights, path)
    assert load(spec_of(path), device="cpu", warmup=False).info.family == "sam1"


def test_checkpoint_in_the_old_torch_format_is_read(tmp_path: Path, sam1_file: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.load(sam1_file, weights_only=True), path, _use_new_zipfile_serialization=False)
    assert load(spec_of(path), device="cpu", warmup=False).info.family == "sam1"


def test_load_logs_an_unknown_hash_once(sam1_file: Path) -> None:
    from loguru import logger

    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    try:
        load(spec_of(sam1_file), device="cpu", warmup=False)
        load(resolve("demo"), device="cpu", warmup=False)
    finally:
        logger.remove(sink)
    assert sum("no SHA-256 is known" in line for line in lines) == 1


# ── devices and precisions ──


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A simulated GPU, with a torch built for CUDA 13."""
    card = SimpleNamespace(
        capability=(8, 6),
        name="Card",
        built=["sm_75", "sm_80", "sm_86", "sm_90", "sm_120", "compute_120"],
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: card.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: card.name)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: card.built)
    return card


@pytest.mark.parametrize(
    ("capability", "precision", "half"),
    [
        ((7, 0), "float16", "float16"),
        ((7, 5), "float16", "float16"),
        ((8, 0), "bfloat16", "bfloat16"),
        ((8, 9), "bfloat16", "bfloat16"),
        ((9, 0), "bfloat16", "bfloat16"),
        ((6, 1), "float32", "float16"),
    ],
)
def test_choose_derives_the_precision_from_the_gpu(
    card: SimpleNamespace, capability: tuple[int, int], precision: str, half: str
) -> None:
    card.capability = capability
    card.built = ["sm_50", "sm_60", "sm_70", "sm_80", "sm_90"]  # the CUDA 12.6 build
    assert devices.choose("auto", "auto") == devices.Device("cuda:0", precision, half)
    assert devices.choose("cuda:1", "float32") == devices.Device("cuda:1", "float32", half)


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((7, 0), "Tesla V100"),
        ((6, 1), "NVIDIA GeForce GTX 1050 Ti"),
        ((5, 2), "Tesla M40"),
    ],
)
def test_choose_refuses_a_gpu_without_kernels_and_names_the_build(
    card: SimpleNamespace, capability: tuple[int, int], name: str
) -> None:
    card.capability, card.name = capability, name
    with pytest.raises(
        ModelError, match=rf"{name}.*{capability[0]}\.{capability[1]}.*CUDA 12\.6.*cu126"
    ) as caught:
        devices.choose("auto", "auto")
    assert caught.value.exit_code == ExitCode.MODEL


def test_choose_refuses_a_gpu_newer_than_the_build(card: SimpleNamespace) -> None:
    card.capability, card.built = (12, 0), ["sm_70", "sm_90"]
    with pytest.raises(ModelError, match=r"capability 12\.0") as caught:
        devices.choose("cuda", "auto")
    assert "cu126" not in str(caught.value)


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 9), ["sm_80"], True),  # kernels run on a later minor
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((12, 0), ["sm_80", "compute_90"], True),  # compiled when first used
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_100"], True),
        ((6, 1), ["sm_75", "compute_120"], False),
        ((9, 4), [], True),  # ROCm lists none
    ],
)
def test_has_kernels_follows_the_rule_of_cuda(
    capability: tuple[int, int], built: list[str], runs: bool
) -> None:
    assert devices._has_kernels(capability, built) is runs


def test_choose_refuses_a_missing_gpu(card: SimpleNamespace) -> None:
    with pytest.raises(ModelError, match="there are 2 CUDA devices"):
        devices.choose("cuda:2", "auto")


def test_choose_without_gpu_takes_the_cpu_for_auto_and_refuses_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert devices.choose("auto", "auto") == devices.Device("cpu", "float32", None)
    with pytest.raises(ModelError, match="nvidia-smi"):
        devices.choose("cuda", "auto")
    with pytest.raises(ModelError, match="no Apple GPU"):
        devices.choose("mps", "auto")


@pytest.mark.parametrize(
    ("device", "precision"), [("gpu", "auto"), ("cuda:x", "auto"), ("cpu", "half"), ("", "auto")]
)
def test_choose_refuses_unknown_devices_and_precisions(device: str, precision: str) -> None:
    with pytest.raises(ModelError, match="use"):
        devices.choose(device, precision)
