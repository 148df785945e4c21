"""The command line, run in this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sam_poll.cli import main
from tests.conftest import Share


class Run:
    """A command's end: exit code, stdout, stderr."""

    def __init__(self, *arguments: object) -> None:
        result = CliRunner().invoke(main.app, [str(a) for a in arguments])
        self.code = result.exit_code
        self.out = result.stdout
        self.err = result.stderr
        self.text = self.out + self.err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from the checkout's config.yaml, and with no settings from outside."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("COLUMNS", "200")
    for name in [n for n in os.environ if n.startswith("SAM_POLL_")]:
        monkeypatch.delenv(name)


def watch_once(share: Share, *more: object) -> Run:
    return Run("watch", share.input, "--once", "-m", "fake", *more)


def watch_command(share: Share) -> list[str]:
    """The arguments of a real daemon on the share, for a process of its own."""
    return [
        sys.executable,
        "-m",
        "sam_poll",
        "watch",
        str(share.input),
        "-m",
        "fake",
        "--log",
        "text",
    ]
