"""CVAT 1.1 XML: run lengths, layers, names; read back with a decoder that shares nothing with the
encoder.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from cvat_sdk import masks as cvat_masks
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sam_poll.core.types import Mask, Result, Size
from sam_poll.formats.cvat import flat, make, run_lengths, z_orders
from sam_poll.formats.registry import CvatForm, FormatOptions
from tests.support.results import disc, frames, mask_of, rectangle, result_of

SIZE = Size(60, 40)


def written(result: Result) -> ET.Element:
    (document,) = make(FormatOptions())(result)
    assert (document.suffix, document.media_type) == (".cvat.xml", "application/xml")
    return ET.fromstring(document.body)


def frame_of(element: ET.Element, width: int, height: int) -> np.ndarray:
    """The full frame of a <mask>, pixel by pixel from its definition: zeros first, row by row,
    inside the box.
    """
    frame = np.zeros((height, width), bool)
    left, top, box_width = (int(element.attrib[key]) for key in ("left", "top", "width"))
    position, value = 0, False
    for run in element.attrib["rle"].split(","):
        for _ in range(int(run)):
            frame[top + position // box_width, left + position % box_width] = value
            position += 1
        value = not value
    assert position == box_width * int(element.attrib["height"])
    return frame


def test_a_ring_of_three_by_three_is_written_as_cvat_reads_it() -> None:
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    (document,) = make(FormatOptions())(result_of(Size(10, 8), [Mask("dot", 0.934, 1, 0, ring)]))
    assert document.body.decode() == (
        "<?xml version='1.0' encoding='utf-8'?>\n"
        "<annotations>\n"
        "  <version>1.1</version>\n"
        '  <image id="1000000" name="done/cam1/dog.jpg" width="10" height="8">\n'
        '    <mask label="dot" source="auto" occluded="0" rle="0, 4, 1, 4" left="1" top="0" '
        'width="3" height="3"'
        ' z_order="0">\n'
        '      <attribute name="score">0.934</attribute>\n'
        "    </mask>\n"
        "  </image>\n"
        "</annotations>\n"
    )


@settings(deadline=None, max_examples=200)
@given(frames())
@example(np.ones((1, 1), bool))
@example(np.pad(np.ones((1, 1), bool), 3))
def test_a_mask_comes_back_from_its_run_lengths_exactly(frame: np.ndarray) -> None:
    height, width = frame.shape
    elements = written(result_of(Size(width, height), [mask_of(frame)])).findall("image/mask")
    assert len(elements) == frame.any()
    for element in elements:
        assert np.array_equal(frame_of(element, width, height), frame)


@settings(deadline=None, max_examples=100)
@given(frames())
def test_run_lengths_start_with_zeros_and_only_the_first_may_be_nought(frame: np.ndarray) -> None:
    runs = run_lengths(frame)
    assert sum(runs) == frame.size
    assert (runs[0] == 0) == bool(frame[0, 0])
    assert all(run > 0 for run in runs[1:])


@settings(deadline=None, max_examples=200)
@given(frames())
@example(np.ones((1, 1), bool))
def test_the_flat_form_is_what_cvats_own_library_reads_and_writes(frame: np.ndarray) -> None:
    if not frame.any():
        return
    height, width = frame.shape
    values = flat(mask_of(frame))
    assert np.array_equal(
        cvat_masks.decode_mask(values, image_width=width, image_height=height), frame
    )
    assert values == [int(value) for value in cvat_masks.encode_mask(frame)]


@pytest.mark.parametrize("form", ["mask", "polygon"])
def test_an_object_that_is_left_out_is_named_in_a_comment_and_a_note(form: CvatForm) -> None:
    masks = [
        rectangle(SIZE, 5, 5, 5, 5, label="a--->\x00"),
        rectangle(SIZE, 1, 1, 3, 3, label="speck"),
    ]
    (document,) = make(FormatOptions(cvat=form))(result_of(SIZE, masks))
    missing = [
        "object 1 (a--->\x00) is left out: its mask is empty",
        "object 2 (speck) is left out: every part of it is below the minimum area",
    ]
    assert list(document.notes) == missing[: 2 if form == "polygon" else 1]
    comments = ET.fromstring(
        document.body, ET.XMLParser(target=ET.TreeBuilder(insert_comments=True))
    ).iter(ET.Comment)
    told = [(comment.text or "").strip() for comment in comments]
    assert told == [
        "object 1 (a->\ufffd) is left out: its mask is empty",
        *missing[1 : len(document.notes)],
    ]
    (image,) = ET.fromstring(document.body).iter("image")
    assert len(image) == (0 if form == "polygon" else 1)


def test_an_empty_mask_has_no_flat_form() -> None:
    with pytest.raises(ValueError, match="empty"):
        flat(mask_of(np.zeros((4, 4), bool)))


def two_parts() -> np.ndarray:
    frame = np.zeros((SIZE.height, SIZE.width), bool)
    frame[2:8, 2:8] = frame[20:30, 20:40] = True
    frame[24:28, 24:28] = False
    return frame


def test_polygons_are_the_outer_ones_of_each_part_and_parts_of_one_object_share_a_group() -> None:
    masks = [
        mask_of(two_parts(), label="a"),
        rectangle(SIZE, 45, 5, 55, 15, label="b"),
        mask_of(two_parts(), label="c"),
    ]
    (document,) = make(FormatOptions(cvat="polygon"))(result_of(SIZE, masks))
    (image,) = ET.fromstring(document.body).findall("image")
    assert [(s.tag, s.get("label"), s.get("group_id"), s.get("z_order")) for s in image] == [
        ("polygon", "a", "1", "0"),
        ("polygon", "a", "1", "0"),
        ("polygon", "b", None, "0"),
        ("polygon", "c", "2", "1"),
        ("polygon", "c", "2", "1"),
    ]
    assert [a.text for a in image.iter("attribute")] == ["0.9"] * 5
    assert {tuple(point.split(",")) for point in image[0].attrib["points"].split(";")} == {
        (x, y) for x in ("20.25", "39.75") for y in ("20.25", "29.75")
    }


def test_polygons_too_small_to_write_make_no_shape_and_no_group() -> None:
    frame = two_parts()
    frame[0, 59] = True
    masks = [rectangle(SIZE, 1, 1, 3, 3), mask_of(np.zeros((40, 60), bool)), mask_of(frame[:, 15:])]
    (document,) = make(FormatOptions(cvat="polygon"))(result_of(SIZE, masks))
    (shape,) = ET.fromstring(document.body).iter("polygon")
    assert shape.get("group_id") is None


def test_run_lengths_of_nothing_are_none() -> None:
    assert run_lengths(np.zeros((0, 0), bool)) == []


def test_run_lengths_run_by_rows_even_over_a_view_stored_by_columns() -> None:
    frame = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert run_lengths(np.asfortranarray(frame)) == [1, 2, 2, 1]


def test_an_image_without_objects_is_still_named() -> None:
    (image,) = written(result_of(SIZE, [])).findall("image")
    assert image.attrib == {
        "id": "1000000",
        "name": "done/cam1/dog.jpg",
        "width": "60",
        "height": "40",
    }
    assert len(image) == 0


def test_a_score_that_is_no_number_is_left_out() -> None:
    (mask,) = written(result_of(SIZE, [rectangle(SIZE, 1, 1, 5, 5, score=float("nan"))])).iter(
        "mask"
    )
    assert len(mask) == 0


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(), min_size=1), st.text(st.characters(), min_size=1))
@example("a\x00b\x1f\ud800", "\udfff\ufffe\uffff")
@example("<&\">'", "a\r\n\tb]]>")
@example("Tür 漢字 😀", "done/Größe/ä ö.jpg")
def test_any_label_and_any_name_make_well_formed_xml(label: str, name: str) -> None:
    root = written(result_of(SIZE, [rectangle(SIZE, 1, 1, 5, 5, label=label)], name=name))
    (image,) = root.iter("image")
    (mask,) = root.iter("mask")
    for text, read in ((label, mask.attrib["label"]), (name, image.attrib["name"])):
        assert len(read) == len(text)
        assert all(a == b or b == "\ufffd" for a, b in zip(text, read, strict=True))


@pytest.mark.parametrize("text", ["Tür 漢字 😀", "<&\">'", "two\nlines\tand\ra tab", "]]>"])
def test_what_xml_can_hold_is_kept(text: str) -> None:
    (mask,) = written(result_of(SIZE, [rectangle(SIZE, 1, 1, 5, 5, label=text)])).iter("mask")
    assert mask.attrib["label"] == text


def test_objects_that_do_not_meet_share_the_lowest_layer() -> None:
    assert z_orders(
        [rectangle(SIZE, 0, 0, 10, 10), rectangle(SIZE, 10, 0, 20, 10), disc(SIZE, 40, 20, 8)]
    ) == [0, 0, 0]


def test_a_smaller_object_lies_above_the_larger_it_meets() -> None:
    wheel = rectangle(SIZE, 5, 20, 15, 30)
    car = rectangle(SIZE, 0, 0, 50, 30)
    bolt = rectangle(SIZE, 9, 24, 11, 26)
    far = rectangle(SIZE, 55, 35, 60, 40)
    assert z_orders([wheel, car, bolt, far]) == [1, 0, 2, 0]


def test_of_two_with_the_same_area_the_later_lies_above() -> None:
    assert z_orders([rectangle(SIZE, 0, 0, 10, 10), rectangle(SIZE, 5, 5, 15, 15)]) == [0, 1]


def test_an_empty_mask_meets_nobody() -> None:
    empty = mask_of(np.zeros((40, 60), bool))
    assert z_orders([empty, rectangle(SIZE, 0, 0, 9, 9), empty]) == [0, 0, 0]


def test_painting_by_layers_shows_what_the_mask_png_shows() -> None:
    """The same rule twice: layers bottom up, within a layer boxes do not meet, so any order will
    do.
    """
    rng = np.random.default_rng(7)
    corners = rng.integers(0, [40, 20], (12, 2))
    masks = [
        rectangle(SIZE, x, y, x + 5 + i, y + 3 + i, label=str(i))
        for i, (x, y) in enumerate(corners.tolist())
    ]
    layers = z_orders(masks)
    frame = np.zeros((SIZE.height, SIZE.width), int)
    for index in sorted(range(len(masks)), key=lambda i: layers[i]):
        mask = masks[index]
        view = frame[
            mask.top : mask.top + mask.pixels.shape[0], mask.left : mask.left + mask.pixels.shape[1]
        ]
        view[mask.pixels] = index + 1
    from_above = np.zeros_like(frame)
    for y in range(SIZE.height):
        for x in range(SIZE.width):
            here = [
                (mask.area, -i, i + 1)
                for i, mask in enumerate(masks)
                if 0 <= y - mask.top < mask.pixels.shape[0]
                and 0 <= x - mask.left < mask.pixels.shape[1]
            ]
            from_above[y, x] = min(here)[2] if here else 0
    assert np.array_equal(frame, from_above)
