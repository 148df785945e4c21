"""The messages between a worker process and its parent."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from sam_poll.core.errors import InputError, PromptError
from sam_poll.core.stats import Stats
from sam_poll.core.types import OutputFile
from sam_poll.engines.fake import FakeEngine
from sam_poll.pipeline import messages
from tests.support.pipelines import MemorySource, job

DOCUMENTS = [OutputFile(".txt", "text/plain", b"x")]
ERROR = PromptError("odd")


@pytest.mark.parametrize(
    "message",
    [
        messages.Configure(FakeEngine, "INFO"),
        messages.RunJob(job("dog")),
        messages.Reply(1, None),
        messages.EndOfJobs(),
        messages.Stop(),
        messages.Ready(FakeEngine().info),
        messages.Beat(1.5, FakeEngine().info, 2),
        messages.LogLine("INFO", "text", {"job": "dog"}),
        messages.AlarmRaised("output", "no space"),
        messages.AlarmCleared("output"),
        messages.Ended(None),
        messages.WantJob(),
        messages.JobStarted(1),
        messages.JobProgressed(),
        messages.DiskCacheUsed("removed", 2),
        messages.JobAnswered("dog", 2, {"total": 5.0}),
        messages.JobRejected("dog", "prompt"),
        messages.JobReleased("device"),
        messages.Deliver(1, DOCUMENTS),
        messages.Requeue(1, None),
    ],
    ids=lambda message: type(message).__name__,
)
def test_message_is_the_same_after_pickling(message: Any) -> None:
    copy = pickle.loads(pickle.dumps(message))
    assert type(copy) is type(message)
    assert repr(copy) == repr(message)  # jobs are compared by identity


def test_source_calls_reach_the_source() -> None:
    source = MemorySource([])
    trouble = OSError(5, "Input/output error")
    messages.Deliver(1, DOCUMENTS).apply(source, job("answered"))
    messages.Reject(2, ERROR).apply(source, job("rejected"))
    messages.Requeue(3, trouble).apply(source, job("requeued"))
    messages.Defer(4, ERROR).apply(source, job("deferred"))
    assert source.delivered == {"answered": DOCUMENTS}
    assert source.rejected == {"rejected": ERROR}
    assert (source.released, source.troubles) == (["requeued"], [trouble])
    assert source.deferred == {"deferred": ERROR}


def test_counts_are_added_to_the_stats() -> None:
    stats = Stats()
    for _ in range(3):
        stats.started()
    for count in (
        messages.Deliver(1, DOCUMENTS).count(job("answered")),
        messages.Reject(2, ERROR).count(job("rejected")),
        messages.JobReleased("device"),
    ):
        assert count
        count.add_to(stats)
    now = stats.now()
    assert (now.answered, now.rejected, now.at_work) == (1, 1, 0)
    assert (now.reasons, now.released) == ({ERROR.code: 1}, {"device": 1})


def test_calls_that_give_a_job_back_are_the_last_ones_for_it() -> None:
    assert [
        call.last
        for call in (
            messages.Deliver(1, []),
            messages.Reject(1, InputError("odd")),
            messages.Requeue(1, None),
            messages.Defer(1, ERROR),
        )
    ] == [False, False, True, True]
