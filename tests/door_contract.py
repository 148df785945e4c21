"""What every door keeps, whatever it is made of. Subclass it and give `door`, `reply` and `refusal`."""

from __future__ import annotations

import threading
from typing import Any

from sam_poll.errors import InputError
from sam_poll.types import Document, Door, Job

DOCUMENTS = [Document(".mask.png", "image/png", b"mask"), Document(".opex.json", "application/json", b"{}")]


class DoorContract:
    """The rules. A fixture `door` must hold exactly two jobs, `a` and `b`."""

    def take(self, door: Door) -> dict[str, Job]:
        jobs: dict[str, Job] = {}
        for job in door.jobs(threading.Event()):
            jobs[job.id] = job
            if len(jobs) == 2:
                break
        return jobs

    def answers(self, door: Any) -> dict[str, bytes]:
        """File name → content of what has been delivered."""
        raise NotImplementedError

    def refusals(self, door: Any) -> dict[str, str]:
        """Job id → reason of what has been rejected."""
        raise NotImplementedError

    def test_each_job_is_handed_out_once(self, door: Door) -> None:
        assert sorted(self.take(door)) == ["a", "b"]

    def test_nothing_is_handed_out_after_stop(self, door: Door) -> None:
        stop = threading.Event()
        stop.set()
        assert list(door.jobs(stop)) == []

    def test_delivered_documents_are_the_jobs_name_and_the_suffix(self, door: Door) -> None:
        for job in self.take(door).values():
            door.deliver(job, DOCUMENTS)
        assert self.answers(door) == {f"{j}{d.suffix}": d.body for j in "ab" for d in DOCUMENTS}

    def test_a_rejection_carries_its_reason_and_writes_no_answer(self, door: Door) -> None:
        jobs = self.take(door)
        door.reject(jobs["a"], InputError("too odd", place="here", remedy="do less"))
        door.release(jobs["b"])
        assert self.refusals(door) == {"a": "too odd"}
        assert self.answers(door) == {}

    def test_answers_may_come_from_several_threads(self, door: Door) -> None:
        jobs = self.take(door)
        threads = [threading.Thread(target=door.deliver, args=(job, DOCUMENTS)) for job in jobs.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(self.answers(door)) == 4
