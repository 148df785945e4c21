"""`sam-poll cluster`: its flags; what they do is in `cluster_run`.

Nothing heavy is imported at the top, so that `--help` answers at once. What can still go wrong here: nothing of its
own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sam_poll.errors import ExitCode
from sam_poll.given import Device, Formats, In, Log, LogLevel, Model, ModelCfg, ShareConfig, settings_of
from sam_poll.reporting import reports

app = typer.Typer(
    help="One folder, many machines: a watcher hands out, workers answer. See `docs/scale.md`.", no_args_is_help=True
)

Url = Annotated[
    str | None, typer.Option("--url", help="redis://user:password@host:port/0, rediss:// for TLS, unix://.")
]
UrlFile = Annotated[Path | None, typer.Option("--url-file", help="A file with the URL. Default: SAM_POLL_REDIS_URL.")]


@app.command()
@reports
def watch(
    source: In = None,
    config: ShareConfig = None,
    url: Url = None,
    url_file: UrlFile = None,
    ahead: Annotated[
        int, typer.Option("--ahead", min=1, help="So many pictures wait, claimed, for a worker at most.")
    ] = 256,
    first: Annotated[
        list[str] | None, typer.Option("--first", help="A folder whose jobs go before all others; may be repeated.")
    ] = None,
    log: Log = None,
    log_level: LogLevel = None,
) -> ExitCode:
    """Look at the folder for all workers, and hand out what is dropped. Needs no model and no card."""
    settings = settings_of(source, config, log=log, log_level=log_level)
    from sam_poll import cluster_run as run

    return run.watch(settings, run.find(url, url_file), ahead=ahead, first=first or [])


@app.command()
@reports
def worker(
    source: In = None,
    output: Annotated[Path | None, typer.Argument(metavar="OUT", help="Folder for the answers.")] = None,
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
    """Answer what the watcher hands out, on the same folder. Ctrl-C stops after what is at work."""
    flags = {"output": output, "model": model, "model_cfg": model_cfg, "device": device, "formats": format}
    settings = settings_of(source, config, **flags, log=log, log_level=log_level)
    from sam_poll import cluster_run as run

    return run.worker(settings, run.find(url, url_file))
