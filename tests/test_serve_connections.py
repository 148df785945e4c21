"""SAM over HTTP: connections of which nothing comes, and answers that nobody takes, cost the others nothing."""

from __future__ import annotations

import json
import socket

import pytest

from sam_poll.serve import run
from sam_poll.serve.connections import Connection
from tests.conftest import picture_bytes, wait_until
from tests.serve_site import Site, in_base64, json_body, site


def connected(there: Site) -> socket.socket:
    host, port = there.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def ended(opened: socket.socket) -> bool:
    """Whether the server ends the connection, waiting for it."""
    try:
        while opened.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\nGET /no",
        b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\nx",
    ],
)
def test_a_connection_on_which_no_request_begins_is_ended(said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "patience_s", 0.2)
    with site(work=False) as there, connected(there) as caller:
        caller.sendall(said)
        assert ended(caller)


def test_a_request_may_take_longer_than_a_connection_may_be_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "patience_s", 0.1)
    with site(serve__timeout_s=0.5) as there, there.begin("/predict", {}, length=1000) as caller:
        assert b" 408 " in caller.recv(4096)


def test_a_caller_who_does_not_take_his_answer_loses_his_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "patience_s", 0.5)
    asked = {
        "image": in_base64(picture_bytes(width=3000, height=3000)),
        "pos_points": [[100, 100]],
    }  # an answer of 27 MB
    with site(serve__queue=1) as there:  # the answer has 27 MB, more than the system takes for him
        with there.begin("/interact", asked):
            wait_until(lambda: there.signs.stats.now().answered == 1)
            wait_until(lambda: there.door.inside == 0)
        assert there.post("/predict", json_body()).status_code == 200
        whole = there.post("/interact", asked)
        assert len(json.loads(whole.content)["mask"]) == 3000


def test_beyond_so_many_connections_no_more_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Connection", lambda **more: Connection(**{**more, "most": 3}))
    with site() as there:
        kept = [connected(there) for _ in range(3)]
        with connected(there) as caller:
            assert ended(caller)
        for one in kept:
            one.close()
        wait_until(lambda: _answers(there))


def _answers(there: Site) -> bool:
    try:
        with there.client() as client:
            return client.get("/health").status_code == 200
    except OSError:
        return False
