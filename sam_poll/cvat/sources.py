"""Annotation files on disk: one file, a ZIP as CVAT exports it, or a folder of many small ones.

What can still go wrong here: a file is read whole; one that is written meanwhile is read half, and refused as broken.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sam_poll.annotations import Annotated, files, yolo
from sam_poll.doors.layout import walk
from sam_poll.doors.settle import is_temporary
from sam_poll.errors import InputError, PromptError, UsageError
from sam_poll.safe_path import SafePath
from sam_poll.types import Size

MAX_BYTES = 2 << 30

_OPEX = (".opex.json", ".json")
_IN_A_ZIP = "unpack it, and give the file or the folder of texts in it"


@dataclass(frozen=True, slots=True)
class Source:
    """What is annotated of one picture. `names`: what the picture may be called, most trustworthy first. `size`: as the
    file says. `made(size)`: its shapes, for a picture of this size; PromptError."""

    names: tuple[str, ...]
    size: Size | None
    made: Callable[[Size], Annotated]


def opened(path: Path, refused: Callable[[str, InputError], None]) -> list[Source]:
    """All pictures that a file or folder is about. In a folder, files that cannot be read are `refused`, by their
    names, and the others go on; else PromptError with the file's name. UsageError: there is no such file."""
    if path.is_dir():
        return _folder(path, refused)
    if not path.exists():
        raise UsageError("there is no such file or folder", place=str(path))
    try:
        return _named(_unpacked(path), _stem(path.name))
    except InputError as error:
        raise _placed(error, path.name) from None


def _named(data: bytes, stem: str) -> list[Source]:
    found = files.read(data, stem)
    return [Source(one.names, one.annotated.size, partial(_as_it_is, one.annotated)) for one in found]


def _as_it_is(annotated: Annotated, size: Size) -> Annotated:
    return annotated


def _stem(name: str) -> str:
    return next((name[: -len(ending)] for ending in _OPEX if name.lower().endswith(ending)), name)


def _placed(error: InputError, name: str) -> InputError:
    error.place = f"{name}: {error.place}" if error.place else name
    return error


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        reason = f"has {size >> 20:,} MiB; at most {MAX_BYTES >> 20:,} are read"
        raise PromptError(reason, remedy="export fewer pictures at once")
    return path.read_bytes()


def _unpacked(path: Path) -> bytes:
    """A file's bytes; those of the one annotation file in it, where it is a ZIP."""
    if not zipfile.is_zipfile(path):
        return _read(path)
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [
                info
                for info in archive.infolist()
                if info.filename == "annotations.xml" or info.filename.startswith("annotations/")
                if info.filename.lower().endswith((".xml", ".json"))
            ]
            if len(inside) != 1:
                reason = f"is a ZIP with {len(inside)} files of annotations that can be read from it"
                raise PromptError(reason, remedy=_IN_A_ZIP)
            if inside[0].file_size > MAX_BYTES:
                raise PromptError("its annotations are too large", remedy="export fewer pictures at once")
            with archive.open(inside[0]) as file:
                return file.read(MAX_BYTES)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:  # broken, odd or encrypted
        raise PromptError(f"is a ZIP that cannot be read: {error}", remedy=_IN_A_ZIP) from None


# ── folders ──


def _folder(root: Path, refused: Callable[[str, InputError], None]) -> list[Source]:
    names = sorted(name for name, entry in walk(SafePath.at(root)) if not is_temporary(entry.name))
    texts = [name for name in names if name.lower().endswith(".txt") and name[:-4].lower() not in yolo.LISTS]
    jsons = [name for name in names if name.lower().endswith(".json")]
    if bool(texts) == bool(jsons):
        what = "both texts and JSON files" if texts else "neither texts nor JSON files"
        raise PromptError(
            f"holds {what}", place=str(root), remedy=f"a folder of YOLO texts or of OPEX files; else: {files.KINDS}"
        )
    if texts:
        return _texts(root, texts)
    sources: list[Source] = []
    for name in jsons:
        try:
            sources += _named(_read(root / name), _stem(name))
        except InputError as error:
            refused(name, error)
    return sources


def _texts(root: Path, texts: list[str]) -> list[Source]:
    classes = _classes(root)
    return [Source((name[:-4],), None, partial(_text, root / name, name, classes)) for name in texts]


def _text(path: Path, name: str, classes: dict[int, str], size: Size) -> Annotated:
    return yolo.read(_read(path), name, size, classes)


def _classes(root: Path) -> dict[int, str]:
    """The classes' names, from the folder of the texts or the one above it."""
    for folder in (root, root.absolute().parent):
        for name in yolo.NAMES:
            if (folder / name).is_file():
                return yolo.names_of(_read(folder / name), name)
    raise PromptError(
        "does not say what its classes are called",
        place=str(root),
        remedy=f"put {yolo.NAMES[0]} or classes.txt there",
    )
