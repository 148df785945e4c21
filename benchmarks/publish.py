"""Puts the figures of benchmarks/results into docs/speed.md, between the marks that name them.

`python -m benchmarks.publish`. A test holds that the page says what the results say.

Limitations: the sentences around the tables are a person's; they must be read
again after a new run."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.settings import lines
from sam_poll.diagnostics.bench.report import summary, tables
from tools.wrap_docs import wrapped

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "speed.md"
RESULTS = ROOT / "benchmarks" / "results"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """A table."""
    made = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in made)


def block(name: str) -> str:
    """What belongs between the marks of this name: all tables of `results/<name>.json`."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return "Not measured yet."
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    if "steps" in report:
        return gpu(report)
    if "groups" in report:
        head = [
            "| what, where | setting | ms a job | × the default | MiB |",
            "|---|---|---:|---:|---:|",
        ]
        return "\n".join(head + [line for group in report["groups"] for line in lines(group)])
    return "\n\n".join([f"{summary(report)}.", *_all_tables(report)])


def _all_tables(report: dict[str, Any]) -> list[str]:
    return [f"**{title}**\n\n{markdown(columns, rows)}" for title, columns, rows in tables(report)]


def gpu(report: dict[str, Any]) -> str:
    """What `make gpu` has found (tools/gpu.py): each step that was good."""
    machine, steps = report["machine"], report["steps"]
    where = f"{machine.get('gpu', machine['device'])}, {machine.get('gpu_mib', 0)} MiB"
    parts = [f"{where}, torch {machine['torch']}, sam_poll {report['sam_poll']}."]
    ended = [
        [name, "good" if step["ok"] else "failed", f"{step['seconds']:.0f}"]
        for name, step in steps.items()
    ]
    parts.append(f"**steps**\n\n{markdown(['step', 'result', 's'], ended)}")
    good = {name for name, step in steps.items() if step["ok"]}
    if "proof" in good:
        columns = ["model", "precision", "step of the ladder", "peak MiB"]
        rows = [
            [run["model"], run["precision"] or "by estimate", run["step"], f"{run['peak_mib']}"]
            for run in report["proof"]["runs"]
        ]
        title = "masks of 5184×3888 in 3.93 GiB (4,024 MiB)"
        parts.append(f"**{title}**\n\n{markdown(columns, rows)}")
    if "compare" in good:
        compared = report["compare"]
        findings = "; ".join(compared["findings"])
        parts.append(f"**beside the official predictor** ({compared['model']}): {findings}.")
    if "mosaic" in good:
        found = report["mosaic"]
        speed = f"{found['s_per_megapixel']} s a megapixel"
        figures = f"{speed}, {found['peak_mib']} MiB of main memory"
        parts.append(f"**mosaic** ({found['model']}, {found['side']}² pixels): {figures}.")
    if "bench" in good:
        parts += [f"{summary(report['bench'])}.", *_all_tables(report["bench"])]
    return "\n\n".join(parts)


def published(text: str) -> str:
    """The page with every marked block made anew."""
    made = re.sub(
        r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{block(found[2])}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )
    return wrapped(made)


def main() -> int:
    """Rewrite the page."""
    PAGE.write_text(published(PAGE.read_text("utf-8")), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
