"""The files below one of the five folders, kept in memory: only what has changed is read again.

A folder whose times are as they were is not listed again. In one that is listed again, a file of
the same name and inode is taken for the same file, so that its status is not read again: on a
share with 100,000 files most of the time would go there.

Limitations: a file that is changed in place keeps the time that it was first seen with. A file
system that gives a new file the inode of the one that it replaces hides the replacement.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sam_poll.core.files import TEMP_PREFIX
from sam_poll.core.safe_path import SafePath
from sam_poll.share.intake.directory_index import DirectoryStamp
from sam_poll.share.intake.ignored import SYSTEM_ONLY, Ignored

_SKIPPED = (FileNotFoundError, NotADirectoryError, PermissionError)


@dataclass(frozen=True, slots=True)
class IndexedFile:
    """A regular file: its name, inode, kind and, if the index reads times, modification time."""

    name: str
    inode: int
    kind: str
    modified: float = 0.0


@dataclass(slots=True, eq=False)
class IndexedFolder:
    """The files of one folder, by name; `path` is relative to the index's root, "" for the root.

    A folder that was listed again is a new object; `kinds` counts its files by kind.
    """

    path: str
    unchanged: DirectoryStamp
    files: dict[str, IndexedFile] = field(default_factory=dict)
    below: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)

    def path_of(self, name: str) -> str:
        """Return a file's path relative to the index's root."""
        return f"{self.path}/{name}" if self.path else name


class FileIndex:
    """The files below a folder, as `layout.walk` finds them. Used by one thread.

    - `kind`: returns the kind of a file by its name.
    - `keep`: do not list unchanged folders again. False where other machines' changes may not show
      in a folder's times (network shares).
    - `times`: read modification times.
    """

    def __init__(
        self,
        root: SafePath,
        *,
        kind: Callable[[str], str],
        keep: bool = True,
        times: bool = False,
        ignored: Ignored = SYSTEM_ONLY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root = root
        self._kind = kind
        self._keep = keep
        self._times = times
        self._ignored = ignored
        self._clock = clock
        self._folders: dict[str, IndexedFolder] = {}

    @property
    def folders(self) -> Iterator[IndexedFolder]:
        """Yield all folders, including empty ones."""
        yield from self._folders.values()

    def kinds(self) -> Counter[str]:
        """Return the number of files of each kind."""
        total: Counter[str] = Counter()
        for folder in self._folders.values():
            total.update(folder.kinds)
        return total

    def refresh(self) -> bool:
        """List what may have changed; return whether any file has.

        A root that does not exist has no files. Raises OSError where it cannot be read.
        """
        before = self._folders
        found: dict[str, IndexedFolder] = {}
        pending = [""]
        while pending:
            path = pending.pop()
            folder = self._current(path, before.get(path))
            if folder:
                found[path] = folder
                pending += folder.below
        self._folders = found
        return len(found) != len(before) or any(
            before.get(path) is not folder for path, folder in found.items()
        )

    def _current(self, path: str, known: IndexedFolder | None) -> IndexedFolder | None:
        """Return a folder as it is now: `known` if its files are the same, None if it is gone."""
        where = self._root / path
        folder = IndexedFolder(path, known.unchanged if known else DirectoryStamp(self._clock))
        try:
            if known and self._keep and known.unchanged.holds(where):
                return known
            folder.unchanged.begin(where)
            self._list(where, folder, known.files if known else {})
        except FileNotFoundError:
            return None
        except _SKIPPED:
            if not path:
                raise
            return known  # it may be readable again later; what was seen is the best that is known
        if known and known.files == folder.files and known.below == folder.below:
            return known
        return folder

    def _list(self, where: SafePath, folder: IndexedFolder, known: dict[str, IndexedFile]) -> None:
        has_patterns = bool(self._ignored.patterns)
        files = folder.files
        with where.scandir() as entries:
            for entry in entries:
                name = entry.name
                before = known.get(name)
                if before and before.inode == entry.inode():
                    files[name] = before
                elif entry.is_file(follow_symlinks=False):
                    ignored = has_patterns and self._ignored.file(folder.path_of(name))
                    if not ignored and not name.startswith(TEMP_PREFIX):
                        self._add(files, entry)
                elif (
                    entry.is_dir(follow_symlinks=False)
                    and not name.startswith(".")
                    and not self._ignored.folder(folder.path_of(name))
                ):
                    folder.below.append(folder.path_of(name))
        folder.kinds = Counter(file.kind for file in files.values())

    def _add(self, files: dict[str, IndexedFile], entry: os.DirEntry[str]) -> None:
        modified = 0.0
        if self._times:
            try:
                modified = entry.stat(follow_symlinks=False).st_mtime
            except (FileNotFoundError, PermissionError):
                return  # it has just been moved, or is in a folder that may only be listed
        name = entry.name
        files[name] = IndexedFile(name, entry.inode(), self._kind(name), modified)
