"""Pools of worker processes with the fake engine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sam_poll.core.errors import DeviceError
from sam_poll.core.protocols import Embedding
from sam_poll.core.types import Prompt
from sam_poll.engines.fake import FakeEngine
from sam_poll.formats import registry
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.worker_pool import WorkerPool, WorkerSpec
from sam_poll.pipeline.worker_process import WorkerSetup
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.source import FolderSource
from tests.conftest import Share
from tests.support.paths import ROOT


class Trapped(FakeEngine):
    """Does what a job's label says, in its worker; the file `once` marks it as done."""

    def __init__(self, once: Path | None = None) -> None:
        super().__init__()
        self.once = once

    def decode(self, embedding: Embedding, prompts: Sequence[Prompt]) -> list[Any]:
        label = prompts[0].label
        if label.startswith("once ") and self.once:
            if self.once.exists():
                label = ""
            else:
                self.once.touch()
        if label.endswith("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if label.endswith("device"):
            raise DeviceError("the device failed: injected")
        return super().decode(embedding, prompts)


def equipped(engine: type[FakeEngine] = FakeEngine, *arguments: Any) -> WorkerSetup:
    formats = registry.load(["mask"], registry.FormatOptions())
    return WorkerSetup(engine(*arguments), formats, PipelineOptions())


@contextmanager
def pool_of(equip: Any, count: int = 2, **more: Any) -> Iterator[WorkerPool]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    specs = [WorkerSpec(f"cpu #{n}", equip, env, "DEBUG") for n in range(count)]
    with WorkerPool(
        specs, more.pop("stop", threading.Event()), **{"pause_s": 0.01, **more}
    ) as pool:
        yield pool


def drain(share: Share, pool: WorkerPool, **options: Any) -> None:
    """Answer all jobs of the share."""
    made = FolderOptions(
        **{"settle_s": 0.0, "once": True, "mode": "poll", "rescan_s": 0.1, **options}
    )
    with FolderSource(share.layout, made) as source:
        pool.run(source, threading.Event())
