"""Tests of where credentials and addresses come from, and that they are never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from sam_poll.core.errors import SettingsError, UsageError
from sam_poll.integrations.cvat import credentials
from sam_poll.integrations.cvat.credentials import Credentials
from tests.support.cvat_server import PASSWORD, TOKEN, USER

BY_TOKEN, BY_PASSWORD = Credentials(token=TOKEN), Credentials(user=USER, password=PASSWORD)


def test_credentials_of_a_file_precede_the_token_and_the_token_precedes_the_password(
    tmp_path: Path,
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{USER}:{PASSWORD}\n")
    file.chmod(0o600)
    both = {"CVAT_ACCESS_TOKEN": TOKEN, "CVAT_USERNAME": "x", "CVAT_PASSWORD": "y"}
    assert credentials.find(both) == BY_TOKEN
    assert credentials.find({"CVAT_USERNAME": USER, "CVAT_PASSWORD": PASSWORD}) == BY_PASSWORD
    assert (
        credentials.find({"CVAT_USERNAME": USER, "PASS": PASSWORD}) == BY_PASSWORD
    )  # the variable of cvat-cli
    assert credentials.find(both, file) == BY_PASSWORD
    file.write_text(TOKEN)
    assert credentials.find({}, file) == BY_TOKEN


@pytest.mark.parametrize(
    "half", [{}, {"CVAT_USERNAME": USER}, {"CVAT_PASSWORD": PASSWORD}, {"CVAT_ACCESS_TOKEN": " "}]
)
def test_missing_credentials_are_a_settings_error_that_names_the_variables(
    half: dict[str, str],
) -> None:
    with pytest.raises(SettingsError) as caught:
        credentials.find(half)
    assert "CVAT_ACCESS_TOKEN" in str(caught.value)
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"one\ntwo", b"\xff\xfe", b"user:", b":password", b"to\x07ken"]
)
def test_an_invalid_token_file_is_refused_without_showing_its_content(
    tmp_path: Path, content: bytes
) -> None:
    file = tmp_path / "secrets"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        credentials.find({}, file)
    assert str(file) in str(caught.value)
    assert "two" not in str(caught.value)


def test_a_token_file_that_others_can_read_causes_a_warning(
    tmp_path: Path, logged: list[str]
) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o644)
    credentials.find({}, file)
    assert any("chmod 600" in line for line in logged)
    assert TOKEN not in "".join(logged)


@pytest.mark.parametrize("password", [PASSWORD, f"{PASSWORD}?x", f"{PASSWORD}#x", f"{PASSWORD}/x"])
def test_a_password_in_the_address_is_refused_and_not_repeated(password: str) -> None:
    with pytest.raises(UsageError) as caught:
        credentials.host_of(f"https://{USER}:{password}@cvat.example.org")
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("pasted", "server"),
    [
        ("https://cvat.example.org/tasks/7/jobs/12?frame=3", "https://cvat.example.org"),
        ("https://cvat.example.org/tasks?page=1#top", "https://cvat.example.org"),
        ("http://localhost:8080/projects/5/", "http://localhost:8080"),
        ("cvat.example.org/auth/login", "https://cvat.example.org"),
        ("https://example.org/cvat/jobs", "https://example.org/cvat"),
        ("https://tasks/tasks", "https://tasks"),
        ("https://api/", "https://api"),
        ("https://example.org/tasks-of-ours", "https://example.org/tasks-of-ours"),
    ],
)
def test_an_address_copied_from_a_browser_is_cut_to_the_server(pasted: str, server: str) -> None:
    assert credentials.host_of(pasted) == server


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("cvat.example.org", "https://cvat.example.org"),
        ("http://localhost:8080/", "http://localhost:8080"),
    ],
)
def test_an_address_without_a_scheme_is_https(given: str, meant: str) -> None:
    assert credentials.host_of(given) == meant


@pytest.mark.parametrize(
    "host", ["http://", "https:///tasks/7", "http://localhost:99999", "localhost:port", "[::1", "/"]
)
def test_an_address_without_a_host_or_with_an_impossible_port_is_refused(host: str) -> None:
    with pytest.raises(UsageError, match="is no address of a server"):
        credentials.host_of(host)


def test_an_ipv6_address_may_be_given() -> None:
    assert credentials.host_of("http://[::1]:8080/tasks/7") == "http://[::1]:8080"
