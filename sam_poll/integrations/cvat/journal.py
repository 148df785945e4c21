"""The local record of computed and uploaded shapes, with which an interrupted run is resumed.

There is one folder for each server and task. Answers are written, each file whole, before any of
them is sent; a line is written for each shape before it is sent, and for each object when its
shapes are known to be on the server. Nothing is ever removed, so an interruption at any point
leaves files that can be read.

    ~/.local/state/sam_poll/cvat/cvat.example.org-1f0c2a9e/task-7/answers/000012-5d41402a.json

Limitations: the journal is local. On another machine, or with another `--state`, only the shapes on
the server tell what has been done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from sam_poll.core.errors import ShareError, UsageError
from sam_poll.core.files import write_whole
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown

_MAX_HOST = 60  # characters of a host's name in its folder's name


def state_folder(environment: Mapping[str, str], chosen: Path | None = None) -> Path:
    """Return the folder for journals: `chosen`, or one below `XDG_STATE_HOME` or `~/.local/state`.

    Raises UsageError if there is no home folder.
    """
    if chosen is not None:
        return chosen
    home = environment.get("XDG_STATE_HOME")
    if home and Path(home).is_absolute():  # the XDG specification: ignore relative paths
        return Path(home) / "sam_poll" / "cvat"
    try:
        return Path.home() / ".local" / "state" / "sam_poll" / "cvat"
    except RuntimeError:
        raise UsageError(
            "there is no home folder for the journal", remedy="name a folder with --state"
        ) from None


def digest(value: Any) -> str:
    """Return a digest of a JSON value: 16 hex digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def folder_of(state: Path, host: str, *parts: str) -> Path:
    """Return the folder for something of a server: its readable name, made unique by a digest."""
    name = host.partition("://")[2]
    readable = "".join(c if c.isalnum() or c in ".-" else "_" for c in name)[:_MAX_HOST]
    return state.joinpath(f"{readable}-{digest(host)[:8]}", *parts)


class Journal:
    """One journal folder. As a context manager it is locked; the lock ends with the process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._answers = folder / "answers"
        self._lock_file = folder / "lock"
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Journal:
        try:
            self._answers.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock_file.open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._close()
            raise UsageError(
                "another sam-poll is using this journal",
                place=shown(self.folder),
                remedy="wait until it has ended",
            ) from None
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

    def store_answers(self, frame: int, answers: Mapping[str, Any]) -> None:
        """Write the answers for some of a frame's objects, by their keys, into one file.

        Raises ShareError if the file cannot be written.
        """
        name = f"{frame:06d}-{digest(sorted(answers))}.json"
        body = json.dumps(answers, separators=(",", ":")).encode()
        try:
            write_whole(SafePath.at(self._answers) / name, body)
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def answer_files(self) -> dict[int, list[Path]]:
        """Return the files with answers, by frame number."""
        files: dict[int, list[Path]] = {}
        if not self._answers.is_dir():
            return files
        for path in sorted(self._answers.glob("*.json")):
            number = path.name.partition("-")[0]
            if number.isdecimal():
                files.setdefault(int(number), []).append(path)
        return files

    @staticmethod
    def read_answers(files: Iterable[Path], is_valid: Callable[[Any], bool]) -> dict[str, Any]:
        """Return the valid answers in these files, by key.

        An unreadable file is skipped: its objects are then segmented again.
        """
        answers: dict[str, Any] = {}
        for path in files:
            try:
                content = json.loads(path.read_bytes())
            except (OSError, ValueError):
                continue
            if isinstance(content, dict):
                answers |= {key: answer for key, answer in content.items() if is_valid(answer)}
        return answers

    # ── lists of lines ──

    def append(self, list_name: str, lines: Iterable[str]) -> None:
        """Append lines to a list, and return when they are on the disk. Raises ShareError."""
        body = "".join(f"{line}\n" for line in lines).encode()
        if not body:
            return
        try:
            with (self.folder / f"{list_name}.txt").open("ab+") as file:
                file.write(body if _is_at_line_start(file) else b"\n" + body)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def lines(self, list_name: str) -> set[str]:
        """Return the lines of a list. Raises ShareError.

        A power cut may leave a partial line; it equals no line that is looked up.
        """
        return set(self._read_lines(list_name))

    def _read_lines(self, list_name: str) -> Iterator[str]:
        path = self.folder / f"{list_name}.txt"
        try:
            yield from path.read_text("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unusable(self.folder, error) from None

    # ── the state ──

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Replace the journal's state, a JSON object. Raises ShareError."""
        path = SafePath.at(self.folder) / "journal.json"
        try:
            write_whole(path, json.dumps(state, indent=1).encode())
        except OSError as error:
            raise _unusable(self.folder, error) from None

    def read_state(self) -> dict[str, Any]:
        """Return the journal's state; empty if there is none yet. Raises ShareError."""
        try:
            state = json.loads((self.folder / "journal.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        except OSError as error:
            raise _unusable(self.folder, error) from None
        return state if isinstance(state, dict) else {}


def _is_at_line_start(file: BinaryIO) -> bool:
    """Return whether the file ends with a whole line: a power cut may leave a partial one."""
    if not file.seek(0, os.SEEK_END):
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _unusable(folder: Path, error: OSError) -> ShareError:
    reason = f"the journal cannot be used: {error.strerror or error}"
    return ShareError(reason, place=shown(folder), remedy="name another folder with --state")
