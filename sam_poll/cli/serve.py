"""`sam-poll serve`: its flags. The work is done by `integrations.http`.

Nothing heavy is imported at the top, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sam_poll.cli.error_handling import reports
from sam_poll.cli.options import Config, Device, Log, LogLevel, Model, ModelCfg, missing_extra
from sam_poll.core.errors import ExitCode


@reports
def serve(
    listen: Annotated[
        str | None,
        typer.Option("--listen", help="Address, host:port; a port alone is on 127.0.0.1."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            help="File with the token that clients must send. Default: SAM_POLL_SERVE_TOKEN.",
        ),
    ] = None,
    ui: Annotated[
        bool, typer.Option("--ui", help="Serve the page of `sam-poll ui` as well, at /ui/.")
    ] = False,
    config: Config = None,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    log: Log = None,
    log_level: LogLevel = None,
) -> ExitCode:
    """Answer HTTP requests: pictures with prompts, and those of CVAT's functions.

    Ctrl-C finishes the running requests, then stops.
    """
    from sam_poll.config import settings

    flags: dict[str, Any] = {
        "serve.listen": listen,
        "serve.token_file": token_file,
        "model": model,
        "model_cfg": model_cfg,
        "device": device,
        "log": log,
        "log_level": log_level,
    }
    loaded = settings.load(config, flags=flags)
    try:
        from sam_poll.integrations.http import server

        if ui:
            from sam_poll.cli.ui import ui_options_of
            from sam_poll.integrations.ui.server import beside
    except ModuleNotFoundError as error:
        raise missing_extra(error, "ui" if ui else "serve") from error
    if not ui:
        return server.serve(loaded)
    options = ui_options_of(loaded, config, flags, read_only=False)
    return server.serve(loaded, beside=beside(loaded, options))
