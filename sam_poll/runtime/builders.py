"""Makes objects from settings: folders, engine, formats, pipeline options, worker processes.

Everything below takes plain arguments; only here are settings turned into them.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from loguru import logger

from sam_poll import engines
from sam_poll.config.settings import Settings, absolute
from sam_poll.core.errors import InputError, ModelError, SettingsError
from sam_poll.core.protocols import Engine, Format, TiledJob
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import Job
from sam_poll.engines import catalog
from sam_poll.formats import registry as formats
from sam_poll.pipeline.disk_cache import DiskCache
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.pipeline.predictor import Predictor
from sam_poll.pipeline.tiled_jobs import TiledJobFactory
from sam_poll.pipeline.worker_pool import WorkerSpec
from sam_poll.pipeline.worker_process import WorkerSetup
from sam_poll.prompts import parser
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake.events import file_system, is_network
from sam_poll.share.intake.ignored import Ignored
from sam_poll.share.intake.stability import LOCAL_S, NETWORK_S
from sam_poll.share.layout import Layout
from sam_poll.share.mount_check import SENTINEL

if TYPE_CHECKING:
    from sam_poll.engines.loader import OnStage

FormatsFactory: TypeAlias = Callable[[Settings], Sequence[Format] | Mapping[str, Format]]
MISSING = "install the library that is missing (on Debian: apt-get install libexpat1)"
_OVERLAY_MIN_SIDE = 1024  # a small network needs less, but an overlay is looked at


def layout_of(settings: Settings, **more: Any) -> Layout:
    """Return the folders of the share.

    Raises SettingsError where `input` is a whole share instead of its input folder: its answers
    would be taken for new jobs.
    """
    folders = settings.folders
    if os.path.lexists(folders.input / "work" / SENTINEL):
        raise SettingsError(
            "this is a whole share: it contains in/, work/ and the other folders",
            place=str(folders.input),
            remedy=f"name its input folder, {folders.input / 'in'}",
        )
    return Layout.at(
        input=folders.input,
        work=folders.work,
        output=folders.output,
        done=folders.done,
        failed=folders.failed,
        ignored=Ignored(settings.watch.ignore),
        **more,
    )


def folder_options_of(settings: Settings, *, once: bool) -> FolderOptions:
    """Return the options of the folder source.

    Events and settling time depend on the file system of the input folder, which is looked up.
    """
    folder = settings.folders.input
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    kind = file_system(existing)
    network = is_network(kind)
    mode = settings.watch.mode
    if network and mode == "events":
        logger.warning(
            "{} is on {}: events of other machines do not arrive there; `watch.mode: auto` polls",
            existing,
            kind,
        )
    settle: float
    if settings.watch.settle_s == "auto":
        settle = NETWORK_S if network else LOCAL_S
    else:
        settle = settings.watch.settle_s
    return FolderOptions(
        rescan_s=settings.watch.rescan_s,
        settle_s=settle,
        mode="events" if mode == "events" or (mode == "auto" and not network) else "poll",
        once=once,
        missing_prompt=settings.missing_prompt,
        pair_timeout_s=settings.pair_timeout_s,
        parse=partial(
            parser.parse,
            max_bytes=settings.limits.prompt_bytes,
            max_prompts=settings.limits.prompts,
            mask_files=True,
        ),
        prompt_bytes=settings.limits.prompt_bytes,
        lease_s=settings.lease_s,
        attempts=settings.attempts,
        sentinel=settings.sentinel and absolute(settings.sentinel),
    )


def formats_of(settings: Settings, names: Sequence[str] | None = None) -> list[Format]:
    """Return the output formats `names`, or those of the settings."""
    options = formats.FormatOptions(
        tolerance_px=settings.contours.tolerance_px,
        min_area_px=settings.contours.min_area_px,
        mask=settings.mask,
        cvat=settings.cvat,
        coco=settings.coco,
        overlay_max_side=settings.overlay.max_side,
    )
    return formats.load(names or settings.formats, options)


def min_decode_side_of(settings: Settings) -> int:
    """Return the least side, in pixels, of a picture that the overlay draws on."""
    return min(_OVERLAY_MIN_SIDE, settings.overlay.max_side)


def max_pixels_of(settings: Settings) -> int:
    """Return how many pixels a picture may have."""
    return int(settings.limits.picture_mpx * 1_000_000)


def usable_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 2
    return os.cpu_count() or 2


def pipeline_options_of(settings: Settings, cores: int | None = None) -> PipelineOptions:
    """Return the pipeline's options for a machine with `cores` cores (None: this one).

    Reading a picture takes about as long as finishing one. On a GPU the pools feed it; on a CPU the
    network takes all cores and the pools only fill gaps.
    """
    cores = cores or usable_cores()
    chosen = settings.pipeline
    threads = min(8, max(1, cores // 2))
    decode_threads = threads if chosen.decode_threads == "auto" else chosen.decode_threads
    # At least two: threads that write wait for the disk most of the time.
    finish_threads = max(2, threads) if chosen.finish_threads == "auto" else chosen.finish_threads
    return PipelineOptions(
        decode_threads=decode_threads,
        finish_threads=finish_threads,
        queue=chosen.queue,
        batch_wait_s=chosen.batch_wait_ms / 1000,
        cache_mib=chosen.cache_mib,
        max_pixels=max_pixels_of(settings),
        min_decode_side=min_decode_side_of(settings) if formats.draws(settings.formats) else 0,
        pixels=formats.draws(settings.formats),
    )


def engine_of(
    settings: Settings,
    *,
    model_type: str | None = None,
    device: str | None = None,
    on_stage: OnStage | None = None,
) -> Engine:
    """Load the network that the settings name, on `device` or the first device of the settings.

    `on_stage`: returns the context that the stage of a name runs in. Raises ModelError.
    """
    memory = settings.memory
    batch = settings.pipeline.batch
    spec = engines.resolve(settings.model, config=settings.model_cfg, model_type=model_type)
    with uncollected():
        return engines.load(
            spec,
            device=device or _first_device(settings),
            precision=settings.precision,
            runtime=settings.runtime,
            max_batch=None if batch == "auto" else batch,
            budget_mib=None if memory.budget_mib == "auto" else memory.budget_mib,
            reserve_mib=memory.reserve_mib,
            min_side=memory.min_side,
            compile=settings.compile,
            hq_token_only=settings.hq_token_only,
            load_timeout_s=settings.load_timeout_s,
            on_stage=on_stage,
        )


def _first_device(settings: Settings) -> str:
    return settings.devices[0] if settings.devices else settings.device


def predictor_of(settings: Settings) -> Predictor:
    """Load the network that the settings name, for callers that wait for each answer."""
    return Predictor(
        engine_of(settings),
        cache_mib=settings.pipeline.cache_mib,
        max_pixels=max_pixels_of(settings),
        disk_cache=disk_cache_of(settings),
    )


def disk_cache_of(settings: Settings, *, model_type: str | None = None) -> DiskCache | None:
    """Return the embeddings on the disk for the network that the settings name; None: switched off.

    Raises SettingsError where the user has no home folder and the settings name none.
    """
    if not settings.cache.disk_mib:
        return None
    spec = engines.resolve(settings.model, config=settings.model_cfg, model_type=model_type)
    folder = settings.cache.folder
    if folder is None:
        try:
            folder = catalog.cache_dir() / "embeddings"
        except RuntimeError as error:
            raise SettingsError(
                f"there is no home folder for embeddings ({error})",
                place="cache.folder",
                remedy="name a folder",
            ) from error
    # The same weights give other embeddings with another yaml.
    config = spec.config or ""
    if Path(config).is_file():
        config = hashlib.sha256(Path(config).read_bytes()).hexdigest()
    network = f"{engines.identity(spec)} {config}".strip()
    return DiskCache(SafePath.at(absolute(folder)), settings.cache.disk_mib << 20, network)


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage while entered, and never what is made meanwhile.

    Libraries and network are a million objects that stay. Measured: 2.7 instead of 3.4 s of CPU
    time for the bundled model, and no more memory.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # Objects that are still frozen at the exit are reported on stderr as leaked, by triton.
        atexit.register(gc.unfreeze)
        if enabled:
            gc.enable()


def can_make_mosaics() -> bool:
    """Return whether the extra `geo` is installed."""
    return all(importlib.util.find_spec(name) for name in ("rasterio", "pyogrio", "shapely"))


def mosaic_factory_of(settings: Settings, model_type: str | None) -> TiledJobFactory | None:
    """Return what opens a mosaic; None where the extra `geo` is not installed."""
    if not can_make_mosaics():
        return None
    name = engines.identity(
        engines.resolve(settings.model, config=settings.model_cfg, model_type=model_type)
    )
    return partial(_open_mosaic, name)


def _open_mosaic(model: str, job: Job, on_step: Callable[[], None]) -> TiledJob:
    try:
        # Imported here: it takes a second and some memory, which most daemons can save.
        from sam_poll.mosaic.job import begin
    except ImportError as error:
        raise InputError(
            f"the extra `geo` cannot be used: {error}", remedy=MISSING, retriable=True
        ) from error
    return begin(job, on_step, model=model)


def devices_of(settings: Settings) -> list[str]:
    """Return the devices to use.

    `devices: auto` stands for every card of the machine or, where there is at most one, for
    `device: auto`.
    """
    if settings.devices != ("auto",):
        return list(settings.devices or (settings.device,))
    # Counted in a process of its own: this one, which only hands jobs out, needs no torch.
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    limit = settings.load_timeout_s
    try:
        count = subprocess.run(  # noqa: S603  a constant command
            command, capture_output=True, text=True, check=False, timeout=limit
        ).stdout.strip()
    except subprocess.TimeoutExpired as error:
        remedy = "name the cards, `devices: [cuda:0, cuda:1]`, or look at the driver (`nvidia-smi`)"
        raise ModelError(
            f"counting the cards took longer than {limit:g} s", place="devices", remedy=remedy
        ) from error
    cards = int(count) if count.isdecimal() else 0
    return [f"cuda:{n}" for n in range(cards)] if cards > 1 else ["auto"]


def worker_specs_of(
    settings: Settings,
    names: Sequence[str],
    *,
    model_type: str | None = None,
    make_formats: FormatsFactory = formats_of,
) -> list[WorkerSpec]:
    """Return a worker process for each device. Those on the CPU share its cores."""
    cores = max(1, usable_cores() // len(names))
    env = worker_environment(names)
    return [
        WorkerSpec(
            name,
            partial(equip, settings, name, model_type, cores, make_formats),
            env,
            settings.log_level,
        )
        for name in names
    ]


def worker_environment(names: Sequence[str]) -> dict[str, str]:
    """Return the environment of the worker processes for these devices."""
    env = dict(os.environ)
    if "cpu" in names:
        env.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // len(names))))
    return env


def equip(
    settings: Settings,
    device: str,
    model_type: str | None,
    cores: int,
    make_formats: FormatsFactory = formats_of,
) -> WorkerSetup:
    """Return what a worker process needs for its device; called in that process."""
    engine = engine_of(settings, model_type=model_type, device=device)
    return WorkerSetup(
        engine,
        make_formats(settings),
        pipeline_options_of(settings, cores),
        mosaic_factory_of(settings, model_type),
        disk_cache_of(settings, model_type=model_type),
    )
