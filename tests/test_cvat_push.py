"""Answered pictures become a CVAT task: the files that were named, each mask once, wherever a run is cut off."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from sam_poll import formats, geometry
from sam_poll.cli import app
from sam_poll.cvat import credentials, push, server
from sam_poll.cvat.calls import FailedError, Limits
from sam_poll.cvat.push import Wish
from sam_poll.errors import CvatError, ExitCode, InputError, UsageError
from sam_poll.formats.cvat import flat
from sam_poll.types import Mask, ModelInfo, Prompt, Result, Size
from tests.conftest import picture_bytes
from tests.cvat_standin import PASSWORD, TOKEN, USER, Fault, StandIn, Task, score_spec, served

WHO = credentials.Credentials(token=TOKEN)
QUICK = Limits(connect_s=2.0, read_s=5.0, pauses_s=(0.0, 0.0, 0.0), poll_s=0.0)
ONCE = Limits(connect_s=2.0, read_s=5.0, pauses_s=(), poll_s=0.0)
SIZE = Size(64, 48)
NAMES = ["done/cam1/a.jpg", "done/cam1/b.jpg", "done/cam2/a.jpg"]


def masks(seed: int) -> tuple[Mask, ...]:
    """A ring and a bar of two labels; where they lie depends on the picture."""
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
        result = Result(name, name, SIZE, made, prompts, ModelInfo("m", "sam2", 256, "cpu", "float32"))
        (make,) = formats.load(["cvat"], formats.FormatOptions(cvat=form))  # type: ignore[arg-type]
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


def pushed(host: str, share: Share, state: Path, *, limits: Limits = QUICK, **wish: Any) -> ExitCode:
    wanted = Wish(**{"name": "cam", **wish})
    return push.run(server.connect(host, WHO, limits=limits), push.read(share.out, wanted), wanted, state)


def only(memory: StandIn) -> Task:
    (task,) = memory.tasks.values()
    return task


def test_a_share_becomes_a_task_with_its_masks(
    memory: StandIn, host: str, share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("CVAT_HOST", host), ("CVAT_USERNAME", USER), ("CVAT_PASSWORD", PASSWORD)):
        monkeypatch.setenv(name, value)
    command = ["cvat", "push", str(share.out), "--task-name", "cam", "--state", str(tmp_path / "state")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    task = only(memory)
    assert [name for name, _ in task.frames] == NAMES  # and no mask's PNG
    assert [label["name"] for label in task.labels] == ["cat", "dog"]
    assert all([a["name"] for a in label["attributes"]] == ["score"] for label in task.labels)
    labels = {label["id"]: label["name"] for label in task.labels}
    found = {(s["frame"], labels[s["label_id"]]): s for s in task.shapes}
    assert len(found) == len(task.shapes) == 6
    for frame in range(3):
        for mask in masks(frame):
            shape = found[frame, mask.label]
            assert shape["points"] == flat(mask)
            assert float(shape["attributes"][0]["value"]) == round(mask.score, 4)
            assert (shape["type"], shape["source"], shape["group"]) == ("mask", "auto", 0)
    assert f"{host}/tasks/{task.id}" in done.output


def test_frames_are_known_by_name_and_not_by_order(
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
    lefts = {task.frames[s["frame"]][0]: s["points"][-4] for s in task.shapes if s["label_id"] == dog}
    assert lefts == {name: 3 + seed for seed, name in enumerate(NAMES)}


def test_polygons_are_the_masks_outlines(memory: StandIn, host: str, share: Share, tmp_path: Path) -> None:
    assert pushed(host, share, tmp_path, polygon=True) == ExitCode.OK
    task = only(memory)
    assert {shape["type"] for shape in task.shapes} == {"polygon"}
    (outline,) = geometry.outlines(masks(0)[1])
    assert [round(v, 2) for v in outline.ravel()] in [shape["points"] for shape in task.shapes]


def test_answers_written_as_polygons_are_pushed_as_such(memory: StandIn, host: str, tmp_path: Path) -> None:
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


def test_a_prefix_goes_before_the_names(memory: StandIn, host: str, share: Share, tmp_path: Path) -> None:
    memory.share = tmp_path
    assert pushed(host, share, tmp_path / "state", prefix="/share/") == ExitCode.OK
    assert [name for name, _ in only(memory).frames] == [f"share/{name}" for name in NAMES]


def test_a_task_in_a_project_has_the_projects_labels(memory: StandIn, host: str, share: Share, tmp_path: Path) -> None:
    memory.projects[5] = memory.labels("dog")
    with pytest.raises(CvatError, match="no label cat"):
        pushed(host, share, tmp_path, project=5)
    assert memory.writes() == []
    memory.projects[5] = memory.labels("dog", "cat", {"name": "cow", "attributes": [score_spec()]})
    assert pushed(host, share, tmp_path, project=5) == ExitCode.OK
    assert only(memory).project == 5
    assert len(only(memory).shapes) == 6


def test_further_labels_are_made(memory: StandIn, host: str, share: Share, tmp_path: Path) -> None:
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


def test_pictures_that_are_not_on_the_servers_share_are_told_before_a_task_is_made(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    (share.root / NAMES[1]).unlink()
    with pytest.raises(CvatError) as caught:
        pushed(host, share, tmp_path)
    assert NAMES[1] in str(caught.value)
    assert NAMES[0] not in str(caught.value)
    assert "cvat_worker_import" in str(caught.value.remedy)
    assert memory.tasks == {}


def test_a_wrong_prefix_is_told_before_a_task_is_made(memory: StandIn, host: str, share: Share, tmp_path: Path) -> None:
    with pytest.raises(CvatError, match="does not find on its share: elsewhere/done/cam1/a") as caught:
        pushed(host, share, tmp_path, prefix="elsewhere")
    assert "--share-prefix" in str(caught.value.remedy)
    assert memory.tasks == {}


@pytest.mark.parametrize("old", [False, True], ids=["requests", "status"])
def test_pictures_that_only_the_worker_misses_are_told_and_the_same_task_goes_on(
    memory: StandIn, host: str, share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool
) -> None:
    if old:
        from cvat_sdk.api_client import ApiClient

        memory.old = True

        def unknown(_: Any) -> None:
            raise TypeError("cannot unpack non-iterable object object")  # as 2.15 says it

        monkeypatch.setattr(ApiClient, "requests_api", property(unknown), raising=False)
    lost = share.root / NAMES[1]
    kept = lost.read_bytes()
    lost.unlink()
    memory.when = lambda method, path: Fault(403) if "/server/share" in path else None  # we may not look
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


def test_answers_that_came_later_need_another_task(memory: StandIn, host: str, share: Share, tmp_path: Path) -> None:
    assert pushed(host, share, tmp_path) == ExitCode.OK
    share.picture("done/cam3/a.jpg")
    share.answer("done/cam3/a.jpg", masks(0))
    with pytest.raises(CvatError, match=r"it lacks done/cam3/a\.jpg"):
        pushed(host, share, tmp_path)
    assert pushed(host, share, tmp_path, name="cam, later") == ExitCode.OK
    assert len(memory.tasks) == 2


@pytest.mark.parametrize(
    ("body", "kind"),
    [(b"<annotations><image", InputError), (b"<!DOCTYPE a><annotations/>", InputError), (None, UsageError)],
)
def test_answers_that_are_none_are_refused_with_their_name(tmp_path: Path, body: bytes | None, kind: type) -> None:
    (tmp_path / "out").mkdir()
    if body:
        (tmp_path / "out" / "bad.cvat.xml").write_bytes(body)
    with pytest.raises(kind, match=r"bad\.cvat\.xml" if body else r"no \.cvat\.xml files"):
        push.read(tmp_path / "out", Wish("cam"))


def test_run_lengths_that_are_no_numbers_are_refused_with_the_pictures_name(share: Share) -> None:
    file = next(share.out.rglob("*.cvat.xml"))
    file.write_bytes(file.read_bytes().replace(b'rle="', b'rle="x, '))
    with pytest.raises(InputError, match="image 'done/"):
        push.read(share.out, Wish("cam"))


# ── again, and after whatever happened ──


def test_pushing_again_changes_nothing(memory: StandIn, host: str, share: Share, tmp_path: Path) -> None:
    assert pushed(host, share, tmp_path) == ExitCode.OK
    before, writes = only(memory).plain(), len(memory.writes())
    assert pushed(host, share, tmp_path) == ExitCode.OK
    assert only(memory).plain() == before
    assert len(memory.writes()) == writes


def test_a_task_that_was_deleted_on_the_server_is_made_anew(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    assert pushed(host, share, tmp_path) == ExitCode.OK
    memory.tasks.clear()
    assert pushed(host, share, tmp_path) == ExitCode.OK
    assert len(only(memory).shapes) == 6


def test_cut_off_before_or_after_any_request_the_next_run_ends_with_the_same_task(share: Share, tmp_path: Path) -> None:
    memory = StandIn(share.root)
    with served(memory) as host:
        assert pushed(host, share, tmp_path / "undisturbed") == ExitCode.OK
    requests, wanted = len(memory.log), len(only(memory).shapes)
    assert requests > 12
    for number in range(1, requests + 1):
        for after in (False, True):
            memory = StandIn(share.root)
            memory.add_task("cam", [], "dog")  # another one's task of the same name
            other = only(memory)
            memory.faults = {number: Fault("drop", after=after)}
            with served(memory) as host:
                state = tmp_path / f"{number}-{after}"
                with pytest.raises(FailedError):
                    pushed(host, share, state, limits=ONCE)
                assert pushed(host, share, state, limits=ONCE) == ExitCode.OK
            made = [task for task in memory.tasks.values() if task is not other]
            assert len(made) == 1, f"request {number}, {after=}"
            assert [name for name, _ in made[0].frames] == NAMES
            assert len(made[0].shapes) == wanted == len({str(line) for line in made[0].plain()})
            assert other.shapes == other.frames == []


@pytest.mark.parametrize("fault", [Fault(503), Fault("drop"), Fault("drop", after=True), Fault("cut", after=True)])
def test_a_write_that_failed_is_looked_after_and_not_repeated_blindly(
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


def test_two_empty_tasks_that_could_be_ours_are_left_to_a_person(
    memory: StandIn, host: str, share: Share, tmp_path: Path
) -> None:
    memory.when = lambda method, path: Fault("drop", after=True) if (method, path) == ("POST", "/api/tasks") else None
    with pytest.raises(FailedError):
        pushed(host, share, tmp_path, limits=ONCE)
    memory.add_task("cam", [], "dog")
    memory.when = lambda method, path: None
    with pytest.raises(CvatError, match="which is ours is not known") as caught:
        pushed(host, share, tmp_path)
    assert caught.value.kind == ExitCode.CVAT_CONFLICT


def test_many_shapes_travel_in_pieces(
    memory: StandIn, host: str, share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sam_poll.cvat.upload.SHAPES", 4)
    assert pushed(host, share, tmp_path) == ExitCode.OK
    assert [len(body["shapes"]) for body in memory.bodies if "shapes" in body] == [4, 2]


@pytest.mark.cvat
@pytest.mark.skipif("CVAT_HOST" not in os.environ, reason="CVAT_HOST names no server")
def test_a_real_server_tells_what_is_not_on_its_share(share: Share, tmp_path: Path) -> None:
    known = server.connect(os.environ["CVAT_HOST"], credentials.find(os.environ))
    wish = Wish("sam_poll test", prefix="sam_poll/no/such/folder")
    with pytest.raises(CvatError):
        push.run(known, push.read(share.out, wish), wish, tmp_path)
    for task in known.tasks_named(wish.name):
        known._api.tasks_api.destroy(task["id"])
