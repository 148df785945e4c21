"""Where annotation files lie: in a folder, or in a ZIP. Nothing is unpacked to disk; a member's name is only a name.

Links in a folder that the user names are followed, because data sets are often made of them; but those that another
user has made are not: on a share that others write to, such a link could lead to a file that they may not read.

What can still go wrong here: a file that changes while it is read.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from sam_poll.annotations.reading import MAX_IMAGES
from sam_poll.doors.settle import is_temporary
from sam_poll.errors import PromptError

MAX_BYTES = 2 << 30  # of a file, and of all that is read of one ZIP
_TOO_LARGE = "export fewer pictures at once"
_IN_A_ZIP = "unpack it, and give the folder with the files in it"


@dataclass
class Listed:
    """The files below a folder: for each path relative to it (with `/`) where its bytes lie. `foreign` counts the links
    of other users, which are not followed."""

    files: dict[str, Path] = field(default_factory=dict)
    foreign: int = 0


def listed(root: Path, unlinked: Collection[Path] = ()) -> Listed:
    """List regular files below a folder, through links too; in hidden folders, and through links below one of
    `unlinked`, nothing is looked for. A folder that may not be read is passed over. OSError: `root` cannot be read."""
    made, owners = Listed(), {os.geteuid(), 0, root.stat().st_uid}
    seen: set[tuple[int, int]] = set()
    pending, linked = [("", root)], list[tuple[str, Path]]()
    while pending or linked:
        folder, there = pending.pop() if pending else linked.pop(0)
        try:
            found = there.stat()
            entries = sorted(os.scandir(there), key=lambda entry: entry.name)
        except OSError:
            if not folder:
                raise
            continue
        if (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if not entry.is_symlink():
                if entry.is_file():
                    made.files[path] = Path(entry.path)
                elif entry.is_dir() and not entry.name.startswith("."):
                    pending.append((path, Path(entry.path)))
                continue
            if any(Path(entry.path).is_relative_to(other) for other in unlinked):
                continue
            if entry.stat(follow_symlinks=False).st_uid not in owners:
                made.foreign += 1
                continue
            target = Path(os.path.realpath(entry.path))
            if target.is_file():
                made.files[path] = target
            elif target.is_dir() and not entry.name.startswith("."):
                linked.append((path, target))
    return made


def read(path: Path) -> bytes:
    """A file's bytes. PromptError: it is too large."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise PromptError(f"has {size >> 20:,} MiB; at most {MAX_BYTES >> 20:,} are read", remedy=_TOO_LARGE)
    return path.read_bytes()


class Folder:
    """The annotation files below a folder."""

    kind = "folder"

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files = listed(root).files
        self.names = sorted(name for name in self._files if not is_temporary(name.rpartition("/")[2]))

    def read(self, name: str) -> bytes:
        """A file's bytes, by its name. PromptError."""
        return read(self._files[name])


class Archive:
    """The annotation files in a ZIP, which is open as long as the `with` lasts. PromptError: it cannot be read."""

    kind = "ZIP"
    root: Path | None = None

    def __init__(self, path: Path) -> None:
        try:
            self._archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
            raise _broken(error) from None
        self._left = MAX_BYTES
        members = {info.filename: info for info in self._archive.infolist() if not info.is_dir()}
        if len(members) > MAX_IMAGES:
            self._archive.close()
            raise PromptError(f"is a ZIP of more than {MAX_IMAGES:,} files", remedy=_TOO_LARGE)
        self._members = {name: info for name, info in members.items() if _is_plain(name)}
        self.names = sorted(self._members)

    def read(self, name: str) -> bytes:
        """A member's bytes. PromptError: encrypted, damaged, or more than may be read of one ZIP."""
        info = self._members[name]
        if info.flag_bits & 1:
            raise PromptError("is an encrypted ZIP", remedy="unpack it with its password, and give the folder")
        try:
            with self._archive.open(info) as file:
                data = file.read(self._left + 1) if info.file_size <= self._left else bytes(self._left + 1)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise _broken(error) from None
        except Exception as error:  # zlib, lzma and bz2 have errors of their own  # noqa: BLE001
            raise _broken(error) from None
        if len(data) > self._left:
            raise PromptError(
                f"is a ZIP whose annotations are too large: at most {MAX_BYTES >> 20:,} MiB are read", remedy=_TOO_LARGE
            )
        self._left -= len(data)
        return data

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exc: object) -> None:
        self._archive.close()


def _broken(error: Exception) -> PromptError:
    return PromptError(f"is a ZIP that cannot be read: {error}", remedy="download or export it again")


def _is_plain(name: str) -> bool:
    """Whether a member is a file like others: not hidden, not what macOS adds."""
    *folders, file = name.split("/")
    return not is_temporary(file) and not any(part.startswith(".") or part == "__MACOSX" for part in folders)
