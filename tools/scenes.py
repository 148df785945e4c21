"""Drawn scenes with known truth: what the bundled model is trained and measured on, and what tests
draw on.

A scene is a picture, and a map that says which shape each pixel belongs to. Shapes are contours
filled by the even-odd rule, so a ring is two of them. They are drawn at four times the resolution
and averaged: a pixel belongs to a shape where the shape covers more than half of it. The same seed
and arguments give the same scene.

Limitations: "the same" holds for one version of numpy and OpenCV; a newer one may
draw a pixel or two otherwise, so nothing may compare scenes with stored bytes. A scene asked to
hold more shapes than fit holds fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from sam_poll.core.types import BoolArray, Box, Point, Prompt, RgbArray, Size

KINDS = ("ellipse", "rectangle", "ring", "frame", "polygon", "blob")
PROMPTS = ("point", "box", "box+point", "point+negative")
DIFFICULTY = 0.3  # what the bundled model is measured at
_OVERSAMPLING = 4
_TRIES = 30

_Canvas = npt.NDArray[np.float32]
_Contour = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """`pixels` uint8 H×W×3 RGB. `labels` uint16 H×W: 0 is ground, n is the n-th shape, whose kind
    is `kinds[n-1]`.
    """

    pixels: RgbArray
    labels: npt.NDArray[np.uint16]
    kinds: tuple[str, ...]

    @property
    def size(self) -> Size:
        return Size(self.labels.shape[1], self.labels.shape[0])

    def mask(self, number: int) -> BoolArray:
        """What is seen of shape `number` (from 1): bool H×W."""
        return np.asarray(self.labels == number)

    @property
    def masks(self) -> list[BoolArray]:
        """All shapes' masks, in order. For a scene of very many shapes ask for one at a time."""
        return [self.mask(number) for number in range(1, len(self.kinds) + 1)]


def draw(
    seed: int,
    size: tuple[int, int] = (256, 256),
    difficulty: float = DIFFICULTY,
    count: tuple[int, int] = (1, 3),
    radius: tuple[float, float] | None = None,
    kinds: Sequence[str] | None = None,
) -> Scene:
    """Draw a scene.

    `size` is (width, height) in pixels. `difficulty` 0 is clean discs, rectangles and rings on flat
    ground, 1 is noisy, textured, overlapping shapes of little contrast. `count` is the least and
    the most shapes, `radius` likewise in pixels (by default 15 % to 32 % of the short side),
    `kinds` the shapes to choose from (by default those that suit the difficulty)."""
    rng = np.random.default_rng(seed)
    width, height = size
    low, high = radius or (0.15 * min(size), 0.32 * min(size))
    canvas, labels = np.empty((height, width, 3), np.float32), np.zeros((height, width), np.uint16)
    colours = [rng.uniform(20, 235, 3)]
    canvas[:] = _texture(rng, (height, width), difficulty, min(size)) + colours[0]
    drawn: list[str] = []
    for _ in range(rng.integers(count[0], count[1] + 1)):
        colour = _another_colour(rng, colours, contrast=110 - 70 * difficulty)
        for _ in range(_TRIES):
            kind = str(rng.choice(kinds or _suited_kinds(difficulty)))
            reach = rng.uniform(low, high)
            stamp = _stamp(_outline(kind, rng, reach), _place(rng, size, reach, difficulty), size)
            if stamp is not None and _add(labels, stamp, len(drawn) + 1, keep=1 - 0.4 * difficulty):
                _paint(canvas, stamp, rng, colour, difficulty, min(size))
                colours.append(colour)
                drawn.append(kind)
                break
    canvas += rng.standard_normal((height, width, 1), dtype=np.float32) * rng.uniform(
        0, 2 + 14 * difficulty
    )
    return Scene(np.clip(canvas, 0, 255).astype(np.uint8), labels, tuple(drawn))


def _suited_kinds(difficulty: float) -> tuple[str, ...]:
    return KINDS[: 4 + round(2 * min(1.0, 2 * difficulty))]


# ── shapes ──


def _outline(kind: str, rng: np.random.Generator, reach: float) -> list[_Contour]:
    """Contours around (0, 0), each N×2 in pixels; none reaches farther than `reach`."""
    angle = rng.uniform(0, np.pi)
    if kind == "ellipse":
        return [_turned(_round(reach, reach * rng.uniform(0.55, 1)), angle)]
    if kind == "rectangle":
        return [_turned(_square(reach, rng.uniform(0.4, 1)), angle)]
    if kind in ("ring", "frame"):
        ratio = rng.uniform(0.75, 1)
        outer = _turned(
            _round(reach, reach * ratio) if kind == "ring" else _square(reach, ratio), angle
        )
        return [outer, outer * rng.uniform(0.35, 0.55) + rng.uniform(-0.06, 0.06, 2) * reach]
    if kind == "polygon":
        corners = int(rng.integers(3, 8))
        turns = angle + (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
        return [_polar(turns, reach * rng.uniform(0.7, 1, corners))]
    if kind == "blob":
        turns = np.linspace(0, 2 * np.pi, 96, endpoint=False)
        waves = sum(
            rng.normal() * 0.14 / n * np.cos(n * turns + rng.uniform(0, 6)) for n in range(2, 6)
        )
        return [_polar(turns, reach * np.clip(0.8 + waves, 0.4, 1))]
    raise ValueError(f"no shape is called {kind!r}; there are {', '.join(KINDS)}")


def _round(a: float, b: float) -> _Contour:
    turns = np.linspace(0, 2 * np.pi, 128, endpoint=False)
    return np.stack([a * np.cos(turns), b * np.sin(turns)], 1)


def _square(reach: float, ratio: float) -> _Contour:
    """A rectangle whose corners lie `reach` from its centre."""
    half = reach / np.hypot(1, ratio)
    return half * np.array([[-1, -ratio], [1, -ratio], [1, ratio], [-1, ratio]])


def _polar(turns: npt.NDArray[np.float64], radii: npt.NDArray[np.float64]) -> _Contour:
    return np.stack([radii * np.cos(turns), radii * np.sin(turns)], 1)


def _turned(contour: _Contour, angle: float) -> _Contour:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.asarray(contour @ np.array([[cos, sin], [-sin, cos]]))


def _place(
    rng: np.random.Generator, size: tuple[int, int], reach: float, difficulty: float
) -> _Contour:
    """A centre (x, y): shapes stay inside the picture, and may stick out by the half when it is
    difficult.
    """
    inset = reach * (1 - 0.5 * difficulty)
    return np.array(
        [rng.uniform(min(inset, side / 2), max(side - inset, side / 2)) for side in size]
    )


# ── drawing ──


@dataclass(frozen=True, slots=True, eq=False)
class _Stamp:
    """A shape on the pixel grid: `cover` float32 h×w, how much of each pixel it covers; `where` it
    lies.
    """

    cover: _Canvas
    where: tuple[slice, slice]


def _stamp(outline: list[_Contour], centre: _Contour, size: tuple[int, int]) -> _Stamp | None:
    """The part of a shape that lies in the picture, or None. One pixel of margin is kept for the
    soft edge.
    """
    points = np.concatenate(outline) + centre
    x0, y0 = np.maximum(np.floor(points.min(0)).astype(int) - 1, 0)
    x1, y1 = np.minimum(np.ceil(points.max(0)).astype(int) + 1, size)
    if x0 >= x1 or y0 >= y1:
        return None
    fine = np.zeros(((y1 - y0) * _OVERSAMPLING, (x1 - x0) * _OVERSAMPLING), np.uint8)
    shifted = [
        ((c + centre - (x0, y0)) * _OVERSAMPLING - 0.5).round().astype(np.int32) for c in outline
    ]
    cv2.fillPoly(fine, shifted, 255)
    cover = cv2.resize(fine, (int(x1 - x0), int(y1 - y0)), interpolation=cv2.INTER_AREA)
    return _Stamp(np.float32(1 / 255) * cover, (slice(y0, y1), slice(x0, x1)))


def _add(labels: npt.NDArray[np.uint16], stamp: _Stamp, number: int, keep: float) -> bool:
    """Put the shape on top, unless it is too little, or leaves less than `keep` or several pieces
    of one below.
    """
    mask, below = stamp.cover > 0.5, labels[stamp.where]
    if np.count_nonzero(mask) < 30 or cv2.connectedComponents(mask.astype(np.uint8))[0] != 2:
        return False
    for hit in np.unique(below[mask]):
        if hit:
            rest = labels == hit
            whole = np.count_nonzero(rest)
            rest[stamp.where] &= ~mask
            if (
                np.count_nonzero(rest) < keep * whole
                or cv2.connectedComponents(rest.astype(np.uint8))[0] != 2
            ):
                return False
    below[mask] = number
    return True


def _paint(
    canvas: _Canvas,
    stamp: _Stamp,
    rng: np.random.Generator,
    colour: npt.NDArray[np.float64],
    difficulty: float,
    side: int,
) -> None:
    surface = _texture(rng, stamp.cover.shape, difficulty, side) + colour.astype(np.float32)
    cover = cv2.GaussianBlur(stamp.cover, (0, 0), rng.uniform(0.2, 0.7))[..., None]
    canvas[stamp.where] += (surface - canvas[stamp.where]) * cover


def _another_colour(
    rng: np.random.Generator, colours: list[npt.NDArray[np.float64]], contrast: float
) -> npt.NDArray[np.float64]:
    """A colour unlike the ground's and, as far as there is one, the other shapes'."""
    tries = rng.uniform(10, 245, (_TRIES, 3))
    apart = np.abs(tries[:, None] - np.array(colours)).max(2).min(1)
    return tries[np.argmax(apart > contrast) if (apart > contrast).any() else np.argmax(apart)]


def _texture(
    rng: np.random.Generator, shape: tuple[int, ...], difficulty: float, side: int
) -> _Canvas:
    """What is added to a plain colour: float32, h×w×3 or broadcastable to it. `side` sets how
    coarse the grain is.
    """
    height, width = shape[:2]
    kind = rng.choice(["flat", "slope", "blotches", "stripes"], p=[0.4, 0.25, 0.2, 0.15])
    strength = np.float32(rng.uniform(0.3, 1) * (8 + 22 * difficulty))
    if kind == "flat":
        return np.zeros((1, 1, 3), np.float32)
    if kind == "blotches":
        grain = side / rng.uniform(4, 16)
        coarse = rng.standard_normal(
            (int(height / grain) + 2, int(width / grain) + 2, 3), dtype=np.float32
        )
        return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC) * (strength / 2)
    turn, wave = rng.uniform(0, 2 * np.pi), 2 * np.pi * rng.uniform(8, 25) / side
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    along = (x * np.cos(turn) + y * np.sin(turn)).astype(np.float32)
    if kind == "slope":
        along = along / (abs(width * np.cos(turn)) + abs(height * np.sin(turn))) * 2
        return (
            (along - along.mean())[..., None]
            * rng.uniform(-1, 1, 3).astype(np.float32)
            * strength
            * 2
        )
    return (np.sin(along * np.float32(wave)) * (strength / 2))[..., None]


# ── prompts ──


def prompt_for(
    mask: BoolArray, kind: str, rng: np.random.Generator, label: str = "object"
) -> Prompt:
    """A prompt of a kind named in `PROMPTS` for a bool H×W mask. Boxes are as loose as a careful
    hand draws them.
    """
    if kind not in PROMPTS:
        raise ValueError(f"no prompt is called {kind!r}; there are {', '.join(PROMPTS)}")
    box = box_of(mask, rng, slack=0.03) if "box" in kind else None
    points = [point_in(mask, rng)] if "point" in kind else []
    if "negative" in kind:
        points.append(point_off(mask, rng))
    return Prompt(label=label, points=tuple(points), box=box)


def point_in(mask: BoolArray, rng: np.random.Generator) -> Point:
    """A foreground point well inside: at least 0.6 times as far from the edge as the innermost
    one.
    """
    depth = _depth(mask)
    return _one_of(depth >= 0.6 * depth.max(), rng, label=1)


def point_off(mask: BoolArray, rng: np.random.Generator) -> Point:
    """A background point clearly outside: as often close by (or in the hole) as anywhere.
    Raises ValueError for a mask that fills the picture."""
    if mask.all():
        raise ValueError("a mask that fills the picture has no outside")
    depth = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 3)
    clear = depth >= min(0.03 * min(mask.shape), 0.6 * depth.max())
    near = clear & (depth <= 0.12 * min(mask.shape))
    return _one_of(near if rng.random() < 0.5 and near.any() else clear, rng, label=0)


def box_of(mask: BoolArray, rng: np.random.Generator | None = None, slack: float = 0.0) -> Box:
    """The tight box of a mask (exclusive right and lower edge); with `rng`, each edge off by up to
    `slack` of the box's side, but inside the picture."""
    x0, y0, width, height = cv2.boundingRect(mask.astype(np.uint8))
    off = (
        rng.uniform(-slack, slack, 4) * (width, height, width, height)
        if rng is not None
        else np.zeros(4)
    )
    return Box(
        float(max(0.0, x0 + off[0])),
        float(max(0.0, y0 + off[1])),
        float(min(mask.shape[1], x0 + width + off[2])),
        float(min(mask.shape[0], y0 + height + off[3])),
    )


def extreme_points(mask: BoolArray) -> list[Point]:
    """The topmost, leftmost, lowest and rightmost pixel, as an annotator clicks them."""
    ys, xs = np.nonzero(mask)
    ends = (ys.argmin(), xs.argmin(), ys.argmax(), xs.argmax())
    return [Point(float(xs[i]), float(ys[i])) for i in ends]


def iou(a: BoolArray, b: BoolArray) -> float:
    """Intersection over union of two bool masks of one shape; two empty ones agree (1.0)."""
    union = np.count_nonzero(a | b)
    return float(np.count_nonzero(a & b) / union) if union else 1.0


def _depth(mask: BoolArray) -> _Canvas:
    """Distance of each pixel to the outside; the picture's edge counts as outside."""
    padded = np.pad(mask.astype(np.uint8), 1)
    return np.asarray(cv2.distanceTransform(padded, cv2.DIST_L2, 3)[1:-1, 1:-1])


def _one_of(choice: BoolArray, rng: np.random.Generator, label: int) -> Point:
    spots = np.flatnonzero(choice)
    y, x = divmod(int(spots[rng.integers(len(spots))]), choice.shape[1])
    return Point(float(x), float(y), label)
