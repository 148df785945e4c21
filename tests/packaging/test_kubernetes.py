"""The Kubernetes examples, as far as they can be tried without a cluster."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from sam_poll.config import settings
from sam_poll.integrations import message_broker
from sam_poll.integrations.cluster.messages import queue_names
from sam_poll.pipeline.options import PipelineOptions
from tests.support.paths import ROOT
from tests.support.shell_lines import parse

FILE = ROOT / "docker" / "kubernetes" / "cluster.yaml"


@pytest.fixture(scope="module")
def parts() -> dict[tuple[str, str], Any]:
    found = list(yaml.safe_load_all(FILE.read_text()))
    return {(part["kind"], part["metadata"]["name"]): part for part in found}


def container(parts: dict[tuple[str, str], Any], name: str) -> Any:
    (found,) = parts["Deployment", name]["spec"]["template"]["spec"]["containers"]
    return found


def test_watcher_and_workers_have_one_share_and_one_set_of_settings(parts: Any) -> None:
    common = parts["ConfigMap", "sam-poll"]["data"]
    for name in ("sam-poll-watcher", "sam-poll-worker"):
        made = container(parts, name)
        variables = {one["name"]: one.get("value") for one in made["env"]}
        assert message_broker.URL in variables
        assert made["envFrom"] == [{"configMapRef": {"name": "sam-poll"}}]
        assert {"name": "share", "mountPath": "/mnt/share"} in made["volumeMounts"]
        plain = {key: value for key, value in variables.items() if value}
        settings.load(None, env={**common, **plain, "SAM_POLL_INPUT": "/mnt/share/in"})
        assert made["args"][:2] == ["cluster", "watch" if "watcher" in name else "worker"]


def test_running_jobs_have_time_to_finish(parts: Any) -> None:
    for name in ("sam-poll-watcher", "sam-poll-worker"):
        spec = parts["Deployment", name]["spec"]["template"]["spec"]
        assert spec["terminationGracePeriodSeconds"] >= 45


def test_workers_are_scaled_by_the_names_that_the_queues_have(parts: Any) -> None:
    scaled = parts["ScaledObject", "sam-poll-worker"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == "sam-poll-worker"
    assert "replicas" not in parts["Deployment", "sam-poll-worker"]["spec"]
    names = {trigger["metadata"]["queueName"] for trigger in scaled["triggers"]}
    assert names == set(queue_names("sam_poll.", "NUMBER").values())
    assert f"sam_poll:{queue_names('', 'NUMBER')[False]}" in FILE.read_text()


def test_queues_become_long_enough_for_the_largest_number_of_workers(parts: Any) -> None:
    args = container(parts, "sam-poll-watcher")["args"]
    parse(["sam-poll", *args])
    ahead = int(args[args.index("--ahead") + 1])
    scaled = parts["ScaledObject", "sam-poll-worker"]["spec"]
    for trigger in scaled["triggers"]:
        assert ahead > int(trigger["metadata"]["value"]) * scaled["maxReplicaCount"]


# ── daemons without a broker ──

WATCH = ROOT / "docker" / "kubernetes" / "watch.yaml"


@pytest.fixture(scope="module")
def pod() -> Any:
    found = list(yaml.safe_load_all(WATCH.read_text()))
    assert [one["kind"] for one in found] == ["PersistentVolumeClaim"] * 2 + ["Deployment"]
    assert all(one["spec"]["accessModes"] == ["ReadWriteMany"] for one in found[:2])
    return found[2]["spec"]["template"]["spec"]


def test_daemons_settings_are_read_and_their_command_is_one_of_ours(pod: Any) -> None:
    (daemon,) = pod["containers"]
    made = settings.load(None, env={one["name"]: one["value"] for one in daemon["env"]})
    (port,) = (one["containerPort"] for one in daemon["ports"] if one["name"] == "metrics")
    assert made.health.metrics == f"0.0.0.0:{port}"
    parse(["sam-poll", *daemon["args"]])
    download, _ = pod["initContainers"]
    parse(["sam-poll", *download["args"]])
    assert made.model in download["args"]


def test_probes_ask_what_the_images_health_check_asks(pod: Any) -> None:
    (daemon,) = pod["containers"]
    (check,) = re.findall(r"^HEALTHCHECK [^\[]*(\[.*\])$", _dockerfile(), re.MULTILINE)
    for probe in ("startupProbe", "livenessProbe"):
        assert daemon[probe]["exec"]["command"] == yaml.safe_load(check)
    start = daemon["startupProbe"]
    assert (
        start["failureThreshold"] * start["periodSeconds"]
        > settings.load(None, env={}).load_timeout_s
    )
    assert daemon["readinessProbe"]["httpGet"] == {"path": "/metrics", "port": "metrics"}
    assert pod["terminationGracePeriodSeconds"] > PipelineOptions().drain_s


def test_a_read_only_root_has_a_folder_for_temporary_files_in_each_container(pod: Any) -> None:
    (daemon,) = pod["containers"]
    assert daemon["securityContext"]["readOnlyRootFilesystem"]
    assert {"name": "tmp", "emptyDir": {}} in pod["volumes"]
    assert {"name": "tmp", "mountPath": "/tmp"} in daemon["volumeMounts"]
    named = {volume["name"] for volume in pod["volumes"]}
    for one in (*pod["containers"], *pod["initContainers"]):
        assert {mount["name"] for mount in one["volumeMounts"]} <= named


def test_examples_name_images_that_compose_builds() -> None:
    built = set(re.findall(r"sam-poll:cpu|sam-poll:cu\d+", _dockerfile()))
    for path in (FILE, WATCH):
        assert set(re.findall(r"sam-poll:[\w.]+", path.read_text())) <= built


def _dockerfile() -> str:
    text = (ROOT / "docker" / "Dockerfile").read_text()
    return text.replace("\\\n", "")
