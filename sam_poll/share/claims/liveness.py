"""The one place that says when a claim's holder counts as dead: `LivenessTracker.dead`.

Each worker keeps a heartbeat file in `work/` (`heartbeat`). A worker is dead, and its claims may
be taken over, when either

- its heartbeat file has not changed (time of change and inode) for more than one lease, measured
  by the monotonic clock of the worker that watches. A missing file counts as one that does not
  change; or
- it runs on this machine, and the lock of its heartbeat file is free. The kernel releases the lock
  when the process ends, however that happens, so on one machine there is no wait.

A lock that is still held does not prove the opposite: a frozen process keeps its lock, and is dead
after a lease all the same. Clocks of two machines are never compared: whether the file's time
changes counts, its value does not.

The lease (setting `lease_s`):

- 60 s by default. That is far more than the 3 to 30 s for which NFS and SMB cache attributes;
- a heartbeat is written four times a lease, and at least every 5 s (`heartbeat.BEATS_PER_LEASE`,
  `heartbeat.LONGEST_INTERVAL_S`): with 60 s every 5 s, so that 12 in a row must fail;
- claims are looked at in each scan, so that a dead worker's claim is taken over within one lease
  and one scan (`watch.rescan_s`, 10 s by default) of its last heartbeat; on one machine within
  one scan;
- a worker is first seen when it is first looked at: a daemon that starts judges no worker dead by
  the lease before a whole lease has passed;
- files and folders in `work/` that nothing needs any more are removed after one lease, too
  (`cleanup`, `mosaic_workspace`).

Limitations: a worker that is frozen, or cannot write for longer than a lease, counts as dead and
loses its claims. A file server that caches attributes for longer than a lease makes all workers of
other machines look dead.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from sam_poll.core.files import NO_FILE, parse_json
from sam_poll.core.safe_path import SafePath
from sam_poll.share.claims.heartbeat import ENDING, MAX_BYTES, PREFIX, boot_id, is_locked

_DEFAULT_LEASE_S = 60.0


class _Observation(NamedTuple):
    """A heartbeat file at one moment.

    `stamp`: its time of change in ns and its inode; None where there is no file. `locked`: whether
    its worker holds the lock; None where only another machine could tell.
    """

    stamp: tuple[int, int] | None
    locked: bool | None


class LivenessTracker:
    """What this worker knows about the others. Used by one thread; `now` is its monotonic clock."""

    def __init__(self, folder: SafePath, lease_s: float) -> None:
        self._folder, self._lease_s = folder, lease_s
        self._boot = boot_id()
        self._seen: dict[str, tuple[tuple[int, int] | None, float]] = {}
        self._moved: set[str] = set()

    def dead(self, worker: str, now: float) -> bool:
        """Return whether a worker is dead, by the rule of this module. Raises OSError."""
        stamp, locked = self._observe(worker)
        before = self._seen.get(worker)
        if before is None or before[0] != stamp:
            self._seen[worker] = (stamp, now)
            if before is not None:
                self._moved.add(worker)
        return locked is False or now - self._seen[worker][1] > self._lease_s

    def expires(self, worker: str) -> float:
        """Return when a worker, seen before, is dead if its file does not change."""
        return self._seen[worker][1] + self._lease_s

    def unsure(self, worker: str) -> bool:
        """Return whether nothing shows yet that a worker lives.

        Its file has not changed since it was first seen, and no lock tells. Raises OSError.
        """
        return worker not in self._moved and self._observe(worker).locked is not True

    def forget_all_but(self, names: set[str]) -> None:
        """Forget other workers, which no file and no claim names any more."""
        self._seen = {worker: seen for worker, seen in self._seen.items() if worker in names}
        self._moved &= names

    def _observe(self, worker: str) -> _Observation:
        """Look at a worker's file. Raises OSError.

        Opening it makes a network file system ask the server instead of its cache.
        """
        try:
            handle = (self._folder / f"{PREFIX}{worker}{ENDING}").open_file(os.O_RDONLY)
        except OSError as error:
            if error.errno in NO_FILE or isinstance(error, FileNotFoundError):
                return _Observation(None, None)
            raise
        try:
            status = os.fstat(handle)
            locked = is_locked(handle, worker, self._boot)
            return _Observation((status.st_mtime_ns, status.st_ino), locked)
        finally:
            os.close(handle)


def heartbeat_files(folder: SafePath) -> Iterator[tuple[str, SafePath]]:
    """Yield the name and the heartbeat file of each worker that has one in `work/`."""
    with contextlib.suppress(FileNotFoundError):
        for name in folder.names():
            worker = worker_of_file(name)
            if worker:
                yield worker, folder / name


def worker_of_file(name: str) -> str | None:
    """Return the worker whose heartbeat file has this name; None where it is another file's."""
    if name.startswith(PREFIX) and name.endswith(ENDING):
        return name[len(PREFIX) : -len(ENDING)]
    return None


def read_heartbeat(worker: str, path: SafePath, now: float) -> dict[str, Any] | None:
    """Return what a worker last wrote in its heartbeat file, with `alive` and `beat_s`.

    `now` is wall-clock time. `beat_s` is the file's age in seconds. `alive` compares this
    machine's clock with the file's time: a guess for people, which the protocol does not use.
    Returns None when the file has just gone.
    """
    try:
        with path.open() as file:
            beat = max(0.0, now - os.fstat(file.fileno()).st_mtime)
            body = file.read(MAX_BYTES)
            locked = is_locked(file.fileno(), worker, boot_id())
    except OSError:
        return None
    try:
        written = parse_json(body)
    except ValueError:  # read while it was written
        written = {}
    if not isinstance(written, dict):
        written = {}
    lease_s = written.get("lease_s")
    if not isinstance(lease_s, int | float):
        lease_s = _DEFAULT_LEASE_S
    return {
        **written,
        "worker": worker,
        "beat_s": round(beat, 1),
        "alive": locked is not False and beat <= lease_s,
    }
