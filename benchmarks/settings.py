"""Which setting moves what: daemons with different settings answer the same pictures, in turn,
round by round.

`python -m benchmarks.settings [--rounds 3] [--device auto] [--json FILE] [--only WORD …]`. One
setting is changed at a time; the first row of each group is the default. A row's figure is the
median of its rounds, and its ratio is made against the default's figure of the same round.

Limitations: differences smaller than the spread, which is beside each figure, say
nothing."""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam_poll.core.types import Size
from sam_poll.diagnostics.bench import dataset
from sam_poll.diagnostics.bench.checkpoints import weights_for
from sam_poll.diagnostics.bench.dataset import Supply, TestImages
from sam_poll.diagnostics.bench.plan import LARGE, MIDDLE, SMALL
from sam_poll.diagnostics.bench.processes import Daemon, scratch
from sam_poll.diagnostics.bench.run import device_of, machine


@dataclass(frozen=True)
class Group:
    """Settings tried on one model and one kind of picture. `known`: all jobs are about the same few
    pictures, in turn; the last one is always kept, so one picture alone would tell nothing of the
    cache."""

    title: str
    model: str
    size: Size
    variants: Mapping[str, Mapping[str, str]]
    jobs: int = 24
    objects: int = 1
    known: bool = False
    tried: dict[str, Any] = field(default_factory=dict, compare=False)


def key(setting: str) -> str:
    """A setting's name in the environment."""
    return "SAM_POLL_" + setting.upper().replace(".", "__")


def one(setting: str, *values: object) -> dict[str, dict[str, str]]:
    """The default, and one variant for each value."""
    return {
        "default": {},
        **{f"{setting}: {value}": {key(setting): str(value)} for value in values},
    }


_OMP = (("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "passive"))


def groups(gpu: bool) -> list[Group]:
    """What is tried. The network is small where the surroundings matter, and large where it does
    itself.
    """
    tiny = 32 if gpu else 3
    made = [
        Group("threads that read", "demo", LARGE, one("pipeline.decode_threads", 1, 2, 4)),
        Group("threads that finish", "demo", LARGE, one("pipeline.finish_threads", 1, 2, 4)),
        Group("jobs between two stages", "demo", LARGE, one("pipeline.queue", 1, 16)),
        Group("pictures at once", "demo", SMALL, one("pipeline.batch", 1, 4, 8), jobs=48),
        Group(
            "two prompts for each picture",
            "sam2.1_hiera_tiny",
            MIDDLE,
            one("pipeline.cache_mib", 0),
            jobs=2 * tiny,
            known=True,
        ),
        Group(
            "precision",
            "sam2.1_hiera_tiny",
            MIDDLE,
            one("precision", "float32", "bfloat16"),
            jobs=tiny,
        ),
        Group("compiled", "demo", SMALL, one("compile", "true"), jobs=48),
    ]
    if gpu:
        made += [
            Group(
                "pictures at once",
                "sam2.1_hiera_tiny",
                MIDDLE,
                one("pipeline.batch", 1, 4, 16),
                jobs=48,
            ),
            Group(
                "waiting for a batch",
                "sam2.1_hiera_tiny",
                LARGE,
                one("pipeline.batch_wait_ms", 0, 50),
                jobs=48,
            ),
            Group("compiled", "sam2.1_hiera_large", MIDDLE, one("compile", "true"), jobs=48),
        ]
    else:
        waiting = {f"{name}: {value}": {name: value} for name, value in _OMP}
        threads = {"default": {}, **waiting}
        made.append(Group("torch's threads", "demo", MIDDLE, threads))
        made.append(Group("torch's threads", "sam2.1_hiera_tiny", MIDDLE, threads, jobs=tiny))
    return made


def measure(group: Group, device: str, root: Path, rounds: int) -> dict[str, Any]:
    """Seconds a job by variant, one figure a round; and each daemon's CPU seconds and most
    memory.
    """
    subject: TestImages = dataset.draw_pictures(group.size, group.objects)
    weights = weights_for(group.model, root)
    rows: dict[str, dict[str, Any]] = {
        name: {"seconds": [], "cpu_s": []} for name in group.variants
    }
    with contextlib.ExitStack() as stack:
        daemons: dict[str, tuple[Daemon, Supply]] = {}
        for number, (name, env) in enumerate(group.variants.items()):
            share = root / f"{group.title}{number}"
            supply = Supply(share / "aside")
            daemons[name] = (
                stack.enter_context(Daemon(weights, device, share, root / f"{number}.log", env)),
                supply,
            )
        for daemon, supply in daemons.values():  # all load at once, then each is warmed up
            daemon.run(supply.pairs(subject, 2))
        for _ in range(rounds):
            for name, (daemon, supply) in daemons.items():
                pairs = supply.pairs(subject, group.jobs, known=group.known)
                before = daemon.cpu_s
                rows[name]["seconds"].append(daemon.run(pairs) / group.jobs)
                rows[name]["cpu_s"].append((daemon.cpu_s - before) / group.jobs)
        for name, (daemon, _) in daemons.items():
            rows[name]["peak_mib"] = daemon.peak_mib
    return {
        "title": group.title,
        "model": group.model,
        "pictures": subject.name,
        "jobs": group.jobs,
        "rows": rows,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """One group as rows of a Markdown table: where, setting, seconds, × as fast as the default,
    memory.
    """
    made = []
    first = found["rows"]["default"]["seconds"]
    for name, row in found["rows"].items():
        middle = statistics.median(row["seconds"])
        half = (max(row["seconds"]) - min(row["seconds"])) / 2 / middle
        times = statistics.median(a / b for a, b in zip(first, row["seconds"], strict=True))
        where = (
            f"{found['title']} ({found['model']}, {found['pictures']})" if name == "default" else ""
        )
        cells = [
            where,
            name,
            f"{middle * 1000:.0f} ±{half:.0%}",
            f"{times:.2f}",
            f"{row['peak_mib']:.0f}",
        ]
        made.append(f"| {' | '.join(cells)} |")
    return made


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="only groups with one of these in title or model"
    )
    given = parser.parse_args()
    device = device_of(given.device)
    report: dict[str, Any] = {"machine": machine(device), "groups": []}
    for group in groups(device.startswith("cuda")):
        if not any(word in f"{group.title} {group.model}" for word in given.only):
            continue
        with scratch("sam_poll-settings-") as root:
            found = measure(group, device, root, given.rounds)
        report["groups"].append(found)
        print("\n".join(lines(found)), flush=True)
        if given.json:  # after each group: whoever stops here keeps what is known
            given.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
