"""A job on its way through the stages of the pipeline.

What can still go wrong here: a task holds its picture and its embedding until the stage that needs them is over; how
many tasks there are at once is the pipeline's business.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loguru import logger

from sam_poll.embeddings import Key
from sam_poll.fs import shown
from sam_poll.types import (
    Candidate,
    Document,
    Embedding,
    Everything,
    Field,
    Job,
    Logits,
    Mask,
    ModelInfo,
    Picture,
    Pieces,
    Prepared,
    Prompt,
    Result,
    Size,
)

NOTHING_FOUND = "no mask reaches everything's iou, stability and min_area: lower them, or take a larger model"


@dataclass(eq=False)
class Task:
    """What has become of a job so far. Each stage fills in its part, and drops what the next ones do not need."""

    job: Job
    prompts: tuple[Prompt, ...] = ()
    key: Key = ("", 0)  # of the embedding
    size: Size | None = None
    notes: tuple[str, ...] = ()
    picture: Picture | None = None  # only as long as somebody will look at it
    prepared: Prepared | None = None
    embedding: Embedding | None = None
    logits: list[Logits] = field(default_factory=list)  # one for each prompt
    found: list[Candidate] = field(default_factory=list)  # where everything was asked for
    array: Field | None = None  # the embedding itself, where it was asked for
    pieces: Pieces | None = None  # where it is done in pieces
    info: ModelInfo | None = None
    timings: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    left: bool = False  # on the device when it failed
    refused: bool = False  # it is to be rejected
    proved: threading.Event = field(default_factory=threading.Event)  # it has ended, or done a piece that it had not

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self.job.gone is not None and self.job.gone.is_set()

    @property
    def crops(self) -> int:
        """How many layers of crops are asked for, which are cut from the picture itself."""
        return self.job.prompts.crops if isinstance(self.job.prompts, Everything) else 0


class Hurried(Exception):  # noqa: N818  not an error: the run ends, or nobody waits; the job goes back
    """The work on a job is broken off."""


def result_of(task: Task, masks: Sequence[Mask]) -> Result:
    """The answer, when all is known."""
    assert task.size is not None
    assert task.info is not None
    notes = task.job.notes + task.notes + tuple(note for prompt in task.prompts for note in prompt.notes)
    if isinstance(task.job.prompts, Everything) and not masks:
        notes += (NOTHING_FOUND,)
    return Result(
        job_id=task.job.id,
        name=task.job.name,
        size=task.size,
        masks=tuple(masks),
        prompts=task.prompts,
        model=task.info,
        picture=task.picture,
        timings=task.timings,
        notes=notes,
        embedding=task.array,
    )


class timed:  # noqa: N801  reads as a word in a `with`
    """Notes how many milliseconds a stage of a task took; with `add`, on top of what it took before."""

    def __init__(self, task: Task, stage: str, *, add: bool = False) -> None:
        self._task, self._stage = task, stage
        self._before = task.timings.get(stage, 0.0) if add else 0.0

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        self._task.timings[self._stage] = self._before + (time.monotonic() - self._started) * 1000


def log_answer(result: Result, documents: Sequence[Document]) -> None:
    """One line for each answered job, and one for each note of it and of its documents."""
    ms = " ".join(f"{stage} {value:.0f}" for stage, value in result.timings.items())
    scores = " ".join(f"{shown(m.label)}={m.score:.2f}" for m in result.masks[:5])
    more = f" … {len(result.masks)} objects" if len(result.masks) > 5 else ""
    logger.info("job {} done: {}{} ({} ms)", shown(result.job_id), scores, more, ms)
    for note in dict.fromkeys([*result.notes, *(note for document in documents for note in document.notes)]):
        logger.info("job {}: {}", shown(result.job_id), shown(note))


def log_pieces(task: Task, objects: int) -> None:
    """One line for an answered job that was done in pieces."""
    ms = " ".join(f"{stage} {value:.0f}" for stage, value in task.timings.items())
    logger.info("job {} done: {} objects ({} ms)", shown(task.job.id), objects, ms)
    for note in task.job.notes:
        logger.info("job {}: {}", shown(task.job.id), shown(note))


class Either:
    """A stop event that is also set when a condition holds."""

    def __init__(self, stop: threading.Event, also: Callable[[], bool]) -> None:
        self._stop, self._also = stop, also

    def is_set(self) -> bool:
        return self._stop.is_set() or self._also()

    def wait(self, timeout: float | None = None) -> bool:
        return self._stop.wait(timeout) or self._also()
