"""Dockerfiles and the compose file, as far as they can be tried without an engine; and the wheel
that they install.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from sam_poll import __version__
from sam_poll.config import settings
from sam_poll.pipeline.options import PipelineOptions
from sam_poll.runtime.health import LivenessFile
from tests.support.paths import ROOT
from tests.support.project_file import constraints, project
from tests.support.redis_server import Server
from tests.support.shell_lines import parse

FILES = ["docker/Dockerfile", "docker/Dockerfile.cuda"]
dockerfiles = pytest.mark.parametrize("name", FILES)


def instructions(name: str) -> list[tuple[str, str]]:
    """A Dockerfile's instructions in order, lines joined, comments left out."""
    lines = [
        line for line in (ROOT / name).read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (line.split(" ", 1)[0], line.split(" ", 1)[1].strip())
        for line in joined.splitlines()
        if line.strip()
    ]


def last(name: str, kind: str) -> str:
    return [value for key, value in instructions(name) if key == kind][-1]


def interpolated(value: Any, given: dict[str, str]) -> Any:
    """Compose's `${NAME:-default}` and `${NAME:?reason}`."""
    if isinstance(value, dict):
        return {key: interpolated(entry, given) for key, entry in value.items()}
    if isinstance(value, list):
        return [interpolated(entry, given) for entry in value]
    if not isinstance(value, str):
        return value

    def value_of(match: re.Match[str]) -> str:
        name, kind, text = match.groups()
        if given.get(name):
            return given[name]
        if kind == "?":
            raise KeyError(f"{name}: {text}")
        return text

    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value_of, value)


def compose(name: str = "compose.yaml", **given: str) -> Any:
    return interpolated(yaml.safe_load((ROOT / "docker" / name).read_text()), given)


# ── Dockerfiles ──


def runs(name: str) -> list[str]:
    return [value for key, value in instructions(name) if key == "RUN"]


def only(texts: list[str], word: str) -> str:
    (found,) = [text for text in texts if word in text]
    return found


@dockerfiles
def test_torch_comes_from_its_builds_index_in_the_pinned_version(name: str) -> None:
    torch = only(runs(name), " torch torchvision")
    assert "--constraint /tmp/constraints.txt" in torch
    assert (
        '--extra-index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/$TORCH}" torch' in torch
    )


def test_pip_takes_the_build_of_the_index_before_pypis_of_the_same_version() -> None:
    """It chooses the greatest version that the constraints admit."""
    pinned = dict(line.split("==") for line in constraints() if line.startswith("torch"))
    for name in ("torch", "torchvision"):
        plain = Version(pinned[name])
        for build in ("cpu", "cu126", "cu130"):
            assert Version(f"{plain}+{build}") > plain
            assert SpecifierSet(f"=={plain}").contains(f"{plain}+{build}")


@dockerfiles
def test_a_change_of_the_source_installs_no_dependency_again(name: str) -> None:
    """A layer is built again when a file changes that it, or one before it, has mounted."""
    steps = runs(name)
    mounted = [re.findall(r"--mount=type=bind,(?:source=(\S+?),)?target=(\S+)", s) for s in steps]
    (source,) = [n for n, files in enumerate(mounted) if any(t == "/src,rw" for _, t in files)]
    assert source == len(steps) - 1
    assert "pip install --no-cache-dir --no-deps /src" in steps[source]
    before = {path for files in mounted[:source] for path, _ in files}
    assert before == {"constraints.txt", "pyproject.toml"}
    assert not [key for key, _ in instructions(name) if key in ("COPY", "ADD")]


@dockerfiles
def test_nothing_is_left_of_caches_and_of_the_trial_run(name: str) -> None:
    apt, *_, trial = runs(name)
    assert apt.endswith("&& rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*")
    assert "export HOME=/tmp/trial TMPDIR=/tmp/trial SAM_POLL_CACHE=/tmp/trial" in trial
    assert trial.endswith("&& rm -rf /tmp/trial")
    order = [key for key, _ in instructions(name)]
    assert order.index("ENV") < len(order) - 1 - order[::-1].index("RUN"), (
        "without PYTHONDONTWRITEBYTECODE the run writes beside the packages"
    )
    assert all(
        "--no-cache-dir" in line for s in runs(name) for line in re.findall(r"pip install.*?&&", s)
    )


@dockerfiles
def test_labels_name_the_version_and_the_licence(name: str) -> None:
    labels = dict(word.split("=", 1) for word in shlex.split(last(name, "LABEL")))
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}version"] == __version__
    assert labels[f"{prefix}description"] == project()["description"]
    assert labels[f"{prefix}licenses"] == project()["license"]


@dockerfiles
def test_it_runs_as_nobody_in_particular_and_stops_by_signal(name: str) -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last(name, "USER"))
    assert last(name, "STOPSIGNAL") == "SIGTERM"
    assert yaml.safe_load(last(name, "ENTRYPOINT")) == ["tini", "--", "sam-poll"]
    environment = dict(word.split("=", 1) for word in shlex.split(last(name, "ENV")))
    assert environment["HOME"] == "/tmp"
    assert f"install -d -m 1777 {environment['SAM_POLL_CACHE']}" in (ROOT / name).read_text()


@dockerfiles
def test_its_command_is_one_of_ours(name: str) -> None:
    parse(["sam-poll", *yaml.safe_load(last(name, "CMD"))])


@pytest.mark.parametrize(
    "name", [*FILES, "docker/nuclio/Dockerfile", "docker/nuclio/Dockerfile.remote"]
)
def test_what_it_mounts_is_there_and_not_ignored(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert "*" in ignored
    sources = re.findall(r"--mount=type=bind,source=(\S+?),", " ".join(runs(name)))
    used = re.findall(r"/src/(examples/\S+)/\S+", " ".join(runs(name)))
    assert sources
    for source in {
        *sources,
        *used,
        "pyproject.toml",
        "setup.py",
        "README.md",
        "LICENSE",
        "sam_poll",
    }:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored, source


def test_the_image_for_gpus_by_its_former_name_is_the_same() -> None:
    one, other = (instructions(name) for name in FILES)
    different = {(a[0], a[1][:5], b[1][:5]) for a, b in zip(one, other, strict=True) if a != b}
    assert different == {("ARG", "TORCH", "TORCH"), ("ENV", "HOME=", "HOME=")}
    assert (ROOT / "docker/Dockerfile.cpu").resolve() == ROOT / "docker/Dockerfile"


@pytest.mark.skipif(os.name != "posix", reason="runs a POSIX shell")
@dockerfiles
def test_the_health_check_wants_a_heartbeat_of_the_last_minute(name: str, tmp_path: Path) -> None:
    command = yaml.safe_load(last(name, "HEALTHCHECK").partition("CMD ")[2])
    alive = tmp_path / "it is alive"

    def healthy() -> bool:
        env = {"PATH": os.environ["PATH"], "SAM_POLL_HEALTH__FILE": str(alive)}
        return (
            subprocess.run(
                command, env=env, check=False, capture_output=True, timeout=60
            ).returncode
            == 0
        )

    assert not healthy()
    LivenessFile(alive).touch()
    assert healthy()
    for age, well in ((50, True), (70, False), (4000, False)):
        os.utime(alive, (time.time() - age, time.time() - age))
        assert healthy() is well, age


@dockerfiles
def test_the_heartbeat_is_where_any_user_may_write_and_the_model_may_take_its_time(
    name: str,
) -> None:
    environment = dict(word.split("=", 1) for word in shlex.split(last(name, "ENV")))
    made = settings.load(None, env=environment)
    assert str(made.health.file).startswith("/tmp/")
    (seconds,) = re.findall(r"--start-period=(\d+)s", last(name, "HEALTHCHECK"))
    assert int(seconds) > made.load_timeout_s


def extras(name: str) -> list[str]:
    """What the image installs beside the project itself."""
    (found,) = re.findall(r"^ARG EXTRAS=(\S+)$", (ROOT / name).read_text(), re.MULTILINE)
    return str(found).split(",")


def test_the_images_extras_are_those_of_the_project() -> None:
    assert set(extras(FILES[0])) <= set(project()["optional-dependencies"])


@dockerfiles
def test_metrics_can_be_switched_on_without_installing_anything(name: str) -> None:
    assert "metrics" in extras(name)


@dockerfiles
def test_hadolint_finds_nothing(name: str) -> None:
    linter = shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        [linter, ROOT / name], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


# ── compose ──


def test_both_services_run_as_the_caller_on_one_mount_with_models_in_a_volume() -> None:
    made = compose(UID="1234", GID="5678", SHARE="/data/share")
    assert set(made["services"]) == {"sam-poll-cpu", "sam-poll-cuda"}
    assert set(made["volumes"]) == {"models"}
    for service in made["services"].values():
        share, models = service["volumes"]
        assert service["user"] == "1234:5678"
        assert (share["source"], share["target"]) == ("/data/share", "/mnt/share")
        assert models == "models:/cache"
        assert service["restart"] == "unless-stopped"
        assert int(service["stop_grace_period"].removesuffix("s")) > PipelineOptions().drain_s
        assert (
            ROOT / "docker" / service["build"]["context"] / service["build"]["dockerfile"]
        ).is_file()


def test_only_one_service_starts_with_a_profile_and_only_cuda_asks_for_a_card() -> None:
    services = compose()["services"]
    assert {name: service["profiles"] for name, service in services.items()} == {
        "sam-poll-cpu": ["cpu"],
        "sam-poll-cuda": ["cuda"],
    }
    (device,) = services["sam-poll-cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in services["sam-poll-cpu"]


@pytest.mark.parametrize("service", ["sam-poll-cpu", "sam-poll-cuda"])
def test_its_variables_are_settings_and_watch_what_is_mounted(service: str) -> None:
    made = settings.load(
        None, env=compose(SAM_POLL_FORMATS="mask,cvat")["services"][service]["environment"]
    )
    assert made.formats == ("mask", "cvat")
    assert made.device == ("cpu" if service == "sam-poll-cpu" else "cuda:0")
    assert str(made.folders.input) == "/mnt/share/in"


OVERRIDE = "docker-compose.cvat.override.yml"
READERS = ["server", *(f"worker_{kind}" for kind in ("import", "export", "annotation", "chunks"))]


def test_cvat_reads_the_share_and_sam_poll_works_on_the_same_one() -> None:
    made = compose(OVERRIDE, SHARE="/data/share")
    assert set(made["services"]) == {"sam_poll", *(f"cvat_{reader}" for reader in READERS)}
    for reader in READERS:
        assert made["services"][f"cvat_{reader}"] == {
            "volumes": ["cvat_share:/home/django/share:ro"]
        }
    assert made["volumes"]["cvat_share"] == {
        "driver_opts": {"type": "none", "device": "/data/share", "o": "bind"}
    }
    service = made["services"]["sam_poll"]
    assert service["volumes"] == ["cvat_share:/mnt/share", "sam_poll_models:/cache"]
    assert service["image"] in {s["image"] for s in compose()["services"].values()}
    assert int(service["stop_grace_period"].removesuffix("s")) > PipelineOptions().drain_s


def test_the_daemon_beside_cvat_writes_what_cvat_imports() -> None:
    made = settings.load(None, env=compose(OVERRIDE)["services"]["sam_poll"]["environment"])
    assert "cvat" in made.formats
    assert str(made.folders.input) == "/mnt/share/in"


CLUSTER = "docker-compose.cluster.yml"


def test_the_cluster_is_one_redis_one_watcher_and_workers_on_one_share() -> None:
    made = compose(
        CLUSTER,
        UID="12",
        GID="34",
        SHARE="/data/share",
        REDIS_HOST="10.0.0.5",
        REDIS_PASSWORD="w0rd",
    )
    services, plain = made["services"], compose()["services"]
    assert {name: service["profiles"] for name, service in services.items()} == {
        "redis": ["head"],
        "watcher": ["head"],
        "worker-cuda": ["cuda"],
        "worker-cpu": ["cpu"],
    }
    for name in ("watcher", "worker-cuda", "worker-cpu"):
        service = services[name]
        share, models = service["volumes"]
        assert service["user"] == "12:34"
        assert (share["source"], share["target"], models) == (
            "/data/share",
            "/mnt/share",
            "models:/cache",
        )
        assert share["bind"] == {"create_host_path": False}
        assert service["image"] in {s["image"] for s in plain.values()}
        assert int(service["stop_grace_period"].removesuffix("s")) > PipelineOptions().drain_s
        assert service["environment"]["SAM_POLL_REDIS_URL"] == "redis://:w0rd@10.0.0.5:6379/0"
        parse(["sam-poll", *service["command"]])
    assert services["watcher"]["command"][:2] == ["cluster", "watch"]
    assert (
        services["worker-cuda"]["command"][:2]
        == services["worker-cpu"]["command"][:2]
        == ["cluster", "worker"]
    )


@pytest.mark.parametrize("service", ["watcher", "worker-cuda", "worker-cpu"])
def test_the_clusters_variables_are_settings_with_one_lease(service: str) -> None:
    made = settings.load(
        None, env=compose(CLUSTER, REDIS_PASSWORD="w0rd")["services"][service]["environment"]
    )
    assert made.lease_s == 30
    assert made.devices == (("auto",) if service == "worker-cuda" else ())


def test_the_clusters_redis_has_a_password() -> None:
    with pytest.raises(KeyError, match="REDIS_PASSWORD: set it"):
        compose(CLUSTER, REDIS_HOST="10.0.0.5")


def test_the_clusters_redis_keeps_what_it_has_and_is_open_to_one_address(tmp_path: Path) -> None:
    service = compose(CLUSTER, REDIS_HOST="10.0.0.5", REDIS_PASSWORD="w0rd")["services"]["redis"]
    assert service["ports"] == ["10.0.0.5:6379:6379"]
    assert service["volumes"] == ["redis:/data"]
    with Server(tmp_path) as server:  # a real one takes these words, and they mean what they should
        words = service["command"][1:]
        for name, value in zip(words[::2], words[1::2], strict=True):
            server.client.config_set(name.removeprefix("--"), value)
        found = server.client.config_get("*")
    assert (found["appendonly"], found["appendfsync"], found["save"]) == ("yes", "everysec", "")
    assert (found["maxmemory"], found["maxmemory-policy"], found["requirepass"]) == (
        str(256 << 20),
        "noeviction",
        "w0rd",
    )


@dockerfiles
def test_the_images_hold_what_a_cluster_needs(name: str) -> None:
    assert {"redis", "cluster"} <= set(extras(name))


def test_compose_itself_accepts_it() -> None:
    client = shutil.which("docker")
    command = [client or "", "compose", "-f", str(ROOT / "docker" / "compose.yaml")]
    if (
        client is None
        or subprocess.run([*command[:2], "version"], check=False, capture_output=True).returncode
    ):
        pytest.skip("docker compose is not installed")
    for profile in ("cpu", "cuda"):
        done = subprocess.run(
            [*command, "--profile", profile, "config", "--quiet"],
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


# ── what the images install ──


@pytest.mark.slow
def test_the_wheel_holds_the_model_the_font_and_the_commands(tmp_path: Path) -> None:
    source = tmp_path / "src"
    shutil.copytree(
        ROOT / "sam_poll", source / "sam_poll", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, "-w", str(tmp_path), str(source)],
        check=False,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (entry_points,) = [n for n in names if n.endswith("entry_points.txt")]
        commands = archive.read(entry_points).decode()
    data = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "sam_poll" / "data").rglob("*")
        if p.is_file()
    }
    assert data | {"sam_poll/py.typed", "sam_poll/cli/main.py"} <= names
    assert any(n.endswith("/licenses/LICENSE") for n in names)
    assert "sam-poll = sam_poll.cli.main:main" in commands
    assert "sam_predict_poll = sam_poll.cli.waikato_poll:main" in commands


@dockerfiles
def test_the_images_hold_what_a_mosaic_needs(name: str) -> None:
    assert "geo" in extras(name)
    assert "libexpat1" in (ROOT / name).read_text("utf-8"), (
        "rasterio's wheel links to it and has it not"
    )
