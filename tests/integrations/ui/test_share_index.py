"""One scanner for all viewers: what it publishes, when it reads, and how large shares open."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from dataclasses import replace

import pytest

from sam_poll.integrations.ui import share_index
from sam_poll.integrations.ui.names import encode
from sam_poll.integrations.ui.share_index import (
    IDLE_S,
    AnswerEntry,
    ShareIndex,
    ShareView,
    kind_of_reason,
)
from sam_poll.share.error_report import ErrorReport
from sam_poll.share.status import status
from tests.conftest import BOX, Share, picture_bytes
from tests.support.ui_site import running_ui

OUTSIDE = {"box": {"x0": 900, "y0": 1, "x1": 2000, "y1": 30}}


def scanned(share: Share) -> ShareView:
    index = ShareIndex(share.layout)
    index.scan()
    return index.view()


def test_the_view_says_what_status_says(share: Share) -> None:
    share.pair("cam1/dog")
    share.pair("cat", prompt=OUTSIDE)
    share.run_once()
    share.drop("waits.jpg", picture_bytes())
    share.drop("lonely.json", BOX)
    os.utime(share.input / "waits.jpg", (5, 5))
    view = scanned(share)
    now = time.time()
    expected = status(share.layout, now)
    assert view.ready
    assert abs(view.status["oldest"].pop("seconds") - expected["oldest"].pop("seconds")) < 60
    assert view.status == expected
    assert view.waiting.paths == ["lonely.json", "waits.jpg"]


def test_answers_are_grouped_by_job_newest_first(share: Share) -> None:
    names = {
        "cam1/dog.mask.png": 5,
        "cam1/dog.opex.json": 7,
        "cam1/dog.left.mask.png": 9,
        "cat.mask.1.png": 2,
        "cat.mask.12.png": 1,
        "notes.txt": 99,
        "x.yolo.txt": 3,
        "x.yolo.yaml": 3,
    }
    for name, when in names.items():
        path = share.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        os.utime(path, (when, when))
    assert scanned(share).answers == (
        AnswerEntry("cam1/dog.left", (".mask.png",), 9),
        AnswerEntry("cam1/dog", (".mask.png", ".opex.json"), 7),
        AnswerEntry("x", (".yolo.txt", ".yolo.yaml"), 3),
        AnswerEntry("cat", (".mask.1.png", ".mask.12.png"), 2),
    )


def test_failures_are_newest_first_and_grouped_by_their_reason(share: Share) -> None:
    share.failed.mkdir()
    for number in range(5):
        body = {"code": "prompt", "reason": f"{number}.5 is outside the picture, 640×480"}
        if number == 4:
            body = {"code": "picture", "reason": "cannot be decoded"}
        path = share.failed / f"p{number}.error.json"
        path.write_text(json.dumps(body))
        os.utime(path, (number, number))
    view = scanned(share)
    assert [one.id for one in view.failures] == ["p4", "p3", "p2", "p1", "p0"]
    assert [(one.count, one.example.reason) for one in view.kinds] == [
        (4, "3.5 is outside the picture, 640×480"),
        (1, "cannot be decoded"),
    ]


def test_reasons_that_differ_in_numbers_and_quotes_are_one_kind() -> None:
    one = ErrorReport("prompt", "'a' at 5 is not a label")
    other = ErrorReport("prompt", "'b <c>' at 1,000.5 is not a label")
    assert kind_of_reason(one) == kind_of_reason(other)
    assert kind_of_reason(one) != kind_of_reason(replace(one, code="picture"))


def test_a_report_is_read_once(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    share.failed.mkdir()
    (share.failed / "a.error.json").write_text("{}")
    read: list[str] = []
    original = share_index.read_report
    monkeypatch.setattr(
        share_index, "read_report", lambda path: read.append(path.name) or original(path)
    )
    index = ShareIndex(share.layout)
    index.scan()
    (share.failed / "b.error.json").write_text("{}")
    index.scan()
    assert read == ["a.error.json", "b.error.json"]


def test_a_change_is_seen_although_the_scan_that_found_it_failed(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ShareIndex(share.layout)
    index.scan()
    share.failed.mkdir()
    (share.failed / "a.error.json").write_text("{}")

    def fail(*args: object, **more: object) -> None:
        raise OSError(errno.EIO, "Input/output error", str(share.done))

    with monkeypatch.context() as broken:
        broken.setattr(share_index, "status", fail)
        index.scan()
    assert "Input/output error" in (index.view().trouble or "")
    index.scan()
    assert index.view().trouble is None
    assert [one.id for one in index.view().failures] == ["a"]


def test_the_version_grows_only_with_news(share: Share) -> None:
    index = ShareIndex(share.layout, clock=lambda: 0.0)
    index.scan()
    version = index.view().version
    index.scan()
    assert index.view().version == version
    share.drop("dog.jpg", picture_bytes())
    index.scan()
    assert index.view().version == version + 1


def test_the_share_is_read_while_somebody_looks(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    index = ShareIndex(share.layout, clock=lambda: now[0])
    waits: list[float | None] = []

    class Condition(threading.Condition().__class__):  # type: ignore[misc]
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout)
            index._due = True
            return True

    monkeypatch.setattr(index, "_changed", Condition())
    index._rest(3.0)
    index._due = False
    now[0] = IDLE_S + 1
    index._rest(now[0] + 3)
    assert waits == [3.0, None], "after a while without viewers it waits for one"
    index._due = False
    index.view()
    assert index._due, "the first viewer does not wait for the next turn"


def test_refresh_returns_a_view_that_has_the_change(share: Share) -> None:
    with ShareIndex(share.layout) as index:
        for number in range(3):
            share.drop(f"dog{number}.jpg", picture_bytes())
            assert f"dog{number}.jpg" in index.refresh(30).waiting.paths


def test_a_hundred_thousand_answers_open_in_a_second(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = tuple(
        AnswerEntry(f"cam{number % 10}/p{number}", (".mask.png", ".opex.json"), 200_000 - number)
        for number in range(100_000)
    )
    view = replace(
        scanned(share), answers=answers, folders=tuple(f"cam{n}" for n in range(10)), version=7
    )
    monkeypatch.setattr(ShareIndex, "scan", lambda self: None)
    monkeypatch.setattr(ShareIndex, "view", lambda self: view)
    with running_ui(share) as site:
        site.page("/ui/settings")
        for path in ("/ui/", "/ui/answers", f"/ui/answers?folder={encode('/cam3')}&page=300"):
            times = []
            for _ in range(3):
                started = time.process_time()  # a busy machine does not count
                text = site.page(path)
                times.append(time.process_time() - started)
            assert min(times) < 1, path
            assert len(text) < 100_000
