"""The janitor: puts back and sweeps what nobody works on. It moves nothing that a living daemon holds.

What can still go wrong here: somebody's own files in `work/` count as jobs that lost their way, and go to `in/`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from loguru import logger

from sam_poll.doors import lease
from sam_poll.doors.claims import Claims, Listing
from sam_poll.doors.layout import Layout
from sam_poll.doors.path_holds import PathHolds
from sam_poll.fs import exists, free_suffix, move_new, with_suffix


class Janitor:
    """Works for one daemon, on its scan thread. `now` is a monotonic clock."""

    def __init__(self, layout: Layout, claims: Claims, lives: lease.Watch, lease_s: float, holds: PathHolds) -> None:
        self._layout, self._claims, self._lives, self._lease_s, self._holds = layout, claims, lives, lease_s, holds
        self._since: dict[str, float] = {}

    def tidy(self, listing: Listing, now: float) -> int:
        """Sweep, given a listing of `work/`. Returns how many files are back in `in/`. OSError."""
        strays = [path for path in listing.strays if not self._holds.blocks_stray(path)]
        moved = put_back(self._layout, strays, lambda path, error: self._holds.failed_stray(error, path, now))
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
        return moved

    def _forget_the_dead(self, listing: Listing, now: float) -> None:
        holders = {f.hold.worker for f in listing.claims if f.hold}
        known = {worker: name for name in listing.ours if (worker := lease.worker_of(name))}
        known.pop(self._claims.worker, None)
        for worker, name in known.items():
            if worker not in holders and self._lives.dead(worker, now):
                with contextlib.suppress(OSError):  # another daemon's janitor was quicker, or it is none of ours
                    (self._layout.work / name).unlink()
        self._lives.forget_all_but({*known, *holders})


def put_back(
    layout: Layout, strays: list[str], held: Callable[[str, OSError], bool] = lambda path, error: False
) -> int:
    """Move files that lie in `work/` outside of any claim to `in/`, those of one stem together; how many it were.

    A name that is taken in `in/` gets a suffix, the same for picture and prompts. `held` is told of a file that cannot
    be moved; where it returns False, that is raised. OSError.
    """
    groups: dict[str, list[str]] = {}
    for path in strays:
        folder, _, name = path.rpartition("/")
        groups.setdefault(f"{folder}/{name.split('.')[0]}", []).append(path)
    moved = 0
    for paths in groups.values():
        path = paths[0]
        try:
            suffix = free_suffix([layout.input / p for p in paths])
            for path in sorted(
                paths, key=lambda p: layout.is_prompt(os.path.basename(p))
            ):  # a prompt never waits alone
                with contextlib.suppress(FileNotFoundError):  # another daemon's janitor was quicker
                    moved += _moved_back(layout, path, suffix)
        except OSError as error:
            if not held(path, error):
                raise
    if moved:
        logger.info("{} files lay in work/ without a claim: they are back in {}", moved, layout.input)
    return moved


def _moved_back(layout: Layout, path: str, suffix: str) -> bool:
    target = with_suffix(layout.input / path, suffix)
    try:
        move_new(layout.work / path, target)
    except FileExistsError:
        if not exists(target):  # a file or a link has the place of its folder
            raise
        return False  # another daemon's janitor was quicker
    return True
