"""`sam_predict_poll` takes Waikato's flags and file names, and gives what their readers expect."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import opex
import pytest
import torch

from sam_poll.cli import waikato_poll
from sam_poll.cli.waikato_scripts import SAM, SAM_HQ
from sam_poll.core.errors import ExitCode, ModelError, SettingsError
from tests.conftest import picture_bytes
from tests.support.networks import small_sam1, small_sam_hq

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
    base = [
        "--model",
        "fake",
        "--prediction_in",
        str(folders[0]),
        "--prediction_out",
        str(folders[1]),
        "--quiet",
    ]
    return waikato_poll.run([*base, "--poll_wait", "0.05", *flags])


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_file())


def test_three_pairs_give_png_and_json_that_opex_reads_and_the_inputs_move_beside_them(
    folders: tuple[Path, Path],
) -> None:
    assert run(folders) is ExitCode.OK
    assert names(folders[0]) == []
    expected = [
        f"{s}.{e}"
        for s, p in (("a", "jpg"), ("b", "jpeg"), ("C", "JPG"))
        for e in (p, "json", "png", "prompt")
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


def test_prediction_tmp_is_where_files_are_while_at_work(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    assert run(folders, "--prediction_tmp", str(tmp_path / "tmp"), "--use_watchdog") is ExitCode.OK
    assert (tmp_path / "tmp").is_dir()
    assert "a.png" in names(folders[1])


def test_what_fails_is_kept_with_its_reason_and_the_rest_is_answered(
    folders: tuple[Path, Path],
) -> None:
    (folders[0] / "a.prompt").write_text("{")
    assert run(folders) is ExitCode.FAILED_JOBS
    assert names(folders[1] / "failed") == ["a.error.json", "a.jpg", "a.prompt"]
    assert "b.png" in names(folders[1])


def test_a_json_beside_a_picture_is_no_prompt_here(folders: tuple[Path, Path]) -> None:
    (folders[0] / "d.jpg").write_bytes(picture_bytes())
    (folders[0] / "d.json").write_text(json.dumps(BOX))
    run(folders)
    assert names(folders[0]) == ["d.jpg", "d.json"]


def test_a_png_is_left_alone_because_the_mask_would_have_its_name(
    folders: tuple[Path, Path],
) -> None:
    (folders[0] / "d.png").write_bytes(picture_bytes(".png"))
    (folders[0] / "d.prompt").write_text(json.dumps(BOX))
    run(folders)
    assert names(folders[0]) == ["d.png", "d.prompt"]


def test_output_inside_input_is_refused(folders: tuple[Path, Path]) -> None:
    with pytest.raises(SettingsError, match="inside input"):
        run((folders[0], folders[0] / "out"))


def test_an_images_health_check_sees_that_it_is_alive(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAM_POLL_HEALTH__FILE", str(tmp_path / "alive"))
    monkeypatch.setenv("SAM_POLL_FORMATS", "[nonsense]")  # no other setting is read
    run(folders)
    assert (tmp_path / "alive").exists()


def test_an_error_ends_the_command_with_its_code_and_one_line(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [
        "--model",
        "nonsense",
        "--prediction_in",
        str(folders[0]),
        "--prediction_out",
        str(folders[1]),
        "--quiet",
    ]
    monkeypatch.setattr("sys.argv", ["sam_predict_poll", *flags])
    with pytest.raises(SystemExit) as ended:
        waikato_poll.main()
    assert ended.value.code == ExitCode.MODEL
    assert "there is no model `nonsense`" in capsys.readouterr().err


# ── SAM-HQ ──


def run_hq(folders: tuple[Path, Path], *flags: str) -> ExitCode:
    base = ["--prediction_in", str(folders[0]), "--prediction_out", str(folders[1]), "--quiet"]
    return waikato_poll.run([*base, "--poll_wait", "0.05", *flags], SAM_HQ)


def test_samhq_predict_poll_answers_with_sam_hq(folders: tuple[Path, Path], tmp_path: Path) -> None:
    torch.save(small_sam_hq(128).state_dict(), tmp_path / "hq.pth")
    assert run_hq(folders, "--model", str(tmp_path / "hq.pth"), "--device", "cpu") is ExitCode.OK
    assert {f"{stem}.png" for stem in "abC"} <= set(names(folders[1]))
    assert json.loads((folders[1] / "a.json").read_text())["meta"]["family"] == "sam-hq"


def test_samhq_predict_poll_refuses_weights_of_another_family_or_type(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    torch.save(small_sam1(256).state_dict(), tmp_path / "sam.pth")
    with pytest.raises(ModelError, match="sam-hq was requested, but these are weights of sam1"):
        run_hq(folders, "--model", str(tmp_path / "sam.pth"), "--device", "cpu")
    torch.save(small_sam_hq(128).state_dict(), tmp_path / "hq.pth")
    flags = ("--model", str(tmp_path / "hq.pth"), "--model_type", "vit_tiny", "--device", "cpu")
    with pytest.raises(ModelError, match="sam_hq_vit_tiny was requested"):
        run_hq(folders, *flags)
    assert "a.jpg" in names(folders[0])


def test_model_types_are_those_of_the_originals(capsys: pytest.CaptureFixture[str]) -> None:
    required = ["--model", "x", "--prediction_in", "a", "--prediction_out", "b"]
    for scripts, types in (
        (SAM, "default vit_h vit_l vit_b"),
        (SAM_HQ, "default vit_h vit_l vit_b vit_tiny"),
    ):
        parser = waikato_poll.parser(scripts)
        for name in types.split():
            flags = parser.parse_args([*required, "--model_type", name])
            wanted = "vit_h" if name == "default" else name
            expected = wanted if scripts is SAM else f"sam_hq_{wanted}"
            assert scripts.model_type_of(flags) == expected
        with pytest.raises(SystemExit):
            parser.parse_args([*required, "--model_type", "vit_x"])
    assert SAM.model_type_of(waikato_poll.parser(SAM).parse_args(required)) is None
    with pytest.raises(SystemExit):
        waikato_poll.parser(SAM_HQ).parse_args([*required, "--config", "x.yaml"])


def test_all_of_their_flags_are_known() -> None:
    flags = (
        "--model --model_type --config --device --prediction_in --prediction_out --prediction_tmp "
        "--poll_wait "
        "--continuous --use_watchdog --watchdog_check_interval --delete_input --verbose --quiet"
    )
    known = {
        option for action in waikato_poll.parser()._actions for option in action.option_strings
    }
    assert set(flags.split()) <= known


def test_a_bad_flag_ends_with_usage() -> None:
    with pytest.raises(SystemExit) as ended:
        waikato_poll.run(["--nonsense"])
    assert ended.value.code == ExitCode.USAGE
