"""The converter: the child process that converts an image encoder for OpenVINO.

It reads the checkpoint again, converts the encoder for one picture of the native side, compiles it
for this CPU, and compares the result with torch's on noise, so that an encoder that OpenVINO
misunderstands is refused. Messages to the parent are JSON lines on the standard output:
`{"step": …}`, then `{"done": …}` or `{"error": …}`.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from sam_poll.core import child_process
from sam_poll.engines import loader
from sam_poll.engines.base import ConvertedEncoder, EncoderModule, TorchEngine
from sam_poll.engines.catalog import ModelSpec
from sam_poll.engines.openvino_encoder import (
    MAGIC,
    ConversionError,
    OpenVinoEncoder,
    fingerprint_of,
    import_openvino,
    options,
)

# Largest difference from torch's float32, relative to the norm of an output. In float32: other
# orders of summation change about 1e-5 of it. In half precision: this many times what torch's own
# half precision changes, or `HALF_TOLERANCE`. Measured in bfloat16: 0.005 to 0.01, as torch's.
TOLERANCE = 1e-3
HALF_TIMES, HALF_TOLERANCE = 2, 0.01

# Options to compile with, the fastest first. With its generated kernels ("snippets") OpenVINO
# 2026.4 computes some attention in bfloat16 wrongly: in the bundled model, whose windows have four
# queries after pooling, the embedding is off by 19 %. Without them it is off by 0.5 %, as in torch,
# but sam2.1_hiera_tiny takes 1.6 times as long (measured).
VARIANTS: tuple[dict[str, str], ...] = ({}, {"SNIPPETS_MODE": "DISABLE"})


def main(text: str) -> None:
    """Run the converter; `text` is the order of `openvino_encoder`."""
    messages = child_process.reserve_stdout()
    child_process.end_with_parent()
    _be_first_to_be_killed()
    warnings.simplefilter("ignore")
    try:
        _convert(json.loads(text), messages)
        _tell(messages, done="")
    except Exception as error:  # noqa: BLE001  it is reported to the parent
        reason = (str(error).strip().splitlines() or [""])[0]
        _tell(messages, error=f"{type(error).__name__}: {reason}")


def _tell(messages: TextIO, **message: str) -> None:
    messages.write(json.dumps(message) + "\n")
    messages.flush()


def _be_first_to_be_killed() -> None:
    """Where memory runs out, let the kernel kill this process rather than the daemon."""
    try:
        Path("/proc/self/oom_score_adj").write_text("1000")
    except OSError:
        return  # not on Linux


def _convert(order: dict[str, Any], messages: TextIO) -> None:
    spec = ModelSpec(**{**order["spec"], "checkpoint": Path(order["spec"]["checkpoint"])})
    # Of the options only the decoder's matters here, which is not converted.
    options_ = loader.LoadOptions("float32", None, 256, False, False, "torch")
    network = loader.network_of(spec, loader.LoadProgress(spec.name, 0, None), options_)
    if fingerprint_of(network.model) != order["fingerprint"]:
        raise ConversionError("the checkpoint has changed since it was loaded")
    engine = network.make_engine(network.model, name=spec.name)
    _tell(messages, step="tracing and converting")
    model = trace(engine)
    write(
        engine,
        model,
        Path(order["file"]),
        order["precision"],
        lambda step: _tell(messages, step=step),
    )


def write(
    engine: TorchEngine,
    model: Any,
    file: Path,
    precision: str,
    tell: Callable[[str], None] = lambda step: None,
) -> None:
    """Write `model`, the traced encoder of `engine`, as the first variant that computes the same.

    Raises ConversionError where none does.
    """
    for variant in VARIANTS:
        tell(f"compiling in {precision}")
        compile_to(file, model, precision, variant)
        tell("comparing with torch")
        try:
            return compare(engine, OpenVinoEncoder(file, engine.native_side, precision))
        except ConversionError as error:
            failure = error
            tell(str(error))
    raise failure


@torch.no_grad()
def trace(engine: TorchEngine) -> Any:
    """Return the encoder of `engine`, which is on the CPU in float32, as an `openvino.Model`."""
    noise = _noise(engine)
    with warnings.catch_warnings():
        # Of sizes that become constants, which is meant; and of torch.jit, which OpenVINO uses.
        warnings.simplefilter("ignore")
        return import_openvino().convert_model(
            EncoderModule(engine).eval(), example_input=noise, input=list(noise.shape)
        )


def compile_to(file: Path, model: Any, precision: str, variant: Mapping[str, str]) -> None:
    """Compile an `openvino.Model` for this CPU and write it as `OpenVinoEncoder` reads it."""
    chosen = {**options(precision), **variant}
    exported = import_openvino().Core().compile_model(model, "CPU", chosen).export_model()
    blob = exported if isinstance(exported, bytes) else exported.getvalue()
    with file.open("wb") as out:
        out.write(MAGIC + hashlib.sha256(blob).digest())
        out.write(blob)
        out.flush()
        os.fsync(out.fileno())


@torch.inference_mode()
def compare(engine: TorchEngine, encoder: ConvertedEncoder) -> None:
    """Raise ConversionError where `encoder` does not compute what the encoder of `engine` does."""
    noise = _noise(engine)
    expected = _flat(engine.embed(noise))
    allowed = [TOLERANCE] * len(expected)
    if encoder.precision != "float32":
        # Autocast rounds the weights of each layer as the daemon does once and for all.
        with torch.autocast("cpu", dtype=getattr(torch, encoder.precision)):
            half = _flat(engine.embed(noise))
        allowed = [
            max(HALF_TOLERANCE, HALF_TIMES * _difference(*pair))
            for pair in zip(half, expected, strict=True)
        ]
    found = encoder(noise)
    if len(found) != len(expected):
        raise ConversionError(f"{len(found)} outputs instead of {len(expected)}")
    for ours, theirs, limit in zip(found, expected, allowed, strict=True):
        difference = _difference(ours, theirs)
        if not difference <= limit:  # NaN, too
            raise ConversionError(
                f"the converted encoder differs from torch's by {difference:.2g} of its output, "
                f"more than {limit:.2g}"
            )


def _flat(embedded: tuple[Tensor, tuple[Tensor, ...]]) -> list[Tensor]:
    return [embedded[0], *embedded[1]]


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


def _noise(engine: TorchEngine) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, engine.native_side, engine.native_side, generator=generator)


if __name__ == "__main__":
    main(sys.argv[1])
