"""What a person sees of a run: log lines, a live display on a terminal, tables.

What can still go wrong here: a terminal that lies about being one gets control characters; `log: text` is for it.
"""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from loguru import logger
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from sam_poll.alarms import Alarm
from sam_poll.fs import shown
from sam_poll.stats import Snapshot

_TEXT = "{time:YYYY-MM-DD HH:mm:ss.SSS} {level: <8} {message}"
_LIVE = "<dim>{time:HH:mm:ss}</dim> <level>{message}</level>"


_ENDLESS = 1_000_000  # characters of a line where nothing has an edge; a table takes only what it needs


def error_console() -> Console:
    """Where errors and progress go: stderr, so that stdout carries results only."""
    return Console(stderr=True, soft_wrap=True)


def result_console() -> Console:
    """Where tables go: stdout. Lines are as long as their content, unless they are for a terminal, where they are
    folded: in a pipe or a file every name can be searched for whole."""
    out = Console()
    if not out.file.isatty():
        out.width = _ENDLESS
    return out


def set_up_log(kind: str, level: str, *, console: Console | None = None, refusals: bool = True) -> None:
    """Send loguru's lines to stderr as text or JSON lines, or through `console` so that a live display stays whole.
    `refusals` is False for text where the command itself prints why a job was rejected."""
    logger.remove()
    if sys.stderr is None:  # closed (2>&-): there is nobody to tell
        return
    if kind == "json":
        logger.add(_write_json, level=level, format="{message}")
    elif console is not None:
        logger.add(
            lambda line: console.print(Text.from_ansi(str(line).rstrip("\n"))), level=level, format=_LIVE, colorize=True
        )
    else:
        quiet: dict[str | None, str | int | bool] = {} if refusals else {"sam_poll.endings": "CRITICAL"}
        logger.add(sys.stderr, level=level, format=_TEXT, colorize=False, backtrace=False, diagnose=False, filter=quiet)


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
    """Numbers stay numbers; texts lose what a terminal acts upon and what JSON's readers refuse (lone surrogates)."""
    return value if value is None or isinstance(value, (bool, int, float)) else shown(value)


def wants_live(log: str) -> bool:
    """Whether the live display suits: `log: auto` on a terminal."""
    return log == "auto" and sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """The live display of a running daemon: one line of counts, one of where the time goes, one for each alarm."""

    def __init__(
        self,
        title: str,
        now: Callable[[], Snapshot],
        waiting: Callable[[], int],
        console: Console,
        alarms: Callable[[], Sequence[Alarm]] = tuple,
    ) -> None:
        self._title, self._now, self._waiting, self._alarms = title, now, waiting, alarms
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=False)

    def __enter__(self) -> Progress:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, value, trace)

    def _render(self) -> Group:
        return render_progress(self._title, self._now(), self._waiting(), self._alarms())


def render_progress(title: str, now: Snapshot, waiting: int, alarms: Sequence[Alarm] = ()) -> Group:
    """Two lines: counts, and mean milliseconds by stage; a red one for each alarm."""
    counts = Text.assemble(
        ("● ", "green" if now.at_work else "dim"),
        (title, "bold"),
        "  ",
        (f"{now.answered}", "bold green"),
        " answered  ",
        (f"{now.rejected}", "bold red" if now.rejected else "dim"),
        " rejected  ",
        (f"{now.at_work}", "bold"),
        " at work  ",
        (f"{waiting}", "bold"),
        " files waiting  ",
        (f"{now.rate:.1f}", "bold"),
        " jobs/s",
    )
    stages = " · ".join(f"{name} {ms:.0f}" for name, ms in now.stage_ms.items() if name != "total")
    second = Text(f"  {stages} ms a job" if stages else "  waiting for the first job", style="dim")
    return Group(counts, second, *(Text(f"  {alarm_line(alarm)}", style="bold red") for alarm in alarms))


class Heartbeat:
    """In a pipe or container: one log line a minute while jobs come or an alarm lasts: a quiet log is a quiet share."""

    def __init__(
        self,
        now: Callable[[], Snapshot],
        waiting: Callable[[], int],
        alarms: Callable[[], Sequence[Alarm]] = tuple,
        every_s: float = 60.0,
        what: str = "file",
    ) -> None:
        self._now, self._waiting, self._alarms, self._every_s, self._what = now, waiting, alarms, every_s, what
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        before = (0, 0)
        while not self._end.wait(self._every_s):
            now, alarms = self._now(), self._alarms()
            if (now.answered, now.rejected) != before or now.at_work or alarms:
                before = (now.answered, now.rejected)
                logger.log("WARNING" if alarms else "INFO", "{}", status_line(now, self._waiting(), alarms, self._what))


def summary(now: Snapshot) -> str:
    """`300 jobs answered (512 objects), 2 rejected (prompt 1, picture 1), 12.5 jobs/s`."""
    reasons = ", ".join(f"{code} {count}" for code, count in sorted(now.reasons.items()))
    rejected = f", {now.rejected} rejected ({reasons})" if now.rejected else ""
    rate = now.answered / now.elapsed_s if now.elapsed_s else 0.0
    done = f"{count(now.answered, 'job')} answered ({count(now.objects, 'object')})"
    return f"{done}{rejected}, {rate:.1f} jobs/s"


def status_line(now: Snapshot, waiting: int, alarms: Sequence[Alarm] = (), what: str = "file") -> str:
    """The summary with what waits and what is wrong, as the log and systemd have it."""
    return "; ".join([f"{summary(now)}, {count(waiting, what)} waiting", *map(alarm_line, alarms)])


def alarm_line(alarm: Alarm) -> str:
    """`alarm (share) for 12 min: the folder is not there`."""
    lasts = f"{alarm.seconds:.0f} s" if alarm.seconds < 60 else f"{alarm.seconds / 60:.0f} min"
    return f"alarm ({alarm.kind}) for {lasts}: {shown(alarm.message)}"


def worker_rows(workers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Daemons for a table: worker, host, pid, model, device, sign of life, alarms.

    Each said so itself in a file on the share, where anybody may write: nothing in it is taken for granted.
    """
    rows = []
    for worker in workers:
        named = [shown(worker.get(key, "?")) for key in ("worker", "host", "pid")]
        loaded = [shown(worker[key]) if worker.get(key) else "loading" for key in ("model", "device")]
        beat = worker.get("beat_s")
        ago = f"{beat:.0f} s ago" if isinstance(beat, (int, float)) else "?"
        alive = worker.get("alive")
        alarms = ", ".join(shown(alarm["kind"]) for alarm in alarms_of(worker)) if alive else ""
        rows.append([*named, *loaded, ago if alive else f"dead, {ago}", alarms])
    return rows


def alarms_of(worker: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A daemon's alarms, as far as they make sense: `{"kind": …, "message": …, "seconds": …}`."""
    told = worker.get("alarms")
    return [
        {"kind": str(a["kind"]), "message": str(a.get("message", "")), "seconds": _number(a.get("seconds"))}
        for a in (told if isinstance(told, list) else [])
        if isinstance(a, dict) and "kind" in a
    ]


def held_lines(worker: Mapping[str, Any]) -> list[str]:
    """The paths that a daemon cannot use, a line for each that it names, and one for all others."""
    held = worker.get("held")
    named = held.get("paths") if isinstance(held, dict) else None
    paths = [one for one in named if isinstance(one, dict) and "path" in one] if isinstance(named, list) else []
    lines = [f"waits: {shown(p['path'])}: {shown(p.get('reason', ''))} ({shown(p.get('remedy', ''))})" for p in paths]
    more = int(_number(held.get("count"))) - len(paths) if isinstance(held, dict) else 0
    return [*lines, f"waits: {more} more"] if more > 0 else lines


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else 0.0


def count(number: int, word: str) -> str:
    """`1 job`, `2 jobs`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def table(title: str, columns: list[str], rows: list[list[str]], *, right: set[int] | None = None) -> Table:
    """A plain table; columns whose index is in `right` are right-aligned."""
    made = Table(title=title or None, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index in (right or set()) else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
