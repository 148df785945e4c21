"""The three stages and what flows between them: decode pool → one device thread → finish pool.

    door.jobs() ─▶ decode pool ─▶ device thread ─▶ finish pool ─▶ door.deliver() | door.reject()

The number of jobs between the doors is bounded, so a slow share slows the intake down instead of filling the memory.
One bad job never stops the others; only a device that has failed for good (`DeviceError`) ends the run.

What can still go wrong here: a picture library that crashes the process on hostile bytes takes the run with it (the
jobs in `work/` come back at the next start).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from loguru import logger

from sam_poll import geometry, images, prompts
from sam_poll.errors import DeviceError, InputError, PictureError, SamPollError
from sam_poll.fs import shown
from sam_poll.stats import Stats
from sam_poll.types import (
    Door,
    Embedding,
    Engine,
    Everything,
    Format,
    Job,
    Logits,
    Mask,
    ModelInfo,
    Picture,
    Prepared,
    Prompt,
    Result,
)

_POLL_S = 0.1
_SICK_S = 1.0
_MAX_BYTES = 2 << 30
_NOT_A_PICTURE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.EACCES, errno.EPERM}
_BAD_NAME = {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL}


@dataclass(frozen=True)
class Sizes:
    """How wide the stages are. The defaults suit 2 to 64 cores: the device thread needs a core of its own on a CPU,
    and decoding and finishing are short beside it."""

    decode_threads: int = 2
    finish_threads: int = 2
    queue: int = 4
    cache_mib: int = 512
    max_pixels: int = images.DEFAULT_MAX_PIXELS
    cover: int = 0  # decode pictures at a scale whose sides have at least this, even if the network wants less
    drain_s: float = 30.0


@dataclass(eq=False)
class _Task:
    job: Job
    prompts: tuple[Prompt, ...] = ()
    picture: Picture | None = None
    prepared: Prepared | None = None
    logits: list[Logits] = field(default_factory=list)
    info: ModelInfo | None = None
    timings: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)


class _Embeddings:
    """The last pictures' embeddings, by content: ten prompts for one picture cost one encoding. Device thread only."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._bytes = limit_bytes, 0
        self._kept: OrderedDict[tuple[str, int], Embedding] = OrderedDict()

    def get(self, key: tuple[str, int]) -> Embedding | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: tuple[str, int], embedding: Embedding) -> None:
        self._kept[key] = embedding
        self._bytes += embedding.nbytes
        while self._bytes > self._limit and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self._kept.clear()
        self._bytes = 0


class Pipeline:
    """Answers a door's jobs with an engine. `run` blocks until the door ends or `stop` is set."""

    def __init__(
        self,
        engine: Engine,
        formats: Sequence[Format],
        *,
        sizes: Sizes | None = None,
        stats: Stats | None = None,
        on_result: Callable[[Result], None] | None = None,
    ) -> None:
        self._engine, self._formats, self._on_result = engine, list(formats), on_result
        self._sizes, self.stats = sizes or Sizes(), stats or Stats()
        self._embeddings = _Embeddings(self._sizes.cache_mib << 20)
        self._device_queue: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._fatal: DeviceError | None = None
        self._hurry = threading.Event()

    def run(self, door: Door, stop: threading.Event) -> None:
        """Work until there is nothing left or `stop` is set, then finish what runs. DeviceError: the device is gone;
        what was not answered has been released.

        Setting `stop` twice is not needed: what has not finished `drain_s` after it is released.
        """
        sizes = self._sizes
        depth = sizes.decode_threads + sizes.queue + max(1, self._engine.batch) + sizes.finish_threads
        slots = threading.BoundedSemaphore(depth)
        device = threading.Thread(target=self._device_loop, name="device", daemon=True)
        with (
            ThreadPoolExecutor(sizes.decode_threads, "decode") as self._decoders,
            ThreadPoolExecutor(sizes.finish_threads, "finish") as self._finishers,
        ):
            self._door, self._slots, self._stop = door, slots, stop
            device.start()
            try:
                self._intake(door, stop)
                self._drain(depth, stop)
            finally:
                self._hurry.set()
                self._decoders.shutdown()
                self._device_queue.put(None)
                device.join(_POLL_S if self._fatal else self._sizes.drain_s)
        if self._fatal:
            raise self._fatal

    # ── intake and drain ──

    def _intake(self, door: Door, stop: threading.Event) -> None:
        ending = _Either(stop, lambda: self._fatal is not None)
        with contextlib.closing(door.jobs(ending)) as jobs:  # type: ignore[arg-type]
            while not ending.is_set():
                if not self._slots.acquire(timeout=_POLL_S):
                    continue
                job = next(jobs, None)
                if job is None:
                    self._slots.release()
                    return
                self.stats.took()
                self._decoders.submit(self._guarded, self._decode, _Task(job))

    def _drain(self, depth: int, stop: threading.Event) -> None:
        """Wait until every slot is back; after `stop`, no longer than `drain_s`."""
        deadline: float | None = None
        free = 0
        while free < depth:
            free += self._slots.acquire(timeout=_POLL_S)
            if not (stop.is_set() or self._fatal):
                continue
            deadline = deadline or time.monotonic() + self._sizes.drain_s
            if time.monotonic() > deadline and not self._hurry.is_set():
                logger.warning("{} jobs did not finish within {:.0f} s and go back", depth - free, self._sizes.drain_s)
                self._hurry.set()

    # ── stages; each hands on to the next, or ends the task ──

    def _guarded(self, stage: Callable[[_Task], None], task: _Task) -> None:
        """Run a stage; whatever goes wrong with this job ends this job only."""
        if self._hurry.is_set() or self._fatal:
            self._release(task)
            return
        try:
            stage(task)
        except SamPollError as error:
            self._reject(task, error)
        except MemoryError:
            remedy = "a smaller picture, or fewer objects at once"
            self._reject(task, InputError("not enough main memory for this job", remedy=remedy))
        except OSError as error:
            # The surroundings are sick, not the job: it goes back and waits.
            logger.error("job {} goes back: {}", shown(task.job.id), error)
            self._stop.wait(_SICK_S)
            self._release(task)
        except Exception as error:  # noqa: BLE001  one job's surprise must not end the daemon
            logger.opt(exception=True).error("job {}: unexpected {}", shown(task.job.id), type(error).__name__)
            reason = f"unexpected {type(error).__name__}: {error}"
            self._reject(task, InputError(reason, remedy="please report this with the log"))

    def _decode(self, task: _Task) -> None:
        job = task.job
        if job.fault:
            raise job.fault
        if isinstance(job.prompts, Everything):
            raise InputError(
                "segmenting everything without a prompt is not available yet",
                place="everything",
                remedy="give points or boxes",
            )
        with _timed(task, "decode"):
            data = _read(job.picture) if isinstance(job.picture, Path) else job.picture
            _check_bytes(job, data)
            info, sizes = self._engine.info, self._sizes
            cover = max(info.side, sizes.cover)
            try:
                task.picture = images.decode(data, cover=cover, both=info.family != "sam1", max_pixels=sizes.max_pixels)
            except PictureError as error:
                error.place = error.place or _file_name(job)
                raise
            task.prompts = prompts.fit(job.prompts, task.picture.size)
            task.prepared = self._engine.prepare(task.picture)
        self._device_queue.put(task)

    def _device_loop(self) -> None:
        while (first := self._device_queue.get()) is not None:
            batch, more = [first], True
            while more and len(batch) < self._engine.batch:
                try:
                    task = self._device_queue.get_nowait()
                except queue.Empty:
                    break
                if task is None:
                    self._device_queue.put(None)
                    more = False
                else:
                    batch.append(task)
            self._encode(batch)
            for task in batch:
                self._guarded(self._predict, task)
        self._embeddings.clear()

    def _encode(self, batch: list[_Task]) -> None:
        """Encode what is not known yet, together. A failure here shows again, job by job, in `_predict`."""
        fresh = {self._key(t): t for t in batch if t.prepared and self._embeddings.get(self._key(t)) is None}
        if len(fresh) < 2 or self._hurry.is_set() or self._fatal:
            return
        started = time.monotonic()
        try:
            made = self._engine.encode([t.prepared for t in fresh.values() if t.prepared])
        except Exception as error:  # noqa: BLE001  each job is tried alone next
            logger.debug("a batch of {} failed ({}); its pictures are tried one by one", len(fresh), error)
            return
        for (key, task), embedding in zip(fresh.items(), made, strict=True):
            self._embeddings.put(key, embedding)
            task.timings["encode"] = (time.monotonic() - started) * 1000 / len(fresh)

    def _predict(self, task: _Task) -> None:
        assert task.prepared is not None
        try:
            key = self._key(task)
            embedding = self._embeddings.get(key)
            if embedding is None:
                with _timed(task, "encode"):
                    (embedding,) = self._engine.encode([task.prepared])
                self._embeddings.put(key, embedding)
            with _timed(task, "predict"):
                task.logits = self._engine.decode(embedding, task.prompts)
            task.info = self._engine.info
        except DeviceError as error:
            logger.critical("{}", error)
            self._fatal = error
            self._release(task)
            return
        task.prepared = None
        self._finishers.submit(self._guarded, self._finish, task)

    def _finish(self, task: _Task) -> None:
        assert task.picture is not None
        assert task.info is not None
        with _timed(task, "masks"):
            masks: list[Mask] = [
                geometry.mask_of(logits, prompt.label) for logits, prompt in zip(task.logits, task.prompts, strict=True)
            ]
        result = Result(
            job_id=task.job.id,
            name=task.job.name,
            size=task.picture.size,
            masks=tuple(masks),
            prompts=task.prompts,
            model=task.info,
            picture=task.picture,
            timings=task.timings,
            notes=task.picture.notes + tuple(n for p in task.prompts for n in p.notes),
        )
        with _timed(task, "formats"):
            documents = [document for make in self._formats for document in make(result)]
        with _timed(task, "deliver"):
            delivered = self._persist(lambda: self._door.deliver(task.job, documents), task)
        if not delivered:
            return
        task.timings["total"] = (time.monotonic() - task.started) * 1000
        self.stats.answered(task.job.id, len(masks), task.timings)
        _log_answer(result)
        if self._on_result:
            try:
                self._on_result(result)
            except Exception:  # noqa: BLE001  the job is answered; who looks on cannot undo that
                logger.exception("the result's listener failed")
        self._slots.release()

    # ── ends ──

    def _reject(self, task: _Task, error: SamPollError) -> None:
        try:
            if not self._persist(lambda: self._door.reject(task.job, error), task):
                return
        except Exception as failure:  # noqa: BLE001  nothing is lost: the inputs are still in work/
            logger.opt(exception=True).critical("job {} cannot be rejected: {}", shown(task.job.id), failure)
        logger.warning("job {} rejected: {}", shown(task.job.id), shown(error))
        self.stats.rejected(task.job.id, error.code)
        self._slots.release()

    def _release(self, task: _Task) -> None:
        try:
            self._door.release(task.job)
        except OSError as error:
            logger.warning("job {} stays in work/ until the next start: {}", shown(task.job.id), error)
        self.stats.released()
        self._slots.release()

    def _persist(self, act: Callable[[], None], task: _Task) -> bool:
        """Deliver or reject, again and again while the surroundings are sick. False: gave up, the job is released."""
        pause = 0.5
        while True:
            try:
                act()
                return True
            except OSError as error:
                if error.errno in _BAD_NAME:
                    reason = f"its outputs cannot be written: {error.strerror}"
                    raise InputError(reason, remedy="a shorter, plainer name") from error
                if self._hurry.is_set() or self._stop.is_set():
                    self._release(task)
                    return False
                logger.error("job {} cannot be put away ({}); next try in {:g} s", shown(task.job.id), error, pause)
            self._stop.wait(pause)
            pause = min(pause * 2, 30.0)

    def _key(self, task: _Task) -> tuple[str, int]:
        assert task.prepared is not None
        return task.prepared.digest, task.prepared.frame.side


class _Either:
    """A stop event that is also set when a condition holds."""

    def __init__(self, stop: threading.Event, also: Callable[[], bool]) -> None:
        self._stop, self._also = stop, also

    def is_set(self) -> bool:
        return self._stop.is_set() or self._also()

    def wait(self, timeout: float | None = None) -> bool:
        return self._stop.wait(timeout) or self._also()


class _timed:  # noqa: N801  reads as a word in a `with`
    def __init__(self, task: _Task, stage: str) -> None:
        self._task, self._stage = task, stage

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *exc: object) -> None:
        self._task.timings[self._stage] = (time.monotonic() - self._started) * 1000


def _read(path: Path) -> bytes:
    """A picture's bytes; never through a link, never blocking on a pipe. Other OSErrors mean a sick share."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _NOT_A_PICTURE:
            raise PictureError(f"cannot be read: {error.strerror}", place=shown(path.name)) from error
        raise
    with os.fdopen(handle, "rb") as file:
        size = os.fstat(handle).st_size
        if size > _MAX_BYTES:
            raise PictureError(
                f"the file has {size >> 20} MiB; at most {_MAX_BYTES >> 20} are read", place=shown(path.name)
            )
        return file.read()


def _check_bytes(job: Job, data: bytes) -> None:
    """Whether the picture is the very file that the prompt names, if it does."""
    differs = None
    if job.nbytes is not None and job.nbytes != len(data):
        differs = f"has {len(data):,} bytes, but the prompt's image_bytes says {job.nbytes:,}"
    elif job.sha256 is not None and job.sha256 != hashlib.sha256(data).hexdigest():
        differs = "is not the file whose SHA-256 the prompt's image_sha256 names"
    if differs:
        raise PictureError(differs, place=_file_name(job), remedy="copy the picture again, or mend the prompt")


def _file_name(job: Job) -> str | None:
    return shown(job.picture.name) if isinstance(job.picture, Path) else None


def _log_answer(result: Result) -> None:
    ms = " ".join(f"{stage} {value:.0f}" for stage, value in result.timings.items())
    scores = " ".join(f"{shown(m.label)}={m.score:.2f}" for m in result.masks[:5])
    more = f" … {len(result.masks)} objects" if len(result.masks) > 5 else ""
    logger.info("job {} done: {}{} ({} ms)", shown(result.job_id), scores, more, ms)
    for note in result.notes:
        logger.info("job {}: {}", shown(result.job_id), shown(note))
