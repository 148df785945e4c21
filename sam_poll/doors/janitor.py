"""The janitor: puts back and sweeps what nobody works on. It moves nothing that a living daemon holds.

What can still go wrong here: somebody's own files in `work/` count as jobs that lost their way, and go to `in/`.
"""

from __future__ import annotations

import contextlib
import os

from loguru import logger

from sam_poll.doors import lease
from sam_poll.doors.claims import Claims, Listing
from sam_poll.doors.layout import Layout
from sam_poll.fs import free_suffix, move_new, with_suffix


class Janitor:
    """Works for one daemon, on its scan thread. `now` is a monotonic clock."""

    def __init__(self, layout: Layout, claims: Claims, lives: lease.Watch, lease_s: float) -> None:
        self._layout, self._claims, self._lives, self._lease_s = layout, claims, lives, lease_s
        self._since: dict[str, float] = {}

    def tidy(self, listing: Listing, now: float) -> None:
        """Sweep, given a listing of `work/`. OSError."""
        if listing.strays:
            put_back(self._layout, listing.strays)
        for bare in (f for f in listing.claims if f.hold is None):
            self._claims.drop_name(bare)
        halves = [name for name in listing.ours if name.endswith(".tmp")]  # of workers' files and the sentinel
        self._since = {path: self._since.get(path, now) for path in (*listing.empty, *halves)}
        for path in [path for path, since in self._since.items() if now - since > self._lease_s]:
            with contextlib.suppress(OSError):
                if path in halves:
                    (self._layout.work / path).unlink()
                else:
                    (self._layout.work / path).rmdir()
        self._forget_the_dead(listing, now)

    def _forget_the_dead(self, listing: Listing, now: float) -> None:
        holders = {f.hold.worker for f in listing.claims if f.hold}
        known = {worker: name for name in listing.ours if (worker := lease.worker_of(name))}
        known.pop(self._claims.worker, None)
        for worker, name in known.items():
            if worker not in holders and self._lives.dead(worker, now):
                with contextlib.suppress(OSError):  # another daemon's janitor was quicker, or it is none of ours
                    (self._layout.work / name).unlink()
        self._lives.forget_all_but({*known, *holders})


def put_back(layout: Layout, strays: list[str]) -> int:
    """Move files that lie in `work/` outside of any claim to `in/`, those of one stem together; how many it were.

    A name that is taken in `in/` gets a suffix, the same for picture and prompts.
    """
    groups: dict[str, list[str]] = {}
    for path in strays:
        folder, _, name = path.rpartition("/")
        groups.setdefault(f"{folder}/{name.split('.')[0]}", []).append(path)
    moved = 0
    for paths in groups.values():
        suffix = free_suffix([layout.input / p for p in paths])
        for path in sorted(paths, key=lambda p: layout.is_prompt(os.path.basename(p))):  # a prompt never waits alone
            with contextlib.suppress(FileNotFoundError, FileExistsError):  # another daemon's janitor was quicker
                move_new(layout.work / path, with_suffix(layout.input / path, suffix))
                moved += 1
    if moved:
        logger.info("{} files lay in work/ without a claim: they are back in {}", moved, layout.input)
    return moved
