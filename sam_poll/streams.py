"""The standard streams of a command, made safe to write to whatever they are.

A stream that was closed by the caller (`2>&-`) becomes the null device, or the next file that is opened would get its
number and with it whatever a library writes to stderr. A character that the stream's encoding lacks is escaped. What
cannot be written is dropped and remembered: a full disk or a reader that has left (`| head -1`) stops no work.

Limitations: a library that writes to the descriptors itself meets the original error.
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
# What rich and argparse can fill. COLUMNS=0 comes from terminals that have no size yet.
_SIDES = {"COLUMNS": (20, 10_000), "LINES": (4, 10_000)}


class _Stream(io.FileIO):
    """A descriptor for which no write fails. `trouble` is the first error."""

    trouble: OSError | None = None

    def write(self, data: Any) -> int:
        """Write, or drop what cannot be written. Returns the number of bytes dealt with."""
        try:
            while (written := super().write(data)) is None:  # non-blocking, and full
                select.select([], [self], [])
            return written
        except OSError as error:
            self.trouble = self.trouble or error
            return len(memoryview(data).cast("B"))


def _escaped(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding lacks: our own signs by ASCII ones, all else by its number, `\\xfc`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = "".join(_IN_ASCII.get(character, character) for character in error.object[error.start : error.end])
    return text.encode("ascii", "backslashreplace").decode("ascii"), error.end


def prepare() -> None:
    """Make stdin, stdout and stderr usable for this process and its children, and a senseless size of the terminal
    unknown. To be called before anything is read, written or opened. Streams that a caller has replaced stay."""
    codecs.register_error(_ERRORS, _escaped)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is taken by the next `open`
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115  for the life of the process
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


def trouble() -> OSError | None:
    """Why some of stdout could not be written; None where all was, or where `prepare` has not been called."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    return raw.trouble if isinstance(raw, _Stream) else None


def unread() -> bool:
    """Whether the reader of stdout has left, as `head` does. A command that only prints may end then."""
    return isinstance(trouble(), BrokenPipeError)
