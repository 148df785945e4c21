"""Fixtures that several test files share: a share to drop things into, and a daemon to run over
it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before torch is imported: two threads on two cores that others use too take up to nine times as
# long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import hypothesis
import numpy as np
import pytest
from loguru import logger

from sam_poll.core.alarms import Alarms
from sam_poll.core.stats import Snapshot
from sam_poll.core.telemetry import Telemetry
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.pipeline import Pipeline
from sam_poll.share.claims.model import list_work
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.layout import Layout
from sam_poll.share.source import FolderSource
from tests.support.optional import (  # noqa: F401  hooks
    pytest_make_collect_report,
    pytest_runtest_call,
    pytest_runtest_makereport,
    pytest_runtest_setup,
)

# A busy machine may take longer than Hypothesis's 200 ms for an example. In CI the examples are the
# same each time, as in Hypothesis's own profile for it: a push fails for what it has changed.
hypothesis.settings.register_profile(
    "sam_poll", deadline=None, derandomize=os.environ.get("CI") == "true"
)
hypothesis.settings.load_profile("sam_poll")

BOX = {"box": {"x0": 10, "y0": 10, "x1": 50, "y1": 40}}


def wait_until(condition: Callable[[], Any], timeout: float = 60.0) -> None:
    """Wait for a condition, with a clear failure when it does not come."""
    deadline = time.monotonic() + timeout
    tick = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        tick.wait(0.005)


def picture_bytes(ending: str = ".jpg", width: int = 64, height: int = 48, seed: int = 0) -> bytes:
    """A noisy picture, encoded."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    return cv2.imencode(ending, pixels)[1].tobytes()


@dataclass
class Share:
    """A share in a temporary folder, and ways to drop things into it."""

    root: Path
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        self.layout = Layout.below(self.root)
        self.input.mkdir(parents=True, exist_ok=True)

    @property
    def input(self) -> Path:
        return self.layout.input.path

    @property
    def work(self) -> Path:
        return self.layout.work.path

    @property
    def output(self) -> Path:
        return self.layout.output.path

    @property
    def done(self) -> Path:
        return self.layout.done.path

    @property
    def failed(self) -> Path:
        return self.layout.failed.path

    def drop(self, name: str, body: bytes | dict[str, Any] | str) -> Path:
        """Write a file into `in/`, in place."""
        path = self.input / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = (
            json.dumps(body).encode()
            if isinstance(body, dict)
            else body.encode()
            if isinstance(body, str)
            else body
        )
        path.write_bytes(data)
        return path

    def move_in(self, name: str, body: bytes | dict[str, Any] | str) -> Path:
        """Write a file elsewhere on the share and rename it into `in/`."""
        aside = self.root / "aside" / name
        aside.parent.mkdir(parents=True, exist_ok=True)
        data = (
            json.dumps(body).encode()
            if isinstance(body, dict)
            else body.encode()
            if isinstance(body, str)
            else body
        )
        aside.write_bytes(data)
        return aside.rename(self.input / name)

    def pair(self, stem: str, ending: str = ".jpg", prompt: Any = None, seed: int = 0) -> None:
        """Drop a picture and its prompt."""
        self.drop(stem + ending, picture_bytes(ending.lower(), seed=seed))
        self.drop(stem + ".json", prompt or BOX)

    def tree(self, folder: str) -> list[str]:
        """The files of one folder, relative to it."""
        root = getattr(self, folder)
        # A daemon may remove a folder meanwhile: `rglob` then raises, `os.walk` passes over it.
        paths = [Path(above, name) for above, _, names in os.walk(root) for name in names]
        names = [path.relative_to(root).as_posix() for path in paths if path.is_file()]
        ours = (
            [".sam_poll-"] if folder == "work" else []
        )  # the sentinel, and daemons' signs of life
        return sorted(n for n in names if not n.startswith(tuple(ours)))

    def at_work(self) -> dict[str, Path]:
        """The files in claims by the names they had in `in/`, and where they lie now."""
        claims = [c for c in list_work(self.layout.work)[0] if c.hold]
        files = [(c, name) for c in claims if c.path.is_dir() for name in c.path.names()]
        return {f"{c.folder}/{name}".lstrip("/"): c.path.path / name for c, name in files}

    def error(self, name: str) -> dict[str, Any]:
        """A rejected job's error file."""
        return json.loads((self.failed / f"{name}.error.json").read_text())

    def run_once(self, engine: Any = None, **options: Any) -> Snapshot:
        """Drain the share and return the counts."""
        pipeline = make_pipeline(engine)
        with FolderSource(
            self.layout, FolderOptions(**{"settle_s": 0.0, "once": True, "mode": "poll", **options})
        ) as source:
            pipeline.run(source, threading.Event())
        return pipeline.stats.now()


def make_pipeline(engine: Any = None, alarms: Alarms | None = None, **sizes: Any) -> Pipeline:
    """A pipeline that writes mask PNGs, over the fake engine unless another is given."""
    chosen = registry.load(["mask"], registry.FormatOptions())
    return Pipeline(
        engine or FakeEngine(),
        chosen,
        options=PipelineOptions(**sizes),
        telemetry=Telemetry(alarms=alarms),
    )


class Daemon:
    """A watching door and pipeline in a thread of this process."""

    def __init__(
        self, share: Share, engine: Any = None, alarms: Alarms | None = None, **options: Any
    ) -> None:
        self.stop = threading.Event()
        self.pipeline = make_pipeline(engine, alarms=alarms)
        self.source = FolderSource(share.layout, FolderOptions(**options))
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="daemon")

    def _run(self) -> None:
        try:
            with self.source as source:
                self.pipeline.run(source, self.stop)
        except BaseException as error:  # noqa: BLE001
            self.error = error

    def __enter__(self) -> Daemon:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the daemon did not stop"
        if self.error:
            raise self.error


@pytest.fixture
def share(tmp_path: Path) -> Share:
    return Share(tmp_path / "share")


@pytest.fixture(autouse=True)
def _log_of_its_own() -> Iterator[None]:
    """The log goes to the stderr of the test that runs now; a command under test binds it to one
    soon closed.
    """
    logger.remove()
    logger.add(lambda m: sys.stderr.write(str(m)), level="DEBUG", format="{level} {message}")
    yield
    logger.remove()


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """What goes into the log, line by line."""
    lines: list[str] = []
    handle = logger.add(lambda m: lines.append(str(m)), level="DEBUG", format="{level} {message}")
    yield lines
    with contextlib.suppress(ValueError):  # a command under test may have set the log up anew
        logger.remove(handle)
