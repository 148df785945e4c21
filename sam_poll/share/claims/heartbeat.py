"""The heartbeat file that each worker keeps in `work/`, so that others can tell whether it lives.

`liveness` judges workers by these files. Which times count, and when a claim's holder counts as
dead, is written there; this module only writes.

Besides its time of change, the file has a lock where the system has locks: the kernel releases it
when the process ends, however that happens. The last part of a worker's name says which kernel's
lock it is.

Limitations: a worker that is frozen, or cannot write for longer than a lease, counts as dead and
loses its claims. It notices when it tries to end them (`ClaimStore.alive`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from loguru import logger

from sam_poll.core.alarms import Alarms
from sam_poll.core.files import TEMP_PREFIX
from sam_poll.core.safe_path import SafePath

PREFIX = TEMP_PREFIX + "worker-"
ENDING = ".json"
MAX_BYTES = 1 << 20
"""Size of a heartbeat file beyond which the rest is not read."""
BEATS_PER_LEASE = 4
LONGEST_INTERVAL_S = 5.0
"""Longest time between two heartbeats, because people read the file, too (`sam-poll status`)."""

_NO_LOCKS = "0"
_DISPATCHER = "dispatcher-"  # in a worker's name no host has a hyphen, so none looks like this
_NAME_PARTS = 4  # after "dispatcher": host, process, random number, boot
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_JOIN_S = 5


def boot_id() -> str:
    """Return eight hex digits that all processes of this kernel share, those of containers, too.

    Returns "0" where the system does not tell.
    """
    try:
        return _BOOT_ID.read_text().strip()[:8] or _NO_LOCKS
    except OSError:
        return _NO_LOCKS


class WorkerHeartbeat:
    """The worker's own heartbeat file.

    `with WorkerHeartbeat(folder, lease_s, alarms) as heartbeat: …`. A thread writes it
    `BEATS_PER_LEASE` times a lease, and at least every `LONGEST_INTERVAL_S`. `dispatcher`: this
    worker claims jobs so that others may run them (see `is_dispatcher`). `state` returns what else
    others should read there (`sam-poll status`). `check_mounted` raises OSError when the share is
    away. Entering raises OSError where the file cannot be made.
    """

    def __init__(
        self,
        folder: SafePath,
        lease_s: float,
        alarms: Alarms,
        *,
        dispatcher: bool = False,
        state: Callable[[], dict[str, Any]] | None = None,
        check_mounted: Callable[[], object] = lambda: None,
    ) -> None:
        self._folder = folder
        self._lease_s = lease_s
        self._alarms = alarms
        self._state = state
        self._check_mounted = check_mounted
        host = re.sub(r"\W", "_", socket.gethostname(), flags=re.ASCII)[:24] or "host"
        # The random number distinguishes two processes that had the same process number.
        self._name = f"{_DISPATCHER if dispatcher else ''}{host}-{os.getpid()}-{uuid4().hex[:6]}"
        self.worker = f"{self._name}-{_NO_LOCKS}"
        self._started = time.time()
        self._handle = -1
        self._state_failed = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    @property
    def path(self) -> SafePath:
        """Return the file's path."""
        return self._folder / f"{PREFIX}{self.worker}{ENDING}"

    def __enter__(self) -> WorkerHeartbeat:
        self._open()
        try:
            self._write()
        except FileNotFoundError:
            # Removed at this moment, by a janitor that takes a new worker for a dead one.
            self._write()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)  # it may hang in a share that does not answer
        self._close()

    def remove(self) -> None:
        """Remove the file; for a worker that holds no claim any more."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)

    def _open(self) -> None:
        """Make the file. It is locked before it has its name, so that it is never seen unlocked."""
        temporary = self._folder / f"{TEMP_PREFIX}{self._name}-{uuid4().hex[:6]}.tmp"
        self._handle = temporary.open_file(os.O_RDWR | os.O_CREAT | os.O_EXCL)
        tag = boot_id() if _lock(self._handle, exclusive=True) else _NO_LOCKS
        self.worker = f"{self._name}-{tag}"
        temporary.rename(self.path)

    def _close(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            with contextlib.suppress(OSError):
                os.close(handle)

    def _run(self) -> None:
        while not self._end.wait(min(self._lease_s / BEATS_PER_LEASE, LONGEST_INTERVAL_S)):
            try:
                self._write()
                self._alarms.clear("lease")
            except OSError as error:
                self._alarms.raise_(
                    "lease",
                    f"the heartbeat file in {self._folder} cannot be written ({error}): other"
                    " workers may take over this one's jobs",
                )

    def _write(self) -> None:
        self._folder.root.renew()  # others see the folder that is there now
        if not self._is_ours():
            # Removed by a worker that took this one for dead; or `work/` was away, or made again.
            self._check_mounted()
            self._open_again()
        body = self._body()
        # A full disk makes what the file says old. Its time still shows that this worker lives.
        with contextlib.suppress(OSError):
            os.pwrite(self._handle, body, 0)
            os.ftruncate(self._handle, len(body))
        os.utime(self._handle)

    def _is_ours(self) -> bool:
        """Return whether the file that others see is the one that this process has locked."""
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self._handle), self.path.lstat())
        return False

    def _body(self) -> bytes:
        known = {
            "worker": self.worker,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "lease_s": self._lease_s,
            "started": self._started,
        }
        try:
            state = self._state() if self._state else {}
            return json.dumps({**known, **state}, default=str).encode()
        except Exception:  # noqa: BLE001  a bug in `state` must not cost the claims
            if not self._state_failed:
                logger.exception("the state of this worker cannot be written for others to read")
            self._state_failed = True
            return json.dumps(known).encode()

    def _open_again(self) -> None:
        before = self.worker
        self._close()
        self._open()
        # Claims bear the worker's name, so it must not change, whatever the lock says now.
        if self.worker != before:
            self.path.rename(self._folder / f"{PREFIX}{before}{ENDING}")
            self.worker = before


def is_dispatcher(worker: str) -> bool:
    """Return whether a worker of this name runs nothing itself: its claims wait for others."""
    return worker.startswith(_DISPATCHER) and worker.count("-") == _NAME_PARTS


def is_locked(handle: int, worker: str, this_boot: str) -> bool | None:
    """Return whether a worker holds the lock of its open heartbeat file.

    Returns None where only another machine could tell. `this_boot` is this kernel's `boot_id()`.
    """
    if this_boot == _NO_LOCKS or not worker.endswith(f"-{this_boot}"):
        return None
    return not _lock(handle, exclusive=False)


def _lock(handle: int, *, exclusive: bool) -> bool:
    """Return whether the lock was granted; False also where the system has no locks."""
    try:
        import fcntl

        fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True
