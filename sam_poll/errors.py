"""The errors a user can meet, each with a reason, a place, a remedy and the exit code it ends the program with.

What can still go wrong here: nothing; these are words. An exception that is not one of these and reaches the top is
our bug, and ends with `ExitCode.BUG`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """How a command ends. 70, 75 and 78 are those of sysexits.h, so that systemd's
    `RestartPreventExitStatus=78` means what it should."""

    OK = 0  # all done; a daemon that was asked to stop
    BUG = 1  # an error we did not foresee
    USAGE = 2  # the command line makes no sense
    FAILED_JOBS = 3  # `--once`, `predict`, `check`: some was refused; `--once`: no partner, or a path cannot be used
    MODEL = 4  # the model, or a library that it needs, cannot be found, verified, built or loaded
    CVAT_REFUSED = 40  # the CVAT server does not accept what it was sent (400 and the like)
    CVAT_UNAUTHORIZED = 41  # it does not know us (401)
    CVAT_FORBIDDEN = 43  # we may not do this there (403)
    CVAT_NOT_FOUND = 44  # it has no such task (404)
    CVAT_CONFLICT = 49  # something else is being done to the task (409)
    CVAT_SERVER = 50  # the server failed (5xx)
    CVAT_TIMEOUT = 54  # it did not answer in time
    CVAT_UNREACHABLE = 55  # there is no server at that address, or no trusted one
    DEVICE = 70  # the GPU failed while running (anything but out of memory): the process must be replaced
    SHARE = 75  # the folders are not there, not writable, not on one file system: worth trying again
    SETTINGS = 78  # config.yaml, environment or a flag's value is wrong: trying again is pointless


class SamPollError(Exception):
    """An error a user can understand: what, where, and what to do about it.

    `reason` is one sentence without the place; `place` is where in a file (`objects[2].box.x1`, `line 3`);
    `remedy` is what the reader can do. `retriable`: once that is done the same input can be answered; where rejected
    inputs are kept, the command that puts them back is named.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[ExitCode] = ExitCode.BUG

    def __init__(
        self, reason: str, *, place: str | None = None, remedy: str | None = None, retriable: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.place = place
        self.remedy = remedy
        self.retriable = retriable

    def __str__(self) -> str:
        text = f"{self.place}: {self.reason}" if self.place else self.reason
        return f"{text} ({self.remedy})" if self.remedy else text


class UsageError(SamPollError):
    """The command line makes no sense."""

    code = "usage"
    exit_code = ExitCode.USAGE


class SettingsError(SamPollError):
    """A setting is unknown, of the wrong type, or contradicts another."""

    code = "settings"
    exit_code = ExitCode.SETTINGS


class ShareError(SamPollError):
    """The folders cannot be used (now)."""

    code = "share"
    exit_code = ExitCode.SHARE


class ModelError(SamPollError):
    """The model cannot be found, downloaded, verified, built or loaded."""

    code = "model"
    exit_code = ExitCode.MODEL


class InstallationError(SamPollError):
    """A package that the program needs is installed, but cannot be loaded on this machine."""

    code = "installation"
    exit_code = ExitCode.MODEL


class DeviceError(SamPollError):
    """The device failed in a way that leaves the process unusable (a CUDA error other than out of memory)."""

    code = "device"
    exit_code = ExitCode.DEVICE


class CvatError(SamPollError):
    """A CVAT server could not be asked, or refused; `kind` tells which way."""

    code = "cvat"
    exit_code = ExitCode.CVAT_REFUSED

    def __init__(
        self,
        reason: str,
        kind: ExitCode = ExitCode.CVAT_REFUSED,
        *,
        place: str | None = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(reason, place=place, remedy=remedy)
        self.kind = kind


class InputError(SamPollError):
    """Something about this one job is wrong. The job is rejected; the daemon lives on."""

    code = "input"
    exit_code = ExitCode.FAILED_JOBS


class PromptError(InputError):
    """The prompt cannot be understood, or does not fit its picture."""

    code = "prompt"


class IncompletePromptError(PromptError):
    """The prompt file, or the annotation file, ends too early: it may still be being written."""


class PictureError(InputError):
    """The picture cannot be read, or is too large."""

    code = "picture"


class UnfinishedError(PictureError):
    """The picture is not all there, or not (yet) the file its prompt names: it may still be on its way."""


class ChangedError(UnfinishedError):
    """The picture was changed while it was read: what was found in it counts for nothing, it must be read again."""


class LostError(SamPollError):
    """The job is no longer ours: another daemon has taken it over. Nothing is lost but our work on it."""

    code = "lost"


class PutOffError(LostError):
    """The job's answer, or refusal, cannot be put away where it belongs: the job waits until it can be."""

    code = "put_off"


class PoisonError(InputError):
    """The job has ended its process more often than may be."""

    code = "poison"


class UnforeseenError(InputError):
    """A surprise of ours, told as this one job's refusal: its input may be as it should."""


class TooLargeError(InputError):
    """The job does not fit into the device's memory even on the last step of the ladder."""

    code = "memory"
