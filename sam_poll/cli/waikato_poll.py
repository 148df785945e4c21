"""`sam_predict_poll` and `samhq_predict_poll`: drop-ins for Waikato's scripts on a folder.

The first stands for Waikato's `sam_predict_poll` (SAM) and `sam2_predict_poll`, the second for
`samhq_predict_poll` (SAM-HQ).

The flags and file names are those of Waikato's scripts (`.prompt` in; `<stem>.png` and
`<stem>.json` out; inputs moved there or deleted). The rest is this project's daemon: the best mask,
points and box together, several objects, and pictures of any ending but `.png`, which is the
mask's. Inputs that cannot be answered go to `failed` below the output folder, with the reason.

Limitations: Waikato's scripts move inputs between file systems. This one refuses to at the start,
because only a rename within one file system loses nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sam_poll.cli import error_handling
from sam_poll.cli.error_handling import reports
from sam_poll.cli.waikato_scripts import SAM, SAM_HQ, Scripts
from sam_poll.core.errors import ExitCode

SUFFIXES = {".mask.png": ".png", ".opex.json": ".json"}


def parser(scripts: Scripts = SAM) -> argparse.ArgumentParser:
    """Return a parser of all flags of Waikato's scripts."""
    arguments = argparse.ArgumentParser(
        prog=f"{scripts.prefix}_predict_poll",
        description=f"{scripts.title} prediction on a folder, with the flags of Waikato's scripts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    scripts.add_model_flags(arguments)
    add = arguments.add_argument
    add(
        "--prediction_in",
        metavar="DIR",
        type=Path,
        required=True,
        help="folder with pictures and .prompt files",
    )
    add(
        "--prediction_out",
        metavar="DIR",
        type=Path,
        required=True,
        help="folder for predictions and inputs",
    )
    add(
        "--prediction_tmp",
        metavar="DIR",
        type=Path,
        help="folder for files being processed; default: hidden in the output folder",
    )
    add(
        "--poll_wait",
        metavar="S",
        type=float,
        default=1.0,
        help="seconds between scans without --use_watchdog",
    )
    add(
        "--continuous",
        action="store_true",
        help="keep watching instead of ending when no input is left",
    )
    add(
        "--use_watchdog",
        action="store_true",
        help="react to file system events instead of scanning every --poll_wait",
    )
    add(
        "--watchdog_check_interval",
        metavar="S",
        type=float,
        default=10.0,
        help="seconds between scans with --use_watchdog",
    )
    add("--delete_input", action="store_true", help="delete answered inputs instead of moving them")
    add("--verbose", action="store_true", help="log more")
    add("--quiet", action="store_true", help="log warnings and errors only")
    return arguments


def run(arguments: Sequence[str] | None = None, scripts: Scripts = SAM) -> ExitCode:
    """Do what Waikato's script does with these arguments. Raises SamPollError."""
    flags = parser(scripts).parse_args(arguments)
    # Imported here, so that `--help` answers at once and a missing library is an ordinary error.
    from sam_poll.config import settings
    from sam_poll.imaging.decode import ENDINGS
    from sam_poll.runtime import builders, daemon

    output: Path = flags.prediction_out.absolute()
    values = {
        "input": flags.prediction_in,
        "output": output,
        "done": output,
        "work": flags.prediction_tmp or output / ".sam_poll-work",
        "failed": output / "failed",
        **scripts.settings_of(flags),
        "formats": ["mask", "opex"],
        "watch.mode": "events" if flags.use_watchdog else "poll",
        "watch.rescan_s": flags.watchdog_check_interval if flags.use_watchdog else flags.poll_wait,
        "log": "text",
        "log_level": _log_level(flags),
    }
    # Where it runs, not what it does: an image's health check looks at the file that is set there.
    environment = {
        name: value for name, value in os.environ.items() if name.startswith("SAM_POLL_HEALTH__")
    }
    loaded = settings.load(None, env=environment, flags=values, done_may_be_output=True)
    layout = builders.layout_of(
        loaded,
        delete_input=flags.delete_input,
        prompt_endings=frozenset({".prompt"}),
        annotation_endings=frozenset(),
        picture_endings=ENDINGS - {".png"},
        suffixes=SUFFIXES,
    )
    return daemon.watch(
        loaded,
        once=not flags.continuous,
        layout=layout,
        model_type=scripts.model_type_of(flags),
    )


def _log_level(flags: argparse.Namespace) -> str:
    if flags.verbose:
        return "DEBUG"
    return "WARNING" if flags.quiet else "INFO"


def main() -> None:
    """Run the command `sam_predict_poll`. Its errors look like those of `sam-poll`."""
    error_handling.run(reports(run))


def hq_main() -> None:
    """Run the command `samhq_predict_poll`."""
    error_handling.run(reports(partial(run, scripts=SAM_HQ)))
