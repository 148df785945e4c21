"""Which objects of a task are to be asked for: its boxes and points, as far as they are not done and not our own work.

Pure but for a look at the pictures' files. What can still go wrong here: a box that somebody has drawn to the hundredth
of a pixel where we once put a rectangle is taken for ours, and is not asked for.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sam_poll import annotations as words
from sam_poll import prompts
from sam_poll.annotations import Asked, Shape
from sam_poll.cvat.door import path_below
from sam_poll.cvat.journal import digest
from sam_poll.cvat.shapes import Form, FramePicture, Label, asking, sign
from sam_poll.errors import CvatError, ExitCode, PromptError, SamPollError, UsageError
from sam_poll.settings import Settings


@dataclass(frozen=True, slots=True)
class Wish:
    """What `cvat masks` was asked to do."""

    form: Form = "mask"
    labels: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    images: Path | None = None
    replace: bool = False
    again: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Item:
    """One object to ask for. Its answer is kept under `key`; `done` is the line that says that its shapes are on the
    server."""

    frame: FramePicture
    asked: Asked
    label: Label
    key: str
    done: str

    @property
    def like(self) -> Mapping[str, Any]:
        """The server's entry of the shape that names the object: its box, or its first positive points."""
        shapes = self.asked.shapes
        named = next((s for s in shapes if s.kind == "box"), None) or next(s for s in shapes if not s.negative)
        entry: Mapping[str, Any] = named.key
        return entry


@dataclass(slots=True)
class Plan:
    """The objects by frame, those refused with the picture's name, and how many shapes are our own."""

    items: list[Item] = field(default_factory=list)
    refused: list[tuple[str, SamPollError]] = field(default_factory=list)
    ours: int = 0

    def by_frame(self) -> Iterator[tuple[FramePicture, list[Item]]]:
        """The items of each frame, in the frames' order."""
        frames: dict[int, list[Item]] = {}
        for item in self.items:
            frames.setdefault(item.frame.number, []).append(item)
        for _, items in sorted(frames.items()):
            yield items[0].frame, items


def make(
    entries: Sequence[Mapping[str, Any]],
    labels: Mapping[int, Label],
    frames: Mapping[int, FramePicture],
    wish: Wish,
    settings: Settings,
    written: set[str],
) -> Plan:
    """The plan for a task's shapes; `written` are the signs of what we have put there. UsageError, CvatError."""
    by_name = {label.name: label for label in labels.values()}
    _check_names(by_name, wish)
    made, model = Plan(), _model_key(settings)
    shapes: dict[int, list[Shape]] = {}
    for entry in entries:
        frame = frames.get(int(entry.get("frame", -1)))
        shape = asking(entry, labels, frame.size) if frame else None
        if frame is None or shape is None:
            continue
        if shape.kind == "box" and sign(entry).hex() in written:
            made.ours += 1
            continue
        shapes.setdefault(frame.number, []).append(shape)
    for number, found in sorted(shapes.items()):
        frame = frames[number]
        picture = _picture_key(frame, wish.images)
        for asked in _objects(frame, words.with_negatives(found, wish.negatives), wish, made):
            key = digest([model, picture, prompts.as_dict(asked.prompt) | {"label": ""}])
            label = by_name[asked.prompt.label]
            made.items.append(Item(frame, asked, label, key, digest([key, number, label.id, wish.form])))
    _check_forms(made, wish.form)
    return made


def _objects(frame: FramePicture, shapes: list[Shape], wish: Wish, made: Plan) -> Iterator[Asked]:
    """The frame's objects that can be asked for; the others are told one by one, so that none takes others along."""
    try:
        found = words.objects(shapes)
    except PromptError as error:
        clear = _beside_points(shapes)
        boxes = sum(shape.kind == "box" for shape in shapes)
        error.reason += f"; {len(clear)} of {boxes} boxes are answered, those that no points can be meant for"
        made.refused.append((frame.name, error))
        found = words.objects(clear)
    for asked in found:
        if wish.labels and asked.prompt.label not in wish.labels:
            continue
        try:
            prompts.fit((asked.prompt,), frame.size)
        except PromptError as error:
            error.place = f"{asked.prompt.label!r} {error.place or ''}".strip()
            made.refused.append((frame.name, error))
            continue
        yield asked


def _beside_points(shapes: Sequence[Shape]) -> list[Shape]:
    """The boxes that no points lie in, and that are in no group with points."""
    clicks = [shape for shape in shapes if shape.kind == "points"]
    places = np.array([place for shape in clicks for place in shape.points]).reshape(-1, 2)
    groups = {shape.group for shape in clicks if shape.group}

    def holds(box: Shape) -> bool:
        low, high = box.points
        return bool(((places >= low) & (places <= high)).all(axis=1).any())

    return [shape for shape in shapes if shape.kind == "box" and shape.group not in groups and not holds(shape)]


def _check_names(labels: Mapping[str, Label], wish: Wish) -> None:
    for flag, names in (("--label", wish.labels), ("--negative", wish.negatives)):
        unknown = [name for name in names if name not in labels]
        if unknown:
            raise UsageError(
                f"the task has no label {unknown[0]!r}",
                place=flag,
                remedy="it has " + (", ".join(sorted(labels)) or "none"),
            )


def _check_forms(made: Plan, form: Form) -> None:
    unfit = sorted({item.label.name for item in made.items if not item.label.allows(form)})
    if unfit:
        kinds = sorted({item.label.kind for item in made.items if item.label.name in unfit})
        raise CvatError(
            f"{', '.join(map(repr, unfit))} may not have shapes of type {form}, only {', '.join(kinds)}",
            ExitCode.CVAT_REFUSED,
            place="labels",
            remedy=f"let the label's type be `any` or `{form}` in CVAT, or choose another form with --as, "
            "or other labels with --label",
        )


def counts(made: Plan) -> str:
    """`3 dog, 2 cat`, the most frequent first."""
    found = Counter(item.label.name for item in made.items)
    return ", ".join(f"{number} {name}" for name, number in sorted(found.items(), key=lambda one: (-one[1], one[0])))


def _model_key(settings: Settings) -> list[Any]:
    """Which network answers. A file is known by its size and time, too: another training may have its name."""
    return [settings.model, settings.model_cfg, _looks(Path(settings.model))]


def _picture_key(frame: FramePicture, root: Path | None) -> list[Any]:
    """Which picture is asked about. A task's own pictures never change; those of a folder may."""
    looks: list[int] | None = None
    if root is not None:
        try:
            looks = _looks(path_below(root, frame.name))
        except SamPollError:
            looks = None
    return [frame.number, frame.name, *frame.size, looks]


def _looks(path: Path) -> list[int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns] if stat.S_ISREG(found.st_mode) else None
