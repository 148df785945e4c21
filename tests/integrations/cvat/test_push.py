"""Tests of `cvat push`: the task has exactly the pictures and each mask once, after any failure."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sam_poll.cli.main import app
from sam_poll.core.errors import CvatError, ExitCode, UsageError
from sam_poll.core.types import Mask, ModelInfo, Prompt, Result, Size
from sam_poll.formats import registry
from sam_poll.formats.cvat import flat
from sam_poll.formats.merge.common import share_prefix
from sam_poll.imaging import outlines
from sam_poll.integrations.cvat import answers, client, credentials, push
from sam_poll.integrations.cvat.push import PushOptions
from sam_poll.integrations.cvat.transport import RequestFailedError, RequestLimits
from tests.conftest import picture_bytes
from tests.support.cvat_server import (
    PASSWORD,
    TOKEN,
    USER,
    Fault,
    Refusal,
    StandIn,
    Task,
    score_spec,
    served,
)

WHO = credentials.Credentials(token=TOKEN)
QUICK = RequestLimits(connect_s=2.0, read_s=5.0, retry_delays_s=(0.0, 0.0, 0.0), poll_s=0.0)
ONCE = RequestLimits(connect_s=2.0, read_s=5.0, retry_delays_s=(), poll_s=0.0)
SIZE = Size(64, 48)
NAMES = ["done/cam1/a.jpg", "done/cam1/b.jpg", "done/cam2/a.jpg"]
LATER = ["done/cam3/a.jpg", "done/cam3/b.jpg"]
# A server whose shapes have a score of their own, and one whose shapes have not.
VERSIONS = pytest.mark.parametrize("version", ["2.73.0", "2.23.1"])


def masks(seed: int) -> tuple[Mask, ...]:
    """Return a ring and a bar of two labels, at positions that depend on the picture."""
    ring = np.ones((9, 11), bool)
    ring[3:6, 3:6] = False
    bar = np.ones((4, 20), bool)
    return Mask("dog", 0.91, 3 + seed, 5, ring), Mask("cat", 0.5 + seed / 100, 20, 20 + seed, bar)


class Share:
    """A share with pictures in `done/` and answers in `out/`, masks' PNGs beside them."""

    def __init__(self, root: Path, form: str = "mask") -> None:
        self.root, self.out = root, root / "out"
        for seed, name in enumerate(NAMES):
            self.picture(name, seed)
            self.answer(name, masks(seed), form=form)
        (root / "done" / "cam1" / "a.mask.png").write_bytes(picture_bytes(".png"))

    def picture(self, name: str, seed: int = 0, size: Size = SIZE) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture_bytes(".jpg", *size, seed=seed))

    def answer(self, name: str, made: tuple[Mask, ...], form: str = "mask") -> None:
        prompts = tuple(Prompt(mask.label) for mask in made)
        result = Result(
            name, name, SIZE, made, prompts, ModelInfo("m", "sam2", 256, "cpu", "float32")
        )
        (make,) = registry.load(["cvat"], registry.FormatOptions(cvat=form))  # type: ignore[arg-type]
        (document,) = make(result)
        path = self.out / f"{name.partition('/')[2]}.cvat.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(document.body)


@pytest.fixture
def share(tmp_path: Path) -> Share:
    return Share(tmp_path / "share")


@pytest.fixture
def memory(share: Share) -> StandIn:
    return StandIn(share.root)


@pytest.fixture
def host(memory: StandIn) -> Iterator[str]:
    with served(memory) as address:
        yield address


def pushed(
    host: str,
    share: Share,
    state: Path,
    *,
    limits: RequestLimits = QUICK,
    prefix: str = "",
    **options: Any,
) -> ExitCode:
    return push.run(
        client.connect(host, WHO, limits=limits),
        answers.read_answers(share.out, share_prefix(prefix)),
        PushOptions(**{"name": "cam", **options}),
        state,
    )


def only(memory: StandIn) -> Task:
    (task,) = memory.tasks.values()
    return task


def add_later(share: Share, names: list[str] = LATER) -> None:
    """Add pictures and answers to a share that has been pushed."""
    for seed, name in enumerate(names, start=len(NAMES)):
        share.picture(name, seed)
        share.answer(name, masks(seed))


def frames(task: Task) -> list[str]:
    return [name for name, _ in task.frames]


def shape_of(task: Task, frame: int, label: str) -> dict[str, Any]:
    (number,) = [one["id"] for one in task.labels if one["name"] == label]
    (shape,) = [s for s in task.shapes if (s["frame"], s["label_id"]) == (frame, number)]
    return shape


@VERSIONS
def test_push_creates_a_task_of_a_share_with_its_masks(
    memory: StandIn,
    host: str,
    share: Share,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
) -> None:
    memory.version = version
    for name, value in (("CVAT_HOST", host), ("CVAT_USERNAME", USER), ("CVAT_PASSWORD", PASSWORD)):
        monkeypatch.setenv(name, value)
    command = [
        "cvat",
        "push",
        str(share.out),
        "--task-name",
        "cam",
        "--state",
        str(tmp_path / "state"),
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    task = only(memory)
    assert [name for name, _ in task.frames] == NAMES  # and no mask's PNG
    assert [label["name"] for label in task.labels] == ["cat", "dog"]
    for label in task.labels:
        attributes = [
            (a["name"], a["input_type"], a["values"], a["default_value"])
            for a in label["attributes"]
        ]
        expected = [] if memory.has_native_score else [("score", "text", ["1"], "1")]
        assert attributes == expected
    labels = {label["id"]: label["name"] for label in task.labels}
    found = {(s["frame"], labels[s["label_id"]]): s for s in task.shapes}
    assert len(found) == len(task.shapes) == 6
    for frame in range(3):
        for mask in masks(frame):
            shape = found[frame, mask.label]
            assert shape["points"] == flat(mask)
            score = shape["score"] if "score" in shape else shape["attributes"][0]["value"]
            assert float(score) == round(mask.score, 4)
            assert (shape["type"], shape["source"], shape["group"]) == ("mask", "auto", 0)
    assert f"{host}/tasks/{task.id}" in done.output


@VERSIONS
def test_what_push_has_created_can_be_exported_as_coco_once_a_person_has_drawn_on_it(
    memory: StandIn, host: str, share: Share, tmp_path: Path, version: str
) -> None:
    memory.version = version
    assert pushed(host, share, tmp_path) == ExitCode.OK
    memory.draw(only(memory), 0, "rectangle", "dog", [1, 1, 9, 9])
    exported = memory.export_coco(only(memory))
    assert len(exported) == 7
    assert exported[-1]["score"] == 1


def test_the_stand_in_cannot_export_an_attribute_score_without_a_number() -> None:
    memory = StandIn()
    task = memory.add_task("cam", [("a.jpg", picture_bytes(".jpg", *SIZE))], "dog")
    memory.draw(task, 0, "rectangle", "dog", [1, 1, 9, 9])
    with pytest.raises(Refusal, match="500"):
        memory.export_coco(task)


@VERSIONS
def test_a_label_that_has_the_attribute_gets_the_score_on_every_server(
    memory: StandIn, host: str, share: Share, tmp_path: Path, version: str
) -> None:
    memory.version = version
    memory.projects[5] = memory.labels("dog", "cat")
    assert pushed(host, share, tmp_path, project=5) == ExitCode.OK
    shape = shape_of(only(memory), 0, "dog")
    assert [a["value"] for a in shape["attributes"]] == ["0.91"]
    assert shape.get("score") == (0.91 if memory.has_native_score else None)


@VERSIONS
def test_a_missing_label_is_named_with_the_attribute_that_it_needs(
    memory: StandIn, host: str, share: Share, tmp_path: Path, version: str
) -> None:
    memory.version = version
    memory.projects[5] = memory.labels("dog")
    with pytest.raises(CvatError, match="no label cat") as caught:
        pushed(host, share, tmp_path, project=5)
    advice = "with a text attribute `score` whose default value is 1"
    assert (advice in str(caught.value.remedy)) == (not memory.has_native_score)


def test_pictures_that_differ_in_their_extensions_only_get_their_own_masks(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    """CVAT's import of a file cannot tell them apart; its API can."""
    share.picture("done/cam1/a.png", 7)
    share.answer("done/cam1/a.png", masks(7))
    assert pushed(host, share, tmp_path) == ExitCode.OK
    task = only(memory)
    lefts = {
        task.frames[number][0]: shape_of(task, number, "dog")["points"][-4] for number in (0, 1)
    }
    assert lefts == {"done/cam1/a.jpg": 3, "done/cam1/a.png": 10}


def test_frames_are_matched_by_name_and_not_by_order(
    memory: StandIn, host: str, share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = memory.get_meta

    def turned(number: int, **more: Any) -> Any:
        task = memory.tasks[number]
        task.frames = task.frames[::-1] if task.frames[0][0] == NAMES[0] else task.frames
        return real(number, **more)

    monkeypatch.setattr(memory, "get_meta", turned)
    assert pushed(host, share, tmp_path) == ExitCode.OK
    task = only(memory)
    dog = next(label["id"] for label in task.labels if label["name"] == "dog")
    lefts = {
        task.frames[s["frame"]][0]: s["points"][-4] for s in task.shapes if s["label_id"] == dog
    }
    assert lefts == {name: 3 + seed for seed, name in enumerate(NAMES)}


def test_polygons_are_the_masks_outlines(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    assert pushed(host, share, tmp_path, polygon=True) == ExitCode.OK
    task = only(memory)
    assert {shape["type"] for shape in task.shapes} == {"polygon"}
    (outline,) = outlines.outlines(masks(0)[1])
    assert [round(v, 2) for v in outline.ravel()] in [shape["points"] for shape in task.shapes]


def test_answers_written_as_polygons_are_pushed_as_polygons(
    memory: StandIn, host: str, tmp_path: Path
) -> None:
    share = Share(tmp_path / "polygons", form="polygon")
    two = np.zeros((20, 40), bool)
    two[:, :10] = two[:, 30:] = True
    share.answer(NAMES[0], (Mask("dog", 0.9, 5, 5, two),), form="polygon")
    memory.share = share.root
    assert pushed(host, share, tmp_path) == ExitCode.OK
    task = only(memory)
    groups = [shape["group"] for shape in task.shapes if shape["frame"] == 0]
    assert len(groups) == 2
    assert len(set(groups)) == 1
    assert groups[0] > 0


def test_a_prefix_is_put_before_the_names(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    memory.share = tmp_path
    assert pushed(host, share, tmp_path / "state", prefix="/share/") == ExitCode.OK
    assert [name for name, _ in only(memory).frames] == [f"share/{name}" for name in NAMES]


def test_a_task_in_a_project_has_the_projects_labels(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    memory.projects[5] = memory.labels("dog")
    with pytest.raises(CvatError, match="no label cat"):
        pushed(host, share, tmp_path, project=5)
    assert memory.writes() == []
    memory.projects[5] = memory.labels("dog", "cat", {"name": "cow", "attributes": [score_spec()]})
    assert pushed(host, share, tmp_path, project=5) == ExitCode.OK
    assert only(memory).project == 5
    assert len(only(memory).shapes) == 6


def test_further_labels_are_created(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    assert pushed(host, share, tmp_path, labels=("cow", "dog")) == ExitCode.OK
    assert [label["name"] for label in only(memory).labels] == ["cat", "dog", "cow"]


def test_dry_run_writes_nothing(
    memory: StandIn, host: str, share: Share, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pushed(host, share, tmp_path / "state", dry_run=True) == ExitCode.OK
    assert memory.writes() == []
    assert not (tmp_path / "state").exists()
    said = capsys.readouterr().out
    assert all(name in said for name in NAMES)
    assert "3 pictures, 6 objects, labels cat, dog" in said


# ── what is refused ──


def test_pictures_missing_on_the_servers_share_are_reported_before_a_task_is_created(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    (share.root / NAMES[1]).unlink()
    with pytest.raises(CvatError) as caught:
        pushed(host, share, tmp_path)
    assert NAMES[1] in str(caught.value)
    assert NAMES[0] not in str(caught.value)
    assert "cvat_worker_import" in str(caught.value.remedy)
    assert memory.tasks == {}


def test_a_wrong_prefix_is_reported_before_a_task_is_created(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    with pytest.raises(
        CvatError, match="not found on the server's share: elsewhere/done/cam1/a"
    ) as caught:
        pushed(host, share, tmp_path, prefix="elsewhere")
    assert "--share-prefix" in str(caught.value.remedy)
    assert memory.tasks == {}


@pytest.mark.parametrize("old", [False, True], ids=["requests", "status"])
def test_pictures_that_only_the_worker_misses_are_reported_and_the_same_task_is_continued(
    memory: StandIn,
    host: str,
    share: Share,
    tmp_path: Path,
    old: bool,
) -> None:
    memory.old = old
    lost = share.root / NAMES[1]
    kept = lost.read_bytes()
    lost.unlink()
    memory.when = lambda method, path: (
        Fault(403) if "/server/share" in path else None
    )  # the share may not be listed
    for _ in range(2):
        with pytest.raises(CvatError, match=NAMES[1]) as caught:
            pushed(host, share, tmp_path)
        assert caught.value.kind == ExitCode.CVAT_REFUSED
        assert "cvat_worker_import" in str(caught.value.remedy)
    lost.write_bytes(kept)
    assert pushed(host, share, tmp_path) == ExitCode.OK
    assert len(only(memory).shapes) == 6


def test_a_picture_of_another_size_is_refused_and_nothing_is_uploaded(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    share.picture(NAMES[2], size=Size(48, 64))
    with pytest.raises(CvatError, match="48×64 there, its answer is for 64×48"):
        pushed(host, share, tmp_path)
    assert only(memory).shapes == []


def test_later_answers_need_update_or_another_name(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    assert pushed(host, share, tmp_path) == ExitCode.OK
    add_later(share)
    with pytest.raises(CvatError, match=r"it lacks done/cam3/a\.jpg") as caught:
        pushed(host, share, tmp_path)
    assert "--update" in str(caught.value.remedy)
    assert len(memory.tasks) == 1
    assert pushed(host, share, tmp_path, name="cam, later") == ExitCode.OK
    assert len(memory.tasks) == 2


def test_a_task_without_a_name_is_refused() -> None:
    with pytest.raises(UsageError, match="needs a name"):
        PushOptions(" ")


# ── second runs, and runs after a failure ──


@pytest.mark.parametrize("update", [False, True])
def test_a_second_push_changes_nothing_and_says_that_all_is_there(
    memory: StandIn,
    host: str,
    share: Share,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    update: bool,
) -> None:
    assert pushed(host, share, tmp_path) == ExitCode.OK
    before, writes = only(memory).plain(), len(memory.writes())
    capsys.readouterr()
    assert pushed(host, share, tmp_path, update=update) == ExitCode.OK
    assert only(memory).plain() == before
    assert len(memory.writes()) == writes
    task = only(memory).id
    assert capsys.readouterr().out == (
        f"all is there already: 3 pictures, 6 objects, labels cat, dog, in task {task}; "
        f"nothing was written, {host}/tasks/{task}\n"
    )


@pytest.mark.parametrize("update", [False, True])
def test_shapes_that_a_person_has_changed_or_deleted_are_not_written_again(
    memory: StandIn,
    host: str,
    share: Share,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    update: bool,
) -> None:
    assert pushed(host, share, tmp_path) == ExitCode.OK
    task = only(memory)
    shape_of(task, 0, "dog")["points"] = [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    task.shapes.remove(shape_of(task, 1, "dog"))
    corrected = task.plain()
    assert pushed(host, share, tmp_path, update=update) == ExitCode.OK
    assert task.plain() == corrected
    assert "nothing was written, 2 earlier shapes changed or deleted" in capsys.readouterr().out


def test_duplicates_that_a_late_write_has_made_are_deleted_by_the_next_push(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    assert pushed(host, share, tmp_path) == ExitCode.OK
    task = only(memory)
    before = task.plain()
    task.shapes += [{**shape, "id": memory.number()} for shape in task.shapes[:2]]
    assert pushed(host, share, tmp_path) == ExitCode.OK
    assert task.plain() == before


def test_of_an_answer_that_was_replaced_only_the_new_objects_are_written(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    assert pushed(host, share, tmp_path) == ExitCode.OK
    task = only(memory)
    task.shapes.remove(shape_of(task, 0, "cat"))  # a person did not want it
    dog, cat = masks(0)
    another = Mask("dog", 0.8, 40, 30, np.ones((5, 5), bool))
    share.answer(NAMES[0], (dog, cat, another))
    assert pushed(host, share, tmp_path) == ExitCode.OK
    on_first = [shape["points"] for shape in task.shapes if shape["frame"] == 0]
    assert sorted(on_first) == sorted([flat(dog), flat(another)])


def test_a_task_that_was_deleted_on_the_server_is_created_again(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    assert pushed(host, share, tmp_path) == ExitCode.OK
    memory.tasks.clear()
    assert pushed(host, share, tmp_path) == ExitCode.OK
    assert len(only(memory).shapes) == 6


@pytest.mark.slow
def test_interrupted_at_any_request_the_next_push_gives_the_same_task(
    share: Share, tmp_path: Path
) -> None:
    memory = StandIn(share.root)
    with served(memory) as host:
        assert pushed(host, share, tmp_path / "undisturbed") == ExitCode.OK
    requests, expected = len(memory.log), len(only(memory).shapes)
    assert requests > 12
    for number in range(1, requests + 1):
        for after in (False, True):
            memory = StandIn(share.root)
            memory.add_task("cam", [], "dog")  # somebody else's task of the same name
            other = only(memory)
            memory.faults = {number: Fault("drop", after=after)}
            with served(memory) as host:
                state = tmp_path / f"{number}-{after}"
                with pytest.raises(RequestFailedError):
                    pushed(host, share, state, limits=ONCE)
                assert pushed(host, share, state, limits=ONCE) == ExitCode.OK
            made = [task for task in memory.tasks.values() if task is not other]
            assert len(made) == 1, f"request {number}, {after=}"
            assert [name for name, _ in made[0].frames] == NAMES
            assert len(made[0].shapes) == expected == len({str(line) for line in made[0].plain()})
            assert other.shapes == other.frames == []


@pytest.mark.parametrize(
    "fault", [Fault(503), Fault("drop"), Fault("drop", after=True), Fault("cut", after=True)]
)
def test_a_failed_write_is_checked_and_not_repeated_blindly(
    memory: StandIn, host: str, share: Share, tmp_path: Path, fault: Fault
) -> None:
    failed: list[str] = []

    def first_of_each(method: str, path: str) -> Fault | None:
        if method == "GET" or path in failed:
            return None
        failed.append(path)
        return fault

    memory.when = first_of_each
    assert pushed(host, share, tmp_path) == ExitCode.OK
    assert len(failed) == 3  # the task, its pictures, its annotations
    assert len(only(memory).shapes) == 6
    assert len(memory.writes()) == (3 if fault.after else 6)


def test_two_empty_tasks_of_the_name_are_left_to_a_person(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    memory.when = lambda method, path: (
        Fault("drop", after=True) if (method, path) == ("POST", "/api/tasks") else None
    )
    with pytest.raises(RequestFailedError):
        pushed(host, share, tmp_path, limits=ONCE)
    memory.add_task("cam", [], "dog")
    memory.when = lambda method, path: None
    with pytest.raises(CvatError, match="which of them") as caught:
        pushed(host, share, tmp_path)
    assert caught.value.kind == ExitCode.CVAT_CONFLICT


def test_a_failure_says_that_the_same_command_continues_and_with_which_task(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    memory.when = lambda method, path: Fault(503) if method == "PATCH" else None
    with pytest.raises(RequestFailedError) as caught:
        pushed(host, share, tmp_path, limits=ONCE)
    remedy = str(caught.value.remedy)
    assert remedy.endswith(f"run the same command again; it continues with task {only(memory).id}")
    memory.when = lambda method, path: None
    assert pushed(host, share, tmp_path) == ExitCode.OK
    assert len(only(memory).shapes) == 6


@pytest.mark.parametrize("method", ["POST", "PATCH"])
def test_an_interruption_says_that_the_same_command_continues(
    memory: StandIn,
    host: str,
    share: Share,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    name = {"POST": "create_task", "PATCH": "change_shapes"}[method]
    command = ["cvat", "push", str(share.out), "--task-name", "cam", "--host", host]
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", TOKEN)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with monkeypatch.context() as patched:
        patched.setattr(client.CvatClient, name, interrupted)
        ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 130
    where = f"with task {only(memory).id}" if method == "PATCH" else "from here"
    assert f"interrupted; the same command continues {where}\n" in ended.stderr
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert len(only(memory).shapes) == 6


def test_a_request_that_is_refused_before_there_is_a_task_speaks_of_no_continuation(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    with pytest.raises(CvatError) as caught:
        pushed(host, share, tmp_path, project=999)
    assert caught.value.kind == ExitCode.CVAT_NOT_FOUND
    assert caught.value.remedy == "check the number; a task of an organization needs --org"


def test_many_shapes_are_sent_in_batches(
    memory: StandIn, host: str, share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sam_poll.integrations.cvat.upload.MAX_SHAPES", 4)
    assert pushed(host, share, tmp_path) == ExitCode.OK
    assert [len(body["shapes"]) for body in memory.bodies if "shapes" in body] == [4, 2]


# ── a folder that grows ──


def tasks_by_picture(memory: StandIn) -> dict[str, list[int]]:
    """Return the numbers of the tasks that have each picture."""
    found: dict[str, list[int]] = {}
    for task in memory.tasks.values():
        for name in frames(task):
            found.setdefault(name, []).append(task.id)
    return found


def assert_each_picture_once(memory: StandIn, names: list[str]) -> None:
    """Assert that each picture is in one task, with its own two masks and no others."""
    assert {name: len(tasks) for name, tasks in tasks_by_picture(memory).items()} == dict.fromkeys(
        names, 1
    )
    for task in memory.tasks.values():
        expected = [
            flat(mask) for name in frames(task) for mask in masks([*NAMES, *LATER].index(name))
        ]
        assert sorted(shape["points"] for shape in task.shapes) == sorted(expected)


@pytest.mark.parametrize("project", [None, 5])
def test_update_pushes_what_is_new_as_a_further_task(
    memory: StandIn,
    host: str,
    share: Share,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    project: int | None,
) -> None:
    memory.projects[5] = memory.labels("dog", "cat")
    assert pushed(host, share, tmp_path, update=True, project=project) == ExitCode.OK
    first = only(memory)
    before = first.plain()
    add_later(share)
    capsys.readouterr()
    assert pushed(host, share, tmp_path, update=True, project=project) == ExitCode.OK
    first, second = memory.tasks.values()
    assert first.plain() == before
    assert (frames(second), second.project, second.name) == (LATER, project, "cam")
    assert_each_picture_once(memory, [*NAMES, *LATER])
    summary = "2 pictures, 4 objects, labels cat, dog; 4 shapes written"
    assert capsys.readouterr().out == (f"task {second.id}: {summary}, {host}/tasks/{second.id}\n")
    writes = len(memory.writes())
    assert pushed(host, share, tmp_path, update=True, project=project) == ExitCode.OK
    assert len(memory.writes()) == writes
    assert f"in tasks {first.id}, {second.id}; nothing was written" in capsys.readouterr().out


def test_a_picture_that_a_task_of_the_project_has_counts_as_pushed(
    memory: StandIn, host: str, share: Share, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory.projects[5] = memory.labels("dog", "cat")
    theirs = memory.add_task("by hand", [(NAMES[1], (share.root / NAMES[1]).read_bytes())], "dog")
    theirs.project = 5
    elsewhere = memory.add_task("x", [(NAMES[0], (share.root / NAMES[0]).read_bytes())], "dog")
    assert pushed(host, share, tmp_path, update=True, project=5) == ExitCode.OK
    (mine,) = [task for task in memory.tasks.values() if task not in (theirs, elsewhere)]
    assert frames(mine) == [NAMES[0], NAMES[2]]
    assert theirs.shapes == elsewhere.shapes == []
    assert f"task {theirs.id} has 1 picture of these already" in capsys.readouterr().err


def test_without_its_journal_update_pushes_nothing_twice_and_leaves_the_tasks_alone(
    memory: StandIn, host: str, share: Share, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pushed(host, share, tmp_path / "one") == ExitCode.OK
    task = only(memory)
    task.shapes.remove(shape_of(task, 1, "dog"))
    corrected, writes = task.plain(), len(memory.writes())
    assert pushed(host, share, tmp_path / "other", update=True) == ExitCode.OK
    assert task.plain() == corrected
    assert len(memory.writes()) == writes
    assert f"task {task.id} has 3 pictures of these already" in capsys.readouterr().err
    add_later(share)
    assert pushed(host, share, tmp_path / "other", update=True) == ExitCode.OK
    assert [frames(task) for task in memory.tasks.values()] == [NAMES, LATER]


def test_without_its_journal_a_push_under_the_same_name_is_refused(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    assert pushed(host, share, tmp_path / "one") == ExitCode.OK
    writes = len(memory.writes())
    with pytest.raises(CvatError, match=r"has these pictures already: done/cam1/a\.jpg") as caught:
        pushed(host, share, tmp_path / "other")
    assert "--update" in str(caught.value.remedy)
    assert len(memory.writes()) == writes
    assert pushed(host, share, tmp_path / "other", name="again") == ExitCode.OK


def test_a_picture_on_a_deleted_frame_counts_as_pushed_and_gets_no_shapes(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    assert pushed(host, share, tmp_path) == ExitCode.OK
    only(memory).deleted = [1]
    before = only(memory).plain()
    add_later(share)
    assert pushed(host, share, tmp_path, update=True) == ExitCode.OK
    first, second = memory.tasks.values()
    assert first.plain() == before
    assert frames(second) == LATER


def test_answers_that_were_removed_do_not_stop_an_update(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    assert pushed(host, share, tmp_path) == ExitCode.OK
    for name in NAMES:
        (share.out / f"{name.removeprefix('done/')}.cvat.xml").unlink()
    add_later(share)
    with pytest.raises(CvatError, match="it lacks done/cam3"):
        pushed(host, share, tmp_path)
    assert pushed(host, share, tmp_path, update=True) == ExitCode.OK
    assert_each_picture_once(memory, [*NAMES, *LATER])


def test_the_pictures_of_a_task_that_was_deleted_are_pushed_again_by_update(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    assert pushed(host, share, tmp_path) == ExitCode.OK
    add_later(share)
    assert pushed(host, share, tmp_path, update=True) == ExitCode.OK
    del memory.tasks[min(memory.tasks)]
    assert pushed(host, share, tmp_path, update=True) == ExitCode.OK
    assert [frames(task) for task in memory.tasks.values()] == [LATER, NAMES]
    assert_each_picture_once(memory, [*NAMES, *LATER])


def test_what_cannot_be_added_is_named_and_nothing_is_written(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    memory.projects[5] = memory.labels("dog", "cat")
    assert pushed(host, share, tmp_path, project=5) == ExitCode.OK
    writes = len(memory.writes())
    share.picture(LATER[0])
    share.answer(LATER[0], (Mask("cow", 0.9, 3, 3, np.ones((5, 5), bool)),))
    with pytest.raises(CvatError, match="the project has no label cow"):
        pushed(host, share, tmp_path, project=5, update=True)
    memory.projects[5] += memory.labels("cow")
    (share.root / LATER[0]).unlink()
    with pytest.raises(CvatError, match=f"not found on the server's share: {LATER[0]}"):
        pushed(host, share, tmp_path, project=5, update=True)
    assert len(memory.writes()) == writes


def test_a_dry_run_of_an_update_lists_what_is_new_and_writes_nothing(
    memory: StandIn, host: str, share: Share, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pushed(host, share, tmp_path) == ExitCode.OK
    writes = len(memory.writes())
    capsys.readouterr()
    assert pushed(host, share, tmp_path, update=True, dry_run=True) == ExitCode.OK
    assert capsys.readouterr().out == (
        "dry run: all pictures are in a task already; nothing was written\n"
    )
    add_later(share)
    assert pushed(host, share, tmp_path, update=True, dry_run=True) == ExitCode.OK
    heading, *names = capsys.readouterr().out.splitlines()
    assert heading == (
        "dry run: a task 'cam' of 2 pictures, 4 objects, labels cat, dog; nothing was written"
    )
    assert names == LATER
    assert len(memory.writes()) == writes


@pytest.mark.slow
def test_interrupted_at_any_request_of_an_update_each_picture_is_pushed_once(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    """Between the two runs the folder grows again."""
    memory.projects[5] = memory.labels("dog", "cat")
    assert pushed(host, share, tmp_path / "first", project=5) == ExitCode.OK
    pushed_before = copy.deepcopy(memory.tasks)
    add_later(share, LATER[:1])

    def update(state: Path) -> ExitCode:
        return pushed(host, share, state, limits=ONCE, project=5, update=True)

    def begin(state: Path) -> None:
        """Go back to the first push; of the later pictures, one is there."""
        memory.tasks = copy.deepcopy(pushed_before)
        memory.log.clear()
        shutil.copytree(tmp_path / "first", state)
        (share.out / f"{LATER[1].removeprefix('done/')}.cvat.xml").unlink(missing_ok=True)

    begin(tmp_path / "undisturbed")
    assert update(tmp_path / "undisturbed") == ExitCode.OK
    requests = len(memory.log)
    assert requests > 15
    for number in range(1, requests + 1):
        for after in (False, True):
            state = tmp_path / f"{number}-{after}"
            begin(state)
            memory.faults = {number: Fault("drop", after=after)}
            with pytest.raises(RequestFailedError):
                update(state)
            add_later(share)
            assert update(state) == ExitCode.OK
            assert_each_picture_once(memory, [*NAMES, *LATER])
            assert all(task.frames for task in memory.tasks.values())


def test_a_task_whose_import_an_earlier_run_has_requested_keeps_its_pictures(
    memory: StandIn, host: str, share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The import is still running when the next run comes, and the folder has grown since."""
    assert pushed(host, share, tmp_path) == ExitCode.OK
    add_later(share, LATER[:1])
    add_data, get_request = memory.add_data, memory.get_request
    polls_left = 3

    def slow_add_data(number: int, body: Any, **_: Any) -> Any:
        answer = add_data(number, body=body)
        task = memory.tasks[number]
        waiting[number] = task.frames
        task.frames, task.state = [], ("started", "")
        return answer

    def slow_get_request(number: int, **_: Any) -> Any:
        nonlocal polls_left
        polls_left -= 1
        if polls_left == 0:
            memory.tasks[number].frames = waiting.pop(number)
            memory.tasks[number].state = ("finished", "")
        return get_request(number)

    waiting: dict[int, list[tuple[str, bytes]]] = {}
    monkeypatch.setattr(memory, "add_data", slow_add_data)
    monkeypatch.setattr(memory, "get_request", slow_get_request)
    memory.when = lambda method, path: Fault(503) if polls_left < 3 and waiting else None
    with pytest.raises(RequestFailedError):
        pushed(host, share, tmp_path, limits=ONCE, update=True)
    assert waiting
    memory.when = lambda method, path: None
    monkeypatch.setattr(memory, "add_data", add_data)
    add_later(share)
    assert pushed(host, share, tmp_path, update=True) == ExitCode.OK
    assert [frames(task) for task in memory.tasks.values()] == [NAMES, LATER[:1], LATER[1:]]
    assert_each_picture_once(memory, [*NAMES, *LATER])


@pytest.mark.cvat
@pytest.mark.skipif("CVAT_HOST" not in os.environ, reason="CVAT_HOST names no server")
def test_a_real_server_reports_what_is_not_on_its_share(share: Share, tmp_path: Path) -> None:
    connection = client.connect(os.environ["CVAT_HOST"], credentials.find(os.environ))
    options = PushOptions("sam_poll test")
    found = answers.read_answers(share.out, "sam_poll/no/such/folder/")
    with pytest.raises(CvatError):
        push.run(connection, found, options, tmp_path)
    for task in connection.tasks_named(options.name):
        connection._api.tasks_api.destroy(task["id"])
