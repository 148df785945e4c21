"""The doctor's looks at machine, device and memory: told machines and told cards, each with one thing wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sam_poll.doctor import cards, facts, machine, plan
from sam_poll.engines.estimate import Footprint
from sam_poll.engines.memory import Step
from sam_poll.engines.needs import Needs
from sam_poll.errors import ExitCode
from tests.doctor_parts import the
from tests.fake_card import Card

TINY = Footprint(27_219_136, 4_436_450, 69.0, 18.5, 0.0, 256, 4)  # about sam2.1_hiera_tiny
HALF = Step("bfloat16", 64, 8, 1024, "cuda:0")


# ── machine ──


@pytest.mark.parametrize(
    ("release", "levels"),
    [
        ("6.8.0-45-generic", []),
        ("5.15.153.1-microsoft-standard-WSL2", ["ok"]),
        ("4.4.0-19041-Microsoft", ["warning"]),
    ],
)
def test_wsl_is_told_by_its_kernel(release: str, levels: list[str]) -> None:
    assert [finding.level for finding in machine.wsl(release)] == levels


def test_the_tightest_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    (inner / "memory.max").write_text(f"{4 * 2**30}\n")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    (inner.parent / "memory.max").write_text(f"{2**30}\n")
    (inner.parent / "memory.current").write_text(f"{2**29}\n")
    (tmp_path / "own").write_text("1:name=systemd:/x\n0::/outer/inner\n")
    limits = machine.Limits.read(tmp_path, tmp_path / "own")
    assert limits == machine.Limits(1.5, 1024.0, 512.0)
    (tmp_path / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable: 8388608 kB\n")
    assert machine.available_mib(limits, tmp_path / "meminfo") == 512.0
    assert machine.available_mib(machine.Limits(), tmp_path / "meminfo") == 8192.0
    assert machine.available_mib(machine.Limits(), tmp_path / "nothing") is None


def test_limits_of_control_groups_version_1_are_read_and_no_limit_is_none(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "memory").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine.Limits.read(tmp_path, tmp_path / "own") == machine.Limits(2.0)
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert machine.Limits.read(tmp_path, tmp_path / "own") == machine.Limits()


def test_more_threads_than_cores_are_a_warning_and_a_library_that_sets_them_too() -> None:
    many = {"threads": 64, "changed": {"OMP_NUM_THREADS": [None, "1"]}}
    first, second = machine.threads(many, machine.Limits(cores=1.0), {"OMP_NUM_THREADS": "64"})
    assert (first.level, second.level) == ("warning", "warning")
    assert "yours: OMP_NUM_THREADS=64" in first.what
    assert "OMP_NUM_THREADS=1" in (first.remedy or "")
    assert "OMP_NUM_THREADS from nothing to 1" in second.what
    (fine,) = machine.threads({"threads": 1}, machine.Limits(), {})
    assert "is set; sam-poll leaves them as they are" in fine.what


def test_what_is_not_installed_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2", "torchvision": "1", "numpy": "2", "segment-anything": "1"}
    monkeypatch.setattr(machine, "_version", versions.get)
    _, missing = machine.packages()
    assert (missing.exit_code, missing.what) == (ExitCode.MODEL, "not installed: sam2, opencv-python-headless")
    monkeypatch.setattr(machine, "_version", lambda name: "1")
    assert [finding.level for finding in machine.packages()] == ["ok", "warning"]


def test_little_main_memory_is_a_warning() -> None:
    levels = [machine.memory(machine.Limits(), mib).level for mib in (500.0, 9000.0)]
    assert levels == ["warning", "ok"]


# ── device ──


@pytest.fixture
def pascal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GTX 1050 Ti, and the torch of this machine said to be built for newer ones."""
    told: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda _: "GTX 1050 Ti",
        "get_device_capability": lambda _: (6, 1),
        "get_arch_list": lambda: ["sm_75", "sm_90"],
        "mem_get_info": lambda _: (3 * 2**30, 4 * 2**30),
    }
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return


@pytest.mark.usefixtures("pascal")
def test_a_card_that_torch_was_not_built_for_is_a_problem_with_the_right_build() -> None:
    gathered = json.loads(json.dumps(facts.gather({}, {})))
    problem = the(list(cards.look(gathered, None, ["auto"])), "cuda:0")
    assert (problem.level, problem.exit_code) == ("problem", ExitCode.DEVICE)
    assert "compute capability 6.1" in problem.what
    assert "cu126" in (problem.remedy or "")
    unwanted = the(list(cards.look(gathered, None, ["cpu"])), "cuda:0")
    assert unwanted.level == "warning"


@pytest.mark.usefixtures("pascal")
def test_a_card_that_fits_is_told_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_61"])
    gathered = facts.gather({}, {})
    found = the(list(cards.look(gathered, None, ["cuda:0"])), "cuda:0")
    assert found.level == "ok"
    assert "3,072 of 4,096 MiB free, runs in float32" in found.what
    (missing,) = [f for f in cards.look(gathered, None, ["cuda:1"]) if f.name == "cuda:1"]
    assert missing.exit_code is ExitCode.DEVICE
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 4 * 2**30))
    full = the(list(cards.look(facts.gather({}, {}), None, ["cuda"])), "cuda:0")
    assert full.level == "warning"


@pytest.mark.usefixtures("pascal")
def test_a_driver_that_fails_in_the_middle_of_a_question_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: int) -> None:
        raise RuntimeError("CUDA error: unknown error\nand more")

    monkeypatch.setattr(torch.cuda, "get_device_capability", fails)
    problem = the(list(cards.look(facts.gather({}, {}), None, ["auto"])), "cuda:0")
    assert problem.exit_code is ExitCode.DEVICE
    assert "unknown error" in problem.what


def test_without_a_card_the_cpu_is_fine_unless_a_card_was_asked_for() -> None:
    none = {"torch": "2", "cuda": None, "cards": []}
    assert the(list(cards.look(none, None, ["auto"])), "card").level == "ok"
    asked = the(list(cards.look(none, None, ["cuda:0"])), "card")
    assert asked.exit_code is ExitCode.DEVICE
    smi = [{"name": "RTX 4090", "driver": "550.54", "total_mib": "24564"}]
    cpu_build = the(list(cards.look(none, smi, ["auto"])), "card")
    assert (cpu_build.level, "without CUDA" in cpu_build.what) == ("warning", True)
    old = {"torch": "2", "cuda": "13.2", "cards": [], "warnings": ["The NVIDIA driver on your system is too old"]}
    too_old = the(list(cards.look(old, smi, ["cuda"])), "card")
    assert (too_old.exit_code, "too old" in too_old.what) == (ExitCode.DEVICE, True)


def test_the_drivers_word_is_read_and_waited_for_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 550.54.15, 81559'\n")
    program.chmod(0o755)
    assert cards.nvidia_smi() == [{"name": "NVIDIA H100 80GB HBM3", "driver": "550.54.15", "total_mib": "81559"}]
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    assert cards.nvidia_smi(limit_s=0.3) is None
    program.write_text("#!/bin/sh\nexit 9\n")
    assert cards.nvidia_smi() == []


@pytest.mark.parametrize(("number", "version"), [(8902, "8.9.2"), (91002, "9.10.2"), (92600, "9.26.0")])
def test_the_number_of_cudnn_is_read_as_a_version(number: int, version: str) -> None:
    told = list(cards.look({"torch": "2", "cuda": "13", "cudnn": number, "cards": []}, None, ["auto"]))
    assert f"cuDNN {version}" in the(told, "build").what


# ── memory ──


def planned(capacity_mib: float, taken: Step = HALF) -> dict[str, Any]:
    needs, reading = Needs(TINY), Card(capacity_mib, reserve_mib=256).read()
    return plan.told(HALF, taken, needs, min_side=256, half="bfloat16", reading=reading)


def test_the_plan_tells_what_each_step_needs_and_which_fit() -> None:
    large, small = planned(4096), planned(420)
    assert [row["step"] for row in large["steps"]] == [
        "bfloat16 1024 on cuda:0",
        "bfloat16 768 on cuda:0",
        "bfloat16 512 on cuda:0",
        "bfloat16 256 on cuda:0",
        "float32 1024 on cpu",
    ]
    assert all(row["fits"] for row in large["steps"])
    assert [row["fits"] for row in small["steps"]] != [True] * 5
    assert small["steps"][-1]["fits"]
    needed = [row["encode_mib"] for row in large["steps"][:4]]
    assert needed == sorted(needed, reverse=True)


def test_the_best_step_is_fine_and_a_lower_one_a_warning() -> None:
    assert plan.finding(planned(4096), 8000).level == "ok"
    lower = plan.finding(planned(420, Step("bfloat16", 64, 8, 512, "cuda:0")), 8000)
    assert lower.level == "warning"
    assert "bfloat16 1024" in lower.what
    assert "164 MiB could be had" in lower.what
    assert plan.finding(planned(420, Step("float32", 1, 1, 1024, "cpu")), 8000).level == "warning"


def test_on_a_cpu_main_memory_is_what_counts() -> None:
    step = Step("float32", 1, 1, 1024, "cpu")
    told = plan.told(step, step, Needs(TINY), min_side=256, half=None, reading=None)
    assert [plan.finding(told, mib).level for mib in (100.0, 8000.0, None)] == ["warning", "ok", "ok"]
