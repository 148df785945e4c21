"""Running a suspect job alone: tiled jobs pause, but not the suspect itself."""

from __future__ import annotations

from sam_poll.pipeline.exclusive_job import ExclusiveJob
from sam_poll.pipeline.task import Task
from tests.support.pipelines import job


def test_tiled_jobs_pause_while_another_job_is_to_run_alone() -> None:
    exclusive = ExclusiveJob()
    suspect, tiled, other = (Task(job(name)) for name in ("suspect", "tiled", "other"))
    assert not exclusive.must_pause(tiled)
    exclusive.begin(suspect)
    assert [exclusive.must_pause(task) for task in (tiled, other, tiled)] == [True, True, True]
    assert exclusive.paused_count == 2
    exclusive.end()
    assert not exclusive.must_pause(tiled)
    assert exclusive.paused_count == 1


def test_a_tiled_job_that_is_the_suspect_does_not_pause() -> None:
    exclusive = ExclusiveJob()
    suspect = Task(job("suspect"))
    exclusive.begin(suspect)
    assert not exclusive.must_pause(suspect)
    assert exclusive.paused_count == 0
