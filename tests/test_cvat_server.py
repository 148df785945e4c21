"""A CVAT server is reached with credentials that nobody sees, and each of its failures ends in one clear line."""

from __future__ import annotations

import io
import json
import os
import socket
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loguru import logger
from typer.testing import CliRunner

from sam_poll.cli import app
from sam_poll.cvat import credentials, server
from sam_poll.cvat.calls import FailedError, Limits
from sam_poll.cvat.credentials import Credentials
from sam_poll.errors import CvatError, ExitCode, SettingsError, UsageError
from tests.conftest import picture_bytes
from tests.cvat_standin import PASSWORD, TOKEN, USER, Fault, StandIn, Task, served

QUICK = Limits(connect_s=2.0, read_s=5.0, pauses_s=(0.0, 0.0, 0.0), poll_s=0.0)
WRONG = 'wr0ng "pa/ss" ü'
ONCE = Limits(connect_s=2.0, read_s=5.0, pauses_s=(), poll_s=0.0)
BY_TOKEN, BY_PASSWORD = Credentials(token=TOKEN), Credentials(user=USER, password=PASSWORD)


@pytest.fixture
def memory() -> StandIn:
    return StandIn()


@pytest.fixture
def host(memory: StandIn) -> Iterator[str]:
    with served(memory) as address:
        yield address


@pytest.fixture
def task(memory: StandIn) -> Task:
    return memory.add_task("cam1", [("done/a.png", picture_bytes(".png"))], "dog", "cat", "cow")


# ── credentials ──


def test_the_token_of_the_environment_comes_before_user_and_password_and_a_file_before_both(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{USER}:{PASSWORD}\n")
    file.chmod(0o600)
    both = {"CVAT_ACCESS_TOKEN": TOKEN, "CVAT_USERNAME": "x", "CVAT_PASSWORD": "y"}
    assert credentials.find(both) == BY_TOKEN
    assert credentials.find({"CVAT_USERNAME": USER, "CVAT_PASSWORD": PASSWORD}) == BY_PASSWORD
    assert credentials.find({"CVAT_USERNAME": USER, "PASS": PASSWORD}) == BY_PASSWORD  # as cvat-cli has it
    assert credentials.find(both, file) == BY_PASSWORD
    file.write_text(TOKEN)
    assert credentials.find({}, file) == BY_TOKEN


@pytest.mark.parametrize("half", [{}, {"CVAT_USERNAME": USER}, {"CVAT_PASSWORD": PASSWORD}, {"CVAT_ACCESS_TOKEN": " "}])
def test_missing_credentials_are_a_settings_error_that_names_the_variables(half: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as caught:
        credentials.find(half)
    assert "CVAT_ACCESS_TOKEN" in str(caught.value)
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"one\ntwo", b"\xff\xfe", b"user:", b":password", b"to\x07ken"])
def test_a_token_file_that_is_none_is_refused_without_showing_what_is_in_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "secrets"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        credentials.find({}, file)
    assert str(file) in str(caught.value)
    assert "two" not in str(caught.value)


def test_a_token_file_that_others_can_read_is_warned_about(tmp_path: Path, logged: list[str]) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o644)
    credentials.find({}, file)
    assert any("chmod 600" in line for line in logged)
    assert TOKEN not in "".join(logged)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as caught:
        credentials.host_of(f"https://{USER}:{PASSWORD}@cvat.example.org")
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("cvat.example.org", "https://cvat.example.org"), ("http://localhost:8080/", "http://localhost:8080")],
)
def test_an_address_without_a_scheme_is_https(given: str, meant: str) -> None:
    assert credentials.host_of(given) == meant


@pytest.mark.parametrize("who", [BY_TOKEN, BY_PASSWORD], ids=["token", "password"])
def test_token_and_password_both_read_and_write(memory: StandIn, host: str, task: Task, who: Credentials) -> None:
    known = server.connect(host, who, limits=QUICK)
    assert known.version() == "2.80.0"
    assert [label["name"] for label in known.labels(task=task.id)] == ["dog", "cat", "cow"]  # two pages
    box = {"type": "rectangle", "frame": 0, "label_id": task.labels[0]["id"], "points": [1, 2, 3, 4]}
    known.change(task.id, "create", [box])
    assert [shape["points"] for shape in task.shapes] == [[1, 2, 3, 4]]


def test_no_secret_is_ever_printed(memory: StandIn, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = io.StringIO()
    logger.add(lambda line: seen.write(str(line)), level="TRACE", backtrace=True, diagnose=True)
    for who in (BY_TOKEN, BY_PASSWORD, Credentials(token="wr0ng-t0ken"), Credentials(user=USER, password=WRONG)):
        seen.write(f"{who!r} {who}")
        for fault in (None, Fault(500, body={"detail": f"you sent {who.token}{who.password}"}), Fault("drop")):
            memory.when = lambda method, path, fault=fault: fault if "self" in path else None
            try:
                seen.write(repr(server.connect(host, who, limits=QUICK)))
            except FailedError:
                logger.exception("it failed")
                seen.write(traceback.format_exc())
    memory.when = lambda method, path: None
    for name, value in (("CVAT_USERNAME", USER), ("CVAT_PASSWORD", WRONG), ("CVAT_HOST", host)):
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["cvat", "masks", "1", "--state", str(tmp_path)])
    assert done.exit_code == ExitCode.CVAT_UNAUTHORIZED
    text = seen.getvalue() + done.output
    assert "the server does not know us" in text
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
    known = server.connect(host, BY_TOKEN, limits=ONCE)
    memory.when = lambda method, path: Fault(fault, after=True, body={"detail": "said\nby \x1b[31mit"})
    with pytest.raises(FailedError) as caught:
        known.annotations(task.id)
    assert caught.value.kind == kind
    assert caught.value.place == f"task {task.id}: annotations"
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    if isinstance(fault, int) and fault >= 400:
        assert f"HTTP {fault}" in caught.value.reason
        assert "said" in caught.value.reason


def test_a_redirection_is_told_and_not_followed_with_our_credentials(memory: StandIn, host: str) -> None:
    known = server.connect(host, BY_TOKEN, limits=QUICK)
    memory.when = lambda method, path: Fault(301, headers={"Location": f"{host}/api/users/self"})
    asked = len(memory.log)
    with pytest.raises(FailedError) as caught:
        known.task(1)
    assert f"{host}/api/users/self" in caught.value.reason
    assert len(memory.log) == asked + 1


def test_a_silent_server_is_left_after_the_time_limit(memory: StandIn, host: str, task: Task) -> None:
    known = server.connect(host, BY_TOKEN, limits=Limits(2.0, 0.2, pauses_s=()))
    memory.when = lambda method, path: Fault("silent")
    with pytest.raises(FailedError) as caught:
        known.meta(task.id)
    memory.let_go.set()
    assert caught.value.kind == ExitCode.CVAT_TIMEOUT
    assert caught.value.transient


def test_an_address_where_nobody_listens_is_unreachable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening
        with pytest.raises(FailedError) as caught:
            server.connect(f"http://127.0.0.1:{taken.getsockname()[1]}", BY_TOKEN, limits=ONCE)
    assert caught.value.kind == ExitCode.CVAT_UNREACHABLE


def test_a_server_without_tls_is_not_trusted_as_https(host: str) -> None:
    with pytest.raises(FailedError) as caught:
        server.connect(host.replace("http:", "https:"), BY_TOKEN, limits=ONCE)
    assert caught.value.kind == ExitCode.CVAT_UNREACHABLE
    assert "trusted" in caught.value.reason
    assert "http://" in str(caught.value.remedy)


def test_a_web_page_is_not_taken_for_cvat(memory: StandIn, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "about", lambda **_: b"<html>welcome</html>")
    with pytest.raises(FailedError) as caught:
        server.connect(host, BY_TOKEN, limits=ONCE)
    assert caught.value.kind == ExitCode.CVAT_UNREACHABLE
    assert "not a CVAT server" in caught.value.reason


@pytest.mark.parametrize(
    "fault", [Fault(500), Fault(502), Fault(503), Fault(429), Fault("drop"), Fault("cut", after=True)]
)
def test_reading_is_tried_again(memory: StandIn, host: str, task: Task, fault: Fault) -> None:
    known = server.connect(host, BY_TOKEN, limits=QUICK)
    asked = len(memory.log)
    memory.faults = {asked + 1: fault, asked + 2: fault}
    assert known.annotations(task.id)["shapes"] == []
    assert len(memory.log) == asked + 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409])
def test_what_another_try_does_not_mend_is_not_tried_again(memory: StandIn, host: str, task: Task, status: int) -> None:
    known = server.connect(host, BY_TOKEN, limits=QUICK)
    memory.when = lambda method, path: Fault(status)
    asked = len(memory.log)
    with pytest.raises(FailedError):
        known.annotations(task.id)
    assert len(memory.log) == asked + 1


def test_the_server_says_when_to_come_again(memory: StandIn, host: str, task: Task) -> None:
    known = server.connect(host, BY_TOKEN, limits=ONCE)
    memory.when = lambda method, path: Fault(429, headers={"Retry-After": "7"})
    with pytest.raises(FailedError) as caught:
        known.annotations(task.id)
    assert caught.value.after_s == 7
    assert caught.value.transient


@pytest.mark.parametrize("fault", [Fault(503), Fault("drop"), Fault("drop", after=True), Fault("cut", after=True)])
def test_writing_is_sent_once_whatever_happens(memory: StandIn, host: str, task: Task, fault: Fault) -> None:
    known = server.connect(host, BY_TOKEN, limits=QUICK)
    memory.when = lambda method, path: fault if method == "PATCH" else None
    box = {"type": "rectangle", "frame": 0, "label_id": task.labels[0]["id"], "points": [1, 2, 3, 4]}
    with pytest.raises(FailedError) as caught:
        known.change(task.id, "create", [box])
    assert caught.value.transient
    assert len(memory.writes()) == 1
    assert len(task.shapes) == int(fault.after)


def test_a_server_of_another_version_is_warned_about(memory: StandIn, host: str, logged: list[str]) -> None:
    memory.version = "1.7.3"
    server.connect(host, BY_TOKEN, limits=QUICK)
    assert any("1.7.3" in line and "cvat-sdk~=1.7.0" in line for line in logged)


ODD = [
    ("annotations", {"detail": "an error with status 200"}),
    ("annotations", {"shapes": None, "tracks": []}),
    ("annotations", {"shapes": [None], "tracks": []}),
    ("annotations", {"shapes": [{"id": 1, "frame": 0, "label_id": 1, "type": "mask", "points": ["1"]}], "tracks": []}),
    ("annotations", {"shapes": [{"id": 1, "frame": None, "label_id": 1, "type": "mask", "points": []}], "tracks": []}),
    ("annotations", {"shapes": [{"id": 1, "frame": 0, "label_id": 1, "type": "mask", "group": "x"}], "tracks": []}),
    ("annotations", ["shapes"]),
    ("meta", {"detail": "an error with status 200"}),
    ("meta", {"size": 1, "frames": [{"name": "a.png", "width": 5}]}),
    ("meta", {"size": float("nan"), "frames": []}),
    ("meta", {"size": 0, "frames": [], "deleted_frames": ["x"]}),
    ("labels", {"detail": "an error with status 200"}),
    ("labels", {"results": [{"name": "dog"}], "next": None}),
    ("labels", {"results": [{"id": 1, "name": "dog", "attributes": [{"name": "score"}]}], "next": None}),
]


@pytest.mark.parametrize(("asked", "answer"), ODD, ids=str)
def test_an_answer_without_what_is_needed_is_refused_and_never_taken_for_an_empty_one(
    memory: StandIn, host: str, task: Task, asked: str, answer: Any
) -> None:
    known = server.connect(host, BY_TOKEN, limits=QUICK)
    memory.when = lambda method, path: Fault(200, body=answer)
    with pytest.raises(CvatError, match="not what CVAT answers") as caught:
        known.labels(task=task.id) if asked == "labels" else getattr(known, asked)(task.id)
    assert caught.value.kind == ExitCode.CVAT_REFUSED
    assert str(task.id) in str(caught.value.place)


def test_pages_end_where_a_server_says_that_there_is_always_another(
    memory: StandIn, host: str, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    paged = memory._page
    monkeypatch.setattr(memory, "_page", lambda entries, query: {**paged(entries, query), "next": "more"})
    known = server.connect(host, BY_TOKEN, limits=QUICK)
    assert [label["name"] for label in known.labels(task=task.id)] == ["dog", "cat", "cow"]


@pytest.mark.cvat
@pytest.mark.skipif("CVAT_HOST" not in os.environ, reason="CVAT_HOST names no server")
def test_a_real_server_knows_us() -> None:
    known: Any = server.connect(os.environ["CVAT_HOST"], credentials.find(os.environ))
    assert known.myself()["username"]
