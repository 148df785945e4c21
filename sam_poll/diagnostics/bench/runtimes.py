"""The runtimes of the image encoder side by side, with each model: torch and OpenVINO, on a CPU.

Of each runtime there is a daemon and a bare network, both with the same weights. They take turns,
round by round.

Limitations: the time of a conversion, which is made once, is not in the figures.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sam_poll.diagnostics.bench.checkpoints import Weights
from sam_poll.diagnostics.bench.dataset import Supply, TestImages
from sam_poll.diagnostics.bench.processes import Daemon, Worker, model_order, paths

RUNTIMES = ("torch", "openvino")
LOAD_TIMEOUT_S = 1800
LEAST_JOBS, MOST_JOBS = 4, 48


class _Runtime:
    """A daemon and a bare network that run the encoder in one runtime."""

    def __init__(
        self, name: str, weights: Weights, device: str, root: Path, stack: contextlib.ExitStack
    ) -> None:
        # On a busy machine a conversion may take longer than a daemon would wait for it.
        env = {"SAM_POLL_RUNTIME": name, "SAM_POLL_LOAD_TIMEOUT_S": str(LOAD_TIMEOUT_S)}
        self.name = name
        share = root / name
        self.supply = Supply(share / "aside")
        # The bare network first: it converts, where that must be done, and says when it is ready.
        self.limit: Worker = stack.enter_context(
            Worker(
                f"the bare network in {name}",
                model_order("limit", weights, device),
                root / f"{name}-limit.log",
                env,
            )
        )
        self.daemon: Daemon = stack.enter_context(
            Daemon(weights, device, share, root / f"{name}-daemon.log", env)
        )
        self.found: dict[str, Any] = {"sam_poll": [], "limit": [], "cpu_s": []}

    def warm_up(self, subject: TestImages) -> float:
        """Answer one picture; return the seconds that the bare network takes for the next."""
        pairs = paths(self.supply.pairs(subject, len(subject.jpegs)))
        self.found["step"] = self.limit(pairs=pairs)["step"]
        if ("OpenVINO" in self.found["step"]) != (self.name == "openvino"):
            raise self.limit.trouble("the encoder does not run in this runtime")
        self.daemon.run(self.supply.pairs(subject, 1))
        self.limit(batches=1)
        return float(self.limit(batches=1)["seconds"])

    def round(self, subject: TestImages, jobs: int) -> None:
        """Measure one figure of both."""
        pairs = self.supply.pairs(subject, jobs)
        before = self.daemon.cpu_s
        self.found["sam_poll"].append(self.daemon.run(pairs) / jobs)
        self.found["cpu_s"].append((self.daemon.cpu_s - before) / jobs)
        self.found["limit"].append(self.limit(batches=max(1, jobs // 2))["seconds"])
        self.found["peak_mib"] = self.daemon.peak_mib


def measure(
    weights: Weights,
    device: str,
    root: Path,
    subject: TestImages,
    *,
    jobs: int | None,
    rounds: int,
    round_s: float,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Return seconds a picture by runtime, of the daemon and the bare network, one each round.

    `jobs` a round, None: as many as take about `round_s`. Raises BenchError.
    """
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        runtimes: dict[str, _Runtime] = {}
        for name in RUNTIMES:
            tell(f"{weights.name}: loading in {name}, twice")
            runtimes[name] = _Runtime(name, weights, device, root, stack)
        seconds = [runtime.warm_up(subject) for runtime in runtimes.values()]
        chosen = jobs or min(max(round(round_s / min(seconds)), LEAST_JOBS), MOST_JOBS)
        for number in range(1, rounds + 1):
            for name, runtime in runtimes.items():
                tell(f"{weights.name}, {subject.name}, round {number} of {rounds}: {name}")
                runtime.round(subject, chosen)
        return {
            "model": weights.name,
            "pictures": subject.name,
            "jobs": chosen,
            "rows": {name: runtime.found for name, runtime in runtimes.items()},
        }
