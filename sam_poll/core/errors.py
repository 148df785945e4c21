"""Errors that a user may see, each with a reason, a place, a remedy and an exit code.

Any other exception that reaches the top level is a bug, and the program exits with `ExitCode.BUG`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """The exit status of a command.

    70, 75 and 78 have the meaning they have in sysexits.h, so that systemd's
    `RestartPreventExitStatus=78` applies.
    """

    OK = 0
    BUG = 1
    USAGE = 2
    FAILED_JOBS = 3
    MODEL = 4
    CVAT_REFUSED = 40
    CVAT_UNAUTHORIZED = 41
    CVAT_FORBIDDEN = 43
    CVAT_NOT_FOUND = 44
    CVAT_CONFLICT = 49
    CVAT_SERVER = 50
    CVAT_TIMEOUT = 54
    CVAT_UNREACHABLE = 55
    DEVICE = 70
    SHARE = 75
    SETTINGS = 78

    @property
    def meaning(self) -> str:
        """When a command ends with it, in Markdown; the documentation's table is made of these."""
        return _MEANINGS[self]


_MEANINGS = {
    ExitCode.OK: "success; a daemon was stopped",
    ExitCode.BUG: (
        "an unexpected error. The message names a file with the traceback; please report it"
    ),
    ExitCode.USAGE: "invalid command line",
    ExitCode.FAILED_JOBS: (
        "`watch --once`, `predict`, `cvat masks`, `cvat find` and `cvat warm`: some jobs were "
        "rejected; `cvat warm`: the cache is too small for the task; `watch --once`: a file "
        "has no partner, or a path could not be used; `check`, `cvat prompts`: an error was "
        "found"
    ),
    ExitCode.MODEL: (
        "the model cannot be found, verified, built or loaded, or loading took longer than "
        "`load_timeout_s`; or a shared library that OpenCV or another package needs is "
        "missing on this machine"
    ),
    ExitCode.CVAT_REFUSED: "the CVAT server refused the request (400 and similar)",
    ExitCode.CVAT_UNAUTHORIZED: "authentication failed (401)",
    ExitCode.CVAT_FORBIDDEN: "permission denied (403)",
    ExitCode.CVAT_NOT_FOUND: "the task does not exist (404)",
    ExitCode.CVAT_CONFLICT: "conflict with another operation on the task (409)",
    ExitCode.CVAT_SERVER: "the server failed (5xx)",
    ExitCode.CVAT_TIMEOUT: "the server did not respond in time",
    ExitCode.CVAT_UNREACHABLE: "the server is unreachable, or its TLS certificate is not trusted",
    ExitCode.DEVICE: (
        "the GPU failed while running (not: out of memory). The process must be replaced"
    ),
    ExitCode.SHARE: (
        "the folders do not exist, are not writable, or are not on one file system; a retry "
        "may help"
    ),
    ExitCode.SETTINGS: (
        "`config.yaml`, the environment or the value of a flag is invalid; a retry does not help"
    ),
}


class SamPollError(Exception):
    """Base class of the errors shown to users: what is wrong, where, and what to do.

    `reason` is one sentence without the place; `place` is the position in a file
    (`objects[2].box.x1`, `line 3`); `remedy` is what the user can do. `retriable`: after the remedy
    the same input can succeed; where rejected inputs are kept, the message then names the command
    that requeues them.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[ExitCode] = ExitCode.BUG

    def __init__(
        self,
        reason: str,
        *,
        place: str | None = None,
        remedy: str | None = None,
        retriable: bool = False,
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
    """The command line is invalid."""

    code = "usage"
    exit_code = ExitCode.USAGE


class SettingsError(SamPollError):
    """A setting is unknown, of the wrong type, or contradicts another."""

    code = "settings"
    exit_code = ExitCode.SETTINGS


class ShareError(SamPollError):
    """The folders of the share cannot be used at present."""

    code = "share"
    exit_code = ExitCode.SHARE


class ModelError(SamPollError):
    """The model cannot be found, downloaded, verified, built or loaded."""

    code = "model"
    exit_code = ExitCode.MODEL


class InstallationError(SamPollError):
    """A required package is installed but cannot be loaded on this machine."""

    code = "installation"
    exit_code = ExitCode.MODEL


class DeviceError(SamPollError):
    """The device failed and the process cannot go on (a CUDA error other than out of memory)."""

    code = "device"
    exit_code = ExitCode.DEVICE


class CvatError(SamPollError):
    """A request to a CVAT server failed or was rejected; `kind` is the exit code."""

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
    """The input of one job is invalid. The job is rejected; the daemon continues."""

    code = "input"
    exit_code = ExitCode.FAILED_JOBS


class PromptError(InputError):
    """The prompt is invalid, or does not fit its picture."""

    code = "prompt"


class IncompletePromptError(PromptError):
    """The prompt file or annotation file is truncated; it may still be being written."""


class PictureError(InputError):
    """The picture cannot be read, or is too large."""

    code = "picture"


class IncompleteFileError(PictureError):
    """The picture is incomplete, or not yet the file its prompt names; it may still be arriving."""


class FileChangedError(IncompleteFileError):
    """The picture was changed while it was read; other errors found in it are void.

    It must be read again.
    """


class ClaimLostError(SamPollError):
    """Another daemon has taken over the job.

    Only the work of this process on it is lost.
    """

    code = "lost"


class PutOffError(ClaimLostError):
    """The job's result or rejection cannot be written at present; the job waits until it can be."""

    code = "put_off"


class PoisonError(InputError):
    """The job has ended its process more often than the limit allows."""

    code = "poison"


class InternalError(InputError):
    """An unexpected error of the program that rejects one job; the input may be valid."""


class DeviceOutOfMemoryError(InputError):
    """The job does not fit into the device's memory even on the last step of the memory plan."""

    code = "memory"
