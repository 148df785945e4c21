"""Puts the figures of benchmarks/results into docs/speed.md, between the marks that name them.

`python -m benchmarks.publish`. A test holds that the page says what the results say.

What can still go wrong here: the sentences around the tables are a person's; they must be read again after a new run.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.settings import lines
from sam_poll.bench.report import summary, tables

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "benchmarks" / "results"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    made = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in made)


def block(name: str) -> str:
    """What belongs between the marks of this name: all tables of `results/<name>.json`."""
    report: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))
    if "groups" in report:
        head = ["| what, where | setting | ms a job | × the default | MiB |", "|---|---|---:|---:|---:|"]
        return "\n".join(head + [line for group in report["groups"] for line in lines(group)])
    parts = [f"{summary(report)}."]
    parts += [f"**{title}**\n\n{markdown(columns, rows)}" for title, columns, rows in tables(report)]
    return "\n\n".join(parts)


def published(text: str) -> str:
    """The page with every marked block made anew."""
    return re.sub(
        r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{block(found[2])}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


def main() -> int:
    """Rewrite the page."""
    PAGE.write_text(published(PAGE.read_text("utf-8")), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
