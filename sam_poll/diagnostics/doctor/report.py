"""The findings as tables in sections, and as JSON.

Limitations: below about 40 columns the text becomes a narrow strip.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from sam_poll import __version__
from sam_poll.core import missing_library
from sam_poll.core.errors import ExitCode, InstallationError, SamPollError
from sam_poll.core.text import shown
from sam_poll.diagnostics.doctor.findings import Finding, exit_code
from sam_poll.runtime import console

SECTIONS = ("settings", "machine", "device", "model", "share", "memory", "trial", "compare")
_REPORT = "this is a bug in sam-poll; please report it, with what stands on stderr"
_STYLE = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def as_json(
    findings: Sequence[Finding],
    stages: Mapping[str, float],
    details: Mapping[str, Any],
    code: ExitCode | None = None,
) -> str:
    """Return all findings as one JSON document.

    `details` are the numbers of torch, the plan, the trial and the comparison. `code` overrides the
    exit code that follows from the findings.
    """
    code = exit_code(findings) if code is None else code
    counts = {level: sum(f.level == level for f in findings) for level in _STYLE}
    rows = [
        {
            "section": f.section,
            "name": f.name,
            "level": f.level,
            "what": f.what,
            "where": f.where,
            "remedy": f.remedy,
        }
        for f in findings
    ]
    report = {
        "sam_poll": __version__,
        "healthy": code is ExitCode.OK,
        "exit_code": int(code),
        "counts": counts,
        "findings": rows,
        "stages_ms": {name: round(ms, 1) for name, ms in stages.items()},
        **details,
    }
    return json.dumps(_plain(report))


def failed(error: Exception) -> str:
    """Return an error that left no other findings as one JSON document."""
    error = missing_library.explained(error) or error
    reason = (
        error.reason
        if isinstance(error, SamPollError)
        else f"unexpected {type(error).__name__}: {error}"
    )
    place, remedy = (
        (error.place, error.remedy) if isinstance(error, SamPollError) else (None, _REPORT)
    )
    code = error.exit_code if isinstance(error, SamPollError) else ExitCode.BUG
    section = "command line" if isinstance(error, SamPollError) else "doctor"
    if isinstance(error, InstallationError):
        section = "machine"
    return as_json([Finding(section, "error", "problem", reason, place, remedy)], {}, {}, code)


def _plain(value: Any) -> Any:
    """Remove what JSON cannot hold.

    NaN, infinities, and halves of surrogate pairs in undecodable names.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(findings: Sequence[Finding], stages: Mapping[str, float], out: Console) -> None:
    """Tables by section, the stages' times, and the sum in one line."""
    names = {finding.name for finding in findings}
    width = max((len(shown(name)) for name in names), default=0)
    for section in SECTIONS:
        in_section = [finding for finding in findings if finding.section == section]
        if not in_section:
            continue
        table = console.table("", ["", section, ""], [])
        table.columns[0].min_width, table.columns[0].no_wrap = len("problem"), True
        table.columns[1].min_width = min(width, 14)
        for finding in in_section:
            level = Text(finding.level, style=_STYLE[finding.level])
            table.add_row(level, Text(shown(finding.name)), _text_of(finding))
        if section == "trial" and stages:
            table.add_row(Text(""), Text("stages"), Text(stage_line(stages), style="dim"))
        out.print(table)
        out.print()
    out.print(summary(findings))


def _text_of(finding: Finding) -> Text:
    text = Text("\n".join(map(shown, finding.what.splitlines())))
    if finding.where:
        text.append(f"\n{shown(finding.where)}", style="dim")
    if finding.remedy:
        text.append(f"\n→ {shown(finding.remedy)}", style=_STYLE["warning"])
    return text


def stage_line(stages: Mapping[str, float]) -> str:
    """`torch 1,204 · read 35 ms`."""
    return " · ".join(f"{name} {ms:,.0f}" for name, ms in stages.items()) + " ms"


def summary(findings: Sequence[Finding]) -> Text:
    """One line: healthy or not, and how many of what."""
    code = exit_code(findings)
    problems, warnings = (
        sum(f.level == level for f in findings) for level in ("problem", "warning")
    )
    counts = f"{console.count(problems, 'problem')}, {console.count(warnings, 'warning')}"
    if code is ExitCode.OK:
        return Text(f"healthy: {counts}", style=_STYLE["warning" if warnings else "ok"])
    return Text(f"not healthy: {counts} (exit code {int(code)})", style=_STYLE["problem"])
