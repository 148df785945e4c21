"""Loading of a model: from a `ModelSpec` to an engine that is ready to work.

Each stage of loading is logged and timed, and a watchdog ends the process if loading hangs.

Limitations: a hang in code that holds Python's global interpreter lock stops the watchdog thread,
too. faulthandler's own thread then dumps the stacks a few seconds later and ends the process with
exit code 1 instead of `ExitCode.MODEL`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from sam_poll.core import missing_library
from sam_poll.core.errors import DeviceOutOfMemoryError, ExitCode, ModelError, PromptError
from sam_poll.core.protocols import Engine
from sam_poll.core.types import Box, ConceptRequest, Picture, Point, Prompt, Size
from sam_poll.engines import checkpoint, devices, hub
from sam_poll.engines.catalog import ModelSpec, cache_dir, folder_or_file
from sam_poll.engines.fake import FakeEngine
from sam_poll.engines.memory.adaptive import AdaptiveEngine
from sam_poll.engines.memory.cuda_errors import classify_device_error
from sam_poll.engines.memory.estimate import footprint_of
from sam_poll.engines.memory.meter import CudaMeter, Meter
from sam_poll.engines.memory.peak_store import NAME as PEAKS
from sam_poll.engines.memory.peak_store import PeakStore
from sam_poll.engines.memory.plan import MemoryPlan, MemoryStep, cpu_prompts
from sam_poll.engines.memory.requirements import Key, MemoryRequirements

# Upper limits of one call on a GPU. Before each call the memory plan reduces them to what fits. At
# side 1024 a prompt takes 28 MiB in float32 (`memory.estimate`), so 64 of them take 1.8 GiB. No
# measurement is recorded for either value.
GPU_PROMPTS = 64
GPU_BATCH = 8  # pictures

# Seconds that faulthandler waits after the watchdog thread should have ended the process.
BACKSTOP_S = 5.0

# With `compile` the timeout is this many times `load_timeout_s`: on one core the encoder of a small
# model takes a minute to compile (measured).
COMPILE_PATIENCE = 4

# Part of the time left for loading that a conversion for OpenVINO may take; the rest is for torch,
# which takes over where the conversion does not end.
CONVERSION_SHARE = 0.8

OnStage = Callable[[str], AbstractContextManager[None]]
"""Returns the context of a stage of loading, by the stage's name."""

# Family → the module of its engine, and the extra that it needs.
_MODULES = {
    "sam1": "sam_poll.engines.sam1",
    "sam2": "sam_poll.engines.sam2",
    "sam-hq": "sam_poll.engines.sam_hq",
    "mobile-sam": "sam_poll.engines.sam_hq",
    "edgetam": "sam_poll.engines.edgetam",
    "sam3": "sam_poll.engines.sam3",
}
_EXTRAS = {"sam-hq": "hq", "mobile-sam": "hq", "edgetam": "hf", "sam3": "hf"}


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The settings that shape the memory plan; see `load`."""

    precision: str
    max_batch: int | None
    min_side: int
    compile: bool
    hq_token_only: bool
    runtime: str


@dataclass(frozen=True, slots=True)
class Network:
    """A network with its weights, in float32 on the CPU, and what makes its engine.

    `family` is that of its weights. `read_again` reads the same checkpoint once more.
    """

    family: str
    model: Any
    make_engine: Any
    read_again: Callable[[], dict[str, Any]]


class LoadProgress:
    """Logs and times the stages of loading, and ends the process if loading takes too long."""

    def __init__(self, name: str, timeout_s: float, on_stage: OnStage | None) -> None:
        self._model = name
        self._timeout_s = timeout_s
        self._on_stage = on_stage
        self._stage = "start"
        self._began = time.monotonic()
        self._done = threading.Event()
        self.ms: dict[str, float] = {}

    @property
    def left_s(self) -> float:
        """Seconds that are left of the timeout."""
        return self._timeout_s - (time.monotonic() - self._began)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """End the process if the body of this context runs longer than the timeout."""
        thread = threading.Thread(target=self._watch, name="load-watchdog", daemon=True)
        thread.start()
        if sys.__stderr__:
            with contextlib.suppress(ValueError, OSError):  # a stderr without a descriptor
                faulthandler.dump_traceback_later(
                    self._timeout_s + BACKSTOP_S, exit=True, file=sys.__stderr__
                )
        try:
            yield
        finally:
            self._done.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Log and time the body of this context as the stage `name`."""
        self._stage = name
        logger.info("{}: {} …", self._model, name)
        start = time.perf_counter()
        with self._on_stage(name) if self._on_stage else contextlib.nullcontext():
            yield
        self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - start) * 1000
        logger.debug("{}: {} took {:.0f} ms", self._model, name, self.ms[name])

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {ms:.0f}" for name, ms in self.ms.items())
        return f"{sum(self.ms.values()):.0f} ms ({parts})"

    def _watch(self) -> None:
        if self._done.wait(self._timeout_s):
            return
        # Not through the logger: the thread that hangs may hold the logger's lock.
        stream = sys.__stderr__
        if stream:
            stream.write(
                f"loading {self._model} hangs in stage `{self._stage}` "
                f"(limit {self._timeout_s:g} s); the stacks of all threads follow; "
                "a slow disk or network share needs a larger load_timeout_s\n"
            )
            stream.flush()
            with contextlib.suppress(ValueError, OSError):
                faulthandler.dump_traceback(file=stream, all_threads=True)
        os._exit(ExitCode.MODEL)  # no exception can be raised in the thread that hangs


def load(
    spec: ModelSpec,
    *,
    device: str = "auto",
    precision: str = "auto",
    runtime: str = "auto",
    max_batch: int | None = None,
    budget_mib: int | None = None,
    reserve_mib: int = 256,
    min_side: int = 256,
    compile: bool = False,
    hq_token_only: bool = False,
    warmup: bool = True,
    load_timeout_s: float = 300,
    on_stage: OnStage | None = None,
) -> Engine:
    """Return the engine for `spec`, on its device, warmed up.

    The engine steps down by itself when memory runs out (`memory.adaptive`).

    - `runtime`: `openvino` runs the image encoder in OpenVINO, which is for CPUs; `auto` does where
      `openvino_encoder.chosen` says so.
    - `max_batch`: None means 8 pictures at once on a GPU, 1 on a CPU.
    - `budget_mib`: limit of the GPU memory that torch takes; None means all but `reserve_mib`.
    - `min_side`: smallest encoder input, in pixels, that the engine steps down to.
    - `compile`: compile the image encoder (`TorchEngine.compile`), which multiplies the timeout by
      `COMPILE_PATIENCE`.
    - `hq_token_only`: with SAM-HQ, the mask of its own output token alone (`sam_hq.SamHqEngine`).
    - `on_stage`: returns the context that the stage of a name runs in.

    Raises ModelError. Ends the process with `ExitCode.MODEL`, and the stacks of all threads on
    stderr, where loading takes longer than `load_timeout_s`.
    """
    if spec.family == "fake":
        return FakeEngine()
    # First of all, because importing torch takes seconds: report a missing file at once.
    _path_of(spec)
    timeout_s = load_timeout_s * (COMPILE_PATIENCE if compile else 1)
    progress = LoadProgress(spec.name, timeout_s, on_stage)
    with progress.watched():
        with progress.stage("import"):
            _import(spec.family)
        chosen = devices.choose(device, precision)
        try:
            meter = _meter(chosen.name, budget_mib, reserve_mib)
            options = LoadOptions(precision, max_batch, min_side, compile, hq_token_only, runtime)
            engine = _build(spec, chosen, progress, options, meter)
            if compile:
                with progress.stage("compile"):
                    warm_up(engine, pictures=1)
                    warm_up(engine, pictures=engine.batch)
            if warmup:
                with progress.stage("warm-up"):
                    warm_up(engine, pictures=engine.batch)
        except DeviceOutOfMemoryError as error:
            raise ModelError(
                f"the model does not fit: {error.reason}", place=spec.name, remedy=error.remedy
            ) from error
    logger.info("{}: ready at {} after {}", spec.name, engine.info.step, progress)
    return engine


def _import(family: str | None) -> None:
    """Import torch and the family's package, as a stage apart from reading the checkpoint.

    A hang in an import can thus be distinguished from a hang in reading.
    """
    try:
        if "torch" not in sys.modules:
            devices.allocator_settings(os.environ)
        import torch  # noqa: F401

        if family in _MODULES:
            importlib.import_module(_MODULES[family])
    except (ImportError, OSError, RuntimeError) as error:
        if explained := missing_library.explained(error):
            raise explained from error
        if family in _EXTRAS and isinstance(error, ModuleNotFoundError):
            raise missing_library.missing_extra(
                error, _EXTRAS[family], f"a model of the family {family}"
            ) from error
        # sam2 raises RuntimeError when it is imported next to a checkout of its own repository.
        raise ModelError(
            f"the model's libraries cannot be imported: {error}",
            remedy="install torch and torchvision from one index, then sam_poll: docs/install.md",
        ) from error


def network_of(spec: ModelSpec, progress: LoadProgress, options: LoadOptions) -> Network:
    """Read the checkpoint and build its network. Raises ModelError."""
    path = _path_of(spec)
    if revision := hub.revision_of(path):
        logger.info("{}: revision {}", spec.name, revision)
    elif not spec.sha256 and spec.name != "demo":
        logger.info("{}: no SHA-256 is known for {}; it is used unverified", spec.name, path)
    weights: dict[str, Any] = {}
    with progress.stage("read"):
        if path.is_dir():
            family = checkpoint.family_of_folder(path)
        else:
            weights = checkpoint.read(path)
            family = checkpoint.family_of(weights, str(path))
    if spec.family and spec.family != family:
        remedy = "leave the config and the model type out, or name those of this checkpoint"
        raise ModelError(
            f"{spec.family} was requested, but these are weights of {family}",
            place=str(path),
            remedy=remedy,
        )
    if not spec.family:
        with progress.stage("import"):
            _import(family)
    if path.is_dir():
        model, make_engine, read_again = _FOLDERS[family](path, progress)
    else:
        read_again = checkpoint.reader(path)
        model, make_engine = _BUILDERS[family](spec, weights, progress, options)
    return Network(family, model, make_engine, read_again)


def _build(
    spec: ModelSpec,
    device: devices.Device,
    progress: LoadProgress,
    options: LoadOptions,
    meter: Meter | None,
) -> AdaptiveEngine:
    """Read the checkpoint, build its network and put it on the device."""
    from sam_poll.engines import openvino_encoder  # which imports torch

    openvino_encoder.check(options.runtime, device.name)
    network = network_of(spec, progress, options)
    model = network.model
    side = _side_of(model)
    if device.name == "cpu" and options.precision == "auto":
        device = replace(device, precision=devices.cpu_precision(side))
    encoder = None
    if openvino_encoder.chosen(
        options.runtime, device=device.name, side=side, compiled=options.compile
    ):
        with progress.stage("openvino"):
            encoder = openvino_encoder.encoder_of(
                model, spec, side, device.precision, limit_s=CONVERSION_SHARE * progress.left_s
            )
    first = _first_step(device, side, options.max_batch)
    # SAM 3 works at one side only: the ladder has no smaller ones.
    min_side = side if network.family == "sam3" else options.min_side
    plan = MemoryPlan(first, min_side=min_side, half=device.half)
    footprint = footprint_of(model)
    peaks = None
    if meter:
        weights_mib = f"{footprint.weights_mib('float32'):.1f} MiB"
        compiled = ", compiled" if options.compile else ""
        peaks = _peak_store(f"{spec.name}, {weights_mib}, {meter.card}{compiled}")
    needs = MemoryRequirements(footprint, peaks.read() if peaks else None)
    keep = peaks.keep if peaks else _discard
    with progress.stage("to device"):
        engine = network.make_engine(model, name=spec.name, weights=network.read_again)
        if options.compile:
            engine.compile()
        if encoder:
            engine.use(encoder)
        return AdaptiveEngine(engine, plan, needs=needs, meter=meter, keep=keep)


def _peak_store(network: str) -> PeakStore | None:
    """Return the store of measured peaks; None where the user has no home, as in containers."""
    try:
        return PeakStore(cache_dir() / PEAKS, network)
    except RuntimeError as error:
        logger.info("measured memory is not kept: {}", error)
        return None


def _discard(measured: Mapping[Key, float]) -> None:
    """Do nothing: without a meter there are no measured peaks to keep."""


def _meter(device: str, budget_mib: int | None, reserve_mib: int) -> Meter | None:
    """Limit the memory of a GPU and return its meter; None on a CPU or MPS, which have none."""
    if not device.startswith("cuda"):
        return None
    try:
        devices.limit_memory(device, budget_mib, reserve_mib)
    except RuntimeError as error:
        # A GPU may be too full even for the CUDA context; the plan then reads zero free memory.
        if classify_device_error(error) != "memory":
            raise
    return CudaMeter(device, budget_mib=budget_mib, reserve_mib=reserve_mib)


def _path_of(spec: ModelSpec) -> Path:
    """Return the file or folder of the model. ModelError where none is named or downloaded."""
    path = folder_or_file(spec)
    if spec.download and not (path and path.exists()):
        where = f" to {path}" if path else ""
        remedy = f"run `sam-poll models download {spec.download}`"
        raise ModelError(
            f"the model has not been downloaded{where}", place=spec.name, remedy=remedy
        )
    if path is None:
        raise ModelError("no checkpoint is named", place=spec.name)
    return path


Weights = Callable[[], dict[str, Any]]
# The network of the weights, and what makes its engine: its class, or that with arguments.
_Built = tuple[Any, Callable[..., Any]]


def _sam1(
    spec: ModelSpec, weights: dict[str, Any], progress: LoadProgress, options: LoadOptions
) -> _Built:
    """Return the SAM1 network of `weights` and the class of its engine."""
    from sam_poll.engines import sam1

    with progress.stage("config"):
        parameters = sam1.architecture(weights)
        sam1.check_type(sam1.type_of(parameters), spec.model_type, str(spec.checkpoint))
    with progress.stage("build"):
        model = sam1.build(parameters)
        checkpoint.fill(model, weights, place=str(spec.checkpoint))
    return model, sam1.Sam1Engine


def _sam_hq(
    spec: ModelSpec, weights: dict[str, Any], progress: LoadProgress, options: LoadOptions
) -> _Built:
    """Return the SAM-HQ or MobileSAM of `weights` and what makes its engine."""
    from sam_poll.engines import sam1, sam_hq

    with progress.stage("config"):
        architecture = sam_hq.architecture(weights)
        sam1.check_type(architecture.type, spec.model_type, str(spec.checkpoint))
    with progress.stage("build"):
        model = sam_hq.build(architecture)
        checkpoint.fill(model, weights, place=str(spec.checkpoint))
    if not architecture.early_width:
        return model, sam_hq.MobileSamEngine
    return model, partial(sam_hq.SamHqEngine, hq_token_only=options.hq_token_only)


def _sam2(
    spec: ModelSpec, weights: dict[str, Any], progress: LoadProgress, options: LoadOptions
) -> _Built:
    """Return the SAM2 network of `weights` and the class of its engine."""
    from sam_poll.engines import sam2

    with progress.stage("config"):
        name = spec.config or checkpoint.sam2_config_of(weights, str(spec.checkpoint))
        path = sam2.find_config(name)
        config = sam2.read_config(path)
    with progress.stage("build"):
        model = sam2.build(config, str(path))
        checkpoint.fill(model, weights, place=str(spec.checkpoint), config=name)
    return model, sam2.Sam2Engine


def _edgetam(folder: Path, progress: LoadProgress) -> tuple[Any, Any, Weights]:
    """Return the EdgeTAM in `folder`, the class of its engine, and what reads its weights again."""
    from sam_poll.engines import edgetam

    with progress.stage("build"):
        model = edgetam.read(folder)
    return model, edgetam.EdgeTamEngine, edgetam.reader(folder)


def _sam3(folder: Path, progress: LoadProgress) -> tuple[Any, Any, Weights]:
    """Return the SAM 3 in `folder`, the class of its engine, and what reads its weights again."""
    from sam_poll.engines import sam3

    with progress.stage("build"):
        model = sam3.read(folder)
    return model, sam3.Sam3Engine, sam3.reader(folder)


_FOLDERS = {"edgetam": _edgetam, "sam3": _sam3}
_BUILDERS = {"sam1": _sam1, "sam2": _sam2, "sam-hq": _sam_hq, "mobile-sam": _sam_hq}


def _side_of(model: Any) -> int:
    return int(model.image_size if hasattr(model, "image_size") else model.image_encoder.img_size)


def _first_step(device: devices.Device, side: int, max_batch: int | None) -> MemoryStep:
    on_gpu = device.name != "cpu"
    batch = max_batch or (GPU_BATCH if on_gpu else 1)
    prompts = GPU_PROMPTS if on_gpu else cpu_prompts(side)
    return MemoryStep(device.precision, prompts, batch, side, device.name)


def warm_up(engine: Engine, pictures: int) -> None:
    """Segment `pictures` grey pictures with one prompt of each kind that the engine takes.

    Kernels are thus chosen, and memory is allocated, before the first job.
    """
    size = Size(64, 64)
    picture = Picture(np.full((size.height, size.width, 3), 128, np.uint8), size, digest="warm-up")
    prompts = [Prompt(points=(Point(32, 32),)), Prompt(box=Box(16, 16, 48, 48))]
    concept = ConceptRequest(("object",))
    try:
        engine.check_concept(concept)
        texts = concept.texts
    except PromptError:
        texts = ()
    for embedding in engine.encode([engine.prepare(picture)] * pictures):
        engine.decode(embedding, prompts)
        if texts:
            engine.find(embedding, texts, (), threshold=concept.threshold, most=1)
