"""An annotation file in `in/`: one job for each of its pictures, each exactly once."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from sam_poll.core.errors import ClaimLostError, ExitCode, PromptError
from sam_poll.diagnostics.validate import check
from sam_poll.integrations.cvat import import_prompts
from sam_poll.share.annotation_expander import AnnotationExpander
from sam_poll.share.claims.store import ClaimStore
from tests.conftest import BOX, Daemon, Share, picture_bytes, wait_until
from tests.support.dropped_annotations import BOXED, xml


@pytest.fixture
def share(tmp_path: Path) -> Share:
    return Share(tmp_path / "share")


def picture(share: Share, name: str, folder: str = "input", seed: int = 0) -> None:
    path = getattr(share, folder) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture_bytes(seed=seed))


def test_one_job_for_each_picture_and_the_file_itself_goes_to_done(share: Share) -> None:
    for name in ("a.jpg", "cam1/b.jpg", "cam1/c.jpg"):
        picture(share, name)
    share.drop(
        "annotations.xml", xml(("a.jpg", BOXED), ("cam1/b.jpg", BOXED * 2), ("cam1/c.jpg", ""))
    )
    counts = share.run_once()
    assert (counts.answered, counts.rejected) == (2, 0)
    assert share.tree("output") == ["a.annotations.mask.png", "cam1/b.annotations.mask.png"]
    assert share.tree("done") == [
        "a.annotations.json",
        "a.jpg",
        "annotations.xml",
        "cam1/b.annotations.json",
        "cam1/b.jpg",
    ]
    assert share.tree("input") == ["cam1/c.jpg"], "nothing was asked of it"
    assert share.tree("work") == []


@pytest.mark.parametrize(
    ("where", "dropped", "named"),
    [
        ("cam1/dog.jpg", "cam1/annotations.xml", "dog.jpg"),
        ("cam1/dog.jpg", "cam1/annotations.xml", "cam1/dog.jpg"),
        ("cam1/dog.jpg", "annotations.xml", "in/cam1/dog.jpg"),
        ("cam1/dog.jpg", "annotations.xml", "done/cam1/dog.jpg"),
        ("cam1/dog.jpg", "cam1/annotations.xml", "elsewhere/dog.jpg"),
        ("dog.jpg", "annotations.xml", "some/export/dog.jpg"),
    ],
)
def test_a_picture_is_found_by_its_name_below_in_with_and_without_folders(
    share: Share, where: str, dropped: str, named: str
) -> None:
    picture(share, where)
    share.drop(dropped, xml((named, BOXED)))
    assert share.run_once().answered == 1
    assert share.tree("output") == [where.replace(".jpg", ".annotations.mask.png")]


def test_pictures_of_a_task_lie_in_done_already_and_are_found_there(share: Share) -> None:
    """The round trip: masks of what CVAT knows as done/cam1/dog.jpg are requested again."""
    share.pair("cam1/dog")
    share.run_once()
    share.drop("annotations.xml", xml(("done/cam1/dog.jpg", BOXED)))
    assert share.run_once().answered == 1
    assert share.tree("done") == [
        "annotations.xml",
        "cam1/dog.annotations.json",
        "cam1/dog.jpg",
        "cam1/dog.json",
    ]


def test_a_later_picture_of_the_same_name_does_not_pass_for_the_one_that_is_named(
    share: Share,
) -> None:
    for seed in (1, 2):
        share.pair("dog", seed=seed)
        share.run_once()
    assert "dog~2.jpg" in share.tree("done")
    share.drop("annotations.xml", xml(("done/dog.jpg", BOXED)))
    assert share.run_once().answered == 0
    assert "image_sha256" in share.error("dog.annotations")["reason"]
    share.drop("second.xml", xml(("done/dog~2.jpg", BOXED)))
    assert share.run_once().answered == 1


def test_existing_prompts_are_not_overwritten(share: Share) -> None:
    share.pair("dog")
    share.drop("annotations.xml", xml(("dog.jpg", BOXED)))
    assert share.run_once().answered == 2
    assert share.tree("output") == ["dog.annotations.mask.png", "dog.mask.png"]


def test_pictures_of_one_stem_get_a_prompt_each(share: Share) -> None:
    picture(share, "dog.jpg")
    share.drop("dog.png", picture_bytes(".png"))
    share.drop("annotations.xml", xml(("dog.jpg", BOXED), ("dog.png", BOXED)))
    assert share.run_once().answered == 2
    assert len(share.tree("output")) == 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<annotations><version>1.1</version>", "XML"),
        (xml(("dog.jpg", "")), "no box and no points"),
        (xml(("../dog.jpg", BOXED)), "name of a picture"),
        (xml((".hidden/dog.jpg", BOXED)), "name of a picture"),
        (xml(("frame_000001", BOXED)), "ending"),
        ("<annotation><folder>voc</folder></annotation>", ""),
        ("", ""),
    ],
)
def test_a_malformed_file_is_rejected_as_a_whole_with_its_reason(
    share: Share, text: str, reason: str
) -> None:
    picture(share, "dog.jpg")
    share.drop("annotations.xml", text)
    counts = share.run_once()
    assert (counts.answered, counts.rejected) == (0, 1)
    assert share.tree("failed") == ["annotations.error.json", "annotations.xml"]
    error = share.error("annotations")
    assert reason in error["reason"]
    assert error["remedy"]
    assert share.tree("input") == ["dog.jpg"], "no prompt of it has come out"
    assert share.tree("work") == []


def test_a_box_outside_its_picture_rejects_that_picture_only(share: Share) -> None:
    picture(share, "a.jpg")
    picture(share, "b.jpg")
    far = '<box label="dog" xtl="10" ytl="10" xbr="500" ybr="40"/>'
    share.drop("annotations.xml", xml(("a.jpg", far), ("b.jpg", BOXED)))
    counts = share.run_once()
    assert (counts.answered, counts.rejected) == (1, 1)
    assert "outside the picture" in share.error("a.annotations")["reason"]


def test_a_file_in_the_place_of_a_folder_does_not_stop_the_others(share: Share) -> None:
    picture(share, "dog.jpg")
    share.drop("annotations.xml", xml(("dog.jpg/cat.jpg", BOXED), ("dog.jpg", BOXED)))
    assert share.run_once().answered == 1
    assert share.tree("input") == ["cat.annotations.json"], "it waits for its picture"


def test_a_picture_without_prompt_waits_for_annotations_in_the_input_folder(share: Share) -> None:
    picture(share, "dog.jpg")
    share.drop("annotations.xml", xml(("dog.jpg", BOXED)))
    assert share.run_once(missing_prompt="reject").rejected == 0
    assert share.tree("output") == ["dog.annotations.mask.png"]


def test_a_watching_daemon_expands_annotations_before_their_pictures_come(share: Share) -> None:
    with Daemon(share, settle_s=0.05, rescan_s=0.2):
        share.move_in("annotations.xml", xml(("cam1/dog.jpg", BOXED)))
        wait_until(lambda: share.tree("input") == ["cam1/dog.annotations.json"])
        picture(share, "cam1/dog.jpg")
        wait_until(lambda: share.tree("output") == ["cam1/dog.annotations.mask.png"])
    assert share.tree("input") == []


def test_a_full_disk_while_prompts_are_written_loses_and_duplicates_none(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{n}.jpg" for n in range(8)]
    for name in names:
        picture(share, name)
    share.drop("annotations.xml", xml(*((name, BOXED) for name in names)))
    really, left = os.rename, iter([None] * 12)

    def rename(*args: object, **more: object) -> None:
        if next(left, OSError) is not OSError:
            return really(*args, **more)  # type: ignore[arg-type]
        monkeypatch.setattr(os, "rename", really)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", rename)
    counts = share.run_once(rescan_s=0.1)
    assert (counts.answered, counts.rejected) == (8, 0)
    assert share.tree("output") == [f"{n}.annotations.mask.png" for n in range(8)]


def test_waikatos_folders_leave_xml_alone(share: Share) -> None:
    share.layout = type(share.layout)(
        **{**share.layout.__dict__, "annotation_endings": frozenset()}
    )
    share.pair("dog", prompt=BOX)
    share.drop("annotations.xml", xml(("dog.jpg", BOXED)))
    assert share.run_once().answered == 1
    assert share.tree("input") == ["annotations.xml"]


def test_the_same_file_dropped_again_replaces_its_answers(share: Share) -> None:
    picture(share, "dog.jpg")
    for _ in range(2):
        share.drop("annotations.xml", xml(("dog.jpg", BOXED)))
        assert share.run_once().answered == 1
    assert share.tree("output") == ["dog.annotations.mask.png"]


@pytest.mark.parametrize("length", [200, 240, 251])
def test_long_names_are_cut_and_stay_distinct(share: Share, length: int) -> None:
    names = ["a" * (length - 1) + end for end in "xy"]
    for name in names:
        picture(share, f"{name}.jpg")
    share.drop("annotations.xml", xml(*((f"{name}.jpg", BOXED) for name in names)))
    assert share.run_once().answered == 2
    assert len(share.tree("output")) == 2


def test_labels_and_negative_points_reach_the_prompt(share: Share) -> None:
    picture(share, "dog.jpg")
    shapes = (
        '<box label="dog" xtl="10" ytl="10" xbr="50" ybr="40" group_id="1"/>'
        '<points label="negative" points="12.5,12.5;14,14" group_id="1"/>'
    )
    share.drop("annotations.xml", xml(("dog.jpg", shapes)))
    share.run_once()
    prompt = json.loads((share.done / "dog.annotations.json").read_text())
    assert [o["label"] for o in prompt["objects"]] == ["dog"]
    assert [p["label"] for p in prompt["objects"][0]["points"]] == [0, 0]


@pytest.mark.parametrize(
    "names",
    [
        ("x.jpg", "x.annotations.json/y.jpg"),
        ("x.annotations.json/y.jpg", "x.jpg"),
        ("dangling/y.jpg",),
        ("dangling/below/y.jpg",),
        ("loop/y.jpg",),
        ("link/y.jpg",),
        ("file/below/y.jpg",),
    ],
)
def test_an_obstacle_to_one_prompt_does_not_stop_the_other_pictures(
    share: Share, tmp_path: Path, names: tuple[str, ...]
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    picture(share, "dog.jpg")
    share.drop("file", "")
    for link, target in (
        ("link", other),
        ("dangling", other / "nowhere"),
        ("loop", share.input / "loop"),
    ):
        (share.input / link).symlink_to(target)
    share.drop("annotations.xml", xml(*((name, BOXED) for name in (*names, "dog.jpg"))))
    counts = share.run_once(rescan_s=0.1)
    assert (counts.answered, counts.rejected) == (1, 0)
    waiting = [path for path in share.tree("input") if path.endswith(".json")]
    assert len(waiting) == len(names), "each waits for its picture where the scan finds it"
    assert list(other.iterdir()) == []
    assert share.tree("work") == []


def test_a_picture_whose_path_would_be_too_long_rejects_the_file(share: Share) -> None:
    picture(share, "dog.jpg")
    share.drop(
        "annotations.xml", xml(("/".join(["d" * 200] * 25) + "/y.jpg", BOXED), ("dog.jpg", BOXED))
    )
    counts = share.run_once(rescan_s=0.1)
    assert (counts.answered, counts.rejected) == (0, 1)
    assert "longer than a path" in share.error("annotations")["reason"]


def test_two_names_that_fit_one_picture_are_rejected(
    share: Share,
) -> None:
    picture(share, "dog.jpg")
    share.drop("annotations.xml", xml(("dog.jpg", BOXED), ("cam1/dog.jpg", BOXED)))
    assert share.run_once().answered == 0
    assert "fits 'dog.jpg'" in share.error("annotations")["reason"]
    assert share.tree("input") == ["dog.jpg"]


@pytest.mark.parametrize("at_work", [False, True])
def test_a_new_picture_of_the_same_name_does_not_pass_for_the_one_in_done_that_is_named(
    share: Share, at_work: bool
) -> None:
    share.pair("dog", seed=1)
    share.run_once()
    picture(share, "dog.jpg", seed=2)
    if at_work:
        claims = ClaimStore(share.layout, "another", lambda: None)
        assert claims.take("dog.jpg", "dog.jpg", [])
    share.drop("annotations.xml", xml(("done/dog.jpg", BOXED)))
    assert expand_alone(share) == "another picture of its name"
    share.drop("second.xml", xml(("in/dog.jpg", BOXED)))
    assert expand_alone(share, "second.xml") == "dog.second.json"


def expand_alone(share: Share, name: str = "annotations.xml") -> str:
    """Expand one file without a daemon; return its prompt's name, or a part of the error."""
    claims = ClaimStore(share.layout, "tester", lambda: None)
    claim = claims.take(name, None, [name])
    assert claim
    try:
        assert AnnotationExpander(share.layout).expand(claim, name)
    except PromptError as error:
        assert share.tree("input") in ([], ["dog.jpg"])
        return (
            "another picture of its name"
            if "another picture of its name" in error.reason
            else error.reason
        )
    (made,) = (path for path in share.tree("input") if path.endswith(".json"))
    return made


def test_no_prompt_is_lost_that_the_former_owner_moves_while_the_file_is_taken_over(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon believed dead has just moved a prompt to `in/`, as its heir looks for the rest."""
    names = ("a.jpg", "b.jpg")
    for name in names:
        picture(share, name)
    share.drop("annotations.xml", xml(*((name, BOXED) for name in names)))
    asleep, heir = (ClaimStore(share.layout, who, lambda: None) for who in ("asleep", "heir"))
    claim = asleep.take("annotations.xml", None, ["annotations.xml"])
    assert claim
    rename, expanded, awake = os.rename, Event(), Event()

    def heirs_work() -> None:
        (entry,) = heir.list_work().claims
        taken = heir.take_over(entry)
        assert taken
        assert AnnotationExpander(share.layout).expand(taken, "annotations.xml")
        expanded.set()
        assert awake.wait(30)
        heir.close(taken, "done", "")

    thread = Thread(target=heirs_work)

    def renaming(source: str, target: str, **folders: int) -> None:
        rename(source, target, **folders)
        if source == "a.annotations.json" and not thread.ident:
            thread.start()
            assert expanded.wait(30)

    monkeypatch.setattr(os, "rename", renaming)
    with suppress(ClaimLostError, FileNotFoundError):
        AnnotationExpander(share.layout).expand(claim, "annotations.xml")
    awake.set()
    thread.join(30)
    assert share.tree("input") == ["a.annotations.json", "a.jpg", "b.annotations.json", "b.jpg"]
    assert share.tree("done") == ["annotations.xml"]
    assert share.tree("work") == []


def test_a_copy_of_the_picture_that_is_named_in_done_is_as_good(share: Share) -> None:
    share.pair("dog", seed=1)
    share.run_once()
    picture(share, "dog.jpg", seed=1)
    share.drop("annotations.xml", xml(("done/dog.jpg", BOXED)))
    assert share.run_once().answered == 1


@pytest.mark.parametrize("shapes", ["", '<polygon label="dog" points="1,1;2,2;3,1"/>'])
@pytest.mark.parametrize("name", ["dog.jpg", "../dog.jpg", "frame_000001", ".hidden/dog.jpg"])
@pytest.mark.parametrize("boxes", ["", BOXED, '<points label="negative" points="1,1"/>'])
def test_check_reports_the_same_errors_as_the_folder(
    share: Share, name: str, shapes: str, boxes: str
) -> None:
    share.drop("annotations.xml", xml((name, shapes + boxes)))
    (finding,) = check([share.input / "annotations.xml"])
    counts = share.run_once()
    assert (finding.error is None) == (counts.rejected == 0)
    if finding.error:
        assert finding.error.reason == share.error("annotations")["reason"]


@pytest.mark.parametrize("policy", ["everything", "reject"])
def test_pictures_wait_for_annotations_that_another_daemon_is_expanding(
    share: Share, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    for number in range(3):
        picture(share, f"{number}.jpg")
    really = AnnotationExpander.expand
    begun = Event()
    go_on = Event()

    def slow(*given: Any) -> bool:
        begun.set()
        assert go_on.wait(20)
        return really(*given)

    monkeypatch.setattr(AnnotationExpander, "expand", slow)
    options: dict[str, Any] = {
        "settle_s": 0.02,
        "rescan_s": 0.05,
        "missing_prompt": policy,
        "pair_timeout_s": None,
    }
    share.drop("annotations.xml", xml(*((f"{number}.jpg", BOXED) for number in range(3))))
    with Daemon(share, **options):
        assert begun.wait(20)
        with Daemon(share, **options) as other:
            wait_until(lambda: other.source.scans > 10)
            assert share.tree("input") == ["0.jpg", "1.jpg", "2.jpg"]
            go_on.set()
            wait_until(lambda: len(share.tree("output")) == 3)
    assert share.tree("output") == [f"{number}.annotations.mask.png" for number in range(3)]
    assert share.tree("failed") == []


def test_a_picture_without_prompt_is_answered_once_no_annotations_can_bring_one(
    share: Share,
) -> None:
    picture(share, "dog.jpg")
    picture(share, "cat.jpg")
    share.drop("annotations.xml", xml(("dog.jpg", BOXED)))
    assert share.run_once(missing_prompt="everything").answered == 2
    assert share.tree("output") == ["cat.mask.png", "dog.annotations.mask.png"]


def test_a_daemon_stopped_while_it_writes_prompts_puts_the_file_back_and_counts_no_attempt(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{number}.jpg" for number in range(50)]
    share.drop("annotations.xml", xml(*((name, BOXED) for name in names)))
    really = AnnotationExpander._body
    with Daemon(share, settle_s=0.02, rescan_s=0.05) as daemon:

        def body(*given: Any) -> bytes:
            daemon.stop.set()
            return really(*given)

        monkeypatch.setattr(AnnotationExpander, "_body", body)
        wait_until(daemon.stop.is_set)
    assert share.tree("input") == ["annotations.xml"]
    assert share.tree("work") == []
    monkeypatch.undo()
    share.run_once()
    assert len(share.tree("input")) == 50


def test_expanding_beats_the_pulse_all_the_while(share: Share) -> None:
    share.drop("annotations.xml", xml(*((f"{number}.jpg", BOXED) for number in range(20))))
    claim = ClaimStore(share.layout, "tester", lambda: None).take(
        "annotations.xml", None, ["annotations.xml"]
    )
    assert claim
    beats: list[None] = []
    assert AnnotationExpander(share.layout, lambda: beats.append(None) or True).expand(
        claim, "annotations.xml"
    )  # type: ignore[func-returns-value]
    assert len(beats) == 3 * 20, (
        "when pictures are found, when prompts are written, when they are moved"
    )


def test_the_prompt_equals_the_one_that_import_prompts_writes(share: Share, tmp_path: Path) -> None:
    shapes = (
        '<points label="dog" points="12,12;20,20"/>'
        '<box label="a:b" xtl="10" ytl="10" xbr="50.25" ybr="40" rotation="30" group_id="2"/>'
        '<points label="négatif &amp; &quot;x&quot;" points="30,20" group_id="2">'
        '<attribute name="negative">true</attribute></points>'
    )
    picture(share, "cam1/dog é&'~2.jpg")
    text = xml(("cam1/dog é&amp;'~2.jpg", shapes))
    (tmp_path / "annotations.xml").write_text(text, encoding="utf-8")
    written = tmp_path / "other" / "in"
    assert (
        import_prompts.write_prompts(tmp_path / "annotations.xml", share.input, written)
        is ExitCode.OK
    )
    share.drop("annotations.xml", text)
    assert share.run_once().answered == 1
    made = share.done / "cam1/dog é&'~2.annotations.json"
    assert made.read_bytes() == (written / "cam1/dog é&'~2.json").read_bytes()


def test_delete_input_deletes_the_annotations_and_their_prompts(share: Share) -> None:
    share.layout = type(share.layout)(**{**share.layout.__dict__, "delete_input": True})
    picture(share, "dog.jpg")
    share.drop("annotations.xml", xml(("dog.jpg", BOXED)))
    assert share.run_once().answered == 1
    assert [share.tree(folder) for folder in ("input", "work", "done", "failed")] == [
        [],
        [],
        [],
        [],
    ]
