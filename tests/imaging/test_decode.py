"""Every picture is decoded as Pillow shows it, upright; other files are refused with a reason."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from sam_poll.core.errors import IncompleteFileError, PictureError
from sam_poll.core.types import Picture, Size
from sam_poll.imaging import headers
from sam_poll.imaging.decode import decode, is_picture, read_header
from tests.support.bad_inputs import (
    blank_page,
    flipped,
    holed,
    noise,
    repeated_scans,
    tiff,
    two_sizes_in_a_webp,
)
from tests.support.pictures import kinds_of_pictures, ramp
from tests.support.strategies import encoded, sample

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF", "AVIF")
Capture = pytest.CaptureFixture[str]


def as_pillow_shows(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def assert_as_pillow_shows(data: bytes, tolerance: int = 0) -> Picture:
    picture, expected = decode(data), as_pillow_shows(data)
    assert picture.pixels.dtype == np.uint8
    assert picture.pixels.shape == expected.shape
    assert np.abs(picture.pixels.astype(int) - expected).max() <= tolerance
    assert picture.size == Size(expected.shape[1], expected.shape[0])
    return picture


# -- names --------------------


@pytest.mark.parametrize(
    "name",
    [
        "a.jpg",
        "B.JPG",
        "c/d.Jpeg",
        "e.tar.png",
        "f.TIF",
        "g.webp",
        "h.jpe",
        "i.bmp",
        "j.tiff",
        "k.GIF",
    ],
)
def test_a_picture_is_known_by_its_ending_in_any_case(name: str) -> None:
    assert is_picture(name)


@pytest.mark.parametrize("name", ["a.json", "jpg", ".jpg", "a.jpg.part", "a.ico", "a.jpg~", ""])
def test_other_names_are_no_pictures(name: str) -> None:
    assert not is_picture(name)


# -- orientation --------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_are_turned_upright_as_pillow_turns_them(kind: str, orientation: int) -> None:
    data = encoded(sample(), kind, orientation)
    assert_as_pillow_shows(data)
    header = read_header(data)
    assert (header.orientation, header.stored) == (orientation, Size(67, 41))
    assert header.size == (Size(41, 67) if orientation > 4 else Size(67, 41))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_a_reduced_jpeg_is_turned_upright_too(shrink: int, orientation: int) -> None:
    data = encoded(sample(333, 201), "JPEG", orientation, quality=95)
    picture = decode(data, min_decode_side=-(-201 // shrink))
    expected = as_pillow_shows(data)
    height, width = (-(-side // shrink) for side in expected.shape[:2])
    assert picture.pixels.shape == (height, width, 3)
    assert picture.size == Size(expected.shape[1], expected.shape[0])
    small = cv2.resize(expected, (width, height), interpolation=cv2.INTER_AREA)
    assert np.abs(picture.pixels.astype(int) - small).mean() < 6


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_in_xmp_counts_where_exif_has_none(kind: str) -> None:
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet.decode())
        data = encoded(sample(), kind, pnginfo=info)
    else:
        data = encoded(sample(), kind, xmp=packet)
    assert read_header(data).orientation == 6
    assert_as_pillow_shows(data)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(value: int) -> None:
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        picture = decode(encoded(sample(), kind, value))
        assert picture.size == Size(67, 41)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\0\xff",
        b"Exif\0\0junk",
    ],
)
def test_corrupt_exif_is_ignored(exif: bytes) -> None:
    for kind in ("JPEG", "WEBP"):
        data = encoded(sample(), kind, exif=exif)
        assert read_header(data).orientation == 1
        assert decode(data).size == Size(67, 41)


# -- scale --------------------


@pytest.mark.parametrize(
    ("width", "height", "min_decode_side", "both", "shrink"),
    [
        (800, 400, None, True, 1),
        (800, 400, 1024, True, 1),
        (800, 400, 400, True, 1),
        (800, 400, 201, True, 1),
        (800, 400, 200, True, 2),
        (800, 400, 200, False, 4),
        (800, 400, 100, True, 4),
        (800, 400, 100, False, 8),
        (800, 400, 50, True, 8),
        (800, 400, 10, True, 8),
        (801, 401, 201, True, 2),
        (400, 800, 200, False, 4),
    ],
)
def test_a_jpeg_is_read_at_the_scale_that_still_covers_the_network(
    width: int, height: int, min_decode_side: int | None, both: bool, shrink: int
) -> None:
    picture = decode(
        encoded(sample(width, height), "JPEG"), min_decode_side=min_decode_side, both=both
    )
    assert picture.pixels.shape[:2] == (-(-height // shrink), -(-width // shrink))
    assert picture.size == Size(width, height)


def test_only_jpeg_is_reduced() -> None:
    for kind in ("PNG", "TIFF", "WEBP", "BMP"):
        assert decode(encoded(sample(800, 400), kind), min_decode_side=50).pixels.shape == (
            400,
            800,
            3,
        )


# -- kinds of pictures --------------------


CASES = [
    *(("JPEG", mode, {"quality": 95}) for mode in ("L", "RGB", "CMYK", "YCbCr")),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "RGB", {"keep_rgb": True}),
    *(("PNG", mode, {}) for mode in ("L", "LA", "RGB", "RGBA", "P", "P16", "1")),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "L", {"transparency": 5}),
    ("PNG", "RGB", {"transparency": (0, 0, 0)}),
    *(("TIFF", mode, {}) for mode in ("L", "LA", "RGB", "RGBA", "P", "1", "CMYK", "YCbCr")),
    *(
        ("TIFF", "RGB", {"compression": name})
        for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg")
    ),
    ("TIFF", "RGBA", {"compression": "tiff_lzw"}),
    ("TIFF", "1", {"compression": "group4"}),
    ("TIFF", "RGB", {"big_tiff": True}),
    *(("WEBP", mode, {}) for mode in ("L", "RGB", "RGBA", "P")),
    ("WEBP", "RGB", {"lossless": False}),
    *(("BMP", mode, {}) for mode in ("L", "RGB", "RGBA", "P", "1")),
]


@pytest.mark.parametrize(("kind", "mode", "options"), CASES, ids=str)
def test_every_kind_of_picture_looks_as_in_pillow(
    kind: str, mode: str, options: dict[str, object]
) -> None:
    data = encoded(kinds_of_pictures()[mode], kind, **options)
    try:
        Image.open(io.BytesIO(data)).load()
    except OSError:
        pytest.skip("this Pillow cannot read back what it wrote (YCbCr TIFF before Pillow 13)")
    assert_as_pillow_shows(data, tolerance=2)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_with_transparency_is_turned_upright(orientation: int) -> None:
    assert_as_pillow_shows(encoded(kinds_of_pictures()["RGBA"], "TIFF", orientation))


def test_a_cmyk_jpeg_without_adobe_marker_looks_as_in_pillow() -> None:
    data = encoded(kinds_of_pictures()["CMYK"], "JPEG", quality=95)
    at = data.index(b"\xff\xee")
    (length,) = struct.unpack_from(">H", data, at + 2)
    assert_as_pillow_shows(data[:at] + data[at + 2 + length :], tolerance=2)


@pytest.mark.parametrize("ending", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bit_colour_keeps_its_upper_eight_bits(ending: str, channels: int) -> None:
    deep = np.dstack([ramp(), ramp()[..., :1]])[..., :channels].astype(np.uint16) * 257
    data = cv2.imencode(ending, deep)[1].tobytes()
    assert np.abs(decode(data).pixels[..., ::-1].astype(int) - ramp()).max() <= 1
    assert read_header(data).bits == 16


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_sixteen_bit_grey_is_stretched_and_equalised_as_in_cvat(
    kind: str, orientation: int
) -> None:
    deep = 1000 + np.arange(41 * 67, dtype=np.uint16).reshape(41, 67)
    data = encoded(Image.fromarray(deep), kind, orientation)
    picture = decode(data)
    with Image.open(io.BytesIO(data)) as image:
        grey = np.array(ImageOps.exif_transpose(image), dtype=np.uint16)
    grey = grey - grey.min()
    expected = np.asarray(
        ImageOps.equalize(Image.fromarray((grey / grey.max() * 255).astype(np.uint8)))
    )
    assert np.array_equal(picture.pixels, expected[..., None].repeat(3, 2))
    assert (picture.pixels.min(), picture.pixels.max()) == (0, 255)
    assert "from 1000 to 3746" in picture.notes[0]


def test_sixteen_bit_grey_of_one_value_is_black_and_said() -> None:
    picture = decode(encoded(Image.fromarray(np.full((5, 7), 900, np.uint16)), "PNG"))
    assert not picture.pixels.any()
    assert "one value (900)" in picture.notes[0]


def test_a_bmp_stored_from_top_to_bottom_is_not_upside_down() -> None:
    data = bytearray(encoded(sample(), "BMP"))
    struct.pack_into("<i", data, 22, -41)
    assert np.array_equal(decode(bytes(data)).pixels, np.asarray(sample())[::-1])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_of_several_frames_the_first_is_used_and_said(kind: str) -> None:
    data = encoded(sample(), kind, save_all=True, append_images=[ImageOps.invert(sample())])
    picture = decode(data)
    assert np.array_equal(picture.pixels, np.asarray(sample()))
    assert "first" in picture.notes[0]
    assert decode(encoded(sample(), kind)).notes == ()


def test_the_digest_is_that_of_the_bytes() -> None:
    data = encoded(sample())
    assert decode(data).digest == hashlib.sha256(data).hexdigest()


# -- refusals --------------------


@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_picture_cut_off_anywhere_is_refused_as_truncated(kind: str, data: st.DataObject) -> None:
    whole = encoded(sample(), kind)
    cut = data.draw(st.integers(12, len(whole) - 1))
    with pytest.raises(PictureError, match="truncated") as refusal:
        decode(whole[:cut])
    assert "copy the file again" in str(refusal.value)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("min_decode_side", [None, 50])
def test_a_progressive_jpeg_cut_off_is_refused(share: float, min_decode_side: int | None) -> None:
    whole = encoded(sample(800, 400), "JPEG", progressive=True)
    with pytest.raises(PictureError, match="truncated"):
        decode(whole[: int(len(whole) * share)], min_decode_side=min_decode_side)


def test_the_end_of_a_preview_inside_a_jpeg_is_not_taken_for_the_end_of_the_picture() -> None:
    preview = encoded(sample(20, 10), "JPEG")
    whole = encoded(sample(), "JPEG", exif=b"Exif\0\0" + preview)
    assert decode(whole).size == Size(67, 41)
    with pytest.raises(PictureError, match="truncated"):
        decode(whole[:-30])


@pytest.mark.parametrize("kind", FORMATS)
def test_bytes_after_the_end_of_a_picture_do_no_harm(kind: str) -> None:
    data = encoded(sample(), kind)
    assert np.array_equal(decode(data + b"\0" * 100 + b"appended").pixels, decode(data).pixels)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_cut_off_empty_or_all_zeros_may_still_be_arriving(kind: str) -> None:
    whole = encoded(sample(), kind)
    for begun in (
        b"",
        whole[:1],
        whole[:5],
        whole[:11],
        whole[: len(whole) // 2],
        bytes(len(whole)),
    ):
        with pytest.raises(IncompleteFileError):
            decode(begun)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"optimize": True}, {"subsampling": 0}], ids=str
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_hole_of_zeros_in_a_jpeg_is_found(
    mode: str, options: dict[str, bool], share: float
) -> None:
    noisy = Image.fromarray(
        np.random.default_rng(5).integers(0, 255, (200, 300, 3), np.uint8)
    ).convert(mode)
    whole = encoded(noisy, "JPEG", quality=90, **options)
    assert decode(whole).size == Size(300, 200)
    with pytest.raises(IncompleteFileError, match=r"zeros from byte [\d,]+ on"):
        decode(holed(whole, share, 2000))


def test_zeros_that_mean_a_blank_page_are_no_hole() -> None:
    assert decode(blank_page()).size == Size(2000, 2000)
    assert decode(encoded(Image.new("RGB", (900, 900)), "JPEG", progressive=True)).size == Size(
        900, 900
    )


def test_zeros_beside_the_compressed_data_are_no_hole() -> None:
    assert decode(encoded(sample(), "JPEG", exif=b"Exif\0\0II*\0" + bytes(5000))).size == Size(
        67, 41
    )
    assert decode(encoded(sample(), "JPEG") + bytes(5000)).size == Size(67, 41)


def test_a_hole_in_a_png_is_distinguished_from_a_flipped_bit() -> None:
    whole = noise("PNG")
    for share in (0.01, 0.5, 0.9):
        with pytest.raises(IncompleteFileError, match="zeros from byte"):
            decode(holed(whole, share))
    with pytest.raises(PictureError, match="checksum") as refusal:
        decode(flipped(whole))
    assert not isinstance(refusal.value, IncompleteFileError)


def test_a_png_with_nonsense_between_its_chunks_is_refused_as_damaged() -> None:
    whole = encoded(sample())
    at = whole.index(b"IDAT") - 4
    with pytest.raises(PictureError, match="no chunk where one should begin") as refusal:
        decode(whole[:at] + b"\x01\x02\x03\x04\x05\x06\x07\x08\x09" + whole[at:])
    assert not isinstance(refusal.value, IncompleteFileError)


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        ("JPEG", {}, "parts"),
        ("PNG", {}, "chunks"),
        ("WEBP", {"exif": b"Exif\0\0II*\0"}, "chunks"),
        ("TIFF", {}, "tags"),
    ],
)
def test_a_file_of_far_too_many_parts_is_not_walked_to_its_end(
    kind: str, options: dict[str, bytes], parts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(sample(), kind, **options)
    assert decode(data).size == Size(67, 41)
    monkeypatch.setattr(headers, "_MAX_PARTS", 2)
    with pytest.raises(PictureError, match=f"far too many {parts}"):
        decode(data)


def test_a_tiff_of_far_too_many_strips_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(sample(40, 400), "TIFF", tiffinfo={278: 1})
    monkeypatch.setattr(headers, "_MAX_PARTS", 300)
    with pytest.raises(PictureError, match="far too many strips"):
        decode(data)


def test_a_jpeg_may_have_a_hundred_scans_and_no_more() -> None:
    assert decode(repeated_scans(90)).size == Size(67, 41)
    with pytest.raises(PictureError, match="far too many scans"):
        decode(repeated_scans(101))


def png_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(sample()))
    struct.pack_into(">II", data, 16, width, height)
    struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    return bytes(data)


def jpeg_of(width: int, height: int) -> bytes:
    data = bytearray(encoded(sample(), "JPEG"))
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, height, width)
    return bytes(data)


@pytest.mark.parametrize("data", [png_of(100_000, 50_000), jpeg_of(65_000, 65_000)])
def test_the_pixel_limit_is_kept_before_anything_is_decoded(
    data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(PictureError, match=r"0,000 pixels, more than the limit of 268,435,456"):
        decode(data)


@pytest.mark.parametrize("kind", [4, 9])
def test_of_two_sizes_in_a_tiff_the_limit_is_held_against_the_one_that_is_decoded(
    kind: int,
) -> None:
    assert decode(tiff()).size == Size(10, 10)
    assert decode(tiff((278, 4, 10))).size == Size(10, 10)
    with pytest.raises(PictureError, match="20000 × 20000"):
        read_header(tiff((256, kind, 20_000), (257, kind, 20_000)))


def test_of_two_sizes_in_a_webp_the_limit_is_held_against_the_one_that_is_decoded() -> None:
    with pytest.raises(PictureError, match="16000 × 2500"):
        read_header(two_sizes_in_a_webp(), max_pixels=10**6)


def test_the_pixel_limit_is_the_last_size_allowed() -> None:
    data = encoded(sample(67, 41))
    assert decode(data, max_pixels=67 * 41).size == Size(67, 41)
    with pytest.raises(
        PictureError, match=re.escape("67 × 41 = 2,747 pixels, more than the limit of 2,746")
    ):
        read_header(data, max_pixels=67 * 41 - 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_pillows_own_limit_does_not_interfere(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(kinds_of_pictures()[mode], "TIFF")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode(data).size == Size(67, 41)


@pytest.mark.parametrize("data", [png_of(0, 5), jpeg_of(5, 0)])
def test_a_picture_without_pixels_is_refused(data: bytes) -> None:
    with pytest.raises(PictureError, match="no pixels"):
        decode(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"just some text", "the file is not a picture"),
        (b"\n<!DOCTYPE html><html>login</html>", "HTML page"),
        (b'{"points": []}', "JSON"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video"),
        (b"%PDF-1.7", "a PDF"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "not a picture"),
        (bytes(4096), "zeros from byte 0 on"),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else "",
)
def test_what_is_no_picture_is_refused_with_what_it_is(data: bytes, reason: str) -> None:
    with pytest.raises(PictureError, match=reason) as refusal:
        read_header(data)
    assert refusal.value.remedy


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_a_tiff_that_eight_bits_cannot_show_is_refused(dtype: type) -> None:
    data = encoded(Image.fromarray(np.zeros((5, 7), dtype)), "TIFF")
    with pytest.raises(PictureError, match="cannot be shown in 8 bits"):
        decode(data)


def test_a_jpeg_of_twelve_bits_is_refused() -> None:
    data = bytearray(encoded(sample(), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(PictureError, match="12 bits"):
        decode(bytes(data))


def test_a_png_with_a_wrong_checksum_is_refused_as_damaged() -> None:
    data = bytearray(encoded(sample()))
    data[data.index(b"IDAT") + 10] ^= 1
    with pytest.raises(PictureError, match="checksum"):
        decode(bytes(data))


@pytest.mark.parametrize("chunk", [b"PLTE", b"IDAT"])
def test_a_png_without_palette_or_pixels_is_refused_without_a_word_to_stderr(
    chunk: bytes, capfd: Capture
) -> None:
    data = encoded(kinds_of_pictures()["P"])
    at = data.index(chunk) - 4
    (length,) = struct.unpack_from(">I", data, at)
    with pytest.raises(PictureError, match="missing"):
        decode(data[:at] + data[at + 12 + length :])
    assert capfd.readouterr().err == ""


def test_a_big_tiff_that_points_beyond_all_memory_is_refused() -> None:
    data = bytearray(encoded(sample(), "TIFF", big_tiff=True))
    data[8:16] = b"\xff" * 8
    with pytest.raises(PictureError, match="truncated"):
        decode(bytes(data))


@pytest.mark.parametrize("kind", FORMATS)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_gives_a_picture_or_a_refusal_and_nothing_else(
    kind: str, data: st.DataObject
) -> None:
    damaged = bytearray(encoded(sample(), kind, orientation=None if kind == "BMP" else 6))
    places = st.one_of(st.integers(0, min(200, len(damaged) - 1)), st.integers(0, len(damaged) - 1))
    for place in data.draw(st.lists(places, min_size=1, max_size=4)):
        damaged[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PictureError):
        picture = decode(bytes(damaged), max_pixels=10**6)
        assert picture.pixels.shape == (picture.size.height, picture.size.width, 3)


def cut_tiff() -> bytes:
    data = bytearray(encoded(sample(), "TIFF", compression="tiff_lzw"))
    data[8:60] = bytes(52)
    return bytes(data)


def strange_profile() -> bytes:
    info = PngInfo()
    info.add(b"iCCP", b"bad\0\0xxxx")
    return encoded(sample(), pnginfo=info)


@pytest.mark.parametrize(
    "make",
    [
        cut_tiff,
        strange_profile,
        lambda: encoded(sample())[:-20],
        lambda: encoded(sample(), "BMP")[:-20],
        lambda: encoded(sample(), "JPEG")[:-20],
    ],
)
def test_bad_input_writes_nothing_to_stderr(make: Callable[[], bytes], capfd: Capture) -> None:
    data = make()
    with contextlib.suppress(PictureError):
        decode(data)
    assert capfd.readouterr() == ("", "")
