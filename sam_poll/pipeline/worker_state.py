"""State of a worker pool and of each of its workers.

The pool hands jobs out (`worker_pool`), and a supervisor for each device starts its processes and
receives their messages (`worker_supervisor`); both work on this state.
"""

from __future__ import annotations

import subprocess
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from loguru import logger

from sam_poll.core.errors import ClaimLostError
from sam_poll.core.protocols import JobSource
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.text import shown
from sam_poll.core.types import Job, ModelInfo
from sam_poll.pipeline.channel import Channel
from sam_poll.pipeline.messages import JobCount
from sam_poll.pipeline.worker_process import Equip

_REMEMBERED_PICTURES = 64


@dataclass(frozen=True)
class WorkerSpec:
    """One worker of a pool.

    - `name`: of its device, for people.
    - `equip`: makes its engine and formats, in its process.
    - `env`: the environment of its process.
    """

    name: str
    equip: Equip
    env: Mapping[str, str]
    log_level: str = "INFO"


@dataclass(eq=False)
class WorkerHandle:
    """State of one device's process, as the pool sees it.

    - `jobs`: handed out and not ended, by number; `started`: those that the process has begun.
    - `calls`: calls to the source that are in progress, by job number.
    - `pictures`: those whose embeddings it has, the latest last.
    - `alarms`: kinds of the alarms that it has raised.
    - `uncounted`: how many jobs it was given and has not counted as ended.
    - `ended_uncounted`: by job id, what to count of those that have ended, should it die before.
    - `last_moved`: when its device loop moved last.
    - `finished`: it has ended because all jobs are done. `killed`: by this pool, at the end.
    """

    spec: WorkerSpec
    channel: Channel | None = None
    process: subprocess.Popen[bytes] | None = None
    wants_job: bool = False
    jobs: dict[int, Job] = field(default_factory=dict)
    started: set[int] = field(default_factory=set)
    calls: dict[int, Future[None]] = field(default_factory=dict)
    pictures: OrderedDict[str, None] = field(default_factory=OrderedDict)
    alarms: set[str] = field(default_factory=set)
    uncounted: int = 0
    ended_uncounted: dict[str, JobCount] = field(default_factory=dict)
    answered: int = 0
    last_moved: float = 0.0
    info: ModelInfo | None = None
    ooms: int = 0
    error: Exception | None = None
    finished: bool = False
    killed: bool = False

    def remember(self, picture: str) -> None:
        """Note that this worker gets, or has, the embedding of a picture."""
        self.pictures[picture] = None
        self.pictures.move_to_end(picture)
        if len(self.pictures) > _REMEMBERED_PICTURES:
            self.pictures.popitem(last=False)


class PoolState:
    """What a worker pool and its supervisors share.

    - `changed`: notified when a worker is ready or wants a job, or the pool ends. Its lock guards
      the jobs of all workers.
    - `writers`: threads that make the workers' calls to the job source.
    - `ready`: all workers were ready once. `ending`: no further processes are started.
    - `fatal`: the error that ends the run.
    - `info`: the model as a worker has reported it last.
    - `past_ooms`: how many times processes that have ended had run out of memory.
    """

    def __init__(
        self, handles: list[WorkerHandle], telemetry: Telemetry, writers: ThreadPoolExecutor
    ) -> None:
        self.handles = handles
        self.telemetry = telemetry
        self.writers = writers
        self.changed = threading.Condition()
        self.source: JobSource | None = None
        self.info: ModelInfo | None = None
        self.past_ooms = 0
        self.ready = False
        self.ending = False
        self.fatal: Exception | None = None

    def requeue(self, job: Job) -> None:
        """Requeue a job at its source."""
        assert self.source is not None
        try:
            self.source.requeue(job)
        except (OSError, ClaimLostError) as error:
            _log_left_in_work(job, error)

    def fail_attempt(self, job: Job) -> None:
        """Have a job offered again, as a further attempt, because its worker has died."""
        assert self.source is not None
        try:
            self.source.fail_attempt(job)
        except (OSError, ClaimLostError) as error:
            _log_left_in_work(job, error)


def _log_left_in_work(job: Job, error: Exception) -> None:
    logger.warning("job {} stays in work/, to be taken over: {}", shown(job.id), error)
