"""One prediction on a drawn picture whose answer is known, stage by stage; and the plan that the engine runs on.

What can still go wrong here: a model of other things than pictures (radar, microscopes) may not know a drawn disc; that
is a warning, not a problem.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import cv2
import numpy as np

from sam_poll import geometry, images
from sam_poll.doctor import plan as plan_
from sam_poll.doctor.findings import Finding
from sam_poll.engines import devices
from sam_poll.engines.adaptive import AdaptiveEngine
from sam_poll.engines.meter import CudaMeter, Reading
from sam_poll.errors import ExitCode
from sam_poll.settings import Settings
from sam_poll.types import Box, Engine, Mask, Prompt, Size

Stage = Callable[..., AbstractContextManager[None]]
SIZE = Size(1500, 1000)
CENTRE, RADIUS = (800, 520), 260  # pixels
FOUND = 0.9  # IoU; a disc on plain ground is the easiest thing there is


def reading(settings: Settings) -> Reading | None:
    """The device's memory now; None where it cannot be read (CPU, MPS)."""
    name = devices.choose(settings.devices[0] if settings.devices else settings.device, settings.precision).name
    if not name.startswith("cuda"):
        return None
    budget = settings.memory.budget_mib
    wanted = None if budget == "auto" else budget
    return CudaMeter(name, budget_mib=wanted, reserve_mib=settings.memory.reserve_mib).read()


def plan(engine: Engine, settings: Settings, before: Reading | None) -> dict[str, Any] | None:
    """`plan.told` for a loaded engine; None for one that has no plan. `before`: the memory before its weights came."""
    if not isinstance(engine, AdaptiveEngine):
        return None
    from sam_poll.engines.estimate import footprint_of
    from sam_poll.engines.needs import Needs

    first, taken = engine.plan.first, engine.plan.step
    needs = Needs(footprint_of(engine.engine.model))  # type: ignore[attr-defined]
    half = devices.choose(first.device, settings.precision).half
    return plan_.told(first, taken, needs, min_side=settings.memory.min_side, half=half, reading=before)


def drawn() -> tuple[bytes, Mask]:
    """A JPEG of a disc on a plain, slightly uneven ground, and the disc's mask."""
    rows = np.linspace(70, 100, SIZE.height)[:, None, None]
    pixels = np.broadcast_to(rows, (SIZE.height, SIZE.width, 3)).astype(np.uint8).copy()
    cv2.circle(pixels, CENTRE, RADIUS, (40, 170, 230), -1)
    truth = np.zeros((SIZE.height, SIZE.width), np.uint8)
    cv2.circle(truth, CENTRE, RADIUS, 1, -1)
    return cv2.imencode(".jpg", pixels)[1].tobytes(), geometry.tight(truth > 0, "disc", 1.0)


def answer(engine: Engine, data: bytes, prompt: Prompt, stage: Stage) -> tuple[Mask, bool]:
    """A picture file's mask, the way of a job; and whether its logits are numbers."""
    wait = waiter(engine.info.device)
    with stage("decode"):
        picture = images.decode_for(data, engine.info)
    with stage("resize"):
        prepared = engine.prepare(picture)
    with stage("encode", wait):
        (embedding,) = engine.encode([prepared])
    with stage("predict", wait):
        (logits,) = engine.decode(embedding, [prompt])
    with stage("mask"):
        mask = geometry.mask_of(logits, prompt.label)
    return mask, bool(np.isfinite(logits.pixels).all() and np.isfinite(logits.score))


def waiter(device: str) -> Callable[[], object]:
    """Waits for all that a card was told to do: it answers before it has done it."""
    if not device.startswith("cuda"):
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)


def predict(engine: Engine, stage: Stage) -> dict[str, Any]:
    """The trial on the drawn disc, as JSON."""
    data, truth = drawn()
    (x, y), r = CENTRE, RADIUS
    mask, numbers = answer(engine, data, Prompt("disc", box=Box(x - r, y - r, x + r, y + r)), stage)
    info = engine.info
    return {
        "numbers": numbers,
        "iou": geometry.iou(mask, truth),
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
        return Finding("trial", "answer", "problem", what, trial["step"] or None, remedy, ExitCode.DEVICE)
    peak = f", at most {trial['peak_mib']:,.0f} MiB of the card" if trial.get("peak_mib") else ""
    what = f"a drawn disc, boxed: IoU {trial['iou']:.3f} with the truth, predicted IoU {trial['score']:.2f}{peak}"
    if trial["iou"] >= FOUND:
        return Finding("trial", "answer", "ok", what)
    remedy = "try `precision: float32`; else the weights are not what their name says, or know other pictures only"
    return Finding("trial", "answer", "warning", what, trial["step"] or None, remedy)
