"""A job source in memory, and a pipeline run over it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

from sam_poll.core.errors import SamPollError
from sam_poll.core.types import Box, Job, OutputFile, Prompt
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.pipeline import Pipeline
from tests.conftest import picture_bytes

ONE = (Prompt("dog", box=Box(5, 5, 40, 40)),)


class MemorySource:
    """A source of given jobs that keeps what becomes of them.

    `faults` are raised by the first deliveries.
    """

    def __init__(self, jobs: Sequence[Job], faults: Sequence[Exception] = ()) -> None:
        self.waiting, self.faults = list(jobs), list(faults)
        self.handed = 0
        self.delivered: dict[str, list[OutputFile]] = {}
        self.rejected: dict[str, SamPollError] = {}
        self.released: list[str] = []
        self.troubles: list[OSError] = []
        self.deferred: dict[str, SamPollError] = {}
        self.lock = threading.Lock()

    def jobs(self, stop: threading.Event) -> Iterator[Job]:
        for job in self.waiting:
            if stop.is_set():
                return
            self.handed += 1
            yield job

    def deliver(self, job: Job, documents: Sequence[OutputFile]) -> None:
        with self.lock:
            if self.faults:
                raise self.faults.pop(0)
            assert job.id not in self.delivered
            self.delivered[job.id] = list(documents)

    def reject(self, job: Job, error: SamPollError) -> None:
        self.rejected[job.id] = error

    def requeue(self, job: Job, trouble: OSError | None = None) -> None:
        with self.lock:
            self.released.append(job.id)
            if trouble:
                self.troubles.append(trouble)

    def defer(self, job: Job, error: SamPollError) -> None:
        self.deferred[job.id] = error


def job(name: str, seed: int = 0, prompts: Any = ONE, **more: Any) -> Job:
    return Job(name, f"{name}.jpg", picture_bytes(seed=seed), prompts, **more)


def run(
    source: MemorySource, engine: Any = None, stop: threading.Event | None = None, **more: Any
) -> Pipeline:
    made = registry.load(["mask"], registry.FormatOptions())
    options = PipelineOptions(
        **{k: more.pop(k) for k in list(more) if k in PipelineOptions.__dataclass_fields__}
    )
    pipeline = Pipeline(engine or FakeEngine(), made, options=options, **more)
    pipeline.run(source, stop or threading.Event())
    return pipeline
