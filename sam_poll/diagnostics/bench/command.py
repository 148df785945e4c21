"""The frame of a benchmark: progress on stderr, tables on stdout, files.

A plot or JSON file that cannot be written would be noticed only after everything was measured, so
its folder is checked first.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.status import Status

from sam_poll.core.errors import SettingsError, UsageError
from sam_poll.diagnostics.bench.plan import Plan
from sam_poll.engines.catalog import resolve
from sam_poll.runtime import console

_NEEDED = ("skimage", "matplotlib")


def run_bench(plan: Plan, *, json_file: Path | None, plot_file: Path | None) -> None:
    """Measure, print the tables and write the files.

    Raises BenchError, ModelError, SettingsError, UsageError; KeyboardInterrupt leaves no files.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        remedy = "pip install 'sam_poll[bench]' (in a checkout: pip install '.[bench]')"
        raise SettingsError(f"the benchmark needs {' and '.join(missing)}", remedy=remedy)
    for file in (json_file, plot_file):
        if file and not file.absolute().parent.is_dir():
            raise UsageError("there is no such folder", place=str(file.parent))
    if plot_file and "speed" not in plan.parts:
        raise UsageError(
            "the plot shows the part `speed`", place="--plot", remedy="leave out --part"
        )
    for name in plan.models:
        resolve(name)  # an unknown one is reported before anything is measured
    report = measured(plan)
    show(report)
    if json_file:
        json_file.write_text(json.dumps(report, indent=1) + "\n")
    if plot_file:
        from sam_poll.diagnostics.bench.report import plot

        plot(report, plot_file)


def measured(plan: Plan) -> dict[str, Any]:
    """Return the report; stderr shows the progress."""
    from sam_poll.diagnostics.bench.run import run

    console.set_up_log("text", "WARNING")
    started = time.monotonic()
    live = Console(stderr=True)
    if not live.is_terminal:

        def line(text: str) -> None:
            sys.stderr.write(f"{time.monotonic() - started:5.0f} s  {text}\n")
            sys.stderr.flush()

        return run(plan, line)
    with Status("", console=live) as status:
        return run(
            plan,
            lambda text: status.update(f"{text}  [dim]({time.monotonic() - started:.0f} s)[/dim]"),
        )


def show(report: dict[str, Any]) -> None:
    """Print the tables on stdout."""
    from sam_poll.diagnostics.bench.report import summary, tables

    out = console.result_console()
    out.print(summary(report), style="dim", highlight=False)
    for title, columns, rows in tables(report):
        out.print(f"\n{title}", style="bold", highlight=False)
        numbers = {index for index in range(len(columns)) if index and not rows[0][index].isalpha()}
        out.print(console.table("", columns, rows, right=numbers if title != "goals" else set()))
