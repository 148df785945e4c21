"""The command line: one module for each group of commands, shared flags, and error handling.

- `main`: the `sam-poll` program and its groups of commands.
- `watch`, `predict`, `share` (status, retry, merge), `ui`, `models`, `mosaic`, `serve`, `redis`,
  `cluster`, `cvat`, `doctor`, `bench`: the commands.
- `prompt_flags`: jobs from flags. `options`: flags that several commands share.
  `error_handling`: an exception becomes one readable message and an exit code.
- `waikato_poll`, `waikato_redis`: programs with the names and flags of Waikato's
  `sam_predict_poll` and `sam_predict_redis`, and of those for SAM-HQ. `waikato_scripts`: where the
  two sets differ.

Importing it imports neither torch nor OpenCV, so that `sam-poll --help` starts at once; and Ctrl-C
prints no traceback from then on, also while the commands are still imported.
"""

from __future__ import annotations

import sys
from types import TracebackType

_print_traceback = sys.excepthook


def _end_quietly(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an uncaught exception, except for Ctrl-C; Python then ends the process by SIGINT."""
    if not issubclass(kind, KeyboardInterrupt):
        _print_traceback(kind, error, trace)


sys.excepthook = _end_quietly
