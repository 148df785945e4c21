"""Helpers to run `sam-poll cvat prompts`, and to make data sets for it."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sam_poll.cli import main
from sam_poll.prompts import parser
from tests.conftest import picture_bytes


class Run:
    """One run of the command: its exit code and its output."""

    def __init__(self, *arguments: object) -> None:
        result = CliRunner().invoke(main.app, ["cvat", "prompts", *map(str, arguments)])
        self.code, self.text = result.exit_code, result.stdout + result.stderr


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")


def picture(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_bytes(path.suffix.lower(), seed=seed))
    return path


def tree(root: Path) -> dict[str, bytes]:
    return {
        p.relative_to(root).as_posix(): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.is_file()
    }


def prompts_in(body: bytes) -> Any:
    return parser.parse(body).prompts


def zipped(*members: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, body in members:
            archive.writestr(name, body)
    return out.getvalue()
