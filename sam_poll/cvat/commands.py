"""`sam-poll cvat …`: the commands and their flags; what they do is in this room's other modules.

Nothing heavy is imported at the top, so that `--help` answers at once. What can still go wrong here: nothing of its
own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sam_poll.errors import ExitCode
from sam_poll.given import Config, Device, Model, ModelCfg
from sam_poll.reporting import reports

app = typer.Typer(help="The round trip with CVAT: prompts out of it, tasks and masks into it.", no_args_is_help=True)

Host = Annotated[str | None, typer.Option("--host", envvar="CVAT_HOST", help="The server: https://cvat.example.org.")]
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help="A file with a token, or user:password. Default: the environment."),
]
Org = Annotated[str | None, typer.Option("--org", help="The organization's short name, if the task is in one.")]
Timeout = Annotated[float, typer.Option("--timeout", min=1, help="Seconds a request may be silent.")]
State = Annotated[Path | None, typer.Option("--state", help="The folder for the journal of what is done.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
_READ_S = 120.0


@app.command()
@reports
def prompts(
    annotations: Annotated[
        Path,
        typer.Argument(
            metavar="ANNOTATIONS",
            help="CVAT for images 1.1, COCO, OPEX, labelme or Pascal VOC; a folder or ZIP of these or of YOLO texts.",
        ),
    ],
    images: Annotated[Path, typer.Option("--images", help="The folder that the pictures' names are relative to.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write to: a daemon's `in`.")],
    label: Annotated[
        list[str] | None, typer.Option("--label", help="Take only shapes of this label; may be repeated.")
    ] = None,
    negative: Annotated[
        list[str] | None,
        typer.Option("--negative", help="Points of this label are not on the object; may be repeated."),
    ] = None,
    no_pictures: Annotated[bool, typer.Option("--no-pictures", help="Write prompts only, copy no pictures.")] = False,
) -> ExitCode:
    """Make prompts of boxes and points drawn in CVAT, or of detections: one prompt file a picture."""
    from sam_poll.cvat import prompts as job

    return job.write(
        annotations, images, output, labels=label or (), negatives=negative or (), pictures=not no_pictures
    )


@app.command()
@reports
def push(
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder the answers lie in, with `.cvat.xml` files.")
    ],
    task_name: Annotated[str, typer.Option("--task-name", help="The name of the new task.")],
    share_prefix: Annotated[
        str, typer.Option("--share-prefix", help="Where our share begins on the server's share, if not at its top.")
    ] = "",
    label: Annotated[
        list[str] | None, typer.Option("--label", help="A further label for the task; may be repeated.")
    ] = None,
    project: Annotated[
        int | None, typer.Option("--project", help="The project for the task; its labels count.")
    ] = None,
    polygon: Annotated[bool, typer.Option("--polygon", help="Upload masks as polygons.")] = False,
    dry_run: DryRun = False,
    host: Host = None,
    token_file: TokenFile = None,
    org: Org = None,
    timeout: Timeout = _READ_S,
    state: State = None,
) -> ExitCode:
    """Make a CVAT task of the pictures that have been answered, and upload their masks."""
    from sam_poll.cvat import push as job

    wish = job.Wish(task_name, share_prefix, tuple(label or ()), project, polygon, dry_run)
    found = job.read(output, wish)
    return job.run(_connect(host, token_file, org, timeout), found, wish, _state(state), org)


@app.command()
@reports
def masks(
    task: Annotated[int, typer.Argument(metavar="TASK_ID", min=1, help="The task's number, as in its address.")],
    label: Annotated[
        list[str] | None, typer.Option("--label", "--labels", help="Take only objects of this label; may be repeated.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option("--images", help="The share that the task was made from. Default: ask the server.")
    ] = None,
    form: Annotated[str, typer.Option("--as", help="mask, polygon or rectangle (the mask's tight box).")] = "mask",
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete boxes and points once their masks are there.")
    ] = False,
    negative: Annotated[
        list[str] | None,
        typer.Option("--negative", help="Points of this label are not on the object; may be repeated."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Write what an earlier run has written, if it is not there any more.")
    ] = False,
    dry_run: DryRun = False,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    config: Config = None,
    host: Host = None,
    token_file: TokenFile = None,
    org: Org = None,
    timeout: Timeout = _READ_S,
    state: State = None,
) -> ExitCode:
    """Answer the boxes and points of a CVAT task with masks, and write these to the same task."""
    from sam_poll import console, settings
    from sam_poll.cvat import masks as job
    from sam_poll.cvat.shapes import FORMS
    from sam_poll.errors import UsageError

    console.set_up_log("text", "WARNING")
    chosen = next((one for one in FORMS if one == form), None)
    if chosen is None:
        raise UsageError(f"there are no shapes of type {form!r}", place="--as", remedy=", ".join(FORMS))
    if images is not None and not images.is_dir():
        raise UsageError("there is no such folder", place=f"--images {images}")
    flags = {"model": model, "model_cfg": model_cfg, "device": device, "formats": ["mask"]}
    chosen_settings = settings.load(config, flags={k: v for k, v in flags.items() if v is not None})
    wish = job.Wish(chosen, tuple(label or ()), tuple(negative or ()), images, replace, again, dry_run)
    return job.run(_connect(host, token_file, org, timeout), task, wish, chosen_settings, _state(state))


def _connect(host: str | None, token_file: Path | None, org: str | None, timeout: float) -> Any:
    import os

    from sam_poll import console
    from sam_poll.cvat import credentials, server
    from sam_poll.cvat.calls import Limits

    console.set_up_log("text", "WARNING")
    who = credentials.find(os.environ, token_file)
    return server.connect(host, who, organization=org, limits=Limits(read_s=timeout))


def _state(chosen: Path | None) -> Path:
    import os

    from sam_poll.cvat.journal import state_folder

    return state_folder(os.environ, chosen)
