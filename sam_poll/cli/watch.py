"""`sam-poll watch`: the daemon on a share.

Nothing heavy is imported at the top, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sam_poll.cli.error_handling import reports
from sam_poll.cli.options import (
    Device,
    Formats,
    In,
    Log,
    LogLevel,
    Model,
    ModelCfg,
    ShareConfig,
    settings_of,
)
from sam_poll.core.errors import ExitCode


@reports
def watch(
    source: In = None,
    output: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder for the results.")
    ] = None,
    config: ShareConfig = None,
    once: Annotated[
        bool, typer.Option("--once", help="Process what is in the folder, then exit.")
    ] = False,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    format: Formats = None,
    log: Log = None,
    log_level: LogLevel = None,
) -> ExitCode:
    """Watch a folder and segment every picture + prompt dropped into it.

    Ctrl-C stops when the running jobs are done.
    """
    flags = {
        "output": output,
        "model": model,
        "model_cfg": model_cfg,
        "device": device,
        "formats": format,
    }
    settings = settings_of(source, config, **flags, log=log, log_level=log_level)
    from sam_poll.runtime.daemon import watch as run

    return run(settings, once=once)
