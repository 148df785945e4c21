"""Claims: one owner at a time, taken over by rename, ended once; whoever has lost one changes nothing any more."""

from __future__ import annotations

import errno
import os
import string
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_poll.doors.claims import Claim, Claims, Found, Hold, listing, outer_name
from sam_poll.doors.proof import prove
from sam_poll.errors import LostError
from sam_poll.fs import Whole
from tests.conftest import Share

WORKERS = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=100)
NUMBERS = st.integers(0, 10**9 - 1)
PLACES = st.sampled_from(["done", "failed", "input"])
SUFFIXES = st.one_of(st.just(""), st.integers(2, 10**9 - 1).map("~{}".format))


def claims_of(share: Share, worker: str = "me-1", still_there: Callable[[], object] = lambda: None) -> Claims:
    """One daemon's claims; its folders are there."""
    if not share.work.exists():
        prove(share.layout)
    return Claims(share.layout, worker, still_there)


def taken(share: Share, worker: str = "me-1", name: str = "dog") -> Claim:
    """A pair in a claim."""
    share.pair(name)
    claim = claims_of(share, worker).take(f"{name}.jpg", f"{name}.jpg", [f"{name}.json"])
    assert claim
    return claim


def found(share: Share) -> Found:
    """The one claim that there is."""
    (one,) = listing(share.layout.work)[0]
    return one


def trees(share: Share) -> dict[str, Any]:
    """Everything on the share: paths, and the files' bytes."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(share.root.rglob("*"))}


# ── names ──


@given(NUMBERS, WORKERS, NUMBERS, NUMBERS)
def test_a_holds_name_says_whose_it_is_and_how_often_it_was_tried(
    generation: int, worker: str, attempt: int, prompts: int
) -> None:
    hold = Hold(generation, worker, attempt, prompts)
    assert Hold.parse(str(hold)) == hold


@given(NUMBERS, WORKERS, PLACES, SUFFIXES)
def test_the_name_of_a_hold_that_is_over_says_where_its_files_belong(
    generation: int, worker: str, place: str, suffix: str
) -> None:
    hold = Hold(generation, worker, attempt=0, place=place, suffix=suffix)
    assert Hold.parse(str(hold)) == hold


@given(st.text(max_size=60))
def test_what_is_not_a_holds_name_is_none_of_ours(text: str) -> None:
    hold = Hold.parse(text)
    assert hold is None or str(hold) == text


@pytest.mark.parametrize(
    "name",
    [
        *("g1.a1.n1", "g1.a1.n1@", "g1.a1@me", "g.a1.n1@me", "g1.a1.n1@me/x", "g1.a1.n1@me.tmp", "g1.a1.n1@me\n"),
        *("g1.work@me", "g1.done~@me", "g1.done~x@me", "g-1.a1.n1@me", "g1.a1.n1@" + "m" * 101, "g1.a٣.n1@me", ""),
    ],
)
def test_names_that_only_look_like_a_holds_are_foreign(name: str) -> None:
    assert Hold.parse(name) is None


@pytest.mark.parametrize(
    "name", ["x" * 255, "ü" * 127 + "x", "🐶" * 63, os.fsdecode(b"\xe9" * 255), "a\nb" * 80], ids=ascii
)
def test_the_longest_names_fit_into_a_claims(name: str) -> None:
    assert len(os.fsencode(outer_name(name))) <= 255
    assert outer_name(name) != outer_name(name[:-1] + "y")


@pytest.mark.parametrize("name", ["ü" * 127, "🐶" * 63, "x" + "🐶" * 63], ids=ascii)
def test_a_long_name_is_not_cut_in_the_middle_of_a_character(name: str) -> None:
    outer_name(name).encode()  # shares that know only whole characters refuse anything else


@pytest.mark.parametrize(
    "name", ["x" * 251, "🐶" * 62, "line\nbreak", os.fsdecode(b"latin\xe9"), "%s{x}", "-rf", "g1"], ids=ascii
)
def test_long_and_odd_names_are_claimed_and_come_back_as_they_were(share: Share, name: str) -> None:
    claims = claims_of(share)
    share.drop(f"{name}.jpg", b"picture")
    claim = claims.take(f"{name}.jpg", f"{name}.jpg", [])
    assert claim
    assert claim.path.names() == [f"{name}.jpg"]
    claims.close(claim, "input", "")
    assert (share.input / f"{name}.jpg").read_bytes() == b"picture"
    assert listing(share.layout.work)[:3] == ([], [], [])


# ── taking ──


def test_of_two_daemons_that_take_one_pair_one_gets_it_and_the_other_leaves_nothing(share: Share) -> None:
    share.pair("cam1/dog")
    one, two = claims_of(share, "one"), claims_of(share, "two")
    first = one.take("cam1/dog.jpg", "cam1/dog.jpg", ["cam1/dog.json"])
    assert first
    before = trees(share)
    assert two.take("cam1/dog.jpg", "cam1/dog.jpg", ["cam1/dog.json"]) is None
    assert trees(share) == before
    assert sorted(first.path.names()) == ["dog.jpg", "dog.json"]
    assert first.hold == Hold(1, "one", attempt=1, prompts=1)


@pytest.mark.parametrize("picture", ["dog.jpg", None])
def test_a_pair_that_has_just_gone_leaves_nothing_behind(share: Share, picture: str | None) -> None:
    claims = claims_of(share)
    assert claims.take("dog.jpg", picture, ["dog.json"]) is None
    assert listing(share.layout.work)[:3] == ([], [], [])


def test_a_picture_whose_prompts_have_just_gone_goes_back(share: Share) -> None:
    claims = claims_of(share)
    share.drop("dog.jpg", b"picture")
    assert claims.take("dog.jpg", "dog.jpg", ["dog.json"]) is None
    assert share.tree("input") == ["dog.jpg"]
    assert listing(share.layout.work)[:3] == ([], [], [])


def test_what_was_taken_goes_back_when_the_share_falls_sick_meanwhile(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = claims_of(share)
    share.pair("dog")
    really = Claims.add

    def sick(self: Claims, claim: Claim, prompt: str) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Claims, "add", sick)
    with pytest.raises(OSError, match="Input/output"):
        claims.take("dog.jpg", "dog.jpg", ["dog.json"])
    monkeypatch.setattr(Claims, "add", really)
    assert share.tree("input") == ["dog.jpg", "dog.json"]
    assert listing(share.layout.work)[:3] == ([], [], [])


def test_daemons_that_race_for_pairs_get_each_of_them_once(share: Share) -> None:
    names = [f"cam{n % 3}/dog{n:03}" for n in range(200)]
    for name in names:
        share.drop(f"{name}.jpg", b"picture")
        share.drop(f"{name}.json", b"{}")
    got: dict[str, list[str]] = {}
    start = threading.Barrier(5)

    def race(worker: str) -> None:
        claims = claims_of(share, worker)
        order = sorted(names, key=lambda name: hash((name, worker)))
        start.wait()
        got[worker] = [n for n in order if claims.take(f"{n}.jpg", f"{n}.jpg", [f"{n}.json"])]

    threads = [threading.Thread(target=race, args=(f"w{n}",)) for n in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(n for won in got.values() for n in won) == sorted(names)
    assert share.tree("input") == []
    assert len(share.at_work()) == 400
    assert sum(len(won) > 0 for won in got.values()) > 1


def test_daemons_that_race_for_abandoned_claims_take_each_over_once(share: Share) -> None:
    for n in range(100):
        taken(share, "dead", f"dog{n:03}")
    claims = listing(share.layout.work).claims
    got: list[str] = []
    start = threading.Barrier(4)

    def race(worker: str) -> None:
        mine = claims_of(share, worker)
        start.wait()
        got.extend(claim.picture or "" for f in claims if (claim := mine.take_over(f)))

    threads = [threading.Thread(target=race, args=(f"w{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [f"dog{n:03}.jpg" for n in range(100)]
    assert all(f.hold and f.hold.generation == 2 for f in listing(share.layout.work)[0])


# ── taking over ──


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_what_others_have_put_in_a_reports_place_does_not_keep_a_claim_from_being_taken_over(
    share: Share, tmp_path: Path, kind: str
) -> None:
    report = taken(share, "dead-1").path.path / ".report"
    outside = tmp_path / "outside.json"
    outside.write_text('{"files": ["dog.json"]}')
    if kind == "pipe":
        os.mkfifo(report)
    elif kind == "link":
        report.symlink_to(outside)
    else:
        (report / "below").mkdir(parents=True)
    claim = claims_of(share, "heir").take_over(found(share))
    assert claim
    assert ".report" not in claim.path.names()
    assert outside.exists()


def test_a_claim_taken_over_counts_its_generation_and_its_attempt(share: Share) -> None:
    taken(share, "dead")
    claim = claims_of(share, "heir").take_over(found(share))
    assert claim
    assert claim.hold == Hold(2, "heir", attempt=2, prompts=1)
    assert (claim.picture, claim.prompts) == ("dog.jpg", {"dog.json"})
    assert str(found(share).hold) == "g2.a2.n1@heir"


def test_attempts_begin_anew_where_prompts_were_put_away(share: Share) -> None:
    share.pair("dog")
    share.drop("dog.left.json", b"{}")
    dead = claims_of(share, "dead")
    claim = dead.take("dog.jpg", "dog.jpg", ["dog.json", "dog.left.json"])
    assert claim
    for generation in (2, 3):
        claim = claims_of(share, f"w{generation}").take_over(found(share))
        assert claim
        assert claim.hold.attempt == generation
    dead.part(claim, "dog.json", "done", "")
    after = claims_of(share, "heir").take_over(found(share))
    assert after
    assert (after.hold.attempt, after.hold.prompts, after.prompts) == (1, 1, {"dog.left.json"})
    last = claims_of(share, "last").take_over(found(share))
    assert last
    assert last.hold.attempt == 2


def test_attempts_at_a_picture_that_came_without_prompts_are_counted(share: Share) -> None:
    share.drop("dog.jpg", b"picture")
    assert claims_of(share, "dead").take("dog.jpg", "dog.jpg", [])
    for attempt in (2, 3, 4):
        claim = claims_of(share, f"w{attempt}").take_over(found(share))
        assert claim
        assert (claim.hold.attempt, claim.hold.prompts) == (attempt, 0)


def test_a_picture_whose_prompts_are_all_put_away_does_not_become_one_that_came_without(share: Share) -> None:
    claim = taken(share, "dead")
    claims_of(share, "dead").part(claim, "dog.json", "failed", "")
    for worker in ("w1", "w2"):
        heir = claims_of(share, worker).take_over(found(share))
        assert heir
        assert (heir.hold.prompts, heir.prompts) == (1, set())


def test_what_a_living_process_gives_up_and_takes_up_again_is_no_further_attempt(share: Share) -> None:
    taken(share, "me-1")
    for generation in (2, 3, 4, 5):
        claim = claims_of(share, "me-1").take_over(found(share))
        assert claim
        assert (claim.hold.generation, claim.hold.attempt) == (generation, 1)


def test_the_answered_prompts_of_a_claim_are_known_to_its_heir(share: Share) -> None:
    share.pair("dog")
    share.drop("dog.left.json", b"{}")
    dead = claims_of(share, "dead")
    claim = dead.take("dog.jpg", "dog.jpg", ["dog.json", "dog.left.json"])
    assert claim
    claim.suffix = "~7"
    dead.mark_answered(claim)
    heir = claims_of(share, "heir").take_over(found(share))
    assert heir
    assert (heir.answered, heir.suffix) == (True, "~7")


def test_what_a_dead_daemon_was_writing_goes_with_its_claim(share: Share) -> None:
    dead = taken(share, "dead")
    (dead.path / ".sam_poll-1-2-3.tmp").touch()
    heir = claims_of(share, "heir").take_over(found(share))
    assert heir
    assert heir.picture == "dog.jpg"
    assert sorted(heir.path.names()) == ["dog.jpg", "dog.json"]


def test_what_an_owner_was_writing_when_it_was_taken_over_can_never_appear(share: Share) -> None:
    claim = taken(share, "asleep")
    with Whole(claim.path) as outputs:
        outputs.write(share.layout.output / "dog.txt", b"answer")
        assert claims_of(share, "heir").take_over(found(share))
        before = trees(share)
        with pytest.raises(FileNotFoundError):
            outputs.show()
    assert trees(share) == before
    assert list(share.output.iterdir()) == []


# ── fenced ──

ENDS: dict[str, Callable[[Claims, Claim], object]] = {
    "alive": lambda claims, claim: claims.alive(claim),
    "part": lambda claims, claim: claims.part(claim, "dog.json", "done", ""),
    "close": lambda claims, claim: claims.close(claim, "done", ""),
    "report": lambda claims, claim: claims.write_report(claim, b"{}"),
    "answered": lambda claims, claim: claims.mark_answered(claim),
    "free": lambda claims, claim: claims.free(claim, "done"),
    "add": lambda claims, claim: claims.add(claim, "dog.left.json"),
}


@pytest.mark.parametrize("end", ENDS)
def test_an_owner_that_was_taken_over_can_end_nothing(share: Share, end: str) -> None:
    claim = taken(share, "asleep")
    share.drop("dog.left.json", b"{}")
    assert claims_of(share, "heir").take_over(found(share))
    before = trees(share)
    with pytest.raises(LostError):
        ENDS[end](claims_of(share, "asleep"), claim)
    assert trees(share) == before
    assert claim.over == (end != "free" or claim.over)


@pytest.mark.parametrize("end", ENDS)
def test_a_share_that_is_away_is_not_taken_for_a_lost_claim(share: Share, end: str) -> None:
    claim = taken(share, "me-1")
    share.drop("dog.left.json", b"{}")

    def away() -> None:
        raise OSError(errno.ESTALE, "the share is not there")

    claims = claims_of(share, "me-1", away)
    share.work.rename(share.root / "unmounted")
    share.layout.work.root.renew()  # as each look at the sentinel does
    with pytest.raises(OSError, match="not there"):
        ENDS[end](claims, claim)
    (share.root / "unmounted").rename(share.work)
    assert not claim.over
    claims.close(claim, "input", "")
    assert share.tree("input") == ["dog.jpg", "dog.json", "dog.left.json"]


# ── ending ──


def test_a_claim_that_ends_halfway_ends_where_it_began_to(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    claims, claim = claims_of(share), taken(share)
    moved: list[Path] = []
    really = Claims._leave

    def dies(self: Claims, claim: Claim, name: str, place: str, suffix: str) -> None:
        if moved:
            raise OSError(errno.EIO, "Input/output error")
        moved.append(claim.path / name)
        really(self, claim, name, place, suffix)

    with monkeypatch.context() as patch:
        patch.setattr(Claims, "_leave", dies)
        with pytest.raises(OSError, match="Input/output"):
            claims.close(claim, "done", "~2")
    assert share.tree("done") == ["dog~2.jpg"]
    claims.close(claim, "input", "")  # whatever is asked for now
    assert share.tree("done") == ["dog~2.jpg", "dog~2.json"]
    assert listing(share.layout.work)[0] == []


def test_done_is_never_overwritten(share: Share) -> None:
    claims, claim = claims_of(share), taken(share)
    (share.done / "dog.json").write_bytes(b"of yesterday")
    claims.close(claim, "done", "")
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog~2.json"]
    assert (share.done / "dog.json").read_bytes() == b"of yesterday"


def test_a_name_that_is_as_long_as_can_be_gets_its_suffix_too(share: Share) -> None:
    name = "x" * 251
    for number in range(3):
        share.drop(f"{name}.jpg", str(number).encode())
        claims = claims_of(share)
        claim = claims.take(f"{name}.jpg", f"{name}.jpg", [])
        assert claim
        claims.close(claim, "done", claims.free(claim, "done"))
    bodies = {(share.done / n).read_bytes() for n in share.tree("done")}
    assert bodies == {b"0", b"1", b"2"}


def test_a_claim_ends_once(share: Share) -> None:
    claims, claim = claims_of(share), taken(share)
    claims.close(claim, "done", "")
    before = trees(share)
    claims.close(claim, "failed", "")
    assert trees(share) == before


def test_no_prompt_joins_a_claim_that_is_over(share: Share) -> None:
    claims, claim = claims_of(share), taken(share)
    share.drop("dog.left.json", b"{}")
    claims.close(claim, "done", "")
    assert not claims.add(claim, "dog.left.json")
    assert share.tree("input") == ["dog.left.json"]


def test_a_prompt_that_is_at_work_already_waits_in_the_input_folder(share: Share) -> None:
    claims, claim = claims_of(share), taken(share)
    share.drop("dog.json", b"newer")
    assert not claims.add(claim, "dog.json")
    assert share.tree("input") == ["dog.json"]


# ── looking ──


def test_the_listing_tells_claims_strays_and_empty_folders_and_follows_no_link(share: Share, tmp_path: Path) -> None:
    claim = taken(share, name="cam1/dog")
    (tmp_path / "elsewhere" / ".cat.jpg" / "g1.a1.n1@x").mkdir(parents=True)
    (share.work / "link").symlink_to(tmp_path / "elsewhere")
    (share.work / "stray.jpg").write_bytes(b"x")
    (share.work / "empty" / "below").mkdir(parents=True)
    (share.work / ".bare.jpg").mkdir()
    (share.work / ".sam_poll-worker-box-1-2.json").write_bytes(b"{}")
    claims, strays, empty, ours, _ = listing(share.layout.work)
    assert [name for name in ours if "worker" in name] == [".sam_poll-worker-box-1-2.json"]
    assert {(f.label, f.hold) for f in claims} == {("cam1/dog.jpg", claim.hold), ("bare.jpg", None)}
    assert strays == ["stray.jpg"]
    assert empty == ["empty/below"]


def test_a_work_folder_that_is_away_is_an_error_and_not_an_empty_one(share: Share) -> None:
    with pytest.raises(FileNotFoundError):
        listing(share.layout.work)
