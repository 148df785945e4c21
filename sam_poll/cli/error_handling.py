"""The frame of every program: safe streams, errors as readable messages, exit codes.

Nothing heavy is imported at the top, so that `--help` answers at once. An unforeseen exception
becomes one line, and its traceback is written to a file for a bug report.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import typer

from sam_poll import __version__
from sam_poll.core import missing_library, streams
from sam_poll.core.errors import ExitCode, SamPollError, ShareError
from sam_poll.runtime.console import print_error

F = TypeVar("F", bound=Callable[..., Any])


def reports(command: F) -> F:
    """Decorate a command: an error becomes one readable message and its exit code."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = command(*args, **kwargs)
        except SamPollError as error:
            print_error(error)
            raise typer.Exit(getattr(error, "kind", error.exit_code)) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:  # noqa: BLE001  the outermost frame
            readable = _described(error)
            print_error(readable)
            raise typer.Exit(readable.exit_code) from None
        raise typer.Exit(code or ExitCode.OK)

    return run  # type: ignore[return-value]


def run(command: Callable[[], object]) -> NoReturn:
    """Run a program, from each entry point, and end the process with the command's exit code.

    A command that succeeded ends with `ExitCode.SHARE` where its output could not be written.
    """
    streams.prepare()
    code: Any = ExitCode.OK
    try:
        command()
    except typer.Exit as end:
        code = end.exit_code
    except SystemExit as end:
        code = end.code
    trouble = streams.write_error()
    if trouble and not isinstance(trouble, BrokenPipeError):
        print_error(ShareError(trouble.strerror or str(trouble), place="standard output"))
        code = code or ExitCode.SHARE
    sys.exit(code)


def _described(error: Exception) -> SamPollError:
    """Return the error to print for one that is not ours."""
    explained = missing_library.explained(error)
    if explained:
        return explained
    if isinstance(error, OSError):
        place = str(error.filename) if error.filename else None
        return ShareError(error.strerror or str(error), place=place)
    with _report_file() as file:
        file.write(f"sam_poll {__version__}, Python {sys.version}\n")
        file.write("".join(traceback.format_exception(error)))
    return SamPollError(
        f"unexpected {type(error).__name__}: {error}",
        remedy=f"this is a bug in sam-poll; please report it with {file.name}",
    )


def _report_file() -> Any:
    return tempfile.NamedTemporaryFile(
        "w",
        prefix="sam-poll-",
        suffix=".txt",
        delete=False,
        encoding="utf-8",
        errors="backslashreplace",
    )
