"""The plan of a benchmark: models, sizes, rounds and parts, read and checked from the flags.

Limitations: sizes that do not fit into memory are not refused; the loop takes 2 GB at 20
megapixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sam_poll.core.errors import ExitCode, SamPollError, UsageError
from sam_poll.core.types import Size

CONTESTANTS = ("loop", "sam_poll", "limit")
PARTS = ("speed", "outside", "latency", "runtimes")
SIZES = (
    Size(640, 480),
    Size(2048, 1536),
    Size(5184, 3888),
)  # a webcam, a phone's preview, a camera's 20 megapixels
SMALL, MIDDLE, LARGE = SIZES
CPU_MODELS = ("demo", "sam2.1_hiera_tiny")
GPU_MODELS = (*CPU_MODELS, "sam2.1_hiera_large", "sam_vit_h")
ROUNDS = 3
MAX_OBJECTS = 255  # the loop's PNG has 8 bits


class BenchError(SamPollError):
    """A benchmark that cannot go on."""

    code = "bench"
    exit_code = ExitCode.FAILED_JOBS


@dataclass(frozen=True, slots=True)
class Plan:
    """One run of the benchmark.

    `jobs` None means as many a round as take a few seconds. `pictures` is a folder of JPEGs to use
    instead of drawn ones; `sizes` is empty then. Empty `models` means those that suit the device.
    """

    models: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = SIZES
    jobs: int | None = None
    rounds: int = ROUNDS
    objects: int = 1
    device: str = "auto"
    parts: tuple[str, ...] = PARTS
    pictures: Path | None = None
    quick: bool = False


def plan_of(
    *,
    models: Sequence[str] = (),
    sizes: Sequence[str] = (),
    jobs: int | None = None,
    rounds: int | None = None,
    objects: int = 1,
    device: str = "auto",
    parts: Sequence[str] = (),
    pictures: Path | None = None,
    quick: bool = False,
) -> Plan:
    """Return the plan for these flags.

    `quick` is one round with the bundled model. Raises UsageError.
    """
    for flag, value, most in (
        ("--jobs", jobs, 10_000),
        ("--rounds", rounds, 1000),
        ("--objects", objects, MAX_OBJECTS),
    ):
        if value is not None and not 1 <= value <= most:
            raise UsageError(f"{value} is not a number from 1 to {most}", place=flag)
    for part in parts:
        if part not in PARTS:
            raise UsageError(
                f"there is no part `{part}`", place="--part", remedy=f"use {', '.join(PARTS)}"
            )
    if pictures and sizes:
        raise UsageError(
            "your own pictures have sizes of their own",
            place="--size",
            remedy="leave out one of the two",
        )
    if pictures and not pictures.is_dir():
        raise UsageError("there is no such folder", place=f"--pictures {pictures}")
    return Plan(
        models=tuple(dict.fromkeys(models)) or (("demo",) if quick else ()),
        sizes=() if pictures else tuple(dict.fromkeys(map(size_of, sizes))) or SIZES,
        jobs=jobs,
        rounds=rounds or (1 if quick else ROUNDS),
        objects=objects,
        device=device,
        parts=tuple(part for part in PARTS if part in (parts or PARTS)),
        pictures=pictures,
        quick=quick,
    )


def size_of(text: str) -> Size:
    """`640x480` or `640×480`; UsageError."""
    found = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text.strip().lower())
    size = Size(int(found[1]), int(found[2])) if found else Size(0, 0)
    if min(size) < 64:
        raise UsageError(
            "not a size of 64 pixels a side or more",
            place=f"--size {text}",
            remedy="write 2048x1536",
        )
    return size
