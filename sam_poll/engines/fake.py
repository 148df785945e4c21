"""A network that is none: masks straight from the prompts, without torch, for tests and for trying out a share.

Boxes become ellipses, points become discs, background points cut discs out; the same prompt always gives the same mask.
Faults can be injected, so that what stands around an engine can be tested. What can still go wrong here: whatever a
test asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event, Lock
from typing import Literal

import numpy as np
import numpy.typing as npt

from sam_poll.engines.chunks import prompt_groups
from sam_poll.engines.memory import Step
from sam_poll.everything import pack
from sam_poll.types import (
    Box,
    Candidate,
    Embedding,
    Field,
    Frame,
    Logits,
    ModelInfo,
    Picture,
    Point,
    Prepared,
    Prompt,
    Size,
)

RADIUS = 1 / 8  # of a point's disc, in parts of the picture's shorter side
STEEP = 32.0  # how much steeper than one a pixel the logits of everything mode run: their masks are stable
HOLD_S = 60.0  # how long a held call waits at most: a test that forgot to let go must not hang


@dataclass(frozen=True, slots=True, eq=False)
class FakeEmbedding:
    """Nothing but the frame and whose picture it is."""

    frame: Frame
    digest: str
    nbytes: int = 1024

    def array(self) -> Field:
        return np.zeros((1, 256, self.frame.side // 16, self.frame.side // 16), dtype=np.float32)


class FakeEngine:
    """`types.Engine` (and `adaptive.Steppable`) in numpy.

    `calls` counts encodes and decodes, `encoded` lists the digests of the pictures encoded. `fail` injects a fault.
    `gate`: encode waits until it is set.
    """

    def __init__(self, *, side: int = 256, batch: int = 4, gate: Event | None = None) -> None:
        self.step = Step("float32", 64, batch, side, "cpu")
        self.gate = gate
        self.calls = {"encode": 0, "decode": 0}
        self.encoded: list[str] = []
        self.applied: list[Step] = []
        self._faults: dict[tuple[str, int], Exception] = {}
        self._lock = Lock()

    def fail(self, call: Literal["encode", "decode"], error: Exception, *, at: int = 1, times: int = 1) -> None:
        """Raises `error` in the `at`-th next `call` and in the `times - 1` after it."""
        with self._lock:
            first = self.calls[call] + at
            self._faults.update({(call, number): error for number in range(first, first + times)})

    @property
    def info(self) -> ModelInfo:
        step = self.step
        return ModelInfo("fake", "fake", step.side, step.device, step.precision, str(step))

    @property
    def batch(self) -> int:
        return self.step.batch

    def prepare(self, picture: Picture) -> Prepared:
        side = self.step.side
        height, width = picture.pixels.shape[:2]
        rows, columns = (np.arange(side) * length // side for length in (height, width))
        frame = Frame(picture.size, side, Size(side, side), two_step=False)
        return Prepared(picture.pixels[rows[:, None], columns], frame, picture.digest)

    def encode(self, pictures: Sequence[Prepared]) -> list[Embedding]:
        self._count("encode")
        if self.gate and not self.gate.wait(HOLD_S):
            raise TimeoutError("nobody opened the fake engine's gate")
        self.encoded.extend(picture.digest for picture in pictures)
        return [FakeEmbedding(picture.frame, picture.digest) for picture in pictures]

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Logits]:
        self._count("decode")
        frame = embedding.frame
        prompt_groups(prompts)
        return [Logits(drawn(prompt, frame), 0.9 if prompt.ambiguous else 0.95, frame) for prompt in prompts]

    def candidates(
        self, embedding: Embedding, points: Sequence[tuple[float, float]], *, iou: float, stability: float
    ) -> list[Candidate]:
        """An ellipse in each quarter of the picture, found by every point in it."""
        self._count("decode")
        found = []
        for box in (_quarter(point, embedding.frame.size) for point in points):
            plane = drawn(Prompt(box=box), embedding.frame) * STEEP
            steady = float((plane > 1).sum() / max(1, (plane > -1).sum()))
            packed = pack(plane, 0.9, steady, embedding.frame)
            if packed and iou <= 0.9 and stability <= steady:
                found.append(packed)
        return found

    def relieve_by(self, let_go: Callable[[], bool]) -> None:
        """Its memory never runs out by itself; `AdaptiveEngine` around it calls its own."""

    def apply(self, step: Step) -> None:
        self.step = step
        self.applied.append(step)

    def free(self) -> None:
        """Nothing to give back."""

    def memory_report(self) -> str:
        return "no memory at all"

    def _count(self, call: str) -> None:
        with self._lock:
            self.calls[call] += 1
            error = self._faults.pop((call, self.calls[call]), None)
        if error:
            raise error


def drawn(prompt: Prompt, frame: Frame) -> Field:
    """Logits, float32 side×side: positive inside the prompt's shape, about one per pixel of the picture."""
    width, height = frame.size
    side = frame.side
    x = (np.arange(side) + 0.5) * width / side
    y = ((np.arange(side) + 0.5) * height / side)[:, None]
    radius = RADIUS * min(width, height)
    shape = _ellipse(prompt.box, x, y) if prompt.box else np.full((side, side), -np.inf)
    for point in prompt.points:
        disc = _disc(point, radius, x, y)
        shape = np.maximum(shape, disc) if point.label else np.minimum(shape, -disc)
    return np.clip(shape, -32, 32).astype(np.float32)


def _quarter(point: tuple[float, float], size: Size) -> Box:
    """The quarter of the picture that a point lies in, but for a rim."""
    half = size.width / 2, size.height / 2
    x, y = (length * (place >= length) for place, length in zip(point, half, strict=True))
    return Box(x + half[0] / 10, y + half[1] / 10, x + half[0] * 0.9, y + half[1] * 0.9)


def _ellipse(box: Box, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    half_width, half_height = (box.x1 - box.x0) / 2, (box.y1 - box.y0) / 2
    radial = np.hypot((x - (box.x0 + half_width)) / half_width, (y - (box.y0 + half_height)) / half_height)
    return (1 - radial) * min(half_width, half_height)


def _disc(
    point: Point, radius: float, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    return radius - np.hypot(x - point.x, y - point.y)
