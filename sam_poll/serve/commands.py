"""`sam-poll serve` and its flags; what it does is in this room's other modules.

Nothing heavy is imported at the top, so that `--help` answers at once. What can still go wrong here: nothing of its
own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sam_poll.errors import ExitCode, SettingsError
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
    config: Annotated[Path | None, typer.Option("-c", "--config", help="Settings file.")] = None,
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="A catalogue name, a checkpoint's path, or `demo`.")
    ] = None,
    model_cfg: Annotated[
        str | None, typer.Option("--model-cfg", help="The model's yaml, if the name does not tell.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:0, mps.")] = None,
    log: Annotated[str | None, typer.Option("--log", help="auto, text or json.")] = None,
    log_level: Annotated[str | None, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.")] = None,
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
