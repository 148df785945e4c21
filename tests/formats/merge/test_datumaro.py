"""Whole merged files, read by datumaro, which knows nothing of us: pictures, labels, scores, groups
and masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sam_poll.core.types import Mask, Result, Size
from sam_poll.formats import registry
from sam_poll.formats.registry import FormatOptions
from sam_poll.imaging.masks import paste
from tests.support.results import disc, filled, mask_of, result_of

datumaro = pytest.importorskip("datumaro", reason="datumaro is not installed")

SIZE = Size(60, 40)
LABELS = ("ant", "cat", "dog")


def results() -> list[Result]:
    frame = np.zeros((SIZE.height, SIZE.width), bool)
    frame[2:12, 2:12] = frame[20:35, 30:55] = True
    frame[25:30, 35:40] = False
    made = []
    for name, (one, other) in {
        "done/cam1/a.jpg": ("dog", "cat"),
        "done/b.png": ("ant", "dog"),
    }.items():
        masks = [disc(SIZE, 30, 20, 15, hole=5, label=one), mask_of(frame, label=other, score=0.7)]
        made.append(result_of(SIZE, masks, name=name))
    return made


def written(kind: str, **options: Any) -> bytes:
    (make,) = registry.load([kind], FormatOptions(tolerance_px=0, **options))
    files = ((f"{n}{d.suffix}", d.body) for n, result in enumerate(results()) for d in make(result))
    return b"".join(registry.merged(kind, files))


def read(kind: str, body: bytes, folder: Path) -> dict[str, list[Any]]:
    """The annotations of each picture by its name without its ending, in the order of labels and
    sizes.
    """
    for result in results():  # its readers want the pictures to be there
        picture = folder / "images" / result.name
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", SIZE).save(picture)
    if kind == "cvat":
        source = folder / "task.xml"
        listed = "".join(f"<label><name>{label}</name>{SCORE}</label>" for label in LABELS)
        meta = f"<meta><task><labels>{listed}</labels></task></meta>".encode()
        source.write_bytes(body.replace(b"<image ", meta + b"<image ", 1))
        dataset = datumaro.Dataset.import_from(str(source), "cvat")
    else:
        (folder / "annotations").mkdir()
        (folder / "annotations" / "instances_train.json").write_bytes(body)
        dataset = datumaro.Dataset.import_from(str(folder), "coco_instances")
    labels = [label.name for label in dataset.categories()[datumaro.AnnotationType.label]]
    assert labels == list(LABELS)
    found = {}
    for item in dataset:
        kept = [
            a for a in item.annotations if a.type != datumaro.AnnotationType.bbox
        ]  # COCO's own boxes
        found[item.id] = sorted(kept, key=lambda a: (labels[a.label], -int(a.get_area())))
    return found


# An import file needs no <meta>: the task has the labels. Datumaro reads exports, which carry them.
SCORE = (
    "<attributes><attribute><name>score</name><input_type>number</input_type>"
    "</attribute></attributes>"
)


def wanted() -> dict[str, list[Mask]]:
    return {
        Path(r.name).with_suffix("").as_posix(): sorted(r.masks, key=lambda m: m.label)
        for r in results()
    }


@pytest.mark.parametrize("kind", ["cvat", "coco"])
def test_datumaro_reads_every_mask_with_its_label_and_score(kind: str, tmp_path: Path) -> None:
    found = read(kind, written(kind), tmp_path)
    assert set(found) == set(wanted())
    for name, masks in wanted().items():
        for annotation, mask in zip(found[name], masks, strict=True):
            assert annotation.type == datumaro.AnnotationType.mask
            assert LABELS[annotation.label] == mask.label
            assert annotation.attributes["score"] == mask.score
            assert np.array_equal(np.asarray(annotation.image, bool), paste(mask, SIZE))


@pytest.mark.parametrize("kind", ["cvat", "coco"])
def test_datumaro_reads_polygons_as_the_parts_of_their_objects(kind: str, tmp_path: Path) -> None:
    found = read(kind, written(kind, **{kind: "polygon"}), tmp_path)
    assert set(found) == set(wanted())
    for name, masks in wanted().items():
        for mask in masks:
            parts = [a for a in found[name] if LABELS[a.label] == mask.label]
            whole = len(parts) == 1
            assert whole == (mask.score == 0.9)
            (group,) = {part.group for part in parts}
            assert kind == "coco" or bool(group) != whole
            assert {part.attributes["score"] for part in parts} == {mask.score}
            runs = coco_mask.frPyObjects(
                [list(part.points) for part in parts], SIZE.height, SIZE.width
            )
            assert np.array_equal(coco_mask.decode(runs).any(axis=2), filled(paste(mask, SIZE)))
