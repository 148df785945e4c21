"""`sam-poll cvat …`: the commands and their flags; `integrations.cvat` does the work.

Nothing heavy is imported at the top, so that `--help` is fast.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sam_poll.cli.error_handling import reports
from sam_poll.cli.options import Config, Device, Model, ModelCfg
from sam_poll.core.errors import ExitCode

if TYPE_CHECKING:
    from sam_poll.config.settings import Settings
    from sam_poll.integrations.cvat.client import CvatClient
    from sam_poll.integrations.cvat.shapes import Form

app = typer.Typer(
    help="Exchange with CVAT: prompts from it, tasks and masks to it.",
    no_args_is_help=True,
)

Host = Annotated[
    str | None,
    typer.Option("--host", envvar="CVAT_HOST", help="Server address: https://cvat.example.org."),
]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file", help="File with a token, or user:password. Default: the environment."
    ),
]
Org = Annotated[
    str | None, typer.Option("--org", help="Short name of the organization that has the task.")
]
Timeout = Annotated[
    float, typer.Option("--timeout", min=1, help="Timeout in seconds while a request is silent.")
]
State = Annotated[
    Path | None,
    typer.Option("--state", help="Folder for the journal, with which a run is resumed."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done; write nothing.")]
Negative = Annotated[
    list[str] | None,
    typer.Option("--negative", help="Label of points that are off the object; repeatable."),
]
Task = Annotated[
    int, typer.Argument(metavar="TASK_ID", min=1, help="Number of the task, as in its address.")
]
Job = Annotated[
    list[int] | None,
    typer.Option(
        "--job",
        min=1,
        metavar="ID",
        help="Number of a job of the task; repeatable. Default: all annotation jobs.",
    ),
]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images", help="Share that the task was made from. Default: download from the server."
    ),
]
Shapes = Annotated[
    str,
    typer.Option("--as", help="Shapes: mask, polygon or rectangle (the mask's bounding box)."),
]
Again = Annotated[
    bool,
    typer.Option(
        "--again", help="Write shapes of earlier runs again if they are not on the server."
    ),
]
_READ_S = 120.0


@app.command()
@reports
def prompts(
    annotations: Annotated[
        Path,
        typer.Argument(
            metavar="ANNOTATIONS",
            help="CVAT for images 1.1, COCO, Datumaro, OPEX, labelme or Pascal VOC; "
            "a folder or ZIP of these or of YOLO texts.",
        ),
    ],
    images: Annotated[
        Path, typer.Option("--images", help="Folder that the pictures' names are relative to.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to write to: a daemon's `in`.")
    ],
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="Label of the shapes to use; repeatable. Default: all."),
    ] = None,
    negative: Negative = None,
    no_pictures: Annotated[
        bool, typer.Option("--no-pictures", help="Write prompts only, copy no pictures.")
    ] = False,
) -> ExitCode:
    """Write one prompt file per picture for boxes and points drawn in CVAT, or for detections."""
    from sam_poll.integrations.cvat import import_prompts

    return import_prompts.write_prompts(
        annotations,
        images,
        output,
        labels=label or (),
        negatives=negative or (),
        pictures=not no_pictures,
    )


@app.command()
@reports
def push(
    output: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Folder with the answers, including `.cvat.xml` files."),
    ],
    task_name: Annotated[str, typer.Option("--task-name", help="Name of the task.")],
    share_prefix: Annotated[
        str,
        typer.Option(
            "--share-prefix",
            help="Path of the answers' share on the server's share. Default: its top folder.",
        ),
    ] = "",
    label: Annotated[
        list[str] | None,
        typer.Option("--label", help="Further label for the task; repeatable."),
    ] = None,
    project: Annotated[
        int | None,
        typer.Option(
            "--project", help="Project for the task, which then has the project's labels."
        ),
    ] = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Push pictures that are in no task of the project, or of this name, "
            "as a further task.",
        ),
    ] = False,
    polygon: Annotated[bool, typer.Option("--polygon", help="Upload masks as polygons.")] = False,
    dry_run: DryRun = False,
    host: Host = None,
    token_file: TokenFile = None,
    org: Org = None,
    timeout: Timeout = _READ_S,
    state: State = None,
) -> ExitCode:
    """Create a CVAT task of the answered pictures, and upload their masks."""
    from sam_poll.formats.merge import common
    from sam_poll.integrations.cvat import answers
    from sam_poll.integrations.cvat import push as command

    options = command.PushOptions(
        name=task_name,
        labels=tuple(label or ()),
        project=project,
        update=update,
        polygon=polygon,
        dry_run=dry_run,
    )
    found = answers.read_answers(output, common.share_prefix(share_prefix))
    client = _connect(host, token_file, org, timeout)
    return command.run(client, found, options, _state(state), org)


@app.command()
@reports
def masks(
    task: Task,
    job: Job = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", "--labels", help="Label of the objects to use; repeatable. Default: all."
        ),
    ] = None,
    images: Images = None,
    form: Shapes = "mask",
    source: Annotated[
        str,
        typer.Option("--from", help="What marks the objects: boxes (with points) or polygons."),
    ] = "boxes",
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="Delete boxes and points, or polygons, once their masks are on the server.",
        ),
    ] = False,
    negative: Negative = None,
    again: Again = False,
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
    """Segment the objects that a CVAT task's shapes mark; add their masks to the task.

    The shapes are boxes and points, or with --from polygons rough polygons.
    """
    from sam_poll.core.errors import UsageError
    from sam_poll.integrations.cvat import masks as command
    from sam_poll.integrations.cvat.shapes import SOURCES

    chosen_source = next((one for one in SOURCES if one == source), None)
    if chosen_source is None:
        raise UsageError(
            f"objects are not marked by {source!r}", place="--from", remedy=", ".join(SOURCES)
        )
    options = command.MasksOptions(
        form=_form(form),
        source=chosen_source,
        jobs=tuple(job or ()),
        labels=tuple(label or ()),
        negatives=tuple(negative or ()),
        images=_existing(images),
        replace=replace,
        again=again,
        dry_run=dry_run,
    )
    chosen = _settings(config, model=model, model_cfg=model_cfg, device=device, formats=["mask"])
    client = _connect(host, token_file, org, timeout)
    return command.run(client, task, options, chosen, _state(state))


@app.command()
@reports
def find(
    task: Task,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            "--labels",
            "--label",
            metavar="NAMES",
            help="Labels to find, separated by commas; repeatable. Default: all of the task.",
        ),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            metavar="LABEL=TEXT",
            help="What to find for a label, instead of its name; repeatable. "
            "LABEL= with --like-existing: shapes alone.",
        ),
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(
            "--threshold",
            metavar="[LABEL=]NUMBER",
            help="Score that an object must exceed, of all labels or of one; repeatable. "
            "Default: 0.5.",
        ),
    ] = None,
    max_objects: Annotated[
        int,
        typer.Option(
            "--max-objects",
            min=1,
            help="At most so many objects of a label on a picture, the best.",
        ),
    ] = 100,
    like_existing: Annotated[
        bool,
        typer.Option(
            "--like-existing",
            help="On each picture, find what is like the shapes that it has of the label, too.",
        ),
    ] = False,
    job: Job = None,
    images: Images = None,
    form: Shapes = "mask",
    again: Again = False,
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
    """Find the objects that a CVAT task's labels name, in its pictures; add them to the task."""
    from sam_poll.integrations.cvat import find as command
    from sam_poll.integrations.cvat import find_plan

    of_all, of_labels = find_plan.thresholds_of(threshold or ())
    options = find_plan.FindOptions(
        form=_form(form),
        jobs=tuple(job or ()),
        labels=tuple(labels or ()),
        texts=find_plan.texts_of(text or ()),
        threshold=of_all,
        thresholds=of_labels,
        max_objects=max_objects,
        like_existing=like_existing,
        images=_existing(images),
        again=again,
        dry_run=dry_run,
    )
    chosen = _settings(config, model=model, model_cfg=model_cfg, device=device, formats=["mask"])
    client = _connect(host, token_file, org, timeout)
    return command.run(client, task, options, chosen, _state(state))


@app.command()
@reports
def warm(
    task: Task,
    job: Job = None,
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
    """Encode a CVAT task's pictures ahead, into the disk cache, for fast first clicks."""
    from sam_poll.integrations.cvat import warm as command

    chosen = _settings(config, model=model, model_cfg=model_cfg, device=device)
    cache = command.cache_of(chosen)
    client = _connect(host, token_file, org, timeout)
    return command.run(
        client, task, tuple(job or ()), chosen, cache, _state(state), dry_run=dry_run
    )


def _form(name: str) -> Form:
    from sam_poll.core.errors import UsageError
    from sam_poll.integrations.cvat.shapes import FORMS

    chosen = next((one for one in FORMS if one == name), None)
    if chosen is None:
        raise UsageError(
            f"there are no shapes of type {name!r}", place="--as", remedy=", ".join(FORMS)
        )
    return chosen


def _existing(folder: Path | None) -> Path | None:
    from sam_poll.core.errors import UsageError

    if folder is not None and not folder.is_dir():
        raise UsageError("there is no such folder", place=f"--images {folder}")
    return folder


def _settings(config: Path | None, **flags: object) -> Settings:
    from sam_poll.config import settings
    from sam_poll.runtime import console

    console.set_up_log("text", "WARNING", refusals=False)
    return settings.load(config, flags=flags)


def _connect(
    host: str | None, token_file: Path | None, org: str | None, timeout_s: float
) -> CvatClient:
    import os

    from sam_poll.integrations.cvat import client, credentials
    from sam_poll.integrations.cvat.transport import RequestLimits
    from sam_poll.runtime import console

    console.set_up_log("text", "WARNING", refusals=False)
    found = credentials.find(os.environ, token_file)
    return client.connect(host, found, organization=org, limits=RequestLimits(read_s=timeout_s))


def _state(chosen: Path | None) -> Path:
    import os

    from sam_poll.integrations.cvat.journal import state_folder

    return state_folder(os.environ, chosen)
