"""The yamls of CVAT's Nuclio functions, and the scripts that deploy them."""

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

from sam_poll import settings
from sam_poll.cvat import nuclio, remote
from sam_poll.engines.catalog import MODELS
from tests.nuclio_calls import FUNCTIONS, ROOT, Lines

YAMLS = sorted(path.relative_to(FUNCTIONS).as_posix() for path in FUNCTIONS.glob("*/*.yaml"))
# ── yamls ──


def config(name: str) -> dict[str, Any]:
    return yaml.safe_load((FUNCTIONS / name).read_text())


def environment(name: str) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in config(name)["spec"]["env"]}


@pytest.mark.parametrize("name", YAMLS)
def test_a_yaml_names_a_handler_that_is_there(name: str) -> None:
    module, _, function = config(name)["spec"]["handler"].partition(":")
    source = (FUNCTIONS / name).with_name(f"{module}.py").read_text()
    assert f"def {function}(context" in source
    assert "def init_context(context" in source
    assert source.count("\n") <= 40


@pytest.mark.parametrize("name", YAMLS)
def test_a_yamls_variables_are_what_the_code_reads_and_sound(name: str) -> None:
    env = environment(name)
    assert all(isinstance(value, str) for value in env.values())
    if "remote" in name:
        assert set(env) == {remote.URI, remote.TIMEOUT_S}
        assert remote.Remote.open(Lines(), env).timeout_s < int(config(name)["spec"]["eventTimeout"].rstrip("s"))
        return
    own = {nuclio.LABEL, nuclio.POINTS_PER_SIDE, nuclio.STARTSWITH_BOX}
    read = settings.load(None, env=env)
    assert set(env) <= own | {"MODEL", "MODEL_CFG"} | {key for key in env if key.startswith("SAM_POLL_")}
    assert read.model == env["MODEL"]
    assert read.model in MODELS
    assert read.device == ("cuda" if "gpu" in name else "cpu")
    nuclio._options(env)


@pytest.mark.parametrize("name", [name for name in YAMLS if "remote" not in name])
def test_the_image_is_built_with_the_weights_that_the_function_asks_for(name: str) -> None:
    build = config(name)["spec"]["build"]
    steps = [step["value"] for step in build["directives"]["preCopy"]]
    assert steps == [f"sam-poll models download {environment(name)['MODEL']}"]
    assert build["baseImage"] == f"sam-poll-nuclio:{'gpu' if 'gpu' in name else 'cpu'}"
    assert build["noBaseImagesPull"] is True
    limits = config(name)["spec"].get("resources", {}).get("limits", {})
    assert ("nvidia.com/gpu" in limits) == ("gpu" in name)


@pytest.mark.parametrize("name", YAMLS)
def test_annotations_are_text_and_say_what_cvat_wants_to_know(name: str) -> None:
    annotations = config(name)["metadata"]["annotations"]
    assert all(isinstance(value, str) for value in annotations.values())
    labels = json.loads(annotations["spec"])
    assert "startswith_box" not in annotations  # any text there, "false" too, is yes to CVAT
    if annotations["type"] == "detector":
        assert [label["name"] for label in labels] == [environment(name)["LABEL"]]
        return
    assert annotations["type"] == "interactor"
    assert labels == []
    assert int(annotations["version"]) == 2
    assert int(annotations["min_pos_points"]) >= 0
    assert int(annotations["min_neg_points"]) == 0


@pytest.mark.parametrize("name", YAMLS)
def test_who_answers_with_embeddings_has_the_one_name_that_the_browser_decodes_for(name: str) -> None:
    fixed = config(name)["metadata"]["name"] == "pth-facebookresearch-sam-vit-h"
    assert fixed == ("sam1" in name)
    if fixed and "remote" not in name:
        assert environment(name)["MODEL"] == "sam_vit_h"
        assert environment(name)["SAM_POLL_MEMORY__MIN_SIDE"] == "1024"


def test_functions_on_cpu_and_gpu_differ_in_what_they_must_only() -> None:
    for pair in ("sam2/function-{}.yaml", "sam2/function-detector-{}.yaml", "sam1/function-{}.yaml"):
        cpu, gpu = config(pair.format("cpu")), config(pair.format("gpu"))
        assert cpu["metadata"] == gpu["metadata"]
        same = set(cpu["spec"]) - {"env", "build", "eventTimeout"}
        assert {key: cpu["spec"][key] for key in same} == {key: gpu["spec"][key] for key in same}


# ── scripts ──


@pytest.fixture
def machine(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """A PATH whose docker and nuctl write down what they are asked, with the yaml that nuctl is given."""
    tools, log = tmp_path / "bin", tmp_path / "log"
    tools.mkdir()
    for name in ("bash", "dirname", "mktemp", "cp", "mv", "rm", "sed", "cat", "env"):
        (tools / name).symlink_to(shutil.which(name) or "")
    for name in ("docker", "nuctl"):
        program = tools / name
        program.write_text(
            f'#!/bin/sh\necho {name} "$@" >> {log}\n'
            f'while [ $# -gt 1 ]; do [ "$1" = --file ] && (echo ---; cat "$2") >> {log}.yaml; shift; done; exit 0\n'
        )
        program.chmod(0o755)
    return {"PATH": str(tools), "TMPDIR": str(tmp_path), "HOME": str(tmp_path)}, log


def run(script: str, *words: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [FUNCTIONS / script, *words], env=env, check=False, capture_output=True, text=True, timeout=100
    )


@pytest.mark.skipif(os.name != "posix", reason="runs a POSIX shell")
@pytest.mark.parametrize("kind", ["cpu", "gpu"])
@pytest.mark.parametrize(
    ("function", "yaml_name"),
    [("sam2", "sam2/function-{}"), ("sam2-everything", "sam2/function-detector-{}"), ("sam1", "sam1/function-{}")],
)
def test_deploying_builds_the_base_first_and_hands_the_right_yaml_to_nuctl(
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
    assert f"docker/Dockerfile.{'cuda' if kind == 'gpu' else 'cpu'} -t sam-poll:{kind} " in lines[builds[0]]
    assert f"BASE=sam-poll:{kind} -t sam-poll-nuclio:{kind} " in lines[builds[1]]
    assert '"network": "cvat_cvat"' in lines[deploy]
    assert yaml.safe_load(Path(f"{log}.yaml").read_text()) == config(yaml_name.format(kind) + ".yaml")


@pytest.mark.skipif(os.name != "posix", reason="runs a POSIX shell")
def test_another_model_and_another_network_can_be_asked_for(machine: tuple[dict[str, str], Path]) -> None:
    env, log = machine
    env |= {"MODEL": "sam2.1_hiera_base_plus", "CVAT_NETWORK": "mine"}
    assert run("deploy_cpu.sh", env=env).returncode == 0
    made = yaml.safe_load(Path(f"{log}.yaml").read_text())
    assert made["spec"]["env"][0] == {"name": "MODEL", "value": "sam2.1_hiera_base_plus"}
    assert made["spec"]["build"]["directives"]["preCopy"][0]["value"].endswith(" sam2.1_hiera_base_plus")
    assert '"network": "mine"' in log.read_text()


@pytest.mark.skipif(os.name != "posix", reason="runs a POSIX shell")
def test_remote_gets_the_servers_address_and_no_torch(machine: tuple[dict[str, str], Path]) -> None:
    env, log = machine
    env |= {"SAM_URI": "http://sam.example.org:51515/features?a=1&b=2", "SAM_TIMEOUT_S": "9"}
    assert run("deploy_cpu.sh", "remote", "remote-sam1", env=env).returncode == 0
    first, second = yaml.safe_load_all(Path(f"{log}.yaml").read_text())
    values = {entry["name"]: entry["value"] for entry in first["spec"]["env"]}
    assert values == {"SAM_URI": env["SAM_URI"], "SAM_TIMEOUT_S": "9"}
    (built,) = [line for line in log.read_text().splitlines() if line.startswith("docker build")]
    assert "Dockerfile.remote -t sam-poll-nuclio:remote" in built
    assert second["metadata"]["name"] == "pth-facebookresearch-sam-vit-h"


@pytest.mark.skipif(os.name != "posix", reason="runs a POSIX shell")
@pytest.mark.parametrize("missing", ["docker", "nuctl"])
def test_without_docker_or_nuctl_nothing_is_done_and_the_remedy_is_said(
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
@pytest.mark.parametrize(("words", "said"), [(["sam3"], "no function sam3"), (["remote"], "SAM_URI")])
def test_what_cannot_be_deployed_is_refused_before_anything_is_built(
    machine: tuple[dict[str, str], Path], words: list[str], said: str
) -> None:
    env, log = machine
    done = run("deploy_cpu.sh", *words, env=env)
    assert done.returncode == 2
    assert said in done.stderr
    assert not log.exists()


@pytest.mark.parametrize("script", ["deploy.sh", "deploy_cpu.sh", "deploy_gpu.sh"])
def test_shellcheck_finds_nothing(script: str) -> None:
    linter = shutil.which("shellcheck")
    if linter is None:
        pytest.skip("there is no shellcheck: apt install shellcheck")
    done = subprocess.run([linter, FUNCTIONS / script], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.remote"])
def test_what_the_images_copy_is_there_and_not_ignored(name: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in (FUNCTIONS / name).read_text().splitlines():
        if line.startswith("COPY"):
            for source in re.split(r"\s+", line)[1:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored, source
