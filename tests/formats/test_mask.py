"""Mask PNGs: values, overlaps, depth, one file per object; read back with OpenCV and Pillow."""

from __future__ import annotations

import io
import tracemalloc

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sam_poll.core.errors import InputError
from sam_poll.core.types import Mask, OutputFile, Result, Size
from sam_poll.formats.mask import make
from sam_poll.formats.registry import FormatOptions
from tests.support.results import disc, frames, mask_of, rectangle, result_of

SIZE = Size(60, 40)


def decoded(document: OutputFile) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(document.body, np.uint8), cv2.IMREAD_UNCHANGED)


def instances(result: Result) -> np.ndarray:
    (document,) = make(FormatOptions())(result)
    assert document.suffix == ".mask.png"
    assert document.media_type == "image/png"
    return decoded(document)


@settings(deadline=None, max_examples=50)
@given(frames())
def test_one_object_is_0_and_255_for_opencv_and_for_pillow(frame: np.ndarray) -> None:
    size = Size(frame.shape[1], frame.shape[0])
    (document,) = make(FormatOptions())(result_of(size, [mask_of(frame)]))
    wanted = frame.astype(np.uint8) * 255
    assert np.array_equal(decoded(document), wanted)
    with Image.open(io.BytesIO(document.body)) as image:
        assert np.array_equal(np.asarray(image), wanted)


def test_several_objects_are_numbered_in_the_order_of_their_prompts() -> None:
    masks = [
        rectangle(SIZE, 30, 0, 40, 10),
        rectangle(SIZE, 0, 0, 10, 10),
        rectangle(SIZE, 50, 20, 60, 40),
    ]
    frame = instances(result_of(SIZE, masks))
    assert frame.dtype == np.uint8
    assert frame.shape == (40, 60)
    assert (frame[5, 35], frame[5, 5], frame[30, 55], frame[39, 0]) == (1, 2, 3, 0)


@pytest.mark.parametrize("small_first", [True, False])
def test_where_objects_overlap_the_smaller_is_on_top_whatever_the_order(small_first: bool) -> None:
    small, large = rectangle(SIZE, 20, 10, 30, 20), rectangle(SIZE, 5, 5, 50, 35)
    frame = instances(result_of(SIZE, [small, large] if small_first else [large, small]))
    number = 1 if small_first else 2
    assert np.array_equal(frame == number, np.pad(np.ones((10, 10), bool), ((10, 20), (20, 30))))
    assert np.count_nonzero(frame) == large.area


def test_of_two_objects_of_the_same_area_the_later_is_on_top() -> None:
    frame = instances(
        result_of(SIZE, [rectangle(SIZE, 0, 0, 10, 10), rectangle(SIZE, 5, 5, 15, 15)])
    )
    assert frame[7, 7] == 2


def test_size_is_counted_in_pixels_of_the_mask_not_of_its_box() -> None:
    ring, inside = disc(SIZE, 30, 20, 19, hole=17), rectangle(SIZE, 12, 12, 48, 28)
    frame = instances(result_of(SIZE, [ring, inside]))
    assert ring.area < inside.area
    assert np.count_nonzero(frame == 1) == ring.area


def test_an_empty_mask_keeps_its_number() -> None:
    masks = [
        rectangle(SIZE, 0, 0, 5, 5),
        mask_of(np.zeros((40, 60), bool)),
        rectangle(SIZE, 9, 9, 12, 12),
    ]
    assert set(np.unique(instances(result_of(SIZE, masks)))) == {0, 1, 3}


@pytest.mark.parametrize(("count", "dtype"), [(255, np.uint8), (256, np.uint16), (300, np.uint16)])
def test_more_than_255_objects_make_a_16_bit_file(count: int, dtype: type) -> None:
    masks = [Mask("dot", 0.9, i % 60, i // 60, np.ones((1, 1), bool)) for i in range(count)]
    frame = instances(result_of(SIZE, masks))
    assert frame.dtype == dtype
    assert np.array_equal(frame.ravel()[:count], np.arange(1, count + 1))
    with Image.open(io.BytesIO(make(FormatOptions())(result_of(SIZE, masks))[0].body)) as image:
        assert np.array_equal(np.asarray(image), frame)


def test_more_objects_than_16_bits_can_number_are_refused_with_the_way_out() -> None:
    dot = Mask("dot", 0.9, 0, 0, np.ones((1, 1), bool))
    with pytest.raises(InputError, match="65536 objects") as caught:
        make(FormatOptions())(result_of(SIZE, [dot] * 65_536, prompts=[]))
    assert "per-object" in str(caught.value)


@settings(deadline=None, max_examples=30)
@given(st.lists(frames(12), min_size=1, max_size=4))
def test_per_object_files_hold_each_mask_whole_even_where_they_overlap(
    drawn: list[np.ndarray],
) -> None:
    size = Size(12, 12)
    whole = [np.pad(f, ((0, 12 - f.shape[0]), (0, 12 - f.shape[1]))) for f in drawn]
    documents = make(FormatOptions(mask="per-object"))(result_of(size, [mask_of(f) for f in whole]))
    assert [d.suffix for d in documents] == [f".mask.{n}.png" for n in range(1, len(whole) + 1)]
    for document, frame in zip(documents, whole, strict=True):
        assert np.array_equal(decoded(document), frame.astype(np.uint8) * 255)


def test_a_hundred_objects_cost_one_frame_not_a_hundred() -> None:
    size = Size(2000, 1000)
    masks = [Mask("dot", 0.9, 19 * i, 9 * i, np.ones((30, 30), bool)) for i in range(100)]
    for form in ("instances", "per-object"):
        tracemalloc.start()
        make(FormatOptions(mask=form))(result_of(size, masks))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 * size.width * size.height
