"""Making jobs of pending files and of claims: no error costs a job or an attempt.

Each error is injected into a real call at the critical moment, and removed again; the share's
content is examined.
"""

from __future__ import annotations

import errno
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sam_poll.core.errors import ClaimLostError
from sam_poll.imaging import source_file
from sam_poll.share.active_claims import ActiveClaims
from sam_poll.share.claims.model import list_work
from sam_poll.share.claims.store import ClaimStore
from sam_poll.share.intake import deferred_jobs
from sam_poll.share.intake.prompt_texts import PromptTexts
from sam_poll.share.job_builder import JobBuilder
from sam_poll.share.job_factory import JobFactory
from sam_poll.share.prompt_reader import PromptReader
from tests.conftest import BOX, Daemon, Share, make_pipeline, picture_bytes, wait_until
from tests.support.share_sources import (
    ANSWER,
    ELSEWHERE,
    claim_left_by,
    failing,
    let_others_look_dead,
    next_job_of,
    open_source,
)


@pytest.mark.parametrize(
    ("part", "where"),
    [(PromptReader, "read_claimed"), (JobBuilder, "build"), (JobFactory, "_has_work")],
)
def test_an_error_of_the_share_during_a_takeover_costs_no_job_and_no_attempt(
    share: Share, monkeypatch: pytest.MonkeyPatch, part: type, where: str
) -> None:
    share.pair("dog")
    with open_source(share, attempts=1) as source:
        claim_left_by(share, ELSEWHERE, "dog.jpg", "dog.json", hold="g1.a0.n1")
        let_others_look_dead(monkeypatch)
        monkeypatch.setattr(part, where, failing(2, getattr(part, where)))
        with next_job_of(source) as next_job:
            job = next_job()
            assert (job.error, job.attempt) == (None, 1)
            source.deliver(job, ANSWER)
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_an_error_of_the_share_while_a_job_is_created_costs_no_job(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.drop("dog.jpg", picture_bytes())
    for n in range(3):
        share.drop(f"dog.{n}.json", BOX)
    calls = []
    original = JobBuilder._identity

    def sick_once(self: JobBuilder, *args: Any) -> str:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return original(self, *args)

    monkeypatch.setattr(JobBuilder, "_identity", sick_once)
    with open_source(share) as source, next_job_of(source) as next_job:
        for _ in range(3):
            source.deliver(next_job(), ANSWER)
    assert len(share.tree("done")) == 4


def test_a_further_prompt_whose_job_cannot_be_created_now_is_not_forgotten(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    with open_source(share) as source, next_job_of(source) as next_job:
        first = next_job()
        share.drop("dog.left.json", BOX)
        monkeypatch.setattr(JobBuilder, "_identity", failing(1, JobBuilder._identity))
        second = next_job()
        ids = {second.id}
        source.deliver(second, ANSWER)
        with suppress(ClaimLostError):
            source.deliver(first, ANSWER)
        while share.tree("done") != ["dog.jpg", "dog.json", "dog.left.json"]:
            again = next_job()
            ids.add(again.id)
            source.deliver(again, ANSWER)
    assert share.tree("output") == ["dog.left.txt", "dog.txt"]


def test_names_of_any_length_are_answered_or_rejected(share: Share) -> None:
    name = "x" * 251 + ".jpg"  # with `.jpeg` it would be too long for a file name
    for number in (1, 2, 3):
        share.drop(name, picture_bytes(seed=number))
        share.drop("a.json", {**BOX, "image": name})
        assert share.run_once().answered == 1
    assert len(share.tree("done")) == 6
    for _ in range(3):
        share.pair("x" * 250)
        assert share.run_once().rejected == 1
    assert len(share.tree("failed")) == 9
    assert share.tree("input") == share.tree("work") == []


def test_a_lone_prompt_claimed_by_another_daemon_is_not_taken_for_a_picture(share: Share) -> None:
    share.pair("dog")
    share.run_once()
    with open_source(share) as source:
        share.drop("dog.json", BOX)
        claim_left_by(share, ELSEWHERE, "dog.json")
        share.pair("dog", seed=2)
        with next_job_of(source) as next_job:
            job = next_job()
    assert job.error is None
    assert job.name == "done/dog~2.jpg"


def test_a_prompt_whose_picture_has_just_ended_is_answered_for_that_picture(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (1, 2):
        share.pair("dog", seed=seed)
        share.run_once()
    share.drop("dog.left.json", BOX)
    monkeypatch.setattr(
        ActiveClaims, "pictures", lambda self, once=["dog.jpg"]: [once.pop()] if once else []
    )
    with open_source(share, lone_s=0.0) as source, next_job_of(source) as next_job:
        assert next_job().name == "done/dog~2.jpg"


def test_a_prompt_whose_picture_still_grows_does_not_delay_its_siblings(share: Share) -> None:
    share.pair("dog", prompt={**BOX, "image_bytes": 10**6})
    with open_source(share, patience_s=1000.0) as source:
        assert (
            source._factory.claim(source._scanner.scan(time.monotonic(), [])) == []
        )  # left alone until it has grown
        share.drop("dog.good.json", BOX)
        (ready,) = source._scanner.scan(time.monotonic(), [])
    assert (ready.prompt, ready.error) == ("dog.good.json", None)


@pytest.mark.parametrize("lone", [False, True])
def test_a_poison_job_is_rejected_without_being_read(
    share: Share, monkeypatch: pytest.MonkeyPatch, lone: bool
) -> None:
    share.pair("dog")
    if lone:
        share.run_once()
        share.drop("dog.again.json", BOX)
    with open_source(share, attempts=3) as source:
        if lone:
            claim_left_by(share, ELSEWHERE, "dog.again.json", hold="g3.a3.n1")
        else:
            claim_left_by(share, ELSEWHERE, "dog.jpg", "dog.json", hold="g3.a3.n1")
        let_others_look_dead(monkeypatch)

        def never(*args: Any) -> None:
            raise AssertionError("it was read")

        monkeypatch.setattr(PromptTexts, "read", never)
        monkeypatch.setattr(source_file, "read", never)
        stop = threading.Event()
        pipeline = make_pipeline()
        thread = threading.Thread(target=pipeline.run, args=(source, stop))
        thread.start()
        wait_until(lambda: pipeline.stats.now().rejected)
        stop.set()
        thread.join(30)
    error = share.error("dog.again" if lone else "dog")
    assert (error["code"], error["attempt"]) == ("poison", 4)
    assert error["place"] == ("dog.again.json" if lone else "dog.jpg")
    assert "3 times" in error["reason"]
    assert "sam-poll retry" in error["remedy"]
    assert share.tree("failed")[-1] == ("dog.again.json" if lone else "dog.json")
    assert share.tree("work") == []


def test_a_job_is_not_poison_before_its_last_attempt(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    with open_source(share, attempts=3) as source:
        claim_left_by(share, ELSEWHERE, "dog.jpg", "dog.json", hold="g2.a2.n1")
        let_others_look_dead(monkeypatch)
        with next_job_of(source) as next_job:
            job = next_job()
            assert (job.error, job.attempt, job.generation) == (None, 3, 3)


def test_a_further_prompt_for_a_lost_claim_does_not_end_the_source(share: Share) -> None:
    share.pair("dog")
    with open_source(share) as source, next_job_of(source) as next_job:
        next_job()
        (found,) = list_work(share.layout.work)[0]
        assert ClaimStore(share.layout, ELSEWHERE, lambda: None).take_over(found)
        share.drop("dog.left.json", BOX)
        share.pair("zebra")
        assert next_job().id == "zebra"
    assert share.tree("input") == ["dog.left.json"]


@pytest.mark.parametrize("lone", [True, False])
def test_a_prompt_on_a_bad_sector_is_held_and_the_others_go_on(
    share: Share, monkeypatch: pytest.MonkeyPatch, lone: bool, logged: list[str]
) -> None:
    original = PromptTexts.read
    bad = [True]

    def read(texts: PromptTexts, prompt: Path) -> Any:
        if prompt.name == "bad.json" and bad:
            raise OSError(errno.EIO, "Input/output error", str(prompt))
        return original(texts, prompt)

    monkeypatch.setattr(PromptTexts, "read", read)
    monkeypatch.setattr(deferred_jobs, "_UNREAD_S", 0.2)
    if lone:
        share.drop("bad.json", BOX)
    else:
        share.pair("bad")
    with Daemon(share, settle_s=0.0, rescan_s=0.2) as daemon:
        wait_until(lambda: any("bad.json cannot be read" in line for line in logged))
        share.move_in("good.jpg", picture_bytes(seed=2))
        share.move_in("good.json", BOX)
        wait_until(lambda: "good.json" in share.tree("done"))
        assert "share" not in daemon.source._alarms
        bad.clear()
        if lone:
            share.drop("bad.jpg", picture_bytes())
        wait_until(lambda: "bad.json" in share.tree("done"))


def test_a_prompt_that_another_daemon_takes_while_it_is_read_raises_no_alarm(
    share: Share, monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    original = PromptTexts.read

    def read(texts: PromptTexts, prompt: Path) -> Any:
        prompt.unlink(missing_ok=True)
        return original(texts, prompt)

    monkeypatch.setattr(PromptTexts, "read", read)
    share.drop("gone.json", BOX)
    share.run_once()
    assert not [line for line in logged if "alarm" in line or "cannot be read" in line]
