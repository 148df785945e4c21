"""Is the daemon alive, and who hears of it: systemd's watchdog, a heartbeat file, the alarm `stuck`.

A process that exists proves nothing. What counts is that its two loops move, the one that looks for jobs (`intake`) and
the one that feeds the network (`device`), and that jobs at work come to an end: one that hangs while it reads or writes
a file moves no loop. As long as all have moved within `stuck_s`, systemd gets its WATCHDOG=1 and the heartbeat file is
touched; when one has not, both stop, and the alarm names it.

What can still go wrong here: a single call that really takes longer than `stuck_s` (a large network on a CPU) looks
like a hang; a heartbeat file on a share that hangs stops this thread, too, which ends the same way.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from loguru import logger

from sam_poll import __version__
from sam_poll.alarms import Alarms
from sam_poll.fs import shown
from sam_poll.stats import Pulse, Stats
from sam_poll.types import ModelInfo

_TICK_S = 1.0
_SEND_S = 1.0
_STUCK = {
    "the scan has not moved": "does the share hang?",
    "the device loop has not moved": "does the driver hang, or is stuck_s too short for the model?",
    "no job at work has ended": "does the share hang, or is stuck_s too short for the model?",
}


class Runs(Protocol):
    """An engine, or several behind one door."""

    @property
    def info(self) -> ModelInfo: ...


class Signs:
    """All there is to see of a running daemon. The network is not there until it is loaded."""

    def __init__(self) -> None:
        self.stats, self.alarms = Stats(), Alarms()
        self.intake, self.device = Pulse(), Pulse()
        self.engine: Runs | None = None
        self.formats: tuple[str, ...] = ()
        """The formats of the answers; empty where nothing is answered, or each request chooses."""

    @property
    def info(self) -> ModelInfo | None:
        """Which network answers; None while it is being loaded."""
        return self.engine.info if self.engine else None

    @property
    def ooms(self) -> int:
        """How often the device's memory has not been enough."""
        return int(getattr(self.engine, "ooms", 0))

    def state(self) -> dict[str, Any]:
        """What others on the share may know of this daemon, for JSON: `sam-poll status` shows it."""
        now, info = self.stats.now(), self.info
        return {
            "version": __version__,
            "model": info.name if info else None,
            "device": info.device if info else None,
            "step": info.step if info else None,
            "formats": list(self.formats),
            "answered": now.answered,
            "rejected": now.rejected,
            "at_work": now.at_work,
            "alarms": [
                {"kind": alarm.kind, "message": alarm.message, "seconds": round(alarm.seconds, 1)}
                for alarm in self.alarms.active()
            ],
        }


class Notifier:
    """Words to systemd (`sd_notify`) through the socket that `NOTIFY_SOCKET` names; without one, nothing happens."""

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        address = env.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address  # @ is the abstract name space

    def __call__(self, *lines: str) -> bool:
        """Send lines like `READY=1`. False: nobody has heard them, which is never an error."""
        if not self._address:
            return False
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
                channel.settimeout(_SEND_S)
                channel.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
        except (OSError, ValueError) as error:
            logger.debug("systemd cannot be told {}: {}", lines[0], error)
            return False
        return True


class Heartbeat:
    """The file whose age tells others that the daemon works. It may fail: then its age grows, which is the message."""

    def __init__(self, path: Path | None) -> None:
        self._path, self._failure = path, ""

    def touch(self) -> None:
        """Set its time to now; made if it is not there. Never through a link, never blocking on a pipe."""
        if self._path is None:
            return
        failure = ""
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(self._path, flags, 0o644)
            try:
                os.utime(handle)
            finally:
                os.close(handle)
        except OSError as error:
            failure = error.strerror or str(error)
        if failure and failure != self._failure:
            logger.warning("the heartbeat file {} cannot be touched: {}", shown(self._path), failure)
        self._failure = failure


class Monitor:
    """Looks every second at the two pulses and tells systemd, the heartbeat file and the alarms what it sees.

    `with Monitor(…)`: entering says READY=1, leaving STOPPING=1. `summary` is one line for systemd's STATUS.
    """

    def __init__(
        self,
        signs: Signs,
        stop: threading.Event,
        *,
        stuck_s: float,
        file: Path | None = None,
        notify: Notifier | None = None,
        summary: Callable[[], str] = lambda: "",
        every_s: float = _TICK_S,
    ) -> None:
        self._signs, self._stop, self._stuck_s = signs, stop, stuck_s
        self._heartbeat, self._notify = Heartbeat(file), notify or Notifier({})
        self._summary, self._every_s = summary, min(every_s, stuck_s / 4)
        self._status = ""
        self._stopping = False
        self._jobs, self._ended = Pulse(), -1
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def __enter__(self) -> Monitor:
        self._signs.intake.beat()  # the model may have taken its time to load
        self._signs.device.beat()
        self._notify("READY=1")
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._end.set()
        self._thread.join(_SEND_S + self._every_s)  # a heartbeat file that hangs must not hold the end up
        self._say_stopping()

    def _run(self) -> None:
        while not self._end.is_set():
            try:
                self.look()
            except Exception as error:  # noqa: BLE001  whatever it is, the next look may work
                logger.opt(exception=True).error("the monitor has failed: {}", error)
            self._end.wait(self._every_s)

    def look(self) -> bool:
        """One look: False when a loop is stuck. After `stop` nothing is: the end has a limit of its own."""
        if self._stop.is_set():
            self._say_stopping()
        self._look_at_jobs()
        pulses = zip(_STUCK.items(), (self._signs.intake, self._signs.device, self._jobs), strict=True)
        # Without the age, which would make each look's message a new one for the log.
        stuck = [f"{what} for over {self._stuck_s:g} s: {why}" for (what, why), p in pulses if p.age > self._stuck_s]
        if stuck and not self._stop.is_set():
            self._signs.alarms.raise_("stuck", "; ".join(stuck))
        else:
            self._signs.alarms.clear("stuck")
            self._heartbeat.touch()
            self._notify("WATCHDOG=1")
        self._say_status()
        return "stuck" not in self._signs.alarms

    def _look_at_jobs(self) -> None:
        """Jobs move when there are none, when one has ended or come a step further, and while their answers are tried
        again and again."""
        now = self._signs.stats.now()
        ended = now.answered + now.rejected + sum(now.released.values()) + now.advances
        if not now.at_work or ended != self._ended or "output" in self._signs.alarms:
            self._ended = ended
            self._jobs.beat()

    def _say_status(self) -> None:
        status = shown(self._summary())
        if status != self._status:
            self._status = status
            self._notify(f"STATUS={status}")

    def _say_stopping(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._notify("STOPPING=1")
