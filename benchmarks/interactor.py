"""`python -m benchmarks.interactor`: the two forms of an interactor's answer at 20 megapixels.

For masks of three shapes it prints the bytes of an answer, the seconds to write it (the function),
and to parse it and write it again with Python's `json`, as CVAT's server does on the way to the
browser. The network is not run.

Limitations: what the browser then does with the answer is not measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import TypeVar

import cv2
import numpy as np

from sam_poll.core.types import BoolArray, Mask, Size
from sam_poll.imaging import masks
from sam_poll.integrations.nuclio import responses
from sam_poll.integrations.nuclio.answer_form import AnswerForm

_SIZE = Size(5184, 3888)
_Value = TypeVar("_Value")


def ellipse(part: float) -> BoolArray:
    """Return a picture with an ellipse whose axes are this part of the picture's sides."""
    axes = (round(_SIZE.width * part / 2), round(_SIZE.height * part / 2))
    image = np.zeros((_SIZE.height, _SIZE.width), np.uint8)
    cv2.ellipse(image, (_SIZE.width // 2, _SIZE.height // 2), axes, 0, 0, 360, 1, -1)
    return image.astype(bool)


def ragged() -> BoolArray:
    """Return a picture with a large object whose edge and inside are full of holes."""
    noise = np.random.default_rng(0).random((_SIZE.height // 4, _SIZE.width // 4), np.float32)
    blurred = cv2.resize(cv2.GaussianBlur(noise, (0, 0), 2), (_SIZE.width, _SIZE.height))
    return ellipse(0.8) & (blurred > 0.47)


def timed(run: Callable[[], _Value], repeats: int) -> tuple[float, _Value]:
    """Return the least seconds of several runs, and the last result."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - started)
    return min(seconds), result


def measure(name: str, mask: Mask, form: AnswerForm, repeats: int) -> None:
    """Print one line of the table."""
    write_s, answer = timed(
        lambda: responses.interactor_response([mask], _SIZE, clicked=True, form=form), repeats
    )
    pass_s, _ = timed(lambda: json.dumps(json.loads(answer)), repeats)
    print(f"| {name} | `{form.value}` | {len(answer):,} | {write_s:.4f} | {pass_s:.4f} |")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    print("| object | answer | bytes | s to write | s to pass on |\n|---|---|---|---|---|")
    objects = {"small": ellipse(0.1), "large": ellipse(0.8), "ragged": ragged()}
    for name, pixels in objects.items():
        mask = masks.tight(pixels, "object", 0.9)
        for form in AnswerForm:
            measure(name, mask, form, repeats)


if __name__ == "__main__":
    main()
