"""`make torture`: writers of all kinds, users who plant links and junk, killed daemons, on several
file systems.

Everybody may write everywhere (modes 0777). Some users only drop jobs, in all the ways in which
files are written (`tools.torture_jobs`); others plant things of their own, also under the daemons'
own names (`tools.torture_users`); an outside folder must stay as it is. At the end daemons run
until nothing moves any more, and each job is judged by the content of its answer
(`tools.torture_verdict`). Each root is a process of its own; all run at the same time.

    python -m tools.torture --minutes 60 --root /tmp --root overlay:/var/tmp --without foreign

Limitations: what is done is drawn from the seed, but what a daemon is doing then
is not. A run that is itself killed with -9 leaves daemons, and mounts below its root, behind."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.chaos import LEASE_S, Report, Torment, Tormentor
from tools.chaos_scenarios import mount, unmount
from tools.chaos_share import HERE, ChaosError, Daemon, Watcher, files_below, new_share, temporaries
from tools.torture_jobs import GROUPS, Writer, Writers, immutable
from tools.torture_names import BLOCKED, MARK
from tools.torture_verdict import (
    KINDS,
    Verdict,
    answered_twice,
    differences,
    judge,
    make_outside,
    quiet,
    seen_outside,
)

SETTLE_S = 1.0
DAEMON_USER, USERS = 20001, (20011, 20012)
_KINDS = {
    "plain": 30,
    "prompt_first": 8,
    "prompt_late": 8,
    "halves": 6,
    "cut_prompt": 3,
    "two_spellings": 3,
    "several": 8,
    "further": 4,
    "reused": 8,
    "folder": 8,
    "annotations": 5,
    "broken": 3,
    "lone": 1,
    "blocked": 4,
    "foreign": 3,
}
_BLOWS = {"kill": 6, "freeze": 2, "term": 2, "jump": 1}
_STILL_S = 60.0  # nothing has moved for so long: what is left stays
_DRAIN_S = 900.0
_SPAWNS = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', '']))"
"""Whether a daemon's user can start this Python, as a pool of workers does."""
_REFUSES = 75  # how a daemon ends that finds something in its own place at the start


@dataclass(frozen=True)
class Plan:
    """What one root gets. `user`: who the daemons are; None: who we are."""

    seed: int = 0
    seconds: float = 3600.0
    without: tuple[str, ...] = ()
    user: int | None = None
    daemons: int = 3
    writers: int = 3
    pause_s: float = 0.8
    blow_s: float = 2.5


@dataclass
class Outcome:
    """How it went on one root."""

    where: str = ""
    jobs: int = 0
    answered: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    excused: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    blows: Counter[str] = field(default_factory=Counter)
    planted: Counter[str] = field(default_factory=Counter)
    not_planted: Counter[str] = field(default_factory=Counter)
    no_start: int = 0
    """Daemons that refused to start because something lay in their place."""
    takeovers: int = 0
    seconds: float = 0.0
    faults: dict[str, list[str]] = field(default_factory=dict)
    kept: str | None = None

    @property
    def bad(self) -> bool:
        """Whether anything is wrong."""
        return any(self.faults.values())


class Crew(Tormentor):
    """Daemons that are struck. Their surprises are taken down, and the run goes on."""

    def __init__(self, share: Path, plan: Plan) -> None:
        super().__init__(share, Torment(daemons=plan.daemons, seed=plan.seed), Report())
        self._before = become(plan.user)
        self._fleets = _runs(self._before, _SPAWNS)
        self.report = self._report
        self.faults: list[str] = []
        self.no_start = 0

    def start(self, *, plain: bool = False) -> Daemon:
        """One more daemon: on a share with lag, a fleet, or a plain one."""
        kind = self._rng.choice(["lag", "lag", "fleet", "plain", "plain"])
        if kind == "fleet" and not self._fleets:
            kind = "plain"
        more: dict[str, Any] = {
            "watch__settle_s": SETTLE_S,
            "before": self._before,
            "blocked": BLOCKED,
        }
        if kind == "lag" and not plain:
            more |= {"module": "tools.chaos_daemon", "CHAOS_LAG_MS": 10, "CHAOS_SHARE": self._share}
        if kind == "fleet":
            more |= {"devices": "cpu,cpu"}
        daemon = Daemon(self._share, **more)
        self.running.append(daemon)
        self.all.append(daemon)
        return daemon

    def tend(self) -> None:
        """Wake whom it is time for, take down who has ended, replace them."""
        for daemon in self.running[:]:
            if daemon.thaw_at and time.monotonic() > daemon.thaw_at:
                daemon.thaw()
            if not daemon.alive:
                self._ended(daemon)
        for daemon, worker in self._leaving[:]:
            if not daemon.alive:
                self._leaving.remove((daemon, worker))
                try:
                    daemon.ended(0)
                    daemon.left_nothing(worker)
                except ChaosError as error:
                    self.faults.append(str(error))
            elif daemon.asked_at and time.monotonic() - daemon.asked_at > 60:
                self._leaving.remove((daemon, worker))
                self.faults.append(
                    f"{daemon.log.name} did not end within 60 s of SIGTERM: {daemon.tail()}"
                )
                daemon.kill()
        while len(self.running) < self._torment.daemons:
            self.start()

    def _ended(self, daemon: Daemon) -> None:
        self.running.remove(daemon)
        code = daemon.process.returncode
        if code == _REFUSES and not daemon.watching:
            self.no_start += 1
            self.all.remove(daemon)
            time.sleep(0.3)
        else:
            self.faults.append(f"{daemon.log.name} ended by itself with {code}: {daemon.tail(2)}")

    def hit(self) -> None:
        """A blow of some kind."""
        (blow,) = self._rng.choices(list(_BLOWS), list(_BLOWS.values()))
        try:
            self.strike(blow)
        except ChaosError as error:
            self.faults.append(str(error))

    def drain(self, share: Path, known: Writers) -> None:
        """Let daemons run until nothing is left to do, or nothing moves any more; then end them in
        order.
        """
        for daemon in self.running:
            if daemon.thaw_at:
                daemon.thaw()
        deadline = time.monotonic() + _DRAIN_S
        before, since = -1, time.monotonic()
        while time.monotonic() < deadline and not quiet(share, known):
            self.tend()
            left = sum(1 for folder in ("in", "work") for _ in files_below(share / folder))
            if left != before:
                before, since = left, time.monotonic()
            if time.monotonic() - since > _STILL_S:
                break
            time.sleep(1.0)
        time.sleep(2 * LEASE_S)  # what dead daemons have left is swept meanwhile
        for daemon in self.running[:]:
            try:
                daemon.stop()
            except ChaosError as error:
                self.faults.append(str(error))
        self.close()


def become(user: int | None) -> tuple[str, ...]:
    """The command that makes a process another user's. Where that user may not reach this Python,
    it may read all.
    """
    if user is None or os.geteuid():
        return ()
    plain = ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
    reads = (*plain, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    for command in (plain, reads):
        with contextlib.suppress(OSError):
            if _runs(command, "import json"):
                return command
    raise ChaosError(f"user {user} cannot run {sys.executable}")


def _runs(before: tuple[str, ...], code: str) -> bool:
    done = subprocess.run(
        [*before, sys.executable, "-c", code], capture_output=True, check=False, cwd=HERE
    )
    return done.returncode == 0


class Users:
    """The processes of those who plant things."""

    def __init__(
        self, share: Path, outside: Path, seed: int, without: tuple[str, ...] = ()
    ) -> None:
        users = (*USERS, 0) if os.geteuid() == 0 else (0, 0)
        command = [sys.executable, "-m", "tools.torture_users", str(share), str(outside)]
        command += [f"--without={kind}" for kind in without]
        self._processes = [
            subprocess.Popen(
                [*command, "--seed", f"{seed} {n}", "--user", str(user)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=HERE,
            )
            for n, user in enumerate(users)
        ]

    def end(self, outcome: Outcome) -> list[str]:
        """They take everything away; returns what happened to their things."""
        found = []
        for process in self._processes:
            out, said = process.communicate(timeout=60)
            if process.returncode:
                raise ChaosError(f"a user ended with {process.returncode}: {said.decode()[-800:]}")
            told = json.loads(out)
            outcome.planted.update(told["planted"])
            outcome.not_planted.update(told["refused"])
            found += told["changed"]
        return found

    def close(self) -> None:
        """End them, whatever happened."""
        for process in self._processes:
            if process.poll() is None:
                process.stdin.close()  # type: ignore[union-attr]
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()


def torture(root: Path, plan: Plan, *, tell: bool = False) -> Outcome:
    """The whole of it below `root`, an empty folder."""
    started = time.monotonic()
    root.chmod(0o755)
    old_mask = os.umask(0)
    share, outside = new_share(root), root / "outside"
    for name in ("in", "work", "out", "done", "failed"):
        (share / name).mkdir(exist_ok=True)
        (share / name).chmod(0o777)
    make_outside(outside)
    before = seen_outside(outside)
    leave_out = {kind for group in plan.without for kind in GROUPS[group]}
    kinds = {kind: weight for kind, weight in _KINDS.items() if kind not in leave_out}
    known = Writers(share, SETTLE_S, foreign=USERS[1] if os.geteuid() == 0 else None)
    outcome, touched = Outcome(where=str(root)), set[str]()
    users, crew = Users(share, outside, plan.seed, plan.without), Crew(share, plan)
    writers = [Writer(known, f"{plan.seed} {n}", kinds, plan.pause_s) for n in range(plan.writers)]
    try:
        with Watcher(share, every_s=1.0, passed=lambda body: MARK in body) as watcher:
            for writer in writers:
                writer.start()
            _rage(
                crew,
                known,
                plan,
                lambda: touched.update(differences(before, seen_outside(outside))),
                tell,
            )
            for writer in writers:
                writer.stop.set()
            while any(writer.is_alive() for writer in writers):
                crew.tend()
                time.sleep(0.1)
            touched.update(users.end(outcome))
            crew.drain(share, known)
        verdict = judge(share, known)
        verdict.other += [f"{w.name}: {w.error!r}" for w in writers if w.error]
        verdict.partial += watcher.partial
        verdict.other += watcher.changed
        touched.update(differences(before, seen_outside(outside)))
        _fill(outcome, verdict, known, crew, share, sorted(touched))
    finally:
        for writer in writers:
            writer.stop.set()
        users.close()
        crew.close()
        if "foreign" not in plan.without:
            immutable(share / "in", False)  # where a writer has not come so far
        os.umask(old_mask)
    outcome.seconds = time.monotonic() - started
    return outcome


def _rage(crew: Crew, known: Writers, plan: Plan, look: Any, tell: bool) -> None:
    rng, parent = random.Random(plan.seed + 1), os.getppid()
    started = time.monotonic()
    minutes = 0
    next_blow = started + 3
    while (now := time.monotonic()) < started + plan.seconds:
        if os.getppid() != parent:
            raise SystemExit("whoever started this is gone")
        crew.tend()
        if now > next_blow:
            crew.hit()
            look()
            next_blow = time.monotonic() + rng.uniform(0, 2 * plan.blow_s)
        if (now - started) // 60 > minutes:
            minutes += 1
            if tell:
                _tell(crew, known, minutes)
        time.sleep(0.1)


def _tell(crew: Crew, known: Writers, minutes: int) -> None:
    waiting = sum(1 for _ in files_below(known.share / "in"))
    blows = ", ".join(f"{count} {blow}s" for blow, count in sorted(crew.report.blows.items()))
    text = f"{known.share}: minute {minutes}: {len(known.jobs)} jobs, {waiting} files wait, {blows}"
    print(f"{text}; {len(crew.faults)} faults of daemons", file=sys.stderr, flush=True)


def _fill(
    outcome: Outcome, verdict: Verdict, known: Writers, crew: Crew, share: Path, touched: list[str]
) -> None:
    messages: list[str] = []
    for daemon in crew.all:
        try:
            messages += [line["message"] for line in daemon.lines()]
        except ChaosError as error:
            verdict.other.append(str(error))
    verdict.twice += answered_twice(messages)
    verdict.touched += touched
    verdict.other += crew.faults
    for path in temporaries(share):
        if MARK not in path.read_bytes():
            verdict.left.append(f"{path.relative_to(share)} is still there")
    outcome.jobs = len(known.jobs)
    outcome.answered = verdict.answered
    outcome.refused = verdict.refused
    outcome.excused = sum(job.excused for job in known.jobs)
    outcome.kinds, outcome.blows = known.kinds, crew.report.blows
    outcome.no_start = crew.no_start
    outcome.takeovers = sum("took over " in text for text in messages)
    outcome.faults = {kind: getattr(verdict, kind) for kind in KINDS}


# ── file systems ──


@contextlib.contextmanager
def place(text: str) -> Iterator[Path]:
    """A folder of its own on what `--root` names: `DIR`, `overlay:DIR` (on a tmpfs), `tmpfs:DIR`,
    or `ext4:DIR` (a new one in a file)."""
    kind, _, name = text.rpartition(":")
    root = Path(tempfile.mkdtemp(prefix="sam_poll-torture-", dir=name))
    mounts: list[Path] = []
    try:
        yield _mounted(kind, root, mounts) if kind else root
    finally:
        for path in reversed(mounts):
            unmount(path)
        if mounts:
            shutil.rmtree(root, ignore_errors=True)


def _mounted(kind: str, root: Path, mounts: list[Path]) -> Path:
    root.chmod(0o755)
    base, top = root / "base", root / "top"
    base.mkdir()
    if kind in ("tmpfs", "overlay"):
        mount("-t", "tmpfs", "-o", "size=2g", "none", base)
        mounts.append(base)
        if kind == "tmpfs":
            return base
        for folder in (top, base / "lower", base / "upper", base / "work"):
            folder.mkdir()
        layers = f"lowerdir={base / 'lower'},upperdir={base / 'upper'},workdir={base / 'work'}"
        mount("-t", "overlay", "-o", layers, "none", top)
        mounts.append(top)
        return top
    if kind != "ext4":
        raise SystemExit(f"{kind}: no file system that is known here")
    image = root / "image"
    with image.open("wb") as file:
        file.truncate(2 << 30)
    subprocess.run(["mkfs.ext4", "-q", "-N", "400000", str(image)], check=True)
    mount("-o", "loop", image, base)
    mounts.append(base)
    top = base / "root"
    top.mkdir()
    return top


# ── all roots ──


def _one(text: str, plan: Plan, result: Path) -> int:
    """One root, in this process; the outcome goes to `result`."""
    with place(text) as root:
        outcome = torture(root, plan, tell=True)
        outcome.where = text
        if outcome.bad and ":" not in text:
            outcome.kept = str(root)
        elif outcome.bad:
            outcome.kept = str(result.with_suffix(".kept"))
            shutil.copytree(root, outcome.kept, symlinks=True)
        else:
            shutil.rmtree(root, ignore_errors=True)
    result.write_text(json.dumps(vars(outcome)))
    return int(outcome.bad)


def table(outcomes: list[Outcome]) -> str:
    """One column for each root."""
    rows: list[tuple[str, list[Any]]] = [
        ("", [o.where for o in outcomes]),
        ("jobs", [o.jobs for o in outcomes]),
        ("answered", [o.answered for o in outcomes]),
        ("refused, as they must", [sum(o.refused.values()) for o in outcomes]),
        ("of jobs, writers held up", [o.excused for o in outcomes]),
        *((f"blows: {blow}", [o.blows[blow] for o in outcomes]) for blow in (*_BLOWS, "part")),
        ("takeovers", [o.takeovers for o in outcomes]),
        ("starts refused", [o.no_start for o in outcomes]),
        ("things planted", [sum(o.planted.values()) for o in outcomes]),
        ("seconds", [round(o.seconds) for o in outcomes]),
        *(
            (kind.replace("_", " ").upper(), [len(o.faults[kind]) for o in outcomes])
            for kind in KINDS
        ),
    ]
    return "\n".join(
        f"{name:26}" + "".join(f"{value!s:>24}" for value in values) for name, values in rows
    )


def main() -> int:
    """Run it; 0 if nothing was lost, partial, twice, of a wrong pair or touched."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--root", action="append", help="DIR, tmpfs:DIR, overlay:DIR, ext4:DIR; may be repeated"
    )
    parser.add_argument(
        "--without", action="append", choices=GROUPS, default=[], help="leave this mischief out"
    )
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--user", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if given.result:
        plan = Plan(
            seed=given.seed,
            seconds=given.minutes * 60,
            without=tuple(given.without),
            user=given.user,
        )
        return _one(given.root[0], plan, given.result)
    roots = given.root or [
        tempfile.gettempdir(),
        *(["/dev/shm"] if os.access("/dev/shm", os.W_OK) else []),
    ]
    return _all(given, roots)


def _all(given: argparse.Namespace, roots: list[str]) -> int:
    """A process for each root, the daemons of every second one those of an ordinary user."""
    results = Path(tempfile.mkdtemp(prefix="sam_poll-torture-results-"))
    flags = ["--minutes", str(given.minutes), *(f"--without={group}" for group in given.without)]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for n, root in enumerate(roots):
            command = [
                sys.executable,
                "-m",
                "tools.torture",
                "--root",
                root,
                "--seed",
                str(given.seed + n),
                *flags,
            ]
            command += ["--result", str(results / f"{n}.json")]
            if n % 2 and os.geteuid() == 0:
                command += ["--user", str(DAEMON_USER)]
            processes.append(subprocess.Popen(command, cwd=HERE))
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
        for process in processes:
            process.wait()
    outcomes = []
    for n, root in enumerate(roots):
        path = results / f"{n}.json"
        if not path.exists():
            print(f"{root}: ended with {codes[n]} and without a verdict")
            continue
        told = json.loads(path.read_text())
        counters = {
            k: Counter(told[k]) for k in ("refused", "kinds", "blows", "planted", "not_planted")
        }
        outcomes.append(Outcome(**{**told, **counters}))
    if outcomes:
        print(table(outcomes))
    for outcome in outcomes:
        _details(outcome)
    if not any((outcome.kept or "").startswith(str(results)) for outcome in outcomes):
        shutil.rmtree(results)
    return int(any(codes) or len(outcomes) < len(roots))


def _details(outcome: Outcome) -> None:
    print(f"{outcome.where}: kinds {dict(outcome.kinds)}")
    print(
        f"  refused {dict(outcome.refused)}\n  planted {dict(outcome.planted)}\n  not "
        f"{dict(outcome.not_planted)}"
    )
    for kind, texts in outcome.faults.items():
        for text in texts[:20]:
            print(f"  {kind}: {text}")
    if outcome.kept:
        print(f"  everything lies in {outcome.kept}")


if __name__ == "__main__":
    sys.exit(main())
