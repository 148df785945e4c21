"""The same boxes, written by datumaro, which knows nothing of us, in every kind that it knows: the
same prompts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sam_poll.core.errors import ExitCode
from sam_poll.core.types import Box, Point
from sam_poll.integrations.cvat import import_prompts as command
from sam_poll.prompts import parser
from tests.conftest import picture_bytes

datumaro = pytest.importorskip("datumaro", reason="datumaro is not installed")

# What is exported, by datumaro's name for the kind: the file (or folder) to be read, and how exact
# its numbers are.
KINDS = {
    "cvat": ("train.xml", 0.005),
    "coco_instances": ("annotations/instances_train.json", 1e-6),
    "yolo": (".", 1e-4),
    "yolo_ultralytics": (".", 1e-4),
    "datumaro": (".", 1e-6),
    "voc": (".", 1e-6),
    "label_me": (".", 0.005),
}
WITH_POINTS = ("cvat", "datumaro")


def exported(kind: str, folder: Path) -> Path:
    unset = {"occluded": False}
    drawn = [
        datumaro.Bbox(10, 10, 40.5, 30, label=1, group=1, attributes=unset),
        datumaro.Bbox(1, 2, 3, 4, label=0, attributes=unset),
    ]
    if kind in WITH_POINTS:
        drawn.append(datumaro.Points([15, 15, 20, 20], label=1, group=1, attributes=unset))
    other = "val" if kind == "yolo_ultralytics" else "train"  # that one must have both
    blank = datumaro.components.media.Image.from_numpy(np.zeros((48, 64, 3), np.uint8))
    items = [
        datumaro.DatasetItem(
            "cam1/dog", subset="train", media=blank, annotations=drawn, attributes={"frame": 0}
        ),
        datumaro.DatasetItem("none", subset=other, media=blank, attributes={"frame": 1}),
    ]
    dataset = datumaro.Dataset.from_iterable(items, categories=["cat", "dog"])
    dataset.export(str(folder), kind, save_media=False)
    return folder / KINDS[kind][0]


@pytest.mark.parametrize("kind", KINDS)
def test_what_datumaro_writes_becomes_the_prompts_that_it_was_given(
    kind: str, tmp_path: Path
) -> None:
    source, exact = exported(kind, tmp_path / "exported"), KINDS[kind][1]
    for name in ("cam1/dog.jpg", "none.jpg"):
        path = tmp_path / "pics" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes())
    assert command.write_prompts(source, tmp_path / "pics", tmp_path / "in") == ExitCode.OK
    assert not (tmp_path / "in/none.json").exists()
    read = parser.parse((tmp_path / "in/cam1/dog.json").read_bytes()).prompts
    boxes = {"dog": Box(10, 10, 50.5, 40), "cat": Box(1, 2, 4, 6)}
    assert sorted(p.label for p in read) == sorted(boxes)  # type: ignore[union-attr]
    for prompt in read:  # type: ignore[union-attr]
        assert prompt.box is not None
        expected = boxes[prompt.label]
        for edge in ("x0", "y0", "x1", "y1"):
            assert getattr(prompt.box, edge) == pytest.approx(getattr(expected, edge), abs=exact)
        clicked = kind in WITH_POINTS and prompt.label == "dog"
        assert prompt.points == ((Point(15, 15), Point(20, 20)) if clicked else ())
