"""The upper limit of speed: image encoder and mask decoder on tensors that are ready.

No file is read and nothing is resized, enlarged or written: the network cannot be faster on this
device, in the precision and batch size that the daemon uses.

Limitations: small logits are copied from the device, because this is the only reliable way to know
that it has finished; that is 0.3 MB an object.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sam_poll.config.settings import Settings
from sam_poll.core.errors import ModelError
from sam_poll.core.types import InputTransform, Prompt
from sam_poll.engines.base import Features, TorchEngine
from sam_poll.imaging import decode
from sam_poll.prompts import parser
from sam_poll.runtime import builders


class BareNetwork:
    """A loaded network with its input on the device."""

    def __init__(self, settings: Settings) -> None:
        engine: Any = builders.engine_of(settings)
        inner = getattr(
            engine, "engine", engine
        )  # what memory is too small for, is too small here as well
        if not isinstance(inner, TorchEngine):
            raise ModelError(
                "the bare network of this model cannot be measured", place=settings.model
            )
        self._engine, self.info = inner, engine.info
        self._batches: dict[int, Any] = {}
        self._requests: list[tuple[InputTransform, Sequence[Prompt]]] = []

    @torch.inference_mode()
    def ready(self, pairs: Sequence[tuple[Path, Path]]) -> None:
        """Decode, resize and upload a batch of these pairs, in turn, for `run`."""
        engine = self._engine
        prepared, self._requests = [], []
        for picture, prompt in pairs:
            decoded = decode.decode(
                picture.read_bytes(), min_decode_side=engine.step.side, both=self.info.stretches
            )
            prompts = parser.parse(prompt.read_bytes()).prompts
            assert isinstance(prompts, tuple)
            prepared.append(engine.prepare(decoded))
            self._requests.append((prepared[-1].frame, prompts))
        sizes = {1, engine.batch}
        self._batches = {
            size: engine._square([prepared[n % len(prepared)] for n in range(size)]).clone()
            for size in sizes
        }

    @torch.inference_mode()
    def run(self, batches: int, *, single: bool = False) -> float:
        """Return the seconds a picture, over as many batches as the daemon would make.

        With `single`, of one picture.
        """
        engine = self._engine
        size = 1 if single else engine.batch
        square = self._batches[size]
        started = time.perf_counter()
        for _ in range(batches):
            image, high_res = engine.embed(square)
            for row in range(size):
                frame, prompts = self._requests[row % len(self._requests)]
                rows = slice(row, row + 1)
                engine.decode(
                    Features(frame, image[rows], tuple(level[rows] for level in high_res)), prompts
                )
        return (time.perf_counter() - started) / (batches * size)

    @property
    def batch(self) -> int:
        """Pictures that the daemon would encode at once."""
        return self._engine.batch
