"""Child processes of this program: how they are started, and how they end with their parent.

Each child runs a module of this program as `__main__`. Its standard input is a pipe that the
parent keeps open: when the parent ends, however that is, the child reads the end of the file and
ends, too.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from typing import TextIO

from sam_poll.core.errors import ExitCode

# The child gets this process's import path. With `-m` or `-c` alone, its first entry would be the
# current directory, where modules would be found that this process does not see (a checkout of
# sam2).
_RUN_MODULE = (
    "import json, runpy, sys; sys.path[:] = json.loads(sys.argv[1]); module = sys.argv[2]; "
    "del sys.argv[1:3]; runpy.run_module(module, run_name='__main__', alter_sys=True)"
)


def command(module: str, *arguments: str) -> list[str]:
    """Return the command that runs a module with `arguments` and this process's import path."""
    return [sys.executable, "-c", _RUN_MODULE, json.dumps(sys.path), module, *arguments]


def end_with_parent() -> None:
    """End this process as soon as its standard input is closed.

    Call it after everything that the parent sends has been read.
    """
    threading.Thread(target=_wait_for_end_of_input, name="end-with-parent", daemon=True).start()


def _wait_for_end_of_input() -> None:
    while os.read(0, 4096):
        pass
    os._exit(ExitCode.OK)


def reserve_stdout() -> TextIO:
    """Return a file on this process's standard output, for messages to the parent only.

    What libraries print from then on goes to the standard error.
    """
    messages = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return messages
