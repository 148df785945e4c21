"""`make demo`: the main job on bundled pictures with the bundled small model, compared with the
known truth.

Pictures and prompts are dropped into `demo-share/in`, the daemon drains the share, and what it
wrote is read back from `demo-share/out`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console

from sam_poll.config import settings
from sam_poll.core.errors import SamPollError
from sam_poll.core.types import Result
from sam_poll.runtime import console, daemon

HERE = Path(__file__).resolve().parent.parent
EXAMPLES, SHARE = HERE / "examples" / "demo", HERE / "demo-share"


def rows_of(result: Result) -> list[list[str]]:
    """Picture, object, score, IoU against the truth, milliseconds: a row an object."""
    written = cv2.imread(str(SHARE / "out" / f"{result.job_id}.mask.png"), cv2.IMREAD_UNCHANGED)
    truth = cv2.imread(str(EXAMPLES / "truth" / f"{result.job_id}.png"), cv2.IMREAD_UNCHANGED)
    rows = []
    for number, mask in enumerate(result.masks, 1):
        mine = written > 0 if len(result.masks) == 1 else written == number
        true = truth == number
        iou = np.logical_and(mine, true).sum() / max(1, np.logical_or(mine, true).sum())
        first = number == 1
        name, ms = (result.name, f"{result.timings['total']:.0f}") if first else ("", "")
        rows.append([name, mask.label, f"{mask.score:.2f}", f"{iou:.3f}", ms])
    return rows


def main() -> int:
    """Run the demo; 0 if every picture was answered."""
    if not (EXAMPLES / "in").is_dir():
        sys.exit(f"{EXAMPLES} is missing: run this from a checkout")
    shutil.rmtree(SHARE, ignore_errors=True)
    shutil.copytree(EXAMPLES / "in", SHARE / "in")
    flags = {"input": SHARE / "in", "model": "demo", "formats": ["mask", "opex", "cvat", "overlay"]}
    results: list[Result] = []
    try:
        chosen = settings.load(None, env={}, flags={**flags, "log_level": "WARNING"})
        print("loading the bundled model and draining demo-share/in …", flush=True)
        code = daemon.watch(chosen, once=True, on_result=results.append)
    except SamPollError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    results.sort(key=lambda r: r.job_id)
    columns = ["picture", "object", "score", "IoU with truth", "ms"]
    out = Console(soft_wrap=not sys.stdout.isatty())
    out.print(
        console.table("", columns, [row for r in results for row in rows_of(r)], right={2, 3, 4})
    )
    out.print("\noverlays:")
    for result in results:
        out.print(
            f"  {(SHARE / 'out' / result.job_id).relative_to(HERE)}.overlay.jpg", highlight=False
        )
    out.print(
        "masks, contours (OPEX) and CVAT files lie beside them; the inputs are in demo-share/done"
    )
    # A picture without a prompt, for whoever opens the page.
    shutil.copyfile(EXAMPLES / "in" / "wide.jpg", SHARE / "in" / "click-me.jpg")
    out.print("\nto see it in the browser, and click what you want in a picture of your own:")
    for line in ("sam-poll watch demo-share/in -m demo", "sam-poll ui demo-share/in -m demo"):
        out.print(f"  .venv/bin/{line}", highlight=False)
    out.print("each in a terminal of its own; then open http://127.0.0.1:8765", highlight=False)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
