"""The official predictor's mask beside ours: the same weights, picture and prompt; both from pixels decoded alike.

Ours goes the way of a job: decoded at the scale that the network needs, resized in 8 bits, masks enlarged on the host.
The official one gets the whole picture. What can still go wrong here: where both run in half precision, a mask whose
logits are close to zero may differ without either being wrong; `precision: float32` tells.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sam_poll import geometry, images, png, prompts
from sam_poll.doctor.attempt import Stage, answer, waiter
from sam_poll.doctor.findings import Finding
from sam_poll.engines import resolve
from sam_poll.errors import ModelError, PictureError
from sam_poll.fs import remedy_of, write_whole
from sam_poll.safe_path import SafePath
from sam_poll.settings import Settings
from sam_poll.types import Box, Engine, Mask, ModelInfo, Prompt, Size

T = TypeVar("T")
RUNS = 3  # the median counts
PATIENCE_S = 20.0  # no further run after so long
ALIKE, ASTRAY = 0.95, 0.5  # IoU


def run(
    settings: Settings,
    engines: list[Engine],
    picture: Path,
    box: tuple[float, float, float, float] | None,
    out: Path | None,
    stage: Stage,
) -> dict[str, Any]:
    """As JSON. `engines` holds the loaded engine alone, and is emptied: a card may not hold both networks.
    `box` None: the middle half of the picture. Masks are written below `out`. PictureError, PromptError."""
    info = engines[0].info
    if info.family == "fake":
        raise ModelError("the model `fake` has no official predictor to compare with", place="--compare")
    with stage("picture"):
        data, size = _read(picture)
    middle = Box(size.width / 4, size.height / 4, size.width * 3 / 4, size.height * 3 / 4)
    with stage("box"):
        (prompt,) = prompts.fit([Prompt("compared", box=Box(*box) if box else middle)], size)
    with stage("ours"):
        mask, ours_s = _ours(engines, data, prompt)
    _free(info)
    theirs, score, theirs_s, precision = _official(settings, info, data, prompt, stage)
    difference = geometry.paste(mask, size) ^ geometry.paste(theirs, size)
    written, failure = _written(out, picture.stem, {"ours": mask, "official": theirs}, size)
    return {
        "size": list(size),
        "box": [prompt.box.x0, prompt.box.y0, prompt.box.x1, prompt.box.y1] if prompt.box else None,
        "differ_percent": 100 * float(np.count_nonzero(difference)) / difference.size,
        "iou": geometry.iou(mask, theirs),
        "pixels": [mask.area, theirs.area],
        "scores": [mask.score, score],
        "ours_ms": ours_s * 1000,
        "official_ms": theirs_s * 1000,
        "speed": theirs_s / ours_s,
        "precisions": [info.precision, precision],
        "written": written,
        "failure": failure,
    }


def _read(picture: Path) -> tuple[bytes, Size]:
    """The file and the upright picture's size. PictureError."""
    try:
        data = picture.read_bytes()
    except OSError as error:
        remedy = remedy_of(error)
        raise PictureError(f"cannot be read: {error.strerror}", place=str(picture), remedy=remedy) from error
    try:
        return data, images.read_header(data).size
    except PictureError as error:
        error.place = error.place or str(picture)
        raise


def _ours(engines: list[Engine], data: bytes, prompt: Prompt) -> tuple[Mask, float]:
    """Our mask and its seconds. Nobody holds the engine then."""
    engine = engines.pop()
    (mask, _), seconds = _timed(lambda: answer(engine, data, prompt, _untold))
    return mask, seconds


def _official(
    settings: Settings, info: ModelInfo, data: bytes, prompt: Prompt, stage: Stage
) -> tuple[Mask, float, float, str]:
    """The official mask, its predicted IoU, seconds, and precision. It runs where we ended, in its own precision."""
    from sam_poll.engines.official import Official

    spec = resolve(settings.model, config=settings.model_cfg)
    assert spec.checkpoint
    with stage("official load"):
        predictor = Official(spec.checkpoint, spec.config, info.device)
    wait = waiter(info.device)

    def once() -> tuple[Any, float]:
        found = predictor(images.decode(data).pixels, prompt)
        wait()
        return found

    with stage("official"):
        (bitmap, score), seconds = _timed(once)
    return geometry.tight(bitmap, prompt.label, score), score, seconds, predictor.precision


def _untold(name: str, then: Callable[[], object] = lambda: None) -> Any:
    return contextlib.nullcontext()


def _timed(run: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and the median seconds of some runs; the first, which is slower, does not count."""
    begun = time.perf_counter()
    taken: list[float] = []
    result = run()
    first = time.perf_counter() - begun
    while len(taken) < RUNS and (time.perf_counter() - begun < PATIENCE_S):
        start = time.perf_counter()
        result = run()
        taken.append(time.perf_counter() - start)
    return result, statistics.median(taken or [first])


def _free(info: ModelInfo) -> None:
    gc.collect()
    if info.device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def _written(
    out: Path | None, stem: str, masks: Mapping[str, Mask], size: Size
) -> tuple[list[str], dict[str, str] | None]:
    """Both masks at full size, 0 and 255: their paths, and why not all could be written (the numbers are told all the
    same)."""
    paths: list[str] = []
    if out is None:
        return paths, None
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, mask in masks.items():
            path = SafePath.at(out) / f"{stem}.{name}.png"
            write_whole(path, png.encode(geometry.paste(mask, size).astype(np.uint8) * np.uint8(255)))
            paths.append(str(path))
    except OSError as error:
        return paths, {"reason": error.strerror or str(error), "place": str(out), "remedy": remedy_of(error)}
    return paths, None


def finding(found: Mapping[str, Any]) -> list[Finding]:
    """How far both masks agree, and what the way there cost."""
    ours, theirs = found["precisions"]
    what = (
        f"{found['differ_percent']:.3f} % of the pixels differ, IoU {found['iou']:.4f} "
        f"(ours in {ours}, the official predictor in {theirs})"
    )
    place = ", ".join(found["written"]) or None
    if not any(found["pixels"]):
        what = "both masks are empty, which tells nothing"
        findings = [Finding("compare", "masks", "warning", what, place, "box an object with `--box`")]
    elif found["iou"] >= ALIKE:
        findings = [Finding("compare", "masks", "ok", what, place)]
    else:
        level = "warning" if found["iou"] >= ASTRAY else "problem"
        remedy = "box an object that is plain, and try `precision: float32`: both should agree. If not, report it"
        findings = [Finding("compare", "masks", level, what, place, remedy)]  # type: ignore[arg-type]
    what = (
        f"{found['ours_ms']:,.0f} ms ours, {found['official_ms']:,.0f} ms the official predictor's, "
        f"from the file's bytes to the mask: {found['speed']:.1f} times as fast"
    )
    findings.append(Finding("compare", "speed", "ok", what))
    if failure := found.get("failure"):
        what = f"the masks cannot be written: {failure['reason']}"
        findings.append(Finding("compare", "output", "warning", what, failure["place"], failure["remedy"]))
    return findings
