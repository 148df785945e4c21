"""A fake engine without torch, for tests and for trying out a share: masks drawn from the prompts.

A box becomes an ellipse, a point a disc; a background point cuts a disc out. A rough shape is its
own mask. The same prompt always gives the same mask. Errors can be injected to test the code that
uses an engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event, Lock
from typing import Literal

import numpy as np
import numpy.typing as npt

from sam_poll.core.protocols import Embedding
from sam_poll.core.types import (
    Box,
    ConceptRequest,
    Exemplar,
    FloatArray,
    InputTransform,
    Logits,
    ModelInfo,
    ModelInput,
    PackedEmbedding,
    PackedLevel,
    PackedMask,
    Picture,
    Point,
    Prompt,
    Size,
)
from sam_poll.engines import concepts
from sam_poll.engines.memory.batching import prompt_groups
from sam_poll.engines.memory.plan import MemoryStep
from sam_poll.imaging.automatic_masks import pack
from sam_poll.imaging.rough_shapes import mask_input

RADIUS = 1 / 8  # of a point's disc, as a fraction of the picture's shorter side
# Logits per pixel at the outlines of automatic masks. Steep outlines make the masks stable.
STEEPNESS = 32.0
_PACKED = 64  # values of a packed embedding, which hold its digest
# Most words in a text of a concept request
MAX_WORDS = 30
# Longest wait for the gate, in seconds, so that a test which never opens it does not hang.
HOLD_S = 60.0


@dataclass(frozen=True, slots=True, eq=False)
class FakeEmbedding:
    """The frame and the digest of a picture, in place of an embedding."""

    frame: InputTransform
    digest: str
    nbytes: int = 1024

    def array(self) -> FloatArray:
        """Return zeros of the shape of a SAM embedding."""
        return np.zeros((1, 256, self.frame.side // 16, self.frame.side // 16), dtype=np.float32)


class FakeEngine:
    """An engine (`core.protocols.Engine` and `memory.adaptive.AdjustableEngine`) in numpy.

    `calls` counts the calls of the network, `encoded` lists the digests of the encoded pictures,
    `applied` the steps of `apply`. `encode` waits until `gate`, if there is one, is set. `fail`
    injects an error.
    """

    def __init__(self, *, side: int = 256, batch: int = 4, gate: Event | None = None) -> None:
        self.step = MemoryStep("float32", 64, batch, side, "cpu")
        self.gate = gate
        self.calls = Counter(encode=0, decode=0)
        self.encoded: list[str] = []
        self.applied: list[MemoryStep] = []
        self._faults: dict[tuple[str, int], Exception] = {}
        self._lock = Lock()

    def fail(
        self,
        call: Literal["encode", "decode", "find"],
        error: Exception,
        *,
        at: int = 1,
        times: int = 1,
    ) -> None:
        """Raise `error` in the `at`-th `call` from now on and in the `times - 1` calls after it."""
        with self._lock:
            first = self.calls[call] + at
            self._faults.update({(call, number): error for number in range(first, first + times)})

    @property
    def info(self) -> ModelInfo:
        """Return the model's name and the step that it runs on."""
        step = self.step
        return ModelInfo("fake", "fake", step.side, step.device, step.precision, str(step))

    @property
    def batch(self) -> int:
        """Return the largest number of pictures in one call of `encode`."""
        return self.step.batch

    def prepare(self, picture: Picture) -> ModelInput:
        """Return the picture sampled at side×side, nearest neighbour."""
        side = self.step.side
        height, width = picture.pixels.shape[:2]
        rows, columns = (np.arange(side) * length // side for length in (height, width))
        frame = InputTransform(picture.size, side, Size(side, side), two_step=False)
        return ModelInput(picture.pixels[rows[:, None], columns], frame, picture.digest)

    def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
        """Return one embedding per picture, once the gate is open."""
        self._count("encode")
        if self.gate and not self.gate.wait(HOLD_S):
            raise TimeoutError(f"the fake engine's gate was not opened within {HOLD_S:g} s")
        self.encoded.extend(picture.digest for picture in pictures)
        return [FakeEmbedding(picture.frame, picture.digest) for picture in pictures]

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Logits]:
        """Return the drawn mask of each prompt, in order."""
        self._count("decode")
        frame = embedding.frame
        prompt_groups(prompts)  # raises PromptError for an empty prompt
        return [
            Logits(drawn(prompt, frame), 0.9 if prompt.ambiguous else 0.95, frame)
            for prompt in prompts
        ]

    def candidates(
        self,
        embedding: Embedding,
        points: Sequence[tuple[float, float]],
        *,
        iou: float,
        stability: float,
    ) -> list[PackedMask]:
        """Return, for each point, the ellipse in its quarter of the picture."""
        self._count("decode")
        masks = []
        for box in (_quarter(point, embedding.frame.size) for point in points):
            plane = drawn(Prompt(box=box), embedding.frame) * STEEPNESS
            mask_stability = float((plane > 1).sum() / max(1, (plane > -1).sum()))
            packed = pack(plane, 0.9, mask_stability, embedding.frame)
            if packed and iou <= 0.9 and stability <= mask_stability:
                masks.append(packed)
        return masks

    def pack(self, embedding: Embedding) -> PackedEmbedding:
        """Return the digest as the data of an embedding."""
        assert isinstance(embedding, FakeEmbedding)
        data = embedding.digest.encode().ljust(2 * _PACKED)[: 2 * _PACKED]
        level = PackedLevel(memoryview(data), "float16", "float32", (1, 1, 1, _PACKED))
        frame = embedding.frame
        return PackedEmbedding(frame.size, frame.side, self.step.precision, (level,))

    def unpack(self, packed: PackedEmbedding) -> Embedding | None:
        """Return the embedding whose digest was packed."""
        if [level.shape for level in packed.levels] != [(1, 1, 1, _PACKED)]:
            return None
        frame = InputTransform(
            packed.size, packed.side, Size(packed.side, packed.side), two_step=False
        )
        return FakeEmbedding(
            frame, bytes(packed.levels[0].data).decode("ascii", "replace").rstrip()
        )

    def check_concept(self, request: ConceptRequest) -> None:
        """Raise PromptError for a text of more than `MAX_WORDS` words."""
        for index, text in enumerate(request.texts):
            words = len(text.split())
            if words > MAX_WORDS:
                raise concepts.too_long(request, index, words, MAX_WORDS)

    def find(
        self,
        embedding: Embedding,
        texts: Sequence[str],
        exemplars: Sequence[Exemplar],
        *,
        threshold: float,
        most: int,
    ) -> list[list[PackedMask]]:
        """Return, for each text, ellipses in the exemplars and in a quarter for each of its words.

        The word `nothing` has none. Scores decrease from 0.9 by a tenth.
        """
        self._count("find")
        return [self._found(embedding.frame, text, exemplars, threshold)[:most] for text in texts]

    def _found(
        self, frame: InputTransform, text: str, exemplars: Sequence[Exemplar], threshold: float
    ) -> list[PackedMask]:
        boxes = [exemplar.box for exemplar in exemplars if exemplar.label]
        quarters = [sum(word.encode()) % 4 for word in text.split() if word != "nothing"]
        boxes += [
            _quarter((quarter % 2 * frame.size.width, quarter // 2 * frame.size.height), frame.size)
            for quarter in quarters
        ]
        found = []
        for index, box in enumerate(boxes):
            score = 0.9 - 0.1 * index
            packed = pack(drawn(Prompt(box=box), frame), score, 1.0, frame)
            if packed and score > threshold:
                found.append(packed)
        return found

    def on_memory_pressure(self, evict: Callable[[], bool]) -> None:
        """Do nothing: this engine uses no device memory."""

    def apply(self, step: MemoryStep) -> None:
        """Switch to `step` and append it to `applied`."""
        self.step = step
        self.applied.append(step)

    def free(self) -> None:
        """Do nothing: there is no memory to return."""

    def memory_report(self) -> str:
        """Return a text for error messages."""
        return "no memory at all"

    def _count(self, call: str) -> None:
        with self._lock:
            self.calls[call] += 1
            error = self._faults.pop((call, self.calls[call]), None)
        if error:
            raise error


def drawn(prompt: Prompt, frame: InputTransform) -> FloatArray:
    """Return logits, float32 side×side, that are positive inside the prompt's shape.

    Across an outline they change by about 1 per pixel of the picture.
    """
    width, height = frame.size
    side = frame.side
    x = (np.arange(side) + 0.5) * width / side
    y = ((np.arange(side) + 0.5) * height / side)[:, None]
    radius = RADIUS * min(width, height)
    if prompt.shape:
        shape = mask_input(prompt.shape, frame, side).astype(np.float64)
    elif prompt.box:
        shape = _ellipse(prompt.box, x, y)
    else:
        shape = np.full((side, side), -np.inf)
    for point in prompt.points:
        disc = _disc(point, radius, x, y)
        shape = np.maximum(shape, disc) if point.label else np.minimum(shape, -disc)
    return np.clip(shape, -32, 32).astype(np.float32)


def _quarter(point: tuple[float, float], size: Size) -> Box:
    """Return the quarter of the picture that contains the point, without a margin of a tenth."""
    half_width, half_height = size.width / 2, size.height / 2
    x = half_width * (point[0] >= half_width)
    y = half_height * (point[1] >= half_height)
    return Box(
        x + half_width / 10, y + half_height / 10, x + half_width * 0.9, y + half_height * 0.9
    )


def _ellipse(
    box: Box, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    half_width, half_height = (box.x1 - box.x0) / 2, (box.y1 - box.y0) / 2
    radial = np.hypot(
        (x - (box.x0 + half_width)) / half_width, (y - (box.y0 + half_height)) / half_height
    )
    return (1 - radial) * min(half_width, half_height)


def _disc(
    point: Point, radius: float, x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    return radius - np.hypot(x - point.x, y - point.y)
