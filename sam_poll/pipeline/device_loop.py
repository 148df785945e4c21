"""The device stage: one thread that batches pictures, encodes them and decodes their prompts."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Executor
from dataclasses import replace
from functools import partial

from loguru import logger

from sam_poll.core.errors import DeviceError
from sam_poll.core.protocols import Embedding
from sam_poll.core.types import AutomaticMaskRequest
from sam_poll.imaging import automatic_masks, found_objects
from sam_poll.pipeline.finish_stage import FinishStage
from sam_poll.pipeline.run_context import RunContext
from sam_poll.pipeline.task import StageTimer, Task
from sam_poll.pipeline.tiled_jobs import TiledJobs

_IDLE_S = 1.0


class DeviceLoop:
    """The device thread of one run. Its results go to the finish stage, on the finish pool."""

    def __init__(
        self,
        context: RunContext,
        tiled_jobs: TiledJobs,
        finish_stage: FinishStage,
        finishers: Executor,
    ) -> None:
        self._context = context
        self._tiled_jobs = tiled_jobs
        self._finish_stage = finish_stage
        self._finishers = finishers
        self._engine = context.engine
        self._embeddings = context.embeddings
        self._stored = context.stored
        self._options = context.options
        self._queue = context.device_queue
        self._heartbeat = context.telemetry.device
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        context.device_thread = self._thread

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def join(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for the thread's end."""
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            self._heartbeat.beat()
            try:
                first = self._queue.get(timeout=_IDLE_S)
            except queue.Empty:
                continue
            if first is None:
                break
            batch = self._queue.batch(first, self._engine.batch, self._options.batch_wait_s)
            self._encode(batch)
            for task in batch:
                self._heartbeat.beat()
                stage = self._tiled_jobs.run_tile if task.tiled_job else self._predict
                self._context.run_stage(stage, task)
        self._embeddings.evict()

    def _encode(self, batch: list[Task]) -> None:
        """Encode the pictures that are not cached, together.

        An error other than the device's is not handled here: each job is tried alone in `_predict`.
        """
        batch = [task for task in batch if not (task.cancelled or task.tiled_job)]
        for task in batch:
            cached = None if task.embedding else self._embeddings.get(task.key)
            if cached:
                task.embedding = cached.embedding
        fresh = {task.key: task for task in batch if task.embedding is None}
        if len(fresh) < 2 or self._context.abort.is_set() or self._context.fatal:
            return
        started = time.monotonic()
        try:
            made = self._engine.encode([t.prepared for t in fresh.values() if t.prepared])
            embeddings = {
                key: self._cache(task, embedding)
                for (key, task), embedding in zip(fresh.items(), made, strict=True)
            }
        except DeviceError as error:
            self._context.fail_device(error, batch)
            return
        except Exception as error:  # noqa: BLE001  each job is tried alone next
            logger.debug(
                "a batch of {} failed ({}); its pictures are tried one by one", len(fresh), error
            )
            return
        for task in fresh.values():
            task.timings["encode"] = (time.monotonic() - started) * 1000 / len(fresh)
        # Held by the task, too: a small cache may have dropped the embedding again by its turn.
        for task in batch:
            task.embedding = task.embedding or embeddings[task.key]

    def _cache(self, task: Task, embedding: Embedding) -> Embedding:
        """Cache a new embedding, and return it as it is to be used."""
        if self._stored.enabled:
            task.stored = self._stored.take(task.key[0], embedding, task.notes)
            embedding = task.stored.cached.embedding
        # By the side it was made at, which may be a smaller one than its picture was prepared for.
        self._embeddings.put((task.key[0], embedding.frame.side), embedding, task.notes)
        return embedding

    def _predict(self, task: Task) -> None:
        try:
            embedding = self._embedding_of(task)
            if task.job.keep and task.stored is None and self._stored.enabled:
                task.stored = self._stored.take(task.key[0], embedding, task.notes)
            with StageTimer(task, "predict"):
                self._decode(task, embedding)
            # The side is the embedding's: the engine's may have changed since it was made.
            task.info = replace(self._engine.info, side=embedding.frame.side)
        except DeviceError as error:
            self._context.fail_device(error, [task])
            return
        task.prepared = None
        task.embedding = None
        if not self._options.keeps_picture(task.job):
            task.picture = None
        self._finishers.submit(self._context.run_stage, self._finish_stage.run, task)

    def _embedding_of(self, task: Task) -> Embedding:
        cached = self._embeddings.get(task.key)
        embedding = task.embedding or (cached.embedding if cached else None)
        if embedding is None:
            assert task.prepared is not None
            with StageTimer(task, "encode"):
                (embedding,) = self._engine.encode([task.prepared])
            embedding = self._cache(task, embedding)
        return embedding

    def _decode(self, task: Task, embedding: Embedding) -> None:
        request = task.job.prompts
        on_step = partial(self._context.step, task)
        if isinstance(request, AutomaticMaskRequest):
            task.packed_masks = automatic_masks.segment(
                self._engine,
                embedding,
                request,
                picture=task.picture,
                on_step=on_step,
            )
        elif task.concept:
            task.found = found_objects.search(
                self._engine, embedding, task.concept, on_step=on_step
            )
        elif task.prompts:
            task.logits = self._engine.decode(embedding, task.prompts)
        if task.job.embedding:
            task.array = embedding.array()
