"""Joins the `.coco.json` files of many pictures into one COCO file.

Images are sorted by name and numbered from 1, categories are all that there are, sorted by name, and annotations are
numbered from 1; several jobs on one picture become one image, its annotations in the order of their files' names. The
same files give the same bytes, in whatever order they come.

Each file is parsed and forgotten again: what is held is the finished text of its annotations, so memory is about the
size of the result.

What can still go wrong here: segmentations are taken as they are. Of images and categories only what is said below is
kept; supercategories, licences and addresses of pictures are not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

from sam_poll.errors import InputError
from sam_poll.formats import Documents, Gathered, gathered, size_of

_Object: TypeAlias = tuple[str, str]  # an annotation's label, and the JSON of the rest, without its opening brace
_GIVEN_ANEW = ("id", "image_id", "category_id")


@dataclass(slots=True)
class _Said:
    """What one file says of one picture."""

    notes: str
    objects: list[_Object] = field(default_factory=list)


def merged_coco(documents: Documents) -> Iterator[bytes]:
    """One COCO JSON from (file name, content) pairs, in pieces; the first comes when all documents have been read.

    Raises InputError with the file's name as its place when one is not JSON, not COCO instances, or contradicts another
    about a picture's size.
    """
    images: dict[str, Gathered[_Said]] = {}
    labels: set[str] = set()
    for file, body in documents:
        try:
            labels |= _gather(images, file, body)  # its errors have no place yet, but where two files disagree
        except InputError as error:
            raise InputError(error.reason, place=file) from None
    categories = {label: number for number, label in enumerate(sorted(labels), start=1)}
    return _pieces(images, categories)


def _pieces(images: dict[str, Gathered[_Said]], categories: dict[str, int]) -> Iterator[bytes]:
    names = sorted(images)
    yield b'{"info": {"description": "sam_poll"}, "licenses": [],\n"categories": ['
    listed = [{"id": number, "name": label, "supercategory": ""} for label, number in categories.items()]
    yield b",\n".join(_json(category) for category in listed)
    yield b'],\n"images": ['
    for number, name in enumerate(names, start=1):
        yield (b",\n" if number > 1 else b"") + _json(_image(number, name, images[name]))
    yield b'],\n"annotations": ['
    total = 0
    for number, name in enumerate(names, start=1):
        for said in images.pop(name).in_order():
            for label, rest in said.objects:
                total += 1
                head = f'{{"id": {total}, "image_id": {number}, "category_id": {categories[label]}'
                yield (b",\n" if total > 1 else b"") + (head + rest).encode("utf-8", "backslashreplace")
    yield b"]}\n"


def _image(number: int, name: str, image: Gathered[_Said]) -> dict[str, Any]:
    notes = "; ".join(dict.fromkeys(said.notes for said in image.in_order() if said.notes))
    made = {"id": number, "file_name": name, "width": image.size.width, "height": image.size.height}
    return made | ({"notes": notes} if notes else {})


def _gather(images: dict[str, Gathered[_Said]], file: str, body: bytes) -> set[str]:
    """Adds what a file says; its labels."""
    root = _parsed(body)
    labels: dict[Any, tuple[str, Any]] = dict(_by_id(root, "categories", "name"))
    here: dict[Any, _Said] = {}
    for number, (name, entry) in _by_id(root, "images", "file_name").items():
        notes = entry.get("notes", "")
        here[number] = _Said(notes if isinstance(notes, str) else "")
        image = gathered(images, name, size_of(name, entry), file)
        image.pieces.append((file, here[number]))
    for index, annotation in enumerate(_list(root, "annotations")):
        said, label = here.get(annotation.get("image_id")), labels.get(annotation.get("category_id"))
        if said is None or label is None:
            missing = "image" if said is None else "category"
            _refuse(f"annotations[{index}] is of {missing} {annotation.get(f'{missing}_id')!r}, which is not there")
        if not annotation.get("segmentation") and not annotation.get("bbox"):
            _refuse(f"annotations[{index}] has neither a segmentation nor a bbox")
        rest = {key: value for key, value in annotation.items() if key not in _GIVEN_ANEW}
        said.objects.append((label[0], ", " + json.dumps(rest, ensure_ascii=False)[1:]))
    return {name for name, _ in labels.values()}


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        root = json.loads(body, parse_constant=lambda word: _refuse(f"holds {word}, which JSON does not know"))
    except RecursionError:
        _refuse("is nested deeper than any COCO file")
    except ValueError as error:  # broken JSON or not UTF-8
        _refuse(f"is not JSON: {error}")
    if not isinstance(root, dict):
        _refuse("is not a COCO file: its root is not an object")
    return root


def _list(root: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = root.get(key)
    if not isinstance(found, list):
        _refuse(f"is not a COCO file: it has no list `{key}`")
    for index, entry in enumerate(found):
        if not isinstance(entry, dict):
            _refuse(f"{key}[{index}] is not an object")
        for name in _GIVEN_ANEW:
            if name in entry and (isinstance(entry[name], bool) or not isinstance(entry[name], int)):
                _refuse(f"{key}[{index}].{name} is not a whole number")
    return found


def _by_id(root: dict[str, Any], key: str, name: str) -> dict[int, tuple[str, dict[str, Any]]]:
    """The entries of a list, each with its name, by id."""
    found: dict[int, tuple[str, dict[str, Any]]] = {}
    for index, entry in enumerate(_list(root, key)):
        if "id" not in entry or entry["id"] in found:
            _refuse(f"{key}[{index}] has " + ("the id of another one" if "id" in entry else "no id"))
        if not isinstance(entry.get(name), str) or not entry[name]:
            _refuse(f"{key}[{index}] has no {name}")
        found[entry["id"]] = entry[name], entry
    return found


def _json(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace")


def _refuse(reason: str) -> NoReturn:
    raise InputError(reason)
