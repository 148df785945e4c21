"""Stopping: SIGTERM and SIGINT set an event.

The second signal, or a shutdown that hangs, ends the process.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loguru import logger

from sam_poll.core.errors import ExitCode
from sam_poll.pipeline.options import PipelineOptions

# Jobs have `drain_s` to finish; the unit and compose files have systemd and Docker wait 45 s.
LAST_RESORT_S = PipelineOptions.drain_s + 10

_STOPPING = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set. The second signal ends the process at once.

    A thread of its own receives them: Python runs signal handlers in the main thread, which may
    hang on a share at that moment.
    """
    stop = threading.Event()
    read_end, write_end = socket.socketpair()
    write_end.setblocking(False)

    def listen() -> None:
        while number := read_end.recv(1):
            if number[0] in _STOPPING:
                if stop.is_set():
                    os._exit(128 + number[0])
                stop.set()

    # Python's C handler runs in whichever thread the kernel chooses, and writes the signal's number
    # into `write_end`.
    before = {number: signal.signal(number, lambda *_: None) for number in _STOPPING}
    wakeup = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    # From here on the kernel does not choose this thread, nor those that it starts.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield stop
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        write_end.close()
        listener.join()
        read_end.close()


@contextmanager
def termination_raises(error_of: Callable[[int], BaseException]) -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise an error in the main thread, so that all is cleaned up.

    `error_of` makes it from the signal's number. For commands that start other processes.
    """

    def end(number: int, _: object) -> None:
        raise error_of(number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def bounded_stop(
    stop: threading.Event, after_s: float, end: Callable[[int], object] = os._exit
) -> Iterator[None]:
    """End the process `after_s` seconds after `stop`, unless this is left before.

    A driver or a share may hang for ever. Unfinished jobs stay in `work/` and are recovered by the
    next start, or by another daemon.
    """
    left = threading.Event()

    def wait() -> None:
        while not stop.wait(1.0):
            if left.is_set():
                return
        if not left.wait(after_s):
            logger.error("shutdown timed out; exiting. Unfinished jobs will be recovered")
            end(ExitCode.OK)

    thread = threading.Thread(target=wait, name="bounded-stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
