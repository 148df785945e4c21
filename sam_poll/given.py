"""The flags that many commands have, and what is given by them becomes settings, for the commands that work on a share.

What can still go wrong here: nothing of its own; `settings` says what is wrong with a setting.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam_poll.errors import UsageError

if TYPE_CHECKING:
    from sam_poll.settings import Settings

Config = Annotated[Path | None, typer.Option("-c", "--config", help="Settings file.")]
ShareConfig = Annotated[Path | None, typer.Option("-c", "--config", help="Settings file. Without IN: ./config.yaml.")]
In = Annotated[Path | None, typer.Argument(metavar="IN", help="Folder to drop pictures and prompts in.")]
Model = Annotated[str | None, typer.Option("-m", "--model", help="A catalogue name, a checkpoint's path, or `demo`.")]
ModelCfg = Annotated[str | None, typer.Option("--model-cfg", help="The model's yaml, if the name does not tell.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:0, mps.")]
Formats = Annotated[
    list[str] | None, typer.Option("-f", "--format", help="mask, opex, overlay, cvat, coco, yolo; may be repeated.")
]
Log = Annotated[str | None, typer.Option("--log", help="auto, text or json.")]
LogLevel = Annotated[str | None, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.")]


def settings_of(source: Path | None, config: Path | None, **flags: Any) -> Settings:
    """The settings of a folder, a file, or the file that lies here; flags that are None are not given. UsageError,
    SettingsError."""
    from sam_poll import settings

    if source is None and config is None and not os.environ.get("SAM_POLL_CONFIG"):
        config = Path("config.yaml")
        if not config.is_file():
            raise UsageError(
                "neither a folder nor settings are given", remedy="`sam-poll watch IN OUT`, or `-c config.yaml`"
            )
    given = {key: value for key, value in flags.items() if value is not None}
    return settings.load(config, flags={"input": source, **given} if source else given)
