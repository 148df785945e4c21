"""Reading a dropped annotation file: its requests, and whether it is complete."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from sam_poll.core.errors import PromptError
from sam_poll.core.files import NAME_MAX
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.prompts.importers import cvat_xml, prompt_files
from sam_poll.prompts.importers.common import image_place
from sam_poll.prompts.importers.shapes import Annotated, PromptObject
from sam_poll.share.file_kinds import is_temporary
from sam_poll.share.layout import prompt_bytes

MAX_BYTES = 512 * 1024 * 1024
_TAIL_BYTES = 256


class PictureRequest(NamedTuple):
    """One picture of an annotation file, and the objects that masks are requested of."""

    annotated: Annotated
    objects: list[PromptObject]


class AnnotationRequests(NamedTuple):
    """The content of an annotation file. `left_out`: counts of the shapes that are no prompts."""

    pictures: list[PictureRequest]
    left_out: str


def read_requests(data: bytes, name: str, is_picture: Callable[[str], bool]) -> AnnotationRequests:
    """Return the requests of an annotation file.

    Raises PromptError where the file called `name` is to be rejected: it is malformed, requests
    nothing, or names a picture that cannot lie below a folder.
    """
    if len(data) > MAX_BYTES:
        raise PromptError(
            f"is larger than {MAX_BYTES >> 20} MiB",
            place=shown(name),
            remedy="export fewer jobs of the task at a time",
        )
    counts: Counter[str] = Counter()
    pictures: list[PictureRequest] = []
    for annotated in cvat_xml.read(data):
        counts.update(dict(annotated.left_out))
        objects = prompt_files.selected_objects(annotated)
        if objects:
            _check_name(annotated.name, is_picture)
            pictures.append(PictureRequest(annotated, objects))
    left_out = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    if not pictures:
        raise PromptError(
            "no box and no points are drawn in it" + (f" (only {left_out})" if left_out else ""),
            place=shown(name),
            remedy="draw a box around each object, or points on it, "
            "and export it again as CVAT for images 1.1",
        )
    return AnnotationRequests(pictures, left_out)


def check_complete(path: SafePath) -> None:
    """Raise PromptError where an annotation file ends too early.

    Other errors in the file are found when it is expanded. Raises OSError.
    """
    data = prompt_bytes(path, MAX_BYTES)
    if len(data) > MAX_BYTES:
        return
    tail = data[-_TAIL_BYTES:].replace(b"\0", b"").rstrip()  # zeros: of UTF-16
    if data.endswith(bytes(4)) or not tail.endswith(b"</annotations>"):
        # Only then: a complete file would be parsed twice.
        cvat_xml.read(data)


def _check_name(name: str, is_picture: Callable[[str], bool]) -> None:
    """Raise PromptError where a picture's name leaves its folder, or the scan ignores it."""
    *folders, file = name.split("/")
    odd = (
        any(part == "" or part.startswith(".") for part in folders)
        or is_temporary(file)
        or not file
    )
    if odd or "\\" in name or not name.isprintable():
        raise PromptError(
            "is not the name of a picture below a folder",
            place=image_place(name),
            remedy="name pictures as CVAT does, relative to the share and with /",
        )
    if not is_picture(file):
        raise PromptError(
            "has no picture's ending",
            place=image_place(name),
            remedy="create the CVAT task from pictures, not from a video",
        )
    if any(len(os.fsencode(part)) > NAME_MAX for part in (*folders, file)):
        raise PromptError("is longer than a file name can be", place=image_place(name))
