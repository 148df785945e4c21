"""HTTP connections that are not used, or not read from, are closed."""

from __future__ import annotations

import json
import socket

import pytest

from sam_poll.integrations.http import server
from sam_poll.integrations.http.connections import Connection
from tests.conftest import picture_bytes, wait_until
from tests.support.http_server import Site, in_base64, json_body, running_site


def connected(site: Site) -> socket.socket:
    host, port = site.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def ended(opened: socket.socket) -> bool:
    """Wait until the server closes the connection."""
    try:
        while opened.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\nGET /no",
        b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\nx",
    ],
)
def test_connection_without_a_request_is_closed(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Connection, "patience_s", 0.2)
    with running_site(work=False) as site, connected(site) as caller:
        caller.sendall(data)
        assert ended(caller)


def test_request_may_take_longer_than_the_idle_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Connection, "patience_s", 0.1)
    with (
        running_site(serve__timeout_s=0.5) as site,
        site.send_without_reading("/predict", {}, length=1000) as caller,
    ):
        assert b" 408 " in caller.recv(4096)


def test_client_that_does_not_read_its_answer_loses_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Connection, "patience_s", 0.5)
    body = {
        "image": in_base64(picture_bytes(width=3000, height=3000)),
        "pos_points": [[100, 100]],
    }  # an answer of 27 MB
    with running_site(
        serve__queue=1
    ) as site:  # the answer has 27 MB, more than the system takes for him
        with site.send_without_reading("/interact", body):
            wait_until(lambda: site.telemetry.stats.now().answered == 1)
            wait_until(lambda: site.source.inside == 0)
        monkeypatch.setattr(Connection, "patience_s", 60)  # enough for who reads on a busy machine
        assert site.post("/predict", json_body()).status_code == 200
        whole = site.post("/interact", body)
        assert len(json.loads(whole.content)["mask"]) == 3000


def test_connections_beyond_the_maximum_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "Connection", lambda **more: Connection(**{**more, "most": 3}))
    with running_site() as site:
        kept = [connected(site) for _ in range(3)]
        with connected(site) as caller:
            assert ended(caller)
        for one in kept:
            one.close()
        wait_until(lambda: _answers(site))


def _answers(site: Site) -> bool:
    try:
        with site.client() as client:
            return client.get("/health").status_code == 200
    except OSError:
        return False
