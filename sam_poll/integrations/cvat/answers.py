"""The answers that `cvat push` uploads: the pictures and shapes of a folder's `.cvat.xml` files.

Limitations: all shapes are held in memory.
"""

from __future__ import annotations

import io
import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sam_poll.core.errors import InputError, UsageError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.core.types import Size
from sam_poll.formats.merge.cvat import pictures_xml
from sam_poll.integrations.cvat.shapes import SCORE, run_lengths_fit
from sam_poll.share.layout import walk

ENDING = ".cvat.xml"


@dataclass(frozen=True, slots=True)
class ShapeRecord:
    """One shape of an answer.

    `points` is CVAT's flat form of a mask, or the coordinates of a polygon.
    """

    label: str
    form: str
    points: list[float]
    z_order: int
    score: float | None
    group: int


@dataclass(slots=True)
class AnswerSet:
    """The answers of a folder: size and shapes by the picture's name on the server's share."""

    sizes: dict[str, Size] = field(default_factory=dict)
    shapes: dict[str, list[ShapeRecord]] = field(default_factory=dict)

    @property
    def labels(self) -> list[str]:
        """Return the labels of all shapes, sorted."""
        return sorted({record.label for records in self.shapes.values() for record in records})

    @property
    def shape_count(self) -> int:
        """Return the number of shapes of all pictures."""
        return sum(map(len, self.shapes.values()))

    def of(self, names: Iterable[str]) -> AnswerSet:
        """Return the answers of these pictures, in the order of the names."""
        chosen = list(names)
        return AnswerSet(
            {name: self.sizes[name] for name in chosen},
            {name: self.shapes[name] for name in chosen},
        )

    def objects(self) -> Iterator[tuple[str, list[ShapeRecord]]]:
        """Yield each object with its picture's name: the shapes of one group are one object."""
        for name, records in self.shapes.items():
            groups: dict[int, list[ShapeRecord]] = {}
            for index, record in enumerate(records):
                groups.setdefault(record.group or -index - 1, []).append(record)
            for parts in groups.values():
                yield name, parts


def read_answers(folder: Path, prefix: str = "") -> AnswerSet:
    """Return the answers below a folder; `prefix` is put before the pictures' names.

    Raises UsageError if there are none, and InputError if files contradict each other.
    """
    if not folder.is_dir():
        raise UsageError("there is no such folder", place=shown(folder))
    root = SafePath.at(folder)
    names = sorted(name for name, _ in walk(root) if name.endswith(ENDING))
    if not names:
        remedy = "add `cvat` to `formats` and run the jobs again"
        raise UsageError(f"there are no {ENDING} files", place=shown(folder), remedy=remedy)
    documents = ((name, (root / name).read_bytes()) for name in names)
    merged = b"".join(pictures_xml(documents, prefix))
    answers = AnswerSet()
    for _, image in ET.iterparse(io.BytesIO(merged)):  # noqa: S314  pictures_xml wrote it
        if image.tag != "image":
            continue
        name = image.get("name", "")
        try:
            answers.sizes[name] = Size(int(image.get("width", "")), int(image.get("height", "")))
            answers.shapes[name] = list(_records(image, answers.sizes[name]))
        except (ValueError, TypeError) as error:
            raise InputError(f"is invalid: {error}", place=f"image {shown(name)!r}") from None
        image.clear()
    if not answers.sizes:
        raise UsageError(f"the {ENDING} files name no pictures", place=shown(folder))
    return answers


def _records(image: ET.Element, size: Size) -> Iterator[ShapeRecord]:
    """Yield the masks and polygons of an `image` element. Raises ValueError, TypeError.

    What the server would refuse is refused here, before a task is created.
    """
    for element in image:
        if element.tag == "mask":
            runs = [int(value) for value in element.get("rle", "").split(",")]
            left, top, width, height = (
                int(element.get(key, "")) for key in ("left", "top", "width", "height")
            )
            points: list[float] = [*runs, left, top, left + width - 1, top + height - 1]
            if not run_lengths_fit(points):
                raise ValueError("a mask's run lengths do not fill its box")
            if left < 0 or top < 0 or left + width > size.width or top + height > size.height:
                raise ValueError("a mask reaches over the picture's edge")
        elif element.tag == "polygon":
            pairs = [pair.split(",") for pair in element.get("points", "").split(";")]
            points = [float(value) for x, y in pairs for value in (x, y)]
            if len(pairs) < 3 or not all(map(math.isfinite, points)):
                raise ValueError("a polygon has fewer than three corners, or one that is nowhere")
        else:
            continue
        yield ShapeRecord(
            label=element.get("label", ""),
            form=element.tag,
            points=points,
            z_order=int(element.get("z_order", "0")),
            score=_score(element),
            group=int(element.get("group_id", "0")),
        )


def _score(element: ET.Element) -> float | None:
    for attribute in element.findall("attribute"):
        if attribute.get("name") == SCORE:
            return float(attribute.text or "nan")
    return None
