"""The contestants' processes as objects: worker processes, and a real `sam-poll watch`.

Limitations: a benchmark that is killed (SIGKILL) leaves its temporary folder, which may be removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sam_poll.core import child_process
from sam_poll.diagnostics.bench.checkpoints import Weights
from sam_poll.diagnostics.bench.dataset import Pair, layout_in
from sam_poll.diagnostics.bench.plan import BenchError

ANSWERS = (".mask.png", ".opex.json")
_LOOKS_S = (
    0.001,
    0.02,
)  # between two looks for an answer: 0.5 % of what has passed, but within these
_PATIENCE_S = 600.0  # without any answer
_CHECK_S = 0.5  # between two looks whether it is still well
_STOP_S = 10.0
_OURS = (
    "SAM_POLL_PIPELINE__",
    "SAM_POLL_MEMORY__",
    "SAM_POLL_PRECISION",
    "SAM_POLL_RUNTIME",
    "SAM_POLL_COMPILE",
    "SAM_POLL_CACHE",
)


def environment(
    given: Mapping[str, str] = os.environ, more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return the environment of all contestants.

    It is the user's, without settings of sam_poll that do not change speed, plus `more`.
    """
    strange = ("SAM_POLL_", "MODEL")
    return {
        key: value
        for key, value in given.items()
        if not key.startswith(strange) or key.startswith(_OURS)
    } | dict(more or {})


def settings_in(env: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of sam_poll in the environment, for the report."""
    return {
        key: value
        for key, value in env.items()
        if key.startswith(_OURS) and key != "SAM_POLL_CACHE"
    }


def _names(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}


def cpu_s(pid: int) -> float:
    """Return the CPU seconds that a process has used so far (proc(5)). Raises OSError."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Child:
    """A process whose stderr goes into a file, so that its last lines can be shown."""

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        env: Mapping[str, str] | None = None,
        **pipes: Any,
    ) -> None:
        self.name, self._log = name, log
        with log.open("wb") as file:
            # A session of its own: Ctrl-C is for the benchmark, which ends it.
            self.process: subprocess.Popen[str] = subprocess.Popen(  # noqa: S603  ourselves
                [sys.executable, *arguments],
                stderr=file,
                env=environment(more=env),
                text=True,
                start_new_session=True,
                **pipes,
            )

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_STOP_S)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()

    @property
    def cpu_s(self) -> float:
        """CPU seconds used so far; 0 where the system does not tell."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            return cpu_s(self.process.pid)
        return 0.0

    @property
    def peak_mib(self) -> float:
        """Most main memory used so far; 0 where the system does not tell."""
        with contextlib.suppress(OSError, ValueError, StopIteration):
            lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
        return 0.0

    def trouble(self, reason: str) -> BenchError:
        """Return an error with the last lines of the process's log."""
        lines = [
            line for line in self._log.read_text("utf-8", "replace").splitlines() if line.strip()
        ]
        return BenchError(
            f"{reason}{': ' if lines else ''}{' / '.join(lines[-3:])}", place=self.name
        )


class Worker(Child):
    """`worker.main` in a process, ready when this returns."""

    def __init__(
        self, name: str, order: dict[str, Any], log: Path, env: Mapping[str, str] | None = None
    ) -> None:
        command = child_process.command("sam_poll.diagnostics.bench.worker", json.dumps(order))
        arguments = command[1:]  # without the interpreter
        super().__init__(name, arguments, log, env, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            self._answer()
        except BaseException:
            self.__exit__(BaseException, None, None)
            raise

    def __call__(self, **order: Any) -> dict[str, Any]:
        """Send an order and return the reply. Raises BenchError."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except OSError as error:
            raise self.trouble("ended") from error
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise self.trouble(f"ended with {self.process.returncode}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise BenchError(answer["error"], place=self.name)
        return answer


def paths(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    """As a worker takes them."""
    return [(str(pair.picture), str(pair.prompt)) for pair in pairs]


def model_order(kind: str, weights: Weights, device: str) -> dict[str, Any]:
    """Return the first order to a worker that loads a model."""
    return {
        "kind": kind,
        "checkpoint": str(weights.path),
        "config": weights.config,
        "device": device,
    }


class Daemon(Child):
    """`sam-poll watch` on a share of its own in `root`.

    `root/aside` is on the same file system, for files before they are moved into the share. `env`
    has settings to measure.
    """

    def __init__(
        self,
        weights: Weights,
        device: str,
        root: Path,
        log: Path,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.layout = layout_in(root)
        arguments = ["watch", str(self.layout.input), "--log", "text", "--log-level", "INFO"]
        arguments += ["--model", str(weights.path), "--device", device, "-f", "mask", "-f", "opex"]
        arguments += ["--model-cfg", weights.config] if weights.config else []
        command = child_process.command("sam_poll.diagnostics.bench.daemon", *arguments)
        super().__init__("sam-poll watch", command[1:], log, env, stdin=subprocess.PIPE)

    def run(self, pairs: Sequence[Pair]) -> float:
        """Move these pairs into the share and return the seconds until the last result.

        The time starts at the first rename. All files are removed afterwards.
        """
        wanted = {f"{pair.picture.stem}{suffix}" for pair in pairs for suffix in ANSWERS}
        started = time.perf_counter()
        for pair in pairs:
            pair.picture.rename(self.layout.input.path / pair.picture.name)
            pair.prompt.rename(self.layout.input.path / pair.prompt.name)
        self._until(lambda: wanted <= _names(self.layout.output.path))
        seconds = time.perf_counter() - started
        self._until(lambda: len(_names(self.layout.done.path)) >= 2 * len(pairs))
        for folder in (self.layout.output.path, self.layout.done.path):
            for name in _names(folder):
                (folder / name).unlink()
        return seconds

    def _until(self, there: Callable[[], bool]) -> None:
        started = checked = time.monotonic()
        while True:
            with contextlib.suppress(FileNotFoundError):  # the folders are made by the daemon
                if there():
                    return
            now = time.monotonic()
            if now - checked > _CHECK_S:
                checked = now
                self._check(now - started)
            time.sleep(min(max((now - started) / 200, _LOOKS_S[0]), _LOOKS_S[1]))

    def _check(self, waited_s: float) -> None:
        if self.process.poll() is not None:
            raise self.trouble(f"ended with {self.process.returncode}")
        if self.layout.failed.is_dir() and _names(self.layout.failed.path):
            raise self.trouble("a job was rejected")
        if waited_s > _PATIENCE_S:
            raise self.trouble(f"no answer within {_PATIENCE_S:.0f} s")


@contextlib.contextmanager
def scratch(prefix: str) -> Any:
    """Create a temporary folder (below TMPDIR) that is removed at the end, whatever happens."""
    import tempfile

    root = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)
