"""SAM over HTTP: what a web page in somebody's browser may not ask, and what programs still may."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sam_poll.errors import SettingsError
from sam_poll.serve.callers import Callers
from sam_poll.serve.refusals import HostError, OriginError
from tests.serve_site import TOKEN, Site, json_body, settings, site

BODY = json.dumps(json_body(formats=["mask"])).encode()


@pytest.fixture(scope="module")
def there() -> Iterator[Site]:
    with site() as made:
        yield made


def said(there: Site, request: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """All answers to raw bytes: status, headers in small letters, body. The connection must end after them."""
    host, port = there.url.removeprefix("http://").split(":")
    found = b""
    with socket.create_connection((host, int(port)), timeout=60) as opened:
        opened.sendall(request)
        while piece := opened.recv(65536):
            found += piece
    answers = []
    while found:
        head, _, found = found.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = 0 if request.startswith(b"HEAD") else int(headers.get("content-length", len(found)))
        answers.append((int(status.split()[1]), headers, found[:length]))
        found = found[length:]
    return answers


def asked(there: Site, request: bytes) -> tuple[int, dict[str, str], bytes]:
    (answer,) = said(there, request)
    return answer


def get(path: str, *lines: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", *lines, "Connection: close", "", ""]).encode()


def post(*lines: str, body: bytes = BODY) -> bytes:
    given = [*lines, "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return get("/predict", *given, method="POST") + body


# ── by which name ──


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST:1", "localhost.", "127.0.0.1", "127.0.0.1:8000", "127.0.0.2:80", "[::1]", "[::1]:8000"],
)
def test_a_server_of_this_machine_answers_to_its_own_names(there: Site, host: str) -> None:
    assert asked(there, get("/health", f"Host: {host}"))[0] == 200
    assert asked(there, post(f"Host: {host}"))[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "evil.example:8000",
        "10.0.0.5",
        "0.0.0.0",
        "[::2]:8000",
        "localhost@evil.example",
        "localhost:evil",
        "::1",
        "",
    ],
)
def test_a_server_of_this_machine_answers_to_no_other_name(there: Site, host: str) -> None:
    for request in (get("/health", f"Host: {host}"), get("/openapi.json", f"Host: {host}"), post(f"Host: {host}")):
        status, _, body = asked(there, request)
        assert (status, json.loads(body)["code"], json.loads(body)["place"]) == (421, "host", "Host")
        assert "serve.hosts" in json.loads(body)["remedy"]


def test_a_program_that_is_too_old_to_name_a_host_is_answered(there: Site) -> None:
    assert asked(there, get("/health", version="1.0"))[0] == 200


def test_the_settings_add_names() -> None:
    with site(serve__hosts=["sam.example.org", "10.0.0.5"]) as there:
        for host in ("sam.example.org", "SAM.example.org:443", "10.0.0.5:8000", "localhost"):
            assert asked(there, get("/health", f"Host: {host}"))[0] == 200
        assert asked(there, get("/health", "Host: example.org"))[0] == 421


NAMES = ["10.0.0.5:8000", "host.docker.internal:8000", "sam-poll:8000", "172.18.0.1", "localhost", "[fd00::1]:8000"]


def scope(host: str, method: str = "POST", **more: str) -> dict[str, Any]:
    headers = {"host": host, **{name.replace("_", "-"): value for name, value in more.items()}}
    return {"type": "http", "method": method, "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}


@pytest.mark.parametrize("bound", ["0.0.0.0", "::", "10.0.0.5"])
def test_a_server_that_others_reach_answers_to_any_name_unless_some_are_set(bound: str) -> None:
    any_name = Callers.of("0.0.0.0:8000", bound, (), ())
    for host in NAMES:
        any_name.check(scope(host))
    some = Callers.of("gpu-box:8000", bound, ("sam.example.org", "fd00::1"), ())
    for host in ("sam.example.org", "gpu-box:8000", "localhost:8000", "127.0.0.1", "[fd00::1]:8000"):
        some.check(scope(host))
    for host in ("10.0.0.5:8000", "host.docker.internal:8000"):
        with pytest.raises(HostError):
            some.check(scope(host))


def test_the_name_it_listens_at_is_its_own() -> None:
    Callers.of("my-machine:8000", "127.0.1.1", (), ()).check(scope("my-machine:8000"))
    Callers.of("[::1]:8000", "::1", (), ()).check(scope("[::1]:8000"))


# ── web pages ──


@pytest.mark.parametrize(
    "lines",
    [
        ["Origin: https://evil.example"],
        ["Origin: http://localhost:3000"],
        ["Origin: http://localhost"],
        ["Origin: null"],
        ["Origin: "],
        ["Origin: localhost:8000"],
        ["Origin: file://localhost:8000"],
        ["Origin: http://localhost:8000", "Origin: https://evil.example"],
        ["Sec-Fetch-Site: cross-site"],
        ["Sec-Fetch-Site: same-site"],
        ["Origin: http://localhost:8000", "Sec-Fetch-Site: cross-site"],
    ],
)
def test_no_page_of_another_origin_may_post(there: Site, lines: list[str]) -> None:
    before = there.engine.calls["encode"]
    status, headers, body = asked(there, post("Host: localhost:8000", *lines))
    assert (status, json.loads(body)["code"]) == (403, "origin")
    assert "serve.origins" in json.loads(body)["remedy"]
    assert not any(name.startswith("access-control") for name in headers)
    assert there.engine.calls["encode"] == before


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Origin: http://localhost:8000"],
        ["Origin: HTTP://LocalHost:8000", "Sec-Fetch-Site: same-origin"],
        ["Sec-Fetch-Site: none"],
    ],
)
def test_programs_and_pages_of_its_own_may(there: Site, lines: list[str]) -> None:
    assert asked(there, post("Host: localhost:8000", *lines))[0] == 200


def test_an_origin_is_the_same_with_its_schemes_own_port_and_without() -> None:
    callers = Callers.of("127.0.0.1:80", "127.0.0.1", ("sam.example.org",), ())
    callers.check(scope("sam.example.org", origin="https://sam.example.org"))
    callers.check(scope("sam.example.org:443", origin="https://sam.example.org"))
    callers.check(scope("localhost:80", origin="http://localhost"))
    with pytest.raises(OriginError):
        callers.check(scope("sam.example.org:80", origin="https://sam.example.org"))


def test_what_changes_nothing_may_be_asked_from_anywhere_and_read_nowhere(there: Site) -> None:
    lines = ["Host: localhost", "Origin: https://evil.example", "Sec-Fetch-Site: cross-site"]
    status, headers, _ = asked(there, get("/health", *lines))
    assert status == 200
    assert "access-control-allow-origin" not in headers


def test_a_page_that_the_settings_name_may_ask_and_read() -> None:
    page = "https://label.example.org"
    with site(token=TOKEN, serve__origins=[f"{page}/"]) as there:
        first = ["Host: localhost", f"Origin: {page}", "Access-Control-Request-Method: POST"]
        status, headers, _ = asked(
            there,
            get("/predict", *first, "Access-Control-Request-Headers: authorization,content-type", method="OPTIONS"),
        )
        assert (status, headers["access-control-allow-origin"]) == (200, page)
        sent = ["Host: localhost", f"Origin: {page}", "Sec-Fetch-Site: cross-site", f"Authorization: Bearer {TOKEN}"]
        status, headers, _ = asked(there, post(*sent))
        assert (status, headers["access-control-allow-origin"]) == (200, page)
        assert asked(there, post(*sent[:3]))[0] == 401
        assert asked(there, post("Host: localhost", "Origin: https://evil.example", sent[3]))[0] == 403


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hosts", "sam.example.org:8000"),
        ("hosts", "https://sam.example.org"),
        ("hosts", "*"),
        ("origins", "example.org"),
        ("origins", "https://example.org/path"),
        ("origins", "*"),
        ("origins", "null"),
    ],
)
def test_a_name_that_no_request_could_have_is_a_mistake_in_the_settings(key: str, value: str) -> None:
    with pytest.raises(SettingsError, match=rf"serve\.{key}"):
        settings(**{f"serve__{key}": [value]})


# ── where a request ends ──

SMUGGLED = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("path", ["/predict", "/interact", "/health", "/nowhere"])
@pytest.mark.parametrize(
    "make",
    [
        lambda head: (
            f"{head}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + b"0\r\n\r\n" + SMUGGLED
        ),
        lambda head: (
            f"{head}Transfer-Encoding: Chunked\r\nContent-Length: 0\r\n\r\n".encode() + b"0\r\n\r\n" + SMUGGLED
        ),
    ],
)
def test_a_request_that_ends_in_two_places_is_refused_and_nothing_after_it_is_read(
    there: Site, path: str, make: Callable[[str], bytes]
) -> None:
    method = "GET" if path == "/health" else "POST"
    status, headers, body = asked(there, make(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"))
    assert (status, json.loads(body)["code"], headers["connection"]) == (400, "framing", "close")


@pytest.mark.parametrize(
    "lines",
    [
        b"Content-Length: 4\r\nContent-Length: 5\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: +4\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding : chunked\r\nContent-Length: 4\r\n",
        b"Transfer-Encoding: \x0bchunked\r\nContent-Length: 4\r\n",
    ],
)
def test_lengths_that_can_be_read_in_two_ways_are_refused(there: Site, lines: bytes) -> None:
    request = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n0\r\n\r\n" + SMUGGLED
    assert asked(there, request)[0] == 400


def test_http_1_0_has_no_chunks(there: Site) -> None:
    request = b"POST /predict HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert asked(there, request)[0] == 400


def test_a_body_in_chunks_alone_is_answered(there: Site) -> None:
    head = get(
        "/predict", "Host: localhost", "Content-Type: application/json", "Transfer-Encoding: chunked", method="POST"
    )
    assert asked(there, head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))[0] == 200


# ── HEAD ──


@pytest.mark.parametrize("path", ["/health", "/metrics", "/openapi.json", "/predict", "/nowhere"])
def test_head_is_answered_as_get_without_the_body(there: Site, path: str) -> None:
    status, headers, _ = asked(there, get(path, "Host: localhost"))
    told, same, body = asked(there, get(path, "Host: localhost", method="HEAD"))
    assert (told, same.keys(), same["content-type"], body) == (status, headers.keys(), headers["content-type"], b"")
    if path != "/metrics":  # which counts the time
        assert same["content-length"] == headers["content-length"]


def test_head_needs_the_token_as_get_does() -> None:
    with site(token=TOKEN) as there:
        assert asked(there, get("/metrics", "Host: localhost", method="HEAD"))[0] == 401
        assert asked(there, get("/health", "Host: localhost", method="HEAD"))[0] == 200
