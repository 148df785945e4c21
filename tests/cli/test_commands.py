"""The commands: what they print, write and end with, by the documented exit codes."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sam_poll.core.errors import DeviceError, ExitCode
from sam_poll.core.telemetry import Telemetry
from sam_poll.diagnostics.bench import command as bench_command
from sam_poll.runtime import signals
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.source import FolderSource
from tests.conftest import BOX, Share, picture_bytes, wait_until
from tests.support.commands import Run, watch_once
from tests.support.commands import elsewhere as elsewhere
from tests.support.dropped_annotations import BOXED, xml
from tests.support.paths import ROOT
from tests.support.strategies import encoded, sample

# ── watch ──


def test_watch_once_drains_and_ends_with_0(share: Share) -> None:
    share.pair("cam1/dog")
    assert (
        watch_once(share, "-f", "mask", "-f", "opex", "-f", "overlay", "-f", "cvat").code
        == ExitCode.OK
    )
    suffixes = (".cvat.xml", ".mask.png", ".opex.json", ".overlay.jpg")
    assert share.tree("output") == [f"cam1/dog{suffix}" for suffix in suffixes]
    assert b'name="done/cam1/dog.jpg"' in (share.output / "cam1/dog.cvat.xml").read_bytes()


def test_watch_once_with_a_rejected_job_ends_with_3(share: Share) -> None:
    share.pair("dog", prompt={"box": 1})
    assert watch_once(share).code == ExitCode.FAILED_JOBS


def test_out_may_be_given_and_settings_come_from_a_file(share: Share, tmp_path: Path) -> None:
    share.pair("dog")
    config = tmp_path / "c.yaml"
    config.write_text(
        f"input: {share.input}\nmodel: fake\nformats: [opex]\nwatch: {{settle_s: 0}}\n"
    )
    assert Run("watch", "--once", "-c", config).code == ExitCode.OK
    assert share.tree("output") == ["dog.opex.json"]
    share.pair("cat")
    assert (
        Run("watch", share.input, share.root / "elsewhere", "--once", "-c", config).code
        == ExitCode.OK
    )
    assert (share.root / "elsewhere" / "cat.opex.json").is_file()


@pytest.mark.parametrize("command", ["watch", "status", "retry"])
def test_without_folder_and_settings_a_command_says_both_ways_and_ends_with_2(
    command: str,
) -> None:
    run = Run(command)
    assert run.code == ExitCode.USAGE
    assert "name the input folder, or a settings file" in run.err


@pytest.mark.parametrize("command", ["predict", "mosaic"])
def test_a_log_level_that_does_not_exist_is_refused(
    command: str, picture: Path, tmp_path: Path
) -> None:
    refused = Run(command, picture, "-o", tmp_path / "out", "--log-level", "loud")
    assert refused.code == ExitCode.SETTINGS
    assert 'log_level: not DEBUG, INFO, WARNING or ERROR: it is the text "LOUD"' in refused.err


def test_bench_without_its_packages_ends_as_other_commands_without_their_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench_command, "find_spec", lambda name: None)
    run = Run("bench")
    assert run.code == ExitCode.SETTINGS
    assert "pip install 'sam_poll[bench]'" in run.err


def test_predict_says_how_many_pictures_an_interruption_has_left(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    stop.set()
    monkeypatch.setattr(signals, "stop_on_signals", lambda: contextlib.nullcontext(stop))
    run = Run("predict", picture, "--box", "1,1,5,5", "-o", tmp_path / "out", "-m", "fake")
    assert run.code == ExitCode.FAILED_JOBS
    assert run.err.splitlines()[-1] == "stopped: 1 picture not processed"


def test_predict_names_a_folder_that_was_given_as_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run("predict", ".", "--box", "1,1,5,5", "-o", "out", "-m", "fake")
    assert run.code == ExitCode.FAILED_JOBS
    assert f"error: {tmp_path.name}: cannot be read: it is not a file" in run.err


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
def test_folders_inside_input_are_refused_with_78(
    share: Share, tmp_path: Path, folder: str
) -> None:
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
        patched.setattr("sam_poll.runtime.builders.engine_of", broken)
        assert watch_once(share).code == ExitCode.DEVICE
    assert share.tree("done") == share.tree("failed") == share.tree("output") == []
    assert watch_once(share).code == ExitCode.OK
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_a_surprise_ends_with_1_one_line_and_a_file_for_the_report(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    def odd(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError("odd")

    monkeypatch.setattr("sam_poll.runtime.daemon.watch", odd)
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


@pytest.mark.slow
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
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == [
        "dog.mask.png",
        "dog.opex.json",
        "dog.overlay.jpg",
    ]
    _, xs = np.nonzero(cv2.imread(str(tmp_path / "o/dog.mask.png"), 0))
    assert 8 <= xs.min() <= 12
    assert 58 <= xs.max() <= 62
    assert picture.exists()


def test_points_and_one_box_are_one_object_and_boxes_are_several(
    picture: Path, tmp_path: Path
) -> None:
    predict(
        picture,
        "--point",
        "30,40",
        "--point",
        "5,5,0",
        "--box",
        "10,10,60,80",
        "-o",
        tmp_path / "a",
    )
    predict(picture, "--box", "10,10,60,80", "--box", "100,10,160,80", "-o", tmp_path / "b")
    counts = [len(np.unique(cv2.imread(str(tmp_path / f"{d}/dog.mask.png"), -1))) - 1 for d in "ab"]
    assert counts == [1, 2]


def test_predict_reads_a_prompt_file_or_the_prompt_beside_the_picture(
    picture: Path, tmp_path: Path
) -> None:
    given = tmp_path / "p.json"
    given.write_text(json.dumps(BOX))
    assert predict(picture, "--prompt", given, "-o", tmp_path / "o").code == ExitCode.OK
    assert predict(picture, "-o", tmp_path / "o").code == ExitCode.USAGE
    picture.with_suffix(".prompt").write_text(json.dumps(BOX))
    assert predict(picture, "-o", tmp_path / "o").code == ExitCode.OK


def test_predict_reads_the_first_frame_of_a_gif_and_notes_it(tmp_path: Path) -> None:
    path = tmp_path / "dog.gif"
    frames = [sample(200, 100), sample(200, 100).rotate(180)]
    path.write_bytes(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert predict(path, "--box", "10,10,60,80", "-o", tmp_path / "o").code == ExitCode.OK
    answer = json.loads((tmp_path / "o" / "dog.opex.json").read_text())
    assert "first frame of 2" in answer["meta"]["notes"]
    assert (answer["meta"]["width"], answer["meta"]["height"]) == ("200", "100")


def test_two_pictures_of_one_stem_get_outputs_of_their_own(picture: Path, tmp_path: Path) -> None:
    other = tmp_path / "x" / "dog.png"
    other.parent.mkdir()
    other.write_bytes(picture_bytes(".png"))
    assert (
        predict(picture, other, "--box", "5,5,30,30", "-f", "mask", "-o", tmp_path / "o").code
        == ExitCode.OK
    )
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["dog.mask.png", "dog~2.mask.png"]


@pytest.mark.parametrize(
    "flags",
    [
        *(
            ["--point", "a,b"],
            ["--point", "1"],
            ["--point", "1,2,3"],
            ["--point", "1,2,0"],
            ["--point", "nan,1"],
        ),
        *(
            ["--box", "1,2,3"],
            ["--box", "5,5,1,1"],
            ["--box", "1,1,5,5", "--box", "1,1,6,6", "--point", "3,3"],
        ),
    ],
)
def test_flags_that_make_no_prompt_end_with_2_and_say_why(
    picture: Path, tmp_path: Path, flags: list[str]
) -> None:
    run = predict(picture, *flags, "-o", tmp_path / "o")
    assert run.code == ExitCode.USAGE
    assert flags[0] in run.err or "point" in run.err


def test_predict_takes_rough_outlines_and_masks(picture: Path, tmp_path: Path) -> None:
    rough = np.zeros((100, 200), dtype=np.uint8)
    rough[20:70, 30:110] = 1  # not black is enough
    cv2.imwrite(str(tmp_path / "rough.png"), rough)
    for name, flags in (
        ("mask", ["--mask", tmp_path / "rough.png"]),
        ("polygon", ["--polygon", "30,20,110,20,110,70,30,70"]),
        ("points", ["--mask", tmp_path / "rough.png", "--point", "190,90,0"]),
    ):
        run = predict(picture, *flags, "-f", "mask", "-o", tmp_path / name)
        assert run.code == ExitCode.OK, run.err
        ys, xs = np.nonzero(cv2.imread(str(tmp_path / name / "dog.mask.png"), 0))
        found = (xs.min(), ys.min(), xs.max(), ys.max())
        assert found == pytest.approx((30, 20, 109, 69), abs=2)
    two = ["--mask", tmp_path / "rough.png", "--polygon", "120,5,190,5,150,90"]
    assert predict(picture, *two, "-f", "mask", "-o", tmp_path / "two").code == ExitCode.OK
    labels = np.unique(cv2.imread(str(tmp_path / "two/dog.mask.png"), -1))
    assert len(labels) == 3


def test_predict_and_check_read_the_mask_files_beside_a_prompt(
    picture: Path, tmp_path: Path
) -> None:
    prompt = picture.with_suffix(".json")
    prompt.write_text(
        '{"objects": [{"box": {"x0": 1, "y0": 1, "x1": 9, "y1": 9}}, {"mask": "dog.rough.png"}]}'
    )
    mask = picture.with_name("dog.rough.png")
    for size, said in ((None, "is not beside the prompt"), ((50, 50), "the mask is 50×50")):
        if size:
            cv2.imwrite(str(mask), np.full(size, 255, dtype=np.uint8))
        for line in (["predict", picture, "-m", "fake", "-o", tmp_path / "o"], ["check", prompt]):
            run = Run(*line)
            assert run.code == ExitCode.FAILED_JOBS
            assert said in run.err + run.out
            assert "objects[1].mask" in run.err + run.out
    cv2.imwrite(str(mask), np.full((100, 200), 255, dtype=np.uint8))
    assert Run("check", prompt, mask, picture.parent).code == ExitCode.OK
    run = predict(picture, "-f", "mask", "-o", tmp_path / "o")
    assert run.code == ExitCode.OK, run.err
    assert len(np.unique(cv2.imread(str(tmp_path / "o/dog.mask.png"), -1))) > 1


def test_rough_shapes_that_cannot_be_used_are_refused_and_say_why(
    picture: Path, tmp_path: Path
) -> None:
    size = (100, 200)
    for name, pixels in (
        ("black.png", np.zeros(size, dtype=np.uint8)),
        ("white.jpg", np.full(size, 255, dtype=np.uint8)),
        ("small.png", np.full((50, 50), 255, dtype=np.uint8)),
        ("white.png", np.full(size, 255, dtype=np.uint8)),
    ):
        cv2.imwrite(str(tmp_path / name), pixels)
    (tmp_path / "text.png").write_text("no picture")
    white, box = ["--mask", tmp_path / "white.png"], ["--box", "1,1,9,9"]
    for flags, code, said in (
        (["--polygon", "1,2,3,4"], ExitCode.USAGE, "--polygon"),
        (["--polygon", "1,1,2,2,3,3"], ExitCode.USAGE, "lie on one line"),
        (["--polygon", "1,1,90,2,500,3"], ExitCode.FAILED_JOBS, "polygon[2][0]"),
        (["--mask", tmp_path / "gone.png"], ExitCode.USAGE, "cannot be read"),
        (["--mask", tmp_path / "text.png"], ExitCode.USAGE, "text.png"),
        (["--mask", tmp_path / "black.png"], ExitCode.USAGE, "all pixels are black"),
        (["--mask", tmp_path / "white.jpg"], ExitCode.USAGE, "save it as a PNG"),
        (["--mask", tmp_path / "small.png"], ExitCode.FAILED_JOBS, "the mask is 50×50"),
        ([*white, *white, *box], ExitCode.USAGE, "ambiguous"),
        ([*white, *box, *box], ExitCode.USAGE, "ambiguous"),
        ([*white, "--everything"], ExitCode.USAGE, "cannot be combined"),
        ([*white, "--text", "dog"], ExitCode.USAGE, "cannot be combined"),
    ):
        run = predict(picture, *flags, "-o", tmp_path / "o")
        assert run.code == code, (flags, run.err)
        assert said in run.err


def test_predict_finds_all_objects_of_a_text(picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    run = predict(picture, "--text", "a b", "--text", "c", "--threshold", "0.85", "-o", out)
    assert run.code == ExitCode.OK, run.err
    assert [line.split()[2:4] for line in run.out.splitlines() if "dog.jpg" in line] == [
        ["a", "b"],
        ["c", "0.90"],
    ]
    answer = json.loads((out / "dog.opex.json").read_text())
    assert [entry["label"] for entry in answer["objects"]] == ["a b", "c"]
    nothing = predict(picture, "--text", "nothing", "-o", out)
    assert nothing.code == ExitCode.OK
    assert "nothing found" in nothing.out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--text", ""], "--text: is empty"),
        (["--text", "a", "--text", "a"], "given twice"),
        (["--text", "a", "--threshold", "2"], "--threshold: must be at most 1"),
        (["--threshold", "0.5"], "--threshold goes with --text"),
        (["--text", "a", "--box", "1,1,5,5"], "--text cannot be combined"),
        (["--text", "a", "--everything"], "cannot be combined"),
        (["--text", "a", "--label", "dog"], "--label"),
    ],
)
def test_texts_that_cannot_be_used_end_with_2_and_say_why(
    picture: Path, tmp_path: Path, flags: list[str], said: str
) -> None:
    run = predict(picture, *flags, "-o", tmp_path / "o")
    assert run.code == ExitCode.USAGE
    assert said in run.err


def test_a_bad_picture_does_not_keep_the_good_one_from_its_answer(
    picture: Path, tmp_path: Path
) -> None:
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


def test_an_output_that_cannot_be_written_is_said_and_not_tried_for_ever(
    picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "o").write_text("a file")
    run = predict(picture, "--box", "10,10,60,80", "-o", tmp_path / "o")
    assert run.code == ExitCode.USAGE
    assert "is not a folder" in run.err


@pytest.mark.parametrize(("error", "shown"), [("KeyboardInterrupt", False), ("ValueError", True)])
def test_ctrl_c_while_the_commands_are_imported_prints_no_traceback(
    error: str, shown: bool
) -> None:
    code = f"""
import builtins, sys
imported = builtins.__import__
def interrupted(name, *rest):
    if name == "typer":
        raise {error}
    return imported(name, *rest)
builtins.__import__ = interrupted
from sam_poll.cli.main import main
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == (1 if shown else -signal.SIGINT)
    assert ("Traceback" in ended.stderr) == shown, ended.stderr
    assert shown or not ended.stderr


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
        profile = {
            "driver": "GTiff",
            "width": 60_000,
            "height": 60_000,
            "count": 3,
            "dtype": "uint8",
        }
        sparse = {
            "tiled": True,
            "sparse_ok": True,
            "compress": "deflate",
            "transform": (0.1, 0, 9, 0, -0.1, 9),
        }
        with rasterio.open(path, "w", **profile, **sparse):
            pass
        share.drop(f"{stem}.json", prompt)
    run = Run("check", share.input)
    assert run.code == ExitCode.FAILED_JOBS
    assert "ortho" not in run.out
    assert "request a mosaic" in " ".join(run.out.split())
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
    assert "no job waits" in Run("status", share.input).out
    run = Run("retry", "--in", share.input)
    assert run.code == 0
    assert "dog" in run.out
    assert share.tree("input") == ["dog.jpg", "dog.json"]
    assert "waiting longest: dog.j" in Run("status", share.input).out


def test_retry_into_a_folder_that_does_not_exist_moves_nothing(share: Share) -> None:
    share.pair("dog", prompt={"box": 1})
    watch_once(share)
    run = Run("retry", "--in", share.input.with_name("inn"))
    assert run.code == ExitCode.SHARE
    assert not share.input.with_name("inn").exists()
    assert "dog.json" in share.tree("failed")


def test_retry_names_a_job_whose_name_is_taken_in_one_line(share: Share) -> None:
    share.pair("dog", prompt={"box": 1})
    watch_once(share)
    share.pair("dog")
    run = Run("retry", "--in", share.input)
    assert "0 jobs" in run.err
    (line,) = [line for line in run.err.splitlines() if "stays in failed/" in line]
    assert line.split("WARNING ")[1].strip() == (
        f"dog stays in failed/: {share.input}/dog.jpg is taken"
    )


@pytest.mark.slow
def test_status_shows_the_daemons_at_work_and_what_they_count(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no daemon runs on this share" in Run("status", share.input).out
    monkeypatch.setenv("SAM_POLL_LEASE_S", "2")

    def worker() -> dict[str, Any]:
        workers = json.loads(Run("status", share.input, "--json").out)["workers"]
        return workers[0] if workers else {}

    with daemon(share) as process:
        share.pair("dog")
        wait_until(lambda: worker().get("answered") == 1, 60)
        assert (worker()["pid"], worker()["model"], worker()["alive"]) == (
            process.pid,
            "fake",
            True,
        )
        (line,) = [
            line
            for line in Run("status", share.input).out.splitlines()
            if worker()["worker"] in line
        ]
        assert line.rstrip().endswith("s ago")
        assert " fake " in line
        process.kill()
        process.communicate(timeout=60)
    assert worker()["alive"] is False
    assert "dead, " in Run("status", share.input).out


def test_status_names_alarms_of_the_living_only_and_ends_with_0(share: Share) -> None:
    signs = Telemetry()
    signs.alarms.raise_("output", "No space left on device\x1b[2J")
    with FolderSource(
        share.layout,
        FolderOptions(lease_s=2.0, mode="poll"),
        alarms=signs.alarms,
        state=signs.state,
    ) as source:
        run = Run("status", share.input)
        report = json.loads(Run("status", share.input, "--json").out)
        (entry,) = share.work.glob("*worker*")
        left_behind = entry.read_bytes()
    assert run.code == ExitCode.OK
    assert f"alarm (output) of {source.worker}: No space left on device\\x1b[2J, for 0 s" in run.out
    ((worker, kind),) = [(alarm["worker"], alarm["kind"]) for alarm in report["alarms"]]
    assert (worker, kind) == (source.worker, "output")
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


def test_merge_makes_one_file_of_each_format_that_can_be_merged(
    share: Share, tmp_path: Path
) -> None:
    share.pair("cam1/a")
    share.pair("cam2/b")
    watch_once(share, "-f", "cvat", "-f", "coco", "-f", "yolo")
    for kind, start in (("cvat", b"<?xml"), ("coco", b"{"), ("yolo", b"PK")):
        target = tmp_path / f"task.{kind}"
        assert Run("merge", share.output, "--format", kind, "-o", target).code == ExitCode.OK
        assert target.read_bytes().startswith(start)


@pytest.mark.parametrize(
    ("kind", "file"), [("cvat", "all.cvat.xml"), ("coco", "cam1/all.coco.json")]
)
def test_merging_twice_into_the_folder_itself_doubles_nothing(
    share: Share, kind: str, file: str
) -> None:
    share.pair("cam1/dog")
    watch_once(share, "-f", kind)
    target = share.output / file
    written = set()
    for _ in range(2):
        assert Run("merge", share.output, "--format", kind, "-o", target).code == ExitCode.OK
        written.add(target.read_bytes())
    assert len(written) == 1


def test_merge_puts_the_share_prefix_before_the_names_of_all_formats(
    share: Share, tmp_path: Path
) -> None:
    share.pair("cam1/a")
    watch_once(share, "-f", "cvat", "-f", "coco", "-f", "yolo")
    for kind, listing in (("cvat", None), ("coco", None), ("yolo", "train.txt")):
        target = tmp_path / kind
        flags = ("--format", kind, "--share-prefix", "/cameras/x/", "-o", target)
        assert Run("merge", share.output, *flags).code == ExitCode.OK
        body = target.read_bytes()
        if listing:
            with zipfile.ZipFile(target) as archive:
                body = archive.read(listing)
        assert b"cameras/x/done/cam1/a.jpg" in body
        assert b"/cameras/x" not in body.replace(b"images/train/cameras/x", b"")
    run = Run("merge", share.output, "--share-prefix", "a/../..", "-o", tmp_path / "no.xml")
    assert run.code == ExitCode.USAGE
    assert "--share-prefix" in run.err
    assert not (tmp_path / "no.xml").exists()


def test_merge_refuses_two_pictures_that_cvat_cannot_tell_apart(
    share: Share, tmp_path: Path
) -> None:
    for suffix in (".jpg", ".png"):
        share.drop(f"dog{suffix}", picture_bytes(suffix))
        share.drop(f"dog{suffix}.json", BOX)
    watch_once(share, "-f", "cvat")
    run = Run("merge", share.output, "-o", tmp_path / "task.xml")
    assert run.code == ExitCode.FAILED_JOBS
    assert "'done/dog.png' is the same as 'done/dog.jpg'" in run.err
    assert "dog.png.cvat.xml" in run.err
    assert not (tmp_path / "task.xml").exists()


def test_merge_names_the_format_that_is_missing(share: Share, tmp_path: Path) -> None:
    share.pair("a")
    watch_once(share, "-f", "cvat")
    run = Run("merge", share.output, "--format", "coco", "-o", tmp_path / "x.json")
    assert run.code == ExitCode.USAGE
    assert "add `coco` to `formats`" in run.err


def test_merge_without_anything_to_merge_or_in_an_unknown_format_ends_with_2(
    share: Share, tmp_path: Path
) -> None:
    assert Run("merge", share.input, "-o", tmp_path / "x.xml").code == ExitCode.USAGE
    assert (
        Run("merge", share.input, "--format", "voc", "-o", tmp_path / "x.xml").code
        == ExitCode.USAGE
    )
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
    assert "part of this program" in Run("models", "verify", "demo").out


def test_an_unknown_model_cannot_be_downloaded() -> None:
    assert Run("models", "download", "nope").code == ExitCode.MODEL


def test_version_and_help() -> None:
    assert Run("--version").out.startswith("sam_poll ")
    assert "watch" in Run("--help").out
