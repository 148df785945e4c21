"""Tests of `cvat warm`: every picture is encoded once, whatever interrupts the command."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sam_poll.cli.main import app
from sam_poll.config import settings
from sam_poll.core.errors import CvatError, ExitCode, ShareError
from sam_poll.core.protocols import Embedding
from sam_poll.core.types import ModelInput, Point, Prompt
from sam_poll.engines.fake import FakeEngine
from sam_poll.integrations.cvat import client, credentials, warm
from sam_poll.integrations.cvat.transport import RequestLimits
from sam_poll.pipeline.predictor import Predictor
from sam_poll.runtime import builders
from tests.conftest import picture_bytes
from tests.support.cvat_server import TOKEN, Fault, StandIn, Task

QUICK = RequestLimits(connect_s=2.0, read_s=5.0, retry_delays_s=(0.0, 0.0, 0.0), poll_s=0.0)
COUNT = 12


def pictures(count: int) -> list[tuple[str, bytes]]:
    return [(f"cam1/{n}.png", picture_bytes(".png", seed=n)) for n in range(count)]


@pytest.fixture
def task(memory: StandIn) -> Task:
    return memory.add_task("cam1", pictures(COUNT), "dog")


def downloads(memory: StandIn) -> int:
    return sum("type=frame" in line for line in memory.log)


class Run:
    """The command on one machine: every call uses the same journal and cache."""

    def __init__(self, host: str, folder: Path) -> None:
        self.host = host
        self.state = folder / "state"
        self.cache = folder / "embeddings"
        self.engines: list[FakeEngine] = []
        self.flags: dict[str, Any] = {"model": "fake", "cache.folder": str(self.cache)}

    def settings(self) -> settings.Settings:
        return settings.load(None, env={}, flags={"cache.disk_mib": 64, **self.flags})

    def __call__(
        self,
        task: Task,
        make: Callable[[], FakeEngine] = FakeEngine,
        *jobs: int,
        dry_run: bool = False,
    ) -> ExitCode:
        who = credentials.Credentials(token=TOKEN)
        connection = client.connect(self.host, who, limits=QUICK)

        def engine_of(_: Any) -> FakeEngine:
            self.engines.append(make())
            return self.engines[-1]

        return warm.run(
            connection,
            task.id,
            jobs,
            self.settings(),
            warm.cache_of(self.settings()),
            self.state,
            dry_run=dry_run,
            engine_of=engine_of,
        )

    @property
    def encoded(self) -> list[int]:
        return [len(engine.encoded) for engine in self.engines]


@pytest.fixture
def run(host: str, tmp_path: Path) -> Run:
    return Run(host, tmp_path)


def test_after_the_command_the_first_click_costs_the_decoder_only(
    run: Run, task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(task) == ExitCode.OK
    out = capsys.readouterr().out
    assert f"task {task.id}: {COUNT} pictures encoded, 0 before (fake, float32, side 256)" in out
    engine = FakeEngine()
    predictor = Predictor(engine, disk_cache=builders.disk_cache_of(run.settings()))
    for _, picture in task.frames:
        predictor.predict(predictor.embed(picture), [Prompt(points=(Point(9, 9),))])
    assert engine.calls == {"encode": 0, "decode": COUNT}


def test_a_second_run_downloads_and_encodes_nothing(
    run: Run, task: Task, memory: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    run(task)
    before = downloads(memory)
    assert before == COUNT
    capsys.readouterr()
    assert run(task) == ExitCode.OK
    assert downloads(memory) == before
    assert run.encoded == [COUNT, 0]
    assert f"0 pictures encoded, {COUNT} before" in capsys.readouterr().out


def test_pictures_that_have_left_the_cache_are_encoded_again(run: Run, task: Task) -> None:
    run(task)
    for path in list(run.cache.iterdir())[:3]:
        path.unlink()
    assert run(task) == ExitCode.OK
    assert run.encoded == [COUNT, 3]


def test_an_interrupted_run_is_continued(run: Run, memory: StandIn) -> None:
    # More than are in the pipeline at once.
    task = memory.add_task("cam2", pictures(60), "dog")

    class Interrupted(FakeEngine):
        def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
            if len(self.encoded) == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return super().encode(pictures)

    with pytest.raises(KeyboardInterrupt):
        run(task, lambda: Interrupted(batch=1))
    done = len(list(run.cache.iterdir()))
    assert 4 <= done < 60
    assert run(task) == ExitCode.OK
    assert run.encoded[1] == 60 - done


def test_a_picture_that_cannot_be_used_fails_alone_and_is_named(
    run: Run, task: Task, capsys: pytest.CaptureFixture[str]
) -> None:
    task.chunk_size, task.missing = 1, {5}
    assert run(task) == ExitCode.FAILED_JOBS
    assert task.frames[5][0] in capsys.readouterr().err
    assert run.encoded == [COUNT - 1]
    task.missing = set()
    assert run(task) == ExitCode.OK
    assert run.encoded == [COUNT - 1, 1]


def test_a_server_that_fails_ends_the_command_and_the_next_run_continues(
    run: Run, task: Task, memory: StandIn
) -> None:
    def refused(method: str, path: str) -> Fault | None:
        return Fault(401) if "type=frame" in path and downloads(memory) > 5 else None

    memory.when = refused
    with pytest.raises(CvatError) as caught:
        run(task)
    assert caught.value.kind == ExitCode.CVAT_UNAUTHORIZED
    assert "the same command continues" in str(caught.value)
    memory.when = lambda method, path: None
    assert run(task) == ExitCode.OK
    assert sum(run.encoded) <= COUNT + 1


def test_without_a_disk_cache_the_command_says_so_before_it_asks_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["cvat", "warm", "7", "--host", "http://127.0.0.1:1", "-m", "fake"]
    done = CliRunner().invoke(app, line, env={"CVAT_ACCESS_TOKEN": TOKEN})
    assert done.exit_code == ExitCode.SETTINGS
    assert "cache.disk_mib" in done.output
    assert "SAM_POLL_CACHE__DISK_MIB" in done.output


def test_a_folder_that_cannot_be_written_ends_the_command_with_the_reason(
    run: Run, task: Task, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    run.flags["cache.folder"] = str(tmp_path / "file" / "embeddings")
    with pytest.raises(ShareError):
        run(task)


def test_a_dry_run_says_what_would_be_encoded_and_downloads_nothing(
    run: Run, task: Task, memory: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    for expected in (COUNT, 0):
        assert run(task, dry_run=True) == ExitCode.OK
        assert f"dry run: {expected} pictures of {COUNT} would" in capsys.readouterr().out
        before = downloads(memory)
        run(task)
        assert downloads(memory) == before + expected


def test_only_the_frames_of_a_named_job_are_encoded(run: Run, task: Task, memory: StandIn) -> None:
    first, _ = memory.split(task, segment_size=8, overlap=0)
    assert run(task, FakeEngine, first.id) == ExitCode.OK
    assert run.encoded == [8]


def test_deleted_frames_are_left_out(run: Run, task: Task) -> None:
    task.deleted = [0, 3]
    assert run(task) == ExitCode.OK
    assert run.encoded == [COUNT - 2]


def test_a_cache_too_small_for_the_task_is_reported(
    run: Run, task: Task, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = builders.disk_cache_of

    def small(*given: Any, **more: Any) -> Any:
        cache = of(*given, **more)
        assert cache
        cache._limit = 4000
        return cache

    monkeypatch.setattr(builders, "disk_cache_of", small)
    assert run(task) == ExitCode.FAILED_JOBS
    assert "raise cache.disk_mib" in capsys.readouterr().err


def test_the_command_line_works_from_end_to_end(
    host: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", TOKEN)
    monkeypatch.setenv("SAM_POLL_CACHE__DISK_MIB", "64")
    monkeypatch.setenv("SAM_POLL_CACHE__FOLDER", str(tmp_path / "embeddings"))
    line = ["cvat", "warm", str(task.id), "-m", "fake", "--host", host]
    result = CliRunner().invoke(app, [*line, "--state", str(tmp_path / "state")])
    assert result.exit_code == 0, result.output
    assert f"{COUNT} pictures encoded" in result.output
    assert len(list((tmp_path / "embeddings").iterdir())) == COUNT
