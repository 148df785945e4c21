"""`sam-poll cluster watch` and `cluster worker`: the doors of many machines, and what runs over them.

What can still go wrong here: as with the folder, a thread that hangs in a driver or a share; the process ends without
it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from loguru import logger

from sam_poll import app
from sam_poll import console as screen
from sam_poll.alarms import Alarms
from sam_poll.doors import redis_link
from sam_poll.doors.cluster_line import Line
from sam_poll.doors.cluster_watcher import WatcherDoor
from sam_poll.doors.cluster_worker import WorkerDoor
from sam_poll.doors.layout import Layout
from sam_poll.doors.redis_link import Address, Link
from sam_poll.doors.scan import Manners
from sam_poll.errors import ExitCode
from sam_poll.health import Monitor, Notifier, Signs
from sam_poll.settings import Settings


def find(url: str | None, file: Path | None) -> Address:
    """The server, by flag, file or environment."""
    return redis_link.find(os.environ, url, file)


def _line(address: Address, alarms: Alarms, lease_s: float) -> Callable[[str], Line]:
    """Makes the line of a share, once it is known which share that is; Redis is asked whether it is there."""

    def make(share: str) -> Line:
        link = Link(address, alarms)
        link.prove()
        return Line(link, share, lease_s)

    return make


def worker(settings: Settings, address: Address) -> ExitCode:
    """Answer what the watchers hand out, until a signal comes."""

    def make(layout: Layout, manners: Manners, *, alarms: Alarms, **more: Any) -> WorkerDoor:
        return WorkerDoor(layout, manners, line=_line(address, alarms, settings.lease_s), alarms=alarms, **more)

    return app.watch(settings, make=make, how=f"told by {address.shown}")


def watch(settings: Settings, address: Address, *, ahead: int, first: Sequence[str]) -> ExitCode:
    """Claim what is dropped and hand it out, until a signal comes."""
    screen.set_up_log("text" if settings.log == "auto" else settings.log, settings.log_level)
    signs, notify = Signs(), Notifier()
    layout, manners = app.layout_of(settings), app.manners_of(settings, once=False)
    door = WatcherDoor(
        layout,
        manners,
        _line(address, signs.alarms, settings.lease_s),
        ahead,
        first,
        sending=signs.device,
        alarms=signs.alarms,
        pulse=signs.intake,
        state=signs.state,
    )
    now, alarms, health = signs.stats.now, signs.alarms.active, settings.health

    def line() -> str:
        return "; ".join([handed(door), *map(screen.alarm_line, alarms())])

    with (
        app.stop_on_signals() as stop,
        app.bounded_stop(stop, app.LAST_RESORT_S),
        door,
        app.metrics_of(settings, signs, door),
    ):
        how = "events" if manners.events else "polling"
        logger.info("watching {} ({}) for the workers at {}", layout.input, how, address.shown)
        with (
            Monitor(signs, stop, stuck_s=health.stuck_s, file=health.file, notify=notify, summary=line),
            screen.Heartbeat(now, lambda: door.waiting, alarms),
        ):
            door.run(stop)
        logger.info("stopped: {}", handed(door))
    return ExitCode.OK


def handed(door: WatcherDoor) -> str:
    """`300 claims handed out (2 again), 12 wait for a worker, 40 files in the input folder`."""
    sender = door.sender
    again = f" ({sender.again} again)" if sender.again else ""
    sent = screen.count(sender.sent - sender.again, "claim")
    left = screen.count(door.waiting, "file")
    return f"{sent} handed out{again}, {sender.count()} wait for a worker, {left} not claimed"
