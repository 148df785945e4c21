"""The page beside `sam-poll serve`: one port, the server's network for previews."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from sam_poll.core.types import Point, Prompt
from sam_poll.engines.fake import FakeEngine
from sam_poll.integrations.http.errors import UnavailableError
from sam_poll.integrations.http.source import HttpSource
from sam_poll.integrations.ui.names import encode
from sam_poll.integrations.ui.preview import SourcePreviewer
from tests.conftest import Share, picture_bytes, wait_until
from tests.support.http_server import json_body, running_site
from tests.support.ui_site import TOKEN

CLICK = {"objects": [{"label": "dog", "points": [{"x": 30, "y": 20, "label": 1}]}]}


@contextmanager
def command(tmp_path: Path, *arguments: object, **env: str) -> Iterator[str]:
    """Run a command that serves; yields its URL."""
    log = tmp_path / "log"
    with log.open("wb") as stderr:
        line = [sys.executable, "-m", "sam_poll", *map(str, arguments), "--log", "text"]
        process = subprocess.Popen(line, stderr=stderr, env={**os.environ, **env}, cwd=tmp_path)
    try:
        pattern = r"(?:serving|the page is) at (http://\S+?)(?:/ui/)?$"
        wait_until(
            lambda: process.poll() is not None or re.search(pattern, log.read_text(), re.M), 90
        )
        found = re.search(pattern, log.read_text(), re.M)
        assert found, log.read_text()
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, log.read_text()


@pytest.mark.slow
def test_serve_with_the_page_answers_requests_and_previews(share: Share, tmp_path: Path) -> None:
    share.drop("dog.jpg", picture_bytes())
    (tmp_path / "config.yaml").write_text(f"input: {share.input}\nmodel: fake\n")
    arguments = ("serve", "--ui", "--listen", "127.0.0.1:0", "-c", tmp_path / "config.yaml")
    with command(tmp_path, *arguments) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert client.post("/predict", json=json_body()).status_code == 200
        assert client.get("/", follow_redirects=True).url.path == "/ui/"
        text = client.get("/ui/").text
        csrf = re.search('name="csrf" content="([^"]*)"', text)
        assert csrf
        address = f"/ui/edit/waiting/{encode('dog.jpg')}/preview"
        answer = client.post(address, json=CLICK, headers={"X-CSRF-Token": csrf[1]})
        assert answer.json()["objects"][0]["score"] == 0.9
        assert client.get("/uix").status_code == 404


@pytest.mark.slow
def test_the_pages_own_command_ends_with_a_signal(share: Share, tmp_path: Path) -> None:
    arguments = ("ui", share.input, "--listen", "127.0.0.1:0")
    with command(tmp_path, *arguments) as url, httpx.Client(base_url=url) as client:
        assert client.get("/ui/").status_code == 200
        # An open stream of events must not hold the end up.
        with client.stream("GET", "/ui/events") as events:
            assert events.headers["content-type"].startswith("text/event-stream")
            lines = events.iter_lines()
            wait_until(lambda: next(lines) == "event: changed")


@pytest.mark.slow
def test_the_token_of_serve_guards_the_page_and_the_endpoints(share: Share, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"input: {share.input}\nmodel: fake\n")
    arguments = ("serve", "--ui", "--listen", "127.0.0.1:0", "-c", tmp_path / "config.yaml")
    with (
        command(tmp_path, *arguments, SAM_POLL_SERVE_TOKEN=TOKEN) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        assert client.get("/ui/").status_code == 401
        assert client.post("/predict", json=json_body()).status_code == 401
        assert client.post("/ui/login", data={"token": TOKEN}).status_code == 303
        assert client.get("/ui/").status_code == 200


def test_a_preview_that_takes_too_long_is_given_up() -> None:
    source = HttpSource(places=1)
    with pytest.raises(UnavailableError, match="no preview within"):
        SourcePreviewer(source, 0.05).preview(picture_bytes(), ())
    assert source.waiting == 0
    assert source.inside == 0


def test_a_preview_of_serve_is_that_of_its_network() -> None:
    engine = FakeEngine()
    with running_site(engine) as site:
        previewer = SourcePreviewer(site.source, 30)
        body = previewer.preview(picture_bytes(), (Prompt("dog", (Point(30, 20),)),))
        assert b'"score": 0.9' in body
        threads = [
            threading.Thread(
                target=previewer.preview,
                args=(picture_bytes(), (Prompt("dog", (Point(x, 20),)),)),
            )
            for x in (10, 20)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert engine.calls["encode"] == 1
