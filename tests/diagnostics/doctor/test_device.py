"""The doctor's looks at machine, device and memory: told machines and told cards, each with one
thing wrong.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sam_poll.config.settings import Settings, load
from sam_poll.core import distributions
from sam_poll.core.errors import ExitCode
from sam_poll.diagnostics.doctor import gpus, machine, memory_plan, torch_info
from sam_poll.engines.memory.estimate import Footprint
from sam_poll.engines.memory.plan import MemoryStep
from sam_poll.engines.memory.requirements import MemoryRequirements
from tests.conftest import wait_until
from tests.support.fake_gpu import Card
from tests.support.findings import the

TINY = Footprint(27_219_136, 4_436_450, 69.0, 0.0, 256, 4)  # about sam2.1_hiera_tiny
HALF = MemoryStep("bfloat16", 64, 8, 1024, "cuda:0")


RTX = gpus.Smi([{"name": "RTX 4090", "driver": "550.54", "total_mib": "24564"}])


def device(name: str) -> Settings:
    return load(None, env={}, flags={"device": name})


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


def test_memory_that_holds_files_only_counts_as_free(tmp_path: Path) -> None:
    """What a container has read stays in its memory until somebody needs it: a daemon's would look
    full for ever.
    """
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**30 - 2**20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {2**29}\nactive_file 7\n")
    assert machine.Limits.read(tmp_path, tmp_path / "own").used_mib == 511.0
    old = tmp_path / "old" / "memory"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text(f"{2**30}\n")
    (old / "memory.usage_in_bytes").write_text(f"{2**29}\n")
    (old / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {2**28}\n")
    assert machine.Limits.read(tmp_path / "old", tmp_path / "own").used_mib == 256.0


@pytest.mark.parametrize(
    ("value", "odd"), [("4", False), ("4,2", False), ("abc", True), ("0", True), ("-3", True)]
)
def test_a_number_of_threads_that_is_none_is_a_warning(value: str, odd: bool) -> None:
    env = {"OMP_NUM_THREADS": value, "OMP_WAIT_POLICY": "passive"}
    told = [
        f.what
        for f in machine.threads({"threads": 1}, machine.Limits(cores=1.0), env)
        if f.level == "warning"
    ]
    assert [f"OMP_NUM_THREADS={value}" in what for what in told] == [True] * odd


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
    assert "is set; sam-poll does not change them" in fine.what


def test_what_is_not_installed_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2", "torchvision": "1", "numpy": "2", "segment-anything": "1"}
    monkeypatch.setattr(distributions, "version_of", versions.get)
    _, missing = machine.packages()
    assert (missing.exit_code, missing.what) == (
        ExitCode.MODEL,
        "not installed: sam2, opencv-python-headless",
    )
    monkeypatch.setattr(distributions, "version_of", lambda name: "1")
    assert [finding.level for finding in machine.packages()] == ["ok", "warning", "warning"]


@pytest.mark.parametrize("name", ["sam2", "rf-sam-2"])
def test_sam2_may_come_from_either_distribution_but_not_from_both(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = dict.fromkeys((*machine.PACKAGES, "opencv-python", name), "1")
    monkeypatch.setattr(distributions, "version_of", versions.get)
    (found,) = machine.packages()
    assert f"{name} 1" in found.what
    versions |= dict.fromkeys(distributions.SAM2, "1")
    _, twice = machine.packages()
    assert (twice.level, twice.name) == ("warning", "SAM 2")
    assert twice.remedy == "pip uninstall sam2 rf-sam-2, then install one of them"


def test_opencv_twice_is_a_warning_unless_it_is_headless_over_the_same_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def levels(**opencv: str) -> list[str]:
        versions = dict.fromkeys((*machine.PACKAGES, "sam2"), "1") | {
            name.replace("_", "-"): v for name, v in opencv.items()
        }
        monkeypatch.setattr(distributions, "version_of", versions.get)
        return [finding.level for finding in machine.packages()]

    assert levels(opencv_python="5.0", opencv_python_headless="5.0") == ["ok"]
    assert levels(opencv_python="5.0", opencv_python_headless="4.9") == ["ok", "warning"]
    assert levels(opencv_python="5.0", opencv_contrib_python="5.0") == ["ok", "warning"]


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
    gathered = json.loads(json.dumps(torch_info.gather({}, {})))
    problem = the(list(gpus.check(gathered, None, device("auto"))), "cuda:0")
    assert (problem.level, problem.exit_code) == ("problem", ExitCode.DEVICE)
    assert "compute capability 6.1" in problem.what
    assert "cu126" in (problem.remedy or "")
    unwanted = the(list(gpus.check(gathered, None, device("cpu"))), "cuda:0")
    assert unwanted.level == "warning"


@pytest.mark.usefixtures("pascal")
def test_a_card_that_fits_is_told_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_61"])
    gathered = torch_info.gather({}, {})
    found = the(list(gpus.check(gathered, None, device("cuda:0"))), "cuda:0")
    assert found.level == "ok"
    assert "3,072 of 4,096 MiB free, runs in float32" in found.what
    (missing,) = [f for f in gpus.check(gathered, None, device("cuda:1")) if f.name == "cuda:1"]
    assert missing.exit_code is ExitCode.DEVICE
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 4 * 2**30))
    full = the(list(gpus.check(torch_info.gather({}, {}), None, device("cuda"))), "cuda:0")
    assert full.level == "warning"


@pytest.mark.usefixtures("pascal")
def test_a_driver_that_fails_in_the_middle_of_a_question_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(_: int) -> None:
        raise RuntimeError("CUDA error: unknown error\nand more")

    monkeypatch.setattr(torch.cuda, "get_device_capability", fails)
    problem = the(list(gpus.check(torch_info.gather({}, {}), None, device("auto"))), "cuda:0")
    assert problem.exit_code is ExitCode.DEVICE
    assert "unknown error" in problem.what


def test_without_a_card_the_cpu_is_fine_unless_a_card_was_asked_for() -> None:
    none: dict[str, Any] = {"torch": "2", "cuda": None, "cards": []}
    assert the(list(gpus.check(none, None, device("auto"))), "card").level == "ok"
    asked = the(list(gpus.check(none, None, device("cuda:0"))), "card")
    assert asked.exit_code is ExitCode.DEVICE
    cpu_build = the(list(gpus.check(none, RTX, device("auto"))), "card")
    assert (cpu_build.level, "without CUDA" in cpu_build.what) == ("warning", True)
    old = {
        "torch": "2",
        "cuda": "13.2",
        "cards": [],
        "warnings": ["The NVIDIA driver on your system is too old"],
    }
    too_old = the(list(gpus.check(old, RTX, device("cuda"))), "card")
    assert (too_old.exit_code, "too old" in too_old.what) == (ExitCode.DEVICE, True)


def test_the_drivers_word_is_read_and_waited_for_only_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 550.54.15, 81559'\n")
    program.chmod(0o755)
    said = {"name": "NVIDIA H100 80GB HBM3", "driver": "550.54.15", "total_mib": "81559"}
    assert gpus.nvidia_smi() == gpus.Smi([said])
    program.write_text(
        "#!/bin/sh\nsleep 600\n"
    )  # a child of its own, as a shell script around the program has
    assert gpus.nvidia_smi(limit_s=0.3) == gpus.Smi(trouble="no answer within 0.3 s")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (
            "echo 'NVIDIA-SMI has failed because it could not talk to the driver.'; exit 9",
            "has failed because",
        ),
        ("echo 'No devices were found'", "No devices were found"),
        ("printf '\\377\\376 nonsense'", "nonsense"),
        ("exit 1", "nothing (exit code 1)"),
        ("kill -9 $$", "exit code -9"),
    ],
)
def test_a_driver_in_trouble_is_a_warning_with_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    smi = gpus.nvidia_smi()
    none: dict[str, Any] = {"torch": "2", "cuda": "13", "cards": []}
    for facts_ in (none, None):  # also where torch hangs in the same driver and tells nothing
        found = the(list(gpus.check(facts_, smi, device("auto"))), "driver")
        assert found.level == "warning"
        assert words in found.what
        assert "restart" in (found.remedy or "")
    assert the(list(gpus.check(none, smi, device("cpu"))), "driver").level == "ok", (
        "nobody asks for a card"
    )


def test_the_driver_is_asked_without_waiting_for_what_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program that hangs is ended with its children: none is left behind."""
    program, told = tmp_path / "nvidia-smi", tmp_path / "pid"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {told}\nwait\n")
    program.chmod(0o755)
    smi = gpus.nvidia_smi(limit_s=1.0)
    assert smi
    assert "no answer" in (smi.trouble or "")
    status = Path("/proc") / told.read_text().strip() / "stat"
    wait_until(lambda: not status.exists() or status.read_text().split()[2] == "Z")


def test_a_card_that_is_hidden_by_the_environment_is_told_so() -> None:
    none: dict[str, Any] = {"torch": "2", "cuda": "13", "cards": []}
    told = list(
        gpus.check(
            none, RTX, device("cuda"), {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_ALLOC_CONF": "x:1"}
        )
    )
    problem = the(told, "card")
    assert "CUDA_VISIBLE_DEVICES= hides" in problem.what
    assert "unset CUDA_VISIBLE_DEVICES" in (problem.remedy or "")
    assert the(told, "environment").what == "CUDA_VISIBLE_DEVICES=, PYTORCH_ALLOC_CONF=x:1"


def test_a_broken_card_that_the_settings_do_not_take_is_a_warning_only() -> None:
    fine: dict[str, Any] = {
        "device": "cuda:0",
        "name": "A",
        "capability": "9.0",
        "free_mib": 9e4,
        "total_mib": 9e4,
        "precision": "x",
    }
    broken: dict[str, Any] = {"device": "cuda:1", "error": {"reason": "has fallen off the bus"}}
    facts_ = {"torch": "2", "cuda": "13", "cards": [fine, broken]}
    for flags, level in (
        ({"device": "auto"}, "warning"),
        ({"device": "cuda"}, "warning"),
        ({"device": "cuda:1"}, "problem"),
        ({"devices": ["auto"]}, "problem"),
        ({"devices": ["cuda:0", "cuda:1"]}, "problem"),
    ):
        told = list(gpus.check(facts_, None, load(None, env={}, flags=flags)))
        assert the(told, "cuda:1").level == level, flags


def test_a_machine_whose_settings_say_cpu_is_not_warned_of_its_torch_without_cuda() -> None:
    none: dict[str, Any] = {"torch": "2", "cuda": None, "cards": []}
    assert {f.level for f in gpus.check(none, RTX, device("cpu"))} == {"ok"}


@pytest.mark.parametrize(
    ("number", "version"), [(8902, "8.9.2"), (91002, "9.10.2"), (92600, "9.26.0")]
)
def test_the_number_of_cudnn_is_read_as_a_version(number: int, version: str) -> None:
    told = list(
        gpus.check({"torch": "2", "cuda": "13", "cudnn": number, "cards": []}, None, device("auto"))
    )
    assert f"cuDNN {version}" in the(told, "build").what


# ── memory ──


def planned(capacity_mib: float, taken: MemoryStep = HALF) -> dict[str, Any]:
    needs, reading = MemoryRequirements(TINY), Card(capacity_mib, reserve_mib=256).read()
    return memory_plan.as_json(HALF, taken, needs, min_side=256, half="bfloat16", reading=reading)


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
    assert memory_plan.finding(planned(4096), 8000).level == "ok"
    lower = memory_plan.finding(planned(420, MemoryStep("bfloat16", 64, 8, 512, "cuda:0")), 8000)
    assert lower.level == "warning"
    assert "bfloat16 1024" in lower.what
    assert "164 MiB available" in lower.what
    assert (
        memory_plan.finding(planned(420, MemoryStep("float32", 1, 1, 1024, "cpu")), 8000).level
        == "warning"
    )


def test_on_a_cpu_main_memory_is_what_counts() -> None:
    step = MemoryStep("float32", 1, 1, 1024, "cpu")
    told = memory_plan.as_json(
        step, step, MemoryRequirements(TINY), min_side=256, half=None, reading=None
    )
    assert [memory_plan.finding(told, mib).level for mib in (100.0, 8000.0, None)] == [
        "warning",
        "ok",
        "ok",
    ]
