"""The settings: config.yaml < environment < command line, checked once at start and frozen.

All problems are reported at once, each with its file, line and key and the nearest known key. This
package imports no torch, and no package below imports it: they get the values they need.

Limitations: values are checked by themselves and against each other, not against the machine.
`share.mount_check` checks whether folders exist and are on one file system; `engines` whether a
model or a device is available.
"""

from __future__ import annotations

import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from sam_poll.config.fields import (
    Address,
    Auto,
    Count,
    Device,
    File,
    Folder,
    FormatName,
    HostNames,
    Listen,
    Name,
    NotNegative,
    Origins,
    Pattern,
    Positive,
    Threads,
    auto_alone,
    each_card_once,
    once_each,
    without_brackets,
)
from sam_poll.core.errors import SettingsError
from sam_poll.core.validation import (
    Loc,
    ValidationIssue,
    complaints,
    nearest,
    place,
    quoted,
    validation_error,
)
from sam_poll.core.yaml_reader import YamlError, read_yaml, scalar
from sam_poll.formats import registry as formats_
from sam_poll.prompts import parser as prompts

PREFIX = "SAM_POLL_"
# The model cache (read by `engines.catalog`), the path of config.yaml, and secrets.
NOT_SETTINGS = (
    "SAM_POLL_BROKER_URL",
    "SAM_POLL_CACHE",
    "SAM_POLL_CONFIG",
    "SAM_POLL_REDIS_URL",
    "SAM_POLL_SERVE_TOKEN",
)
MAX_FILE_BYTES = 1024 * 1024

# Kubernetes sets these in the containers of a namespace that has a service named sam-poll, or
# sam-poll-redis and so on: always NAME_SERVICE_HOST, and these beside it.
_SERVICE_HOST = "_SERVICE_HOST"
_KUBERNETES = re.compile(r"_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")
# A stronger source that sets the first overrides the second of a weaker one: both say the same.
_BELONGS = (("model", "model_cfg"), ("device", "devices"), ("devices", "device"))


def absolute(path: Path) -> Path:
    """Return a path made absolute from the current directory, its links not followed.

    A share keeps the name that the user gave it.
    """
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links


# ── the settings ──


class _Group(BaseModel):
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


class Watch(_Group):
    """How new files are noticed."""

    mode: Literal["auto", "events", "poll"] = Field(
        default="auto", description="how the folder is watched"
    )
    rescan_s: Positive = Field(default=10.0, description="seconds between full scans of the folder")
    settle_s: NotNegative | Auto = Field(
        default="auto", description="seconds that a file must stay unchanged before it is used"
    )
    ignore: Annotated[tuple[Pattern, ...], Field(strict=False), AfterValidator(once_each)] = Field(
        default=(), description="patterns of folders and files in input that are ignored"
    )


class Memory(_Group):
    """Device memory that the network may use."""

    budget_mib: Count | Auto = Field(default="auto", description="memory the network may use, MiB")
    reserve_mib: Annotated[int, Field(ge=0)] = Field(
        default=256, description="memory always left free, MiB"
    )
    min_side: Literal[256, 512, 768, 1024] = Field(
        default=256, description="smallest encoder input to step down to, pixels"
    )


class Contours(_Group):
    """The outlines of masks."""

    tolerance_px: NotNegative = Field(
        default=1.0,
        description="largest distance of a simplified outline from the exact one, pixels",
    )
    min_area_px: NotNegative = Field(
        default=16.0, description="smallest contour that is written, pixels of area"
    )


class Overlay(_Group):
    """The output format `overlay`."""

    max_side: Annotated[int, Field(ge=16)] = Field(
        default=2048, description="longest side of the overlay, pixels"
    )


class Limits(_Group):
    """Limits above which input is refused."""

    picture_mpx: Positive = Field(default=268.0, description="largest picture, megapixels")
    prompt_bytes: Count = Field(default=prompts.MAX_BYTES, description="largest prompt file, bytes")
    prompts: Count = Field(
        default=prompts.MAX_PROMPTS, description="most points, boxes and texts in one prompt file"
    )


class Pipeline(_Group):
    """How much is done in parallel."""

    decode_threads: Threads | Auto = Field(
        default="auto", description="threads that decode pictures"
    )
    finish_threads: Threads | Auto = Field(
        default="auto", description="threads that make and write outputs"
    )
    queue: Count = Field(default=4, description="jobs that may wait between two stages")
    batch: Count | Auto = Field(default="auto", description="maximum pictures in one batch")
    batch_wait_ms: NotNegative = Field(
        default=5.0, description="longest wait for a batch to fill, milliseconds"
    )
    cache_mib: Annotated[int, Field(ge=0)] = Field(
        default=512, description="memory for embeddings of pictures seen, MiB"
    )


class Cache(_Group):
    """Embeddings that stay on a disk."""

    disk_mib: Annotated[int, Field(ge=0)] = Field(
        default=0, description="disk for embeddings that outlast the process, MiB; 0: none"
    )
    folder: Folder | None = Field(
        default=None, description="folder for them; null: `embeddings` beside the downloaded models"
    )


class Health(_Group):
    """Monitoring of the daemon."""

    file: File | None = Field(
        default=None, description="file touched while the daemon works; null: none"
    )
    metrics: Address | None = Field(
        default=None,
        description="address of the Prometheus metrics, a port alone is on 127.0.0.1; null: none",
    )
    stuck_s: Positive = Field(
        default=300.0, description="seconds without progress after which a loop counts as stuck"
    )


class Serve(_Group):
    """The HTTP server, `sam-poll serve`."""

    listen: Listen = Field(
        default="127.0.0.1:8000", description="address to listen on, a port alone is on 127.0.0.1"
    )
    token_file: File | None = Field(
        default=None,
        description="file with the token that clients must send; null: the environment's, or none",
    )
    hosts: HostNames = Field(
        default=(), description="further host names of the server; see below for an empty list"
    )
    origins: Origins = Field(default=(), description="origins whose web pages may send requests")
    queue: Count = Field(
        default=64, description="maximum concurrent requests; further ones get HTTP 429"
    )
    timeout_s: Positive = Field(default=60.0, description="seconds until a request times out")
    body_mib: Count = Field(default=32, description="largest body of a request, MiB")


@dataclass(frozen=True, slots=True)
class Folders:
    """The five folders of a share, absolute."""

    input: Path
    output: Path
    work: Path
    done: Path
    failed: Path


class Settings(_Group):
    """All settings, made by `load`, which also checks the folders against each other."""

    input: Folder = Field(
        default=Path("/mnt/share/in"), description="folder to drop pictures and prompts in"
    )
    output: Folder | None = Field(
        default=None, description="folder for the results; null: `out` beside input"
    )
    work: Folder | None = Field(
        default=None, description="folder for jobs in progress; null: `work` beside input"
    )
    done: Folder | None = Field(
        default=None, description="folder for answered inputs; null: `done` beside input"
    )
    failed: Folder | None = Field(
        default=None, description="folder for rejected inputs; null: `failed` beside input"
    )
    model: Name = Field(
        default="sam2.1_hiera_tiny",
        description="name in the catalogue or on the Hugging Face hub, path of a checkpoint, "
        "or `demo`",
    )
    model_cfg: Name | None = Field(
        default=None, description="yaml of the model, where its name does not determine it"
    )
    device: Device = Field(default="auto", description="device that runs the network")
    devices: Annotated[
        tuple[Device, ...],
        BeforeValidator(auto_alone),
        Field(strict=False),
        AfterValidator(each_card_once),
    ] = Field(
        default=(),
        description="several devices, a process each, instead of `device`; auto: every card",
    )
    precision: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="floating-point precision of the network"
    )
    runtime: Literal["auto", "torch", "openvino"] = Field(
        default="auto", description="library that runs the image encoder; OpenVINO is for CPUs"
    )
    compile: bool = Field(default=False, description="compile the network at the start, for speed")
    hq_token_only: bool = Field(
        default=False, description="with SAM-HQ, its own output token's mask alone"
    )
    formats: Annotated[
        tuple[FormatName, ...], Field(strict=False, min_length=1), AfterValidator(once_each)
    ] = Field(default=("mask", "opex"), description="output formats")
    mask: Literal["instances", "per-object"] = Field(
        default="instances", description="one mask file for all objects, or one each"
    )
    cvat: formats_.CvatForm = Field(
        default="mask", description="form of an object in the format `cvat`"
    )
    coco: formats_.CocoForm = Field(
        default="rle", description="form of an object in the format `coco`"
    )
    missing_prompt: Literal["wait", "everything", "reject"] = Field(
        default="wait", description="what to do with a picture without a prompt"
    )
    pair_timeout_s: NotNegative | None = Field(
        default=None, description="seconds until a prompt counts as missing; null: never"
    )
    lease_s: Annotated[float, Field(ge=2)] = Field(
        default=60.0,
        description="seconds without a heartbeat after which another daemon takes a job over",
    )
    attempts: Count = Field(
        default=3, description="runs of a job that may end the process before it is rejected"
    )
    sentinel: File | None = Field(
        default=None,
        description="file that must exist for the share to count as mounted; null: none",
    )
    watch: Watch = Watch()
    memory: Memory = Memory()
    contours: Contours = Contours()
    overlay: Overlay = Overlay()
    limits: Limits = Limits()
    pipeline: Pipeline = Pipeline()
    cache: Cache = Cache()
    health: Health = Health()
    serve: Serve = Serve()
    load_timeout_s: Positive = Field(
        default=300.0, description="longest time for loading the model, seconds"
    )
    log: Literal["auto", "text", "json"] = Field(default="auto", description="format of the log")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="minimum log level"
    )

    @model_validator(mode="after")
    def _one_answer_each(self) -> Settings:
        if self.devices and self.device != "auto":
            raise validation_error(
                f"device ({self.device}) and devices are both set", "set one of the two"
            )
        if self.compile and self.runtime == "openvino":
            raise validation_error(
                "compile, which is torch's, and runtime: openvino are both set",
                "set one of the two",
            )
        return self

    @property
    def folders(self) -> Folders:
        """The five folders, absolute (from the current directory), beside `input` by default."""
        base = absolute(self.input)
        beside = base.parent
        return Folders(
            input=base,
            output=absolute(self.output or beside / "out"),
            work=absolute(self.work or beside / "work"),
            done=absolute(self.done or beside / "done"),
            failed=absolute(self.failed or beside / "failed"),
        )


def keys() -> dict[str, Any]:
    """Return every key in dotted form (`watch.mode`) with its default, in the order of the docs."""
    return {".".join(loc): leaf.default for loc, leaf in _LEAVES.items()}


def env_name(key: str) -> str:
    """Return the environment variable of a dotted key: `watch.mode` → `SAM_POLL_WATCH__MODE`."""
    return PREFIX + key.replace(".", "__").upper()


def _group(annotation: Any) -> type[BaseModel] | None:
    """Return the group of settings that an annotation names, or None."""
    # On Python 3.10 `tuple[…]` is an instance of `type`, so `get_origin` decides first.
    is_class = get_origin(annotation) is None and isinstance(annotation, type)
    return annotation if is_class and issubclass(annotation, BaseModel) else None


def _leaves(
    model: type[BaseModel], loc: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, info in model.model_fields.items():
        group = _group(info.annotation)
        if group is not None:
            yield from _leaves(group, (*loc, name))
        else:
            yield (*loc, name), info


_LEAVES = dict(_leaves(Settings))
_GROUPS = tuple(dict.fromkeys(loc[0] for loc in _LEAVES if len(loc) > 1))


# ── sources of values ──


@dataclass
class _Source:
    """The values of one source, how to name a place in it, and the problems found in it."""

    values: dict[str, Any]
    where: Callable[[Loc], str]
    problems: list[ValidationIssue] = field(default_factory=list)
    line: Callable[[Loc], int] = lambda loc: 0

    def complaints(self) -> list[tuple[str, ValidationIssue]]:
        """Return all problems of this source with their places, from its top to its bottom."""
        issues = sorted([*self.problems, *_check(self.values)], key=lambda c: self.line(c.loc))
        return [(self.where(c.loc), c) for c in issues]


def load(
    path: Path | None,
    *,
    env: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
    done_may_be_output: bool = False,
) -> Settings:
    """Return the settings of config.yaml, the environment and the command line, the last strongest.

    `path` None takes `SAM_POLL_CONFIG` from `env`, or no file where that is not set. `flags` has
    dotted keys (`watch.mode`) or nested mappings; the value None means that a flag was not given.
    Where no source names a model, `MODEL` and `MODEL_CFG` of `env` do. `done_may_be_output` allows
    these two to be one folder, as in Waikato's scripts. Raises SettingsError, and nothing else,
    with all problems at once.
    """
    sources = _sources(path, env, flags)
    problems = [problem for source in sources for problem in source.complaints()]
    if problems:
        raise _error(problems)
    merged: dict[str, Any] = {}
    for source in sources:
        for strong, weak in _BELONGS:
            if strong in source.values:
                merged.pop(weak, None)
        _merge(merged, source.values)

    def where(loc: Loc) -> str:
        return next(
            (s.where(loc) for s in reversed(sources) if loc and loc[0] in s.values), place(loc)
        )

    problems = [(where(c.loc), c) for c in _check(merged)]
    if not problems:
        settings = Settings.model_validate(merged)
        found = [*_check_folders(settings.folders, done_may_be_output), *_check_cache(settings)]
        problems = [(where(c.loc), c) for c in found]
    if problems:
        raise _error(problems)
    return settings


@dataclass(frozen=True, slots=True)
class SettingInForce:
    """One setting: its dotted key, its value, and where it was set ("default" if nowhere)."""

    key: str
    value: Any
    where: str


def in_force(
    settings: Settings,
    path: Path | None,
    *,
    env: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
) -> list[SettingInForce]:
    """Return every setting with the place where it was set, in the order of the docs.

    The other arguments are those of `load` that `settings` came from. Raises SettingsError if the
    file cannot be read any more.
    """
    sources = list(reversed(_sources(path, env, flags)))
    found = []
    for loc in _LEAVES:
        value: Any = settings
        for name in loc:
            value = getattr(value, name)
        where = next((s.where(loc) for s in sources if _has(s.values, loc)), "default")
        found.append(SettingInForce(".".join(loc), value, where))
    return found


def _has(values: Any, loc: tuple[str, ...]) -> bool:
    for name in loc:
        if not isinstance(values, Mapping) or name not in values:
            return False
        values = values[name]
    return True


def _sources(
    path: Path | None, env: Mapping[str, str], flags: Mapping[str, Any] | None
) -> list[_Source]:
    """Return the sources of values, the weakest first. Raises SettingsError."""
    if path is None and env.get("SAM_POLL_CONFIG"):
        path = Path(env["SAM_POLL_CONFIG"])
    return [
        _seed(env),
        *([_file(Path(path))] if path is not None else []),
        _environment(env),
        _flags(flags or {}),
    ]


def _check(values: object) -> list[ValidationIssue]:
    try:
        Settings.model_validate(values)
    except ValidationError as error:
        return [_better(c) for c in complaints(error, values, _known)]
    return []


def _known(loc: Loc) -> Sequence[str]:
    group = (
        _group(Settings.model_fields[str(loc[0])].annotation)
        if loc and loc[0] in _GROUPS
        else Settings
    )
    return tuple(group.model_fields) if group is not None else ()


def _better(complaint: ValidationIssue) -> ValidationIssue:
    """Return an issue whose remedy names the right group for a key that is in the wrong one."""
    if complaint.reason != "unknown key":
        return complaint
    homes = [".".join(loc) for loc in _LEAVES if loc[-1] == complaint.loc[-1]]
    if homes:
        return ValidationIssue(complaint.loc, "unknown key here", f"did you mean {homes[0]}?")
    remedy = complaint.remedy or ""
    if len(remedy) >= 100:
        remedy = "see docs/settings.md for the keys"
    return ValidationIssue(complaint.loc, "unknown key", remedy)


def _error(problems: Sequence[tuple[str, ValidationIssue]]) -> SettingsError:
    if len(problems) == 1:
        where, complaint = problems[0]
        return SettingsError(complaint.reason, place=where or None, remedy=complaint.remedy)
    messages = [
        str(SettingsError(c.reason, place=where or None, remedy=c.remedy))
        for where, c in problems[:20]
    ]
    more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
    return SettingsError(
        "\n  ".join([f"{len(problems)} problems in the settings:", *messages, *more])
    )


def _merge(base: dict[str, Any], stronger: Mapping[str, Any]) -> None:
    for key, value in stronger.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def _seed(env: Mapping[str, str]) -> _Source:
    """Read `MODEL` and `MODEL_CFG`, the names that SAM's own demos use; the weakest source."""
    values = {"model": env["MODEL"]} if env.get("MODEL") else {}
    if values and env.get("MODEL_CFG"):
        values["model_cfg"] = env["MODEL_CFG"]
    return _Source(values, lambda loc: f"environment, {place(loc).upper()}")


def _file(path: Path) -> _Source:
    try:
        values, lines, problems = read_yaml(_text(path))
    except YamlError as error:
        at = f"{_shown(path)}, line {error.line}" if error.line else _shown(path)
        raise SettingsError(error.reason, place=at) from None

    def line(loc: Loc) -> int:
        return next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), 0)

    def where(loc: Loc) -> str:
        return f"{_shown(path)}, line {line(loc)}, {place(loc)}" if loc else _shown(path)

    if values is not None and not isinstance(values, dict):
        raise SettingsError(
            "contains no keys", place=_shown(path), remedy="write lines like `model: demo`"
        )
    given = {
        k: v for k, v in (values or {}).items() if v is not None or k not in _GROUPS
    }  # `watch:` with nothing below it
    return _Source(given, where, problems, line)


def _shown(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() and len(text) < 300 else quoted(text)


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            raise SettingsError(f"the settings file {_not_a_file(path)}", place=_shown(path))
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise SettingsError(
                f"the settings file is larger than {MAX_FILE_BYTES} bytes", place=_shown(path)
            )
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SettingsError(
            "not UTF-8", place=f"{_shown(path)}, line {line}", remedy="save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SettingsError(
            f"the settings file cannot be read: {reason}", place=_shown(path)
        ) from None


def _not_a_file(path: Path) -> str:
    if path.is_dir():
        return "is a folder"
    return "is not a file" if path.exists() else "does not exist"


def _environment(env: Mapping[str, str]) -> _Source:
    known = {env_name(".".join(loc)): loc for loc in _LEAVES}
    source = _Source(
        {},
        lambda loc: f"environment, {env_name('.'.join(str(p) for p in loc if isinstance(p, str)))}",
    )
    for name in sorted(env):
        if not name.startswith(PREFIX) or name in NOT_SETTINGS:
            continue
        if name not in known and _is_of_kubernetes(name, env):
            continue
        if name not in known:
            source.problems.append(_unknown_variable(name, list(known)))
        elif env[name]:  # empty counts as not set: compose files pass `NAME=` for unset variables
            _put(source.values, known[name], _from_text(known[name], env[name]))
    return source


def _is_of_kubernetes(name: str, env: Mapping[str, str]) -> bool:
    """Return whether a variable is one of those that Kubernetes sets for a service."""
    services = (key.removesuffix(_SERVICE_HOST) for key in env if key.endswith(_SERVICE_HOST))
    return any(
        name.startswith(service) and _KUBERNETES.fullmatch(name, len(service))
        for service in services
    )


def _unknown_variable(name: str, known: Sequence[str]) -> ValidationIssue:
    key = name.removeprefix(PREFIX)
    within = [other for other in known if other.startswith(name + "__")]
    guess = nearest(name, [*known, *NOT_SETTINGS])
    remedy = f"did you mean {guess}?" if guess else "see docs/settings.md for the names"
    return ValidationIssue(
        (key,), "unknown setting", f"set them one by one: {', '.join(within)}" if within else remedy
    )


def _flags(flags: Mapping[str, Any]) -> _Source:
    source = _Source({}, lambda loc: f"command line, {place(loc)}" if loc else "command line")
    for loc, value in _flat(flags):
        if value is not None:
            if isinstance(value, str) and loc in _LEAVES:
                value = _from_text(loc, value)
            _put(source.values, loc, value)
    return source


def _flat(
    flags: Mapping[str, Any], loc: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in flags.items():
        here = (*loc, *key.split("."))
        if isinstance(value, Mapping):
            yield from _flat(value, here)
        else:
            yield here, value


def _put(values: dict[str, Any], loc: tuple[str, ...], value: Any) -> None:
    for part in loc[:-1]:
        if not isinstance(values.get(part), dict):
            values[part] = {}
        values = values[part]
    values[loc[-1]] = value


def _from_text(loc: tuple[str, ...], text: str) -> Any:
    """Read a value from text as its setting needs it.

    Lists are separated by commas, paths and names stay as they are, all else is read as YAML.
    """
    annotation = _LEAVES[loc].annotation
    if get_origin(annotation) is tuple:
        whole = without_brackets(text.strip(), patterns=Pattern in get_args(annotation))
        return [part.strip() for part in whole.split(",") if part.strip()]
    return text if _is_text(annotation) else scalar(text)


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return any(_is_text(part) for part in get_args(annotation))
    return annotation in (Path, str)


# ── checks of the folders against each other ──


def _check_folders(folders: Folders, done_may_be_output: bool) -> Iterator[ValidationIssue]:
    """Find folders that are equal or inside each other, by their paths alone.

    A daemon whose outputs appear in its input would process them again without end.
    """
    by_name = {entry.name: getattr(folders, entry.name) for entry in fields(folders)}
    names = list(by_name)
    for index, name in enumerate(names[1:], start=1):
        path, beside = by_name[name], folders.input.parent / ("out" if name == "output" else name)
        for other in names[:index]:
            if path == by_name[other] and not (
                done_may_be_output and {name, other} == {"done", "output"}
            ):
                yield ValidationIssue(
                    (name,), f"{path} is also {other}", "use a different folder for each"
                )
        if path != folders.input and path.is_relative_to(folders.input):
            yield ValidationIssue(
                (name,),
                f"{path} is inside input ({folders.input})",
                f"put it beside input, for example {beside}",
            )
        elif path != folders.input and folders.input.is_relative_to(path):
            yield ValidationIssue(
                (name,),
                f"input ({folders.input}) is inside {path}",
                f"put it beside input, for example {beside}",
            )


def _check_cache(settings: Settings) -> Iterator[ValidationIssue]:
    """Find a cache folder inside one of the share's, whose files belong to jobs."""
    if settings.cache.folder is None:
        return
    path = absolute(settings.cache.folder)
    folders = settings.folders
    for entry in fields(folders):
        other = getattr(folders, entry.name)
        if path.is_relative_to(other):
            yield ValidationIssue(
                ("cache", "folder"),
                f"{path} is inside {entry.name} ({other})",
                f"put it beside input, for example {folders.input.parent / 'embeddings'}",
            )
            return
