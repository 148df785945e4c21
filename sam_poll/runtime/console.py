"""Output for people: log lines, the live display on a terminal, status lines, tables.

Limitations: a terminal that reports to be one but shows no control characters needs `log: text`.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loguru import logger
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sam_poll.core.alarms import Alarm
from sam_poll.core.errors import SamPollError
from sam_poll.core.stats import Snapshot
from sam_poll.core.text import shown

_TEXT = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <8} {message}"
_LIVE = "<dim>{time:HH:mm:ss}</dim> <level>{message}</level>"

_UNLIMITED = 1_000_000  # characters in a line of a pipe or file; a table takes only what it needs


def error_console() -> Console:
    """Return a console on stderr, for errors and progress; stdout has results only."""
    return Console(stderr=True, soft_wrap=True)


def result_console() -> Console:
    """Return a console on stdout, for tables.

    Lines are folded on a terminal only: in a pipe or a file every name can be searched for whole.
    """
    out = Console()
    if not out.file.isatty():
        out.width = _UNLIMITED
    return out


def set_up_log(
    kind: str, level: str, *, console: Console | None = None, refusals: bool = True
) -> None:
    """Send loguru's records to stderr as text or, if `kind` is "json", as JSON lines.

    - `console`: write through it, so that a live display stays whole.
    - `refusals`: False where the command itself prints why a job was rejected (text only).
    """
    logger.remove()
    if sys.stderr is None:  # closed with 2>&-
        return
    if kind == "json":
        logger.add(_write_json, level=level, format="{message}")
    elif console is not None:
        logger.add(
            lambda line: console.print(Text.from_ansi(str(line).rstrip("\n"))),
            level=level,
            format=_LIVE,
            colorize=True,
        )
    else:
        least_levels: dict[str | None, str | int | bool] = {}
        if not refusals:
            least_levels["sam_poll.pipeline.completion"] = "CRITICAL"
        logger.add(
            sys.stderr,
            level=level,
            format=_TEXT,
            colorize=False,
            backtrace=False,
            diagnose=False,
            filter=least_levels,
        )


def _write_json(message: Any) -> None:
    record = message.record
    line: dict[str, Any] = {
        "time": record["time"].isoformat(timespec="milliseconds"),
        "level": record["level"].name,
        "message": _one_line(record["message"]),
        **{_one_line(key): _one_line(value) for key, value in record["extra"].items()},
    }
    if record["exception"]:
        line["exception"] = _one_line(repr(record["exception"].value))
    sys.stderr.write(json.dumps(line, default=str) + "\n")
    sys.stderr.flush()


def _one_line(value: Any) -> Any:
    """Return a value for a JSON log line.

    Texts lose control characters, and lone surrogates, which JSON readers reject. Numbers stay.
    """
    return value if value is None or isinstance(value, (bool, int, float)) else shown(value)


def forward_log(*names: str) -> None:
    """Forward the log of libraries at level DEBUG.

    For those that log each failed attempt, and tracebacks, of what is an alarm here.
    """

    class LogForwarder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logger.debug("{}: {}", record.name, record.getMessage())

    for name in names:
        library_logger = logging.getLogger(name)
        library_logger.handlers = [LogForwarder()]
        library_logger.propagate = False
        library_logger.setLevel(logging.INFO)


def wants_live(log: str) -> bool:
    """Return whether to use the live display: for `log: auto` on a terminal."""
    return log == "auto" and sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """Live display of a running daemon: counts, stage times, a line for each alarm."""

    def __init__(
        self,
        title: str,
        now: Callable[[], Snapshot],
        waiting: Callable[[], int],
        console: Console,
        alarms: Callable[[], Sequence[Alarm]] = tuple,
    ) -> None:
        self._title = title
        self._now = now
        self._waiting = waiting
        self._alarms = alarms
        self._live = Live(
            get_renderable=self._render, console=console, refresh_per_second=4, transient=False
        )

    def __enter__(self) -> Progress:
        self._live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._live.__exit__(*error)

    def _render(self) -> Group:
        return render_progress(self._title, self._now(), self._waiting(), self._alarms())


def render_progress(title: str, now: Snapshot, waiting: int, alarms: Sequence[Alarm] = ()) -> Group:
    """Return two lines (counts, mean milliseconds by stage) and a red one for each alarm."""
    counts = Text.assemble(
        ("● ", "green" if now.at_work else "dim"),
        (title, "bold"),
        "  ",
        (f"{now.answered}", "bold green"),
        " answered  ",
        (f"{now.rejected}", "bold red" if now.rejected else "dim"),
        " rejected  ",
        (f"{now.at_work}", "bold"),
        " in progress  ",
        (f"{waiting}", "bold"),
        " files waiting  ",
        (f"{now.rate:.1f}", "bold"),
        " jobs/s",
    )
    stages = " · ".join(f"{name} {ms:.0f}" for name, ms in now.stage_ms.items() if name != "total")
    times = f"  {stages} ms a job" if stages else "  waiting for the first job"
    alarm_lines = [Text(f"  {alarm_line(alarm)}", style="bold red") for alarm in alarms]
    return Group(counts, Text(times, style="dim"), *alarm_lines)


class PeriodicStatusLog:
    """Logs one status line a minute, in a pipe or container, while jobs come or an alarm lasts.

    While nothing happens nothing is logged. `what`: the name of one waiting job.
    """

    def __init__(
        self,
        now: Callable[[], Snapshot],
        waiting: Callable[[], int],
        alarms: Callable[[], Sequence[Alarm]] = tuple,
        every_s: float = 60.0,
        what: str = "file",
    ) -> None:
        self._now = now
        self._waiting = waiting
        self._alarms = alarms
        self._every_s = every_s
        self._what = what
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status-log", daemon=True)

    def __enter__(self) -> PeriodicStatusLog:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        before = (0, 0)
        while not self._end.wait(self._every_s):
            now = self._now()
            alarms = self._alarms()
            done = (now.answered, now.rejected)
            if done != before or now.at_work or alarms:
                before = done
                level = "WARNING" if alarms else "INFO"
                logger.log(level, "{}", status_line(now, self._waiting(), alarms, self._what))


def summary(now: Snapshot) -> str:
    """Return the counts of a run as text.

    `300 jobs answered (512 objects), 2 rejected (prompt 1, picture 1), 12.5 jobs/s`.
    """
    reasons = ", ".join(f"{code} {count}" for code, count in sorted(now.reasons.items()))
    rejected = f", {now.rejected} rejected ({reasons})" if now.rejected else ""
    rate = now.answered / now.elapsed_s if now.elapsed_s else 0.0
    done = f"{count(now.answered, 'job')} answered ({count(now.objects, 'object')})"
    return f"{done}{rejected}, {rate:.1f} jobs/s"


def status_line(
    now: Snapshot, waiting: int, alarms: Sequence[Alarm] = (), what: str = "file"
) -> str:
    """Return the summary with the waiting jobs and the alarms, for the log and systemd."""
    return "; ".join([f"{summary(now)}, {count(waiting, what)} waiting", *map(alarm_line, alarms)])


def alarm_line(alarm: Alarm) -> str:
    """Return an alarm as text: `alarm (share) for 12 min: the folder is not there`."""
    lasts = f"{alarm.seconds:.0f} s" if alarm.seconds < 60 else f"{alarm.seconds / 60:.0f} min"
    return f"alarm ({alarm.kind}) for {lasts}: {shown(alarm.message)}"


def worker_rows(workers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return a table row for each daemon: worker, host, pid, model, device, heartbeat, alarms.

    `workers` come from files on the share, which any user may write: every value is checked.
    """
    rows = []
    for worker in workers:
        identity = [shown(worker.get(key, "?")) for key in ("worker", "host", "pid")]
        model = [
            shown(worker[key]) if worker.get(key) else "loading" for key in ("model", "device")
        ]
        beat = worker.get("beat_s")
        ago = f"{beat:.0f} s ago" if isinstance(beat, (int, float)) else "?"
        alive = worker.get("alive")
        alarms = ", ".join(shown(alarm["kind"]) for alarm in alarms_of(worker)) if alive else ""
        rows.append([*identity, *model, ago if alive else f"dead, {ago}", alarms])
    return rows


def alarms_of(worker: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a daemon's valid alarms: `{"kind": …, "message": …, "seconds": …}`."""
    alarms = worker.get("alarms")
    if not isinstance(alarms, list):
        return []
    return [
        {
            "kind": str(alarm["kind"]),
            "message": str(alarm.get("message", "")),
            "seconds": _number(alarm.get("seconds")),
        }
        for alarm in alarms
        if isinstance(alarm, dict) and "kind" in alarm
    ]


def held_lines(worker: Mapping[str, Any]) -> list[str]:
    """Return a line for each path that a daemon names as unusable, and one for their rest."""
    held = worker.get("held")
    if not isinstance(held, dict):
        return []
    named = held.get("paths")
    entries = named if isinstance(named, list) else []
    paths = [entry for entry in entries if isinstance(entry, dict) and "path" in entry]
    lines = [
        f"waits: {shown(p['path'])}: {shown(p.get('reason', ''))} ({shown(p.get('remedy', ''))})"
        for p in paths
    ]
    more = int(_number(held.get("count"))) - len(paths)
    if more > 0:
        lines.append(f"waits: {more} more")
    return lines


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def count(number: int, word: str) -> str:
    """Return a number with its noun: `1 job`, `2 jobs`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def table(
    title: str, columns: list[str], rows: list[list[str]], *, right: set[int] | None = None
) -> Table:
    """Return a plain table; columns whose index is in `right` are right-aligned."""
    result = Table(
        title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False
    )
    for index, column in enumerate(columns):
        result.add_column(
            column, justify="right" if index in (right or set()) else "left", overflow="fold"
        )
    for row in rows:
        result.add_row(*(Text(cell) for cell in row))
    return result


def print_error(error: SamPollError) -> None:
    """Print an error on stderr: place, reason and remedy."""
    place = f"{error.place}: " if error.place else ""
    lines = [shown(line) for line in f"{place}{error.reason}".splitlines()]
    text = Text.assemble(("error: ", "bold red"), "\n".join(lines))
    if error.remedy:
        text.append(f"\n  → {shown(error.remedy)}", style="yellow")
    error_console().print(text)
