"""The official predictor's mask beside ours, on the same weights, picture and prompt.

Our mask is made like a job's: decoded at the scale that the network needs, resized in 8 bits,
enlarged on the host. The official predictor gets the whole picture. Where our network runs in half
precision, it is loaded once more in float32, which shows how much of the difference is due to the
precision.

Limitations: on a GPU the official predictor of SAM 2 runs in half precision itself.
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

from sam_poll.config.settings import Settings
from sam_poll.core.errors import ModelError, PictureError
from sam_poll.core.files import remedy_of, write_whole
from sam_poll.core.protocols import Engine
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import Box, Mask, ModelInfo, Prompt, Size
from sam_poll.diagnostics.doctor.findings import Finding
from sam_poll.diagnostics.doctor.test_prediction import Stage, predict_file, synchronizer
from sam_poll.engines import resolve
from sam_poll.engines.catalog import folder_or_file
from sam_poll.imaging import decode, png_writer
from sam_poll.imaging import masks as geometry
from sam_poll.prompts import parser

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
    """Compare both masks of a picture; the result is ready for JSON.

    `engines` holds the loaded engine alone and is emptied, because a GPU may not hold both
    networks. `box` None is the middle half of the picture. Masks are written below `out`. Raises
    PictureError, PromptError.
    """
    info = engines[0].info
    if info.family == "fake":
        raise ModelError(
            "the model `fake` has no official predictor to compare with", place="--compare"
        )
    with stage("picture"):
        data, size = _read(picture)
    middle = Box(size.width / 4, size.height / 4, size.width * 3 / 4, size.height * 3 / 4)
    with stage("box"):
        (prompt,) = parser.fit([Prompt("compared", box=Box(*box) if box else middle)], size)
    with stage("ours"):
        mask, ours_s = _ours(engines, data, prompt)
    _free(info)
    in_float32 = _in_float32(settings, info, data, prompt, stage)
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
        "float32": _precision_alone(in_float32, mask, theirs, size),
        "written": written,
        "failure": failure,
    }


def _read(picture: Path) -> tuple[bytes, Size]:
    """Return the file's bytes and the size of the upright picture. Raises PictureError."""
    try:
        data = picture.read_bytes()
    except OSError as error:
        remedy = remedy_of(error)
        raise PictureError(
            f"cannot be read: {error.strerror}", place=str(picture), remedy=remedy
        ) from error
    try:
        return data, decode.read_header(data).size
    except PictureError as error:
        error.place = error.place or str(picture)
        raise


def _ours(engines: list[Engine], data: bytes, prompt: Prompt) -> tuple[Mask, float]:
    """Our mask and its seconds. The engine can be freed afterwards."""
    engine = engines.pop()
    (mask, _), seconds = _timed(lambda: predict_file(engine, data, prompt, _untold))
    return mask, seconds


def _in_float32(
    settings: Settings, info: ModelInfo, data: bytes, prompt: Prompt, stage: Stage
) -> Mask | None:
    """Return our mask in float32; None where that is the precision of `info`, or does not fit."""
    if info.precision == "float32":
        return None
    from sam_poll.runtime import builders

    with stage("float32 load"):
        exact = settings.model_copy(update={"precision": "float32"})
        engine = builders.engine_of(exact, device=info.device)
    if engine.info.precision != "float32":  # the memory plan has stepped down
        return None
    with stage("ours in float32"):
        mask, _ = predict_file(engine, data, prompt, _untold)
    del engine
    _free(info)
    return mask


def _precision_alone(
    exact: Mask | None, mask: Mask, theirs: Mask, size: Size
) -> dict[str, float] | None:
    """Compare our mask in float32 with the official one, and with ours in half precision."""
    if exact is None:
        return None
    pixels = geometry.paste(exact, size)
    official, half = (np.count_nonzero(pixels ^ geometry.paste(m, size)) for m in (theirs, mask))
    return {
        "differ_percent": 100 * official / pixels.size,
        "iou": geometry.iou(exact, theirs),
        "precision_percent": 100 * half / pixels.size,
    }


def _official(
    settings: Settings, info: ModelInfo, data: bytes, prompt: Prompt, stage: Stage
) -> tuple[Mask, float, float, str]:
    """Return the official mask, its predicted IoU, seconds, and precision.

    It runs on the device where our engine ran, in its own precision.
    """
    from sam_poll.engines.reference import ReferencePredictor

    spec = resolve(settings.model, config=settings.model_cfg)
    path = folder_or_file(spec)
    assert path
    with stage("official load"):
        predictor = ReferencePredictor(
            path, spec.config, info.device, hq_token_only=settings.hq_token_only
        )
    wait = synchronizer(info.device)

    def once() -> tuple[Any, float]:
        found = predictor(decode.decode(data).pixels, prompt)
        wait()
        return found

    with stage("official"):
        (bitmap, score), seconds = _timed(once)
    return geometry.tight(bitmap, prompt.label, score), score, seconds, predictor.precision


def _untold(name: str, then: Callable[[], object] = lambda: None) -> Any:
    return contextlib.nullcontext()


def _timed(run: Callable[[], T]) -> tuple[T, float]:
    """Return the result and the median seconds of some runs, without the slower first one."""
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
    """Write both masks at full size, 0 and 255.

    Returns their paths, and the reason if not all could be written.
    """
    paths: list[str] = []
    if out is None:
        return paths, None
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, mask in masks.items():
            path = SafePath.at(out) / f"{stem}.{name}.png"
            write_whole(
                path, png_writer.encode(geometry.paste(mask, size).astype(np.uint8) * np.uint8(255))
            )
            paths.append(str(path))
    except OSError as error:
        return paths, {
            "reason": error.strerror or str(error),
            "place": str(out),
            "remedy": remedy_of(error),
        }
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
        findings = [
            Finding("compare", "masks", "warning", what, place, "box an object with `--box`")
        ]
    elif found["iou"] >= ALIKE:
        findings = [Finding("compare", "masks", "ok", what, place)]
    else:
        level = "warning" if found["iou"] >= ASTRAY else "problem"
        remedy = "box an object that is plain: both masks should agree there. If not, report it"
        if (exact := found.get("float32")) and exact["iou"] >= ALIKE:
            remedy = "set `precision: float32`, in which both masks agree"
        findings = [Finding("compare", "masks", level, what, place, remedy)]  # type: ignore[arg-type]
    if exact := found.get("float32"):
        what = (
            f"{ours} alone changes {exact['precision_percent']:.3f} % of the pixels: in float32 "
            f"ours differs from the official mask in {exact['differ_percent']:.3f} %, "
            f"IoU {exact['iou']:.4f}"
        )
        findings.append(Finding("compare", "precision", "ok", what))
    what = (
        f"{found['ours_ms']:,.0f} ms ours, {found['official_ms']:,.0f} ms the official "
        "predictor's, "
        f"from the file's bytes to the mask: {found['speed']:.1f} times as fast"
    )
    findings.append(Finding("compare", "speed", "ok", what))
    if failure := found.get("failure"):
        what = f"the masks cannot be written: {failure['reason']}"
        findings.append(
            Finding("compare", "output", "warning", what, failure["place"], failure["remedy"])
        )
    return findings
