"""Make the standard streams of a command safe to write to, whatever they are.

A stream closed by the caller (`2>&-`) becomes the null device; otherwise the next opened file would
get its number, and with it everything that a library writes to stderr. A character that the
stream's encoding lacks is escaped. Output that cannot be written is dropped and the error
remembered: a full disk or a closed reader (`| head -1`) does not stop the command.

Limitations: a library that writes to the descriptors itself gets the original error.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import select
import sys
from pathlib import Path
from typing import Any, TextIO

_IN_ASCII = {"→": "->", "…": "...", "·": "-", "–": "-", "×": "x", "●": "*", "≥": ">=", "≤": "<="}
_ERRORS = "sam_poll.escaped"  # the name of `_escaped` among Python's error handlers
# Sizes that rich and argparse can use. COLUMNS=0 comes from terminals that have no size yet.
_SIDES = {"COLUMNS": (20, 10_000), "LINES": (4, 10_000)}


class _Stream(io.FileIO):
    """A descriptor on which no write fails; `error` is the first one."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, or drop what cannot be written; return the number of bytes consumed."""
        try:
            while (written := super().write(data)) is None:  # non-blocking, and full
                select.select([], [self], [])
            return written
        except OSError as error:
            self.error = self.error or error
            return len(memoryview(data).cast("B"))


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that an encoding lacks, by ASCII signs or by `\\xfc` and so on."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = "".join(
        _IN_ASCII.get(character, character) for character in error.object[error.start : error.end]
    )
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def prepare() -> None:
    """Make stdin, stdout and stderr usable for this process and its children.

    Call it before anything is read, written or opened. Streams that the caller has replaced are
    kept. Impossible terminal sizes in the environment are removed.
    """
    codecs.register_error(_ERRORS, _escaped)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is taken by the next `open`
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        # Open for the life of the process.
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115
    if sys.stdout is sys.__stdout__:
        sys.stdout = _safe(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _safe(sys.stderr, 2)
    for name, (least, most) in _SIDES.items():
        text = os.environ.get(name, "")
        if text and not (text.isdecimal() and least <= int(text) <= most):
            del os.environ[name]


def _safe(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8", errors=_ERRORS)
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Stream(number, "w", closefd=False)),
        encoding=stream.encoding,
        errors=_ERRORS,
        line_buffering=number == 2 or stream.isatty(),
        write_through=getattr(stream, "write_through", False),
    )


def write_error() -> OSError | None:
    """Return the error of writing to stdout; None without one, and before `prepare` was called."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.error if isinstance(raw, _Stream) else None


def reader_closed() -> bool:
    """Return whether the reader of stdout has closed it, as `head` does.

    A command that only prints may end then.
    """
    return isinstance(write_error(), BrokenPipeError)
