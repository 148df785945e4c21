"""Tests of `cvat prompts`: what it writes, leaves unchanged and reports, and its exit codes."""

from __future__ import annotations

import json
import os
import threading
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from sam_poll.core import files
from sam_poll.core.errors import ExitCode
from sam_poll.integrations.cvat import archives
from sam_poll.prompts import parser
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.source import FolderSource
from tests.conftest import Share
from tests.support.cvat_prompts import Run, picture, prompts_in, tree, zipped
from tests.support.cvat_prompts import wide as wide
from tests.support.strategies import encoded, sample

SIZE = 'width="64" height="48"'
BOX = '<box label="dog" xtl="10" ytl="10" xbr="50" ybr="40"/>'


def xml(path: Path, *images: tuple[str, str], size: str = SIZE) -> Path:
    """Return an annotation file of pictures and their shapes."""
    inside = "".join(
        f'<image id="{n}" name="{name}" {size}>{drawn}</image>'
        for n, (name, drawn) in enumerate(images)
    )
    path.write_text(f"<annotations><version>1.1</version>{inside}</annotations>", encoding="utf-8")
    return path


def stamps(root: Path) -> dict[str, tuple[int, int]]:
    return {
        p.as_posix(): (p.stat().st_ino, p.stat().st_mtime_ns)
        for p in root.rglob("*")
        if p.is_file()
    }


# ── what is written ──


def test_prompts_are_written_beside_copies_of_their_pictures_and_name_them(
    tmp_path: Path,
) -> None:
    dog, cat = picture(tmp_path / "pics/cam1/dog.jpg"), picture(tmp_path / "pics/cat.PNG", 1)
    file = xml(
        tmp_path / "a.xml",
        ("done/cam1/dog.jpg", BOX),
        ("cat.PNG", '<points label="cat" points="5,6"/>'),
    )
    run = Run(file, "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.OK, run.text
    written = tree(tmp_path / "in")
    assert set(written) == {"cam1/dog.jpg", "cam1/dog.json", "cat.PNG", "cat.json"}
    assert written["cam1/dog.jpg"] == dog.read_bytes()
    assert written["cat.PNG"] == cat.read_bytes()
    read = parser.parse(written["cam1/dog.json"])
    assert read.image == "dog.jpg"
    assert [(p.label, p.box) for p in prompts_in(written["cam1/dog.json"])] == [
        ("dog", parser.Box(10, 10, 50, 40))
    ]
    assert "2 prompts written" in run.text
    assert "2 objects; 2 pictures copied" in run.text


def test_written_prompts_are_answered_by_the_daemon(share: Share, tmp_path: Path) -> None:
    picture(tmp_path / "pics/cam1/dog.jpg")
    picture(tmp_path / "pics/cam1/dog.png", 1)
    file = xml(tmp_path / "a.xml", ("cam1/dog.jpg", BOX), ("cam1/dog.png", BOX))
    assert Run(file, "--images", tmp_path / "pics", "-o", share.input).code == ExitCode.OK
    snapshot = share.run_once()
    assert (snapshot.answered, snapshot.rejected) == (2, 0)
    assert share.tree("output") == ["cam1/dog.jpg.mask.png", "cam1/dog.png.mask.png"]


def test_a_picture_in_done_is_not_copied_and_its_lone_prompt_is_answered(
    share: Share, tmp_path: Path
) -> None:
    share.pair("cam1/dog")
    share.run_once()
    file = xml(tmp_path / "a.xml", ("done/cam1/dog.jpg", BOX.replace("dog", "second")))
    run = Run(file, "--images", share.root, "-o", share.input)
    assert run.code == ExitCode.OK, run.text
    # The name of the first prompt exists in done/, not in in/.
    assert share.tree("input") == ["cam1/dog.json"]
    assert share.run_once().answered == 1
    assert share.tree("done") == ["cam1/dog.jpg", "cam1/dog.json", "cam1/dog~2.json"]


def test_a_second_run_changes_nothing_before_and_after_the_daemon(
    share: Share, tmp_path: Path
) -> None:
    picture(tmp_path / "pics/cam1/dog.jpg")
    file = xml(tmp_path / "a.xml", ("cam1/dog.jpg", BOX))
    arguments = (file, "--images", tmp_path / "pics", "-o", share.input)
    Run(*arguments)
    before = stamps(share.root)
    again = Run(*arguments)
    assert (again.code, stamps(share.root)) == (ExitCode.OK, before)
    assert "0 prompts written" in again.text
    assert "1 there already" in again.text
    share.run_once()
    before = stamps(share.root)
    for more in ((), ("--label", "dog")):
        again = Run(*arguments, *more)
        assert (again.code, stamps(share.root)) == (ExitCode.OK, before)
        assert "1 already answered" in again.text


def test_a_prompt_in_progress_is_not_written_again(share: Share, tmp_path: Path) -> None:
    picture(tmp_path / "pics/cam1/dog.jpg")
    file = xml(tmp_path / "a.xml", ("cam1/dog.jpg", BOX))
    arguments = (file, "--images", tmp_path / "pics", "-o", share.input)
    Run(*arguments)
    with FolderSource(share.layout, FolderOptions(settle_s=0.0, once=True, mode="poll")) as source:
        jobs = source.jobs(threading.Event())
        job = next(jobs)
        again = Run(*arguments)
        assert (again.code, share.tree("input")) == (ExitCode.OK, [])
        assert "1 already answered or in progress" in again.text
        source.requeue(job)
        jobs.close()
    assert share.tree("input") == ["cam1/dog.jpg", "cam1/dog.json"]


def test_an_answered_prompt_is_written_again_if_picture_or_boxes_have_changed(
    share: Share, tmp_path: Path
) -> None:
    picture(tmp_path / "pics/dog.jpg")
    file = xml(tmp_path / "a.xml", ("dog.jpg", BOX))
    arguments = (file, "--images", tmp_path / "pics", "-o", share.input)
    Run(*arguments)
    share.run_once()
    picture(tmp_path / "pics/dog.jpg", seed=5)
    assert Run(*arguments).code == ExitCode.OK
    assert share.tree("input") == ["dog.jpg", "dog.json"]
    share.run_once()
    xml(tmp_path / "a.xml", ("dog.jpg", BOX.replace("50", "51")))
    assert Run(*arguments).code == ExitCode.OK
    assert share.tree("input") == ["dog.jpg", "dog.json"]


def test_no_pictures_writes_prompts_only(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    file = xml(tmp_path / "a.xml", ("dog.jpg", BOX))
    assert (
        Run(file, "--images", tmp_path / "pics", "-o", tmp_path / "in", "--no-pictures").code
        == ExitCode.OK
    )
    assert set(tree(tmp_path / "in")) == {"dog.json"}


def test_pictures_that_wait_in_the_output_get_their_prompts_beside_them(tmp_path: Path) -> None:
    picture(tmp_path / "share/in/cam1/dog.jpg")
    file = xml(tmp_path / "a.xml", ("cam1/dog.jpg", BOX))
    for images in (tmp_path / "share/in", tmp_path / "share"):
        before = stamps(tmp_path / "share")
        assert Run(file, "--images", images, "-o", tmp_path / "share/in").code == ExitCode.OK
        assert set(tree(tmp_path / "share")) == {"in/cam1/dog.jpg", "in/cam1/dog.json"}
        assert before.items() <= stamps(tmp_path / "share").items()


def test_two_pictures_of_one_stem_get_prompts_with_their_whole_names(
    tmp_path: Path,
) -> None:
    picture(tmp_path / "pics/dog.jpg")
    picture(tmp_path / "pics/dog.png")
    file = xml(tmp_path / "a.xml", ("dog.png", BOX))
    Run(file, "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert set(tree(tmp_path / "in")) == {"dog.png", "dog.png.json"}


def test_labels_and_negatives_select_the_objects(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    drawn = (
        BOX + '<points label="off" points="20,20"/>' + BOX.replace("dog", "cat").replace("50", "15")
    )
    file = xml(tmp_path / "a.xml", ("dog.jpg", drawn))
    flags = (
        "--images",
        tmp_path / "pics",
        "-o",
        tmp_path / "in",
        "--label",
        "dog",
        "--negative",
        "off",
    )
    assert Run(file, *flags).code == ExitCode.OK
    (dog,) = prompts_in(tree(tmp_path / "in")["dog.json"])
    assert (dog.label, [p.label for p in dog.points]) == ("dog", [0])


def test_a_label_without_objects_is_an_error_that_lists_the_existing_labels(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    file = xml(tmp_path / "a.xml", ("dog.jpg", BOX))
    run = Run(file, "--images", tmp_path / "pics", "-o", tmp_path / "in", "--label", "dgo")
    assert run.code == ExitCode.USAGE
    assert "there are: dog" in run.text
    assert not (tmp_path / "in").exists()


# ── what is reported and skipped ──


def refused(tmp_path: Path, *images: tuple[str, str], size: str = SIZE) -> Run:
    """Run the command; check that it writes the good picture and skips the others."""
    picture(tmp_path / "pics/good.jpg", 9)
    file = xml(tmp_path / "a.xml", *images, ("good.jpg", BOX), size=size)
    run = Run(file, "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS, run.text
    assert {"good.jpg", "good.json"} <= set(tree(tmp_path / "in"))
    return run


def test_a_missing_picture_is_reported_and_the_others_are_written(tmp_path: Path) -> None:
    run = refused(tmp_path, ("cam1/gone.jpg", BOX))
    assert 'image "cam1/gone.jpg": does not exist' in run.text
    assert "1 skipped" in run.text


def test_of_many_problems_the_first_are_printed_and_all_are_counted(tmp_path: Path) -> None:
    run = refused(tmp_path, *((f"gone{n}.jpg", BOX) for n in range(50)))
    assert run.text.count("does not exist") == 20
    assert "… and 30 more" in run.text
    assert "50 skipped" in run.text


def test_a_name_that_matches_several_pictures_is_reported_with_them(tmp_path: Path) -> None:
    for folder in ("cam1", "cam2"):
        picture(tmp_path / "pics" / folder / "dog.jpg")
    run = refused(tmp_path, ("dog.jpg", BOX))
    assert "matches 2 pictures: cam1/dog.jpg, cam2/dog.jpg" in run.text
    assert set(tree(tmp_path / "in")) == {"good.jpg", "good.json"}


def test_two_names_that_match_one_picture_are_both_skipped(tmp_path: Path) -> None:
    """`cam1/dog.jpg` and `cam2/dog.jpg` as `dog.jpg` would get each other's boxes."""
    picture(tmp_path / "pics/dog.jpg")
    run = refused(tmp_path, ("cam1/dog.jpg", BOX), ("cam2/dog.jpg", BOX))
    assert run.text.count("is one of 2 names that all match dog.jpg") == 2


def test_a_picture_of_another_size_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/turned.jpg").write_bytes(encoded(sample(48, 64), "JPEG", orientation=6))
    (tmp_path / "pics/other.jpg").write_bytes(encoded(sample(48, 64), "JPEG"))
    run = refused(tmp_path, ("turned.jpg", BOX), ("other.jpg", BOX))
    assert (
        'image "other.jpg": image_size: the picture is 48×64, but the prompt was made for 64×48'
        in run.text
    )
    assert "turned.json" in tree(tmp_path / "in")


def test_a_damaged_picture_and_prompts_that_do_not_fit_are_skipped(tmp_path: Path) -> None:
    picture(tmp_path / "pics/a.jpg").write_bytes(b"\xff\xd8no")
    picture(tmp_path / "pics/b.jpg")
    picture(tmp_path / "pics/c.jpg")
    picture(tmp_path / "pics/d.jpg")
    run = refused(
        tmp_path,
        ("a.jpg", BOX),
        ("b.jpg", '<points label="dog" points="65,5"/>'),
        ("c.jpg", BOX.replace("50", "5")),
        ("d.jpg", '<points label="background" points="5,5"/>'),
        size="",
    )
    assert set(tree(tmp_path / "in")) == {"good.jpg", "good.json"}
    for name, reason in (
        ("a", "truncated"),
        ("b", "outside the picture"),
        ("c", "inside out"),
        ("d", "negative points"),
    ):
        assert any(
            f'image "{name}.jpg"' in line and reason in line for line in run.text.splitlines()
        ), run.text


def test_an_existing_other_prompt_or_picture_is_never_overwritten(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path / "pics" / name)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.json").write_text("{}")
    picture(tmp_path / "in/b.jpg", 7)
    before = tree(tmp_path / "in")
    run = refused(tmp_path, ("a.jpg", BOX), ("b.jpg", BOX))
    assert tree(tmp_path / "in").items() >= before.items()
    assert set(tree(tmp_path / "in")) == {"a.json", "b.jpg", "good.jpg", "good.json"}
    assert "another prompt has this name: a.json" in run.text
    assert "another picture has this name: b.jpg" in run.text


def test_a_prompt_without_picture_is_not_written_if_the_daemon_would_use_another_picture(
    share: Share, tmp_path: Path
) -> None:
    for name in ("done/a.jpg", "done/a~2.jpg", "done/b.jpg", "in/b.jpg"):
        picture(share.root / name)
    file = xml(tmp_path / "a.xml", ("done/a.jpg", BOX), ("done/a~2.jpg", BOX), ("done/b.jpg", BOX))
    run = Run(file, "--images", share.root, "-o", share.input)
    assert run.code == ExitCode.FAILED_JOBS
    assert share.tree("input") == ["a~2.json", "b.jpg"]
    assert "another picture would be used for it: done/a~2.jpg" in run.text
    assert "another picture would be used for it: in/b.jpg" in run.text


def test_pictures_without_prompts_and_other_shapes_are_counted(tmp_path: Path) -> None:
    picture(tmp_path / "pics/a.jpg")
    picture(tmp_path / "pics/b.jpg")
    polygon = '<polygon label="x" points="1,1;2,2;3,1"/>'
    file = xml(tmp_path / "a.xml", ("a.jpg", BOX + polygon), ("b.jpg", polygon * 2))
    run = Run(file, "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.OK
    assert "1 picture without boxes or points" in run.text
    assert "left out: 3 polygons" in run.text
    assert set(tree(tmp_path / "in")) == {"a.jpg", "a.json"}


HOSTILE = [
    "../secret.jpg",
    "cam1/../../secret.jpg",
    "/secret.jpg",
    "..\\secret.jpg",
    "C:\\secret.jpg",
    ".",
    "/",
    "a\nb",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_leads_out_of_the_folders(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "secret.jpg")
    (tmp_path / "pics").mkdir()
    entry = {"id": 1, "file_name": name, "width": 64, "height": 48}
    note = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9]}
    document = {"images": [entry], "annotations": [note], "categories": [{"id": 1, "name": "dog"}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    run = Run(tmp_path / "a.json", "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    assert set(tree(tmp_path)) == {"a.json", "secret.jpg"}


def test_linked_pictures_and_folders_are_read_and_copied(tmp_path: Path) -> None:
    """Data sets are often made of links."""
    dog = picture(tmp_path / "elsewhere/dog.jpg")
    cat = picture(tmp_path / "elsewhere/more/cat.jpg", 1)
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/dog.jpg").symlink_to(dog)
    (tmp_path / "pics/cam1").symlink_to(cat.parent)
    (cat.parent / "round").symlink_to(tmp_path / "pics")  # an endless loop of folders
    file = xml(tmp_path / "a.xml", ("dog.jpg", BOX), ("cam1/cat.jpg", BOX))
    assert Run(file, "--images", tmp_path / "pics", "-o", tmp_path / "in").code == ExitCode.OK
    written = tree(tmp_path / "in")
    assert set(written) == {"dog.jpg", "dog.json", "cam1/cat.jpg", "cam1/cat.json"}
    assert not (tmp_path / "in/dog.jpg").is_symlink()
    assert written["cam1/cat.jpg"] == cat.read_bytes()


@pytest.mark.parametrize("folder", ["in", "done"])
def test_links_in_the_shares_own_folders_are_not_followed(tmp_path: Path, folder: str) -> None:
    """A daemon follows no links, and anybody who can write to the share could create them."""
    picture(tmp_path / "elsewhere/dog.jpg")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "dog.jpg").symlink_to(tmp_path / "elsewhere/dog.jpg")
    file = xml(tmp_path / "a.xml", ("dog.jpg", BOX))
    run = Run(file, "--images", tmp_path / folder, "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    assert "does not exist" in run.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a link of another user's")
def test_links_of_other_users_are_not_followed_and_counted(tmp_path: Path) -> None:
    secret = picture(tmp_path / "secret/dog.jpg")
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/dog.jpg").symlink_to(secret)
    os.lchown(tmp_path / "pics/dog.jpg", 12345, 12345)
    file = xml(tmp_path / "a.xml", ("dog.jpg", BOX))
    run = Run(file, "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    assert "1 link of other users not followed" in run.text
    os.chown(tmp_path / "pics", 12345, 12345)  # the named folder has the same owner
    assert Run(file, "--images", tmp_path / "pics", "-o", tmp_path / "in").code == ExitCode.OK


def test_one_bad_box_refuses_its_object_only(tmp_path: Path) -> None:
    picture(tmp_path / "pics/dog.jpg")
    bad = BOX.replace("50", "nan").replace("dog", "cat")
    file = xml(tmp_path / "a.xml", ("dog.jpg", BOX + bad + BOX.replace("50", "500")))
    run = Run(file, "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    (dog,) = prompts_in(tree(tmp_path / "in")["dog.json"])
    assert dog.label == "dog"
    assert len(dog.notes) == 2
    assert 'image "dog.jpg": object 2 "cat": box 2, xbr: is not a number' in run.text
    assert 'image "dog.jpg": object 3 "dog", box.x1: 500 is outside' in run.text


def test_a_size_before_the_exif_rotation_is_reported_as_such(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    (tmp_path / "pics/turned.jpg").write_bytes(encoded(sample(48, 64), "JPEG", orientation=6))
    file = xml(
        tmp_path / "a.xml", ("turned.jpg", BOX.replace("50", "40")), size='width="48" height="64"'
    )
    run = Run(file, "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    assert (
        "64×48, but the prompt was made for 48×64, which is the picture's size before its EXIF turn"
        in run.text
    )
    assert not (tmp_path / "in").exists()


# ── the other kinds ──


def test_a_folder_of_yolo_texts_is_read_with_its_names(tmp_path: Path) -> None:
    """As CVAT exports YOLO 1.1: obj_train_data/, obj.names, train.txt."""
    picture(tmp_path / "pics/cam1/dog.jpg")
    root = tmp_path / "yolo"
    (root / "obj_train_data/cam1").mkdir(parents=True)
    (root / "obj_train_data/cam1/dog.txt").write_text(
        "1 0.5 0.5 0.25 0.5\n0 0.1 0.1 0.2 0.2 0.2 0.1\n"
    )
    (root / "obj.names").write_text("dog\ncat\n")
    (root / "train.txt").write_text("data/obj_train_data/cam1/dog.jpg\n")
    run = Run(root, "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.OK, run.text
    (cat,) = prompts_in(tree(tmp_path / "in")["cam1/dog.json"])
    assert (cat.label, cat.box) == ("cat", parser.Box(24, 12, 40, 36))
    assert "left out: 1 outline" in run.text


def test_texts_without_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a/labels").mkdir(parents=True)
    (tmp_path / "a/labels/dog.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    run = Run(tmp_path / "a/labels", "--images", tmp_path, "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    assert "names of its classes" in run.text


def test_a_folder_of_opex_files_is_matched_by_name_and_an_invalid_one_is_reported(
    tmp_path: Path,
) -> None:
    picture(tmp_path / "pics/cam1/dog.jpg")
    found = {"label": "dog", "bbox": {"top": 1, "left": 2, "bottom": 9, "right": 19}}
    (tmp_path / "found/cam1").mkdir(parents=True)
    (tmp_path / "found/cam1/dog.opex.json").write_text(
        json.dumps({"id": "17:04:33", "objects": [found]})
    )
    (tmp_path / "found/cam1/cat.json").write_text("{")
    run = Run(tmp_path / "found", "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    (dog,) = prompts_in(tree(tmp_path / "in")["cam1/dog.json"])
    assert dog.box == parser.Box(2, 1, 20, 10)
    assert "cam1/cat.json: line 1: is not JSON" in run.text


@pytest.mark.parametrize("member", ["annotations.xml", "annotations/instances_default.json"])
def test_a_zip_as_cvat_exports_it_is_read(tmp_path: Path, member: str) -> None:
    picture(tmp_path / "pics/dog.jpg")
    xml(tmp_path / "a.xml", ("dog.jpg", BOX))
    note = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 40, 30]}
    coco = {
        "images": [{"id": 1, "file_name": "dog.jpg"}],
        "annotations": [note],
        "categories": [{"id": 1, "name": "d"}],
    }
    with zipfile.ZipFile(tmp_path / "task.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/dog.jpg", b"")
        archive.writestr(
            member,
            json.dumps(coco) if member.endswith("json") else (tmp_path / "a.xml").read_bytes(),
        )
    run = Run(tmp_path / "task.zip", "--images", tmp_path / "pics", "-o", tmp_path / "in")
    assert run.code == ExitCode.OK, run.text
    assert prompts_in(tree(tmp_path / "in")["dog.json"])[0].box == parser.Box(10, 10, 50, 40)


BIG = zipped(("annotations.xml", bytes(100_000)))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "a.zip: line 1: is empty"),
        (b"GIF89a", "of no kind that can be read"),
        (zipped(("x.md", b"")), "a ZIP that holds neither texts nor JSON nor XML"),
        (zipped(("x.txt", b"")), "has no file with the names of its classes"),
        (
            zipped(("annotations.xml", b"<a/>"), ("annotations/b.json", b"{}")),
            "a ZIP that holds both JSON files and XML files",
        ),
        (zipped(("annotations.xml", b"<a/>")), "a.zip: the XML file: is not a CVAT file"),
        (BIG, "too large"),
        (BIG[:30] + b"\xff" * 20 + BIG[50:], "cannot be read|too large"),
    ],
)
def test_an_unreadable_file_is_reported_with_its_name_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes, reason: str
) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 50_000)
    (tmp_path / "a.zip").write_bytes(body)
    run = Run(tmp_path / "a.zip", "--images", tmp_path, "-o", tmp_path / "in")
    assert run.code == ExitCode.FAILED_JOBS
    assert any(part in run.text for part in reason.split("|")), run.text
    assert not (tmp_path / "in").exists()


def test_missing_files_and_folders_are_usage_errors(tmp_path: Path) -> None:
    file = xml(tmp_path / "a.xml", ("dog.jpg", BOX))
    assert (
        Run(tmp_path / "b.xml", "--images", tmp_path, "-o", tmp_path / "in").code == ExitCode.USAGE
    )
    assert Run(file, "--images", tmp_path / "nowhere", "-o", tmp_path / "in").code == ExitCode.USAGE


def test_a_folder_of_neither_or_both_kinds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert (
        "neither texts nor JSON"
        in Run(tmp_path / "a", "--images", tmp_path, "-o", tmp_path / "in").text
    )
    (tmp_path / "a/b.txt").touch()
    (tmp_path / "a/b.json").touch()
    assert (
        "both YOLO texts and JSON files"
        in Run(tmp_path / "a", "--images", tmp_path, "-o", tmp_path / "in").text
    )


# ── interrupted ──


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_whole_files_and_the_next_run_does_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: type[BaseException]
) -> None:
    names = [f"cam{n}/dog.jpg" for n in range(3)]
    for n, name in enumerate(names):
        picture(tmp_path / "pics" / name, n)
    file = xml(tmp_path / "a.xml", *((name, BOX) for name in names))
    Run(file, "--images", tmp_path / "pics", "-o", tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    real = os.fsync
    for last in range(2 * len(names)):
        output = tmp_path / f"in{last}"
        calls = iter(range(100))

        def sync(handle: int, calls: Iterable[int] = calls, last: int = last) -> None:
            if next(iter(calls)) == last:
                raise trouble
            real(handle)

        with monkeypatch.context() as patch:
            patch.setattr(files.os, "fsync", sync)
            run = Run(file, "--images", tmp_path / "pics", "-o", output)
        assert run.code == (130 if trouble is KeyboardInterrupt else ExitCode.SHARE)
        there = tree(output)
        assert there.items() <= whole.items()
        assert len(there) == last
        # no prompt without its picture: the daemon would use another one
        assert all(name.replace(".json", ".jpg") in there for name in there)
        assert Run(file, "--images", tmp_path / "pics", "-o", output).code == ExitCode.OK
        assert tree(output) == whole
