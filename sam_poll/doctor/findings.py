"""What was found: ok, a warning or a problem, where, and what to do; and how to look without hanging or falling over.

What can still go wrong here: a look that was given up goes on in its thread, until what it waits for answers or the
process ends.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from sam_poll.errors import DeviceError, ExitCode, ModelError, SamPollError, SettingsError, ShareError
from sam_poll.fs import remedy_of, shown

T = TypeVar("T")
Level: TypeAlias = Literal["ok", "warning", "problem"]

# A daemon meets them in this order: it reads its settings, proves its share, and takes its device to load a model.
MATTERS = (ExitCode.SETTINGS, ExitCode.SHARE, ExitCode.DEVICE, ExitCode.MODEL)
# For errors that bring none.
_REMEDIES = {
    "settings": "mend it there; docs/settings.md has every key",
    "model": "`sam-poll models list` names what can be had; weights of your own are named by their path",
    "trial": "try `-m demo`: if that works it is this model, not this machine; please report what cannot be explained",
    "compare": "try another picture, or `--box`; please report what cannot be explained",
}
_OF_SECTION = {"settings": ExitCode.SETTINGS, "share": ExitCode.SHARE, "device": ExitCode.DEVICE}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `code` is what a problem ends the command with; None: by its section."""

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


class Late(Exception):  # noqa: N818  it says what happened
    """What was looked at has not answered in time."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"no answer within {limit_s:g} s")


def exit_code(findings: Iterable[Finding]) -> ExitCode:
    """That of the first problem that a daemon would meet; 0 without a problem."""
    codes = {finding.exit_code for finding in findings}
    return next((code for code in MATTERS if code in codes), ExitCode.OK)


def bounded(run: Callable[[], T], limit_s: float) -> T:
    """What `run` returns or raises, in a thread of its own; Late after `limit_s`."""
    answer: queue.SimpleQueue[tuple[list[T], BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answer.put(([run()], None))
        except BaseException as error:  # noqa: BLE001  it is raised where it was asked for
            answer.put(([], error))

    threading.Thread(target=work, name="look", daemon=True).start()
    try:
        results, error = answer.get(timeout=limit_s)
    except queue.Empty:
        raise Late(limit_s) from None
    if error:
        raise error
    return results[0]


def looked(
    section: str, name: str, look: Callable[[], Iterable[Finding]], limit_s: float, *, sick: Level = "warning"
) -> list[Finding]:
    """What `look` finds, whatever happens to it. Our own errors are problems; `sick`: what an error of the system is.
    Late is raised: whoever asks knows what else hangs then."""
    try:
        return bounded(lambda: list(look()), limit_s)
    except SamPollError as error:
        return [told(section, name, error)]
    except OSError as error:
        place = str(error.filename) if error.filename else None
        return [Finding(section, name, sick, f"cannot be used: {error.strerror or error}", place, remedy_of(error))]
    except Late:
        raise
    except Exception as error:  # noqa: BLE001  one thing that cannot be found out hides no other
        what = f"cannot be found out: {type(error).__name__}: {error}"
        return [Finding(section, name, "warning", what, None, "nothing depends on it; please report it")]


def told(section: str, name: str, error: SamPollError) -> Finding:
    """An error as a problem."""
    remedy = error.remedy or _REMEDIES.get(section)
    return Finding(section, name, "problem", error.reason, error.place, remedy, code_of(error.exit_code))


def code_of(code: ExitCode) -> ExitCode | None:
    """An error's exit code, if it is one of ours."""
    return code if code in MATTERS else None


def error_of(told: dict[str, str | int | None]) -> SamPollError:
    """An error that another process has told as JSON (`error_told`)."""
    kinds: Sequence[type[SamPollError]] = (ModelError, DeviceError, ShareError, SettingsError)
    kind = next((kind for kind in kinds if kind.exit_code == told.get("exit_code")), SamPollError)
    place, remedy = (str(told[key]) if told.get(key) else None for key in ("place", "remedy"))
    return kind(str(told.get("reason")), place=place, remedy=remedy)


def error_told(error: SamPollError) -> dict[str, str | int | None]:
    """An error for another process."""
    return {
        "reason": shown(error.reason),
        "place": error.place,
        "remedy": error.remedy,
        "exit_code": int(error.exit_code),
    }
