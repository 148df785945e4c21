"""What has been computed and sent, kept on this machine: a run that was cut off goes on where it was.

A folder for each server and task. Answers are written whole before anything of them is sent; a line for each shape
before it goes out, and a line for each object when its shapes are known to be on the server. Nothing is ever taken
back, so whatever was cut off leaves something that reads well.

    ~/.local/state/sam_poll/cvat/cvat.example.org-1f0c2a9e/task-7/answers/000012-5d41402a.json

What can still go wrong here: on another machine, or with another `--state`, nothing of it is known; then only what lies
on the server tells what has been done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sam_poll.errors import ShareError, UsageError
from sam_poll.fs import shown, write_whole
from sam_poll.safe_path import SafePath


def state_folder(environment: Mapping[str, str], chosen: Path | None = None) -> Path:
    """Where journals lie: the folder chosen, or below `XDG_STATE_HOME`, or below `~/.local/state`."""
    if chosen is not None:
        return chosen
    home = environment.get("XDG_STATE_HOME")
    if home and Path(home).is_absolute():  # the XDG specification: others are to be ignored
        return Path(home) / "sam_poll" / "cvat"
    try:
        return Path.home() / ".local" / "state" / "sam_poll" / "cvat"
    except RuntimeError:
        raise UsageError("there is no home folder to keep a journal in", remedy="name a folder with --state") from None


def digest(value: Any) -> str:
    """A name for a JSON value: 16 hex digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def folder_of(state: Path, host: str, *parts: str) -> Path:
    """The folder for something of a server: its name to be read, a digest to be its own."""
    readable = "".join(c if c.isalnum() or c in ".-" else "_" for c in host.partition("://")[2])[:60]
    return state.joinpath(f"{readable}-{digest(host)[:8]}", *parts)


class Journal:
    """One folder, for one process at a time. As a context it is locked; the lock dies with the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._answers, self._lock_file = folder / "answers", folder / "lock"
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Journal:
        try:
            self._answers.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock_file.open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            reason = "another sam-poll is at work on it"
            raise UsageError(reason, place=shown(self.folder), remedy="wait until it has ended") from None
        except OSError as error:
            self._close()
            raise _unusable(self.folder, error) from None
        return self

    def __exit__(self, *exc: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    # ── answers ──

    def keep(self, frame: int, answers: Mapping[str, Any]) -> None:
        """The answers to some of a frame's objects, by their keys. ShareError where they cannot be written."""
        name = f"{frame:06d}-{digest(sorted(answers))}.json"
        body = json.dumps(answers, separators=(",", ":")).encode()
        try:
            write_whole(SafePath.at(self._answers) / name, body)
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def frames(self) -> dict[int, list[Path]]:
        """The files with answers, by frame."""
        found: dict[int, list[Path]] = {}
        for path in sorted(self._answers.glob("*.json")) if self._answers.is_dir() else ():
            number = path.name.partition("-")[0]
            if number.isdecimal():
                found.setdefault(int(number), []).append(path)
        return found

    @staticmethod
    def answers(files: Iterable[Path]) -> dict[str, Any]:
        """What these files hold. One that cannot be read counts as none: its objects are asked for again."""
        found: dict[str, Any] = {}
        for path in files:
            try:
                read = json.loads(path.read_bytes())
            except (OSError, ValueError):
                continue
            found |= read if isinstance(read, dict) else {}
        return found

    # ── lines ──

    def note(self, what: str, lines: Iterable[str]) -> None:
        """Add lines to the list `what`, and have them on the disk before it returns."""
        body = "".join(f"{line}\n" for line in lines).encode()
        if not body:
            return
        try:
            with (self.folder / f"{what}.txt").open("ab+") as file:
                file.write(body if _ends_a_line(file) else b"\n" + body)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def noted(self, what: str) -> set[str]:
        """The lines of the list `what`; half a line, left by a power cut, is no line that anybody looks for."""
        return set(self._lines(what))

    def _lines(self, what: str) -> Iterator[str]:
        try:
            yield from (self.folder / f"{what}.txt").read_text("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unusable(self.folder, error) from None

    # ── one value ──

    def write(self, value: Mapping[str, Any]) -> None:
        """The journal's one value, whole."""
        try:
            write_whole(SafePath.at(self.folder) / "journal.json", json.dumps(value, indent=1).encode())
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def read(self) -> dict[str, Any]:
        """The journal's one value; empty where there is none yet."""
        try:
            read = json.loads((self.folder / "journal.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        except OSError as error:
            raise _unusable(self.folder, error) from None
        return read if isinstance(read, dict) else {}


def _ends_a_line(file: BinaryIO) -> bool:
    """Whether what is added begins a line: a power cut or a full disk leaves half of one."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _unusable(folder: Path, error: OSError) -> ShareError:
    reason = f"the journal cannot be kept: {error.strerror or error}"
    return ShareError(reason, place=shown(folder), remedy="name another folder with --state")
