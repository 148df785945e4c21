"""`sam-poll watch`, the daemon on a share, and `sam-poll predict`, a run over given files."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from loguru import logger

from sam_poll.config.settings import Settings
from sam_poll.core.errors import ExitCode
from sam_poll.core.text import shown
from sam_poll.core.types import Job, Result
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.runtime import builders, console, signals
from sam_poll.runtime.file_list import FileListSource
from sam_poll.runtime.service import Service, Workers
from sam_poll.share.claims import liveness
from sam_poll.share.intake.waiting import without_partner
from sam_poll.share.layout import Layout
from sam_poll.share.source import FolderSource


def watch(
    settings: Settings,
    *,
    once: bool = False,
    layout: Layout | None = None,
    model_type: str | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> ExitCode:
    """Answer what is dropped on a share until a signal comes or, with `once`, no job is left."""
    service = Service(settings, live_display=True)
    layout = layout or builders.layout_of(settings)
    options = builders.folder_options_of(settings, once=once)
    telemetry = service.telemetry
    source = FolderSource(
        layout, options, alarms=telemetry.alarms, pulse=telemetry.intake, state=telemetry.state
    )
    found_by = "events" if options.mode == "events" else "polling"
    with service.lifetime() as stop:
        answer_share(
            service, settings, source, found_by, model_type=model_type, on_result=on_result
        )
        return _report_end(service, source, layout, once=once, stopped=stop.is_set())


def answer_share(
    service: Service,
    settings: Settings,
    source: FolderSource,
    found_by: str,
    *,
    metrics: Sequence[object] = (),
    model_type: str | None = None,
    on_ready: Callable[[Workers], None] = lambda workers: None,
    on_result: Callable[[Result], None] | None = None,
) -> None:
    """Load the model and answer the jobs of a share until they end, or `service.stop` is set.

    - `found_by`: how the source finds its jobs, for the log.
    - `metrics`: see `Service.metrics`.
    - `on_ready`: called when the model is loaded and `source` entered.
    """
    layout = source.layout
    service.telemetry.formats = tuple(settings.formats)

    def ready(workers: Workers) -> None:
        logger.info("watching {} ({}), answers in {}", layout.input, found_by, layout.output)
        source.device_count = workers.device_count
        on_ready(workers)

    # The folders are checked and the metrics port opened before the model is loaded, so that simple
    # mistakes are reported at once.
    with source, service.metrics(source, metrics):
        service.notify_loading()
        for warning in format_conflicts(layout, source.worker, settings.formats):
            logger.warning("{}", warning)
        source.prescan()  # files that are there already settle while the model is loaded
        service.answer(source, on_ready=ready, model_type=model_type, on_result=on_result)


def _report_end(
    service: Service, source: FolderSource, layout: Layout, *, once: bool, stopped: bool
) -> ExitCode:
    """Log what was done and what was left; return the exit code."""
    rest = ""
    if once and source.waiting:
        rest = f"; waiting in {layout.input}: {console.count(source.waiting, 'file')}"
    left_behind = once and not stopped and _left_behind(layout)
    service.log_end("stopped" if stopped else "drained", rest)
    if not once:
        return ExitCode.OK
    if source.held:
        logger.warning(
            "{} could not be used: what needs them was left", console.count(source.held, "path")
        )
    rejected = service.telemetry.stats.now().rejected
    return ExitCode.FAILED_JOBS if rejected or left_behind or source.held else ExitCode.OK


def _left_behind(layout: Layout) -> bool:
    """Return whether files that may be meant as a job stay in the input folder, and log them.

    These are prompts without a picture, and pictures beside something that may be meant as their
    prompt. A picture with nothing beside it just waits for its prompt.
    """
    try:
        waiting = without_partner(layout)
    except OSError as error:
        logger.warning("{} cannot be searched for files that are left: {}", layout.input, error)
        return False
    for reason in waiting.explained.values():
        logger.warning("{}", reason)
    if waiting.prompts or waiting.explained:
        pictures = console.count(waiting.pictures, "picture")
        prompts = console.count(waiting.prompts, "prompt")
        logger.warning("left in {} without a partner: {}, {}", layout.input, pictures, prompts)
    return bool(waiting.prompts or waiting.explained)


def format_conflicts(layout: Layout, worker: str, formats: Sequence[str]) -> list[str]:
    """Return a warning for each living daemon of the share with other formats than `worker` has."""
    warnings: list[str] = []
    for name, path in liveness.heartbeat_files(layout.work):
        other = liveness.read_heartbeat(name, path, time.time()) if name != worker else None
        theirs = other.get("formats") if other and other["alive"] else None
        if isinstance(theirs, list) and theirs and set(map(str, theirs)) != set(formats):
            here = ", ".join(formats)
            there = shown(", ".join(map(str, theirs)))
            warnings.append(
                f"{shown(name)} answers jobs of this share as {there}, this daemon as {here}: "
                "which files a job gets depends on which of them takes it "
                "(give all of them the same `formats`)"
            )
    return warnings


def predict(
    settings: Settings,
    jobs: Sequence[Job],
    output: Path,
    *,
    on_result: Callable[[Result], None],
    on_reject: Callable[[Job, Exception], None],
) -> ExitCode:
    """Answer the given jobs once and write their outputs into `output`."""
    source = FileListSource(jobs, output, on_reject)
    with signals.stop_on_signals() as stop:
        engine = builders.engine_of(settings)
        pipeline = Pipeline(
            engine,
            builders.formats_of(settings),
            options=builders.pipeline_options_of(settings),
            on_result=on_result,
            disk_cache=builders.disk_cache_of(settings),
        )
        pipeline.run(source, stop)
        now = pipeline.stats.now()
    return ExitCode.FAILED_JOBS if now.rejected or now.answered < len(jobs) else ExitCode.OK
