"""How the doctor ends: signals, closed outputs, errors before there is anything to tell, a trial
that dies; always one JSON document, the right exit code, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from typer.testing import CliRunner

from sam_poll.cli import main
from sam_poll.config.settings import load
from sam_poll.core.errors import ExitCode
from sam_poll.core.types import Size
from sam_poll.diagnostics.doctor import (
    checkpoint,
    compare,
    report,
    run,
    settings_check,
    test_prediction,
    trial_process,
)
from sam_poll.diagnostics.doctor.findings import Finding
from sam_poll.runtime import builders
from tests.conftest import wait_until
from tests.support.findings import the
from tests.support.paths import ROOT
from tests.support.ports import free_port


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from the checkout's config.yaml, and with no settings from outside."""
    monkeypatch.chdir(tmp_path)
    for name in [
        n for n in os.environ if n.startswith("SAM_POLL_") or n in trial_process.ALLOCATOR
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SAM_POLL_CACHE", str(tmp_path / "models"))


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# The doctor with a trial that leaves its number and then hangs, as in a library or a driver.
TRIAL = (
    "import json, os, sys, threading; sys.path[:] = json.loads(sys.argv[1]); "
    "from sam_poll.diagnostics.doctor import trial; "
    "trial.run = lambda order, tell: (open('pid', 'w').write(str(os.getpid())), "
    "threading.Event().wait()); "
    "trial.main()"
)
DOCTOR = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(ROOT)!r})
from sam_poll.diagnostics.doctor import trial_process as child
child.run.__kwdefaults__["code"] = {TRIAL!r}
from sam_poll.cli.main import app
sys.argv = ["sam-poll", "doctor", "-m", "demo", "--json"]
app()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name
)
def test_no_trial_is_left_behind_however_the_doctor_ends(
    tmp_path: Path, number: signal.Signals
) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    doctor = subprocess.Popen(
        [sys.executable, "-c", DOCTOR],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=env,
        start_new_session=True,
    )
    try:
        pid = tmp_path / "pid"
        wait_until(lambda: pid.exists() and pid.read_text().isdecimal(), 60)
        doctor.send_signal(number)
        out, err = doctor.communicate(timeout=30)
        assert (out, err) == (b"", b"")
        assert doctor.returncode == (-number if number is signal.SIGKILL else 128 + number)
        wait_until(lambda: gone(int(pid.read_text())), 30)
    finally:
        doctor.kill()
        doctor.communicate()


# ── stdout ──


@pytest.mark.parametrize("as_json", [False, True], ids=["tables", "json"])
def test_where_nobody_reads_to_the_end_the_exit_code_is_still_that_of_the_findings(
    as_json: bool,
) -> None:
    """`sam-poll doctor | head -1`: in a process of its own, because its stdout is closed."""
    reader, writer = os.pipe()
    code = (
        "import sys; from sam_poll.cli import error_handling as reporting; "
        "from sam_poll.cli import doctor as command; "
        "from sam_poll.diagnostics.doctor import run; "
        "from sam_poll.diagnostics.doctor.findings import Finding; "
        "done = run.DoctorReport([Finding('share', 'folders', 'problem', 'away ' * 20_000)]); "
        f"reporting.run(lambda: sys.exit(int(command._show(done, as_json={as_json}))))"
    )
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=writer,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            check=False,
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (ExitCode.SHARE, b"")


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--compare", "nothing.jpg"], ExitCode.USAGE),
        (["--box", "1,2,3,4"], ExitCode.USAGE),
        (["--compare", __file__, "--box", "9,9,1,1"], ExitCode.USAGE),
        (["--compare", __file__, "-o", __file__], ExitCode.USAGE),
    ],
)
def test_json_is_one_document_where_the_command_line_is_wrong_too(
    words: list[str], code: ExitCode
) -> None:
    result = CliRunner().invoke(main.app, ["doctor", "--json", *words])
    told = json.loads(result.stdout)
    assert (result.exit_code, told["exit_code"], told["healthy"]) == (code, code, False)
    assert told["findings"][0]["section"] == "command line"


def test_json_is_one_document_where_a_look_fails_as_nobody_foresaw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # where the report of the bug goes

    def fails(*_: object) -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr(run, "examine", fails)
    result = CliRunner().invoke(main.app, ["doctor", "--json"])
    told = json.loads(result.stdout)
    assert (result.exit_code, told["exit_code"]) == (ExitCode.BUG, ExitCode.BUG)
    assert "unforeseen" in told["findings"][0]["what"]


def test_json_holds_nothing_that_its_readers_refuse() -> None:
    findings = [Finding("model", "model", "ok", "bad\udcff.pt\x1b", "two\nlines")]
    text = report.as_json(
        findings, {"read": float("inf")}, {"compare": {"scores": [float("nan"), 0.5]}}
    )
    told = json.loads(text, parse_constant=lambda word: pytest.fail(f"not JSON: {word}"))
    assert told["compare"]["scores"] == [None, 0.5]
    assert told["findings"][0]["what"] == "bad\\udcff.pt\x1b"
    assert told["findings"][0]["where"] == "two\nlines"


# ── settings ──


def test_settings_that_cannot_be_read_leave_the_model_that_they_name_unjudged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is said of a model that nobody has asked for."""
    monkeypatch.setattr(trial_process, "run", lambda *_, **__: trial_process.TrialResult())
    done = run.examine(run.DoctorOptions(config=Path("missing.yaml")))
    assert [f.section for f in done.findings if f.level == "problem"] == ["settings"]
    assert "not checked" in the(done.findings, "model").what
    assert all(f.remedy for f in done.findings if f.level == "problem")


@pytest.fixture
def daemon() -> Iterator[HTTPServer]:
    """What answers at a daemon's port for Prometheus; `said` is what."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(self.server.said)  # type: ignore[attr-defined]

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def metrics(address: str) -> Finding:
    return the(
        list(settings_check.metrics(load(None, env={}, flags={"health.metrics": address}))),
        "metrics",
    )


def test_a_port_for_metrics_that_another_program_has_is_a_problem_and_a_daemons_own_is_not(
    daemon: HTTPServer,
) -> None:
    address = f"127.0.0.1:{daemon.server_port}"
    daemon.said = b"something else"  # type: ignore[attr-defined]
    taken = metrics(address)
    assert (taken.exit_code, "ss -ltnp" in (taken.remedy or "")) == (ExitCode.SETTINGS, True)
    daemon.said = b"sam_poll_jobs 1"  # type: ignore[attr-defined]
    assert metrics(address).level == "ok"


def test_a_port_for_metrics_that_is_free_is_fine_and_free_again_afterwards() -> None:
    address = f"127.0.0.1:{free_port()}"
    assert [metrics(address).level for _ in range(2)] == ["ok", "ok"]
    assert metrics("192.0.2.1:9").exit_code is ExitCode.SETTINGS, "no address of this machine"
    assert list(settings_check.metrics(load(None, env={}, flags={}))) == []


def test_metrics_without_their_package_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert "prometheus_client" in metrics("127.0.0.1:1").what


# ── model ──


def test_a_folder_as_checkpoint_and_one_that_may_not_be_read_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dir.pt").mkdir()
    (folder,) = [
        f
        for f in checkpoint.check(load(None, env={}, flags={"model": "dir.pt"}))
        if f.level == "problem"
    ]
    assert "config.json cannot be read" in folder.what
    assert "name a checkpoint's file" in folder.remedy
    (tmp_path / "mine.pt").write_bytes(b"weights")
    monkeypatch.setattr("os.access", lambda *_: False)
    (closed,) = [
        f
        for f in checkpoint.check(load(None, env={}, flags={"model": "mine.pt"}))
        if f.level == "problem"
    ]
    assert "may not be read" in closed.what


# ── trial ──


def test_a_checkpoint_whose_name_is_no_utf8_is_tried_like_any_other(tmp_path: Path) -> None:
    name = os.fsdecode(b"mine\xff.pt")
    (tmp_path / name).write_bytes(b"not weights")
    order = json.loads(
        json.dumps(
            trial_process.order_of(
                load(None, env={}, flags={"model": name}), load=True, compare=None
            )
        )
    )
    from sam_poll.diagnostics.doctor import trial

    told = trial_process.TrialResult()
    trial.run(order, lambda **event: told.hear(json.loads(json.dumps(event))))
    assert told.error
    assert "not a PyTorch file" in str(told.error["reason"])


@pytest.mark.parametrize(
    ("end", "what", "remedy"),
    [
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "killed, by the kernel if memory ran out",
            "more memory",
        ),
        ("os.kill(os.getpid(), signal.SIGBUS)", "Bus error", "local disk"),
        ("faulthandler._sigsegv()", "Fatal Python error: Segmentation fault / ", "from one place"),
        (
            "os.write(2, b'  what():  bad option\\nframe #0\\n' + b'x\\n' * 9); os.abort()",
            "(what():  bad option)",
            "PYTORCH",
        ),
        ("os.write(1, b'{\"sta'); sys.exit(3)", "exit code 3", "load_timeout_s"),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 5)", "signal", "from one place"),
    ],
)
def test_each_end_of_the_trial_has_the_remedy_that_helps_against_it(
    monkeypatch: pytest.MonkeyPatch, end: str, what: str, remedy: str
) -> None:
    if remedy == "PYTORCH":
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "nonsense")
    head = "import faulthandler, os, signal, sys; faulthandler.enable(); "
    head += """print('{"stage": "torch"}', flush=True); """
    settings = load(None, env={}, flags={"model": "demo"})
    found = run._failed(trial_process.run(settings, limit_s=60, code=head + end), settings)
    assert found
    assert "ended in stage `torch`" in found.what
    assert what in found.what
    assert remedy in (found.remedy or "")


def test_an_official_predictor_that_crashes_does_not_make_the_machine_ill() -> None:
    told = trial_process.TrialResult(trial={"step": "x"}, stage="official", trouble="ended")
    found = run._failed(told, load(None, env={}, flags={}), Path("dog.jpg"))
    assert found
    assert (found.section, found.level) == ("compare", "warning")


# ── compare ──


def compared(**more: Any) -> dict[str, Any]:
    told = {
        "differ_percent": 0.0,
        "iou": 1.0,
        "pixels": [5, 5],
        "precisions": ["a", "b"],
        "written": [],
    }
    return {**told, "ours_ms": 1.0, "official_ms": 2.0, "speed": 2.0, "failure": None, **more}


def test_two_empty_masks_are_not_taken_for_agreement() -> None:
    assert the(compare.finding(compared()), "masks").level == "ok"
    empty = the(compare.finding(compared(pixels=[0, 0])), "masks")
    assert (empty.level, "empty" in empty.what) == ("warning", True)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_half_precision_is_told_from_float32(precision: str, tmp_path: Path) -> None:
    picture = tmp_path / "disc.jpg"
    picture.write_bytes(test_prediction.draw_disc()[0])
    flags = {"model": "demo", "device": "cpu", "precision": precision}
    settings = load(None, env={}, flags=flags)
    engines = [builders.engine_of(settings)]
    box = (540.0, 260.0, 1060.0, 780.0)
    found = compare.run(settings, engines, picture, box, None, lambda *_: nullcontext())
    assert found["precisions"] == [precision, "float32"]
    named = [finding.name for finding in compare.finding(found)]
    if precision == "float32":
        assert found["float32"] is None
        assert named == ["masks", "speed"]
        return
    assert named == ["masks", "precision", "speed"]
    exact, half = found["float32"], found["differ_percent"]
    assert exact["iou"] > 0.98
    # What the precision changes is what lies between the two differences, or more.
    assert exact["precision_percent"] >= abs(exact["differ_percent"] - half) - 1e-9
    words = f"bfloat16 alone changes {exact['precision_percent']:.3f} %"
    assert words in the(compare.finding(found), "precision").what


def test_a_difference_that_float32_does_not_have_is_remedied_by_it() -> None:
    exact = {"differ_percent": 0.1, "iou": 0.99, "precision_percent": 8.0}
    apart = the(compare.finding(compared(iou=0.9, float32=exact)), "masks")
    assert (apart.level, "precision: float32" in (apart.remedy or "")) == ("warning", True)
    apart = the(compare.finding(compared(iou=0.9, float32={**exact, "iou": 0.9})), "masks")
    assert "precision: float32" not in (apart.remedy or "")


def test_masks_that_cannot_be_written_cost_nothing_of_the_comparison(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    _, mask = test_prediction.draw_disc()
    written, failure = compare._written(
        tmp_path / "file" / "deep", "dog", {"ours": mask}, Size(1500, 1000)
    )
    assert (written, (failure or {})["place"]) == ([], str(tmp_path / "file" / "deep"))
    told = compare.finding(compared(failure=failure))
    assert the(told, "masks").level == "ok"
    assert the(told, "output").level == "warning"


def test_a_picture_that_is_none_is_told_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "no.jpg").write_bytes(b"no picture")
    with pytest.raises(compare.PictureError) as caught:
        compare._read(tmp_path / "no.jpg")
    assert caught.value.place == str(tmp_path / "no.jpg")


def test_a_comparison_that_could_not_be_begun_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_process, "run", lambda *_, **__: trial_process.TrialResult())
    done = run.examine(run.DoctorOptions(flags={"model": "nothing.pt"}, compare=Path("dog.jpg")))
    assert the(done.findings, "masks").level == "warning"
