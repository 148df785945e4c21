"""A simulated GPU: its capacity, other processes, weights, embeddings and activations.

`Card` is a `meter.Meter`. `CardEngine` is the fake engine with the memory needs of a real network:
it takes that memory from the card and raises torch's error when there is not enough. Nothing is
allocated.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from sam_poll.core.protocols import Embedding
from sam_poll.core.types import InputTransform, Logits, ModelInput, Picture, Prompt, Size
from sam_poll.engines.fake import FakeEmbedding, FakeEngine
from sam_poll.engines.memory.batching import chunks, prompt_groups
from sam_poll.engines.memory.estimate import MIB, Footprint
from sam_poll.engines.memory.meter import Reading
from sam_poll.engines.memory.plan import Call, MemoryStep


class OutOfMemoryError(RuntimeError):
    """An error with the name of torch's."""


@dataclass
class Card:
    """A simulated GPU, in MiB. `others_mib` is held by other processes and may be changed."""

    capacity_mib: float
    others_mib: float = 0.0
    reserve_mib: float = 0.0
    budget_mib: float | None = None
    card: str = "simulated GPU"
    held_mib: float = 0.0
    most_mib: float = 0.0

    def take(self, mib: float) -> None:
        free = self.capacity_mib - self.others_mib - self.held_mib
        if self.budget_mib is not None:
            free = min(free, self.budget_mib - self.held_mib)
        if mib > max(free, 0.0):
            raise OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {mib:.2f} MiB; {free:.0f} MiB are free"
            )
        self.held_mib += mib
        self.most_mib = max(self.most_mib, self.held_mib)

    def give(self, mib: float) -> None:
        self.held_mib -= mib

    @contextmanager
    def taken(self, mib: float) -> Iterator[None]:
        self.take(mib)
        try:
            yield
        finally:
            self.give(mib)

    def read(self) -> Reading:
        device_free = max(0.0, self.capacity_mib - self.others_mib - self.held_mib)
        free = device_free - self.reserve_mib
        if self.budget_mib is not None:
            free = min(free, self.budget_mib - self.held_mib)
        return Reading(
            max(0.0, free), device_free, self.capacity_mib, self.held_mib, self.budget_mib
        )

    def start(self) -> None:
        self.most_mib = self.held_mib

    def peak_mib(self) -> float:
        return self.most_mib


class CardEngine(FakeEngine):
    """A fake engine on a `Card`.

    `truth` is the need of its calls as a multiple of the estimate. Its weights are on the host
    until `apply`.
    """

    def __init__(
        self, card: Card, footprint: Footprint, *, side: int = 1024, truth: float = 1.0
    ) -> None:
        super().__init__(side=side)
        self.card = card
        self.footprint = footprint
        self.truth = truth
        self.weights_mib = 0.0
        self.taken: list[MemoryStep] = []  # steps with another network than the one before

    def apply(self, step: MemoryStep) -> None:
        if not self.taken or step.network != self.taken[-1].network:
            self.taken.append(step)
        wanted = 0.0 if step.device == "cpu" else self.footprint.weights_mib(step.precision)
        if wanted > self.weights_mib:
            self.card.take(wanted - self.weights_mib)
        else:
            self.card.give(self.weights_mib - wanted)
        self.weights_mib = wanted
        super().apply(step)

    def prepare(self, picture: Picture) -> ModelInput:
        """Return a small input for any side, because thousands of masks are drawn."""
        frame = InputTransform(picture.size, 16, Size(16, 16), two_step=False)
        return ModelInput(np.zeros((16, 16, 3), np.uint8), frame, picture.digest)

    def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
        found: list[Embedding] = []
        for chunk in chunks(pictures, self.step.batch):
            with self._activations("encode", len(chunk)):
                made = super().encode(chunk)
            found += [self._kept(embedding) for embedding in made]
        return found

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Logits]:
        for group in prompt_groups(prompts):
            for chunk in chunks(group, self.step.prompts_per_call):
                with self._activations("decode", len(chunk)):
                    pass
        return super().decode(embedding, prompts)

    @contextmanager
    def _activations(self, call: Call, count: int) -> Iterator[None]:
        step = self.step
        mib = self.truth * self.footprint.call_mib(call, step.precision, step.side, count)
        with self.card.taken(0.0 if step.device == "cpu" else mib):
            yield

    def _kept(self, embedding: Embedding) -> Embedding:
        """Take the embedding's memory until the embedding is garbage-collected."""
        assert isinstance(embedding, FakeEmbedding)
        frame = embedding.frame
        mib = self.footprint.embedding_mib(self.step.precision, self.step.side)
        kept = Kept(frame, embedding.digest, int(mib * MIB))
        if self.step.device != "cpu":
            self.card.take(mib)
            weakref.finalize(kept, self.card.give, mib)
        return kept


class Kept(FakeEmbedding):
    """A subclass without slots, which allows weak references."""
