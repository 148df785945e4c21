"""The janitor: returns files that no claim contains to `in/`, and removes what is not needed.

It moves nothing that a living worker's claim contains. The package's docstring says of each name
in `work/` whether and when the janitor removes it.

Limitations: files that a user puts into `work/` count as jobs that lost their claim, and
go to `in/`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from loguru import logger

from sam_poll.core.files import exists, free_suffix, move_new, with_suffix
from sam_poll.share.claims import liveness
from sam_poll.share.claims.model import WorkListing
from sam_poll.share.claims.store import ClaimStore
from sam_poll.share.layout import Layout
from sam_poll.share.path_holds import PathHolds

_TEMPORARY_ENDING = ".tmp"


class Janitor:
    """Cleans up `work/` for one daemon, on its scan thread. `now` is a monotonic clock."""

    def __init__(
        self,
        layout: Layout,
        claims: ClaimStore,
        lives: liveness.LivenessTracker,
        lease_s: float,
        holds: PathHolds,
    ) -> None:
        self._layout = layout
        self._claims = claims
        self._lives = lives
        self._lease_s = lease_s
        self._holds = holds
        self._first_seen: dict[str, float] = {}

    def tidy(self, listing: WorkListing, now: float) -> int:
        """Clean up by a listing of `work/`, and return the number of files returned to `in/`.

        Raises OSError.
        """
        strays = [path for path in listing.strays if not self._holds.blocks_stray(path)]
        moved = return_strays(
            self._layout, strays, lambda path, error: self._holds.failed_stray(error, path, now)
        )
        for nameless in (entry for entry in listing.claims if entry.hold is None):
            self._claims.drop_name(nameless)
        self._remove_unused(listing, now)
        self._remove_dead_heartbeats(listing, now)
        return moved

    def _remove_unused(self, listing: WorkListing, now: float) -> None:
        """Remove temporary files and empty folders that have been seen for a lease."""
        temporary = [name for name in listing.ours if name.endswith(_TEMPORARY_ENDING)]
        unused = (*listing.empty, *temporary)
        self._first_seen = {path: self._first_seen.get(path, now) for path in unused}
        for path, since in self._first_seen.items():
            if now - since <= self._lease_s:
                continue
            with contextlib.suppress(OSError):
                if path in temporary:
                    (self._layout.work / path).unlink()
                else:
                    (self._layout.work / path).rmdir()

    def _remove_dead_heartbeats(self, listing: WorkListing, now: float) -> None:
        """Remove the heartbeat files of dead workers that hold no claim."""
        holders = {entry.hold.worker for entry in listing.claims if entry.hold}
        known = {worker: name for name in listing.ours if (worker := liveness.worker_of_file(name))}
        known.pop(self._claims.worker, None)
        for worker, name in known.items():
            if worker not in holders and self._lives.dead(worker, now):
                # Another daemon's janitor may be quicker, or the name may be that of a folder.
                with contextlib.suppress(OSError):
                    (self._layout.work / name).unlink()
        self._lives.forget_all_but({*known, *holders})


def return_strays(
    layout: Layout,
    strays: list[str],
    held: Callable[[str, OSError], bool] = lambda path, error: False,
) -> int:
    """Move files in `work/` that no claim contains to `in/`, and return how many were moved.

    `strays` are their paths relative to `work/`. Files of one stem are moved together: where a
    name is taken in `in/`, picture and prompts get the same suffix. `held` is called for a file
    that cannot be moved; where it returns False, the error is raised.

    Raises OSError.
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
            # Pictures first, so that no prompt is ever in `in/` without its picture.
            for path in sorted(paths, key=lambda p: layout.is_prompt(os.path.basename(p))):
                with contextlib.suppress(FileNotFoundError):  # another janitor was quicker
                    moved += _move_back(layout, path, suffix)
        except OSError as error:
            if not held(path, error):
                raise
    if moved:
        logger.info("{} files in work/ had no claim: moved back to {}", moved, layout.input)
    return moved


def _move_back(layout: Layout, path: str, suffix: str) -> bool:
    target = with_suffix(layout.input / path, suffix)
    try:
        move_new(layout.work / path, target)
    except FileExistsError:
        if not exists(target):  # a file or a link has the name of the target's folder
            raise
        return False  # another janitor was quicker
    return True
