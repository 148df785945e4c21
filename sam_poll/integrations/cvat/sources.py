"""Annotations on disk: a file, a ZIP, or a folder of many files, as CVAT and others export them.

Limitations: a file that is still being written is read in part, and refused as damaged.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sam_poll.core.errors import InputError, PromptError, UsageError
from sam_poll.core.types import Size
from sam_poll.integrations.cvat import archives
from sam_poll.integrations.cvat.archives import Archive, Folder
from sam_poll.prompts.importers import prompt_files, yolo
from sam_poll.prompts.importers.shapes import Annotated

_ENDINGS = (".opex.json", ".json", ".xml", ".txt")
_CVAT_FILE = "annotations.xml"  # in CVAT's own format, for all pictures
_JSON_FOLDER = "annotations"  # holds COCO and Datumaro files, one for each subset of the pictures
_COCO_BOXES = "instances_"  # begins the names of COCO's files that have boxes
_KINDS = (
    "a folder or ZIP of YOLO texts, of labelme or OPEX files, of Pascal VOC files; "
    f"else: {prompt_files.KINDS}"
)
# Folders above the given one in which the file with the classes' names is looked for.
_PARENTS = 2
_YOLO_TEXTS = "YOLO texts"
_LABEL_STUDIO_NOTES = "notes.json"  # a description beside its YOLO texts, without annotations


@dataclass(frozen=True, slots=True)
class PictureAnnotations:
    """The annotations of one picture.

    `names`: the possible names of the picture, most trustworthy first. `size`: the picture's size
    as the file states it. `annotated(size)`: its shapes, for a picture of this size; it raises
    PromptError.
    """

    names: tuple[str, ...]
    size: Size | None
    annotated: Callable[[Size], Annotated]


OnRefused = Callable[[str, InputError], None]


def read_annotations(path: Path, on_refused: OnRefused) -> list[PictureAnnotations]:
    """Return the annotations of all pictures in a file, a ZIP or a folder.

    Of many files, each that cannot be read is reported by `on_refused`, with its name, and the
    others are used.

    Raises PromptError with the file's name, and UsageError if there is no such file.
    """
    if path.is_dir():
        return _read_files(Folder(path), str(path), on_refused)
    if not path.exists():
        raise UsageError("there is no such file or folder", place=str(path))
    try:
        if not archives.is_zip(path):
            return _read_file(archives.read(path), _stem(path.name))
        with Archive(path) as archive:
            return _read_files(archive, None, on_refused)
    except InputError as error:
        raise _with_file(error, path.name) from None


def _read_file(data: bytes, stem: str) -> list[PictureAnnotations]:
    return [
        PictureAnnotations(
            entry.names, entry.annotated.size, partial(_for_any_size, entry.annotated)
        )
        for entry in prompt_files.read(data, stem)
    ]


def _for_any_size(annotated: Annotated, size: Size) -> Annotated:
    return annotated


def _stem(name: str) -> str:
    return next(
        (name[: -len(ending)] for ending in _ENDINGS if name.lower().endswith(ending)), name
    )


def _with_file(error: InputError, name: str) -> InputError:
    error.place = f"{name}: {error.place}" if error.place else name
    return error


# ── many files ──


def _read_files(
    container: Folder | Archive, place: str | None, on_refused: OnRefused
) -> list[PictureAnnotations]:
    names = _files_for_many_pictures(container.names)
    if len(names) == 1:
        return _read_file(container.read(names[0]), _stem(names[0]))
    if not names:
        kind, names = _files_of_one_kind(container, place)
        if kind == _YOLO_TEXTS:
            return _read_yolo(container, place, names)
    annotations: list[PictureAnnotations] = []
    for name in names:
        data = container.read(name)
        try:
            annotations += _read_file(data, _stem(name))
        except InputError as error:
            on_refused(name, error)
    return annotations


def _files_for_many_pictures(names: list[str]) -> list[str]:
    """Return the files that are each for many pictures, as CVAT's exports have them.

    With these, files of other kinds are no annotations: a readme, a list of pictures, a manifest.
    There are none where it is open which files are meant.
    """
    xmls = [name for name in names if name.lower().endswith(".xml")]
    jsons = [name for name in names if name.lower().endswith(".json")]
    at_top = [
        name
        for name in (*xmls, *jsons)
        if name == _CVAT_FILE or name.startswith(f"{_JSON_FOLDER}/")
    ]
    if len(at_top) == 1:
        return at_top
    if not jsons and all(posixpath.basename(name) == _CVAT_FILE for name in xmls):
        return xmls
    if not xmls and all(name.split("/")[-2:-1] == [_JSON_FOLDER] for name in jsons):
        boxes = [name for name in jsons if posixpath.basename(name).startswith(_COCO_BOXES)]
        return boxes or jsons
    return []


def _files_of_one_kind(container: Folder | Archive, place: str | None) -> tuple[str, list[str]]:
    """Return the kind of the container's annotation files, and their names.

    Raises PromptError if there are none, or files of several kinds.
    """
    by_kind: dict[str, list[str]] = {_YOLO_TEXTS: [], "JSON files": [], "XML files": []}
    for name in container.names:
        lower = name.lower()
        if lower.endswith(".txt") and not yolo.is_list(name):
            by_kind[_YOLO_TEXTS].append(name)
        elif lower.endswith(".json") and posixpath.basename(name) != _LABEL_STUDIO_NOTES:
            by_kind["JSON files"].append(name)
        elif lower.endswith(".xml"):
            by_kind["XML files"].append(name)
    kinds = [kind for kind, names in by_kind.items() if names]
    if len(kinds) != 1:
        content = f"both {' and '.join(kinds)}" if kinds else "neither texts nor JSON nor XML files"
        raise PromptError(
            f"is a {container.kind} that holds {content}", place=place, remedy=f"give {_KINDS}"
        )
    return kinds[0], by_kind[kinds[0]]


# ── YOLO ──


def _read_yolo(
    container: Folder | Archive, place: str | None, texts: list[str]
) -> list[PictureAnnotations]:
    lists = {name for name in texts if "/" not in name and _is_subset_list(name[:-4], texts)}
    texts = [name for name in texts if name not in lists]
    classes = _classes(container, texts, place)
    annotations = []
    for name in texts:
        body: Callable[[], bytes]
        if isinstance(container, Folder):
            body = partial(container.read, name)
        else:  # the ZIP is closed by the time its texts are parsed
            body = partial(bytes, container.read(name))
        names = _picture_names(name, container.root)
        annotations.append(
            PictureAnnotations(names, None, partial(_parse_yolo, body, name, classes))
        )
    return annotations


def _parse_yolo(
    body: Callable[[], bytes], name: str, classes: yolo.Classes, size: Size
) -> Annotated:
    return yolo.read(body(), name, size, classes.names, keypoints=classes.keypoints)


def _is_subset_list(stem: str, texts: list[str]) -> bool:
    """Return whether a text at the top, named as a subset, is CVAT's list of its pictures."""
    begin = (f"obj_{stem}_data/", f"labels/{stem}/")
    return any(name.startswith(begin) for name in texts)


def _picture_names(name: str, root: Path | None) -> tuple[str, ...]:
    """Return the possible names of a text's picture, without endings.

    The pictures of the texts in `labels/train` are in `images/train`.
    """
    parts = [*(root.absolute().parts[-2:] if root else ()), *name[:-4].split("/")]
    names = [name[:-4]]
    labels = next(
        (index for index in range(len(parts) - 2, -1, -1) if parts[index].lower() == "labels"), None
    )
    if labels is not None:
        names.insert(0, "/".join(["images", *parts[labels + 1 :]]))
    return tuple(names)


def _classes(container: Folder | Archive, texts: list[str], place: str | None) -> yolo.Classes:
    """Return the classes from a file in the folder of the texts or in one above it."""
    for inside in _upward(_common_folders(texts)):
        for file in yolo.NAMES:
            name = posixpath.join(inside, file)
            if name in container.names:
                return yolo.classes_of(container.read(name), file)
    parents = container.root.absolute().parents[:_PARENTS] if container.root else ()
    for folder in parents:
        for file in yolo.NAMES:
            if (folder / file).is_file():
                return yolo.classes_of(archives.read(folder / file), file)
    raise PromptError(
        "has no file with the names of its classes",
        place=place,
        remedy=f"put {yolo.NAMES[0]} or classes.txt there",
    )


def _common_folders(names: list[str]) -> list[str]:
    """Return the folders that all names begin with; a ZIP's names may be malformed paths."""
    first, *others = (name.split("/")[:-1] for name in names)
    for other in others:
        differences = (
            index for index, (one, two) in enumerate(zip(first, other, strict=False)) if one != two
        )
        first = first[: next(differences, min(len(first), len(other)))]
    return first


def _upward(parts: list[str]) -> Iterator[str]:
    """Yield a folder's path, those of its parents, and "" for the top."""
    for count in range(len(parts), -1, -1):
        yield "/".join(parts[:count])
