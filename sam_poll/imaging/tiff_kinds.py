"""The kinds of TIFF that can be read, and by which decoder; others are refused by their kind.

A table over the tags of a TIFF's directory. OpenCV reads the usual kinds; Pillow those with a
compression that OpenCV's libtiff lacks (LZMA, Zstandard) or with samples that it does not unpack (2
and 4 bits). Kinds that neither of them supports, such as five samples a pixel, are read sample by
sample (`tiff_samples`) where their compression allows that.

Limitations: a kind that is not in these tables is left to OpenCV, which may fail; the error then
names the kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sam_poll.core.errors import PictureError

Decoder = Literal["opencv", "pillow", "samples"]

# Samples a pixel, without extra ones
COLOURS = {"grey": 1, "rgb": 3, "palette": 1, "cmyk": 4, "ycbcr": 3, "lab": 3}
COMPRESSIONS = {  # TIFF 6.0, its supplements, and libtiff's tiff.h
    1: "none",
    2: "CCITT RLE",
    3: "CCITT fax 3",
    4: "CCITT fax 4",
    5: "LZW",
    6: "old-style JPEG",
    7: "JPEG",
    8: "deflate",
    32766: "NeXT",
    32773: "PackBits",
    32809: "ThunderScan",
    32946: "deflate",
    34661: "JBIG",
    34712: "JPEG 2000",
    34887: "LERC",
    34925: "LZMA",
    50000: "Zstandard",
    50001: "WebP",
    50002: "JPEG XL",
}
NOT_READ = {32766, 32809, 34661, 34712, 34887, 50001, 50002}
PILLOW_ONLY = {34925: "lzma", 50000: "zstd"}  # as Pillow calls them
# Compressions of bytes that do not depend on what the samples mean
_OF_PLAIN_SAMPLES = {1, 5, 8, 32773, 32946, 34925, 50000}
BITS = {  # per sample; what OpenCV and Pillow read in tests, of 1 to 16
    "grey": (1, 2, 4, 8, 10, 12, 14, 16),
    "rgb": (8, 10, 12, 14, 16),
    "palette": (1, 2, 4, 8),
    "cmyk": (8,),
    "ycbcr": (8,),
    "lab": (8, 16),
}
_OTHER_COMPRESSION = (
    "save it with deflate or LZW compression: gdal_translate -co COMPRESS=DEFLATE IN OUT.tif"
)
_FEWER_SAMPLES = "keep the samples to be shown: gdal_translate -b 1 -b 2 -b 3 IN OUT.tif"
_EIGHT_BITS = "save it with 8 or 16 bits a sample, or as PNG"


@dataclass(frozen=True, slots=True)
class TiffKind:
    """The samples of a TIFF.

    `mode` is as in `Header`; `bits` are those of each sample (one number where all are equal);
    `samples` is their number per pixel, `alphas` the number of those that are transparency.
    `compression` is its TIFF number. `planes`: each sample has a plane of its own; `tiled`: the
    picture is stored in tiles.
    """

    mode: str
    bits: tuple[int, ...]
    samples: int
    alphas: int
    compression: int
    planes: bool
    tiled: bool

    @property
    def extra(self) -> int:
        """Number of samples in addition to those of the colours."""
        return self.samples - COLOURS.get(self.mode, 1)

    @property
    def compressed(self) -> str:
        """The compression's name, or its number."""
        return COMPRESSIONS.get(self.compression, f"number {self.compression}")


def several_bands(kind: TiffKind) -> bool:
    """Return whether a picture declared as grey has at least three samples to be shown.

    GDAL writes 16-bit colours so.
    """
    shown = kind.samples - kind.alphas
    return (
        kind.mode == "grey"
        and shown >= 3
        and set(kind.bits) <= {8, 16}
        and kind.compression in _OF_PLAIN_SAMPLES
    )


def decoder_for(kind: TiffKind) -> Decoder:
    """Return the decoder for a TIFF of this kind.

    Raises PictureError for a kind that cannot be read, naming its compression, depth or number of
    samples.
    """
    if kind.compression in NOT_READ:
        raise PictureError(
            f"a TIFF with {kind.compressed} compression cannot be read", remedy=_OTHER_COMPRESSION
        )
    if len(set(kind.bits)) > 1:
        depths = ", ".join(map(str, kind.bits))
        raise PictureError(
            f"a TIFF of samples of {depths} bits cannot be read: they differ", remedy=_EIGHT_BITS
        )
    bits = kind.bits[0]
    if bits not in BITS.get(kind.mode, (bits,)):
        raise PictureError(
            f"a TIFF of {bits}-bit {kind.mode} samples cannot be read", remedy=_EIGHT_BITS
        )
    if (
        kind.mode in ("grey", "rgb")
        and bits in (8, 16)
        and kind.compression in _OF_PLAIN_SAMPLES
        and _unusual(kind)
    ):
        return "samples"
    if kind.planes and bits > 8:
        raise PictureError(
            f"a TIFF of {bits}-bit samples in planes of their own cannot be read",
            remedy=_EIGHT_BITS,
        )
    if kind.extra > _extra_allowed(kind):
        what = (
            f"{kind.samples} samples a pixel "
            f"({kind.mode}, {bits}-bit, compression: {kind.compressed})"
        )
        raise PictureError(f"a TIFF of {what} cannot be read", remedy=_FEWER_SAMPLES)
    packed = bits in (2, 4) and kind.mode in ("grey", "palette")
    return "pillow" if packed or kind.compression in PILLOW_ONLY else "opencv"


def _unusual(kind: TiffKind) -> bool:
    """Return whether OpenCV (4.11, 5.0) cannot read these samples, or reads them wrongly.

    That is so for planes of 16 bits, tiles of grey with an extra sample, and uncompressed tiles
    whose number of bytes is not a multiple of 1,024.
    """
    if kind.compression in PILLOW_ONLY or kind.extra > 1:
        return True
    if kind.tiled and kind.compression == 1:
        return True
    if kind.mode == "grey":
        return kind.extra == 1
    return kind.planes and kind.bits[0] == 16


def _extra_allowed(kind: TiffKind) -> int:
    """Return the number of extra samples that the decoder (OpenCV or Pillow) ignores."""
    bits = kind.bits[0]
    if kind.compression in PILLOW_ONLY:
        return 0
    if kind.mode == "grey":
        return 3 if bits == 8 else 0
    if kind.mode == "palette":
        return 1 if bits == 8 else 0
    return 1 if kind.mode == "rgb" else 0
