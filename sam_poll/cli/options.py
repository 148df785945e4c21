"""The flags that several commands share, and the settings that follow from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam_poll.core import missing_library
from sam_poll.core.errors import SettingsError, UsageError
from sam_poll.formats import registry

if TYPE_CHECKING:
    from sam_poll.config.settings import Settings

Config = Annotated[Path | None, typer.Option("-c", "--config", help="Settings file.")]
ShareConfig = Annotated[
    Path | None,
    typer.Option("-c", "--config", help="Settings file. Default without IN: ./config.yaml."),
]
In = Annotated[
    Path | None, typer.Argument(metavar="IN", help="Folder to drop pictures and prompts in.")
]
Model = Annotated[
    str | None,
    typer.Option("-m", "--model", help="Name in the catalogue, path of a checkpoint, or `demo`."),
]
ModelCfg = Annotated[
    str | None,
    typer.Option("--model-cfg", help="Yaml of the model, if its name does not determine it."),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:0, mps.")]
Formats = Annotated[
    list[str] | None,
    typer.Option("-f", "--format", help=f"{', '.join(registry.REGISTRY)}; may be repeated."),
]
Log = Annotated[str | None, typer.Option("--log", help="auto, text or json.")]
LogLevel = Annotated[str | None, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.")]


def settings_of(source: Path | None, config: Path | None, **flags: Any) -> Settings:
    """Load the settings for a folder, from a file, or from `./config.yaml`.

    Flags that are None count as not given. Raises UsageError, SettingsError.
    """
    from sam_poll.config import settings

    config = config_of(source, config)
    return settings.load(config, flags={"input": source, **flags})


def missing_extra(error: ModuleNotFoundError, extra: str) -> Exception:
    """Return the error of a command for a package of an extra that is not installed."""
    return missing_library.missing_extra(error, extra, "this command", SettingsError)


def config_of(source: Path | None, config: Path | None) -> Path | None:
    """Return the settings file to use: without a folder and a file it is `./config.yaml`.

    None: no file, or the one that the environment names. Raises UsageError.
    """
    if source is not None or config is not None or os.environ.get("SAM_POLL_CONFIG"):
        return config
    config = Path("config.yaml")
    if not config.is_file():
        raise UsageError(
            "no folder and no settings file",
            remedy="name the input folder, or a settings file: `-c config.yaml`",
        )
    return config
