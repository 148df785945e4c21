"""Several processes behind one door: each job ends once, whichever of them dies."""

from __future__ import annotations

import threading

from sam_poll.doors.folder import FolderDoor
from sam_poll.doors.scan import Manners
from tests.conftest import Share

# ── the door's part ──


def test_a_job_that_ended_its_process_is_offered_again_as_a_further_attempt(share: Share) -> None:
    share.pair("dog")
    with FolderDoor(share.layout, Manners(quiet_s=0.0, rescan_s=0.1, events=False)) as door:
        jobs = door.jobs(threading.Event())
        attempts = []
        for _ in range(3):
            job = next(jobs)
            attempts.append(job.attempt)
            door.abandon(job)
        assert attempts == [1, 2, 3]
        door.release(next(jobs))
        assert next(jobs).attempt == 1
