"""Pictures to measure with: drawn ones whose JPEGs have the size of a camera's, or the user's.

Each file differs from all others (a serial number in a JPEG comment), because the daemon recognises
a picture by its bytes and would not encode it twice; the pixels are the same, so all contestants
have the same work.

Limitations: grain is random, so these JPEGs are a little larger than a camera's of equal quality,
and a little slower to decode, for all contestants.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from sam_poll.core.errors import PictureError
from sam_poll.core.files import write_synced
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import Box, RgbArray, Size
from sam_poll.diagnostics.bench.plan import BenchError
from sam_poll.imaging.decode import read_header
from sam_poll.share.layout import Layout

QUALITY = 92  # with it the made 20-megapixel photograph has about 6 MB, as a camera's
_GRAIN = (
    7.0  # standard deviation of the sensor's noise, in grey values; decides how large the JPEGs are
)
_LOOSE = 0.03  # how far outside its object a box is drawn, in parts of the object


@dataclass(frozen=True, slots=True, eq=False)
class TestImages:
    """Pictures of one kind: `name` for the table, JPEGs, and the boxes of each."""

    name: str
    megapixels: float
    jpegs: tuple[bytes, ...] = field(repr=False)
    boxes: tuple[tuple[Box, ...], ...] = field(repr=False)

    @property
    def megabytes(self) -> float:
        """Mean size of a file."""
        return sum(map(len, self.jpegs)) / len(self.jpegs) / 1e6


@dataclass(frozen=True, slots=True)
class Pair:
    """A picture and its prompt on disk."""

    picture: Path
    prompt: Path


def draw_pictures(size: Size, objects: int) -> TestImages:
    """Photographs of this size, with as many objects."""
    boxes = grid(size, objects)
    pixels = photograph(size, boxes)
    jpegs = tuple(
        _jpeg(turned) for turned in (pixels, cv2.flip(pixels, 0), cv2.flip(pixels, 1))
    )  # the grid is the same
    return TestImages(
        f"{size.width}×{size.height}", size.width * size.height / 1e6, jpegs, (boxes,) * len(jpegs)
    )


def own_pictures(folder: Path, objects: int) -> TestImages:
    """Return the JPEGs of a folder.

    Raises BenchError if there is none, or one that cannot be read.
    """
    files = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in (".jpg", ".jpeg", ".jpe", ".jfif")
    )
    if not files:
        raise BenchError("no JPEGs are in it", place=str(folder))
    jpegs = tuple(path.read_bytes() for path in files)
    try:
        sizes = [read_header(data).size for data in jpegs]
    except PictureError as error:
        raise BenchError(
            f"one of the pictures cannot be used: {error}", place=str(folder)
        ) from error
    megapixels = sum(width * height for width, height in sizes) / len(sizes) / 1e6
    return TestImages(
        "own pictures", megapixels, jpegs, tuple(grid(size, objects) for size in sizes)
    )


def grid(size: Size, objects: int) -> tuple[Box, ...]:
    """Return boxes side by side in rows, each in the middle of its cell, 0.6 times as wide."""
    columns = int(np.ceil(np.sqrt(objects)))
    rows = -(-objects // columns)
    width, height = size.width / columns, size.height / rows
    return tuple(
        Box((x + 0.2) * width, (y + 0.2) * height, (x + 0.8) * width, (y + 0.8) * height)
        for y, x in (divmod(number, columns) for number in range(objects))
    )


def photograph(size: Size, boxes: Sequence[Box], seed: int = 0) -> RgbArray:
    """Draw a picture (RGB): ground with natural detail, an ellipse in each box, grain."""
    rng = np.random.default_rng(seed)
    width, height = size
    canvas = np.full((height, width, 3), 110, np.float32)
    cell = max(size)
    while cell >= 2:  # octave by octave, the finer the weaker
        coarse = rng.standard_normal((height // cell + 3, width // cell + 3, 3), dtype=np.float32)
        canvas += cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR) * (
            24 * (cell / max(size)) ** 0.5
        )
        cell //= 2
    for box in boxes:
        _ellipse(canvas, box, rng)
    canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * _GRAIN
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _ellipse(canvas: np.ndarray, box: Box, rng: np.random.Generator) -> None:
    """Draw an object with contrast to the ground, a little smaller than its box."""
    centre = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
    axes = ((box.x1 - box.x0) * (0.5 - _LOOSE), (box.y1 - box.y0) * (0.5 - _LOOSE))
    colour = rng.choice([-60.0, 70.0], 3)
    top, left, bottom, right = (int(v) for v in (box.y0, box.x0, box.y1, box.x1))
    part = canvas[top:bottom, left:right]
    stamp = np.zeros(part.shape[:2], np.uint8)
    middle = (round(centre[0] - left), round(centre[1] - top))
    cv2.ellipse(stamp, middle, (round(axes[0]), round(axes[1])), 0, 0, 360, 1, -1, cv2.LINE_AA)
    part += stamp[..., None] * colour.astype(np.float32)


def _jpeg(pixels: np.ndarray) -> bytes:
    return cv2.imencode(
        ".jpg", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    )[1].tobytes()


def with_comment(jpeg: bytes, serial: str) -> bytes:
    """Return the same picture as another file: with a comment after its first segment."""
    place = 2
    if jpeg[2:3] == b"\xff" and jpeg[3] & 0xF0 == 0xE0:  # JFIF or EXIF must stay first
        place = 4 + int.from_bytes(jpeg[4:6], "big")
    text = serial.encode()
    return jpeg[:place] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + jpeg[place:]


def prompt_body(boxes: Sequence[Box]) -> bytes:
    """Return the bytes of a prompt file for these boxes."""
    objects = [
        {"label": "object", "box": {"x0": b.x0, "y0": b.y0, "x1": b.x1, "y1": b.y1}} for b in boxes
    ]
    return json.dumps({"objects": objects}).encode()


def layout_in(root: Path) -> Layout:
    """Return the layout of a share in this folder and create its `in/`."""
    layout = Layout.below(root)
    layout.input.mkdir(parents=True)
    return layout


class Supply:
    """Writes pairs that no daemon has seen.

    They are flushed to disk, so that no contestant pays for writing them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir(parents=True, exist_ok=True)

    def pairs(self, subject: TestImages, count: int, *, known: bool = False) -> list[Pair]:
        """Write `count` new pairs, with the subject's pictures in turn.

        With `known` a picture that comes again is the same file.
        """
        serial = f"p{self._count:06d}" if known else None
        return [self._pair(subject, number % len(subject.jpegs), serial) for number in range(count)]

    def _pair(self, subject: TestImages, which: int, serial: str | None) -> Pair:
        self._count += 1
        stem = f"p{self._count:06d}"
        pair = Pair(self._folder / f"{stem}.jpg", self._folder / f"{stem}.json")
        write_synced(
            SafePath.beside(pair.picture), with_comment(subject.jpegs[which], serial or stem)
        )
        write_synced(SafePath.beside(pair.prompt), prompt_body(subject.boxes[which]))
        return pair
