"""The catalogue of bad input: what people, cameras, copying tools and strangers drop, and what must
become of it.

Each `Case` is some files and one end: answered, rejected with a reason, or left alone. `FAMILIES`
holds them all; test_catalogue.py drops each family into one share. Pictures are built here, so that
no binary file lies in the repository. Limitations: a case can only show what its
builder thought of; test_fuzz.py looks further."""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from tests.support.heic import HAS_HEIC, heic
from tests.support.strategies import encoded, sample
from tests.support.tiffs import tiff_of

Lay = Callable[[Path], None]
End = Literal["answered", "rejected", "left"]

WIDTH, HEIGHT = 67, 41
PROMPT = b'{"points": [{"x": 0, "y": 0}]}'  # fits every picture there is
SPARSE = 100_000_000


@dataclass(frozen=True)
class Case:
    """What is dropped and what must become of it.

    `files`: by name below the input folder, their bytes, or what puts them there. `stem` is the
    prompt's name without ending, by which outputs and reports are found. `code` and `says` are of a
    rejection: the error's code, and words that its reason, place and remedy together must contain.
    `size`: of an answer's mask, width and height."""

    name: str
    end: End
    files: dict[str, bytes | Lay]
    stem: str
    code: str = ""
    says: tuple[str, ...] = ()
    size: tuple[int, int] | None = field(default=None)


def answered(
    name: str, picture: bytes, *, ending: str, prompt: bytes = PROMPT, size: Any = None
) -> Case:
    """A picture and a prompt that must be answered."""
    stem = name.replace(" ", "-")
    return Case(name, "answered", {stem + ending: picture, stem + ".json": prompt}, stem, size=size)


def refused(
    name: str, picture: bytes, *says: str, ending: str = ".jpg", prompt: bytes = PROMPT
) -> Case:
    """A picture that must be refused with these words."""
    stem = name.replace(" ", "-")
    return Case(
        name, "rejected", {stem + ending: picture, stem + ".json": prompt}, stem, "picture", says
    )


def not_understood(name: str, prompt: bytes | dict[str, Any] | Lay, *says: str) -> Case:
    """A prompt beside a sound picture that must be refused with these words."""
    stem = name.replace(" ", "-")
    body = json.dumps(prompt).encode() if isinstance(prompt, dict) else prompt
    return Case(
        name, "rejected", {stem + ".jpg": jpeg(), stem + ".json": body}, stem, "prompt", says
    )


def left(name: str, **files: bytes | Lay) -> Case:
    """Files that are nobody's business; `__` in a name stands for a dot."""
    return Case(name, "left", {k.replace("__", "."): v for k, v in files.items()}, name)


# ── pictures ──


def jpeg(width: int = WIDTH, height: int = HEIGHT, **options: Any) -> bytes:
    """A JPEG of coloured quarters."""
    return encoded(sample(width, height), "JPEG", **options)


@lru_cache
def noise(kind: str, side: int = 200) -> bytes:
    """A picture with enough compressed data to cut and to make holes in."""
    pixels = np.random.default_rng(1).integers(0, 255, (side, side, 3), np.uint8)
    return encoded(Image.fromarray(pixels), kind)


def png(
    width: int, height: int, bits: int, colour: int, pixels: bytes, *extra: tuple[bytes, bytes]
) -> bytes:
    """A PNG from its parts: `pixels` as compressed, `extra` chunks before them."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), *extra]
    out = b"\x89PNG\r\n\x1a\n"
    for name, body in [*chunks, (b"IDAT", pixels), (b"IEND", b"")]:
        out += (
            struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        )
    return out


def with_checksums(data: bytes) -> bytes:
    """A PNG whose chunks all have the checksum they should have, as far as they can be found."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, at)
        if at + 12 + length > len(out):
            break
        struct.pack_into(">I", out, at + 8 + length, zlib.crc32(out[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(out)


@lru_cache
def deflated_zeros(megabytes: int) -> bytes:
    """Zeros, packed a thousand to one."""
    packer, block = zlib.compressobj(9), bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(megabytes)) + packer.flush()


def tiff(*entries: tuple[int, int, int]) -> bytes:
    """A grey TIFF of 10 × 10 pixels; `entries` (tag, kind, value) come before its own of the same
    name.
    """
    usual = [
        (256, 3, 10),
        (257, 3, 10),
        (258, 3, 8),
        (259, 3, 1),
        (262, 3, 1),
        (273, 4, 8),
        (277, 3, 1),
        (279, 4, 100),
    ]
    lines = [
        struct.pack("<HHII", tag, kind, 1, value % 2**32)
        for tag, kind, value in sorted([*entries, *usual], key=first)
    ]
    return (
        b"II*\0"
        + struct.pack("<I", 108)
        + bytes(100)
        + struct.pack("<H", len(lines))
        + b"".join(lines)
        + bytes(4)
    )


def first(entry: tuple[int, int, int]) -> int:
    return entry[0]


def two_sizes_in_a_webp() -> bytes:
    """The header of a WebP of 16,000 × 2,500 pixels that claims in a second one to have a single
    pixel.
    """
    large = b"VP8L" + struct.pack("<IBIx", 6, 0x2F, (2_500 - 1) << 14 | 16_000 - 1)
    small = b"VP8X" + struct.pack("<I", 10) + bytes(10)
    return b"RIFF" + struct.pack("<I", 4 + len(large + small)) + b"WEBP" + large + small


def holed(data: bytes, share: float = 0.5, length: int = 4096) -> bytes:
    """The file with a block of zeros where its data should be, as a copy has that was not
    finished.
    """
    at = int(len(data) * share)
    return data[:at] + bytes(length) + data[at + length :]


def repeated_scans(times: int) -> bytes:
    """A JPEG whose last scan comes again and again."""
    whole = jpeg(progressive=True)
    at = whole.rindex(b"\xff\xda")
    return whole[:at] + whole[at:-2] * times + whole[-2:]


def huge_jpeg() -> bytes:
    data = bytearray(jpeg())
    struct.pack_into(">HH", data, data.index(b"\xff\xc0") + 5, 65_500, 65_500)
    return bytes(data)


def huge_gif() -> bytes:
    data = bytearray(encoded(sample(), "GIF"))
    struct.pack_into("<HH", data, 6, 65_500, 65_500)
    return bytes(data)


def heif_of_another_kind() -> bytes:
    """A HEIF whose picture is in JPEG 2000."""
    return encoded(sample(), "AVIF").replace(b"av01", b"j2k1")


def long_line(ending: str) -> bytes:
    """65,000 × 1 pixels."""
    return cv2.imencode(ending, np.full((1, 65_000, 3), 90, np.uint8))[1].tobytes()


def deep(channels: int, ending: str = ".png") -> bytes:
    """16 bits a sample."""
    values = (
        np.arange(WIDTH * HEIGHT * channels, dtype=np.uint16).reshape(HEIGHT, WIDTH, channels) * 7
    )
    return cv2.imencode(ending, values)[1].tobytes()


def blank_page(**options: Any) -> bytes:
    """A JPEG whose compressed data are thousands of zeros, and rightly so."""
    data = encoded(Image.new("L", (2000, 2000)), "JPEG", optimize=True, **options)
    assert bytes(10_000) in data
    return data


def bad_profile() -> PngInfo:
    info = PngInfo()
    info.add(b"iCCP", b"bad\0\0xxxx")
    return info


def sound() -> Iterator[Case]:
    """Odd, but pictures: they are answered."""
    size = (WIDTH, HEIGHT)
    picture = sample()
    other = ImageOps.invert(sample())
    rgba = picture.convert("RGBA")
    rgba.putalpha(128)
    frames: dict[str, Any] = {"save_all": True, "append_images": [other]}
    for turn in range(1, 9):
        upright = size if turn < 5 else size[::-1]
        yield answered(
            f"EXIF orientation {turn}", jpeg(orientation=turn), ending=".jpg", size=upright
        )
    made = [
        ("trailing bytes after a JPEG", jpeg() + b"\0" * 5000 + b"appended", ".jpg"),
        ("trailing bytes after a PNG", encoded(picture) + b"\0" * 5000 + b"appended", ".png"),
        ("16-bit grey PNG", deep(1), ".png"),
        ("16-bit RGB PNG", deep(3), ".png"),
        ("16-bit RGB TIFF", deep(3, ".tiff"), ".tiff"),
        ("TIFF in Zstandard compression", encoded(picture, "TIFF", compression="zstd"), ".tif"),
        (
            "TIFF of five samples",
            tiff_of(np.zeros((HEIGHT, WIDTH, 5), np.uint8), 2, extra=(0, 0)),
            ".tif",
        ),
        ("a jfif", jpeg(), ".jfif"),
        ("CMYK JPEG", encoded(picture.convert("CMYK"), "JPEG"), ".jpg"),
        ("CMYK TIFF", encoded(picture.convert("CMYK"), "TIFF"), ".tif"),
        ("PNG with alpha", encoded(rgba), ".png"),
        ("TIFF with alpha", encoded(rgba, "TIFF"), ".tiff"),
        ("PNG with palette", encoded(picture.quantize(20)), ".png"),
        ("black and white BMP", encoded(picture.convert("1"), "BMP"), ".bmp"),
        ("animated PNG", encoded(picture, "PNG", **frames), ".png"),
        ("animated WebP", encoded(picture, "WEBP", **frames), ".webp"),
        ("GIF", encoded(picture, "GIF"), ".gif"),
        ("animated GIF", encoded(picture, "GIF", **frames), ".GIF"),
        ("AVIF", encoded(picture, "AVIF"), ".avif"),
        ("animated AVIF", encoded(picture, "AVIF", **frames), ".avif"),
        ("an AVIF called jpg", encoded(picture, "AVIF"), ".jpg"),
        ("TIFF of two pages", encoded(picture, "TIFF", **frames), ".tif"),
        ("a PNG called jpg", encoded(picture), ".jpg"),
        ("a JPEG called TIFF", jpeg(), ".TIFF"),
        ("corrupt EXIF", jpeg(exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), ".jpg"),
        (
            "EXIF that points in a circle",
            jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\x08\0\0\0"),
            ".jpg",
        ),
        ("corrupt ICC in a JPEG", jpeg(icc_profile=b"junk" * 100), ".jpg"),
        ("corrupt ICC in a PNG", encoded(picture, pnginfo=bad_profile()), ".png"),
    ]
    yield from (answered(name, data, ending=ending, size=size) for name, data, ending in made)
    if HAS_HEIC:
        yield answered("HEIC", heic(picture), ending=".heic", size=size)
        yield answered("turned HEIC", heic(picture, 6), ending=".HEIC", size=size[::-1])
        both = heic(picture, None, other)
        yield answered("HEIC of two pictures", both, ending=".heif", size=size)
    bomb = (b"zTXt", b"Comment\0\0" + deflated_zeros(64))
    grey = zlib.compress(bytes((WIDTH + 1) * HEIGHT))
    yield answered(
        "PNG with a bomb in its comment",
        png(WIDTH, HEIGHT, 8, 0, grey, bomb),
        ending=".png",
        size=size,
    )
    yield answered(
        "blank page whose data are zeros", blank_page(), ending=".jpg", size=(2000, 2000)
    )
    yield answered("1 by 1", encoded(sample(1, 1)), ending=".png", size=(1, 1))
    yield answered("65,000 by 1 JPEG", long_line(".jpg"), ending=".jpg", size=(65_000, 1))
    yield answered("65,000 by 1 PNG", long_line(".png"), ending=".png", size=(65_000, 1))


def broken() -> Iterator[Case]:
    """What cannot be a picture, or is not all there."""
    whole = {kind: noise(kind) for kind in ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "AVIF")}
    yield refused("empty", b"", "empty", "copy the file again")
    for kind, cut in [
        ("JPEG", 1), ("JPEG", 200), ("JPEG", 0.5), ("JPEG", -2), ("PNG", 7), ("PNG", 0.5),
        ("PNG", -12),
        ("TIFF", 0.9), ("BMP", 0.5), ("WEBP", 0.5),
    ]:  # fmt: skip
        end = int(len(whole[kind]) * cut) if isinstance(cut, float) else cut
        yield refused(
            f"{kind} cut off at {cut:g}",
            whole[kind][:end],
            "truncated",
            "again",
            ending=f".{kind.lower()}",
        )
    for kind in ("JPEG", "PNG"):
        yield refused(
            f"{kind} with a hole of zeros",
            holed(whole[kind]),
            "zeros from byte",
            "copy the file again",
        )
    yield refused(
        "JPEG whose second half is zeros", holed(whole["JPEG"], 0.5, 10**6), "truncated", "again"
    )
    yield refused("nothing but zeros", bytes(10_000), "zeros from byte 0")
    yield refused(
        "PNG with a flipped bit", flipped(whole["PNG"]), "checksum", "IDAT", ending=".png"
    )
    yield refused(
        "PNG bomb",
        png(50_000, 50_000, 8, 0, deflated_zeros(64)),
        "2,500,000,000",
        "limit",
        ending=".png",
    )
    yield refused(
        "PNG of two billion pixels a side",
        png(2**31 - 1, 2**31 - 1, 8, 2, b""),
        "limit",
        ending=".png",
    )
    yield refused("PNG without pixels", png(0, 0, 8, 2, b""), "no pixels", ending=".png")
    twice = [(256, 4, 20_000), (257, 4, 20_000)]
    lerc = tiff_of(np.zeros((HEIGHT, WIDTH, 3), np.uint8), 2, t259=(34887,))
    yield refused("TIFF in LERC compression", lerc, "LERC", "COMPRESS=DEFLATE", ending=".tif")
    yield refused(
        "TIFF that names its size twice", tiff(*twice), "400,000,000", "limit", ending=".tif"
    )
    signed = [(256, 9, -1), (257, 9, 10)]
    yield refused("TIFF of a negative size", tiff(*signed), "no pixels", ending=".tif")
    yield refused("JPEG with a huge header", huge_jpeg(), "65500 × 65500", "limit")
    yield refused("JPEG of a thousand scans", repeated_scans(1000), "scans", "save it")
    yield refused(
        "float TIFF",
        encoded(Image.new("F", (9, 9)), "TIFF"),
        "floating-point",
        "save it",
        ending=".tiff",
    )
    yield refused(
        "32-bit TIFF", encoded(Image.new("I", (9, 9)), "TIFF"), "32-bit", "save it", ending=".tiff"
    )
    yield refused("GIF of a huge screen", huge_gif(), "65500 × 65500", "limit", ending=".gif")
    brand = b"\0\0\0\x18ftypheic" + bytes(12)
    yield refused("HEIC cut off after its first box", brand, "truncated", ending=".avif")
    yield refused("HEIC called jpg", heif_of_another_kind(), "AV1 or HEVC", "j2k1")
    yield refused(
        "AVIF with a hole of zeros",
        holed(noise("AVIF")),
        "zeros from byte",
        "copy the file again",
        ending=".avif",
    )
    yield refused("JPEG 2000 called jpg", b"\0\0\0\x0cjP  \r\n", "JPEG 2000", "JPEG, PNG")
    yield refused("web page called jpg", b"<!DOCTYPE html><html>log in</html>", "HTML page")
    yield refused("prompt called jpg", PROMPT, "JSON")
    yield refused("text called png", b"\x1b[31mred\nlines", "not a picture", ending=".png")
    yield refused("noise called jpg", np.random.default_rng(3).bytes(5000), "not a picture")
    yield refused(
        "not the picture meant", jpeg(), "image_bytes", prompt=PROMPT[:-1] + b', "image_bytes": 5}'
    )


def flipped(data: bytes) -> bytes:
    at = data.index(b"IDAT") + 99
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


# ── names ──


def named(
    name: str, stem: str, end: End = "answered", code: str = "", says: tuple[str, ...] = ()
) -> Case:
    return Case(name, end, {stem + ".jpg": jpeg(), stem + ".json": PROMPT}, stem, code, says)


def names() -> Iterator[Case]:
    """Names that a file system allows."""
    yield named("spaces", " two  words ")
    yield named("a line break", "two\nlines")
    yield named("terminal controls", "\x1b[2J\x1b[31mred\r\a")
    yield named("right to left", "\u202egpj.exe\u200f")
    yield named("emoji", "🐕\u200d🦺")
    yield named("not UTF-8", os.fsdecode(b"caf\xe9 \xff\xfe"))
    yield named("format strings", "{0.__class__} %s {} %n ${HOME} $(id)")
    yield named("markup", "<red>[bold]&amp;'\"`")
    yield named("options", "--help -rf")
    yield named("percent and backslash", "%2e%2e%2f..\\..\\etc")
    for what, files in [("picture", (b"", PROMPT)), ("prompt", (jpeg(), b"{"))]:
        stem = f"bad\n{what}\x1b[31m\u202e"
        dropped = dict(zip((stem + ".jpg", stem + ".json"), files, strict=True))
        yield Case(f"bad {what}, bad name", "rejected", dropped, stem, what, ("again",))
    yield named("as long as outputs allow", "x" * 230)
    yield named("255 bytes", "x" * 250, "rejected", "input", ("too long", "at most 231 bytes"))
    yield named(
        "255 bytes of umlauts", "ü" * 125, "rejected", "input", ("too long", "at most 231 bytes")
    )


# ── things ──


def pipe(path: Path) -> None:
    os.mkfifo(path)


def socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def folder(path: Path) -> None:
    path.mkdir()


def link_out(body: bytes) -> Lay:
    """A link to a file beside the share."""

    def lay(path: Path) -> None:
        outside = path.parents[2] / f"outside-{path.name}"
        outside.write_bytes(body)
        path.symlink_to(outside)

    return lay


def link_to_folder(path: Path) -> None:
    outside = path.parents[2] / "outside-folder"
    outside.mkdir()
    (outside / "secret.jpg").write_bytes(jpeg())
    (outside / "secret.json").write_bytes(PROMPT)
    path.symlink_to(outside)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def things() -> Iterator[Case]:
    """What is no file of ours, and stays where it is."""
    yield left("a link out of the tree", link__jpg=link_out(jpeg()), link__json=PROMPT)
    yield left("a prompt that is a link", linked__jpg=jpeg(), linked__json=link_out(PROMPT))
    yield left("a linked folder", folders=link_to_folder)
    yield left("a link to itself", loop__jpg=link_to_itself, loop__json=PROMPT)
    yield left("a pipe for a picture", pipe__jpg=pipe, pipe__json=PROMPT)
    yield left("a pipe for a prompt", piped__jpg=jpeg(), piped__json=pipe)
    yield left("a socket", socket__jpg=socket, socket__json=PROMPT)
    yield left("a folder called jpg", folder__jpg=folder, folder__json=PROMPT)
    yield left("a folder called json", named__jpg=jpeg(), named__json=folder)
    yield left(".DS_Store", __DS_Store=b"\0\0\0\1Bud1")
    yield left("a Mac's shadow files", **{"._dog__jpg": b"\0\5\26\7", "._dog__json": b"\0\5\26\7"})
    yield left("Thumbs.db", Thumbs__db=b"\xd0\xcf\x11\xe0")
    yield left("half an upload", upload__jpg__part=jpeg()[:99], upload__jpg__crdownload=b"")
    yield left("a picture alone", alone__jpg=jpeg())
    yield left("a prompt alone", alone_too__json=PROMPT)
    yield left("another file", notes__txt=b"notes")


# ── prompts ──


def sparse(path: Path) -> None:
    """100 MB that take no room."""
    with path.open("wb") as file:
        file.write(PROMPT)
        file.truncate(SPARSE)


def prompts() -> Iterator[Case]:
    """Prompt files that cannot be read."""
    text = PROMPT.decode()
    yield not_understood("empty prompt", b"", "empty", "line 1")
    yield not_understood("only spaces", b" \n\t", "empty", "line 1")
    yield answered("byte order mark", jpeg(), ending=".jpg", prompt=b"\xef\xbb\xbf" + PROMPT)
    yield not_understood("UTF-16", text.encode("utf-16"), "UTF-16", "save it as UTF-8")
    yield not_understood(
        "UTF-16 without mark", text.encode("utf-16-be"), "UTF-16", "save it as UTF-8"
    )
    yield not_understood("UTF-32", text.encode("utf-32"), "UTF-32", "save it as UTF-8")
    yield not_understood(
        "Latin-1", '{\n"label": "é"}'.encode("latin-1"), "Latin-1", "line 2", "save it as UTF-8"
    )
    yield not_understood("cut off", PROMPT[:-9], "not JSON", "line 1, column", "cut off")
    yield not_understood("trailing data", PROMPT + b"\n{}", "follows the end", "line 2")
    yield not_understood(
        "trailing comma", PROMPT[:-1] + b",}", "not JSON", "no comma after the last entry"
    )
    yield not_understood(
        "Python, not JSON", text.replace('"', "'").encode(), "double quotes", "column 2"
    )
    yield not_understood("a list", b"[1, 2]", "not a JSON object", "a list")
    yield not_understood("a picture called json", jpeg(), "not UTF-8", "line 1")
    yield not_understood("100 MB", sparse, "larger than 4,194,304 bytes", "split it")
    yield not_understood("10,000 levels deep", b'{"a":' * 10_000, "nested more than 16", "line 1")
    yield not_understood(
        "17 levels deep", b'{"a":' * 17 + b"1" + b"}" * 17, "nested more than 16", "a.a.a"
    )
    yield not_understood(
        "a million lists", b'{"points": [' + b"[]," * 10**6 + b"[]]}", "at most 10000"
    )
    yield not_understood(
        "duplicate keys", b'{"points": [{"x": 1, "x": 2, "y": 3}]}', "given twice", "points[0].x"
    )
    yield not_understood(
        "lone surrogate", rb'{"label": "\ud800", "points": []}', "surrogate", "label"
    )
    yield not_understood(
        "line break in a string", b'{"label": "a\nb"}', "not JSON", "line 1, column"
    )
    yield not_understood("zero bytes", bytes(500), "ends in zero bytes", "copy it again")


def values() -> Iterator[Case]:
    """Prompt files whose words are known and whose values make no sense."""
    box = {"x0": 5, "y0": 5, "x1": 30, "y1": 30}

    def point(x: str, label: str = "1") -> bytes:
        return f'{{"points": [{{"x": {x}, "y": 2, "label": {label}}}]}}'.encode()

    for number in ("NaN", "Infinity", "1e999"):
        yield not_understood(number, point(number), "not a finite number", "points[0].x")
    yield not_understood(
        "5,000-digit integer", point("9" * 5000), "not a finite number", "points[0].x"
    )
    yield not_understood(
        "number in quotes", point('"12"'), "the text", "points[0].x", "without quotes"
    )
    yield not_understood("boolean as number", point("true"), "it is true", "points[0].x")
    yield not_understood("label 2", point("1", "2"), "not 0 or 1", "points[0].label")
    yield not_understood("label -1", point("1", "-1"), "not 0 or 1", "points[0].label")
    yield not_understood("label true", point("1", "true"), "not 0 or 1", "points[0].label")
    yield not_understood("no foreground", point("1", "0"), "no foreground", "points", "label 1")
    yield not_understood(
        "point outside", point("68"), "outside the picture", "67×41", "points[0].x"
    )
    yield not_understood(
        "box far outside", {"box": {**box, "x1": 500}}, "outside", "67×41", "box.x1"
    )
    yield not_understood(
        "box inside out", {"box": {**box, "x0": 40}}, "inside out", "box", "swapped"
    )
    yield not_understood("box without width", {"box": {**box, "x1": 5}}, "no width", "box")
    yield not_understood(
        "box without a side", {"box": {"x0": 1, "y0": 1, "x1": 9}}, "missing", "box.y1"
    )
    yield not_understood("box as list", {"box": [1, 2, 3, 4]}, "an object", "box")
    yield not_understood("null", {"box": None}, "null", "box", "leave the key out")
    yield not_understood("unknown key", {"bbox": box}, "unknown key", "bbox", "did you mean box")
    yield not_understood(
        "unknown model", {"box": box, "model": "sam9"}, "unknown key", "model", "known here"
    )
    triangle = b'{"polygon": [[5, 5], [60, 8], [30, 44.5]]}'
    yield answered("polygon", jpeg(), ending=".jpg", prompt=triangle)
    mask = {"size": [41, 67], "counts": [1000, 41, 1706]}
    rough = json.dumps({"mask": mask}).encode()
    yield answered("mask", jpeg(), ending=".jpg", prompt=rough)
    yield not_understood(
        "polygon far outside", {"polygon": [[5, 5], [90, 9], [9, 9]]}, "67×41", "polygon[1][0]"
    )
    yield not_understood(
        "mask file", {"mask": "rough.png"}, "not the name of a mask file", "mask", ".rough.png"
    )
    yield not_understood(
        "mask of another size",
        {"mask": {**mask, "size": [67, 41]}},
        "is 41×67",
        "67×41",
        "mask.size",
    )
    yield not_understood("nothing asked for", {"label": "dog"}, "requests nothing", "top level")
    yield not_understood(
        "two forms", {"box": box, "objects": [{"box": box}]}, "several forms", "box"
    )
    yield not_understood(
        "10,001 points", {"points": [{"x": 1, "y": 1}] * 10_001}, "10001 points", "at most 10000"
    )
    for name in ("../../etc/passwd", "/etc/passwd", "..", "a\\b.jpg", "a\0.jpg", "dog\n.jpg"):
        title = f"picture named {name!r}".replace("/", "|").replace("\\", "|")
        yield not_understood(title, {"box": box, "image": name}, "not a plain file name", "image")
    control = {"box": box, "label": "dog\x1b[31m\n"}
    yield not_understood("label with controls", control, "control characters", "label")
    odd = "../../{0.__class__} %s ${HOME} $(id) <red>"
    yield answered(
        "label that is a path and a format", jpeg(), ending=".jpg", prompt=prompt_of(odd)
    )


def prompt_of(label: str) -> bytes:
    return json.dumps({"label": label, "points": [{"x": 3, "y": 3}]}).encode()


FAMILIES: dict[str, list[Case]] = {
    "sound": list(sound()),
    "broken": list(broken()),
    "names": list(names()),
    "things": list(things()),
    "prompts": list(prompts()),
    "values": list(values()),
}
