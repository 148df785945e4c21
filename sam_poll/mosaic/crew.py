"""Further processes for one mosaic, one for each further device. Each takes tiles until there are none, and ends.

They hold nothing that could be lost: a tile whose maker ends is free again. Run as a module it is such a process; what
it is to do comes pickled through its standard input, which also tells it when there is nobody left to work for.

What can still go wrong here: a process that cannot load its network is said in the log, and the others do its tiles.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from loguru import logger

from sam_poll.errors import ExitCode, SamPollError
from sam_poll.mosaic.run import lend_a_hand
from sam_poll.mosaic.work import Wish
from sam_poll.safe_path import SafePath
from sam_poll.types import Engine

_COMMAND = (sys.executable, "-m", "sam_poll.mosaic.crew")


@dataclass(frozen=True)
class Hand:
    """What one process is told. `name` is its device's, for people; `engine` travels as a pickle: a function of a
    module, maybe with arguments."""

    name: str
    picture: SafePath
    output: SafePath
    wish: Wish
    engine: Callable[[], Engine]


@contextmanager
def crew(hands: Sequence[Hand], env: Mapping[str, str]) -> Iterator[None]:
    """A process for each of `hands`, as long as this is entered."""
    processes = [_started(hand, env) for hand in hands]
    ending = threading.Event()
    pairs = zip(hands, processes, strict=True)
    watchers = [
        threading.Thread(target=_watch, args=(hand.name, process, ending), daemon=True) for hand, process in pairs
    ]
    for watcher in watchers:
        watcher.start()
    try:
        yield
    finally:
        ending.set()
        for process in processes:
            process.kill()  # there is no tile left; one that hangs is not waited for
        for watcher in watchers:
            watcher.join()


def _started(hand: Hand, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(  # noqa: S603  our own module
        _COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(env),
        start_new_session=True,  # Ctrl-C is for the first process, which ends the others
    )
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(hand))
    process.stdin.flush()  # and left open: its end is the end of this process
    return process


def _watch(name: str, process: subprocess.Popen[bytes], ending: threading.Event) -> None:
    with process:
        assert process.stdout is not None
        said = process.stdout.read().decode(errors="replace").strip()
        code = process.wait()
    if code and not ending.is_set():
        logger.warning("{}: its process ended ({}); the others do its tiles", name, said or f"code {code}")


def main() -> int:
    """One such process."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level} {message}")
    hand: Hand = pickle.load(sys.stdin.buffer)  # noqa: S301  from the process that has started this one
    threading.Thread(target=_end_with_the_first, daemon=True).start()
    try:
        lend_a_hand(hand.picture, hand.output, hand.wish, hand.engine)
    except SamPollError as error:
        sys.stdout.write(str(error))
        return error.exit_code
    except Exception as error:  # noqa: BLE001  said by the first process
        sys.stdout.write(f"{type(error).__name__}: {error}")
        return ExitCode.BUG
    return ExitCode.OK


def _end_with_the_first() -> None:
    sys.stdin.buffer.read()
    os._exit(ExitCode.OK)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread that hangs in a driver must not hold the end up
