"""Boxes drawn in a CVAT task come back as masks: exact, once, and with nothing lost wherever a run is cut off."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from sam_poll import geometry, settings
from sam_poll.cli import app
from sam_poll.cvat import credentials, masks, server, shapes, upload
from sam_poll.cvat.calls import FailedError, Limits
from sam_poll.cvat.journal import Journal
from sam_poll.cvat.masks import Wish
from sam_poll.engines.fake import FakeEngine
from sam_poll.errors import CvatError, ExitCode, ShareError, UsageError
from sam_poll.types import Bitmap, Size
from tests.conftest import picture_bytes
from tests.cvat_standin import TOKEN, Fault, StandIn, Task, score_spec, served
from tools import scenes

WHO = credentials.Credentials(token=TOKEN)
QUICK = Limits(connect_s=2.0, read_s=5.0, pauses_s=(0.0, 0.0, 0.0), poll_s=0.0)
ONCE = Limits(connect_s=2.0, read_s=5.0, pauses_s=(), poll_s=0.0)
SIZE = Size(64, 48)


@pytest.fixture
def memory() -> StandIn:
    return StandIn()


@pytest.fixture
def host(memory: StandIn) -> Iterator[str]:
    with served(memory) as address:
        yield address


def boxed(memory: StandIn, *labels: Any) -> Task:
    """Three pictures: two boxes, a box with a click of its group, a lone click; and what cannot be asked with."""
    frames = [(f"done/cam1/{n}.png", picture_bytes(".png", *SIZE, seed=n)) for n in range(3)]
    task = memory.add_task("cam1", frames, *(labels or ("dog", "cat")))
    memory.draw(task, 0, "rectangle", "dog", [5.3, 5.4, 30.2, 30.1], occluded=True, z_order=3)
    memory.draw(task, 0, "rectangle", "cat", [32.5, 8, 60, 40.25])
    memory.draw(task, 1, "rectangle", "dog", [10.2, 10.2, 40.3, 40.3], group=4)
    memory.draw(task, 1, "points", "dog", [20, 20, 24, 26], group=4)
    memory.draw(task, 2, "points", "cat", [30, 30])
    memory.draw(task, 2, "polygon", "dog", [1, 1, 9, 1, 9, 9])
    return task


class Run:
    """One person's command on one machine: the same journal again and again."""

    def __init__(self, host: str, state: Path, engine: Callable[[Any], Any] | None = None) -> None:
        self.host, self.state = host, state
        self.engines: list[FakeEngine] = []
        self.engine = engine or self._fake

    def _fake(self, _: Any) -> FakeEngine:
        self.engines.append(FakeEngine())
        return self.engines[-1]

    def __call__(self, task: Task, *, limits: Limits = QUICK, **wish: Any) -> ExitCode:
        known = server.connect(self.host, WHO, limits=limits)
        chosen = settings.load(None, env={}, flags={"model": "demo", "device": "cpu"})
        return masks.run(known, task.id, Wish(**wish), chosen, self.state, engine_of=self.engine)

    @property
    def decoded(self) -> int:
        return sum(engine.calls["decode"] for engine in self.engines)


@pytest.fixture
def run(host: str, tmp_path: Path) -> Run:
    return Run(host, tmp_path / "state")


def of(task: Task, kind: str) -> list[dict[str, Any]]:
    return [shape for shape in task.shapes if shape["type"] == kind]


def bitmap(shape: dict[str, Any], size: Size) -> Bitmap:
    return geometry.paste(shapes.unflat(shape["points"], "", 0.0), size)


# ── the whole trip ──


def drawn_scenes(memory: StandIn) -> tuple[Task, list[scenes.Scene]]:
    drawn = [scenes.draw(seed, (320, 240), difficulty=0, count=(2, 2)) for seed in (7, 30)]
    files = [cv2.imencode(".png", np.ascontiguousarray(scene.pixels[..., ::-1]))[1].tobytes() for scene in drawn]
    task = memory.add_task("scenes", [(f"done/{n}.png", data) for n, data in enumerate(files)], "shape")
    for frame, scene in enumerate(drawn):
        for mask in scene.masks:
            box = scenes.box_of(mask)
            memory.draw(task, frame, "rectangle", "shape", [box.x0, box.y0, box.x1, box.y1])
    return task, drawn


def test_boxes_drawn_in_a_task_come_back_as_masks_of_what_is_in_them(
    memory: StandIn, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, drawn = drawn_scenes(memory)
    monkeypatch.setenv("CVAT_HOST", host)
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", TOKEN)
    command = ["cvat", "masks", str(task.id), "-m", "demo", "--device", "cpu", "--state", str(tmp_path)]
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
    assert not any("/data/?" in line for line in memory.log)
    first = task.plain()
    assert Run(run.host, tmp_path / "other")(task) == ExitCode.OK
    assert sum("/data/?" in line for line in memory.log) == 3
    assert task.plain() == first


# ── what is written ──


def test_masks_lie_beside_the_boxes_with_their_label_flags_and_layer(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    before = [dict(shape) for shape in task.shapes]
    assert run(task) == ExitCode.OK
    assert task.shapes[: len(before)] == before
    made = task.shapes[len(before) :]
    assert [shape["type"] for shape in made] == ["mask"] * 4
    first = made[0]
    assert (first["label_id"], first["occluded"], first["z_order"]) == (task.labels[0]["id"], True, 3)


def test_attributes_of_the_box_are_kept_and_the_score_goes_beside_them(memory: StandIn, run: Run) -> None:
    spec = {"name": "dog", "attributes": [{"name": "breed", "input_type": "text", "values": [""]}, score_spec()]}
    task = memory.add_task("t", [("a.png", picture_bytes(".png", *SIZE))], spec)
    breed, score = (attribute["id"] for attribute in task.labels[0]["attributes"])
    said = [{"spec_id": breed, "value": "poodle"}, {"spec_id": score, "value": "0.1"}]
    memory.draw(task, 0, "rectangle", "dog", [5, 5, 30, 30], attributes=said)
    assert run(task, replace=True) == ExitCode.OK
    (mask,) = task.shapes
    assert mask["attributes"] == [{"spec_id": breed, "value": "poodle"}, {"spec_id": score, "value": "0.95"}]


@pytest.mark.parametrize(
    ("attribute", "written"),
    [
        (score_spec("number", ("0", "1", "0.01")), ["0.95"]),
        (score_spec("number", ("0", "0.5", "0.1")), []),
        (score_spec("checkbox", ("false",)), []),
    ],
)
def test_a_score_is_written_only_where_the_attribute_takes_it(
    memory: StandIn, run: Run, attribute: dict[str, Any], written: list[str]
) -> None:
    label = {"name": "dog", "attributes": [attribute]}
    task = memory.add_task("t", [("a.png", picture_bytes(".png", *SIZE))], label)
    memory.draw(task, 0, "rectangle", "dog", [5, 5, 30, 30])
    assert run(task) == ExitCode.OK
    assert [a["value"] for a in of(task, "mask")[0]["attributes"]] == written


def test_a_rectangle_is_the_tight_box_of_the_mask(memory: StandIn, run: Run, tmp_path: Path) -> None:
    task = boxed(memory)
    assert run(task) == ExitCode.OK
    assert run(task, form="rectangle") == ExitCode.OK
    tight = {(s["frame"], *s["points"]) for s in of(task, "rectangle") if s["source"] == "auto"}
    for shape in of(task, "mask"):
        *_, left, top, right, bottom = shape["points"]
        assert (shape["frame"], left, top, right + 1, bottom + 1) in tight
    assert run.decoded == 3  # what was computed for the masks was enough


def test_our_own_rectangles_are_not_asked_for_again(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    for _ in range(3):
        assert run(task, form="rectangle") == ExitCode.OK
    assert sum(shape["source"] == "auto" for shape in task.shapes) == 4


@pytest.mark.parametrize("replace", [False, True])
def test_a_box_that_is_tight_already_is_neither_doubled_nor_deleted(memory: StandIn, run: Run, replace: bool) -> None:
    task = memory.add_task("t", [("a.png", picture_bytes(".png", *SIZE))], "dog")
    memory.draw(task, 0, "rectangle", "dog", [5, 5, 30, 30], group=1)  # the fake engine's ellipse touches its sides
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


@pytest.mark.parametrize("form", ["mask", "polygon", "rectangle"])
def test_replace_leaves_the_answers_and_what_was_not_asked_with(memory: StandIn, run: Run, form: str) -> None:
    task = boxed(memory)
    assert run(task, form=form, replace=True) == ExitCode.OK
    assert len(of(task, "points")) == 0
    assert [s["source"] for s in of(task, "rectangle")] == (["auto"] * 4 if form == "rectangle" else [])
    assert sum(shape["source"] == "auto" for shape in task.shapes) == 4
    assert [shape["points"] for shape in of(task, "polygon") if shape["source"] == "manual"] == [[1, 1, 9, 1, 9, 9]]


def test_replace_after_a_run_without_it_deletes_the_boxes_and_computes_nothing(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    assert run(task) == ExitCode.OK
    assert run(task, replace=True) == ExitCode.OK
    assert [shape["type"] for shape in task.shapes] == ["polygon"] + ["mask"] * 4
    assert len(run.engines) == 1


def test_replace_asks_again_where_an_answer_of_an_earlier_run_is_lost(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    assert run(task) == ExitCode.OK
    for file in run.state.rglob("answers/*.json"):
        file.unlink()
    assert run(task, replace=True) == ExitCode.OK
    assert (len(of(task, "rectangle")), len(of(task, "points")), len(of(task, "mask"))) == (0, 0, 4)


def test_an_object_whose_mask_is_empty_keeps_its_box_and_is_told(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    task.shapes = []
    kept = [memory.draw(task, 0, "rectangle", "dog", [20, 20, 20.2, 20.2])]
    memory.draw(task, 0, "rectangle", "cat", [5, 5, 30, 30])
    kept += [memory.draw(task, 1, "rectangle", "cat", [20, 20, 20.2, 20.2 + n / 100]) for n in range(9)]
    assert run(task, replace=True) == ExitCode.OK
    assert [shape["id"] for shape in of(task, "rectangle")] == kept
    assert len(of(task, "mask")) == 1
    said = capsys.readouterr().err
    assert "0.png: 'dog': the mask is empty; what asked for it is kept" in said
    assert "1.png: 'cat': 9 masks are empty; what asked for it is kept" in said


def test_a_box_that_was_moved_meanwhile_is_not_deleted(
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


# ── what is asked ──


def test_labels_choose_the_objects_and_their_clicks_come_along(memory: StandIn, run: Run) -> None:
    task = boxed(memory, "dog", "cat", "off")
    memory.draw(task, 0, "points", "off", [10, 10])
    assert run(task, labels=("dog",), negatives=("off",)) == ExitCode.OK
    dog = task.labels[0]["id"]
    assert [(shape["frame"], shape["label_id"]) for shape in of(task, "mask")] == [(0, dog), (1, dog)]
    assert not bitmap(of(task, "mask")[0], SIZE)[10, 10]


def test_a_ticked_attribute_makes_points_negative(memory: StandIn, run: Run) -> None:
    tick = {"name": "negative", "mutable": False, "input_type": "checkbox", "values": ["false"]}
    task = memory.add_task("t", [("a.png", picture_bytes(".png", *SIZE))], {"name": "dog", "attributes": [tick]})
    ticked = [{"spec_id": task.labels[0]["attributes"][0]["id"], "value": "true"}]
    memory.draw(task, 0, "rectangle", "dog", [5, 5, 40, 40])
    memory.draw(task, 0, "points", "dog", [22, 22], attributes=ticked)
    assert run(task) == ExitCode.OK
    (mask,) = of(task, "mask")
    assert not bitmap(mask, SIZE)[22, 22]


@pytest.mark.parametrize("wish", [{"labels": ("dgo",)}, {"negatives": ("dgo",)}])
def test_a_label_that_the_task_lacks_is_refused_with_those_it_has(
    memory: StandIn, run: Run, wish: dict[str, Any]
) -> None:
    task = boxed(memory)
    with pytest.raises(UsageError, match="cat, dog"):
        run(task, **wish)


def test_frames_deleted_in_the_task_are_skipped(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    task.deleted = [0]
    assert run(task) == ExitCode.OK
    assert {shape["frame"] for shape in of(task, "mask")} == {1, 2}


def test_tracks_and_other_shapes_are_counted_and_told(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    task.tracks = [{"id": 1, "shapes": []}] * 2
    assert run(task) == ExitCode.OK
    assert "not asked for: 1 polygon, 2 track" in capsys.readouterr().err


def test_a_label_type_that_forbids_the_answer_is_told_before_anything_is_computed(memory: StandIn, run: Run) -> None:
    task = boxed(memory, {"name": "dog", "type": "rectangle"}, "cat")
    with pytest.raises(CvatError, match=r"'dog' may not have shapes of type mask") as caught:
        run(task)
    assert caught.value.kind == ExitCode.CVAT_REFUSED
    assert run.engines == []
    assert memory.writes() == []
    assert run(task, labels=("cat",)) == ExitCode.OK


def test_bad_pictures_and_prompts_are_told_and_the_others_go_on(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory)
    task.frames[2] = ("done/cam1/2.png", task.frames[2][1])
    memory.draw(task, 0, "rectangle", "dog", [500, 500, 600, 600])
    whole = task.frames[1][1]
    memory.when = lambda method, path: Fault(404) if "number=1&" in path else None
    assert run(task) == ExitCode.FAILED_JOBS
    said = capsys.readouterr().err
    assert "done/cam1/0.png: 'dog' box.x0: 500 lies outside the picture" in said
    assert "done/cam1/1.png" in said
    assert [shape["frame"] for shape in of(task, "mask")] == [0, 0, 2]
    memory.when = lambda method, path: None
    assert whole
    assert run(task) == ExitCode.FAILED_JOBS  # the box outside is still there
    assert len(of(task, "mask")) == 4


def test_points_that_do_not_tell_whose_they_are_leave_the_boxes_beside_them_alone(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = boxed(memory, "dog", "cat", "negative")
    task.shapes = []
    clear = [memory.draw(task, 0, "rectangle", "dog", [1, 1 + 4 * n, 9, 4 + 4 * n]) for n in range(9)]
    memory.draw(task, 0, "rectangle", "cat", [20, 20, 50, 40])
    memory.draw(task, 0, "rectangle", "cat", [25, 20, 55, 40], group=3)
    memory.draw(task, 0, "points", "negative", [30, 30])  # in both
    memory.draw(task, 0, "rectangle", "dog", [57, 1, 63, 6], group=5)
    memory.draw(task, 0, "rectangle", "dog", [57, 8, 63, 14], group=5)
    memory.draw(task, 0, "points", "dog", [1, 47], group=5)  # in neither
    assert run(task, replace=True) == ExitCode.FAILED_JOBS
    assert "0.png" in (said := capsys.readouterr().err)
    assert "9 of 13 boxes are answered" in said
    left = {shape["id"] for shape in task.shapes}
    assert not left & set(clear)
    assert (len(of(task, "mask")), len(of(task, "rectangle")), len(of(task, "points"))) == (9, 4, 2)


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


def test_a_frame_name_never_leads_out_of_the_share(memory: StandIn, run: Run, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture_bytes(".png", *SIZE))
    (tmp_path / "share").mkdir()
    task = memory.add_task("t", [("../secret.png", picture_bytes(".png", *SIZE))], "dog")
    memory.draw(task, 0, "rectangle", "dog", [5, 5, 30, 30])
    assert run(task, images=tmp_path / "share") == ExitCode.FAILED_JOBS
    assert of(task, "mask") == []


def test_dry_run_writes_nothing_anywhere(memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    task = boxed(memory)
    assert run(task, dry_run=True, replace=True) == ExitCode.OK
    assert memory.writes() == []
    assert not run.state.exists()
    assert run.engines == []
    assert "4 objects (2 cat, 2 dog) on 3 pictures" in capsys.readouterr().err


# ── again, and after whatever happened ──


@pytest.mark.parametrize("wish", [{}, {"replace": True}, {"form": "polygon"}, {"form": "rectangle", "replace": True}])
def test_running_it_again_changes_nothing(memory: StandIn, run: Run, wish: dict[str, Any]) -> None:
    task = boxed(memory)
    assert run(task, **wish) == ExitCode.OK
    before, writes = task.plain(), len(memory.writes())
    assert run(task, **wish) == ExitCode.OK
    assert task.plain() == before
    assert len(memory.writes()) == writes
    assert len(run.engines) == 1


def test_a_task_with_nothing_left_to_do_is_read_once(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    assert run(task) == ExitCode.OK
    asked = len(memory.log)
    assert run(task) == ExitCode.OK
    assert sum("/annotations/" in line for line in memory.log[asked:]) == 1


def test_masks_on_the_server_are_known_again_without_a_journal(memory: StandIn, run: Run, tmp_path: Path) -> None:
    task = boxed(memory)
    assert run(task) == ExitCode.OK
    before = task.plain()
    assert Run(run.host, tmp_path / "another machine")(task) == ExitCode.OK
    assert task.plain() == before


def test_what_a_person_has_changed_or_deleted_is_left_alone_until_asked_for(memory: StandIn, run: Run) -> None:
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


def test_only_a_box_that_was_moved_is_asked_anew(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    assert run(task) == ExitCode.OK
    task.shapes[0]["points"] = [6.0, 6.0, 33.0, 33.0]
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 5
    assert run.engines[1].calls["decode"] == 1


def undisturbed(tmp_path: Path, **wish: Any) -> tuple[list[Any], int]:
    memory = StandIn()
    task = boxed(memory)
    with served(memory) as host:
        assert Run(host, tmp_path / "undisturbed")(task, **wish) == ExitCode.OK
    return task.plain(), len(memory.log)


@pytest.mark.parametrize("wish", [{}, {"replace": True}, {"form": "polygon", "replace": True}], ids=str)
def test_cut_off_before_or_after_any_request_the_next_run_gives_the_same_task(
    tmp_path: Path, wish: dict[str, Any]
) -> None:
    wanted, requests = undisturbed(tmp_path, **wish)
    assert requests > 9
    for number in range(1, requests + 1):
        for after in (False, True):
            memory = StandIn()
            task = boxed(memory)
            memory.faults = {number: Fault("drop", after=after)}
            with served(memory) as host:
                run = Run(host, tmp_path / f"{number}-{after}")
                with pytest.raises(FailedError):
                    run(task, limits=ONCE, **wish)
                assert run(task, limits=ONCE, **wish) == ExitCode.OK
            assert task.plain() == wanted, f"request {number}, {after=}"
            assert run.decoded <= 4  # nothing that was kept is computed again


@pytest.mark.parametrize("fault", [Fault(502), Fault("drop"), Fault("drop", after=True), Fault("cut", after=True)])
def test_a_write_that_failed_is_not_done_twice(memory: StandIn, run: Run, tmp_path: Path, fault: Fault) -> None:
    wanted, _ = undisturbed(tmp_path, replace=True)
    task = boxed(memory)
    failed: list[str] = []

    def first_of_each(method: str, path: str) -> Fault | None:
        if method != "PATCH" or path in failed:
            return None
        failed.append(path)
        return fault

    memory.when = first_of_each
    assert run(task, replace=True) == ExitCode.OK
    assert len(failed) == 2
    assert task.plain() == wanted


def test_a_write_that_a_server_ends_late_leaves_nothing_twice(memory: StandIn, run: Run, tmp_path: Path) -> None:
    wanted, _ = undisturbed(tmp_path)
    task = boxed(memory)
    late: list[Any] = []

    def slow(method: str, path: str) -> Fault | None:
        if method == "PATCH" and not late:
            late.append(memory.bodies[-1])
            return Fault(504)
        if "create" in path:  # the second attempt: by now the first is done, too
            memory.patch_annotations(task.id, query={"action": "create"}, body=late[0])
        return None

    memory.when = slow
    assert run(task) == ExitCode.OK
    assert task.plain() == wanted


class Killed(BaseException):
    """The process ends here."""


def test_killed_around_any_write_the_next_run_gives_the_same_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, _ = undisturbed(tmp_path, replace=True)
    calls, end = [0], [0, False]

    def lethal(kind: type, name: str) -> None:
        real = getattr(kind, name)

        def call(*args: Any) -> Any:
            calls[0] += 1
            if end == [calls[0], False]:
                raise Killed
            value = real(*args)
            if end == [calls[0], True]:
                raise Killed
            return value

        monkeypatch.setattr(kind, name, call)

    lethal(Journal, "note")
    lethal(server.Server, "change")
    number = 0
    while True:
        number += 1
        for after in (False, True):
            memory = StandIn()
            task = boxed(memory)
            with served(memory) as host:
                run = Run(host, tmp_path / f"{number}-{after}")
                calls[0], end[:] = 0, [number, after]
                try:
                    run(task, replace=True)
                except Killed:
                    end[:] = [0, False]
                    assert run(task, replace=True) == ExitCode.OK
                assert task.plain() == wanted, f"call {number}, {after=}"
        if calls[0] < number:
            break
    assert number > 4


def test_a_server_that_refuses_the_masks_costs_nothing_but_a_second_command(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    memory.when = lambda method, path: Fault(403) if method == "PATCH" else None
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
    monkeypatch.setattr(memory, "patch_annotations", lambda *_, body, **__: body)
    with pytest.raises(CvatError, match="does not have 4 of them"):
        run(task, replace=True)
    assert len(of(task, "rectangle")) == 3


def test_a_server_lost_while_pictures_are_fetched_ends_it_and_keeps_what_is_there(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    memory.when = lambda method, path: Fault(401) if "number=2&" in path else None
    with pytest.raises(CvatError) as caught:
        run(task)
    assert caught.value.kind == ExitCode.CVAT_UNAUTHORIZED
    memory.when = lambda method, path: None
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 4
    assert run.decoded == 3


def test_a_picture_that_the_server_fails_at_costs_no_other_picture(
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


def test_a_server_that_fails_at_every_picture_is_not_asked_for_all_of_them(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    task.frames = [(f"{number}.png", task.frames[0][1]) for number in range(40)]
    for number in range(3, 40):
        memory.draw(task, number, "rectangle", "dog", [5, 5, 30, 30])
    memory.when = lambda method, path: Fault(500) if "/data/?" in path else None
    with pytest.raises(CvatError) as caught:
        run(task, limits=ONCE)
    assert caught.value.kind == ExitCode.CVAT_SERVER
    assert sum("/data/?" in line for line in memory.log) < 20


@pytest.mark.parametrize("points", [[8000, 0] * 30_000, [8765.43] * 60_000, [8765.43] * 4000, [1] * 8])
def test_a_request_stays_below_what_a_proxy_takes_by_itself(points: list[float]) -> None:
    label = shapes.Label(1_000_000, "dog", "any", shapes.Attribute(1_000_000))
    one = shapes.entry(100_000, label, "mask", points, 0.98765)
    count = 100 if len(points) > 10_000 else 1000
    pieces = list(upload._pieces([one] for _ in range(count)))
    assert sum(map(len, pieces)) == count
    assert max(len(json.dumps(piece)) for piece in pieces) < 1 << 20


def test_two_commands_on_one_task_do_not_work_at_once(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    with Journal(next_folder(run, task)), pytest.raises(UsageError, match="another sam-poll"):
        run(task)
    assert run(task) == ExitCode.OK


def next_folder(run: Run, task: Task) -> Path:
    from sam_poll.cvat.journal import folder_of

    return folder_of(run.state, run.host, f"task-{task.id}")


def test_a_journal_that_cannot_be_kept_is_told_before_anything_is_computed(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    run.state.parent.mkdir(exist_ok=True)
    run.state.write_text("a file where the folder should be")
    with pytest.raises(ShareError, match="--state"):
        run(task)
    assert run.engines == []


def test_answers_that_cannot_be_kept_end_the_run(memory: StandIn, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    task = boxed(memory)

    def full(path: Path, body: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sam_poll.cvat.journal.write_whole", full)
    with pytest.raises(ShareError, match="No space left"):
        run(task)
    assert memory.writes() == []


def test_a_broken_answer_file_is_asked_for_again(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    memory.when = lambda method, path: Fault(403) if method == "PATCH" else None
    with pytest.raises(CvatError):
        run(task)
    files = sorted(run.state.rglob("*.json"))
    files[0].write_bytes(b"{")
    memory.when = lambda method, path: None
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 4
    assert run.engines[1].calls["decode"] == 1


def test_ctrl_c_while_masks_are_uploaded_tells_how_to_go_on(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = boxed(memory)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server.Server, "change", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(task)
    assert "the same command goes on from there" in capsys.readouterr().err
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
def test_a_damaged_answer_is_asked_for_again(memory: StandIn, run: Run, damaged: Any) -> None:
    task = boxed(memory)
    memory.when = lambda method, path: Fault(403) if method == "PATCH" else None
    with pytest.raises(CvatError):
        run(task)
    for file in run.state.rglob("answers/*.json"):
        file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), damaged)))
    memory.when = lambda method, path: None
    assert run(task) == ExitCode.OK
    assert len(of(task, "mask")) == 4
    assert run.engines[1].calls["decode"] == 3


def test_half_a_line_that_a_full_disk_has_left_spoils_no_other(memory: StandIn, run: Run) -> None:
    task = boxed(memory)
    next_folder(run, task).mkdir(parents=True)
    for name in ("written", "done"):
        (next_folder(run, task) / f"{name}.txt").write_text("0badc0de")
    assert run(task, form="rectangle") == ExitCode.OK
    assert len(of(task, "rectangle")) == 7
    assert run(task, form="mask") == ExitCode.OK
    assert len(of(task, "mask")) == 4  # none for one of the four rectangles that are ours
    task.shapes = [shape for shape in task.shapes if shape["type"] != "mask"]
    assert run(task, form="mask") == ExitCode.OK
    assert of(task, "mask") == []  # they were done, and somebody has deleted them


def test_ctrl_c_keeps_what_is_answered_and_ends_with_130(
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
    assert "the same command goes on from there" in done.output
    assert memory.writes() == []
    assert list(tmp_path.rglob("answers/*.json"))
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len(of(task, "mask")) == 4
    assert sum(engine.calls["decode"] for engine in engines) <= 4


@pytest.mark.parametrize(
    ("flags", "code"),
    [
        (["--as", "cloud"], ExitCode.USAGE),
        (["--images", "no/such/folder"], ExitCode.USAGE),
        (["--token-file", "no/such/file"], ExitCode.SETTINGS),
        (["--host", "http://user:pw@example.org"], ExitCode.USAGE),
        (["--host", "ftp://example.org"], ExitCode.USAGE),
    ],
)
def test_flags_that_make_no_sense_are_refused_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, flags: list[str], code: ExitCode
) -> None:
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", TOKEN)
    monkeypatch.setenv("CVAT_HOST", "http://127.0.0.1:1")
    done = CliRunner().invoke(app, ["cvat", "masks", "7", *flags])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output


def test_a_task_that_is_not_there_ends_with_44(
    memory: StandIn, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", TOKEN)
    done = CliRunner().invoke(app, ["cvat", "masks", "99", "--host", host, "--state", str(tmp_path)])
    assert done.exit_code == ExitCode.CVAT_NOT_FOUND
    assert "task 99" in done.output


@pytest.mark.cvat
@pytest.mark.skipif("CVAT_HOST" not in os.environ, reason="CVAT_HOST names no server")
def test_the_trip_on_a_real_server(tmp_path: Path) -> None:
    from cvat_sdk import make_client
    from cvat_sdk.core.proxies.tasks import ResourceType

    who = credentials.find(os.environ)
    scene = scenes.draw(7, (320, 240), difficulty=0, count=(2, 2))
    file = tmp_path / "scene.png"
    cv2.imwrite(str(file), np.ascontiguousarray(scene.pixels[..., ::-1]))
    given: dict[str, Any] = {"access_token": who.token} if who.token else {"credentials": (who.user, who.password)}
    with make_client(os.environ["CVAT_HOST"], **given) as client:
        labels = [{"name": "shape", "attributes": [score_spec()]}]
        made = client.tasks.create_from_data(
            spec={"name": "sam_poll test", "labels": labels}, resource_type=ResourceType.LOCAL, resources=[file]
        )
        try:
            known = server.connect(os.environ["CVAT_HOST"], who)
            label = known.labels(task=made.id)[0]["id"]
            boxes = [scenes.box_of(mask) for mask in scene.masks]
            drawn = [
                {"type": "rectangle", "frame": 0, "label_id": label, "points": [b.x0, b.y0, b.x1, b.y1], "group": 0}
                for b in boxes
            ]
            known.change(made.id, "create", drawn)
            chosen = settings.load(None, flags={"model": "demo", "device": "cpu"})
            for _ in range(2):
                assert masks.run(known, made.id, Wish(replace=True), chosen, tmp_path) == ExitCode.OK
                found = list(known.annotations(made.id)["shapes"])
                assert [shape["type"] for shape in found] == ["mask"] * 2
            for truth in scene.masks:
                assert max(scenes.iou(bitmap(shape, scene.size), truth) for shape in found) > 0.85
        finally:
            made.remove()
