"""Interfaces between the parts: job sources, engines, tiled jobs and output formats.

All implementations of an interface pass one shared class of contract tests.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from threading import Event
from typing import Protocol

from sam_poll.core.errors import SamPollError
from sam_poll.core.types import (
    ConceptRequest,
    Exemplar,
    FloatArray,
    InputTransform,
    Job,
    Logits,
    ModelInfo,
    ModelInput,
    OutputFile,
    PackedEmbedding,
    PackedMask,
    Picture,
    Prompt,
    Result,
)


class Embedding(Protocol):
    """The encoder's output for a picture; only the engine that made it reads its content."""

    @property
    def frame(self) -> InputTransform: ...
    @property
    def nbytes(self) -> int: ...
    def array(self) -> FloatArray:
        """Return the coarsest level unchanged, for clients with a decoder of their own.

        float32, 1×C×h×w, in host memory. Called on the device thread.
        """
        ...


class JobSource(Protocol):
    """Where jobs come from and where their results go.

    Each job ends with one call of `deliver`, `reject`, `requeue`, `defer` or `fail_attempt`, from
    any thread.

    - `jobs` claims a job when the next one is requested, and ends when `stop` is set or no further
      job can come. Closing it requeues jobs that were claimed but not handed out.
    - `deliver` and `reject` raise OSError while the share or the server is unavailable; the caller
      retries or requeues.
    - `requeue` gives the job back as if it had not been claimed; with `trouble`, an error of
      reading it, the job is not offered again at once.
    - `defer` gives the job back because its picture is incomplete, or not the one that its prompt
      names. It is offered again when the picture has changed, and rejected with `error` after a
      while without a change.
    - `fail_attempt` is for a job whose process has ended, maybe because of it; it is offered again
      as a further attempt.
    - ClaimLostError from any of them: the job no longer belongs to this source and needs no further
      call.
    """

    def jobs(self, stop: Event) -> Generator[Job, None, None]: ...
    def deliver(self, job: Job, documents: Sequence[OutputFile]) -> None: ...
    def reject(self, job: Job, error: SamPollError) -> None: ...
    def requeue(self, job: Job, trouble: OSError | None = None) -> None: ...
    def defer(self, job: Job, error: SamPollError) -> None: ...
    def fail_attempt(self, job: Job) -> None: ...


class Engine(Protocol):
    """A network.

    `prepare`, `unpack` and `check_concept` are called from any thread, the other methods from the
    device thread only.

    `candidates` takes each of `points` (x, y in the picture's pixels) as a click on an object, and
    returns those of its three masks whose predicted IoU and stability score reach `iou` and
    `stability`, in the order of the points. With a threshold of 0 every mask with a set pixel
    passes.

    `check_concept` raises PromptError for a concept request that the network cannot take: it takes
    none, or a text is too long for it. `find` returns, for each of `texts`, the objects whose score
    exceeds `threshold`, best first, at most `most` of them. An empty text stands for `exemplars`
    alone, whose boxes are in the picture.
    """

    @property
    def info(self) -> ModelInfo: ...
    @property
    def batch(self) -> int:
        """Maximum number of pictures that `encode` takes in one call at present."""
        ...

    def prepare(self, picture: Picture) -> ModelInput: ...
    def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]: ...
    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Logits]: ...
    def candidates(
        self,
        embedding: Embedding,
        points: Sequence[tuple[float, float]],
        *,
        iou: float,
        stability: float,
    ) -> list[PackedMask]: ...
    def pack(self, embedding: Embedding) -> PackedEmbedding:
        """Copy an embedding to main memory, in half precision."""
        ...

    def unpack(self, packed: PackedEmbedding) -> Embedding | None:
        """Return a packed embedding as one of this engine, in main memory.

        None where it has another form than those that this engine has made at its precision and
        side; so, too, before it has made one.
        """
        ...

    def check_concept(self, request: ConceptRequest) -> None: ...
    def find(
        self,
        embedding: Embedding,
        texts: Sequence[str],
        exemplars: Sequence[Exemplar],
        *,
        threshold: float,
        most: int,
    ) -> list[list[PackedMask]]: ...
    def on_memory_pressure(self, evict: Callable[[], bool]) -> None:
        """Register a function that frees cached memory (embeddings) and returns whether it did.

        It is called on the device thread when memory runs out, before the memory plan takes its
        next step.
        """
        ...


class TiledJob(Protocol):
    """A job that is processed piece by piece.

    `take` and `documents` may raise every error that ends a job.
    """

    def take(self, engine: Engine) -> bool | None:
        """Process one piece, on the device thread.

        Returns True when there may be more, False when all pieces are done, None when the remaining
        pieces are being processed by helpers.
        """
        ...

    def documents(self) -> Sequence[OutputFile]:
        """Return the output files when all pieces are done. Called on the finish pool."""
        ...

    @property
    def found(self) -> int:
        """Number of objects in the output."""
        ...

    def close(self) -> None:
        """Release files and memory, however the job ends.

        Callable from any thread, and more than once.
        """
        ...


class Format(Protocol):
    """Converts a result into the files of one output format. Pure: returns bytes, does no I/O.

    Each file's suffix is `.<format>.<extension>` (`.mask.png`), or
    `.<format>.<anything>.<extension>` where a format makes several files of one kind
    (`.mask.1.png`). `<format>` is the format's name in `formats.registry`: readers of output files
    recognise the format by it.
    """

    def __call__(self, result: Result) -> Sequence[OutputFile]: ...
