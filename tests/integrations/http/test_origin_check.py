"""HTTP requests from web pages are refused, those from programs are not."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sam_poll.core.errors import SettingsError
from sam_poll.integrations.http.errors import HostError, OriginError
from sam_poll.integrations.http.origin_check import Callers
from tests.support.http_server import TOKEN, Site, json_body, running_site, settings

BODY = json.dumps(json_body(formats=["mask"])).encode()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with running_site() as made:
        yield made


def exchange_all(site: Site, request: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Return all answers to raw bytes: status, headers in lower case, body.

    The server must close the connection after them.
    """
    host, port = site.url.removeprefix("http://").split(":")
    found = b""
    with socket.create_connection((host, int(port)), timeout=60) as opened:
        opened.sendall(request)
        while piece := opened.recv(65536):
            found += piece
    answers = []
    while found:
        head, _, found = found.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines)
        }
        length = (
            0 if request.startswith(b"HEAD") else int(headers.get("content-length", len(found)))
        )
        answers.append((int(status.split()[1]), headers, found[:length]))
        found = found[length:]
    return answers


def exchange(site: Site, request: bytes) -> tuple[int, dict[str, str], bytes]:
    (answer,) = exchange_all(site, request)
    return answer


def get(path: str, *lines: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join(
        [f"{method} {path} HTTP/{version}", *lines, "Connection: close", "", ""]
    ).encode()


def post(*lines: str, body: bytes = BODY) -> bytes:
    given = [*lines, "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return get("/predict", *given, method="POST") + body


# ── Host ──


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:1",
        "localhost.",
        "127.0.0.1",
        "127.0.0.1:8000",
        "127.0.0.2:80",
        "[::1]",
        "[::1]:8000",
    ],
)
def test_loopback_server_accepts_its_own_names(site: Site, host: str) -> None:
    assert exchange(site, get("/health", f"Host: {host}"))[0] == 200
    assert exchange(site, post(f"Host: {host}"))[0] == 200


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
def test_loopback_server_accepts_no_other_name(site: Site, host: str) -> None:
    for request in (
        get("/health", f"Host: {host}"),
        get("/openapi.json", f"Host: {host}"),
        post(f"Host: {host}"),
    ):
        status, _, body = exchange(site, request)
        assert (status, json.loads(body)["code"], json.loads(body)["place"]) == (
            421,
            "host",
            "Host",
        )
        assert "serve.hosts" in json.loads(body)["remedy"]


def test_http_1_0_request_without_host_is_accepted(site: Site) -> None:
    assert exchange(site, get("/health", version="1.0"))[0] == 200


def test_hosts_of_the_settings_are_accepted() -> None:
    with running_site(serve__hosts=["sam.example.org", "10.0.0.5"]) as site:
        for host in ("sam.example.org", "SAM.example.org:443", "10.0.0.5:8000", "localhost"):
            assert exchange(site, get("/health", f"Host: {host}"))[0] == 200
        assert exchange(site, get("/health", "Host: example.org"))[0] == 421


NAMES = [
    "10.0.0.5:8000",
    "host.docker.internal:8000",
    "sam-poll:8000",
    "172.18.0.1",
    "localhost",
    "[fd00::1]:8000",
]


def scope(host: str, method: str = "POST", **more: str) -> dict[str, Any]:
    headers = {"host": host, **{name.replace("_", "-"): value for name, value in more.items()}}
    return {
        "type": "http",
        "method": method,
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }


@pytest.mark.parametrize("bound", ["0.0.0.0", "::", "10.0.0.5"])
def test_public_server_accepts_any_name_unless_hosts_are_set(bound: str) -> None:
    any_name = Callers.of("0.0.0.0:8000", bound, (), ())
    for host in NAMES:
        any_name.check(scope(host))
    some = Callers.of("gpu-box:8000", bound, ("sam.example.org", "fd00::1"), ())
    for host in (
        "sam.example.org",
        "gpu-box:8000",
        "localhost:8000",
        "127.0.0.1",
        "[fd00::1]:8000",
    ):
        some.check(scope(host))
    for host in ("10.0.0.5:8000", "host.docker.internal:8000"):
        with pytest.raises(HostError):
            some.check(scope(host))


def test_listen_name_is_accepted() -> None:
    Callers.of("my-machine:8000", "127.0.1.1", (), ()).check(scope("my-machine:8000"))
    Callers.of("[::1]:8000", "::1", (), ()).check(scope("[::1]:8000"))


# ── Origin ──


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
def test_post_from_a_page_of_another_origin_is_refused(site: Site, lines: list[str]) -> None:
    before = site.engine.calls["encode"]
    status, headers, body = exchange(site, post("Host: localhost:8000", *lines))
    assert (status, json.loads(body)["code"]) == (403, "origin")
    assert "serve.origins" in json.loads(body)["remedy"]
    assert not any(name.startswith("access-control") for name in headers)
    assert site.engine.calls["encode"] == before


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Origin: http://localhost:8000"],
        ["Origin: HTTP://LocalHost:8000", "Sec-Fetch-Site: same-origin"],
        ["Sec-Fetch-Site: none"],
    ],
)
def test_post_from_programs_and_own_pages_is_accepted(site: Site, lines: list[str]) -> None:
    assert exchange(site, post("Host: localhost:8000", *lines))[0] == 200


def test_origin_is_compared_without_the_default_port() -> None:
    callers = Callers.of("127.0.0.1:80", "127.0.0.1", ("sam.example.org",), ())
    callers.check(scope("sam.example.org", origin="https://sam.example.org"))
    callers.check(scope("sam.example.org:443", origin="https://sam.example.org"))
    callers.check(scope("localhost:80", origin="http://localhost"))
    with pytest.raises(OriginError):
        callers.check(scope("sam.example.org:80", origin="https://sam.example.org"))


def test_get_from_another_origin_is_answered_without_cors_headers(site: Site) -> None:
    lines = ["Host: localhost", "Origin: https://evil.example", "Sec-Fetch-Site: cross-site"]
    status, headers, _ = exchange(site, get("/health", *lines))
    assert status == 200
    assert "access-control-allow-origin" not in headers


def test_origins_of_the_settings_may_post_and_read() -> None:
    page = "https://label.example.org"
    with running_site(token=TOKEN, serve__origins=[f"{page}/"]) as site:
        first = ["Host: localhost", f"Origin: {page}", "Access-Control-Request-Method: POST"]
        status, headers, _ = exchange(
            site,
            get(
                "/predict",
                *first,
                "Access-Control-Request-Headers: authorization,content-type",
                method="OPTIONS",
            ),
        )
        assert (status, headers["access-control-allow-origin"]) == (200, page)
        sent = [
            "Host: localhost",
            f"Origin: {page}",
            "Sec-Fetch-Site: cross-site",
            f"Authorization: Bearer {TOKEN}",
        ]
        status, headers, _ = exchange(site, post(*sent))
        assert (status, headers["access-control-allow-origin"]) == (200, page)
        assert exchange(site, post(*sent[:3]))[0] == 401
        assert (
            exchange(site, post("Host: localhost", "Origin: https://evil.example", sent[3]))[0]
            == 403
        )


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
def test_hosts_and_origins_that_no_request_can_have_are_a_settings_error(
    key: str, value: str
) -> None:
    with pytest.raises(SettingsError, match=rf"serve\.{key}"):
        settings(**{f"serve__{key}": [value]})


# ── framing ──

SMUGGLED = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize("path", ["/predict", "/interact", "/health", "/nowhere"])
@pytest.mark.parametrize(
    "make",
    [
        lambda head: (
            f"{head}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
            + b"0\r\n\r\n"
            + SMUGGLED
        ),
        lambda head: (
            f"{head}Transfer-Encoding: Chunked\r\nContent-Length: 0\r\n\r\n".encode()
            + b"0\r\n\r\n"
            + SMUGGLED
        ),
    ],
)
def test_request_with_two_possible_ends_is_refused_and_nothing_after_it_is_read(
    site: Site, path: str, make: Callable[[str], bytes]
) -> None:
    method = "GET" if path == "/health" else "POST"
    status, headers, body = exchange(site, make(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n"))
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
def test_ambiguous_lengths_are_refused(site: Site, lines: bytes) -> None:
    request = b"POST /predict HTTP/1.1\r\nHost: localhost\r\n" + lines + b"\r\n0\r\n\r\n" + SMUGGLED
    assert exchange(site, request)[0] == 400


def test_chunked_body_in_http_1_0_is_refused(site: Site) -> None:
    request = (
        b"POST /predict HTTP/1.0\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    )
    assert exchange(site, request)[0] == 400


def test_chunked_body_is_answered(site: Site) -> None:
    head = get(
        "/predict",
        "Host: localhost",
        "Content-Type: application/json",
        "Transfer-Encoding: chunked",
        method="POST",
    )
    assert exchange(site, head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY))[0] == 200


# ── HEAD ──


@pytest.mark.parametrize("path", ["/health", "/metrics", "/openapi.json", "/predict", "/nowhere"])
def test_head_is_answered_as_get_without_the_body(site: Site, path: str) -> None:
    status, headers, _ = exchange(site, get(path, "Host: localhost"))
    head_status, same, body = exchange(site, get(path, "Host: localhost", method="HEAD"))
    assert (head_status, same.keys(), same["content-type"], body) == (
        status,
        headers.keys(),
        headers["content-type"],
        b"",
    )
    if path != "/metrics":  # which counts the time
        assert same["content-length"] == headers["content-length"]


def test_head_needs_the_token_as_get_does() -> None:
    with running_site(token=TOKEN) as site:
        assert exchange(site, get("/metrics", "Host: localhost", method="HEAD"))[0] == 401
        assert exchange(site, get("/health", "Host: localhost", method="HEAD"))[0] == 200
