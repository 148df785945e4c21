"""`sam_predict_poll` takes Waikato's flags and file names, and gives what their readers expect."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import opex
import pytest

from sam_poll import waikato
from sam_poll.errors import ExitCode, SettingsError
from tests.conftest import picture_bytes

POINTS = {"points": [{"x": 30, "y": 20, "label": 1}, {"x": 2, "y": 2, "label": 0}]}
BOX = {"box": {"x0": 10, "y0": 5, "x1": 50, "y1": 40}}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    for name, prompt in (("a.jpg", POINTS), ("b.jpeg", BOX), ("C.JPG", {**POINTS, **BOX})):
        (source / name).write_bytes(picture_bytes())
        (source / name).with_suffix(".prompt").write_text(json.dumps(prompt))
    return source, out


def run(folders: tuple[Path, Path], *flags: str) -> ExitCode:
    base = ["--model", "fake", "--prediction_in", str(folders[0]), "--prediction_out", str(folders[1]), "--quiet"]
    return waikato.run([*base, "--poll_wait", "0.05", *flags])


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_file())


def test_three_pairs_give_png_and_json_that_opex_reads_and_the_inputs_move_beside_them(
    folders: tuple[Path, Path],
) -> None:
    assert run(folders) is ExitCode.OK
    assert names(folders[0]) == []
    expected = [
        f"{s}.{e}" for s, p in (("a", "jpg"), ("b", "jpeg"), ("C", "JPG")) for e in (p, "json", "png", "prompt")
    ]
    assert names(folders[1]) == sorted(expected)
    for stem in "abC":
        mask = cv2.imread(str(folders[1] / f"{stem}.png"), cv2.IMREAD_UNCHANGED)
        assert mask.shape == (48, 64)
        assert set(mask.flat) == {0, 255}
        read = opex.ObjectPredictions.load_json_from_file(str(folders[1] / f"{stem}.json"))
        assert read.id == stem
        assert len(read.objects) >= 1
        assert read.objects[0].polygon.points


def test_delete_input_leaves_predictions_only(folders: tuple[Path, Path]) -> None:
    assert run(folders, "--delete_input") is ExitCode.OK
    assert names(folders[0]) == []
    assert names(folders[1]) == sorted(f"{s}.{e}" for s in "abC" for e in ("json", "png"))


def test_prediction_tmp_is_where_files_are_while_at_work(folders: tuple[Path, Path], tmp_path: Path) -> None:
    assert run(folders, "--prediction_tmp", str(tmp_path / "tmp"), "--use_watchdog") is ExitCode.OK
    assert (tmp_path / "tmp").is_dir()
    assert "a.png" in names(folders[1])


def test_what_fails_is_kept_with_its_reason_and_the_rest_is_answered(folders: tuple[Path, Path]) -> None:
    (folders[0] / "a.prompt").write_text("{")
    assert run(folders) is ExitCode.FAILED_JOBS
    assert names(folders[1] / "failed") == ["a.error.json", "a.jpg", "a.prompt"]
    assert "b.png" in names(folders[1])


def test_a_json_beside_a_picture_is_no_prompt_here(folders: tuple[Path, Path]) -> None:
    (folders[0] / "d.jpg").write_bytes(picture_bytes())
    (folders[0] / "d.json").write_text(json.dumps(BOX))
    run(folders)
    assert names(folders[0]) == ["d.jpg", "d.json"]


def test_a_png_is_left_alone_because_the_mask_would_have_its_name(folders: tuple[Path, Path]) -> None:
    (folders[0] / "d.png").write_bytes(picture_bytes(".png"))
    (folders[0] / "d.prompt").write_text(json.dumps(BOX))
    run(folders)
    assert names(folders[0]) == ["d.png", "d.prompt"]


def test_output_inside_input_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(SettingsError, match="inside input"):
        run((folders[0], folders[0] / "out"))


def test_an_error_ends_the_command_with_its_code_and_one_line(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", "nonsense", "--prediction_in", str(folders[0]), "--prediction_out", str(folders[1]), "--quiet"]
    monkeypatch.setattr("sys.argv", ["sam_predict_poll", *flags])
    with pytest.raises(SystemExit) as ended:
        waikato.main()
    assert ended.value.code == ExitCode.MODEL
    assert "there is no model `nonsense`" in capsys.readouterr().err


def test_all_of_their_flags_are_known() -> None:
    flags = (
        "--model --model_type --config --device --prediction_in --prediction_out --prediction_tmp --poll_wait "
        "--continuous --use_watchdog --watchdog_check_interval --delete_input --verbose --quiet"
    )
    known = {option for action in waikato.parser()._actions for option in action.option_strings}
    assert set(flags.split()) <= known


def test_a_bad_flag_ends_with_usage() -> None:
    with pytest.raises(SystemExit) as ended:
        waikato.run(["--nonsense"])
    assert ended.value.code == ExitCode.USAGE
