"""Which picture a prompt is for, by their names, and the job's name. Pure: names are passed in."""

from __future__ import annotations

import posixpath
import unicodedata
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Ambiguous(NamedTuple):
    """A prompt that fits more than one picture."""

    pictures: tuple[str, ...]


class PictureIndex:
    """The pictures of a listing, to be found by a prompt's name.

    Paths are relative to `in/`, with `/`. A name beyond ASCII can be written in several ways that
    look the same: `é` is one character, or, as macOS writes it, `e` and an accent. Where no picture
    is written as the prompt is, one that looks the same is found.

    `partial` collects prompts whose picture was found only by a part of their name, so that another
    picture could match better: `dog.left.json` for `dog.jpg`.
    """

    def __init__(self, pictures: Iterable[str]) -> None:
        self._paths = set(pictures)
        # By path without ending, as written and composed: one picture, or several.
        self._by_stem: dict[str, str | list[str]] = {}
        self._by_composed: dict[str, str | list[str]] = {}
        self.partial: set[str] = set()
        beyond_ascii: list[str] = []
        for path in self._paths:
            stem = _without_ending(path)
            other = self._by_stem.setdefault(stem, path)
            if other is not path:
                _add(self._by_stem, stem, path)
            if not path.isascii():
                beyond_ascii.append(path)
        for path in beyond_ascii:
            _add(self._by_composed, nfc_path(_without_ending(path)), path)
        for path in beyond_ascii:  # a whole name matches better than a stem
            self._by_composed[nfc_path(path)] = path

    def shares_stem(self, picture: str) -> bool:
        """Return whether there is another picture with this one's stem."""
        return self._by_stem.get(_without_ending(picture), picture) != picture

    def named(self, prompt: str, image: str) -> str | None:
        """Return the picture beside a prompt that its text names as `image`; None if not there."""
        path = _join(_split(prompt)[0], image)
        if path in self._paths:
            return path
        if path.isascii():
            return None
        other = self._by_composed.get(nfc_path(path))
        return other if isinstance(other, str) and nfc_path(other) == nfc_path(path) else None

    def find(self, prompt: str) -> str | Ambiguous | None:
        """Return the picture that a prompt is for by its name; None: there is none.

        The most exact match counts: `dog.jpg.json` is for `dog.jpg`, `dog.json` for the picture
        with the stem `dog`, and so is `dog.left.json` where no picture has the stem `dog.left`.
        `partial` then contains it.
        """
        whole = True
        for stem in _path_stems(prompt):
            if stem in self._paths:
                return stem
            found = self._by_stem.get(stem)
            if found is None and not stem.isascii():
                found = self._by_composed.get(nfc_path(stem))
            if found is not None:
                if not whole:
                    self.partial.add(prompt)
                return found if isinstance(found, str) else Ambiguous(tuple(sorted(found)))
            whole = False
        return None


def _add(pictures: dict[str, str | list[str]], key: str, path: str) -> None:
    """Add a picture under a key."""
    other = pictures.get(key, path)
    known = [other] if isinstance(other, str) else other
    pictures[key] = path if known == [path] else [*known, path]


def nfc_path(path: str) -> str:
    """Return a path with its file name as most systems write it (Unicode's form NFC)."""
    if path.isascii():
        return path
    folder, name = _split(path)
    return _join(folder, unicodedata.normalize("NFC", name))


def candidate_stems(prompt: str) -> Iterator[str]:
    """Yield the names that a prompt's picture may have, most exact first: `dog.left`, then `dog`.

    Each is a name with or without its ending.
    """
    return _path_stems(_split(prompt)[1])


def _path_stems(path: str) -> Iterator[str]:
    start = path.rfind("/") + 1
    stem = _without_ending(path)
    while len(stem) > start:
        yield stem
        stem = stem[: max(stem.rfind(".", start), start)]


def _without_ending(path: str) -> str:
    """Return what `posixpath.splitext` does for a path's stem, in a third of the time."""
    dot = path.rfind(".")
    if dot > path.rfind("/") + 1 and path[dot - 1] != ".":
        return path[:dot]
    return posixpath.splitext(path)[0]


def job_id(prompt: str, picture: str, *, shares_stem: bool, twin: bool) -> str:
    """Return the path of a job's outputs below `out/`, without suffix.

    Usually that is the prompt's path without its ending. `shares_stem`: another picture has this
    picture's stem, so that the picture's own ending must be in the name (`dog.png`). `twin`:
    `dog.json` is beside `dog.prompt`, so that the second keeps its ending.
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
