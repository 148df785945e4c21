"""CVAT's XML as people export it, as strangers write it, and as it may be made to hurt."""

from __future__ import annotations

import contextlib
import tracemalloc
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_poll.core.errors import IncompletePromptError, InputError, PromptError
from sam_poll.core.types import Box, Point, Prompt, Size
from sam_poll.prompts.importers import common, cvat_xml, prompt_files
from sam_poll.prompts.importers.shapes import (
    NEGATIVE_ATTRIBUTE,
    NEGATIVE_LABELS,
    Annotated,
    Shape,
    objects,
)
from tests.support.annotation_files import EXPORT, around, box, image, label, shapes
from tests.support.results import rectangle, result_of

# ── what people export ──


def test_an_export_of_cvat_is_read_shape_by_shape_and_what_is_left_out_is_counted() -> None:
    dog, none = cvat_xml.read(EXPORT)
    assert (dog.name, dog.size) == ("done/cam1/dog.jpg", Size(640, 480))
    assert dog.shapes == (
        Shape("box", "dog", ((100.5, 50.0), (300.25, 200.0)), 1),
        Shape("box", "cat", (pytest.approx((440.0, 60.0)), pytest.approx((460.0, 160.0)))),  # type: ignore[arg-type]
        Shape("points", "dog", ((150.0, 100.0), (160.0, 110.0)), 1),
        Shape("points", "dog", ((299.0, 51.0),), 1, negative=True),
        Shape("points", "background", ((450.0, 110.0),), negative=True),
    )
    assert dict(dog.left_out) == {
        "polygon": 1,
        "polyline": 1,
        "ellipse": 1,
        "cuboid": 1,
        "mask": 1,
        "skeleton": 1,
        "tag": 2,
    }
    assert none == Annotated("done/cam1/none.jpg", Size(640, 480), ())


def test_an_exports_objects_are_what_was_drawn() -> None:
    dog, cat = (asked.prompt for asked in objects(cvat_xml.read(EXPORT)[0].shapes))
    points = (Point(150, 100), Point(160, 110), Point(299, 51, 0))
    assert dog == Prompt("dog", points, Box(100.5, 50, 300.25, 200))
    assert (cat.label, cat.points) == ("cat", (Point(450, 110, 0),))


def test_our_own_files_are_read_too_and_their_masks_counted() -> None:
    from sam_poll.formats.cvat import make
    from sam_poll.formats.registry import FormatOptions

    size = Size(60, 40)
    body = make(FormatOptions())(
        result_of(size, [rectangle(size, 1, 1, 9, 9, label="dog")], name="done/dog.jpg")
    )[0]
    assert cvat_xml.read(body.body) == [Annotated("done/dog.jpg", size, (), (("mask", 1),))]


def test_a_picture_without_a_size_is_of_unknown_size() -> None:
    assert cvat_xml.read(around(f'<image name="a.jpg">{box()}</image>'))[0].size is None


def test_a_box_that_is_inside_out_is_read_as_it_stands() -> None:
    assert cvat_xml.read(image(box(xtl="9", rotation="12")))[0].shapes[0].points == ((9, 2), (3, 4))


@pytest.mark.parametrize("label", [*sorted(NEGATIVE_LABELS), "Negative", "BACKGROUND"])
def test_points_of_certain_labels_are_negative_and_boxes_of_them_are_not(label: str) -> None:
    points, framed = cvat_xml.read(
        image(f'<points label="{label}" points="1,2"/>' + box(label=label))
    )[0].shapes
    assert points.negative
    assert not framed.negative


@pytest.mark.parametrize(
    ("text", "negative"), [("true", True), ("True", True), ("false", False), ("", False)]
)
def test_a_ticked_checkbox_makes_points_negative(text: str, negative: bool) -> None:
    body = image(
        '<points label="dog" points="1,2">'
        f'<attribute name="negative"> {text}\n</attribute></points>'
    )
    assert cvat_xml.read(body)[0].shapes[0].negative is negative


def test_utf_16_and_a_byte_order_mark_are_read() -> None:
    text = image(box(label="Köter")).decode()
    assert cvat_xml.read(text.encode("utf-16"))[0].shapes[0].label == "Köter"
    assert cvat_xml.read(text.encode("utf-8-sig"))[0].shapes[0].label == "Köter"


# ── any shapes ──


def written(name: str, size: Size, drawn: list[Shape]) -> bytes:
    """The shapes as CVAT would write them, by ElementTree."""
    root = ET.Element("annotations")
    ET.SubElement(root, "version").text = "1.1"
    at = ET.SubElement(
        root, "image", id="0", name=name, width=str(size.width), height=str(size.height)
    )
    for one in drawn:
        more = {"label": one.label, "group_id": str(one.group)}
        if one.kind == "box":
            corners = [str(v) for corner in one.points for v in corner]
            ET.SubElement(
                at, "box", more | dict(zip(("xtl", "ytl", "xbr", "ybr"), corners, strict=True))
            )
        else:
            element = ET.SubElement(
                at, "points", more, points=";".join(f"{x},{y}" for x, y in one.points)
            )
            ET.SubElement(element, "attribute", name="negative").text = str(one.negative).lower()
    return ET.tostring(root, encoding="utf-8")


@given(shapes, label, st.integers(1, 9999), st.integers(1, 9999))
def test_all_that_is_drawn_is_read_back(
    drawn: list[Shape], name: str, width: int, height: int
) -> None:
    size = Size(width, height)
    assert cvat_xml.read(written(name, size, drawn)) == [Annotated(name, size, tuple(drawn))]


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_whatever_bytes_come_they_are_read_or_refused(data: bytes) -> None:
    for body in (data, image("X").replace(b"X", data), image(box(xtl="X")).replace(b"X", data)):
        with contextlib.suppress(PromptError):
            assert all(picture.name for picture in cvat_xml.read(body))


# ── what is refused ──

LAUGHS = (
    '<!DOCTYPE b [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY a{n} "{"&a;" * 10}">' for n in range(9))
    + "]>"
    "<annotations><version>1.1</version>&a8;</annotations>"
)


@pytest.mark.parametrize(
    ("body", "place", "reason"),
    [
        (b"", "the XML file", "not well-formed"),
        (EXPORT[:-30], "the XML file", "not well-formed"),
        (
            b'<?xml version="1.0" encoding="klingon"?><annotations/>',
            "the XML file",
            "not well-formed",
        ),
        (LAUGHS.encode(), "the XML file", "document type"),
        (LAUGHS.encode("utf-16"), "the XML file", "document type"),
        (
            b'<!DOCTYPE x SYSTEM "file:///etc/passwd"><annotations/>',
            "the XML file",
            "document type",
        ),
        (b"<html/>", "the XML file", "root is <html>"),
        (b'<a:annotations xmlns:a="b"/>', "the XML file", "root is"),
        (b"<annotations/>", "the XML file", "version unknown"),
        (around("", version="1.0"), "the XML file", "version 1.0"),
        (around('<track id="0" label="dog"/>'), "the XML file", "CVAT for video"),
        (around("<picture/>"), "the XML file", "<picture>"),
        (around("<meta>" + "<a>" * 99 + "</a>" * 99 + "</meta>"), "the XML file", "nested deeper"),
        (around('<image id="0"/>'), "image 1", "no name"),
        (around('<image name="a.jpg"/><image name=""/>'), "image 2", "no name"),
        (around('<image name="a.jpg"/><image name="a.jpg"/>'), 'image "a.jpg"', "twice"),
        (
            around('<image name="a.jpg" width="9"/>'),
            'image "a.jpg", height',
            "not a number: it is null",
        ),
        (
            around('<image name="a.jpg" width="9.5" height="9"/>'),
            'image "a.jpg", width',
            "not a whole number",
        ),
        (
            around('<image name="a.jpg" width="0" height="9"/>'),
            'image "a.jpg", width',
            "not a whole number",
        ),
        (image("<b/>"), 'image "dog.jpg"', "<b>"),
        (image(box() + box(label=None)), 'image "dog.jpg", box 2', "no label"),
        (image(box(label="")), 'image "dog.jpg", box 1', "no label"),
        (image(box(group_id="-1")), 'image "dog.jpg", box 1, group_id', "whole number"),
        (
            image(
                '<points label="a" points="1,2">'
                '<attribute name="negative">maybe</attribute></points>'
            ),
            'image "dog.jpg", points 1',
            "neither true nor false",
        ),
    ],
)
def test_what_is_broken_or_foreign_is_refused_with_its_place_and_a_remedy(
    body: bytes, place: str, reason: str
) -> None:
    with pytest.raises(PromptError, match=reason) as caught:
        cvat_xml.read(body)
    assert caught.value.place == place
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("body", "place", "reason"),
    [
        (image(box(xbr=None)), "box 1, xbr", "not a number: it is null"),
        (image(box(xbr="nan")), "box 1, xbr", 'the text "nan"'),
        (image(box(xbr="inf")), "box 1, xbr", 'the text "inf"'),
        (image(box(xbr="1_0")), "box 1, xbr", 'the text "1_0"'),
        (image(box(xbr="12px")), "box 1, xbr", 'the text "12px"'),
        (image(box(xbr="٣")), "box 1, xbr", "not a number"),
        (image(box(xbr="9" * 5000)), "box 1, xbr", "not a number"),
        (image(box(xbr="1e99")), "box 1, xbr", "outside any picture"),
        (image(box(rotation="x")), "box 1, rotation", "not a number"),
        (image('<points label="dog"/>'), "points 1, point 1", "not x,y"),
        (image('<points label="dog" points="1,2;3"/>'), "points 1, point 2", "not x,y"),
        (image('<points label="dog" points="1,2;3,x"/>'), "points 1, point 2", "not a number"),
    ],
)
def test_a_shape_of_broken_numbers_takes_its_own_object_along_and_no_other(
    body: bytes, place: str, reason: str
) -> None:
    """The last shape of the picture is the broken one."""
    more = body.replace(b"</image>", box(label="cat").encode() + b"</image>")
    (read,) = cvat_xml.read(more)
    broken, cat = read.shapes[-2:]
    assert (broken.fault or "").startswith(f"{place}: ")
    assert reason in (broken.fault or "")
    assert (cat.label, cat.fault) == ("cat", None)
    split = prompt_files.split(prompt_files.selected_objects(read), read.size)
    assert "cat" in [one.prompt.label for one in split.sound]
    assert len(split.refused) == 1
    assert split.refused[0].remedy


def test_a_video_export_is_refused_with_the_export_to_use() -> None:
    with pytest.raises(PromptError) as caught:
        cvat_xml.read(around('<track id="0" label="dog"/>'))
    assert "CVAT for images 1.1" in (caught.value.remedy or "")


def test_more_pictures_or_shapes_than_can_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cvat_xml, "MAX_IMAGES", 2)
    monkeypatch.setattr(cvat_xml, "MAX_SHAPES", 3)
    many = "".join(f'<image name="{n}.jpg"/>' for n in range(3))
    with pytest.raises(PromptError, match="more than 2 images"):
        cvat_xml.read(around(many))
    with pytest.raises(PromptError, match="more than 3 shapes"):
        cvat_xml.read(image(box() * 2 + '<tag label="a"/>' * 2))
    assert common.MAX_IMAGES >= 100_000


def test_a_million_levels_neither_crash_nor_take_memory() -> None:
    deep = b"<annotations><version>1.1</version>" + b"<meta>" * 1_000_000
    tracemalloc.start()
    with pytest.raises(PromptError, match="nested deeper"):
        cvat_xml.read(deep)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # measured: 22 MB, and 128 where it is fed in one piece


def test_no_tree_is_kept_of_elements_that_are_not_used() -> None:
    """Masks make most of a file's text and none of its prompts."""
    masks = '<mask label="m" rle="' + "1, " * 5000 + '1"/>'
    body = around("".join(f'<image name="{n}.jpg">{masks}</image>' for n in range(500)))
    tracemalloc.start()
    assert len(cvat_xml.read(body)) == 500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(body) / 2


def test_prompt_errors_are_what_a_rejected_job_is_made_of() -> None:
    assert issubclass(PromptError, InputError)
    assert NEGATIVE_ATTRIBUTE == "negative"


@pytest.mark.parametrize(
    "whole", [EXPORT, EXPORT.decode().replace("utf-8", "utf-16").encode("utf-16")]
)
def test_a_file_that_is_cut_off_anywhere_may_still_grow(whole: bytes) -> None:
    whole = whole.rstrip()
    end = len(whole.removesuffix(b"\n").removesuffix("\n".encode("utf-16-le")))
    for length in (0, 1, 2, 3, *range(4, end, 13), end - 4):
        with pytest.raises(IncompletePromptError):
            cvat_xml.read(whole[:length])
        with pytest.raises(IncompletePromptError):
            cvat_xml.read(whole[:length] + bytes(8))


@pytest.mark.parametrize(
    "wrong", [b"<annotations><a></annotations>", b"<annotations>&x;", b"{", b"<annotations x=1"]
)
def test_a_mistake_in_the_middle_is_not_mended_by_what_may_follow(wrong: bytes) -> None:
    with pytest.raises(PromptError) as caught:
        cvat_xml.read(wrong)
    assert type(caught.value) is PromptError
