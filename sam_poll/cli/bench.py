"""`sam-poll bench`: the naive loop, this program and the bare network, measured side by side.

Nothing heavy is imported at the top, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sam_poll.cli.error_handling import reports


@reports
def bench(
    model: Annotated[
        list[str] | None,
        typer.Option("-m", "--model", help="A model; may be repeated. Default: by the device."),
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option("--size", help="2048x1536; may be repeated.")
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", help="Jobs a round. Default: as many as take some seconds."),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", help="Rounds, of which the median counts. Default: 3.")
    ] = None,
    objects: Annotated[int, typer.Option("--objects", help="Objects in each picture.")] = 1,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:0, mps.")] = "auto",
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part", help="speed, outside, latency or runtimes; may be repeated. Default: all."
        ),
    ] = None,
    pictures: Annotated[
        Path | None,
        typer.Option("--pictures", help="Folder with JPEGs to use instead of drawn pictures."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="PNG file for a plot of the speeds.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run one short round with the bundled model.")
    ] = False,
) -> None:
    """Measure the naive loop, this program and the bare network side by side on this machine."""
    from sam_poll.diagnostics.bench.command import run_bench
    from sam_poll.diagnostics.bench.plan import plan_of

    plan = plan_of(
        models=model or (),
        sizes=size or (),
        jobs=jobs,
        rounds=rounds,
        objects=objects,
        device=device,
        parts=part or (),
        pictures=pictures,
        quick=quick,
    )
    run_bench(plan, json_file=json_file, plot_file=plot)
