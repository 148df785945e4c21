"""The boxes and points that a function answers, by the names of a task's frames: read from a task, or from a file.

What can still go wrong here: they are read once, at the start. Whether they fit a picture is seen when it comes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loguru import logger

from sam_poll import annotations as words
from sam_poll.annotations import Shape
from sam_poll.cvat import shapes, sources
from sam_poll.errors import InputError, PictureError, UsageError
from sam_poll.fs import shown
from sam_poll.types import Prompt, Size

_ANY = Size(1 << 14, 1 << 14)  # for a look at labels, where a file leaves the pictures' sizes open

Ask = Callable[[Size], Sequence[Prompt]]  # a picture's prompts, by its size; InputError


@dataclass(frozen=True)
class Boxes:
    """What is asked of which frame. `labels` are those of all objects, in their order; `scored` those that have a text
    attribute for the score."""

    by_name: Mapping[str, Ask]
    labels: tuple[str, ...]
    scored: frozenset[str] = frozenset()

    def of(self, frame: str) -> Ask | None:
        """A frame's, by its full name, or by what is left of it when leading folders are cut; None: it is unknown."""
        parts = PurePosixPath(frame).parts
        names = ("/".join(parts[start:]) for start in range(len(parts)))
        return self.by_name.get(frame) or next((self.by_name[name] for name in names if name in self.by_name), None)


def of_file(path: Path) -> Boxes:
    """Those of an annotation file or folder of any kind that `sam-poll cvat prompts` reads. InputError, UsageError."""

    def refused(name: str, error: InputError) -> None:
        logger.warning("{}: left out: {}", shown(name), shown(error))

    found = sources.opened(path, refused)
    names = Counter(name for source in found for name in source.names)
    labels: dict[str, None] = {}
    by_name: dict[str, Ask] = {}
    for source in found:
        with suppress(InputError):  # told when its frame comes
            labels.update(dict.fromkeys(_labels(source.made(source.size or _ANY).shapes)))
        by_name.update({name: _asking(source) for name in source.names if names[name] == 1})
    return _sound(Boxes(by_name, tuple(labels)), str(path))


def _asking(source: sources.Source) -> Ask:
    def ask(size: Size) -> Sequence[Prompt]:
        _check_size(source.size, size)
        return words.prompts_of(source.made(size).shapes)

    return ask


def _check_size(annotated: Size | None, size: Size) -> None:
    """Another size is another picture, or a part of it."""
    if annotated and annotated != size:
        there, here = (f"{width}×{height}" for width, height in (annotated, size))
        raise PictureError(f"it was annotated at {there}, and is {here}", remedy="annotate this very picture")


def of_task(task: int, host: str) -> Boxes:
    """Those that a task has now. CvatError, SettingsError (credentials), UsageError."""
    from sam_poll.cvat import credentials, server

    there = server.connect(host or os.environ.get("CVAT_HOST"), credentials.find(os.environ))
    entries = there.labels(task=task)
    frames = shapes.frames_of(there.meta(task))
    return _sound(of_entries(there.annotations(task)["shapes"], entries, frames), f"task {task}")


def of_entries(
    drawn: Sequence[Mapping[str, Any]],
    labels: Sequence[Mapping[str, Any]],
    frames: Mapping[int, shapes.FramePicture],
) -> Boxes:
    """Those of a task's shapes and labels, as the API gives them."""
    known = shapes.labels_of(labels)
    found: dict[str, list[Shape]] = {frame.name: [] for frame in frames.values()}
    if len(found) < len(frames):
        raise UsageError("several frames have one name", place="-p task", remedy="`sam-poll cvat masks` can tell them")
    for entry in drawn:
        frame = frames.get(int(entry.get("frame", -1)))
        shape = shapes.asking(entry, known, frame.size) if frame else None
        if frame and shape:
            found[frame.name].append(shape)
    asked = {frame.name: _fixed(found[frame.name], frame.size) for frame in frames.values()}
    here = tuple(dict.fromkeys(label for some in found.values() for label in _labels(some)))
    return Boxes(asked, here, frozenset(_scored(labels)))


def _fixed(some: Sequence[Shape], annotated: Size) -> Ask:
    def ask(size: Size) -> Sequence[Prompt]:
        _check_size(annotated, size)
        return words.prompts_of(some)

    return ask


def _labels(some: Sequence[Shape]) -> Iterator[str]:
    """The labels that objects can get: those of boxes and of points that are on something."""
    return (shape.label for shape in some if not shape.negative)


def _scored(labels: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """CVAT's SDK takes whole numbers only for an attribute that is a number, so that a score must be a text."""
    for label in labels:
        kinds = {a.get("name"): a.get("input_type") for a in label.get("attributes") or ()}
        if kinds.get(shapes.SCORE) == "text":
            yield str(label["name"])
        elif shapes.SCORE in kinds:
            logger.warning("label {!r}: its attribute `score` is no text, and stays empty", label["name"])


def _sound(boxes: Boxes, place: str) -> Boxes:
    if not boxes.labels:
        raise UsageError(
            "there are no boxes and no points", place=place, remedy="draw some, or use -p mode=str:everything"
        )
    return boxes
