"""Draw the bundled examples (`examples/demo`): pictures with prompts in every form, and what the
answers should be.

    python -m tools.make_examples

`in/` is a tree as a user would drop it, `truth/` holds an instance PNG for each picture: pixel
value n is the n-th object of its prompt file, 0 is ground. The scenes differ in shape, size, file
type and form of prompt, not in how well they go; how well the model does is measured on 200 others
(`tools.train_demo --measure`).

Limitations: another version of numpy or OpenCV may draw a little otherwise, so
write all or none anew."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from sam_poll.core.types import BoolArray, Point
from tools import scenes

FOLDER = Path(__file__).parents[1] / "examples" / "demo"
_Json = dict[str, Any]
_Form = Callable[[BoolArray, np.random.Generator], _Json]


# ── the forms of a prompt ──


def _points(mask: BoolArray, rng: np.random.Generator) -> _Json:
    """One click, as Waikato's files have it."""
    return {"points": [_point(scenes.point_in(mask, rng))]}


def _box(mask: BoolArray, rng: np.random.Generator) -> _Json:
    box = scenes.box_of(mask, rng, slack=0.02)
    return {"box": {name: round(getattr(box, name)) for name in ("x0", "y0", "x1", "y1")}}


def _box_and_point(mask: BoolArray, rng: np.random.Generator) -> _Json:
    return {**_points(mask, rng), **_box(mask, rng)}


def _point_and_negative(mask: BoolArray, rng: np.random.Generator) -> _Json:
    return {"points": [_point(scenes.point_in(mask, rng)), _point(scenes.point_off(mask, rng))]}


def _extreme_points(mask: BoolArray, _: np.random.Generator) -> _Json:
    return {
        "extreme_points": [{"x": round(p.x), "y": round(p.y)} for p in scenes.extreme_points(mask)]
    }


def _point(point: Point) -> _Json:
    return {"x": round(point.x), "y": round(point.y), "label": point.label}


# ── the examples ──


@dataclass(frozen=True, slots=True)
class Example:
    """`forms[n]` asks for the (n+1)-th shape. With `bare`, only for the first, in Waikato's form:
    without a label.
    """

    path: str
    size: tuple[int, int]
    seed: int
    kinds: tuple[str, ...]
    forms: tuple[_Form, ...]
    bare: bool = False
    difficulty: float = scenes.DIFFICULTY

    def scene(self) -> scenes.Scene:
        count = (max(1, len(self.forms)), max(1, len(self.forms)))
        scene = scenes.draw(self.seed, self.size, self.difficulty, count, kinds=self.kinds)
        if len(scene.kinds) < len(self.forms):
            raise ValueError(
                f"{self.path}: seed {self.seed} draws {len(scene.kinds)} shapes of "
                f"{len(self.forms)}"
            )
        return scene

    def prompt(self, scene: scenes.Scene) -> _Json:
        rng = np.random.default_rng(self.seed)
        asked = [form(scene.mask(n), rng) for n, form in enumerate(self.forms, 1)]
        if self.bare:
            return asked[0]
        return {
            "objects": [
                {"label": kind, **form} for kind, form in zip(scene.kinds, asked, strict=False)
            ]
        }


ROUND = ("ellipse", "ring", "blob")
EXAMPLES = (
    Example("tray.jpg", (640, 480), 11, scenes.KINDS, (_box, _points, _box_and_point)),
    Example("portrait.png", (480, 640), 29, ("ring",), (_points,), bare=True, difficulty=0.0),
    Example("wide.jpg", (1024, 768), 13, scenes.KINDS, (_box, _box), bare=True),
    Example("CAMERA7.JPG", (800, 600), 14, ROUND, (_box_and_point, _box), bare=True),
    Example("line2/corners.jpg", (640, 360), 15, scenes.KINDS, (_extreme_points, _extreme_points)),
    Example(
        "line2/washer.png",
        (360, 360),
        27,
        ("ring",),
        (_point_and_negative,),
        bare=True,
        difficulty=0.0,
    ),
)


def write(example: Example, folder: Path) -> None:
    scene = example.scene()
    picture, truth = (
        folder / "in" / example.path,
        (folder / "truth" / example.path).with_suffix(".png"),
    )
    for path in (picture, truth):
        path.parent.mkdir(parents=True, exist_ok=True)
    asked = 1 if example.bare else len(example.forms)
    _write_image(picture, cv2.cvtColor(scene.pixels, cv2.COLOR_RGB2BGR))
    _write_image(truth, np.where(scene.labels <= asked, scene.labels, 0).astype(np.uint8))
    picture.with_suffix(".json").write_text(
        json.dumps(example.prompt(scene), indent=2) + "\n", encoding="utf-8"
    )


def _write_image(path: Path, pixels: np.ndarray[Any, Any]) -> None:
    options = (
        [cv2.IMWRITE_JPEG_QUALITY, 90]
        if path.suffix.lower() == ".jpg"
        else [cv2.IMWRITE_PNG_COMPRESSION, 9]
    )
    if not cv2.imwrite(str(path), pixels, options):
        raise OSError(f"{path} cannot be written")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.make_examples", description="Draw the bundled examples."
    )
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: %(default)s")
    folder = parser.parse_args(argv).out
    for example in EXAMPLES:
        write(example, folder)


if __name__ == "__main__":
    main()
