"""Tests of `cvat masks`: masks are exact, written once, and no interruption loses anything."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from sam_poll.cli.main import app
from sam_poll.config import settings
from sam_poll.core.errors import CvatError, ExitCode, PictureError, ShareError, UsageError
from sam_poll.core.types import BoolArray, Size
from sam_poll.engines.fake import FakeEngine
from sam_poll.imaging import masks as geometry
from sam_poll.integrations.cvat import client, credentials, masks, shapes
from sam_poll.integrations.cvat.journal import Journal
from sam_poll.integrations.cvat.masks import MasksOptions
from sam_poll.integrations.cvat.task_source import ServerPictures
from sam_poll.integrations.cvat.transport import RequestFailedError
from tests.conftest import picture_bytes
from tests.support.cvat_commands import ONCE, QUICK, SIZE, CommandRun
from tests.support.cvat_interruptions import LethalWrites
from tests.support.cvat_real import logged_in_sdk
from tests.support.cvat_server import (
    ANNOTATOR,
    PASSWORD,
    READER,
    TOKEN,
    USER,
    Fault,
    Job,
    StandIn,
    Task,
    is_empty,
    score_spec,
    served,
)
from tools import scenes


def boxed(memory: StandIn, *labels: Any) -> Task:
    """Three pictures: two boxes, a box with a click of its group, a single click; and a polygon."""
    frames = [(f"done/cam1/{n}.png", picture_bytes(".png", *SIZE, seed=n)) for n in range(3)]
    task = memory.add_task("cam1", frames, *(labels or ("dog", "cat")))
    memory.draw(task, 0, "rectangle", "dog", [5.3, 5.4, 30.2, 30.1], occluded=True, z_order=3)
    memory.draw(task, 0, "rectangle", "cat", [32.5, 8, 60, 40.25])
    memory.draw(task, 1, "rectangle", "dog", [10.2, 10.2, 40.3, 40.3], group=4)
    memory.draw(task, 1, "points", "dog", [20, 20, 24, 26], group=4)
    memory.draw(task, 2, "points", "cat", [30, 30])
    memory.draw(task, 2, "polygon", "dog", [1, 1, 9, 1, 9, 9])
    return task


def overlapping(memory: StandIn, *labels: Any) -> Task:
    """A video of 8 frames in two jobs, 0–4 and 3–7, with a box on each frame and a click on one.

    Frame 3 has a further box in the second job only.
    """
    frames = [(f"{n}.png", picture_bytes(".png", *SIZE, seed=n)) for n in range(8)]
    task = memory.add_task("video", frames, *(labels or ("dog", "cat")))
    task.is_video = True
    first, second = memory.split(task, segment_size=5, overlap=2)
    assert (first.stop, second.start, second.stop) == (4, 3, 7)
    for n in range(8):
        memory.draw(task, n, "rectangle", "dog", [5 + n, 5, 30 + n, 30])
    memory.draw(task, 4, "points", "cat", [40, 30])
    memory.draw(task, 3, "rectangle", "cat", [33, 8, 60, 40], job=second)
    return task


def refuse_writes(memory: StandIn, status: int = 403) -> None:
    """Answer every request that would change annotations with this status."""

    def refused(method: str, path: str) -> Fault | None:
        return Fault(status) if is_write(memory, method) else None

    memory.when = refused


def is_write(memory: StandIn, method: str) -> bool:
    return method == "PATCH" and not is_empty(memory.bodies[-1])


def kinds(job: Job) -> list[tuple[int, str]]:
    """Return frame and type of the shapes of a job."""
    return sorted((shape["frame"], shape["type"]) for shape in job.shapes)


class Run(CommandRun):
    """`cvat masks` on one machine."""

    command = staticmethod(masks.run)
    options = MasksOptions
    flags: ClassVar[dict[str, str]] = {"model": "demo", "device": "cpu"}

    @property
    def decoded(self) -> int:
        return self.calls("decode")


@pytest.fixture
def run(host: str, tmp_path: Path) -> Run:
    return Run(host, tmp_path / "state")


def of(task: Task, kind: str) -> list[dict[str, Any]]:
    return [shape for shape in task.shapes if shape["type"] == kind]


def bitmap(shape: dict[str, Any], size: Size) -> BoolArray:
    return geometry.paste(shapes.mask_of(shape["points"], "", 0.0), size)


# ── the whole trip ──


def drawn_scenes(memory: StandIn) -> tuple[Task, list[scenes.Scene]]:
    drawn = [scenes.draw(seed, (320, 240), difficulty=0, count=(2, 2)) for seed in (7, 30)]
    files = [
        cv2.imencode(".png", np.ascontiguousarray(scene.pixels[..., ::-1]))[1].tobytes()
        for scene in drawn
    ]
    task = memory.add_task(
        "scenes", [(f"done/{n}.png", data) for n, data in enumerate(files)], "shape"
    )
    for frame, scene in enumerate(drawn):
        for mask in scene.masks:
            box = scenes.box_of(mask)
            memory.draw(task, frame, "rectangle", "shape", [box.x0, box.y0, box.x1, box.y1])
    return task, drawn


def test_masks_command_segments_what_is_in_a_tasks_boxes(
    memory: StandIn, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, drawn = drawn_scenes(memory)
    monkeypatch.setenv("CVAT_HOST", host)
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", TOKEN)
    command = [
        "cvat",
        "masks",
        str(task.id),
        "-m",
        "demo",
        "--device",
        "cpu",
        "--state",
        str(tmp_path),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "4 masks written" in done.output
    made = of(task, "mask")
    assert len(of(task, "rectangle")) == len(made) == 4
    assert {(shape["source"], shape["group"]) for shape in made} == {("auto", 0)}
    assert all(0 < float(shape["attributes"][0]["value"]) <= 1 for shape in made)
    for frame, scene in enumerate(drawn):
        found = [bitmap(shape, scene.size) for shape in made if shape["frame"] == frame]
        for truth, mask in zip(scene.masks, found, strict=True):
            assert scenes.iou(mask, truth) > 0.85


def test_pictures_from_the_share_and_from_the_server_give_the_same_masks(
    memory: StandIn, run: Run, tmp_path: Path
) -> None:
    task = boxed(memory)
    for name, data in task.frames:
        (tmp_path / "share" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "share" / name).write_bytes(data)
    assert run(task, images=tmp_path / "share") == ExitCode.OK
    assert not any("/data?" in line for line in memory.log)
    first = task.plain()
    assert Run(run.host, tmp_path / "other")(task) == ExitCode.OK
    assert sum("/data?" in line for line in memory.log) == 3
    assert task.plain() == first


# ── what is written ──


def test_masks_are_added_with_the_label_flags_and_layer_of_their_boxes(
    memory: StandIn, run: Run
) -> None:
    task = boxed(memory)
    before = [dict(shape) for shape in task.shapes]
    assert run(task) == ExitCode.OK
    assert task.shapes[: len(before)] == before
    made = task.shapes[len(before) :]
    assert [shape["type"] for shape in made] == ["mask"] * 4
    first = made[0]
    assert (first["label_id"], first["occluded"], first["z_order"]) == (
        task.labels[0]["id"],
        True,
        3,
    )


def test_attributes_of_the_box_are_kept_and_the_score_is_added(memory: StandIn, run: Run) -> None:
    spec = {
        "name": "dog",
        "attributes": [{"name": "breed", "input_type": "text", "values": [""]}, score_spec()],
    }
    task = memory.add_task("t", [("a.png", picture_bytes(".png", *SIZE))], spec)
    breed, score = (attribute["id"] for attribute in task.labels[0]["attributes"])
    said = [{"spec_id": breed, "value": "poodle"}, {"spec_id": score, "value": "0.1"}]
    memory.draw(task, 0, "rectangle", "dog", [5, 5, 30, 30], attributes=said)
    assert run(task, replace=True) == ExitCode.OK
    (mask,) = task.shapes
    assert mask["attributes"] == [
        {"spec_id": breed, "value": "poodle"},
        {"spec_id": score, "value": "0.95"},
    ]


@pytest.mark.parametrize(
    ("attribute", "written"),
    [
        (score_spec("number", ("0", "1", "0.01")), ["0.95"]),
        (score_spec("number", ("0", "0.5", "0.1")), []),
        (score_spec("checkbox", ("false",)), []),
    ],
)
def test_a_score_is_written_only_if_the_attribute_can_hold_it(
    memory: StandIn, run: Run, attribute: dict[str, Any], written: list[str]
) -> None:
    label = {"name": "dog", "attributes": [attribute]}
    task = memory.add_task("t", [("a.png", picture_bytes(".png", *SIZE))], label)
    memory.draw(task, 0, "rectangle", "dog", [5, 5, 30, 30])
    assert run(task) == ExitCode.OK
    assert [a["value"] for a in of(task, "mask")[0]["attributes"]] == written


@pytest.mark.parametrize(("version", "kept"), [("2.73.0", 0.95), ("2.23.1", None)])
def test_a_score_needs_no_attribute_where_the_servers_shapes_have_one(
    memory: StandIn,
    run: Run,
    capsys: pytest.CaptureFixture[str],
    version: str,
    kept: float | None,
) -> None:
    memory.version = version
    label = {"name": "dog", "attributes": []}
    task = memory.add_task("t", [("a.png", picture_bytes(".png", *SIZE))], label)
    memory.draw(task, 0, "rectangle", "dog", [5, 5, 30, 30])
    assert run(task) == ExitCode.OK
    assert of(task, "mask")[0].get("score") == kept
    assert ("scores are not written" in capsys.readouterr().err) == (kept is None)


def test_a_rectangle_is_the_tight_box_of_the_mask(
    memory: StandIn, run: Run, tmp_path: Path
) -> None:
    task = boxed(memory)
    assert run(task) == ExitCode.OK
    assert run(task, form="rectangle") == ExitCode.OK
    tight = {(s["frame"], *s["points"]) for s in of(task, "rectangle") if s["source"] == "auto"}
    for shape in of(task, "mask"):
        *_, left, top, right, bottom = shape["points"]
        assert (shape["frame"], left, top, right + 1, bottom + 1) in tight
    assert run.decoded == 3  # the answers of the masks were used again


def test_own_rectangles_are_not_used_as_prompts(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    for _ in range(3):
        assert run(task, form="rectangle") == ExitCode.OK
    assert sum(shape["source"] == "auto" for shape in task.shapes) == 4


@pytest.mark.parametrize("replace", [False, True])
def test_a_box_that_is_tight_already_is_neither_duplicated_nor_deleted(
    memory: StandIn, run: Run, replace: bool
) -> None:
    task = memory.add_task("t", [("a.png", picture_bytes(".png", *SIZE))], "dog")
    memory.draw(
        task, 0, "rectangle", "dog", [5, 5, 30, 30], group=1
    )  # the fake engine's ellipse touches its sides
    memory.draw(task, 0, "points", "dog", [15, 15], group=1)
    box = task.shapes[0]
    for _ in range(2):
        assert run(task, form="rectangle", replace=replace) == ExitCode.OK
        assert [shape for shape in task.shapes if shape["type"] == "rectangle"] == [box]
    assert len(of(task, "points")) == (0 if replace else 1)
    assert len(run.engines) == 1


def test_the_parts_of_one_object_are_one_group_of_polygons(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    cut = {"name": "dog", "attributes": []}
    split = memory.add_task("t", task.frames, cut)
    memory.draw(split, 0, "points", "dog", [12, 24], group=7)
    memory.draw(split, 0, "points", "dog", [50, 24], group=7)
    memory.draw(split, 1, "rectangle", "dog", [5, 5, 30, 30])
    assert run(split, form="polygon") == ExitCode.OK
    groups = [shape["group"] for shape in of(split, "polygon")]
    assert groups == [8, 8, 0]


# ── from polygons ──


def rough(memory: StandIn) -> Task:
    """Two polygons, one with a point of its group that is off the object, and other shapes."""
    frames = [(f"{n}.png", picture_bytes(".png", *SIZE, seed=n)) for n in range(2)]
    task = memory.add_task("rough", frames, "dog", "negative")
    memory.draw(task, 0, "polygon", "dog", [5.5, 5, 40, 8, 30, 40, 8, 35], occluded=True)
    memory.draw(task, 0, "rectangle", "dog", [32.5, 8, 60, 40.25])
    memory.draw(task, 0, "points", "dog", [50, 30])
    memory.draw(task, 1, "polygon", "dog", [4, 4, 60, 4, 60, 44, 4, 44], group=3)
    memory.draw(task, 1, "points", "negative", [56, 40], group=3)
    return task


def test_rough_polygons_become_masks_and_other_shapes_stay(memory: StandIn, run: Run) -> None:
    task = rough(memory)
    before = [dict(shape) for shape in task.shapes]
    assert run(task, source="polygons") == ExitCode.OK
    assert task.shapes[: len(before)] == before
    first, second = of(task, "mask")
    assert (first["frame"], first["occluded"], second["frame"]) == (0, True, 1)
    inside = bitmap(first, SIZE)
    assert inside[20, 20]
    assert not inside[45, 60]
    # The point that is off the object has cut a disc out.
    whole = bitmap(second, SIZE)
    assert whole[10, 10]
    assert not whole[40, 56]


def test_polygons_are_replaced_by_tight_ones_once(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = rough(memory)
    manual = [shape["id"] for shape in of(task, "polygon")]
    for attempt in range(3):
        assert run(task, source="polygons", form="polygon", replace=True) == ExitCode.OK
        said = capsys.readouterr()
        polygons = of(task, "polygon")
        assert len(polygons) == 2
        assert not {shape["id"] for shape in polygons} & set(manual)
        assert {shape["source"] for shape in polygons} == {"auto"}
        # Boxes, and points that belong to no polygon, are not touched.
        assert [shape["type"] for shape in task.shapes if shape["source"] == "manual"] == [
            "rectangle",
            "points",
        ]
        if attempt:
            assert "no polygons to segment" in said.err
            assert "2 polygons of earlier runs" in said.err
    assert len(run.engines) == 1


def test_what_boxes_mark_is_left_alone_where_polygons_are_meant(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    assert run(task, source="polygons", dry_run=True) == ExitCode.OK
    said = capsys.readouterr().err
    assert "1 object (1 dog) on 1 picture" in said
    assert "3 rectangles" in said


def test_a_polygon_that_does_not_fit_its_picture_is_named_and_the_others_are_segmented(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = rough(memory)
    memory.draw(task, 0, "polygon", "dog", [5, 5, 400, 8, 30, 40])
    assert run(task, source="polygons") == ExitCode.FAILED_JOBS
    assert "polygon[1][0]" in capsys.readouterr().err
    assert len(of(task, "mask")) == 2


@pytest.mark.parametrize("form", ["mask", "polygon", "rectangle"])
def test_replace_keeps_the_answers_and_shapes_that_were_no_prompts(
    memory: StandIn, run: Run, form: str
) -> None:
    task = boxed(memory)
    assert run(task, form=form, replace=True) == ExitCode.OK
    assert len(of(task, "points")) == 0
    assert [s["source"] for s in of(task, "rectangle")] == (
        ["auto"] * 4 if form == "rectangle" else []
    )
    assert sum(shape["source"] == "auto" for shape in task.shapes) == 4
    assert [shape["points"] for shape in of(task, "polygon") if shape["source"] == "manual"] == [
        [1, 1, 9, 1, 9, 9]
    ]


def test_replace_after_a_run_without_it_deletes_the_boxes_and_computes_nothing(
    memory: StandIn, run: Run
) -> None:
    task = boxed(memory)
    assert run(task) == ExitCode.OK
    assert run(task, replace=True) == ExitCode.OK
    assert [shape["type"] for shape in task.shapes] == ["polygon"] + ["mask"] * 4
    assert len(run.engines) == 1


def test_replace_segments_again_if_an_answer_of_an_earlier_run_is_lost(
    memory: StandIn, run: Run
) -> None:
    task = boxed(memory)
    assert run(task) == ExitCode.OK
    for file in run.state.rglob("answers/*.json"):
        file.unlink()
    assert run(task, replace=True) == ExitCode.OK
    assert (len(of(task, "rectangle")), len(of(task, "points")), len(of(task, "mask"))) == (0, 0, 4)


def test_an_object_with_an_empty_mask_keeps_its_box_and_is_reported(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    task.shapes = []
    kept = [memory.draw(task, 0, "rectangle", "dog", [20, 20, 20.2, 20.2])]
    memory.draw(task, 0, "rectangle", "cat", [5, 5, 30, 30])
    kept += [
        memory.draw(task, 1, "rectangle", "cat", [20, 20, 20.2, 20.2 + n / 100]) for n in range(9)
    ]
    assert run(task, replace=True) == ExitCode.OK
    assert [shape["id"] for shape in of(task, "rectangle")] == kept
    assert len(of(task, "mask")) == 1
    said = capsys.readouterr().err
    assert "0.png: 'dog': the mask is empty; its box or points are kept" in said
    assert "1.png: 'cat': 9 masks are empty; its box or points are kept" in said


def test_replace_does_not_delete_a_box_that_was_moved_meanwhile(
    memory: StandIn, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = boxed(memory)
    moved = task.shapes[0]

    def move(method: str, path: str) -> None:
        if method == "PATCH" and "create" in path:
            moved["points"] = [6.0, 6.0, 31.0, 31.0]

    memory.when = move
    assert run(task, replace=True) == ExitCode.OK
    assert [shape["id"] for shape in of(task, "rectangle")] == [moved["id"]]


# ── which objects are segmented ──


def test_labels_select_objects_with_their_clicks(memory: StandIn, run: Run) -> None:
    task = boxed(memory, "dog", "cat", "off")
    memory.draw(task, 0, "points", "off", [10, 10])
    assert run(task, labels=("dog",), negatives=("off",)) == ExitCode.OK
    dog = task.labels[0]["id"]
    assert [(shape["frame"], shape["label_id"]) for shape in of(task, "mask")] == [
        (0, dog),
        (1, dog),
    ]
    assert not bitmap(of(task, "mask")[0], SIZE)[10, 10]


def test_a_ticked_attribute_makes_points_negative(memory: StandIn, run: Run) -> None:
    tick = {"name": "negative", "mutable": False, "input_type": "checkbox", "values": ["false"]}
    task = memory.add_task(
        "t", [("a.png", picture_bytes(".png", *SIZE))], {"name": "dog", "attributes": [tick]}
    )
    ticked = [{"spec_id": task.labels[0]["attributes"][0]["id"], "value": "true"}]
    memory.draw(task, 0, "rectangle", "dog", [5, 5, 40, 40])
    memory.draw(task, 0, "points", "dog", [22, 22], attributes=ticked)
    assert run(task) == ExitCode.OK
    (mask,) = of(task, "mask")
    assert not bitmap(mask, SIZE)[22, 22]


@pytest.mark.parametrize("options", [{"labels": ("dgo",)}, {"negatives": ("dgo",)}])
def test_an_unknown_label_is_refused_with_a_list_of_the_existing_ones(
    memory: StandIn, run: Run, options: dict[str, Any]
) -> None:
    task = boxed(memory)
    with pytest.raises(UsageError, match="cat, dog"):
        run(task, **options)


def test_frames_deleted_in_the_task_are_skipped(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    task.deleted = [0]
    assert run(task) == ExitCode.OK
    assert {shape["frame"] for shape in of(task, "mask")} == {1, 2}


def test_tracks_and_other_shapes_are_counted_and_reported(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    task.tracks = [{"id": 1, "shapes": []}] * 2
    assert run(task) == ExitCode.OK
    assert "left out: 1 polygon, 2 tracks" in capsys.readouterr().err


def test_a_task_without_boxes_says_so(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = memory.add_task("empty", [], "dog")
    assert run(task) == ExitCode.OK
    assert f"task {task.id}: no boxes or points to segment\n" in capsys.readouterr().err


def test_a_label_type_that_forbids_the_form_is_reported_before_anything_is_computed(
    memory: StandIn, run: Run
) -> None:
    task = boxed(memory, {"name": "dog", "type": "rectangle"}, "cat")
    with pytest.raises(CvatError, match=r"'dog' may not have shapes of type mask") as caught:
        run(task)
    assert caught.value.kind == ExitCode.CVAT_REFUSED
    assert run.engines == []
    assert memory.writes() == []
    assert run(task, labels=("cat",)) == ExitCode.OK


def test_bad_pictures_and_prompts_are_reported_and_the_others_are_segmented(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    task.frames[2] = ("done/cam1/2.png", task.frames[2][1])
    memory.draw(task, 0, "rectangle", "dog", [500, 500, 600, 600])
    whole = task.frames[1][1]
    memory.when = lambda method, path: Fault(404) if "number=1&" in path else None
    assert run(task) == ExitCode.FAILED_JOBS
    said = capsys.readouterr().err
    assert "done/cam1/0.png: 'dog' box.x0: 500 is outside the picture" in said
    assert "done/cam1/1.png" in said
    assert [shape["frame"] for shape in of(task, "mask")] == [0, 0, 2]
    memory.when = lambda method, path: None
    assert whole
    assert run(task) == ExitCode.FAILED_JOBS  # the box outside is still there
    assert len(of(task, "mask")) == 4


def test_ambiguous_points_do_not_affect_the_boxes_without_points(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory, "dog", "cat", "negative")
    task.shapes = []
    clear = [
        memory.draw(task, 0, "rectangle", "dog", [1, 1 + 4 * n, 9, 4 + 4 * n]) for n in range(9)
    ]
    memory.draw(task, 0, "rectangle", "cat", [20, 20, 50, 40])
    memory.draw(task, 0, "rectangle", "cat", [25, 20, 55, 40], group=3)
    memory.draw(task, 0, "points", "negative", [30, 30])  # in both
    memory.draw(task, 0, "rectangle", "dog", [57, 1, 63, 6], group=5)
    memory.draw(task, 0, "rectangle", "dog", [57, 8, 63, 14], group=5)
    memory.draw(task, 0, "points", "dog", [1, 47], group=5)  # in neither
    assert run(task, replace=True) == ExitCode.FAILED_JOBS
    assert "0.png" in (said := capsys.readouterr().err)
    assert "9 of 13 boxes are segmented" in said
    left = {shape["id"] for shape in task.shapes}
    assert not left & set(clear)
    assert (len(of(task, "mask")), len(of(task, "rectangle")), len(of(task, "points"))) == (9, 4, 2)


def test_a_stray_negative_point_blocks_no_grouped_objects(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory, "dog", "cat", "negative")
    task.shapes = []
    memory.draw(task, 0, "rectangle", "dog", [2, 2, 30, 40], group=1)
    memory.draw(task, 0, "points", "negative", [20, 30], group=1)
    memory.draw(task, 0, "rectangle", "cat", [10, 2, 50, 40], group=2)
    memory.draw(task, 0, "points", "cat", [40, 20], group=2)
    memory.draw(task, 0, "rectangle", "cat", [52, 2, 60, 10])
    stray = memory.draw(task, 0, "points", "negative", [62, 46])  # in no box
    other = memory.draw(task, 1, "points", "negative", [15, 15])  # in two, both of a group
    memory.draw(task, 1, "rectangle", "dog", [2, 2, 30, 40], group=1)
    memory.draw(task, 1, "points", "dog", [20, 30], group=1)
    memory.draw(task, 1, "rectangle", "cat", [10, 2, 50, 40], group=2)
    memory.draw(task, 1, "points", "negative", [40, 20], group=2)
    assert run(task, replace=True) == ExitCode.FAILED_JOBS
    said = capsys.readouterr().err
    assert "0.png" in said
    assert "3 of 3 boxes are segmented" in said
    assert "2 of 2 boxes are segmented" in said
    assert [shape["id"] for shape in task.shapes if shape["type"] != "mask"] == [stray, other]
    assert len(of(task, "mask")) == 5
    assert not bitmap(of(task, "mask")[0], SIZE)[30, 20]


def test_a_picture_of_another_size_than_its_frame_is_refused(
    memory: StandIn, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    share = tmp_path / "share" / "done" / "cam1"
    share.mkdir(parents=True)
    (share / "0.png").write_bytes(picture_bytes(".png", 32, 48))
    (share / "1.png").write_bytes(task.frames[1][1])
    (share / "2.png").write_bytes(b"\x89PNG but not really")
    assert run(task, images=tmp_path / "share") == ExitCode.FAILED_JOBS
    said = capsys.readouterr().err
    assert "it is 32×48, the task's frame is 64×48" in said
    assert {shape["frame"] for shape in of(task, "mask")} == {1}


def test_a_frame_name_never_leads_out_of_the_share(
    memory: StandIn, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "secret.png").write_bytes(picture_bytes(".png", *SIZE))
    (tmp_path / "share").mkdir()
    task = memory.add_task("t", [("../secret.png", picture_bytes(".png", *SIZE))], "dog")
    memory.draw(task, 0, "rectangle", "dog", [5, 5, 30, 30])
    assert run(task, images=tmp_path / "share") == ExitCode.FAILED_JOBS
    assert of(task, "mask") == []


def test_dry_run_writes_nothing_anywhere(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    assert run(task, dry_run=True, replace=True) == ExitCode.OK
    assert memory.writes() == []
    assert not run.state.exists()
    assert run.engines == []
    assert "4 objects (2 cat, 2 dog) on 3 pictures" in capsys.readouterr().err


# ── second runs, and runs after a failure ──


@pytest.mark.parametrize(
    "options", [{}, {"replace": True}, {"form": "polygon"}, {"form": "rectangle", "replace": True}]
)
def test_a_second_run_changes_nothing(memory: StandIn, run: Run, options: dict[str, Any]) -> None:
    task = boxed(memory)
    assert run(task, **options) == ExitCode.OK
    before, writes = task.plain(), len(memory.writes())
    assert run(task, **options) == ExitCode.OK
    assert task.plain() == before
    assert len(memory.writes()) == writes
    assert len(run.engines) == 1


def test_a_task_with_nothing_left_to_do_is_read_once(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    assert run(task) == ExitCode.OK
    requests = len(memory.log)
    assert run(task) == ExitCode.OK
    assert sum("/annotations/" in line for line in memory.log[requests:]) == 1


def test_masks_on_the_server_are_recognized_without_a_journal(
    memory: StandIn, run: Run, tmp_path: Path
) -> None:
    task = boxed(memory)
    assert run(task) == ExitCode.OK
    before = task.plain()
    assert Run(run.host, tmp_path / "another machine")(task) == ExitCode.OK
    assert task.plain() == before


def test_changed_or_deleted_masks_are_not_written_again_without_the_flag(
    memory: StandIn, run: Run
) -> None:
    task = boxed(memory)
    assert run(task) == ExitCode.OK
    removed, mended = of(task, "mask")[:2]
    task.shapes.remove(removed)
    mended["points"] = [0.0, 4.0, 1.0, 1.0, 2.0, 2.0]
    before = task.plain()
    assert run(task) == ExitCode.OK
    assert task.plain() == before
    assert run(task, again=True) == ExitCode.OK
    assert len(of(task, "mask")) == 5


def test_only_a_box_that_was_moved_is_segmented_again(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    assert run(task) == ExitCode.OK
    task.shapes[0]["points"] = [6.0, 6.0, 33.0, 33.0]
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 5
    assert run.engines[1].calls["decode"] == 1


def undisturbed(
    tmp_path: Path, make: Callable[[StandIn], Task] = boxed, **options: Any
) -> tuple[list[Any], int]:
    memory = StandIn()
    task = make(memory)
    with served(memory) as host:
        assert Run(host, tmp_path / "undisturbed")(task, **options) == ExitCode.OK
    return task.plain(), len(memory.log)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (boxed, {}),
        (boxed, {"replace": True}),
        (boxed, {"form": "polygon", "replace": True}),
        (overlapping, {"replace": True}),
        (overlapping, {"form": "rectangle", "replace": True}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_interrupted_at_any_request_the_next_run_gives_the_same_task(
    tmp_path: Path, make: Callable[[StandIn], Task], options: dict[str, Any]
) -> None:
    expected, requests = undisturbed(tmp_path, make, **options)
    objects = 4 if make is boxed else 10
    assert requests > 9
    for number in range(1, requests + 1):
        for after in (False, True):
            memory = StandIn()
            task = make(memory)
            memory.faults = {number: Fault("drop", after=after)}
            with served(memory) as host:
                run = Run(host, tmp_path / f"{number}-{after}")
                with pytest.raises(RequestFailedError):
                    run(task, limits=ONCE, **options)
                assert run(task, limits=ONCE, **options) == ExitCode.OK
            assert task.plain() == expected, f"request {number}, {after=}"
            assert run.decoded <= objects  # stored answers are not computed again


@pytest.mark.parametrize(
    "fault", [Fault(502), Fault("drop"), Fault("drop", after=True), Fault("cut", after=True)]
)
def test_a_write_that_failed_is_not_done_twice(
    memory: StandIn, run: Run, tmp_path: Path, fault: Fault
) -> None:
    expected, _ = undisturbed(tmp_path, replace=True)
    task = boxed(memory)
    failed: list[str] = []

    def first_of_each(method: str, path: str) -> Fault | None:
        if not is_write(memory, method) or path in failed:
            return None
        failed.append(path)
        return fault

    memory.when = first_of_each
    assert run(task, replace=True) == ExitCode.OK
    assert len(failed) == 2
    assert task.plain() == expected


def test_a_late_write_of_the_server_leaves_no_duplicates(
    memory: StandIn, run: Run, tmp_path: Path
) -> None:
    expected, _ = undisturbed(tmp_path)
    task = boxed(memory)
    late: list[Any] = []

    def slow(method: str, path: str) -> Fault | None:
        if not is_write(memory, method):
            return None
        if not late:
            late.append(memory.bodies[-1])
            return Fault(504)
        if "create" in path:  # the second attempt; the first is carried out now
            job = task.jobs[0].id
            memory.patch_job_annotations(job, query={"action": "create"}, body=late[0])
        return None

    memory.when = slow
    assert run(task) == ExitCode.OK
    assert late
    assert task.plain() == expected


@pytest.mark.slow
@pytest.mark.parametrize("form", ["mask", "rectangle"])
@pytest.mark.parametrize("make", [boxed, overlapping])
def test_killed_around_any_write_the_next_run_gives_the_same_task(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[StandIn], Task],
    form: str,
) -> None:
    options: dict[str, Any] = {"form": form, "replace": True}
    expected, _ = undisturbed(tmp_path, make, **options)
    writes = LethalWrites(monkeypatch)
    for number in writes.numbers():
        for after in (False, True):
            memory = StandIn()
            task = make(memory)
            with served(memory) as host:
                run = Run(host, tmp_path / f"{number}-{after}")
                with writes.killing(number, after=after):
                    run(task, **options)
                assert run(task, **options) == ExitCode.OK
                assert task.plain() == expected, f"call {number}, {after=}"
    assert writes.count > 4


def test_a_server_that_refuses_the_masks_costs_only_a_second_command(
    memory: StandIn, run: Run
) -> None:
    task = boxed(memory)
    refuse_writes(memory)
    with pytest.raises(CvatError) as caught:
        run(task)
    assert caught.value.kind == ExitCode.CVAT_FORBIDDEN
    assert str(run.state) in str(caught.value.remedy)
    memory.when = lambda method, path: None
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 4
    assert len(run.engines) == 1


def test_shapes_that_the_server_accepts_and_does_not_keep_are_an_error(
    memory: StandIn, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = boxed(memory)
    monkeypatch.setattr(memory, "patch_job_annotations", lambda *_, body, **__: body)
    with pytest.raises(CvatError, match="does not have 4 of them"):
        run(task, replace=True)
    assert len(of(task, "rectangle")) == 3


def test_a_server_lost_while_pictures_are_fetched_ends_the_run_and_keeps_its_answers(
    memory: StandIn, run: Run
) -> None:
    task = boxed(memory)
    memory.when = lambda method, path: Fault(401) if "number=2&" in path else None
    with pytest.raises(CvatError) as caught:
        run(task)
    assert caught.value.kind == ExitCode.CVAT_UNAUTHORIZED
    memory.when = lambda method, path: None
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 4
    assert run.decoded == 3


def test_a_picture_that_the_server_fails_to_send_costs_no_other_picture(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    memory.when = lambda method, path: Fault(500) if "number=1&" in path else None
    assert run(task) == ExitCode.FAILED_JOBS
    assert "done/cam1/1.png" in capsys.readouterr().err
    assert {shape["frame"] for shape in of(task, "mask")} == {0, 2}
    memory.when = lambda method, path: None
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 4


@pytest.mark.parametrize("chunk_size", [1, 3])
def test_a_picture_that_left_the_share_costs_no_picture_of_another_chunk(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str], chunk_size: int
) -> None:
    task = boxed(memory)
    task.frames = [(f"{number}.png", task.frames[0][1]) for number in range(12)]
    for number in range(3, 12):
        memory.draw(task, number, "rectangle", "dog", [5, 5, 30, 30])
    task.chunk_size = chunk_size
    task.missing = {4, 9}
    gone = {4, 9} if chunk_size == 1 else {3, 4, 5, 9, 10, 11}
    for _ in range(2):
        assert run(task) == ExitCode.FAILED_JOBS
        assert {shape["frame"] for shape in of(task, "mask")} == set(range(12)) - gone
        said = capsys.readouterr().err
        for number in range(12):
            assert said.count(f" {number}.png: ") == (number in gone)
        assert said.count("→ check that it is still on the server") == 1
    task.missing = set()
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 13


def test_pictures_that_left_the_share_are_named_though_nothing_is_drawn_on_them(
    memory: StandIn, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    task.frames += [(f"done/cam1/{name}.png", task.frames[0][1]) for name in ("there", "gone")]
    task.missing = {4}
    memory.share = tmp_path / "share"
    for name, data in task.frames[:4]:
        (memory.share / name).parent.mkdir(parents=True, exist_ok=True)
        (memory.share / name).write_bytes(data)
    assert run(task) == ExitCode.FAILED_JOBS
    said = capsys.readouterr().err
    assert "1 picture of the task has left the share: done/cam1/gone.png\n" in said
    assert said.count("error: done/cam1/") == 3


@pytest.mark.parametrize("share", ["other", "none", "forbidden"])
def test_no_picture_is_called_missing_where_the_share_does_not_tell(
    memory: StandIn,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    share: str,
) -> None:
    task = boxed(memory)
    task.missing = {1}
    if share == "other":  # the task was not made from it
        memory.share = tmp_path
        (tmp_path / "done/cam1").mkdir(parents=True)
        (tmp_path / "done/cam1/another.png").touch()
    if share == "forbidden":
        memory.when = lambda method, path: Fault(403) if "/server/share" in path else None
    assert run(task) == ExitCode.FAILED_JOBS
    assert any("/server/share" in line for line in memory.log)
    assert "left the share" not in capsys.readouterr().err


def test_a_picture_that_the_server_does_not_find_has_a_remedy_for_pictures(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    memory.when = lambda method, path: Fault(404) if "number=1&" in path else None
    assert run(task) == ExitCode.FAILED_JOBS
    said = capsys.readouterr().err
    assert "check that it is still on the server's share" in said
    assert "check the number" not in said.split("error: ")[-1]
    assert {shape["frame"] for shape in of(task, "mask")} == {0, 2}


def test_pictures_beside_one_that_left_the_share_are_read_from_a_folder(
    memory: StandIn, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    task.missing = {1}
    for name, data in (task.frames[0], task.frames[2]):
        (tmp_path / "share" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "share" / name).write_bytes(data)
    assert run(task) == ExitCode.FAILED_JOBS  # all three are in one chunk
    assert of(task, "mask") == []
    capsys.readouterr()
    assert run(task, images=tmp_path / "share") == ExitCode.FAILED_JOBS
    assert {shape["frame"] for shape in of(task, "mask")} == {0, 2}
    said = capsys.readouterr().err
    assert "done/cam1/1.png: cannot be read" in said
    assert "0.png" not in said


def test_a_server_without_its_share_is_tried_once_for_each_picture(
    memory: StandIn, run: Run
) -> None:
    task = boxed(memory)
    task.frames = [(f"{number}.png", task.frames[0][1]) for number in range(40)]
    for number in range(3, 40):
        memory.draw(task, number, "rectangle", "dog", [5, 5, 30, 30])
    task.missing = set(range(40))
    assert run(task) == ExitCode.FAILED_JOBS
    # The first four are fetched at once, and retried.
    assert sum("/data?" in line for line in memory.log) <= 36 + 4 * (1 + len(QUICK.retry_delays_s))
    assert memory.writes() == []


def test_a_server_that_fails_at_every_request_is_given_up_after_a_few(
    memory: StandIn, run: Run
) -> None:
    task = boxed(memory)
    task.frames = [(f"{number}.png", task.frames[0][1]) for number in range(40)]
    for number in range(3, 40):
        memory.draw(task, number, "rectangle", "dog", [5, 5, 30, 30])
    down: list[str] = []

    def fail(method: str, path: str) -> Fault | None:
        if "/data?" in path and "number=9&" in path:
            down.append(path)
        return Fault(502) if down else None

    memory.when = fail
    with pytest.raises(CvatError) as caught:
        run(task, limits=ONCE)
    assert caught.value.kind == ExitCode.CVAT_SERVER
    assert sum("/data?" in line for line in memory.log) < 20
    memory.when = lambda method, path: None
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 41


# ── jobs ──


def test_each_job_gets_its_own_copy_of_each_mask_of_a_video_with_overlapping_jobs(
    memory: StandIn, run: Run
) -> None:
    frames = [(f"{n}.png", picture_bytes(".png", *SIZE, seed=n)) for n in range(20)]
    task = memory.add_task("video", frames, "dog")
    task.is_video = True
    jobs = memory.split(task, segment_size=12, overlap=5)
    assert [(job.start, job.stop) for job in jobs] == [(0, 11), (7, 18), (14, 19)]
    for n in range(20):
        memory.draw(task, n, "rectangle", "dog", [5 + n, 5, 30 + n, 30])
    for _ in range(2):
        assert run(task, replace=True) == ExitCode.OK
        for job in jobs:
            assert job.stop is not None
            assert kinds(job) == [(n, "mask") for n in range(job.start, job.stop + 1)]
        by_frame = {s["frame"]: s["points"] for s in jobs[0].shapes}
        copies = {s["frame"]: s["points"] for s in jobs[1].shapes}
        assert all(by_frame[n] == copies[n] for n in range(7, 12))
    assert run.decoded == 20  # once for each picture, not for each copy
    assert sum("/data?" in line for line in memory.log) == 20


def test_a_box_that_one_of_two_jobs_has_gets_its_mask_in_that_job(
    memory: StandIn, run: Run
) -> None:
    task = overlapping(memory)
    assert run(task, replace=True) == ExitCode.OK
    first, second = task.jobs
    assert [frame for frame, _ in kinds(first)] == [0, 1, 2, 3, 4, 4]
    assert [frame for frame, _ in kinds(second)] == [3, 3, 4, 4, 5, 6, 7]
    assert {kind for job in task.jobs for _, kind in kinds(job)} == {"mask"}
    assert run.decoded == 8


def test_shapes_that_one_job_has_twice_are_made_one_and_those_of_two_jobs_stay(
    memory: StandIn, run: Run
) -> None:
    task = overlapping(memory)
    assert run(task) == ExitCode.OK
    first, second = task.jobs
    expected = task.plain()
    double = next(s for s in second.shapes if s["type"] == "mask" and s["frame"] == 3)
    second.shapes.append({**double, "id": memory.number()})
    assert run(task) == ExitCode.OK
    assert task.plain() == expected
    assert len(of(task, "mask")) == len([s for j in (first, second) for s in j.shapes]) // 2


def test_a_run_on_one_job_changes_only_this_job_and_its_answers_serve_the_others(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = overlapping(memory)
    first, second = task.jobs
    before = kinds(second)
    assert run(task, jobs=(first.id,), replace=True) == ExitCode.OK
    assert f"task {task.id}, job {first.id}: 6 masks written, 6 prompt shapes" in (
        capsys.readouterr().out
    )
    assert kinds(first) == [(n, "mask") for n in (0, 1, 2, 3, 4, 4)]
    assert kinds(second) == before
    assert run.decoded == 5
    assert run(task, replace=True) == ExitCode.OK
    assert kinds(first) == [(n, "mask") for n in (0, 1, 2, 3, 4, 4)]
    assert kinds(second) == [(n, "mask") for n in (3, 3, 4, 4, 5, 6, 7)]
    # Of the overlap, only the box that the second job alone has was left to segment.
    assert run.decoded == 9


def test_a_tight_box_that_one_job_keeps_is_still_a_prompt_in_the_other(
    memory: StandIn, run: Run
) -> None:
    frames = [(f"{n}.png", picture_bytes(".png", *SIZE, seed=n)) for n in range(3)]
    task = memory.add_task("t", frames, "dog")
    first, second = memory.split(task, segment_size=2, overlap=1)
    memory.draw(task, 1, "rectangle", "dog", [5, 5, 30, 30], group=1)  # equals its own answer
    memory.draw(task, 1, "points", "dog", [15, 15], group=1)
    for job in (first, second):
        assert run(task, jobs=(job.id,), form="rectangle", replace=True) == ExitCode.OK
    assert kinds(first) == kinds(second) == [(1, "rectangle")]
    assert run.decoded == 1


def test_an_annotator_who_may_use_a_job_only_is_not_asked_for_more(
    memory: StandIn, host: str, tmp_path: Path
) -> None:
    task = overlapping(memory)
    first, second = task.jobs
    second.assigned = True
    run = Run(host, tmp_path / "state", token=ANNOTATOR)
    assert run(task, jobs=(second.id,), replace=True) == ExitCode.OK
    assert kinds(second) == [(n, "mask") for n in (3, 3, 4, 4, 5, 6, 7)]
    assert not any(kind == "mask" for _, kind in kinds(first))
    assert not any("/api/tasks" in line or "task_id" in line for line in memory.log)
    with pytest.raises(CvatError) as caught:
        run(task, jobs=(first.id,))
    assert caught.value.kind == ExitCode.CVAT_FORBIDDEN
    with pytest.raises(CvatError, match="assigned with --job") as caught:
        run(task)
    assert caught.value.kind == ExitCode.CVAT_FORBIDDEN


def test_several_jobs_may_be_named(memory: StandIn, run: Run) -> None:
    task = overlapping(memory)
    first, second = task.jobs
    assert run(task, jobs=(second.id, first.id, second.id), replace=True) == ExitCode.OK
    assert {kind for job in task.jobs for _, kind in kinds(job)} == {"mask"}


def test_jobs_that_do_not_exist_are_of_another_task_or_hold_the_truth_are_refused(
    memory: StandIn, run: Run
) -> None:
    task, other = overlapping(memory), boxed(memory)
    truth = Job(memory.number(), 0, 1, kind="ground_truth")
    task.jobs.append(truth)
    with pytest.raises(UsageError, match=f"belongs to task {other.id}"):
        run(task, jobs=(other.jobs[0].id,))
    with pytest.raises(UsageError, match="ground truth"):
        run(task, jobs=(truth.id,))
    with pytest.raises(CvatError) as caught:
        run(task, jobs=(9999,))
    assert caught.value.kind == ExitCode.CVAT_NOT_FOUND
    assert "job 9999" in str(caught.value)


@pytest.mark.parametrize("kind", ["ground_truth", "consensus_replica"])
def test_jobs_that_are_no_annotation_jobs_stay_as_they_are(
    memory: StandIn, run: Run, kind: str
) -> None:
    task = overlapping(memory)
    special = Job(memory.number(), 0, 1, kind=kind)
    task.jobs.append(special)
    memory.draw(task, 1, "rectangle", "cat", [33, 8, 60, 40], job=special)
    assert run(task, replace=True) == ExitCode.OK
    assert kinds(special) == [(1, "rectangle")]
    assert {kind for job in task.jobs[:2] for _, kind in kinds(job)} == {"mask"}


def test_honeypots_are_named_and_left_alone_before_anything_is_computed(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    task.honeypots = {1}
    box = [shape for shape in task.shapes if shape["frame"] == 1]
    assert run(task, dry_run=True) == ExitCode.OK
    assert "1 frame left out, because CVAT checks" in capsys.readouterr().err
    for options in ({}, {"jobs": (task.jobs[0].id,)}):
        assert run(task, replace=True, **options) == ExitCode.OK
        assert "(honeypots): done/cam1/1.png" in capsys.readouterr().err
        assert [shape for shape in task.shapes if shape["frame"] == 1] == box
        assert {shape["frame"] for shape in of(task, "mask")} == {0, 2}
        assert {shape["frame"] for shape in of(task, "rectangle")} == {1}
    assert not any("number=1&" in line for line in memory.log)


def test_an_annotator_who_may_not_know_the_honeypots_annotates_them_like_other_frames(
    memory: StandIn, host: str, tmp_path: Path
) -> None:
    task = boxed(memory)
    task.honeypots = {1}
    task.jobs[0].assigned = True
    run = Run(host, tmp_path / "state", token=ANNOTATOR)
    assert run(task, jobs=(task.jobs[0].id,)) == ExitCode.OK
    assert {shape["frame"] for shape in of(task, "mask")} == {0, 1, 2}


# ── permissions, and sizes of requests ──


@pytest.mark.parametrize("with_job", [False, True])
def test_a_token_that_may_only_read_is_noticed_before_anything_is_computed(
    memory: StandIn, host: str, tmp_path: Path, with_job: bool
) -> None:
    task = boxed(memory)
    jobs = (task.jobs[0].id,) if with_job else ()
    run = Run(host, tmp_path / "state", token=READER)
    assert run(task, jobs=jobs, dry_run=True) == ExitCode.OK
    with pytest.raises(CvatError) as caught:
        run(task, jobs=jobs)
    assert caught.value.kind == ExitCode.CVAT_FORBIDDEN
    assert "answers stored in" not in str(caught.value)
    assert run.engines == []
    assert not any("/data?" in line for line in memory.log)


@pytest.mark.parametrize("form", ["mask", "polygon"])
def test_uploads_that_are_too_large_for_a_proxy_are_divided(
    memory: StandIn, run: Run, tmp_path: Path, form: str
) -> None:
    def make(memory: StandIn) -> Task:
        task = boxed(memory)
        for n in range(20):
            memory.draw(task, 1, "rectangle", "dog", [2 + n, 2, 30 + n, 40])
        memory.draw(task, 2, "points", "dog", [12, 24], group=7)
        memory.draw(task, 2, "points", "dog", [50, 24], group=7)
        return task

    expected, _ = undisturbed(tmp_path, make, form=form, replace=True)
    task = make(memory)
    memory.max_body = 3000
    assert run(task, form=form, replace=True) == ExitCode.OK
    assert task.plain() == expected
    creations = [
        body for body, line in zip(memory.bodies, memory.log, strict=True) if "=create" in line
    ]
    refused = [body for body in creations if len(json.dumps(body)) > memory.max_body]
    assert len(creations) > 5
    assert len(refused) < 5  # the size that was refused is not tried again


def test_a_mask_that_is_too_large_by_itself_is_an_error_that_names_its_frame(
    memory: StandIn, run: Run
) -> None:
    task = boxed(memory)
    memory.max_body = 200
    with pytest.raises(CvatError) as caught:
        run(task)
    assert caught.value.place == f"task {task.id}, job {task.jobs[0].id}: frame 0"
    assert "client_max_body_size" in str(caught.value.remedy)
    memory.max_body = 1 << 20
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 4


def test_the_parts_of_an_object_stay_one_group_if_a_run_ended_between_them(
    memory: StandIn, run: Run
) -> None:
    task = memory.add_task("t", [("a.png", picture_bytes(".png", *SIZE))], "dog")
    memory.draw(task, 0, "points", "dog", [12, 24], group=7)
    memory.draw(task, 0, "points", "dog", [50, 24], group=7)
    assert run(task, form="polygon") == ExitCode.OK
    task.shapes.remove(of(task, "polygon")[1])
    memory.draw(task, 0, "polyline", "dog", [1, 1, 9, 9], group=20)
    for file in run.state.rglob("done-*.txt"):
        file.unlink()
    assert run(task, form="polygon") == ExitCode.OK
    assert [shape["group"] for shape in of(task, "polygon")] == [8, 8]


def test_two_commands_on_one_task_do_not_run_at_once(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    with Journal(next_folder(run, task)), pytest.raises(UsageError, match="another sam-poll"):
        run(task)
    assert run(task) == ExitCode.OK


def next_folder(run: Run, task: Task) -> Path:
    from sam_poll.integrations.cvat.journal import folder_of

    return folder_of(run.state, run.host, f"task-{task.id}")


def test_an_unusable_journal_is_reported_before_anything_is_computed(
    memory: StandIn, run: Run
) -> None:
    task = boxed(memory)
    run.state.parent.mkdir(exist_ok=True)
    run.state.write_text("a file where the folder should be")
    with pytest.raises(ShareError, match="--state"):
        run(task)
    assert run.engines == []


def test_answers_that_cannot_be_stored_end_the_run(
    memory: StandIn, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = boxed(memory)

    def full(path: Path, body: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sam_poll.integrations.cvat.journal.write_whole", full)
    with pytest.raises(ShareError, match="No space left"):
        run(task)
    assert memory.writes() == []


def test_objects_of_an_unreadable_answer_file_are_segmented_again(
    memory: StandIn, run: Run
) -> None:
    task = boxed(memory)
    refuse_writes(memory)
    with pytest.raises(CvatError):
        run(task)
    files = sorted(run.state.rglob("*.json"))
    files[0].write_bytes(b"{")
    memory.when = lambda method, path: None
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 4
    assert run.engines[1].calls["decode"] == 1


def test_ctrl_c_during_upload_reports_how_to_continue(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = boxed(memory)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client.CvatClient, "change_shapes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(task)
    assert "the same command continues from there" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 4
    assert run.decoded == 3


@pytest.mark.parametrize(
    "damaged",
    [
        5,
        {},
        {"score": "high", "mask": [1, 1, 0, 0, 1, 0]},
        {"score": 0.9, "mask": [1, 1, 0, 0, 1, 5]},
        {"score": 0.9, "mask": [1]},
        {"score": 0.9, "mask": ["a", 1, 0, 0, 1, 0]},
        {"score": 0.9, "mask": None},
    ],
    ids=str,
)
def test_an_object_with_a_damaged_answer_is_segmented_again(
    memory: StandIn, run: Run, damaged: Any
) -> None:
    task = boxed(memory)
    refuse_writes(memory)
    with pytest.raises(CvatError):
        run(task)
    for file in run.state.rglob("answers/*.json"):
        file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), damaged)))
    memory.when = lambda method, path: None
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 4
    assert run.engines[1].calls["decode"] == 3


def test_a_partial_line_of_the_journal_damages_no_other_line(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    next_folder(run, task).mkdir(parents=True)
    for name in ("written", "done"):
        (next_folder(run, task) / f"{name}-{task.jobs[0].id}.txt").write_text("0badc0de")
    assert run(task, form="rectangle") == ExitCode.OK
    assert len(of(task, "rectangle")) == 7
    assert run(task, form="mask") == ExitCode.OK
    assert len(of(task, "mask")) == 4  # none for the four rectangles of the command itself
    task.shapes = [shape for shape in task.shapes if shape["type"] != "mask"]
    assert run(task, form="mask") == ExitCode.OK
    assert of(task, "mask") == []  # they were done before, and deleted since


def test_ctrl_c_keeps_the_answers_and_ends_with_130(
    memory: StandIn, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    task = boxed(memory)
    engines: list[FakeEngine] = []

    class Interrupted(FakeEngine):
        def decode(self, *args: Any) -> Any:
            if not engines[1:] and not self.calls["decode"]:
                os.kill(os.getpid(), signal.SIGINT)
            return super().decode(*args)

    def engine_of(*_: Any, **__: Any) -> FakeEngine:
        engines.append(Interrupted())
        return engines[-1]

    monkeypatch.setattr(masks.run, "__kwdefaults__", {"engine_of": engine_of})
    for name, value in (("CVAT_HOST", host), ("CVAT_ACCESS_TOKEN", TOKEN)):
        monkeypatch.setenv(name, value)
    command = ["cvat", "masks", str(task.id), "--state", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 130, done.output
    assert "the same command continues from there" in done.output
    assert memory.writes() == []
    assert list(tmp_path.rglob("answers/*.json"))
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(of(task, "mask")) == 4
    assert sum(engine.calls["decode"] for engine in engines) <= 4


def test_ctrl_c_does_not_wait_for_a_picture_that_a_silent_server_does_not_send(
    memory: StandIn, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    task = boxed(memory)

    def requests() -> int:
        return sum("number=1" in line for line in memory.log)

    def silent_from_the_second_picture(method: str, path: str) -> Fault | None:
        if "/data?" not in path or "number=0" in path:
            return None
        if "number=1" in path and requests() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return Fault("silent")

    memory.when = silent_from_the_second_picture
    monkeypatch.setattr(masks.run, "__kwdefaults__", {"engine_of": lambda *_: FakeEngine()})
    for name, value in (("CVAT_HOST", host), ("CVAT_ACCESS_TOKEN", TOKEN)):
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["cvat", "masks", str(task.id), "--state", str(tmp_path)])
    assert done.exit_code == 130, done.output
    assert "the same command continues" in done.output
    assert requests() == 1, "the command has waited for the picture, and requested it again"


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--as", "cloud"], ExitCode.USAGE),
        (["--from", "clouds"], ExitCode.USAGE),
        (["--images", "no/such/folder"], ExitCode.USAGE),
        (["--token-file", "no/such/file"], ExitCode.SETTINGS),
        (["--host", "http://user:pw@example.org"], ExitCode.USAGE),
        (["--host", "ftp://example.org"], ExitCode.USAGE),
    ],
)
def test_invalid_flags_are_refused_before_any_request(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], code: ExitCode
) -> None:
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", TOKEN)
    monkeypatch.setenv("CVAT_HOST", "http://127.0.0.1:1")
    done = CliRunner().invoke(app, ["cvat", "masks", "7", *flags])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output


@pytest.mark.parametrize("more", [[], ["--job", "99"]])
def test_a_missing_task_or_job_ends_with_44_at_once(
    memory: StandIn, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", TOKEN)
    done = CliRunner().invoke(
        app, ["cvat", "masks", "99", "--host", host, "--state", str(tmp_path), *more]
    )
    assert done.exit_code == ExitCode.CVAT_NOT_FOUND
    assert ("job 99" if more else "task 99") in done.output
    assert len(memory.log) == 3  # version, user, task or job


def test_a_refused_picture_is_printed_once(
    memory: StandIn, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = boxed(memory)
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", TOKEN)
    memory.when = lambda method, path: Fault(404) if "number=1&" in path else None
    command = ["cvat", "masks", str(task.id), "-m", "demo", "--device", "cpu"]
    done = CliRunner().invoke(app, [*command, "--host", host, "--state", str(tmp_path)])
    assert done.exit_code == ExitCode.FAILED_JOBS
    assert done.output.count("done/cam1/1.png") == 1
    assert done.output.count("HTTP 404") == 1


def test_an_older_server_needs_no_sdk_of_its_version(
    memory: StandIn, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = boxed(memory)
    memory.version = "2.23.1"  # whose answer to /server/about lacks fields that SDK 2.80 needs
    monkeypatch.setenv("CVAT_USERNAME", USER)
    monkeypatch.setenv("CVAT_PASSWORD", PASSWORD)
    command = ["cvat", "masks", str(task.id), "-m", "demo", "--device", "cpu"]
    done = CliRunner().invoke(app, [*command, "--host", host, "--state", str(tmp_path)])
    assert done.exit_code == ExitCode.OK
    assert "sdk" not in done.output


def test_a_frame_that_is_in_no_job_cannot_be_read() -> None:
    pictures = ServerPictures(Mock(spec=client.CvatClient), 7, {0: 1})
    with pytest.raises(PictureError, match="is in no job of the task"):
        pictures(shapes.FramePicture(5, "dog.jpg", Size(64, 48)))


@pytest.mark.cvat
@pytest.mark.skipif("CVAT_HOST" not in os.environ, reason="CVAT_HOST names no server")
def test_masks_command_works_on_overlapping_jobs_of_a_real_server(tmp_path: Path) -> None:
    from cvat_sdk.core.proxies.tasks import ResourceType

    who = credentials.find(os.environ)
    scene = scenes.draw(7, (320, 240), difficulty=0, count=(2, 2))
    files = [tmp_path / f"{name}.png" for name in "abc"]
    for file in files:
        cv2.imwrite(str(file), np.ascontiguousarray(scene.pixels[..., ::-1]))
    with logged_in_sdk(os.environ["CVAT_HOST"], who) as sdk:
        labels = [{"name": "shape", "attributes": [score_spec()]}]
        task = sdk.tasks.create_from_data(
            spec={"name": "sam_poll test", "labels": labels, "segment_size": 2, "overlap": 1},
            resource_type=ResourceType.LOCAL,
            resources=files,
        )
        try:
            connection = client.connect(os.environ["CVAT_HOST"], who)
            label = connection.labels(task=task.id)[0]["id"]
            drawn = [
                {
                    "type": "rectangle",
                    "frame": 1,
                    "label_id": label,
                    "points": [b.x0, b.y0, b.x1, b.y1],
                    "group": 0,
                }
                for b in map(scenes.box_of, scene.masks)
            ]
            connection.change_shapes(task.id, "create", drawn)
            jobs = [job["id"] for job in connection.jobs(task.id)]
            assert len(jobs) == 2
            chosen = settings.load(None, flags={"model": "demo", "device": "cpu"})
            for named in ((jobs[0],), (), ()):
                options = MasksOptions(replace=True, jobs=named)
                code = masks.run(connection, task.id, options, chosen, tmp_path)
                assert code == ExitCode.OK
                for job in jobs:
                    written = list(connection.annotations(task.id, job=job)["shapes"])
                    kind = "rectangle" if named and job not in named else "mask"
                    assert [shape["type"] for shape in written] == [kind] * 2
            for truth in scene.masks:
                assert max(scenes.iou(bitmap(shape, scene.size), truth) for shape in written) > 0.85
        finally:
            task.remove()
