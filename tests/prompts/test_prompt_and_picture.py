"""A prompt that was made for another picture, or in other units, is refused in the same words
wherever it comes in.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sam_poll.cli import main
from sam_poll.core.errors import ExitCode, PromptError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import Box, Point, Prompt, Size
from sam_poll.integrations.redis import messages
from sam_poll.prompts import parser
from sam_poll.prompts.parser import check_size, fit
from tests.conftest import Share, picture_bytes
from tests.support.dropped_annotations import BOXED, xml
from tests.support.http_server import in_base64, running_site
from tests.support.pipelines import MemorySource, run
from tests.support.strategies import encoded, sample

BOX = {"x0": 10, "y0": 10, "x1": 50, "y1": 40}
TURNED = encoded(sample(48, 64), "JPEG", orientation=6)  # 64×48 upright


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "400"}).invoke(main.app, list(map(str, arguments)))
    return result.exit_code, result.stdout + result.stderr


# ── the ways in: what is said of one picture and one prompt; "" where it is answered ──


def by_folder(root: Path, picture: bytes, prompt: Any) -> str:
    share = Share(root)
    share.drop("dog.jpg", picture)
    share.drop("dog.json", prompt)
    if share.run_once().answered:
        return ""
    error = share.error("dog")
    return f"{error['place']}: {error['reason']} ({error['remedy']})"


def by_http(root: Path, picture: bytes, prompt: Any) -> str:
    with running_site() as site:
        answer = site.post("/predict", {"picture": in_base64(picture), "prompt": prompt})
    return "" if answer.status_code == 200 else json.dumps(answer.json(), ensure_ascii=False)


def by_redis(root: Path, picture: bytes, prompt: Any) -> str:
    said = {"image": base64.b64encode(picture).decode(), "prompt": prompt, "id": "dog"}
    source = MemorySource(
        [messages.parse_message(json.dumps(said).encode(), parser.parse).job("dog", None)]
    )
    run(source)
    return str(source.rejected.get("dog", ""))


def by_predict(root: Path, picture: bytes, prompt: Any) -> str:
    root.mkdir()
    (root / "dog.jpg").write_bytes(picture)
    (root / "dog.json").write_text(json.dumps(prompt))
    code, text = command("predict", "-m", "fake", root / "dog.jpg", "-o", root / "out")
    return "" if code == ExitCode.OK else text


def by_check(root: Path, picture: bytes, prompt: Any) -> str:
    root.mkdir()
    (root / "dog.jpg").write_bytes(picture)
    (root / "dog.json").write_text(json.dumps(prompt))
    code, text = command("check", root)
    return "" if code == ExitCode.OK else text


WAYS: list[Callable[[Path, bytes, Any], str]] = [by_folder, by_http, by_redis, by_predict, by_check]

FOREIGN = {
    "a box of fractions": (
        {"box": {"x0": 0.1, "y0": 0.2, "x1": 0.6, "y1": 0.9}},
        ["normalised coordinates"],
    ),
    "points of fractions": ({"points": [{"x": 0.25, "y": 0.5}]}, ["normalised coordinates"]),
    "another size": (
        {"image_size": {"width": 640, "height": 480}, "box": BOX},
        ["64×48", "640×480"],
    ),
    "the size before the turn": (
        {"image_size": {"width": 48, "height": 64}, "box": BOX},
        ["48×64", "EXIF turn"],
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_prompt_for_another_picture_is_refused_alike_on_every_way_in(
    tmp_path: Path, kind: str, way: Callable[[Path, bytes, Any], str]
) -> None:
    prompt, words = FOREIGN[kind]
    said = way(tmp_path / "share", TURNED, prompt)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_for_this_very_picture_is_answered_on_every_way_in(
    tmp_path: Path, way: Callable[[Path, bytes, Any], str]
) -> None:
    assert (
        way(tmp_path / "share", TURNED, {"image_size": {"width": 64.0, "height": 48}, "box": BOX})
        == ""
    )


# ── fractions ──


@pytest.mark.parametrize(
    "prompt",
    [
        Prompt(box=Box(0.1, 0.2, 0.5, 0.9)),
        Prompt(box=Box(0, 0, 1, 1)),
        Prompt(points=(Point(30, 20),), box=Box(0.1, 0.2, 0.5, 0.9)),
        Prompt(points=(Point(0.5, 0.5), Point(0.1, 0.9, 0))),
    ],
)
def test_coordinates_between_0_and_1_are_refused_with_what_to_do(prompt: Prompt) -> None:
    with pytest.raises(PromptError, match="normalised coordinates") as caught:
        fit([prompt], Size(640, 480))
    assert caught.value.place in ("box", "points")
    assert "multiply x by 640 and y by 480" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    ("prompt", "size"),
    [
        (Prompt(box=Box(0, 0, 2, 1)), Size(640, 480)),
        (Prompt(box=Box(0.5, 0.5, 1.5, 1)), Size(640, 480)),
        (Prompt(points=(Point(0, 0),)), Size(640, 480)),
        (Prompt(points=(Point(1, 1),)), Size(640, 480)),
        (Prompt(points=(Point(0.5, 0.5), Point(3, 4))), Size(640, 480)),
        (Prompt(points=(Point(0.5, 0.5),), box=Box(0, 0, 64, 48)), Size(640, 480)),
        (Prompt(box=Box(0, 0, 1, 1)), Size(2, 2)),
        (Prompt(points=(Point(0.5, 0.5),)), Size(1, 1)),
    ],
)
def test_small_pictures_and_clicks_on_whole_pixels_are_not_taken_for_fractions(
    prompt: Prompt, size: Size
) -> None:
    fit([prompt], size)


def test_of_several_objects_the_one_of_fractions_is_named() -> None:
    with pytest.raises(PromptError) as caught:
        fit([Prompt(box=Box(1, 1, 9, 9)), Prompt(box=Box(0.1, 0.1, 0.9, 0.9))], Size(64, 48))
    assert caught.value.place == "objects[1].box"


# ── sizes ──


def test_a_prompt_that_states_no_size_fits_any_picture() -> None:
    check_size(None, Size(1, 2))


def test_the_size_of_a_mosaics_picture_is_compared_too(share: Share) -> None:
    pytest.importorskip("rasterio")
    from sam_poll.core.types import Job, Mosaic
    from sam_poll.mosaic.job import begin

    picture = share.drop("ortho.png", picture_bytes(".png"))
    scratch = SafePath.at(share.root)
    job = Job(
        "ortho",
        "ortho.png",
        SafePath.beside(picture),
        Mosaic(),
        image_size=Size(640, 480),
        scratch=scratch,
    )
    with pytest.raises(PromptError, match="64×48, but the prompt was made for 640×480"):
        begin(job, lambda: None, model="fake")


@pytest.mark.parametrize(
    "size", [{"width": 0, "height": 4}, {"width": 4}, [4, 4], "4x4", {"width": 4.5, "height": 4}]
)
def test_a_size_that_is_none_is_refused_with_its_place(size: Any) -> None:
    with pytest.raises(PromptError) as caught:
        parser.parse(json.dumps({"image_size": size, "box": BOX}).encode())
    assert (caught.value.place or "").startswith("image_size")


# ── annotations dropped into the folder ──


@pytest.fixture
def share(tmp_path: Path) -> Share:
    return Share(tmp_path / "share")


@pytest.mark.parametrize("early", [True, False])
def test_annotations_of_another_size_are_refused_for_that_picture_alone_whenever_it_comes(
    share: Share, early: bool
) -> None:
    share.drop("annotations.xml", xml(("a.jpg", BOXED), ("b.jpg", BOXED)))
    share.drop("a.jpg", picture_bytes())
    if early:
        share.drop("b.jpg", picture_bytes(width=128, height=96))
    share.run_once()
    if not early:
        share.drop("b.jpg", picture_bytes(width=128, height=96))
        share.run_once()
    assert share.tree("output") == ["a.annotations.mask.png"]
    error = share.error("b.annotations")
    assert error["place"] == "image_size"
    assert "the picture is 128×96, but the prompt was made for 64×48" in error["reason"]


def test_annotations_made_on_the_unturned_picture_are_refused_as_such(share: Share) -> None:
    share.drop("a.jpg", TURNED)
    text = xml(("a.jpg", BOXED)).replace('width="64" height="48"', 'width="48" height="64"')
    share.drop("annotations.xml", text.replace('xbr="50"', 'xbr="40"'))
    assert share.run_once().answered == 0
    assert "EXIF turn" in share.error("a.annotations")["reason"]


@pytest.mark.parametrize("bad", ['xtl="nan"', 'xtl="900"', 'xtl="60"'])
def test_one_bad_box_of_annotations_refuses_its_object_and_not_its_pictures_others(
    share: Share, bad: str
) -> None:
    share.drop("a.jpg", picture_bytes())
    share.drop(
        "annotations.xml",
        xml(("a.jpg", BOXED + BOXED.replace('xtl="10"', bad).replace("dog", "cat"))),
    )
    counts = share.run_once()
    assert (counts.answered, counts.rejected) == (1, 0)
    (prompt,) = parser.parse((share.done / "a.annotations.json").read_bytes()).prompts  # type: ignore[misc]
    assert prompt.label == "dog"
    assert prompt.notes[0].startswith('object 2 "cat"')


def test_notes_of_a_prompt_are_in_its_answer(share: Share) -> None:
    share.drop("a.jpg", picture_bytes())
    share.drop("a.json", {"objects": [{"box": BOX}], "notes": ["seen twice"]})
    code, text = command(
        "watch", share.input, "--once", "-m", "fake", "-f", "opex", "--log", "text"
    )
    assert code == ExitCode.OK, text
    assert "seen twice" in json.dumps(
        json.loads((share.output / "a.opex.json").read_text())["meta"]
    )


# ── check ──


def test_check_compares_annotations_with_the_pictures_beside_them(share: Share) -> None:
    share.drop("cam1/a.jpg", picture_bytes(width=128, height=96))
    share.drop("annotations.xml", xml(("in/cam1/a.jpg", BOXED)))
    code, text = command("check", share.input)
    assert code == ExitCode.FAILED_JOBS
    assert (
        'image "in/cam1/a.jpg", image_size: the picture is 128×96, '
        "but the prompt was made for 64×48" in text
    )


def test_check_finds_the_pictures_of_a_task_in_done(share: Share) -> None:
    (share.root / "done").mkdir()
    (share.root / "done/a.jpg").write_bytes(picture_bytes(width=128, height=96))
    share.drop("annotations.xml", xml(("done/a.jpg", BOXED)))
    code, text = command("check", share.input)
    assert code == ExitCode.FAILED_JOBS
    assert "128×96" in text


def test_check_names_a_bad_box_among_good_ones(share: Share) -> None:
    share.drop("annotations.xml", xml(("a.jpg", BOXED + BOXED.replace('"10"', '"nan"'))))
    code, text = command("check", share.input)
    assert code == ExitCode.FAILED_JOBS
    assert 'image "a.jpg", object 2 "dog"' in text


# ── labels ──


@pytest.mark.parametrize("label", ["", "  ", "a\nb", "x" * 201])
def test_a_label_that_no_prompt_file_may_have_is_no_label_of_predict_either(
    tmp_path: Path, label: str
) -> None:
    (tmp_path / "dog.jpg").write_bytes(picture_bytes())
    picture = tmp_path / "dog.jpg"
    code, text = command(
        "predict", "-m", "fake", picture, "--box", "1,1,9,9", "--label", label, "-o", tmp_path / "o"
    )
    assert code == ExitCode.USAGE
    assert "--label" in text
    with pytest.raises(PromptError):
        parser.parse(json.dumps({"label": label, "box": BOX}).encode())
