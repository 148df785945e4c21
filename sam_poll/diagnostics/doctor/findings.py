"""Findings (ok, warning or problem) with their remedies, and checks that cannot hang or crash.

Limitations: a check that timed out continues in its thread until it returns or the process ends.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from sam_poll.core.errors import (
    DeviceError,
    ExitCode,
    ModelError,
    SamPollError,
    SettingsError,
    ShareError,
)
from sam_poll.core.files import remedy_of
from sam_poll.core.text import shown

T = TypeVar("T")
Level: TypeAlias = Literal["ok", "warning", "problem"]

# A daemon meets them in this order: it reads its settings, proves its share, and takes its device
# to load a model.
MATTERS = (ExitCode.SETTINGS, ExitCode.SHARE, ExitCode.DEVICE, ExitCode.MODEL)
# Remedies for errors that have none.
_REMEDIES = {
    "settings": "correct it there; docs/settings.md lists every key",
    "model": "`sam-poll models list` names what can be had; weights of your own are named by "
    "their path",
    "trial": "try `-m demo`: if that works it is this model, not this machine; please report what "
    "cannot be explained",
    "compare": "try another picture, or `--box`; please report what cannot be explained",
}
_OF_SECTION = {"settings": ExitCode.SETTINGS, "share": ExitCode.SHARE, "device": ExitCode.DEVICE}


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check.

    `code` is the exit code of a problem; None: that of its section.
    """

    section: str
    name: str
    level: Level
    what: str
    where: str | None = None
    remedy: str | None = None
    code: ExitCode | None = None

    @property
    def exit_code(self) -> ExitCode:
        """0 unless it is a problem."""
        if self.level != "problem":
            return ExitCode.OK
        return self.code or _OF_SECTION.get(self.section, ExitCode.MODEL)


class CheckTimeout(Exception):  # noqa: N818  it says what happened
    """What was looked at has not answered in time."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"no answer within {limit_s:g} s")


def exit_code(findings: Iterable[Finding]) -> ExitCode:
    """Return the code of the first problem that a daemon would meet; 0 without a problem."""
    codes = {finding.exit_code for finding in findings}
    return next((code for code in MATTERS if code in codes), ExitCode.OK)


def run_with_timeout(run: Callable[[], T], limit_s: float) -> T:
    """Run a function in a thread and return or raise its result.

    Raises CheckTimeout after `limit_s` seconds.
    """
    answer: queue.SimpleQueue[tuple[list[T], BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put(([run()], None))
        except BaseException as error:  # noqa: BLE001  raised in the calling thread
            answer.put(([], error))

    threading.Thread(target=work, name="look", daemon=True).start()
    try:
        results, error = answer.get(timeout=limit_s)
    except queue.Empty:
        raise CheckTimeout(limit_s) from None
    if error:
        raise error
    return results[0]


def run_check(
    section: str,
    name: str,
    check: Callable[[], Iterable[Finding]],
    limit_s: float,
    *,
    system_error: Level = "warning",
) -> list[Finding]:
    """Return the findings of a check, whatever it raises.

    Errors of sam_poll become problems, errors of the system findings of level `system_error`.
    Raises CheckTimeout, because the caller knows which further checks would hang as well.
    """
    try:
        return run_with_timeout(lambda: list(check()), limit_s)
    except SamPollError as error:
        return [problem_of(section, name, error)]
    except OSError as error:
        place = str(error.filename) if error.filename else None
        return [
            Finding(
                section,
                name,
                system_error,
                f"cannot be used: {error.strerror or error}",
                place,
                remedy_of(error),
            )
        ]
    except CheckTimeout:
        raise
    except Exception as error:  # noqa: BLE001  one thing that fails hides no other
        what = f"check failed: {type(error).__name__}: {error}"
        return [
            Finding(
                section,
                name,
                "warning",
                what,
                None,
                "no other check depends on it; please report it",
            )
        ]


def problem_of(section: str, name: str, error: SamPollError) -> Finding:
    """Return an error as a finding of level `problem`."""
    remedy = error.remedy or _REMEDIES.get(section)
    return Finding(
        section, name, "problem", error.reason, error.place, remedy, code_of(error.exit_code)
    )


def code_of(code: ExitCode) -> ExitCode | None:
    """Return an error's exit code if it is one of those in `MATTERS`."""
    return code if code in MATTERS else None


def error_of(problem_of: dict[str, str | int | None]) -> SamPollError:
    """Return the error that another process has sent as JSON (`error_as_json`)."""
    kinds: Sequence[type[SamPollError]] = (ModelError, DeviceError, ShareError, SettingsError)
    kind = next(
        (kind for kind in kinds if kind.exit_code == problem_of.get("exit_code")), SamPollError
    )
    place, remedy = (
        str(problem_of[key]) if problem_of.get(key) else None for key in ("place", "remedy")
    )
    return kind(str(problem_of.get("reason")), place=place, remedy=remedy)


def error_as_json(error: SamPollError) -> dict[str, str | int | None]:
    """Return an error as JSON for another process."""
    return {
        "reason": shown(error.reason),
        "place": error.place,
        "remedy": error.remedy,
        "exit_code": int(error.exit_code),
    }
