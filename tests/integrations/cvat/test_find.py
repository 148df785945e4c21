"""Tests of `cvat find`: what the labels name is found, written once, and nothing is doubled."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sam_poll.cli.main import app
from sam_poll.core.errors import CvatError, ExitCode, UsageError
from sam_poll.core.protocols import Embedding
from sam_poll.core.types import ConceptRequest, ModelInput
from sam_poll.engines import concepts
from sam_poll.engines.fake import MAX_WORDS, FakeEngine
from sam_poll.integrations.cvat import find
from sam_poll.integrations.cvat.find_plan import FindOptions
from sam_poll.integrations.cvat.transport import RequestFailedError
from tests.conftest import picture_bytes
from tests.support.cvat_commands import ONCE, SIZE, CommandRun
from tests.support.cvat_interruptions import LethalWrites
from tests.support.cvat_server import ANNOTATOR, READER, TOKEN, Fault, StandIn, Task, served

# The quarter of the picture, without a margin, in which the fake engine finds `dog`.
DOG = [3.2, 26.4, 28.8, 45.6]


def pictures(count: int) -> list[tuple[str, bytes]]:
    return [(f"cam1/{n}.png", picture_bytes(".png", *SIZE, seed=n)) for n in range(count)]


def plain(memory: StandIn, *labels: Any) -> Task:
    """Three pictures without shapes."""
    return memory.add_task("cam1", pictures(3), *(labels or ("dog", "cat")))


def annotated(memory: StandIn) -> Task:
    """Three pictures, two of them with shapes: a dog that the engine finds, too, and others."""
    task = plain(memory)
    memory.draw(task, 0, "rectangle", "dog", DOG)
    memory.draw(task, 0, "polygon", "dog", [40, 4, 60, 4, 60, 20, 40, 20])
    memory.draw(task, 1, "rectangle", "cat", DOG)
    return task


def overlapping(memory: StandIn) -> Task:
    """A video of 6 frames in two jobs, 0–3 and 2–5; the second has a dog on frame 3 already."""
    task = memory.add_task("video", pictures(6), "dog", "cat")
    task.is_video = True
    _, second = memory.split(task, segment_size=4, overlap=2)
    memory.draw(task, 3, "rectangle", "dog", [40, 4, 60, 20], job=second)
    return task


class Run(CommandRun):
    """`cvat find` on one machine."""

    command = staticmethod(find.run)
    options = FindOptions

    @property
    def searches(self) -> int:
        return self.calls("find")


@pytest.fixture
def run(host: str, tmp_path: Path) -> Run:
    return Run(host, tmp_path / "state")


def found(task: Task) -> list[tuple[int, str, float | None]]:
    """Return frame, label and score of the shapes that the command has written."""
    names = {label["id"]: label["name"] for label in task.labels}
    return sorted(
        (shape["frame"], names[shape["label_id"]], shape.get("score"))
        for shape in task.shapes
        if shape["source"] == "auto"
    )


def both(*frames: int) -> list[tuple[int, str, float]]:
    return [(frame, label, 0.9) for frame in frames for label in ("cat", "dog")]


# ── what is found ──


def test_the_command_finds_what_the_tasks_labels_name(
    memory: StandIn, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = plain(memory, "dog", "cat", "nothing")
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", TOKEN)
    line = ["cvat", "find", str(task.id), "-m", "fake", "--host", host, "--state", str(tmp_path)]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 0, done.output
    assert "found 3 dog, 3 cat on 3 of 3 pictures; 6 masks written" in done.output
    assert "nothing found for 'nothing' (threshold 0.5)" in done.output
    assert found(task) == both(0, 1, 2)
    assert {shape["type"] for shape in task.shapes} == {"mask"}
    chosen = ["--labels", "dog,nothing", "--text", "dog=brown dog", "--threshold", "dog=0.85"]
    limits = ["--threshold", "0.1", "--max-objects", "7", "--as", "rectangle", "--dry-run"]
    done = CliRunner().invoke(app, [*line, *chosen, *limits])
    assert done.exit_code == 0, done.output
    assert "finding 'dog' as 'brown dog', 'nothing' on 3 pictures" in done.output


@pytest.mark.parametrize("form", ["mask", "polygon", "rectangle"])
def test_objects_are_written_as_shapes_of_the_type_that_was_chosen(
    memory: StandIn, run: Run, form: str
) -> None:
    task = plain(memory)
    assert run(task, form=form) == ExitCode.OK
    assert {shape["type"] for shape in task.shapes} == {form}
    assert found(task) == both(0, 1, 2)


@pytest.mark.parametrize(("version", "own"), [("2.73.0", 0.9), ("2.23.1", None)])
def test_the_score_is_the_shapes_own_and_that_of_the_attribute(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str], version: str, own: float | None
) -> None:
    memory.version = version
    task = plain(memory, "dog", {"name": "cat", "attributes": []})
    assert run(task) == ExitCode.OK
    for shape in task.shapes:
        is_dog = shape["label_id"] == task.labels[0]["id"]
        assert [a["value"] for a in shape["attributes"]] == (["0.9"] if is_dog else [])
        assert shape.get("score") == own
    said = "scores are not written for labels without an attribute `score`: cat\n"
    assert (said in capsys.readouterr().err) == (own is None)


def test_a_text_of_its_own_and_a_threshold_are_those_of_one_label(
    memory: StandIn, run: Run
) -> None:
    task = plain(memory)
    # `brown dog` are two objects, of scores 0.9 and 0.8.
    assert run(task, labels=("dog",), texts={"dog": "brown dog"}) == ExitCode.OK
    assert found(task) == [(frame, "dog", score) for frame in range(3) for score in (0.8, 0.9)]
    other = plain(memory)
    given = {"dog": "brown dog", "cat": "big cat"}
    assert run(other, texts=given, thresholds={"dog": 0.85}) == ExitCode.OK
    on_first = [(label, score) for frame, label, score in found(other) if frame == 0]
    assert on_first == [("cat", 0.8), ("cat", 0.9), ("dog", 0.9)]


def test_two_labels_may_have_the_same_text(memory: StandIn, run: Run) -> None:
    task = plain(memory, "dog", "pet")
    assert run(task, texts={"pet": "dog"}) == ExitCode.OK
    assert found(task) == [(n, label, 0.9) for n in range(3) for label in ("dog", "pet")]
    assert run.searches == 3


def test_nothing_found_is_no_failure(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = plain(memory, "nothing")
    assert run(task) == ExitCode.OK
    assert memory.writes() == []
    assert "found nothing; 0 masks written" in capsys.readouterr().out
    assert run(task) == ExitCode.OK
    assert run.searches == 3  # that there is nothing is known from the journal


def test_a_picture_with_as_many_objects_as_are_taken_is_reported(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = plain(memory, "brown dog")
    assert run(task, max_objects=1) == ExitCode.OK
    assert found(task) == [(frame, "brown dog", 0.9) for frame in range(3)]
    assert "'brown dog': on 3 pictures as many objects" in capsys.readouterr().err


# ── which labels ──


@pytest.mark.parametrize("labels", [("dog, cat",), ("cat", "dog")])
def test_labels_are_named_with_commas_or_one_by_one(
    memory: StandIn, run: Run, labels: tuple[str, ...]
) -> None:
    task = plain(memory, "dog", "cat", "bird")
    assert run(task, labels=labels) == ExitCode.OK
    assert found(task) == both(0, 1, 2)


def test_a_label_may_have_a_comma_in_its_name(memory: StandIn, run: Run) -> None:
    task = plain(memory, "dog, brown", "dog")
    assert run(task, labels=("dog, brown",)) == ExitCode.OK
    assert {label for _, label, _ in found(task)} == {"dog, brown"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ("dgo",)}, "no label 'dgo'.*cat, dog"),
        ({"texts": {"dgo": "dog"}}, "--text: the task has no label 'dgo'"),
        ({"thresholds": {"dgo": 0.1}}, "--threshold: the task has no label 'dgo'"),
        ({"labels": ("cat",), "texts": {"dog": "x"}}, "'dog' is not among the labels to find"),
        ({"texts": {"dog": ""}}, "the text is empty.*--like-existing"),
        ({"texts": {"dog": "a\nb"}}, "cannot be the text for label 'dog': holds control"),
    ],
)
def test_what_fits_no_label_of_the_task_is_refused_before_anything_is_done(
    memory: StandIn, run: Run, options: dict[str, Any], message: str
) -> None:
    task = plain(memory)
    with pytest.raises(UsageError, match=message):
        run(task, **options)
    assert memory.writes() == []
    assert run.engines == []


def test_labels_whose_type_forbids_the_shapes_are_left_out_unless_they_are_named(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = plain(memory, {"name": "dog", "type": "rectangle"}, "cat", "negative")
    assert run(task) == ExitCode.OK
    assert {label for _, label, _ in found(task)} == {"cat"}
    assert "labels left out, which allow no mask or are for negative points: dog, negative" in (
        capsys.readouterr().err
    )
    with pytest.raises(CvatError, match="'dog' may not have shapes of type mask"):
        run(task, labels=("dog",))
    assert run(task, form="rectangle", labels=("dog",)) == ExitCode.OK
    assert {label for _, label, _ in found(task)} == {"cat", "dog"}


def test_a_task_without_labels_says_so(memory: StandIn, run: Run) -> None:
    task = memory.add_task("t", pictures(1))
    with pytest.raises(UsageError, match="the task has no labels"):
        run(task)


@pytest.mark.parametrize(
    ("flag", "value", "place"),
    [
        ("--text", "brown dog", "--text brown dog"),
        ("--text", "=dog", "--text =dog"),
        ("--threshold", "1.5", "--threshold 1.5"),
        ("--threshold", "dog=nan", "--threshold dog=nan"),
        ("--threshold", "dog=", "--threshold dog="),
        ("--as", "circle", "--as"),
        ("--images", "/nowhere", "--images /nowhere"),
    ],
)
def test_malformed_flags_are_refused_with_their_place(flag: str, value: str, place: str) -> None:
    done = CliRunner().invoke(app, ["cvat", "find", "7", flag, value])
    assert done.exit_code == ExitCode.USAGE
    assert place in done.output


# ── exemplars ──


def test_existing_shapes_of_a_label_are_exemplars_on_their_picture(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = annotated(memory)
    assert run(task, like_existing=True, labels=("dog",)) == ExitCode.OK
    # With two exemplars the quarter of `dog` comes third; it is the rectangle, as are both of them.
    assert found(task) == [(1, "dog", 0.9), (2, "dog", 0.9)]
    captured = capsys.readouterr()
    assert "like 2 existing shapes" in captured.err
    assert "3 objects left out, which shapes of the label mark already" in captured.out


def test_found_shapes_are_no_exemplars_of_a_second_run(memory: StandIn, run: Run) -> None:
    task = annotated(memory)
    assert run(task, like_existing=True, texts={"dog": "brown dog"}, threshold=0.1) == ExitCode.OK
    before, writes = task.plain(), len(memory.writes())
    assert run(task, like_existing=True, texts={"dog": "brown dog"}, threshold=0.1) == ExitCode.OK
    assert task.plain() == before
    assert len(memory.writes()) == writes
    assert len(run.engines) == 1


def test_without_a_text_only_pictures_with_shapes_of_the_label_are_searched(
    memory: StandIn, run: Run
) -> None:
    task = annotated(memory)
    options: dict[str, Any] = {"like_existing": True, "texts": {"dog": ""}, "labels": ("dog",)}
    assert run(task, **options) == ExitCode.OK
    assert run.searches == 1
    assert sum("type=frame" in line for line in memory.log) == 1
    assert found(task) == []  # the fake engine finds the exemplars only


def test_a_shape_beside_the_picture_is_no_exemplar_and_is_named(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = annotated(memory)
    memory.draw(task, 2, "rectangle", "dog", [500, 500, 600, 600])
    assert run(task, like_existing=True) == ExitCode.FAILED_JOBS
    assert "cam1/2.png: rectangle 'dog'" in capsys.readouterr().err
    assert (2, "dog", 0.9) in found(task)


def test_the_picture_of_several_requests_is_downloaded_once(memory: StandIn, run: Run) -> None:
    task = plain(memory, "dog", "cat", "bird")
    assert run(task, thresholds={"dog": 0.1, "cat": 0.2}) == ExitCode.OK
    assert sum("type=frame" in line for line in memory.log) == 3
    assert [len(engine.encoded) for engine in run.engines] == [3]


# ── nothing is doubled ──


@pytest.mark.parametrize(
    "shape",
    [
        ("rectangle", DOG),
        ("polygon", [16, 26, 29, 36, 16, 46, 3, 36]),
        ("mask", [0, 26 * 19, 3, 27, 28, 45]),
        ("ellipse", [16, 36, 29, 26]),
    ],
)
def test_an_object_that_a_shape_of_its_label_marks_is_left_out(
    memory: StandIn, run: Run, shape: tuple[str, list[float]]
) -> None:
    task = plain(memory)
    memory.draw(task, 1, shape[0], "dog", shape[1])
    memory.draw(task, 2, shape[0], "cat", shape[1])  # of another label
    assert run(task) == ExitCode.OK
    assert found(task) == [one for one in both(0, 1, 2) if one[:2] != (1, "dog")]


@pytest.mark.parametrize("options", [{}, {"form": "polygon"}, {"like_existing": True}])
@pytest.mark.parametrize("make", [plain, annotated, overlapping])
def test_a_second_run_changes_nothing(
    memory: StandIn, run: Run, make: Callable[[StandIn], Task], options: dict[str, Any]
) -> None:
    task = make(memory)
    assert run(task, **options) == ExitCode.OK
    before, writes = task.plain(), len(memory.writes())
    assert run(task, **options) == ExitCode.OK
    assert task.plain() == before
    assert len(memory.writes()) == writes
    assert len(run.engines) == 1


def test_other_options_add_only_what_was_not_found_before(memory: StandIn, run: Run) -> None:
    task = plain(memory, "brown dog")
    assert run(task, threshold=0.85) == ExitCode.OK
    assert run(task, form="rectangle", threshold=0.85) == ExitCode.OK
    assert found(task) == [(frame, "brown dog", 0.9) for frame in range(3)]
    assert run(task) == ExitCode.OK
    assert found(task) == [(n, "brown dog", score) for n in range(3) for score in (0.8, 0.9)]
    assert {shape["type"] for shape in task.shapes} == {"mask"}


def test_shapes_on_the_server_are_recognized_without_a_journal(
    memory: StandIn, run: Run, tmp_path: Path
) -> None:
    task = annotated(memory)
    assert run(task) == ExitCode.OK
    before = task.plain()
    assert Run(run.host, tmp_path / "another machine")(task) == ExitCode.OK
    assert task.plain() == before


def test_changed_or_deleted_shapes_are_not_written_again_without_the_flag(
    memory: StandIn, run: Run
) -> None:
    task = plain(memory, "dog")
    assert run(task) == ExitCode.OK
    removed, mended, _ = task.shapes
    task.shapes.remove(removed)
    mended.update(type="rectangle", points=DOG, source="semi-auto")
    before = task.plain()
    assert run(task) == ExitCode.OK
    assert task.plain() == before
    assert run(task, again=True) == ExitCode.OK
    assert len(task.shapes) == 3


# ── interruptions ──


def undisturbed(
    tmp_path: Path, make: Callable[[StandIn], Task], **options: Any
) -> tuple[list[Any], int]:
    memory = StandIn()
    task = make(memory)
    with served(memory) as host:
        assert Run(host, tmp_path / "undisturbed")(task, **options) == ExitCode.OK
    return task.plain(), len(memory.log)


CASES = [
    (annotated, {"like_existing": True, "texts": {"dog": "brown dog"}, "threshold": 0.1}),
    (overlapping, {"like_existing": True, "form": "polygon", "thresholds": {"cat": 0.1}}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "options"), CASES, ids=["annotated", "overlapping"])
def test_interrupted_at_any_request_the_next_run_gives_the_same_task(
    tmp_path: Path, make: Callable[[StandIn], Task], options: dict[str, Any]
) -> None:
    expected, requests = undisturbed(tmp_path, make, **options)
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


@pytest.mark.slow
@pytest.mark.parametrize(("make", "options"), CASES, ids=["annotated", "overlapping"])
def test_killed_around_any_write_the_next_run_gives_the_same_task(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[StandIn], Task],
    options: dict[str, Any],
) -> None:
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
    assert writes.count > 2


def test_stored_answers_are_not_computed_again(memory: StandIn, run: Run) -> None:
    task = plain(memory)
    memory.when = lambda method, path: (
        Fault(500)
        if "action=create" in path
        and any(body and body.get("shapes") for body in memory.bodies[-1:])
        else None
    )
    with pytest.raises(CvatError, match="continues with the answers stored"):
        run(task)
    memory.when = lambda method, path: None
    assert run(task) == ExitCode.OK
    assert found(task) == both(0, 1, 2)
    assert len(run.engines) == 1


def test_damaged_answers_are_computed_again(memory: StandIn, run: Run) -> None:
    task = plain(memory)
    assert run(task) == ExitCode.OK
    before = task.plain()
    files = sorted(run.state.rglob("answers/*.json"))
    files[0].write_text("{")
    files[1].write_text(files[1].read_text().replace('"mask":[', '"mask":[7,'))
    files[2].unlink()
    assert run(task) == ExitCode.OK
    assert len(run.engines) == 2
    assert task.plain() == before


def test_ctrl_c_keeps_the_answers_so_far(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = memory.add_task("long", pictures(40), "dog")

    class Interrupted(FakeEngine):
        def encode(self, pictures: Sequence[ModelInput]) -> list[Embedding]:
            if len(self.encoded) == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return super().encode(pictures)

    run.make = lambda: Interrupted(batch=1)
    with pytest.raises(KeyboardInterrupt):
        run(task)
    assert "the same command continues from there" in capsys.readouterr().err
    assert 4 <= run.searches < 40
    run.make = FakeEngine
    assert run(task) == ExitCode.OK
    assert found(task) == [(frame, "dog", 0.9) for frame in range(40)]
    assert run.searches <= 41


# ── jobs, permissions, pictures, models ──


def test_each_job_gets_the_shapes_of_its_frames(memory: StandIn, run: Run) -> None:
    task = overlapping(memory)
    first, second = task.jobs
    assert run(task, jobs=(first.id,)) == ExitCode.OK
    assert {shape["frame"] for shape in first.shapes} == {0, 1, 2, 3}
    assert len(second.shapes) == 1
    assert run(task) == ExitCode.OK
    assert sorted(shape["frame"] for shape in second.shapes) == [2, 2, 3, 3, 3, 4, 4, 5, 5]
    assert sum(len(engine.encoded) for engine in run.engines) == 6  # those of both jobs once


def test_an_annotator_needs_permission_for_the_job_only(
    memory: StandIn, host: str, tmp_path: Path
) -> None:
    task = overlapping(memory)
    task.jobs[0].assigned = True
    run = Run(host, tmp_path, token=ANNOTATOR)
    assert run(task, jobs=(task.jobs[0].id,)) == ExitCode.OK
    assert len(task.jobs[0].shapes) == 8


def test_without_permission_to_write_nothing_is_computed(
    memory: StandIn, host: str, tmp_path: Path
) -> None:
    run = Run(host, tmp_path, token=READER)
    with pytest.raises(CvatError) as caught:
        run(plain(memory))
    assert caught.value.kind == ExitCode.CVAT_FORBIDDEN
    assert run.engines == []


def test_honeypots_and_deleted_frames_are_left_out(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = plain(memory)
    task.honeypots, task.deleted = {0}, [1]
    assert run(task) == ExitCode.OK
    assert found(task) == both(2)
    assert "(honeypots): cam1/0.png" in capsys.readouterr().err


def test_a_picture_that_cannot_be_used_fails_alone_and_is_named(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = plain(memory)
    task.chunk_size, task.missing = 1, {1}
    assert run(task) == ExitCode.FAILED_JOBS
    assert "cam1/1.png" in capsys.readouterr().err
    assert found(task) == both(0, 2)
    task.missing = set()
    assert run(task) == ExitCode.OK
    assert found(task) == both(0, 1, 2)


def test_pictures_may_come_from_the_share(memory: StandIn, run: Run, tmp_path: Path) -> None:
    task = plain(memory)
    (tmp_path / "share/cam1").mkdir(parents=True)
    for name, data in task.frames:
        (tmp_path / "share" / name).write_bytes(data)
    assert run(task, images=tmp_path / "share") == ExitCode.OK
    assert not any("/data?" in line for line in memory.log)
    assert found(task) == both(0, 1, 2)


class ClicksOnly(FakeEngine):
    """A model that takes no texts."""

    def check_concept(self, request: ConceptRequest) -> None:
        raise concepts.refusal("sam2.1_hiera_tiny", request)


def test_a_model_that_takes_no_texts_is_refused_before_a_picture_is_fetched(
    memory: StandIn, run: Run
) -> None:
    run.make = ClicksOnly
    with pytest.raises(UsageError, match=r"label 'dog': sam2.1_hiera_tiny takes no texts.*sam3"):
        run(plain(memory))
    assert not any("/data?" in line for line in memory.log)


def test_a_text_that_is_too_long_for_the_model_is_refused_with_its_label(
    memory: StandIn, run: Run
) -> None:
    with pytest.raises(UsageError, match=r"label 'dog': .* has 31 tokens"):
        run(plain(memory), texts={"dog": " ".join(["dog"] * (MAX_WORDS + 1))})
    assert memory.writes() == []


def test_a_dry_run_writes_nothing_and_loads_no_model(
    memory: StandIn, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    task = annotated(memory)
    assert run(task, dry_run=True, like_existing=True) == ExitCode.OK
    assert memory.writes() == []
    assert run.engines == []
    assert not run.state.exists()
    captured = capsys.readouterr()
    assert "finding 'dog', 'cat' on 3 pictures, like 3 existing shapes" in captured.err
    assert "nothing was computed or written" in captured.out


@pytest.mark.slow
def test_the_command_finds_objects_with_a_real_network(
    memory: StandIn, host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers.models.sam3", reason="needs transformers with SAM 3")
    from tests.support import tiny_sam3

    task = annotated(memory)
    monkeypatch.setenv("CVAT_ACCESS_TOKEN", TOKEN)
    folder = str(tiny_sam3.save(tmp_path / "tiny", scale=100))
    line = ["cvat", "find", str(task.id), "-m", folder, "--device", "cpu", "--host", host]
    flags = ["--threshold", "0", "--like-existing", "--state", str(tmp_path / "state")]
    for _ in range(2):
        done = CliRunner().invoke(app, [*line, *flags])
        assert done.exit_code == 0, done.output
        assert {(frame, label) for frame, label, _ in found(task)} == {
            (frame, label) for frame in range(3) for label in ("dog", "cat")
        }
        assert all(0 < score <= 1 for _, _, score in found(task))
        first = task.plain()
    assert "0 masks written" in done.output
    assert task.plain() == first
