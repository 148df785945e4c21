"""What `cvat masks`, `cvat find` and `cvat warm` share: frames through the pipeline, and reports.

The answers of each frame are in the journal when its job has ended, so a run that is interrupted is
continued by the same command.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import typer

from sam_poll.config.settings import Settings
from sam_poll.core.errors import CvatError, InputError, SamPollError
from sam_poll.core.protocols import Engine, Format
from sam_poll.core.text import listed, shown
from sam_poll.integrations.cvat import shapes, task_source
from sam_poll.integrations.cvat.journal import Journal
from sam_poll.integrations.cvat.shapes import FramePicture, Label
from sam_poll.integrations.cvat.upload import progress
from sam_poll.pipeline.disk_cache import DiskCache
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.runtime import builders
from sam_poll.runtime.console import count, print_error

MakeEngine = Callable[[Settings], Engine]


class FrameRunner:
    """Runs the pipeline on frames. `remedies` are those that were printed, each only once."""

    def __init__(
        self,
        settings: Settings,
        journal: Journal,
        *,
        source: type[task_source.CvatTaskSource] = task_source.CvatTaskSource,
        output: Format = task_source.journal_format,
    ) -> None:
        self.remedies: set[str] = set()
        self._settings = settings
        self._journal = journal
        self._source = source
        self._output = output

    def run(
        self,
        engine: Engine,
        requests: Sequence[task_source.FrameRequest],
        fetch: task_source.FetchPicture,
        stop: threading.Event,
        disk_cache: DiskCache | None,
    ) -> list[task_source.FrameRequest]:
        """Answer the requests until `stop` is set.

        Returns those that failed; each is printed when it fails, and so are the pictures that have
        left the server's share. Raises the error that would meet every frame.
        """
        failed: list[task_source.FrameRequest] = []
        lock = threading.Lock()
        with progress() as bar:
            row = bar.add_task("pictures", total=len(requests))

            def on_end(request: task_source.FrameRequest, error: SamPollError | None) -> None:
                with lock:
                    bar.advance(row)
                    if error:
                        failed.append(request)
                        print_refusal(request.frame.name, error, self.remedies)

            options = replace(
                builders.pipeline_options_of(self._settings), pixels=False, min_decode_side=0
            )
            source = self._source(
                requests, fetch, self._journal, max_pixels=options.max_pixels, on_end=on_end
            )
            Pipeline(engine, [self._output], options=options, disk_cache=disk_cache).run(
                source, stop
            )
        if source.failure:
            raise source.failure
        return failed


@contextmanager
def resumable(journal: Journal) -> Iterator[None]:
    """Tell, where the command is ended by CVAT or the user, that the same command continues."""
    try:
        yield
    except CvatError as error:
        who = "it" if "same command" in (error.remedy or "") else "the same command"
        resume = f"{who} continues with the answers stored in {shown(journal.folder)}"
        error.remedy = f"{error.remedy}; {resume}" if error.remedy else resume
        raise
    except KeyboardInterrupt:
        folder = shown(journal.folder)
        typer.echo(
            f"interrupted; the answers so far are stored in {folder}: "
            "the same command continues from there",
            err=True,
        )
        raise


# ── printing ──


def title(task: int, jobs: Sequence[int]) -> str:
    """Return what the command works on: the task, and the jobs that were named."""
    if not jobs:
        return f"task {task}"
    numbers = ", ".join(str(job) for job in dict.fromkeys(jobs))
    return f"task {task}, {'job' if len(set(jobs)) == 1 else 'jobs'} {numbers}"


def print_honeypots(frames: Iterable[FramePicture]) -> None:
    """Print which frames are left out because they serve to check annotators, if any."""
    names = [shown(frame.name) for frame in sorted(frames, key=lambda frame: frame.number)]
    if names:
        typer.echo(
            f"{count(len(names), 'frame')} left out, because CVAT checks annotators with them "
            f"(honeypots): {', '.join(names)}",
            err=True,
        )


def print_unscored(labels: Iterable[Label]) -> None:
    """Print the labels whose shapes' scores are not kept, if any."""
    unscored = sorted({label.name for label in labels if not label.keeps_score})
    if unscored:
        typer.echo(
            f"scores are not written for labels without an attribute `{shapes.SCORE}`: "
            f"{', '.join(unscored)}",
            err=True,
        )


def print_missing(names: Sequence[str]) -> None:
    """Print which pictures of the task have left the server's share, if any."""
    if names:
        verb = "has" if len(names) == 1 else "have"
        pictures = count(len(names), "picture")
        typer.echo(f"{pictures} of the task {verb} left the share: {listed(names)}", err=True)


def print_refusal(name: str, error: SamPollError, remedies: set[str]) -> None:
    """Print why a picture or an object is refused; a remedy only if it is not in `remedies`."""
    place = shown(name)
    if error.place and name not in error.place:
        place = f"{place}: {error.place}"
    remedy = None if error.remedy in remedies else error.remedy
    remedies.add(error.remedy or "")
    print_error(InputError(error.reason, place=place, remedy=remedy))
