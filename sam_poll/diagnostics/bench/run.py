"""Running a benchmark: the contestants take turns, round by round.

So a slow minute of the machine affects all of them.

Limitations: on a machine of few cores all other work is measured, too.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sam_poll import __version__
from sam_poll.diagnostics.bench import cpu_stages, runtimes
from sam_poll.diagnostics.bench import dataset as pictures
from sam_poll.diagnostics.bench.checkpoints import Weights, weights_for
from sam_poll.diagnostics.bench.dataset import Supply, TestImages
from sam_poll.diagnostics.bench.plan import (
    CONTESTANTS,
    CPU_MODELS,
    GPU_MODELS,
    LARGE,
    MIDDLE,
    SMALL,
    Plan,
)
from sam_poll.diagnostics.bench.processes import (
    Daemon,
    Worker,
    environment,
    model_order,
    paths,
    scratch,
    settings_in,
)
from sam_poll.runtime import signals
from sam_poll.runtime.builders import usable_cores

Tell = Callable[[str], None]

ROUND_S = 6.0  # what a contestant's round should take
QUICK_S = 1.5
MOST_JOBS = 48
MOST_LOOPED = 6
LEAST_JOBS = 8  # fewer, and filling and draining the pipeline weighs too much
OUTSIDE_RUNS = 5
LATENCY_RUNS = (5, 15)


@dataclass
class Cell:
    """The figures of one model on one kind of picture.

    Seconds a picture, one figure a round and contestant; CPU seconds likewise.
    """

    model: str
    pictures: str
    megapixels: float
    megabytes: float
    jobs: int
    looped: int
    loop: list[float] = field(default_factory=list)
    sam_poll: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    cpu_s: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in CONTESTANTS}
    )


def run(plan: Plan, tell: Tell) -> dict[str, Any]:
    """Run all that the plan contains and return the report, ready for JSON.

    `tell` gets the current step. Raises BenchError, ModelError; leaves no files.
    """
    # A signal ends it like Ctrl-C, with everything removed.
    as_ctrl_c = signals.termination_raises(lambda number: KeyboardInterrupt())
    with as_ctrl_c, scratch("sam_poll-bench-") as root:
        bench = _Bench(plan, root, tell)
        return bench.run()


class _Bench:
    def __init__(self, plan: Plan, root: Path, tell: Tell) -> None:
        self._plan = plan
        self._root = root
        self._tell = tell
        self._round_s = QUICK_S if plan.quick else ROUND_S

    def run(self) -> dict[str, Any]:
        plan, started = self._plan, time.monotonic()
        device = device_of(plan.device)
        models = plan.models or (GPU_MODELS if device.startswith("cuda") else CPU_MODELS)
        report: dict[str, Any] = {
            "machine": machine(device),
            "settings": settings_in(environment()),
        }
        report |= {
            "objects": plan.objects,
            "models": [],
            "speed": [],
            "outside": None,
            "latency": [],
            "runtimes": [],
        }
        if "outside" in plan.parts:
            self._tell("outside the network, one core")
            report["outside"] = self._outside()
        if {"speed", "latency", "runtimes"} & set(plan.parts):
            subjects = self._subjects() if plan.pictures or "speed" in plan.parts else []
            for model in models:
                report["models"].append(self._model(model, device, subjects, report))
        report["seconds"] = round(time.monotonic() - started, 1)
        return report

    # ── what surrounds the network ──

    def _outside(self) -> dict[str, Any]:
        """CPU and wall seconds by stage, medians, of the loop and of ours."""
        root = self._root / "outside"
        found: dict[str, Any] = {}
        supply = Supply(root / "aside")
        subject = pictures.draw_pictures(LARGE, 1)
        with contextlib.ExitStack() as stack:
            workers = {}
            for side in ("loop", "sam_poll"):
                order = {"kind": "outside", "side": side, "root": str(root / "share")}
                workers[side] = stack.enter_context(
                    Worker(f"outside: {side}", order, root / f"{side}.log")
                )
            clocks: dict[str, list[dict[str, Any]]] = {"loop": [], "sam_poll": []}
            for number in range(1 + (2 if self._plan.quick else OUTSIDE_RUNS)):
                for side, worker in workers.items():
                    (pair,) = supply.pairs(subject, 1)
                    given = {
                        "picture": str(pair.picture),
                        "prompt": str(pair.prompt),
                        "out": str(root),
                    }
                    answer = worker(**given)
                    clocks[side] += [answer] if number else []  # the first one warms up
        for side, seen in clocks.items():
            found[side] = {
                kind: {
                    stage: statistics.median(clock[kind][stage] for clock in seen)
                    for stage in cpu_stages.STAGES
                }
                for kind in ("cpu", "wall")
            }
            found[side]["cpu_s"] = sorted(sum(clock["cpu"].values()) for clock in seen)
        return {"pictures": subject.name, "megabytes": subject.megabytes, **found}

    # ── a model ──

    def _subjects(self) -> list[TestImages]:
        plan = self._plan
        if plan.pictures:
            return [pictures.own_pictures(plan.pictures, plan.objects)]
        self._tell("making photographs")
        return [pictures.draw_pictures(size, plan.objects) for size in plan.sizes]

    def _model(
        self, model: str, device: str, subjects: Sequence[TestImages], report: dict[str, Any]
    ) -> dict[str, Any]:
        root = self._root / f"model{len(report['models'])}"
        root.mkdir()
        weights = weights_for(model, self._root, self._tell)
        about: dict[str, Any] = {"name": weights.name, "random": weights.random}
        with self._cache_for(weights):
            if {"speed", "latency"} & set(self._plan.parts):
                about |= self._compared(weights, device, root, subjects, report)
            if "runtimes" in self._plan.parts and device == "cpu":
                report["runtimes"] += self._runtimes(weights, device, root)
        weights.remove_random()
        return about

    @contextlib.contextmanager
    def _cache_for(self, weights: Weights) -> Iterator[None]:
        """Keep what is derived from random weights out of the user's folder of models."""
        if not weights.random:
            yield
            return
        before = os.environ.get("SAM_POLL_CACHE")
        os.environ["SAM_POLL_CACHE"] = str(self._root / "cache")
        try:
            yield
        finally:
            del os.environ["SAM_POLL_CACHE"]
            if before is not None:
                os.environ["SAM_POLL_CACHE"] = before

    def _runtimes(self, weights: Weights, device: str, root: Path) -> list[dict[str, Any]]:
        if find_spec("openvino") is None:
            self._tell("the runtimes are not compared: pip install 'sam_poll[openvino]'")
            return []
        plan = self._plan
        if plan.pictures:
            subject = pictures.own_pictures(plan.pictures, plan.objects)
        else:
            size = plan.sizes[0] if len(plan.sizes) == 1 else MIDDLE
            subject = pictures.draw_pictures(size, plan.objects)
        found = runtimes.measure(
            weights,
            device,
            root / "runtimes",
            subject,
            jobs=plan.jobs,
            rounds=plan.rounds,
            round_s=self._round_s,
            tell=self._tell,
        )
        return [found]

    def _compared(
        self,
        weights: Weights,
        device: str,
        root: Path,
        subjects: Sequence[TestImages],
        report: dict[str, Any],
    ) -> dict[str, Any]:
        """Measure loop, daemon and bare network; return what they say of the model."""
        self._tell(f"{weights.name}: loading, three times")
        with contextlib.ExitStack() as stack:
            contest = Comparison(weights, device, root, stack, self._tell)
            if "speed" in self._plan.parts:
                report["speed"] += [vars(cell) for cell in self._speed(contest, subjects)]
            if "latency" in self._plan.parts:
                report["latency"].append(self._latency(contest, subjects))
            peaks = {name: process.peak_mib for name, process in contest.processes.items()}
            return {"step": contest.step, "batch": contest.batch, "peak_mib": peaks}

    def _speed(self, contest: Comparison, subjects: Sequence[TestImages]) -> list[Cell]:
        cells = []
        for subject in subjects:
            self._tell(f"{contest.name}, {subject.name}: warming up")
            contest.warm_up(subject)
            cells.append(contest.cell(subject, self._plan.jobs, self._round_s))
        for number in range(1, self._plan.rounds + 1):
            for subject, cell in zip(subjects, cells, strict=True):
                contest.round(
                    subject,
                    cell,
                    f"{contest.name}, {subject.name}, round {number} of {self._plan.rounds}",
                )
        return cells

    def _latency(self, contest: Comparison, subjects: Sequence[TestImages]) -> dict[str, Any]:
        """One job at a time into an idle daemon, against the network alone; seconds."""
        subject = (
            subjects[0]
            if self._plan.pictures
            else pictures.draw_pictures(SMALL, self._plan.objects)
        )
        contest.warm_up(subject)
        network_s, _ = contest.one(subject)
        least, most = (2, 2) if self._plan.quick else LATENCY_RUNS
        runs = min(max(round(self._round_s / max(network_s, 1e-3)), least), most)
        found: dict[str, Any] = {
            "model": contest.name,
            "pictures": subject.name,
            "network": [],
            "drop_to_result": [],
        }
        for number in range(1, runs + 1):
            self._tell(f"{contest.name}, {subject.name}: drop to result, {number} of {runs}")
            for name, seconds in zip(
                ("network", "drop_to_result"), contest.one(subject), strict=True
            ):
                found[name].append(seconds)
        return found


class Comparison:
    """The three contestants, loaded with the same weights."""

    def __init__(
        self, weights: Weights, device: str, root: Path, stack: contextlib.ExitStack, tell: Tell
    ) -> None:
        self.name = weights.name
        self._root = root
        self._tell = tell
        self.supply = Supply(root / "share" / "aside")
        self.daemon: Daemon = stack.enter_context(
            Daemon(weights, device, root / "share", root / "daemon.log")
        )
        self.loop: Worker = stack.enter_context(
            Worker("the loop", model_order("loop", weights, device), root / "loop.log")
        )
        self.limit: Worker = stack.enter_context(
            Worker("the bare network", model_order("limit", weights, device), root / "limit.log")
        )
        self.processes = {"loop": self.loop, "sam_poll": self.daemon, "limit": self.limit}
        # Pairs of the loop and the network: they forget what they saw.
        self._own: dict[str, list[tuple[str, str]]] = {}
        self._ready = ""
        self.batch, self.step = 1, ""

    def _fixed(self, subject: TestImages) -> list[tuple[str, str]]:
        if subject.name not in self._own:
            self._own[subject.name] = paths(self.supply.pairs(subject, len(subject.jpegs)))
        return self._own[subject.name]

    def _network(
        self, subject: TestImages, batches: int, *, single: bool = False
    ) -> tuple[float, float]:
        """Seconds, and CPU seconds, a picture."""
        if self._ready != subject.name:
            answer = self.limit(pairs=self._fixed(subject))
            self.batch = answer["batch"]
            self.step = answer["step"]
            self._ready = subject.name
        answer = self.limit(batches=batches, single=single)
        return answer["seconds"], answer["cpu_s"]

    def looped(
        self, subject: TestImages, count: int, *, flush: bool = False
    ) -> tuple[float, float]:
        """Seconds, and CPU seconds, a picture of the loop, which may flush its files."""
        fixed = self._fixed(subject)
        pairs = [fixed[number % len(fixed)] for number in range(count)]
        answer = self.loop(pairs=pairs, out=str(self._root), flush=flush)
        return answer["seconds"], answer["cpu_s"]

    def answered(self, subject: TestImages, count: int) -> tuple[float, float]:
        """Seconds, and CPU seconds, a picture of the daemon."""
        pairs = self.supply.pairs(subject, count)
        before = self.daemon.cpu_s
        seconds = self.daemon.run(pairs)
        return seconds / count, (self.daemon.cpu_s - before) / count

    def one(self, subject: TestImages) -> tuple[float, float]:
        """Seconds of the network for one picture, and from drop to result."""
        network, _ = self._network(subject, 1, single=True)
        return network, self.answered(subject, 1)[0]

    def warm_up(self, subject: TestImages) -> None:
        """Each runs what it will run."""
        self._network(subject, 1)
        self.looped(subject, 1)
        self.answered(subject, self.batch)

    def cell(self, subject: TestImages, jobs: int | None, round_s: float) -> Cell:
        """Nothing measured yet, but how many jobs make a round of that length."""
        if jobs is None:
            network_s, _ = self._network(subject, 1)
            jobs = min(max(round(round_s / network_s), LEAST_JOBS, 2 * self.batch), MOST_JOBS)
        loop_s, _ = self.looped(subject, 1)
        looped = min(max(round(round_s / 2 / loop_s), 1), MOST_LOOPED, jobs)
        return Cell(self.name, subject.name, subject.megapixels, subject.megabytes, jobs, looped)

    def round(self, subject: TestImages, cell: Cell, title: str) -> None:
        """Measure one figure of each contestant.

        The loop and the network do fewer jobs: their figures do not depend on the number of jobs.
        """
        contestants: dict[str, Callable[[], tuple[float, float]]] = {
            "loop": lambda: self.looped(subject, cell.looped),
            "sam_poll": lambda: self.answered(subject, cell.jobs),
            "limit": lambda: self._network(subject, max(1, cell.jobs // 2 // self.batch)),
        }
        for name, run_ in contestants.items():
            self._tell(f"{title}: {name}")
            seconds, cpu_s = run_()
            getattr(cell, name).append(seconds)
            cell.cpu_s[name].append(cpu_s)


def device_of(wanted: str) -> str:
    from sam_poll.engines import devices

    return devices.choose(wanted, "auto").name


def machine(device: str) -> dict[str, Any]:
    """Return what the figures depend on, without the name of the machine."""
    import torch

    made: dict[str, Any] = {"device": device, "cpu": _cpu(), "cores": usable_cores()}
    made["torch_threads"] = torch.get_num_threads()
    if device.startswith("cuda"):
        made["gpu"] = torch.cuda.get_device_name(device)
    made |= {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "sam_poll": __version__,
    }
    return made


def _cpu() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return (
            next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
        )
    return platform.processor() or platform.machine()
