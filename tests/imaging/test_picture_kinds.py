"""Pictures of unusual kinds: more than 8 bits, more samples than colours, compressions that few
programs read.
"""

from __future__ import annotations

import contextlib
import io
import re
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, TiffImagePlugin

from sam_poll.core.errors import IncompleteFileError, PictureError
from sam_poll.core.types import ModelInfo
from sam_poll.diagnostics import validate
from sam_poll.imaging import decode as images
from sam_poll.imaging import headers, tiff_kinds
from sam_poll.imaging.decode import (
    ENDINGS,
    KNOWN_BUT_NOT_READ,
    decode,
    decode_for,
    not_read,
    read_header,
)
from tests.support.bad_inputs import png
from tests.support.heic import heic, needs_heic
from tests.support.paths import ROOT
from tests.support.pictures import kinds_of_pictures
from tests.support.strategies import encoded, sample
from tests.support.tiffs import PACKERS, tiff_of

GREY, RGB, PALETTE, CMYK = 1, 2, 3, 5  # TIFF's names of them
SHAPE = (41, 67)
PAGE = ROOT / "docs" / "prompts.md"


def random(channels: int, high: int, low: int = 0, dtype: type = np.uint16) -> np.ndarray:
    """H×W×channels, with `low` and `high` among them."""
    values = (
        np.random.default_rng(7)
        .integers(low, high, (*SHAPE, channels), endpoint=True)
        .astype(dtype)
    )
    values[0, 0], values[-1, -1] = low, high
    return values


def file_of(values: np.ndarray, ending: str) -> bytes:
    """RGB or RGBA, in the bits that it has."""
    swapped = values.copy()
    swapped[..., :3] = values[..., 2::-1]
    return cv2.imencode(ending, swapped)[1].tobytes()


# -- more than 8 bits --------------------


@pytest.mark.parametrize("ending", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(
    ("low", "high"), [(0, 4095), (320, 1760), (40_000, 41_000), (0, 2**15 - 1)]
)
def test_dim_or_flat_colour_of_16_bits_is_stretched_alike_in_all_channels_and_said(
    ending: str, channels: int, low: int, high: int
) -> None:
    values = random(channels, high, low)
    values[..., 3:] = 65_535  # opaque, which says nothing of the colours
    picture = decode(file_of(values, ending))
    expected = (values[..., :3].astype(float) - low) / (high - low) * 255
    assert np.abs(picture.pixels - expected).max() < 1
    assert picture.notes == (f"16-bit colour from {low} to {high}, stretched to 8 bits",)


@pytest.mark.parametrize("ending", [".png", ".tiff"])
@pytest.mark.parametrize(("low", "high"), [(0, 65_535), (10_000, 10_000 + 2**15)])
def test_colour_of_16_bits_that_uses_half_of_its_range_keeps_its_upper_8(
    ending: str, low: int, high: int
) -> None:
    values = random(3, high, low)
    picture = decode(file_of(values, ending))
    assert np.array_equal(picture.pixels, values >> 8)
    assert picture.notes == (f"16-bit colour from {low} to {high}, shown by its upper 8 bits",)


def test_colour_of_one_value_is_not_stretched() -> None:
    picture = decode(file_of(np.full((*SHAPE, 3), 3000, np.uint16), ".png"))
    assert (picture.pixels == 3000 >> 8).all()


def test_dim_grey_with_transparency_is_stretched_too() -> None:
    values = random(2, 4095)
    values[..., 1] = 65_535
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    picture = decode(png(SHAPE[1], SHAPE[0], 16, 4, zlib.compress(raw)))
    assert np.abs(picture.pixels[..., 0] - values[..., 0] / 4095 * 255).max() < 1
    assert "16-bit grey from 0 to 4095" in picture.notes[0]


def test_dim_colour_is_stretched_at_the_scale_of_any_network() -> None:
    data = file_of(random(3, 4095), ".png")
    info = ModelInfo("demo", "sam1", 16, "cpu", "float32", step="float32 16")
    for picture in (decode(data, min_decode_side=16), decode_for(data, info)):
        assert (picture.pixels.min(), picture.pixels.max()) == (0, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_dim_colour_is_turned_upright(orientation: int) -> None:
    turned = tiff_of(random(3, 4095), RGB, t274=(orientation,))
    plain = Image.fromarray(decode(tiff_of(random(3, 4095), RGB)).pixels)
    plain.getexif()[274] = orientation
    with Image.open(io.BytesIO(encoded(plain, "PNG", orientation))) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(decode(turned).pixels, expected)


def packed_bits(values: np.ndarray, bits: int) -> bytes:
    """Rows of samples of so many bits, each row in whole bytes."""
    rows = ["".join(f"{value:0{bits}b}" for value in row.ravel()) for row in values]
    return b"".join(
        int(row.ljust(-(-len(row) // 8) * 8, "0"), 2).to_bytes(-(-len(row) // 8), "big")
        for row in rows
    )


def packed_tiff(values: np.ndarray, bits: int, photometric: int) -> bytes:
    raw = np.frombuffer(packed_bits(values, bits), np.uint8).reshape(len(values), -1, 1)
    height, width, count = values.shape
    return tiff_of(
        raw, photometric, rows=height, t256=(width,), t258=(bits,) * count, t277=(count,)
    )


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_tiffs_of_10_12_and_14_bits_are_read(bits: int) -> None:
    values = random(3, 2**bits - 1)
    picture = decode(packed_tiff(values, bits, RGB))
    assert np.array_equal(picture.pixels, values >> (bits - 8))
    assert f"{bits}-bit colour from 0 to {2**bits - 1}" in picture.notes[0]
    grey = decode(packed_tiff(values[..., :1], bits, GREY))
    assert f"{bits}-bit grey from 0 to {2**bits - 1}, stretched and equalised" in grey.notes[0]


@pytest.mark.parametrize("bits", [2, 4])
def test_tiffs_of_2_and_4_bits_are_read(bits: int) -> None:
    values = random(1, 2**bits - 1)
    assert np.array_equal(
        decode(packed_tiff(values, bits, GREY)).pixels[..., :1], values * (255 // (2**bits - 1))
    )


# -- compressions --------------------


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
@pytest.mark.parametrize("compression", ["zstd", "lzma"])
def test_tiffs_compressed_with_zstandard_or_lzma_look_as_in_pillow(
    mode: str, compression: str
) -> None:
    data = encoded(kinds_of_pictures()[mode], "TIFF", compression=compression)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(decode(data).pixels, expected)


@pytest.mark.parametrize("compression", ["zstd", "lzma"])
def test_grey_of_16_bits_looks_the_same_in_any_compression(compression: str) -> None:
    deep = Image.fromarray(random(1, 4095)[..., 0])
    plain, packed = (
        decode(encoded(deep, "TIFF", **how)) for how in ({}, {"compression": compression})
    )
    assert np.array_equal(packed.pixels, plain.pixels)
    assert packed.notes == plain.notes


def test_a_build_of_pillow_without_a_compression_is_named_as_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = encoded(sample(), "TIFF", compression="zstd")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("decoder error -2")

    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", refuse)
    monkeypatch.setattr(Image.Image, "save", refuse)
    with pytest.raises(
        PictureError, match="Zstandard compression, which this build of Pillow cannot read"
    ) as refusal:
        decode(data)
    assert "pip install" in str(refusal.value)


@pytest.mark.parametrize("number", sorted(tiff_kinds.NOT_READ))
def test_a_tiff_in_a_compression_that_is_not_read_is_refused_by_its_name(number: int) -> None:
    with pytest.raises(PictureError, match=re.escape(tiff_kinds.COMPRESSIONS[number])) as refusal:
        read_header(tiff_of(random(3, 255, dtype=np.uint8), RGB, t259=(number,)))
    assert "gdal_translate" in str(refusal.value)


# -- samples --------------------

LAYOUTS = [
    {"rows": 7}, {"rows": 41}, {"tile": (32, 16)},
    {"planes": True}, {"planes": True, "tile": (32, 16)},
    {"differences": True}, {"differences": True, "tile": (32, 16)},
    {"differences": True, "planes": True},
    {"order": ">"}, {"order": ">", "differences": True},
    {"order": ">", "planes": True, "tile": (32, 16)},
]  # fmt: skip


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_colours_of_a_tiff_are_found_among_any_extra_samples(
    packer: str, layout: dict[str, Any], dtype: type
) -> None:
    full = int(np.iinfo(dtype).max)
    kinds = [(GREY, 3), (GREY, 4), (GREY, 5), (RGB, 3), (RGB, 4), (RGB, 5)]
    for photometric, count in kinds:
        values = random(count, full, dtype=dtype)
        extra = (0,) * (count - (3 if photometric == RGB else 1))
        picture = decode(tiff_of(values, photometric, packer=packer, extra=extra, **layout))
        expected = values[..., :3] >> (8 if dtype == np.uint16 else 0)
        assert np.array_equal(picture.pixels, expected), (photometric, count)
        told = any(f"{count} samples a pixel" in note for note in picture.notes)
        assert told == (count > 4 or photometric == GREY)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("extra", [(0,), (2,)])
def test_grey_with_an_extra_sample_looks_as_without_it(
    packer: str, layout: dict[str, Any], dtype: type, extra: tuple[int, ...]
) -> None:
    values = random(2, 200, dtype=dtype)
    alone, beside = (
        decode(
            tiff_of(values[..., :count], GREY, packer=packer, extra=extra[: count - 1], **layout)
        )
        for count in (1, 2)
    )
    assert np.array_equal(beside.pixels, alone.pixels)


def test_transparency_among_the_samples_is_no_colour() -> None:
    values = random(2, 255, dtype=np.uint8)
    values[..., 1] = 9
    assert np.array_equal(
        decode(tiff_of(values, GREY, extra=(2,))).pixels, values[..., :1].repeat(3, 2)
    )
    four = random(4, 255, dtype=np.uint8)
    assert np.array_equal(decode(tiff_of(four, GREY, extra=(0, 0, 2))).pixels, four[..., :3])


def test_white_is_zero_where_a_grey_tiff_says_so() -> None:
    values = random(2, 255, dtype=np.uint8)
    assert np.array_equal(
        decode(tiff_of(values, 0, extra=(0,))).pixels[..., 0], 255 - values[..., 0]
    )


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_tiff_of_five_samples_is_turned_upright(orientation: int) -> None:
    values = random(5, 255, dtype=np.uint8)
    three, five = (
        decode(tiff_of(values[..., :count], RGB, extra=(0,) * (count - 3), t274=(orientation,)))
        for count in (3, 5)
    )
    assert np.array_equal(three.pixels, five.pixels)
    assert three.size == five.size


REFUSED = {
    "five samples as JPEG": (
        tiff_of(random(5, 255, dtype=np.uint8), RGB, t259=(7,)),
        "5 samples a pixel.*JPEG",
    ),
    "CMYK and two more": (tiff_of(random(6, 255, dtype=np.uint8), CMYK), "6 samples a pixel.*cmyk"),
    "one bit a colour": (packed_tiff(random(3, 1), 1, RGB), "1-bit rgb samples"),
    "six bits": (packed_tiff(random(1, 63), 6, GREY), "6-bit grey samples"),
    "palette of 16 bits": (tiff_of(random(1, 65_535), PALETTE), "16-bit palette samples"),
    "CMYK of 16 bits": (tiff_of(random(4, 65_535), CMYK), "16-bit cmyk samples"),
    "different depths": (
        tiff_of(random(3, 255, dtype=np.uint8), RGB, t258=(8, 8, 16)),
        "8, 8, 16 bits",
    ),
    "floating point": (tiff_of(random(1, 65_535), GREY, t339=(3,)), "floating-point"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tiff_that_is_not_read_is_refused_by_its_true_reason_by_check_as_by_the_daemon(
    name: str, tmp_path: Path
) -> None:
    data, reason = REFUSED[name]
    (tmp_path / "a.tif").write_bytes(data)
    (finding,) = validate.check([tmp_path / "a.tif"])
    with pytest.raises(PictureError, match=reason) as refusal:
        decode(data)
    assert str(finding.error) == str(refusal.value)
    assert refusal.value.remedy
    assert "damaged" not in str(refusal.value)


def test_samples_count_for_the_pixel_limit_before_they_are_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tiff_of(random(9, 255, dtype=np.uint8), RGB, extra=(0,) * 6)
    monkeypatch.setattr(images, "read_samples", lambda *_: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="67 × 41 pixels of 9 samples"):
        decode(data, max_pixels=67 * 41)


@pytest.mark.parametrize("packer", ["LZMA", "Zstandard"])
@pytest.mark.parametrize("planes", [False, True])
def test_a_damaged_tiff_is_refused_with_the_kind_that_it_is(packer: str, planes: bool) -> None:
    data = bytearray(tiff_of(random(5, 255, dtype=np.uint8), RGB, packer=packer, planes=planes))
    data[8:16] = b"\x5a" * 8
    with pytest.raises(PictureError, match=f"5 samples of 8 bits, compression: {packer}"):
        decode(bytes(data))


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_tiff_of_many_samples_gives_a_picture_or_a_refusal_and_nothing_else(
    data: st.DataObject,
) -> None:
    packer, planes = data.draw(st.sampled_from(sorted(PACKERS))), data.draw(st.booleans())
    damaged = bytearray(
        tiff_of(random(5, 65_535), RGB, packer=packer, planes=planes, differences=True)
    )
    places = st.one_of(
        st.integers(0, len(damaged) - 1), st.integers(len(damaged) - 300, len(damaged) - 1)
    )
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PictureError):
        picture = decode(bytes(damaged), max_pixels=10**5)
        assert picture.pixels.shape == (picture.size.height, picture.size.width, 3)


# -- GIF --------------------


def frames_of_a_gif(count: int, **options: Any) -> bytes:
    frames = [Image.fromarray(random(3, 255, dtype=np.uint8)).rotate(90 * n) for n in range(count)]
    animated = {"save_all": True, "append_images": frames[1:]} if count > 1 else {}
    return encoded(frames[0], "GIF", **animated, **options)


def first_frame(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("options", [{}, {"interlace": 1}, {"transparency": 3}], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_first_frame_of_a_gif_is_read_and_the_number_of_frames_noted(
    count: int, options: dict[str, Any]
) -> None:
    data = frames_of_a_gif(count, **options)
    picture = decode(data)
    assert np.array_equal(picture.pixels, first_frame(data))
    noted = [note for note in picture.notes if f"first frame of {count}" in note]
    assert len(noted) == len(picture.notes) == (1 if count > 1 else 0)


def with_screen(data: bytes, width: int, height: int) -> bytes:
    return data[:6] + width.to_bytes(2, "little") + height.to_bytes(2, "little") + data[10:]


@pytest.mark.parametrize("screen", [(5, 5), (67, 41), (90, 70)])
def test_a_gif_has_the_size_of_its_screen_or_of_a_first_frame_that_reaches_beyond(
    screen: tuple[int, int],
) -> None:
    data = with_screen(frames_of_a_gif(3), *screen)
    picture = decode(data)
    assert picture.size == (max(screen[0], SHAPE[1]), max(screen[1], SHAPE[0]))
    assert np.array_equal(picture.pixels, first_frame(data))


def test_the_screen_of_a_gif_counts_for_the_pixel_limit_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images, "decode_by_pillow", lambda *_: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="60000 × 60000"):
        decode(with_screen(frames_of_a_gif(1), 60_000, 60_000))


def test_a_gif_within_our_pixel_limit_is_read_whatever_that_of_pillow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = with_screen(frames_of_a_gif(1), 5, 5)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(data).size == (SHAPE[1], SHAPE[0])


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_hole_of_zeros_in_a_gif_is_found(share: float) -> None:
    data = bytearray(frames_of_a_gif(3))
    at = int(len(data) * share)
    data[at : at + 2000] = bytes(len(data[at : at + 2000]))
    with pytest.raises(IncompleteFileError):
        decode(bytes(data))


def test_a_gif_of_endless_small_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "_MAX_SUB_BLOCKS", 1000)
    comment = b"!\xfe" + b"\1x" * 2000 + b"\0"
    with pytest.raises(PictureError, match="too many blocks"):
        read_header(frames_of_a_gif(1)[:-1] + comment + b";")


def test_a_gif_without_a_frame_is_refused() -> None:
    with pytest.raises(PictureError, match="no picture") as refusal:
        read_header(b"GIF89a\5\0\5\0\0\0\0;")
    assert refusal.value.remedy


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_gif_gives_a_picture_or_a_refusal_and_nothing_else(data: st.DataObject) -> None:
    damaged = bytearray(frames_of_a_gif(2))
    begins = st.integers(0, 40)
    for place in data.draw(
        st.lists(st.one_of(begins, st.integers(0, len(damaged) - 1)), min_size=1, max_size=4)
    ):
        damaged[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PictureError):
        picture = decode(bytes(damaged), max_pixels=10**5)
        assert picture.pixels.shape == (picture.size.height, picture.size.width, 3)


# -- names, and what the page says --------------------


def test_a_jfif_is_a_picture() -> None:
    assert images.is_picture("photo.JFIF")
    assert decode(encoded(sample(), "JPEG")).size == (67, 41)


@pytest.mark.parametrize("name", ["a.JP2", "b.jxl", "c.cr2", "d.ico", "e.pdf"])
def test_a_kind_that_is_known_and_not_read_has_a_name_and_a_remedy(name: str) -> None:
    found = not_read(name)
    assert found
    assert found.name
    assert found.remedy
    assert not images.is_picture(name)


def test_no_kind_is_both_read_and_not_read() -> None:
    assert not ENDINGS & set(KNOWN_BUT_NOT_READ)
    assert not_read("a.jpg") is None
    assert not_read("jp2") is None


@pytest.mark.parametrize(
    "kind",
    [kind if kind != "HEIC" else pytest.param(kind, marks=needs_heic) for kind in headers.FORMATS],
)
def test_every_format_that_is_listed_is_read_by_its_content(kind: str) -> None:
    header = read_header(heic(sample()) if kind == "HEIC" else encoded(sample(), kind.upper()))
    assert header.format == kind
    assert kind in headers.READABLE


def test_the_page_lists_the_endings_and_compressions_as_they_are() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Pictures\n")[1].split("\n## ")[0]
    taken, others = section.split("Not taken")
    rows = re.findall(r"^\| (\w+) \| (`\..*?) \|", taken, re.MULTILINE)
    listed = {kind: tuple(re.findall(r"`(\.\w+)`", endings)) for kind, endings in rows}
    assert listed == headers.FORMATS
    heic_endings = set(headers.FORMATS["HEIC"])  # the page names the extra that they need
    assert set(re.findall(r"`(\.\w+)`", taken)) == ENDINGS | heic_endings
    assert set(re.findall(r"`(\.\w+)`", others)) == set(KNOWN_BUT_NOT_READ) - heic_endings
    (read,) = re.findall(r"^\| compression \| (.*) \|$", section, re.MULTILINE)
    (refused,) = re.findall(r"^\| compression, refused \| (.*) \|$", section, re.MULTILINE)
    names = tiff_kinds.COMPRESSIONS
    assert set(refused.split(", ")) == {names[number] for number in tiff_kinds.NOT_READ}
    assert set(read.split(", ")) == set(names.values()) - set(refused.split(", "))
    for mode, bits in tiff_kinds.BITS.items():
        assert f"| {mode}, bits | {', '.join(map(str, bits))} |" in section
