"""The doctor: each thing that can be broken is broken once, and is found, with its remedy and its
exit code.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sam_poll.cli import main
from sam_poll.config.settings import Settings, load
from sam_poll.core.errors import DeviceError, ExitCode, ModelError, SamPollError, ShareError
from sam_poll.core.types import Logits
from sam_poll.diagnostics.doctor import (
    checkpoint,
    machine,
    memory_plan,
    report,
    run,
    settings_check,
    share,
    test_prediction,
    trial,
    trial_process,
)
from sam_poll.diagnostics.doctor.findings import (
    CheckTimeout,
    Finding,
    error_as_json,
    error_of,
    exit_code,
    run_check,
    run_with_timeout,
)
from sam_poll.engines import devices, sam1
from sam_poll.engines.fake import FakeEngine
from sam_poll.engines.loader import LoadProgress as LoaderStages
from sam_poll.share.mount_check import check_folders
from tests.conftest import Share, wait_until
from tests.support.findings import the
from tests.support.networks import SMALL_SAM1


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from the checkout's config.yaml, and with no settings from outside."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for name in [n for n in os.environ if n.startswith("SAM_POLL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SAM_POLL_CACHE", str(tmp_path / "models"))


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial's process tells nothing."""
    monkeypatch.setattr(trial_process, "run", lambda *_, **__: trial_process.TrialResult())


@pytest.fixture
def proved(share: Share) -> Share:
    """A share with all its folders."""
    check_folders(share.layout)
    return share


def settings_for(place: Share, **flags: Any) -> Settings:
    return load(None, env={}, flags={"input": place.layout.input.path, "model": "demo", **flags})


def everything_below(root: Path) -> list[tuple[str, int]]:
    return sorted((p.relative_to(root).as_posix(), p.stat().st_mode) for p in root.rglob("*"))


# ── the whole of it ──


@pytest.mark.slow
def test_a_healthy_machine_ends_with_0_and_nothing_on_the_share_has_changed(
    proved: Share, tmp_path: Path
) -> None:
    before = everything_below(proved.root)
    picture = tmp_path / "disc.jpg"
    picture.write_bytes(test_prediction.draw_disc()[0])
    box = "540,260,1060,780"
    words = ["-m", "demo", "--device", "cpu", "--share", str(proved.root), "--json"]
    words += ["--compare", str(picture), "--box", box, "-o", str(tmp_path / "masks")]
    result = CliRunner().invoke(main.app, ["doctor", *words])
    told = json.loads(result.stdout)
    assert [f for f in told["findings"] if f["level"] == "problem"] == []
    assert (result.exit_code, told["exit_code"], told["healthy"]) == (0, 0, True)
    assert everything_below(proved.root) == before
    assert {f["section"] for f in told["findings"]} == set(report.SECTIONS)
    stages = [
        "torch",
        "torchvision",
        "device",
        "import",
        "read",
        "config",
        "build",
        "to device",
        "warm-up",
    ]
    stages += [
        "decode",
        "resize",
        "encode",
        "predict",
        "mask",
        "picture",
        "box",
        "ours",
        "official load",
        "official",
    ]
    assert list(told["stages_ms"]) == stages
    assert told["trial"]["iou"] > test_prediction.FOUND
    assert told["plan"]["taken"] == told["trial"]["step"]
    assert told["compare"]["iou"] > 0.98
    assert told["compare"]["differ_percent"] < 0.5
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == [
        "disc.official.png",
        "disc.ours.png",
    ]


@pytest.mark.parametrize(
    "words",
    [
        ["--box", "1,2,3,4"],
        ["-o", "masks"],
        ["--compare", "nothing.jpg"],
        ["--compare", __file__, "--quick"],
    ],
    ids=" ".join,
)
def test_flags_that_make_no_sense_together_end_with_2(words: list[str]) -> None:
    assert CliRunner().invoke(main.app, ["doctor", *words]).exit_code == ExitCode.USAGE


@pytest.mark.usefixtures("no_trial")
def test_what_cannot_be_found_out_hides_nothing_else(
    proved: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    def falls_over() -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr(machine, "packages", falls_over)
    done = run.examine(run.DoctorOptions(share=proved.layout.input.path, flags={"model": "demo"}))
    assert "unforeseen" in the(done.findings, "system").what
    assert {"settings", "model", "share"} <= {f.section for f in done.findings}
    assert exit_code(done.findings) is ExitCode.OK


@pytest.mark.usefixtures("no_trial")
def test_a_missing_share_and_a_missing_checkpoint_are_both_told_and_the_share_decides(
    tmp_path: Path,
) -> None:
    done = run.examine(
        run.DoctorOptions(share=tmp_path / "nowhere" / "in", flags={"model": "sam2.1_hiera_tiny"})
    )
    problems = [f.section for f in done.findings if f.level == "problem"]
    assert problems == ["model", "share"]
    assert exit_code(done.findings) is ExitCode.SHARE
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.usefixtures("no_trial")
def test_without_a_share_in_the_settings_none_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "check", lambda *_: pytest.fail("nobody has named a share"))
    done = run.examine(run.DoctorOptions(flags={"model": "demo"}))
    assert "not checked" in the(done.findings, "folders").what


# ── findings ──


def test_the_exit_code_is_that_of_the_first_problem_a_daemon_would_meet() -> None:
    sections = ["compare", "trial", "memory", "model", "device", "share", "settings"]
    found = [Finding(section, "x", "problem", "") for section in sections]
    codes = [exit_code(found[:n]) for n in range(1, len(found) + 1)]
    assert codes == [ExitCode.MODEL] * 4 + [ExitCode.DEVICE, ExitCode.SHARE, ExitCode.SETTINGS]
    warnings = [Finding(section, "x", "warning", "") for section in sections]
    assert exit_code(warnings) is ExitCode.OK


def test_what_hangs_is_given_up_and_what_fails_is_raised() -> None:
    forever = threading.Event()
    try:
        with pytest.raises(CheckTimeout):
            run_with_timeout(forever.wait, 0.05)
        with pytest.raises(ZeroDivisionError):
            run_with_timeout(lambda: 1 / 0, 30)
        assert run_with_timeout(lambda: None, 30) is None
    finally:
        forever.set()


def test_our_own_errors_are_problems_and_the_systems_what_the_caller_says() -> None:
    def fails(error: Exception) -> Callable[[], Iterator[Finding]]:
        def look() -> Iterator[Finding]:
            raise error
            yield

        return look

    (own,) = run_check(
        "share", "x", fails(ShareError("reason", place="place", remedy="remedy")), 30
    )
    assert (own.level, own.what, own.where, own.remedy) == ("problem", "reason", "place", "remedy")
    (system,) = run_check(
        "share", "x", fails(OSError(5, "Input/output error", "file")), 30, system_error="problem"
    )
    assert (system.level, system.where) == ("problem", "file")
    (other,) = run_check("share", "x", fails(ValueError("odd")), 30, system_error="problem")
    assert other.level == "warning"


@pytest.mark.parametrize("kind", [ModelError, DeviceError, ShareError])
def test_errors_travel_between_processes_with_their_kind(kind: type[SamPollError]) -> None:
    error = kind("reason", place="place", remedy=None)
    back = error_of(json.loads(json.dumps(error_as_json(error))))
    assert (type(back), str(back)) == (kind, str(error))


# ── settings ──


@pytest.mark.usefixtures("no_trial")
def test_an_unknown_key_is_a_problem_with_its_line_and_the_rest_is_looked_at(proved: Share) -> None:
    Path("config.yaml").write_text("model: demo\nmodle: demo\n")
    done = run.examine(run.DoctorOptions(share=proved.layout.input.path, flags={"model": "demo"}))
    problem = the(done.findings, "file")
    assert problem.level == "problem"
    assert "line 2" in (problem.where or "")
    assert "model" in (problem.remedy or "")
    assert the(done.findings, "rename").level == "ok"
    assert exit_code(done.findings) is ExitCode.SETTINGS


def test_values_show_what_matters_and_what_is_not_as_by_default_and_no_secret() -> None:
    env = {"SAM_POLL_WATCH__RESCAN_S": "3", "SAM_POLL_SERVE_TOKEN": "secret", "PATH": "/bin"}
    settings, shared, modelled, found = settings_check.check(None, {"model": "demo"}, env)
    assert settings.watch.rescan_s == 3
    assert (shared, modelled) == (False, True)
    text = the(found, "values").what
    assert "model=demo" in text
    assert "watch.rescan_s=3.0" in text
    assert "attempts" not in text
    assert "secret" not in str(found)
    assert the(found, "environment").what == "SAM_POLL_SERVE_TOKEN, SAM_POLL_WATCH__RESCAN_S"


def test_a_flag_that_is_wrong_leaves_the_defaults_to_look_with() -> None:
    told = settings_check.check(None, {"device": "toaster", "model": "demo"}, {})
    assert (told.settings.device, told.settings.model, told.modelled) == ("auto", "demo", True)
    assert told.found[0].exit_code is ExitCode.SETTINGS


# ── model ──


def test_a_checkpoint_that_is_not_there_is_a_problem_and_the_remedy_downloads_it() -> None:
    found = checkpoint.check(load(None, env={}, flags={"model": "sam2.1_hiera_tiny"}))
    problem = the(found, "checkpoint")
    assert problem.exit_code is ExitCode.MODEL
    assert "models download sam2.1_hiera_tiny" in (problem.remedy or "")


def test_a_checkpoint_that_is_not_as_published_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sam2.1_hiera_tiny.pt").write_bytes(b"other weights")
    found = checkpoint.check(load(None, env={}, flags={"model": "sam2.1_hiera_tiny"}))
    assert "the catalogue's is 148.8 MiB" in the(found, "checkpoint").what
    assert the(found, "SHA-256").exit_code is ExitCode.MODEL


def test_own_weights_have_no_known_hash_and_that_is_fine(tmp_path: Path) -> None:
    (tmp_path / "mine.pt").write_bytes(b"weights")
    found = checkpoint.check(load(None, env={}, flags={"model": str(tmp_path / "mine.pt")}))
    assert {f.level for f in found} == {"ok"}
    assert "none is known" in the(found, "SHA-256").what


def test_a_folder_of_the_hub_is_checked_like_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "edgetam"}')
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    found = checkpoint.check(load(None, env={}, flags={"model": str(tmp_path)}))
    assert {f.level for f in found} == {"ok"}
    assert the(found, "checkpoint").what.startswith("edgetam, ")
    (tmp_path / "model.safetensors").unlink()
    found = checkpoint.check(load(None, env={}, flags={"model": str(tmp_path)}))
    assert "no weights" in the(found, "checkpoint").what


def test_a_checkpoint_that_cannot_be_read_to_its_end_is_not_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forever = threading.Event()
    monkeypatch.setattr(checkpoint.catalog, "verify", lambda _: forever.wait())
    found = checkpoint.check(load(None, env={}, flags={"model": "demo"}), limit_s=0.3)
    forever.set()
    assert the(found, "hash").level == "warning"


# ── trial ──


class Odd(FakeEngine):
    """Answers with logits of one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def decode(self, *arguments: Any) -> list[Logits]:
        return [
            Logits(np.full_like(m.pixels, self.value), m.score, m.frame)
            for m in super().decode(*arguments)
        ]


def tried(engine: FakeEngine) -> Finding:
    told: list[str] = []
    stages = run.trial_process.TrialResult()

    def stage(name: str, then: Callable[[], object] = lambda: None) -> Any:
        told.append(name)
        return contextlib.nullcontext()

    found = json.loads(json.dumps(test_prediction.predict(engine, stage)))
    assert told == ["decode", "resize", "encode", "predict", "mask"]
    assert stages.trouble is None
    return test_prediction.finding(found)


def test_a_network_that_finds_the_disc_is_fine() -> None:
    assert tried(FakeEngine(side=1024)).level == "ok"


def test_a_network_that_finds_something_else_is_a_warning() -> None:
    assert tried(Odd(-1.0)).level == "warning"


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_network_that_answers_no_numbers_is_a_problem_of_the_device() -> None:
    found = tried(Odd(float("nan")))
    assert found.exit_code is ExitCode.DEVICE
    assert "float32" in (found.remedy or "")


def ran(code: str, limit_s: float = 60.0) -> trial_process.TrialResult:
    return trial_process.run(
        load(None, env={}, flags={"model": "demo"}), limit_s=limit_s, code=code
    )


STEP = "import json; print(json.dumps({'stage': 'build'}), flush=True); "


def test_a_trial_that_hangs_is_ended_and_its_stage_named() -> None:
    seen: list[str] = []
    code = STEP + "import threading; threading.Event().wait()"
    told = trial_process.run(
        load(None, env={}, flags={}), limit_s=1.0, code=code, on_stage=seen.append
    )
    assert told.trouble == "hangs in stage `build`: nothing for 1 s"
    assert seen == ["build"]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "by the kernel if memory ran out",
        ),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "does not suit the processor"),
        ("import sys; sys.exit('last words')", "exit code 1 (last words)"),
        (
            "import sys; sys.exit('a\\nloading demo hangs in stage `build` "
            "(limit)\\nFile\\nb\\nc\\nd')",
            "(loading demo",
        ),
    ],
)
def test_a_trial_that_dies_is_told_with_its_stage_and_its_end(end: str, words: str) -> None:
    told = ran(STEP + end)
    assert "ended in stage `build`" in (told.trouble or "")
    assert words in (told.trouble or "")
    finding = run._failed(told, load(None, env={}, flags={}))
    assert finding
    assert finding.exit_code is ExitCode.MODEL


@pytest.fixture
def trial_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial in this process, which has torch already."""

    def run_here(
        settings: Settings, *, load: bool = True, compare: Any = None, **_: Any
    ) -> trial_process.TrialResult:
        told = trial_process.TrialResult()
        order = trial_process.order_of(settings, load=load, compare=compare)
        trial.run(
            json.loads(json.dumps(order)), lambda **event: told.hear(json.loads(json.dumps(event)))
        )
        return told

    monkeypatch.setattr(trial_process, "run", run_here)


@pytest.mark.usefixtures("trial_here")
def test_sam1_is_compared_with_its_own_predictor(tmp_path: Path) -> None:
    """Of random weights: logits close to zero, the harshest case, in which half precision, or a
    JPEG that is read at a quarter of its size, may change more pixels than this.
    """
    torch.manual_seed(0)
    torch.save(sam1.build(SMALL_SAM1).state_dict(), tmp_path / "small.pth")
    pixels = cv2.imdecode(np.frombuffer(test_prediction.draw_disc()[0], np.uint8), cv2.IMREAD_COLOR)
    cv2.imwrite(str(tmp_path / "disc.png"), pixels)
    flags = {"model": str(tmp_path / "small.pth"), "device": "cpu", "precision": "float32"}
    done = run.examine(run.DoctorOptions(flags=flags, compare=tmp_path / "disc.png"))
    assert done.details["compare"]["box"] == [375, 250, 1125, 750]
    assert done.details["compare"]["differ_percent"] < 0.05
    assert the(done.findings, "masks").level == "ok"


@pytest.mark.usefixtures("trial_here")
def test_a_checkpoint_that_is_none_is_the_trials_problem(tmp_path: Path) -> None:
    """The weights are there, and their hash is not known: only the load can tell."""
    (tmp_path / "mine.pt").write_bytes(b"not weights")
    done = run.examine(
        run.DoctorOptions(flags={"model": str(tmp_path / "mine.pt"), "device": "cpu"})
    )
    (problem,) = [f for f in done.findings if f.level == "problem"]
    assert (problem.section, problem.name, problem.exit_code) == ("trial", "read", ExitCode.MODEL)
    assert "not a PyTorch file" in problem.what
    assert {"torch", "torchvision", "device"} <= set(done.ms)


def test_a_comparison_that_fails_does_not_make_the_machine_ill() -> None:
    told = trial_process.TrialResult(
        trial={"step": "x"}, stage="official", error={"reason": "out of memory", "exit_code": 1}
    )
    finding = run._failed(told, load(None, env={}, flags={}))
    assert finding
    assert (finding.section, finding.level) == ("compare", "warning")


def test_the_trial_tells_the_stages_of_a_load_and_how_long_each_took() -> None:
    events: list[dict[str, Any]] = []
    stages = trial.Stages(lambda **event: events.append(event))
    trial._work(
        load(None, env={}, flags={"model": "demo", "device": "cpu"}),
        None,
        stages,
        lambda **event: None,
    )
    told = [event.get("stage") or event["took"] for event in events]
    expected = ["import", "read", "config", "build", "to device", "warm-up"]
    assert told[: 2 * len(expected)] == [name for name in expected for _ in range(2)]
    assert all(event["ms"] >= 0 for event in events if "took" in event)


def test_a_stage_that_fails_is_the_last_one_begun_and_has_no_time() -> None:
    events: list[dict[str, Any]] = []
    loader = LoaderStages("name", 60, trial.Stages(lambda **event: events.append(event)).stage)
    with pytest.raises(ValueError, match="broken"), loader.stage("read"):
        raise ValueError("broken")
    assert events == [{"stage": "read"}]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")
def test_on_a_card_the_plan_is_made_of_what_was_free_and_the_peak_is_measured() -> None:
    told = trial_process.run(load(None, env={}, flags={"model": "demo", "device": "cuda"}))
    assert (told.trouble, told.error) == (None, None)
    assert told.facts
    assert told.plan
    assert told.trial
    card = told.facts["cards"][0]
    assert 0 < card["free_mib"] <= card["total_mib"]
    assert told.plan["free_mib"] <= card["total_mib"]
    assert memory_plan.finding(told.plan, None).what.startswith("the best step fits")
    assert told.trial["peak_mib"] > 0
    assert test_prediction.finding(told.trial).level == "ok"


# ── report ──


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_report_says_everything_at_any_width(width: int) -> None:
    findings = [
        Finding("share", "rename", "problem", "words " * 20, "/a/long/path", "do this"),
        Finding("trial", "load", "ok", "fine\x1b[2J"),
    ]
    console = Console(width=width, record=True, file=io.StringIO())
    report.show(findings, {"torch": 1234.5, "read": 3.2}, console)
    text = console.export_text()
    assert text.split().count("words") == 20
    for word in ("problem", "rename", "/a/long/path", "→", "1,234", "not", "healthy:", "75"):
        assert word in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width


def test_json_has_every_finding_and_the_sum() -> None:
    findings = [
        Finding("device", "card", "problem", "x", "y", "z"),
        Finding("trial", "load", "warning", "w"),
    ]
    told = json.loads(report.as_json(findings, {"torch": 1.25}, {"device": {"torch": "2"}}))
    assert (told["healthy"], told["exit_code"]) == (False, 70)
    assert told["counts"] == {"ok": 0, "warning": 1, "problem": 1}
    assert told["findings"][0]["remedy"] == "z"
    assert told["device"] == {"torch": "2"}


def test_the_device_of_the_plan_is_read_as_the_daemon_would_choose_it() -> None:
    assert test_prediction.reading(load(None, env={}, flags={"device": "cpu"})) is None
    assert devices.choose("cpu", "auto").half is None
    wait_until(lambda: test_prediction.synchronizer("cpu")() is None)
