"""What `sam-poll cvat prompts` reads: data sets as CVAT, Ultralytics, labelme, labelImg and Roboflow lay them out."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sam_poll import prompts
from sam_poll.annotations import files
from sam_poll.cvat import containers
from sam_poll.errors import ExitCode, PromptError
from sam_poll.types import Box, Point, Prompt, Size
from tests.test_cvat_prompts import Run, asked, picture, tree, wide, zipped
from tests.test_foreign import LABELME, STUDIO

__all__ = ["wide"]

LINE = "1 0.5 0.5 0.25 0.5\n"
CAT = Box(24, 12, 40, 36)  # the line, on 64×48
YAML = "path: .\ntrain: train.txt\nnames:\n  0: dog\n  1: cat\n"
VOC = """<annotation>
  <folder>pics</folder><filename>{name}</filename>
  <size><width>64</width><height>48</height><depth>3</depth></size>
  <object><name>dog</name><difficult>0</difficult>
    <bndbox><xmin>10</xmin><ymin>10.5</ymin><xmax>50</xmax><ymax>40</ymax></bndbox>
    <part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>
  </object>
  <object><name>cat</name><polygon><pt><x>1</x><y>1</y></pt></polygon></object>
</annotation>"""


def laid_out(root: Path, members: dict[str, str]) -> Path:
    for name, text in members.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def packed(root: Path, members: dict[str, str]) -> Path:
    root.with_suffix(".zip").write_bytes(zipped(*((name, text.encode()) for name, text in members.items())))
    return root.with_suffix(".zip")


WAYS: tuple[Callable[[Path, dict[str, str]], Path], ...] = (laid_out, packed)
LAYOUTS: dict[str, dict[str, str]] = {
    "YOLO 1.1 of CVAT": {
        "obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n",
        "obj.names": "dog\ncat\n",
        "train.txt": "data/obj_train_data/dog.jpg\n",
        "obj_train_data/dog.txt": LINE,
    },
    "a subset of CVAT's with a name of its own": {
        "obj.names": "dog\ncat\n",
        "night.txt": "data/obj_night_data/dog.jpg\n",
        "obj_night_data/dog.txt": LINE,
    },
    "Ultralytics of CVAT": {
        "data.yaml": YAML,
        "train.txt": "data/images/train/dog.jpg\n",
        "labels/train/dog.txt": LINE,
    },
    "Ultralytics by subsets": {"data.yaml": YAML, "train/labels/dog.txt": LINE, "README.roboflow.txt": "hello\n"},
    "YOLO of Label Studio": {"classes.txt": "dog\ncat\n", "notes.json": "{}", "labels/dog.txt": LINE},
    "a wrapped folder": {"set/data.yaml": YAML, "set/labels/val/dog.txt": LINE, "__MACOSX/set/._data.yaml": "x"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_yolo_data_sets_are_read_from_folders_and_zips(
    tmp_path: Path, layout: str, way: Callable[[Path, dict[str, str]], Path]
) -> None:
    picture(tmp_path / "pics/dog.jpg")
    run = Run(way(tmp_path / "set", LAYOUTS[layout]), "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.OK, run.text
    assert asked(tree(tmp_path / "in")["dog.json"]) == (Prompt("cat", box=CAT),)


def test_texts_in_labels_are_about_the_pictures_of_the_same_subset_in_images(tmp_path: Path) -> None:
    for subset, seed in (("train", 1), ("val", 2)):
        picture(tmp_path / f"set/images/{subset}/dog.jpg", seed)
    texts = {"labels/train/dog.txt": LINE, "labels/val/dog.txt": LINE.replace("1", "0", 1), "data.yaml": YAML}
    laid_out(tmp_path / "set", texts)
    for given, pictures in (("set", "set"), ("set/labels", "set"), ("set", "set/images"), ("set/labels", "set/images")):
        output = tmp_path / f"{given}-{pictures}".replace("/", "-")
        run = Run(tmp_path / given, "--images", tmp_path / pictures, "-o", output)
        assert run.code == ExitCode.OK, run.text
        begin = "" if pictures.endswith("images") else "images/"
        labels = {name: asked(body)[0].label for name, body in tree(output).items() if name.endswith(".json")}
        assert labels == {f"{begin}train/dog.json": "cat", f"{begin}val/dog.json": "dog"}
    # The names of the classes lie two folders above.
    run = Run(tmp_path / "set/labels/val", "--images", tmp_path / "set", "-o", tmp_path / "val")
    assert run.code == ExitCode.OK, run.text
    assert set(tree(tmp_path / "val")) == {"images/val/dog.jpg", "images/val/dog.json"}


def test_keypoints_of_a_pose_data_set_follow_their_boxes(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    members = {"data.yaml": YAML + "kpt_shape: [2, 2]\n", "labels/dog.txt": LINE.strip() + " 0.1 0.2 0.3 0.4\n"}
    assert Run(laid_out(tmp_path / "set", members), "--images", tmp_path / "pics", "-o", tmp_path / "in").code == 0
    assert asked(tree(tmp_path / "in")["dog.json"]) == (Prompt("cat", box=CAT),)


# ── labelme ──


def labelme(*shapes: dict[str, Any], **more: Any) -> str:
    return json.dumps({**LABELME, "shapes": list(shapes), **more})


def drawn(label: str, kind: str, points: list[Any], **more: Any) -> dict[str, Any]:
    return {"label": label, "shape_type": kind, "points": points, "group_id": None, "flags": {}, **more}


def test_rectangles_and_points_of_labelme_are_read_and_others_counted(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    text = labelme(
        drawn("dog", "rectangle", [[50, 40], [10, 12.5]], group_id=0),
        drawn("dog", "point", [[20, 20]], group_id=0),
        drawn("dog", "point", [[11, 13]], group_id=0, flags={"negative": True}),
        drawn("cat", "rectangle", [[1, 1], [9, 1], [9, 5], [1, 5]]),
        drawn("cat", "polygon", [[1, 1], [9, 1], [9, 5]]),
        drawn("cat", "circle", [[1, 1], [9, 1]]),
    )
    (tmp_path / "dog.json").write_text(text)
    run = Run(tmp_path / "dog.json", "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.OK, run.text
    dog, cat = asked(tree(tmp_path / "in")["dog.json"])
    assert dog == Prompt("dog", (Point(20, 20), Point(11, 13, 0)), Box(10, 12.5, 50, 40))
    assert (cat.label, cat.box) == ("cat", Box(1, 1, 9, 5))
    assert "left out: 1 circle, 1 polygon" in run.text


@pytest.mark.parametrize(
    ("place", "path"),
    [
        ("cam1/dog.json", "dog.jpg"),
        ("cam1/dog.json", "..\\pics\\cam1\\dog.jpg"),
        ("labels/cam1/dog.json", "../../images/cam1/dog.jpg"),
        ("cam1/dog.json", "../../../../etc/cam1/dog.jpg"),
        ("cam1/dog.json", "renamed.jpg"),
        ("cam1/dog.json", None),
    ],
)
def test_the_picture_of_a_labelme_file_is_found_beside_it_by_path_or_by_its_own_name(
    tmp_path: Path, place: str, path: str | None
) -> None:
    picture(tmp_path / "pics/cam1/dog.jpg")
    laid_out(tmp_path / "set", {place: labelme(drawn("dog", "rectangle", [[1, 1], [9, 9]]), imagePath=path)})
    run = Run(tmp_path / "set", "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.OK, run.text
    assert "cam1/dog.json" in tree(tmp_path / "in")


def test_a_labelme_picture_of_another_size_is_passed_over(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    (tmp_path / "dog.json").write_text(labelme(drawn("dog", "rectangle", [[1, 1], [9, 9]]), imageWidth=128))
    run = Run(tmp_path / "dog.json", "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert "64×48, but the prompt was made for 128×48" in run.text


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"shapes": 3}, "shapes"),
        ({"shapes": [3]}, "shapes[0]"),
        ({"shapes": [drawn("", "rectangle", [[1, 1], [2, 2]])]}, "shapes[0]"),
        ({"shapes": [drawn("a", "rectangle", [[1, 1], [2, 2]], group_id="x")]}, "shapes[0].group_id"),
        ({"imageWidth": "wide"}, "imageWidth"),
    ],
)
def test_broken_labelme_is_refused_with_its_place_and_a_remedy(changes: dict[str, Any], place: str) -> None:
    with pytest.raises(PromptError) as caught:
        files.read(json.dumps({**LABELME, **changes}).encode(), "dog")
    assert caught.value.place == place
    assert caught.value.remedy


@pytest.mark.parametrize("points", [[[1, 1]], [[1, 1], [2, "x"]], [[1, 1], 2], "x", None, []])
def test_a_broken_rectangle_of_labelme_takes_its_own_object_along(points: Any) -> None:
    text = labelme(drawn("bad", "rectangle", points), drawn("dog", "rectangle", [[1, 1], [9, 9]]))
    (found,) = files.read(text.encode(), "dog")
    split = files.split(files.asked(found.annotated), found.annotated.size)
    assert [one.prompt.label for one in split.sound] == ["dog"]
    assert len(split.refused) == 1


# ── Pascal VOC ──


def test_boxes_of_pascal_voc_are_read_with_the_pictures_size(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    (tmp_path / "dog.xml").write_text(VOC.format(name="dog.jpg"))
    run = Run(tmp_path / "dog.xml", "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.OK, run.text
    assert asked(tree(tmp_path / "in")["dog.json"]) == (Prompt("dog", box=Box(10, 10.5, 50, 40)),)
    assert "left out: 1 polygon" in run.text


@pytest.mark.parametrize("way", WAYS)
def test_a_pascal_voc_data_set_as_cvat_exports_it_is_read(
    tmp_path: Path, way: Callable[[Path, dict[str, str]], Path]
) -> None:
    picture(tmp_path / "set/JPEGImages/cam1/dog.jpg")
    members = {
        "labelmap.txt": "# label:color_rgb:parts:actions\ndog:::\n",
        "ImageSets/Main/default.txt": "cam1/dog\n",
        "Annotations/cam1/dog.xml": VOC.format(name="cam1/dog.jpg"),
        "Annotations/gone.xml": VOC.format(name="gone.jpg"),
    }
    run = Run(way(tmp_path / "voc", members), "--images", tmp_path / "set", "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    assert 'image "Annotations/gone.jpg": is not there' in run.text
    assert "JPEGImages/cam1/dog.json" in tree(tmp_path / "in")


def test_a_size_of_zero_in_pascal_voc_is_none() -> None:
    text = VOC.format(name="").replace("64", "0").replace("48", "0")
    (found,) = files.read(text.encode(), "cam1/dog")
    assert (found.annotated.size, found.names) == (None, ("cam1/dog",))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (VOC.format(name="dog.jpg").replace("64", "wide"), "not a number"),
        (VOC.format(name="dog.jpg").replace("<name>dog</name>", ""), "no name"),
        (VOC.format(name="dog.jpg")[:-20], "not well-formed"),
        ("<!DOCTYPE a><annotation/>", "document type"),
    ],
)
def test_broken_pascal_voc_is_refused_with_a_remedy(text: str, reason: str) -> None:
    with pytest.raises(PromptError, match=reason) as caught:
        files.read(text.encode(), "dog")
    assert caught.value.remedy
    assert caught.value.place


def test_a_label_studio_export_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(STUDIO))
    run = Run(tmp_path / "a.json", "--images", tmp_path, "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    assert "a Label Studio export" in run.text


# ── ZIPs ──


def test_no_member_of_a_zip_leads_anywhere(tmp_path: Path) -> None:
    picture(tmp_path / "secret/dog.jpg")
    (tmp_path / "pics").mkdir()
    members = {"classes.txt": "dog\ncat\n", "../secret/dog.txt": LINE, "/etc/dog.txt": LINE, "a\\..\\..\\dog.txt": LINE}
    before = set(tree(tmp_path))
    run = Run(packed(tmp_path / "set", members), "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    assert set(tree(tmp_path)) == before | {"set.zip"}


def test_an_encrypted_zip_is_told_as_such(tmp_path: Path) -> None:
    body = bytearray(zipped(("classes.txt", b"dog\ncat\n"), ("dog.txt", LINE.encode())))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = body.find(signature)
        while at >= 0:
            body[at + flags] |= 1
            at = body.find(signature, at + 4)
    (tmp_path / "a.zip").write_bytes(body)
    run = Run(tmp_path / "a.zip", "--images", tmp_path, "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    assert "a.zip: is an encrypted ZIP" in run.text


def test_a_damaged_zip_is_told_as_such_wherever_it_is_cut_or_changed(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    whole = zipped(("classes.txt", b"dog\ncat\n"), ("dog.txt", LINE.encode() * 50))
    for at in range(0, len(whole), 7):
        for body in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            (tmp_path / "a.zip").write_bytes(body)
            run = Run(tmp_path / "a.zip", "--images", tmp_path / "pics", "-o", tmp_path / f"in{at}")
            assert run.code in (ExitCode.OK, ExitCode.FAILED_JOBS), (at, run.text)
            assert "Traceback" not in run.text


def test_a_zip_may_not_hold_more_than_may_be_read_whatever_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(containers, "MAX_BYTES", 50_000)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("classes.txt", "dog\ncat\n")
        for number in range(10):
            archive.writestr(f"{number}.txt", " " * 10_000)
    (tmp_path / "a.zip").write_bytes(out.getvalue())
    run = Run(tmp_path / "a.zip", "--images", tmp_path, "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    assert "too large" in run.text


def test_the_prompts_written_say_the_size_that_they_were_made_for(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    members = {"classes.txt": "dog\ncat\n", "dog.txt": LINE}
    Run(laid_out(tmp_path / "set", members), "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert prompts.parse(tree(tmp_path / "in")["dog.json"]).image_size == Size(64, 48)
