"""Merge the `.coco.json` files of many pictures into one COCO file.

Images are sorted by name and numbered from 1, categories are all that occur, sorted by name, and
annotations are numbered from 1; several jobs on one picture become one image, its annotations in
the order of their files' names. The same files give the same bytes, in any order.

Only the encoded text of the annotations is kept of each file, so memory is about the size of the
result.

Limitations: segmentations are copied unchanged. Of images and categories only the name, size and
notes are kept; supercategories, licences and addresses of pictures are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

from sam_poll.core.errors import InputError
from sam_poll.formats.merge.common import PictureParts, parts_of, size_of
from sam_poll.formats.registry import Documents

# An annotation's label, and the JSON of its other keys without the opening brace
_Object: TypeAlias = tuple[str, str]
_RENUMBERED = ("id", "image_id", "category_id")


@dataclass(slots=True)
class _FileEntry:
    """The notes and annotations of one picture in one file."""

    notes: str
    objects: list[_Object] = field(default_factory=list)


def merged_coco(documents: Documents, prefix: str = "") -> Iterator[bytes]:
    """Merge (file name, content) pairs into one COCO JSON.

    `prefix` is put before the pictures' names. The pieces are yielded after all files are read.
    Raises InputError with the file's name as its place where a file is not COCO instances, or
    contradicts another about a picture's size.
    """
    images: dict[str, PictureParts[_FileEntry]] = {}
    labels: set[str] = set()
    for file, body in documents:
        try:
            labels |= _gather(images, file, body, prefix)
        except InputError as error:
            raise InputError(error.reason, place=file) from None
    categories = {label: number for number, label in enumerate(sorted(labels), start=1)}
    return _pieces(images, categories)


def _pieces(
    images: dict[str, PictureParts[_FileEntry]], categories: dict[str, int]
) -> Iterator[bytes]:
    names = sorted(images)
    yield b'{"info": {"description": "sam_poll"}, "licenses": [],\n"categories": ['
    listed = [
        {"id": number, "name": label, "supercategory": ""} for label, number in categories.items()
    ]
    yield b",\n".join(_json(category) for category in listed)
    yield b'],\n"images": ['
    for number, name in enumerate(names, start=1):
        yield (b",\n" if number > 1 else b"") + _json(_image(number, name, images[name]))
    yield b'],\n"annotations": ['
    total = 0
    for number, name in enumerate(names, start=1):
        for entry in images.pop(name).in_order():
            for label, rest in entry.objects:
                total += 1
                head = f'{{"id": {total}, "image_id": {number}, "category_id": {categories[label]}'
                separator = b",\n" if total > 1 else b""
                yield separator + (head + rest).encode("utf-8", "backslashreplace")
    yield b"]}\n"


def _image(number: int, name: str, image: PictureParts[_FileEntry]) -> dict[str, Any]:
    notes = "; ".join(dict.fromkeys(entry.notes for entry in image.in_order() if entry.notes))
    merged: dict[str, Any] = {"id": number, "file_name": name}
    merged |= {"width": image.size.width, "height": image.size.height}
    if notes:
        merged["notes"] = notes
    return merged


def _gather(
    images: dict[str, PictureParts[_FileEntry]], file: str, body: bytes, prefix: str
) -> set[str]:
    """Add the pictures and annotations of one file; return its labels."""
    root = _parsed(body)
    labels: dict[Any, tuple[str, Any]] = dict(_by_id(root, "categories", "name"))
    here: dict[Any, _FileEntry] = {}
    for number, (name, entry) in _by_id(root, "images", "file_name").items():
        notes = entry.get("notes", "")
        here[number] = _FileEntry(notes if isinstance(notes, str) else "")
        image = parts_of(images, prefix + name, size_of(name, entry), file)
        image.pieces.append((file, here[number]))
    for index, annotation in enumerate(_list(root, "annotations")):
        picture = here.get(annotation.get("image_id"))
        label = labels.get(annotation.get("category_id"))
        if picture is None or label is None:
            missing = "image" if picture is None else "category"
            id_ = annotation.get(f"{missing}_id")
            _refuse(f"annotations[{index}] is of {missing} {id_!r}, which is missing")
        if not annotation.get("segmentation") and not annotation.get("bbox"):
            _refuse(f"annotations[{index}] has neither a segmentation nor a bbox")
        rest = {key: value for key, value in annotation.items() if key not in _RENUMBERED}
        picture.objects.append((label[0], ", " + json.dumps(rest, ensure_ascii=False)[1:]))
    return {name for name, _ in labels.values()}


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        root = json.loads(
            body, parse_constant=lambda word: _refuse(f"holds {word}, which JSON does not know")
        )
    except RecursionError:
        _refuse("is nested deeper than any COCO file")
    except ValueError as error:  # broken JSON or not UTF-8
        _refuse(f"is not JSON: {error}")
    if not isinstance(root, dict):
        _refuse("is not a COCO file: its root is not an object")
    return root


def _list(root: dict[str, Any], key: str) -> list[dict[str, Any]]:
    entries = root.get(key)
    if not isinstance(entries, list):
        _refuse(f"is not a COCO file: it has no list `{key}`")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            _refuse(f"{key}[{index}] is not an object")
        for name in _RENUMBERED:
            if name in entry and (
                isinstance(entry[name], bool) or not isinstance(entry[name], int)
            ):
                _refuse(f"{key}[{index}].{name} is not a whole number")
    return entries


def _by_id(root: dict[str, Any], key: str, name: str) -> dict[int, tuple[str, dict[str, Any]]]:
    """Return the entries of a list, each with its name, by id."""
    by_id: dict[int, tuple[str, dict[str, Any]]] = {}
    for index, entry in enumerate(_list(root, key)):
        if "id" not in entry:
            _refuse(f"{key}[{index}] has no id")
        if entry["id"] in by_id:
            _refuse(f"{key}[{index}] has the id of another one")
        if not isinstance(entry.get(name), str) or not entry[name]:
            _refuse(f"{key}[{index}] has no {name}")
        by_id[entry["id"]] = entry[name], entry
    return by_id


def _json(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _refuse(reason: str) -> NoReturn:
    raise InputError(reason)
