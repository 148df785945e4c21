"""What the chaos and soak runs stand on: daemon processes, a watcher of `out/`, and the verdict
over a share.

Limitations: the watcher reads a few times a second; a half file that is whole
again in between is not seen by it (the crash sweep in `tools.chaos_sweep` looks at every step
instead)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from tools.chaos_jobs import File, Plan, key_of

HERE = Path(__file__).resolve().parent.parent
TEMPORARY = ".sam_poll-"
FOLDERS = ("in", "work", "out", "done", "failed")
SETTLE_S = 0.5


class ChaosError(AssertionError):
    """The share or a daemon is not as it must be."""


def wait_for(
    condition: Callable[[], Any], what: str, timeout: float = 60.0, every: float = 0.02
) -> Any:
    """Wait until the condition holds and return what it gave; ChaosError says what did not come."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise ChaosError(f"did not happen within {timeout:g} s: {what}")
        time.sleep(every)
    return found


def new_share(root: Path) -> Path:
    """A fresh share below `root`, with its log folder beside it."""
    share = root / "share"
    (share / "in").mkdir(parents=True)
    (root / "logs").mkdir(exist_ok=True)
    return share


# ── daemons ──


class Daemon:
    """One daemon process. Its log goes to a file of its own beside the share."""

    _serial = 0

    def __init__(
        self,
        share: Path,
        *,
        module: str = "sam_poll",
        once: bool = False,
        logs: Path | None = None,
        model: str = "fake",
        before: Sequence[str] = (),
        blocked: Sequence[str] = (),
        **env: Any,
    ) -> None:
        """Start it.

        `before`: a command that becomes the daemon, as `setpriv` does. `blocked`: folders whose
        places are taken by something else now and then.
        """
        Daemon._serial += 1
        self.share, self._blocked = share, blocked
        self.log = (logs or share.parent / "logs") / f"{Daemon._serial:05d}.log"
        self.killed = self.asked = False
        self.thaw_at: float | None = None
        self.asked_at: float | None = None
        self._seen = False
        command = [*before, sys.executable, "-m", module, "watch", str(share / "in")]
        command += [
            *(["--once"] if once else []),
            "-m",
            model,
            "-f",
            "mask",
            "-f",
            "opex",
            "--log",
            "json",
        ]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(**env),
                cwd=HERE,
                umask=0o022,
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def parts(self) -> list[int]:
        """The processes that it has started."""
        with contextlib.suppress(OSError):
            tasks = [
                path.read_text().split()
                for path in Path(f"/proc/{self.pid}/task").glob("*/children")
            ]
            return [int(pid) for pids in tasks for pid in pids]
        return []

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def watching(self) -> bool:
        """Whether it has come so far as to look for jobs."""
        self._seen = self._seen or b'"message": "watching ' in self.log.read_bytes()
        return self._seen

    @property
    def worker(self) -> str | None:
        """Its name on the share."""
        for path in (self.share / "work").glob(TEMPORARY + "worker-*.json"):
            try:
                if _is_file(path) and json.loads(path.read_text()).get("pid") == self.pid:
                    return path.name[len(TEMPORARY + "worker-") : -len(".json")]
            except (OSError, ValueError):
                continue
        return None

    def started(self, timeout: float = 60.0) -> Daemon:
        """Wait until it looks for jobs; ChaosError if it has ended."""
        wait_for(lambda: self.watching or not self.alive, f"daemon {self.log.name} starts", timeout)
        if not self.alive:
            raise ChaosError(f"the daemon has ended with {self.process.returncode}: {self.tail()}")
        return self

    def kill(self) -> None:
        """`kill -9`."""
        self.killed = True
        self.process.kill()
        self.process.wait()

    def freeze(self, seconds: float) -> None:
        """SIGSTOP; `thaw_at` says when somebody has to call `thaw`."""
        self.process.send_signal(signal.SIGSTOP)
        self.thaw_at = time.monotonic() + seconds

    def thaw(self) -> None:
        """SIGCONT."""
        self.thaw_at = None
        self.process.send_signal(signal.SIGCONT)

    def ask(self) -> None:
        """SIGTERM."""
        self.asked, self.asked_at = True, time.monotonic()
        self.process.send_signal(signal.SIGTERM)

    def stop(self, timeout: float = 50.0, code: int = 0) -> None:
        """SIGTERM, and it must end with `code`; before it looks for jobs, nothing is there to catch
        the signal.
        """
        worker = self.started().worker
        self.ask()
        self.ended(code, timeout)
        self.left_nothing(worker)

    def ended(self, code: int, timeout: float = 50.0) -> None:
        """Wait for its end, and hold it to its exit code."""
        try:
            found = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise ChaosError(
                f"daemon {self.log.name} did not end within {timeout:g} s: {self.tail()}"
            ) from None
        if found != code:
            raise ChaosError(
                f"daemon {self.log.name} ended with {found}, not {code}: {self.tail()}"
            )

    def left_nothing(self, worker: str | None) -> None:
        """Check that no claim carries its name after an orderly end.

        Allowed are jobs that are over and wait for a blocked folder in `done/` or `failed/`
        (docs/operations.md), and jobs of a worker process that was killed: their recovery counts
        the attempt.
        """
        mine = [p for p in claims(self.share) if worker and p.name.endswith(f"@{worker}")]
        mine = [p for p in mine if not self._waits(p)]
        if mine:
            raise ChaosError(f"daemon {self.log.name} ended in order and left {mine[0]} in work/")

    def _waits(self, claim: Path) -> bool:
        """Return whether a claim may be left after an orderly end."""
        top = claim.relative_to(self.share / "work").parts[0]
        if re.match(r"g\d+\.(done|failed)", claim.name):
            return top in self._blocked
        return bool(self.says("its process was ended by"))

    def lines(self) -> list[dict[str, Any]]:
        """Its log; ChaosError for a line that is not JSON, or for a surprise."""
        return list(log_lines(self.log, cut=self.killed))

    def says(self, text: str) -> int:
        """How many of its lines have `text` in their message."""
        raw = self.log.read_bytes().decode(errors="replace").splitlines()
        return sum(
            text in json.loads(line)["message"]
            for line in raw
            if line.startswith("{") and line.endswith("}")
        )

    def tail(self, count: int = 5) -> str:
        """The log's last lines."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.alive:
            self.kill()


def environment(**more: Any) -> dict[str, str]:
    """A daemon's environment: short leases, quick scans. `lease_s=…` is `SAM_POLL_LEASE_S`;
    capitals stay.
    """
    given: dict[str, Any] = {
        "lease_s": 2,
        "attempts": 1000,
        "watch__rescan_s": 0.3,
        "watch__settle_s": SETTLE_S,
        "pipeline__decode_threads": 2,
        "pipeline__finish_threads": 2,
        **more,
    }
    base = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SAM_POLL_", "CHAOS_")) and k != "MODEL"
    }
    named = {k if k.isupper() else f"SAM_POLL_{k.upper()}": str(v) for k, v in given.items()}
    return {**base, "OMP_NUM_THREADS": "1", **named}


def log_lines(log: Path, *, cut: bool) -> Iterator[dict[str, Any]]:
    """A daemon's log lines; the last one of a killed daemon may be cut."""
    raw = log.read_text(errors="replace").splitlines()
    for number, text in enumerate(raw, 1):
        try:
            line = json.loads(text)
        except ValueError:
            if cut and number == len(raw):
                return
            raise ChaosError(f"{log.name}, line {number}, is not JSON: {text[:200]}") from None
        if "exception" in line or line["level"] == "CRITICAL" or "Traceback" in line["message"]:
            raise ChaosError(f"{log.name}, line {number}, tells of a surprise: {text[:400]}")
        yield line


# ── what lies on the share ──


def files_below(folder: Path) -> Iterator[Path]:
    """All regular files below a folder, hidden ones too. What vanishes is passed over, links are
    not followed.
    """
    for parent, _, names in os.walk(folder):
        yield from (path for name in names if _is_file(path := Path(parent) / name))


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def claims(share: Path) -> list[Path]:
    """The claims in work/."""
    return [Path(p) / d for p, folders, _ in os.walk(share / "work") for d in folders if "@" in d]


def holders(share: Path) -> set[int]:
    """The process numbers of those who hold claims; a worker's name is host-process-chance-boot."""
    workers = (path.name.rpartition("@")[2].split("-") for path in claims(share))
    return {int(parts[-3]) for parts in workers if len(parts) > 3 and parts[-3].isdigit()}


def at_work(share: Path) -> list[Path]:
    """What lies in work/ and is a job's, not the daemons' own."""
    return [p for p in files_below(share / "work") if not p.name.startswith(TEMPORARY)] + claims(
        share
    )


def temporaries(share: Path) -> list[Path]:
    """Unfinished files outside of work/."""
    found = (p for f in ("in", "out", "done", "failed") for p in files_below(share / f))
    return [p for p in found if p.name.startswith(TEMPORARY)]


def broken(path: Path, body: bytes) -> str | None:
    """What is wrong with an output file's bytes."""
    if path.suffix == ".png":
        pixels = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED) if body else None
        return None if pixels is not None and b"IEND" in body[-12:] else "the PNG is not whole"
    try:
        json.loads(body)
    except ValueError as error:
        return f"the JSON is not whole: {error}"
    return None


class Watcher:
    """Reads every new file in out/ as soon as it has its name, as a greedy reader would."""

    def __init__(
        self,
        share: Path,
        every_s: float = 0.1,
        *,
        passed: Callable[[bytes], bool] = lambda body: False,
    ) -> None:
        """`passed`: whether a file's bytes are none of the daemons'."""
        self._folder = share / "out"
        self._every_s = every_s
        self._passed = passed
        self._known: dict[Path, tuple[tuple[int, int], str]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watcher", daemon=True)
        self.partial: list[str] = []
        self.changed: list[str] = []

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(60)
        self.look()

    def _run(self) -> None:
        while not self._stop.wait(self._every_s):
            self.look()

    def look(self) -> None:
        """Read what is new."""
        for path in files_below(self._folder):
            if path.name.startswith(TEMPORARY):
                continue
            try:
                found = path.stat()
                mark = (found.st_ino, found.st_mtime_ns)
                before = self._known.get(path)
                if before and before[0] == mark:
                    continue
                body = path.read_bytes()
            except OSError:
                continue
            if self._passed(body):
                continue
            fault = broken(path, body)
            if fault:
                self.partial.append(f"{path.name}: {fault} ({len(body)} bytes)")
            if before and before[1] != key_of(body):
                self.changed.append(f"{path.name} has other bytes than before")
            self._known[path] = (mark, key_of(body))


def settled(share: Path, plan: Plan, stalled: Iterable[str] = ()) -> bool:
    """Whether every file of the plan lies where it may end, and nothing is at work."""
    return not at_work(share) and not _unsettled(share, plan, set(stalled))


def _unsettled(share: Path, plan: Plan, stalled: set[str]) -> bool:
    places = located(share)
    return any(_fault(file, places.get(file.key, []), stalled) for file in plan.files)


def _fault(file: File, found: list[str], stalled: set[str]) -> tuple[str, str] | None:
    """Which list of the verdict a dropped file belongs in, and why."""
    if not found:
        return "lost", f"{file.name} lies nowhere"
    if len(found) > 1:
        return "twice", f"{file.name} lies in {', '.join(found)}"
    ends = file.ends | ({"failed", "done", "in"} if file.key in stalled else set())
    if found[0].split("/")[0] not in ends:
        return "left", f"{file.name} lies in {found[0]}, not in {' or '.join(sorted(ends))}"
    return None


def located(share: Path) -> dict[str, list[str]]:
    """Where each content lies, but for outputs and what the daemons write themselves."""
    places: dict[str, list[str]] = {}
    for folder in ("in", "work", "done", "failed"):
        for path in files_below(share / folder):
            if path.name.startswith(TEMPORARY):
                continue
            try:
                key = key_of(path.read_bytes())
            except FileNotFoundError:
                continue
            places.setdefault(key, []).append(path.relative_to(share).as_posix())
    return places


# ── the verdict ──


@dataclass
class Verdict:
    """What is wrong with a share after a run; all lists empty: nothing."""

    lost: list[str] = field(default_factory=list)
    partial: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    workers: int = 0
    """Files of daemons that are gone, still in work/."""

    @property
    def faults(self) -> list[str]:
        """All of them, as sentences."""
        kinds = ("lost", "partial", "twice", "left", "differs", "log")
        return [f"{kind}: {text}" for kind in kinds for text in getattr(self, kind)]

    def hold(self) -> None:
        """ChaosError with the first faults, if there are any."""
        if self.faults:
            raise ChaosError(f"{len(self.faults)} faults\n  " + "\n  ".join(self.faults[:20]))


def judge(
    share: Path, files: list[File], *, calm: Path | None = None, stalled: Iterable[str] = ()
) -> Verdict:
    """Hold a share, on which no daemon works any more, against what was dropped and against an
    undisturbed run.
    """
    verdict, places = Verdict(), located(share)
    excused = set(stalled)
    for file in files:
        if wrong := _fault(file, places.get(file.key, []), excused):
            getattr(verdict, wrong[0]).append(wrong[1])
    known = {file.key for file in files}
    for key, found in places.items():
        strange = [p for p in found if key not in known and not _error_file(p)]
        verdict.left += [f"{p} is nothing that was dropped" for p in strange]
    verdict.left += [
        f"{p.relative_to(share)} is still there" for p in temporaries(share) + at_work(share)
    ]
    verdict.workers = len(list((share / "work").glob(TEMPORARY + "worker-*")))
    for path in files_below(share / "out"):
        if not path.name.startswith(TEMPORARY) and (fault := broken(path, path.read_bytes())):
            verdict.partial.append(f"{path.name}: {fault}")
    verdict.lost += _without_reason(share, files, places)
    if calm:
        verdict.differs = differences(share, calm, {f.name for f in files if f.key in excused})
    return verdict


def _error_file(path: str) -> bool:
    return path.startswith("failed/") and path.endswith(".error.json")


def _without_reason(share: Path, files: list[File], places: dict[str, list[str]]) -> list[str]:
    """Prompts in failed/ that no error file names."""
    named = set()
    for path in files_below(share / "failed"):
        if path.name.endswith(".error.json"):
            told = json.loads(path.read_bytes())
            named |= {(path.parent / name).relative_to(share).as_posix() for name in told["files"]}
    failed = [p for f in files for p in places.get(f.key, []) if p.startswith("failed/")]
    return [f"{p} has no error file" for p in failed if p not in named]


def differences(share: Path, calm: Path, excused: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """In what the answers and the places of two shares differ."""
    stems = {name.split(".")[0] for name in excused}
    found = []
    for folder in ("out", "done", "failed"):
        one, other = (_bodies(root / folder) for root in (share, calm))
        for name in sorted({*one, *other}):
            if name.split(".")[0] in stems or (
                folder == "failed" and name not in one and _waits(share, name)
            ):
                continue
            if name not in one or name not in other:
                found.append(
                    f"{folder}/{name} is only in the "
                    f"{'undisturbed' if name in other else 'disturbed'} run"
                )
            elif one[name] != other[name]:
                found.append(f"{folder}/{name} has other bytes than in the undisturbed run")
    return found


def _waits(share: Path, name: str) -> bool:
    return (share / "in" / name).exists()


_LATE = "no picture came with the prompt"


def _bodies(folder: Path) -> dict[str, bytes]:
    """Relative name → bytes; of an error file, what does not tell the time; of an answer, all but
    the note that it was made on a picture from done/.

    A prompt that could not be read in time is answered later, on its picture in done/.
    """
    found = {}
    for path in files_below(folder):
        if path.name.startswith(TEMPORARY):
            continue
        body = path.read_bytes()
        if path.name.endswith(".error.json"):
            told = json.loads(body)
            body = json.dumps(
                {k: v for k, v in told.items() if k not in ("time", "files", "attempt")}
            ).encode()
        elif path.name.endswith(".opex.json"):
            told = json.loads(body)
            meta = told.get("meta", {})
            notes = [n for n in meta.pop("notes", "").split("; ") if n and _LATE not in n]
            told["notes"] = notes
            body = json.dumps(told).encode()
        found[path.relative_to(folder).as_posix()] = body
    return found


def answered_twice(lines: Iterable[dict[str, Any]]) -> list[str]:
    """Jobs that daemons say to have answered more than once."""
    done = Counter(
        m[1] for line in lines if (m := re.fullmatch(r"job (.+?) done: .*", line["message"]))
    )
    return [
        f"job {name} was answered {count} times by the logs"
        for name, count in done.items()
        if count > 1
    ]
