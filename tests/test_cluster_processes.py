"""A watcher and workers as processes, a real Redis, and `kill -9` for each of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.cluster_parts import Part
from tests.redis_server import Server
from tools.chaos_jobs import Dropper, drop_pair, plan
from tools.chaos_share import Daemon, Watcher, claims, holders, judge, new_share, settled, wait_for

JOBS = 300


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "redis") as made:
        yield made


def tell(capsys: pytest.CaptureFixture[str], *lines: str) -> None:
    """Figures for who runs the tests; nothing is asserted of them."""
    with capsys.disabled():
        sys.stdout.write("".join(f"\n{line}" for line in lines) + "\n")


def answers(share: Path) -> int:
    return sum(1 for _ in (share / "out").rglob("*.opex.json")) if (share / "out").is_dir() else 0


def done_or_failed(share: Path) -> int:
    return sum(p.suffix in (".json", ".prompt") for f in ("done", "failed") for p in (share / f).rglob("*"))


def held_by(part: Part) -> list[Path]:
    return [path for path in claims(part.share) if path.name.endswith(f"@{part.worker}")]


def calm_run(root: Path, count: int, seed: int) -> Path:
    """The same jobs on a share of their own, answered by one undisturbed daemon."""
    share = new_share(root)
    made = plan(count, seed)
    with Dropper(made, share, 0.5, hurry=True) as dropper:
        for _ in range(5):
            dropper.drop_ready()
            with Daemon(share, once=True, watch__settle_s=0) as daemon:
                daemon.process.wait(60)
            if not dropper.left:
                break
    return share


@pytest.mark.timeout(180)
def test_no_job_is_lost_or_answered_otherwise_when_worker_redis_and_watcher_are_killed(
    tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    calm = calm_run(tmp_path / "calm", JOBS, seed=7)
    share = new_share(tmp_path)
    made = plan(JOBS, 7)
    with (
        ExitStack() as stack,
        Watcher(share) as outputs,
        Dropper(made, share, 0.5, hurry=True) as dropper,
    ):
        watcher = stack.enter_context(Part("watch", share, server, "--ahead", "32"))
        workers = [stack.enter_context(Part("worker", share, server, lag_ms=20)) for _ in range(3)]
        for part in (watcher, *workers):
            part.started()
        dropper.allow(10_000)
        wait_for(lambda: done_or_failed(share) > JOBS // 4, "a quarter is done")
        dead_s = kill_one(share, workers)
        frozen_s = freeze_one(share, workers)
        wait_for(lambda: done_or_failed(share) > JOBS // 2, "half is done")
        server.kill()
        server.forget()
        wait_for(lambda: watcher.says("Redis is away"), "the watcher notices")
        server.start()
        watcher.kill()
        heir = stack.enter_context(Part("watch", share, server, "--ahead", "32")).started()
        wait_for(lambda: not dropper.left and settled(share, made, dropper.stalled), "all is answered", 90)
        for part in (heir, *workers):
            if not part.killed:
                part.ask()
                part.ended(0)
                part.lines()
    verdict = judge(share, made.files, calm=calm, stalled=dropper.stalled)
    verdict.hold()
    assert outputs.partial == outputs.changed == []
    tell(
        capsys,
        f"{len(made.files)} files, {made.jobs} jobs; redelivery: {dead_s:.1f} s after kill -9 on this machine,",
        f"{frozen_s:.1f} s after SIGSTOP, which is how another machine sees it (lease 2 s); {again(heir)}",
    )


def again(watcher: Part) -> str:
    """A watcher's last line: how many it has handed out, and handed out again."""
    return str(watcher.lines()[-1]["message"])


def at_work(workers: list[Part]) -> Part:
    return wait_for(lambda: next((w for w in workers if not w.killed and held_by(w)), None), "a worker is at work")


def freeze_one(share: Path, workers: list[Part]) -> float:
    """SIGSTOP for a worker at work, until what it had is in other hands; returns the seconds that it took."""
    victim = at_work(workers)
    name = victim.worker
    victim.freeze(0)
    frozen, had = time.monotonic(), set(held_by(victim))
    wait_for(lambda: not any(path.name.endswith(f"@{name}") for path in claims(share)), "its claims are taken over")
    took = time.monotonic() - frozen
    victim.thaw()
    return took if had else 0.0


def kill_one(share: Path, workers: list[Part]) -> float:
    """Kill a worker that is at work; returns the seconds until all that it had is in other hands."""
    victim = at_work(workers)
    name = victim.worker
    victim.kill()
    killed = time.monotonic()
    wait_for(lambda: not any(path.name.endswith(f"@{name}") for path in claims(share)), "its claims are taken over")
    return time.monotonic() - killed


def test_throughput_of_one_and_two_workers(tmp_path: Path, server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    told = []
    for count in (1, 2):
        share = new_share(tmp_path / str(count))
        with ExitStack() as stack:
            parts = [stack.enter_context(Part("watch", share, server))]
            parts += [stack.enter_context(Part("worker", share, server, lag_ms=20)) for _ in range(count)]
            for part in parts:
                part.started()
            for number in range(60):
                drop_pair(share, f"d{number}", number)
            first = wait_for(lambda share=share: answers(share), "the first answer")
            began = time.monotonic()
            wait_for(lambda share=share: answers(share) >= 60, "all answers")
            told.append(f"{count}: {(60 - first) / (time.monotonic() - began):.0f} jobs/s")
            for part in reversed(parts):
                part.stop()
        assert not holders(share)
    tell(capsys, "throughput by workers: " + ", ".join(told))
