"""`make chaos`: daemons on one share are killed, frozen, stopped and lied to about time; at the end
nothing is lost.

Every job must be in exactly one place, every output whole and equal to that of an undisturbed run,
nothing committed twice, and no temporary file or claim left. `tools/chaos_scenarios.py` has the
sick surroundings: a full disk, a share that goes read-only or away, a job that kills its process, a
device that fails.

Limitations: the moments are drawn from a seed, but what a daemon is doing then is
not; two runs of one seed are not the same run."""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.chaos_jobs import Dropper, Plan, plan
from tools.chaos_share import (
    SETTLE_S,
    ChaosError,
    Daemon,
    Verdict,
    Watcher,
    answered_twice,
    at_work,
    claims,
    files_below,
    holders,
    judge,
    new_share,
    settled,
    temporaries,
    wait_for,
)

LEASE_S = 2.0
_YEARS = (31_536_000.0, 4_070_908_800.0)  # 1971 and 2099, in seconds since 1970
_DRAIN_S = 120.0
_SWEEP_S = 15.0


@dataclass(frozen=True)
class Torment:
    """What is done to the daemons, and how often. `lag_ms`: each step on the share takes up to so
    long, for a part of the daemons, so that a blow falls between two steps more often. `devices`
    (`cpu,cpu`): each daemon is a fleet, and every second kill is of one of its processes."""

    jobs: int = 3000
    daemons: int = 3
    kills: int = 587
    freezes: int = 103
    terms: int = 60
    jumps: int = 60
    seed: int = 0
    lag_ms: float = 20.0
    devices: str = ""
    late: bool = True


@dataclass
class Report:
    """How a run went."""

    jobs: int = 0
    blows: Counter[str] = field(default_factory=Counter)
    held: Counter[str] = field(default_factory=Counter)
    """Blows that hit a daemon with claims."""
    takeovers: int = 0
    fenced: int = 0
    stalled: int = 0
    workers: int = 0
    seconds: float = 0.0
    verdict: Verdict = field(default_factory=Verdict)

    def __str__(self) -> str:
        v = self.verdict
        rows = {
            "jobs": self.jobs,
            "kills": f"{self.blows['kill']} ({self.held['kill']} of a daemon with claims)",
            "of them, of a fleet's process": self.blows["part"],
            "freezes": f"{self.blows['freeze']} ({self.held['freeze']} of a daemon with claims)",
            "terms": self.blows["term"],
            "clock jumps": self.blows["jump"],
            "takeovers": self.takeovers,
            "claims lost to another": self.fenced,
            "writers held up": self.stalled,
            "files of gone daemons": self.workers,
            "jobs lost": len(v.lost),
            "partial outputs": len(v.partial),
            "committed twice": len(v.twice),
            "other faults": len(v.left) + len(v.differs) + len(v.log),
            "seconds": f"{self.seconds:.0f}",
        }
        return "\n".join(f"{name}: {value}" for name, value in rows.items())


class Tormentor:
    """Keeps `daemons` of them running, and strikes them."""

    def __init__(self, share: Path, torment: Torment, report: Report) -> None:
        self._share = share
        self._torment = torment
        self._report = report
        self._rng = random.Random(torment.seed)
        self.running: list[Daemon] = []
        self.all: list[Daemon] = []
        self._leaving: list[tuple[Daemon, str | None]] = []

    def blows(self) -> list[str]:
        """All blows to come, in a random order."""
        t = self._torment
        made = ["kill"] * t.kills + ["freeze"] * t.freezes + ["term"] * t.terms + ["jump"] * t.jumps
        self._rng.shuffle(made)
        return made

    def start(self, *, plain: bool = False) -> Daemon:
        """One more daemon; every second one on a share with lag."""
        lag = self._torment.lag_ms if not plain and self._rng.random() < 0.5 else 0.0
        more: dict[str, Any] = {"devices": self._torment.devices} if self._torment.devices else {}
        if lag:
            daemon = Daemon(
                self._share,
                module="tools.chaos_daemon",
                CHAOS_LAG_MS=lag,
                CHAOS_SHARE=self._share,
                **more,
            )
        else:
            daemon = Daemon(self._share, **more)
        self.running.append(daemon)
        self.all.append(daemon)
        return daemon

    def tend(self) -> None:
        """Replace who is gone, wake who has slept enough, and see that who was asked to stop
        has.
        """
        now = time.monotonic()
        for daemon in self.running:
            if daemon.thaw_at and now > daemon.thaw_at:
                daemon.thaw()
            if not daemon.alive:
                raise ChaosError(
                    f"{daemon.log.name} ended by itself with {daemon.process.returncode}: "
                    f"{daemon.tail()}"
                )
        for daemon, worker in self._leaving[:]:
            if not daemon.alive:
                self._leaving.remove((daemon, worker))
                daemon.ended(0)
                daemon.left_nothing(worker)
        while len(self.running) < self._torment.daemons:
            self.start()

    def strike(self, blow: str) -> None:
        """One blow, on a daemon that has claims just now if there is one."""
        if blow == "jump":
            self._jump()
        else:
            daemon = wait_for(self._target, "a daemon is awake")
            getattr(self, f"_{blow}")(daemon)
        self._report.blows[blow] += 1

    def _target(self) -> Daemon | None:
        """One that is at work, if that happens within a second; else any, now and then one that has
        not started.
        """
        deadline = time.monotonic() + self._rng.choice([0.0, 1.0, 1.0, 1.0])
        while time.monotonic() < deadline:
            busy = [d for d in self.running if d.thaw_at is None and d.pid in holders(self._share)]
            if busy:
                time.sleep(self._rng.uniform(0.0, 0.02))
                return self._rng.choice(busy)
            self.tend()
        self.tend()
        ready = [d for d in self.running if d.thaw_at is None and d.watching]
        return self._rng.choice(ready) if ready else None

    def _kill(self, daemon: Daemon) -> None:
        parts = daemon.parts if self._rng.random() < 0.5 else []
        if parts:  # it goes on without one of its fleet
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._rng.choice(parts), signal.SIGKILL)
            self._report.blows["part"] += 1
            return
        daemon.kill()
        self._report.held["kill"] += daemon.pid in holders(self._share)
        self.running.remove(daemon)

    def _freeze(self, daemon: Daemon) -> None:
        daemon.freeze(LEASE_S * self._rng.uniform(1.5, 3.0))
        self._report.held["freeze"] += daemon.pid in holders(self._share)

    def _term(self, daemon: Daemon) -> None:
        self._leaving.append((daemon, daemon.worker))
        daemon.ask()
        self.running.remove(daemon)

    def _jump(self) -> None:
        """Somebody's clock is wrong: times of files and folders in work/ become nonsense."""
        for path in [*files_below(self._share / "work"), *claims(self._share)]:
            if self._rng.random() < 0.5:
                year = self._rng.choice(_YEARS)
                try:
                    if path.is_file() and path.lstat().st_nlink > 1:
                        continue  # a user's hard link: its time is that of a file outside
                    os.utime(path, (year, year), follow_symlinks=False)
                except FileNotFoundError:
                    continue

    def end(self, settled_now: Callable[[], bool]) -> None:
        """Wake all, let one or two finish what is left, and end them."""
        for daemon in self.running:
            if daemon.thaw_at:
                daemon.thaw()
        for daemon in self.running[2:]:
            self._term(daemon.started())
        wait_for(self._tended(settled_now), "everything is put away", _DRAIN_S, every=0.3)
        with contextlib.suppress(ChaosError):  # the verdict tells of them
            wait_for(lambda: not temporaries(self._share), "unfinished files are swept", _SWEEP_S)
        for daemon in self.running:
            daemon.stop()
        wait_for(
            lambda: not any(d.alive for d, _ in self._leaving),
            "those asked to stop have stopped",
            50,
        )
        for daemon, worker in self._leaving:
            daemon.ended(0)
            daemon.left_nothing(worker)

    def _tended(self, settled_now: Callable[[], bool]) -> Callable[[], bool]:
        def look() -> bool:
            for daemon in self.running:
                if not daemon.alive:
                    raise ChaosError(f"{daemon.log.name} ended while draining: {daemon.tail()}")
            return settled_now()

        return look

    def close(self) -> None:
        """End every process, whatever happened."""
        for daemon in self.all:
            if daemon.alive:
                daemon.kill()


def undisturbed(root: Path, made: Plan) -> Path:
    """The same drops through one daemon that nobody touches; returns the share."""
    share = new_share(root)
    dropper = Dropper(made, share, SETTLE_S, hurry=True)
    while dropper.left:
        if not dropper.drop_ready():
            raise ChaosError("an undisturbed daemon did not answer what others wait for")
        with Daemon(share, once=True, watch__settle_s=0) as daemon:
            daemon.process.wait(600)
            daemon.ended(
                3 if daemon.says(" rejected: ") or daemon.says(" without a partner: ") else 0
            )
            daemon.lines()
    judge(share, made.files).hold()
    return share


def disturbed(
    root: Path, made: Plan, torment: Torment, *, tell: bool = False
) -> tuple[Path, Report]:
    """The drops under torment; the share and how it went, the verdict still without comparison."""
    share, report = new_share(root), Report(jobs=made.jobs)
    tormentor = Tormentor(share, torment, report)
    blows = tormentor.blows()
    rng = random.Random(torment.seed + 1)
    with Watcher(share) as watcher, Dropper(made, share, SETTLE_S) as dropper:
        try:
            tormentor.tend()
            for number, blow in enumerate(blows, 1):
                tormentor.tend()
                dropper.allow(len(made.drops) * number // len(blows))
                time.sleep(rng.uniform(0.0, 2 * SETTLE_S))
                tormentor.strike(blow)
                if tell and number % 50 == 0:
                    print(
                        f"  {number} of {len(blows)} blows, {dropper.dropped} drops",
                        file=sys.stderr,
                        flush=True,
                    )
            dropper.allow(len(made.drops))
            tormentor.tend()
            tormentor.end(lambda: not dropper.left and settled(share, made, dropper.stalled))
        except ChaosError as error:
            raise ChaosError(f"{error}\n{_state(share, made, dropper)}") from None
        finally:
            tormentor.close()
    report.verdict = judge(share, made.files, stalled=dropper.stalled)
    report.verdict.partial += watcher.partial
    report.verdict.differs += watcher.changed
    report.stalled, report.workers = len(dropper.stalled), report.verdict.workers
    _read_logs(tormentor.all, report)
    return share, report


def _state(share: Path, made: Plan, dropper: Dropper) -> str:
    here = [file for drop in made.drops if drop not in dropper.waiting for file in drop.files]
    left = [
        f"{dropper.left} drops were not made",
        *judge(share, here, stalled=dropper.stalled).faults,
    ]
    left += [f"at work: {p.relative_to(share)}" for p in at_work(share)]
    left += [f"unfinished: {p.relative_to(share)}" for p in temporaries(share)]
    return "\n  ".join(left[:40])


def _read_logs(daemons: list[Daemon], report: Report) -> None:
    lines = []
    for daemon in daemons:
        try:
            lines += daemon.lines()
        except ChaosError as error:
            report.verdict.log.append(str(error))
    report.verdict.twice += answered_twice(lines)
    report.takeovers = sum("took over " in line["message"] for line in lines)
    report.fenced = sum("has taken it over" in line["message"] for line in lines)


def run(root: Path, torment: Torment, *, tell: bool = False) -> Report:
    """The whole test below `root`: torment, an undisturbed run, and the verdict with both."""
    started = time.monotonic()
    made = plan(torment.jobs, torment.seed, late=torment.late)
    share, report = disturbed(root / "torment", made, torment, tell=tell)
    calm = undisturbed(root / "calm", made)
    stalled = {f.key for f in made.files} if report.stalled else set()
    report.verdict.differs += judge(share, made.files, calm=calm, stalled=stalled).differs
    report.seconds = time.monotonic() - started
    return report


def main() -> int:
    """Run it; 0 if nothing was lost, partial, twice or otherwise wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in vars(Torment()).items():
        if name != "late":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--keep", type=Path, help="run in this folder, and keep it")
    given = vars(parser.parse_args())
    keep = given.pop("keep")
    root = keep or Path(tempfile.mkdtemp(prefix="sam_poll-chaos-"))
    report = None
    try:
        report = run(root, Torment(**given), tell=True)
        print(report)
        for fault in report.verdict.faults[:50]:
            print(f"  {fault}", file=sys.stderr)
        return 1 if report.verdict.faults else 0
    finally:
        if keep is None and report and not report.verdict.faults:
            shutil.rmtree(root)
        elif keep is None:
            print(f"everything lies in {root}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
