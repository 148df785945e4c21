"""`make gpu`: one bad step takes nothing from the others, and all ends in time."""

from __future__ import annotations

import fcntl
import json
import re
from pathlib import Path
from typing import IO, Any

import pytest

from benchmarks import publish
from tests.conftest import wait_until
from tests.support.paths import ROOT
from tools import gpu


def step(name: str, code: str, limit_s: float = 100, **other: Any) -> gpu.Step:
    """A step that runs these lines of Python in place of a module."""
    read = other.pop("read", lambda _, printed: {"printed": printed.strip()})
    return gpu.Step(name, ("timeit", "-n1", "-r1", code), limit_s, read, **other)


def run(monkeypatch: pytest.MonkeyPatch, result: Path, *given: gpu.Step) -> tuple[int, Any]:
    monkeypatch.setattr(gpu, "steps", lambda _: list(given))
    code = gpu.main(["--device", "cpu", "--result", str(result)])
    return code, json.loads(result.read_text())


def test_a_step_that_fails_or_never_ends_leaves_the_others_their_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, report = run(
        monkeypatch,
        tmp_path / "gpu.json",
        step("fails", "raise ValueError"),
        step("hangs", "import threading; threading.Event().wait()", 3),
        step(
            "prints no figures",
            "print(1)",
            read=lambda _, printed: gpu.read_mosaic(Path(), printed),
        ),
        step("good", "print('here')"),
    )
    assert code == 1
    assert {name: one["ok"] for name, one in report["steps"].items()} == {
        "fails": False,
        "hangs": False,
        "prints no figures": False,
        "good": True,
    }
    assert "exit status 1" in report["steps"]["fails"]["why"]
    assert "not ready after 3 s" in report["steps"]["hangs"]["why"]
    assert "here" in report["good"]["printed"]
    assert report["fails"] == {}


def test_all_good_is_0_and_a_device_that_is_not_there_is_4(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run(monkeypatch, tmp_path / "gpu.json", step("good", "print('here')"))
    assert code == 0
    assert gpu.main(["--device", "cuda:99", "--result", str(tmp_path / "none.json")]) == 4
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "none.json").exists()


def test_what_a_step_has_started_ends_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that outlives its step would take the card from the next one."""
    file = tmp_path / "held"
    child = (
        f"import fcntl, signal; f = open({str(file)!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
        "print('x', flush=True); signal.pause()"
    )
    start = (
        f"import subprocess, sys; line = [sys.executable, '-c', {child!r}]; "
        "assert subprocess.Popen(line, stdout=subprocess.PIPE).stdout.read(1) == b'x'"
    )
    _, report = run(monkeypatch, tmp_path / "gpu.json", step("starts", start))
    assert report["steps"]["starts"]["ok"]
    with file.open("w") as handle:
        wait_until(lambda: can_lock(handle))


def can_lock(file: IO[str]) -> bool:
    """Return whether no process holds the file's lock, which ends with its process."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_the_limits_of_all_steps_are_eight_minutes(device: str) -> None:
    made = gpu.steps(device)
    assert sum(step.limit_s for step in made) <= gpu.TOTAL_S == 480
    assert {step.name for step in made} == {"proof", "compare", "bench", "mosaic", "tests"}
    assert all(device in one.command for one in made if one.name in ("compare", "bench", "mosaic"))


def test_each_step_runs_what_there_is() -> None:
    for one in gpu.steps("cuda:0"):
        module, *words = one.command
        if module == "pytest":
            assert all(Path(word).exists() for word in words if word.startswith(str(ROOT)))
    assert {Path(path).name for path in gpu._marked()} >= {"test_steps.py", "test_doctor.py"}
    assert str(ROOT / gpu.PROOF) not in gpu._marked()
    text = (ROOT / gpu.PROOF).read_text()
    assert "def test_gpu_of_four_gib_" in text
    assert "_by_estimate" in text


def test_the_proofs_lines_are_read_as_the_tests_print_them() -> None:
    printed = (
        ".sam2.1_hiera_large auto: bfloat16 1024 on cuda:0, batch 4, 16 prompts a call: "
        "peak 2100 MiB, "
        "reserved 2,500 MiB, out of memory 0 times\n"
        "sam_vit_h: float32 1024 on cuda:0: 3900 MiB of 4024\n1 passed"
    )
    first, second = gpu.read_proof(Path(), printed)["runs"]
    assert (first["model"], first["precision"], first["peak_mib"]) == (
        "sam2.1_hiera_large",
        "auto",
        2100,
    )
    assert first["step"] == "bfloat16 1024 on cuda:0, batch 4, 16 prompts a call"
    assert (second["model"], second["precision"], second["peak_mib"]) == ("sam_vit_h", "", 3900)
    with pytest.raises(gpu.StepError, match="skipped"):
        gpu.read_proof(Path(), "6 skipped")


def test_on_a_gpu_tests_that_were_all_skipped_are_no_success(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite tests="1" failures="0" errors="0" skipped="1"><testcase name="a">'
        '<skipped message="needs a CUDA device"/></testcase></testsuite></testsuites>'
    )
    assert gpu.read_tests(tmp_path, "", card=False)["skipped_for"] == ["needs a CUDA device"]
    with pytest.raises(gpu.StepError, match="needs a CUDA device"):
        gpu.read_tests(tmp_path, "", card=True)


def test_masks_that_differ_are_no_success() -> None:
    one = {"section": "compare", "level": "warning", "what": "3 % differ"}
    with pytest.raises(gpu.StepError, match="3 % differ"):
        gpu.read_compare(json.dumps({"findings": [one], "compare": {}}))
    with pytest.raises(gpu.StepError, match="nothing was compared"):
        gpu.read_compare(json.dumps({"findings": [], "compare": None}))


def test_the_page_shows_each_step_that_was_good_and_only_those() -> None:
    report = {
        "sam_poll": "0.1.0",
        "machine": {"device": "cuda:0", "gpu": "A card", "gpu_mib": 4024, "torch": "2"},
        "steps": {
            "proof": {"ok": True, "seconds": 80.2, "limit_s": 120},
            "mosaic": {"ok": False, "seconds": 45.0, "limit_s": 45, "why": "not ready"},
        },
        "proof": {
            "runs": [{"model": "m", "precision": "auto", "step": "s", "peak_mib": 3000}],
        },
        "mosaic": {},
    }
    text = publish.gpu(report)
    assert "A card, 4024 MiB" in text
    assert re.search(r"\| m \| auto \| s \| 3000 \|", text)
    assert re.search(r"\| mosaic \| failed \| 45 \|", text)
    assert "**mosaic**" not in text


def test_results_that_are_not_there_yet_are_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "RESULTS", tmp_path)
    assert publish.block("gpu") == "Not measured yet."
