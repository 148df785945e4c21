"""The settings: config.yaml < environment < command line, checked once at the top and frozen.

Every problem is named with its file, line and key, all of them at once, and with the nearest known key. No torch here,
and nothing below this room imports it: the parts are handed the values they need.

What can still go wrong here: values are checked for themselves and against each other, not against the machine.
Whether folders exist, lie on one file system or are the same through a link is the folder door's check; whether a
model or a device is there, the engines'.
"""

from __future__ import annotations

import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sam_poll import formats as formats_
from sam_poll import prompts
from sam_poll.complaints import Complaint, Loc, complaints, nearest, place, quoted, refuse
from sam_poll.errors import SettingsError
from sam_poll.setting_kinds import (
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
from sam_poll.yaml_lines import NotYaml, read_yaml, scalar

PREFIX = "SAM_POLL_"
# the model cache (read by the catalogue); the path of config.yaml; what is a secret, or may hold one
NOT_SETTINGS = ("SAM_POLL_CACHE", "SAM_POLL_CONFIG", "SAM_POLL_REDIS_URL", "SAM_POLL_SERVE_TOKEN")
MAX_FILE_BYTES = 1024 * 1024

# Kubernetes gives every container these for a service named sam-poll; they are not meant for us.
_KUBERNETES = re.compile(r"SAM_POLL_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)")
# A stronger source that sets the first drops the second of a weaker one: they answer the same question.
_BELONGS = (("model", "model_cfg"), ("device", "devices"), ("devices", "device"))


def absolute(path: Path) -> Path:
    """Relative paths count from the current directory; links are not followed: a share goes by the name given."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links


# ── what there is to set ──


class _Group(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Watch(_Group):
    """How new files are noticed."""

    mode: Literal["auto", "events", "poll"] = Field(default="auto", description="how the folder is watched")
    rescan_s: Positive = Field(default=10.0, description="seconds between full looks at the folder")
    settle_s: NotNegative | Auto = Field(
        default="auto", description="seconds a file must stay unchanged before it is taken"
    )
    ignore: Annotated[tuple[Pattern, ...], Field(strict=False), AfterValidator(once_each)] = Field(
        default=(), description="patterns of folders and files in input that are left alone"
    )


class Memory(_Group):
    """What the network may use of the device's memory."""

    budget_mib: Count | Auto = Field(default="auto", description="memory the network may use, MiB")
    reserve_mib: Annotated[int, Field(ge=0)] = Field(default=256, description="memory always left free, MiB")
    min_side: Literal[256, 512, 768, 1024] = Field(
        default=256, description="smallest encoder input to step down to, pixels"
    )


class Contours(_Group):
    """How a mask's outline is written."""

    tolerance_px: NotNegative = Field(
        default=1.0, description="how far a simplified outline may lie from the true one, pixels"
    )
    min_area_px: NotNegative = Field(default=16.0, description="smallest contour written, pixels of area")


class Overlay(_Group):
    """The overlay picture."""

    max_side: Annotated[int, Field(ge=16)] = Field(default=2048, description="its longest side, pixels")


class Limits(_Group):
    """What is refused for its size."""

    picture_mpx: Positive = Field(default=268.0, description="largest picture, megapixels")
    prompt_bytes: Count = Field(default=prompts.MAX_BYTES, description="largest prompt file, bytes")
    prompts: Count = Field(default=prompts.MAX_PROMPTS, description="most points and boxes in one prompt file")


class Pipeline(_Group):
    """How much is done side by side."""

    decode_threads: Threads | Auto = Field(default="auto", description="threads that read pictures")
    finish_threads: Threads | Auto = Field(default="auto", description="threads that draw contours and write")
    queue: Count = Field(default=4, description="jobs that may wait between two stages")
    batch: Count | Auto = Field(default="auto", description="pictures encoded at once, at most")
    batch_wait_ms: NotNegative = Field(default=5.0, description="longest wait for a batch to fill, milliseconds")
    cache_mib: Annotated[int, Field(ge=0)] = Field(
        default=512, description="memory for embeddings of pictures seen, MiB"
    )


class Health(_Group):
    """How others see whether the daemon works."""

    file: File | None = Field(default=None, description="file touched while the daemon works; null: none")
    metrics: Address | None = Field(
        default=None, description="where Prometheus may ask, a port alone is on 127.0.0.1; null: nowhere"
    )
    stuck_s: Positive = Field(default=300.0, description="seconds after which a loop that does not move is stuck")


class Serve(_Group):
    """The HTTP server, `sam-poll serve`."""

    listen: Listen = Field(default="127.0.0.1:8000", description="where it listens, a port alone is on 127.0.0.1")
    token_file: File | None = Field(
        default=None, description="file with the token that callers must send; null: the environment's, or none"
    )
    hosts: HostNames = Field(default=(), description="further host names of the server; see below for an empty list")
    origins: Origins = Field(default=(), description="origins whose web pages may send requests")
    queue: Count = Field(default=64, description="requests inside at once; who comes then is told to come again")
    timeout_s: Positive = Field(default=60.0, description="seconds until a request must be answered")
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
    """All settings. Made by `load`, which also checks the folders against each other and says where a mistake is."""

    input: Folder = Field(default=Path("/mnt/share/in"), description="folder to drop pictures and prompts in")
    output: Folder | None = Field(default=None, description="folder for the answers; null: `out` beside input")
    work: Folder | None = Field(default=None, description="folder for jobs in progress; null: `work` beside input")
    done: Folder | None = Field(default=None, description="folder for answered inputs; null: `done` beside input")
    failed: Folder | None = Field(default=None, description="folder for rejected inputs; null: `failed` beside input")
    model: Name = Field(
        default="sam2.1_hiera_tiny", description="a catalogue name, the path of a checkpoint, or `demo`"
    )
    model_cfg: Name | None = Field(default=None, description="the model's yaml, where the name does not tell it")
    device: Device = Field(default="auto", description="device that runs the network")
    devices: Annotated[
        tuple[Device, ...], BeforeValidator(auto_alone), Field(strict=False), AfterValidator(each_card_once)
    ] = Field(default=(), description="several devices, a process each, instead of `device`; auto: every card")
    precision: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="the network's numbers"
    )
    compile: bool = Field(default=False, description="compile the network at the start, for speed")
    formats: Annotated[tuple[FormatName, ...], Field(strict=False, min_length=1), AfterValidator(once_each)] = Field(
        default=("mask", "opex"), description="output formats"
    )
    mask: Literal["instances", "per-object"] = Field(
        default="instances", description="one mask file for all objects, or one each"
    )
    cvat: formats_.CvatForm = Field(default="mask", description="what the format `cvat` writes of an object")
    coco: formats_.CocoForm = Field(default="rle", description="what the format `coco` writes of an object")
    missing_prompt: Literal["wait", "everything", "reject"] = Field(
        default="wait", description="a picture whose prompt is missing"
    )
    pair_timeout_s: NotNegative | None = Field(
        default=None, description="seconds until a prompt counts as missing; null: never"
    )
    lease_s: Annotated[float, Field(ge=2)] = Field(
        default=60.0, description="seconds without a sign of life after which another daemon takes a job over"
    )
    attempts: Count = Field(default=3, description="runs of a job that may end the process before it is rejected")
    sentinel: File | None = Field(
        default=None, description="file that must be there for the share to count as mounted; null: none"
    )
    watch: Watch = Watch()
    memory: Memory = Memory()
    contours: Contours = Contours()
    overlay: Overlay = Overlay()
    limits: Limits = Limits()
    pipeline: Pipeline = Pipeline()
    health: Health = Health()
    serve: Serve = Serve()
    load_timeout_s: Positive = Field(default=300.0, description="seconds that loading the model may take")
    log: Literal["auto", "text", "json"] = Field(default="auto", description="form of the log")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="least weight that is logged"
    )

    @model_validator(mode="after")
    def _one_answer_each(self) -> Settings:
        if self.devices and self.device != "auto":
            raise refuse(f"device ({self.device}) and devices are both given", "give one of the two")
        return self

    @property
    def folders(self) -> Folders:
        """The five folders, absolute (relative ones count from the current directory), siblings of input by default."""
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
    """Every key in dotted form (`watch.mode`) with its default, in the order of the docs."""
    return {".".join(loc): leaf.default for loc, leaf in _LEAVES.items()}


def env_name(key: str) -> str:
    """The environment variable of a dotted key: `watch.mode` → `SAM_POLL_WATCH__MODE`."""
    return PREFIX + key.replace(".", "__").upper()


def _group(annotation: Any) -> type[BaseModel] | None:
    """The group that an annotation is; on Python 3.10 `tuple[…]` passes for a type, too."""
    is_class = get_origin(annotation) is None and isinstance(annotation, type)
    return annotation if is_class and issubclass(annotation, BaseModel) else None


def _leaves(model: type[BaseModel], loc: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, info in model.model_fields.items():
        group = _group(info.annotation)
        if group is not None:
            yield from _leaves(group, (*loc, name))
        else:
            yield (*loc, name), info


_LEAVES = dict(_leaves(Settings))
_GROUPS = tuple(dict.fromkeys(loc[0] for loc in _LEAVES if len(loc) > 1))


# ── where values come from ──


@dataclass
class _Source:
    """One source's values, how it names a place in itself, and what is wrong with it."""

    values: dict[str, Any]
    where: Callable[[Loc], str]
    problems: list[Complaint] = field(default_factory=list)
    line: Callable[[Loc], int] = lambda loc: 0

    def complaints(self) -> list[tuple[str, Complaint]]:
        """All that is wrong in this source, from its top to its bottom, each with its place."""
        found = sorted([*self.problems, *_check(self.values)], key=lambda c: self.line(c.loc))
        return [(self.where(c.loc), c) for c in found]


def load(
    path: Path | None,
    *,
    env: Mapping[str, str] = os.environ,
    flags: Mapping[str, Any] | None = None,
    done_may_be_output: bool = False,
) -> Settings:
    """The settings of a config.yaml, the environment and the command line, the later stronger.

    `path` None takes `SAM_POLL_CONFIG` from `env`, and no file where that is not set either. `flags` has dotted keys
    (`watch.mode`) or nested mappings; None means that a flag was not given. Where nobody names a model, `MODEL` and
    `MODEL_CFG` of `env` do. `done_may_be_output` allows these two to be one folder, as Waikato's scripts have it.
    Raises SettingsError, and nothing else, with all problems at once.
    """
    if path is None and env.get("SAM_POLL_CONFIG"):
        path = Path(env["SAM_POLL_CONFIG"])
    sources = [_seed(env), *([_file(Path(path))] if path is not None else []), _environment(env), _flags(flags or {})]
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
        return next((s.where(loc) for s in reversed(sources) if loc and loc[0] in s.values), place(loc))

    problems = [(where(c.loc), c) for c in _check(merged)]
    if not problems:
        settings = Settings.model_validate(merged)
        problems = [(where(c.loc), c) for c in _check_folders(settings.folders, done_may_be_output)]
    if problems:
        raise _error(problems)
    return settings


def _check(values: object) -> list[Complaint]:
    try:
        Settings.model_validate(values)
    except ValidationError as error:
        return [_better(c) for c in complaints(error, values, _known)]
    return []


def _known(loc: Loc) -> Sequence[str]:
    group = _group(Settings.model_fields[str(loc[0])].annotation) if loc and loc[0] in _GROUPS else Settings
    return tuple(group.model_fields) if group is not None else ()


def _better(complaint: Complaint) -> Complaint:
    """A key that belongs into a group, or into another one, is told where."""
    if complaint.reason != "unknown key":
        return complaint
    homes = [".".join(loc) for loc in _LEAVES if loc[-1] == complaint.loc[-1]]
    if homes:
        return Complaint(complaint.loc, "unknown key here", f"did you mean {homes[0]}?")
    found = complaint.remedy or ""
    return Complaint(complaint.loc, "unknown key", found if len(found) < 100 else "see docs/settings.md for the keys")


def _error(problems: Sequence[tuple[str, Complaint]]) -> SettingsError:
    if len(problems) == 1:
        where, complaint = problems[0]
        return SettingsError(complaint.reason, place=where or None, remedy=complaint.remedy)
    said = [str(SettingsError(c.reason, place=where or None, remedy=c.remedy)) for where, c in problems[:20]]
    more = [f"… and {len(problems) - 20} more"] if len(problems) > 20 else []
    return SettingsError("\n  ".join([f"{len(problems)} problems in the settings:", *said, *more]))


def _merge(base: dict[str, Any], stronger: Mapping[str, Any]) -> None:
    for key, value in stronger.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = dict(value) if isinstance(value, Mapping) else value


def _seed(env: Mapping[str, str]) -> _Source:
    """`MODEL` and `MODEL_CFG`, the weakest: the names that SAM's own demos use."""
    values = {"model": env["MODEL"]} if env.get("MODEL") else {}
    if values and env.get("MODEL_CFG"):
        values["model_cfg"] = env["MODEL_CFG"]
    return _Source(values, lambda loc: f"environment, {place(loc).upper()}")


def _file(path: Path) -> _Source:
    try:
        values, lines, problems = read_yaml(_text(path))
    except NotYaml as error:
        at = f"{_shown(path)}, line {error.line}" if error.line else _shown(path)
        raise SettingsError(error.reason, place=at) from None

    def line(loc: Loc) -> int:
        return next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), 0)

    def where(loc: Loc) -> str:
        return f"{_shown(path)}, line {line(loc)}, {place(loc)}" if loc else _shown(path)

    if values is not None and not isinstance(values, dict):
        raise SettingsError("holds no keys", place=_shown(path), remedy="write lines like `model: demo`")
    given = {
        k: v for k, v in (values or {}).items() if v is not None or k not in _GROUPS
    }  # `watch:` with nothing below
    return _Source(given, where, problems, line)


def _shown(path: Path) -> str:
    text = str(path)
    return text if text.isprintable() and len(text) < 300 else quoted(text)


def _text(path: Path) -> str:
    try:
        if not path.is_file():
            what = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
            raise SettingsError(f"the settings file {what}", place=_shown(path))
        with path.open("rb") as stream:
            data = stream.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise SettingsError(f"the settings file is larger than {MAX_FILE_BYTES} bytes", place=_shown(path))
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SettingsError("not UTF-8", place=f"{_shown(path)}, line {line}", remedy="save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SettingsError(f"the settings file cannot be read: {reason}", place=_shown(path)) from None


def _environment(env: Mapping[str, str]) -> _Source:
    known = {env_name(".".join(loc)): loc for loc in _LEAVES}
    source = _Source({}, lambda loc: f"environment, {env_name('.'.join(str(p) for p in loc if isinstance(p, str)))}")
    for name in sorted(env):
        if not name.startswith(PREFIX) or name in NOT_SETTINGS or _KUBERNETES.fullmatch(name):
            continue
        if name not in known:
            source.problems.append(_unknown_variable(name, list(known)))
        elif env[name]:  # empty counts as not set: compose files pass `NAME=` for what nobody gave
            _put(source.values, known[name], _from_text(known[name], env[name]))
    return source


def _unknown_variable(name: str, known: Sequence[str]) -> Complaint:
    key = name.removeprefix(PREFIX)
    within = [other for other in known if other.startswith(name + "__")]
    guess = nearest(name, [*known, *NOT_SETTINGS])
    remedy = f"did you mean {guess}?" if guess else "see docs/settings.md for the names"
    return Complaint((key,), "unknown setting", f"set one by one: {', '.join(within)}" if within else remedy)


def _flags(flags: Mapping[str, Any]) -> _Source:
    source = _Source({}, lambda loc: f"command line, {place(loc)}" if loc else "command line")
    for loc, value in _flat(flags):
        if value is not None:
            _put(source.values, loc, _from_text(loc, value) if isinstance(value, str) and loc in _LEAVES else value)
    return source


def _flat(flags: Mapping[str, Any], loc: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
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
    """A value from a source that has texts only, read as its setting needs it: lists by commas, paths and names as
    they are, all else as in config.yaml."""
    annotation = _LEAVES[loc].annotation
    if get_origin(annotation) is tuple:
        whole = without_brackets(text.strip(), patterns=Pattern in get_args(annotation))
        return [part.strip() for part in whole.split(",") if part.strip()]
    return text if _is_text(annotation) else scalar(text)


def _is_text(annotation: Any) -> bool:
    if get_origin(annotation) in (Annotated, Union, types.UnionType):
        return any(_is_text(part) for part in get_args(annotation))
    return annotation in (Path, str)


# ── the folders against each other ──


def _check_folders(folders: Folders, done_may_be_output: bool) -> Iterator[Complaint]:
    """By their paths alone. A daemon that found its own answers in its input would answer them again, without end."""
    by_name = {entry.name: getattr(folders, entry.name) for entry in fields(folders)}
    names = list(by_name)
    for index, name in enumerate(names[1:], start=1):
        path, beside = by_name[name], folders.input.parent / ("out" if name == "output" else name)
        for other in names[:index]:
            if path == by_name[other] and not (done_may_be_output and {name, other} == {"done", "output"}):
                yield Complaint((name,), f"{path} is also {other}", "give every folder its own place")
        if path != folders.input and path.is_relative_to(folders.input):
            yield Complaint((name,), f"{path} lies inside input ({folders.input})", f"put it beside, like {beside}")
        elif path != folders.input and folders.input.is_relative_to(path):
            yield Complaint((name,), f"input ({folders.input}) lies inside {path}", f"put it beside, like {beside}")
