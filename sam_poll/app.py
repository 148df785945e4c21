"""Settings become objects here: doors, engine, formats, pipeline; and here they are started and stopped in order.

The only room that knows all others. Signals set an event and nothing else; a second one ends the process at once (what
was at work is taken over by the next start, or by another daemon).

What can still go wrong here: a thread that hangs inside a driver does not end with its process's good will; after
`drain_s` the run ends without it.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from loguru import logger
from rich.console import Console

from sam_poll import console as screen
from sam_poll import engines, formats, prompts
from sam_poll.doors import lease
from sam_poll.doors.files import FilesDoor
from sam_poll.doors.folder import FolderDoor
from sam_poll.doors.ignored import Ignored
from sam_poll.doors.layout import Layout
from sam_poll.doors.scan import Manners
from sam_poll.doors.settle import LOCAL_S, NETWORK_S
from sam_poll.doors.waiting import without_partner
from sam_poll.doors.watch import file_system, is_network
from sam_poll.errors import ExitCode, InputError, ModelError, SettingsError
from sam_poll.fleet import Fleet, Post
from sam_poll.fs import shown
from sam_poll.health import Monitor, Notifier, Signs
from sam_poll.member import Equipment
from sam_poll.pipeline import Begin, Pipeline, Sizes
from sam_poll.predictor import Predictor
from sam_poll.settings import Settings, absolute
from sam_poll.types import Engine, Format, Job, Pieces, Result

LAST_RESORT_S = Sizes.drain_s + 10  # jobs have `drain_s` to finish; systemd and Docker are asked to wait 45 s
_STOPPING = (signal.SIGTERM, signal.SIGINT)
Menu: TypeAlias = Callable[[Settings], Sequence[Format] | Mapping[str, Format]]
MISSING = "install the library that is missing (on Debian: apt-get install libexpat1)"
_OVERLAY_COVER = 1024  # a small network needs less, but its user wants to see something


def layout_of(settings: Settings, **more: Any) -> Layout:
    """The share's folders as the folder door wants them."""
    f, ignored = settings.folders, Ignored(settings.watch.ignore)
    folders = {"input": f.input, "work": f.work, "output": f.output, "done": f.done, "failed": f.failed}
    return Layout.at(**folders, ignored=ignored, **more)


def manners_of(settings: Settings, *, once: bool) -> Manners:
    """How the folder door behaves, after a look at the file system under `input`."""
    existing = next(p for p in (settings.folders.input, *settings.folders.input.parents) if p.exists())
    kind = file_system(existing)
    network = is_network(kind)
    mode = settings.watch.mode
    events = mode == "events" or (mode == "auto" and not network)
    settle = settings.watch.settle_s
    if network and mode == "events":
        logger.warning(
            "{} is on {}: events of other machines do not arrive there; `watch.mode: auto` polls", existing, kind
        )
    return Manners(
        rescan_s=settings.watch.rescan_s,
        quiet_s=(NETWORK_S if network else LOCAL_S) if settle == "auto" else settle,
        events=events,
        once=once,
        missing_prompt=settings.missing_prompt,
        pair_timeout_s=settings.pair_timeout_s,
        parse=partial(prompts.parse, max_bytes=settings.limits.prompt_bytes, max_prompts=settings.limits.prompts),
        prompt_bytes=settings.limits.prompt_bytes,
        lease_s=settings.lease_s,
        attempts=settings.attempts,
        sentinel=settings.sentinel and absolute(settings.sentinel),
    )


def formats_of(settings: Settings, names: Sequence[str] | None = None) -> list[Format]:
    """The output formats, ready."""
    options = formats.FormatOptions(
        tolerance_px=settings.contours.tolerance_px,
        min_area_px=settings.contours.min_area_px,
        mask=settings.mask,
        cvat=settings.cvat,
        coco=settings.coco,
        overlay_max_side=settings.overlay.max_side,
    )
    return formats.load(names or settings.formats, options)


def cover_of(settings: Settings) -> int:
    """The least side, in pixels, of a picture that the overlay draws on."""
    return min(_OVERLAY_COVER, settings.overlay.max_side)


def cores_here() -> int:
    """How many cores this process may use."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return usable or 2


def sizes_of(settings: Settings, cores: int | None = None) -> Sizes:
    """Thread counts for this machine. Reading a picture takes about as long as finishing one; on a GPU the pools feed
    it, on a CPU the network takes all cores and the pools only fill gaps."""
    cores = cores or cores_here()
    p = settings.pipeline
    threads = min(8, max(1, cores // 2))
    return Sizes(
        decode_threads=threads if p.decode_threads == "auto" else p.decode_threads,
        # Those that write wait for the disk most of the time.
        finish_threads=max(2, threads) if p.finish_threads == "auto" else p.finish_threads,
        queue=p.queue,
        batch_wait_s=p.batch_wait_ms / 1000,
        cache_mib=p.cache_mib,
        max_pixels=int(settings.limits.picture_mpx * 1_000_000),
        cover=cover_of(settings) if "overlay" in settings.formats else 0,
        pixels="overlay" in settings.formats,
    )


def engine_of(settings: Settings, *, model_type: str | None = None, device: str | None = None) -> Engine:
    """The network the settings name, loaded, on `device` or the first of theirs. ModelError says what is in the way."""
    memory, batch = settings.memory, settings.pipeline.batch
    spec = engines.resolve(settings.model, config=settings.model_cfg, model_type=model_type)
    with uncollected():
        return engines.load(
            spec,
            device=device or (settings.devices[0] if settings.devices else settings.device),
            precision=settings.precision,
            max_batch=None if batch == "auto" else batch,
            budget_mib=None if memory.budget_mib == "auto" else memory.budget_mib,
            reserve_mib=memory.reserve_mib,
            min_side=memory.min_side,
            compile=settings.compile,
            load_timeout_s=settings.load_timeout_s,
        )


def predictor_of(settings: Settings) -> Predictor:
    """The network the settings name, loaded, for callers that wait for each answer."""
    limit = int(settings.limits.picture_mpx * 1_000_000)
    return Predictor(engine_of(settings), cache_mib=settings.pipeline.cache_mib, max_pixels=limit)


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection in here, and none later on of what is made in here: libraries and network are a million
    objects that stay. Measured: 2.7 instead of 3.4 s of processor time for the bundled model, and no more memory."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # what is not let go of at the end is reported on stderr as leaked, by triton
        if enabled:
            gc.enable()


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set. The second signal ends the process at once.

    A thread of its own hears them. Python tells signals to the main thread, which may hang in a share just then.
    """
    stop = threading.Event()
    ear, mouth = socket.socketpair()
    mouth.setblocking(False)

    def listen() -> None:
        while number := ear.recv(1):
            if number[0] in _STOPPING:
                if stop.is_set():
                    os._exit(128 + number[0])
                stop.set()

    # Python's own part, written in C, runs in whichever thread the kernel chooses, and writes the number into `mouth`.
    before = {number: signal.signal(number, lambda *_: None) for number in _STOPPING}
    wakeup = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=listen, name="signals", daemon=True)
    listener.start()
    # From here on the kernel may not choose this thread, nor those that it starts.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield stop
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        mouth.close()
        listener.join()
        ear.close()


@contextmanager
def bounded_stop(stop: threading.Event, after_s: float, end: Callable[[int], object] = os._exit) -> Iterator[None]:
    """Ends the process `after_s` after `stop`, if it is still here then: a driver or a share may hang for ever.

    What was at work stays in `work/` and is taken over by the next start, or by another daemon.
    """
    over = threading.Event()

    def wait() -> None:
        while not stop.wait(1.0):
            if over.is_set():
                return
        if not over.wait(after_s):
            logger.error("something hangs; ending without it. What was at work is taken over")
            end(ExitCode.OK)

    thread = threading.Thread(target=wait, name="bounded-stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()


def metrics_of(settings: Settings, signs: Signs, door: Any) -> AbstractContextManager[None]:
    """Metrics served as long as this is entered, if the settings ask for them. SettingsError where they cannot be.
    `door` is what `metrics.Share` wants."""
    address = settings.health.metrics
    if address is None:
        return nullcontext()
    try:
        from sam_poll import metrics
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"metrics need the package prometheus_client ({error})",
            place="health.metrics",
            remedy="pip install 'sam_poll[metrics]', or set it to null",
        ) from error
    return metrics.serve(address, signs, door)


def watch(
    settings: Settings,
    *,
    once: bool = False,
    layout: Layout | None = None,
    model_type: str | None = None,
    on_result: Callable[[Result], None] | None = None,
    make: Callable[..., FolderDoor] = FolderDoor,
    how: str | None = None,
) -> ExitCode:
    """The daemon: answer what is dropped, until a signal comes or (`once`) everything is drained.

    `make` makes another door than the one that scans, from the same arguments; `how` says in the log what tells it.
    """
    live = screen.wants_live(settings.log)
    console = Console(stderr=True) if live else None
    screen.set_up_log(settings.log, settings.log_level, console=console)
    layout = layout or layout_of(settings)
    manners = manners_of(settings, once=once)
    signs, notify = Signs(), Notifier()
    signs.formats = tuple(settings.formats)
    door = make(layout, manners, alarms=signs.alarms, pulse=signs.intake, state=signs.state)
    # The share is proved and the port opened before the model is loaded: the cheap mistakes are told first.
    with (
        stop_on_signals() as stop,
        bounded_stop(stop, LAST_RESORT_S),
        door,
        metrics_of(settings, signs, door),
    ):
        notify(f"STATUS=loading {settings.model}")
        for warning in odd_formats(layout, door.worker, settings.formats):
            logger.warning("{}", warning)
        door.glance()  # what lies there settles while the model is loaded
        with workforce(settings, signs, stop, model_type=model_type, on_result=on_result) as work:
            how = how or ("events" if manners.events else "polling")
            logger.info("watching {} ({}), answers in {}", layout.input, how, layout.output)
            door.hands = work.hands
            with _watched(settings, signs, door, stop, notify, console):
                work.run(door, stop)
        now = signs.stats.now()
        rest = f"; waiting in {layout.input}: {screen.count(door.waiting, 'file')}" if once and door.waiting else ""
        left = once and not stop.is_set() and _left_behind(layout)
        logger.info("{}: {}{}", "stopped" if stop.is_set() else "drained", screen.summary(now), rest)
        if once and door.held:
            logger.warning("{} could not be used: what needs them was left", screen.count(door.held, "path"))
        return ExitCode.FAILED_JOBS if once and (now.rejected or left or door.held) else ExitCode.OK


def _left_behind(layout: Layout) -> bool:
    """Whether prompts stay in the input folder because they have no picture, or pictures with something beside them
    that may be meant as their prompt; says which. A picture with nothing beside it just waits for its prompt."""
    try:
        waiting = without_partner(layout)
    except OSError as error:
        logger.warning("{} cannot be looked through for what is left: {}", layout.input, error)
        return False
    for reason in waiting.explained.values():
        logger.warning("{}", reason)
    if waiting.prompts or waiting.explained:
        counts = f"{screen.count(waiting.pictures, 'picture')}, {screen.count(waiting.prompts, 'prompt')}"
        logger.warning("left in {} without a partner: {}", layout.input, counts)
    return bool(waiting.prompts or waiting.explained)


def odd_formats(layout: Layout, worker: str, formats: Sequence[str]) -> list[str]:
    """Return what to say of the living daemons of a share that answer in other formats than this one, `worker`."""
    said: list[str] = []
    for name, path in lease.workers(layout.work):
        other = lease.read(name, path, time.time()) if name != worker else None
        theirs = other.get("formats") if other and other["alive"] else None
        if isinstance(theirs, list) and theirs and set(map(str, theirs)) != set(formats):
            here, there = ", ".join(formats), shown(", ".join(map(str, theirs)))
            said.append(
                f"{shown(name)} answers jobs of this share as {there}, this daemon as {here}: which files a job gets "
                "depends on which of them takes it (give all of them the same `formats`)"
            )
    return said


@contextmanager
def workforce(
    settings: Settings,
    signs: Signs,
    stop: threading.Event,
    *,
    model_type: str | None,
    on_result: Callable[[Result], None] | None,
    menu: Menu = formats_of,
) -> Iterator[Pipeline | Fleet]:
    """What answers the jobs: a pipeline in this process, or one in a process of its own for each of several devices.
    `menu` makes the formats, there: a function of a module."""
    names = devices_of(settings)
    if len(names) > 1:
        posts = posts_of(settings, names, model_type=model_type, menu=menu)
        writers = sum(sizes_of(settings, cores_here() // len(names)).finish_threads for _ in names)
        with Fleet(
            posts,
            stop,
            writers=writers,
            pieces=can_make_mosaics(),
            stats=signs.stats,
            alarms=signs.alarms,
            intake=signs.intake,
            device=signs.device,
        ) as fleet:
            if not stop.is_set():  # else they may not be ready, and nothing is known of them
                signs.engine = fleet
            yield fleet
        return
    signs.engine = engine = engine_of(settings, model_type=model_type, device=names[0])
    yield Pipeline(
        engine,
        menu(settings),
        sizes=sizes_of(settings),
        stats=signs.stats,
        on_result=on_result,
        alarms=signs.alarms,
        intake=signs.intake,
        device=signs.device,
        pieces=pieces_of(settings, model_type),
    )


def can_make_mosaics() -> bool:
    """Whether the extra `geo` is installed."""
    return all(importlib.util.find_spec(name) for name in ("rasterio", "pyogrio", "shapely"))


def pieces_of(settings: Settings, model_type: str | None) -> Begin | None:
    """What begins a mosaic; None where the extra `geo` is not installed."""
    if not can_make_mosaics():
        return None
    name = engines.identity(engines.resolve(settings.model, config=settings.model_cfg, model_type=model_type))
    return partial(_mosaic, name)


def _mosaic(model: str, job: Job, between: Callable[[], None]) -> Pieces:
    try:
        from sam_poll.mosaic.jobs import begin  # here, for a second and some memory that most daemons can save
    except ImportError as error:
        raise InputError(f"the extra `geo` cannot be used: {error}", remedy=MISSING, retriable=True) from error
    return begin(job, between, model=model)


def devices_of(settings: Settings) -> list[str]:
    """The devices to work on, `devices: auto` replaced by every card of the machine (or by what `device: auto` takes
    where there is no more than one)."""
    if settings.devices != ("auto",):
        return list(settings.devices or (settings.device,))
    # Asked in a process of its own: this one, which only hands out, needs no torch.
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    limit = settings.load_timeout_s
    try:
        count = subprocess.run(  # noqa: S603  our own words
            command, capture_output=True, text=True, check=False, timeout=limit
        ).stdout.strip()
    except subprocess.TimeoutExpired as error:
        remedy = "name the cards, `devices: [cuda:0, cuda:1]`, or look at the driver (`nvidia-smi`)"
        raise ModelError(f"counting the cards took longer than {limit:g} s", place="devices", remedy=remedy) from error
    cards = int(count) if count.isdecimal() else 0
    return [f"cuda:{n}" for n in range(cards)] if cards > 1 else ["auto"]


def posts_of(
    settings: Settings, names: Sequence[str], *, model_type: str | None = None, menu: Menu = formats_of
) -> list[Post]:
    """A process for each device. Those on the CPU share its cores."""
    share, env = max(1, cores_here() // len(names)), env_of(names)
    return [
        Post(name, partial(equip, settings, name, model_type, share, menu), env, settings.log_level) for name in names
    ]


def env_of(names: Sequence[str]) -> dict[str, str]:
    """The environment of each process of several, one for each device."""
    env = dict(os.environ)
    if "cpu" in names:
        env.setdefault("OMP_NUM_THREADS", str(max(1, cores_here() // len(names))))
    return env


def equip(settings: Settings, device: str, model_type: str | None, cores: int, menu: Menu = formats_of) -> Equipment:
    """What a fleet's process needs for one device. Runs in that process."""
    engine = engine_of(settings, model_type=model_type, device=device)
    return Equipment(engine, menu(settings), sizes_of(settings, cores), pieces_of(settings, model_type))


@contextmanager
def _watched(
    settings: Settings,
    signs: Signs,
    door: FolderDoor,
    stop: threading.Event,
    notify: Notifier,
    console: Console | None,
) -> Iterator[None]:
    """What tells people, systemd and others how the run goes while it goes."""
    now, alarms = signs.stats.now, signs.alarms.active

    def waiting() -> int:
        return door.waiting

    def line() -> str:
        return screen.status_line(now(), waiting(), alarms())

    health, info = settings.health, signs.info
    title = f"{info.name} on {info.device}" if info else ""
    with (
        Monitor(signs, stop, stuck_s=health.stuck_s, file=health.file, notify=notify, summary=line),
        screen.Progress(title, now, waiting, console, alarms) if console else screen.Heartbeat(now, waiting, alarms),
    ):
        yield


def predict(
    settings: Settings,
    jobs: Sequence[Job],
    output: Path,
    *,
    on_result: Callable[[Result], None],
    on_reject: Callable[[Job, Exception], None],
) -> ExitCode:
    """Answer these jobs once and write into `output`."""
    door = FilesDoor(jobs, output, on_reject)
    with stop_on_signals() as stop:
        engine = engine_of(settings)
        pipeline = Pipeline(engine, formats_of(settings), sizes=sizes_of(settings), on_result=on_result)
        pipeline.run(door, stop)
        now = pipeline.stats.now()
    return ExitCode.FAILED_JOBS if now.rejected or now.answered < len(jobs) else ExitCode.OK
