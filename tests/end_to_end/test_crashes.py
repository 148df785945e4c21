"""A daemon that dies, or sleeps too long, at any one of its steps on the share: nothing is lost,
nothing done twice.

Every call that changes the share is counted. For each of them one daemon is ended (or put to sleep
while another one works) just before it; afterwards the share must look as if nothing had happened.
"""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from sam_poll.share import source as folder
from sam_poll.share.claims.liveness import LivenessTracker
from tests.conftest import BOX, Share, picture_bytes
from tests.support.crashes import (
    PARTS,
    PROCESSES,
    OthersLookDead,
    before_step,
    parts,
    picture_of,
)
from tests.support.dropped_annotations import BOXED, xml
from tests.support.rough_masks import mask_bytes


def fill(share: Share) -> None:
    """Every ending: answered, with several prompts, refused, refused beside an answer, for a
    picture in done/; and with mask files that go along.
    """
    share.pair("lone", seed=1)
    share.run_once(rescan_s=0.2)
    share.drop("lone.again.json", {"mask": "lone.rough.png"})
    share.drop("lone.rough.png", mask_bytes(2, 20))
    share.pair("cam1/dog", seed=2, prompt={"mask": "dog.rough.png"})
    share.drop("cam1/dog.rough.png", mask_bytes())
    share.drop("cam1/dog.left.json", {"objects": [BOX, {"mask": "dog.rough.png"}]})
    share.pair("mixed", seed=3)
    share.drop("mixed.bad.json", "{")
    share.pair("bad", prompt="{")
    share.drop("broken.jpg", b"no picture at all")
    share.drop("broken.json", {"mask": "broken.rough.png"})
    share.drop("broken.rough.png", mask_bytes())
    share.drop("broken.too.json", BOX)
    for number, name in enumerate(("x", "y")):
        share.drop(f"cam2/{name}.jpg", picture_bytes(seed=4 + number))
    share.drop("cam2/drawn.xml", xml(("x.jpg", BOXED), ("y.jpg", BOXED)))
    share.drop("odd.xml", xml(("z.jpg", "")))


def die_before(number: int, root: Path) -> None:
    """A daemon, in a process of its own, that is gone before this step."""
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123
    with before_step(number, lambda: os._exit(9)):
        Share(root).run_once(rescan_s=0.2)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], int]:
    """An undisturbed share's picture, and how many steps it took."""
    share = Share(tmp_path_factory.mktemp("undisturbed") / "share")
    fill(share)
    with before_step(-1, lambda: None) as count:
        share.run_once(rescan_s=0.2)
    return picture_of(share), count[0]


def test_the_undisturbed_share_shows_every_kind_of_ending(
    expected: tuple[dict[str, object], int],
) -> None:
    seen, steps = expected
    assert seen["input"] == seen["work"] == seen["claims"] == []
    assert seen["failed"] == [
        *(
            "bad.error.json",
            "bad.jpg",
            "bad.json",
            "broken.error.json",
            "broken.jpg",
            "broken.json",
            "broken.rough.png",
        ),
        *("broken.too.error.json", "broken.too.json", "mixed.bad.error.json", "mixed.bad.json"),
        *("odd.error.json", "odd.xml"),
    ]
    assert seen["done"] == [
        *("cam1/dog.jpg", "cam1/dog.json", "cam1/dog.left.json", "cam1/dog.rough.png"),
        *("cam2/drawn.xml", "cam2/x.drawn.json", "cam2/x.jpg", "cam2/y.drawn.json", "cam2/y.jpg"),
        *("lone.again.json", "lone.jpg", "lone.json", "lone.rough.png"),
        *("mixed.jpg", "mixed.json"),
    ]
    assert steps > 60


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_a_daemon_may_die_before_any_step(
    part: int, expected: tuple[dict[str, object], int], tmp_path: Path
) -> None:
    seen, steps = expected
    died = 0
    for number in range(part, steps + 8, 8):
        share = Share(tmp_path / f"{number}" / "share")
        fill(share)
        child = PROCESSES.Process(target=die_before, args=(number, share.root))
        child.start()
        child.join(60)
        died += child.exitcode == 9
        share.run_once(rescan_s=0.2)
        assert picture_of(share) == seen, f"after dying before step {number}"
    assert died


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_a_daemon_may_sleep_before_any_step_while_another_one_does_its_work(
    part: int,
    expected: tuple[dict[str, object], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, steps = expected
    slept = 0

    def others_work() -> None:
        """Another daemon, to which everybody else looks dead."""
        nonlocal slept
        slept += 1
        with monkeypatch.context() as patch:
            patch.setattr(folder, "LivenessTracker", OthersLookDead)
            share.run_once(attempts=1000, rescan_s=0.2)

    for number in range(part, steps, 8):
        share = Share(tmp_path / f"{number}" / "share")
        fill(share)
        with before_step(number, others_work):
            share.run_once(attempts=1000, rescan_s=0.2)
        share.run_once(rescan_s=0.2)
        assert picture_of(share) == seen, f"after sleeping before step {number}"
    assert slept


@pytest.mark.slow
@pytest.mark.parametrize("part", parts(5))
def test_a_daemon_may_be_taken_for_dead_at_any_step_and_go_on(
    part: int,
    expected: tuple[dict[str, object], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both work at the same time, and change places as often as threads can."""
    seen, steps = expected
    heirs: set[threading.Thread] = set()
    work: list[Future[None]] = []

    class OthersLookDeadToHeirs(LivenessTracker):
        def dead(self, worker: str, now: float) -> bool:
            return super().dead(worker, now) or threading.current_thread() in heirs

    def inherit() -> None:
        heirs.add(threading.current_thread())
        share.run_once(attempts=1000, rescan_s=0.2)

    monkeypatch.setattr(folder, "LivenessTracker", OthersLookDeadToHeirs)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for number in range(part, steps, PARTS):
            share = Share(tmp_path / f"{number}" / "share")
            fill(share)
            with ThreadPoolExecutor() as pool:
                with before_step(number, lambda: work.append(pool.submit(inherit))):
                    share.run_once(attempts=1000, rescan_s=0.2)
                for each in work:
                    each.result()
            share.run_once(rescan_s=0.2)
            assert picture_of(share) == seen, f"after another one began before step {number}"
    finally:
        sys.setswitchinterval(interval)
    assert heirs
