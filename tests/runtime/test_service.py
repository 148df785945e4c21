"""The life cycle that all long-running commands share."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from sam_poll.config import settings
from sam_poll.core.errors import ExitCode
from sam_poll.runtime import daemon, signals


def test_a_stop_while_the_workers_load_their_models_exits_with_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr(signals, "stop_on_signals", lambda: nullcontext(stop))
    (tmp_path / "in").mkdir()
    flags = {"input": tmp_path / "in", "model": "fake", "devices": ["cpu", "cpu"]}
    chosen = settings.load(None, env={}, flags=flags)
    assert daemon.watch(chosen) == ExitCode.OK


@pytest.mark.slow
def test_a_daemon_exits_without_output_from_libraries(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    command = [
        sys.executable,
        "-m",
        "sam_poll",
        "watch",
        str(tmp_path / "in"),
        "-m",
        "demo",
        "--once",
        "--log",
        "text",
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert all(re.match(r"20\d\d-", line) for line in ended.stderr.splitlines()), ended.stderr
