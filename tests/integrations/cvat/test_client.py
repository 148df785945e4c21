"""Tests of the connection to a CVAT server: credentials stay secret, each failure is one line."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from loguru import logger
from typer.testing import CliRunner

from sam_poll.cli.main import app
from sam_poll.core.errors import CvatError, ExitCode, SettingsError, UsageError
from sam_poll.integrations.cvat import client, credentials, shapes
from sam_poll.integrations.cvat.credentials import Credentials
from sam_poll.integrations.cvat.transport import RequestFailedError, RequestLimits
from tests.conftest import picture_bytes
from tests.support.cvat_server import (
    ANNOTATOR,
    CSRF,
    PASSWORD,
    READER,
    TOKEN,
    USER,
    Fault,
    StandIn,
    Task,
)

QUICK = RequestLimits(connect_s=2.0, read_s=5.0, retry_delays_s=(0.0, 0.0, 0.0), poll_s=0.0)
WRONG = 'wr0ng "pa/ss" ü'
ONCE = RequestLimits(connect_s=2.0, read_s=5.0, retry_delays_s=(), poll_s=0.0)
BY_TOKEN, BY_PASSWORD = Credentials(token=TOKEN), Credentials(user=USER, password=PASSWORD)


@pytest.fixture
def task(memory: StandIn) -> Task:
    return memory.add_task("cam1", [("done/a.png", picture_bytes(".png"))], "dog", "cat", "cow")


# ── logging in ──


@pytest.mark.parametrize("who", [BY_TOKEN, BY_PASSWORD], ids=["token", "password"])
def test_connect_with_token_or_password_can_read_and_write(
    memory: StandIn, host: str, task: Task, who: Credentials
) -> None:
    connection = client.connect(host, who, limits=QUICK)
    assert connection.version() == "2.80.0"
    assert [label["name"] for label in connection.labels(task=task.id)] == [
        "dog",
        "cat",
        "cow",
    ]  # two pages
    box = {
        "type": "rectangle",
        "frame": 0,
        "label_id": task.labels[0]["id"],
        "points": [1, 2, 3, 4],
    }
    connection.change_shapes(task.id, "create", [box])
    assert [shape["points"] for shape in task.shapes] == [[1, 2, 3, 4]]


def test_credentials_never_appear_in_output_logs_or_tracebacks(
    memory: StandIn, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = io.StringIO()
    logger.add(lambda line: seen.write(str(line)), level="TRACE", backtrace=True, diagnose=True)
    for who in (
        BY_TOKEN,
        BY_PASSWORD,
        Credentials(token="wr0ng-t0ken"),
        Credentials(user=USER, password=WRONG),
    ):
        seen.write(f"{who!r} {who}")
        for fault in (
            None,
            Fault(500, body={"detail": f"you sent {who.token}{who.password}"}),
            Fault("drop"),
        ):
            memory.when = lambda method, path, fault=fault: fault if "self" in path else None
            try:
                seen.write(repr(client.connect(host, who, limits=QUICK)))
            except RequestFailedError:
                logger.exception("it failed")
                seen.write(traceback.format_exc())
    memory.when = lambda method, path: None
    for name, value in (("CVAT_USERNAME", USER), ("CVAT_PASSWORD", WRONG), ("CVAT_HOST", host)):
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["cvat", "masks", "1", "--state", str(tmp_path)])
    assert done.exit_code == ExitCode.CVAT_UNAUTHORIZED
    text = seen.getvalue() + done.output
    assert "HTTP 401" in text
    for secret in (TOKEN, PASSWORD, "wr0ng-t0ken", WRONG, json.dumps(WRONG)[1:-1]):
        assert secret not in text


# ── failures ──


KINDS = [
    (401, ExitCode.CVAT_UNAUTHORIZED),
    (403, ExitCode.CVAT_FORBIDDEN),
    (404, ExitCode.CVAT_NOT_FOUND),
    (409, ExitCode.CVAT_CONFLICT),
    (400, ExitCode.CVAT_REFUSED),
    (413, ExitCode.CVAT_REFUSED),
    (302, ExitCode.CVAT_REFUSED),
    (500, ExitCode.CVAT_SERVER),
    (502, ExitCode.CVAT_SERVER),
    (503, ExitCode.CVAT_SERVER),
    ("drop", ExitCode.CVAT_UNREACHABLE),
    ("cut", ExitCode.CVAT_UNREACHABLE),
]


@pytest.mark.parametrize(("fault", "kind"), KINDS)
def test_each_failure_has_its_exit_code_and_one_line_with_place_and_remedy(
    memory: StandIn, host: str, task: Task, fault: int | str, kind: ExitCode
) -> None:
    connection = client.connect(host, BY_TOKEN, limits=ONCE)
    memory.when = lambda method, path: Fault(
        fault, after=True, body={"detail": "said\nby \x1b[31mit"}
    )
    with pytest.raises(RequestFailedError) as caught:
        connection.annotations(task.id)
    assert caught.value.kind == kind
    assert caught.value.place == f"task {task.id}: annotations"
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    if isinstance(fault, int) and fault >= 400:
        assert f"HTTP {fault}" in caught.value.reason
        assert "said" in caught.value.reason


@pytest.mark.parametrize("kind", ["task", "project", "job"])
def test_what_does_not_exist_is_not_found_though_the_server_fails_at_its_labels(
    memory: StandIn, host: str, kind: str
) -> None:
    connection = client.connect(host, BY_TOKEN, limits=QUICK)
    before = len(memory.log)
    with pytest.raises(RequestFailedError) as caught:
        connection.labels(**{kind: 99})
    assert caught.value.kind == ExitCode.CVAT_NOT_FOUND
    assert caught.value.place == f"{kind} 99"
    assert len(memory.log) == before + 1


def test_a_redirect_is_reported_and_not_followed_with_the_credentials(
    memory: StandIn, host: str
) -> None:
    connection = client.connect(host, BY_TOKEN, limits=QUICK)
    memory.when = lambda method, path: Fault(301, headers={"Location": f"{host}/api/users/self"})
    before = len(memory.log)
    with pytest.raises(RequestFailedError) as caught:
        connection.task(1)
    assert f"{host}/api/users/self" in caught.value.reason
    assert len(memory.log) == before + 1


def test_a_silent_server_is_a_timeout(memory: StandIn, host: str, task: Task) -> None:
    connection = client.connect(host, BY_TOKEN, limits=RequestLimits(2.0, 0.2, retry_delays_s=()))
    memory.when = lambda method, path: Fault("silent")
    with pytest.raises(RequestFailedError) as caught:
        connection.meta(task.id)
    memory.released.set()
    assert caught.value.kind == ExitCode.CVAT_TIMEOUT
    assert caught.value.transient


def test_an_address_without_a_listener_is_unreachable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        with pytest.raises(RequestFailedError) as caught:
            client.connect(f"http://127.0.0.1:{taken.getsockname()[1]}", BY_TOKEN, limits=ONCE)
    assert caught.value.kind == ExitCode.CVAT_UNREACHABLE


def test_a_server_without_tls_is_not_trusted_as_https(host: str) -> None:
    with pytest.raises(RequestFailedError) as caught:
        client.connect(host.replace("http:", "https:"), BY_TOKEN, limits=ONCE)
    assert caught.value.kind == ExitCode.CVAT_UNREACHABLE
    assert "trusted" in caught.value.reason
    assert "http://" in str(caught.value.remedy)


def test_a_web_page_is_not_taken_for_cvat(
    memory: StandIn, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "about", lambda **_: b"<html>welcome</html>")
    with pytest.raises(RequestFailedError) as caught:
        client.connect(host, BY_TOKEN, limits=ONCE)
    assert caught.value.kind == ExitCode.CVAT_UNREACHABLE
    assert "not a CVAT server" in caught.value.reason


@pytest.mark.parametrize(
    "fault",
    [Fault(500), Fault(502), Fault(503), Fault(429), Fault("drop"), Fault("cut", after=True)],
)
def test_reading_is_retried_after_transient_failures(
    memory: StandIn, host: str, task: Task, fault: Fault
) -> None:
    connection = client.connect(host, BY_TOKEN, limits=QUICK)
    before = len(memory.log)
    memory.faults = {before + 1: fault, before + 2: fault}
    assert connection.annotations(task.id)["shapes"] == []
    assert len(memory.log) == before + 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409])
def test_reading_is_not_retried_after_permanent_failures(
    memory: StandIn, host: str, task: Task, status: int
) -> None:
    connection = client.connect(host, BY_TOKEN, limits=QUICK)
    memory.when = lambda method, path: Fault(status)
    before = len(memory.log)
    with pytest.raises(RequestFailedError):
        connection.annotations(task.id)
    assert len(memory.log) == before + 1


def test_retry_after_is_the_delay_of_the_failure(memory: StandIn, host: str, task: Task) -> None:
    connection = client.connect(host, BY_TOKEN, limits=ONCE)
    memory.when = lambda method, path: Fault(429, headers={"Retry-After": "7"})
    with pytest.raises(RequestFailedError) as caught:
        connection.annotations(task.id)
    assert caught.value.retry_after_s == 7
    assert caught.value.transient


@pytest.mark.parametrize(
    "fault", [Fault(503), Fault("drop"), Fault("drop", after=True), Fault("cut", after=True)]
)
def test_writing_is_never_retried(memory: StandIn, host: str, task: Task, fault: Fault) -> None:
    connection = client.connect(host, BY_TOKEN, limits=QUICK)
    memory.when = lambda method, path: fault if method == "PATCH" else None
    box = {
        "type": "rectangle",
        "frame": 0,
        "label_id": task.labels[0]["id"],
        "points": [1, 2, 3, 4],
    }
    with pytest.raises(RequestFailedError) as caught:
        connection.change_shapes(task.id, "create", [box])
    assert caught.value.transient
    assert len(memory.writes()) == 1
    assert len(task.shapes) == int(fault.after)


def test_write_access_is_checked_without_a_change_and_retried(
    memory: StandIn, host: str, task: Task
) -> None:
    connection = client.connect(host, BY_TOKEN, limits=QUICK)
    memory.faults = {len(memory.log) + 1: Fault(502), len(memory.log) + 2: Fault("drop")}
    for job in (None, task.jobs[0].id):
        connection.check_write_access(task.id, job=job)
    assert memory.writes() == []
    reader = client.connect(host, Credentials(token=READER), limits=QUICK)
    for job in (None, task.jobs[0].id):
        with pytest.raises(RequestFailedError) as caught:
            reader.check_write_access(task.id, job=job)
        assert caught.value.kind == ExitCode.CVAT_FORBIDDEN


def test_frames_and_shapes_of_a_job_have_the_numbers_of_the_task(
    memory: StandIn, host: str
) -> None:
    frames = [(f"{n}.png", picture_bytes(".png", seed=n)) for n in range(5)]
    task = memory.add_task("t", frames, "dog")
    task.deleted = [1, 3]
    _, second = memory.split(task, segment_size=3, overlap=1)
    memory.draw(task, 4, "rectangle", "dog", [1, 2, 3, 4])
    connection = client.connect(host, BY_TOKEN, limits=QUICK)
    found = shapes.frames_of(connection.meta(task.id, job=second.id), first=second.start)
    assert {n: frame.name for n, frame in found.items()} == {2: "2.png", 4: "4.png"}
    assert connection.picture(task.id, 4, job=second.id) == frames[4][1]
    held = connection.annotations(task.id, job=second.id)["shapes"]
    assert [shape["frame"] for shape in held] == [4]
    task.is_video = True
    whole = shapes.frames_of(connection.meta(task.id))
    part = shapes.frames_of(connection.meta(task.id, job=second.id), first=second.start)
    assert part == {n: frame for n, frame in whole.items() if n >= 2}


def test_honeypots_are_empty_where_they_may_not_be_known(
    memory: StandIn, host: str, task: Task
) -> None:
    task.honeypots = {0}
    job = task.jobs[0]
    job.assigned = True
    connection = client.connect(host, BY_TOKEN, limits=QUICK)
    assert connection.honeypot_frames(task.id) == {0}
    assert connection.honeypot_frames(task.id, job=job.id) == {0}
    annotator = client.connect(host, Credentials(token=ANNOTATOR), limits=QUICK)
    assert annotator.honeypot_frames(task.id, job=job.id) == frozenset()
    memory.when = lambda method, path: Fault(404)  # a server that knows no honeypots
    assert connection.honeypot_frames(task.id) == frozenset()
    memory.when = lambda method, path: Fault(400)
    with pytest.raises(RequestFailedError):
        connection.honeypot_frames(task.id)


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        ("2.15.0", "Token"),
        ("2.46.9", "Token"),
        ("2.47.0", "Bearer"),
        ("3.0", "Bearer"),
        ("?", "Bearer"),
    ],
)
def test_a_token_is_an_api_key_for_servers_without_access_tokens(
    memory: StandIn, host: str, version: str, kind: str
) -> None:
    memory.version = version
    client.connect(host, BY_TOKEN, limits=QUICK)
    assert memory.headers[-1]["Authorization"] == f"{kind} {TOKEN}"


def test_a_session_sends_the_proof_that_django_wants_for_writes(
    memory: StandIn, host: str, task: Task
) -> None:
    connection = client.connect(host, BY_PASSWORD, limits=QUICK)
    connection.check_write_access(task.id)
    assert memory.headers[-1]["Origin"] == host
    assert memory.headers[-1]["X-CSRFToken"]


def test_of_two_csrf_cookies_the_proof_is_that_which_django_takes(
    memory: StandIn, host: str, task: Task
) -> None:
    memory.cookies = ["csrftoken=other; Path=/api"]
    connection = client.connect(host, BY_PASSWORD, limits=QUICK)
    connection.check_write_access(task.id)
    assert memory.headers[-1]["X-CSRFToken"] == CSRF
    assert memory.headers[-1]["Cookie"].endswith(f"csrftoken={CSRF}")  # Django takes the last


def test_a_csrf_cookie_that_no_header_can_hold_is_one_line(memory: StandIn, host: str) -> None:
    memory.cookies = ["csrftoken=\u00fc; Path=/"]
    with pytest.raises(RequestFailedError) as caught:
        client.connect(host, BY_PASSWORD, limits=ONCE)
    assert caught.value.place == host


def test_proxies_of_the_environment_are_not_used(
    memory: StandIn, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert client.connect(host, BY_TOKEN, limits=ONCE).version() == "2.80.0"


@pytest.mark.parametrize("address", ["ftp://cvat.example.org", "http://a\0b"])
def test_only_http_addresses_are_servers(address: str) -> None:
    with pytest.raises(UsageError) as caught:
        client.connect(address, BY_TOKEN, limits=ONCE)
    assert caught.value.place == "--host"


@pytest.mark.parametrize("name", ["\u00f6rg", "a\nb", " org"])
def test_an_impossible_organization_is_a_usage_error(host: str, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        client.connect(host, BY_TOKEN, organization=name, limits=ONCE)
    assert caught.value.place == "--org"


@pytest.mark.parametrize("address", ["http://a..b", "http://xn--", "http://" + "a" * 300])
def test_an_impossible_host_name_is_one_line(address: str) -> None:
    with pytest.raises(RequestFailedError) as caught:
        client.connect(address, BY_TOKEN, limits=ONCE)
    assert caught.value.place == address


@pytest.mark.parametrize("token", ["wr0ng-t\u00f6ken", "wr0ng\nt\u00f6ken"])
def test_a_token_that_no_header_can_hold_is_refused_and_not_shown(host: str, token: str) -> None:
    with pytest.raises(RequestFailedError) as caught:
        client.connect(host, Credentials(token=token), limits=ONCE)
    assert caught.value.kind == ExitCode.CVAT_UNAUTHORIZED
    assert "wr0ng" not in str(caught.value)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(SettingsError, match="needs the package httpx") as caught:
        client.connect(host, BY_TOKEN, limits=ONCE)
    assert "sam_poll[cvat]" in str(caught.value.remedy)


ODD = [
    ("annotations", {"detail": "an error with status 200"}),
    ("annotations", {"shapes": None, "tracks": []}),
    ("annotations", {"shapes": [None], "tracks": []}),
    (
        "annotations",
        {
            "shapes": [{"id": 1, "frame": 0, "label_id": 1, "type": "mask", "points": ["1"]}],
            "tracks": [],
        },
    ),
    (
        "annotations",
        {
            "shapes": [{"id": 1, "frame": None, "label_id": 1, "type": "mask", "points": []}],
            "tracks": [],
        },
    ),
    (
        "annotations",
        {
            "shapes": [{"id": 1, "frame": 0, "label_id": 1, "type": "mask", "group": "x"}],
            "tracks": [],
        },
    ),
    ("annotations", ["shapes"]),
    ("meta", {"detail": "an error with status 200"}),
    ("meta", {"size": 1, "frames": [{"name": "a.png", "width": 5}]}),
    ("meta", {"size": float("nan"), "frames": []}),
    ("meta", {"size": 0, "frames": [], "deleted_frames": ["x"]}),
    ("jobs", {"detail": "an error with status 200"}),
    ("jobs", {"results": [{"id": 1, "task_id": 1, "start_frame": 0}], "next": None}),
    ("honeypot_frames", {"honeypot_frames": ["1"]}),
    ("honeypot_frames", {"honeypot_frames": 1}),
    ("labels", {"detail": "an error with status 200"}),
    ("labels", {"results": [{"name": "dog"}], "next": None}),
    (
        "labels",
        {"results": [{"id": 1, "name": "dog", "attributes": [{"name": "score"}]}], "next": None},
    ),
]


@pytest.mark.parametrize(("method", "answer"), ODD, ids=str)
def test_an_incomplete_answer_is_refused_and_never_taken_for_an_empty_one(
    memory: StandIn, host: str, task: Task, method: str, answer: Any
) -> None:
    connection = client.connect(host, BY_TOKEN, limits=QUICK)
    memory.when = lambda method, path: Fault(200, body=answer)
    with pytest.raises(CvatError) as caught:
        getattr(connection, method)(task=task.id)
    assert caught.value.kind == ExitCode.CVAT_REFUSED
    assert str(task.id) in str(caught.value.place)


def test_pages_end_even_if_the_server_always_names_a_next_page(
    memory: StandIn, host: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged = memory._page
    monkeypatch.setattr(
        memory, "_page", lambda entries, query: {**paged(entries, query), "next": "more"}
    )
    connection = client.connect(host, BY_TOKEN, limits=QUICK)
    assert [label["name"] for label in connection.labels(task=task.id)] == ["dog", "cat", "cow"]


@pytest.mark.cvat
@pytest.mark.skipif("CVAT_HOST" not in os.environ, reason="CVAT_HOST names no server")
def test_connect_works_on_a_real_server() -> None:
    connection: Any = client.connect(os.environ["CVAT_HOST"], credentials.find(os.environ))
    assert connection.current_user()["username"]
