"""How a command begins and ends: streams that can be written to, its error in one readable message, its exit code.

Nothing heavy is imported at the top, so that `--help` answers at once. What can still go wrong here: an exception that
we did not foresee; it ends with one line, and its traceback goes into a file for the report.
"""

from __future__ import annotations

import functools
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import typer

from sam_poll import __version__, missing_library, streams
from sam_poll.errors import ExitCode, SamPollError, ShareError

F = TypeVar("F", bound=Callable[..., Any])


def reports(command: F) -> F:
    """Ends a command with its error's exit code and one readable message."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = command(*args, **kwargs)
        except SamPollError as error:
            say(error)
            raise typer.Exit(getattr(error, "kind", error.exit_code)) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort):
            raise
        except OSError as error:
            say(ShareError(error.strerror or str(error), place=str(error.filename) if error.filename else None))
            raise typer.Exit(ExitCode.SHARE) from None
        except Exception as error:  # noqa: BLE001  the last place where a surprise can be told in one line
            if explained := missing_library.explained(error):
                say(explained)
                raise typer.Exit(explained.exit_code) from None
            _say_surprise(error)
            raise typer.Exit(ExitCode.BUG) from None
        raise typer.Exit(code or ExitCode.OK)

    return run  # type: ignore[return-value]


def run(command: Callable[[], object]) -> NoReturn:
    """Run the whole of a program: what each entry point calls. Ends the process with the command's exit code; one that
    succeeded ends with `ExitCode.SHARE` where its output could not be written."""
    streams.prepare()
    code: Any = ExitCode.OK
    try:
        command()
    except typer.Exit as end:
        code = end.exit_code
    except SystemExit as end:
        code = end.code
    trouble = streams.trouble()
    if trouble and not isinstance(trouble, BrokenPipeError):
        say(ShareError(trouble.strerror or str(trouble), place="standard output"))
        code = code or ExitCode.SHARE
    sys.exit(code)


def say(error: SamPollError) -> None:
    """One error on stderr: what, where, and what to do about it."""
    from rich.text import Text

    from sam_poll.console import error_console
    from sam_poll.fs import shown

    place = f"{error.place}: " if error.place else ""
    lines = [shown(line) for line in f"{place}{error.reason}".splitlines()]
    text = Text.assemble(("error: ", "bold red"), "\n".join(lines))
    if error.remedy:
        text.append(f"\n  → {shown(error.remedy)}", style="yellow")
    error_console().print(text)


def _say_surprise(error: Exception) -> None:
    with _report_file() as file:
        file.write(f"sam_poll {__version__}, Python {sys.version}\n")
        file.write("".join(traceback.format_exception(error)))
    kind = f"unexpected {type(error).__name__}: {error}"
    say(SamPollError(kind, remedy=f"this is a bug in sam-poll; please report it with {file.name}"))


def _report_file() -> Any:
    return tempfile.NamedTemporaryFile(
        "w", prefix="sam-poll-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
    )
