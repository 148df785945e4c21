"""Liveness of the daemon: systemd's watchdog, the heartbeat file, the alarm `stuck`.

That the process exists proves nothing. Three things must move: the loop that takes jobs in
(`intake`), the loop that feeds the network (`device`), and the jobs in progress, one of which may
hang while it reads or writes a file without stopping either loop. While all three have moved
within `stuck_s`, systemd gets WATCHDOG=1 and the heartbeat file is touched; when one has not, both
stop and the alarm names it.

Limitations: a single call that takes longer than `stuck_s` (a large network on a CPU) looks like a
hang. A heartbeat file on a share that hangs also stops the monitor's thread, which ends the same
way: the file is not touched any more.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from loguru import logger

from sam_poll.core.stats import LoopHeartbeat
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.text import shown

_TICK_S = 1.0
_SEND_S = 1.0
# Operators search the log for these texts; the part after the colon of the alarm is the likely
# cause.
_SCAN = "the scan has not moved"
_DEVICE = "the device loop has not moved"
_JOBS = "no job in progress has ended"
_CAUSES = {
    _SCAN: "does the share hang?",
    _DEVICE: "does the driver hang, or is stuck_s too short for the model?",
    _JOBS: "does the share hang, or is stuck_s too short for the model?",
}


class SystemdNotifier:
    """Sends state to systemd (`sd_notify`) through the socket that `NOTIFY_SOCKET` names.

    Without that variable nothing is sent.
    """

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        address = env.get("NOTIFY_SOCKET", "")
        # A leading @ stands for the abstract name space.
        self._address = "\0" + address[1:] if address.startswith("@") else address

    def __call__(self, *lines: str) -> bool:
        """Send lines like `READY=1`. Returns False if they were not sent, which is not an error."""
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.settimeout(_SEND_S)
                channel.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except (OSError, ValueError) as error:
            logger.debug("{} cannot be sent to systemd: {}", lines[0], error)
            return False
        return True


class LivenessFile:
    """A file whose age shows whether the daemon works.

    Failing to touch it is no error: the file then grows older, which is what it has to show.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._failure = ""

    def touch(self) -> None:
        """Set the file's time to now, creating it if needed.

        Neither follows a link nor blocks on a pipe.
        """
        if self._path is None:
            return
        failure = ""
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o644)
            try:
                os.utime(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            failure = error.strerror or str(error)
        if failure and failure != self._failure:
            logger.warning(
                "the heartbeat file {} cannot be touched: {}", shown(self._path), failure
            )
        self._failure = failure


class Monitor:
    """Checks every second that loops and jobs move, and reports to systemd, file and alarms.

    `with Monitor(…)`: entering sends READY=1, leaving STOPPING=1. `summary` makes the one line of
    systemd's STATUS.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        stop: threading.Event,
        *,
        stuck_s: float,
        file: Path | None = None,
        notify: SystemdNotifier | None = None,
        summary: Callable[[], str] = lambda: "",
        every_s: float = _TICK_S,
    ) -> None:
        self._telemetry = telemetry
        self._stop = stop
        self._stuck_s = stuck_s
        self._file = LivenessFile(file)
        self._notify = notify or SystemdNotifier({})
        self._summary = summary
        self._every_s = min(every_s, stuck_s / 4)
        self._status = ""
        self._stopping = False
        self._jobs = LoopHeartbeat()
        self._steps_seen = -1
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def __enter__(self) -> Monitor:
        # Loading the model may have taken longer than `stuck_s`.
        self._telemetry.intake.beat()
        self._telemetry.device.beat()
        self._notify("READY=1")
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        # Bounded: a heartbeat file that hangs must not delay the exit.
        self._thread.join(_SEND_S + self._every_s)
        self._notify_stopping()

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self.check()
            except Exception as error:  # noqa: BLE001  whatever it is, the next check may work
                logger.opt(exception=True).error("the monitor has failed: {}", error)
            self._end.wait(self._every_s)

    def check(self) -> bool:
        """Check once and report. Returns False when something is stuck.

        After `stop` nothing counts as stuck: the shutdown has a time limit of its own.
        """
        if self._stop.is_set():
            self._notify_stopping()
        self._check_jobs()
        stuck = self._stuck_parts()
        if stuck and not self._stop.is_set():
            self._telemetry.alarms.raise_("stuck", "; ".join(stuck))
        else:
            self._telemetry.alarms.clear("stuck")
            self._file.touch()
            self._notify("WATCHDOG=1")
        self._notify_status()
        return "stuck" not in self._telemetry.alarms

    def _stuck_parts(self) -> list[str]:
        heartbeats = {
            _SCAN: self._telemetry.intake,
            _DEVICE: self._telemetry.device,
            _JOBS: self._jobs,
        }
        # Without the age, which would make each check's message a new one for the log.
        return [
            f"{what} for over {self._stuck_s:g} s: {_CAUSES[what]}"
            for what, heartbeat in heartbeats.items()
            if heartbeat.age > self._stuck_s
        ]

    def _check_jobs(self) -> None:
        """Let the jobs' heart beat if they move.

        Jobs move when there are none, when one has ended or done a step, and while their outputs
        are retried.
        """
        now = self._telemetry.stats.now()
        steps = now.answered + now.rejected + sum(now.released.values()) + now.advances
        moved = steps != self._steps_seen
        if not now.at_work or moved or "output" in self._telemetry.alarms:
            self._steps_seen = steps
            self._jobs.beat()

    def _notify_status(self) -> None:
        status = shown(self._summary())
        if status != self._status:
            self._status = status
            self._notify(f"STATUS={status}")

    def _notify_stopping(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._notify("STOPPING=1")
