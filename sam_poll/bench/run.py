"""Runs the benchmark: the contestants in turn, round by round, so that a slow minute of the machine hits all of them.

What can still go wrong here: on a machine of few cores everything that runs beside is measured too.
"""

from __future__ import annotations

import contextlib
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam_poll import __version__
from sam_poll.app import cores_here
from sam_poll.bench import outside, pictures
from sam_poll.bench.pictures import Subject, Supply
from sam_poll.bench.plan import CONTESTANTS, CPU_MODELS, GPU_MODELS, LARGE, SMALL, Plan
from sam_poll.bench.processes import Daemon, Worker, environment, model_order, paths, scratch, settings_in
from sam_poll.bench.weights import Weights, weights_for

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
    """One model on one kind of picture: seconds a picture, one figure a round and contestant; CPU seconds likewise."""

    model: str
    pictures: str
    megapixels: float
    megabytes: float
    jobs: int
    looped: int
    loop: list[float] = field(default_factory=list)
    sam_poll: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    cpu_s: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in CONTESTANTS})


def run(plan: Plan, tell: Tell) -> dict[str, Any]:
    """Everything the plan asks for; the report, ready for JSON. `tell` hears what is done now. BenchError, ModelError;
    nothing is left behind."""
    with _terminable(), scratch("sam_poll-bench-") as root:
        bench = _Bench(plan, root, tell)
        return bench.run()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM, and a terminal that is closed, end the benchmark as Ctrl-C does: with everything put away."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Bench:
    def __init__(self, plan: Plan, root: Path, tell: Tell) -> None:
        self._plan, self._root, self._tell = plan, root, tell
        self._round_s = QUICK_S if plan.quick else ROUND_S

    def run(self) -> dict[str, Any]:
        plan, started = self._plan, time.monotonic()
        device = device_of(plan.device)
        models = plan.models or (GPU_MODELS if device.startswith("cuda") else CPU_MODELS)
        report: dict[str, Any] = {"machine": machine(device), "settings": settings_in(environment())}
        report |= {"objects": plan.objects, "models": [], "speed": [], "outside": None, "latency": []}
        if "outside" in plan.parts:
            self._tell("outside the network, one core")
            report["outside"] = self._outside()
        if {"speed", "latency"} & set(plan.parts):
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
        subject = pictures.made(LARGE, 1)
        with contextlib.ExitStack() as stack:
            workers = {}
            for side in ("loop", "sam_poll"):
                order = {"kind": "outside", "side": side, "root": str(root / "share")}
                workers[side] = stack.enter_context(Worker(f"outside: {side}", order, root / f"{side}.log"))
            clocks: dict[str, list[dict[str, Any]]] = {"loop": [], "sam_poll": []}
            for number in range(1 + (2 if self._plan.quick else OUTSIDE_RUNS)):
                for side, worker in workers.items():
                    (pair,) = supply.pairs(subject, 1)
                    given = {"picture": str(pair.picture), "prompt": str(pair.prompt), "out": str(root)}
                    answer = worker(**given)
                    clocks[side] += [answer] if number else []  # the first one warms up
        for side, seen in clocks.items():
            found[side] = {
                kind: {stage: statistics.median(clock[kind][stage] for clock in seen) for stage in outside.STAGES}
                for kind in ("cpu", "wall")
            }
            found[side]["cpu_s"] = sorted(sum(clock["cpu"].values()) for clock in seen)
        return {"pictures": subject.name, "megabytes": subject.megabytes, **found}

    # ── a model ──

    def _subjects(self) -> list[Subject]:
        plan = self._plan
        if plan.pictures:
            return [pictures.own(plan.pictures, plan.objects)]
        self._tell("making photographs")
        return [pictures.made(size, plan.objects) for size in plan.sizes]

    def _model(self, model: str, device: str, subjects: Sequence[Subject], report: dict[str, Any]) -> dict[str, Any]:
        root = self._root / f"model{len(report['models'])}"
        root.mkdir()
        self._tell(f"{model}: loading, three times")
        weights = weights_for(model, self._root, self._tell)
        with contextlib.ExitStack() as stack:
            contest = _Contest(weights, device, root, stack, self._tell)
            if "speed" in self._plan.parts:
                report["speed"] += [vars(cell) for cell in self._speed(contest, subjects)]
            if "latency" in self._plan.parts:
                report["latency"].append(self._latency(contest, subjects))
            about = {"name": weights.name, "random": weights.random, "step": contest.step, "batch": contest.batch}
            about["peak_mib"] = {name: process.peak_mib for name, process in contest.processes.items()}
        if weights.random:
            weights.path.unlink()
        return about

    def _speed(self, contest: _Contest, subjects: Sequence[Subject]) -> list[Cell]:
        cells = []
        for subject in subjects:
            self._tell(f"{contest.name}, {subject.name}: warming up")
            contest.warm_up(subject)
            cells.append(contest.cell(subject, self._plan.jobs, self._round_s))
        for number in range(1, self._plan.rounds + 1):
            for subject, cell in zip(subjects, cells, strict=True):
                contest.round(subject, cell, f"{contest.name}, {subject.name}, round {number} of {self._plan.rounds}")
        return cells

    def _latency(self, contest: _Contest, subjects: Sequence[Subject]) -> dict[str, Any]:
        """One job at a time into an idle daemon, against the network alone; seconds."""
        subject = subjects[0] if self._plan.pictures else pictures.made(SMALL, self._plan.objects)
        contest.warm_up(subject)
        network_s, _ = contest.one(subject)
        least, most = (2, 2) if self._plan.quick else LATENCY_RUNS
        runs = min(max(round(self._round_s / max(network_s, 1e-3)), least), most)
        found: dict[str, Any] = {"model": contest.name, "pictures": subject.name, "network": [], "drop_to_result": []}
        for number in range(1, runs + 1):
            self._tell(f"{contest.name}, {subject.name}: drop to result, {number} of {runs}")
            for name, seconds in zip(("network", "drop_to_result"), contest.one(subject), strict=True):
                found[name].append(seconds)
        return found


class _Contest:
    """The three contestants, loaded with the same weights."""

    def __init__(self, weights: Weights, device: str, root: Path, stack: contextlib.ExitStack, tell: Tell) -> None:
        self.name, self._root, self._tell = weights.name, root, tell
        self.supply = Supply(root / "share" / "aside")
        self.daemon: Daemon = stack.enter_context(Daemon(weights, device, root / "share", root / "daemon.log"))
        self.loop: Worker = stack.enter_context(
            Worker("the loop", model_order("loop", weights, device), root / "loop.log")
        )
        self.limit: Worker = stack.enter_context(
            Worker("the bare network", model_order("limit", weights, device), root / "limit.log")
        )
        self.processes = {"loop": self.loop, "sam_poll": self.daemon, "limit": self.limit}
        self._own: dict[str, list[tuple[str, str]]] = {}  # pairs of the loop and the network: they forget what they saw
        self._ready = ""
        self.batch, self.step = 1, ""

    def _fixed(self, subject: Subject) -> list[tuple[str, str]]:
        if subject.name not in self._own:
            self._own[subject.name] = paths(self.supply.pairs(subject, len(subject.jpegs)))
        return self._own[subject.name]

    def _network(self, subject: Subject, batches: int, *, single: bool = False) -> tuple[float, float]:
        """Seconds, and CPU seconds, a picture."""
        if self._ready != subject.name:
            answer = self.limit(pairs=self._fixed(subject))
            self.batch, self.step, self._ready = answer["batch"], answer["step"], subject.name
        answer = self.limit(batches=batches, single=single)
        return answer["seconds"], answer["cpu_s"]

    def _looped(self, subject: Subject, count: int) -> tuple[float, float]:
        fixed = self._fixed(subject)
        answer = self.loop(pairs=[fixed[number % len(fixed)] for number in range(count)], out=str(self._root))
        return answer["seconds"], answer["cpu_s"]

    def _answered(self, subject: Subject, count: int) -> tuple[float, float]:
        pairs = self.supply.pairs(subject, count)
        before = self.daemon.cpu_s
        seconds = self.daemon.run(pairs)
        return seconds / count, (self.daemon.cpu_s - before) / count

    def one(self, subject: Subject) -> tuple[float, float]:
        """Seconds of the network for one picture, and from drop to result."""
        network, _ = self._network(subject, 1, single=True)
        return network, self._answered(subject, 1)[0]

    def warm_up(self, subject: Subject) -> None:
        """Each runs what it will run."""
        self._network(subject, 1)
        self._looped(subject, 1)
        self._answered(subject, self.batch)

    def cell(self, subject: Subject, jobs: int | None, round_s: float) -> Cell:
        """Nothing measured yet, but how many jobs make a round of that length."""
        if jobs is None:
            network_s, _ = self._network(subject, 1)
            jobs = min(max(round(round_s / network_s), LEAST_JOBS, 2 * self.batch), MOST_JOBS)
        loop_s, _ = self._looped(subject, 1)
        looped = min(max(round(round_s / 2 / loop_s), 1), MOST_LOOPED, jobs)
        return Cell(self.name, subject.name, subject.megapixels, subject.megabytes, jobs, looped)

    def round(self, subject: Subject, cell: Cell, title: str) -> None:
        """One figure of each. The loop and the network do fewer jobs: theirs do not depend on how many they are."""
        contestants: dict[str, Callable[[], tuple[float, float]]] = {
            "loop": lambda: self._looped(subject, cell.looped),
            "sam_poll": lambda: self._answered(subject, cell.jobs),
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
    """What the figures depend on. No name of the machine."""
    import torch

    made: dict[str, Any] = {"device": device, "cpu": _cpu(), "cores": cores_here()}
    made["torch_threads"] = torch.get_num_threads()
    if device.startswith("cuda"):
        made["gpu"] = torch.cuda.get_device_name(device)
    made |= {"torch": torch.__version__, "python": platform.python_version(), "sam_poll": __version__}
    return made


def _cpu() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()
