"""`sam-poll redis`: its flags; what it does is in `redis_run`.

Nothing heavy is imported at the top, so that `--help` answers at once. What can still go wrong here: nothing of its
own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sam_poll.errors import ExitCode, UsageError
from sam_poll.given import Config, Device, Formats, Log, LogLevel, Model, ModelCfg
from sam_poll.reporting import reports


@reports
def redis(
    stream: Annotated[
        bool, typer.Option("--stream", help="Streams with a group: nothing is lost. Default: pub/sub, as Waikato's.")
    ] = False,
    url: Annotated[str | None, typer.Option("--url", help="redis://host:port/0, rediss:// for TLS, unix://.")] = None,
    url_file: Annotated[
        Path | None, typer.Option("--url-file", help="A file with the URL. Default: SAM_POLL_REDIS_URL.")
    ] = None,
    password_env: Annotated[
        str | None, typer.Option("--password-env", help="The variable that holds the password.")
    ] = None,
    source: Annotated[str, typer.Option("--in", help="The stream, or the channel, of the questions.")] = "sam:in",
    target: Annotated[str, typer.Option("--out", help="… and of the answers.")] = "sam:out",
    group: Annotated[str, typer.Option("--group", help="The streams' consumer group.")] = "sam_poll",
    keep: Annotated[bool, typer.Option("--keep", help="Leave answered entries in the stream.")] = False,
    max_answers: Annotated[
        int, typer.Option("--max-answers", min=0, help="Drop the oldest answers beyond so many; 0: never.")
    ] = 0,
    config: Config = None,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    format: Formats = None,
    log: Log = None,
    log_level: LogLevel = None,
) -> ExitCode:
    """Answer what is sent through Redis. Ctrl-C stops after what is at work."""
    from sam_poll import settings as settings_

    flags: dict[str, Any] = {"model": model, "model_cfg": model_cfg, "device": device, "formats": format}
    flags |= {"log": log, "log_level": log_level}
    given = {key: value for key, value in flags.items() if value is not None}
    chosen = settings_.load(config, flags=given)
    for name, flag in ((source, "--in"), (target, "--out"), (group, "--group")):
        if not name:
            raise UsageError("is empty", place=flag)
    if source == target:
        raise UsageError("answers would be taken for questions", place="--out", remedy="another name than --in")
    from sam_poll import redis_run as run

    address = run.address_of(url, url_file, password_env)
    if stream:
        return run.streams(chosen, address, run.Names(source, target, group), keep=keep, max_answers=max_answers)
    if keep or max_answers or group != "sam_poll":
        raise UsageError("--keep, --max-answers and --group are of streams", remedy="add --stream")
    wanted = [*run.NEEDED, *(name for name in chosen.formats if name not in run.NEEDED)]
    chosen = settings_.load(config, flags={**given, "formats": wanted, "mask": "instances"})
    return run.pubsub(chosen, address, source, target, segmenter={"model_file": chosen.model})
