"""The plan of `cvat masks` for one job: which of its boxes and points, or polygons, are segmented.

Rectangles and polygons of earlier runs are left out. No I/O is done but reading the size and time
of files.

Limitations: a box that a user has drawn, to a hundredth of a pixel, where an earlier run has
written a rectangle, is taken for that rectangle and left out; so is a polygon.
"""

from __future__ import annotations

import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam_poll.config.settings import Settings
from sam_poll.core.errors import CvatError, ExitCode, PromptError, SamPollError, UsageError
from sam_poll.integrations.cvat.journal import digest
from sam_poll.integrations.cvat.scope import Scope
from sam_poll.integrations.cvat.shapes import (
    Form,
    FramePicture,
    Label,
    Source,
    fingerprint,
    prompt_shape,
)
from sam_poll.integrations.cvat.task_source import path_below
from sam_poll.prompts import parser
from sam_poll.prompts.importers import shapes as importer
from sam_poll.prompts.importers.shapes import PromptObject, Shape


@dataclass(frozen=True, slots=True)
class MasksOptions:
    """The options of `cvat masks`; each is the flag of its name (`form` is `--as`).

    `source` is `--from`.
    """

    form: Form = "mask"
    source: Source = "boxes"
    jobs: tuple[int, ...] = ()
    labels: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    images: Path | None = None
    replace: bool = False
    again: bool = False
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Item:
    """One object of a job to segment.

    Its answer is stored in the journal under `key`; `done_key` is the line of the job's list in the
    journal that says that its shapes are on the server. Objects that are equal in two jobs have the
    same keys.
    """

    frame: FramePicture
    prompt_object: PromptObject
    label: Label
    key: str
    done_key: str

    @property
    def template(self) -> Mapping[str, Any]:
        """The server's entry of the shape that names the object.

        That is its box or polygon, or its positive points.

        The new shapes take their attributes and flags from it.
        """
        shapes = self.prompt_object.shapes
        area = next((shape for shape in shapes if shape.is_area), None)
        shape = area or next(shape for shape in shapes if not shape.negative)
        entry: Mapping[str, Any] = shape.key
        return entry


@dataclass(slots=True)
class Plan:
    """The objects to segment.

    `refused`: pairs of a picture's name and why some of its objects cannot be segmented;
    `own_shapes`: the number of rectangles or polygons of earlier runs, which are left out;
    `honeypots`: the frames with such shapes that are left out because they serve to check
    annotators.
    """

    items: list[Item] = field(default_factory=list)
    refused: list[tuple[str, SamPollError]] = field(default_factory=list)
    own_shapes: int = 0
    honeypots: dict[int, FramePicture] = field(default_factory=dict)

    def by_frame(self) -> Iterator[tuple[FramePicture, list[Item]]]:
        """Yield each frame with its items, in the order of the frames."""
        frames: dict[int, list[Item]] = {}
        for item in self.items:
            frames.setdefault(item.frame.number, []).append(item)
        for _, items in sorted(frames.items()):
            yield items[0].frame, items


def make_plan(
    entries: Sequence[Mapping[str, Any]],
    scope: Scope,
    options: MasksOptions,
    settings: Settings,
    written: set[str],
) -> Plan:
    """Return the plan for a job's shapes.

    `entries` are the API's shapes; `written` are the fingerprints (hex) of the shapes that earlier
    runs have written.

    Raises UsageError (a label that the task does not have) and CvatError (a label that does not
    allow the form).
    """
    by_name = {label.name: label for label in scope.labels.values()}
    check_names("--label", options.labels, by_name)
    check_names("--negative", options.negatives, by_name)
    plan = Plan()
    model = model_key(settings)
    shapes: dict[int, list[Shape]] = {}
    for entry in entries:
        frame = scope.frames.get(int(entry.get("frame", -1)))
        if frame is None:
            continue
        shape = prompt_shape(entry, scope.labels, frame.size, options.source)
        if shape is None:
            continue
        if frame.number in scope.honeypots:
            plan.honeypots[frame.number] = frame
            continue
        if shape.is_area and fingerprint(entry).hex() in written:
            plan.own_shapes += 1
            continue
        shapes.setdefault(frame.number, []).append(shape)
    for number, frame_shapes in sorted(shapes.items()):
        frame = scope.frames[number]
        if options.source == "polygons":
            frame_shapes = _with_their_points(frame_shapes)
        picture = picture_key(frame, options.images)
        marked = importer.with_negatives(frame_shapes, options.negatives)
        for prompt_object in _valid_objects(frame, marked, options, plan):
            prompt = parser.as_dict(prompt_object.prompt) | {"label": ""}
            key = digest([model, picture, prompt])
            label = by_name[prompt_object.prompt.label]
            done_key = digest([key, number, label.id, options.form])
            plan.items.append(Item(frame, prompt_object, label, key, done_key))
    check_forms((item.label for item in plan.items), options.form)
    return plan


def _with_their_points(shapes: list[Shape]) -> list[Shape]:
    """Return the polygons, and the points of their groups: other points are not about polygons."""
    groups = {shape.group for shape in shapes if shape.is_area} - {0}
    return [shape for shape in shapes if shape.is_area or shape.group in groups]


def _valid_objects(
    frame: FramePicture, shapes: list[Shape], options: MasksOptions, plan: Plan
) -> Iterator[PromptObject]:
    """Yield the frame's objects that can be segmented.

    The others are added to `plan.refused` one by one, so that none takes others with it.
    """
    try:
        prompt_objects = importer.objects(shapes)
    except PromptError as error:
        prompt_objects = importer.unambiguous_objects(shapes)
        used = sum(shape.is_area for one in prompt_objects for shape in one.shapes)
        areas = sum(shape.is_area for shape in shapes)
        error.reason += (
            f"; {used} of {areas} {options.source} are segmented, "
            "namely those that this does not concern"
        )
        plan.refused.append((frame.name, error))
    for prompt_object in prompt_objects:
        if options.labels and prompt_object.prompt.label not in options.labels:
            continue
        try:
            parser.fit((prompt_object.prompt,), frame.size)
        except PromptError as error:
            error.place = f"{prompt_object.prompt.label!r} {error.place or ''}".strip()
            plan.refused.append((frame.name, error))
            continue
        yield prompt_object


def check_names(flag: str, names: Iterable[str], labels: Mapping[str, Label]) -> None:
    """Raise UsageError where one of the names that a flag gives is no label of the task."""
    unknown = [name for name in names if name not in labels]
    if unknown:
        raise UsageError(
            f"the task has no label {unknown[0]!r}",
            place=flag,
            remedy="it has " + (", ".join(sorted(labels)) or "none"),
        )


def check_forms(labels: Iterable[Label], form: Form) -> None:
    """Raise CvatError where a label does not allow shapes of this type."""
    unfit = {label.name: label.kind for label in labels if not label.allows(form)}
    if unfit:
        kinds = sorted(set(unfit.values()))
        names = ", ".join(map(repr, sorted(unfit)))
        raise CvatError(
            f"{names} may not have shapes of type {form}, only {', '.join(kinds)}",
            ExitCode.CVAT_REFUSED,
            place="labels",
            remedy=f"set the label's type to `any` or `{form}` in CVAT, "
            "or choose another form with --as, or other labels with --label",
        )


def objects_by_label(items: Iterable[Item]) -> str:
    """Return the numbers of objects by label, the most frequent first: `3 dog, 2 cat`."""
    numbers = Counter(item.label.name for item in items)
    ordered = sorted(numbers.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{number} {name}" for name, number in ordered)


def model_key(settings: Settings) -> list[Any]:
    """Return what identifies the network.

    Size and time of a checkpoint file count too: another training may have the same name.
    """
    return [settings.model, settings.model_cfg, _file_signature(Path(settings.model))]


def picture_key(frame: FramePicture, root: Path | None) -> list[Any]:
    """Return what identifies the picture.

    The server's pictures of a task never change; those of a folder may.
    """
    signature: list[int] | None = None
    if root is not None:
        try:
            signature = _file_signature(path_below(root, frame.name))
        except SamPollError:
            signature = None
    return [frame.number, frame.name, *frame.size, signature]


def _file_signature(path: Path) -> list[int] | None:
    """Return size and modification time (ns) of a regular file; None for anything else."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return [status.st_size, status.st_mtime_ns] if stat.S_ISREG(status.st_mode) else None
