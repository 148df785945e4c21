"""The `sam-poll` program: all commands, in the groups that `--help` shows."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sam_poll import __version__
from sam_poll.cli import cluster, cvat, error_handling
from sam_poll.cli.bench import bench
from sam_poll.cli.doctor import doctor
from sam_poll.cli.models import models
from sam_poll.cli.mosaic import mosaic
from sam_poll.cli.predict import check, predict, schema
from sam_poll.cli.redis import redis
from sam_poll.cli.serve import serve
from sam_poll.cli.share import merge, retry, status
from sam_poll.cli.ui import ui
from sam_poll.cli.watch import watch

_GROUPS: dict[str, dict[str, Any]] = {
    "Everyday": {
        "watch": watch,
        "predict": predict,
        "check": check,
        "status": status,
        "retry": retry,
        "ui": ui,
        "merge": merge,
    },
    "CVAT": {"cvat": cvat.app},
    "Serving and scaling": {"serve": serve, "redis": redis, "cluster": cluster.app},
    "Large pictures": {"mosaic": mosaic},
    "Models and machine": {"models": models, "doctor": doctor, "bench": bench, "schema": schema},
}


class _Grouped(TyperGroup):
    """List the commands in the order of `_GROUPS`; Typer lists those with sub-commands last."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for commands in _GROUPS.values() for name in commands]


app = typer.Typer(
    cls=_Grouped,
    name="sam-poll",
    help="Drop a picture and a prompt into a folder; "
    "get its masks and contours back, ready for CVAT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 success · 2 bad usage · 3 some jobs failed · 4 model not loadable · "
    "70 GPU failed · 75 share not usable · 78 bad settings · "
    "40 to 55 a CVAT server, see `docs/cvat.md`",
)
for group, commands in _GROUPS.items():
    for name, command in commands.items():
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=group)
        else:
            app.command(name, rich_help_panel=group)(command)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(f"sam_poll {__version__}")
        raise typer.Exit


def main() -> None:
    """Run the `sam-poll` command."""
    error_handling.run(app)
