"""Output for people and log collectors: JSON lines, live display, status lines, tables."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from loguru import logger
from rich.console import Console

from sam_poll.core.alarms import Alarm, Alarms
from sam_poll.core.stats import Stats
from sam_poll.runtime import console
from tests.conftest import wait_until


def json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_json_line_carries_job_generation_and_attempt(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_up_log("json", "INFO")
    with logger.contextualize(job="cam1/dog", generation=2, attempt=3):
        logger.info("job {} done", "cam1/dog")
    logger.info("after it")
    with_job, after = json_lines(capsys)
    assert (with_job["job"], with_job["generation"], with_job["attempt"]) == ("cam1/dog", 2, 3)
    assert with_job["message"] == "job cam1/dog done"
    assert with_job["level"] == "INFO"
    assert set(after) == {"time", "level", "message"}


@pytest.mark.parametrize(
    "name",
    ["a\nlevel: ERROR", "\x1b[2Jgone", "fake\u202egpj", "\udcff\udcfe.jpg", "a\rb", "\u2028"],
)
def test_a_name_in_a_json_line_is_escaped(capsys: pytest.CaptureFixture[str], name: str) -> None:
    console.set_up_log("json", "INFO")
    with logger.contextualize(job=name, where=Path(name)):
        logger.info("job {}", name)
    (line,) = json_lines(capsys)
    for key in ("job", "where", "message"):
        assert line[key].isprintable(), key
    assert line["job"] != name


def test_an_exception_in_a_json_line_is_one_printable_string(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console.set_up_log("json", "INFO")
    try:
        raise ValueError("a\nb\udcff")
    except ValueError:
        logger.exception("odd")
    (line,) = json_lines(capsys)
    assert line["exception"].startswith("ValueError(")
    assert line["exception"].isprintable()


def rendered(*lines: Any) -> str:
    screen = Console(
        width=200, record=True, color_system="standard", force_terminal=True, file=io.StringIO()
    )
    for line in lines:
        screen.print(line)
    return screen.export_text(styles=True)


def test_the_live_display_has_a_red_line_for_each_alarm() -> None:
    alarms = Alarms()
    shown = rendered(console.render_progress("demo on cpu", Stats().now(), 3, alarms.active()))
    assert "alarm" not in shown
    alarms.raise_("share", "the folder is not there\x1b[2J")
    alarms.raise_("output", "No space left on device")
    shown = rendered(console.render_progress("demo on cpu", Stats().now(), 3, alarms.active()))
    first, second = [line for line in shown.splitlines() if "alarm" in line]
    assert "alarm (share) for 0 s: the folder is not there\\x1b[2J" in first
    assert "alarm (output) for 0 s: No space left on device" in second
    assert "\x1b[1;31m" in first


def test_the_age_of_a_long_alarm_is_in_minutes() -> None:
    lasting = Alarm("share", "gone", since=0.0, started=time.monotonic() - 600.0, logged=0.0)
    assert console.alarm_line(lasting) == "alarm (share) for 10 min: gone"


def test_the_periodic_status_names_an_alarm_even_when_no_job_comes(logged: list[str]) -> None:
    alarms, stats = Alarms(), Stats()
    with console.PeriodicStatusLog(stats.now, lambda: 3, alarms.active, every_s=0.001):
        alarms.raise_("share", "gone")
        wait_until(
            lambda: any("3 files waiting; alarm (share) for 0 s: gone" in line for line in logged)
        )


def test_no_status_is_logged_while_nothing_happens(logged: list[str]) -> None:
    stats, asked = Stats(), list[int]()
    with console.PeriodicStatusLog(
        stats.now, lambda: 3, lambda: asked.append(1) or (), every_s=0.001
    ):
        wait_until(lambda: len(asked) > 3)
    assert logged == []


WORKER = {
    "worker": "box-3f-77",
    "host": "box",
    "pid": 77,
    "alive": True,
    "beat_s": 4.4,
    "model": "demo",
    "device": "cpu",
    "alarms": [{"kind": "share", "message": "gone", "seconds": 12.5}],
}


def test_a_daemon_is_a_row_with_its_last_heartbeat_and_its_alarms() -> None:
    assert console.worker_rows([WORKER]) == [
        ["box-3f-77", "box", "77", "demo", "cpu", "4 s ago", "share"]
    ]
    (dead,) = console.worker_rows(
        [WORKER | {"alive": False, "beat_s": 400, "model": None, "device": None}]
    )
    assert dead[3:6] == ["loading", "loading", "dead, 400 s ago"]


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"beat_s": "soon", "alarms": "all", "host": None},
        {
            "alarms": [1, None, {}, {"kind": ["x"], "seconds": "long", "message": 5}],
            "pid": {"a": 1},
        },
        {"worker": "\x1b[2J\n", "model": "\udcff", "device": 7},
    ],
)
def test_invalid_values_in_a_daemons_file_are_shown_escaped(odd: dict[str, Any]) -> None:
    (row,) = console.worker_rows([odd])
    assert len(row) == 7
    assert all(cell.isprintable() for cell in row)
    for alarm in console.alarms_of(odd):
        assert (type(alarm["kind"]), type(alarm["message"]), type(alarm["seconds"])) == (
            str,
            str,
            float,
        )


def test_a_command_without_a_stderr_logs_nothing_and_goes_on() -> None:
    code = (
        "from sam_poll.runtime import console; console.set_up_log('text', 'INFO'); "
        "from loguru import logger; logger.error('x')"
    )
    words = [sys.executable, "-c", f"import sys; sys.stderr = None; {code}"]
    assert subprocess.run(words, check=False).returncode == 0
