"""A job on its way through the stages of the pipeline.

A task holds its picture and its embedding until the stage that needs them is over. How many tasks
there are at once is bounded by the pipeline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from loguru import logger

from sam_poll.core.protocols import Embedding, TiledJob
from sam_poll.core.text import shown
from sam_poll.core.types import (
    AutomaticMaskRequest,
    ConceptRequest,
    FloatArray,
    Job,
    Logits,
    Mask,
    ModelInfo,
    ModelInput,
    OutputFile,
    PackedMask,
    Picture,
    Prompt,
    Result,
    Size,
)
from sam_poll.imaging.found_objects import FoundObjects
from sam_poll.pipeline.embedding_cache import Key
from sam_poll.pipeline.stored_embeddings import StoredEmbedding

NOTHING_FOUND = (
    "no mask reaches everything's iou, stability and min_area: lower them, or take a larger model"
)
_SCORES_LOGGED = 5


@dataclass(eq=False)
class Task:
    """State of a job in the pipeline. Each stage adds its part and drops what is not needed later.

    - `key`: of the embedding in the cache.
    - `stored`: the embedding as it is, or is to be, in the disk cache.
    - `picture`: kept only as long as a later stage draws on it or cuts crops from it.
    - `concept`: a concept request, as it applies to the picture.
    - `logits`: one for each prompt. `packed_masks`: of a job that asks for all objects. `found`: of
      one that asks for all objects of a kind.
    - `array`: the embedding itself, for a job that asks for it.
    - `tiled_job`: of a job that is done tile by tile.
    - `on_failed_device`: the job was on the device when the device failed.
    - `rejecting`: the job is to be rejected; its rejection is retried until it can be written.
    - `harmless`: set when the job has ended, or has done a tile, without ending the process.
    """

    job: Job
    prompts: tuple[Prompt, ...] = ()
    concept: ConceptRequest | None = None
    key: Key = ("", 0)
    size: Size | None = None
    notes: tuple[str, ...] = ()
    picture: Picture | None = None
    prepared: ModelInput | None = None
    embedding: Embedding | None = None
    stored: StoredEmbedding | None = None
    logits: list[Logits] = field(default_factory=list)
    packed_masks: list[PackedMask] = field(default_factory=list)
    found: FoundObjects | None = None
    array: FloatArray | None = None
    tiled_job: TiledJob | None = None
    info: ModelInfo | None = None
    timings: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    on_failed_device: bool = False
    rejecting: bool = False
    harmless: threading.Event = field(default_factory=threading.Event)

    @property
    def cancelled(self) -> bool:
        """Whether the client no longer waits for the answer."""
        return self.job.cancelled is not None and self.job.cancelled.is_set()

    @property
    def crops(self) -> int:
        """How many layers of crops, cut from the picture itself, the job asks for."""
        return self.job.prompts.crops if isinstance(self.job.prompts, AutomaticMaskRequest) else 0


class JobInterrupted(Exception):  # noqa: N818  no error: the run ends, or the client has left
    """The work on a job stops between two steps; the job is requeued."""


def result_of(task: Task, masks: Sequence[Mask], kept: str | None = None) -> Result:
    """Return the result of a task whose stages are done; `kept` as in `Result`."""
    assert task.size is not None
    assert task.info is not None
    prompt_notes = tuple(note for prompt in task.prompts for note in prompt.notes)
    if task.concept:
        prompt_notes = task.concept.notes
    notes = task.job.notes + task.notes + prompt_notes
    if isinstance(task.job.prompts, AutomaticMaskRequest) and not masks:
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
        kept=kept,
    )


class StageTimer:
    """Records the milliseconds of a stage in the task; with `add`, in addition to earlier ones."""

    def __init__(self, task: Task, stage: str, *, add: bool = False) -> None:
        self._task = task
        self._stage = stage
        self._before = task.timings.get(stage, 0.0) if add else 0.0

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        elapsed_ms = (time.monotonic() - self._started) * 1000
        self._task.timings[self._stage] = self._before + elapsed_ms


def log_answer(result: Result, documents: Sequence[OutputFile]) -> None:
    """Log one line for an answered job, and one for each note of it and of its outputs."""
    ms = _stage_times(result.timings)
    scores = " ".join(
        f"{shown(mask.label)}={mask.score:.2f}" for mask in result.masks[:_SCORES_LOGGED]
    )
    count = len(result.masks)
    more = f" … {count} objects" if count > _SCORES_LOGGED else ""
    logger.info("job {} done: {}{} ({} ms)", shown(result.job_id), scores, more, ms)
    output_notes = [note for document in documents for note in document.notes]
    for note in dict.fromkeys([*result.notes, *output_notes]):
        logger.info("job {}: {}", shown(result.job_id), shown(note))


def log_tiled_answer(task: Task, objects: int) -> None:
    """Log one line for an answered tiled job, and one for each of its notes."""
    ms = _stage_times(task.timings)
    logger.info("job {} done: {} objects ({} ms)", shown(task.job.id), objects, ms)
    for note in task.job.notes:
        logger.info("job {}: {}", shown(task.job.id), shown(note))


def _stage_times(timings: Mapping[str, float]) -> str:
    return " ".join(f"{stage} {value:.0f}" for stage, value in timings.items())


class CombinedEvent:
    """A stop event that also counts as set while a condition holds."""

    def __init__(self, stop: threading.Event, condition: Callable[[], bool]) -> None:
        self._stop = stop
        self._condition = condition

    def is_set(self) -> bool:
        """Return whether the event is set or the condition holds."""
        return self._stop.is_set() or self._condition()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the event, not for the condition; return as `is_set`."""
        return self._stop.wait(timeout) or self._condition()
