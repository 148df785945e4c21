"""What the facts say of the device that is asked for: driver, torch's build, each card, the one that would be taken.

What can still go wrong here: `nvidia-smi` that is missing, or hangs with its driver, leaves the driver's version out.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sam_poll.doctor.findings import Finding
from sam_poll.errors import ExitCode

SMI_S = 15.0  # seconds; it starts a card that sleeps
_LITTLE_MIB = 1024  # sam2.1_hiera_tiny takes less in half precision


def nvidia_smi(limit_s: float = SMI_S) -> list[dict[str, str]] | None:
    """The cards that the driver knows: name, driver, memory in MiB. None where there is no `nvidia-smi`, or no
    answer."""
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    command = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return []
    rows = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines()]
    return [dict(zip(("name", "driver", "total_mib"), row, strict=True)) for row in rows if len(row) == 3]


def look(facts: Mapping[str, Any], smi: Sequence[Mapping[str, str]] | None, wanted: Sequence[str]) -> Iterator[Finding]:
    """`facts` of `facts.gather`; `wanted`: the devices that the settings name (`auto`, `cuda:1`, …)."""
    cuda = facts.get("cuda")
    build = f"torch {facts.get('torch')}, {f'CUDA {cuda}' if cuda else 'no CUDA'}"
    cudnn = f", cuDNN {_cudnn(facts['cudnn'])}" if facts.get("cudnn") else ""
    yield Finding("device", "build", "ok", f"{build}{cudnn}")
    if facts.get("architectures"):
        yield Finding("device", "kernels", "ok", f"built for {' '.join(facts['architectures'])}")
    if smi:
        yield Finding("device", "driver", "ok", f"NVIDIA {smi[0]['driver']}: {', '.join(card['name'] for card in smi)}")
    cards = facts.get("cards") or []
    asked_cuda = any(name.startswith("cuda") for name in wanted)
    if not cards:
        yield _no_card(facts, smi, asked_cuda)
    for card in cards:
        matters = "auto" in wanted or card["device"] in wanted or "cuda" in wanted
        yield _card(card, matters)
    names = [card["device"] for card in cards]
    for name in wanted:
        if name.startswith("cuda:") and cards and name not in names:
            remedy = f"use {' or '.join(names)}"
            yield Finding("device", name, "problem", "there is no such card", "device", remedy)
    if "mps" in wanted and not facts.get("mps"):
        yield Finding("device", "mps", "problem", "no Apple GPU here", "device", "set `device: auto`")
    elif facts.get("mps"):
        yield Finding("device", "mps", "ok", "an Apple GPU can be used")


def _cudnn(number: int) -> str:
    """91002 → 9.10.2; up to 8, 8902 → 8.9.2 (cudnn_version.h)."""
    major, rest = divmod(number, 10_000) if number >= 90_000 else divmod(number, 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _no_card(facts: Mapping[str, Any], smi: Sequence[Mapping[str, str]] | None, asked: bool) -> Finding:
    level = "problem" if asked else "warning"
    if smi and not facts.get("cuda"):
        remedy = "install the CUDA build: `pip install --force-reinstall torch torchvision`"
        what = f"there is a card ({smi[0]['name']}), but this torch was built without CUDA"
        return Finding("device", "card", level, what, None, remedy)  # type: ignore[arg-type]
    reasons = facts.get("warnings") or []
    if smi or reasons:
        what = f"torch finds no card{': ' + reasons[0] if reasons else ', though the driver knows one'}"
        remedy = (
            "install a driver for the CUDA version of this torch, or a torch for the driver; in Docker: `--gpus all`"
        )
        return Finding("device", "card", level, what, None, remedy)  # type: ignore[arg-type]
    if asked:
        remedy = "look at `nvidia-smi`; or set `device: cpu`"
        return Finding("device", "card", "problem", "no CUDA device can be used", "device", remedy)
    return Finding("device", "card", "ok", "none; the CPU is used")


def _card(card: Mapping[str, Any], matters: bool) -> Finding:
    """One card. What is wrong with a card that nobody asked for is a warning."""
    name = f"{card.get('name', 'card')}, compute capability {card.get('capability', '?')}"
    if error := card.get("error"):
        level = "problem" if matters else "warning"
        what, remedy = f"{name}: {error['reason']}", error.get("remedy") or "look at `nvidia-smi` and dmesg"
        return Finding("device", card["device"], level, what, None, remedy, ExitCode.DEVICE)  # type: ignore[arg-type]
    free, total = card["free_mib"], card["total_mib"]
    what = f"{name}, {free:,.0f} of {total:,.0f} MiB free, runs in {card['precision']}"
    if free < _LITTLE_MIB:
        remedy = "`nvidia-smi` names the processes that hold it"
        return Finding("device", card["device"], "warning", what, None, remedy)
    return Finding("device", card["device"], "ok", what)
