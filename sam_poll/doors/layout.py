"""The share's folders: which there are, the proof that they can be used, what lies in them, putting failed jobs back.

What can still go wrong here: the proof is of the moment it was made. Two daemons on one share are kept apart by an
advisory lock, which some network file systems grant to everybody; there, see to it that one daemon runs.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

from loguru import logger

from sam_poll.doors.settle import PROMPT_ENDINGS, is_temporary
from sam_poll.errors import ShareError
from sam_poll.fs import TEMP_PREFIX, exists, free_suffix, move_new, shown, with_suffix
from sam_poll.images import ENDINGS

ERROR_ENDING = ".error.json"
LOCK_NAME = TEMP_PREFIX + "lock"


@dataclass(frozen=True)
class Layout:
    """Where things lie. `suffixes` renames a format's outputs (`{".mask.png": ".png"}`), `prompt_endings` and
    `picture_endings` say which files are jobs, `delete_input`: answered inputs are deleted, not moved to `done`."""

    input: Path
    work: Path
    output: Path
    done: Path
    failed: Path
    delete_input: bool = False
    prompt_endings: frozenset[str] = PROMPT_ENDINGS
    picture_endings: frozenset[str] = ENDINGS
    suffixes: dict[str, str] = field(default_factory=dict)

    @property
    def folders(self) -> dict[str, Path]:
        """All five by name."""
        return {k: getattr(self, k) for k in ("input", "work", "output", "done", "failed")}

    @property
    def share(self) -> Path:
        """What the names in CVAT are relative to: the deepest folder that holds input and done."""
        return Path(os.path.commonpath([self.input.absolute().parent, self.done.absolute()]))

    def share_name(self, path: Path) -> str:
        """A picture as CVAT knows it, `done/cam1/dog.jpg`."""
        return path.absolute().relative_to(self.share).as_posix()

    def is_prompt(self, name: str) -> bool:
        """Whether a file name is a prompt's."""
        return os.path.splitext(name)[1].lower() in self.prompt_endings

    def is_picture(self, name: str) -> bool:
        """Whether a file name is a picture's."""
        return os.path.splitext(name)[1].lower() in self.picture_endings


def walk(root: Path, visited: Callable[[str], object] = lambda folder: None) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Regular files below a folder as (path relative to it with `/`, entry), without following any link.

    `visited` is told each subfolder's path, empty ones included.
    Folders that vanish meanwhile are passed over; a root that cannot be read raises OSError.
    """
    pending = [""]
    while pending:
        folder = pending.pop()
        try:
            entries = os.scandir(root / folder if folder else root)
        except (FileNotFoundError, NotADirectoryError):
            if not folder:
                raise
            continue
        with entries:
            for entry in entries:
                path = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith("."):
                        visited(path)
                        pending.append(path)
                elif entry.is_file(follow_symlinks=False):
                    yield path, entry


def prove(layout: Layout) -> None:
    """Make the folders where they are missing and prove by a real rename that a file can travel through them.

    Device numbers are not enough: two bind mounts of one disk have the same number and still refuse a rename.
    ShareError says which two folders do not fit and what to do.
    """
    if not layout.input.parent.is_dir():
        raise ShareError(
            "the share is not there",
            place=str(layout.input),
            remedy=f"mount it, or `mkdir -p {layout.input}`",
        )
    for name, folder in layout.folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unusable(name, folder, error) from error
    names = list(layout.folders.items())
    token = f"{TEMP_PREFIX}{os.getpid()}-probe"
    here_name, here = names[0]
    probe = here / token
    try:
        probe.write_bytes(b"")
    except OSError as error:
        raise unusable(here_name, here, error) from error
    try:
        for name, folder in names[1:]:
            try:
                probe = probe.rename(folder / token)
            except OSError as error:
                if error.errno == errno.EXDEV:
                    raise ShareError(
                        f"`{here_name}` and `{name}` are on different file systems: renaming between them fails",
                        place=f"{here} → {folder}",
                        remedy="put all five folders on one mount (in Docker: mount their parent, not each of them)",
                    ) from error
                raise unusable(name, folder, error) from error
            here_name, here = name, folder
    finally:
        probe.unlink(missing_ok=True)


def unusable(name: str, folder: Path, error: OSError) -> ShareError:
    """What to say of a folder, or a file in it, that the system does not let us use."""
    return ShareError(
        f"`{name}` cannot be used: {error.strerror or error}",
        place=str(folder),
        remedy=f"this process runs as user {os.getuid()}, group {os.getgid()}; it must be able to write there",
    )


class Lock:
    """Keeps a second daemon off the same share. `with Lock(layout): …`; ShareError names who has it."""

    def __init__(self, layout: Layout) -> None:
        self._path = layout.work / LOCK_NAME
        self._file: IO[str] | None = None

    def __enter__(self) -> Lock:
        import fcntl

        try:
            self._file = self._path.open("a+")
        except OSError as error:  # made by another user, most likely
            raise unusable("work", self._path, error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                logger.warning("{} grants no locks: make sure that one daemon runs on this share", self._path.parent)
                return self
            self._file.seek(0)
            owner = self._file.read().strip() or "unknown"
            self._file.close()
            raise ShareError(
                f"another sam-poll works on this share ({owner})",
                place=str(self._path.parent),
                remedy="stop it, or give this one folders of its own",
            ) from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()


def recover(layout: Layout) -> int:
    """Put what an earlier run left in `work/` back into `input`, and sweep its unfinished outputs.

    A name that is taken in `input` by now gets a suffix, the same for picture and prompts. Returns the files moved.
    """
    groups: dict[str, list[str]] = {}
    for path, entry in walk(layout.work):
        if not entry.name.startswith(TEMP_PREFIX):
            folder, _, name = path.rpartition("/")
            groups.setdefault(f"{folder}/{name.split('.')[0]}", []).append(path)
    for paths in groups.values():
        suffix = free_suffix([layout.input / p for p in paths])
        for path in sorted(paths, key=lambda p: layout.is_prompt(p)):  # pictures first: a prompt never waits alone
            move_new(layout.work / path, with_suffix(layout.input / path, suffix))
    for folder in {os.path.dirname(p) for paths in groups.values() for p in paths}:
        for stale in (layout.output / folder).glob(TEMP_PREFIX + "*.tmp"):
            stale.unlink(missing_ok=True)
    moved = sum(map(len, groups.values()))
    if moved:
        logger.info("{} files of an earlier run were still in work/: they are back in {}", moved, layout.input)
    return moved


def status(layout: Layout, now: float | None = None) -> dict[str, Any]:
    """Counts of the five folders, and the oldest prompt or picture that waits.

    `{"input": {"pictures": 3, "prompts": 2, "other": 0}, "work": …, "oldest": {"name": …, "seconds": …} | None}`
    """
    now = time.time() if now is None else now
    report: dict[str, Any] = {}
    oldest: tuple[float, str] | None = None
    for name, folder in layout.folders.items():
        counts = {"pictures": 0, "prompts": 0, "other": 0}
        if name == "failed":
            counts["errors"] = 0
        report[name] = counts
        if not folder.is_dir():
            continue
        for path, entry in walk(folder):
            if entry.name.startswith(TEMP_PREFIX):
                continue
            kind = _kind(layout, entry.name, name)
            counts[kind] = counts.get(kind, 0) + 1
            if name == "input" and kind in ("pictures", "prompts"):
                age = entry.stat(follow_symlinks=False).st_mtime
                oldest = min(oldest, (age, path)) if oldest else (age, path)
    report["oldest"] = {"name": oldest[1], "seconds": max(0.0, round(now - oldest[0], 1))} if oldest else None
    return report


def _kind(layout: Layout, name: str, folder: str) -> str:
    if is_temporary(name):
        return "other"
    if folder == "failed" and name.endswith(ERROR_ENDING):
        return "errors"
    if folder != "output" and layout.is_prompt(name):
        return "prompts"
    return "pictures" if folder != "output" and layout.is_picture(name) else "other"


def retry(layout: Layout, pattern: str = "*", *, on_move: Callable[[str], None] = lambda name: None) -> int:
    """Put failed jobs whose id matches the pattern (`cam1/*`) back into `input` and drop their error files.

    Returns the number of jobs. What the error file lists is moved; a name taken in `input` is left where it is.
    """
    jobs = 0
    errors = [p for p, e in walk(layout.failed) if e.name.endswith(ERROR_ENDING)] if layout.failed.is_dir() else []
    for path in sorted(errors):
        error_file = layout.failed / path
        identity = path[: -len(ERROR_ENDING)]
        if not fnmatch(identity, pattern):
            continue
        files = _files_of(error_file)
        folder = os.path.dirname(path)
        moves = [(error_file.parent / f, layout.input / folder / f) for f in files]
        moves = [(source, target) for source, target in moves if exists(source)]
        taken = [target for _, target in moves if exists(target)]
        if taken:
            logger.warning("{} stays in failed/: {} is taken", shown(identity), shown(taken[0]))
            continue
        for source, target in sorted(moves, key=lambda m: layout.is_prompt(m[0].name)):
            move_new(source, target)
        error_file.unlink(missing_ok=True)
        jobs += 1
        on_move(identity)
    return jobs


def _files_of(error_file: Path) -> list[str]:
    try:
        listed = json.loads(error_file.read_bytes()).get("files", [])
    except (OSError, ValueError, AttributeError):
        listed = []
    # Names come from a file that anybody on the share can write: plain names beside it, nothing else.
    return [f for f in listed if isinstance(f, str) and f == os.path.basename(f) and f not in ("", ".", "..")]
