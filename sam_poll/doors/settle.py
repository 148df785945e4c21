"""Which files are complete, and which prompt belongs to which picture. Pure: the clock and the listing are passed in.

A file is *settled* when its (inode, size, mtime) has not changed for a while by the monotonic clock. How long depends
on what the watcher saw: a rename puts a whole file in place, a close ends one writer's work, and without a word from
the watcher (polling, network shares, files found at start) only patience helps.

What can still go wrong here: a writer that pauses for longer than `quiet_s` in the middle of a file looks finished.
The picture's end marker, checked when it is decoded, catches most of these.
"""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

RENAMED_S = 0.03  # `opened` follows `created` within 1 ms when somebody writes; no `opened` by then: it was renamed
CLOSED_S = 0.3  # tools that open and close a file twice do so within this
LOCAL_S = 2.0
NETWORK_S = 10.0

PROMPT_ENDINGS = frozenset({".json", ".prompt"})
_TEMPORARY_ENDINGS = frozenset(
    {".part", ".partial", ".tmp", ".temp", ".crdownload", ".download", ".filepart", ".swp", ".opdownload", ".!sync"}
)
_TEMPORARY_STARTS = (".", "~$", "~syncthing~", "._")


def is_temporary(name: str) -> bool:
    """Whether a name is one that copying tools use while they write: `.part`, `.tmp`, `.crdownload`, `~$…`, `.~lock…`,
    dotfiles, rsync's `.dog.jpg.Ab12Cd`, Syncthing's `~syncthing~…` and `.syncthing.….tmp`, `dog.jpg~`, and an editor's
    `#dog.json#`; but not `#12 kitchen.jpg`."""
    lower = name.lower()
    if lower.startswith(_TEMPORARY_STARTS) or lower.endswith("~"):
        return True
    return _ending(lower) in _TEMPORARY_ENDINGS or (lower.startswith("#") and lower.endswith("#"))


class Signature(NamedTuple):
    """What changes when a file changes."""

    inode: int
    size: int
    mtime_ns: int


class Hint(IntEnum):
    """What the watcher saw happen to a file last."""

    OPENED = 0  # a writer, or a mere reader
    WRITING = 1
    CREATED = 2  # a name appeared and nobody has opened it (yet): a rename or a hard link from outside
    CLOSED = 3
    RENAMED = 4


class Settler:
    """Remembers looks and hints, and says which files have settled. Times are of one monotonic clock, in seconds."""

    def __init__(self, quiet_s: float = LOCAL_S, *, closed_s: float = CLOSED_S, renamed_s: float = RENAMED_S) -> None:
        self._wait = {
            Hint.WRITING: quiet_s,
            Hint.CREATED: min(renamed_s, quiet_s),
            Hint.CLOSED: min(closed_s, quiet_s),
            Hint.RENAMED: min(renamed_s, quiet_s),
        }
        self._quiet_s = quiet_s
        # (inode, size, mtime, since when they have been the same): one flat tuple a file, because there may be many.
        self._looks: dict[str, tuple[int, int, int, float]] = {}
        self._hints: dict[str, tuple[Hint, float]] = {}

    def hint(self, path: str, hint: Hint, now: float) -> None:
        """Take down what the watcher saw. Writing after a rename takes the rename's word back; reading does not."""
        if hint is Hint.OPENED:
            if self._hints.get(path, (None,))[0] is not Hint.CREATED:
                return
            hint = Hint.WRITING
        self._hints[path] = (hint, now)

    def settled_in(self, path: str, signature: Signature, now: float) -> float:
        """Seconds until the file counts as settled if nothing changes; 0 or less: it has settled."""
        look = self._looks.get(path)
        if look is None or look[:3] != signature:
            look = self._looks[path] = (*signature, now)
        return self._left(path, look[3], now)

    def left(self, path: str, now: float) -> float | None:
        """As `settled_in`, by what was last seen of the file; None: it was never looked at."""
        look = self._looks.get(path)
        return None if look is None else self._left(path, look[3], now)

    def _left(self, path: str, since: float, now: float) -> float:
        hint = self._hints.get(path)
        if hint is None:
            return since + self._quiet_s - now
        kind, seen = hint
        if kind is Hint.WRITING:
            return max(since, seen) + self._quiet_s - now
        return seen + self._wait[kind] - now

    def being_written(self, path: str) -> bool:
        """Whether the last hint is that of a writer who has not closed the file since."""
        return self._hints.get(path, (None,))[0] is Hint.WRITING

    def known(self, path: str) -> Signature | None:
        """What was last seen of a file; None: it was never looked at."""
        look = self._looks.get(path)
        return Signature(*look[:3]) if look else None

    def forget_all_but(self, paths: Collection[str]) -> None:
        """Drop what is no longer there, so that a year of file names does not pile up."""
        for book in (self._looks, self._hints):
            for path in [p for p in book if p not in paths]:
                del book[path]  # type: ignore[attr-defined]


class Ambiguous(NamedTuple):
    """A prompt that fits more than one picture."""

    pictures: tuple[str, ...]


class Index:
    """The pictures of a listing, to be found by a prompt's name. Paths are relative to `in/`, with `/`.

    A name beyond ASCII can be written in several ways that look the same (`é` is one character, or `e` and an accent:
    macOS writes it so). Where none is written as the prompt has it, one that looks the same is found.

    `partial`: prompts that were found a picture only by a part of their name, so that another picture could fit better:
    `dog.left.json` for `dog.jpg`.
    """

    def __init__(self, pictures: Iterable[str]) -> None:
        self._paths = set(pictures)
        self._by_stem: dict[str, str | list[str]] = {}
        self._composed: dict[str, str | list[str]] = {}
        self.partial: set[str] = set()
        beyond_ascii: list[str] = []
        for path in self._paths:
            stem = _cut(path)
            other = self._by_stem.setdefault(stem, path)
            if other is not path:
                _add(self._by_stem, stem, path)
            if not path.isascii():
                beyond_ascii.append(path)
        for path in beyond_ascii:
            _add(self._composed, composed(_cut(path)), path)
        for path in beyond_ascii:  # the whole name is the better one
            self._composed[composed(path)] = path

    def shares_stem(self, picture: str) -> bool:
        """Whether there is another picture with this one's stem."""
        found = self._by_stem.get(_cut(picture), picture)
        return found != picture

    def named(self, prompt: str, image: str) -> str | None:
        """The picture that a prompt names, beside it."""
        path = _join(_split(prompt)[0], image)
        if path in self._paths:
            return path
        found = None if path.isascii() else self._composed.get(composed(path))
        return found if isinstance(found, str) and composed(found) == composed(path) else None

    def find(self, prompt: str) -> str | Ambiguous | None:
        """The picture a prompt belongs to by its name, most exact first.

        `dog.jpg.json` is for `dog.jpg`; `dog.json` for the picture with stem `dog`; `dog.left.json` for `dog` too,
        if no picture is called `dog.left`, which `partial` then says.
        """
        whole = True
        for stem in _stems(prompt):
            if stem in self._paths:
                return stem
            found = self._by_stem.get(stem)
            if found is None and not stem.isascii():
                found = self._composed.get(composed(stem))
            if found is not None:
                if not whole:
                    self.partial.add(prompt)
                return found if isinstance(found, str) else Ambiguous(tuple(sorted(found)))
            whole = False
        return None


def _add(book: dict[str, str | list[str]], key: str, path: str) -> None:
    """One more picture under a key."""
    other = book.get(key, path)
    known = [other] if isinstance(other, str) else other
    book[key] = path if known == [path] else [*known, path]


def composed(path: str) -> str:
    """A path with its file name as most systems write it (Unicode's form NFC)."""
    if path.isascii():
        return path
    folder, name = _split(path)
    return _join(folder, unicodedata.normalize("NFC", name))


def stems(prompt: str) -> Iterator[str]:
    """What a prompt's picture may be called, with or without ending, most exact first: `dog.left`, then `dog`."""
    return _stems(_split(prompt)[1])


def _stems(path: str) -> Iterator[str]:
    start = path.rfind("/") + 1
    stem = _cut(path)
    while len(stem) > start:
        yield stem
        stem = stem[: max(stem.rfind(".", start), start)]


def _cut(path: str) -> str:
    """A path without its ending, as `posixpath.splitext` cuts it, in a third of the time."""
    dot = path.rfind(".")
    return path[:dot] if dot > path.rfind("/") + 1 and path[dot - 1] != "." else posixpath.splitext(path)[0]


def job_id(prompt: str, picture: str, *, shares_stem: bool, twin: bool) -> str:
    """The path of a job's outputs below `out/`, without suffix.

    Usually the prompt's path without its ending. `shares_stem`: another picture has this picture's stem, so the
    picture's own ending must be in the name (`dog.png`); `twin`: `dog.json` lies beside `dog.prompt`, so the second
    keeps its ending.
    """
    folder, name = _split(prompt)
    stem, picture_name = _stem(name), _split(picture)[1]
    if shares_stem and stem == _stem(picture_name):
        stem = picture_name
    return _join(folder, f"{stem}{_ending(name)}" if twin else stem)


def _split(path: str) -> tuple[str, str]:
    folder, _, name = path.rpartition("/")
    return folder, name


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def _ending(name: str) -> str:
    return posixpath.splitext(name)[1]
