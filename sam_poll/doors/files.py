"""The one-off door: files named on the command line, answers written into a folder, inputs left where they are.

What can still go wrong here: two pictures of one stem in different folders write the same outputs; the second gets a
number.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from sam_poll.errors import InputError, SamPollError, ShareError
from sam_poll.fs import write_whole
from sam_poll.safe_path import SafePath
from sam_poll.types import Document, Job


class FilesDoor:
    """Hands out the given jobs once. Outputs are `output/<job.id><suffix>`."""

    def __init__(self, jobs: Sequence[Job], output: Path, on_reject: Callable[[Job, SamPollError], None]) -> None:
        self._jobs, self._output, self._on_reject = list(jobs), output, on_reject
        self.written: dict[str, list[Path]] = {}

    def jobs(self, stop: threading.Event) -> Generator[Job, None, None]:
        """All jobs, until `stop` is set."""
        for job in self._jobs:
            if stop.is_set():
                return
            yield job

    def deliver(self, job: Job, documents: Sequence[Document]) -> None:
        """Write the outputs whole. Somebody waits for a one-off, so what cannot be written is said, not tried again."""
        base = SafePath.at(self._output) / job.id
        paths = [base.with_name(base.name + document.suffix) for document in documents]
        try:
            base.parent.mkdir(parents=True, exist_ok=True)
            for path, document in zip(paths, documents, strict=True):
                write_whole(path, document.body)
        except OSError as error:
            raise ShareError(
                f"the answer cannot be written: {error.strerror or error}", place=str(base.parent)
            ) from error
        self.written[job.id] = [path.path for path in paths]

    def reject(self, job: Job, error: SamPollError) -> None:
        """Tell the caller; the input stays where it is."""
        self._on_reject(job, error)

    def release(self, job: Job, trouble: OSError | None = None) -> None:
        """Nothing to put back: a picture that cannot be read now is refused, as nobody reads it again."""
        if trouble is not None:
            self.reject(job, InputError(f"cannot be read: {trouble.strerror or trouble}"))

    def abandon(self, job: Job) -> None:
        """Nobody tries again here."""
        self.reject(job, InputError("the process that worked on it has ended", remedy="look at the log"))

    def defer(self, job: Job, error: SamPollError) -> None:
        """Nobody is going to change the picture meanwhile."""
        self.reject(job, error)
