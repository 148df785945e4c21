"""A cluster on one share whose workers, watcher and broker are killed, wiped and frozen.

    python -m tools.chaos_cluster [--jobs 300] [--broker redis] [--broker rabbitmq]

Every file must be in one place at the end, and every output have the bytes of an undisturbed run.
Part of `make chaos`; the servers are started for the run.

Limitations: all processes run on one machine, so a frozen process stands for one that another
machine cannot see."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.cluster_processes import Part
from tests.support.rabbit_server import RabbitServer
from tests.support.redis_server import Server as RedisServer
from tools.chaos_jobs import Dropper, plan
from tools.chaos_share import Daemon, Watcher, claims, judge, new_share, settled, wait_for

SERVERS: dict[str, Callable[..., AbstractContextManager[Any]]] = {
    "redis": RedisServer,
    "rabbitmq": RabbitServer,
}
LAG_MS = 20
_LEASE_S = 2.0  # that of tools.chaos_share.environment


@dataclass
class Report:
    """Seconds until what a part had was in other hands; `end` is the watcher's last line."""

    jobs: int = 0
    files: int = 0
    dead_s: float = 0.0
    frozen_s: float = 0.0
    wiped_s: float = 0.0
    end: str = ""

    def __str__(self) -> str:
        return (
            f"{self.files} files, {self.jobs} jobs; redelivery: {self.dead_s:.1f} s after kill -9 "
            f"of a worker on this machine, {self.frozen_s:.1f} s after SIGSTOP, which is how "
            f"another machine sees it (lease {_LEASE_S:g} s), {self.wiped_s:.1f} s after the "
            f"broker is back and empty; {self.end}"
        )


def calm_run(root: Path, jobs: int, seed: int) -> Path:
    """The same jobs on a share of their own, answered by one undisturbed daemon."""
    share = new_share(root)
    with Dropper(plan(jobs, seed), share, 0.5, hurry=True) as dropper:
        for _ in range(5):
            dropper.drop_ready()
            with Daemon(share, once=True, watch__settle_s=0) as daemon:
                daemon.process.wait(120)
            if not dropper.left:
                break
    return share


def _ended(share: Path) -> int:
    endings = (".json", ".prompt")
    return sum(p.suffix in endings for f in ("done", "failed") for p in (share / f).rglob("*"))


def _held_by(name: str | None, share: Path) -> list[Path]:
    return [path for path in claims(share) if path.name.endswith(f"@{name}")]


def _at_work(workers: list[Part]) -> Part:
    return wait_for(
        lambda: next((w for w in workers if not w.killed and _held_by(w.worker, w.share)), None),
        "a worker is at work",
    )


def _taken_over(share: Path, name: str | None) -> float:
    """Seconds until a worker's claims are in other hands."""
    began = time.monotonic()
    wait_for(lambda: not _held_by(name, share), "its claims are taken over")
    return time.monotonic() - began


def disturbed_run(root: Path, server: Any, jobs: int, seed: int = 7) -> Report:
    """Run the jobs while a worker is killed, one frozen, the broker wiped and the watcher killed.

    ChaosError, or AssertionError, tells what is lost, doubled or different.
    """
    calm = calm_run(root / "calm", jobs, seed)
    share, made = new_share(root), plan(jobs, seed)
    report = Report(made.jobs, len(made.files))
    with (
        ExitStack() as stack,
        Watcher(share) as outputs,
        Dropper(made, share, 0.5, hurry=True) as dropper,
    ):
        watcher = stack.enter_context(Part("watch", share, server, "--ahead", "32"))
        workers = [
            stack.enter_context(Part("worker", share, server, lag_ms=LAG_MS)) for _ in range(3)
        ]
        for part in (watcher, *workers):
            part.started()
        dropper.allow(10_000)
        wait_for(lambda: _ended(share) > jobs // 4, "a quarter is done")
        victim = _at_work(workers)
        name = victim.worker
        victim.kill()
        report.dead_s = _taken_over(share, name)
        victim = _at_work(workers)
        name = victim.worker
        victim.freeze(0)
        report.frozen_s = _taken_over(share, name)
        victim.thaw()
        wait_for(lambda: _ended(share) > jobs // 2, "half is done", 90)
        server.kill()
        server.forget()
        wait_for(lambda: watcher.says("is unreachable"), "the watcher notices")
        server.start()
        began, before = time.monotonic(), _ended(share)
        wait_for(lambda: _ended(share) > before + 4, "jobs are answered again", 90)
        report.wiped_s = time.monotonic() - began
        watcher.kill()
        heir = stack.enter_context(Part("watch", share, server, "--ahead", "32")).started()
        wait_for(
            lambda: not dropper.left and settled(share, made, dropper.stalled),
            "all is answered",
            180,
        )
        for part in (heir, *workers):
            if not part.killed:
                part.ask()
                part.ended(0)
                part.lines()
        report.end = str(heir.lines()[-1]["message"])
    judge(share, made.files, calm=calm, stalled=dropper.stalled).hold()
    assert outputs.partial == outputs.changed == []
    return report


def main() -> None:
    """Run with each broker, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--broker", action="append", choices=SERVERS)
    asked = parser.parse_args()
    for name in asked.broker or SERVERS:
        with tempfile.TemporaryDirectory() as root, SERVERS[name](Path(root) / name) as server:
            report = disturbed_run(Path(root), server, asked.jobs, asked.seed)
        sys.stdout.write(f"{name}: {report}\n")


if __name__ == "__main__":
    main()
