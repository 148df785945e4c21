"""Claims: one owner at a time, taken over by rename, ended once; a former owner changes nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import string
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sam_poll.core.errors import ClaimLostError
from sam_poll.core.files import AtomicFiles
from sam_poll.core.safe_path import SafePath
from sam_poll.share.claims.model import Claim, ClaimEntry, ClaimState, claim_name, list_work
from sam_poll.share.claims.store import ClaimStore
from sam_poll.share.mount_check import check_folders
from tests.conftest import Share
from tests.support.trees import trees

WORKERS = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=100)
NUMBERS = st.integers(0, 10**9 - 1)
PLACES = st.sampled_from(["done", "failed", "input"])
SUFFIXES = st.one_of(st.just(""), st.integers(2, 10**9 - 1).map("~{}".format))


def claims_of(
    share: Share, worker: str = "me-1", check_mounted: Callable[[], object] = lambda: None
) -> ClaimStore:
    """Return the claims of one daemon, whose folders are there."""
    if not share.work.exists():
        check_folders(share.layout)
    return ClaimStore(share.layout, worker, check_mounted)


def taken(share: Share, worker: str = "me-1", name: str = "dog") -> Claim:
    """Claim a new pair."""
    share.pair(name)
    claim = claims_of(share, worker).take(f"{name}.jpg", f"{name}.jpg", [f"{name}.json"])
    assert claim
    return claim


def found(share: Share) -> ClaimEntry:
    """Return the only claim."""
    (one,) = list_work(share.layout.work)[0]
    return one


# ── names ──


@given(NUMBERS, WORKERS, NUMBERS, NUMBERS)
def test_claim_state_is_what_its_name_says(
    generation: int, worker: str, attempt: int, prompts: int
) -> None:
    hold = ClaimState(generation, worker, attempt, prompts)
    assert ClaimState.parse(str(hold)) == hold


@given(NUMBERS, WORKERS, PLACES, SUFFIXES)
def test_claim_state_of_an_ended_job_is_what_its_name_says(
    generation: int, worker: str, place: str, suffix: str
) -> None:
    hold = ClaimState(generation, worker, attempt=0, place=place, suffix=suffix)
    assert ClaimState.parse(str(hold)) == hold


@given(st.text(max_size=60))
def test_claim_state_is_none_for_other_names(text: str) -> None:
    hold = ClaimState.parse(text)
    assert hold is None or str(hold) == text


@pytest.mark.parametrize(
    "name",
    [
        *(
            "g1.a1.n1",
            "g1.a1.n1@",
            "g1.a1@me",
            "g.a1.n1@me",
            "g1.a1.n1@me/x",
            "g1.a1.n1@me.tmp",
            "g1.a1.n1@me\n",
        ),
        *(
            "g1.work@me",
            "g1.done~@me",
            "g1.done~x@me",
            "g-1.a1.n1@me",
            "g1.a1.n1@" + "m" * 101,
            "g1.a٣.n1@me",
            "",
        ),
    ],
)
def test_claim_state_is_none_for_names_that_look_similar(name: str) -> None:
    assert ClaimState.parse(name) is None


@pytest.mark.parametrize(
    "name",
    ["x" * 255, "ü" * 127 + "x", "🐶" * 63, os.fsdecode(b"\xe9" * 255), "a\nb" * 80],
    ids=ascii,
)
def test_outer_name_of_the_longest_file_names_fits(name: str) -> None:
    assert len(os.fsencode(claim_name(name))) <= 255
    assert claim_name(name) != claim_name(name[:-1] + "y")


@pytest.mark.parametrize("name", ["ü" * 127, "🐶" * 63, "x" + "🐶" * 63], ids=ascii)
def test_outer_name_is_not_cut_within_a_character(name: str) -> None:
    claim_name(name).encode()  # shares that know only whole characters refuse anything else


@pytest.mark.parametrize(
    "name",
    ["x" * 251, "🐶" * 62, "line\nbreak", os.fsdecode(b"latin\xe9"), "%s{x}", "-rf", "g1"],
    ids=ascii,
)
def test_take_and_close_keep_long_and_odd_names(share: Share, name: str) -> None:
    claims = claims_of(share)
    share.drop(f"{name}.jpg", b"picture")
    claim = claims.take(f"{name}.jpg", f"{name}.jpg", [])
    assert claim
    assert claim.path.names() == [f"{name}.jpg"]
    claims.close(claim, "input", "")
    assert (share.input / f"{name}.jpg").read_bytes() == b"picture"
    assert list_work(share.layout.work)[:3] == ([], [], [])


# ── taking ──


def test_take_by_two_daemons_succeeds_once_and_leaves_nothing_of_the_other(
    share: Share,
) -> None:
    share.pair("cam1/dog")
    one, two = claims_of(share, "one"), claims_of(share, "two")
    first = one.take("cam1/dog.jpg", "cam1/dog.jpg", ["cam1/dog.json"])
    assert first
    before = trees(share)
    assert two.take("cam1/dog.jpg", "cam1/dog.jpg", ["cam1/dog.json"]) is None
    assert trees(share) == before
    assert sorted(first.path.names()) == ["dog.jpg", "dog.json"]
    assert first.hold == ClaimState(1, "one", attempt=1, prompts=1)


@pytest.mark.parametrize("picture", ["dog.jpg", None])
def test_take_of_a_pair_that_has_just_gone_leaves_nothing_behind(
    share: Share, picture: str | None
) -> None:
    claims = claims_of(share)
    assert claims.take("dog.jpg", picture, ["dog.json"]) is None
    assert list_work(share.layout.work)[:3] == ([], [], [])


def test_take_returns_a_picture_whose_prompts_have_just_gone(share: Share) -> None:
    claims = claims_of(share)
    share.drop("dog.jpg", b"picture")
    assert claims.take("dog.jpg", "dog.jpg", ["dog.json"]) is None
    assert share.tree("input") == ["dog.jpg"]
    assert list_work(share.layout.work)[:3] == ([], [], [])


def test_take_returns_the_files_when_the_share_fails_meanwhile(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = claims_of(share)
    share.pair("dog")
    really = ClaimStore.add

    def failing(self: ClaimStore, claim: Claim, prompt: str) -> bool:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(ClaimStore, "add", failing)
    with pytest.raises(OSError) as failed:
        claims.take("dog.jpg", "dog.jpg", ["dog.json"])
    assert failed.value.errno == errno.EIO
    monkeypatch.setattr(ClaimStore, "add", really)
    assert share.tree("input") == ["dog.jpg", "dog.json"]
    assert list_work(share.layout.work)[:3] == ([], [], [])


def test_take_by_racing_daemons_claims_each_pair_once(share: Share) -> None:
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


def test_take_leaves_a_claim_alone_that_its_maker_fills_at_the_same_moment(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    share.pair("dog")
    mine, other = claims_of(share, "me-1"), claims_of(share, "other-1")
    outer = share.layout.work / claim_name("dog.jpg")
    outer.mkdir()
    listed = SafePath.names

    def filled_once_listed(self: SafePath) -> list[str]:
        names = listed(self)
        if self.rel == outer.rel:
            monkeypatch.undo()
            (outer / str(ClaimState(1, other.worker, attempt=1, prompts=1))).mkdir()
        return names

    monkeypatch.setattr(SafePath, "names", filled_once_listed)
    assert mine.take("dog.jpg", "dog.jpg", ["dog.json"]) is None
    assert found(share).hold
    assert share.tree("input") == ["dog.jpg", "dog.json"]


@pytest.mark.parametrize("error", [errno.EPERM, errno.EACCES])
def test_take_says_where_an_empty_folder_that_cannot_be_removed_has_the_claims_name(
    share: Share, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    share.pair("dog")
    claims = claims_of(share)
    outer = share.layout.work / claim_name("dog.jpg")
    outer.mkdir()

    def refused(name: str, **where: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "rmdir", refused)
    with pytest.raises(FileExistsError, match=r"name of a claim.*\.dog\.jpg"):
        claims.take("dog.jpg", "dog.jpg", ["dog.json"])
    assert share.tree("input") == ["dog.jpg", "dog.json"]


def test_take_over_by_racing_daemons_succeeds_once_for_each_claim(share: Share) -> None:
    for n in range(100):
        taken(share, "dead", f"dog{n:03}")
    claims = list_work(share.layout.work).claims
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
    assert all(f.hold and f.hold.generation == 2 for f in list_work(share.layout.work)[0])


# ── taking over ──


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_take_over_removes_what_others_have_put_in_the_place_of_a_report(
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


def test_take_over_goes_on_when_the_report_goes_while_it_is_read(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = taken(share, "dead-1").path.path / ".report"
    report.write_text('{"files": ["dog.json"]}')

    def gone(path: SafePath) -> list[str]:
        path.unlink()
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr("sam_poll.share.claims.store.reported_files", gone)
    assert claims_of(share, "heir").take_over(found(share))


def test_report_of_an_heir_is_not_replaced_by_one_that_the_former_owner_is_writing(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    asleep, heir = claims_of(share, "asleep"), claims_of(share, "heir")
    claim, entry = taken(share, "asleep"), found(share)
    heirs: list[Claim] = []

    def as_before(really: Callable[..., object]) -> Callable[..., object]:
        def call(name: str, *args: object, **more: object) -> object:
            if name == ".report" and not heirs:
                monkeypatch.undo()
                second = heir.take_over(entry)
                assert second
                heirs.append(second)
                heir.write_report(second, b'{"files": ["dog.json"], "reason": "heir"}')
            return really(name, *args, **more)

        return call

    monkeypatch.setattr(os, "open", as_before(os.open))
    monkeypatch.setattr(os, "unlink", as_before(os.unlink))
    with pytest.raises(ClaimLostError):
        asleep.write_report(claim, b'{"files": ["dog.json"], "reason": "asleep"}')
    heir.close(heirs[0], "failed", "")
    assert share.error("dog")["reason"] == "heir"


def test_report_that_the_former_owner_moves_during_a_take_over_stays_with_its_file(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon believed dead has moved a rejected prompt away, and then just its report."""
    share.drop("dog.json", b"{}")
    asleep, heir = claims_of(share, "asleep"), claims_of(share, "heir")
    claim = asleep.take("dog.json", None, ["dog.json"])
    assert claim
    asleep.write_report(claim, b'{"files": ["dog.json"], "reason": "asleep"}')
    entry, rename = found(share), os.rename
    heirs: list[Claim] = []

    def renaming(source: str, target: str, **folders: int) -> None:
        rename(source, target, **folders)
        if source == ".report" and not heirs:
            second = heir.take_over(entry)
            assert second
            heirs.append(second)

    monkeypatch.setattr(os, "rename", renaming)
    with contextlib.suppress(ClaimLostError):
        asleep.close(claim, "failed", "")
    monkeypatch.undo()
    heir.close(heirs[0], "input", "")
    assert share.error("dog")["reason"] == "asleep"
    assert share.tree("failed") == ["dog.error.json", "dog.json"]
    assert share.tree("work") == share.tree("input") == []


def test_report_that_comes_from_a_former_owner_is_not_put_beside_an_answered_job(
    share: Share,
) -> None:
    taken(share, "asleep")
    heir = claims_of(share, "heir")
    claim = heir.take_over(found(share))
    assert claim
    (claim.path / ".report").path.write_text('{"files": ["dog.json"]}')
    heir.close(claim, "done", "")
    assert share.tree("done") == ["dog.jpg", "dog.json"]
    assert share.tree("failed") == []
    assert share.tree("work") == []


def test_prompt_moved_back_during_a_take_over_is_not_put_away_without_its_report(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon believed dead moves a prompt out of its claim just before that is taken over.

    It finds out and moves the prompt back just after its heir has listed the claim.
    """
    share.pair("dog")
    share.drop("dog.left.json", b"{}")
    asleep, heir = claims_of(share, "asleep"), claims_of(share, "heir")
    claim = asleep.take("dog.jpg", "dog.jpg", ["dog.json", "dog.left.json"])
    assert claim
    asleep.write_report(claim, b'{"files": ["dog.json"]}')
    moved_back, listed = threading.Event(), threading.Event()
    names, rename = SafePath.names, os.rename
    heirs: list[Claim | None] = []

    def listing(path: SafePath) -> list[str]:
        found = names(path)
        if path.name.startswith("g2"):
            listed.set()
            assert moved_back.wait(30)
        return found

    def renaming(source: str, target: str, **folders: int) -> None:
        rename(source, target, **folders)
        if source == target == "dog.json" and not heirs_thread.ident:
            heirs_thread.start()
            assert listed.wait(30)

    entry = found(share)
    heirs_thread = threading.Thread(target=lambda: heirs.append(heir.take_over(entry)))
    monkeypatch.setattr(SafePath, "names", listing)
    monkeypatch.setattr(os, "rename", renaming)
    with pytest.raises(ClaimLostError):
        asleep.part(claim, "dog.json", "failed", "")
    moved_back.set()
    heirs_thread.join(30)
    monkeypatch.undo()

    (second,) = heirs
    assert second
    assert second.prompts == {"dog.left.json"}
    with pytest.raises(ClaimLostError, match="moved back"):
        heir.close(second, "failed", "")
    third = heir.take_over(found(share))
    assert third
    assert third.prompts == {"dog.json", "dog.left.json"}
    for prompt in sorted(third.prompts):
        heir.write_report(third, b'{"files": ["%s"]}' % prompt.encode())
        heir.part(third, prompt, "failed", "")
    heir.close(third, "failed", "")
    assert share.tree("failed") == [
        *("dog.error.json", "dog.jpg", "dog.json", "dog.left.error.json", "dog.left.json")
    ]


def test_report_replaces_one_on_an_earlier_file_of_the_same_name_only(share: Share) -> None:
    for text in ("first", "second"):
        claim = taken(share)
        claims = claims_of(share)
        body = b'{"files": ["dog.jpg", "dog.json"], "reason": "%s"}' % text.encode()
        claims.write_report(claim, body)
        claims.close(claim, "failed", "")
        assert share.tree("failed") == ["dog.error.json", "dog.jpg", "dog.json"]
        assert text in (share.failed / "dog.error.json").read_text()
        (share.failed / "dog.jpg").unlink()
        (share.failed / "dog.json").unlink()
    (share.failed / "dog.error.json").write_text("a user's own")
    claims.write_report(claim := taken(share), body)
    claims.close(claim, "failed", "")
    assert share.tree("failed") == [
        *("dog.error.json", "dog.jpg", "dog.json", "dog.json.error.json")
    ]
    assert (share.failed / "dog.error.json").read_text() == "a user's own"


def test_take_over_counts_generation_and_attempt(share: Share) -> None:
    taken(share, "dead")
    claim = claims_of(share, "heir").take_over(found(share))
    assert claim
    assert claim.hold == ClaimState(2, "heir", attempt=2, prompts=1)
    assert (claim.picture, claim.prompts) == ("dog.jpg", {"dog.json"})
    assert str(found(share).hold) == "g2.a2.n1@heir"


def test_take_over_counts_attempts_from_1_where_prompts_were_put_away(share: Share) -> None:
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


def test_take_over_counts_attempts_at_a_picture_without_prompts(share: Share) -> None:
    share.drop("dog.jpg", b"picture")
    assert claims_of(share, "dead").take("dog.jpg", "dog.jpg", [])
    for attempt in (2, 3, 4):
        claim = claims_of(share, f"w{attempt}").take_over(found(share))
        assert claim
        assert (claim.hold.attempt, claim.hold.prompts) == (attempt, 0)


def test_take_over_remembers_that_a_picture_had_prompts(
    share: Share,
) -> None:
    claim = taken(share, "dead")
    claims_of(share, "dead").part(claim, "dog.json", "failed", "")
    for worker in ("w1", "w2"):
        heir = claims_of(share, worker).take_over(found(share))
        assert heir
        assert (heir.hold.prompts, heir.prompts) == (1, set())


def test_take_over_of_the_workers_own_claim_is_no_further_attempt(
    share: Share,
) -> None:
    taken(share, "me-1")
    for generation in (2, 3, 4, 5):
        claim = claims_of(share, "me-1").take_over(found(share))
        assert claim
        assert (claim.hold.generation, claim.hold.attempt) == (generation, 1)


def test_take_over_knows_that_a_prompt_was_answered(share: Share) -> None:
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


@pytest.mark.parametrize("tries", [1, 2], ids=["before its marks are removed", "after that"])
def test_picture_moved_back_while_its_claim_is_removed_still_goes_to_done(
    tries: int, share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon believed dead moves an answered picture to `done/`, as the claim is taken over.

    It finds out and moves the picture back, while its heir, which found the claim without files,
    removes it.
    """
    share.pair("dog")
    share.drop("dog.left.json", b"{}")
    asleep, heir = claims_of(share, "asleep"), claims_of(share, "heir")
    claim = asleep.take("dog.jpg", "dog.jpg", ["dog.json", "dog.left.json"])
    assert claim
    claim.suffix = "~7"
    asleep.mark_answered(claim)
    for prompt in ("dog.json", "dog.left.json"):
        asleep.part(claim, prompt, "done", "~7")
    Path(str(claim.path / "dog.jpg")).rename(share.done / "dog~7.jpg")
    second = heir.take_over(found(share))
    assert second
    assert second.picture is None
    rmdir, calls = os.rmdir, 0

    def moved_back_before(name: str, **more: int) -> None:
        nonlocal calls
        calls += 1
        if calls == tries:
            (share.done / "dog~7.jpg").rename(str(second.path / "dog.jpg"))
        rmdir(name, **more)

    monkeypatch.setattr(os, "rmdir", moved_back_before)
    heir.close(second, "done", second.suffix)
    monkeypatch.undo()
    assert share.tree("done") == ["dog.left~7.json", "dog~7.json"]

    third = heir.take_over(found(share))
    assert third
    assert (third.picture, third.answered, third.suffix) == ("dog.jpg", True, "~7")
    heir.close(third, "done", third.suffix)
    assert share.tree("done") == ["dog.left~7.json", "dog~7.jpg", "dog~7.json"]
    assert not share.tree("work")


def test_take_over_removes_what_a_dead_daemon_was_writing(share: Share) -> None:
    dead = taken(share, "dead")
    (dead.path / ".sam_poll-1-2-3.tmp").touch()
    heir = claims_of(share, "heir").take_over(found(share))
    assert heir
    assert heir.picture == "dog.jpg"
    assert sorted(heir.path.names()) == ["dog.jpg", "dog.json"]


def test_take_over_keeps_answers_from_appearing_that_the_former_owner_was_writing(
    share: Share,
) -> None:
    claim = taken(share, "asleep")
    with AtomicFiles(claim.path) as outputs:
        outputs.write(share.layout.output / "dog.txt", b"answer")
        assert claims_of(share, "heir").take_over(found(share))
        before = trees(share)
        with pytest.raises(FileNotFoundError):
            outputs.show()
    assert trees(share) == before
    assert list(share.output.iterdir()) == []


# ── fenced ──

ENDS: dict[str, Callable[[ClaimStore, Claim], object]] = {
    "alive": lambda claims, claim: claims.alive(claim),
    "part": lambda claims, claim: claims.part(claim, "dog.json", "done", ""),
    "close": lambda claims, claim: claims.close(claim, "done", ""),
    "report": lambda claims, claim: claims.write_report(claim, b"{}"),
    "answered": lambda claims, claim: claims.mark_answered(claim),
    "free": lambda claims, claim: claims.free(claim, "done"),
    "add": lambda claims, claim: claims.add(claim, "dog.left.json"),
}


@pytest.mark.parametrize("end", ENDS)
def test_former_owner_can_end_nothing(share: Share, end: str) -> None:
    claim = taken(share, "asleep")
    share.drop("dog.left.json", b"{}")
    assert claims_of(share, "heir").take_over(found(share))
    before = trees(share)
    with pytest.raises(ClaimLostError):
        ENDS[end](claims_of(share, "asleep"), claim)
    assert trees(share) == before
    assert claim.over == (end != "free" or claim.over)


@pytest.mark.parametrize("end", ENDS)
def test_share_that_is_away_does_not_make_a_claim_lost(share: Share, end: str) -> None:
    claim = taken(share, "me-1")
    share.drop("dog.left.json", b"{}")

    def away() -> None:
        raise OSError(errno.ESTALE, "the share is not there")

    claims = claims_of(share, "me-1", away)
    share.work.rename(share.root / "unmounted")
    share.layout.work.root.renew()  # as each look at the sentinel does
    with pytest.raises(OSError) as failed:
        ENDS[end](claims, claim)
    assert failed.value.errno == errno.ESTALE
    (share.root / "unmounted").rename(share.work)
    assert not claim.over
    claims.close(claim, "input", "")
    assert share.tree("input") == ["dog.jpg", "dog.json", "dog.left.json"]


# ── ending ──


def test_close_that_failed_halfway_ends_where_it_began_to(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims, claim = claims_of(share), taken(share)
    moved: list[Path] = []
    really = ClaimStore._leave

    def dies(self: ClaimStore, claim: Claim, name: str, place: str, suffix: str) -> None:
        if moved:
            raise OSError(errno.EIO, "Input/output error")
        moved.append(claim.path / name)
        really(self, claim, name, place, suffix)

    with monkeypatch.context() as patch:
        patch.setattr(ClaimStore, "_leave", dies)
        with pytest.raises(OSError) as failed:
            claims.close(claim, "done", "~2")
    assert failed.value.errno == errno.EIO
    assert share.tree("done") == ["dog~2.jpg"]
    claims.close(claim, "input", "")  # the place that it began with counts
    assert share.tree("done") == ["dog~2.jpg", "dog~2.json"]
    assert list_work(share.layout.work)[0] == []


def test_close_overwrites_nothing_in_done(share: Share) -> None:
    claims, claim = claims_of(share), taken(share)
    (share.done / "dog.json").write_bytes(b"of yesterday")
    claims.close(claim, "done", "")
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog~2.json"]
    assert (share.done / "dog.json").read_bytes() == b"of yesterday"


def test_close_adds_the_suffix_to_the_longest_names(share: Share) -> None:
    name = "x" * 251
    for number in range(3):
        share.drop(f"{name}.jpg", str(number).encode())
        claims = claims_of(share)
        claim = claims.take(f"{name}.jpg", f"{name}.jpg", [])
        assert claim
        claims.close(claim, "done", claims.free(claim, "done"))
    bodies = {(share.done / n).read_bytes() for n in share.tree("done")}
    assert bodies == {b"0", b"1", b"2"}


def test_close_ends_a_claim_once(share: Share) -> None:
    claims, claim = claims_of(share), taken(share)
    claims.close(claim, "done", "")
    before = trees(share)
    claims.close(claim, "failed", "")
    assert trees(share) == before


def test_add_refuses_a_claim_that_has_ended(share: Share) -> None:
    claims, claim = claims_of(share), taken(share)
    share.drop("dog.left.json", b"{}")
    claims.close(claim, "done", "")
    assert not claims.add(claim, "dog.left.json")
    assert share.tree("input") == ["dog.left.json"]


def test_add_leaves_a_prompt_in_the_input_folder_whose_name_is_claimed(share: Share) -> None:
    claims, claim = claims_of(share), taken(share)
    share.drop("dog.json", b"newer")
    assert not claims.add(claim, "dog.json")
    assert share.tree("input") == ["dog.json"]


@pytest.mark.parametrize("struck", [1, 2, 3])
def test_close_leaves_nothing_in_work_where_removing_fails_once(
    share: Share, monkeypatch: pytest.MonkeyPatch, struck: int
) -> None:
    claims, claim = claims_of(share), taken(share)
    claims.mark_stem(claim)
    calls, rmdir = [0], os.rmdir

    def failing(name: str, **where: int) -> None:
        calls[0] += 1
        if calls[0] == struck:
            raise OSError(errno.EIO, "Input/output error")
        rmdir(name, **where)

    monkeypatch.setattr(os, "rmdir", failing)
    claims.close(claim, "done", "")
    monkeypatch.undo()
    assert calls[0] >= struck
    assert list_work(share.layout.work)[:3] == ([], [], [])


# ── listing ──


def test_list_work_finds_claims_strays_and_empty_folders_and_follows_no_link(
    share: Share, tmp_path: Path
) -> None:
    claim = taken(share, name="cam1/dog")
    (tmp_path / "elsewhere" / ".cat.jpg" / "g1.a1.n1@x").mkdir(parents=True)
    (share.work / "link").symlink_to(tmp_path / "elsewhere")
    (share.work / "stray.jpg").write_bytes(b"x")
    (share.work / "empty" / "below").mkdir(parents=True)
    (share.work / ".bare.jpg").mkdir()
    (share.work / ".sam_poll-worker-box-1-2.json").write_bytes(b"{}")
    claims, strays, empty, ours, _ = list_work(share.layout.work)
    assert [name for name in ours if "worker" in name] == [".sam_poll-worker-box-1-2.json"]
    assert {(f.label, f.hold) for f in claims} == {("cam1/dog.jpg", claim.hold), ("bare.jpg", None)}
    assert strays == ["stray.jpg"]
    assert empty == ["empty/below"]


def test_list_work_raises_where_the_folder_is_away(share: Share) -> None:
    with pytest.raises(FileNotFoundError):
        list_work(share.layout.work)
