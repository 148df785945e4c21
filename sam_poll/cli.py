"""The command line: commands and their flags; what they do is elsewhere.

Nothing heavy is imported at the top, so that `--help` answers at once. What can still go wrong here: an exception that
we did not foresee; it ends with one line, and its traceback goes into a file for the report.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sam_poll import __version__, cluster_cli, reporting, streams
from sam_poll.cvat import commands as cvat_commands
from sam_poll.doctor.command import doctor
from sam_poll.errors import ExitCode, ShareError, UsageError
from sam_poll.given import Device, Formats, In, Log, LogLevel, Model, ModelCfg, ShareConfig, settings_of
from sam_poll.mosaic_cli import mosaic
from sam_poll.redis_cli import redis
from sam_poll.reporting import reports, say
from sam_poll.serve.commands import serve

app = typer.Typer(
    name="sam-poll",
    help="Drop a picture and a prompt into a folder; get its masks and contours back, ready for CVAT.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 all done · 2 bad usage · 3 some jobs failed · 4 model not loadable · 70 GPU failed · "
    "75 share not usable · 78 bad settings · 40 to 55 a CVAT server, see `docs/cvat.md`",
)
models = typer.Typer(help="List, download and verify the networks' weights.", no_args_is_help=True)
app.add_typer(models, name="models")
app.add_typer(cvat_commands.app, name="cvat")
app.command()(mosaic)
app.command()(serve)
app.command()(redis)
app.command()(doctor)
app.add_typer(cluster_cli.app, name="cluster")


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"sam_poll {__version__}")
        raise typer.Exit


@app.command()
@reports
def watch(
    source: In = None,
    output: Annotated[Path | None, typer.Argument(metavar="OUT", help="Folder for the answers.")] = None,
    config: ShareConfig = None,
    once: Annotated[bool, typer.Option("--once", help="Answer what is there, then exit.")] = False,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    format: Formats = None,
    log: Log = None,
    log_level: LogLevel = None,
) -> ExitCode:
    """Watch a folder and answer every picture + prompt dropped into it. Ctrl-C stops after what is at work."""
    flags = {"output": output, "model": model, "model_cfg": model_cfg, "device": device, "formats": format}
    settings = settings_of(source, config, **flags, log=log, log_level=log_level)
    from sam_poll.app import watch as run

    return run(settings, once=once)


@app.command()
@reports
def predict(
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE…", help="Pictures.", readable=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the answers.")],
    point: Annotated[
        list[str] | None, typer.Option("--point", help="x,y or x,y,0 (background); may be repeated.")
    ] = None,
    box: Annotated[list[str] | None, typer.Option("--box", help="x0,y0,x1,y1; several are several objects.")] = None,
    everything: Annotated[bool, typer.Option("--everything", help="Segment all there is, without a prompt.")] = False,
    prompt: Annotated[
        Path | None, typer.Option("--prompt", help="A prompt file, for all the pictures.", readable=False)
    ] = None,
    label: Annotated[str, typer.Option("--label", help="The label of what --point and --box mark.")] = "object",
    config: ShareConfig = None,
    model: Model = None,
    model_cfg: ModelCfg = None,
    device: Device = None,
    format: Formats = None,
    log_level: Annotated[str, typer.Option("--log-level", help="DEBUG, INFO, WARNING or ERROR.")] = "WARNING",
) -> ExitCode:
    """Answer some pictures once. Without --point, --box, --everything or --prompt, the prompt beside each is used."""
    from sam_poll import console, oneoff
    from sam_poll import settings as settings_
    from sam_poll.fs import shown

    console.set_up_log("text", log_level.upper(), refusals=False)
    jobs = oneoff.jobs_for(pictures, oneoff.prompts_of_flags(point or [], box or [], label, everything), prompt)
    flags: dict[str, Any] = {"model": model, "model_cfg": model_cfg, "device": device}
    flags["formats"] = format or (None if config else ["mask", "opex", "overlay"])
    settings = settings_.load(config, flags={k: v for k, v in flags.items() if v is not None})

    def refused(job: Any, error: Any) -> None:
        error.place = f"{job.name}: {error.place}" if error.place and job.name not in error.place else job.name
        say(error)

    # The cheap mistakes are told before torch is imported and the model loaded.
    faults = oneoff.faults_of(jobs, int(settings.limits.picture_mpx * 1_000_000))
    for job, error in faults.items():
        refused(job, error)
    jobs = [job for job in jobs if job not in faults]
    if not jobs:
        return ExitCode.FAILED_JOBS
    oneoff.make_writable(output)
    from sam_poll.app import predict as run

    rows: dict[str, list[list[str]]] = {}

    def result(done: Any) -> None:
        rows[done.job_id] = [
            [done.name, str(n), m.label, f"{m.score:.2f}", f"{m.area:,}", f"{done.timings['total']:.0f}"]
            for n, m in enumerate(done.masks, 1)
        ] or [[done.name, "", "nothing found", "", "", f"{done.timings['total']:.0f}"]]

    code = run(settings, jobs, output, on_result=result, on_reject=refused)
    if rows:
        columns = ["picture", "#", "object", "predicted IoU", "pixels", "ms"]
        console.result_console().print(
            console.table("", columns, [row for job in jobs for row in rows.get(job.id, [])], right={1, 3, 4, 5})
        )
        console.error_console().print(f"written to {shown(output)}", style="dim", markup=False, highlight=False)
    return code or (ExitCode.FAILED_JOBS if faults else ExitCode.OK)


@app.command()
@reports
def check(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH…", help="Prompts, pictures, settings, folders.", readable=False)
    ],
) -> ExitCode:
    """Validate prompts, pictures' headers and settings without loading a model."""
    from sam_poll import oneoff
    from sam_poll.errors import SettingsError
    from sam_poll.fs import shown

    fine, wrong = 0, []
    for finding in oneoff.check(paths):
        if streams.unread():
            break
        if finding.error is None:
            fine += 1
        else:
            wrong.append(finding.error)
            place = finding.error.place
            prefix = "" if place and str(finding.path) in place else f"{shown(finding.path)}: "
            typer.echo(f"{prefix}{finding.error}")
    typer.echo(f"{fine} fine, {len(wrong)} wrong", err=bool(wrong))
    if any(isinstance(error, SettingsError) for error in wrong):
        return ExitCode.SETTINGS
    return ExitCode.FAILED_JOBS if wrong else ExitCode.OK


@app.command()
@reports
def schema() -> None:
    """Print the JSON Schema of prompt files."""
    from sam_poll import prompts

    typer.echo(json.dumps(prompts.schema(), indent=2))


@app.command()
@reports
def status(
    source: In = None,
    config: ShareConfig = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count what lies in the five folders, name what has waited longest, and the daemons at work with their alarms."""
    settings = settings_of(source, config)
    from sam_poll import console
    from sam_poll.app import layout_of
    from sam_poll.doors.report import status as look
    from sam_poll.fs import shown

    layout = layout_of(settings)
    if not layout.input.is_dir():
        raise ShareError("the share is not there", place=str(layout.input), remedy="mount it, or name another folder")
    report = look(layout)
    living = [worker for worker in report["workers"] if worker["alive"]]  # what the dead last said is over
    alarms = [{"worker": worker["worker"], **alarm} for worker in living for alarm in console.alarms_of(worker)]
    if as_json:
        report["alarms"] = alarms
        typer.echo(json.dumps(report))
        return
    rows = [
        [name, *(str(report[name].get(kind, "")) for kind in ("pictures", "prompts", "errors", "other")), str(folder)]
        for name, folder in layout.folders.items()
    ]
    out = console.result_console()
    out.print(console.table("", ["folder", "pictures", "prompts", "errors", "other", ""], rows, right={1, 2, 3, 4}))
    oldest = report["oldest"]
    typer.echo(f"waiting longest: {shown(oldest['name'])}, {oldest['seconds']:.0f} s" if oldest else "nothing waits")
    lone = report["without_partner"]
    if lone["pictures"] or lone["prompts"]:
        counts = f"{console.count(lone['pictures'], 'picture')}, {console.count(lone['prompts'], 'prompt')}"
        typer.echo(f"without a partner: {counts}")
    for one in lone["explained"]:
        typer.echo(f"  {shown(one['name'])}: {shown(one['reason'])} ({shown(one['remedy'])})")
    typer.echo("" if report["workers"] else "no daemon works here")
    if report["workers"]:
        columns = ["daemon", "host", "pid", "model", "device", "last sign of life", "alarms"]
        out.print(console.table("", columns, console.worker_rows(report["workers"])))
    for alarm in alarms:
        message = f"alarm ({shown(alarm['kind'])}) of {shown(alarm['worker'])}: {shown(alarm['message'])}"
        typer.echo(f"{message}, for {alarm['seconds']:.0f} s")
    for line in (line for worker in living for line in console.held_lines(worker)):
        typer.echo(line)


@app.command()
@reports
def retry(
    pattern: Annotated[str, typer.Argument(help="Which jobs, by their path below failed: `cam1/*`.")] = "*",
    source: Annotated[Path | None, typer.Option("--in", help="The input folder, if no settings file names it.")] = None,
    config: ShareConfig = None,
) -> None:
    """Put failed jobs back into the input folder and drop their error files."""
    settings = settings_of(source, config)
    from sam_poll import console
    from sam_poll.app import layout_of
    from sam_poll.doors.report import retry as put_back
    from sam_poll.fs import shown

    count = put_back(layout_of(settings), pattern, on_move=lambda job: typer.echo(shown(job)))
    typer.echo(f"put back into {settings.folders.input}: {console.count(count, 'job')}", err=True)


@app.command()
@reports
def merge(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder the answers lie in.")],
    target: Annotated[Path, typer.Option("-o", "--output", help="The file to write.")],
    format: Annotated[str, typer.Option("--format", help="cvat, coco or yolo (a ZIP).")] = "cvat",
) -> None:
    """Join the answers of many pictures into one file for a CVAT task."""
    from sam_poll import formats
    from sam_poll.doors.layout import walk
    from sam_poll.fs import write_whole
    from sam_poll.safe_path import SafePath

    if format not in formats.MERGES:
        raise UsageError(
            f"there is no format `{format}` to merge", place="--format", remedy=", ".join(sorted(formats.MERGES))
        )
    endings, _ = formats.MERGES[format]
    if not output.is_dir():
        raise UsageError("there is no such folder", place=str(output))
    made = target.resolve()  # of an earlier time: all objects would be there twice
    answers = SafePath.at(output)
    names = sorted(n for n, _ in walk(answers) if n.endswith(endings) and (output / n).resolve() != made)
    if not names:
        remedy = f"add `{format}` to `formats` and answer again"
        raise UsageError(f"no {' and '.join(endings)} files", place=str(output), remedy=remedy)
    body = b"".join(formats.merged(format, ((name, (answers / name).read_bytes()) for name in names)))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(SafePath.beside(target), body)
    typer.echo(f"{len(names)} files joined into {target}", err=True)


@app.command()
@reports
def bench(
    model: Annotated[
        list[str] | None, typer.Option("-m", "--model", help="A model; may be repeated. Default: by the device.")
    ] = None,
    size: Annotated[list[str] | None, typer.Option("--size", help="2048x1536; may be repeated.")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", help="Jobs a round. Default: some seconds' worth.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Rounds; the median counts. Default: 3.")] = None,
    objects: Annotated[int, typer.Option("--objects", help="Objects in each picture.")] = 1,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:0, mps.")] = "auto",
    part: Annotated[
        list[str] | None, typer.Option("--part", help="speed, outside or latency; may be repeated. Default: all.")
    ] = None,
    pictures: Annotated[Path | None, typer.Option("--pictures", help="A folder of your own JPEGs.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures into this file.")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Draw the speeds into this PNG.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One short round of the bundled model.")] = False,
) -> None:
    """Measure the naive loop, this program and the bare network side by side on this machine."""
    from sam_poll.bench import command
    from sam_poll.bench.plan import plan_of

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
    command.bench(plan, json_file=json_file, plot_file=plot)


@models.command("list")
@reports
def models_list() -> None:
    """The models that can be named in settings, and whether they are here."""
    from sam_poll import console
    from sam_poll.engines import catalog

    rows = [["demo", "sam2", "6", "bundled; knows drawn shapes only"]]
    for name, entry in catalog.MODELS.items():
        path = catalog.path_of(name)
        rows.append([name, entry.family, f"{entry.size >> 20}", str(path) if path.is_file() else "not downloaded"])
    console.result_console().print(console.table("", ["name", "family", "MiB", "where"], rows, right={2}))


@models.command("download")
@reports
def models_download(names: Annotated[list[str], typer.Argument(metavar="NAME…", help="Catalogue names.")]) -> None:
    """Download models into the cache folder and verify them."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from sam_poll.console import error_console
    from sam_poll.engines import catalog

    known = [catalog.path_of(name) for name in names]  # all names are known before the first byte travels
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=error_console()) as progress:
        for name in names:
            task = progress.add_task(name, total=None)
            catalog.download(name, progress=functools.partial(_advance, progress, task))
    for path in known:
        typer.echo(path)


def _advance(progress: Any, task: Any, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


@models.command("verify")
@reports
def models_verify(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME|FILE…", help="Default: all that are here.")] = None,
) -> ExitCode:
    """Compare model files with their known SHA-256."""
    from sam_poll.engines import catalog

    wanted = names or [name for name in catalog.MODELS if catalog.path_of(name).is_file()]
    wrong = 0
    for name in wanted:
        good = catalog.verify(name)
        wrong += good is False
        typer.echo(f"{name}: {'as published' if good else 'no hash is known for it' if good is None else 'DIFFERENT'}")
    if not wanted:
        typer.echo("no model is downloaded", err=True)
    return ExitCode.MODEL if wrong else ExitCode.OK


def main() -> None:
    """The `sam-poll` command."""
    reporting.run(app)
