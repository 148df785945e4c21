"""The job source of a share: dropped files are answered, rejected or wait, each in one place."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from pathlib import Path

import cv2
import pytest

from sam_poll.core.errors import DeviceError, ExitCode, ShareError
from sam_poll.core.files import AtomicFiles
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import OutputFile
from sam_poll.engines.fake import FakeEngine
from sam_poll.imaging.decode import decode
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.intake.scanner import Scanner
from sam_poll.share.intake.stability import FileEvent
from sam_poll.share.layout import Layout
from sam_poll.share.mount_check import check_folders
from sam_poll.share.source import FolderSource
from tests.conftest import BOX, Daemon, Share, make_pipeline, picture_bytes, wait_until


def test_a_pair_is_answered_and_its_inputs_move_to_done(share: Share) -> None:
    share.pair("cam1/dog")
    done = share.run_once()
    assert (done.answered, done.rejected) == (1, 0)
    assert share.tree("output") == ["cam1/dog.mask.png"]
    assert share.tree("done") == ["cam1/dog.jpg", "cam1/dog.json"]
    assert share.tree("input") == share.tree("work") == share.tree("failed") == []
    assert set(cv2.imread(str(share.output / "cam1/dog.mask.png"), 0).flat) == {0, 255}


def test_inputs_are_moved_unchanged(share: Share) -> None:
    share.pair("dog")
    before = {n: (share.input / n).read_bytes() for n in share.tree("input")}
    share.run_once()
    assert {n: (share.done / n).read_bytes() for n in share.tree("done")} == before


@pytest.mark.parametrize("name", ["B.JPG", "b.PnG", "b.TIFF", "b.webp", "b.bmp", "b.jpeg"])
def test_endings_count_in_any_case(share: Share, name: str) -> None:
    share.drop(name, picture_bytes(os.path.splitext(name)[1].lower()))
    share.drop(os.path.splitext(name)[0] + ".json", BOX)
    assert share.run_once().answered == 1
    assert name in share.tree("done")


def test_a_lone_picture_and_a_lone_prompt_wait(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("cat.json", BOX)
    assert share.run_once().answered == 0
    assert share.tree("input") == ["cat.json", "dog.jpg"]


def test_a_broken_prompt_goes_to_failed_with_its_picture_and_a_reason(share: Share) -> None:
    share.pair("dog", prompt='{"box": {"x0": 1, "y0": 1, "x1": "five", "y1": 9}}')
    share.pair("cat")
    done = share.run_once()
    assert (done.answered, done.rejected) == (1, 1)
    assert share.tree("failed") == ["dog.error.json", "dog.jpg", "dog.json"]
    error = share.error("dog")
    assert error["place"] == "box.x1"
    assert error["reason"]
    assert error["code"] == "prompt"
    assert error["files"] == ["dog.jpg", "dog.json"]
    assert error["versions"]["sam_poll"]
    assert error["time"]


def test_a_broken_picture_goes_to_failed_with_its_prompt_and_a_reason(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes()[:200])
    share.drop("dog.json", BOX)
    assert share.run_once().rejected == 1
    assert share.tree("failed") == ["dog.error.json", "dog.jpg", "dog.json"]
    assert share.error("dog")["code"] == "picture"
    assert share.error("dog")["place"] == "dog.jpg"


@pytest.mark.parametrize(
    ("claim", "good"),
    [
        ({"image_bytes": len(picture_bytes())}, True),
        ({"image_bytes": 5}, False),
        ({"image_sha256": hashlib.sha256(picture_bytes()).hexdigest()}, True),
        ({"image_sha256": "0" * 64}, False),
    ],
)
def test_a_prompt_that_names_its_pictures_bytes_is_answered_for_those_bytes_only(
    share: Share, claim: dict[str, object], good: bool
) -> None:
    share.pair("dog", prompt={**BOX, **claim})
    assert share.run_once().answered == good
    if not good:
        assert next(iter(claim)) in share.error("dog")["reason"]


def test_an_unreadable_prompt_without_picture_is_rejected_alone(share: Share) -> None:
    share.drop("dog.json", "{")
    assert share.run_once().rejected == 1
    assert share.tree("failed") == ["dog.error.json", "dog.json"]


def test_everything_is_answered_with_a_mask_for_each_object(share: Share) -> None:
    share.pair("dog", prompt={"everything": {"points_per_side": 4, "min_area": 0}})
    assert share.run_once().objects == 4  # the fake engine finds one in each quarter
    assert share.tree("done") == ["dog.jpg", "dog.json"]


def test_several_prompts_of_one_picture_share_one_embedding(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    for name in ("dog.json", "dog.left.json", "dog.jpg.right.json", "other.json"):
        share.drop(name, {**BOX, "image": "dog.jpg"})
    engine = FakeEngine()
    assert share.run_once(engine).answered == 4
    assert engine.calls["encode"] == 1
    assert share.tree("done") == [
        "dog.jpg",
        "dog.jpg.right.json",
        "dog.json",
        "dog.left.json",
        "other.json",
    ]
    assert share.tree("output") == [
        f"{n}.mask.png" for n in ("dog.jpg.right", "dog.left", "dog", "other")
    ]
    assert share.tree("work") == []


def test_one_bad_prompt_among_several_does_not_take_the_picture_away(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.json", BOX)
    share.drop("dog.bad.json", {"box": 1})
    done = share.run_once()
    assert (done.answered, done.rejected) == (1, 1)
    assert share.tree("done") == ["dog.jpg", "dog.json"]
    assert share.tree("failed") == ["dog.bad.error.json", "dog.bad.json"]


def test_two_pictures_of_one_stem_are_both_answered_under_their_own_names(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.png", picture_bytes(".png"))
    share.drop("dog.json", {**BOX, "image": "dog.png"})
    share.drop("dog.jpg.json", BOX)
    assert share.run_once().answered == 2
    assert share.tree("output") == ["dog.jpg.mask.png", "dog.png.mask.png"]


def test_two_pictures_of_one_stem_one_after_the_other_do_not_overwrite_each_other(
    share: Share,
) -> None:
    share.pair("dog", ".jpg")
    share.run_once()
    share.pair("dog", ".png")
    share.run_once()
    assert share.tree("output") == ["dog.mask.png", "dog.png.mask.png"]


def test_a_prompt_that_fits_two_pictures_is_rejected_and_the_pictures_stay(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.png", picture_bytes(".png"))
    share.drop("dog.json", BOX)
    assert share.run_once().rejected == 1
    assert share.tree("input") == ["dog.jpg", "dog.png"]
    assert '"image": "dog.jpg"' in share.error("dog")["remedy"]


def test_a_json_and_a_prompt_file_of_one_stem_are_two_jobs(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.json", BOX)
    share.drop("dog.prompt", BOX)
    assert share.run_once().answered == 2
    assert share.tree("output") == ["dog.mask.png", "dog.prompt.mask.png"]


def test_a_picture_whose_inputs_are_deleted_stays_until_its_last_prompt_is_answered(
    share: Share,
) -> None:
    share.layout = Layout(**share.layout.folders, delete_input=True)
    share.drop("dog.jpg", picture_bytes())
    for n in range(3):
        share.drop(f"dog.{n}.json", BOX)
    with FolderSource(share.layout, FolderOptions(settle_s=0.0, once=True, mode="poll")) as source:
        for job in source.jobs(threading.Event()):  # each is answered before the next is requested
            assert job.picture.read_bytes() == picture_bytes()
            source.deliver(job, [OutputFile(".txt", "text/plain", b"")])
    assert share.tree("output") == [f"dog.{n}.txt" for n in range(3)]
    assert share.tree("input") == share.tree("work") == share.tree("done") == []


def test_prompts_claimed_with_their_picture_go_back_with_it_on_stop(share: Share) -> None:
    gate = threading.Event()
    share.drop("dog.jpg", picture_bytes())
    for n in range(60):
        share.drop(f"dog.{n}.json", BOX)
    with Daemon(share, FakeEngine(batch=1, gate=gate), settle_s=0.0, rescan_s=0.05) as daemon:
        wait_until(lambda: len(share.tree("work")) > 30)
        daemon.stop.set()
        gate.set()
    assert share.tree("work") == share.tree("failed") == []
    prompts = [
        name
        for folder in ("input", "done")
        for name in share.tree(folder)
        if name.endswith(".json")
    ]
    assert len(prompts) == 60


def test_a_later_prompt_means_the_newest_picture_of_its_name_in_done(share: Share) -> None:
    for seed in (1, 2, 3):
        share.pair("dog", seed=seed)
        share.run_once()
    share.drop("dog.right.json", BOX)
    engine = FakeEngine()
    assert share.run_once(engine).answered == 1
    assert "dog.right~3.mask.png" in share.tree("output")
    assert (share.done / "dog~3.jpg").read_bytes() == picture_bytes(seed=3)
    assert engine.encoded == [decode(picture_bytes(seed=3)).digest]


def test_a_new_picture_of_an_old_name_gets_a_new_name_everywhere(share: Share) -> None:
    share.pair("dog", seed=1)
    share.run_once()
    first = (share.output / "dog.mask.png").read_bytes()
    share.pair("dog", seed=2, prompt={"box": {"x0": 1, "y0": 1, "x1": 20, "y1": 20}})
    share.run_once()
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog~2.jpg", "dog~2.json"]
    assert share.tree("output") == ["dog.mask.png", "dog~2.mask.png"]
    assert (share.output / "dog.mask.png").read_bytes() == first


def test_a_prompt_dropped_later_finds_its_picture_in_done_and_renews_the_answer(
    share: Share,
) -> None:
    share.pair("dog")
    share.run_once()
    share.drop("dog.json", {"box": {"x0": 1, "y0": 1, "x1": 20, "y1": 20}})
    assert share.run_once().answered == 1
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog~2.json"]
    assert share.tree("output") == ["dog.mask.png"]


def test_a_prompt_for_an_answered_picture_waits_first_for_a_new_picture(share: Share) -> None:
    share.pair("dog", seed=1)
    share.run_once()
    with Daemon(share, settle_s=0.0, rescan_s=0.05) as daemon:
        share.drop("dog.json", BOX)
        wait_until(lambda: daemon.source.waiting == 1)
        share.move_in("dog.jpg", picture_bytes(seed=2))
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)
    assert "dog~2.jpg" in share.tree("done")


def test_temporary_names_are_left_alone(share: Share) -> None:
    for name in ("dog.jpg.part", ".dog.json", "~$cat.json", "cat.json.crdownload"):
        share.drop(name, b"x")
    assert share.run_once().answered == 0
    assert len(share.tree("input")) == 4


def test_links_and_pipes_are_not_jobs(share: Share, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(picture_bytes())
    (share.input / "dog.jpg").symlink_to(secret)
    share.drop("dog.json", BOX)
    os.mkfifo(share.input / "pipe.jpg")
    share.drop("pipe.json", BOX)
    assert share.run_once().answered == 0
    assert secret.exists()


def test_missing_prompt_reject_rejects_a_picture_without_prompt(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    assert share.run_once(missing_prompt="reject").rejected == 1
    assert share.tree("failed") == ["dog.error.json", "dog.jpg"]
    assert "no prompt" in share.error("dog")["reason"]


def test_missing_prompt_everything_segments_a_picture_without_prompt(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    assert share.run_once(missing_prompt="everything").answered == 1
    assert share.tree("done") == ["dog.jpg"]
    assert share.tree("output") == ["dog.mask.png"]


def test_pair_timeout_rejects_a_lone_picture_and_a_lone_prompt(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("cat.json", BOX)
    with Daemon(share, settle_s=0.0, rescan_s=0.05, pair_timeout_s=0.3) as daemon:
        wait_until(lambda: daemon.pipeline.stats.now().rejected == 2)
    assert "within 0.3 s" in share.error("dog")["reason"]
    assert "within 0.3 s" in share.error("cat")["reason"]


@pytest.mark.parametrize("order", [("dog.jpg", "dog.json"), ("dog.json", "dog.jpg")])
def test_the_order_of_arrival_does_not_matter(share: Share, order: tuple[str, str]) -> None:
    bodies = {"dog.jpg": picture_bytes(), "dog.json": BOX}
    with Daemon(share, rescan_s=0.05, settle_s=0.2) as daemon:
        share.drop(order[0], bodies[order[0]])
        wait_until(lambda: daemon.source.waiting == 1)
        share.drop(order[1], bodies[order[1]])
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)


def test_a_pair_renamed_into_place_is_claimed_long_before_the_next_scan(share: Share) -> None:
    # Longer than the test waits: only the event of the rename is quicker.
    with Daemon(share, rescan_s=600.0, settle_s=600.0) as daemon:
        wait_until(lambda: daemon.source.scans > 0)
        share.move_in("dog.jpg", picture_bytes())
        share.move_in("dog.json", BOX)
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)


def test_a_file_that_arrives_while_the_folder_is_listed_keeps_its_event(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    scanner = Scanner(share.layout, FolderOptions(mode="poll"), threading.Event(), lambda: clock[0])
    listing = scanner._names.refresh

    def and_then_it_comes() -> bool:
        changed = listing()
        for path in (share.move_in("dog.jpg", picture_bytes()), share.move_in("dog.json", BOX)):
            assert scanner._files.note_event(str(path), FileEvent.RENAMED, clock[0])
        return changed

    with monkeypatch.context() as patch:
        patch.setattr(scanner._names, "refresh", and_then_it_comes)
        assert scanner.scan(clock[0], []) == []
    clock[0] = 100.1
    assert [ready.prompt for ready in scanner.scan(clock[0], [])] == ["dog.json"]


def test_subfolders_made_later_are_watched_too(share: Share) -> None:
    with Daemon(share, rescan_s=60.0, settle_s=0.2) as daemon:
        wait_until(lambda: daemon.source.scans > 0)
        share.pair("new/deep/dog")
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)
        share.pair("new/deep/cat")
        wait_until(lambda: daemon.pipeline.stats.now().answered == 2)


def test_a_subfolder_that_is_empty_when_it_is_first_seen_is_watched_too(share: Share) -> None:
    with Daemon(share, rescan_s=60.0, settle_s=0.2) as daemon:
        wait_until(lambda: daemon.source.scans > 0)
        (share.input / "new" / "deep").mkdir(parents=True)
        scans = daemon.source.scans
        wait_until(lambda: daemon.source.scans > scans)
        share.pair("new/deep/dog")
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)


def test_without_events_the_rescan_finds_everything(share: Share) -> None:
    with Daemon(share, mode="poll", rescan_s=0.05, settle_s=0.1) as daemon:
        wait_until(lambda: daemon.source.scans > 0)
        share.pair("dog")
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)


def test_a_file_that_grows_is_not_taken_before_it_is_quiet(share: Share) -> None:
    body = picture_bytes()
    share.drop("dog.json", BOX)
    path = share.drop("dog.jpg", body[:100])
    with Daemon(share, mode="poll", rescan_s=0.02, settle_s=0.5) as daemon:
        with path.open("ab") as file:
            for at in range(100, len(body), max(1, len(body) // 20)):
                scans = daemon.source.scans
                wait_until(lambda scans=scans: daemon.source.scans > scans)
                file.write(body[at : at + max(1, len(body) // 20)])
                file.flush()
        assert daemon.pipeline.stats.now().rejected == 0
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)


def test_the_folder_may_vanish_and_come_back(share: Share, logged: list[str]) -> None:
    with Daemon(share, settle_s=0.2, rescan_s=0.05) as daemon:
        wait_until(lambda: daemon.source.scans > 0)
        share.input.rename(share.root / "gone")
        wait_until(lambda: any("cannot be used" in line for line in logged))
        (share.root / "gone").rename(share.input)
        share.pair("dog")
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)


def test_a_full_disk_while_delivering_lets_the_job_wait(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    really = AtomicFiles.write

    def full(self: AtomicFiles, path: Path, body: bytes) -> None:
        calls.append(path)
        if len(calls) < 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        really(self, path, body)

    monkeypatch.setattr(AtomicFiles, "write", full)
    share.pair("dog")
    done = share.run_once()
    assert (done.answered, done.rejected) == (1, 0)
    assert len(calls) == 3
    assert share.tree("output") == ["dog.mask.png"]


def test_inputs_that_vanish_from_a_claim_do_not_block_the_daemon(
    share: Share, logged: list[str]
) -> None:
    gate = threading.Event()
    engine = FakeEngine(batch=1, gate=gate)
    share.pair("dog")
    with Daemon(share, engine, settle_s=0.0, rescan_s=0.05) as daemon:
        wait_until(lambda: engine.calls["encode"])
        for path in share.at_work().values():
            path.unlink()
        gate.set()
        share.move_in("cat.jpg", picture_bytes())
        share.move_in("cat.json", BOX)
        wait_until(lambda: share.tree("done") == ["cat.jpg", "cat.json"])
    assert any("vanished" in line for line in logged)
    assert daemon.pipeline.stats.now().at_work == 0


def test_a_name_too_long_for_its_outputs_is_rejected(share: Share) -> None:
    share.pair("x" * 245)
    assert share.run_once().rejected == 1
    assert any(name.endswith(".error.json") for name in share.tree("failed"))


def test_a_dead_device_leaves_its_job_claimed_and_puts_the_others_back(share: Share) -> None:
    for n in range(5):
        share.pair(f"dog{n}")
    engine = FakeEngine(batch=1)
    engine.fail("encode", DeviceError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(DeviceError) as raised:
        share.run_once(engine)
    assert raised.value.exit_code is ExitCode.DEVICE
    assert len(share.tree("input")) == 8
    assert len(share.at_work()) == 2
    assert share.tree("failed") == []
    assert share.run_once().answered == 5


def test_an_unexpected_error_in_one_job_rejects_that_job_only(share: Share) -> None:
    for n in range(3):
        share.pair(f"dog{n}", seed=n)
    engine = FakeEngine(batch=1)
    engine.fail("decode", ValueError("odd"), at=2)
    done = share.run_once(engine)
    assert (done.answered, done.rejected) == (2, 1)
    (failed,) = [n for n in share.tree("failed") if n.endswith(".error.json")]
    assert "ValueError" in (share.failed / failed).read_text()


def test_stop_finishes_what_runs_and_puts_back_the_rest(share: Share) -> None:
    gate = threading.Event()
    for n in range(30):
        share.pair(f"dog{n:02}", seed=n)
    with Daemon(share, FakeEngine(batch=1, gate=gate), settle_s=0.0) as daemon:
        wait_until(lambda: daemon.pipeline.stats.now().at_work > 3)
        daemon.stop.set()
        gate.set()
    done = daemon.pipeline.stats.now()
    assert done.at_work == 0
    assert share.tree("work") == []
    assert len(share.tree("input")) + len(share.tree("done")) == 60


def test_jobs_that_do_not_finish_in_time_go_back(share: Share) -> None:
    gate = threading.Event()
    share.pair("dog")
    share.pair("cat")
    pipeline = make_pipeline(FakeEngine(batch=1, gate=gate), drain_s=0.05)
    stop = threading.Event()
    with FolderSource(share.layout, FolderOptions(settle_s=0.0)) as source:
        thread = threading.Thread(target=pipeline.run, args=(source, stop))
        thread.start()
        wait_until(lambda: pipeline.stats.now().at_work == 2)
        stop.set()
        gate.set()
        thread.join(30)
    assert share.tree("work") == []


def test_a_missing_share_is_named(tmp_path: Path) -> None:
    layout = Layout.below(tmp_path / "mnt")
    with pytest.raises(ShareError, match="mkdir -p"):
        check_folders(layout)


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs a second file system")
def test_folders_on_different_file_systems_are_an_error_with_a_remedy(share: Share) -> None:
    other = Path("/dev/shm") / f"sam_poll-test-{os.getpid()}"
    other.mkdir()
    try:
        if other.stat().st_dev == share.root.stat().st_dev:
            pytest.skip("the temporary folder is on the same file system")
        layout = Layout(**{**share.layout.folders, "done": SafePath.at(other)})
        with pytest.raises(ShareError, match="different file systems"):
            check_folders(layout)
        assert list(other.iterdir()) == []
        assert share.tree("input") == share.tree("output") == []
    finally:
        other.rmdir()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named_with_user_and_group(share: Share) -> None:
    share.input.chmod(0o500)
    with pytest.raises(ShareError, match="user"):
        check_folders(share.layout)


def test_names_with_unusual_characters_are_kept(share: Share, logged: list[str]) -> None:
    names = ["a b", "új", "line\nbreak", "שלום", "🐶", "%s{x}", "-rf", os.fsdecode(b"latin\xe9")]
    for name in names:
        share.pair(name)
    done = share.run_once()
    assert (done.answered, done.rejected) == (len(names), 0)
    assert not any("line\nbreak" in line for line in logged)


def test_delete_input_leaves_nothing_behind(share: Share) -> None:
    share.layout = Layout(**share.layout.folders, delete_input=True, suffixes={".mask.png": ".png"})
    share.pair("dog")
    share.run_once()
    assert share.tree("done") == []
    assert share.tree("output") == ["dog.png"]
