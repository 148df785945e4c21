"""One prediction on a drawn picture with a known mask, timed by stage; the engine's memory plan.

Limitations: a model for other pictures (radar, microscopy) may not segment a drawn disc; that is a
warning, not a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import cv2
import numpy as np

from sam_poll.config.settings import Settings
from sam_poll.core.errors import ExitCode
from sam_poll.core.protocols import Engine
from sam_poll.core.types import Box, Mask, Prompt, Size
from sam_poll.diagnostics.doctor import memory_plan as plan_
from sam_poll.diagnostics.doctor.findings import Finding
from sam_poll.engines import devices
from sam_poll.engines.memory.adaptive import AdaptiveEngine
from sam_poll.engines.memory.meter import CudaMeter, Reading
from sam_poll.imaging import decode, masks

Stage = Callable[..., AbstractContextManager[None]]
SIZE = Size(1500, 1000)
CENTRE, RADIUS = (800, 520), 260  # pixels
FOUND = 0.9  # IoU; a disc on plain ground is the easiest thing there is


def reading(settings: Settings) -> Reading | None:
    """Return the device's memory now; None where it cannot be read (CPU, MPS)."""
    name = devices.choose(
        settings.devices[0] if settings.devices else settings.device, settings.precision
    ).name
    if not name.startswith("cuda"):
        return None
    budget = settings.memory.budget_mib
    wanted = None if budget == "auto" else budget
    return CudaMeter(name, budget_mib=wanted, reserve_mib=settings.memory.reserve_mib).read()


def plan(engine: Engine, settings: Settings, before: Reading | None) -> dict[str, Any] | None:
    """Return `memory_plan.as_json` of a loaded engine; None without a plan.

    `before`: the device's memory before the weights were loaded.
    """
    if not isinstance(engine, AdaptiveEngine):
        return None
    from sam_poll.engines.memory.estimate import footprint_of
    from sam_poll.engines.memory.requirements import MemoryRequirements

    first, taken = engine.plan.first, engine.plan.step
    needs = MemoryRequirements(footprint_of(engine.engine.model))  # type: ignore[attr-defined]
    half = devices.choose(first.device, settings.precision).half
    return plan_.as_json(
        first, taken, needs, min_side=settings.memory.min_side, half=half, reading=before
    )


def draw_disc() -> tuple[bytes, Mask]:
    """Draw a disc on a plain, slightly uneven ground; return the JPEG and the disc's mask."""
    rows = np.linspace(70, 100, SIZE.height)[:, None, None]
    pixels = np.broadcast_to(rows, (SIZE.height, SIZE.width, 3)).astype(np.uint8).copy()
    cv2.circle(pixels, CENTRE, RADIUS, (40, 170, 230), -1)
    truth = np.zeros((SIZE.height, SIZE.width), np.uint8)
    cv2.circle(truth, CENTRE, RADIUS, 1, -1)
    return cv2.imencode(".jpg", pixels)[1].tobytes(), masks.tight(truth > 0, "disc", 1.0)


def predict_file(engine: Engine, data: bytes, prompt: Prompt, stage: Stage) -> tuple[Mask, bool]:
    """Return the mask of a picture file, made like a job's, and whether its logits are numbers."""
    wait = synchronizer(engine.info.device)
    with stage("decode"):
        picture = decode.decode_for(data, engine.info)
    with stage("resize"):
        prepared = engine.prepare(picture)
    with stage("encode", wait):
        (embedding,) = engine.encode([prepared])
    with stage("predict", wait):
        (logits,) = engine.decode(embedding, [prompt])
    with stage("mask"):
        mask = masks.mask_of(logits, prompt.label)
    return mask, bool(np.isfinite(logits.pixels).all() and np.isfinite(logits.score))


def synchronizer(device: str) -> Callable[[], object]:
    """Return a function that waits until the GPU has done all its work."""
    if not device.startswith("cuda"):
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)


def predict(engine: Engine, stage: Stage) -> dict[str, Any]:
    """Run the test prediction on the drawn disc; the result is ready for JSON."""
    data, truth = draw_disc()
    (x, y), r = CENTRE, RADIUS
    mask, numbers = predict_file(
        engine, data, Prompt("disc", box=Box(x - r, y - r, x + r, y + r)), stage
    )
    info = engine.info
    return {
        "numbers": numbers,
        "iou": masks.iou(mask, truth),
        "score": mask.score if np.isfinite(mask.score) else None,
        "step": info.step,
        "device": info.device,
        "peak_mib": info.peak_mib,
    }


def finding(trial: Mapping[str, Any]) -> Finding:
    """Whether the network works, not only runs."""
    if not trial["numbers"]:
        remedy = "set `precision: float32`: some cards (GTX 16xx) lose numbers in half precision"
        what = "the network's answer is not a number (NaN)"
        return Finding(
            "trial", "answer", "problem", what, trial["step"] or None, remedy, ExitCode.DEVICE
        )
    peak = f", at most {trial['peak_mib']:,.0f} MiB of the card" if trial.get("peak_mib") else ""
    what = (
        f"a drawn disc, boxed: IoU {trial['iou']:.3f} with the truth, predicted IoU "
        f"{trial['score']:.2f}{peak}"
    )
    if trial["iou"] >= FOUND:
        return Finding("trial", "answer", "ok", what)
    remedy = (
        "try `precision: float32`; else the weights are not what their name says, or "
        "know other pictures only"
    )
    return Finding("trial", "answer", "warning", what, trial["step"] or None, remedy)
