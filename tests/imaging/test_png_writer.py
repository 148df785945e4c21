"""PNGs of masks: any reader gives the same pixels back, wherever the objects lie."""

from __future__ import annotations

import io
import subprocess
import sys
import zlib
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sam_poll.imaging import png_writer

LONG = png_writer._LONG


@pytest.fixture(autouse=True, params=[True, False], ids=["isal", "zlib"], scope="module")
def library(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Each test runs with ISA-L, if it is installed, and with zlib."""
    if request.param and not png_writer.HAS_ISAL:
        pytest.skip("the package isal is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(png_writer, "HAS_ISAL", request.param)
        patch.setattr(png_writer, "_LONG", 0)
        png_writer._piece.cache_clear()
        yield request.param
    png_writer._piece.cache_clear()


def read(body: bytes) -> np.ndarray:
    found = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
    assert found is not None
    return found


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    box=st.tuples(*[st.integers(0, 40)] * 4),
    value=st.integers(1, 65535),
    wide=st.booleans(),
)
def test_what_is_written_is_read_again(
    height: int, width: int, box: tuple[int, int, int, int], value: int, wide: bool
) -> None:
    frame = np.zeros((height, width), np.uint16 if wide else np.uint8)
    top, left, rows, columns = box
    frame[top : top + rows, left : left + columns] = value if wide else value % 256
    body = png_writer.encode(frame)
    found = read(body)
    assert found.dtype == frame.dtype
    assert np.array_equal(found, frame)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), frame)
    length = int.from_bytes(body[33:37], "big")
    assert len(zlib.decompress(body[41 : 41 + length])) == height * (
        1 + frame.nbytes // height
    )  # its checksum, too
    assert png_writer.encode(frame) == body


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "rows", [slice(0, 0), slice(0, 1), slice(1499, 1500), slice(700, 720), slice(0, 1500)]
)
def test_ground_of_more_than_one_piece_is_read_again(rows: slice, dtype: type) -> None:
    frame = np.zeros(
        (1500, 2100), dtype
    )  # 3 and 6 MB: several times what is compressed as one piece
    frame[rows, 100:200] = np.random.default_rng(0).integers(0, 255, 100)
    assert np.array_equal(read(png_writer.encode(frame)), frame)


def test_columns_that_do_not_follow_each_other_in_memory_are_read_in_their_order() -> None:
    frame = np.arange(60, dtype=np.uint16).reshape(6, 10).T
    assert np.array_equal(read(png_writer.encode(frame)), frame)


def test_a_ragged_mask_is_read_again_by_any_reader(library: bool) -> None:
    noise = np.random.default_rng(0).random((300, 400))
    frame = (cv2.GaussianBlur(noise, (0, 0), 2) > 0.5).astype(np.uint8) * 255
    body = png_writer.encode(frame)
    assert np.array_equal(read(body), frame)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))), frame)
    assert len(body) < frame.size / 5


def test_another_process_writes_the_same_bytes(
    library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(png_writer, "_LONG", LONG)  # ISA-L's bytes may differ
    code = (
        "import sys, numpy as np; from sam_poll.imaging import png_writer; "
        f"png_writer.HAS_ISAL = {library}; "
        "frame = (np.random.default_rng(1).random((80, 90)) > 0.3).astype(np.uint8); "
        "sys.stdout.buffer.write(png_writer.encode(frame))"
    )
    frame = (np.random.default_rng(1).random((80, 90)) > 0.3).astype(np.uint8)
    written = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert written == png_writer.encode(frame)


def test_empty_ground_takes_a_thousandth_of_its_size() -> None:
    assert len(png_writer.encode(np.zeros((3888, 5184), np.uint8))) < 3888 * 5184 / 900
