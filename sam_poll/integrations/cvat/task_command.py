"""What `cvat masks` and `cvat find` share: the order of their steps on a task.

    read the jobs → plan → run the pipeline for what the journal lacks → write each job → print

Each step can be interrupted at any point; the next run does what is left (`journal`, `upload`). A
command says what is to be done in a job, which answers it needs, and how they become shapes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from sam_poll.config.settings import Settings
from sam_poll.core.errors import ExitCode, SamPollError
from sam_poll.core.protocols import Engine
from sam_poll.integrations.cvat import frame_runner, task_source
from sam_poll.integrations.cvat import scope as scopes
from sam_poll.integrations.cvat.client import CvatClient
from sam_poll.integrations.cvat.frame_runner import FrameRunner, MakeEngine
from sam_poll.integrations.cvat.journal import Journal, folder_of
from sam_poll.integrations.cvat.scope import Job
from sam_poll.integrations.cvat.upload import DONE, WRITTEN, job_list
from sam_poll.runtime import builders, signals


class TaskOptions(Protocol):
    """The options that the commands have in common."""

    @property
    def jobs(self) -> tuple[int, ...]:
        """Jobs of the task to work on; empty: all annotation jobs."""

    @property
    def images(self) -> Path | None:
        """Share that the pictures are read from; None: they are downloaded."""

    @property
    def again(self) -> bool:
        """Whether shapes of earlier runs are written again where they are missing."""

    @property
    def dry_run(self) -> bool:
        """Whether the plan is only printed."""


class JobPlan(Protocol):
    """The plan for a job."""

    @property
    def refused(self) -> list[tuple[str, SamPollError]]:
        """Pairs of a picture's name and why something on it cannot be done."""


OptionsT = TypeVar("OptionsT", bound=TaskOptions)
PlanT = TypeVar("PlanT", bound=JobPlan)
OutcomeT = TypeVar("OutcomeT")


@dataclass(frozen=True, slots=True)
class JobWork(Generic[PlanT]):
    """What there is to do in one job; `annotations` is what it held when the command started."""

    job: Job
    annotations: Mapping[str, Any]
    plan: PlanT


class TaskCommand(ABC, Generic[OptionsT, PlanT, OutcomeT]):
    """A command on a task. `run` does its steps; a subclass defines what they are.

    `state` is the folder for journals, `name` begins the name of this command's.
    """

    def __init__(
        self,
        client: CvatClient,
        task: int,
        options: OptionsT,
        settings: Settings,
        state: Path,
        *,
        name: str,
    ) -> None:
        self.client = client
        self.task = task
        self.options = options
        self.settings = settings
        self.scope = scopes.of(client, task, options.jobs)
        self.journal = Journal(folder_of(state, client.host, f"{name}-{task}"))

    def run(self, engine_of: MakeEngine) -> ExitCode:
        """Do all steps, and print what was done.

        Returns FAILED_JOBS where something was refused or could not be computed. Raises CvatError,
        ModelError and the other errors that end the whole command.
        """
        annotations = {
            job: self.client.annotations(self.task, job=job.id) for job in self.scope.jobs
        }
        if self.options.dry_run:
            return _exit_code(self._planned(annotations))
        with self.journal:
            works = self._planned(annotations)
            # Before anything is computed
            for work in works:
                if self.writes(work):
                    self.client.check_write_access(self.task, job=work.job.id)
            with frame_runner.resumable(self.journal):
                failed = self._compute(works, engine_of)
                outcome = self.write(works)
        self.print_outcome(outcome, works)
        return ExitCode.FAILED_JOBS if failed else _exit_code(works)

    def _planned(self, annotations: Mapping[Job, Mapping[str, Any]]) -> list[JobWork[PlanT]]:
        works = []
        for job, held in annotations.items():
            written = self.journal.lines(job_list(WRITTEN, job.id))
            works.append(JobWork(job, held, self.plan(job, held["shapes"], written)))
        self.print_plan(works)
        return works

    def _compute(
        self, works: Sequence[JobWork[PlanT]], engine_of: MakeEngine
    ) -> list[task_source.FrameRequest]:
        """Run the pipeline on what the journal has no answer for.

        Returns the requests that failed; each is printed when it fails.
        """
        requests = self.requests(works)
        if not requests:
            return []
        jobs = self.scope.job_of_frame()
        fetch = task_source.fetch_from(self.options.images, self.client, self.task, jobs)
        with signals.stop_on_signals() as stop:
            engine = engine_of(self.settings)
            self.check(engine, works)
            failed = FrameRunner(self.settings, self.journal).run(
                engine, requests, fetch, stop, builders.disk_cache_of(self.settings)
            )
            if stop.is_set():
                raise KeyboardInterrupt
        if isinstance(fetch, task_source.ServerPictures):
            frame_runner.print_missing(fetch.missing_on_share(self.scope.frames.values()))
        return failed

    def done_before(self, job: Job) -> set[str]:
        """Return the objects of a job whose shapes earlier runs have written, by their keys."""
        return set() if self.options.again else self.journal.lines(job_list(DONE, job.id))

    @property
    def title(self) -> str:
        """What the command works on, for its first and last line."""
        return frame_runner.title(self.task, self.options.jobs)

    # ── for subclasses ──

    @abstractmethod
    def plan(self, job: Job, entries: Sequence[Mapping[str, Any]], written: set[str]) -> PlanT:
        """Return the plan for a job's shapes.

        `written`: fingerprints (hex) of the shapes that earlier runs have written.
        """

    @abstractmethod
    def writes(self, work: JobWork[PlanT]) -> bool:
        """Return whether a job may have to be changed."""

    @abstractmethod
    def requests(self, works: Sequence[JobWork[PlanT]]) -> Sequence[task_source.FrameRequest]:
        """Return the frames whose answers are needed and not in the journal."""

    def check(self, engine: Engine, works: Sequence[JobWork[PlanT]]) -> None:
        """Raise UsageError where the network does not take a request. No picture was fetched."""

    @abstractmethod
    def write(self, works: Sequence[JobWork[PlanT]]) -> OutcomeT:
        """Upload the shapes of all answers to each job, and verify them."""

    @abstractmethod
    def print_plan(self, works: Sequence[JobWork[PlanT]]) -> None:
        """Print what is going to be done, and what is refused or left out."""

    @abstractmethod
    def print_outcome(self, outcome: OutcomeT, works: Sequence[JobWork[PlanT]]) -> None:
        """Print what was done."""


def _exit_code(works: Sequence[JobWork[PlanT]]) -> ExitCode:
    refused = any(work.plan.refused for work in works)
    return ExitCode.FAILED_JOBS if refused else ExitCode.OK


def print_refused(works: Sequence[JobWork[PlanT]]) -> None:
    """Print what is refused, that of a frame of two jobs once, and each remedy once."""
    refused = {(name, str(error)): error for work in works for name, error in work.plan.refused}
    remedies: set[str] = set()
    for (name, _), error in refused.items():
        frame_runner.print_refusal(name, error, remedies)
