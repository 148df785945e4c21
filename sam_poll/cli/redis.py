"""`sam-poll redis`: its flags. The work is done by `integrations.redis`.

Nothing heavy is imported at the top, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sam_poll.cli.error_handling import reports
from sam_poll.cli.options import Config, Device, Formats, Log, LogLevel, Model, ModelCfg
from sam_poll.core.errors import ExitCode, UsageError


@reports
def redis(
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Use streams, which lose nothing. Default: pub/sub, as Waikato's scripts.",
        ),
    ] = False,
    url: Annotated[
        str | None,
        typer.Option("--url", help="Server: redis://host:port/0, rediss:// for TLS, unix://."),
    ] = None,
    url_file: Annotated[
        Path | None,
        typer.Option("--url-file", help="File with the URL. Default: SAM_POLL_REDIS_URL."),
    ] = None,
    password_env: Annotated[
        str | None, typer.Option("--password-env", help="Environment variable with the password.")
    ] = None,
    source: Annotated[str, typer.Option("--in", help="Input stream or channel.")] = "sam:in",
    target: Annotated[str, typer.Option("--out", help="Output stream or channel.")] = "sam:out",
    group: Annotated[
        str, typer.Option("--group", help="Consumer group of the streams.")
    ] = "sam_poll",
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep answered entries in the input stream.")
    ] = False,
    max_answers: Annotated[
        int,
        typer.Option(
            "--max-answers",
            min=0,
            help="Maximum number of answers in the output stream; 0: no limit.",
        ),
    ] = 0,
    config: Config = None,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    format: Formats = None,
    log: Log = None,
    log_level: LogLevel = None,
) -> ExitCode:
    """Answer requests sent through Redis. Ctrl-C finishes the running jobs, then stops."""
    from sam_poll.config import settings

    flags: dict[str, Any] = {
        "model": model,
        "model_cfg": model_cfg,
        "device": device,
        "formats": format,
        "log": log,
        "log_level": log_level,
    }
    loaded = settings.load(config, flags=flags)
    for name, flag in ((source, "--in"), (target, "--out"), (group, "--group")):
        if not name:
            raise UsageError("is empty", place=flag)
    if source == target:
        raise UsageError(
            "is the same as --in: answers would be taken for requests",
            place="--out",
            remedy="give another name",
        )
    from sam_poll.integrations.redis import service

    address = service.address_of(url, url_file, password_env)
    if stream:
        return service.streams(
            loaded,
            address,
            service.StreamNames(source, target, group),
            keep=keep,
            max_answers=max_answers,
        )
    if keep or max_answers or group != "sam_poll":
        raise UsageError("--keep, --max-answers and --group need streams", remedy="add --stream")
    others = [name for name in loaded.formats if name not in service.REQUIRED_FORMATS]
    formats = [*service.REQUIRED_FORMATS, *others]
    loaded = settings.load(config, flags={**flags, "formats": formats, "mask": "instances"})
    return service.pubsub(loaded, address, source, target, segmenter={"model_file": loaded.model})
