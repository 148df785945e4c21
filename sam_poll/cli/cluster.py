"""`sam-poll cluster`: its flags. The work is done by `integrations.cluster`.

Nothing heavy is imported at the top, so that `--help` answers at once.
"""

from __future__ import annotations

import os
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

app = typer.Typer(
    help="One folder, many machines: a dispatcher claims jobs, workers run them. "
    "See `docs/scale.md`.",
    no_args_is_help=True,
)

Url = Annotated[
    str | None,
    typer.Option(
        "--broker",
        "--url",
        help="Redis: redis://user:password@host:port/0, rediss:// for TLS, unix://. "
        "RabbitMQ: amqp://user:password@host:port, amqps:// for TLS.",
    ),
]
UrlFile = Annotated[
    Path | None,
    typer.Option(
        "--url-file",
        help="File with the URL. Default: SAM_POLL_BROKER_URL, then SAM_POLL_REDIS_URL.",
    ),
]


@app.command()
@reports
def watch(
    source: In = None,
    config: ShareConfig = None,
    url: Url = None,
    url_file: UrlFile = None,
    ahead: Annotated[
        int,
        typer.Option("--ahead", min=1, help="Maximum number of claimed jobs queued for workers."),
    ] = 256,
    first: Annotated[
        list[str] | None,
        typer.Option("--first", help="Folder whose jobs go before all others; may be repeated."),
    ] = None,
    log: Log = None,
    log_level: LogLevel = None,
) -> ExitCode:
    """Scan the folder for all workers, and queue its jobs. Needs no model and no GPU."""
    settings = settings_of(source, config, log=log, log_level=log_level)
    from sam_poll.integrations import message_broker
    from sam_poll.integrations.cluster import service

    address = message_broker.find_url(os.environ, url, url_file)
    return service.watch(settings, address, ahead=ahead, first=first or [])


@app.command()
@reports
def worker(
    source: In = None,
    output: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder for the outputs.")
    ] = None,
    config: ShareConfig = None,
    url: Url = None,
    url_file: UrlFile = None,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    format: Formats = None,
    log: Log = None,
    log_level: LogLevel = None,
) -> ExitCode:
    """Run the jobs that the watcher queues, on the same folder.

    Ctrl-C finishes the running jobs, then stops.
    """
    flags = {
        "output": output,
        "model": model,
        "model_cfg": model_cfg,
        "device": device,
        "formats": format,
    }
    settings = settings_of(source, config, **flags, log=log, log_level=log_level)
    from sam_poll.integrations import message_broker
    from sam_poll.integrations.cluster import service

    return service.worker(settings, message_broker.find_url(os.environ, url, url_file))
