"""The memory plan in numbers: the step that this model takes on this device, and its memory.

Limitations: what was not yet measured on this GPU is an estimate (`engines.memory.estimate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sam_poll.core.errors import ExitCode
from sam_poll.diagnostics.doctor.findings import Finding
from sam_poll.engines.memory.meter import Reading
from sam_poll.engines.memory.plan import MemoryModel, MemoryStep, fits, ladder


def as_json(
    first: MemoryStep,
    taken: MemoryStep,
    needs: MemoryModel,
    *,
    min_side: int,
    half: str | None,
    reading: Reading | None,
) -> dict[str, Any]:
    """Each network of the ladder with what it needs for one picture and one prompt, MiB; as JSON.

    `first` is the step that the settings ask for, `taken` the one that was taken; `reading` of the
    device before the weights went there, None where it cannot be read."""
    rows, seen = [], set()
    here = MemoryStep("float32", 1, 1, first.side, "cpu")  # the weights are on the host
    for step in ladder(first, min_side=min_side, half=half):
        if step.network in seen:
            continue
        seen.add(step.network)
        row: dict[str, Any] = {
            "step": f"{step.precision} {step.side} on {step.device}",
            "weights_mib": needs.weights_mib(step),
            "encode_mib": needs.call_mib("encode", step, 1),
            "decode_mib": needs.call_mib("decode", step, 1),
            "taken": step.network == taken.network,
        }
        if reading is not None:
            row["fits"] = fits(step, reading.free_mib, needs, here=here, cautious=True)
        rows.append(row)
    return {
        "first": str(first),
        "taken": str(taken),
        "lower": taken.network != first.network,
        "free_mib": None if reading is None else reading.free_mib,
        "reading": None if reading is None else str(reading),
        "steps": rows,
    }


def finding(plan: Mapping[str, Any], host_free_mib: float | None) -> Finding:
    """Return a finding with the step and the reason for it."""
    row = next((row for row in plan["steps"] if row["taken"]), plan["steps"][0])
    weights, encode, decode = (row[f"{part}_mib"] for part in ("weights", "encode", "decode"))
    call = f"a picture {encode:,.0f} MiB, a prompt {decode:,.0f} MiB (estimated)"
    on_host = " on cpu" in str(plan["taken"])
    if plan["reading"] is None or on_host:
        free = (
            f"; {host_free_mib:,.0f} MiB of main memory free" if host_free_mib is not None else ""
        )
        what = f"{plan['taken']}: {call}{free}"
        if host_free_mib is not None and encode > host_free_mib:
            remedy = "end other programs, or choose a smaller model"
            return Finding("memory", "plan", "warning", what, None, remedy, ExitCode.MODEL)
        if not plan["lower"]:
            return Finding("memory", "plan", "ok", what)
    else:
        what = f"{plan['taken']}: weights {weights:,.0f} MiB, {call}; {plan['reading']}"
        if not plan["lower"]:
            return Finding("memory", "plan", "ok", f"the best step fits, {what}")
    remedy = (
        "free memory on the card (`nvidia-smi`), raise memory.budget_mib, or choose a smaller model"
    )
    return Finding(
        "memory", "plan", "warning", f"not the best step ({plan['first']}) but {what}", None, remedy
    )
