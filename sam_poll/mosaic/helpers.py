"""Helper processes that compute tiles of one mosaic, one process for each further device.

A helper holds nothing that could be lost: when it ends, the lock on its tile ends, too, and another
process computes the tile. Run as a module, this file is a helper process. Its `HelperSpec` is
pickled to its standard input, whose end shows that the first process has ended.

If a helper cannot load its network, that is logged, and the other processes compute its tiles.
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

from sam_poll.core import child_process
from sam_poll.core.errors import ExitCode, SamPollError
from sam_poll.core.protocols import Engine
from sam_poll.core.safe_path import SafePath
from sam_poll.mosaic.assembly import MosaicOptions
from sam_poll.mosaic.run import help_with


@dataclass(frozen=True)
class HelperSpec:
    """The work of one helper process.

    `name` is that of its device, for log lines. `engine` must be picklable: a function of a module,
    or a `functools.partial` of one.
    """

    name: str
    picture: SafePath
    output: SafePath
    options: MosaicOptions
    engine: Callable[[], Engine]


@contextmanager
def run_helpers(helpers: Sequence[HelperSpec], env: Mapping[str, str]) -> Iterator[None]:
    """Run a process for each of `helpers` until the context ends."""
    processes = [_started(helper, env) for helper in helpers]
    ending = threading.Event()
    pairs = zip(helpers, processes, strict=True)
    watchers = [
        threading.Thread(target=_watch, args=(helper.name, process, ending), daemon=True)
        for helper, process in pairs
    ]
    for watcher in watchers:
        watcher.start()
    try:
        yield
    finally:
        ending.set()
        for process in processes:
            process.kill()  # no tile is left; a process that hangs is not waited for
        for watcher in watchers:
            watcher.join()


def _started(helper: HelperSpec, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(  # noqa: S603  this module
        child_process.command("sam_poll.mosaic.helpers"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=dict(env),
        # Ctrl-C reaches the first process only, which ends the helpers.
        start_new_session=True,
    )
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(helper))
    # Left open: the helper ends when the pipe is closed, at the latest with this process.
    process.stdin.flush()
    return process


def _watch(name: str, process: subprocess.Popen[bytes], ending: threading.Event) -> None:
    """Wait for a helper process and log its error."""
    with process:
        assert process.stdout is not None
        message = process.stdout.read().decode(errors="replace").strip()
        code = process.wait()
    if code and not ending.is_set():
        logger.warning(
            "{}: the helper process ended ({}); other processes compute its tiles",
            name,
            message or f"code {code}",
        )


def main() -> int:
    """Run as a helper process and return its exit code."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level} {message}")
    # The pickle comes from the process that has started this one.
    helper: HelperSpec = pickle.load(sys.stdin.buffer)  # noqa: S301
    child_process.end_with_parent()
    try:
        help_with(helper.picture, helper.output, helper.options, helper.engine)
    except SamPollError as error:
        sys.stdout.write(str(error))
        return error.exit_code
    except Exception as error:  # noqa: BLE001  the first process logs it
        sys.stdout.write(f"{type(error).__name__}: {error}")
        return ExitCode.BUG
    return ExitCode.OK


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # without waiting for threads, which may hang in a driver
