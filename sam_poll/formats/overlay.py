"""Overlays, `.overlay.jpg`: the picture with masks, prompts, labels and scores drawn on it.

Drawn at the scale at which the picture was decoded, at most `overlay_max_side` pixels long; line
widths and text scale with it. The colour of an object depends on its number, so the same job always
looks the same. The smaller object is drawn over the larger, as in the mask PNG. Lines have a dark
seam, so that they are visible on any background.

Limitations: an overlay is lossy and scaled; measure on the mask PNG. With hundreds of crowded
objects, labels without a free place are left out. Characters that the bundled font lacks (it has
Latin, Greek and Cyrillic) are shown as boxes.
"""

from __future__ import annotations

import colorsys
import io
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import resources
from itertools import chain
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from sam_poll.core.errors import InputError
from sam_poll.core.protocols import Format
from sam_poll.core.types import (
    Box,
    Mask,
    OutputFile,
    Picture,
    Point,
    Prompt,
    Result,
    RgbArray,
    Size,
)
from sam_poll.formats.common import paint_order, published_score
from sam_poll.formats.registry import FormatOptions
from sam_poll.imaging.contours import contours

Colour: TypeAlias = tuple[int, int, int]  # RGB
# Left, top, right, bottom of a label in pixels; right and bottom exclusive
Rect: TypeAlias = tuple[int, int, int, int]

SUFFIX = ".overlay.jpg"
QUALITY = 90  # lower values smear the coloured lines
FILL = 0.42  # opacity of an object's fill: the colour is clear, the picture still visible
SEAM = 0.50  # opacity of the dark line under every line
CROWD = 24  # up to this number, all objects are labelled, even if labels overlap
SHIFT = 4  # cv2 takes coordinates in units of 1/16 pixel
FOREGROUND: Colour = (34, 197, 94)
BACKGROUND: Colour = (239, 68, 68)
# Chosen by eye: bright enough for a thin line, neighbours far apart in hue.
PALETTE: tuple[Colour, ...] = (
    (56, 189, 248),
    (251, 113, 133),
    (250, 204, 21),
    (192, 132, 252),
    (74, 222, 128),
    (251, 146, 60),
    (45, 212, 191),
    (244, 114, 182),
    (163, 230, 53),
    (129, 140, 248),
)
_FONT = "data/fonts/DejaVuSansCondensed-Bold.subset.ttf"


@dataclass(frozen=True, slots=True)
class _Scale:
    """The scale from the full picture to the canvas, and line and text sizes on the canvas."""

    x: float
    y: float
    line: int  # px of an outline
    text: int  # px of the font

    @classmethod
    def of(cls, full: Size, canvas: RgbArray) -> _Scale:
        height, width = canvas.shape[:2]
        longest = max(width, height)
        return cls(
            width / full.width,
            height / full.height,
            max(2, round(longest / 600)),
            max(11, round(longest / 58)),
        )

    def fixed(self, points: npt.ArrayLike, pixel: float = 0.0) -> npt.NDArray[np.int32]:
        """Convert N×2 coordinates of the full picture to fixed-point coordinates of the canvas.

        `pixel` is 0.5 for points that name whole pixels, whose centres are half a pixel further.
        """
        moved = (np.asarray(points, np.float64).reshape(-1, 2) + pixel) * (self.x, self.y) - 0.5
        return np.rint(moved * (1 << SHIFT)).astype(np.int32)


def make(options: FormatOptions) -> Format:
    """Return the format `overlay` for these options. Reads the bundled font."""
    font = resources.files("sam_poll").joinpath(_FONT).read_bytes()
    return partial(overlay, options=options, font=font)


def overlay(result: Result, options: FormatOptions, font: bytes) -> Sequence[OutputFile]:
    """Return one JPEG; nothing where the result has no picture."""
    if result.picture is None:
        return []
    canvas = draw(result, result.picture, options, font)
    done, body = cv2.imencode(
        ".jpg", cv2.cvtColor(canvas, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    )
    if not done:
        raise InputError(
            f"an overlay of {canvas.shape[1]}×{canvas.shape[0]} cannot be written as JPEG"
        )
    return [OutputFile(SUFFIX, "image/jpeg", body.tobytes())]


def draw(result: Result, picture: Picture, options: FormatOptions, font: bytes) -> RgbArray:
    """Return the finished overlay: uint8, h×w×3, RGB. `font` is a TrueType file."""
    canvas = draw_shapes(result, picture, options)
    return _labelled(canvas, result, _Scale.of(result.size, canvas), font)


def draw_shapes(result: Result, picture: Picture, options: FormatOptions) -> RgbArray:
    """Return the overlay without labels: uint8, h×w×3, RGB."""
    ground = scaled_down(picture.pixels, options.overlay_max_side)
    canvas = ground.copy()
    scale = _Scale.of(result.size, canvas)
    order = paint_order(result.masks)
    for index in order:
        _fill(canvas, ground, result.masks[index], scale, colour(index + 1))
    outlines = [_outline(result.masks[index], scale, options) for index in order]
    _stroke(canvas, outlines, [colour(index + 1) for index in order], scale.line)
    boxes = [
        (_dashes(p.box, scale), colour(n))
        for n, p in enumerate(result.prompts, 1)
        if p.box is not None
    ]
    _stroke(
        canvas,
        [lines for lines, _ in boxes],
        [c for _, c in boxes],
        max(2, scale.line - 1),
        closed=False,
    )
    for point in chain.from_iterable(prompt.points for prompt in result.prompts):
        _point(canvas, point, scale)
    return canvas


def colour(number: int) -> Colour:
    """Return the colour of object `number`, from 1.

    The palette comes first, then hues a golden angle apart in two brightnesses.
    """
    if number <= len(PALETTE):
        return PALETTE[number - 1]
    rgb = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.62, 0.98 if number % 2 else 0.78)
    red, green, blue = (round(255 * part) for part in rgb)
    return red, green, blue


# -- shapes --------------------


def scaled_down(pixels: RgbArray, max_side: int) -> RgbArray:
    """Return the picture, scaled down to at most `max_side`."""
    height, width = pixels.shape[:2]
    shrink = max_side / max(height, width)
    if shrink >= 1:
        return pixels
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    return np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8)


def _fill(canvas: RgbArray, ground: RgbArray, mask: Mask, scale: _Scale, tint: Colour) -> None:
    """Paint the tinted picture where the mask is, over any larger object.

    The edges are soft where the canvas is smaller than the mask.
    """
    if not mask.pixels.size:
        return
    height, width = mask.pixels.shape
    left, top = int(mask.left * scale.x), int(mask.top * scale.y)
    right = min(canvas.shape[1], max(left + 1, round((mask.left + width) * scale.x)))
    bottom = min(canvas.shape[0], max(top + 1, round((mask.top + height) * scale.y)))
    whole = np.ascontiguousarray(mask.pixels).view(np.uint8) * np.uint8(255)
    coverage = np.asarray(
        cv2.resize(whole, (right - left, bottom - top), interpolation=cv2.INTER_AREA), np.uint8
    )
    here = slice(top, bottom), slice(left, right)
    tinted = cv2.addWeighted(ground[here], 1 - FILL, np.full_like(ground[here], tint), FILL, 0)
    _blend(canvas[here], coverage, np.asarray(tinted, np.uint8), 1.0)


def _blend(
    canvas: RgbArray, coverage: npt.NDArray[np.uint8], paint: RgbArray, opacity: float
) -> None:
    """Mix the paint (h×w×3) into the canvas, in place, where `coverage` (h×w, 0…255) is set."""
    alpha = coverage * np.float32(opacity / 255)
    canvas[:] = cv2.blendLinear(paint, canvas, alpha, 1 - alpha)


def _outline(mask: Mask, scale: _Scale, options: FormatOptions) -> list[npt.NDArray[np.int32]]:
    """Return the contours that the other formats write, with holes, in canvas coordinates."""
    parts = contours(mask, tolerance_px=options.tolerance_px, min_area_px=options.min_area_px)
    return [scale.fixed(polygon, 0.5) for part in parts for polygon in (part.points, *part.holes)]


def _stroke(
    canvas: RgbArray,
    shapes: Sequence[Sequence[npt.NDArray[np.int32]]],
    colours: Sequence[Colour],
    line: int,
    *,
    closed: bool = True,
) -> None:
    """Draw polylines over one common dark seam, so that neighbours do not darken each other."""
    if not any(shapes):
        return
    seam = np.zeros(canvas.shape[:2], np.uint8)
    for lines in shapes:
        cv2.polylines(
            seam, list(lines), closed, 255, line + 2 * max(1, line // 2), cv2.LINE_AA, SHIFT
        )
    _blend(canvas, seam, np.zeros_like(canvas), SEAM)
    for lines, tint in zip(shapes, colours, strict=True):
        cv2.polylines(canvas, list(lines), closed, tint, line, cv2.LINE_AA, SHIFT)


def _dashes(box: Box, scale: _Scale) -> list[npt.NDArray[np.int32]]:
    """Return a box as dashed lines.

    Each side has an odd number of equal pieces, of which every other one is drawn, so that corners
    meet.
    """
    corners = np.array(
        [[box.x0, box.y0], [box.x1, box.y0], [box.x1, box.y1], [box.x0, box.y1]], np.float64
    )
    dashes = []
    for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        length = float(np.hypot(*((end - start) * (scale.x, scale.y))))
        pieces = 2 * round(length / (12 * scale.line)) + 1
        stops = np.linspace(start, end, pieces + 1)
        dashes += [scale.fixed(stops[i : i + 2]) for i in range(0, pieces, 2)]
    return dashes


def _point(canvas: RgbArray, point: Point, scale: _Scale) -> None:
    """Draw a click: green for foreground, red for background, with a white ring and a dark seam."""
    ((x, y),) = scale.fixed([point.x, point.y]).tolist()
    radius = max(3.0, scale.text / 3.2)
    ring = max(1.5, scale.text / 8)
    tint = FOREGROUND if point.label else BACKGROUND
    for reach, shade in (
        (radius + 1.7 * ring, (20, 20, 20)),
        (radius + ring, (255, 255, 255)),
        (radius, tint),
    ):
        cv2.circle(canvas, (x, y), round(reach * (1 << SHIFT)), shade, -1, cv2.LINE_AA, SHIFT)


# -- labels --------------------


def _labelled(canvas: RgbArray, result: Result, scale: _Scale, font_file: bytes) -> RgbArray:
    """Draw a label at each mask in the object's colour; at the prompt where the mask is empty."""
    font = ImageFont.truetype(
        io.BytesIO(font_file), scale.text, layout_engine=ImageFont.Layout.BASIC
    )
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    taken: list[Rect] = []
    forced = len(result.masks) <= CROWD
    for index in reversed(paint_order(result.masks)):  # smallest first: it has the fewest places
        mask = result.masks[index]
        anchor = _anchor(
            mask, result.prompts[index] if index < len(result.prompts) else None, scale
        )
        text = _shortened(caption(mask), font, 0.6 * image.width)
        pad = max(2, scale.text // 4)
        ascent, descent = font.getmetrics()
        size = round(font.getlength(text)) + 2 * pad, ascent + descent + pad
        rect = _place(anchor, size, image.size, taken, forced)
        if rect is None:
            continue
        taken.append(rect)
        _tag(pen, rect, text, font, colour(index + 1), pad)
    return np.array(image)


def caption(mask: Mask) -> str:
    """Return a label and its score on one line; unprintable characters are replaced."""
    text = "".join(map(_printable, mask.label))
    score = published_score(mask.score)
    return text if score is None else f"{text} {score:.2f}"


def _printable(character: str) -> str:
    if character.isspace():
        return " "
    return "\ufffd" if unicodedata.category(character).startswith("C") else character


def _anchor(mask: Mask, prompt: Prompt | None, scale: _Scale) -> Rect:
    """Return the rectangle on the canvas that a label belongs to."""
    box = Box(0.0, 0.0, 0.0, 0.0)
    if mask.pixels.size:
        height, width = mask.pixels.shape
        box = Box(mask.left, mask.top, mask.left + width, mask.top + height)
    elif prompt and prompt.box:
        box = prompt.box
    elif prompt and prompt.points:
        point = prompt.points[0]
        box = Box(point.x, point.y, point.x, point.y)
    return (
        round(box.x0 * scale.x),
        round(box.y0 * scale.y),
        round(box.x1 * scale.x),
        round(box.y1 * scale.y),
    )


def _place(
    anchor: Rect, size: tuple[int, int], canvas: tuple[int, int], taken: list[Rect], forced: bool
) -> Rect | None:
    """Return the first free place for a label, or None.

    Tried are above, below, inside at the top and at the bottom, each at three positions along the
    width.
    """
    rects = [_inside(corner, size, canvas) for corner in _corners(anchor, size)]
    for rect in rects:
        if not any(_overlap(rect, other) for other in taken):
            return rect
    return rects[0] if forced else None


def _corners(anchor: Rect, size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    left, top, right, bottom = anchor
    width, height = size
    for x in (left, (left + right - width) // 2, right - width):
        for y in (top - height - 2, top + 2, bottom + 2, bottom - height - 2):
            yield x, y


def _inside(corner: tuple[int, int], size: tuple[int, int], canvas: tuple[int, int]) -> Rect:
    x, y = (
        max(0, min(at, room - length))
        for at, length, room in zip(corner, size, canvas, strict=True)
    )
    return x, y, x + size[0], y + size[1]


def _overlap(a: Rect, b: Rect) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _shortened(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """Return the text, shortened in its middle if wider than `room` px: its end is the score."""
    if font.getlength(text) <= room:
        return text
    keep = max(2, int(len(text) * room / font.getlength(text)))
    while keep > 2 and font.getlength(_middle_out(text, keep)) > room:
        keep -= 1
    return _middle_out(text, keep)


def _middle_out(text: str, keep: int) -> str:
    tail = min(keep // 2, 6)
    return text[: keep - tail] + "…" + text[len(text) - tail :]


def _tag(
    pen: ImageDraw.ImageDraw,
    rect: Rect,
    text: str,
    font: ImageFont.FreeTypeFont,
    tint: Colour,
    pad: int,
) -> None:
    left, top, right, bottom = rect
    red, green, blue = tint
    dark_ground = 0.299 * red + 0.587 * green + 0.114 * blue < 128  # ITU-R BT.601 luma
    pen.rounded_rectangle(
        (left, top, right - 1, bottom - 1), radius=pad + 1, fill=tint, outline=(20, 20, 20)
    )
    pen.text(
        (left + pad, (top + bottom) / 2),
        text,
        font=font,
        fill="white" if dark_ground else (15, 15, 15),
        anchor="lm",
    )
