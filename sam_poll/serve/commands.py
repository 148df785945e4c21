"""`sam-poll serve` and its flags; what it does is in this room's other modules.

Nothing heavy is imported at the top, so that `--help` answers at once. What can still go wrong here: nothing of its
own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sam_poll.errors import ExitCode, SettingsError
from sam_poll.given import Config, Device, Log, LogLevel, Model, ModelCfg
from sam_poll.reporting import reports


@reports
def serve(
    listen: Annotated[
        str | None, typer.Option("--listen", help="Where to listen, host:port; a port alone is on 127.0.0.1.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="File with the token that callers must send. Default: the environment."),
    ] = None,
    config: Config = None,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    log: Log = None,
    log_level: LogLevel = None,
) -> ExitCode:
    """Answer HTTP requests: pictures and prompts, and what CVAT's functions are asked. Ctrl-C stops after what is at
    work."""
    from sam_poll import settings

    flags: dict[str, Any] = {"serve.listen": listen, "serve.token_file": token_file, "model": model, "log": log}
    flags |= {"model_cfg": model_cfg, "device": device, "log_level": log_level}
    read = settings.load(config, flags={key: value for key, value in flags.items() if value is not None})
    try:
        from sam_poll.serve import run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "sam_poll":
            raise
        remedy = "pip install 'sam_poll[serve]'"
        raise SettingsError(f"the server needs the package {error.name}", place="serve", remedy=remedy) from error
    return run.serve(read)
