"""Every bad input ends in a reason: the cases of catalogue.py, each family dropped into one share
and drained.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from loguru import logger

from sam_poll.engines.fake import FakeEngine
from sam_poll.imaging import decode as images
from sam_poll.imaging import source_file
from sam_poll.prompts import parser
from tests.conftest import Share, wait_until
from tests.support.bad_inputs import (
    FAMILIES,
    PROMPT,
    SPARSE,
    Case,
    answered,
    jpeg,
    not_understood,
    refused,
    sparse,
)
from tests.support.paths import ROOT
from tools import audited

HEALTHY = Case("healthy", "answered", {"healthy.jpg": jpeg(), "healthy.json": PROMPT}, "healthy")
SMALL = 10_000_000  # files up to this size are compared byte by byte

# ── what the process touches ──

_touched: list[tuple[str, str, bool]] | None = None
_WRITES = {
    "os.rename",
    "os.remove",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
}
_STARTS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.connect",
    "socket.bind",
}


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _touched is None:
        return
    if event in _STARTS:
        _touched.append((event, str(args[0]), True))
    elif event in _WRITES or event in ("open", "os.listdir", "os.scandir", "os.utime"):
        writes = event in _WRITES or (
            event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        )
        for path in audited.paths(event, args):
            _touched.append((event, path, writes))


audited.begin()
sys.addaudithook(_hook)


@contextlib.contextmanager
def watched() -> Iterator[list[tuple[str, str, bool]]]:
    """Each file that this process opens, lists, moves or makes meanwhile: event, absolute path,
    whether it writes.
    """
    global _touched
    _touched = []
    try:
        yield _touched
    finally:
        _touched = None


def outside(touched: list[tuple[str, str, bool]], share: Share) -> list[tuple[str, str]]:
    """What was touched that is neither in the share nor, for reading, a part of Python, its
    packages or this one.
    """
    ours = (str(share.root) + os.sep, str(share.root.parent) + os.sep + share.root.name)
    readable = (sys.prefix, sys.base_prefix, str(ROOT), "/proc/", "/sys/", "/usr/", "/etc/")
    way = {
        str(folder) for folder in share.root.parents
    }  # each of them is opened, to follow no link
    return [
        (event, path)
        for event, path, writes in touched
        if not path.startswith(ours)
        and not (path in way and not writes)
        and not (path.startswith(readable) and (not writes or "__pycache__" in path))
    ]


# ── a drained share ──


@dataclass
class Drained:
    """What became of a family: the share, its log, what was touched, and each dropped file's inode
    and size.
    """

    share: Share
    log: list[str] = field(default_factory=list)
    touched: list[tuple[str, str, bool]] = field(default_factory=list)
    before: dict[str, tuple[int, int]] = field(default_factory=dict)
    engine: FakeEngine = field(default_factory=FakeEngine)

    def drop(self, *cases: Case) -> None:
        for case in cases:
            for name, body in case.files.items():
                path = self.share.input / name
                if isinstance(body, bytes):
                    path.write_bytes(body)
                else:
                    body(path)
                self.before[name] = identity(path)

    def drain(self, **options: Any) -> Drained:
        handle = logger.add(
            lambda line: self.log.append(str(line)), level="DEBUG", format="{level} {message}"
        )
        try:
            with watched() as self.touched:
                self.share.run_once(self.engine, **options)
        finally:
            logger.remove(handle)
        return self

    def report(self, prompt: str) -> dict[str, Any]:
        """The error file of the job with this prompt; there must be exactly one."""
        reports = (json.loads(p.read_bytes()) for p in self.share.failed.rglob("*.error.json"))
        (found,) = [report for report in reports if prompt in report["files"]]
        return found


def identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_ino, found.st_size


@pytest.fixture(scope="module")
def drained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Drained]:
    """Each family in a share of its own, drained once, with a healthy pair beside it."""
    known: dict[str, Drained] = {}

    def drain(family: str) -> Drained:
        if family not in known:
            known[family] = Drained(Share(tmp_path_factory.mktemp(family) / "share"))
            known[family].drop(*FAMILIES[family], HEALTHY)
            known[family].drain()
        return known[family]

    return drain


# ── what must become of a case ──


def check(case: Case, drained: Drained) -> None:
    {"answered": check_answered, "rejected": check_rejected, "left": check_left}[case.end](
        case, drained
    )


def check_untouched(case: Case, drained: Drained, folder: str) -> None:
    place = getattr(drained.share.layout, folder)
    for name, body in case.files.items():
        assert identity(place / name) == drained.before[name], name
        if isinstance(body, bytes) and len(body) < SMALL:
            assert (place / name).read_bytes() == body, name


def check_answered(case: Case, drained: Drained) -> None:
    check_untouched(case, drained, "done")
    body = (drained.share.output / f"{case.stem}.mask.png").read_bytes()
    mask = cv2.imdecode(np.frombuffer(body, np.uint8), cv2.IMREAD_UNCHANGED)
    assert case.size is None or mask.shape == case.size[::-1]


def check_rejected(case: Case, drained: Drained) -> None:
    check_untouched(case, drained, "failed")
    report = drained.report(f"{case.stem}.json")
    assert report["code"] == case.code
    assert sorted(report["files"]) == sorted(case.files)
    told = [report[part] for part in ("reason", "place", "remedy")]
    assert all(told), told
    assert all(text.isprintable() for text in told), told
    for words in case.says:
        assert words in " | ".join(told)
    assert not list(drained.share.output.glob(f"{glob_safe(case.stem)}.*"))


def glob_safe(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def check_left(case: Case, drained: Drained) -> None:
    for name in case.files:
        assert identity(drained.share.input / name) == drained.before[name], name


def cases(family: str) -> Any:
    return pytest.mark.parametrize("case", FAMILIES[family], ids=lambda case: case.name)


@cases("sound")
def test_an_odd_picture_is_answered_at_its_upright_size(
    case: Case, drained: Callable[[str], Drained]
) -> None:
    check(case, drained("sound"))


@cases("broken")
def test_a_broken_picture_ends_in_its_reason(case: Case, drained: Callable[[str], Drained]) -> None:
    check(case, drained("broken"))


@cases("names")
def test_a_name_is_only_a_name(case: Case, drained: Callable[[str], Drained]) -> None:
    check(case, drained("names"))


@cases("things")
def test_what_is_no_job_is_left_alone(case: Case, drained: Callable[[str], Drained]) -> None:
    check(case, drained("things"))


@cases("prompts")
def test_a_prompt_that_cannot_be_read_ends_in_its_reason(
    case: Case, drained: Callable[[str], Drained]
) -> None:
    check(case, drained("prompts"))


@cases("values")
def test_a_prompt_that_makes_no_sense_ends_in_its_reason(
    case: Case, drained: Callable[[str], Drained]
) -> None:
    check(case, drained("values"))


# ── what holds for every family ──

families = pytest.mark.parametrize("family", FAMILIES)


@families
def test_a_healthy_pair_beside_them_is_answered(
    family: str, drained: Callable[[str], Drained]
) -> None:
    check(HEALTHY, drained(family))


@families
def test_the_log_has_no_control_character_and_no_traceback(
    family: str, drained: Callable[[str], Drained]
) -> None:
    log = drained(family).log
    assert log
    for line in log:
        assert line.removesuffix("\n").isprintable(), line
        assert "Traceback" not in line
        assert "unexpected" not in line


@families
def test_nothing_outside_the_share_is_touched_and_nothing_started(
    family: str, drained: Callable[[str], Drained]
) -> None:
    outcome = drained(family)
    assert len(outcome.touched) > len(FAMILIES[family])
    assert outside(outcome.touched, outcome.share) == []


@families
def test_nothing_stays_in_work(family: str, drained: Callable[[str], Drained]) -> None:
    left = [p for p in drained(family).share.work.rglob("*") if not p.is_dir()]
    assert [p for p in left if not p.name.startswith(".sam_poll-")] == []


@families
def test_every_answer_and_report_belongs_to_a_case(
    family: str, drained: Callable[[str], Drained]
) -> None:
    share, ends = drained(family).share, [case.end for case in (*FAMILIES[family], HEALTHY)]
    assert len(share.tree("output")) == ends.count("answered")
    assert len(
        [name for name in share.tree("failed") if name.endswith(".error.json")]
    ) == ends.count("rejected")


def test_what_a_link_points_at_is_never_read(drained: Callable[[str], Drained]) -> None:
    engine = drained("things").engine
    assert engine.encoded == [images.decode(jpeg()).digest]


# ── cases that need more than a drain ──


@pytest.fixture
def ordinary_user(tmp_path: Path) -> Iterator[Drained]:
    """A share of a user who is not root, who may read everything; this process is that user
    meanwhile.
    """
    if os.geteuid():
        yield Drained(Share(tmp_path / "share"))
        return
    nobody = 65534
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are root's
        os.chown(folder, nobody, nobody)
        os.seteuid(nobody)
        try:
            if not os.access(folder, os.W_OK, effective_ids=True):
                pytest.skip("an ordinary user cannot reach the folder for temporary files")
            yield Drained(Share(Path(folder) / "share"))
        finally:
            os.seteuid(0)


UNREADABLE = [
    refused("unreadable picture", jpeg(), "cannot be read", "unreadable-picture.jpg"),
    not_understood("unreadable prompt", PROMPT, "cannot be read", "unreadable-prompt.json"),
]


@pytest.mark.parametrize("case", UNREADABLE, ids=lambda case: case.name)
def test_what_may_not_be_read_ends_in_its_reason_and_stops_nobody(
    case: Case, ordinary_user: Drained
) -> None:
    ordinary_user.drop(case, HEALTHY)
    locked = (
        ordinary_user.share.input / f"{case.stem}{'.jpg' if case.code == 'picture' else '.json'}"
    )
    locked.chmod(0)
    ordinary_user.drain()
    (ordinary_user.share.failed / locked.name).chmod(0o600)
    check(case, ordinary_user)
    check(HEALTHY, ordinary_user)


def test_a_folder_that_may_not_be_read_stops_nobody(ordinary_user: Drained) -> None:
    locked = ordinary_user.share.input / "locked"
    locked.mkdir(mode=0)
    ordinary_user.drop(HEALTHY)
    ordinary_user.drain()
    assert locked.exists()
    check(HEALTHY, ordinary_user)


@pytest.fixture
def alone(share: Share) -> Drained:
    return Drained(share)


CHANGED = answered("a picture that changes after the claim", jpeg(), ending=".jpg")
CUT = refused("a picture that is emptied after the claim", jpeg(), "empty", "copy the file again")


def test_a_picture_that_changes_after_the_claim_is_read_again(
    alone: Drained, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone.drop(CHANGED, HEALTHY)
    decode, changed = images.decode, []
    with (alone.share.input / f"{CHANGED.stem}.jpg").open("ab") as writer:

        def and_then_it_grows(data: bytes, **how: Any) -> Any:
            if data == jpeg() and not changed:
                changed.append(writer.write(b"more"))
                writer.flush()
            return decode(data, **how)

        monkeypatch.setattr(images, "decode", and_then_it_grows)
        alone.drain()
    assert changed
    assert images.decode(jpeg() + b"more").digest in alone.engine.encoded
    assert (alone.share.done / f"{CHANGED.stem}.jpg").read_bytes() == jpeg() + b"more"
    assert len(alone.share.tree("output")) == 2


def test_a_picture_that_is_emptied_after_the_claim_ends_in_its_reason(
    alone: Drained, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone.drop(CUT)
    read = source_file.read
    with (alone.share.input / f"{CUT.stem}.jpg").open("r+b") as writer:

        def emptied_before(path: Path) -> Any:
            writer.truncate(0)
            return read(path)

        monkeypatch.setattr(source_file, "read", emptied_before)
        alone.drain()
    report = alone.report(f"{CUT.stem}.json")
    assert report["code"] == CUT.code
    for words in CUT.says:
        assert words in f"{report['reason']} | {report['remedy']}"


REPLACED = answered("a prompt replaced while running", jpeg(), ending=".jpg")


def test_a_prompt_replaced_while_running_is_a_job_of_its_own(alone: Drained) -> None:
    gate = threading.Event()
    alone.engine = FakeEngine(gate=gate)
    alone.drop(REPLACED)
    name, later = f"{REPLACED.stem}.json", PROMPT.replace(b'"x": 0', b'"x": 9')
    run = threading.Thread(target=alone.drain)
    run.start()
    try:
        wait_until(lambda: alone.engine.calls["encode"] > 0)
        alone.share.move_in(name, later)
    finally:
        gate.set()
        run.join(30)
    assert not run.is_alive()
    done = {n: (alone.share.done / n).read_bytes() for n in alone.share.tree("done")}
    assert sorted(body for n, body in done.items() if n.endswith(".json")) == sorted(
        [PROMPT, later]
    )
    assert alone.share.tree("failed") == alone.share.tree("input") == []
    check(
        Case(
            "the first", "answered", {f"{REPLACED.stem}.jpg": jpeg(), name: PROMPT}, REPLACED.stem
        ),
        alone,
    )


def test_a_prompt_of_100_mb_costs_neither_the_time_nor_the_memory_of_reading_it(
    alone: Drained,
) -> None:
    sizes = []

    def measured(data: bytes) -> parser.PromptFile:
        sizes.append(len(data))
        return parser.parse(data)

    alone.drop(not_understood("100 MB", sparse, "larger than"))
    tracemalloc.start()
    try:
        alone.drain(parse=measured)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (alone.share.failed / "100-MB.json").stat().st_size == SPARSE
    assert sizes
    assert max(sizes) <= parser.MAX_BYTES + 1
    assert peak < SPARSE / 4


def test_caps_come_before_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda *_, **__: pytest.fail("parsed"))
    with pytest.raises(parser.PromptError, match="larger than 10 bytes"):
        parser.parse(PROMPT, max_bytes=10)


def test_the_catalogue_has_all_its_cases() -> None:
    counts = {family: len(family_cases) for family, family_cases in FAMILIES.items()}
    counts |= {"unreadable": len(UNREADABLE), "moving": len([CHANGED, CUT, REPLACED])}
    names = [case.name for family_cases in FAMILIES.values() for case in family_cases]
    sys.stdout.write(
        f"\ncatalogue: {sum(counts.values())} cases: "
        + ", ".join(f"{n} {f}" for f, n in counts.items())
    )
    assert sum(counts.values()) >= 70
    assert len(names) == len(set(names))
