"""`sam-poll cvat …`: the commands and their flags; what they do is in this room's other modules.

Nothing heavy is imported at the top, so that `--help` answers at once. What can still go wrong here: nothing of its
own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sam_poll.errors import ExitCode
from sam_poll.reporting import reports

app = typer.Typer(help="The round trip with CVAT: prompts out of it, tasks and masks into it.", no_args_is_help=True)


@app.command()
@reports
def prompts(
    annotations: Annotated[
        Path, typer.Argument(metavar="ANNOTATIONS", help="CVAT for images 1.1, COCO, OPEX, or a folder of YOLO texts.")
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
