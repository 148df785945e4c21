"""Checks of this machine: system, WSL, Python, packages, cores, memory, threads, container limits.

It only reads files of the system. Limitations: a limit of a hypervisor is not visible from inside.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam_poll import __version__
from sam_poll.core import distributions
from sam_poll.diagnostics.doctor.findings import Finding
from sam_poll.runtime.builders import usable_cores

MIB = 2**20
PACKAGES = ("torch", "torchvision", "segment-anything", "numpy")
# The wheels that hold the module cv2; two of them in one environment overwrite each other's files.
# The first two in one version do no harm: the Makefile puts the second over the first where
# libraries of a desktop are missing.
OPENCV = (
    "opencv-python",
    "opencv-python-headless",
    "opencv-contrib-python",
    "opencv-contrib-python-headless",
)
# What the libraries under torch, numpy and OpenCV read to choose their number of threads.
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "OMP_WAIT_POLICY",
)
_ENOUGH_MIB = 2048  # torch and its libraries take about 1 GiB of main memory before any model
_V1 = ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
_UNLIMITED = 2**60  # bytes; cgroup v1 says "no limit" as a number of this size


def check() -> Iterator[Finding]:
    """System, Python, packages, memory. What torch says of threads is `threads`."""
    yield Finding("machine", "system", "ok", platform.platform())
    yield from wsl(platform.release())
    yield Finding(
        "machine",
        "Python",
        "ok",
        f"{platform.python_version()} ({platform.machine()}), sam_poll {__version__}",
    )
    yield from packages()
    yield memory(Limits.read())


def wsl(release: str) -> Iterator[Finding]:
    """Nothing where this is no Windows Subsystem for Linux, by its kernel's release."""
    name = release.lower()
    if "microsoft" not in name and "wsl" not in name:
        return
    if "wsl2" in name or "microsoft-standard" in name:
        yield Finding(
            "machine",
            "WSL",
            "ok",
            f"WSL 2 ({release}); folders of Windows (/mnt/c …) are polled, and slow",
        )
        return
    remedy = "`wsl --set-version NAME 2` in Windows"
    yield Finding(
        "machine", "WSL", "warning", f"WSL 1 ({release}): no card can be used", None, remedy
    )


def packages() -> Iterator[Finding]:
    """Which versions are installed, without importing them."""
    found = distributions.installed(*PACKAGES)
    sam2 = distributions.installed(*distributions.SAM2)
    cv = distributions.installed(*OPENCV)
    everything = ", ".join(f"{name} {v}" for name, v in {**found, **sam2, **cv}.items())
    yield Finding("machine", "packages", "ok", everything or "none")
    missing = [name for name in PACKAGES if name not in found]
    missing += [] if sam2 else [distributions.SAM2[0]]
    missing += [] if cv else ["opencv-python-headless"]
    if missing:
        remedy = "install what is missing as the README says"
        names = ", ".join(missing)
        yield Finding("machine", "packages", "problem", f"not installed: {names}", None, remedy)
    if len(sam2) > 1:
        remedy = f"pip uninstall {' '.join(sam2)}, then install one of them"
        names = " and ".join(sam2)
        what = f"the module sam2 is installed twice: {names}"
        yield Finding("machine", "SAM 2", "warning", what, None, remedy)
    if len(cv) > 1 and not (set(cv) == set(OPENCV[:2]) and len(set(cv.values())) == 1):
        remedy = f"pip uninstall {' '.join(cv)}, then install one of them"
        yield Finding(
            "machine",
            "OpenCV",
            "warning",
            f"installed {len(cv)} times over: {', '.join(cv)}",
            None,
            remedy,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What the control groups allow this process.

    Cores, memory in MiB and how much of it is used; None: no limit.
    """

    cores: float | None = None
    memory_mib: float | None = None
    used_mib: float = 0.0

    @staticmethod
    def read(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Limits:
        """Return the tightest limits of our group and its parents (cgroups(7)).

        Of version 1 only the top group of the container is read.
        """
        limits = Limits()
        for group in _groups(root, own):
            cores = _cores(_text(group / "cpu.max"))
            most, used = (_bytes(_text(group / name)) for name in ("memory.max", "memory.current"))
            limits = limits._tighter(
                cores, most, used, _cached(group / "memory.stat", "inactive_file")
            )
        v1 = _cores(
            f"{_text(root / 'cpu/cpu.cfs_quota_us')} {_text(root / 'cpu/cpu.cfs_period_us')}"
        )
        most, used = (_bytes(_text(root / name)) for name in _V1)
        return limits._tighter(
            v1, most, used, _cached(root / "memory/memory.stat", "total_inactive_file")
        )

    def _tighter(
        self, cores: float | None, most: float | None, used: float | None, cached: float
    ) -> Limits:
        """Return the tighter limits.

        `cached` bytes of `used` are files that the kernel can drop.
        """
        fewer = min((c for c in (self.cores, cores) if c is not None), default=None)
        if most is not None and (self.memory_mib is None or most / MIB < self.memory_mib):
            return Limits(fewer, most / MIB, max(0.0, (used or 0.0) - cached) / MIB)
        return Limits(fewer, self.memory_mib, self.used_mib)


def _groups(root: Path, own: Path) -> Iterator[Path]:
    path = next((line[3:] for line in _text(own).splitlines() if line.startswith("0::")), "/")
    group = root / path.strip("/")
    while group != root and root in group.parents:
        yield group
        group = group.parent
    yield root


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace").strip()
    return ""


def _cached(stat: Path, name: str) -> float:
    lines = (line.split() for line in _text(stat).splitlines())
    return next(
        (_bytes(words[1]) or 0.0 for words in lines if len(words) == 2 and words[0] == name), 0.0
    )


def _cores(text: str) -> float | None:
    """`200000 100000` are two cores; `max 100000` and `-1 100000` are no limit."""
    match text.split():
        case [quota, period] if (
            quota.isdecimal() and period.isdecimal() and int(quota) and int(period)
        ):
            return int(quota) / int(period)
    return None


def _bytes(text: str) -> float | None:
    return float(text) if text.isdecimal() and int(text) < _UNLIMITED else None


def available_mib(limits: Limits, meminfo: Path = Path("/proc/meminfo")) -> float | None:
    """Return the main memory that this process could still get; None if it is not known."""
    lines = dict(line.split(":", 1) for line in _text(meminfo).splitlines() if ":" in line)
    word = lines.get("MemAvailable", "").split()
    free = [int(word[0]) / 1024] if word and word[0].isdecimal() else []
    if limits.memory_mib is not None:
        free.append(max(0.0, limits.memory_mib - limits.used_mib))
    return min(free, default=None)


def memory(limits: Limits, available: float | None = None) -> Finding:
    """Return a finding on main memory, free and total."""
    free = available_mib(limits) if available is None else available
    if free is None:
        return Finding("machine", "memory", "ok", "not known")
    inside = (
        f" (the container's limit is {limits.memory_mib:,.0f} MiB)"
        if limits.memory_mib is not None
        else ""
    )
    what = f"{free:,.0f} MiB of main memory free{inside}"
    if free >= _ENOUGH_MIB:
        return Finding("machine", "memory", "ok", what)
    remedy = "end other programs, or raise the container's limit: the kernel ends what takes more"
    return Finding("machine", "memory", "warning", what, None, remedy)


def _is_count(word: str) -> bool:
    """`OMP_NUM_THREADS=4`, also `4,2` (nested); what is no count of threads is left alone."""
    name, _, value = word.partition("=")
    return not name.endswith("_NUM_THREADS") or all(
        part.strip().isdecimal() and int(part) > 0 for part in value.split(",")
    )


def threads(
    facts: Mapping[str, Any], limits: Limits, env: Mapping[str, str] = os.environ
) -> Iterator[Finding]:
    """Compare torch's number of threads with the cores, and name who has set it.

    `facts` are those of `torch_info.gather`.
    """
    cores, count = usable_cores(), int(facts.get("threads", 0))
    set_here = [f"{name}={env[name]}" for name in THREADS if env.get(name)]
    yours = (
        f"yours: {', '.join(set_here)}" if set_here else f"none of {', '.join(THREADS[:3])} is set"
    )
    quota = f", of which the container may use {limits.cores:g}" if limits.cores is not None else ""
    what = f"{count} torch threads on {cores} cores{quota}; {yours}; sam-poll does not change them"
    usable = min(cores, limits.cores or cores)
    if count > usable + 0.5:
        remedy = (
            f"OMP_NUM_THREADS={max(1, int(usable))}: threads without a core of their own "
            "wait for each other"
        )
        yield Finding("machine", "threads", "warning", what, "environment", remedy)
    elif count == 1 and usable >= 4 and not facts.get("cards"):
        remedy = f"OMP_NUM_THREADS={int(usable)} for one daemon on a CPU"
        yield Finding("machine", "threads", "warning", what, "environment", remedy)
    else:
        yield Finding("machine", "threads", "ok", what)
    if odd := [word for word in set_here if not _is_count(word)]:
        remedy = f"OMP_NUM_THREADS={max(1, int(usable))}, a whole number of threads, or unset"
        what = f"not a number of threads, so libraries choose one: {', '.join(odd)}"
        yield Finding("machine", "threads", "warning", what, "environment", remedy)
    if changed := facts.get("changed"):
        remedy = "set them before the start of the program"
        words = ", ".join(
            f"{name} from {was or 'nothing'} to {now}" for name, (was, now) in changed.items()
        )
        what = f"a library has changed the environment: {words}"
        yield Finding("machine", "threads", "warning", what, "environment", remedy)
