"""The names in `in/`: its pictures, prompts and mask files, listed again where they have changed.

A folder's inode and times say whether it has changed. They are only compared with what they were;
how long they have been the same is measured by this machine's monotonic clock, so that no two
machines' clocks are compared.

Limitations: a file system that does not change a folder's times when its names change hides a file
for `TRUTH_S`. Where other machines write (polling), every refresh therefore lists all folders.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from sam_poll.core.files import NOT_THERE
from sam_poll.core.safe_path import SafePath
from sam_poll.imaging.sidecars import AUX_STEM, is_aux
from sam_poll.prompts.mask_files import is_mask_file
from sam_poll.share.file_kinds import is_temporary
from sam_poll.share.layout import Layout

OLD_S = 3.0
"""Seconds longer than a file system's steps of time; FAT has steps of 2 s, others finer ones."""
TRUTH_S = 300.0
"""Seconds after which a folder is listed again in any case."""

_OTHER = 0
_PICTURE = 1
_PROMPT = 2
_PICTURE_OR_MASK = 3
_TEMPORARY_STARTS = frozenset(".~#")  # what names begin with that `is_temporary` knows
_MAX_ENDINGS = 1000
_MAX_OTHERS = 10_000  # in one folder; they only serve to explain what waits
_SKIPPED = (FileNotFoundError, NotADirectoryError, PermissionError)


class DirectoryStamp:
    """Says whether a folder has the names that it had when it was last listed.

    Call `begin` before listing it, and `holds` later. A listing counts only if at its beginning the
    folder's times were older than the file system's steps: any later change has then changed them.

    Both raise OSError, except where the folder is not there, which is a state like any other.
    """

    __slots__ = ("_clock", "_listed", "_since", "_stamp")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stamp: tuple[int, ...] | None = None
        self._since = self._listed = 0.0

    def begin(self, path: SafePath) -> None:
        """Note that the folder is listed now."""
        stamp = _stamp(path)
        now = self._clock()
        if stamp != self._stamp:
            self._stamp, self._since = stamp, now
        self._listed = now

    def holds(self, path: SafePath) -> bool:
        """Return whether listing the folder again would give the same names."""
        if (
            self._stamp is None
            or self._listed - self._since < OLD_S
            or self._clock() - self._listed >= TRUTH_S
        ):
            return False
        return _stamp(path) == self._stamp


def _stamp(path: SafePath) -> tuple[int, ...]:
    try:
        status = path.lstat()
    except OSError as error:
        if error.errno in NOT_THERE:
            return ()
        raise
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


@dataclass(slots=True)
class _Folder:
    """The names in one folder, as paths relative to `in/`; `others` are as in `others_in`."""

    unchanged: DirectoryStamp
    pictures: list[str] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    masks: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)
    others: dict[str, bool] = field(default_factory=dict, compare=False)
    closed: bool = False


class DirectoryIndex:
    """The names in `in/`. Paths are relative to it, with `/`. Links are not followed.

    `keep`: do not list unchanged folders again. Used by one thread.
    """

    def __init__(
        self, layout: Layout, *, keep: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._layout = layout
        self._keep = keep
        self._clock = clock
        self._folders: dict[str, _Folder] = {}
        self._kinds: dict[str, int] = {}
        self.pictures: set[str] = set()
        self.prompts: list[str] = []
        self.masks: set[str] = set()
        """The mask files, which prompts may name."""

    @property
    def below(self) -> set[str]:
        """Return all subfolders, including empty ones."""
        return self._folders.keys() - {""}

    @property
    def closed(self) -> set[str]:
        """Return the subfolders that may not be read; their files wait."""
        return {path for path, folder in self._folders.items() if folder.closed}

    def pictures_in(self, folder: str) -> list[str]:
        """Return the file names of the pictures in one folder."""
        known = self._folders.get(folder)
        return [path[path.rfind("/") + 1 :] for path in known.pictures] if known else []

    def masks_in(self, folder: str) -> list[str]:
        """Return the file names of the mask files in one folder."""
        known = self._folders.get(folder)
        return [path[path.rfind("/") + 1 :] for path in known.masks] if known else []

    def others_in(self, folder: str) -> dict[str, bool]:
        """Return the names in one folder of what is neither a picture nor a prompt.

        Of the folders in it only those that are named as a picture or a prompt. The value says
        whether a name is a link.
        """
        known = self._folders.get(folder)
        return known.others if known else {}

    def others(self) -> Iterator[tuple[str, dict[str, bool]]]:
        """Yield each folder that has such names, with what `others_in` returns for it."""
        yield from (
            (path, folder.others) for path, folder in self._folders.items() if folder.others
        )

    def forget(self) -> None:
        """List everything again at the next refresh."""
        self._folders.clear()

    def refresh(self) -> bool:
        """List what may have changed, and return whether any name has.

        Raises OSError when `in/` itself cannot be read.
        """
        before, self._folders = self._folders, {}
        pending = [""]
        same = True
        try:
            while pending:
                path = pending.pop()
                known = before.get(path)
                folder = self._current(path, known)
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
        self.masks = set().union(*(f.masks for f in self._folders.values()))
        return True

    def _current(self, path: str, known: _Folder | None) -> _Folder | None:
        """Return the folder as it is now; `known` itself where it has the same names.

        Returns None where it has vanished.
        """
        where = self._layout.input / path
        folder = _Folder(known.unchanged if known else DirectoryStamp(self._clock))
        try:
            if known and self._keep and folder.unchanged.holds(where):
                return known
            folder.unchanged.begin(where)
            self._list(where, f"{path}/" if path else "", folder)
        except _SKIPPED as error:
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
        """Read the names of a folder. `prefix`: its path with a `/` behind it, or nothing."""
        kinds = self._kinds
        pictures = folder.pictures
        prompts = folder.prompts
        masks = folder.masks
        ignored = self._layout.ignored
        has_patterns = bool(ignored.patterns)
        with where.scandir() as entries:
            # This runs for each file of a crowd: as few calls as possible, cheap ones first.
            for entry in entries:
                name = entry.name
                kind = kinds.get(name[name.rfind(".") :])
                if kind is None:
                    kind = self._kind(name)
                if (
                    kind
                    and not (name[0] in _TEMPORARY_STARTS and is_temporary(name))
                    and entry.is_file(follow_symlinks=False)
                ):
                    if has_patterns and ignored.file(prefix + name):
                        continue
                    if kind == _PROMPT:
                        prompts.append(prefix + name)
                    elif kind == _PICTURE_OR_MASK and is_mask_file(name):
                        masks.append(prefix + name)
                    else:
                        pictures.append(prefix + name)
                elif (
                    name[0] != "."
                    and entry.is_dir(follow_symlinks=False)
                    and not ignored.folder(prefix + name)
                ):
                    folder.below.append(prefix + name)
                    if kind and len(folder.others) < _MAX_OTHERS:
                        folder.others[name] = False
                elif (
                    name[0] != "."
                    and len(folder.others) < _MAX_OTHERS
                    and not ignored.folder(prefix + name)
                ):
                    folder.others[name] = entry.is_symlink()

    def _kind(self, name: str) -> int:
        """Return what files with a name's ending are, and remember it by the ending."""
        ending = name[name.rfind(".") :]
        usual = f"x{ending}"  # `.json` itself has no ending
        if not ending.startswith(".") or is_temporary(usual) or is_aux(name):
            return _OTHER
        if self._layout.is_prompt(usual):
            kind = _PROMPT
        elif self._layout.is_picture(usual):
            kind = _PICTURE_OR_MASK if is_mask_file(f"x.rough{ending}") else _PICTURE
        else:
            kind = _OTHER
        if len(self._kinds) < _MAX_ENDINGS and not is_aux(f"{AUX_STEM}{ending}"):
            self._kinds[ending] = kind
        return kind
