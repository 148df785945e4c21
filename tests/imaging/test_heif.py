"""AVIF and HEIC are read as Pillow and pillow-heif show them; incomplete files are told apart."""

from __future__ import annotations

import contextlib
import io
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import AvifImagePlugin, Image, ImageOps

from sam_poll.core.errors import IncompleteFileError, PictureError
from sam_poll.core.types import Size
from sam_poll.imaging import decode as images
from sam_poll.imaging import heif
from sam_poll.imaging.decode import decode, read_header
from tests.support.bad_inputs import holed
from tests.support.heic import as_pillow_heif_shows, heic, needs_heic
from tests.support.pictures import kinds_of_pictures
from tests.support.strategies import encoded, sample


def avif(image: Image.Image, orientation: int | None = None, **options: Any) -> bytes:
    return encoded(image, "AVIF", orientation, **options)


def as_pillow_shows(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


Maker = Callable[..., bytes]
BOTH = [
    pytest.param(avif, as_pillow_shows, "AVIF", id="AVIF"),
    pytest.param(heic, as_pillow_heif_shows, "HEIC", id="HEIC", marks=needs_heic),
]
MAKERS = [
    pytest.param(avif, id="AVIF"),
    pytest.param(heic, id="HEIC", marks=needs_heic),
]


def noisy(width: int = 300, height: int = 200) -> Image.Image:
    return Image.fromarray(np.random.default_rng(5).integers(0, 255, (height, width, 3), np.uint8))


# -- sound files --------------------


@pytest.mark.parametrize(("make", "shown", "kind"), BOTH)
@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
def test_every_mode_looks_as_in_pillow(
    make: Maker, shown: Callable[[bytes], Image.Image], kind: str, mode: str
) -> None:
    data = make(kinds_of_pictures()[mode])
    picture = decode(data)
    assert read_header(data).format == kind
    assert np.array_equal(picture.pixels, np.asarray(shown(data)))
    assert (picture.size, picture.notes) == (Size(67, 41), ())


@pytest.mark.parametrize(("make", "shown", "kind"), BOTH)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright_once(
    make: Maker, shown: Callable[[bytes], Image.Image], kind: str, orientation: int
) -> None:
    data = make(sample(), orientation)
    picture, expected = decode(data), shown(data)
    assert picture.size == expected.size == ((41, 67) if orientation > 4 else (67, 41))
    assert read_header(data).size == picture.size
    assert np.array_equal(picture.pixels, np.asarray(expected))


def test_an_orientation_in_the_xmp_of_an_avif_counts_where_there_is_no_other() -> None:
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = avif(sample(), xmp=packet)
    assert read_header(data).orientation == 6
    assert np.array_equal(decode(data).pixels, np.asarray(as_pillow_shows(data)))


def test_of_an_animated_avif_the_first_frame_is_used_and_said() -> None:
    data = avif(sample(), save_all=True, append_images=[ImageOps.invert(sample())])
    picture = decode(data)
    assert picture.notes == ("the AVIF is animated; first frame of 2 used",)
    assert np.abs(picture.pixels.astype(int) - np.asarray(sample())).mean() < 20


@needs_heic
def test_of_several_pictures_in_a_heic_the_main_one_is_used_and_said() -> None:
    data = heic(sample(), None, ImageOps.invert(sample()), primary_index=1)
    picture = decode(data)
    assert picture.notes == ("the HEIC holds several pictures; the main one was used",)
    assert np.abs(picture.pixels.astype(int) - np.asarray(ImageOps.invert(sample()))).mean() < 20


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("after", [b"appended by a camera", bytes(100) + b"appended"])
def test_bytes_after_the_end_do_no_harm(make: Maker, after: bytes) -> None:
    data = make(sample())
    assert np.array_equal(decode(data + after).pixels, decode(data).pixels)


@pytest.mark.parametrize("make", MAKERS)
def test_a_blank_picture_has_no_hole(make: Maker) -> None:
    assert not decode(make(Image.new("RGB", (2000, 1500)))).pixels.any()


@pytest.mark.parametrize("make", MAKERS)
def test_zeros_in_the_exif_are_no_hole(make: Maker) -> None:
    exif = Image.Exif()
    exif[0x927C] = bytes(5000)  # a camera's own notes
    assert decode(make(sample(), exif=exif.tobytes())).size == Size(67, 41)


# -- incomplete and damaged files --------------------


@pytest.mark.parametrize("make", MAKERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_cut_off_anywhere_is_refused_as_truncated(make: Maker, data: st.DataObject) -> None:
    whole = make(sample())
    for cut in (1, 5, 11, data.draw(st.integers(12, len(whole) - 1))):
        with pytest.raises(IncompleteFileError, match="truncated") as refusal:
            decode(whole[:cut])
        assert "copy the file again" in str(refusal.value)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("share", [0.001, 0.02, 0.3, 0.6, 0.9])
def test_a_hole_of_zeros_is_found(make: Maker, share: float) -> None:
    whole = make(noisy())
    assert decode(whole).size == Size(300, 200)
    with pytest.raises(IncompleteFileError, match=r"zeros from byte [\d,]+ on"):
        decode(holed(whole, share, 2000))


@pytest.mark.parametrize("make", MAKERS)
def test_the_pixel_limit_is_kept_before_anything_is_decoded(
    make: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make(sample())
    monkeypatch.setattr(images, "decode_by_pillow", lambda *_: pytest.fail("decoded"))
    with pytest.raises(PictureError, match="2,747 pixels, more than the limit of 2,746"):
        decode(data, max_pixels=67 * 41 - 1)


@pytest.mark.parametrize("make", MAKERS)
def test_pillows_own_limit_does_not_interfere(make: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode(make(sample())).size == Size(67, 41)


@needs_heic
def test_a_heic_that_is_larger_than_it_says_is_refused() -> None:
    data = bytearray(heic(noisy()))
    struct.pack_into(">II", data, data.index(b"ispe") + 8, 64, 64)
    with pytest.raises(PictureError, match="damaged or of a kind that cannot be decoded"):
        decode(bytes(data))


@pytest.mark.slow
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.filterwarnings("ignore:.*EXIF", "ignore:not enough data")
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_gives_a_picture_or_a_refusal_and_nothing_else(
    make: Maker, data: st.DataObject
) -> None:
    damaged = bytearray(make(sample(), 6))
    begins = st.integers(0, 400)
    for place in data.draw(
        st.lists(st.one_of(begins, st.integers(0, len(damaged) - 1)), min_size=1, max_size=4)
    ):
        damaged[place] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PictureError):
        picture = decode(bytes(damaged), max_pixels=10**6)
        assert picture.pixels.shape == (picture.size.height, picture.size.width, 3)


def test_a_file_of_far_too_many_boxes_or_items_is_not_walked_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = avif(sample(), 6)
    for parts, words in ((4, "far too many boxes"), (1, "far too many")):
        monkeypatch.setattr(heif, "_MAX_PARTS", parts)
        with pytest.raises(PictureError, match=words):
            decode(data)


@pytest.mark.parametrize(
    "kinds",
    [struct.pack(">I4s", 8, b"iinf"), struct.pack(">I4sQ", 1, b"iinf", 1 << 62)],
    ids=["empty", "far too long"],
)
def test_an_empty_list_of_kinds_at_the_end_of_the_file_is_damage(kinds: bytes) -> None:
    body = bytes(4) + struct.pack(">I4s", 16, b"iloc") + bytes(8) + kinds
    begin = struct.pack(">I4s", 16, b"ftyp") + b"avif" + bytes(4)
    with pytest.raises(PictureError, match="its list of items cannot be read"):
        read_header(begin + struct.pack(">I4s", 8 + len(body), b"meta") + body)


def test_a_heif_in_another_coding_is_refused_by_the_kinds_of_its_items() -> None:
    data = avif(sample()).replace(b"av01", b"j2k1")
    with pytest.raises(PictureError, match=r"without a picture in AV1 or HEVC.*j2k1") as refusal:
        read_header(data)
    assert refusal.value.remedy


# -- libraries --------------------


def test_a_build_of_pillow_without_avif_is_named_as_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = avif(sample())
    monkeypatch.setattr(AvifImagePlugin, "SUPPORTED", False)
    with pytest.raises(PictureError, match="build of Pillow cannot read AVIF") as refusal:
        decode(data)
    assert "pip install" in str(refusal.value)


def test_a_heic_without_its_library_is_refused_with_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    data = avif(sample()).replace(b"av01", b"hvc1")
    with pytest.raises(PictureError, match="needs the package pillow-heif") as refusal:
        read_header(data)
    assert "pip install 'sam_poll[heic]'" in str(refusal.value)


WITHOUT_THE_LIBRARY = """
import sys
sys.modules["pillow_heif"] = None
from sam_poll.imaging import decode
assert not decode.is_picture("a.heic")
assert decode.is_picture("a.avif")
print(decode.not_read("a.HEIC").remedy)
"""


def test_without_its_library_the_endings_of_heic_are_not_taken() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_LIBRARY], capture_output=True, text=True, check=True
    )
    assert "pip install 'sam_poll[heic]'" in done.stdout


@needs_heic
@pytest.mark.parametrize("name", ["a.heic", "b.HEIF", "c.hif"])
def test_with_its_library_the_endings_of_heic_are_taken(name: str) -> None:
    assert images.is_picture(name)
    assert images.not_read(name) is None
