"""What every door keeps, whatever it is made of. Subclass it and give `source`, `reply` and
`refusal`.
"""

from __future__ import annotations

import threading
from typing import Any

from sam_poll.core.errors import InputError
from sam_poll.core.protocols import JobSource
from sam_poll.core.types import Job, OutputFile

DOCUMENTS = [
    OutputFile(".mask.png", "image/png", b"mask"),
    OutputFile(".opex.json", "application/json", b"{}"),
]


class SourceContract:
    """The rules. A fixture `source` must hold exactly two jobs, `a` and `b`."""

    def take(self, source: JobSource) -> dict[str, Job]:
        jobs: dict[str, Job] = {}
        for job in source.jobs(threading.Event()):
            jobs[job.id] = job
            if len(jobs) == 2:
                break
        return jobs

    def answers(self, source: Any) -> dict[str, bytes]:
        """File name → content of what has been delivered."""
        raise NotImplementedError

    def refusals(self, source: Any) -> dict[str, str]:
        """Job id → reason of what has been rejected."""
        raise NotImplementedError

    def test_each_job_is_handed_out_once(self, source: JobSource) -> None:
        assert sorted(self.take(source)) == ["a", "b"]

    def test_nothing_is_handed_out_after_stop(self, source: JobSource) -> None:
        stop = threading.Event()
        stop.set()
        assert list(source.jobs(stop)) == []

    def test_delivered_documents_are_the_jobs_name_and_the_suffix(self, source: JobSource) -> None:
        for job in self.take(source).values():
            source.deliver(job, DOCUMENTS)
        assert self.answers(source) == {f"{j}{d.suffix}": d.body for j in "ab" for d in DOCUMENTS}

    def test_a_rejection_carries_its_reason_and_writes_no_answer(self, source: JobSource) -> None:
        jobs = self.take(source)
        source.reject(jobs["a"], InputError("too odd", place="here", remedy="do less"))
        source.requeue(jobs["b"])
        assert self.refusals(source) == {"a": "too odd"}
        assert self.answers(source) == {}

    def test_answers_may_come_from_several_threads(self, source: JobSource) -> None:
        jobs = self.take(source)
        threads = [
            threading.Thread(target=source.deliver, args=(job, DOCUMENTS)) for job in jobs.values()
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(self.answers(source)) == 4
