"""The benchmark's figures as tables, goals and a plot. Pure, except for the plot's file.

Ratios are made round by round and then their median is taken, so that a slow minute of the machine
does not change them.

Limitations: with `--quick` the median is that of one round.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam_poll.diagnostics.bench.cpu_stages import STAGES
from sam_poll.diagnostics.bench.plan import CONTESTANTS
from sam_poll.diagnostics.bench.runtimes import RUNTIMES

# The goals of the project. `megapixels` 20 are those of a camera's picture.
LOOP_TIMES = 10.0  # faster than the loop: large pictures on a GPU
OUTSIDE_PART = 1 / 20  # of the loop's time outside the network
LIMIT_PART = 0.95  # of the bare network's speed, where that is what takes the time
OPENVINO_TIMES = 1.4  # faster than the daemon in torch: SAM 2.1 tiny on a CPU
LATENCY_S = 0.060  # from drop to result, beside the network's own time


@dataclass(frozen=True, slots=True)
class Goal:
    """What is wanted, what was measured, and whether that is enough."""

    text: str
    measured: str
    reached: bool


Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows


def tables(report: dict[str, Any]) -> list[Table]:
    """All that was measured, for people."""
    made: list[Table] = []
    for model in dict.fromkeys(cell["model"] for cell in report["speed"]):
        rows = [_speed_row(cell) for cell in report["speed"] if cell["model"] == model]
        made.append((f"{model}: seconds a picture", _SPEED, rows))
    if report["speed"]:
        rows = [
            [m["name"], *(f"{m['peak_mib'][who]:.0f}" for who in CONTESTANTS)]
            for m in report["models"]
        ]
        made.append(("most main memory, MiB", ["model", *CONTESTANTS], rows))
    if report["outside"]:
        made.append(_outside_table(report["outside"]))
    if report["latency"]:
        columns = ["model", "pictures", "network", "drop to result", "beside the network"]
        made.append(
            (
                "one job into an idle daemon, ms",
                columns,
                [_latency_row(row) for row in report["latency"]],
            )
        )
    if report.get("runtimes"):
        rows = [row for found in report["runtimes"] for row in _runtime_rows(found)]
        title = (
            f"runtimes of the image encoder, {report['runtimes'][0]['pictures']}: seconds a picture"
        )
        made.append((title, _RUNTIMES, rows))
    found = goals(report)
    if found:
        rows = [
            [goal.text, goal.measured, "reached" if goal.reached else "missed"] for goal in found
        ]
        made.append(("goals", ["", "measured", ""], rows))
    return made


_SPEED = ["pictures", "loop", "sam_poll", "limit", "× loop", "of limit", "CPU: loop → ours"]


def _speed_row(cell: dict[str, Any]) -> list[str]:
    cpu = (
        f"{statistics.median(cell['cpu_s'][contestant]):.2f}" for contestant in ("loop", "sam_poll")
    )
    return [
        cell["pictures"],
        *(_spread(cell[contestant]) for contestant in CONTESTANTS),
        f"{times_loop(cell):.1f}",
        f"{part_of_limit(cell):.0%}",
        " → ".join(cpu),
    ]


def _outside_table(found: dict[str, Any]) -> Table:
    rows = []
    for stage in STAGES:
        cpu = [found[side]["cpu"][stage] for side in ("loop", "sam_poll")]
        rows.append(
            [
                stage,
                *(f"{seconds * 1000:.1f}" for seconds in cpu),
                f"{found['sam_poll']['wall'][stage] * 1000:.1f}",
            ]
        )
    sums = [statistics.median(found[side]["cpu_s"]) for side in ("loop", "sam_poll")]
    wall = sum(found["sam_poll"]["wall"].values())
    rows.append(["all", *(f"{seconds * 1000:.1f}" for seconds in sums), f"{wall * 1000:.1f}"])
    title = (
        f"outside the network, {found['pictures']} ({found['megabytes']:.1f} MB), one core: CPU ms"
    )
    return title, ["", "loop", "sam_poll", "waiting included"], rows


def _latency_row(row: dict[str, Any]) -> list[str]:
    network, latency = row["network"], row["drop_to_result"]
    return [
        row["model"],
        row["pictures"],
        _spread(network, 1000),
        _spread(latency, 1000),
        f"{beside(row) * 1000:.0f}",
    ]


_RUNTIMES = ["model", "runtime", "sam_poll", "limit", "× torch", "of limit", "CPU", "MiB"]


def _runtime_rows(found: dict[str, Any]) -> list[list[str]]:
    return [
        [
            found["model"],
            f"{runtime}, {row['step'].partition(' ')[0]}",
            _spread(row["sam_poll"]),
            _spread(row["limit"]),
            f"{times_torch(found, runtime):.2f}",
            f"{part_of_limit(row):.0%}",
            f"{statistics.median(row['cpu_s']):.2f}",
            f"{row['peak_mib']:.0f}",
        ]
        for runtime, row in found["rows"].items()
    ]


def times_torch(found: dict[str, Any], runtime: str) -> float:
    """How many times as fast as the daemon in torch the daemon in `runtime` is."""
    rows = found["rows"]
    pairs = zip(rows[RUNTIMES[0]]["sam_poll"], rows[runtime]["sam_poll"], strict=True)
    return statistics.median(a / b for a, b in pairs)


def _spread(values: Sequence[float], times: float = 1) -> str:
    """`1.23 ±4%`: the median, and half of the range."""
    middle = statistics.median(values)
    if times > 1:
        digits = 0
    elif middle < 0.3:
        digits = 3
    else:
        digits = 2
    half = (max(values) - min(values)) / 2 / middle if middle else 0.0
    return f"{middle * times:.{digits}f}" + (f" ±{half:.0%}" if len(values) > 1 else "")


def times_loop(cell: dict[str, Any]) -> float:
    """How many times as fast as the loop sam_poll is."""
    return statistics.median(a / b for a, b in zip(cell["loop"], cell["sam_poll"], strict=True))


def part_of_limit(cell: dict[str, Any]) -> float:
    """Return the share of the bare network's speed that sam_poll reaches."""
    return statistics.median(a / b for a, b in zip(cell["limit"], cell["sam_poll"], strict=True))


def beside(row: dict[str, Any]) -> float:
    """Seconds from drop to result that are not the network's."""
    return statistics.median(row["drop_to_result"]) - statistics.median(row["network"])


def goals(report: dict[str, Any]) -> list[Goal]:
    """Return the project's goals that this run can check."""
    made = []
    gpu = report["machine"]["device"].startswith("cuda")
    for cell in report["speed"]:
        if gpu and cell["megapixels"] > 15:
            text = f"{cell['model']}, {cell['pictures']}: at least {LOOP_TIMES:.0f} × the loop"
            made.append(Goal(text, f"{times_loop(cell):.1f} ×", times_loop(cell) >= LOOP_TIMES))
        if not gpu and cell["model"].endswith("hiera_tiny") and 1 < cell["megapixels"] < 15:
            text = f"{cell['model']}, {cell['pictures']}: at least {LIMIT_PART:.0%} of the limit"
            made.append(Goal(text, f"{part_of_limit(cell):.1%}", part_of_limit(cell) >= LIMIT_PART))
    made += [goal for found in report.get("runtimes", ()) for goal in _runtime_goals(found)]
    if report["outside"]:
        loop, ours = (
            statistics.median(report["outside"][side]["cpu_s"]) for side in ("loop", "sam_poll")
        )
        text = (
            f"outside the network, 20 megapixels: at most 1/{1 / OUTSIDE_PART:.0f} of the "
            "loop's CPU time"
        )
        made.append(
            Goal(
                text,
                f"1/{loop / ours:.1f} ({loop:.2f} s → {ours:.3f} s)",
                ours <= OUTSIDE_PART * loop,
            )
        )
    if report["latency"]:
        quickest = min(
            report["latency"], key=lambda row: statistics.median(row["network"])
        )  # the others' noise is more
        text = f"{quickest['model']}, drop to result: network + {LATENCY_S * 1000:.0f} ms at most"
        made.append(
            Goal(text, f"network + {beside(quickest) * 1000:.0f} ms", beside(quickest) <= LATENCY_S)
        )
    return made


def _runtime_goals(found: dict[str, Any]) -> list[Goal]:
    """Return the goals of the runtimes, for the model that they are set for."""
    if not found["model"].endswith("hiera_tiny"):
        return []
    times, part = times_torch(found, "openvino"), part_of_limit(found["rows"]["openvino"])
    name = f"{found['model']} in OpenVINO"
    return [
        Goal(
            f"{name}: at least {OPENVINO_TIMES} × torch", f"{times:.2f} ×", times >= OPENVINO_TIMES
        ),
        Goal(f"{name}: at least {LIMIT_PART:.0%} of the limit", f"{part:.1%}", part >= LIMIT_PART),
    ]


def summary(report: dict[str, Any]) -> str:
    """Describe the machine and models of a run in one line."""
    machine = report["machine"]
    cores = f"{machine['cores']} cores of {machine['cpu']}"
    where = f"{machine['gpu']}, {cores}" if "gpu" in machine else cores
    threads = f"{machine['torch_threads']} torch threads"
    settings = "".join(f", {key}={value}" for key, value in report["settings"].items())
    random = [model["name"] for model in report["models"] if model["random"]]
    weights = f"; random weights: {', '.join(random)}" if random else ""
    return f"{where}, {threads}, torch {machine['torch']}{settings}{weights}"


def plot(report: dict[str, Any], path: Path) -> None:
    """Plot seconds a picture as bars: one group a size, one panel a model.

    The file's extension decides on its format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = list(dict.fromkeys(cell["model"] for cell in report["speed"]))
    figure, axes = pyplot.subplots(
        1, len(models), figsize=(4.4 * len(models), 3.2), squeeze=False, layout="constrained"
    )
    styles = (("loop", "#b9b9b9"), ("sam_poll", "#1f6fb4"), ("limit", "#9fd08c"))
    for axis, model in zip(axes[0], models, strict=True):
        cells = [cell for cell in report["speed"] if cell["model"] == model]
        for offset, (contestant, colour) in enumerate(styles):
            middle = [statistics.median(cell[contestant]) for cell in cells]
            places = [group + (offset - 1) * 0.27 for group in range(len(cells))]
            bars = axis.bar(places, middle, 0.25, label=contestant, color=colour)
            axis.bar_label(bars, [f"{value:.2g}" for value in middle], fontsize=7, padding=1)
        axis.set_xticks(range(len(cells)), [cell["pictures"] for cell in cells], fontsize=8)
        axis.set_title(model, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds a picture")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(figure)
