"""`sam_predict_poll`: a drop-in for Waikato's scripts of that name (SAM1) and `sam2_predict_poll` (SAM2).

Their flags, their file names (`.prompt` in; `<stem>.png` and `<stem>.json` out; inputs moved there or deleted), our
engine: the best mask, points and box together, several objects, any picture ending but `.png` (which is the mask's).

What can still go wrong here: their scripts move inputs between file systems, this one refuses to (a rename is the only
way nothing gets lost); it says so at start. What fails goes to `failed` below the output folder, with the reason.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sam_poll import reporting
from sam_poll.errors import ExitCode
from sam_poll.reporting import reports

SUFFIXES = {".mask.png": ".png", ".opex.json": ".json"}


def parser() -> argparse.ArgumentParser:
    """Their flags, all of them."""
    made = argparse.ArgumentParser(
        prog="sam_predict_poll",
        description="SAM/SAM2 prediction by polling a folder, with the flags of Waikato's scripts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = made.add_argument
    add("--model", metavar="FILE", required=True, help="checkpoint, or a name of `sam-poll models list`")
    add("--model_type", choices=["default", "vit_h", "vit_l", "vit_b"], help="SAM1: the type of the checkpoint")
    add("--config", metavar="FILE", help="SAM2: the model's yaml")
    add("--device", help="device to run on: auto, cpu, cuda, cuda:0 …", default="auto")
    add("--prediction_in", metavar="DIR", type=Path, required=True, help="folder with pictures and .prompt files")
    add("--prediction_out", metavar="DIR", type=Path, required=True, help="folder for predictions and inputs")
    add(
        "--prediction_tmp",
        metavar="DIR",
        type=Path,
        help="folder for files at work; default: hidden in the output folder",
    )
    add("--poll_wait", metavar="S", type=float, default=1.0, help="seconds between looks when not using watchdog")
    add("--continuous", action="store_true", help="keep watching instead of ending when nothing is left")
    add("--use_watchdog", action="store_true", help="react to events instead of looking every --poll_wait")
    add(
        "--watchdog_check_interval",
        metavar="S",
        type=float,
        default=10.0,
        help="seconds between looks beside the events",
    )
    add("--delete_input", action="store_true", help="delete answered inputs instead of moving them")
    add("--verbose", action="store_true", help="log more")
    add("--quiet", action="store_true", help="log warnings and errors only")
    return made


def run(arguments: Sequence[str] | None = None) -> ExitCode:
    """Work as their script would. Raises SamPollError."""
    given = parser().parse_args(arguments)
    # Here, so that `--help` answers at once, and so that a library that is missing is reported as any other error.
    from sam_poll import app, settings
    from sam_poll.images import ENDINGS

    out: Path = given.prediction_out.absolute()
    flags = {
        "input": given.prediction_in,
        "output": out,
        "done": out,
        "work": given.prediction_tmp or out / ".sam_poll-work",
        "failed": out / "failed",
        "model": given.model,
        "model_cfg": given.config,
        "device": given.device,
        "formats": ["mask", "opex"],
        "watch.mode": "events" if given.use_watchdog else "poll",
        "watch.rescan_s": given.watchdog_check_interval if given.use_watchdog else given.poll_wait,
        "log": "text",
        "log_level": "DEBUG" if given.verbose else "WARNING" if given.quiet else "INFO",
    }
    chosen = settings.load(None, env={}, flags=flags, done_may_be_output=True)
    layout = app.layout_of(
        chosen,
        delete_input=given.delete_input,
        prompt_endings=frozenset({".prompt"}),
        annotation_endings=frozenset(),
        picture_endings=ENDINGS - {".png"},
        suffixes=SUFFIXES,
    )
    kind = "vit_h" if given.model_type == "default" else given.model_type  # as in segment-anything's registry
    return app.watch(chosen, once=not given.continuous, layout=layout, model_type=kind)


def main() -> None:
    """The `sam_predict_poll` command; its errors look like those of `sam-poll`."""
    reporting.run(reports(run))
