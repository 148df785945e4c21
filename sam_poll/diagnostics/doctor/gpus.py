"""Checks of the device: driver, torch's build, each GPU, and the one that would be used.

Limitations: without `nvidia-smi` the driver's version is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sam_poll.config.settings import Settings
from sam_poll.core.errors import ExitCode
from sam_poll.diagnostics.doctor.findings import Finding, Level
from sam_poll.diagnostics.doctor.trial_process import ALLOCATOR

SMI_S = 15.0  # seconds; it starts a card that sleeps
_END_S = 1.0
_LITTLE_MIB = 1024  # sam2.1_hiera_tiny takes less in half precision
_LINE = 200  # characters of the first line that are shown
# What decides which cards torch sees, and how it takes their memory.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "NVIDIA_VISIBLE_DEVICES", *ALLOCATOR)


@dataclass(frozen=True, slots=True)
class Smi:
    """What `nvidia-smi` reports: GPUs by name, driver, memory in MiB; or why it fails."""

    cards: Sequence[Mapping[str, str]] = ()
    trouble: str | None = None


def nvidia_smi(limit_s: float = SMI_S) -> Smi | None:
    """Return what the driver reports; None without `nvidia-smi`."""
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    command = [
        program,
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        code, text = _output(command, limit_s)
    except subprocess.TimeoutExpired:
        return Smi(trouble=f"no answer within {limit_s:g} s")
    except OSError as error:
        return Smi(trouble=error.strerror or str(error))
    rows = [[word.strip() for word in line.split(",")] for line in text.splitlines()]
    cards = [
        dict(zip(("name", "driver", "total_mib"), row, strict=True))
        for row in rows
        if len(row) == 3
    ]
    if cards and not code:
        return Smi(cards)
    reported = next((line.strip() for line in text.splitlines() if line.strip()), "nothing")
    return Smi(trouble=f"it says: {reported[:_LINE]}" + (f" (exit code {code})" if code else ""))


def _output(command: Sequence[str], limit_s: float) -> tuple[int, str]:
    """Return exit code and output of a command.

    The process and its children are ended in any case; one that sleeps in a dead driver is left
    behind.
    """
    process = subprocess.Popen(  # noqa: S603
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        text, _ = process.communicate(timeout=limit_s)
        return process.returncode, text.decode("utf-8", "replace")
    finally:
        if process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
        if process.stdout:
            process.stdout.close()


def check(
    facts: Mapping[str, Any] | None,
    smi: Smi | None,
    settings: Settings,
    env: Mapping[str, str] = os.environ,
) -> Iterator[Finding]:
    """Return findings on the device.

    `facts` are those of `torch_info.gather`; None if torch did not answer, then only the driver is
    checked.
    """
    wanted = settings.devices or (settings.device,)
    concerned = any(name == "auto" or name.startswith("cuda") for name in wanted)
    if facts is not None:
        yield from _build(facts)
    if named := [f"{name}={env[name]}" for name in VARIABLES if name in env]:
        yield Finding("device", "environment", "ok", ", ".join(named))
    if smi:
        yield _driver(smi, concerned)
    if facts is None:
        return
    cards = facts.get("cards") or []
    if not cards:
        yield _no_card(facts, smi, wanted, env.get("CUDA_VISIBLE_DEVICES"))
    for card in cards:
        yield _card(card, matters=card["device"] in _taken(settings, cards))
    names = [card["device"] for card in cards]
    for name in wanted:
        if name.startswith("cuda:") and cards and name not in names:
            remedy = f"use {' or '.join(names)}"
            yield Finding("device", name, "problem", "there is no such card", "device", remedy)
    if "mps" in wanted and not facts.get("mps"):
        yield Finding("device", "mps", "problem", "no Apple GPU", "device", "set `device: auto`")
    elif facts.get("mps"):
        yield Finding("device", "mps", "ok", "an Apple GPU can be used")


def _taken(settings: Settings, cards: Sequence[Mapping[str, Any]]) -> set[str]:
    """Return the GPUs that a daemon with these settings uses."""
    if settings.devices == ("auto",):
        return {card["device"] for card in cards}
    names = settings.devices or (settings.device,)
    return {"cuda:0" if name in ("auto", "cuda") else name for name in names}


def _build(facts: Mapping[str, Any]) -> Iterator[Finding]:
    cuda = facts.get("cuda")
    build = f"torch {facts.get('torch')}, {f'CUDA {cuda}' if cuda else 'no CUDA'}"
    cudnn = f", cuDNN {_cudnn(facts['cudnn'])}" if facts.get("cudnn") else ""
    yield Finding("device", "build", "ok", f"{build}{cudnn}")
    if facts.get("architectures"):
        yield Finding("device", "kernels", "ok", f"built for {' '.join(facts['architectures'])}")


def _driver(smi: Smi, concerned: bool) -> Finding:
    if smi.trouble:
        remedy = (
            "`nvidia-smi` must work first: `dmesg | grep -i nvrm`; install the driver or load it "
            "(`modprobe nvidia`); "
            "after an update of it, or when a card has fallen off the bus, restart the machine"
        )
        return Finding(
            "device",
            "driver",
            "warning" if concerned else "ok",
            f"nvidia-smi: {smi.trouble}",
            None,
            remedy,
        )
    names = ", ".join(card["name"] for card in smi.cards)
    return Finding("device", "driver", "ok", f"NVIDIA {smi.cards[0]['driver']}: {names}")


def _cudnn(number: int) -> str:
    """91002 → 9.10.2; up to 8, 8902 → 8.9.2 (cudnn_version.h)."""
    major, rest = divmod(number, 10_000) if number >= 90_000 else divmod(number, 1_000)
    return f"{major}.{rest // 100}.{rest % 100}"


def _no_card(
    facts: Mapping[str, Any], smi: Smi | None, wanted: Sequence[str], visible: str | None
) -> Finding:
    requested = any(name.startswith("cuda") for name in wanted)
    level: Level = "ok"
    if requested:
        level = "problem"
    elif "auto" in wanted:
        level = "warning"
    known = bool(smi and smi.cards)
    if smi and known and not facts.get("cuda"):
        remedy = "install the CUDA build: `pip install --force-reinstall torch torchvision`"
        what = f"there is a card ({smi.cards[0]['name']}), but this torch was built without CUDA"
        return Finding("device", "card", level, what, None, remedy)
    if smi and known and visible is not None:
        remedy = f"unset CUDA_VISIBLE_DEVICES, or name cards by number (0 to {len(smi.cards) - 1})"
        what = f"torch finds no card: CUDA_VISIBLE_DEVICES={visible} hides what the driver knows"
        return Finding("device", "card", level, what, "environment", remedy)
    reasons = facts.get("warnings") or []
    if known or reasons:
        what = (
            f"torch finds no GPU{': ' + reasons[0] if reasons else ', though the driver lists one'}"
        )
        remedy = (
            "install a driver for the CUDA version of this torch, or a torch for the "
            "driver; in Docker: `--gpus all`"
        )
        return Finding("device", "card", level, what, None, remedy)
    if requested:
        remedy = (
            "check `nvidia-smi`; torch must be a CUDA build; in Docker: `--gpus all`; "
            "or set `device: cpu`"
        )
        return Finding("device", "card", "problem", "no CUDA device can be used", "device", remedy)
    return Finding("device", "card", "ok", "none; the CPU is used")


def _card(card: Mapping[str, Any], *, matters: bool) -> Finding:
    """Return a finding on one GPU; a problem of a GPU that is not used is a warning."""
    name = f"{card.get('name', 'card')}, compute capability {card.get('capability', '?')}"
    if error := card.get("error"):
        level: Level = "problem" if matters else "warning"
        what, remedy = (
            f"{name}: {error['reason']}",
            error.get("remedy") or "check `nvidia-smi` and dmesg",
        )
        return Finding("device", card["device"], level, what, None, remedy, ExitCode.DEVICE)
    free, total = card["free_mib"], card["total_mib"]
    what = f"{name}, {free:,.0f} of {total:,.0f} MiB free, runs in {card['precision']}"
    if free < _LITTLE_MIB:
        remedy = "`nvidia-smi` names the processes that hold it"
        return Finding("device", card["device"], "warning", what, None, remedy)
    return Finding("device", card["device"], "ok", what)
