"""The limit: the image encoder and the mask decoder on tensors that are ready, and nothing else.

No file is read, nothing is resized, enlarged or written: faster than this the network cannot be on this device, in the
precision and batch size that the daemon runs it in.

What can still go wrong here: small logits are still copied from the device, because there is no other honest way to
know that it has finished; that is 0.3 MB an object.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sam_poll import app, images, prompts
from sam_poll.engines.base import Features, TorchEngine
from sam_poll.errors import ModelError
from sam_poll.settings import Settings
from sam_poll.types import Frame, Prompt


class Limit:
    """A loaded network with its input on the device."""

    def __init__(self, settings: Settings) -> None:
        engine: Any = app.engine_of(settings)
        inner = getattr(engine, "engine", engine)  # what memory is too small for, is too small here as well
        if not isinstance(inner, TorchEngine):
            raise ModelError("the bare network of this model cannot be measured", place=settings.model)
        self._engine, self.info = inner, engine.info
        self._batches: dict[int, Any] = {}
        self._ask: list[tuple[Frame, Sequence[Prompt]]] = []

    @torch.inference_mode()
    def ready(self, pairs: Sequence[tuple[Path, Path]]) -> None:
        """Decodes, resizes and uploads a batch of these pairs, in turn; `run` then works on it."""
        engine = self._engine
        prepared, self._ask = [], []
        for picture, prompt in pairs:
            decoded = images.decode(picture.read_bytes(), cover=engine.step.side, both=engine.family != "sam1")
            asked = prompts.parse(prompt.read_bytes()).prompts
            assert isinstance(asked, tuple)
            prepared.append(engine.prepare(decoded))
            self._ask.append((prepared[-1].frame, asked))
        sizes = {1, engine.batch}
        self._batches = {
            size: engine._square([prepared[n % len(prepared)] for n in range(size)]).clone() for size in sizes
        }

    @torch.inference_mode()
    def run(self, batches: int, *, single: bool = False) -> float:
        """Seconds a picture, over as many batches as the daemon would make (`single`: of one picture)."""
        engine = self._engine
        size = 1 if single else engine.batch
        square = self._batches[size]
        started = time.perf_counter()
        for _ in range(batches):
            with engine._autocast():
                image, high_res = engine._encode(square)
            for row in range(size):
                frame, asked = self._ask[row % len(self._ask)]
                here = slice(row, row + 1)
                engine.decode(Features(frame, image[here], tuple(level[here] for level in high_res)), asked)
        return (time.perf_counter() - started) / (batches * size)

    @property
    def batch(self) -> int:
        """Pictures that the daemon would encode at once."""
        return self._engine.batch
