"""The boxes and points that a function segments, by frame name: read from a task or from a file.

Limitations: they are read once, when the function starts. Whether they fit a picture is checked
when the picture comes. Annotations whose picture is named without an extension are used for each
frame of that stem.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from loguru import logger

from sam_poll.core.errors import InputError, PictureError, UsageError
from sam_poll.core.text import shown
from sam_poll.core.types import Prompt, Size
from sam_poll.integrations.cvat import shapes, sources
from sam_poll.prompts.importers import shapes as importer
from sam_poll.prompts.importers.shapes import Shape

# Any size will do to list the labels, where a file does not state the pictures' sizes.
_ANY_SIZE = Size(1 << 14, 1 << 14)

# Returns a picture's prompts, given its size. Raises InputError.
PromptsFor = Callable[[Size], Sequence[Prompt]]


@dataclass(frozen=True)
class FramePrompts:
    """The prompts of each frame.

    `by_name`: the prompts by each of a picture's names, which may lack the extension. `by_ending`:
    by each end of such a name that no other picture has. `labels` are those of all objects, in
    their order; `scored` are the labels with a text attribute for the score.
    """

    by_name: Mapping[str, PromptsFor]
    labels: tuple[str, ...]
    scored: frozenset[str] = frozenset()
    by_ending: Mapping[str, PromptsFor] = field(default_factory=dict)

    def find(self, frame: str) -> PromptsFor | None:
        """Return a frame's prompts by its name, with and without the extension.

        A name of the annotations may have more leading folders than the frame's, or fewer. Returns
        None if no name matches.
        """
        whole, *shorter = _endings(frame)
        for name in _spellings(whole):
            if name in self.by_name:
                return self.by_name[name]
            if name in self.by_ending:
                return self.by_ending[name]
        for ending in shorter:
            for name in _spellings(ending):
                if name in self.by_name:
                    return self.by_name[name]
        return None


def _endings(name: str) -> list[str]:
    """Return a path, and what is left of it without one leading folder, without two, and so on."""
    parts = PurePosixPath(name).parts
    return [name, *("/".join(parts[start:]) for start in range(1, len(parts)))]


def _spellings(name: str) -> tuple[str, str]:
    """Return a name with and without its extension."""
    return name, posixpath.splitext(name)[0]


def from_file(path: Path) -> FramePrompts:
    """Return the prompts of an annotation file or folder, as `sam-poll cvat prompts` reads it.

    Raises InputError and UsageError.
    """

    def on_refused(name: str, error: InputError) -> None:
        logger.warning("{}: left out: {}", shown(name), shown(error))

    pictures = sources.read_annotations(path, on_refused)
    uses = Counter(name for picture in pictures for name in picture.names)
    labels: dict[str, None] = {}
    endings = Counter(ending for picture in pictures for ending in _endings_of(picture))
    by_name: dict[str, PromptsFor] = {}
    by_ending: dict[str, PromptsFor] = {}
    for picture in pictures:
        with suppress(InputError):  # logged when the picture's frame comes
            annotated = picture.annotated(picture.size or _ANY_SIZE)
            labels.update(dict.fromkeys(_labels(annotated.shapes)))
        prompts = _prompts_of_picture(picture)
        by_name.update({name: prompts for name in picture.names if uses[name] == 1})
        unique = (ending for ending in _endings_of(picture) if endings[ending] == 1)
        by_ending.update(dict.fromkeys(unique, prompts))
    return _checked(FramePrompts(by_name, tuple(labels), by_ending=by_ending), str(path))


def _endings_of(picture: sources.PictureAnnotations) -> set[str]:
    """Return the ends of a picture's names, after at least one leading folder."""
    return {ending for name in picture.names for ending in _endings(name)[1:]}


def _prompts_of_picture(picture: sources.PictureAnnotations) -> PromptsFor:
    def prompts(size: Size) -> Sequence[Prompt]:
        _check_size(picture.size, size)
        return importer.prompts_of(picture.annotated(size).shapes)

    return prompts


def _check_size(annotated: Size | None, actual: Size) -> None:
    """Raise PictureError if the sizes differ: it is another picture, or a part of it."""
    if annotated and annotated != actual:
        raise PictureError(
            f"it was annotated at {annotated.width}×{annotated.height}, "
            f"and is {actual.width}×{actual.height}",
            remedy="annotate this very picture",
        )


def from_task(task: int, host: str) -> FramePrompts:
    """Return the prompts that a task has now; without `host`, `CVAT_HOST` names the server.

    Raises CvatError, SettingsError (credentials) and UsageError.
    """
    from sam_poll.integrations.cvat import client, credentials

    server = client.connect(host or os.environ.get("CVAT_HOST"), credentials.find(os.environ))
    labels = server.labels(task=task)
    frames = shapes.frames_of(server.meta(task))
    return _checked(from_shapes(server.annotations(task)["shapes"], labels, frames), f"task {task}")


def from_shapes(
    entries: Sequence[Mapping[str, Any]],
    labels: Sequence[Mapping[str, Any]],
    frames: Mapping[int, shapes.FramePicture],
) -> FramePrompts:
    """Return the prompts of a task's shapes; shapes and labels are those of CVAT's API.

    Raises UsageError if several frames have the same name.
    """
    labels_by_id = shapes.labels_of(labels)
    by_frame: dict[str, list[Shape]] = {frame.name: [] for frame in frames.values()}
    if len(by_frame) < len(frames):
        raise UsageError(
            "several frames have the same name",
            place="-p task",
            remedy="use `sam-poll cvat masks`, which distinguishes them by number",
        )
    seen: set[shapes.Fingerprint] = set()
    for entry in entries:
        frame = frames.get(int(entry.get("frame", -1)))
        shape = shapes.prompt_shape(entry, labels_by_id, frame.size) if frame else None
        if frame and shape:
            # Read from the task, points on a frame that two jobs cover come once for each job.
            fingerprint = shapes.fingerprint(entry)
            if fingerprint not in seen:
                seen.add(fingerprint)
                by_frame[frame.name].append(shape)
    by_name = {
        frame.name: _prompts_of_shapes(by_frame[frame.name], frame.size)
        for frame in frames.values()
    }
    used = dict.fromkeys(
        label for frame_shapes in by_frame.values() for label in _labels(frame_shapes)
    )
    return FramePrompts(by_name, tuple(used), frozenset(_scored(labels)))


def _prompts_of_shapes(frame_shapes: Sequence[Shape], annotated: Size) -> PromptsFor:
    def prompts(size: Size) -> Sequence[Prompt]:
        _check_size(annotated, size)
        return importer.prompts_of(frame_shapes)

    return prompts


def _labels(some: Sequence[Shape]) -> Iterator[str]:
    """Yield the labels that objects can get: those of boxes and of positive points."""
    return (shape.label for shape in some if not shape.negative)


def _scored(labels: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the labels whose attribute `score` is a text.

    CVAT's SDK accepts only whole numbers for a number attribute, so that a score must be a text.
    """
    for label in labels:
        types = {a.get("name"): a.get("input_type") for a in label.get("attributes") or ()}
        if types.get(shapes.SCORE) == "text":
            yield str(label["name"])
        elif shapes.SCORE in types:
            logger.warning(
                "label {!r}: its attribute `score` is not a text, and stays empty", label["name"]
            )


def _checked(prompts: FramePrompts, place: str) -> FramePrompts:
    if not prompts.labels:
        raise UsageError(
            "there are no boxes and no points",
            place=place,
            remedy="draw some, or use -p mode=str:everything",
        )
    return prompts
