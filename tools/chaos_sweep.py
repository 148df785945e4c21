"""A blow at every step: a daemon dies, or freezes past its lease, before its n-th change on the
share, for every n; or its n-th step fails once.

Where the chaos run strikes at random moments, this one strikes at each: another daemon must then
finish everything (and a frozen one, when it wakes up, must do no harm), with the same answers as if
nothing had happened. A daemon whose step fails must finish by itself, unless it could not start.
Daemons are forked from one process that has imported everything, so that a step costs a second or
two and not five.

Limitations: threads share the count of steps, so step 40 is not the same step in
every run; a sweep passes each of them only about once."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cv2

from sam_poll.engines import loader  # noqa: F401
from sam_poll.formats import mask, opex  # noqa: F401

# Imported here so that the forked daemons need not.
from sam_poll.runtime import builders  # noqa: F401
from tools import chaos_daemon
from tools.chaos_jobs import File, pair, picture
from tools.chaos_share import (
    ChaosError,
    at_work,
    environment,
    judge,
    located,
    log_lines,
    new_share,
    temporaries,
    wait_for,
)

_DRAIN_S = 30.0
_WAVE = 8


@dataclass
class Forked:
    """A daemon forked from this process."""

    share: Path
    name: str
    pid: int = 0
    code: int | None = None

    @property
    def log(self) -> Path:
        return self.share.parent / "logs" / f"{self.name}.log"

    def start(self, *, once: bool, **env: object) -> Forked:
        """Fork; the child never returns."""
        self.pid = os.fork()
        if self.pid:
            return self
        try:
            handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            os.environ.clear()
            os.environ.update(environment(watch__settle_s=0, **env))
            sys.argv = ["sam-poll", "watch", str(self.share / "in"), *(["--once"] if once else [])]
            sys.argv += ["-m", "fake", "-f", "mask", "-f", "opex", "--log", "json"]
            chaos_daemon.main()
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(1)

    def ended(self, options: int = os.WNOHANG | os.WUNTRACED) -> int | None:
        """Its exit code; -SIGKILL where it was killed, -SIGSTOP where it stands still; None: it
        runs.
        """
        if self.code in (None, -signal.SIGSTOP):
            found, status = os.waitpid(self.pid, options)
            if found and os.WIFSTOPPED(status):
                self.code = -signal.SIGSTOP
            elif found:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def stop(self) -> None:
        """SIGTERM; it must end with 0."""
        wait_for(lambda: b"watching " in self.log.read_bytes(), f"{self.name} starts", 30)
        os.kill(self.pid, signal.SIGTERM)
        wait_for(lambda: self.ended() is not None, f"{self.name} stops", 50)
        if self.code:
            raise ChaosError(f"{self.name} ended with {self.code}: {self.log.read_text()[-600:]}")

    def close(self) -> None:
        """End it, whatever it does."""
        if self.pid and self.ended() in (None, -signal.SIGSTOP):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@dataclass
class Trial:
    """One step: the daemon that is struck there, and those that come after."""

    root: Path
    step: int
    blow: str
    after: int = 0
    """Another daemon was killed at this step before, so that its claims are taken over; 0: none."""
    struck: Forked = field(init=False)
    heirs: list[Forked] = field(default_factory=list)
    files: list[File] = field(default_factory=list)
    fault: str | None = None

    def begin(self) -> None:
        """Drop everything, and let the first daemon run into the blow."""
        share = new_share(self.root)
        self.files = _drop(share)
        if self.after:
            dead = Forked(share, "dead").start(once=True, CHAOS_SHARE=share, CHAOS_STEP=self.after)
            wait_for(lambda: dead.ended() is not None, "the one before is killed", _DRAIN_S)
        self.struck = Forked(share, "struck").start(
            once=True,
            CHAOS_SHARE=share,
            CHAOS_STEP=self.step,
            CHAOS_BLOW=self.blow,
            CHAOS_MET=self.root / "met",
        )

    @property
    def met(self) -> str | None:
        """The step at which it was struck; None: there are no more."""
        told = self.root / "met"
        return told.read_text() if told.exists() else None

    def inherit(self, heirs: int) -> None:
        """See the first daemon struck, and start those that have to finish."""
        wait_for(
            lambda: self.struck.ended() is not None, "the first daemon is struck, or ends", _DRAIN_S
        )
        if not self.met or self.struck.code in (0, 3):
            return
        if not self.blow.startswith("SIG") and self.struck.code != 75:
            raise ChaosError(
                f"an error ended it with {self.struck.code}: {self.struck.log.read_text()[-600:]}"
            )
        for number in range(heirs):
            self.heirs.append(Forked(self.struck.share, f"heir{number}").start(once=False))

    def finish(self, calm: Path | None) -> None:
        """Wait for the heirs, wake the frozen one, and hold the share to everything."""
        share = self.struck.share
        wait_for(
            lambda: _over(share, self.files),
            "all is finished",
            _DRAIN_S if self.heirs else 1,
            every=0.05,
        )
        if self.struck.code == -signal.SIGSTOP:
            self.struck.code = None
            os.kill(self.struck.pid, signal.SIGCONT)
            wait_for(lambda: self.struck.ended() is not None, "the frozen one ends", _DRAIN_S)
            if self.struck.code not in (
                0,
                3,
                75,
            ):  # 75: it slept before it had begun, and its files were swept
                raise ChaosError(f"after its sleep it ended with {self.struck.code}")
            wait_for(
                lambda: _over(share, self.files),
                "the heirs finish what the frozen one left",
                _DRAIN_S,
            )
        for heir in self.heirs:
            heir.stop()
        for daemon in (self.struck, *self.heirs):
            if daemon.code != 75:
                list(log_lines(daemon.log, cut=daemon is self.struck))
        judge(share, self.files, calm=calm).hold()

    def attempt(self, act: Callable[[Trial], None]) -> None:
        """Do one part, unless an earlier one has failed."""
        if self.fault is None:
            try:
                act(self)
            except ChaosError as error:
                self.fault = str(error)

    @property
    def told(self) -> str:
        """The fault in full."""
        state = "; ".join(judge(self.struck.share, self.files).faults)
        before = f" (after SIGKILL at step {self.after})" if self.after else ""
        return (
            f"{self.blow} at step {self.step}{before}, {self.met} ({self.root}): "
            f"{self.fault}; {state}"
        )

    def close(self) -> None:
        """End all its daemons."""
        for daemon in (self.struck, *self.heirs):
            daemon.close()


def _drop(share: Path) -> list[File]:
    """One of each: a pair, a picture with three prompts, a name that is taken in done/, refused
    ones, a subfolder, mask files beside a picture that is answered and one that is refused.
    """
    (share / "in/cam1").mkdir()
    (share / "done").mkdir()
    old = [File(f.name, f.body, f.ends) for f in pair("again", 90)]
    for file in old:
        (share / "done" / file.name).write_bytes(file.body)
    files = [*pair("one", 1), *pair("cam1/two", 2), *pair("again", 3)]
    files += [File("three.jpg", picture(".jpg", 4), frozenset({"done"}))]
    files += [
        File(f"three.{n}.json", pair(f"three{n}", 5 + n)[1].body, frozenset({"done"}))
        for n in range(3)
    ]
    bad = [
        File("four.png", b"no picture at all", frozenset({"failed"})),
        pair("four", 20, end="failed")[1],
    ]
    bad += [
        pair("five", 21, end="failed")[0],
        File("five.json", b'{"bbox": 5}', frozenset({"failed"})),
    ]
    files += _with_mask("six", 30, (b'{"label": "six", "mask": "%s"}', b'{"mask": "%s"}'), "done")
    bad += _with_mask("seven", 40, (b'{"mask": "%s", "points": [{"x": 9000, "y": 3}]}',), "failed")
    for file in files + bad:
        (share / "in" / file.name).write_bytes(file.body)
    return old + files + bad


def _with_mask(stem: str, seed: int, prompts: tuple[bytes, ...], end: str) -> list[File]:
    """A picture, its mask file, and prompts that name it."""
    ends = frozenset({end})
    white = picture(".png", seed, colour=(255, 255, seed))
    files = [
        File(f"{stem}.jpg", picture(".jpg", seed), ends),
        File(f"{stem}.rough.png", white, ends),
    ]
    for number, body in enumerate(prompts):
        name = f"{stem}.{number}.json" if number else f"{stem}.json"
        files.append(File(name, body.replace(b"%s", files[1].name.encode()), ends))
    return files


def _over(share: Path, files: list[File]) -> bool:
    if at_work(share) or temporaries(share):
        return False
    places = located(share)
    return all([p.split("/")[0] in f.ends for p in places.get(f.key, [])] == [True] for f in files)


def sweep(
    root: Path, blow: str, steps: list[int], heirs: int, *, after: bool = False, tell: bool = False
) -> tuple[int, list[str]]:
    """Strike at these steps, some at a time; returns how many were met, and what went wrong.

    `after`: a daemon that was killed, at another step each time, has gone before.
    """
    calm = Trial(root / "calm", 0, blow)
    calm.begin()
    calm.inherit(0)
    judge(calm.struck.share, calm.files).hold()
    met, faults = 0, []
    for start in range(0, len(steps), _WAVE):
        wave = [
            Trial(root / f"{blow}-{step}", step, blow, 10 + step * 37 % 101 if after else 0)
            for step in steps[start : start + _WAVE]
        ]
        try:
            for act in (
                Trial.begin,
                lambda trial: trial.inherit(heirs),
                lambda trial: trial.finish(calm.struck.share),
            ):
                for trial in wave:
                    trial.attempt(act)
        finally:
            for trial in wave:
                trial.close()
        met += sum(trial.met is not None for trial in wave)
        faults += [trial.told for trial in wave if trial.fault]
        if tell:
            print(f"  {blow}: {met} steps, {len(faults)} faults", file=sys.stderr, flush=True)
        if not any(trial.met for trial in wave):
            break
        for trial in wave:
            if not trial.fault:
                shutil.rmtree(trial.root)
    return met, faults


def main() -> int:
    """Sweep; 0 if every step was survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--blow", choices=["SIGKILL", "SIGSTOP", "EIO", "ESTALE", "ENOSPC"], default="SIGKILL"
    )
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--last", type=int, default=2000)
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--heirs", type=int, default=2)
    parser.add_argument(
        "--after", action="store_true", help="a killed daemon has left claims to take over"
    )
    parser.add_argument("--root", type=Path, help="make the shares below this folder")
    given = parser.parse_args()
    cv2.setNumThreads(1)  # a process with threads is not to be forked
    root = Path(tempfile.mkdtemp(prefix="sam_poll-sweep-", dir=given.root))
    started = time.monotonic()
    steps = list(range(given.first, given.last + 1, given.stride))
    met, faults = sweep(root, given.blow, steps, given.heirs, after=given.after, tell=True)
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        shutil.rmtree(root)
    print(
        f"{given.blow}: {met} steps struck, {len(faults)} faults, "
        f"{time.monotonic() - started:.0f} s"
    )
    return 1 if faults or not met else 0


if __name__ == "__main__":
    sys.exit(main())
