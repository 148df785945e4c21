"""Signs of life: each daemon touches one file in `work/`, and judges the others by whether theirs still change.

No two clocks are compared. A daemon is dead when its file has stayed the same for a whole lease by the *watcher's own*
monotonic clock; what the times in it say does not matter. On one machine a lock says so at once: the kernel lets go of
it when the process ends, however it ends.

What can still go wrong here: a daemon that is frozen, or cannot write for longer than a lease, is taken for dead and
loses its claims (see `claims`; it finds out when it wants to end them). A file server that caches attributes for
longer than a lease makes everybody look dead; a lease of 60 s is far above the 3 to 30 s that NFS and SMB cache.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from loguru import logger

from sam_poll.alarms import Alarms
from sam_poll.fs import NO_FILE, TEMP_PREFIX, json_of
from sam_poll.safe_path import SafePath

PREFIX = TEMP_PREFIX + "worker-"
ENDING = ".json"
_NO_LOCKS = "0"
_DISPATCHER = "dispatcher-"  # no host's name has a hyphen here, so that none can be taken for this
_PARTS = 4  # of other names: host, process, a number, boot
_BOOT = Path("/proc/sys/kernel/random/boot_id")
_MAX_BYTES = 1 << 20
_BEAT_S = 5.0  # at the latest: people read what it says


def boot() -> str:
    """Eight hex digits that are the same for all processes of this kernel, containers included; "0": not known."""
    try:
        return _BOOT.read_text().strip()[:8] or _NO_LOCKS
    except OSError:
        return _NO_LOCKS


class Life:
    """This daemon's own file. `with Life(folder, lease_s) as life:`; a thread touches it four times a lease or more.

    `dispatcher`: it claims so that others may run (`is_dispatcher`). `state` is asked for what else others should read
    there (`status`), `still_there` raises OSError when the share is away. OSError: the file cannot be made.
    """

    def __init__(
        self,
        folder: SafePath,
        lease_s: float,
        alarms: Alarms,
        *,
        dispatcher: bool = False,
        state: Callable[[], dict[str, Any]] | None = None,
        still_there: Callable[[], object] = lambda: None,
    ) -> None:
        self._folder, self._lease_s, self._alarms, self._state = folder, lease_s, alarms, state
        self._still_there = still_there
        host = re.sub(r"\W", "_", socket.gethostname(), flags=re.ASCII)[:24] or "host"
        # The last part tells two lives apart that had the same process number.
        self._name = f"{_DISPATCHER if dispatcher else ''}{host}-{os.getpid()}-{uuid4().hex[:6]}"
        self.worker = f"{self._name}-{_NO_LOCKS}"
        self._started = time.time()
        self._handle = -1
        self._mute = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    @property
    def path(self) -> SafePath:
        """The file."""
        return self._folder / f"{PREFIX}{self.worker}{ENDING}"

    def __enter__(self) -> Life:
        self._open()
        try:
            self._write()
        except FileNotFoundError:  # swept in this very moment, by one who takes new daemons for dead ones
            self._write()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(5)  # it may hang in a share that does not answer
        self._close()

    def remove(self) -> None:
        """Nothing is claimed any more: no need to be remembered."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _open(self) -> None:
        """Locked before it has its name, so that nobody ever finds it without its lock."""
        temporary = self._folder / f"{TEMP_PREFIX}{self._name}-{uuid4().hex[:6]}.tmp"
        self._handle = temporary.open_file(os.O_RDWR | os.O_CREAT | os.O_EXCL)
        tag = boot() if _lock(self._handle, exclusive=True) else _NO_LOCKS
        self.worker = f"{self._name}-{tag}"
        temporary.rename(self.path)

    def _close(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            with contextlib.suppress(OSError):
                os.close(handle)

    def _run(self) -> None:
        while not self._end.wait(min(self._lease_s / 4, _BEAT_S)):
            try:
                self._write()
                self._alarms.clear("lease")
            except OSError as error:
                self._alarms.raise_(
                    "lease", f"no sign of life can be given in {self._folder} ({error}): others may take our jobs over"
                )

    def _write(self) -> None:
        self._folder.root.renew()  # others look at the folder that lies there now
        if not self._is_ours():  # swept by one who took us for dead, or `work/` was away or made anew
            self._still_there()
            self._again()
        body = self._said()
        with contextlib.suppress(OSError):  # the disk is full: what is said is old then, but it is a sign of life
            os.pwrite(self._handle, body, 0)
            os.ftruncate(self._handle, len(body))
        os.utime(self._handle)

    def _is_ours(self) -> bool:
        """Whether the file that others see is the one that we have locked."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._handle), self.path.lstat())
        return False

    def _said(self) -> bytes:
        known = {
            "worker": self.worker,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "lease_s": self._lease_s,
            "started": self._started,
        }
        try:
            return json.dumps({**known, **(self._state() if self._state else {})}, default=str).encode()
        except Exception:  # noqa: BLE001  a bug in what is told must not cost the claims
            if not self._mute:
                logger.exception("what this daemon does cannot be told to others")
            self._mute = True
            return json.dumps(known).encode()

    def _again(self) -> None:
        before = self.worker
        self._close()
        self._open()
        if self.worker != before:  # claims bear the name; it must not change, whatever the lock says now
            self.path.rename(self._folder / f"{PREFIX}{before}{ENDING}")
            self.worker = before


def is_dispatcher(worker: str) -> bool:
    """Whether a daemon of this name runs nothing itself: what bears its name waits for a worker."""
    return worker.startswith(_DISPATCHER) and worker.count("-") == _PARTS


def _lock(handle: int, *, exclusive: bool) -> bool:
    """Whether the lock was granted. False also where there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _is_held(handle: int, worker: str, here: str) -> bool | None:
    """Whether the lock of a daemon's file is held; None where only another machine could tell. `here` is our boot."""
    if here == _NO_LOCKS or not worker.endswith(f"-{here}"):
        return None
    return not _lock(handle, exclusive=False)


class Watch:
    """What one daemon knows of the others' lives. Used by one thread; `now` is its monotonic clock."""

    def __init__(self, folder: SafePath, lease_s: float) -> None:
        self._folder, self._lease_s = folder, lease_s
        self._boot = boot()
        self._seen: dict[str, tuple[tuple[int, int] | None, float]] = {}
        self._moved: set[str] = set()

    def dead(self, worker: str, now: float) -> bool:
        """Whether this daemon has given no sign of life for a lease, or has let go of its lock on this machine."""
        stamp, locked = self._look(worker)
        before = self._seen.get(worker)
        if before is None or before[0] != stamp:
            self._seen[worker] = (stamp, now)
            if before is not None:
                self._moved.add(worker)
        return locked is False or now - self._seen[worker][1] > self._lease_s

    def expires(self, worker: str) -> float:
        """When this daemon, seen before, is dead if it stays as it is."""
        return self._seen[worker][1] + self._lease_s

    def unsure(self, worker: str) -> bool:
        """Not known to be alive: its file has not changed since it was first seen, and no lock tells."""
        return worker not in self._moved and self._look(worker)[1] is not True

    def forget_all_but(self, workers: set[str]) -> None:
        """Drop those that nothing bears the name of any more."""
        self._seen = {worker: seen for worker, seen in self._seen.items() if worker in workers}
        self._moved &= workers

    def _look(self, worker: str) -> tuple[tuple[int, int] | None, bool | None]:
        """Time of change and inode of its file (None: no file), and whether its lock is held (None: nobody can tell).

        Opening makes a network file system ask the server instead of its cache.
        """
        try:
            handle = (self._folder / f"{PREFIX}{worker}{ENDING}").open_file(os.O_RDONLY)
        except OSError as error:
            if error.errno in NO_FILE or isinstance(error, FileNotFoundError):
                return None, None
            raise
        try:
            found = os.fstat(handle)
            return (found.st_mtime_ns, found.st_ino), _is_held(handle, worker, self._boot)
        finally:
            os.close(handle)


def workers(folder: SafePath) -> Iterator[tuple[str, SafePath]]:
    """All daemons' files in `work/`: name and path."""
    with contextlib.suppress(FileNotFoundError):
        for name in folder.names():
            worker = worker_of(name)
            if worker:
                yield worker, folder / name


def worker_of(name: str) -> str | None:
    """Whose sign of life a file is by its name; None where it is none."""
    return name[len(PREFIX) : -len(ENDING)] if name.startswith(PREFIX) and name.endswith(ENDING) else None


def read(worker: str, path: SafePath, now: float) -> dict[str, Any] | None:
    """What a daemon last wrote about itself, with `alive` and `beat_s`; None when its file has just gone.

    `alive` is a guess from the times in it: for people, not for the protocol.
    """
    try:
        with path.open() as file:
            beat = max(0.0, now - os.fstat(file.fileno()).st_mtime)
            body = file.read(_MAX_BYTES)
            held = _is_held(file.fileno(), worker, boot())
    except OSError:
        return None
    try:
        said = json_of(body)
    except ValueError:  # read while it was written
        said = {}
    said = said if isinstance(said, dict) else {}
    told = said.get("lease_s")
    lease_s = told if isinstance(told, int | float) else 60.0
    return {**said, "worker": worker, "beat_s": round(beat, 1), "alive": held is not False and beat <= lease_s}
