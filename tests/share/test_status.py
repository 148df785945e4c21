"""Counts of the five folders and the daemons; putting failed jobs back."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from sam_poll.share import status as report
from sam_poll.share.intake.waiting import Waiting
from sam_poll.share.mount_check import check_folders
from sam_poll.share.status import retry, status
from tests.conftest import BOX, Share, picture_bytes
from tests.support.share_sources import ANSWER, next_job_of, open_source


def test_retry_puts_a_failed_job_back_and_drops_its_error_file(share: Share) -> None:
    share.pair("cam1/dog", prompt={"box": 1})
    share.pair("cat", prompt={"box": 1})
    share.run_once()
    assert retry(share.layout, "cam1/*") == 1
    assert share.tree("input") == ["cam1/dog.jpg", "cam1/dog.json"]
    assert share.tree("failed") == ["cat.error.json", "cat.jpg", "cat.json"]


def test_retry_ignores_paths_in_an_error_report(share: Share, tmp_path: Path) -> None:
    check_folders(share.layout)
    outside = tmp_path / "secret.json"
    outside.write_text("secret")
    (share.failed / "x.error.json").write_text('{"files": ["../../secret.json", "..", 5]}')
    retry(share.layout)
    assert outside.exists()
    assert share.tree("input") == []


def test_retry_does_not_overwrite(share: Share) -> None:
    share.pair("dog", prompt={"box": 1})
    share.run_once()
    share.drop("dog.jpg", b"new")
    assert retry(share.layout) == 0
    assert (share.input / "dog.jpg").read_bytes() == b"new"


def test_status_counts_all_five_folders_and_names_the_oldest_waiting_file(share: Share) -> None:
    share.pair("dog")
    share.pair("cat", prompt={"box": 1})
    share.run_once()
    old = share.drop("sub/old.jpg", picture_bytes())
    os.utime(old, (time.time() - 100, time.time() - 100))
    share.drop("new.json", BOX)
    report = status(share.layout)
    assert report["input"] == {"pictures": 1, "prompts": 1, "other": 0}
    assert report["done"] == {"pictures": 1, "prompts": 1, "other": 0}
    assert report["failed"] == {"pictures": 1, "prompts": 1, "other": 0, "errors": 1}
    assert report["output"]["other"] == 1
    assert report["oldest"]["name"] == "sub/old.jpg"
    assert 99 < report["oldest"]["seconds"] < 200


def test_status_counts_the_files_in_claims_and_lists_the_daemons(share: Share) -> None:
    share.pair("cam1/dog")
    share.pair("cat")
    with open_source(share) as source, next_job_of(source) as next_job:
        jobs = [next_job(), next_job()]
        seen = status(share.layout)
        assert seen["work"] == {"pictures": 2, "prompts": 2, "other": 0}
        assert [(w["worker"], w["pid"], w["alive"]) for w in seen["workers"]] == [
            (source.worker, os.getpid(), True)
        ]
        for job in jobs:
            source.requeue(job)
    assert status(share.layout)["workers"] == []


def test_status_survives_claims_that_end_while_it_counts(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    original = report.walk
    with open_source(share) as source, next_job_of(source) as next_job:
        job = next_job()

        def and_then_it_ends(root: Path, *more: Any, **named: Any) -> Any:
            if root.name.startswith("g1."):
                source.deliver(job, ANSWER)
            return original(root, *more, **named)

        monkeypatch.setattr(report, "walk", and_then_it_ends)
        assert status(share.layout)["work"] == {"pictures": 0, "prompts": 0, "other": 0}


def test_named_jobs_alone_are_put_back(share: Share) -> None:
    for name in ("a[1]", "cam1/b", "c"):
        share.pair(name, prompt={"box": 1})
    share.run_once()
    assert report.retry_jobs(share.layout, ["a[1]", "cam1/b", "not-there"]) == 2
    assert share.tree("input") == ["a[1].jpg", "a[1].json", "cam1/b.jpg", "cam1/b.json"]
    assert share.tree("failed") == ["c.error.json", "c.jpg", "c.json"]


def test_status_takes_what_was_counted_already(share: Share) -> None:
    share.pair("dog")
    counts = report.Counts({"input": report.kinds_of("input", {"pictures": 7})}, (5.0, "x.jpg"))
    waiting = Waiting(pictures=3)
    found = status(share.layout, 10.0, counts=counts, waiting=waiting)
    assert found["input"] == {"pictures": 7, "prompts": 0, "other": 0}
    assert found["oldest"] == {"name": "x.jpg", "seconds": 5.0}
    assert found["without_partner"]["pictures"] == 3
