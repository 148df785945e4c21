"""Whoever may write to the share gains nothing outside it: links, pipes and folders planted under
every name that is used there, before the daemon starts and while it works; run as root and as an
ordinary user.

Nothing is asserted here of jobs whose names are taken: what is planted may hold them up, and does
no more."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sam_poll.core.safe_path import SafePath
from sam_poll.diagnostics import validate
from sam_poll.share.layout import walk
from tests.conftest import BOX, picture_bytes, wait_until
from tests.support.planted import (
    CLAIM,
    DEAD,
    FOLDERS,
    KINDS,
    LEASE_S,
    MOSAIC,
    WHO,
    XML,
    Site,
    mosaic_folder,
    site,
)

pytestmark = pytest.mark.slow  # they wait for a daemon each

FIXED = [
    *(f"{folder}/.sam_poll-probe" for folder in FOLDERS),
    "work/.sam_poll-share",
    "work/.sam_poll-mosaic",
    f"work/.sam_poll-worker-{DEAD}.json",
    "work/.sam_poll-half.tmp",
    *("in/lone.jpg", "in/drawn.xml", "in/with.json", "in/p2.jpg", "in/p2.json", "in/p1.drawn.json"),
    *(
        "out/good.mask.png",
        "out/p1.mask.png",
        "out/p2.mask.png",
        "out/merged.xml",
        "out/x.cvat.xml",
    ),
    *(
        "done/good.jpg",
        "done/good.json",
        "failed/f.error.json",
        "failed/good.error.json",
        "work/stray.jpg",
    ),
]
IN_CLAIMS = [
    f"work/.c.jpg/{CLAIM}/{name}"
    for name in (
        ".answered",
        ".answered~2",
        ".report",
        ".held",
        ".shares_stem",
        ".sam_poll-1.tmp",
        "c.json",
    )
]
IN_CLAIMS += [f"work/.{name}.xml/{CLAIM}/.{name}" for name in ("making", "prompts")]
IN_CLAIMS += [
    f"work/.d.jpg/g2.{place}@{DEAD}/{name}"
    for place in ("failed",)
    for name in ("d.jpg", ".report")
]
IN_CLAIMS += [f"work/.e.jpg/{CLAIM}", "work/.f.jpg", "work/.g.jpg/g1.done@dead-2-abcdef-0"]
BIG = mosaic_folder("big.png", "big.json")
IN_MOSAICS = [
    f"{BIG}/{name}"
    for name in ("open.json", "advanced", "job.json", "begin.lock", "end.lock", "made-0")
]
IN_MOSAICS += [f"work/.sam_poll-mosaic/{n}/open.json" for n in ("0", "1")] + [
    "work/.sam_poll-mosaic/2"
]


@pytest.fixture(params=WHO)
def place(request: pytest.FixtureRequest) -> Iterator[Site]:
    with site(request.param) as made:
        yield made


def fixed_names(made: Site, kind: str) -> None:
    made.pair("in/good")
    made.drop("in/lone.json", BOX)
    made.drop("in/with.jpg", picture_bytes())
    made.drop("failed/f.jpg", picture_bytes())
    for row in FIXED:
        made.plant(row, kind)


def names_in_claims(made: Site, kind: str) -> None:
    made.pair("in/good")
    made.drop(f"work/.c.jpg/{CLAIM}/c.jpg", picture_bytes())
    for name in ("making", "prompts"):
        made.drop(f"work/.{name}.xml/{CLAIM}/{name}.xml", XML.format("good.jpg"))
    for row in IN_CLAIMS:
        made.plant(row, kind)


def names_in_mosaics(made: Site, kind: str) -> None:
    made.pair("in/big", MOSAIC, ".png", 128)
    for row in IN_MOSAICS:
        made.plant(row, kind)


SUBFOLDERS = {
    "in/p": ["work/p/stray.jpg", "work/p/stray.json", "failed/p/f.jpg", "failed/p/f.json"],
    "out/cam1": ["in/cam1/a.jpg", "in/cam1/a.json"],
    "done/cam2": ["in/cam2/a.jpg", "in/cam2/a.json", "in/cam2/drawn.xml"],
    "failed/cam3": ["in/cam3/a.jpg", "in/cam3/a.json"],
    "work/cam4": ["in/cam4/a.jpg", "in/cam4/a.json"],
    "in/cam5": [f"work/cam5/.a.xml/{CLAIM}/a.xml"],
    "in/cam6": [
        f"work/cam6/.a.jpg/g3.input@{DEAD}/a.jpg",
        f"work/cam6/.a.jpg/g3.input@{DEAD}/a.json",
    ],
    "done/cam7": [f"work/cam7/.a.jpg/g3.done@{DEAD}/a.jpg"],
    "failed/cam8": [
        f"work/cam8/.a.jpg/g3.failed@{DEAD}/a.jpg",
        f"work/cam8/.a.jpg/g3.failed@{DEAD}/.report",
    ],
    "out/p1": [],
}
BODIES: dict[str, Callable[[str], bytes | dict[str, object] | str]] = {
    ".jpg": lambda name: picture_bytes(),
    ".json": lambda name: {"box": {"x0": 0}} if "cam3" in name else dict(BOX),
    ".xml": lambda name: XML.format("a.jpg"),
    "": lambda name: {"files": ["a.jpg"]},
}


def work_on(made: Site, *, must_answer: bool = False) -> None:
    """A daemon works until it has taken over what a dead one has left, and has answered a further
    job; or cannot, unless it must.
    """
    claims = list(made.share.glob(f"work/**/*@{DEAD}"))
    answer = made.share / "out/late.mask.png"
    with made.watching():
        made.pair("in/late")
        if must_answer:
            wait_until(answer.exists)
        with suppress(AssertionError):
            wait_until(answer.exists, 3 + LEASE_S)
            wait_until(lambda: not any(map(os.path.lexists, claims)), 4 + 2 * LEASE_S)


AS_USER = ("link to a file", "link to a folder", "hard link", "pipe")


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize(
    "plant", [fixed_names, names_in_claims, names_in_mosaics], ids=lambda plant: plant.__name__
)
def test_whatever_is_planted_under_a_name_nothing_outside_changes(
    plant: Callable[[Site, str], None], kind: str, place: Site
) -> None:
    if place.who == "user" and len(WHO) > 1 and kind not in AS_USER:
        pytest.skip("tried as root")
    plant(place, kind)
    place.before = place.outside_now()
    work_on(place)
    place.check()
    if plant is fixed_names:
        place.commands()
        place.check()
        place.once(8)
        place.check()


@pytest.mark.parametrize("kind", ["link to a file", "dangling link", "pipe"])
@pytest.mark.parametrize(
    "name", [".answered", ".report", ".held", ".shares_stem", ".making", ".prompts", "c.jpg"]
)
def test_no_name_in_a_dead_daemons_claim_leads_out(name: str, kind: str, place: Site) -> None:
    """Each alone: one that cannot be taken over may hold others up."""
    if place.who == "user" and len(WHO) > 1:
        pytest.skip("tried as root")
    if name in (".making", ".prompts"):
        place.drop(f"work/.c.xml/{CLAIM}/c.xml", XML.format("c.jpg"))
        place.plant(f"work/.c.xml/{CLAIM}/{name}", kind)
    else:
        for stem, prompt in (("c", BOX), ("c.left", BOX), ("c.bad", {"box": {"x0": 0}})):
            place.drop(f"work/.c.jpg/{CLAIM.replace('n1', 'n3')}/{stem}.json", prompt)
        if name != "c.jpg":
            place.drop(f"work/.c.jpg/{CLAIM.replace('n1', 'n3')}/c.jpg", picture_bytes())
        place.plant(f"work/.c.jpg/{CLAIM.replace('n1', 'n3')}/{name}", kind)
    place.before = place.outside_now()
    work_on(place)
    place.check()


@pytest.mark.parametrize("name", [f".x.jpg/{CLAIM}", f".x.jpg/g2.input@{DEAD}", ".x.jpg"])
def test_a_claim_that_is_a_link_to_a_folder_is_none(name: str, place: Site) -> None:
    place.plant(f"work/{name}", "link to a folder")
    place.before = place.outside_now()
    work_on(place, must_answer=True)
    place.check()


@pytest.mark.parametrize("row", sorted(SUBFOLDERS))
@pytest.mark.parametrize("kind", ["link to a folder", "folder of links"])
def test_no_subfolder_that_is_a_link_is_entered(row: str, kind: str, place: Site) -> None:
    for name in SUBFOLDERS[row]:
        place.drop(name, BODIES[os.path.splitext(name)[1]](name))
    for stem in ("f",) if row == "in/p" else ():
        place.drop(f"failed/p/{stem}.error.json", {"files": [f"{stem}.jpg", f"{stem}.json"]})
    place.plant(row, kind)
    place.before = place.outside_now()
    work_on(place)
    place.check()
    if row in ("in/p", "out/p1"):
        place.commands()
        place.check()


def exchange(made: Site, over: threading.Event, name: str, target: Path) -> None:
    """Put a link in a name's place, and what was there back, as fast as can be."""
    path = made.share / name
    aside = made.share / f"aside of {name.replace('/', ' ')}"
    link = made.share / "link"
    link = link.with_name(f"link of {aside.name}")
    link.symlink_to(target)
    while not over.is_set():
        for old, new in ((path, aside), (link, path), (path, link), (aside, path)):
            with suppress(OSError):
                old.rename(new)


def attack_what_is_made(made: Site, over: threading.Event, target: Path) -> None:
    """Exchange each claim, each folder of a mosaic and each file in them for a link, as soon as it
    can be seen.
    """
    number = 0
    while not over.is_set():
        for path in [*made.share.joinpath("work").rglob("*")]:
            number += 1
            aside = made.share / f"taken {number}"
            with suppress(OSError):
                if number % 3 == 0:
                    path.rename(aside)
                    path.symlink_to(target / ("folder" if aside.is_dir() else "file"))
                elif path.is_symlink():
                    path.unlink()
                elif path.is_dir():
                    for name in (
                        "labels.tif",
                        "labels.gpkg",
                        "labels.geojson",
                        ".answered",
                        ".report",
                        "job.json",
                    ):
                        (path / name).symlink_to(target / "new")


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["folders", "claims"])
def test_nothing_outside_changes_while_names_are_exchanged_for_links_and_back(
    attack: str, place: Site
) -> None:
    over = threading.Event()
    threads = []
    for number, name in enumerate(
        ("in/cam", "work/cam", "out/cam", "done/cam", "failed/cam", "work/.sam_poll-mosaic")
    ):
        target = place.target(name, attack) / "folder"
        place.folder(name)
        if attack == "folders":
            threads.append(threading.Thread(target=exchange, args=(place, over, name, target)))
        elif number == 0:
            threads.append(
                threading.Thread(target=attack_what_is_made, args=(place, over, target.parent))
            )
    if place.owner:
        for each in place.outside.rglob("*"):
            os.chown(each, place.owner, place.owner)
    place.before = place.outside_now()
    cam = os.open(place.share / "in/cam", os.O_RDONLY)
    with place.watching() as process:
        for thread in threads:
            thread.start()
        try:
            for number in range(24):
                place.pair(f"dropped/{number}", {"box": {"x0": 0}} if number % 3 == 1 else None)
                for ending in (".jpg", ".json"):
                    with suppress(OSError):  # by its handle: we do not follow our own links
                        os.rename(
                            place.share / f"dropped/{number}{ending}",
                            f"{number}{ending}",
                            dst_dir_fd=cam,
                        )
                if number % 4 == 0:
                    place.pair(f"in/big{number}", MOSAIC, ".png", 96)
                process.join(0.12)
        finally:
            over.set()
            for thread in threads:
                thread.join()
            os.close(cam)
    place.check()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_link_of_another_user_in_a_roots_place_ends_the_start(folder: str, place: Site) -> None:
    """Where the share itself may be written to by everybody, and a folder is not made yet."""
    if place.who != "root":
        pytest.skip("only root can make links of other users")
    place.share.chmod(0o777)
    (place.share / folder).rmdir()
    place.plant(folder, "link to a folder")
    place.before = place.outside_now()
    place.once(10)
    place.commands()
    place.check()
    assert "in a folder that others may write to" in place.said("once.log").replace("\n", " ")


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_link_that_takes_a_roots_place_while_the_daemon_works_is_not_followed(
    folder: str, place: Site
) -> None:
    place.share.chmod(0o777)
    target = place.target(folder, "link") / "folder"
    if place.owner:
        for each in place.outside.rglob("*"):
            os.chown(each, place.owner, place.owner)
    place.before = place.outside_now()
    with place.watching() as process:
        place.pair("in/first")
        wait_until(lambda: (place.share / "out/first.mask.png").exists())
        (place.share / folder).rename(place.share / "aside")
        (place.share / folder).symlink_to(target)
        if folder != "in":
            place.pair("in/second")
        process.join(2.5)  # longer than any handle is used
    place.check()


def test_check_waits_for_no_pipe_that_has_just_taken_a_files_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchanged(root: SafePath, **more: Any) -> Iterator[tuple[str, os.DirEntry[str]]]:
        for name, entry in list(walk(root, **more)):
            (root.path / name).unlink()
            os.mkfifo(root.path / name)
            yield name, entry

    names = ["a.jpg", "a.json", "b.xml"]
    for name in names:
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(validate, "walk", exchanged)
    found = {finding.path.name: str(finding.error) for finding in validate.check([tmp_path])}
    assert sorted(found) == names
    assert all("cannot be read" in said for said in found.values())


def test_very_deep_folders_stop_nothing_else(place: Site) -> None:
    """What is nested deeper than a path can be long is passed over, wherever it lies."""
    here = Path.cwd()
    place.before = place.outside_now()
    for folder in (*(f"{name}/deep" for name in FOLDERS), "work/.sam_poll-mosaic"):
        (place.share / folder).mkdir()
        os.chdir(place.share / folder)
        try:
            for _ in range(25):
                os.mkdir("d" * 200)  # noqa: PTH102
                os.chdir("d" * 200)
        finally:
            os.chdir(here)
    with place.watching():
        place.pair("in/good")
        wait_until(lambda: (place.share / "out/good.mask.png").exists())
    place.commands()
    assert "too long" not in place.said("commands.log")
    place.check_outside()
