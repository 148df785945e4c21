"""The job source of `sam-poll predict`: files named on the command line, outputs into one folder.

The inputs stay where they are. Of two pictures with the same stem the second one's outputs get a
number.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from sam_poll.core.errors import InputError, SamPollError, ShareError
from sam_poll.core.files import write_whole
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import Job, OutputFile


class FileListSource:
    """Hands out the given jobs once. Outputs are `output/<job.id><suffix>`."""

    def __init__(
        self, jobs: Sequence[Job], output: Path, on_reject: Callable[[Job, SamPollError], None]
    ) -> None:
        self._jobs = list(jobs)
        self._output = output
        self._on_reject = on_reject
        self.written: dict[str, list[Path]] = {}

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """Yield all jobs, until `stop` is set."""
        for job in self._jobs:
            if stop.is_set():
                return
            yield job

    def deliver(self, job: Job, documents: Sequence[OutputFile]) -> None:
        """Write the outputs whole.

        A failure is reported at once, not retried: the user waits for the command.
        Raises ShareError.
        """
        base = SafePath.at(self._output) / job.id
        paths = [base.with_name(base.name + document.suffix) for document in documents]
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            for path, document in zip(paths, documents, strict=True):
                write_whole(path, document.body)
        except OSError as error:
            raise ShareError(
                f"the outputs cannot be written: {error.strerror or error}", place=str(base.parent)
            ) from error
        self.written[job.id] = [path.path for path in paths]

    def reject(self, job: Job, error: SamPollError) -> None:
        """Report the job to the caller; the input stays where it is."""
        self._on_reject(job, error)

    def requeue(self, job: Job, trouble: OSError | None = None) -> None:
        """Reject a picture that cannot be read: it is not read again. Nothing is put back."""
        if trouble is not None:
            self.reject(job, InputError(f"cannot be read: {trouble.strerror or trouble}"))

    def fail_attempt(self, job: Job) -> None:
        """Reject the job: there is no further attempt."""
        self.reject(
            job, InputError("the process that worked on it has ended", remedy="look at the log")
        )

    def defer(self, job: Job, error: SamPollError) -> None:
        """Reject the job: the picture is not expected to change."""
        self.reject(job, error)
