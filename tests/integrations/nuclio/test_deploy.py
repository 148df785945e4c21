"""Tests of the yamls of CVAT's Nuclio functions, and of the scripts that deploy them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from sam_poll.config import settings
from sam_poll.engines.catalog import MODELS
from sam_poll.integrations.nuclio import handler, proxy
from tests.support.nuclio_calls import FUNCTIONS, ROOT, Lines

YAMLS = sorted(path.relative_to(FUNCTIONS).as_posix() for path in FUNCTIONS.glob("*/*.yaml"))
# ── yamls ──


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load((FUNCTIONS / name).read_text())


def environment(name: str) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in config(name)["spec"]["env"]}


@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_names_an_existing_handler(name: str) -> None:
    module, _, function = config(name)["spec"]["handler"].partition(":")
    source = (FUNCTIONS / name).with_name(f"{module}.py").read_text()
    assert f"def {function}(context" in source
    assert "def init_context(context" in source
    assert source.count("\n") <= 40


@pytest.mark.parametrize("name", YAMLS)
def test_variables_of_a_yaml_are_read_by_the_code_and_valid(name: str) -> None:
    env = environment(name)
    assert all(isinstance(value, str) for value in env.values())
    if "remote" in name:
        assert set(env) == {proxy.URI, proxy.TIMEOUT_S}
        assert proxy.Remote.open(Lines(), env).timeout_s < int(
            config(name)["spec"]["eventTimeout"].rstrip("s")
        )
        return
    own = {
        handler.LABEL,
        handler.POINTS_PER_SIDE,
        handler.STARTSWITH_BOX,
        handler.INTERACTOR_ANSWER,
    }
    read = settings.load(None, env=env)
    assert set(env) <= own | {"MODEL", "MODEL_CFG"} | {
        key for key in env if key.startswith("SAM_POLL_")
    }
    assert read.model == env["MODEL"]
    assert read.model in MODELS
    assert read.device == ("cuda" if "gpu" in name else "cpu")
    handler._options(env)


@pytest.mark.parametrize("name", [name for name in YAMLS if "remote" not in name])
def test_the_image_is_built_with_the_weights_of_the_functions_model(name: str) -> None:
    build = config(name)["spec"]["build"]
    steps = [step["value"] for step in build["directives"]["preCopy"]]
    assert steps == [f"sam-poll models download {environment(name)['MODEL']}"]
    assert build["baseImage"] == f"sam-poll-nuclio:{'gpu' if 'gpu' in name else 'cpu'}"
    assert build["noBaseImagesPull"] is True
    limits = config(name)["spec"].get("resources", {}).get("limits", {})
    assert ("nvidia.com/gpu" in limits) == ("gpu" in name)


@pytest.mark.parametrize("name", YAMLS)
def test_annotations_of_a_yaml_are_texts_and_complete_for_cvat(name: str) -> None:
    annotations = config(name)["metadata"]["annotations"]
    assert all(isinstance(value, str) for value in annotations.values())
    labels = json.loads(annotations["spec"])
    assert "startswith_box" not in annotations  # CVAT takes any text there for yes, even "false"
    if annotations["type"] == "detector":
        assert [label["name"] for label in labels] == [environment(name)["LABEL"]]
        (score,) = labels[0]["attributes"]
        assert (score["name"], score["input_type"]) == ("score", "text")
        # CVAT's COCO export fails on a score that is not a number.
        assert (score["default_value"], score["values"]) == ("1", ["1"])
        return
    assert annotations["type"] == "interactor"
    assert labels == []
    assert int(annotations["version"]) == 2
    assert int(annotations["min_pos_points"]) >= 0
    assert int(annotations["min_neg_points"]) == 0


@pytest.mark.parametrize("name", YAMLS)
def test_functions_that_answer_with_embeddings_have_the_name_that_the_browser_decodes(
    name: str,
) -> None:
    fixed = config(name)["metadata"]["name"] == "pth-facebookresearch-sam-vit-h"
    assert fixed == ("sam1" in name)
    if fixed and "remote" not in name:
        assert environment(name)["MODEL"] == "sam_vit_h"
        assert environment(name)["SAM_POLL_MEMORY__MIN_SIDE"] == "1024"


def test_yamls_for_cpu_and_gpu_differ_only_where_they_must() -> None:
    for pair in (
        "sam2/function-{}.yaml",
        "sam2/function-detector-{}.yaml",
        "sam1/function-{}.yaml",
    ):
        cpu, gpu = config(pair.format("cpu")), config(pair.format("gpu"))
        assert cpu["metadata"] == gpu["metadata"]
        same = set(cpu["spec"]) - {"env", "build", "eventTimeout"}
        assert {key: cpu["spec"][key] for key in same} == {key: gpu["spec"][key] for key in same}


# ── scripts ──


@pytest.fixture
def machine(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """A PATH whose docker and nuctl record their arguments, and the yaml that nuctl gets."""
    tools, log = tmp_path / "bin", tmp_path / "log"
    tools.mkdir()
    for name in ("bash", "dirname", "mktemp", "cp", "mv", "rm", "sed", "cat", "env"):
        (tools / name).symlink_to(shutil.which(name) or "")
    for name in ("docker", "nuctl"):
        program = tools / name
        program.write_text(
            f'#!/bin/sh\necho {name} "$@" >> {log}\n'
            'while [ $# -gt 1 ]; do [ "$1" = --file ] && '
            f'(echo ---; cat "$2") >> {log}.yaml; shift; done; exit 0\n'
        )
        program.chmod(0o755)
    return {"PATH": str(tools), "TMPDIR": str(tmp_path), "HOME": str(tmp_path)}, log


def run(script: str, *words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FUNCTIONS / script, *words],
        env=env,
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.skipif(os.name != "posix", reason="runs a POSIX shell")
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("function", "yaml_name"),
    [
        ("sam2", "sam2/function-{}"),
        ("sam2-everything", "sam2/function-detector-{}"),
        ("sam1", "sam1/function-{}"),
    ],
)
def test_deploy_builds_the_base_image_first_and_passes_the_right_yaml_to_nuctl(
    machine: tuple[dict[str, str], Path], kind: str, function: str, yaml_name: str
) -> None:
    env, log = machine
    done = run(f"deploy_{kind}.sh", function, env=env)
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    builds = [n for n, line in enumerate(lines) if line.startswith("docker build")]
    (deploy,) = [n for n, line in enumerate(lines) if line.startswith("nuctl deploy")]
    assert len(builds) == 2
    assert max(builds) < deploy
    torch = "cu130" if kind == "gpu" else "cpu"
    assert f"docker/Dockerfile --build-arg TORCH={torch} " in lines[builds[0]]
    assert f"-t sam-poll:{torch} " in lines[builds[0]]
    assert f"BASE=sam-poll:{torch} -t sam-poll-nuclio:{kind} " in lines[builds[1]]
    assert '"network": "cvat_cvat"' in lines[deploy]
    assert yaml.safe_load(Path(f"{log}.yaml").read_text()) == config(
        yaml_name.format(kind) + ".yaml"
    )


@pytest.mark.skipif(os.name != "posix", reason="runs a POSIX shell")
def test_deploy_accepts_another_model_and_another_network(
    machine: tuple[dict[str, str], Path],
) -> None:
    env, log = machine
    env |= {"MODEL": "sam2.1_hiera_base_plus", "CVAT_NETWORK": "mine"}
    assert run("deploy_cpu.sh", env=env).returncode == 0
    made = yaml.safe_load(Path(f"{log}.yaml").read_text())
    assert made["spec"]["env"][0] == {"name": "MODEL", "value": "sam2.1_hiera_base_plus"}
    assert made["spec"]["build"]["directives"]["preCopy"][0]["value"].endswith(
        " sam2.1_hiera_base_plus"
    )
    assert '"network": "mine"' in log.read_text()


@pytest.mark.skipif(os.name != "posix", reason="runs a POSIX shell")
def test_deploy_of_remote_sets_the_servers_address_and_needs_no_torch(
    machine: tuple[dict[str, str], Path],
) -> None:
    env, log = machine
    env |= {"SAM_URI": "http://sam.example.org:51515/features?a=1&b=2", "SAM_TIMEOUT_S": "9"}
    assert run("deploy_cpu.sh", "remote", "remote-sam1", env=env).returncode == 0
    first, second = yaml.safe_load_all(Path(f"{log}.yaml").read_text())
    values = {entry["name"]: entry["value"] for entry in first["spec"]["env"]}
    assert values == {"SAM_URI": env["SAM_URI"], "SAM_TIMEOUT_S": "9"}
    assert first["spec"]["eventTimeout"] == "14s", "above the timeout of a request"
    (built,) = [line for line in log.read_text().splitlines() if line.startswith("docker build")]
    assert "Dockerfile.remote -t sam-poll-nuclio:remote" in built
    assert second["metadata"]["name"] == "pth-facebookresearch-sam-vit-h"


@pytest.mark.skipif(os.name != "posix", reason="runs a POSIX shell")
@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({}, "SAM_URI=http://172.18.0.1:8000/"),
        ({"SAM_URI": "http://sam:8000/", "SAM_TIMEOUT_S": "2.5"}, "leave it out for 25"),
        ({"SAM_URI": "http://sam:8000/", "SAM_TIMEOUT_S": "0"}, "leave it out for 25"),
    ],
)
def test_deploy_of_remote_refuses_what_cannot_work_with_a_remedy(
    machine: tuple[dict[str, str], Path], given: dict[str, str], remedy: str
) -> None:
    env, log = machine
    program = Path(env["PATH"]) / "docker"
    program.write_text("#!/bin/sh\necho 172.18.0.1\n")
    done = run("deploy_cpu.sh", "remote", env=env | given)
    assert done.returncode == 2
    assert remedy in done.stderr
    assert not log.exists()


@pytest.mark.skipif(os.name != "posix", reason="runs a POSIX shell")
@pytest.mark.parametrize("missing", ["docker", "nuctl"])
def test_deploy_without_docker_or_nuctl_does_nothing_and_prints_the_remedy(
    machine: tuple[dict[str, str], Path], missing: str
) -> None:
    env, log = machine
    (Path(env["PATH"]) / missing).unlink()
    done = run("deploy_gpu.sh", "sam2", env=env)
    assert done.returncode == 1
    assert f"{missing} is not installed" in done.stderr
    assert "https://" in done.stderr
    assert not log.exists()


@pytest.mark.skipif(os.name != "posix", reason="runs a POSIX shell")
@pytest.mark.parametrize(
    ("words", "said"), [(["sam3"], "no function sam3"), (["remote"], "SAM_URI")]
)
def test_deploy_refuses_invalid_functions_before_anything_is_built(
    machine: tuple[dict[str, str], Path], words: list[str], said: str
) -> None:
    env, log = machine
    done = run("deploy_cpu.sh", *words, env=env)
    assert done.returncode == 2
    assert said in done.stderr
    assert not log.exists() or "build" not in log.read_text()


@pytest.mark.parametrize("script", ["deploy.sh", "deploy_cpu.sh", "deploy_gpu.sh"])
def test_shellcheck_finds_nothing(script: str) -> None:
    linter = shutil.which("shellcheck")
    if linter is None:
        pytest.skip("there is no shellcheck: apt install shellcheck")
    done = subprocess.run(
        [linter, FUNCTIONS / script], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.remote"])
def test_files_copied_by_the_dockerfiles_exist_and_are_not_ignored(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in (FUNCTIONS / name).read_text().splitlines():
        if line.startswith("COPY"):
            for source in re.split(r"\s+", line)[1:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored, source
