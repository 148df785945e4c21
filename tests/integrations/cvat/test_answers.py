"""Tests of the answers that `cvat push` reads: names, shapes, objects, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sam_poll.core.errors import InputError, UsageError
from sam_poll.core.types import Mask, Size
from sam_poll.formats import registry
from sam_poll.formats.cvat import flat
from sam_poll.integrations.cvat import answers
from tests.support.results import result_of

SIZE = Size(64, 48)
BAR = Mask("dog", 0.9, 3, 4, np.ones((5, 6), bool))


def write(folder: Path, file: str, name: str, *masks: Mask, form: Any = "mask") -> Path:
    (make,) = registry.load(["cvat"], registry.FormatOptions(cvat=form))
    (document,) = make(result_of(SIZE, list(masks), name=name))
    path = folder / f"{file}.cvat.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(document.body)
    return path


def test_answers_are_read_from_all_folders_below_with_the_prefix_before_their_names(
    tmp_path: Path,
) -> None:
    write(tmp_path, "cam2/b", "done/cam2/b.jpg")
    write(tmp_path, "a", "done/a.jpg", BAR)
    found = answers.read_answers(tmp_path, "share/")
    assert found.sizes == {"share/done/a.jpg": SIZE, "share/done/cam2/b.jpg": SIZE}
    (record,) = found.shapes["share/done/a.jpg"]
    assert (record.label, record.form, record.points, record.score) == (
        "dog",
        "mask",
        flat(BAR),
        0.9,
    )
    assert (found.labels, found.shape_count) == (["dog"], 1)
    assert list(found.of(["share/done/cam2/b.jpg"]).objects()) == []


def test_the_parts_of_one_object_are_one_object(tmp_path: Path) -> None:
    two = np.zeros((20, 40), bool)
    two[:, :10] = two[:, 30:] = True
    parted = Mask("dog", 0.9, 5, 5, two)
    write(tmp_path, "a", "done/a.jpg", parted, Mask("cat", 0.9, 1, 1, two), BAR, form="polygon")
    objects = list(answers.read_answers(tmp_path).objects())
    assert {name for name, _ in objects} == {"done/a.jpg"}
    labels = [[part.label for part in parts] for _, parts in objects]
    assert sorted(labels) == [["cat", "cat"], ["dog"], ["dog", "dog"]]


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        (b"<annotations><image", InputError, r"bad\.cvat\.xml"),
        (b"<!DOCTYPE a><annotations/>", InputError, r"bad\.cvat\.xml"),
        (b"<annotations><version>1.1</version></annotations>", UsageError, "name no pictures"),
        (None, UsageError, r"no \.cvat\.xml files"),
    ],
)
def test_invalid_answers_are_refused_with_their_name(
    tmp_path: Path, body: bytes | None, kind: type, reason: str
) -> None:
    (tmp_path / "out").mkdir()
    if body:
        (tmp_path / "out" / "bad.cvat.xml").write_bytes(body)
    with pytest.raises(kind, match=reason):
        answers.read_answers(tmp_path / "out")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        answers.read_answers(tmp_path / "out")


@pytest.mark.parametrize(
    ("form", "old", "new"),
    [
        ("mask", b'rle="', b'rle="x, '),
        ("mask", b'rle="', b'rle="5, '),
        ("mask", b'left="3"', b'left="-1"'),
        ("mask", b'top="4"', b'top="47"'),
        ("mask", b'height="5"', b'height="' + 400 * b"9" + b'"'),
        ("polygon", b'points="', b'points="nan,1;'),
        ("polygon", b'points="', b'points="1,1" old="'),
    ],
)
def test_a_shape_that_the_server_would_refuse_is_refused_with_the_pictures_name(
    tmp_path: Path, form: str, old: bytes, new: bytes
) -> None:
    file = write(tmp_path, "a", "done/a.jpg", BAR, form=form)
    body = file.read_bytes()
    assert old in body
    file.write_bytes(body.replace(old, new))
    with pytest.raises(InputError, match="image 'done/a"):
        answers.read_answers(tmp_path)
