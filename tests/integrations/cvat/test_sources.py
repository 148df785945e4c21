"""Tests of `cvat prompts` with data sets of CVAT, Ultralytics, labelme, labelImg and Roboflow."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sam_poll.core.errors import ExitCode, PromptError
from sam_poll.core.types import Box, Point, Prompt, Size
from sam_poll.integrations.cvat import archives
from sam_poll.prompts import parser
from sam_poll.prompts.importers import prompt_files
from tests.support.cvat_prompts import Run, picture, prompts_in, tree, wide, zipped
from tests.support.foreign_files import LABELME, STUDIO

__all__ = ["wide"]

LINE = "1 0.5 0.5 0.25 0.5\n"
CAT = Box(24, 12, 40, 36)  # the object of the YOLO line, on 64×48
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
    root.with_suffix(".zip").write_bytes(
        zipped(*((name, text.encode()) for name, text in members.items()))
    )
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
    "Ultralytics by subsets": {
        "data.yaml": YAML,
        "train/labels/dog.txt": LINE,
        "README.roboflow.txt": "hello\n",
    },
    "YOLO of Label Studio": {
        "classes.txt": "dog\ncat\n",
        "notes.json": "{}",
        "labels/dog.txt": LINE,
    },
    "a wrapped folder": {
        "set/data.yaml": YAML,
        "set/labels/val/dog.txt": LINE,
        "__MACOSX/set/._data.yaml": "x",
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_yolo_data_sets_are_read_from_folders_and_zips(
    tmp_path: Path, layout: str, way: Callable[[Path, dict[str, str]], Path]
) -> None:
    picture(tmp_path / "pics/dog.jpg")
    run = Run(
        way(tmp_path / "set", LAYOUTS[layout]), "--images", tmp_path / "pics", "-o", tmp_path / "in"
    )
    assert run.code == ExitCode.OK, run.text
    assert prompts_in(tree(tmp_path / "in")["dog.json"]) == (Prompt("cat", box=CAT),)


def test_texts_in_labels_belong_to_the_pictures_of_the_same_subset_in_images(
    tmp_path: Path,
) -> None:
    for subset, seed in (("train", 1), ("val", 2)):
        picture(tmp_path / f"set/images/{subset}/dog.jpg", seed)
    texts = {
        "labels/train/dog.txt": LINE,
        "labels/val/dog.txt": LINE.replace("1", "0", 1),
        "data.yaml": YAML,
    }
    laid_out(tmp_path / "set", texts)
    for given, pictures in (
        ("set", "set"),
        ("set/labels", "set"),
        ("set", "set/images"),
        ("set/labels", "set/images"),
    ):
        output = tmp_path / f"{given}-{pictures}".replace("/", "-")
        run = Run(tmp_path / given, "--images", tmp_path / pictures, "-o", output)
        assert run.code == ExitCode.OK, run.text
        begin = "" if pictures.endswith("images") else "images/"
        labels = {
            name: prompts_in(body)[0].label
            for name, body in tree(output).items()
            if name.endswith(".json")
        }
        assert labels == {f"{begin}train/dog.json": "cat", f"{begin}val/dog.json": "dog"}
    # The file with the names of the classes is two folders above.
    run = Run(tmp_path / "set/labels/val", "--images", tmp_path / "set", "-o", tmp_path / "val")
    assert run.code == ExitCode.OK, run.text
    assert set(tree(tmp_path / "val")) == {"images/val/dog.jpg", "images/val/dog.json"}


def test_keypoints_of_a_pose_data_set_follow_their_boxes(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    members = {
        "data.yaml": YAML + "kpt_shape: [2, 2]\n",
        "labels/dog.txt": LINE.strip() + " 0.1 0.2 0.3 0.4\n",
    }
    assert (
        Run(
            laid_out(tmp_path / "set", members),
            "--images",
            tmp_path / "pics",
            "-o",
            tmp_path / "in",
        ).code
        == 0
    )
    assert prompts_in(tree(tmp_path / "in")["dog.json"]) == (Prompt("cat", box=CAT),)


# ── labelme ──


def labelme(*shapes: dict[str, Any], **more: Any) -> str:
    return json.dumps({**LABELME, "shapes": list(shapes), **more})


def drawn(label: str, kind: str, points: list[Any], **more: Any) -> dict[str, Any]:
    return {
        "label": label,
        "shape_type": kind,
        "points": points,
        "group_id": None,
        "flags": {},
        **more,
    }


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
    dog, cat = prompts_in(tree(tmp_path / "in")["dog.json"])
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
    laid_out(
        tmp_path / "set",
        {place: labelme(drawn("dog", "rectangle", [[1, 1], [9, 9]]), imagePath=path)},
    )
    run = Run(tmp_path / "set", "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.OK, run.text
    assert "cam1/dog.json" in tree(tmp_path / "in")


def test_a_labelme_picture_of_another_size_is_skipped(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    (tmp_path / "dog.json").write_text(
        labelme(drawn("dog", "rectangle", [[1, 1], [9, 9]]), imageWidth=128)
    )
    run = Run(tmp_path / "dog.json", "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert "64×48, but the prompt was made for 128×48" in run.text


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"shapes": 3}, "shapes"),
        ({"shapes": [3]}, "shapes[0]"),
        ({"shapes": [drawn("", "rectangle", [[1, 1], [2, 2]])]}, "shapes[0]"),
        (
            {"shapes": [drawn("a", "rectangle", [[1, 1], [2, 2]], group_id="x")]},
            "shapes[0].group_id",
        ),
        ({"imageWidth": "wide"}, "imageWidth"),
    ],
)
def test_invalid_labelme_is_refused_with_place_and_remedy(
    changes: dict[str, Any], place: str
) -> None:
    with pytest.raises(PromptError) as caught:
        prompt_files.read(json.dumps({**LABELME, **changes}).encode(), "dog")
    assert caught.value.place == place
    assert caught.value.remedy


@pytest.mark.parametrize("points", [[[1, 1]], [[1, 1], [2, "x"]], [[1, 1], 2], "x", None, []])
def test_an_invalid_rectangle_of_labelme_refuses_its_object_only(points: Any) -> None:
    text = labelme(drawn("bad", "rectangle", points), drawn("dog", "rectangle", [[1, 1], [9, 9]]))
    (found,) = prompt_files.read(text.encode(), "dog")
    split = prompt_files.split(prompt_files.selected_objects(found.annotated), found.annotated.size)
    assert [one.prompt.label for one in split.sound] == ["dog"]
    assert len(split.refused) == 1


# ── Pascal VOC ──


def test_boxes_of_pascal_voc_are_read_with_the_pictures_size(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    (tmp_path / "dog.xml").write_text(VOC.format(name="dog.jpg"))
    run = Run(tmp_path / "dog.xml", "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.OK, run.text
    assert prompts_in(tree(tmp_path / "in")["dog.json"]) == (
        Prompt("dog", box=Box(10, 10.5, 50, 40)),
    )
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
    assert 'image "Annotations/gone.jpg": does not exist' in run.text
    assert "JPEGImages/cam1/dog.json" in tree(tmp_path / "in")


def test_a_rotated_box_of_pascal_voc_becomes_the_box_around_it() -> None:
    rotation = (
        "<attributes><attribute><name>rotation</name><value>90.0</value></attribute></attributes>"
    )
    text = VOC.format(name="dog.jpg").replace("</bndbox>\n    <part>", f"</bndbox>{rotation}<part>")
    (found,) = prompt_files.read(text.encode(), "dog")
    # 40×29.5 about its centre (30, 25.25), turned by a quarter
    (box,) = found.annotated.shapes
    assert box.points == (pytest.approx((15.25, 5.25)), pytest.approx((44.75, 45.25)))


# ── LabelMe's XML ──

CORNERS = "".join(
    f"<pt><x>{x:.2f}</x><y>{y:.2f}</y></pt>" for x, y in ((10, 12), (40, 12), (40, 32), (10, 32))
)
# As CVAT's exporter writes it: names without folder, the box's corners, attributes as one text.
LABELME_XML = f"""<annotation>
  <filename>dog.jpg</filename>
  <folder>done/cam1</folder>
  <source><sourceImage></sourceImage><sourceAnnotation>Datumaro</sourceAnnotation></source>
  <imagesize><nrows>48</nrows><ncols>64</ncols></imagesize>
  <object>
    <name>dog</name><deleted>0</deleted><verified>0</verified><occluded>no</occluded><date></date>
    <id>0</id><type>bounding_box</type>
    <polygon>{CORNERS}<username></username></polygon>
    <attributes>color=brown, rotation=0.0</attributes>
    <parts><hasparts></hasparts><ispartof></ispartof></parts>
  </object>
  <object>
    <name>cat</name><deleted>0</deleted>
    <polygon>{CORNERS}<username></username></polygon><attributes></attributes>
  </object>
  <object>
    <name>cat</name><deleted>0</deleted>
    <segm><mask>dog_mask_2.png</mask><box><xmin>0.00</xmin></box></segm><attributes></attributes>
  </object>
  <object>
    <name>gone</name><deleted>1</deleted><type>bounding_box</type><polygon>{CORNERS}</polygon>
  </object>
</annotation>"""


@pytest.mark.parametrize("way", WAYS)
def test_boxes_of_labelmes_xml_are_read_as_cvat_exports_them(
    tmp_path: Path, way: Callable[[Path, dict[str, str]], Path]
) -> None:
    picture(tmp_path / "pics/done/cam1/dog.jpg")
    picture(tmp_path / "pics/done/cam2/dog.jpg", 1)
    members = {"default/done/cam1/dog.xml": LABELME_XML}
    run = Run(way(tmp_path / "set", members), "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.OK, run.text
    assert prompts_in(tree(tmp_path / "in")["done/cam1/dog.json"]) == (
        Prompt("dog", box=Box(10, 12, 40, 32)),
    )
    assert "left out: 1 mask, 1 polygon" in run.text
    (tmp_path / "dog.xml").write_text(LABELME_XML)
    run = Run(tmp_path / "dog.xml", "--images", tmp_path / "pics", "-o", tmp_path / "single")
    assert run.code == ExitCode.OK, run.text
    assert "done/cam1/dog.json" in tree(tmp_path / "single")


def test_a_rotated_box_of_labelme_becomes_the_box_around_it_and_a_bad_one_refuses_itself() -> None:
    (found,) = prompt_files.read(LABELME_XML.replace("=0.0", "=90.0").encode(), "dog")
    assert found.annotated.size == Size(64, 48)
    assert found.annotated.shapes[0].points == (
        pytest.approx((15, 7)),
        pytest.approx((35, 37)),
    )
    (found,) = prompt_files.read(LABELME_XML.replace("10.00", "x").encode(), "dog")
    assert "object 1, x: is not a number" in (found.annotated.shapes[0].fault or "")


def test_a_size_of_zero_in_pascal_voc_counts_as_no_size() -> None:
    text = VOC.format(name="").replace("64", "0").replace("48", "0")
    (found,) = prompt_files.read(text.encode(), "cam1/dog")
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
def test_invalid_pascal_voc_is_refused_with_a_remedy(text: str, reason: str) -> None:
    with pytest.raises(PromptError, match=reason) as caught:
        prompt_files.read(text.encode(), "dog")
    assert caught.value.remedy
    assert caught.value.place


def test_a_label_studio_export_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(STUDIO))
    run = Run(tmp_path / "a.json", "--images", tmp_path, "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    assert "a Label Studio export" in run.text


# ── Datumaro ──


def datumaro(*annotations: dict[str, Any], **item: Any) -> str:
    """Return a file as CVAT exports it without pictures: `path` is empty."""
    image = {"path": "", "size": [48, 64]}
    labels = [{"name": name, "parent": "", "attributes": []} for name in ("dog", "cat")]
    return json.dumps(
        {
            "info": {},
            "categories": {"label": {"labels": labels, "attributes": ["occluded"]}},
            "items": [
                {
                    "id": "done/cam1/dog",
                    "annotations": list(annotations),
                    "attr": {"frame": 0},
                    "image": image,
                    **item,
                }
            ],
        }
    )


def bbox(**changed: Any) -> dict[str, Any]:
    return {
        "id": 0,
        "type": "bbox",
        "attributes": {"occluded": False, "rotation": 0.0},
        "group": 0,
        "label_id": 0,
        "z_order": 0,
        "bbox": [10.0, 12.0, 30.0, 20.0],
        **changed,
    }


def points(**changed: Any) -> dict[str, Any]:
    made = {"type": "points", "points": [20.0, 20.0], "visibility": [2], **changed}
    return bbox(**made) | {"bbox": None}


@pytest.mark.parametrize("way", WAYS)
def test_boxes_and_points_of_datumaro_are_read_and_others_counted(
    tmp_path: Path, way: Callable[[Path, dict[str, str]], Path]
) -> None:
    picture(tmp_path / "pics/done/cam1/dog.jpg")
    text = datumaro(
        bbox(group=7),
        points(group=7, points=[20, 20, 21, 22, 0, 0], visibility=[2, 1, 0]),
        points(group=7, points=[11, 13], attributes={"negative": True}),
        bbox(label_id=1, attributes={"rotation": 90.0}),
        bbox(type="polygon", points=[1, 1, 9, 1, 9, 9]),
        bbox(type="skeleton", elements=[points()]),
    )
    source = way(tmp_path / "set", {"annotations/default.json": text})
    run = Run(source, "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.OK, run.text
    dog, cat = prompts_in(tree(tmp_path / "in")["done/cam1/dog.json"])
    assert dog == Prompt(
        "dog", (Point(20, 20), Point(21, 22), Point(11, 13, 0)), Box(10, 12, 40, 32)
    )
    assert (cat.label, cat.box.x0, cat.box.y1) == ("cat", pytest.approx(15), pytest.approx(37))
    assert "left out: 1 polygon, 1 skeleton" in run.text


@pytest.mark.parametrize(
    ("item", "names"),
    [
        ({}, ("done/cam1/dog",)),
        (
            {"image": {"path": "done/cam1/dog.jpg"}},
            ("done/cam1/dog.jpg", "done/cam1/dog"),
        ),
        (
            {"image": {"path": "done_cam1_dog.jpg"}},
            ("done/cam1/dog.jpg", "done_cam1_dog.jpg", "done/cam1/dog"),
        ),
        ({"image": None}, ("done/cam1/dog",)),
        ({"id": "dog.left", "image": {"path": "dog.left.png"}}, ("dog.left.png", "dog.left")),
    ],
)
def test_the_picture_of_a_datumaro_item_is_found_by_its_id_and_the_extension(
    item: dict[str, Any], names: tuple[str, ...]
) -> None:
    (found,) = prompt_files.read(datumaro(bbox(), **item).encode())
    assert found.names == names


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (datumaro(bbox(label_id=2)), "items[0].annotations[0].label_id"),
        (datumaro(bbox(label_id=None)), "items[0].annotations[0].label_id"),
        (datumaro(bbox(group="x")), "items[0].annotations[0].group"),
        (datumaro(3), "items[0].annotations[0]"),  # type: ignore[arg-type]
        (datumaro(annotations={}), "items[0].annotations"),
        (datumaro(id=3), "items[0].id"),
        (datumaro(image={"size": [1]}), "items[0].image.size"),
        (datumaro(image={"size": ["x", 1]}), "items[0].image.size[0]"),
        ('{"categories": {}, "items": []}', "categories.label.labels"),
        ('{"categories": {"label": {"labels": [{}]}}, "items": []}', "categories.label.labels[0]"),
        ('{"categories": {"label": {"labels": []}}, "items": {}}', "items"),
    ],
)
def test_invalid_datumaro_is_refused_with_place_and_remedy(text: str, place: str) -> None:
    with pytest.raises(PromptError) as caught:
        prompt_files.read(text.encode())
    assert caught.value.place == place
    assert caught.value.remedy


@pytest.mark.parametrize(
    "bad",
    [
        bbox(bbox=[1, 2, 3]),
        bbox(bbox=[1, 2, 3, "x"]),
        bbox(attributes={"rotation": "x"}),
        points(points=[1]),
        points(points=[1, None]),
        points(visibility=[0]),
    ],
)
def test_an_invalid_shape_of_datumaro_refuses_its_object_only(bad: dict[str, Any]) -> None:
    (found,) = prompt_files.read(datumaro(bad, bbox(label_id=1)).encode())
    split = prompt_files.split(prompt_files.selected_objects(found.annotated), found.annotated.size)
    assert [one.prompt.label for one in split.sound] == ["cat"]
    assert len(split.refused) == 1


# ── several files, each for many pictures ──

XML = (
    '<annotations><version>1.1</version><image id="0" name="{name}" width="64" height="48">'
    '<box label="dog" xtl="10" ytl="12" xbr="40" ybr="32"/></image></annotations>'
)


def coco(name: str) -> str:
    note = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 12, 30, 20]}
    images, categories = [{"id": 1, "file_name": name}], [{"id": 1, "name": "dog"}]
    return json.dumps({"images": images, "annotations": [note], "categories": categories})


SEVERAL: dict[str, dict[str, str]] = {
    "tasks of a project in CVAT's format": {
        "task_1/annotations.xml": XML.format(name="a.jpg"),
        "task_2/annotations.xml": XML.format(name="b.jpg"),
        "readme.txt": "two tasks",
        "task_2/images/list.txt": "b.jpg",
    },
    "subsets of COCO": {
        "annotations/instances_Train.json": coco("a.jpg"),
        "annotations/instances_Test.json": coco("b.jpg"),
        "annotations/person_keypoints_Train.json": coco("a.jpg"),
        "annotations/image_info_Test.json": coco("b.jpg"),
        "LICENSE.txt": "free",
    },
    "subsets of Datumaro": {
        "annotations/Train.json": datumaro(bbox(), id="a"),
        "annotations/Test.json": datumaro(bbox(), id="b"),
    },
    "labelme in a folder of this name": {
        "annotations/a.json": labelme(
            drawn("dog", "rectangle", [[10, 12], [40, 32]]), imagePath="a.jpg"
        ),
        "annotations/b.json": labelme(
            drawn("dog", "rectangle", [[10, 12], [40, 32]]), imagePath="b.jpg"
        ),
    },
    "Pascal VOC in a folder of this name": {
        "annotations/a.xml": VOC.format(name="a.jpg"),
        "annotations/b.xml": VOC.format(name="b.jpg"),
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", SEVERAL)
def test_several_files_are_read_together_from_folders_and_zips(
    tmp_path: Path, layout: str, way: Callable[[Path, dict[str, str]], Path]
) -> None:
    for seed, name in enumerate("ab"):
        picture(tmp_path / f"pics/{name}.jpg", seed)
    source = way(tmp_path / "set", SEVERAL[layout])
    run = Run(source, "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.OK, run.text
    made = tree(tmp_path / "in")
    assert {name: prompts_in(made[name])[0].label for name in ("a.json", "b.json")} == {
        "a.json": "dog",
        "b.json": "dog",
    }


def test_one_annotations_xml_is_read_whatever_is_beside_it(tmp_path: Path) -> None:
    picture(tmp_path / "task/images/a.jpg")
    members = {"annotations.xml": XML.format(name="a.jpg"), "notes.txt": "x", "a.json": "{"}
    run = Run(
        laid_out(tmp_path / "task", members),
        *("--images", tmp_path / "task/images", "-o", tmp_path / "in"),
    )
    assert run.code == ExitCode.OK, run.text
    assert "a.json" in tree(tmp_path / "in")


# ── ZIPs ──


def test_names_of_zip_members_are_never_used_as_paths(tmp_path: Path) -> None:
    picture(tmp_path / "secret/dog.jpg")
    (tmp_path / "pics").mkdir()
    members = {
        "classes.txt": "dog\ncat\n",
        "../secret/dog.txt": LINE,
        "/etc/dog.txt": LINE,
        "a\\..\\..\\dog.txt": LINE,
    }
    before = set(tree(tmp_path))
    run = Run(
        packed(tmp_path / "set", members), "--images", tmp_path / "pics", "-o", tmp_path / "in"
    )
    assert run.code == ExitCode.FAILED_JOBS
    assert set(tree(tmp_path)) == before | {"set.zip"}


def test_an_encrypted_zip_is_reported_as_such(tmp_path: Path) -> None:
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


@pytest.mark.slow
def test_a_damaged_zip_is_reported_as_such_wherever_it_is_cut_or_changed(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    whole = zipped(("classes.txt", b"dog\ncat\n"), ("dog.txt", LINE.encode() * 50))
    for at in range(0, len(whole), 7):
        for body in (whole[:at], whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :]):
            (tmp_path / "a.zip").write_bytes(body)
            run = Run(tmp_path / "a.zip", "--images", tmp_path / "pics", "-o", tmp_path / f"in{at}")
            assert run.code in (ExitCode.OK, ExitCode.FAILED_JOBS), (at, run.text)
            assert "Traceback" not in run.text
        if at >= 4:
            (tmp_path / "a.zip").write_bytes(whole[:at])
            run = Run(tmp_path / "a.zip", "--images", tmp_path / "pics", "-o", tmp_path / "in")
            assert "a.zip: is a ZIP that cannot be read: it is incomplete" in run.text, at


def test_a_zip_that_exceeds_the_limit_is_refused_even_if_it_understates_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 50_000)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("classes.txt", "dog\ncat\n")
        for number in range(10):
            archive.writestr(f"{number}.txt", " " * 10_000)
    (tmp_path / "a.zip").write_bytes(out.getvalue())
    run = Run(tmp_path / "a.zip", "--images", tmp_path, "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    assert "too large" in run.text


def test_written_prompts_state_the_size_that_they_were_made_for(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    members = {"classes.txt": "dog\ncat\n", "dog.txt": LINE}
    Run(laid_out(tmp_path / "set", members), "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert parser.parse(tree(tmp_path / "in")["dog.json"]).image_size == Size(64, 48)
