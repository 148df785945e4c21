"""The names in `in/`: which pictures and prompts lie there. A folder that has not changed is not listed again.

Whether it has changed is told by its inode and times. They are compared for equality only, and how long they have been
the same is measured by our own monotonic clock: no clock is compared with another machine's.

What can still go wrong here: a file system that does not change a folder's times with its names hides a file for
`TRUTH_S`; where other machines write (polling), every look is therefore a whole one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sam_poll.doors.layout import Layout
from sam_poll.doors.settle import is_temporary
from sam_poll.fs import NOT_THERE
from sam_poll.safe_path import SafePath
from sam_poll.sidecars import AUX_STEM, is_aux

OLD_S = 3.0  # FAT keeps times in steps of 2 s, all others in finer ones
TRUTH_S = 300.0  # after this long nothing remembered is believed any more

_PICTURE, _PROMPT, _OTHER = 1, 2, 0
_ODD = frozenset(".~#")  # what `is_temporary` names begin with
_MAX_ENDINGS = 1000
_MAX_OTHERS = 10_000  # in one folder; they are of no use but to explain what waits
_PASSED_OVER = (FileNotFoundError, NotADirectoryError, PermissionError)


class Unchanged:
    """Whether a folder still has the names it had when it was last listed: `begin` a listing, later ask `holds`.

    A listing counts only if the folder's times were older than their own steps when it began: whatever came after it
    has then changed them. OSError, unless the folder is not there, which is a state like any other.
    """

    __slots__ = ("_clock", "_listed", "_since", "_stamp")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stamp: tuple[int, ...] | None = None
        self._since = self._listed = 0.0

    def begin(self, path: SafePath) -> None:
        """It is listed now."""
        stamp = _stamp(path)
        now = self._clock()
        if stamp != self._stamp:
            self._stamp, self._since = stamp, now
        self._listed = now

    def holds(self, path: SafePath) -> bool:
        """Whether listing it again would tell nothing new."""
        if self._stamp is None or self._listed - self._since < OLD_S or self._clock() - self._listed >= TRUTH_S:
            return False
        return _stamp(path) == self._stamp


def _stamp(path: SafePath) -> tuple[int, ...]:
    try:
        found = path.lstat()
    except OSError as error:
        if error.errno in NOT_THERE:
            return ()
        raise
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns


@dataclass(slots=True)
class _Folder:
    unchanged: Unchanged
    pictures: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)
    others: dict[str, bool] = field(default_factory=dict, compare=False)
    closed: bool = False


class Names:
    """What lies in `in/` by name. Paths are relative to it, with `/`. Links are not followed.

    `keep`: believe unchanged folders. Used by one thread.
    """

    def __init__(self, layout: Layout, *, keep: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._layout, self._keep, self._clock = layout, keep, clock
        self._folders: dict[str, _Folder] = {}
        self._kinds: dict[str, int] = {}
        self.pictures: set[str] = set()
        self.prompts: list[str] = []

    @property
    def below(self) -> set[str]:
        """All subfolders, empty ones included."""
        return self._folders.keys() - {""}

    @property
    def closed(self) -> set[str]:
        """Subfolders that may not be read; what lies in them waits."""
        return {path for path, folder in self._folders.items() if folder.closed}

    def pictures_in(self, folder: str) -> list[str]:
        """The file names of the pictures in one folder."""
        found = self._folders.get(folder)
        return [path[path.rfind("/") + 1 :] for path in found.pictures] if found else []

    def others_in(self, folder: str) -> dict[str, bool]:
        """The names in one folder that are no pictures, prompts or folders, links included, and whether each is one."""
        found = self._folders.get(folder)
        return found.others if found else {}

    def others(self) -> Iterator[tuple[str, dict[str, bool]]]:
        """As `others_in`, of all folders that have any."""
        yield from ((path, folder.others) for path, folder in self._folders.items() if folder.others)

    def forget(self) -> None:
        """Believe nothing at the next look."""
        self._folders.clear()

    def look(self) -> bool:
        """List what may have changed. False: the same names as before. OSError when `in/` itself cannot be read."""
        before, self._folders = self._folders, {}
        pending, same = [""], True
        try:
            while pending:
                path = pending.pop()
                known = before.get(path)
                folder = self._listed(path, known)
                if folder:
                    same = same and folder is known
                    self._folders[path] = folder
                    pending += folder.below
        except OSError:
            self._folders = {}
            raise
        if same and len(before) == len(self._folders):
            return False
        self.pictures = set().union(*(f.pictures for f in self._folders.values()))
        self.prompts = [prompt for f in self._folders.values() for prompt in f.prompts]
        return True

    def _listed(self, path: str, known: _Folder | None) -> _Folder | None:
        """The folder as it is now, `known` itself where it has the same names; None: it has vanished."""
        where = self._layout.input / path
        folder = _Folder(known.unchanged if known else Unchanged(self._clock))
        try:
            if known and self._keep and folder.unchanged.holds(where):
                return known
            folder.unchanged.begin(where)
            self._list(where, f"{path}/" if path else "", folder)
        except _PASSED_OVER as error:
            if not path:
                raise
            if not isinstance(error, PermissionError):
                return None
            folder.closed = True
        if known and folder == known:
            known.others = folder.others
            return known
        return folder

    def _list(self, where: SafePath, prefix: str, folder: _Folder) -> None:
        kinds, pictures, prompts = self._kinds, folder.pictures, folder.prompts
        ignored, some = self._layout.ignored, bool(self._layout.ignored.patterns)
        with where.scandir() as entries:
            for entry in entries:  # once for each file of a crowd: as little as can be
                name = entry.name
                kind = kinds.get(name[name.rfind(".") :])
                if kind is None:
                    kind = self._kind(name)
                if kind and not (name[0] in _ODD and is_temporary(name)) and entry.is_file(follow_symlinks=False):
                    if not (some and ignored.file(prefix + name)):
                        (pictures if kind == _PICTURE else prompts).append(prefix + name)
                elif name[0] != "." and entry.is_dir(follow_symlinks=False) and not ignored.folder(prefix + name):
                    folder.below.append(prefix + name)
                elif name[0] != "." and len(folder.others) < _MAX_OTHERS and not ignored.folder(prefix + name):
                    folder.others[name] = entry.is_symlink()

    def _kind(self, name: str) -> int:
        ending = name[name.rfind(".") :]
        if not ending.startswith(".") or is_temporary(f"x{ending}") or is_aux(name):
            return _OTHER
        usual = f"x{ending}"  # `.json` itself has no ending
        kind = _PROMPT if self._layout.is_prompt(usual) else _PICTURE if self._layout.is_picture(usual) else _OTHER
        if len(self._kinds) < _MAX_ENDINGS and not is_aux(f"{AUX_STEM}{ending}"):
            self._kinds[ending] = kind
        return kind
