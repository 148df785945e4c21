"""What a command works on: the jobs of a task, and what is needed to read their shapes.

CVAT keeps annotations by job. Jobs of a video overlap (by 5 frames by default), and a frame that
two jobs cover has shapes of its own in each of them. Read from the task, boxes of such a frame are
merged, and masks are not: what two jobs hold cannot be told from what one job holds twice. So each
job is read, written and verified by itself.

Limitations: consensus replicas are used only if they are named.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sam_poll.core.errors import CvatError, ExitCode, UsageError
from sam_poll.integrations.cvat import shapes
from sam_poll.integrations.cvat.client import CvatClient
from sam_poll.integrations.cvat.response_checks import Answer
from sam_poll.integrations.cvat.shapes import FramePicture, Label

# Types of jobs. Servers before 2.5 have annotation jobs only, and send no type.
_ANNOTATION, _GROUND_TRUTH = "annotation", "ground_truth"
_HONEYPOTS = "gt_pool"  # a task's validation mode


@dataclass(frozen=True, slots=True)
class Job:
    """A job: its number, and the numbers in the task of its first and last frame."""

    id: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Scope:
    """The jobs to work on, with the labels, and the frames of at least these jobs by number.

    `honeypots` are the frames that the server has inserted to check annotators.
    """

    jobs: tuple[Job, ...]
    labels: Mapping[int, Label]
    frames: Mapping[int, FramePicture]
    honeypots: frozenset[int]

    def job_of_frame(self) -> dict[int, int]:
        """Return the number of a job that covers each frame, by the frame's number."""
        return {number: job.id for job in self.jobs for number in range(job.first, job.last + 1)}

    def covered_frames(self) -> list[FramePicture]:
        """Return the frames of the jobs, in their order."""
        covered = self.job_of_frame()
        return [frame for number, frame in sorted(self.frames.items()) if number in covered]


def of(client: CvatClient, task: int, jobs: Sequence[int]) -> Scope:
    """Return these jobs of a task, or, where none are named, all its annotation jobs.

    Raises CvatError, and UsageError for a job of another task and for a ground truth job.
    """
    return _of_jobs(client, task, jobs) if jobs else _of_task(client, task)


def _of_task(client: CvatClient, task: int) -> Scope:
    """Return all annotation jobs of a task. Raises CvatError."""
    honeypots: frozenset[int] = frozenset()
    try:
        mode = client.task(task).get("validation_mode")
    except CvatError as error:
        if error.kind == ExitCode.CVAT_FORBIDDEN:
            error.remedy = f"name the jobs that you are assigned with --job, or {error.remedy}"
        raise
    if mode == _HONEYPOTS:
        honeypots = client.honeypot_frames(task)
    labels = _labels(client, client.labels(task=task))
    jobs = [job for job in client.jobs(task) if _kind(job) == _ANNOTATION]
    return Scope(
        tuple(sorted(map(_job, jobs), key=lambda job: (job.first, job.id))),
        labels,
        shapes.frames_of(client.meta(task)),
        honeypots,
    )


def _of_jobs(client: CvatClient, task: int, numbers: Iterable[int]) -> Scope:
    """Return these jobs of a task. No permission for the task is needed. Raises as `of`."""
    jobs = []
    frames: dict[int, FramePicture] = {}
    honeypots: frozenset[int] = frozenset()
    for number in dict.fromkeys(numbers):
        answer = client.job(number)
        _check(answer, task)
        job = _job(answer)
        jobs.append(job)
        frames |= shapes.frames_of(client.meta(task, job=number), first=job.first)
        honeypots |= client.honeypot_frames(task, job=number)
    labels = _labels(client, client.labels(job=jobs[0].id))
    return Scope(tuple(jobs), labels, frames, honeypots)


def _labels(client: CvatClient, entries: Iterable[Answer]) -> dict[int, Label]:
    native_score = shapes.has_native_score(client.version())
    return shapes.labels_of(entries, native_score=native_score)


def _check(job: Answer, task: int) -> None:
    if job["task_id"] != task:
        raise UsageError(
            f"it belongs to task {job['task_id']}, not to task {task}",
            place=f"--job {job['id']}",
            remedy="both numbers are in the job's address: …/tasks/TASK_ID/jobs/ID",
        )
    if _kind(job) == _GROUND_TRUTH:
        raise UsageError(
            "it is a ground truth job, which annotations are compared with",
            place=f"--job {job['id']}",
            remedy="name annotation jobs",
        )


def _kind(job: Answer) -> str:
    return str(job.get("type") or _ANNOTATION)


def _job(answer: Answer) -> Job:
    return Job(int(answer["id"]), int(answer["start_frame"]), int(answer["stop_frame"]))
