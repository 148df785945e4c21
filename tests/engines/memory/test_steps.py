"""Changes of the step of a real network: side, precision, call sizes; injected memory errors."""

from __future__ import annotations

import copy
import shutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sam_poll.core.errors import DeviceError, DeviceOutOfMemoryError, ModelError
from sam_poll.core.protocols import Engine
from sam_poll.core.types import Box, Mask, Picture, Point, Prompt, Size
from sam_poll.engines import devices, load, resolve, sam1
from sam_poll.engines.base import TorchEngine
from sam_poll.engines.memory.adaptive import AdaptiveEngine
from sam_poll.imaging import masks as geometry
from tests.support.engine_contract import BOX, CLICK, PROMPTS, assert_close, picture
from tests.support.networks import SMALL_SAM1, needs_cuda

SCENE = Size(300, 200)
ELLIPSE = Prompt(box=Box(70, 40, 230, 160))


def scene() -> tuple[Picture, np.ndarray]:
    """Return a picture of an ellipse, which the demo model knows, and its mask."""
    pixels = np.full((200, 300, 3), (90, 120, 80), np.uint8)
    y, x = np.mgrid[:200, :300]
    truth = np.hypot((x - 150) / 80, (y - 100) / 60) < 1
    pixels[truth] = (200, 60, 50)
    return Picture(pixels, SCENE, "ellipse"), truth


def iou(mask: Mask, truth: np.ndarray) -> float:
    found = geometry.paste(mask, SCENE)
    return float((found & truth).sum() / (found | truth).sum())


def loaded(**options: Any) -> tuple[AdaptiveEngine, TorchEngine]:
    adaptive = load(resolve("demo"), device="cpu", warmup=False, **options)
    assert isinstance(adaptive, AdaptiveEngine)
    engine: Any = adaptive.engine
    return adaptive, engine


def small_sam1() -> sam1.Sam1Engine:
    torch.manual_seed(0)
    model = sam1.build({**SMALL_SAM1, "img_size": 512})
    model.image_encoder.pos_embed.data.normal_()
    return sam1.Sam1Engine(model)


def failing(
    monkeypatch: pytest.MonkeyPatch, module: Any, fits: Callable[[torch.Tensor], bool]
) -> list[tuple[int, ...]]:
    """Make `module` run out of memory when its input is too large; return the shapes of inputs."""
    seen: list[tuple[int, ...]] = []
    forward = module.forward

    def guarded(*args: Any, **keywords: Any) -> Any:
        tensor = args[0] if args else keywords["sparse_prompt_embeddings"]
        seen.append(tuple(tensor.shape))
        if not fits(tensor):
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 4 GiB"
            )
        return forward(*args, **keywords)

    monkeypatch.setattr(module, "forward", guarded)
    return seen


@pytest.mark.parametrize("side", [128, 192, 512])
def test_weights_work_at_another_side_as_if_built_for_it(side: int, tmp_path: Path) -> None:
    _, engine = loaded()
    demo = resolve("demo")
    own = tmp_path / "own.yaml"
    own.write_text(
        Path(str(demo.config)).read_text().replace("image_size: 256", f"image_size: {side}")
    )
    built_for_it = load(replace(demo, config=str(own)), device="cpu", warmup=False)
    source, truth = scene()
    engine.apply(replace(engine.step, side=side))
    [embedding] = engine.encode([engine.prepare(source)])
    assert embedding.frame.side == side
    [logits] = engine.decode(embedding, [ELLIPSE])
    assert logits.pixels.shape == (side // 4, side // 4)
    [expected] = built_for_it.encode([built_for_it.prepare(source)])
    assert_close(
        engine.decode(embedding, PROMPTS), built_for_it.decode(expected, PROMPTS), tolerance=1e-5
    )
    # 128 and 512 are far from the side the small model was trained at: the mask is rough, but
    # in the right place.
    assert iou(geometry.mask_of(logits, "x"), truth) > (0.85 if side == 192 else 0.6)
    assert engine.info.side == side
    assert str(side) in engine.info.step


def test_sam1_works_at_another_side_and_comes_back_unchanged() -> None:
    engine = small_sam1()
    prepared = engine.prepare(picture(400, 300))
    [before] = engine.encode([prepared])
    expected = engine.decode(before, PROMPTS)
    for side in (256, 128):
        engine.apply(replace(engine.step, side=side))
        [embedding] = engine.encode([engine.prepare(picture(400, 300))])
        assert embedding.frame.region == Size(side, side * 3 // 4)
        assert all(
            logits.pixels.shape == (side // 4, side // 4)
            for logits in engine.decode(embedding, PROMPTS)
        )
    engine.apply(replace(engine.step, side=512))
    [after] = engine.encode([prepared])
    assert_close(engine.decode(after, PROMPTS), expected, tolerance=0)


@pytest.mark.parametrize("make", [lambda: loaded()[1], small_sam1], ids=["sam2", "sam1"])
def test_embedding_decodes_the_same_after_a_change_of_side(
    make: Callable[[], TorchEngine],
) -> None:
    engine = make()
    [old] = engine.encode([engine.prepare(picture(400, 300))])
    expected = engine.decode(old, PROMPTS)
    engine.apply(replace(engine.step, side=128, prompts_per_call=1))
    [new] = engine.encode([engine.prepare(picture(400, 300))])
    engine.decode(new, PROMPTS)
    assert_close(engine.decode(old, PROMPTS), expected)


def test_picture_prepared_before_a_change_of_side_is_resized() -> None:
    _, engine = loaded()
    source, _ = scene()
    early = engine.prepare(source)
    engine.apply(replace(engine.step, side=128))
    [embedding] = engine.encode([early])
    assert embedding.frame == engine.prepare(source).frame


def test_half_precision_gives_nearly_the_same_mask_and_float32_returns_exactly() -> None:
    _, engine = loaded()
    source, truth = scene()
    prepared = engine.prepare(source)
    [full] = engine.encode([prepared])
    expected = engine.decode(full, [ELLIPSE, CLICK])
    engine.apply(replace(engine.step, precision="bfloat16"))
    assert engine.info.precision == "bfloat16"
    [half] = engine.encode([prepared])
    assert half.nbytes <= full.nbytes
    logits = engine.decode(half, [ELLIPSE])[0]
    assert logits.pixels.dtype == np.float32
    assert iou(geometry.mask_of(logits, "x"), truth) > 0.9
    engine.decode(full, [ELLIPSE])  # encoded in float32, decoded in half
    engine.apply(replace(engine.step, precision="float32"))
    assert_close(
        engine.decode(engine.encode([prepared])[0], [ELLIPSE, CLICK]), expected, tolerance=0
    )
    engine.decode(half, [ELLIPSE])  # encoded in half, decoded in float32


def test_sam1_runs_in_half_precision() -> None:
    engine = small_sam1()
    prepared = engine.prepare(picture())
    expected = engine.decode(engine.encode([prepared])[0], PROMPTS)
    engine.apply(replace(engine.step, precision="bfloat16", side=256))
    engine.decode(engine.encode([prepared])[0], PROMPTS)
    engine.apply(replace(engine.step, side=512))
    found = engine.decode(engine.encode([prepared])[0], PROMPTS)
    for one, other in zip(found, expected, strict=True):
        assert np.corrcoef(one.pixels.ravel(), other.pixels.ravel())[0, 1] > 0.95


def test_out_of_memory_in_the_encoder_shrinks_the_batch_then_the_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adaptive, engine = loaded(max_batch=4, min_side=128)
    engine.native_side = 512  # as if it were a larger model
    adaptive.plan = type(adaptive.plan)(replace(engine.step, side=512), min_side=128)
    engine.apply(adaptive.plan.step)
    seen = failing(
        monkeypatch, engine.model.image_encoder, lambda x: x.shape[0] * x.shape[2] ** 2 <= 300**2
    )
    source, truth = scene()
    prepared = [adaptive.prepare(source)] * 4
    embeddings = adaptive.encode(prepared)
    assert [shape[0] for shape in seen[:4]] == [4, 2, 1, 1]
    assert {embedding.frame.side for embedding in embeddings} == {256}
    assert len(embeddings) == 4
    assert adaptive.batch == 1
    assert "256" in adaptive.info.step
    for embedding in embeddings:
        [logits] = adaptive.decode(embedding, [ELLIPSE])
        assert iou(geometry.mask_of(logits, "x"), truth) > 0.9


def test_out_of_memory_in_the_decoder_takes_fewer_prompts_a_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adaptive, engine = loaded()
    [embedding] = adaptive.encode([adaptive.prepare(picture())])
    many = [BOX, CLICK, *[Prompt(points=(Point(5 * place, 4 * place),)) for place in range(1, 15)]]
    expected = adaptive.decode(embedding, many)
    seen = failing(monkeypatch, engine.model.sam_mask_decoder, lambda sparse: sparse.shape[0] <= 4)
    assert_close(adaptive.decode(embedding, many), expected)
    assert max(shape[0] for shape in seen[-4:]) <= 4
    assert adaptive.plan.step.prompts_per_call == 4
    assert engine.step.batch == 1


def test_last_step_that_fails_rejects_the_job_and_the_next_succeeds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adaptive, engine = loaded(max_batch=2)
    prepared = adaptive.prepare(picture())
    with monkeypatch.context() as patch:
        failing(patch, engine.model.image_encoder, lambda _: False)
        with pytest.raises(DeviceOutOfMemoryError, match=r"batch 1.*Tried to allocate 2\.00 GiB"):
            adaptive.encode([prepared])
    [embedding] = adaptive.encode([prepared])
    assert len(adaptive.decode(embedding, PROMPTS)) == len(PROMPTS)
    with monkeypatch.context() as patch:
        failing(patch, engine.model.sam_mask_decoder, lambda _: False)
        with pytest.raises(DeviceOutOfMemoryError, match=r"in decode even at .* 1 prompts a call"):
            adaptive.decode(embedding, PROMPTS)
    assert len(adaptive.decode(embedding, PROMPTS)) == len(PROMPTS)


def test_kernel_fault_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    adaptive, engine = loaded()

    def fault(_: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(engine.model.image_encoder, "forward", fault)
    with pytest.raises(DeviceError, match="device-side assert"):
        adaptive.encode([adaptive.prepare(picture())])


def test_embeddings_of_a_batch_do_not_hold_each_other() -> None:
    adaptive, _ = loaded(max_batch=3)
    embeddings: list[Any] = list(
        adaptive.encode([adaptive.prepare(picture(seed=seed)) for seed in range(3)])
    )
    for embedding in embeddings:
        assert embedding.image.untyped_storage().nbytes() == embedding.image.nbytes


def test_calling_thread_gets_the_engines_gpu_as_its_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch's current GPU is per thread, and GPU 0 by default: it got an unused context."""
    engine, done = small_sam1(), []

    def says(what: str) -> Callable[..., Any]:
        return lambda *_, **__: done.append(what) or ()

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))
    monkeypatch.setattr(engine.model, "to", says("weights"))
    monkeypatch.setattr(engine, "_encode_chunk", says("encode"))
    monkeypatch.setattr(engine, "_on_device", says("decode"))
    for name in ("_set_weights", "_set_side"):
        monkeypatch.setattr(engine, name, says("weights"))
    prepared = engine.prepare(picture())
    engine.apply(replace(engine.step, device="cuda:1"))
    assert done[0] == "cuda:1"
    assert "weights" in done
    for call, name in (
        (lambda: engine.encode([prepared]), "encode"),
        (lambda: engine.decode(None, []), "decode"),
    ):
        done.clear()
        call()
        assert done == ["cuda:1", name]
    monkeypatch.undo()
    done.clear()
    engine.apply(replace(engine.step, device="cpu"))
    engine.encode([prepared])
    assert done == []


def test_embedding_of_another_engine_is_a_type_error() -> None:
    adaptive, _ = loaded()
    fake = load(resolve("fake"))
    [embedding] = fake.encode([fake.prepare(picture())])
    with pytest.raises(TypeError, match="not an embedding of this engine"):
        adaptive.decode(embedding, [CLICK])


def test_missing_checkpoint_does_not_prevent_the_step_up(tmp_path: Path) -> None:
    demo = resolve("demo")
    assert demo.checkpoint is not None
    copy = tmp_path / "copy.pt"
    copy.write_bytes(demo.checkpoint.read_bytes())
    adaptive = load(
        resolve(str(copy), config=demo.config), device="cpu", precision="bfloat16", warmup=False
    )
    assert isinstance(adaptive, AdaptiveEngine)
    copy.unlink()
    adaptive.engine.apply(replace(adaptive.plan.step, precision="float32"))
    source, truth = scene()
    [logits] = adaptive.decode(adaptive.encode([adaptive.prepare(source)])[0], [ELLIPSE])
    assert iou(geometry.mask_of(logits, "x"), truth) > 0.9


@pytest.mark.parametrize("other", ["other weights", "another network"])
def test_replaced_checkpoint_is_not_read_by_a_running_engine(other: str, tmp_path: Path) -> None:
    demo = resolve("demo")
    assert demo.checkpoint is not None
    copy = tmp_path / "copy.pt"
    shutil.copyfile(demo.checkpoint, copy)
    adaptive = load(
        resolve(str(copy), config=demo.config), device="cpu", precision="bfloat16", warmup=False
    )
    assert isinstance(adaptive, AdaptiveEngine)
    weights = torch.load(demo.checkpoint, weights_only=True)
    weights = weights.get("model", weights)
    wider = 2 if other == "another network" else 1
    torch.save(
        {key: torch.cat([torch.atleast_1d(value + 1)] * wider) for key, value in weights.items()},
        tmp_path / "new",
    )
    (tmp_path / "new").replace(copy)
    adaptive.engine.apply(replace(adaptive.plan.step, precision="float32"))
    source, truth = scene()
    [logits] = adaptive.decode(adaptive.encode([adaptive.prepare(source)])[0], [ELLIPSE])
    assert iou(geometry.mask_of(logits, "x"), truth) > 0.9


def test_memory_report_works_without_sysconf_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    adaptive, engine = loaded()
    monkeypatch.setattr("sam_poll.engines.base.os.sysconf", unknown)  # as on macOS
    monkeypatch.setattr(engine, "_encode_chunk", full)
    with pytest.raises(DeviceOutOfMemoryError, match="the host's memory"):
        adaptive.encode([adaptive.prepare(picture())])


def test_model_that_fits_nowhere_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TorchEngine, "_encode_chunk", full)
    with pytest.raises(ModelError, match="the model does not fit"):
        load(resolve("demo"), device="cpu")


# ── compiled ──


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset torch's compiler, with its files in the test's own folder."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch._dynamo.reset()


@pytest.fixture
def any_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for a compiler, where torch's own use of it is replaced."""
    monkeypatch.setenv("CXX", sys.executable)


@pytest.mark.parametrize(
    ("device", "env", "said"),
    [
        ("cpu", {}, "g++: apt install g++, name a compiler in CXX"),
        ("cpu", {"CXX": "nvc++"}, "nvc++: apt install"),
        ("cuda:0", {}, "gcc or clang: apt install gcc, name a compiler in CC"),
        ("cuda:0", {"CC": "tcc"}, "tcc: apt install"),
        ("mps", {}, None),
    ],
)
def test_missing_compiler_is_named_with_its_remedy(
    device: str,
    env: dict[str, str],
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = devices.missing_compiler(device)
    assert (found or "").startswith(said or "")
    assert (found is None) is (said is None)
    for name in ("g++", "gcc", "nvc++", "tcc"):
        (tmp_path / name).touch(0o755)
    assert devices.missing_compiler(device) is None


def test_without_a_compiler_the_network_runs_uncompiled_which_is_logged_at_once(
    monkeypatch: pytest.MonkeyPatch, logged: list[str], tmp_path: Path
) -> None:
    def never(_: Any) -> Any:
        raise AssertionError("torch would look for a compiler only after a minute of tracing")

    monkeypatch.setattr(torch, "compile", never)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    engine = load(resolve("demo"), device="cpu", compile=True, warmup=False)
    assert engine.encode([engine.prepare(picture())])
    (said,) = [line for line in logged if "cannot be compiled" in line]
    assert "set `compile: false`" in said


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler: apt install g++"
)
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch's own modules
@pytest.mark.timeout(600)
def test_compiled_network_gives_the_same_logits_after_a_change_of_step(
    logged: list[str],
) -> None:
    smallest = {
        **SMALL_SAM1,
        "depth": 1,
        "global_attn_indexes": [0],
    }  # a kernel takes seconds to compile
    model = sam1.build(smallest)
    plain, compiled = sam1.Sam1Engine(model), sam1.Sam1Engine(copy.deepcopy(model))
    compiled.compile()
    prepared = plain.prepare(picture(400, 300))
    for side in (128, 64):
        for engine in (plain, compiled):
            engine.apply(replace(engine.step, side=side))
        [expected], [found] = plain.encode([prepared]), compiled.encode([prepared])
        assert_close(compiled.decode(found, PROMPTS), plain.decode(expected, PROMPTS))
    assert not [line for line in logged if "cannot be compiled" in line]


@pytest.mark.usefixtures("any_compiler")
def test_network_that_cannot_be_compiled_runs_uncompiled_and_logs_it_once(
    monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    def no_compiler(_: Any) -> Any:
        def fails(*_: Any) -> Any:
            raise RuntimeError("InvalidCxxCompiler: no working C++ compiler found\nmore")

        return fails

    monkeypatch.setattr(torch, "compile", no_compiler)
    stages: list[str] = []
    engine = load(
        resolve("demo"),
        device="cpu",
        compile=True,
        on_stage=lambda name: nullcontext(stages.append(name)),
    )
    assert stages == ["import", "read", "config", "build", "to device", "compile", "warm-up"]
    source, truth = scene()
    [logits] = engine.decode(engine.encode([engine.prepare(source)])[0], [ELLIPSE])
    assert iou(geometry.mask_of(logits, "x"), truth) > 0.9
    said = [line for line in logged if "cannot be compiled" in line]
    assert len(said) == 1
    assert "no working C++ compiler found" in said[0]


@pytest.mark.usefixtures("any_compiler")
def test_compiled_network_stays_compiled_after_out_of_memory(
    monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    times: list[int] = []

    def tight(eager: Any) -> Any:
        def compiled(square: torch.Tensor) -> Any:
            times.append(len(square))
            if len(square) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return eager(square)

        return compiled

    monkeypatch.setattr(torch, "compile", tight)
    adaptive = load(resolve("demo"), device="cpu", compile=True, max_batch=2, warmup=False)
    assert len(adaptive.encode([adaptive.prepare(picture())] * 2)) == 2
    assert times[-2:] == [1, 1]
    assert not [line for line in logged if "cannot be compiled" in line]


# ── on a real GPU ──


@pytest.fixture
def limited() -> Any:
    """Return a function that limits torch's GPU memory in MiB; the limit is lifted afterwards."""
    total = torch.cuda.get_device_properties(0).total_memory / 2**20

    def limit(mib: float) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(mib / total, 0)

    yield limit
    limit(total)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_masks_on_a_gpu_are_those_of_the_cpu(precision: str) -> None:
    source, truth = scene()
    card = load(resolve("demo"), device="cuda", precision=precision)
    assert card.info.device == "cuda:0"
    assert card.info.precision == precision
    embeddings = card.encode([card.prepare(source)] * (card.batch + 1))
    cpu, _ = loaded()
    [expected] = cpu.decode(cpu.encode([cpu.prepare(source)])[0], [ELLIPSE])
    for embedding in embeddings:
        [logits] = card.decode(embedding, [ELLIPSE])
        assert iou(geometry.mask_of(logits, "x"), truth) > 0.9
        np.testing.assert_allclose(
            logits.pixels, expected.pixels, atol=0.05 if precision == "float32" else 1.5
        )


@pytest.mark.gpu
@needs_cuda
def test_gpu_that_is_too_small_steps_down_and_answers(limited: Any) -> None:
    adaptive: Engine = load(resolve("demo"), device="cuda", precision="float32", max_batch=8)
    assert isinstance(adaptive, AdaptiveEngine)
    source, truth = scene()
    held = torch.cuda.memory_allocated() / 2**20
    limited(held + 60)
    embeddings = adaptive.encode([adaptive.prepare(source)] * 8)
    many = [Prompt(box=Box(70 + place % 3, 40, 230, 160)) for place in range(64)]
    masks = [geometry.mask_of(logits, "x") for logits in adaptive.decode(embeddings[7], many)]
    assert min(iou(mask, truth) for mask in masks) > 0.85
    assert adaptive.plan.step != adaptive.plan.first


@pytest.mark.gpu
@needs_cuda
def test_model_larger_than_the_gpu_runs_on_the_cpu(limited: Any) -> None:
    torch.cuda.empty_cache()
    adaptive = load(resolve("demo"), device="cuda", budget_mib=2, warmup=False)
    source, truth = scene()
    [logits] = adaptive.decode(adaptive.encode([adaptive.prepare(source)])[0], [ELLIPSE])
    assert adaptive.info.device == "cpu"
    assert iou(geometry.mask_of(logits, "x"), truth) > 0.9


@pytest.mark.gpu
@needs_cuda
def test_gpu_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ModelError, match="CUDA devices"):
        load(resolve("demo"), device=f"cuda:{torch.cuda.device_count()}")
