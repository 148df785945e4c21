"""COCO, OPEX and YOLO as their tools write them; the kind told by the content; a picture's prompt
file.
"""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opex import BBox, ObjectPrediction, ObjectPredictions
from opex import Polygon as OpexPolygon

from sam_poll.core.errors import PromptError
from sam_poll.core.types import Prompt, Size
from sam_poll.formats.registry import FormatOptions
from sam_poll.prompts import parser
from sam_poll.prompts.importers import coco, opex, prompt_files, yolo
from sam_poll.prompts.importers.shapes import Annotated, Shape, box_shape, prompts_of
from tests.support.annotation_files import EXPORT, image, label, shapes
from tests.support.coco_files import COCO
from tests.support.results import rectangle, result_of


def changed(key: str, index: int, **values: Any) -> bytes:
    """COCO with some values of one entry changed; None: left out."""
    document = json.loads(json.dumps(COCO))
    entry = document[key][index]
    entry |= values
    document[key][index] = {k: v for k, v in entry.items() if v is not None}
    return json.dumps(document).encode()


# ── COCO ──


def test_coco_boxes_are_corner_and_size_and_what_is_no_box_is_counted() -> None:
    dog, none = coco.read(json.dumps(COCO).encode())
    assert (dog.name, dog.size, dog.left_out) == (
        "done/cam1/dog.jpg",
        Size(640, 480),
        (("crowd", 1),),
    )
    assert dog.shapes == (
        Shape("box", "dog", ((100.5, 50.0), (300.5, 200.0))),
        Shape("box", "cat", ((440.0, 60.0), (460.0, 160.0))),
    )
    assert none == Annotated("none.jpg", Size(100, 50), (), (("boxless annotation", 1),))


def test_ids_of_coco_may_be_large_and_differ_in_their_last_digit_only() -> None:
    first, second = 17_000_000_000_000_000_001, 17_000_000_000_000_000_002
    document = json.loads(json.dumps(COCO))
    for picture, number in zip(document["images"], (first, second), strict=True):
        picture["id"] = number
    for entry in document["annotations"]:
        entry["image_id"] = {1: first, 2: second}[entry["image_id"]]
    assert coco.read(json.dumps(document).encode()) == coco.read(json.dumps(COCO).encode())


def test_coco_pictures_need_no_size() -> None:
    assert coco.read(changed("images", 0, width=None, height=None))[0].size is None


@pytest.mark.parametrize(
    ("body", "place", "reason"),
    [
        (b"[]", "the COCO file", "a list of results"),
        (b'"x"', "the COCO file", "not a COCO file"),
        (b"{", "line 1", "not JSON"),
        (b"\xff{}", "the JSON file", "not UTF-8"),
        (b"[" * 100_000, "the JSON file", "nested deeper"),
        (b'{"images": []}', "categories", "is missing"),
        (b'{"images": [], "categories": {}, "annotations": []}', "categories", "not a list"),
        (b'{"images": [1], "categories": [], "annotations": []}', r"images[0]", "not an object"),
        (changed("categories", 0, name=None), "categories[0]", "no name"),
        (changed("categories", 1, id=1), "categories[1]", "given twice"),
        (changed("images", 0, file_name=None), "images[0]", "no file_name"),
        (changed("images", 0, file_name=7), "images[0]", "no file_name"),
        (changed("images", 0, height=None), 'image "done/cam1/dog.jpg", height', "null"),
        (changed("images", 1, id=1), "images[1]", "given twice"),
        (changed("images", 1, file_name="done/cam1/dog.jpg"), 'image "done/cam1/dog.jpg"', "twice"),
        (changed("annotations", 1, image_id=9), "annotations[1].image_id", "no id 9"),
        (changed("annotations", 1, image_id=True), "annotations[1].image_id", "true"),
        (changed("annotations", 1, category_id=None), "annotations[1].category_id", "null"),
        (changed("annotations", 1, category_id=9), "annotations[1].category_id", "no id 9"),
    ],
)
def test_broken_coco_is_refused_with_its_place_and_a_remedy(
    body: bytes, place: str, reason: str
) -> None:
    with pytest.raises(PromptError) as caught:
        coco.read(body)
    assert reason in caught.value.reason
    assert caught.value.place == place
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("body", "place", "reason"),
    [
        (changed("annotations", 1, bbox=[1, 2, 3]), "annotations[1].bbox", "not [x"),
        (changed("annotations", 1, bbox=[1, 2, "3x", 4]), "annotations[1].bbox[2]", "not a number"),
        (
            changed("annotations", 1, bbox=[1, 2, float("nan"), 4]),
            "annotations[1].bbox[2]",
            "not a number",
        ),
        (
            changed("annotations", 1, bbox=[1, 2, float("inf"), 4]),
            "annotations[1].bbox[2]",
            "outside any picture",
        ),
        (
            changed("annotations", 1, bbox=[1, 2, 10**30, 4]),
            "annotations[1].bbox[2]",
            "outside any picture",
        ),
    ],
)
def test_a_broken_box_of_coco_takes_its_own_object_along_and_no_other(
    body: bytes, place: str, reason: str
) -> None:
    dog, cat = coco.read(body)[0].shapes
    assert dog.fault is None
    assert (cat.fault or "").startswith(f"{place}: ")
    assert reason in (cat.fault or "")


def test_a_list_of_results_is_refused_with_what_it_lacks() -> None:
    with pytest.raises(PromptError) as caught:
        prompt_files.read(
            b'[{"image_id": 42, "category_id": 18, "bbox": [1, 2, 3, 4], "score": 0.2}]'
        )
    assert "`images` and `categories`" in (caught.value.remedy or "")


def test_polygons_are_not_held_while_coco_is_read() -> None:
    outline = [[round(0.37 * n, 2) for n in range(2000)]]
    entries = [{**COCO["annotations"][0], "segmentation": outline, "id": n} for n in range(300)]
    body = json.dumps({**COCO, "annotations": entries}).encode()
    tracemalloc.start()
    assert len(coco.read(body)[0].shapes) == 300
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(body)  # measured: 1.04, the text itself decoded; 5.1 with all of it held


# ── OPEX ──


def opex_of(**changes: Any) -> bytes:
    entry = {
        "score": 0.9,
        "label": "dog",
        "bbox": {"top": 10, "left": 20, "bottom": 29, "right": 49},
        "polygon": {"points": [[20, 10], [49, 10], [49, 29]]},
    }
    return json.dumps(
        {"timestamp": "2024-05-06", "id": "dog.jpg", "objects": [entry], **changes}
    ).encode()


def test_an_opex_box_ends_behind_its_last_row_and_column() -> None:
    annotated, names = opex.read(opex_of(), "frame1")
    assert annotated == Annotated("dog.jpg", None, (box_shape((20, 10, 50, 30), "dog"),))
    assert names == ("dog.jpg", "frame1")


def test_what_waikatos_own_library_writes_is_read() -> None:
    square = OpexPolygon(points=[(1, 1), (5, 1), (5, 4)])
    found = ObjectPrediction(
        label="dog", score=0.5, bbox=BBox(left=1, top=1, right=5, bottom=4), polygon=square
    )
    body = (
        ObjectPredictions(id="cam1", timestamp="2024-05-06 07:08:09.0", objects=[found])
        .to_json_string()
        .encode()
    )
    ((annotated, names),) = [(one.annotated, one.names) for one in prompt_files.read(body, "dog")]
    assert names == ("cam1", "dog")
    assert annotated.shapes == (box_shape((1, 1, 6, 5), "dog"),)


def test_our_own_opex_names_its_picture_and_size_and_its_boxes_are_the_masks_edges() -> None:
    from sam_poll.formats.opex import make

    size = Size(60, 40)
    options = FormatOptions(min_area_px=0)
    (document,) = make(options)(
        result_of(size, [rectangle(size, 3, 4, 20, 30, label="dog")], name="done/cam1/dog.jpg")
    )
    annotated, names = opex.read(document.body, "dog")
    assert (names[0], annotated.size) == ("done/cam1/dog.jpg", size)
    (mask,) = result_of(size, [rectangle(size, 3, 4, 20, 30)]).masks
    height, width = mask.pixels.shape
    edges = ((mask.left, mask.top), (mask.left + width, mask.top + height))
    assert annotated.shapes == (Shape("box", "dog", edges),)


@pytest.mark.parametrize(
    ("body", "place", "reason"),
    [
        (b"{}", "the OPEX file", "not OPEX"),
        (opex_of(id="", objects=[]), "id", "name its picture"),
        (opex_of(objects=[3]), "objects[0]", "not an object"),
        (
            opex_of(objects=[{"bbox": {"top": 1, "left": 1, "bottom": 2, "right": 2}}]),
            "objects[0]",
            "no label",
        ),
        (
            opex_of(meta={"image": "a.jpg", "width": "x", "height": "9"}),
            "meta.width",
            "not a number",
        ),
    ],
)
def test_broken_opex_is_refused_with_its_place_and_a_remedy(
    body: bytes, place: str, reason: str
) -> None:
    with pytest.raises(PromptError) as caught:
        opex.read(body)
    assert reason in caught.value.reason
    assert caught.value.place == place
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("body", "place", "reason"),
    [
        (opex_of(objects=[{"label": "a", "bbox": [1, 2, 3, 4]}]), "objects[0].bbox", "a list"),
        (opex_of(objects=[{"label": "a", "bbox": {"top": 1}}]), "objects[0].bbox.left", "null"),
    ],
)
def test_a_broken_box_of_opex_takes_its_own_object_along(
    body: bytes, place: str, reason: str
) -> None:
    (shape,) = opex.read(body)[0].shapes
    assert (shape.fault or "").startswith(f"{place}: ")
    assert reason in (shape.fault or "")


def test_an_object_of_opex_without_a_box_is_counted() -> None:
    assert opex.read(opex_of(objects=[{"label": "a"}]))[0].left_out == (("boxless object", 1),)


# ── YOLO ──

NAMES = {0: "dog", 7: "cat"}


@given(
    st.lists(st.tuples(*[st.integers(1, 99)] * 4), max_size=5),
    st.integers(1, 9999),
    st.integers(1, 9999),
)
def test_a_yolo_box_is_centre_and_size_in_parts_of_the_sides(
    boxes: list[tuple[int, int, int, int]], width: int, height: int
) -> None:
    text = "".join(f"7 {a / 100} {b / 100} {c / 100} {d / 100} 0.93\r\n" for a, b, c, d in boxes)
    read = yolo.read(text.encode(), "dog", Size(width, height), NAMES)
    for shape, (a, b, c, d) in zip(read.shapes, boxes, strict=True):
        (x0, y0), (x1, y1) = shape.points
        assert shape.label == "cat"
        assert (x0 + x1, y0 + y1) == pytest.approx((2 * a * width / 100, 2 * b * height / 100))
        assert (x1 - x0, y1 - y0) == pytest.approx((c * width / 100, d * height / 100))


def test_outlines_of_yolo_are_counted_and_empty_lines_passed_over() -> None:
    read = yolo.read(
        b"\n0 0.5 0.5 0.1 0.1\n\n0 0 0 1 0 1 1\n0 0 0 1 0 1 1 0 1\n", "dog", Size(10, 10), NAMES
    )
    assert (len(read.shapes), read.left_out) == (1, (("outline", 2),))


@pytest.mark.parametrize(
    ("line", "place", "reason"),
    [
        (b"0 0.5 0.5 0.1", "dog, line 2", "no box"),
        (b"dog 0.5 0.5 0.1 0.1", "dog, line 2, class", "not a number"),
        (b"1 0.5 0.5 0.1 0.1", "dog, line 2", "class 1 has no name"),
        (b"0 0.5 0.5 0.1 \xff", "dog", "UTF-8"),
    ],
)
def test_broken_yolo_is_refused_with_its_line_and_a_remedy(
    line: bytes, place: str, reason: str
) -> None:
    with pytest.raises(PromptError) as caught:
        yolo.read(b"0 0.5 0.5 0.1 0.1\n" + line, "dog", Size(640, 480), NAMES)
    assert reason in caught.value.reason
    assert caught.value.place == place
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("line", "reason"),
    [("0 0.5 nan 0.1 0.1", "not a number"), ("0 320 240 100 100", "fractions of the picture")],
)
def test_a_broken_box_of_yolo_takes_its_own_object_along(line: str, reason: str) -> None:
    good, bad = yolo.read(
        f"0 0.5 0.5 0.1 0.1\n{line}".encode(), "dog", Size(640, 480), NAMES
    ).shapes
    assert good.fault is None
    assert "dog, line 2: " in (bad.fault or "")
    assert reason in (bad.fault or "")


BOX_LINE = "0 0.5 0.5 0.2 0.2"


@pytest.mark.parametrize(
    ("line", "keypoints"),
    [
        (f"{BOX_LINE} 7", 0),  # a track
        (f"{BOX_LINE} 0.93 1", 0),  # a confidence and a track
        (f"{BOX_LINE} 0.93 12", 0),
        (f"{BOX_LINE} 0.4 0.4 2 0.6 0.6 0", 0),  # keypoints that say whether they are seen
        (f"{BOX_LINE} 0.4 0.4 2.000000 0 0 0.000000 0.6 0.6 1", 0),
        (f"{BOX_LINE} 0.4 0.4 0.6 0.6", 4),  # keypoints as the YAML has them
        (f"{BOX_LINE} 0.4 0.4 0.99 0.6 0.6 0.98", 6),
        (f"{BOX_LINE} 0.4 0.4 0.99 0.6 0.6 0.98 0.93", 6),
        (f"{BOX_LINE} 0.4 0.4 0.99 0.6 0.6 0.98 0.93 3", 6),
    ],
)
def test_lines_of_tracks_and_poses_are_boxes(line: str, keypoints: int) -> None:
    read = yolo.read(line.encode(), "dog", Size(100, 100), NAMES, keypoints=keypoints)
    assert read.left_out == ()
    assert list(read.shapes[0].points) == [pytest.approx((40, 40)), pytest.approx((60, 60))]


@pytest.mark.parametrize(
    "line",
    [
        "0 0.1 0.1 0.9 0.1 0.5 0.9",  # a triangle
        "0 0.1 0.1 0.9 0.1 0.5 1",  # … that ends on the edge, and no box inside the picture
        "0 0.1 0.1 0.9 0.1 0.9 0.9 0.1 0.9",  # a turned box
        "0 0.1 0 0.9 0 1 0 0 1 0 1",  # five corners on the edges
    ],
)
def test_outlines_are_not_taken_for_tracks_or_poses(line: str) -> None:
    read = yolo.read(line.encode(), "dog", Size(100, 100), NAMES)
    assert (read.shapes, read.left_out) == ((), (("outline", 1),))


def test_a_yaml_states_the_number_of_keypoint_values_of_a_box() -> None:
    text = b"names: [dog]\nkpt_shape: [17, 3]\n"
    assert yolo.classes_of(text, "data.yaml") == yolo.Classes({0: "dog"}, 51)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("classes.txt", "dog\ncat\n\n"),
        ("obj.names", "dog\r\ncat"),
        ("data.yaml", "path: .\ntrain: train.txt\nnc: 2\nnames: [dog, cat]\n"),
        ("data.yaml", "names:\n  0: dog\n  1: 'cat'\n"),
    ],
)
def test_classes_are_named_by_a_list_or_a_yaml(file: str, text: str) -> None:
    assert yolo.names_of(text.encode(), file) == {0: "dog", 1: "cat"}


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("classes.txt", "", "0 classes"),
        ("classes.txt", "dog\n\ncat", "the name of class 1"),
        ("data.yaml", "names: [007]", "the name of class 0"),
        ("data.yaml", "nc: 3", "no `names`"),
        ("data.yaml", "names: {dog: 0}", "not a number"),
        ("data.yaml", "names: [", "not YAML"),
    ],
)
def test_names_that_are_none_are_refused(file: str, text: str, reason: str) -> None:
    with pytest.raises(PromptError) as caught:
        yolo.names_of(text.encode(), file)
    assert reason in caught.value.reason
    assert (caught.value.place or "").startswith(file)


# ── which kind ──


def test_the_content_says_which_kind_a_file_is() -> None:
    kinds = [
        EXPORT,
        json.dumps(COCO).encode(),
        json.dumps(COCO, indent=2).encode("utf-8-sig"),
        opex_of(),
    ]
    assert [prompt_files.read(body)[0].names[0] for body in kinds] == ["done/cam1/dog.jpg"] * 3 + [
        "dog.jpg"
    ]


@pytest.mark.parametrize(
    ("body", "reason", "remedy"),
    [
        (b"", "is empty", "one of these kinds"),
        (b"\x89PNG\r\n\x1a\n", "of no kind", "one of these kinds"),
        (b'{"a": 1}', "JSON of no kind", "one of these kinds"),
        (b"0 0.5 0.5 0.1 0.1\n", "a single YOLO text", "folder"),
        (
            b'{"objects": [{"box": {"x0": 1, "y0": 1, "x1": 2, "y1": 2}}]}',
            "a prompt file already",
            "beside",
        ),
        (b'{"box": {"x0": 1, "y0": 1, "x1": 2, "y1": 2}}', "a prompt file already", "beside"),
    ],
)
def test_an_unknown_kind_of_file_is_refused_with_the_known_ones(
    body: bytes, reason: str, remedy: str
) -> None:
    with pytest.raises(PromptError) as caught:
        prompt_files.read(body)
    assert reason in caught.value.reason
    assert remedy in (caught.value.remedy or "")
    if remedy == "one of these kinds":
        assert all(
            kind in (caught.value.remedy or "")
            for kind in ("CVAT", "COCO", "OPEX", "labelme", "Pascal VOC", "YOLO")
        )


@given(
    st.binary(max_size=100)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=9),
        lambda s: (
            st.lists(s, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "images",
                        "annotations",
                        "categories",
                        "objects",
                        "bbox",
                        "id",
                        "image_id",
                        "meta",
                        "name",
                    ]
                ),
                s,
                max_size=5,
            )
        ),
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_is_given_it_is_read_or_refused(data: bytes) -> None:
    try:
        prompt_files.read(data)
    except PromptError:
        return


# ── prompt files ──


def prompt_file(annotated: Annotated, image: str, **chosen: list[str]) -> bytes:
    """Return the prompt file of a picture's objects, of these `labels` and `negatives`."""
    return prompt_files.document(
        prompt_files.selected_objects(annotated, **chosen), image, annotated.size
    )


def fits(prompt: Prompt, size: Size) -> bool:
    try:
        parser.fit(
            parser.parse(json.dumps({"objects": [parser.as_dict(prompt)]}).encode()).prompts, size
        )  # type: ignore[arg-type]
    except PromptError:
        return False
    return True


@given(shapes, label.filter(lambda name: not set(name) & set("/\\") and name not in (".", "..")))
def test_a_prompt_file_is_read_back_as_the_objects_that_fit_its_picture_and_names_the_others(
    drawn: list[Shape], name: str
) -> None:
    size = Size(640, 480)
    annotated = Annotated(f"done/{name}", size, tuple(drawn))
    try:
        chosen = prompt_files.selected_objects(annotated)
    except PromptError as error:
        assert 'image "done/' in (error.place or "")  # noqa: PT017  all there is to see of the error
        return
    assert bool(chosen) == bool(drawn)
    body = prompt_files.document(chosen, name, size)
    assert body == prompt_file(annotated, name)
    expected = [prompt for prompt in prompts_of(drawn) if fits(prompt, size)]
    try:
        read = parser.parse(body)
        parser.fit(read.prompts, size)  # type: ignore[arg-type]
    except PromptError:
        assert not expected
        return
    assert isinstance(read.prompts, tuple)
    assert list(map(parser.as_dict, read.prompts)) == list(map(parser.as_dict, expected))
    assert (read.image, read.image_size) == (name, size)
    assert len(read.prompts[0].notes) == len(prompts_of(drawn)) - len(expected)


FAULTS = {
    "inside out": '<box label="bad" xtl="9" ytl="2" xbr="3" ybr="4"/>',
    "outside the picture": '<box label="bad" xtl="9" ytl="2" xbr="900" ybr="4"/>',
    "not a number": '<box label="bad" xtl="nan" ytl="2" xbr="9" ybr="4"/>',
    "normalised": '<box label="bad" xtl="0.1" ytl="0.2" xbr="0.5" ybr="0.4"/>',
    "has no width": '<box label="bad" xtl="9" ytl="2" xbr="9" ybr="4"/>',
    "longer than 200": f'<box label="{"b" * 201}" xtl="1" ytl="2" xbr="9" ybr="4"/>',
}


@pytest.mark.parametrize("reason", FAULTS)
def test_one_bad_box_refuses_its_object_alone_and_the_prompt_notes_it(reason: str) -> None:
    good = '<box label="dog" xtl="1" ytl="2" xbr="9" ybr="4"/>'
    (annotated,) = (one.annotated for one in prompt_files.read(image(good + FAULTS[reason] + good)))
    read = parser.parse(prompt_file(annotated, "a.jpg"))
    assert isinstance(read.prompts, tuple)
    assert [prompt.label for prompt in read.prompts] == ["dog", "dog"]
    (note,) = read.prompts[0].notes
    assert note.startswith('object 2 "b')
    assert reason in note


@pytest.mark.parametrize("reason", FAULTS)
def test_a_picture_of_bad_boxes_only_gets_a_prompt_that_is_refused(reason: str) -> None:
    (annotated,) = (one.annotated for one in prompt_files.read(image(FAULTS[reason])))
    with pytest.raises(PromptError):
        parser.fit(parser.parse(prompt_file(annotated, "a.jpg")).prompts, Size(64, 48))  # type: ignore[arg-type]


def test_a_faulty_shape_takes_along_what_is_grouped_with_it() -> None:
    """Without its points that are not on it, a box would ask for another object."""
    drawn = (
        '<box label="dog" xtl="1" ytl="1" xbr="9" ybr="9" group_id="1"/>'
        '<points label="background" points="x,2" group_id="1"/>'
        '<box label="cat" xtl="1" ytl="1" xbr="5" ybr="5"/>'
    )
    (annotated,) = (one.annotated for one in prompt_files.read(image(drawn)))
    (cat,) = parser.parse(prompt_file(annotated, "a.jpg")).prompts  # type: ignore[misc]
    assert cat.label == "cat"


def test_of_many_bad_objects_the_first_are_named_and_the_others_counted() -> None:
    drawn = FAULTS["inside out"] * 300 + '<box label="dog" xtl="1" ytl="2" xbr="9" ybr="4"/>'
    (annotated,) = (one.annotated for one in prompt_files.read(image(drawn)))
    (dog,) = parser.parse(prompt_file(annotated, "a.jpg")).prompts  # type: ignore[misc]
    assert len(dog.notes) == 21
    assert "280 more objects" in dog.notes[-1]


def test_a_box_inside_out_is_written_as_it_stands_and_its_job_refused_with_the_reason() -> None:
    body = prompt_file(Annotated("a.jpg", None, (box_shape((9, 1, 3, 5), "dog"),)), "a.jpg")
    with pytest.raises(PromptError, match="swapped"):
        parser.parse(body)


def test_labels_choose_objects_and_not_the_points_that_belong_to_them() -> None:
    drawn = image(
        '<box label="dog" xtl="1" ytl="1" xbr="9" ybr="9" group_id="1"/>'
        '<points label="nose" points="2,2" group_id="1"/>'
        '<points label="background" points="3,3" group_id="1"/>'
        '<box label="cat" xtl="1" ytl="1" xbr="5" ybr="5"/>'
    )
    (annotated,) = (one.annotated for one in prompt_files.read(drawn))
    (dog,) = parser.parse(prompt_file(annotated, "a.jpg", labels=["dog"])).prompts  # type: ignore[misc]
    assert [point.label for point in dog.points] == [1, 0]
    assert prompt_files.selected_objects(annotated, labels=["cat"])
    assert not prompt_files.selected_objects(annotated, labels=["nose", "background"])


def test_further_labels_of_negative_points_can_be_named() -> None:
    drawn = image('<points label="dog" points="2,2"/><points label="off" points="3,3"/>')
    (annotated,) = (one.annotated for one in prompt_files.read(drawn))
    (dog,) = parser.parse(prompt_file(annotated, "a.jpg", negatives=["off"])).prompts  # type: ignore[misc]
    assert [point.label for point in dog.points] == [1, 0]


def test_a_picture_with_nothing_to_ask_for_asks_nothing_and_one_that_is_unclear_does() -> None:
    assert not prompt_files.selected_objects(Annotated("a.jpg", None, (), (("polygon", 3),)))
    unclear = Annotated("a.jpg", None, (Shape("points", "background", ((1, 1),), negative=True),))
    with pytest.raises(PromptError, match="negative points"):
        prompt_files.selected_objects(unclear)


def test_half_a_character_in_a_label_is_refused_by_who_reads_the_prompt() -> None:
    body = prompt_file(Annotated("a.jpg", None, (box_shape((1, 1, 3, 5), "\ud83d"),)), "a.jpg")
    with pytest.raises(PromptError, match="surrogate"):
        parser.parse(body)
