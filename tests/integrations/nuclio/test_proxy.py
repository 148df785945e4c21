"""Tests of the Nuclio function that forwards requests to a SAM server."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from nuclio_sdk.test import Platform

from sam_poll.core.errors import SettingsError
from sam_poll.integrations.nuclio import proxy
from tests.support.nuclio_calls import NEW_CVAT, ROOT, Lines, event, load, wire

pytestmark = pytest.mark.filterwarnings(
    "ignore:datetime.datetime.utcfromtimestamp:DeprecationWarning"
)


class Upstream(http.server.BaseHTTPRequestHandler):
    """A SAM server that answers with `answer`."""

    seen: list[tuple[str, str | None, bytes]]
    agents: list[str | None]
    answer: Callable[[Upstream], None]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, self.headers["Content-Type"], body))
        self.agents.append(self.headers["User-Agent"])
        type(self).answer(self)

    def reply(
        self, status: int, body: bytes, kind: str = "application/json", length: int | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[tuple[type[Upstream], str]]:
    members = {"seen": [], "agents": [], "answer": lambda self: self.reply(200, b"{}")}
    kind = type("Told", (Upstream,), members)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield kind, f"http://127.0.0.1:{server.server_address[1]}/features?x=1"
        server.shutdown()
        thread.join()


def forwarded(uri: str, body: Any = None, **env: str) -> tuple[int, Any, list[str]]:
    context = Platform().context
    context.logger = logger = Lines()
    service = proxy.Remote.open(logger, {"SAM_URI": uri, **env})
    response = service.forward(context, event(body or {"image": "AAAA"}))
    return response.status_code, response.body, logger.lines


def test_remote_forwards_the_request_and_returns_the_answer(
    upstream: tuple[type[Upstream], str],
) -> None:
    kind, uri = upstream
    kind.answer = lambda self: self.reply(200, b'{"mask": [[0, 255]]}')
    body = {"image": "AAAA", "pos_points": [[1, 2.5]], "neg_points": [], "obj_bbox": None}
    status, answer, _ = forwarded(uri, body)
    assert (status, json.loads(answer)) == (200, {"mask": [[0, 255]]})
    ((path, content_type, sent),) = kind.seen
    assert (path, content_type, json.loads(sent)) == ("/features?x=1", "application/json", body)


@pytest.mark.parametrize(
    ("headers", "agent"),
    [
        (NEW_CVAT, NEW_CVAT["User-Agent"]),
        ({}, None),
        ({"User-Agent": "a\r\nAuthorization: Basic b"}, None),
        ({"User-Agent": "zu groß"}, None),
    ],
)
def test_the_user_agent_of_cvat_reaches_the_server(
    upstream: tuple[type[Upstream], str], headers: dict[str, str], agent: str | None
) -> None:
    kind, uri = upstream
    service = proxy.Remote.open(Lines(), {"SAM_URI": uri})
    context = Platform().context
    assert service.forward(context, event({"image": "AAAA"}, headers=headers)).status_code == 200
    assert kind.agents == [agent]


def test_the_handler_of_remote_calls_forward(
    upstream: tuple[type[Upstream], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, uri = upstream
    monkeypatch.setenv("SAM_URI", uri)
    main = load("remote/main.py", "sam_poll_nuclio_remote")
    assert wire(Platform().call_handler(main.handler, event({"image": "AAAA"}))) == (200, {})


@pytest.mark.parametrize("status", [400, 404, 500, 503])
def test_a_refusal_of_the_server_is_passed_on_unchanged(
    upstream: tuple[type[Upstream], str], status: int
) -> None:
    kind, uri = upstream
    kind.answer = lambda self: self.reply(status, "zu groß".encode(), "text/plain; charset=utf-8")
    passed, answer, lines = forwarded(uri)
    assert (passed, answer) == (status, "zu groß")
    assert f"answered {status}: zu groß" in lines[-1]


def test_an_unreachable_server_is_502_with_address_and_remedy() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Upstream) as server:
        port = server.server_address[1]
    status, answer, _ = forwarded(f"http://user:secret@127.0.0.1:{port}/")
    error = json.loads(answer)
    assert status == 502
    assert error["place"] == f"http://127.0.0.1:{port}/"
    assert "host.docker.internal" in error["remedy"]
    assert "secret" not in answer


def test_a_server_that_does_not_answer_in_time_is_504(upstream: tuple[type[Upstream], str]) -> None:
    kind, uri = upstream
    over = threading.Event()
    kind.answer = lambda self: over.wait(60) and None
    try:
        status, answer, _ = forwarded(uri, SAM_TIMEOUT_S="0.2")
    finally:
        over.set()
    assert status == 504
    assert "0.2 s" in json.loads(answer)["error"]


def test_a_server_that_sends_slowly_gets_no_more_time(upstream: tuple[type[Upstream], str]) -> None:
    kind, uri = upstream
    over = threading.Event()

    def dribble(self: Upstream) -> None:
        self.reply(200, b"", length=10_000)
        while not over.wait(0.02):
            self.wfile.write(b" ")

    kind.answer = dribble
    try:
        status, _, _ = forwarded(uri, SAM_TIMEOUT_S="0.3")
    finally:
        over.set()
    assert status == 504


def test_an_incomplete_answer_is_502(upstream: tuple[type[Upstream], str]) -> None:
    kind, uri = upstream
    kind.answer = lambda self: self.reply(200, b'{"mask": [[0', length=1000)
    status, answer, _ = forwarded(uri)
    assert status == 502
    assert "IncompleteRead" in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({}, "SAM_URI"),
        ({"SAM_URI": "localhost:8000"}, "SAM_URI"),
        ({"SAM_URI": "file:///etc/passwd"}, "SAM_URI"),
        ({"SAM_URI": "http://host:port/"}, "SAM_URI"),
        ({"SAM_URI": "http:///path"}, "SAM_URI"),
        ({"SAM_URI": "http://host/", "SAM_TIMEOUT_S": "soon"}, "SAM_TIMEOUT_S"),
        ({"SAM_URI": "http://host/", "SAM_TIMEOUT_S": "0"}, "SAM_TIMEOUT_S"),
        ({"SAM_URI": "http://host/", "SAM_TIMEOUT_S": "nan"}, "SAM_TIMEOUT_S"),
    ],
)
def test_remote_without_a_valid_address_does_not_start(env: dict[str, str], place: str) -> None:
    with pytest.raises(SettingsError) as caught:
        proxy.Remote.open(Lines(), env)
    assert caught.value.place == place


def test_remote_needs_the_standard_library_only() -> None:
    code = (
        "import sys, sam_poll.integrations.nuclio.proxy; "
        "print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    foreign = {"torch", "numpy", "cv2", "pydantic", "yaml", "loguru", "PIL", "urllib3"} & set(
        done.stdout.split()
    )
    assert not foreign
