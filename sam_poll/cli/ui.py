"""`sam-poll ui`: its flags. The work is done by `integrations.ui`.

Nothing heavy is imported at the top, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam_poll.cli.error_handling import reports
from sam_poll.cli.options import (
    Device,
    In,
    Log,
    LogLevel,
    Model,
    ModelCfg,
    ShareConfig,
    config_of,
    missing_extra,
    settings_of,
)
from sam_poll.core.errors import ExitCode

if TYPE_CHECKING:
    from sam_poll.config.settings import Settings
    from sam_poll.integrations.ui.server import UiOptions

LISTEN = "127.0.0.1:8765"
"""The page's address, where `--listen` gives none."""


@reports
def ui(
    source: In = None,
    listen: Annotated[
        str, typer.Option("--listen", help="Address, host:port; a port alone is on 127.0.0.1.")
    ] = LISTEN,
    token_file: Annotated[
        Path | None,
        typer.Option(
            "--token-file",
            help="File with the token that users log in with. Default: SAM_POLL_SERVE_TOKEN.",
        ),
    ] = None,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Show everything, change nothing.")
    ] = False,
    config: ShareConfig = None,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    log: Log = None,
    log_level: LogLevel = None,
) -> ExitCode:
    """Show a share as a web page: watch it, look at answers, click prompts, retry failures.

    It works beside any number of daemons. The model is loaded for previews only.
    """
    flags: dict[str, Any] = {
        "serve.listen": listen,
        "serve.token_file": token_file,
        "model": model,
        "model_cfg": model_cfg,
        "device": device,
        "log": log,
        "log_level": log_level,
    }
    settings = settings_of(source, config, **flags)
    config = config_of(source, config)
    try:
        from sam_poll.integrations.ui import server
    except ModuleNotFoundError as error:
        raise missing_extra(error, "ui") from error
    if source is not None:
        flags["input"] = source
    options = ui_options_of(settings, config, flags, read_only=read_only)
    return server.run(settings, options)


def ui_options_of(
    settings: Settings, config: Path | None, flags: dict[str, Any], *, read_only: bool
) -> UiOptions:
    """Return what the page shows of the settings that `config` and `flags` have given."""
    from sam_poll.config.settings import in_force
    from sam_poll.integrations.ui.server import UiOptions

    doctor = ["--share", str(settings.folders.input)]
    if config is not None:
        doctor += ["-c", str(config.absolute())]
    for flag, key in (("-m", "model"), ("--model-cfg", "model_cfg"), ("--device", "device")):
        value = flags[key]
        if value is not None:
            # It runs in another folder, so that it does not take a config.yaml of this one.
            doctor += [flag, str(Path(value).absolute() if Path(value).is_file() else value)]
    return UiOptions(read_only, in_force(settings, config, flags=flags), doctor)
