"""The three stages and what flows between them: decode pool → one device thread → finish pool.

    door.jobs() ─▶ decode pool ─▶ device thread ─▶ finish pool ─▶ door.deliver() | door.reject()

The number of jobs between the doors is bounded, so a slow share slows the intake down instead of filling the memory.
One bad job never stops the others; only a device that has failed for good (`DeviceError`) ends the run. While the
surroundings are sick (answers cannot be written, pictures not be read), no further jobs are taken in.

What can still go wrong here: a picture library that crashes the process on hostile bytes takes the run with it. Its job
and its neighbours stay claimed and come back; each is then run alone (`Job.attempt`), which tells the culprit.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from loguru import logger

from sam_poll import bytesof, everything, geometry, images, prompts
from sam_poll.alarms import Alarms
from sam_poll.embeddings import Embeddings
from sam_poll.endings import Endings
from sam_poll.errors import (
    DeviceError,
    InputError,
    LostError,
    PictureError,
    SamPollError,
    UnfinishedError,
    UnforeseenError,
)
from sam_poll.fs import shown
from sam_poll.safe_path import SafePath
from sam_poll.stats import Pulse, Stats
from sam_poll.tasks import Either, Hurried, Task, log_answer, log_pieces, result_of, timed
from sam_poll.types import Document, Door, Embedding, Engine, Everything, Format, Job, Mosaic, Pieces, Result

_POLL_S = 0.1
_IDLE_S = 1.0
_SICK_S = 1.0
_LONGEST_SICK_S = 30.0
_WAIT_S = 0.25  # until it is looked anew whether others have done the pieces that are left
_MOSAIC = "`sam-poll mosaic IMAGE -o DIR`, or drop it into the folder of a daemon that has the extra `geo`"
_SICK_READS = 3  # pictures in a row that cannot be read: it is the share, not the pictures

Begin: TypeAlias = Callable[[Job, Callable[[], None]], Pieces]  # called with what is to be called between two steps


@dataclass(frozen=True)
class Sizes:
    """How wide the stages are. The defaults suit 2 to 64 cores: the device thread needs a core of its own on a CPU,
    and decoding and finishing are short beside it."""

    decode_threads: int = 2
    finish_threads: int = 2
    queue: int = 4
    batch_wait_s: float = 0.005  # how long the device may wait for pictures that are being decoded
    cache_mib: int = 512
    max_pixels: int = images.DEFAULT_MAX_PIXELS
    cover: int = 0  # decode pictures at a scale whose sides have at least this, even if the network wants less
    pixels: bool = True  # keep the decoded pictures until the end, for a format that draws on them
    drain_s: float = 30.0


class Pipeline:
    """Answers a door's jobs with an engine. `run` blocks until the door ends or `stop` is set.

    `formats` are those that each job is answered in; by their names, where jobs choose (`Job.formats`). `pieces` begins
    a job that is done piece by piece, between which others have their turn.
    """

    def __init__(
        self,
        engine: Engine,
        formats: Sequence[Format] | Mapping[str, Format],
        *,
        sizes: Sizes | None = None,
        stats: Stats | None = None,
        alarms: Alarms | None = None,
        intake: Pulse | None = None,
        device: Pulse | None = None,
        on_result: Callable[[Result], None] | None = None,
        pieces: Begin | None = None,
    ) -> None:
        self._alarms, self._intake_pulse, self._device_pulse = alarms or Alarms(), intake or Pulse(), device or Pulse()
        self._formats = formats if isinstance(formats, Mapping) else {str(n): f for n, f in enumerate(formats)}
        self._engine, self._on_result, self._begin = engine, on_result, pieces
        self._sizes, self.stats = sizes or Sizes(), stats or Stats()
        self._embeddings = Embeddings(self._sizes.cache_mib << 20)
        engine.relieve_by(self._embeddings.let_go)
        self._device_queue: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._fatal: DeviceError | None = None
        self._hurry = threading.Event()
        self._lock = threading.Lock()
        self._lone: Task | None = None
        self._aside: set[Task] = set()
        self._unread = self._coming = 0
        self._not_before = 0.0

    @property
    def hands(self) -> int:
        """How many devices may work on one job that is done in pieces."""
        return int(self._begin is not None)

    def run(self, door: Door, stop: threading.Event) -> None:
        """Work until there is nothing left or `stop` is set, then finish what runs. DeviceError: the device is gone;
        what was on it stays claimed, what else was not answered has been released.

        Setting `stop` twice is not needed: what has not finished `drain_s` after it is released.
        """
        sizes = self._sizes
        depth = sizes.decode_threads + sizes.queue + max(1, self._engine.batch) + sizes.finish_threads
        slots = threading.BoundedSemaphore(depth)
        self._depth = depth
        device = self._device = threading.Thread(target=self._device_loop, name="device", daemon=True)
        with (
            ThreadPoolExecutor(sizes.decode_threads, "decode") as self._decoders,
            ThreadPoolExecutor(sizes.finish_threads, "finish") as self._finishers,
        ):
            self._door, self._slots, self._stop = door, slots, stop
            self._ends = Endings(door, slots.release, self.stats, self._alarms, stop, self._hurry)
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
        ending = Either(stop, lambda: self._fatal is not None)
        with contextlib.closing(door.jobs(ending)) as jobs:  # type: ignore[arg-type]
            while not ending.is_set():
                self._intake_pulse.beat()
                if self._is_sick():
                    ending.wait(_POLL_S)
                    continue
                if not self._slots.acquire(timeout=_POLL_S):
                    continue
                job = next(jobs, None)
                if job is None:
                    self._slots.release()
                    return
                self.stats.took()
                task = Task(job)
                if job.attempt > 1:
                    self._alone(task, ending)
                else:
                    self._count_coming(1)
                    self._decoders.submit(self._decode_next, task)

    def _is_sick(self) -> bool:
        return self._ends.sick or time.monotonic() < self._not_before

    def _alone(self, task: Task, ending: Either) -> None:
        """Run a job that was at work when a process ended, with nothing else at work: if it ends this one too, no
        other job is blamed for it. Of one that is done in pieces the first that is left; others of that kind pause."""
        others = 0
        with self._lock:
            self._lone = task
        while others + len(self._aside) < self._depth - 1 and not ending.is_set():
            others += self._slots.acquire(timeout=_POLL_S)
            self._intake_pulse.beat()
        # to be run alone, or another time
        stage = self._decode if others + len(self._aside) >= self._depth - 1 else self._ends.release
        self._decoders.submit(self._guarded, stage, task)
        while not (task.proved.wait(_POLL_S) or ending.is_set()):
            self._intake_pulse.beat()
        self._lone = None
        self._slots.release(others) if others else None

    def _steps_aside(self, task: Task) -> bool:
        """Whether a job done in pieces pauses, because another one is to be run alone."""
        with self._lock:
            lone = self._lone
            (self._aside.discard if lone in (None, task) else self._aside.add)(task)
        return lone not in (None, task)

    def _drain(self, depth: int, stop: threading.Event) -> None:
        """Wait until every slot is back; after `stop`, no longer than `drain_s`."""
        deadline: float | None = None
        free = 0
        while free < depth:
            self._intake_pulse.beat()
            free += self._slots.acquire(timeout=_POLL_S)
            if not (stop.is_set() or self._fatal):
                continue
            deadline = deadline or time.monotonic() + self._sizes.drain_s
            if time.monotonic() > deadline and not self._hurry.is_set():
                logger.warning("{} jobs did not finish within {:.0f} s and go back", depth - free, self._sizes.drain_s)
                self._hurry.set()

    # ── stages; each hands on to the next, or ends the task ──

    def _guarded(self, stage: Callable[[Task], None], task: Task) -> None:
        """Run a stage; whatever goes wrong with this job ends this job only."""
        if task.left:
            return
        if self._hurry.is_set() or self._fatal or task.unwanted:
            self._ends.release(task)
            return
        job = task.job
        try:
            with logger.contextualize(job=job.id, generation=job.generation, attempt=job.attempt):
                self._run_stage(stage, task)
        except Exception:  # noqa: BLE001  a thread of the pools must not end with it
            logger.exception("job {}: an error while another was handled", shown(job.id))

    def _run_stage(self, stage: Callable[[Task], None], task: Task) -> None:
        try:
            stage(task)
        except Hurried:
            self._ends.release(task)
        except LostError as error:
            self._ends.lost(task, error)
        except UnfinishedError as error:
            if error is task.job.fault:  # it has had its time
                self._ends.reject(task, error)
                return
            self._ends.give_back(task, partial(self._door.defer, task.job, error), error)
        except SamPollError as error:
            self._ends.reject(task, error)
        except MemoryError:
            remedy = "a smaller picture, or fewer objects at once"
            self._ends.reject(task, InputError("not enough main memory for this job", remedy=remedy))
        except OSError as error:
            # The surroundings are sick, not the job: it goes back and waits. One that has gone was taken over or away.
            if not isinstance(error, FileNotFoundError):
                self._note_unread()
            self._ends.give_back(task, partial(self._door.release, task.job, error), error)
        except Exception as error:  # noqa: BLE001  one job's surprise must not end the daemon
            logger.opt(exception=True).error("job {}: unexpected {}", shown(task.job.id), type(error).__name__)
            reason = f"unexpected {type(error).__name__}: {error}"
            self._ends.reject(task, UnforeseenError(reason, remedy="please report this with the log"))

    def _decode_next(self, task: Task) -> None:
        try:
            self._guarded(self._decode, task)
        finally:
            self._count_coming(-1)

    def _count_coming(self, change: int) -> None:
        with self._lock:
            self._coming += change

    def _decode(self, task: Task) -> None:
        job = task.job
        if job.fault:
            raise job.fault
        if isinstance(job.prompts, Mosaic):
            self._open(task)
            return
        with timed(task, "decode"):
            data, seen = bytesof.read(job.picture) if isinstance(job.picture, SafePath) else (job.picture, None)
            self._unread = 0
            bytesof.check(job, data)
            try:
                self._look_at(task, data)
            except PictureError as error:
                error.place = error.place or bytesof.name(job)
                raise
            finally:
                if isinstance(job.picture, SafePath):
                    bytesof.check_unchanged(job.picture, seen)
            assert task.size is not None
            prompts.check_size(job.image_size, task.size, lambda: bytesof.header_of(data).stored)
            if isinstance(job.prompts, tuple):
                task.prompts = prompts.fit(job.prompts, task.size)
        self._device_queue.put(task)

    def _open(self, task: Task) -> None:
        """Make a job ready that is done piece by piece."""
        if task.job.scratch is None or self._begin is None:
            raise InputError("pictures larger than memory are not answered this way", place="mosaic", remedy=_MOSAIC)
        with timed(task, "open"):
            task.pieces = self._begin(task.job, partial(self._breathe, task))
        self._device_queue.put(task)

    def _look_at(self, task: Task, data: bytes) -> None:
        """Decode the picture and make it ready for the network; unless it is known, and nobody draws on it."""
        info, (drawn, cover) = self._engine.info, self._drawn(task.job)
        task.key = images.digest_of(data), info.side
        kept = None if drawn or task.crops else self._embeddings.get(task.key)
        if kept:
            task.embedding, task.size, task.notes = kept.embedding, kept.embedding.frame.size, kept.notes
            return
        cover = max(cover, info.side << task.crops if task.crops else 0)
        picture = images.decode_for(data, info, cover=cover, max_pixels=self._sizes.max_pixels, digest=task.key[0])
        task.size, task.notes = picture.size, picture.notes
        task.prepared = self._engine.prepare(picture)
        task.key = picture.digest, task.prepared.frame.side
        task.picture = picture if drawn or task.crops else None

    def _drawn(self, job: Job) -> tuple[bool, int]:
        """Whether a format draws on the picture, and the least side that it wants."""
        return (self._sizes.pixels, self._sizes.cover) if job.formats is None else (job.cover > 0, job.cover)

    def _device_loop(self) -> None:
        while True:
            self._device_pulse.beat()
            try:
                first = self._device_queue.get(timeout=_IDLE_S)
            except queue.Empty:
                continue
            if first is None:
                break
            batch = self._batch(first)
            self._encode(batch)
            for task in batch:
                self._device_pulse.beat()
                self._guarded(self._piece if task.pieces else self._predict, task)
        self._embeddings.let_go()

    def _batch(self, first: Task) -> list[Task]:
        """What is ready, up to the engine's batch; waits for more only while some is being decoded, and not long."""
        batch, deadline = [first], time.monotonic() + self._sizes.batch_wait_s
        while len(batch) < self._engine.batch:
            left = deadline - time.monotonic()
            try:
                task = (
                    self._device_queue.get(timeout=left)
                    if self._coming and left > 0
                    else self._device_queue.get_nowait()
                )
            except queue.Empty:
                break
            if task is None:
                self._device_queue.put(None)
                break
            batch.append(task)
        return batch

    def _encode(self, batch: list[Task]) -> None:
        """Encode what is not known yet, together. A failure here shows again, job by job, in `_predict`."""
        batch = [task for task in batch if not (task.unwanted or task.pieces)]
        for task in batch:
            kept = None if task.embedding else self._embeddings.get(task.key)
            task.embedding = kept.embedding if kept else task.embedding
        fresh = {task.key: task for task in batch if task.embedding is None}
        if len(fresh) < 2 or self._hurry.is_set() or self._fatal:
            return
        started = time.monotonic()
        try:
            made = self._engine.encode([t.prepared for t in fresh.values() if t.prepared])
        except DeviceError as error:
            self._fail(error, batch)
            return
        except Exception as error:  # noqa: BLE001  each job is tried alone next
            logger.debug("a batch of {} failed ({}); its pictures are tried one by one", len(fresh), error)
            return
        known = dict(zip(fresh, made, strict=True))
        for key, embedding in known.items():
            self._keep(fresh[key], embedding)
            fresh[key].timings["encode"] = (time.monotonic() - started) * 1000 / len(fresh)
        for task in batch:  # held by its task, too: a small cache may have dropped it again by its turn
            task.embedding = task.embedding or known[task.key]

    def _keep(self, task: Task, embedding: Embedding) -> None:
        """By the side it was made at, which may be a smaller one than its picture was prepared for."""
        self._embeddings.put((task.key[0], embedding.frame.side), embedding, task.notes)

    def _predict(self, task: Task) -> None:
        try:
            kept = self._embeddings.get(task.key)
            embedding = task.embedding or (kept.embedding if kept else None)
            if embedding is None:
                assert task.prepared is not None
                with timed(task, "encode"):
                    (embedding,) = self._engine.encode([task.prepared])
                self._keep(task, embedding)
            with timed(task, "predict"):
                self._ask(task, embedding)
            # The side is the embedding's: the step may have changed since it was made.
            task.info = replace(self._engine.info, side=embedding.frame.side)
        except DeviceError as error:
            self._fail(error, [task])
            return
        task.prepared = task.embedding = None
        task.picture = task.picture if self._drawn(task.job)[0] else None
        self._finishers.submit(self._guarded, self._finish, task)

    def _piece(self, task: Task) -> None:
        """One piece of a job, and then it is the others' turn."""
        assert task.pieces is not None
        if self._stop.is_set():
            raise Hurried  # what is done is kept
        if self._steps_aside(task):
            self._put_off(task)
            return
        try:
            with timed(task, "predict", add=True):
                more = task.pieces.take(self._engine)
        except DeviceError as error:
            self._fail(error, [task])
            return
        if more:
            self._unread = 0
            task.proved.set()
            self._device_queue.put(task)
        elif task.job.helps:
            self._ends.release(task)
        elif more is None:
            task.proved.set()  # nothing of it is at work here
            self._breathe(task)  # it waits, and not for ever
            self._put_off(task)
        else:
            self._finishers.submit(self._guarded, self._assemble, task)

    def _put_off(self, task: Task) -> None:
        threading.Timer(_WAIT_S, self._device_queue.put, [task]).start()

    def _assemble(self, task: Task) -> None:
        assert task.pieces is not None
        with timed(task, "assemble"):
            documents = task.pieces.documents()
        if self._delivered(task, documents, task.pieces.found):
            log_pieces(task, task.pieces.found)
            task.pieces.close()
            self._slots.release()

    def _ask(self, task: Task, embedding: Embedding) -> None:
        asked = task.job.prompts
        if isinstance(asked, Everything):
            between = partial(self._breathe, task)
            task.found = everything.segment(self._engine, embedding, asked, picture=task.picture, between=between)
        elif task.prompts:
            task.logits = self._engine.decode(embedding, task.prompts)
        if task.job.embedding:
            task.array = embedding.array()

    def _breathe(self, task: Task) -> None:
        """Between two steps of a long job: all can see that it moves, and it ends when it must. Hurried."""
        if threading.current_thread() is self._device:
            self._device_pulse.beat()
        self.stats.advanced()
        if self._hurry.is_set() or self._fatal or task.unwanted:
            raise Hurried

    def _finish(self, task: Task) -> None:
        asked = task.job.prompts
        with timed(task, "masks"):
            if isinstance(asked, Everything):
                masks = everything.masks(task.found, asked, between=partial(self._breathe, task))
            else:
                pairs = zip(task.logits, task.prompts, strict=True)
                masks = [geometry.mask_of(logits, prompt.label) for logits, prompt in pairs]
        task.found = []
        result = result_of(task, masks)
        chosen = self._formats if task.job.formats is None else task.job.formats
        with timed(task, "formats"):
            documents = [document for name in chosen for document in self._formats[name](result)]
        if not self._delivered(task, documents, len(masks)):
            return
        log_answer(result, documents)
        if self._on_result:
            try:
                self._on_result(result)
            except Exception:  # noqa: BLE001  the job is answered; who looks on cannot undo that
                logger.exception("the result's listener failed")
        self._slots.release()

    def _delivered(self, task: Task, documents: Sequence[Document], objects: int) -> bool:
        """False: the job is over another way."""
        with timed(task, "deliver"):
            delivered = self._ends.persist(lambda: self._door.deliver(task.job, documents), task)
        task.proved.set()
        if delivered:
            task.timings["total"] = (time.monotonic() - task.started) * 1000
            self.stats.answered(task.job.id, objects, task.timings)
        return delivered

    def _fail(self, error: DeviceError, tasks: list[Task]) -> None:
        """The device is gone. The jobs that were on it stay claimed: each may be the reason, so this run counts."""
        logger.critical("{}", error)
        self._fatal = error
        for task in tasks:
            task.left = True
            task.proved.set()
            self._ends.gone(error.code)

    def _note_unread(self) -> None:
        """After a few pictures in a row that cannot be read, the share is to blame: wait before taking more."""
        self._unread += 1
        if self._unread >= _SICK_READS:
            pause = min(_SICK_S * 2 ** (self._unread - _SICK_READS), _LONGEST_SICK_S)
            self._not_before = time.monotonic() + pause
