"""What a precision or a runtime costs in truth: masks of the daemon's engine on a CPU against those
of the official predictor in float32, on the same weights, pictures and prompts.

`python -m benchmarks.precision [--model sam2.1_hiera_tiny …] [--json FILE]`. The pictures and
prompts are those of `tests/engines/test_reference.py`: six sizes, six prompts each. A row's figures
are over these 36 cases, in per cent of the picture's pixels.

Limitations: a model that is not downloaded gets random weights. Their logits are close to zero all
over the picture, which no trained network's are: such figures are an upper limit."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sam_poll.core.types import Picture, Prompt, RgbArray, Size
from sam_poll.engines import catalog, load, resolve, sam1, sam2
from sam_poll.engines.reference import ReferencePredictor
from sam_poll.imaging import masks as geometry
from tests.support.engine_contract import drawn
from tests.support.networks import shaken
from tests.support.reference_cases import SIZES, prompts_for

MODELS = ("sam2.1_hiera_tiny", "sam_vit_b")
RUNTIMES = ("torch", "openvino")
PRECISIONS = ("float32", "bfloat16")


def checkpoint(model: str, folder: Path) -> tuple[Path, str | None, bool]:
    """The model's file and config, and whether its weights are random ones, made in `folder`."""
    spec = resolve(model)
    assert spec.checkpoint
    if spec.checkpoint.is_file() or model not in catalog.MODELS:
        return spec.checkpoint, spec.config, False
    path = folder / f"{model}.pt"
    torch.manual_seed(0)
    if spec.family == "sam1":
        from segment_anything import sam_model_registry

        with torch.device("meta"):
            meta = sam_model_registry[model.removeprefix("sam_")]()
        network: Any = shaken(sam1.build(sam1.architecture(meta.state_dict())))
    else:
        config = sam2.find_config(str(spec.config))
        network = sam2.build(sam2.read_config(config), str(config))
    torch.save(network.state_dict(), path)
    return path, spec.config, True


def cases() -> Iterator[tuple[RgbArray, list[Prompt]]]:
    """Pictures and their prompts."""
    for size in SIZES:
        yield drawn(*size), prompts_for(size)


def official(path: Path, config: str | None) -> list[np.ndarray]:
    """The official masks of all cases in float32."""
    predictor = ReferencePredictor(path, config, "cpu")
    return [mask for pixels, prompts in cases() for mask, _ in predictor.masks(pixels, prompts)]


def ours(path: Path, config: str | None, runtime: str, precision: str) -> list[np.ndarray]:
    """The masks of all cases as the daemon makes them; ValueError where it makes them otherwise."""
    spec = resolve(str(path), config=config)
    engine = load(spec, device="cpu", precision=precision, runtime=runtime, load_timeout_s=1200)
    if ("OpenVINO" in engine.info.step) != (runtime == "openvino"):
        raise ValueError(f"{runtime} was not used, see the log")
    made = []
    for pixels, prompts in cases():
        size = Size(pixels.shape[1], pixels.shape[0])
        (embedding,) = engine.encode([engine.prepare(Picture(pixels, size, "x"))])
        for logits in engine.decode(embedding, prompts):
            made.append(geometry.paste(geometry.mask_of(logits, "x"), size))
    return made


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="*", default=list(MODELS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| model | runtime | precision | median | worst of 36 |\n|---|---|---|---:|---:|")
    for model in given.model:
        with tempfile.TemporaryDirectory(prefix="sam_poll-precision-") as folder:
            path, config, random = checkpoint(model, Path(folder))
            if random:  # what is converted of them is of no further use
                os.environ["SAM_POLL_CACHE"] = folder
            expected = official(path, config)
            for runtime in RUNTIMES:
                for precision in PRECISIONS:
                    found = ours(path, config, runtime, precision)
                    parts = [
                        100 * float(np.mean(a != b)) for a, b in zip(found, expected, strict=True)
                    ]
                    row = {"model": model, "random": random, "runtime": runtime}
                    rows.append({**row, "precision": precision, "percent": parts})
                    shown = f"{statistics.median(parts):.3f} % | {max(parts):.2f} %"
                    print(f"| {model} | {runtime} | {precision} | {shown} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
