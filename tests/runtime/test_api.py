"""The Python interface: what it predicts and saves is what the commands predict and write."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

import sam_poll
from sam_poll.core.errors import (
    ModelError,
    PictureError,
    PromptError,
    SettingsError,
    ShareError,
)
from tests.support.paths import ROOT

PICTURE = ROOT / "examples" / "demo" / "in" / "tray.jpg"


@pytest.fixture(scope="module")
def model() -> sam_poll.Model:
    return sam_poll.load("demo", device="cpu")


def prompt_of(picture: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(picture.with_suffix(".json").read_text())
    return content


@pytest.mark.slow
def test_one_format_may_be_named_without_a_list(model: sam_poll.Model, tmp_path: Path) -> None:
    result = model.predict(np.zeros((64, 64, 3), np.uint8), {"points": [{"x": 30, "y": 30}]})
    assert result.save(tmp_path, "mask") == [tmp_path / "image.mask.png"]


def test_saved_files_are_those_of_the_command(model: sam_poll.Model, tmp_path: Path) -> None:
    formats = ["mask", "opex", "coco", "cvat", "yolo", "overlay"]
    result = model.predict(PICTURE, prompt_of(PICTURE))
    paths = result.save(tmp_path / "api" / "deeper", formats)
    command = [sys.executable, "-m", "sam_poll", "predict", str(PICTURE), "-m", "demo"]
    flags = [flag for name in formats for flag in ("--format", name)]
    subprocess.run([*command, "--device", "cpu", "-o", tmp_path / "cli", *flags], check=True)
    written = {path.name: path.read_bytes() for path in (tmp_path / "cli").iterdir()}
    assert {path.name for path in paths} == set(written)
    for path in paths:
        assert path.parent == tmp_path / "api" / "deeper"
        if path.name.endswith(".opex.json"):  # it says when it was made
            assert (
                json.loads(path.read_text())["objects"] == json.loads(written[path.name])["objects"]
            )
        else:
            assert path.read_bytes() == written[path.name], path.name


def test_objects_agree_in_all_their_forms(model: sam_poll.Model) -> None:
    content = prompt_of(PICTURE)
    result = model.predict(PICTURE, content)
    assert len(result.objects) == len(content["objects"])
    assert [one.label for one in result.objects] == [
        entry.get("label", "object") for entry in content["objects"]
    ]
    for one, mask in zip(result.objects, result.masks, strict=True):
        assert mask.shape == (result.size.height, result.size.width)
        assert mask.dtype == bool
        assert one.area == mask.sum() > 0
        rows, columns = np.nonzero(mask)
        assert one.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
        np.testing.assert_array_equal(coco_mask.decode(one.rle()).astype(bool), mask)
        drawn = np.zeros(mask.shape, np.uint8)
        for outline, holes in one.polygons(tolerance_px=0):
            cv2.fillPoly(drawn, [np.rint(p).astype(np.int32) for p in (outline, *holes)], 1)
        assert (drawn.astype(bool) & mask).sum() / (drawn.astype(bool) | mask).sum() > 0.98
        assert 0 < one.score <= 1.1


def test_image_may_be_a_path_a_files_bytes_or_pixels(model: sam_poll.Model, tmp_path: Path) -> None:
    content = prompt_of(PICTURE)
    pixels = cv2.cvtColor(cv2.imread(str(PICTURE)), cv2.COLOR_BGR2RGB)
    link = tmp_path / "link.jpg"
    link.symlink_to(PICTURE)
    expected = model.predict(PICTURE, content).masks
    for image in (str(PICTURE), PICTURE.read_bytes(), pixels, link):
        result = model.predict(image, content)
        np.testing.assert_array_equal(result.masks, expected)
    (saved,) = model.predict(pixels, content, name="cam1/dog.png").save(tmp_path, ["coco"])
    assert saved == tmp_path / "dog.coco.json"
    assert json.loads(saved.read_text())["images"][0]["file_name"] == "cam1/dog.png"
    (saved,) = model.predict(pixels, content).save(tmp_path, ["mask"], name="cam1/dog")
    assert saved == tmp_path / "cam1" / "dog.mask.png"


def test_values_of_numpy_may_be_among_the_prompts(model: sam_poll.Model) -> None:
    box = np.array([100, 80, 260, 220], dtype=np.float32)
    plain = {"x0": 100, "y0": 80, "x1": 260, "y1": 220}
    by_numpy = model.predict(PICTURE, {"box": dict(zip(plain, box, strict=True))})
    assert by_numpy.objects[0].score == model.predict(PICTURE, {"box": plain}).objects[0].score


@pytest.mark.slow
def test_everything_comes_best_first_and_nothing_found_is_no_error(model: sam_poll.Model) -> None:
    scores = [one.score for one in model.predict(PICTURE, {"everything": True}).objects]
    assert scores == sorted(scores, reverse=True)
    assert scores
    empty = np.zeros((64, 64, 3), np.uint8)
    result = model.predict(empty, {"everything": {"min_area": 4000}})
    assert result.masks.shape == (0, 64, 64)
    assert result.notes


def test_predict_from_several_threads_gives_each_its_own_answer(model: sam_poll.Model) -> None:
    boxes = [{"x0": 10 * n, "y0": 10, "x1": 10 * n + 90, "y1": 120} for n in range(6)]
    expected = [model.predict(PICTURE, {"box": box}).masks for box in boxes]
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        found[number] = model.predict(PICTURE, {"box": boxes[number]}).masks

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, masks in enumerate(expected):
        np.testing.assert_array_equal(found[number], masks)


@pytest.mark.parametrize(
    ("image", "prompts", "error", "place"),
    [
        ("missing.jpg", {"everything": True}, PictureError, "missing.jpg"),
        (str(ROOT), {"everything": True}, PictureError, ROOT.name),
        (b"no picture", {"everything": True}, PictureError, "image"),
        (np.zeros((4, 4), np.uint8), {"everything": True}, PictureError, "image"),
        (PICTURE, {"box": {"x0": 1}}, PromptError, "box.y0"),
        (PICTURE, {"box": object()}, PromptError, "top level"),
        (PICTURE, [1], PromptError, "top level"),
        (PICTURE, {"points": [{"x": 9000, "y": 1, "label": 1}]}, PromptError, "points[0].x"),
        (PICTURE, {"mosaic": True}, PromptError, "mosaic"),
    ],
    ids=[
        *("missing", "folder", "no-picture", "grey", "half-a-box", "no-json", "no-mapping"),
        *("outside", "mosaic"),
    ],
)
def test_wrong_input_is_an_error_with_its_place(
    model: sam_poll.Model, image: Any, prompts: Any, error: type[PromptError], place: str
) -> None:
    with pytest.raises(error) as raised:
        model.predict(image, prompts)
    assert raised.value.place == place
    assert raised.value.reason


def test_wrong_arguments_are_errors_of_their_own(model: sam_poll.Model, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="sam_vit_b"):
        sam_poll.load("no-such-model")
    with pytest.raises(SettingsError, match="device"):
        sam_poll.load("demo", devise="cpu")
    result = model.predict(PICTURE, {"box": {"x0": 1, "y0": 1, "x1": 50, "y1": 50}})
    with pytest.raises(SettingsError, match="coco"):
        result.save(tmp_path, ["cocoa"])
    with pytest.raises(ValueError, match="below"):
        result.save(tmp_path, name="../outside")
    (tmp_path / "file").write_text("")
    with pytest.raises(ShareError) as raised:
        result.save(tmp_path / "file")
    assert raised.value.place == str(tmp_path / "file")


def test_import_is_quick_and_names_what_is_public() -> None:
    code = (
        "import sys, sam_poll; assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules);"
        "assert {'load', 'Model', 'Prediction', 'PredictedObject'} <= set(dir(sam_poll));"
        "sam_poll.no_such_name"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stderr.strip().endswith("module 'sam_poll' has no attribute 'no_such_name'")


def test_docs_name_every_public_attribute_and_their_example_runs(
    model: sam_poll.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    for owner, word in ((sam_poll.Prediction, "result"), (sam_poll.PredictedObject, "one")):
        for name in vars(owner):
            assert name.startswith("_") or f"{word}.{name}" in text, name
    (example,) = re.findall(r"```python\n(.+?)```", text, re.DOTALL)
    ast.parse(example)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog.jpg").write_bytes(PICTURE.read_bytes())
    monkeypatch.setattr(sam_poll, "load", lambda name: model, raising=False)
    exec(compile(example, "docs/python.md", "exec"), {})
    assert sorted(path.name for path in (tmp_path / "answers").iterdir()) == [
        "dog.coco.json",
        "dog.mask.png",
    ]


def test_texts_find_objects_with_a_model_that_takes_them_and_are_refused_by_others(
    model: sam_poll.Model,
) -> None:
    fake = sam_poll.load("fake")
    result = fake.predict(PICTURE, {"text": ["a b", "nothing"]})
    assert [one.label for one in result.objects] == ["a b", "a b"]
    assert any("nothing found" in note for note in result.notes)
    with pytest.raises(PromptError, match="facebook/sam3"):
        model.predict(PICTURE, {"text": "dog"})
