"""`python -m benchmarks.flushed`: the daemon, the loop, and a loop that flushes its files.

The loop of `sam-poll bench` leaves its files in the page cache; the daemon flushes each before it
is renamed. Both kinds of loop, and the daemon, take turns with the bundled model on pictures of
640×480; a ratio is made within a round.

Limitations: the folders are in TMPDIR; how long a flush takes is a matter of its disk.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable

from sam_poll.diagnostics.bench import dataset
from sam_poll.diagnostics.bench.checkpoints import weights_for
from sam_poll.diagnostics.bench.plan import SMALL
from sam_poll.diagnostics.bench.processes import scratch
from sam_poll.diagnostics.bench.run import Comparison


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=48)
    given = parser.parse_args()
    with scratch("sam_poll-flushed-") as root, contextlib.ExitStack() as stack:
        contest = Comparison(weights_for("demo", root), "cpu", root, stack, lambda text: None)
        pictures = dataset.draw_pictures(SMALL, 1)
        contest.warm_up(pictures)
        turns: dict[str, Callable[[], tuple[float, float]]] = {
            "loop": lambda: contest.looped(pictures, given.jobs),
            "loop that flushes": lambda: contest.looped(pictures, given.jobs, flush=True),
            "sam_poll": lambda: contest.answered(pictures, given.jobs),
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in turns}
        for _ in range(given.rounds):
            for name, run in turns.items():
                found[name].append(run())
    print(f"demo, {pictures.name}, {given.rounds} rounds of {given.jobs}")
    print("| | ms a picture | from – to | processor, ms | × sam_poll |\n|---|---:|---:|---:|---:|")
    ours = [wall for wall, _ in found["sam_poll"]]
    for name, rounds in found.items():
        walls = [1000 * wall for wall, _ in rounds]
        cpu = statistics.median(1000 * cpu for _, cpu in rounds)
        times = statistics.median(one[0] / our for one, our in zip(rounds, ours, strict=True))
        print(
            f"| {name} | {statistics.median(walls):.1f} | {min(walls):.1f} – {max(walls):.1f} "
            f"| {cpu:.1f} | {times:.2f} |"
        )


if __name__ == "__main__":
    main()
