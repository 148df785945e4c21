"""Prompts and annotation files that are still being written get the patience that pictures have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sam_poll.core.safe_path import SafePath
from sam_poll.share import annotation_reader
from tests.conftest import BOX, Daemon, Share, picture_bytes, wait_until
from tests.support.dropped_annotations import BOXED, xml

TEXT = json.dumps(BOX)
HASTE = {"settle_s": 0.0, "rescan_s": 0.05}


@pytest.mark.parametrize("half", ["", TEXT[:20], "\0" * len(TEXT)])
@pytest.mark.parametrize("mode", ["events", "poll"])
def test_a_prompt_beside_its_picture_is_answered_when_it_is_whole(
    share: Share, half: str, mode: str
) -> None:
    share.drop("dog.jpg", picture_bytes())
    with Daemon(share, **HASTE, patience_s=60.0, mode=mode) as daemon:
        share.drop("dog.json", half)
        scans = daemon.source.scans
        wait_until(lambda: daemon.source.scans > scans + 5)
        assert share.tree("input") == ["dog.jpg", "dog.json"]
        share.drop("dog.json", TEXT)
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)
    assert daemon.pipeline.stats.now().rejected == 0


@pytest.mark.parametrize("half", ["", TEXT[:20]])
def test_a_prompt_alone_waits_to_become_whole_and_then_for_its_picture(
    share: Share, half: str
) -> None:
    with Daemon(share, **HASTE, patience_s=60.0) as daemon:
        share.drop("dog.json", half)
        scans = daemon.source.scans
        wait_until(lambda: daemon.source.scans > scans + 5)
        share.drop("dog.json", json.dumps({**BOX, "image": "cat.jpg"}))
        share.drop("cat.jpg", picture_bytes())
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)
    assert share.tree("failed") == []


@pytest.mark.parametrize("picture", [True, False])
def test_a_prompt_that_stays_cut_off_is_rejected_after_the_patience_with_the_reason(
    share: Share, picture: bool
) -> None:
    if picture:
        share.drop("dog.jpg", picture_bytes())
    with Daemon(share, **HASTE, patience_s=0.3) as daemon:
        share.drop("dog.json", TEXT[:20])
        wait_until(lambda: daemon.pipeline.stats.now().rejected == 1)
    error = share.error("dog")
    assert error["code"] == "prompt"
    assert error["reason"].startswith("not JSON")
    assert share.tree("failed") == ["dog.error.json", *(["dog.jpg"] if picture else []), "dog.json"]


def test_a_prompt_that_is_wrong_in_the_middle_is_rejected_at_once(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.json", '{"box": 1,}')
    with Daemon(share, **HASTE, patience_s=3600.0) as daemon:
        wait_until(lambda: daemon.pipeline.stats.now().rejected == 1)


def test_a_prompt_that_a_writer_has_open_may_be_wrong_anywhere(share: Share) -> None:
    """Tools that write in blocks, the last one first."""
    share.drop("dog.jpg", picture_bytes())
    with Daemon(share, **HASTE, patience_s=60.0) as daemon:
        wait_until(lambda: daemon.source.scans > 0)
        with (share.input / "dog.json").open("w") as file:
            file.write(" " * 5 + TEXT[5:])
            file.flush()
            scans = daemon.source.scans
            wait_until(lambda: daemon.source.scans > scans + 5)
            assert share.tree("failed") == []
            file.seek(0)
            file.write(TEXT[:5])
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)


def test_draining_waits_for_no_rest(share: Share) -> None:
    share.pair("dog", prompt=TEXT[:20])
    share.drop("cat.json", "")
    share.drop("annotations.xml", "<annotations>")
    assert share.run_once().rejected == 3
    assert share.tree("input") == []


# ── annotation files ──


def test_an_annotation_file_is_spread_when_it_is_whole_and_stays_where_it_is_until_then(
    share: Share,
) -> None:
    whole = xml(("dog.jpg", BOXED))
    share.drop("dog.jpg", picture_bytes())
    with Daemon(share, **HASTE, patience_s=60.0, lone_s=0.0) as daemon:
        with (share.input / "annotations.xml").open("w") as file:
            for part in (whole[:40], whole[40:-20]):
                file.write(part)
                file.flush()
                scans = daemon.source.scans
                wait_until(lambda scans=scans: daemon.source.scans > scans + 5)
                assert share.tree("input") == ["annotations.xml", "dog.jpg"]
            file.write(whole[-20:])
        wait_until(lambda: daemon.pipeline.stats.now().answered == 1)
    assert share.tree("failed") == []


def test_an_annotation_file_that_stays_cut_off_is_rejected_after_the_patience_with_the_reason(
    share: Share,
) -> None:
    with Daemon(share, **HASTE, patience_s=0.3) as daemon:
        share.drop("annotations.xml", xml(("dog.jpg", BOXED))[:-20])
        wait_until(lambda: daemon.pipeline.stats.now().rejected == 1)
    assert "not well-formed" in share.error("annotations")["reason"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_whole_annotation_file_is_parsed_once(
    tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.xml"
    path.write_bytes((xml(("dog.jpg", BOXED)) + "\n").encode(encoding))
    monkeypatch.setattr(annotation_reader.cvat_xml, "read", lambda data: pytest.fail("parsed"))
    annotation_reader.check_complete(SafePath.beside(path))
