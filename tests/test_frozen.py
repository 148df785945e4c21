"""What users and shares depend on. It changes with a migration only.

Everything here is seen from outside: by the commands, the files of the repository, HTTP, Redis
and a share, or by the texts in all sources together. Modules, classes and functions may move and
be renamed without a change here. The few module paths below are ones that users write themselves.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module, util
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parent.parent
BOX = {"box": {"x0": 10, "y0": 10, "x1": 50, "y1": 40}}
ENV = {k: v for k, v in os.environ.items() if not k.startswith(("SAM_POLL_", "CVAT_", "MODEL"))} | {
    "COLUMNS": "300",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
SAM_POLL = [sys.executable, "-m", "sam_poll"]


# ── ways to look from outside ──


def run(*arguments: object, command: list[str] = SAM_POLL, **env: str) -> Any:
    """A command's end, in a folder that has no config.yaml."""
    line = [*command, *map(str, arguments)]
    return subprocess.run(line, env=ENV | env, cwd="/", capture_output=True, text=True, timeout=120)


def wait_until(condition: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    tick = threading.Event()
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        tick.wait(0.005)
    return found


def scripts() -> dict[str, str]:
    """The entry points in pyproject.toml, each with its target."""
    text = (ROOT / "pyproject.toml").read_text().partition("[project.scripts]\n")[2]
    return dict(re.findall(r'^(\S+) = "(\S+)"$', text.partition("\n[")[0], re.MULTILINE))


def script(name: str) -> list[str]:
    """The command line of an entry point, as the script that pip makes of it calls it."""
    module, _, function = scripts()[name].partition(":")
    return [sys.executable, "-c", f"from {module} import {function} as main; main()"]


def picture(ending: str = ".jpg", width: int = 64, height: int = 48) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return cv2.imencode(ending, pixels)[1].tobytes()


def put(path: Path, body: bytes | str | dict[str, Any] | list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(body, (dict, list)):
        body = json.dumps(body)
    path.write_bytes(body.encode() if isinstance(body, str) else body)


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def keys(value: Any, path: str = "") -> set[str]:
    """All keys in a JSON value: `a`, `a.b`, `a[].b`."""
    if isinstance(value, list):
        return set().union(*(keys(one, f"{path}[]") for one in value))
    if not isinstance(value, dict):
        return set()
    below = [keys(one, f"{path}.{key}".lstrip(".")) for key, one in value.items()]
    return {f"{path}.{key}".lstrip(".") for key in value}.union(*below)


def source_texts() -> set[str]:
    """All texts that stand in the sources of the package, wherever they are."""
    found = set()
    for path in (ROOT / "sam_poll").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
                text = node.value
                found.add(text if isinstance(text, str) else text.decode("latin-1"))
    return found


# ── the command line ──

CONFIG = "-c --config"
MODEL = "-m --model --model-cfg --device"
LOG = "--log --log-level"
REDIS = "--url --url-file"
BROKER = f"--broker {REDIS}"
CVAT = "--host --org --token-file --timeout --state --dry-run"
MOSAIC = "--tile --padding --points-per-side --iou --stability --min-area --passes"
MOSAIC_MORE = "--target-coverage --text --threshold"
COMMANDS = {
    "": "--version",
    "watch": f"{CONFIG} {MODEL} {LOG} -f --format --once",
    "predict": f"{CONFIG} {MODEL} --log-level -f --format -o --output --point --box --everything --prompt --label --text --threshold"
    " --polygon --mask",
    "check": "",
    "schema": "",
    "status": f"{CONFIG} --json",
    "retry": f"{CONFIG} --in",
    "merge": "-o --output --format --share-prefix",
    "bench": "-m --model --size --jobs --rounds --objects --device --part --pictures --json --plot --quick",
    "doctor": f"{CONFIG} {MODEL} --share --compare --box -o --output --quick --json",
    "mosaic": f"{CONFIG} {MODEL} --log-level -o --output --devices {MOSAIC} {MOSAIC_MORE}",
    "serve": f"{CONFIG} {MODEL} {LOG} --listen --token-file --ui",
    "ui": f"{CONFIG} {MODEL} {LOG} --listen --token-file --read-only",
    "redis": f"{CONFIG} {MODEL} {LOG} {REDIS} -f --format --stream --password-env --in --out"
    " --group --keep --max-answers",
    "models": "",
    "models list": "",
    "models download": "",
    "models verify": "",
    "cvat": "",
    "cvat prompts": "-o --output --images --label --negative --no-pictures",
    "cvat push": f"{CVAT} --task-name --project --share-prefix --label --polygon --update",
    "cvat masks": f"{CVAT} {CONFIG} {MODEL} --images --label --labels --negative --replace --again --as"
    " --job --from",
    "cvat find": f"{CVAT} {CONFIG} {MODEL} --images --labels --label --text --threshold --max-objects"
    " --like-existing --again --as --job",
    "cvat warm": f"{CVAT} {CONFIG} {MODEL} --job",
    "cluster": "",
    "cluster watch": f"{CONFIG} {LOG} {BROKER} --ahead --first",
    "cluster worker": f"{CONFIG} {MODEL} {LOG} {BROKER} -f --format",
}

SCRIPTS = {
    "sam-poll",
    "sam_predict_poll",
    "sam_predict_redis",
    "sam_test_redis_send",
    "sam_test_redis_recv",
    *("samhq_predict_poll", "samhq_predict_redis", "samhq_test_redis_send"),
    "samhq_test_redis_recv",
}

SERVER = "-H --host -p --port -d --database --password_env -c --channel"
WAIKATO = {
    "sam_predict_poll": "--model --model_type --config --device --prediction_in --prediction_out"
    " --prediction_tmp --poll_wait --continuous --use_watchdog --watchdog_check_interval"
    " --delete_input --verbose --quiet",
    "sam_predict_redis": "--redis_host --redis_port --redis_password --redis_password_env"
    " --redis_db --redis_in --redis_out --redis_timeout --model --model_type --config --device"
    " --verbose",
    "sam_test_redis_send": f"{SERVER} -I --image -P --prompt",
    "sam_test_redis_recv": f"{SERVER} -o --output_dir -f --file_prefix --count",
    "samhq_predict_poll": "--model --model_type --device --prediction_in --prediction_out"
    " --prediction_tmp --poll_wait --continuous --use_watchdog --watchdog_check_interval"
    " --delete_input --verbose --quiet",
    "samhq_predict_redis": "--redis_host --redis_port --redis_password --redis_password_env"
    " --redis_db --redis_in --redis_out --redis_timeout --model --model_type --device --verbose",
    "samhq_test_redis_send": f"{SERVER} -I --image -P --prompt",
    "samhq_test_redis_recv": f"{SERVER} -o --output_dir -f --file_prefix --count",
}
WAIKATO_DEFAULTS = {
    "device auto",
    "poll_wait 1.0",
    "watchdog_check_interval 10.0",
    "continuous False",
    "use_watchdog False",
    "delete_input False",
    "verbose False",
    "quiet False",
    "redis_host localhost",
    "redis_port 6379",
    "redis_db 0",
    "redis_timeout 0.01",
    "host localhost",
    "port 6379",
    "database 0",
    "file_prefix %Y%m%d_%H%M%S.%f",
    "count 0",
}


HELPS = """
import contextlib, io, json, runpy, sys
texts = {}
for name in sys.argv[1:]:
    sys.argv = ["sam-poll", *name.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_module("sam_poll", run_name="__main__")
    texts[name] = out.getvalue()
print(json.dumps(texts))
"""


def helps(names: list[str]) -> dict[str, str]:
    """The help texts of commands, by one process."""
    return json.loads(run("-c", HELPS, *names, command=[sys.executable]).stdout)


def flags_of(text: str) -> set[str]:
    """The flags in the first column of a help text, with or without a frame around it."""
    found: set[str] = set()
    for line in text.splitlines():
        words = re.split(r"[ ,]+", line.strip(" │*"))
        for word in words if words[0].startswith("-") else ():
            if re.fullmatch(r"--?[A-Za-z][\w-]*", word):
                found.add(word)
            elif word.isupper() or word.startswith(("<", "{")):
                continue  # what the flag takes
            else:
                break
    return found


@pytest.mark.slow
def test_every_command_has_its_flags_and_no_command_is_missing() -> None:
    found, pending = {}, [""]
    while pending:
        texts = helps(pending)
        found |= {name: flags_of(text) for name, text in texts.items()}
        pending = []
        for name, text in texts.items():
            for panel in text.split("╭─ ")[1:]:
                if not panel.startswith(("Options", "Arguments")):
                    names = re.findall(r"^│ ([a-z]\S*)", panel, re.MULTILINE)
                    pending += [f"{name} {command}".strip() for command in names]
    assert found == {k: {"-h", "--help", *flags.split()} for k, flags in COMMANDS.items()}


def test_every_script_is_installed_under_its_name_and_can_be_called() -> None:
    assert set(scripts()) == SCRIPTS
    for target in scripts().values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))


@pytest.mark.slow
def test_waikatos_scripts_have_waikatos_flags_and_defaults() -> None:
    texts = {name: run("--help", command=script(name)).stdout for name in WAIKATO}
    assert {name: flags_of(text) for name, text in texts.items()} == {
        name: {"-h", "--help", *flags.split()} for name, flags in WAIKATO.items()
    }
    said: set[str] = set()
    for text in texts.values():
        for about in re.split(r"\n  (?=-)", text)[1:]:
            flag = re.findall(r"--(\w+)", re.split(r"\n|  ", about)[0])[-1]
            said |= {f"{flag} {value}" for value in re.findall(r"\(default: (.*)\)", about)}
    assert {default for default in said if not default.endswith(" None")} == WAIKATO_DEFAULTS


FUNCTION = {
    "mode",
    "model",
    "model_cfg",
    "device",
    "precision",
    "config",
    "label",
    "task",
    "host",
} | {
    "texts",
    "threshold",
    "annotations",
    "score",
    "points_per_side",
    "min_area",
    "iou",
    "stability",
}
INTERACTOR = {"model", "model_cfg", "device", "precision", "config", "points_per_side"}


@pytest.mark.parametrize(
    ("module", "parameters"),
    [("sam_poll.cvat.function", FUNCTION), ("sam_poll.cvat.interactor", INTERACTOR)],
)
def test_cvat_cli_finds_functions_by_the_names_that_its_users_write(
    module: str, parameters: set[str]
) -> None:
    pytest.importorskip("cvat_sdk")
    with pytest.raises(Exception, match="there are ") as refused:
        import_module(module).create(nonsense="1")
    assert set(re.findall(r"\w+", str(refused.value).partition("there are ")[2])) == parameters


# ── exit codes ──

EXIT_CODES = {0, 1, 2, 3, 4, 40, 41, 43, 44, 49, 50, 54, 55, 70, 75, 78}


def test_the_exit_codes_are_these_numbers() -> None:
    enums = []
    for path in (ROOT / "sam_poll").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any(
                "IntEnum" in ast.unparse(b) for b in node.bases
            ):
                values = [n.value for n in node.body if isinstance(n, ast.Assign)]
                enums.append({v.value for v in values if isinstance(v, ast.Constant)})
    assert EXIT_CODES in enums


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (0, "--version"),
        (0, "check {good} {root}/config.yaml"),
        (0, "watch {empty}/in --once -m fake"),
        (2, "watch"),
        (2, "watch --nonsense"),
        (2, "nonsense"),
        (2, "predict {good}/dog.jpg --point nonsense -o {empty}/out"),
        (3, "check {wrong}"),
        (3, "predict {wrong}/dog.jpg -o {empty}/out -m fake"),
        (3, "watch {lone}/in --once -m fake"),
        (4, "watch {empty}/in --once -m sam3_unknown"),
        (4, "watch {empty}/in --once -m sam2.1_hiera_tiny"),
        (55, "cvat masks 7 --label dog -m fake --host http://127.0.0.1:9"),
        (75, "watch {empty}/away/in --once -m fake"),
        (75, "status {empty}/away/in"),
        (78, "watch -c {settings}"),
        (78, "watch {empty}/in --once -m fake --log nonsense"),
        (78, "serve --listen 0.0.0.0:0 -m fake"),
    ],
)
def test_a_command_ends_with_its_code(code: int, arguments: str, tmp_path: Path) -> None:
    for folder in ("good", "wrong"):
        put(tmp_path / folder / "dog.jpg", picture())
    put(tmp_path / "lone/in/dog.json", BOX)
    put(tmp_path / "good" / "dog.json", BOX)
    put(tmp_path / "wrong" / "dog.json", {"box": 1})
    put(tmp_path / "settings.yaml", "nonsense: 1\n")
    (tmp_path / "empty" / "in").mkdir(parents=True)
    where = {name: tmp_path / name for name in ("good", "wrong", "lone", "empty")}
    line = arguments.format(**where, root=ROOT, settings=tmp_path / "settings.yaml")
    env = {
        "SAM_POLL_CACHE": str(tmp_path),
        "CVAT_ACCESS_TOKEN": "x",
        "XDG_STATE_HOME": str(tmp_path),
    }
    if code == 55:
        pytest.importorskip("cvat_sdk")
    ended = run(*line.split(), **env)
    assert ended.returncode == code, ended.stderr


# ── settings ──

SETTINGS: dict[str, Any] = {
    "input": "/mnt/share/in",
    "output": None,
    "work": None,
    "done": None,
    "failed": None,
    "model": "sam2.1_hiera_tiny",
    "model_cfg": None,
    "device": "auto",
    "devices": [],
    "precision": "auto",
    "runtime": "auto",
    "compile": False,
    "hq_token_only": False,
    "load_timeout_s": 300,
    "formats": ["mask", "opex"],
    "mask": "instances",
    "cvat": "mask",
    "coco": "rle",
    "contours.tolerance_px": 1.0,
    "contours.min_area_px": 16,
    "overlay.max_side": 2048,
    "missing_prompt": "wait",
    "pair_timeout_s": None,
    "watch.mode": "auto",
    "watch.rescan_s": 10,
    "watch.ignore": [],
    "watch.settle_s": "auto",
    "lease_s": 60,
    "attempts": 3,
    "sentinel": None,
    "limits.picture_mpx": 268,
    "limits.prompt_bytes": 4194304,
    "limits.prompts": 10000,
    "memory.budget_mib": "auto",
    "memory.reserve_mib": 256,
    "memory.min_side": 256,
    "pipeline.decode_threads": "auto",
    "pipeline.finish_threads": "auto",
    "pipeline.queue": 4,
    "pipeline.batch": "auto",
    "pipeline.batch_wait_ms": 5,
    "pipeline.cache_mib": 512,
    "cache.disk_mib": 0,
    "cache.folder": None,
    "health.file": None,
    "health.metrics": None,
    "health.stuck_s": 300,
    "serve.listen": "127.0.0.1:8000",
    "serve.token_file": None,
    "serve.hosts": [],
    "serve.origins": [],
    "serve.queue": 64,
    "serve.timeout_s": 60,
    "serve.body_mib": 32,
    "log": "auto",
    "log_level": "INFO",
}
"""All settings with their defaults, a group's as `group.key`."""

WORDS = {
    "precision": "auto float32 float16 bfloat16",
    "runtime": "auto torch openvino",
    "mask": "instances per-object",
    "cvat": "mask polygon",
    "coco": "rle polygon",
    "missing_prompt": "wait everything reject",
    "watch.mode": "auto events poll",
    "memory.min_side": "256 512 768 1024",
    "log": "auto text json",
    "log_level": "DEBUG INFO WARNING ERROR",
    "formats": "mask opex overlay cvat coco yolo",
}
"""The words that a setting may be."""

NO_SETTINGS = {
    "SAM_POLL_CONFIG",
    "SAM_POLL_CACHE",
    "SAM_POLL_REDIS_URL",
    "SAM_POLL_SERVE_TOKEN",
} | {"SAM_POLL_BROKER_URL"}
OTHER_VARIABLES = {
    *("MODEL", "MODEL_CFG", "LABEL", "TEXTS", "POINTS_PER_SIDE", "STARTSWITH_BOX"),
    "INTERACTOR_ANSWER",
    *("SAM_URI", "SAM_TIMEOUT_S"),
    *("CVAT_HOST", "CVAT_ACCESS_TOKEN", "CVAT_USERNAME", "CVAT_PASSWORD", "PASS"),
    *("XDG_CACHE_HOME", "XDG_STATE_HOME"),
}


def variable(key: str) -> str:
    return "SAM_POLL_" + key.replace(".", "__").upper()


def in_groups(values: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        (made.setdefault(group, {}) if group else made)[name] = value
    return made


def test_config_yaml_has_every_setting_with_its_default() -> None:
    assert yaml.safe_load((ROOT / "config.yaml").read_text()) == in_groups(SETTINGS)


@pytest.mark.slow
def test_the_program_has_these_defaults_itself(tmp_path: Path) -> None:
    """`doctor` names nine values in any case, and else those that are not as by default."""
    put(tmp_path / "c.yaml", yaml.safe_dump(in_groups(SETTINGS | {"model": "fake"})))
    (tmp_path / "in").mkdir()
    env = {"SAM_POLL_INPUT": str(tmp_path / "in"), "SAM_POLL_SERVE__QUEUE": "65"}
    ended = run("doctor", "-c", tmp_path / "c.yaml", "--quick", "--json", **env)
    findings = json.loads(ended.stdout)["findings"]
    (values,) = [found["what"] for found in findings if found["name"] == "values"]
    assert set(values.split(", ")) == {
        f"input={tmp_path / 'in'}",
        "model=fake",
        "device=auto",
        "precision=auto",
        "formats=mask,opex",
        "lease_s=60.0",
        "watch.mode=auto",
        "memory.budget_mib=auto",
        "load_timeout_s=300.0",
        "serve.queue=65",
    }


def test_every_setting_has_its_variable_and_no_other_variable_is_taken(tmp_path: Path) -> None:
    def text(value: Any) -> str:
        return ",".join(value) if isinstance(value, list) else json.dumps(value).strip('"')

    given = {variable(k): text(v) for k, v in SETTINGS.items() if v not in (None, [])}
    nothing = {variable(k): "" for k, v in SETTINGS.items() if v in (None, [])}
    ours = dict.fromkeys(NO_SETTINGS - {"SAM_POLL_CONFIG"}, "x")
    ended = run("status", tmp_path, **given, **nothing, **ours)
    assert ended.returncode == 0, ended.stderr
    assert run("status", tmp_path, SAM_POLL_NONSENSE="1").returncode == 78


def test_a_setting_may_be_these_words(tmp_path: Path) -> None:
    for key, words in WORDS.items():
        for word in [*words.split(), "nonsense"]:
            value: Any = [word] if key == "formats" else int(word) if word.isdigit() else word
            put(tmp_path / f"{key}={word}.yaml", yaml.safe_dump(in_groups({key: value})))
    told = run("check", *sorted(tmp_path.glob("*.yaml"))).stdout.splitlines()
    refused = {key: line for line in told for key in WORDS if f"{key}=nonsense.yaml" in line}
    assert set(refused) == set(WORDS)
    assert len(told) == len(WORDS), "no word of these is refused"
    for key, words in WORDS.items():
        assert set(re.findall(r"[\w-]+", refused[key])) >= set(words.split()), refused[key]


def test_the_environment_has_these_names_beside_the_settings(source: set[str]) -> None:
    ours = {text for text in source if re.fullmatch(r"SAM_POLL_[A-Z_]*[A-Z]", text)}
    assert ours - {variable(key) for key in SETTINGS} == NO_SETTINGS
    assert source >= OTHER_VARIABLES


@pytest.fixture(scope="module")
def source() -> set[str]:
    return source_texts()


# ── prompts ──

ABOUT_THE_PICTURE = {"image", "image_sha256", "image_bytes", "image_size"} | {
    "image_size.width!",
    "image_size.height!",
}
ONE_OBJECT = {
    'label="object"',
    "points=[]",
    *("points[].x!", "points[].y!", "points[].label=1"),
    *("box", "box.x0!", "box.y0!", "box.x1!", "box.y1!"),
    *("extreme_points", "extreme_points[].x!", "extreme_points[].y!"),
    *("polygon", "mask", "mask.size!", "mask.counts!"),
}
PROMPTS = {
    "one object": ONE_OBJECT | ABOUT_THE_PICTURE,
    "objects": {"objects!", "notes=[]"}
    | {f"objects[].{key}" for key in ONE_OBJECT}
    | ABOUT_THE_PICTURE,
    "concept": {
        *("text", "label", "threshold=0.5", "max_objects=100"),
        *("exemplars", "exemplars[].box!", "exemplars[].label=1"),
        *(f"exemplars[].box.{edge}!" for edge in ("x0", "y0", "x1", "y1")),
    }
    | ABOUT_THE_PICTURE,
    "everything": {
        "everything!",
        "everything.points_per_side=32",
        "everything.min_area=100",
        "everything.iou=0.8",
        "everything.stability=0.9",
        "everything.crops=0",
    }
    | ABOUT_THE_PICTURE,
    "mosaic": {
        "mosaic!",
        "mosaic.tile=1024",
        "mosaic.padding=128",
        "mosaic.passes=1",
        "mosaic.target_coverage=0.95",
        "mosaic.points_per_side=32",
        "mosaic.min_area=100",
        "mosaic.iou=0.8",
        "mosaic.stability=0.9",
        "mosaic.text",
        "mosaic.threshold",
    }
    | ABOUT_THE_PICTURE,
}
"""What each form may have: `key!` is required, `key=1` has that default."""


def properties(root: dict[str, Any], node: dict[str, Any], path: str = "") -> set[str]:
    """The properties of a JSON schema as `PROMPTS` has them, whatever its definitions are called."""
    while "$ref" in node:
        known: Any = root
        for part in node["$ref"].removeprefix("#/").split("/"):
            known = known[part]
        node = known
    found: set[str] = set()
    for one in node.get("anyOf", []):
        found |= properties(root, one, path) if "$ref" in one else set()
    if node.get("type") == "array" and isinstance(node.get("items"), dict):
        found |= properties(root, node["items"], f"{path}[]")
    for key, value in node.get("properties", {}).items():
        here = f"{path}.{key}".lstrip(".")
        required = key in node.get("required", ())
        found.add(
            f"{here}!"
            if required
            else f"{here}={json.dumps(value['default'])}"
            if "default" in value
            else here
        )
        found |= properties(root, value, here)
    return found


def test_prompts_have_these_keys_and_no_others() -> None:
    schema = json.loads(run("schema").stdout)
    found = [properties(schema, form) for form in schema["anyOf"]]
    for name, expected in PROMPTS.items():
        assert expected in found, name
    assert len(found) == len(PROMPTS)
    labels = [
        d["properties"]["label"] for d in schema["$defs"].values() if "label" in d["properties"]
    ]
    assert [0, 1] in [label.get("enum") for label in labels]


# ── a share, by runs of the daemon over it ──

FORMATS = ("mask", "opex", "overlay", "cvat", "coco", "yolo")
ANSWER = {
    *(".mask.png", ".opex.json", ".overlay.jpg", ".cvat.xml", ".coco.json"),
    *(".yolo.txt", ".yolo.yaml"),
}
ERROR = {"job", "code", "reason", "place", "remedy", "time", "attempt", "files", "versions"}
WORKER = {"worker", "host", "pid", "lease_s", "started", "version", "model", "device", "step"} | {
    "formats",
    "peak_mib",
    "rate",
    "answered",
    "rejected",
    "at_work",
    "alarms",
}
ALARMS = {"share", "read", "output", "path", "lease", "stuck", "redis", "rabbitmq"}


@dataclass
class Share:
    """A share that was left by a daemon that was killed, then drained by another one."""

    root: Path
    at_work: set[str] = field(default_factory=set)
    life: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    code: int = -1

    def tree(self, folder: str) -> set[str]:
        return files(self.root / folder)

    def error(self, name: str) -> dict[str, Any]:
        return json.loads((self.root / "failed" / f"{name}.error.json").read_text())


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Share:
    """A first daemon is killed while it works. Then claims are laid down as today's daemons leave
    them, and a second daemon answers all there is."""
    made = Share(tmp_path_factory.mktemp("share"))
    root, work = made.root, made.root / "work"
    env = {"SAM_POLL_LEASE_S": "2", "SAM_POLL_WATCH__SETTLE_S": "0"}
    put(root / "in/cam1/big.png", picture(".png", 4000, 3000))
    put(root / "in/cam1/big.json", BOX)
    line = [*SAM_POLL, "watch", str(root / "in"), "-m", "fake", "-f", "overlay"]
    killed = subprocess.Popen(line, env=ENV | env, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: list(work.glob("cam1/.*/*/big.json")))
    finally:
        killed.kill()
        killed.wait()
    made.status = json.loads(run("status", root / "in", "--json", **env).stdout)
    made.at_work = files(work)
    (life,) = work.glob(".sam_poll-worker-*.json")
    made.life = json.loads(life.read_text())

    def claim(path: str, **prompts: Any) -> Path:
        """A claim of a daemon that is gone, with its picture and prompts in it."""
        name = path.split("/")[0][1:]
        put(work / f"{path}@gone-1-aa" / name, picture())
        for stem, body in prompts.items():
            put(work / f"{path}@gone-1-aa" / f"{stem}.json", body)
        return work / f"{path}@gone-1-aa"

    claim(".dog.jpg/g1.a1.n1", dog=BOX)
    claim(".cat.jpg/g3.a3.n1", cat=BOX)
    claim(".cow.jpg/g2.done~2", cow=BOX)
    report = {
        "job": "hen",
        "code": "prompt",
        "reason": "as written",
        "files": ["hen.jpg", "hen.json"],
    }
    put(claim(".hen.jpg/g2.failed", hen=BOX) / ".report", report)
    put(claim(".ram.jpg/g1.a1.n2", ram={"box": 1}) / ".answered~2", "")
    put(claim(".ant.jpg/g1.a1.n1", ant=BOX) / ".shares_stem", "")
    why = {"reason": "as held", "place": "here", "remedy": "wait"}
    held = [{"job": "bee.json", "seen": {}, "seconds": 0.2, "error": why}]
    put(claim(".bee.jpg/g2.input", bee=BOX) / ".held", held)
    put(root / "in/annotated.jpg", picture())
    put(root / "in/annotated.prompt", {"objects": [{"label": "a", **BOX}, {"label": "b", **BOX}]})
    put(root / "in/drawn.jpg", picture())
    put(root / "in/drawn.rough.png", picture(".png"))
    put(root / "in/drawn.json", {"mask": "drawn.rough.png"})
    put(root / "in/broken.jpg", picture()[:200])
    put(root / "in/broken.json", BOX)
    formats = [word for name in FORMATS for word in ("-f", name)]
    ended = run("watch", root / "in", "--once", "-m", "fake", *formats, **env)
    made.code = ended.returncode
    return made


@pytest.mark.slow
def test_a_share_has_five_folders(share: Share) -> None:
    assert {p.name for p in share.root.iterdir()} == {"in", "work", "out", "done", "failed"}


def test_work_has_the_daemons_sign_of_life_the_shares_mark_and_claims(share: Share) -> None:
    worker = r"\w+-\d+-[0-9a-f]{6}-[0-9a-f]+"
    patterns = {
        r"\.sam_poll-share",
        rf"\.sam_poll-worker-{worker}\.json",
        rf"cam1/\.big\.png/g1\.a1\.n1@{worker}/big\.png",
        rf"cam1/\.big\.png/g1\.a1\.n1@{worker}/big\.json",
    }
    unknown = {n for n in share.at_work if not any(re.fullmatch(p, n) for p in patterns)}
    assert not {n for n in unknown if not re.fullmatch(r"(.*/)?\.sam_poll-[\w-]+\.tmp", n)}
    assert all(any(re.fullmatch(p, name) for name in share.at_work) for p in patterns)
    assert f"/g1.a1.n1@{share.life['worker']}/" in " ".join(share.at_work)


def test_a_sign_of_life_has_these_keys(share: Share) -> None:
    assert set(share.life) == WORKER


def test_no_other_name_of_ours_begins_with_our_prefix(source: set[str]) -> None:
    ours = {text for text in source if text.startswith(".sam_poll-")}
    kinds = ("share", "probe", "worker-", "mosaic", "work", "try-")
    assert ours <= {".sam_poll-", *(f".sam_poll-{kind}" for kind in kinds)}
    assert {".sam_poll-", "share", "probe", "worker-", "mosaic"} & source


def test_claims_of_an_earlier_daemon_are_understood(share: Share) -> None:
    done = share.tree("done")
    failed = share.tree("failed")
    out = share.tree("out")
    assert {"cam1/big.png", "cam1/big.json"} <= done, "the claim of the daemon that was killed"
    assert {"dog.jpg", "dog.json"} <= done, "g1.a1.n1: run again"
    assert share.error("cat")["code"] == "poison", "g3.a3.n1: tried three times"
    assert {"cow~2.jpg", "cow~2.json"} <= done, "g2.done~2: over, to be carried away"
    assert "cow.mask.png" not in out
    assert {"hen.jpg", "hen.json"} <= failed, "g2.failed"
    assert share.error("hen")["reason"] == "as written", ".report"
    assert {"ram~2.jpg"} <= done, ".answered~2: the picture goes to done"
    assert {"ram.json"} <= failed
    assert {"ant.jpg.mask.png"} <= out, ".shares_stem: the answers' names have the ending"
    held = share.error("bee")
    told = [held[key] for key in ("code", "reason", "place", "remedy")]
    assert told == ["picture", "as held", "here", "wait"], ".held"


def test_every_answer_and_refusal_lies_where_it_did(share: Share) -> None:
    assert share.code == 3
    assert share.tree("in") == set()
    assert share.tree("work") == {".sam_poll-share"}
    stems = ("cam1/big", "dog", "annotated", "ant.jpg", "drawn")
    assert share.tree("out") == {f"{stem}{ending}" for stem in stems for ending in ANSWER}
    assert {"annotated.jpg", "annotated.prompt"} <= share.tree("done")
    assert {"drawn.jpg", "drawn.json", "drawn.rough.png"} <= share.tree("done")
    errors = {name for name in share.tree("failed") if name.endswith(".error.json")}
    assert errors == {f"{name}.error.json" for name in ("cat", "hen", "ram", "bee", "broken")}


def test_an_error_file_has_these_keys_and_codes(share: Share) -> None:
    assert {name: set(share.error(name)) for name in ("cat", "ram", "bee", "broken")} == {
        "cat": ERROR,
        "ram": ERROR,
        "bee": ERROR,
        "broken": ERROR,
    }
    ram = share.error("ram")
    assert (ram["job"], ram["code"], ram["place"], ram["files"]) == (
        "ram~2",
        "prompt",
        "box",
        ["ram.json"],
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", ram["time"])
    assert share.error("broken")["code"] == "picture"
    assert share.error("broken")["files"] == ["broken.jpg", "broken.json"]
    packages = {"sam_poll", "torch", "sam2", "segment-anything", "opencv-python"}
    assert "sam_poll" in ram["versions"]
    assert set(ram["versions"]) <= packages


def test_status_has_these_keys(share: Share) -> None:
    counts = {"pictures", "prompts", "other"}
    folders = ("input", "work", "output", "done", "failed")
    lone = {"pictures", "prompts", "explained"}
    expected = {*folders, "oldest", "without_partner", "workers", "alarms"}
    expected |= {f"{name}.{key}" for name in folders for key in counts} | {"failed.errors"}
    expected |= {f"without_partner.{key}" for key in lone}
    expected |= {f"workers[].{key}" for key in {*WORKER, "beat_s", "alive"}}
    assert keys(share.status) == expected


# ── the formats ──

OPEX = {
    *("id", "objects", "meta"),
    *(
        "objects[].score",
        "objects[].label",
        "objects[].bbox",
        "objects[].polygon",
        "objects[].meta",
    ),
    *(f"objects[].bbox.{side}" for side in ("top", "left", "bottom", "right")),
    "objects[].polygon.points",
    *(f"objects[].meta.{key}" for key in ("object", "prompt", "area", "holes")),
    *(f"meta.{key}" for key in ("image", "width", "height", "model", "family", "device")),
    *("meta.precision", "meta.step", "meta.side"),
}
COCO = {
    *("info", "info.description", "licenses", "categories", "images", "annotations"),
    *(f"categories[].{key}" for key in ("id", "name", "supercategory")),
    *(f"images[].{key}" for key in ("id", "file_name", "width", "height")),
    *(f"annotations[].{key}" for key in ("id", "image_id", "category_id", "segmentation", "area")),
    *("annotations[].segmentation.size", "annotations[].segmentation.counts"),
    *(f"annotations[].{key}" for key in ("bbox", "iscrowd", "score", "attributes")),
    "annotations[].attributes.score",
}
CVAT_XML = {
    "annotations": set(),
    "version": set(),
    "image": {"id", "name", "width", "height"},
    "mask": {"label", "source", "occluded", "rle", "left", "top", "width", "height", "z_order"},
    "attribute": {"name"},
}
CVAT_POLYGON = {"label", "source", "occluded", "points", "z_order"}


def test_opex_has_these_keys(share: Share) -> None:
    made = json.loads((share.root / "out/annotated.opex.json").read_text())
    assert keys(made) == OPEX
    assert made["meta"]["image"] == "done/annotated.jpg"
    assert [found["label"] for found in made["objects"]] == ["a", "b"]


def test_coco_has_these_keys(share: Share) -> None:
    made = json.loads((share.root / "out/annotated.coco.json").read_text())
    assert keys(made) == COCO
    assert made["images"][0]["file_name"] == "done/annotated.jpg"


def test_cvats_xml_has_these_elements_and_attributes(share: Share) -> None:
    tree = ElementTree.parse(share.root / "out/annotated.cvat.xml")
    assert {element.tag: set(element.keys()) for element in tree.iter()} == CVAT_XML
    assert tree.findtext("version") == "1.1"


def test_yolo_has_a_class_and_a_polygon_a_line_and_facts_beside_it(share: Share) -> None:
    facts = yaml.safe_load((share.root / "out/annotated.yolo.yaml").read_text())
    names = {0: "a", 1: "b"}
    assert facts == {"image": "done/annotated.jpg", "width": 64, "height": 48, "names": names}
    lines = (share.root / "out/annotated.yolo.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1"]
    assert all(re.fullmatch(r"\d+( [01]\.\d{6}){6,}", line) for line in lines)


def test_masks_are_255_for_one_object_and_numbers_for_several(share: Share) -> None:
    one = cv2.imread(str(share.root / "out/dog.mask.png"), cv2.IMREAD_UNCHANGED)
    several = cv2.imread(str(share.root / "out/annotated.mask.png"), cv2.IMREAD_UNCHANGED)
    assert set(np.unique(one)) == {0, 255}
    assert set(np.unique(several)) <= {0, 1, 2}
    overlay = cv2.imread(str(share.root / "out/cam1/big.overlay.jpg"))
    assert max(overlay.shape) <= 2048


def test_the_other_forms_of_mask_cvat_and_coco(share: Share, tmp_path: Path) -> None:
    env = {"SAM_POLL_MASK": "per-object", "SAM_POLL_CVAT": "polygon", "SAM_POLL_COCO": "polygon"}
    path, prompt = share.root / "done/annotated.jpg", share.root / "done/annotated.prompt"
    formats = ("-f", "mask", "-f", "cvat", "-f", "coco")
    ended = run("predict", path, "--prompt", prompt, "-o", tmp_path, "-m", "fake", *formats, **env)
    assert ended.returncode == 0, ended.stderr
    endings = ("mask.1.png", "mask.2.png", "cvat.xml", "coco.json")
    assert files(tmp_path) == {f"annotated.{ending}" for ending in endings}
    tree = ElementTree.parse(tmp_path / "annotated.cvat.xml")
    assert {frozenset(e.keys()) for e in tree.iter("polygon")} == {frozenset(CVAT_POLYGON)}
    coco = json.loads((tmp_path / "annotated.coco.json").read_text())
    assert isinstance(coco["annotations"][0]["segmentation"][0][0], (int, float))


@pytest.mark.parametrize("format", ["cvat", "coco", "yolo"])
def test_joined_answers_have_the_same_keys(share: Share, tmp_path: Path, format: str) -> None:
    ended = run("merge", share.root / "out", "-o", tmp_path / "joined", "--format", format)
    assert ended.returncode == 0, ended.stderr
    data = (tmp_path / "joined").read_bytes()
    if format == "coco":
        assert keys(json.loads(data)) == COCO
    elif format == "cvat":
        elements = ElementTree.fromstring(data).iter()
        assert {element.tag: set(element.keys()) for element in elements} == CVAT_XML
    else:
        labels = {
            f"labels/train/done/{name}.txt"
            for name in ("annotated", "ant", "cam1/big", "dog", "drawn")
        }
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert set(archive.namelist()) == {"data.yaml", "train.txt", *labels}
            assert set(yaml.safe_load(archive.read("data.yaml"))) == {"names", "path", "train"}


def test_retry_puts_jobs_back_under_their_names(share: Share, tmp_path: Path) -> None:
    shutil.copytree(share.root, tmp_path / "again")
    ended = run("retry", "--in", tmp_path / "again/in", "h*")
    assert ended.stdout == "hen\n"
    assert files(tmp_path / "again/in") == {"hen.jpg", "hen.json"}


# ── mosaics ──

STATS = {
    *("width", "height", "crs", "transform", "nodata", "tiles", "tiles_skipped", "valid_px"),
    *("labelled_px", "coverage", "labels_before", "joins", "slivers_merged", "slivers_dropped"),
    *("labels", "notes", "job"),
    *(f"job.{key}" for key in ("picture", "bytes", "changed_ns", "tile", "padding", "passes")),
    *(f"job.{key}" for key in ("model", "width", "height", "band")),
    *(f"job.passes.{key}" for key in ("first", "passes", "target_coverage")),
    *(f"job.passes.first.{key}" for key in ("points_per_side", "min_area", "iou", "stability")),
    "job.passes.first.crops",
}


@pytest.mark.slow
def test_a_mosaic_keeps_its_tiles_and_ends_with_these_files(tmp_path: Path) -> None:
    pytest.importorskip("rasterio", exc_type=ImportError)
    put(tmp_path / "wide.png", picture(".png", 384, 384))
    more = ("-m", "fake", "--tile", "64", "--padding", "16", "--points-per-side", "4")
    line = ("mosaic", str(tmp_path / "wide.png"), "-o", str(tmp_path / "made"), *more)
    state = tmp_path / "made/.sam_poll-mosaic"
    begun = subprocess.Popen([*SAM_POLL, *line], env=ENV, stderr=subprocess.DEVNULL)
    try:
        tile = wait_until(lambda: next(state.glob("*/tile-*.npz"), None))
    finally:
        begun.kill()
        begun.wait()
    names = ("job.json", r"begin\.lock", r"[0-9a-f]{16}/tile-\d{5}\.(npz|lock)")
    passing = r"([0-9a-f]{16}/)?\.sam_poll-[\w-]+\.tmp|made-.*|\w+\.lock"
    assert all(re.fullmatch("|".join([*names, passing]), name) for name in files(state))
    job = json.loads((state / "job.json").read_text())
    assert {f"job.{key}" for key in keys(job)} == {key for key in STATS if key.startswith("job.")}
    with np.load(tile) as kept:
        bands = {name for name in kept.files if name.startswith("band_")}
        assert set(kept.files) - bands == {"numbers", "scores", "areas", "counts"}
        assert bands <= {f"band_{side}" for side in ("left", "right", "top", "bottom")}
    again = run(*line)
    assert again.returncode == 0, again.stderr
    assert files(tmp_path / "made") == {"labels.tif", "labels.gpkg", "labels.geojson", "stats.json"}
    assert keys(json.loads((tmp_path / "made/stats.json").read_text())) == STATS
    drawn = json.loads((tmp_path / "made/labels.geojson").read_text())
    assert set(drawn) == {"type", "name", "crs", "features"}
    assert set(drawn["features"][0]["properties"]) == {
        "label",
        "score",
        "area_px",
        "area",
        "perimeter",
    }


@pytest.mark.slow
def test_a_mosaic_of_texts_has_these_files(tmp_path: Path) -> None:
    pytest.importorskip("rasterio", exc_type=ImportError)
    put(tmp_path / "wide.png", picture(".png", 384, 384))
    more = ("-m", "fake", "--tile", "192", "--padding", "16", "--text", "a", "--text", "b")
    ended = run("mosaic", str(tmp_path / "wide.png"), "-o", str(tmp_path / "made"), *more)
    assert ended.returncode == 0, ended.stderr
    assert files(tmp_path / "made") == {"labels.tif", "labels.gpkg", "labels.geojson", "stats.json"}
    of_texts = {"job.text", "job.threshold", "job.min_area", "classes", "classes.a", "classes.b"}
    of_both = {key for key in STATS if not key.startswith("job.passes")}
    assert keys(json.loads((tmp_path / "made/stats.json").read_text())) == of_both | of_texts
    drawn = json.loads((tmp_path / "made/labels.geojson").read_text())
    columns = {"label", "score", "area_px", "area", "perimeter", "class"}
    assert set(drawn["features"][0]["properties"]) == columns


def test_a_mosaics_folder_on_a_share_has_these_names(source: set[str]) -> None:
    assert source >= {"open.json", "job.json", "advanced"}
    assert {".sam_poll-mosaic", "mosaic"} & source


# ── models ──

MODELS = {
    "demo",
    *("sam_vit_b", "sam_vit_l", "sam_vit_h"),
    *("sam_hq_vit_tiny", "sam_hq_vit_b", "sam_hq_vit_l", "sam_hq_vit_h", "mobile_sam"),
    *("yonigozlan/EdgeTAM-hf", "facebook/sam3"),
    *("sam2_hiera_tiny", "sam2_hiera_small", "sam2_hiera_base_plus", "sam2_hiera_large"),
    *("sam2.1_hiera_tiny", "sam2.1_hiera_small", "sam2.1_hiera_base_plus", "sam2.1_hiera_large"),
}


def test_the_catalogue_has_these_models() -> None:
    lines = run("models", "list").stdout.splitlines()
    assert {line.split()[0] for line in lines if line.strip()} - {"name"} == MODELS


# ── HTTP ──

ADDRESSES = {
    "post /predict",
    "post /interact",
    "post /features",
    "post /warm",
    "get /health",
    "get /metrics",
}
BODIES = {
    "/predict": {"picture!", "prompt!", "formats", "name"},
    "/interact": {
        *("image!", "pos_points", "neg_points", "obj_bbox", "threshold"),
        *("text", "exemplars", "max_objects=100", "polygon", "mask"),
    },
    "/features": {"image!"},
    "/warm": {"picture!"},
}
REFUSED = {"400", "401", "403", "408", "413", "415", "421", "422", "429", "500", "503"}
REFUSAL = {"code", "reason", "place", "remedy"}
HEALTH = {
    *("live", "ready", "version", "model", "memory", "requests"),
    *(f"model.{key}" for key in ("name", "family", "device", "precision", "side")),
    *(f"memory.{key}" for key in ("step", "peak_mib", "out_of_memory")),
    *(
        f"requests.{key}"
        for key in ("places", "taken", "waiting", "at_work", "answered", "rejected")
    ),
}
METRICS = {
    "sam_poll_jobs_total": {"result", "reason"},
    "sam_poll_job_duration_seconds_bucket": {"le"},
    "sam_poll_job_duration_seconds_count": set(),
    "sam_poll_job_duration_seconds_sum": set(),
    "sam_poll_jobs_in_progress": set(),
    "sam_poll_pending_jobs": set(),
    "sam_poll_oldest_pending_seconds": set(),
    "sam_poll_last_scan_timestamp_seconds": set(),
    "sam_poll_claims_recovered_total": set(),
    "sam_poll_gpu_oom_total": set(),
    "sam_poll_disk_cache_total": {"event"},
    "sam_poll_orphans": set(),
    "sam_poll_alarm": {"kind"},
    "sam_poll_info": {"version", "model", "device"},
}
"""Each number with its labels."""


@dataclass
class Site:
    """A running `sam-poll serve`."""

    url: str

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, str, bytes]:
        """Status, kind and body of an answer; a body is posted, as JSON unless a kind is given."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {
            k.replace("_", "-"): v for k, v in headers.items()
        }
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.headers.get_content_type(), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers.get_content_type(), error.read()

    def json(self, path: str, body: Any = None) -> Any:
        return json.loads(self.ask(path, body)[2])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    pytest.importorskip("fastapi")
    log = tmp_path_factory.mktemp("serve") / "log"
    line = [*SAM_POLL, "serve", "--listen", "127.0.0.1:0", "-m", "fake"]
    with log.open("w") as stream:
        process = subprocess.Popen(line, env=ENV, stderr=stream, cwd="/")
    try:
        url = wait_until(lambda: re.search(r"http://127\.0\.0\.1:\d+", log.read_text()))
        made = Site(url[0])
        wait_until(lambda: made.ask("/health")[0] == 200)
        yield made
    finally:
        process.terminate()
        ended = process.wait(60)
    assert ended == 0, "SIGTERM ends it with 0"


@pytest.fixture(scope="module")
def described(site: Site) -> dict[str, Any]:
    return site.json("/openapi.json")


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_the_server_has_these_addresses(described: dict[str, Any]) -> None:
    assert {
        f"{verb} {path}" for path, verbs in described["paths"].items() for verb in verbs
    } == ADDRESSES


def test_requests_have_these_fields(described: dict[str, Any]) -> None:
    for path, fields in BODIES.items():
        for kind, content in described["paths"][path]["post"]["requestBody"]["content"].items():
            found = properties(described, content["schema"])
            assert {key for key in found if not re.search(r"[.\[]", key)} == fields, (path, kind)
    kinds = described["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert set(kinds) == {"application/json", "multipart/form-data"}


def test_refusals_have_these_numbers_and_keys(described: dict[str, Any], site: Site) -> None:
    assert set(described["paths"]["/predict"]["post"]["responses"]) == {"200", *REFUSED}
    for path, body, status, code in (
        ("/predict", {"picture": in_base64(picture()), "prompt": {"box": 1}}, 422, "prompt"),
        ("/predict", {"picture": in_base64(b"none"), "prompt": BOX}, 422, "picture"),
        ("/predict", b"{", 400, "body"),
        ("/nonsense", {}, 404, "address"),
        ("/health", {}, 405, "method"),
    ):
        found, _, told = site.ask(path, body)
        assert (found, json.loads(told)["code"]) == (status, code)
        assert set(json.loads(told)) == REFUSAL
    assert site.ask("/predict", b"x", Content_Type="text/plain")[0] == 415
    assert site.ask("/health", Host="elsewhere.example")[0] == 421


def test_one_format_is_answered_as_its_file_and_several_as_documents(site: Site) -> None:
    asked = {"picture": in_base64(picture()), "prompt": BOX}
    kinds = {name: site.ask("/predict", asked | {"formats": [name]})[1] for name in FORMATS}
    assert kinds == {
        "mask": "image/png",
        "opex": "application/json",
        "overlay": "image/jpeg",
        "cvat": "application/xml",
        "coco": "application/json",
        "yolo": "application/json",
    }
    made = site.json("/predict", asked | {"formats": ["mask", "opex"], "name": "done/dog.jpg"})
    assert keys(made) == {"documents"} | {
        f"documents[].{k}" for k in ("name", "media_type", "base64", "text")
    }
    names = [document["name"] for document in made["documents"]]
    assert names == ["done/dog.mask.png", "done/dog.opex.json"]


def test_a_form_is_answered_like_json(site: Site) -> None:
    parts = [
        b'--x\r\nContent-Disposition: form-data; name="picture"; filename="dog.jpg"\r\n\r\n'
        + picture(),
        b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + json.dumps(BOX).encode(),
        b'--x\r\nContent-Disposition: form-data; name="formats"\r\n\r\nopex',
        b"--x--\r\n",
    ]
    _, _, body = site.ask(
        "/predict", b"\r\n".join(parts), Content_Type="multipart/form-data; boundary=x"
    )
    assert json.loads(body)["id"] == "dog"


def test_interactors_are_answered_with_a_mask_row_by_row(site: Site) -> None:
    asked = {
        "image": in_base64(picture()),
        "pos_points": [[20, 20]],
        "neg_points": [],
        "obj_bbox": None,
    }
    made = site.json("/interact", asked)
    assert set(made) == {"mask"}
    assert {value for row in made["mask"] for value in row} == {0, 255}


def test_health_has_these_keys(site: Site) -> None:
    assert keys(site.json("/health")) == HEALTH


def test_the_numbers_for_prometheus_have_these_names_and_labels(site: Site) -> None:
    text = site.ask("/metrics")[2].decode()
    found: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? ", text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    assert found == METRICS
    assert set(re.findall(r'kind="(\w+)"', text)) == ALARMS
    results = set(re.findall(r'result="(\w+)"', text))
    reasons = set(re.findall(r'reason="(\w+)"', text))
    assert results == {"answered", "rejected", "released"}
    assert reasons >= {"input", "memory", "picture", "poison", "prompt"}


# ── Redis ──


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[Any]:
    redis = pytest.importorskip("redis")
    binary = shutil.which("redis-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if binary is None:
        pytest.skip("there is no redis-server: apt install redis-server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [
        binary,
        "--bind",
        "127.0.0.1",
        "--port",
        str(port),
        "--save",
        "",
        "--dir",
        str(tmp_path),
    ]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    client = redis.Redis(port=port, protocol=2)

    def answers() -> bool:
        try:
            return bool(client.ping())
        except redis.RedisError:
            return False

    try:
        wait_until(answers)
        yield SimpleNamespace(client=client, url=f"redis://127.0.0.1:{port}/0", port=port)
    finally:
        client.close()
        process.kill()
        process.wait()


@pytest.mark.slow
def test_stream_entries_and_answers_have_these_fields(redis_server: Any) -> None:
    client = redis_server.client
    client.xadd(
        "sam:in", {"id": "dog", "image": picture(), "prompt": json.dumps(BOX), "formats": "mask"}
    )
    client.xadd("sam:in", {"id": "cat", "image": picture(), "prompt": '{"box": 1}'})
    message = {"image": in_base64(picture()), "prompt": BOX}
    client.xadd("sam:in", {"id": "cow", "message": json.dumps(message)})
    line = [*SAM_POLL, "redis", "--stream", "-m", "fake"]
    env = ENV | {"SAM_POLL_REDIS_URL": redis_server.url}
    worker = subprocess.Popen(line, env=env, cwd="/", stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: client.xlen("sam:out") == 3)
        (group,) = client.xinfo_groups("sam:in")
    finally:
        worker.terminate()
        assert worker.wait(60) == 0
    assert group["name"] == b"sam_poll"
    fields = [entry for _, entry in client.xrange("sam:out")]
    assert {
        entry[b"id"].decode(): (entry[b"status"].decode(), {key.decode() for key in entry})
        for entry in fields
    } == {
        "dog": ("ok", {"id", "entry", "status", "documents", "mask.png"}),
        "cat": ("error", {"id", "entry", "status", "code", "reason", "place", "remedy"}),
        "cow": ("ok", {"id", "entry", "status", "documents", "mask.png", "opex.json"}),
    }


def test_waikatos_messages_are_answered_with_these_keys(redis_server: Any) -> None:
    client = redis_server.client
    heard = client.pubsub()
    heard.subscribe("out")
    flags = ("--redis_port", str(redis_server.port), "--redis_in", "in", "--redis_out", "out")
    line = [*script("sam_predict_redis"), *flags, "--model", "fake"]
    worker = subprocess.Popen(line, env=ENV, cwd="/", stderr=subprocess.DEVNULL)

    def answer(prompt: Any) -> Any:
        message = {"id": "dog", "image": in_base64(picture()), "prompt": prompt}
        wait_until(lambda: client.publish("in", json.dumps(message)))
        found = wait_until(lambda: heard.get_message(ignore_subscribe_messages=True, timeout=1))
        return json.loads(found["data"])

    try:
        good, wrong = answer(BOX), answer({"box": 1})
    finally:
        worker.terminate()
        assert worker.wait(60) == 0
        heard.close()
    assert set(good) == {"mask", "contours", "meta", "objects"}
    assert set(good["meta"]) == {"segmenter", "prompt", "id"}
    assert set(good["meta"]["segmenter"]) == {"type", "model_type", "model_file"}
    assert set(wrong) == {"error", "mask", "contours", "meta"}
    assert set(wrong["error"]) == REFUSAL


@pytest.mark.slow
def test_a_cluster_hands_out_claims_under_these_names(redis_server: Any, tmp_path: Path) -> None:
    pytest.importorskip("dramatiq")
    client = redis_server.client
    put(tmp_path / "in/dog.jpg", picture())
    put(tmp_path / "in/dog.json", BOX)
    line = [*SAM_POLL, "cluster", "watch", str(tmp_path / "in"), "--url", redis_server.url]
    env = ENV | {"SAM_POLL_WATCH__SETTLE_S": "0"}
    watcher = subprocess.Popen(line, env=env, stderr=subprocess.DEVNULL)
    try:
        (queue,) = wait_until(lambda: client.keys("sam_poll:*-rest.msgs"))
        message = json.loads(next(iter(client.hgetall(queue).values())))
    finally:
        watcher.terminate()
        assert watcher.wait(60) == 0
    assert message["actor_name"] == "run"
    assert message["kwargs"] == {"claim": ".dog.jpg", "generation": 1}
    (claim,) = (tmp_path / "work/.dog.jpg").iterdir()
    assert re.fullmatch(r"g1\.a0\.n1@dispatcher-\w+-\d+-[0-9a-f]{6}-[0-9a-f]+", claim.name)


def test_redis_names_stand_in_the_sources(source: set[str]) -> None:
    """Where there is no server this is all that can be seen."""
    assert source >= {"sam:in", "sam:out", ":dead", "sam_poll", "redis://localhost:6379/0"}
    assert source >= {"id", "image", "prompt", "message", "formats"}
    assert source >= {"entry", "status", "ok", "error", "documents", "attempts", "reason"}
    assert source >= {"claim", "generation", "-first", "-rest", "dispatcher-"}


# ── Waikato's folder ──


def test_sam_predict_poll_names_files_as_waikato_does(tmp_path: Path) -> None:
    for name, prompt in (("dog", BOX), ("bad", {"box": 1})):
        put(tmp_path / f"in/{name}.jpg", picture())
        put(tmp_path / f"in/{name}.prompt", prompt)
    flags = (
        "--prediction_in",
        tmp_path / "in",
        "--prediction_out",
        tmp_path / "out",
        "--use_watchdog",
    )
    assert run("--model", "fake", *flags, command=script("sam_predict_poll")).returncode == 3
    assert files(tmp_path / "in") == set()
    assert files(tmp_path / "out") == {
        *("dog.jpg", "dog.prompt", "dog.png", "dog.json"),
        *("failed/bad.jpg", "failed/bad.prompt", "failed/bad.error.json"),
        ".sam_poll-work/.sam_poll-share",
    }


# ── Docker and Nuclio ──

IMAGE = {"HOME", "USER", "SAM_POLL_CACHE", "HF_HOME", "SAM_POLL_HEALTH__FILE"} | {
    "PYTHONFAULTHANDLER",
    "PYTHONUNBUFFERED",
    "PYTHONDONTWRITEBYTECODE",
}
DOCKERFILES = {
    "Dockerfile.cpu": IMAGE,
    "Dockerfile.cuda": IMAGE | {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"},
    "Dockerfile": IMAGE,
    "nuclio/Dockerfile": {"SAM_POLL_CACHE", "HF_HOME"},
    "nuclio/Dockerfile.remote": set(),
}
WANTED = {"SAM_POLL_MODEL", "SAM_POLL_FORMATS", "SAM_POLL_LOG"}
COMPOSE = {
    "compose.yaml": {
        "sam-poll-cuda": WANTED | {"SAM_POLL_DEVICE"},
        "sam-poll-cpu": WANTED | {"SAM_POLL_DEVICE"},
    },
    "docker-compose.cluster.yml": {
        "watcher": {"SAM_POLL_REDIS_URL", "SAM_POLL_LEASE_S", "SAM_POLL_LOG"},
        "worker-cuda": WANTED | {"SAM_POLL_REDIS_URL", "SAM_POLL_LEASE_S", "SAM_POLL_DEVICES"},
        "worker-cpu": WANTED | {"SAM_POLL_REDIS_URL", "SAM_POLL_LEASE_S", "SAM_POLL_DEVICE"},
    },
    "docker-compose.cvat.override.yml": {"sam_poll": WANTED | {"SAM_POLL_DEVICE"}},
}
ASKED = {
    "compose.yaml": WANTED | {"UID", "GID", "SHARE", "TORCH", "TORCH_INDEX", "SAM_POLL_DEVICE"},
    "docker-compose.cluster.yml": WANTED
    | {
        "UID",
        "GID",
        "SHARE",
        "REDIS_HOST",
        "REDIS_PASSWORD",
        "TORCH",
        "SAM_POLL_LEASE_S",
        "SAM_POLL_DEVICES",
    },
    "docker-compose.cvat.override.yml": WANTED
    | {"SHARE", "SAM_POLL_DEVICE", "SAM_POLL_IMAGE", "SAM_POLL_UID", "SAM_POLL_GID"},
}
"""What a `.env` beside a compose file may set."""

NETWORK = {"MODEL", "MODEL_CFG", "SAM_POLL_DEVICE"}
EMBEDDING = {"MODEL", "SAM_POLL_DEVICE", "SAM_POLL_MEMORY__MIN_SIDE"}
ELSEWHERE = {"SAM_URI", "SAM_TIMEOUT_S"}
SAM1 = "pth-facebookresearch-sam-vit-h"
FUNCTIONS = {
    "sam2/function-cpu.yaml": ("pth-sam-poll-sam2", "main:handler", NETWORK | {"POINTS_PER_SIDE"}),
    "sam2/function-gpu.yaml": ("pth-sam-poll-sam2", "main:handler", NETWORK | {"POINTS_PER_SIDE"}),
    "sam2/function-detector-cpu.yaml": (
        "pth-sam-poll-sam2-everything",
        "main:detector",
        NETWORK | {"LABEL", "POINTS_PER_SIDE"},
    ),
    "sam2/function-detector-gpu.yaml": (
        "pth-sam-poll-sam2-everything",
        "main:detector",
        NETWORK | {"LABEL", "POINTS_PER_SIDE"},
    ),
    "sam1/function-cpu.yaml": (SAM1, "main:handler", EMBEDDING),
    "sam1/function-gpu.yaml": (SAM1, "main:handler", EMBEDDING),
    "remote/function.yaml": ("sam-poll-remote", "main:handler", ELSEWHERE),
    "remote/function-sam1.yaml": (SAM1, "main:handler", ELSEWHERE),
}
"""Name, handler and environment of each function."""


def test_images_set_these_variables_and_start_the_watcher() -> None:
    found = {}
    for name in DOCKERFILES:
        text = (ROOT / "docker" / name).read_text().replace("\\\n", " ")
        lines = " ".join(re.findall(r"^ENV (.*)$", text, re.MULTILINE))
        found[name] = set(re.findall(r"(\w+)=", lines))
    assert found == DOCKERFILES
    for name in ("Dockerfile.cpu", "Dockerfile.cuda"):
        text = (ROOT / "docker" / name).read_text()
        assert 'ENTRYPOINT ["tini", "--", "sam-poll"]\nCMD ["watch", "/mnt/share/in"]' in text
        assert "ARG TORCH_INDEX=" in text
    assert "ARG BASE=sam-poll:cpu" in (ROOT / "docker/nuclio/Dockerfile").read_text()


def test_compose_files_set_these_variables_and_ask_for_these() -> None:
    for name, services in COMPOSE.items():
        text = (ROOT / "docker" / name).read_text()
        described = yaml.safe_load(text)["services"]
        assert {
            k: set(v["environment"]) for k, v in described.items() if "environment" in v
        } == services
        assert set(re.findall(r"\$\{(\w+)", re.sub(r"(?m)^ *#.*$", "", text))) == ASKED[name]


def test_nuclio_finds_its_functions() -> None:
    found = {}
    for path in (ROOT / "docker/nuclio").glob("*/function*.yaml"):
        told = yaml.safe_load(path.read_text())
        names = {entry["name"] for entry in told["spec"]["env"]}
        key = path.relative_to(ROOT / "docker/nuclio").as_posix()
        found[key] = (told["metadata"]["name"], told["spec"]["handler"], names)
    assert found == FUNCTIONS
    script = (ROOT / "docker/nuclio/deploy.sh").read_text()
    for name in ("sam2", "sam2-everything", "sam1", "remote", "remote-sam1"):
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", script), name
    for name in ("MODEL", "SAM_URI", "SAM_TIMEOUT_S", "CVAT_NETWORK", "TORCH_INDEX"):
        assert re.search(rf"\$\{{?{name}\b", script), name


SHAPE = frozenset({"confidence", "label", "points", "mask", "type"})


def entry(folder: str, name: str) -> Any:
    """A function's main.py, as Nuclio imports it."""
    spec = util.spec_from_file_location(name, ROOT / "docker/nuclio" / folder / "main.py")
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def context() -> Any:
    """Stands where Nuclio's context would."""
    silent = dict.fromkeys(("info", "warn", "error", "debug"), lambda *told: None)
    return SimpleNamespace(
        logger=SimpleNamespace(**silent),
        user_data=SimpleNamespace(),
        Response=lambda **told: SimpleNamespace(**told),
    )


def event(**body: Any) -> Any:
    return SimpleNamespace(
        body={"image": in_base64(picture()), **body}, content_type="application/json", headers={}
    )


def test_the_functions_of_nuclio_answer_as_cvat_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "fake")
    monkeypatch.setenv("LABEL", "thing")
    monkeypatch.setenv("POINTS_PER_SIDE", "4")
    main, given = entry("sam2", "frozen_sam2"), context()
    main.init_context(given)
    clicked = main.handler(given, event(pos_points=[[20, 20]], neg_points=[], obj_bbox=[]))
    assert clicked.status_code == 200
    assert set(json.loads(clicked.body)) == {"mask"}
    found = main.detector(given, event(threshold=0.1))
    assert found.status_code == 200
    shapes = json.loads(found.body)
    assert {frozenset(shape) for shape in shapes} == {SHAPE | {"attributes"}}
    assert {(shape["label"], shape["type"]) for shape in shapes} == {("thing", "mask")}
    refused = main.handler(given, event(pos_points="nonsense"))
    assert refused.status_code != 200
    for folder in ("sam1", "remote"):
        module = entry(folder, f"frozen_{folder}")
        assert callable(module.init_context)
        assert callable(module.handler)


def test_the_function_elsewhere_hands_on_to_sam_uri(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAM_URI", f"{site.url}/interact")
    monkeypatch.setenv("SAM_TIMEOUT_S", "20")
    main, given = entry("remote", "frozen_remote"), context()
    main.init_context(given)
    answer = main.handler(given, event(pos_points=[[20, 20]], neg_points=[]))
    assert answer.status_code == 200
    assert set(json.loads(answer.body)) == {"mask"}


@pytest.mark.slow
def test_the_python_interface_keeps_its_names() -> None:
    import sam_poll

    assert sorted(sam_poll.__all__) == [
        "Model",
        "PredictedObject",
        "Prediction",
        "__version__",
        "load",
    ]
    model = sam_poll.load("fake")
    assert isinstance(model, sam_poll.Model)
    public = {
        cls: {n for n in vars(cls) if n[0] != "_"}
        for cls in (sam_poll.Model, sam_poll.Prediction, sam_poll.PredictedObject)
    }
    assert public == {
        sam_poll.Model: {"info", "predict"},
        sam_poll.Prediction: {"masks", "model", "notes", "objects", "save", "size"},
        sam_poll.PredictedObject: {"area", "box", "label", "mask", "polygons", "rle", "score"},
    }
