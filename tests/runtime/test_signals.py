"""SIGTERM and SIGINT set an event; a shutdown that hangs ends the process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from sam_poll.core.errors import ExitCode
from sam_poll.runtime import signals
from tests.conftest import wait_until


def test_a_stop_that_hangs_ends_the_process() -> None:
    stop, ends = threading.Event(), list[int]()
    with signals.bounded_stop(stop, 0.01, ends.append):
        stop.set()
        wait_until(lambda: ends == [ExitCode.OK])


def test_a_stop_in_time_ends_no_process_and_leaves_no_thread() -> None:
    stop, ends = threading.Event(), list[int]()
    before = set(threading.enumerate())
    with signals.bounded_stop(stop, 60.0, ends.append):
        stop.set()
    wait_until(lambda: set(threading.enumerate()) <= before)
    assert ends == []


HANGING = """
import hashlib, os, threading
from sam_poll.runtime.signals import stop_on_signals
with stop_on_signals() as stop:
    threading.Thread(target=lambda: stop.wait() and os._exit(7), daemon=True).start()
    print("ready", flush=True)
    while True:
        # Minutes in which Python's own handlers cannot run.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 100_000_000)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_event_while_the_main_thread_hangs(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGING], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        try:
            assert process.wait(20) == 7
        finally:
            process.kill()


def test_leaving_restores_handlers_mask_and_threads() -> None:
    before = [
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGINT),
        signal.pthread_sigmask(signal.SIG_BLOCK, []),
    ]
    threads = set(threading.enumerate())
    with signals.stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(stop.is_set)
    after = [
        signal.getsignal(signal.SIGTERM),
        signal.getsignal(signal.SIGINT),
        signal.pthread_sigmask(signal.SIG_BLOCK, []),
    ]
    assert after == before
    assert set(threading.enumerate()) == threads
