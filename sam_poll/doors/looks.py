"""Looks at the files of `in/`: as few as can be, because a crowd of files is large and a share may be slow.

A file is looked at when it is first wanted, when the watcher has seen something happen to it, when it is doubted, and
once more when it is to be claimed (`changed`). What the last of these finds as the first one did has been the same for
all the time between.

What can still go wrong here: a writer that puts size and time of a file back as they were before anybody looked again.
"""

from __future__ import annotations

import os
import stat
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

from sam_poll.doors.layout import Layout
from sam_poll.doors.settle import Hint, Settler, Signature, is_temporary
from sam_poll.fs import NOT_THERE
from sam_poll.safe_path import SafePath

NEVER = float("inf")
_MAX_HINTS = 100_000


class Looks:
    """What is known of the files in `in/`. Paths are relative to it. Used by one thread, but for `hinted`.

    `soonest`: when the first of the files asked for has settled; `hurried`: not all could be looked at. Both since
    `begin`.
    """

    def __init__(
        self,
        layout: Layout,
        quiet_s: float,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[str], object] = lambda path: None,
    ) -> None:
        """`changed` is told of each file that is not any more as it was known."""
        self._layout, self._clock, self._changed = layout, clock, changed
        self._prefix = f"{layout.input}/"
        self._input = layout.input
        self._settler = Settler(quiet_s)
        self._hints: deque[tuple[str, Hint, float]] = deque(maxlen=_MAX_HINTS)
        self._doubted: set[str] = set()
        self._spell_s = self._spent_s = 0.0
        self.closed: set[str] = set()
        """Folders whose files may not be looked at."""
        self.soonest = NEVER
        self.hurried = False

    def begin(self, spell_s: float) -> None:
        """A scan may spend so long on looking."""
        self._spell_s, self._spent_s = spell_s, 0.0
        self.soonest, self.hurried = NEVER, False

    @contextmanager
    def spending(self) -> Iterator[None]:
        """What is done in here counts as looking. What is not looking does not: each scan must get on."""
        started = self._clock()
        try:
            yield
        finally:
            self._spent_s += self._clock() - started

    def hinted(self, path: str, hint: Hint, seen: float) -> bool:
        """The watcher has seen something; from its thread. False: nobody needs to wake up for it."""
        name = path[path.rfind("/") + 1 :]
        if is_temporary(name) or not (self._layout.is_prompt(name) or self._layout.is_picture(name)):
            return False
        if self._layout.ignored.patterns and self._layout.ignored.file(self._below(path)):
            return False
        self._hints.append((path, hint, seen))
        return hint is not Hint.OPENED

    def take_hints(self) -> bool:
        """Whether there were any that tell of a change."""
        told = False
        while self._hints:
            where, hint, seen = self._hints.popleft()
            path = where[len(self._prefix) :] if where.startswith(self._prefix) else self._below(where)
            self._settler.hint(path, hint, seen)
            if hint is not Hint.OPENED:
                self._doubted.add(path)
                told = True
        return told

    def _below(self, where: str) -> str:
        return os.path.relpath(where, self._input.path).replace(os.sep, "/")

    def forget_all_but(self, paths: Collection[str]) -> None:
        """Drop what is no longer there."""
        self._settler.forget_all_but(paths)
        self._doubted.intersection_update(paths)

    def doubt(self, paths: Iterable[str]) -> None:
        """These are to be looked at anew when they are next asked for."""
        self._doubted.update(paths)

    def known(self, path: str) -> Signature | None:
        """What was last seen of a file; None: nothing."""
        return self._settler.known(path)

    def being_written(self, path: str) -> bool:
        """Whether the watcher has last seen somebody write into a file, who has not closed it since."""
        return self._settler.being_written(path)

    def settled(self, path: str) -> bool:
        """Whether a file has settled, looking at it if need be. False also when it is gone, or there was no time."""
        left = None if path in self._doubted else self._settler.left(path, self._clock())
        if left is None:
            if self.out_of_time() or self.look(path) is None:
                return False
            left = self.left(path)
        if left > 0:
            self.soonest = min(self.soonest, self._clock() + left)
        return left <= 0

    def out_of_time(self) -> bool:
        """Whether this scan has looked for long enough; what waits is then for the next."""
        if self._spent_s < self._spell_s:
            return False
        self.hurried = True
        return True

    def look(self, path: str) -> Signature | None:
        """A file as it is now; None if it is gone."""
        started = self._clock()
        known = self._settler.known(path)
        try:
            signature = _looked(self._input / path)
            if self.closed:
                self.closed.discard(path.rpartition("/")[0])
        except PermissionError:  # its folder may be listed, and what lies in it not be looked at
            signature = None
            self.closed.add(path.rpartition("/")[0])
        self._doubted.discard(path)
        if known not in (signature, None):
            self._changed(path)
        now = self._clock()
        self._spent_s += now - started
        if signature:
            # By the time of this very look: a scan of a slow share may have begun long ago.
            self._settler.settled_in(path, signature, now)
        return signature

    def changed(self, signatures: dict[str, Signature]) -> list[str]:
        """Which of these files are not as they were seen. Theirs is to settle anew."""
        return [path for path, seen in signatures.items() if self.look(path) != seen]

    def left(self, path: str) -> float:
        """Seconds until a file that was looked at has settled."""
        return self._settler.left(path, self._clock()) or 0.0


def look(path: SafePath) -> Signature | None:
    """A regular file's signature; None if it is not there, something else, or in a folder that is closed to us."""
    try:
        return _looked(path)
    except PermissionError:
        return None


def _looked(path: SafePath) -> Signature | None:
    try:
        found = path.lstat()
    except OSError as error:
        if error.errno in NOT_THERE:
            return None
        raise
    return Signature(found.st_ino, found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None
