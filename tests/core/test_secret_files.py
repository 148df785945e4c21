"""Secrets are read from files of one line, and never shown."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from sam_poll.core.errors import SettingsError
from sam_poll.core.secret_files import read_secret, redact

SECRET = "s3cret-word"


def read(file: Path) -> str:
    return read_secret(file, place="--token-file", remedy="one line with the token")


def secret_file(tmp_path: Path, content: bytes, mode: int = 0o600) -> Path:
    file = tmp_path / "secret"
    file.write_bytes(content)
    file.chmod(mode)
    return file


def test_read_secret_returns_the_line_without_white_space_around_it(
    tmp_path: Path, logged: list[str]
) -> None:
    assert read(secret_file(tmp_path, f"\n {SECRET} \r\n".encode())) == SECRET
    assert logged == []


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_read_secret_warns_of_a_file_that_other_users_can_read(
    tmp_path: Path, logged: list[str], mode: int
) -> None:
    file = secret_file(tmp_path, SECRET.encode(), mode)
    assert read(file) == SECRET
    (line,) = logged
    assert str(file) in line
    assert "chmod 600" in line
    assert SECRET not in line


@pytest.mark.parametrize(
    "content",
    [b"", b" \n", f"{SECRET}\nmore".encode(), f"{SECRET}\0".encode(), b"\xff" + SECRET.encode()],
    ids=["empty", "blank", "two lines", "control character", "no text"],
)
def test_read_secret_refuses_anything_but_one_line_of_text(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(SettingsError) as refused:
        read(secret_file(tmp_path, content))
    assert (refused.value.place, refused.value.remedy) == (
        "--token-file",
        "one line with the token",
    )
    assert SECRET not in str(refused.value)


def test_read_secret_refuses_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for file in (tmp_path / "missing", tmp_path):
        with pytest.raises(SettingsError) as refused:
            read(file)
        assert refused.value.place == "--token-file"


@pytest.mark.parametrize("quoted", ["{}", '"{}"', "https://h/?token={}"])
def test_secrets_are_replaced_in_the_forms_in_which_a_server_quotes_them(quoted: str) -> None:
    secret = 'p"a/ss ü+'
    for form in (secret, json.dumps(secret)[1:-1], quote(secret), quote_plus(secret)):
        shown = redact(f"you sent {quoted.format(form)}", ["", secret])
        assert shown == f"you sent {quoted.format('…')}"
