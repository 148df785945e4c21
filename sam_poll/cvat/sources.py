"""Annotation files on disk: one file, a ZIP, or a folder of many small ones, as CVAT, Ultralytics, others export them.

What can still go wrong here: a file is read whole; one that is written meanwhile is read half, and refused as broken.
"""

from __future__ import annotations

import posixpath
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sam_poll.annotations import Annotated, files, yolo
from sam_poll.cvat import containers
from sam_poll.cvat.containers import Archive, Folder
from sam_poll.errors import InputError, PromptError, UsageError
from sam_poll.types import Size

_ENDINGS = (".opex.json", ".json", ".xml", ".txt")
_ONE = "annotations.xml"  # CVAT's, for all pictures
_MANY = "annotations/"  # CVAT's folder of COCO files
_KINDS = f"a folder or ZIP of YOLO texts, of labelme or OPEX files, of Pascal VOC files; else: {files.KINDS}"
_ABOVE = 2  # folders above the one that was named in which the classes' names are looked for


@dataclass(frozen=True, slots=True)
class Source:
    """What is annotated of one picture. `names`: what the picture may be called, most trustworthy first. `size`: as the
    file says. `made(size)`: its shapes, for a picture of this size; PromptError."""

    names: tuple[str, ...]
    size: Size | None
    made: Callable[[Size], Annotated]


def opened(path: Path, refused: Callable[[str, InputError], None]) -> list[Source]:
    """All pictures that a file, a ZIP or a folder is about. Of many files, those that cannot be read are `refused`, by
    their names, and the others go on; else PromptError with the file's name. UsageError: there is no such file."""
    if path.is_dir():
        return _all(Folder(path), str(path), refused)
    if not path.exists():
        raise UsageError("there is no such file or folder", place=str(path))
    try:
        if not zipfile.is_zipfile(path):
            return _named(containers.read(path), _stem(path.name))
        with Archive(path) as archive:
            return _all(archive, None, refused)
    except InputError as error:
        raise _placed(error, path.name) from None


def _named(data: bytes, stem: str) -> list[Source]:
    found = files.read(data, stem)
    return [Source(one.names, one.annotated.size, partial(_as_it_is, one.annotated)) for one in found]


def _as_it_is(annotated: Annotated, size: Size) -> Annotated:
    return annotated


def _stem(name: str) -> str:
    return next((name[: -len(ending)] for ending in _ENDINGS if name.lower().endswith(ending)), name)


def _placed(error: InputError, name: str) -> InputError:
    error.place = f"{name}: {error.place}" if error.place else name
    return error


# ── many files ──


def _all(where: Folder | Archive, place: str | None, refused: Callable[[str, InputError], None]) -> list[Source]:
    whole = [name for name in where.names if name == _ONE or name.startswith(_MANY)]
    whole = [name for name in whole if name.lower().endswith((".xml", ".json"))]
    if isinstance(where, Archive) and len(whole) > 1:
        reason = f"is a ZIP with {len(whole)} files of annotations that can be read from it"
        raise PromptError(reason, remedy="unpack it, and give one of them")
    if len(whole) == 1:
        return _named(where.read(whole[0]), _stem(whole[0]))
    kinds = {
        "YOLO texts": [name for name in where.names if name.lower().endswith(".txt") and not yolo.is_list(name)],
        "JSON files": [name for name in where.names if name.lower().endswith(".json") and not _is_by_the_way(name)],
        "XML files": [name for name in where.names if name.lower().endswith(".xml")],
    }
    there = [kind for kind, names in kinds.items() if names]
    if len(there) != 1:
        what = f"both {' and '.join(there)}" if there else "neither texts nor JSON nor XML files"
        raise PromptError(f"is a {where.kind} that holds {what}", place=place, remedy=f"give {_KINDS}")
    if kinds["YOLO texts"]:
        return _texts(where, place, kinds["YOLO texts"])
    sources: list[Source] = []
    for name in kinds[there[0]]:
        data = where.read(name)
        try:
            sources += _named(data, _stem(name))
        except InputError as error:
            refused(name, error)
    return sources


def _is_by_the_way(name: str) -> bool:
    """Label Studio's word about its YOLO texts."""
    return posixpath.basename(name) == "notes.json"


# ── YOLO ──


def _texts(where: Folder | Archive, place: str | None, texts: list[str]) -> list[Source]:
    subsets = {name for name in texts if "/" not in name and _names_a_subset(name[:-4], texts)}
    texts = [name for name in texts if name not in subsets]
    classes = _classes(where, texts, place)
    sources = []
    for name in texts:
        # A ZIP is closed when its texts are wanted.
        body = partial(where.read, name) if isinstance(where, Folder) else partial(bytes, where.read(name))
        sources.append(Source(_picture_names(name, where.root), None, partial(_text, body, name, classes)))
    return sources


def _text(body: Callable[[], bytes], name: str, classes: yolo.Classes, size: Size) -> Annotated:
    return yolo.read(body(), name, size, classes.names, keypoints=classes.keypoints)


def _names_a_subset(stem: str, texts: list[str]) -> bool:
    """Whether a text beside the folders is a list of a subset's pictures: CVAT calls it as the subset."""
    begin = (f"obj_{stem}_data/", f"labels/{stem}/")
    return any(name.startswith(begin) for name in texts)


def _picture_names(name: str, root: Path | None) -> tuple[str, ...]:
    """What the picture of a text may be called: texts in `labels/train` are about pictures in `images/train`."""
    parts = [*(root.absolute().parts[-2:] if root else ()), *name[:-4].split("/")]
    names = [name[:-4]]
    at = next((index for index in range(len(parts) - 2, -1, -1) if parts[index].lower() == "labels"), None)
    if at is not None:
        names.insert(0, "/".join(["images", *parts[at + 1 :]]))
    return tuple(names)


def _classes(where: Folder | Archive, texts: list[str], place: str | None) -> yolo.Classes:
    """The classes' names, from the folder of the texts or one above it."""
    for inside in _upward(_common(texts)):
        for file in yolo.NAMES:
            name = posixpath.join(inside, file)
            if name in where.names:
                return yolo.classes_of(where.read(name), file)
    for folder in where.root.absolute().parents[:_ABOVE] if where.root else ():
        for file in yolo.NAMES:
            if (folder / file).is_file():
                return yolo.classes_of(containers.read(folder / file), file)
    remedy = f"put {yolo.NAMES[0]} or classes.txt there"
    raise PromptError("does not say what its classes are called", place=place, remedy=remedy)


def _common(names: list[str]) -> list[str]:
    """The folders that all of the names begin with; a ZIP's names need not be well-formed paths."""
    first, *others = (name.split("/")[:-1] for name in names)
    for other in others:
        same = (index for index, pair in enumerate(zip(first, other, strict=False)) if pair[0] != pair[1])
        first = first[: next(same, min(len(first), len(other)))]
    return first


def _upward(parts: list[str]) -> Iterator[str]:
    """A folder of the set, those that it lies in, and the top."""
    for count in range(len(parts), -1, -1):
        yield "/".join(parts[:count])
