"""`load`: from a `ModelSpec` to an engine ready to work, each stage said, timed and watched.

What can still go wrong here: a hang in code that holds the interpreter's lock is seen by faulthandler's own thread
alone, which dumps the stacks and ends the process with code 1 instead of ours, a few seconds later.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from loguru import logger

from sam_poll.engines import checkpoint, devices
from sam_poll.engines.adaptive import AdaptiveEngine
from sam_poll.engines.catalog import ModelSpec, cache_dir
from sam_poll.engines.estimate import footprint_of
from sam_poll.engines.fake import FakeEngine
from sam_poll.engines.faults import kind_of
from sam_poll.engines.memory import Plan, Step, cpu_prompts
from sam_poll.engines.meter import CudaMeter, Meter
from sam_poll.engines.needs import Key, Needs
from sam_poll.engines.peaks import NAME as PEAKS
from sam_poll.engines.peaks import Peaks
from sam_poll.errors import ExitCode, ModelError, TooLargeError
from sam_poll.types import Box, Engine, Picture, Point, Prompt, Size

GPU_PROMPTS = (
    64  # at most; at side 1024 each takes 28 MiB in float32 (`estimate`), and what fits is chosen before a call
)
GPU_BATCH = 8
BACKSTOP_S = 5.0
COMPILE_PATIENCE = 4  # times `load_timeout_s`: on one core a small encoder takes a minute to compile

OnStage = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What the settings ask of the plan."""

    precision: str
    max_batch: int | None
    min_side: int
    compile: bool


class Stages:
    """Says which stage of loading runs, how long each took, and ends the process if one hangs."""

    def __init__(self, name: str, timeout_s: float, on_stage: OnStage | None) -> None:
        self._model = name
        self._timeout_s = timeout_s
        self._on_stage = on_stage
        self._stage = "start"
        self._done = threading.Event()
        self.ms: dict[str, float] = {}

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within this, all stages together must not take longer than the time limit."""
        thread = threading.Thread(target=self._watch, name="load-watchdog", daemon=True)
        thread.start()
        if sys.__stderr__:
            with contextlib.suppress(ValueError, OSError):  # a stderr without a descriptor
                faulthandler.dump_traceback_later(self._timeout_s + BACKSTOP_S, exit=True, file=sys.__stderr__)
        try:
            yield
        finally:
            self._done.set()
            thread.join()
            faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stage = name
        logger.info("{}: {} …", self._model, name)
        if self._on_stage:
            self._on_stage(name)
        start = time.perf_counter()
        yield
        self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - start) * 1000
        logger.debug("{}: {} took {:.0f} ms", self._model, name, self.ms[name])

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {ms:.0f}" for name, ms in self.ms.items())
        return f"{sum(self.ms.values()):.0f} ms ({parts})"

    def _watch(self) -> None:
        if self._done.wait(self._timeout_s):
            return
        # Not through the logger: the thread that hangs may hold its lock.
        stream = sys.__stderr__
        if stream:
            stream.write(
                f"loading {self._model} hangs in stage `{self._stage}` (limit {self._timeout_s:g} s); "
                "the stacks of all threads follow; a slow disk or network share needs a larger load_timeout_s\n"
            )
            stream.flush()
            with contextlib.suppress(ValueError, OSError):
                faulthandler.dump_traceback(file=stream, all_threads=True)
        os._exit(ExitCode.MODEL)  # a hang cannot be unwound


def load(
    spec: ModelSpec,
    *,
    device: str = "auto",
    precision: str = "auto",
    max_batch: int | None = None,
    budget_mib: int | None = None,
    reserve_mib: int = 256,
    min_side: int = 256,
    compile: bool = False,
    warmup: bool = True,
    load_timeout_s: float = 300,
    on_stage: OnStage | None = None,
) -> Engine:
    """The engine that `spec` names, on the device, warmed up, stepping down by itself when memory runs out.

    `max_batch` None: 8 pictures at once on a GPU, 1 on a CPU. `budget_mib` limits what torch may take of a GPU's
    memory (None: all but `reserve_mib`). `compile`: see `TorchEngine.compile`; there is time for it. Raises ModelError;
    past `load_timeout_s` ends the process with `ExitCode.MODEL` and all stacks on stderr.
    """
    if spec.family == "fake":
        return FakeEngine()
    _checkpoint_path(spec)  # importing torch takes seconds; what is missing is told before
    stages = Stages(spec.name, load_timeout_s * (COMPILE_PATIENCE if compile else 1), on_stage)
    with stages.watched():
        with stages.stage("import"):
            _import(spec.family)
        chosen = devices.choose(device, precision)
        try:
            meter = _meter(chosen.name, budget_mib, reserve_mib)
            wishes = Wishes(precision, max_batch, min_side, compile)
            engine = _build(spec, chosen, stages, wishes, meter)
            if compile:
                with stages.stage("compile"):
                    warm_up(engine, pictures=1)
                    warm_up(engine, pictures=engine.batch)
            if warmup:
                with stages.stage("warm-up"):
                    warm_up(engine, pictures=engine.batch)
        except TooLargeError as error:
            raise ModelError(f"the model does not fit: {error.reason}", place=spec.name, remedy=error.remedy) from error
    logger.info("{}: ready at {} after {}", spec.name, engine.info.step, stages)
    return engine


def _import(family: str | None) -> None:
    """Imports torch and the family's package, so that a hang in an import is told from one in reading."""
    try:
        if "torch" not in sys.modules:
            devices.allocator_settings(os.environ)
        import torch  # noqa: F401

        if family == "sam1":
            import sam_poll.engines.sam1
        elif family == "sam2":
            import sam_poll.engines.sam2  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # sam2 raises RuntimeError next to a checkout of itself
        raise ModelError(
            f"the model's libraries cannot be imported: {error}",
            remedy="install torch and torchvision from one place, then sam2 and segment-anything, as the README says",
        ) from error


def _build(
    spec: ModelSpec,
    device: devices.Device,
    stages: Stages,
    wishes: Wishes,
    meter: Meter | None,
) -> AdaptiveEngine:
    path = _checkpoint_path(spec)
    if not spec.sha256 and spec.name != "demo":
        logger.info("{}: no SHA-256 is known for {}; it is used as it is", spec.name, path)
    with stages.stage("read"):
        read_again = checkpoint.reader(path)
        weights = checkpoint.read(path)
        family = checkpoint.family_of(weights, str(path))
    if spec.family and spec.family != family:
        remedy = "leave the config and the model type out, or name those of this checkpoint"
        raise ModelError(
            f"{spec.family} was asked for, but these are weights of {family}", place=str(path), remedy=remedy
        )
    if not spec.family:
        with stages.stage("import"):
            _import(family)
    make = _sam1 if family == "sam1" else _sam2
    model, engine_class = make(spec, weights, stages)
    side = _side_of(model)
    if device.name == "cpu" and wishes.precision == "auto":
        device = replace(device, precision=devices.cpu_precision(side))
    first = _first_step(device, side, wishes.max_batch)
    plan = Plan(first, min_side=wishes.min_side, half=device.half)
    footprint = footprint_of(model)
    peaks = None
    if meter:
        weights_mib = f"{footprint.weights_mib('float32'):.1f} MiB"
        network = f"{spec.name}, {weights_mib}, {meter.card}{', compiled' * wishes.compile}"
        peaks = _peaks(network)
    needs = Needs(footprint, peaks.read() if peaks else None)
    with stages.stage("to device"):
        engine = engine_class(model, name=spec.name, weights=read_again)
        if wishes.compile:
            engine.compile()
        return AdaptiveEngine(engine, plan, needs=needs, meter=meter, keep=peaks.keep if peaks else _forget)


def _peaks(network: str) -> Peaks | None:
    """None where there is no place to keep them: a user without a home, as containers have."""
    try:
        return Peaks(cache_dir() / PEAKS, network)
    except RuntimeError as error:
        logger.info("measured memory is not kept: {}", error)
        return None


def _forget(measured: Mapping[Key, float]) -> None:
    """There is no meter, so there is nothing to keep."""


def _meter(device: str, budget_mib: int | None, reserve_mib: int) -> Meter | None:
    """Limits a card's memory, and reads it; None where there is nothing to read (CPU, MPS)."""
    if not device.startswith("cuda"):
        return None
    try:
        devices.limit_memory(device, budget_mib, reserve_mib)
    except RuntimeError as error:
        if kind_of(error) != "memory":  # a card too full even for CUDA's own: the plan will read that nothing is free
            raise
    return CudaMeter(device, budget_mib=budget_mib, reserve_mib=reserve_mib)


def _checkpoint_path(spec: ModelSpec) -> Path:
    path = spec.checkpoint
    if path is None:
        raise ModelError("no checkpoint is named", place=spec.name)
    if spec.sha256 and not path.is_file():
        remedy = f"run `sam-poll models download {spec.name}`"
        raise ModelError(f"the model has not been downloaded to {path}", place=spec.name, remedy=remedy)
    return path


def _sam1(spec: ModelSpec, weights: dict[str, Any], stages: Stages) -> tuple[Any, Any]:
    from sam_poll.engines import sam1

    with stages.stage("config"):
        parameters = sam1.architecture(weights)
        sam1.check_type(parameters, spec.model_type, str(spec.checkpoint))
    with stages.stage("build"):
        model = sam1.build(parameters)
        checkpoint.fill(model, weights, place=str(spec.checkpoint), config=spec.model_type or "read from its weights")
    return model, sam1.Sam1Engine


def _sam2(spec: ModelSpec, weights: dict[str, Any], stages: Stages) -> tuple[Any, Any]:
    from sam_poll.engines import sam2

    with stages.stage("config"):
        name = spec.config or checkpoint.sam2_config_of(weights, str(spec.checkpoint))
        path = sam2.find_config(name)
        config = sam2.read_config(path)
    with stages.stage("build"):
        model = sam2.build(config, str(path))
        checkpoint.fill(model, weights, place=str(spec.checkpoint), config=name)
    return model, sam2.Sam2Engine


def _side_of(model: Any) -> int:
    return int(model.image_size if hasattr(model, "image_size") else model.image_encoder.img_size)


def _first_step(device: devices.Device, side: int, max_batch: int | None) -> Step:
    on_gpu = device.name != "cpu"
    batch = max_batch or (GPU_BATCH if on_gpu else 1)
    return Step(device.precision, GPU_PROMPTS if on_gpu else cpu_prompts(side), batch, side, device.name)


def warm_up(engine: Engine, pictures: int) -> None:
    """Grey pictures with one prompt of each kind: kernels are chosen and memory is taken before the first job."""
    size = Size(64, 64)
    picture = Picture(np.full((size.height, size.width, 3), 128, np.uint8), size, digest="warm-up")
    prompts = [Prompt(points=(Point(32, 32),)), Prompt(box=Box(16, 16, 48, 48))]
    for embedding in engine.encode([engine.prepare(picture)] * pictures):
        engine.decode(embedding, prompts)
