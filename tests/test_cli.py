"""The commands: what they print, write and end with, by the documented exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from sam_poll import cli
from sam_poll.doors.folder import FolderDoor
from sam_poll.doors.scan import Manners
from sam_poll.errors import DeviceError, ExitCode
from sam_poll.health import Signs
from tests.conftest import BOX, Share, picture_bytes, wait_until
from tests.test_spread import BOXED, xml

ROOT = Path(__file__).parent.parent


class Run:
    """A command's end: exit code, stdout, stderr."""

    def __init__(self, *arguments: object) -> None:
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        self.code, self.out, self.err = result.exit_code, result.stdout, result.stderr
        self.text = self.out + self.err


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from the checkout's config.yaml, and with no settings from outside."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("COLUMNS", "200")
    for name in [n for n in os.environ if n.startswith("SAM_POLL_")]:
        monkeypatch.delenv(name)


def watch_once(share: Share, *more: object) -> Run:
    return Run("watch", share.input, "--once", "-m", "fake", *more)


# ── watch ──


def test_watch_once_drains_and_ends_with_0(share: Share) -> None:
    share.pair("cam1/dog")
    assert watch_once(share, "-f", "mask", "-f", "opex", "-f", "overlay", "-f", "cvat").code == ExitCode.OK
    suffixes = (".cvat.xml", ".mask.png", ".opex.json", ".overlay.jpg")
    assert share.tree("output") == [f"cam1/dog{suffix}" for suffix in suffixes]
    assert b'name="done/cam1/dog.jpg"' in (share.output / "cam1/dog.cvat.xml").read_bytes()


def test_watch_once_with_a_rejected_job_ends_with_3(share: Share) -> None:
    share.pair("dog", prompt={"box": 1})
    assert watch_once(share).code == ExitCode.FAILED_JOBS


def test_out_may_be_given_and_settings_come_from_a_file(share: Share, tmp_path: Path) -> None:
    share.pair("dog")
    config = tmp_path / "c.yaml"
    config.write_text(f"input: {share.input}\nmodel: fake\nformats: [opex]\nwatch: {{settle_s: 0}}\n")
    assert Run("watch", "--once", "-c", config).code == ExitCode.OK
    assert share.tree("output") == ["dog.opex.json"]
    share.pair("cat")
    assert Run("watch", share.input, share.root / "elsewhere", "--once", "-c", config).code == ExitCode.OK
    assert (share.root / "elsewhere" / "cat.opex.json").is_file()


def test_without_folder_and_settings_watch_says_both_ways_and_ends_with_2() -> None:
    run = Run("watch")
    assert run.code == ExitCode.USAGE
    assert "sam-poll watch IN OUT" in run.err


def test_an_unknown_flag_ends_with_2() -> None:
    assert Run("watch", "--nonsense").code == ExitCode.USAGE


def test_bad_settings_end_with_78_and_name_line_and_key(share: Share, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"input: {share.input}\nwatch:\n  mod: poll\n")
    run = Run("watch", "-c", config)
    assert run.code == ExitCode.SETTINGS
    assert "line 3" in run.err
    assert "mod" in run.err


@pytest.mark.parametrize("folder", ["output", "done", "failed", "work"])
def test_folders_inside_input_are_refused_with_78(share: Share, tmp_path: Path, folder: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"input: {share.input}\n{folder}: {share.input}/x\n")
    assert Run("watch", "-c", config).code == ExitCode.SETTINGS


def test_a_missing_share_ends_with_75(tmp_path: Path) -> None:
    run = Run("watch", tmp_path / "no" / "in", "--once", "-m", "fake")
    assert run.code == ExitCode.SHARE
    assert "mkdir -p" in run.err


def test_an_unknown_model_ends_with_4_and_names_the_known_ones(share: Share) -> None:
    run = Run("watch", share.input, "--once", "-m", "sam3_gigantic")
    assert run.code == ExitCode.MODEL
    assert "sam2.1_hiera_tiny" in run.err


def test_a_model_that_is_not_downloaded_ends_with_4_and_says_how_to_get_it(
    share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAM_POLL_CACHE", str(tmp_path / "cache"))
    run = Run("watch", share.input, "--once", "-m", "sam2.1_hiera_tiny")
    assert run.code == ExitCode.MODEL
    assert "sam-poll models download sam2.1_hiera_tiny" in run.err


def test_a_failed_device_ends_with_70_and_the_next_start_answers_the_jobs(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sam_poll.engines.fake import FakeEngine

    def broken(*args: Any, **kwargs: Any) -> FakeEngine:
        engine = FakeEngine()
        engine.fail("encode", DeviceError("CUDA error: an illegal memory access was encountered"))
        return engine

    share.pair("dog")
    with monkeypatch.context() as patched:
        patched.setattr("sam_poll.app.engine_of", broken)
        assert watch_once(share).code == ExitCode.DEVICE
    assert share.tree("done") == share.tree("failed") == share.tree("output") == []
    assert watch_once(share).code == ExitCode.OK
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_a_surprise_ends_with_1_one_line_and_a_file_for_the_report(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr("sam_poll.app.watch", odd)
    run = watch_once(share)
    assert run.code == ExitCode.BUG
    assert "Traceback" not in run.text
    report = Path(run.err.replace("\n", " ").split(" with ")[-1].strip())
    assert "ZeroDivisionError" in report.read_text()
    report.unlink()


def daemon(share: Share, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sam_poll", "watch", str(share.input), "-m", "fake", *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=share.root)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_answers_and_ends_with_0_on_a_signal(share: Share, number: signal.Signals) -> None:
    with daemon(share, "--log", "json") as process:
        share.pair("dog")
        wait_until(lambda: share.tree("done") == ["dog.jpg", "dog.json"], 60)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == ExitCode.OK
    lines = [json.loads(line) for line in err.splitlines()]
    assert any("dog" in line["message"] and line["level"] == "INFO" for line in lines)
    assert "stopped" in lines[-1]["message"]


def test_a_killed_daemon_loses_nothing(share: Share) -> None:
    for n in range(40):
        share.pair(f"dog{n:02}", seed=n)
    with daemon(share) as process:
        wait_until(lambda: len(share.tree("done")) > 10, 60)
        process.kill()
        process.communicate(timeout=60)
    assert watch_once(share).code == ExitCode.OK
    assert len(share.tree("done")) == 80
    assert len(share.tree("output")) == 80  # mask and opex
    assert share.tree("work") == share.tree("input") == share.tree("failed") == []


# ── predict ──


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "dog.jpg"
    path.write_bytes(picture_bytes(width=200, height=100))
    return path


def predict(*arguments: object) -> Run:
    return Run("predict", "-m", "fake", *arguments)


def test_predict_answers_a_box_and_prints_a_table(picture: Path, tmp_path: Path) -> None:
    run = predict(picture, "--box", "10,10,60,80", "--label", "dog", "-o", tmp_path / "o")
    assert run.code == ExitCode.OK
    assert "dog.jpg" in run.out
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["dog.mask.png", "dog.opex.json", "dog.overlay.jpg"]
    _, xs = np.nonzero(cv2.imread(str(tmp_path / "o/dog.mask.png"), 0))
    assert 8 <= xs.min() <= 12
    assert 58 <= xs.max() <= 62
    assert picture.exists()


def test_points_and_one_box_are_one_object_and_boxes_are_several(picture: Path, tmp_path: Path) -> None:
    predict(picture, "--point", "30,40", "--point", "5,5,0", "--box", "10,10,60,80", "-o", tmp_path / "a")
    predict(picture, "--box", "10,10,60,80", "--box", "100,10,160,80", "-o", tmp_path / "b")
    counts = [len(np.unique(cv2.imread(str(tmp_path / f"{d}/dog.mask.png"), -1))) - 1 for d in "ab"]
    assert counts == [1, 2]


def test_predict_reads_a_prompt_file_or_the_prompt_beside_the_picture(picture: Path, tmp_path: Path) -> None:
    given = tmp_path / "p.json"
    given.write_text(json.dumps(BOX))
    assert predict(picture, "--prompt", given, "-o", tmp_path / "o").code == ExitCode.OK
    assert predict(picture, "-o", tmp_path / "o").code == ExitCode.USAGE
    picture.with_suffix(".prompt").write_text(json.dumps(BOX))
    assert predict(picture, "-o", tmp_path / "o").code == ExitCode.OK


def test_two_pictures_of_one_stem_get_outputs_of_their_own(picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "x" / "dog.png"
    other.parent.mkdir()
    other.write_bytes(picture_bytes(".png"))
    assert predict(picture, other, "--box", "5,5,30,30", "-f", "mask", "-o", tmp_path / "o").code == ExitCode.OK
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["dog.mask.png", "dog~2.mask.png"]


@pytest.mark.parametrize(
    "flags",
    [
        *(["--point", "a,b"], ["--point", "1"], ["--point", "1,2,3"], ["--point", "1,2,0"], ["--point", "nan,1"]),
        *(["--box", "1,2,3"], ["--box", "5,5,1,1"], ["--box", "1,1,5,5", "--box", "1,1,6,6", "--point", "3,3"]),
    ],
)
def test_flags_that_make_no_prompt_end_with_2_and_say_why(picture: Path, tmp_path: Path, flags: list[str]) -> None:
    run = predict(picture, *flags, "-o", tmp_path / "o")
    assert run.code == ExitCode.USAGE
    assert flags[0] in run.err or "point" in run.err


def test_a_bad_picture_does_not_keep_the_good_one_from_its_answer(picture: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no")
    run = predict(bad, picture, "--box", "10,10,60,80", "-o", tmp_path / "o")
    assert run.code == ExitCode.FAILED_JOBS
    assert "bad.jpg" in run.err
    assert (tmp_path / "o" / "dog.mask.png").is_file()


def test_a_picture_that_is_not_there_is_said_at_once(picture: Path, tmp_path: Path) -> None:
    run = predict(tmp_path / "gone.jpg", picture, "--box", "10,10,60,80", "-o", tmp_path / "o")
    assert run.code == ExitCode.FAILED_JOBS
    assert "gone.jpg" in run.err
    assert "No such file" in run.err
    assert (tmp_path / "o" / "dog.mask.png").is_file()


def test_an_output_that_cannot_be_written_is_said_and_not_tried_for_ever(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "o").write_text("a file")
    run = predict(picture, "--box", "10,10,60,80", "-o", tmp_path / "o")
    assert run.code == ExitCode.USAGE
    assert "is no folder" in run.err


# ── check, schema, status, retry, merge, models ──


def test_check_passes_what_is_right_and_names_what_is_wrong(share: Share, tmp_path: Path) -> None:
    share.pair("good")
    assert Run("check", share.input).code == ExitCode.OK
    share.drop("outside.json", {"box": {"x0": 500, "y0": 500, "x1": 900, "y1": 900}})
    share.drop("outside.jpg", picture_bytes())
    share.drop("broken.prompt", "{")
    run = Run("check", share.input)
    assert run.code == ExitCode.FAILED_JOBS
    assert "outside.json" in run.out
    assert "broken.prompt" in run.out
    assert "3 fine, 2 wrong" in run.text


def test_check_lets_a_picture_be_large_where_a_mosaic_is_asked_for(share: Share) -> None:
    """In windows of a sparse file; 3.6 gigapixels would fit into no memory."""
    import rasterio  # here: it needs a library that not every machine has

    for stem, prompt in (("ortho", {"mosaic": True}), ("plain", BOX)):
        path = share.drop(f"{stem}.tif", b"")
        profile = {"driver": "GTiff", "width": 60_000, "height": 60_000, "count": 3, "dtype": "uint8"}
        sparse = {"tiled": True, "sparse_ok": True, "compress": "deflate", "transform": (0.1, 0, 9, 0, -0.1, 9)}
        with rasterio.open(path, "w", **profile, **sparse):
            pass
        share.drop(f"{stem}.json", prompt)
    run = Run("check", share.input)
    assert run.code == ExitCode.FAILED_JOBS
    assert "ortho" not in run.out
    assert "ask for a mosaic" in " ".join(run.out.split())
    assert Run("check", share.input / "ortho.tif").code == ExitCode.OK
    (share.input / "ortho.tif").write_bytes(b"II*\0")
    assert "ortho.tif" in Run("check", share.input).out


def test_check_looks_into_annotations_as_the_folder_would(share: Share, tmp_path: Path) -> None:
    share.drop("fine.xml", xml(("dog.jpg", BOXED)))
    share.drop("cam1/far.xml", xml(("a.jpg", BOXED), ("cat.jpg", BOXED.replace("50", "500"))))
    run = Run("check", share.input)
    assert run.code == ExitCode.FAILED_JOBS
    assert "1 fine, 1 wrong" in run.err
    assert "cam1/far.xml" in run.out
    assert 'image "cat.jpg", object 1 "dog", box.x1' in run.out


def test_check_of_settings_ends_with_78(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("modell: demo\n")
    run = Run("check", config)
    assert run.code == ExitCode.SETTINGS
    assert "line 1" in run.out
    assert Run("check", ROOT / "config.yaml").code == ExitCode.OK


@pytest.mark.parametrize("name", ["nothing.json", "notes.txt", "gone"])
def test_check_of_what_is_not_there_or_not_checkable_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert Run("check", tmp_path / name).code == ExitCode.FAILED_JOBS


def test_schema_is_json_schema() -> None:
    import jsonschema

    run = Run("schema")
    assert run.code == 0
    jsonschema.Draft202012Validator.check_schema(json.loads(run.out))


def test_status_counts_and_retry_puts_back(share: Share) -> None:
    share.pair("dog", prompt={"box": 1})
    watch_once(share)
    report = json.loads(Run("status", share.input, "--json").out)
    assert report["failed"] == {"pictures": 1, "prompts": 1, "other": 0, "errors": 1}
    assert report["work"] == {"pictures": 0, "prompts": 0, "other": 0}
    assert "nothing waits" in Run("status", share.input).out
    run = Run("retry", "--in", share.input)
    assert run.code == 0
    assert "dog" in run.out
    assert share.tree("input") == ["dog.jpg", "dog.json"]
    assert "waiting longest: dog.j" in Run("status", share.input).out


def test_status_shows_the_daemons_at_work_and_what_they_count(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no daemon works here" in Run("status", share.input).out
    monkeypatch.setenv("SAM_POLL_LEASE_S", "2")

    def worker() -> dict[str, Any]:
        workers = json.loads(Run("status", share.input, "--json").out)["workers"]
        return workers[0] if workers else {}

    with daemon(share) as process:
        share.pair("dog")
        wait_until(lambda: worker().get("answered") == 1, 60)
        assert (worker()["pid"], worker()["model"], worker()["alive"]) == (process.pid, "fake", True)
        (line,) = [line for line in Run("status", share.input).out.splitlines() if worker()["worker"] in line]
        assert line.rstrip().endswith("s ago")
        assert " fake " in line
        process.kill()
        process.communicate(timeout=60)
    assert worker()["alive"] is False
    assert "dead, " in Run("status", share.input).out


def test_status_names_alarms_of_the_living_only_and_ends_with_0(share: Share) -> None:
    signs = Signs()
    signs.alarms.raise_("output", "No space left on device\x1b[2J")
    with FolderDoor(share.layout, Manners(lease_s=2.0, events=False), alarms=signs.alarms, state=signs.state) as door:
        run = Run("status", share.input)
        report = json.loads(Run("status", share.input, "--json").out)
        (entry,) = share.work.glob("*worker*")
        left_behind = entry.read_bytes()
    assert run.code == ExitCode.OK
    assert f"alarm (output) of {door.worker}: No space left on device\\x1b[2J, for 0 s" in run.out
    ((worker, kind),) = [(alarm["worker"], alarm["kind"]) for alarm in report["alarms"]]
    assert (worker, kind) == (door.worker, "output")
    entry.write_bytes(left_behind)
    assert json.loads(Run("status", share.input, "--json").out)["alarms"] == []
    assert "alarm (" not in Run("status", share.input).out


def test_status_of_a_share_that_is_not_there_ends_with_75(tmp_path: Path) -> None:
    assert Run("status", tmp_path / "none" / "in").code == ExitCode.SHARE


def test_merge_joins_the_cvat_files_of_a_folder(share: Share, tmp_path: Path) -> None:
    share.pair("cam1/a")
    share.pair("cam2/b")
    watch_once(share, "-f", "cvat")
    target = tmp_path / "task.xml"
    assert Run("merge", share.output, "--format", "cvat", "-o", target).code == ExitCode.OK
    text = target.read_text()
    assert text.count("<image ") == 2
    assert 'name="done/cam1/a.jpg"' in text


def test_merge_makes_one_file_of_each_format_that_can_be_merged(share: Share, tmp_path: Path) -> None:
    share.pair("cam1/a")
    share.pair("cam2/b")
    watch_once(share, "-f", "cvat", "-f", "coco", "-f", "yolo")
    for kind, start in (("cvat", b"<?xml"), ("coco", b"{"), ("yolo", b"PK")):
        target = tmp_path / f"task.{kind}"
        assert Run("merge", share.output, "--format", kind, "-o", target).code == ExitCode.OK
        assert target.read_bytes().startswith(start)


@pytest.mark.parametrize(("kind", "file"), [("cvat", "all.cvat.xml"), ("coco", "cam1/all.coco.json")])
def test_merging_twice_into_the_folder_itself_doubles_nothing(share: Share, kind: str, file: str) -> None:
    share.pair("cam1/dog")
    watch_once(share, "-f", kind)
    target = share.output / file
    written = set()
    for _ in range(2):
        assert Run("merge", share.output, "--format", kind, "-o", target).code == ExitCode.OK
        written.add(target.read_bytes())
    assert len(written) == 1


def test_merge_names_the_format_that_is_missing(share: Share, tmp_path: Path) -> None:
    share.pair("a")
    watch_once(share, "-f", "cvat")
    run = Run("merge", share.output, "--format", "coco", "-o", tmp_path / "x.json")
    assert run.code == ExitCode.USAGE
    assert "add `coco` to `formats`" in run.err


def test_merge_without_anything_to_merge_or_in_an_unknown_format_ends_with_2(share: Share, tmp_path: Path) -> None:
    assert Run("merge", share.input, "-o", tmp_path / "x.xml").code == ExitCode.USAGE
    assert Run("merge", share.input, "--format", "voc", "-o", tmp_path / "x.xml").code == ExitCode.USAGE
    assert Run("merge", tmp_path / "none", "-o", tmp_path / "x.xml").code == ExitCode.USAGE


def test_what_the_system_refuses_is_said_in_one_line(share: Share, tmp_path: Path) -> None:
    share.pair("a")
    watch_once(share, "-f", "cvat")
    (tmp_path / "file").write_text("x")
    run = Run("merge", share.output, "-o", tmp_path / "file" / "x.xml")
    assert run.code == ExitCode.SHARE
    assert "file" in run.err
    assert "bug" not in run.err


def test_models_list_names_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAM_POLL_CACHE", str(tmp_path))
    (tmp_path / "sam_vit_b_01ec64.pth").write_bytes(b"not it")
    out = Run("models", "list").out
    assert "sam2.1_hiera_large" in out
    assert "sam_vit_b_01ec64.pth" in out
    verify = Run("models", "verify")
    assert verify.code == ExitCode.MODEL
    assert "sam_vit_b: DIFFERENT" in verify.out


def test_an_unknown_model_cannot_be_downloaded() -> None:
    assert Run("models", "download", "nope").code == ExitCode.MODEL


def test_version_and_help() -> None:
    assert Run("--version").out.startswith("sam_poll ")
    assert "watch" in Run("--help").out
