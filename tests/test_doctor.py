"""The doctor: each thing that can be broken is broken once, and is found, with its remedy and its exit code."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from sam_poll import cli
from sam_poll.doctor import attempt, cards, child, facts, given, inotify, machine, plan, report, run, share, weights
from sam_poll.doctor.findings import Finding, Late, bounded, error_of, error_told, exit_code, looked
from sam_poll.doors.proof import prove
from sam_poll.engines import devices
from sam_poll.engines.estimate import Footprint
from sam_poll.engines.fake import FakeEngine
from sam_poll.engines.memory import Step
from sam_poll.engines.needs import Needs
from sam_poll.errors import DeviceError, ExitCode, ModelError, SamPollError, ShareError
from sam_poll.settings import Settings, load
from sam_poll.types import Logits
from tests.conftest import Share, wait_until
from tests.fake_card import Card

TINY = Footprint(27_219_136, 4_436_450, 69.0, 18.5, 0.0, 256, 4)  # about sam2.1_hiera_tiny
HALF = Step("bfloat16", 64, 8, 1024, "cuda:0")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Away from the checkout's config.yaml, and with no settings from outside."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for name in [n for n in os.environ if n.startswith("SAM_POLL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SAM_POLL_CACHE", str(tmp_path / "models"))


@pytest.fixture
def no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial's process tells nothing."""
    monkeypatch.setattr(child, "run", lambda *_, **__: child.Told())


@pytest.fixture
def proved(share: Share) -> Share:
    """A share with all its folders."""
    prove(share.layout)
    return share


def settings_for(place: Share, **flags: Any) -> Settings:
    return load(None, env={}, flags={"input": place.layout.input, "model": "demo", **flags})


def about(findings: list[Finding], name: str) -> list[Finding]:
    return [finding for finding in findings if finding.name == name]


def the(findings: list[Finding], name: str) -> Finding:
    (found,) = about(findings, name)
    return found


def everything_below(root: Path) -> list[tuple[str, int]]:
    return sorted((p.relative_to(root).as_posix(), p.stat().st_mode) for p in root.rglob("*"))


# ── the whole of it ──


def test_a_healthy_machine_ends_with_0_and_nothing_on_the_share_has_changed(proved: Share, tmp_path: Path) -> None:
    before = everything_below(proved.root)
    picture = tmp_path / "disc.jpg"
    picture.write_bytes(attempt.drawn()[0])
    box = "540,260,1060,780"
    words = ["-m", "demo", "--device", "cpu", "--share", str(proved.root), "--json"]
    words += ["--compare", str(picture), "--box", box, "-o", str(tmp_path / "masks")]
    result = CliRunner().invoke(cli.app, ["doctor", *words])
    told = json.loads(result.stdout)
    assert [f for f in told["findings"] if f["level"] == "problem"] == []
    assert (result.exit_code, told["exit_code"], told["healthy"]) == (0, 0, True)
    assert everything_below(proved.root) == before
    assert {f["section"] for f in told["findings"]} == set(report.SECTIONS)
    stages = ["torch", "torchvision", "device", "import", "read", "config", "build", "to device", "warm-up"]
    stages += ["decode", "resize", "encode", "predict", "mask", "ours", "official load", "official"]
    assert list(told["stages_ms"]) == stages
    assert told["trial"]["iou"] > attempt.FOUND
    assert told["plan"]["taken"] == told["trial"]["step"]
    assert told["compare"]["iou"] > 0.98
    assert told["compare"]["differ_percent"] < 0.5
    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == ["disc.official.png", "disc.ours.png"]


@pytest.mark.parametrize(
    "words",
    [["--box", "1,2,3,4"], ["-o", "masks"], ["--compare", "nothing.jpg"], ["--compare", __file__, "--quick"]],
    ids=" ".join,
)
def test_flags_that_make_no_sense_together_end_with_2(words: list[str]) -> None:
    assert CliRunner().invoke(cli.app, ["doctor", *words]).exit_code == ExitCode.USAGE


@pytest.mark.usefixtures("no_trial")
def test_what_cannot_be_found_out_hides_nothing_else(proved: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    def falls_over() -> None:
        raise KeyError("unforeseen")

    monkeypatch.setattr(machine, "packages", falls_over)
    done = run.examine(run.Wishes(share=proved.layout.input, flags={"model": "demo"}))
    assert "unforeseen" in the(done.findings, "system").what
    assert {"settings", "model", "share"} <= {f.section for f in done.findings}
    assert exit_code(done.findings) is ExitCode.OK


@pytest.mark.usefixtures("no_trial")
def test_a_missing_share_and_a_missing_checkpoint_are_both_told_and_the_share_decides(tmp_path: Path) -> None:
    done = run.examine(run.Wishes(share=tmp_path / "nowhere" / "in", flags={"model": "sam2.1_hiera_tiny"}))
    problems = [f.section for f in done.findings if f.level == "problem"]
    assert problems == ["model", "share"]
    assert exit_code(done.findings) is ExitCode.SHARE
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.usefixtures("no_trial")
def test_without_a_share_in_the_settings_none_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "look", lambda *_: pytest.fail("nobody has named a share"))
    done = run.examine(run.Wishes(flags={"model": "demo"}))
    assert "not looked at" in the(done.findings, "folders").what


# ── findings ──


def test_the_exit_code_is_that_of_the_first_problem_a_daemon_would_meet() -> None:
    sections = ["compare", "trial", "memory", "model", "device", "share", "settings"]
    found = [Finding(section, "x", "problem", "") for section in sections]
    codes = [exit_code(found[:n]) for n in range(1, len(found) + 1)]
    assert codes == [ExitCode.MODEL] * 4 + [ExitCode.DEVICE, ExitCode.SHARE, ExitCode.SETTINGS]
    warnings = [Finding(section, "x", "warning", "") for section in sections]
    assert exit_code(warnings) is ExitCode.OK


def test_what_hangs_is_given_up_and_what_fails_is_raised() -> None:
    import threading

    forever = threading.Event()
    try:
        with pytest.raises(Late):
            bounded(forever.wait, 0.05)
        with pytest.raises(ZeroDivisionError):
            bounded(lambda: 1 / 0, 30)
        assert bounded(lambda: None, 30) is None
    finally:
        forever.set()


def test_our_own_errors_are_problems_and_the_systems_what_the_caller_says() -> None:
    def fails(error: Exception) -> Callable[[], Iterator[Finding]]:
        def look() -> Iterator[Finding]:
            raise error
            yield

        return look

    (own,) = looked("share", "x", fails(ShareError("reason", place="place", remedy="remedy")), 30)
    assert (own.level, own.what, own.where, own.remedy) == ("problem", "reason", "place", "remedy")
    (system,) = looked("share", "x", fails(OSError(5, "Input/output error", "file")), 30, sick="problem")
    assert (system.level, system.where) == ("problem", "file")
    (other,) = looked("share", "x", fails(ValueError("odd")), 30, sick="problem")
    assert other.level == "warning"


@pytest.mark.parametrize("kind", [ModelError, DeviceError, ShareError])
def test_errors_travel_between_processes_with_their_kind(kind: type[SamPollError]) -> None:
    error = kind("reason", place="place", remedy=None)
    back = error_of(json.loads(json.dumps(error_told(error))))
    assert (type(back), str(back)) == (kind, str(error))


# ── settings ──


@pytest.mark.usefixtures("no_trial")
def test_an_unknown_key_is_a_problem_with_its_line_and_the_rest_is_looked_at(proved: Share) -> None:
    Path("config.yaml").write_text("model: demo\nmodle: demo\n")
    done = run.examine(run.Wishes(share=proved.layout.input, flags={"model": "demo"}))
    problem = the(done.findings, "file")
    assert problem.level == "problem"
    assert "line 2" in (problem.where or "")
    assert "model" in (problem.remedy or "")
    assert the(done.findings, "rename").level == "ok"
    assert exit_code(done.findings) is ExitCode.SETTINGS


def test_values_show_what_matters_and_what_is_not_as_by_default_and_no_secret() -> None:
    env = {"SAM_POLL_WATCH__RESCAN_S": "3", "SAM_POLL_SERVE_TOKEN": "secret", "PATH": "/bin"}
    settings, named, found = given.look(None, {"model": "demo"}, env)
    assert settings.watch.rescan_s == 3
    assert not named
    text = the(found, "values").what
    assert "model=demo" in text
    assert "watch.rescan_s=3.0" in text
    assert "attempts" not in text
    assert "secret" not in str(found)
    assert the(found, "environment").what == "SAM_POLL_SERVE_TOKEN, SAM_POLL_WATCH__RESCAN_S"


def test_a_flag_that_is_wrong_leaves_the_defaults_to_look_with() -> None:
    settings, _, found = given.look(None, {"device": "toaster"}, {})
    assert settings.device == "auto"
    assert found[0].exit_code is ExitCode.SETTINGS


# ── model ──


def test_a_checkpoint_that_is_not_there_is_a_problem_and_the_remedy_downloads_it() -> None:
    found = weights.look(load(None, env={}, flags={"model": "sam2.1_hiera_tiny"}))
    problem = the(found, "checkpoint")
    assert problem.exit_code is ExitCode.MODEL
    assert "models download sam2.1_hiera_tiny" in (problem.remedy or "")


def test_a_checkpoint_that_is_not_as_published_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "sam2.1_hiera_tiny.pt").write_bytes(b"other weights")
    found = weights.look(load(None, env={}, flags={"model": "sam2.1_hiera_tiny"}))
    assert "the catalogue's is 148.8 MiB" in the(found, "checkpoint").what
    assert the(found, "SHA-256").exit_code is ExitCode.MODEL


def test_own_weights_have_no_known_hash_and_that_is_fine(tmp_path: Path) -> None:
    (tmp_path / "mine.pt").write_bytes(b"weights")
    found = weights.look(load(None, env={}, flags={"model": str(tmp_path / "mine.pt")}))
    assert {f.level for f in found} == {"ok"}
    assert "none is known" in the(found, "SHA-256").what


def test_a_checkpoint_that_cannot_be_read_to_its_end_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    forever = threading.Event()
    monkeypatch.setattr(weights.catalog, "verify", lambda _: forever.wait())
    found = weights.look(load(None, env={}, flags={"model": "demo"}), limit_s=0.3)
    forever.set()
    assert the(found, "hash").level == "warning"


# ── share ──


def test_a_share_as_it_should_be_has_only_good_findings(proved: Share) -> None:
    found = share.look(settings_for(proved))
    assert {f.level for f in found if f.name not in ("inotify", "free space")} == {"ok"}
    names = ["folders", "file system", "new files", "inotify", "rename", "free space", "clock", "daemons"]
    assert [f.name for f in found] == names


def test_a_share_is_named_by_its_input_folder_or_the_one_above(proved: Share) -> None:
    assert share.input_of(proved.root) == proved.layout.input
    assert share.input_of(proved.layout.input) == proved.layout.input
    assert share.input_of(proved.root / "nothing") == proved.root / "nothing"


def test_folders_that_are_missing_are_not_made(share_without_folders: Share) -> None:
    found = share.look(settings_for(share_without_folders))
    assert [p.name for p in share_without_folders.root.iterdir()] == ["in"]
    assert list(share_without_folders.layout.input.iterdir()) == []
    assert "work, output, done, failed" in the(found, "folders").what.replace("not made yet: ", "")
    assert {f.level for f in found if f.name in ("folders", "rename")} == {"ok"}


@pytest.fixture
def share_without_folders(share: Share) -> Share:
    return share


def refuse(monkeypatch: pytest.MonkeyPatch, method: str, number: int, where: Callable[[Path], bool]) -> None:
    """`Path.method` fails with this errno for some paths."""
    real = getattr(Path, method)

    def refusing(self: Path, *arguments: Any, **keywords: Any) -> Any:
        if where(self):
            raise OSError(number, os.strerror(number), str(self))
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(Path, method, refusing)


def test_a_share_that_cannot_be_written_to_is_a_problem(proved: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    refuse(monkeypatch, "write_bytes", errno.EROFS, lambda path: path.parent == proved.layout.input)
    found = share.look(settings_for(proved))
    problem = the(found, "rename")
    assert (problem.exit_code, problem.where) == (ExitCode.SHARE, str(proved.layout.input))
    assert "Read-only" in problem.what
    assert about(found, "daemons"), "the looks after it are still made"


def test_a_mount_without_writing_is_named(proved: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    class ReadOnly:
        f_flag, f_files, f_favail = os.ST_RDONLY, 1, 1

    monkeypatch.setattr(os, "statvfs", lambda path: ReadOnly if path == proved.layout.output else real(path))
    problem = the(share.look(settings_for(proved)), "file system")
    assert problem.exit_code is ExitCode.SHARE
    assert "read-only: output" in problem.what


def test_folders_on_different_file_systems_are_a_problem(proved: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    refuse(monkeypatch, "rename", errno.EXDEV, lambda path: path.parent == proved.layout.output)
    problem = the(share.look(settings_for(proved)), "rename")
    assert problem.exit_code is ExitCode.SHARE
    assert "different file systems" in problem.what
    assert "one mount" in (problem.remedy or "")


def test_a_share_that_hangs_is_a_problem_and_nothing_further_is_looked_at(
    proved: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    forever = threading.Event()
    monkeypatch.setattr(share, "file_system", lambda _: forever.wait())
    found = share.look(settings_for(proved), limit_s=0.3)
    forever.set()
    assert [(f.name, f.level) for f in found] == [("folders", "ok"), ("file system", "problem")]
    assert "hangs" in found[-1].what
    assert found[-1].exit_code is ExitCode.SHARE


@pytest.mark.parametrize(
    ("kind", "mode", "level", "words"),
    [
        ("ext4", "auto", "ok", "events of ext4"),
        ("nfs4", "auto", "ok", "polling, a look every 10 s: nfs4 tells nobody"),
        ("ext4", "poll", "ok", "polling, a look every 10 s: watch.mode says so"),
        ("cifs", "events", "warning", "events, but cifs has none"),
    ],
)
def test_how_new_files_are_noticed_is_told_with_the_reason(
    proved: Share, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str, level: str, words: str
) -> None:
    monkeypatch.setattr(share, "file_system", lambda _: kind)
    monkeypatch.setattr("sam_poll.app.file_system", lambda _: kind)
    found = the(share.look(settings_for(proved, **{"watch.mode": mode})), "new files")
    assert found.level == level
    assert words in found.what


def test_inotify_that_is_used_up_is_a_warning_with_the_sysctl(proved: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inotify, "read", lambda: inotify.Inotify(8192, 128, 9, 128))
    found = the(share.look(settings_for(proved, **{"watch.mode": "events"})), "inotify")
    assert (found.level, found.remedy) == ("warning", "sysctl -w fs.inotify.max_user_instances=256")
    both = inotify.finding(inotify.Inotify(10, 10, 10, 10), 10)
    assert both.remedy == "sysctl -w fs.inotify.max_user_instances=20 fs.inotify.max_user_watches=20"


def test_inotify_is_counted_for_this_user_only(tmp_path: Path) -> None:
    limits = tmp_path / "sys" / "fs" / "inotify"
    limits.mkdir(parents=True)
    (limits / "max_user_watches").write_text("100\n")
    (limits / "max_user_instances").write_text("7\n")
    for process, target in (("12", "anon_inode:inotify"), ("13", "/dev/null"), ("self", "anon_inode:inotify")):
        (tmp_path / process / "fd").mkdir(parents=True)
        (tmp_path / process / "fdinfo").mkdir()
        (tmp_path / process / "fd" / "3").symlink_to(target)
        (tmp_path / process / "fdinfo" / "3").write_text("pos: 0\ninotify wd:2 ino:1\ninotify wd:1 ino:2\n")
    assert inotify.read(tmp_path, os.getuid()) == inotify.Inotify(100, 7, 2, 1)
    assert inotify.read(tmp_path, os.getuid() + 1) == inotify.Inotify(100, 7, 0, 0)
    assert inotify.read(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("free", "level"), [(0, "problem"), (500 * 2**20, "warning"), (50 * 2**30, "ok")])
def test_little_space_is_a_warning_and_none_a_problem(
    proved: Share, monkeypatch: pytest.MonkeyPatch, free: int, level: str
) -> None:
    import shutil

    real = shutil.disk_usage(proved.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=free))
    (found,) = {f.level for f in about(share.look(settings_for(proved)), "free space")}
    assert found == level


@pytest.mark.parametrize(("ahead", "words"), [(3600, "3,600 s ahead of"), (-3600, "3,600 s behind")])
def test_a_clock_that_is_wrong_is_a_warning(
    proved: Share, monkeypatch: pytest.MonkeyPatch, ahead: int, words: str
) -> None:
    real = time.time
    monkeypatch.setattr(share.time, "time", lambda: real() - ahead)
    found = the(share.look(settings_for(proved)), "clock")
    assert found.level == "warning"
    assert words in found.what
    assert proved.tree("input") == []


def test_daemons_at_work_are_counted_and_their_alarms_told(proved: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    alarm = {"kind": "output", "message": "disk full\x1b[2J", "seconds": 3}
    said = {
        "a": {"worker": "a", "alive": True, "lease_s": 60.0, "alarms": [alarm]},
        "b": {"worker": "b", "alive": True, "lease_s": 30},
        "c": {"worker": "c", "alive": False},
    }
    monkeypatch.setattr(share.lease, "workers", lambda _: [(name, proved.root) for name in said])
    monkeypatch.setattr(share.lease, "read", lambda name, *_: said[name])
    counted, alarmed, leased = about(share.look(settings_for(proved)), "daemons")
    assert counted.what == "2 daemons at work, 1 dead"
    assert (alarmed.level, alarmed.where) == ("warning", "a")
    assert "\x1b" not in alarmed.what
    assert (leased.level, leased.where) == ("warning", "b")


# ── machine ──


@pytest.mark.parametrize(
    ("release", "levels"),
    [
        ("6.8.0-45-generic", []),
        ("5.15.153.1-microsoft-standard-WSL2", ["ok"]),
        ("4.4.0-19041-Microsoft", ["warning"]),
    ],
)
def test_wsl_is_told_by_its_kernel(release: str, levels: list[str]) -> None:
    assert [finding.level for finding in machine.wsl(release)] == levels


def test_the_tightest_limit_of_all_groups_above_counts(tmp_path: Path) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "cpu.max").write_text("max 100000\n")
    (inner / "memory.max").write_text(f"{4 * 2**30}\n")
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    (inner.parent / "memory.max").write_text(f"{2**30}\n")
    (inner.parent / "memory.current").write_text(f"{2**29}\n")
    (tmp_path / "own").write_text("1:name=systemd:/x\n0::/outer/inner\n")
    limits = machine.Limits.read(tmp_path, tmp_path / "own")
    assert limits == machine.Limits(1.5, 1024.0, 512.0)
    (tmp_path / "meminfo").write_text("MemTotal: 9999999 kB\nMemAvailable: 8388608 kB\n")
    assert machine.available_mib(limits, tmp_path / "meminfo") == 512.0
    assert machine.available_mib(machine.Limits(), tmp_path / "meminfo") == 8192.0
    assert machine.available_mib(machine.Limits(), tmp_path / "nothing") is None


def test_limits_of_control_groups_version_1_are_read_and_no_limit_is_none(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "memory").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("200000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert machine.Limits.read(tmp_path, tmp_path / "own") == machine.Limits(2.0)
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert machine.Limits.read(tmp_path, tmp_path / "own") == machine.Limits()


def test_more_threads_than_cores_are_a_warning_and_a_library_that_sets_them_too() -> None:
    many = {"threads": 64, "changed": {"OMP_NUM_THREADS": [None, "1"]}}
    first, second = machine.threads(many, machine.Limits(cores=1.0), {"OMP_NUM_THREADS": "64"})
    assert (first.level, second.level) == ("warning", "warning")
    assert "yours: OMP_NUM_THREADS=64" in first.what
    assert "OMP_NUM_THREADS=1" in (first.remedy or "")
    assert "OMP_NUM_THREADS from nothing to 1" in second.what
    (fine,) = machine.threads({"threads": 1}, machine.Limits(), {})
    assert "is set; sam-poll leaves them as they are" in fine.what


def test_what_is_not_installed_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2", "torchvision": "1", "numpy": "2", "segment-anything": "1"}
    monkeypatch.setattr(machine, "_version", versions.get)
    _, missing = machine.packages()
    assert (missing.exit_code, missing.what) == (ExitCode.MODEL, "not installed: sam2, opencv-python-headless")
    monkeypatch.setattr(machine, "_version", lambda name: "1")
    assert [finding.level for finding in machine.packages()] == ["ok", "warning"]


def test_little_main_memory_is_a_warning() -> None:
    levels = [machine.memory(machine.Limits(), mib).level for mib in (500.0, 9000.0)]
    assert levels == ["warning", "ok"]


# ── device ──


@pytest.fixture
def pascal(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A GTX 1050 Ti, and the torch of this machine said to be built for newer ones."""
    import torch

    told: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_name": lambda _: "GTX 1050 Ti",
        "get_device_capability": lambda _: (6, 1),
        "get_arch_list": lambda: ["sm_75", "sm_90"],
        "mem_get_info": lambda _: (3 * 2**30, 4 * 2**30),
    }
    for name, answer in told.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return


@pytest.mark.usefixtures("pascal")
def test_a_card_that_torch_was_not_built_for_is_a_problem_with_the_right_build() -> None:
    gathered = json.loads(json.dumps(facts.gather({}, {})))
    problem = the(list(cards.look(gathered, None, ["auto"])), "cuda:0")
    assert (problem.level, problem.exit_code) == ("problem", ExitCode.DEVICE)
    assert "compute capability 6.1" in problem.what
    assert "cu126" in (problem.remedy or "")
    unwanted = the(list(cards.look(gathered, None, ["cpu"])), "cuda:0")
    assert unwanted.level == "warning"


@pytest.mark.usefixtures("pascal")
def test_a_card_that_fits_is_told_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_61"])
    gathered = facts.gather({}, {})
    found = the(list(cards.look(gathered, None, ["cuda:0"])), "cuda:0")
    assert found.level == "ok"
    assert "3,072 of 4,096 MiB free, runs in float32" in found.what
    (missing,) = [f for f in cards.look(gathered, None, ["cuda:1"]) if f.name == "cuda:1"]
    assert missing.exit_code is ExitCode.DEVICE
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 4 * 2**30))
    full = the(list(cards.look(facts.gather({}, {}), None, ["cuda"])), "cuda:0")
    assert full.level == "warning"


@pytest.mark.usefixtures("pascal")
def test_a_driver_that_fails_in_the_middle_of_a_question_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def fails(_: int) -> None:
        raise RuntimeError("CUDA error: unknown error\nand more")

    monkeypatch.setattr(torch.cuda, "get_device_capability", fails)
    problem = the(list(cards.look(facts.gather({}, {}), None, ["auto"])), "cuda:0")
    assert problem.exit_code is ExitCode.DEVICE
    assert "unknown error" in problem.what


def test_without_a_card_the_cpu_is_fine_unless_a_card_was_asked_for() -> None:
    none = {"torch": "2", "cuda": None, "cards": []}
    assert the(list(cards.look(none, None, ["auto"])), "card").level == "ok"
    asked = the(list(cards.look(none, None, ["cuda:0"])), "card")
    assert asked.exit_code is ExitCode.DEVICE
    smi = [{"name": "RTX 4090", "driver": "550.54", "total_mib": "24564"}]
    cpu_build = the(list(cards.look(none, smi, ["auto"])), "card")
    assert (cpu_build.level, "without CUDA" in cpu_build.what) == ("warning", True)
    old = {"torch": "2", "cuda": "13.2", "cards": [], "warnings": ["The NVIDIA driver on your system is too old"]}
    too_old = the(list(cards.look(old, smi, ["cuda"])), "card")
    assert (too_old.exit_code, "too old" in too_old.what) == (ExitCode.DEVICE, True)


def test_the_drivers_word_is_read_and_waited_for_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 550.54.15, 81559'\n")
    program.chmod(0o755)
    assert cards.nvidia_smi() == [{"name": "NVIDIA H100 80GB HBM3", "driver": "550.54.15", "total_mib": "81559"}]
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    assert cards.nvidia_smi(limit_s=0.3) is None
    program.write_text("#!/bin/sh\nexit 9\n")
    assert cards.nvidia_smi() == []


@pytest.mark.parametrize(("number", "version"), [(8902, "8.9.2"), (91002, "9.10.2"), (92600, "9.26.0")])
def test_the_number_of_cudnn_is_read_as_a_version(number: int, version: str) -> None:
    told = list(cards.look({"torch": "2", "cuda": "13", "cudnn": number, "cards": []}, None, ["auto"]))
    assert f"cuDNN {version}" in the(told, "build").what


# ── memory ──


def planned(capacity_mib: float, taken: Step = HALF) -> dict[str, Any]:
    needs, reading = Needs(TINY), Card(capacity_mib, reserve_mib=256).read()
    return plan.told(HALF, taken, needs, min_side=256, half="bfloat16", reading=reading)


def test_the_plan_tells_what_each_step_needs_and_which_fit() -> None:
    large, small = planned(4096), planned(420)
    assert [row["step"] for row in large["steps"]] == [
        "bfloat16 1024 on cuda:0",
        "bfloat16 768 on cuda:0",
        "bfloat16 512 on cuda:0",
        "bfloat16 256 on cuda:0",
        "float32 1024 on cpu",
    ]
    assert all(row["fits"] for row in large["steps"])
    assert [row["fits"] for row in small["steps"]] != [True] * 5
    assert small["steps"][-1]["fits"]
    needed = [row["encode_mib"] for row in large["steps"][:4]]
    assert needed == sorted(needed, reverse=True)


def test_the_best_step_is_fine_and_a_lower_one_a_warning() -> None:
    assert plan.finding(planned(4096), 8000).level == "ok"
    lower = plan.finding(planned(420, Step("bfloat16", 64, 8, 512, "cuda:0")), 8000)
    assert lower.level == "warning"
    assert "bfloat16 1024" in lower.what
    assert "164 MiB could be had" in lower.what
    assert plan.finding(planned(420, Step("float32", 1, 1, 1024, "cpu")), 8000).level == "warning"


def test_on_a_cpu_main_memory_is_what_counts() -> None:
    step = Step("float32", 1, 1, 1024, "cpu")
    told = plan.told(step, step, Needs(TINY), min_side=256, half=None, reading=None)
    assert [plan.finding(told, mib).level for mib in (100.0, 8000.0, None)] == ["warning", "ok", "ok"]


# ── trial ──


class Odd(FakeEngine):
    """Answers with logits of one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def decode(self, *arguments: Any) -> list[Logits]:
        return [Logits(np.full_like(m.pixels, self.value), m.score, m.frame) for m in super().decode(*arguments)]


def tried(engine: FakeEngine) -> Finding:
    told: list[str] = []
    stages = run.child.Told()

    def stage(name: str, then: Callable[[], object] = lambda: None) -> Any:
        import contextlib

        told.append(name)
        return contextlib.nullcontext()

    found = json.loads(json.dumps(attempt.predict(engine, stage)))
    assert told == ["decode", "resize", "encode", "predict", "mask"]
    assert stages.trouble is None
    return attempt.finding(found)


def test_a_network_that_finds_the_disc_is_fine() -> None:
    assert tried(FakeEngine(side=1024)).level == "ok"


def test_a_network_that_finds_something_else_is_a_warning() -> None:
    assert tried(Odd(-1.0)).level == "warning"


@pytest.mark.filterwarnings("ignore:invalid value")
def test_a_network_that_answers_no_numbers_is_a_problem_of_the_device() -> None:
    found = tried(Odd(float("nan")))
    assert found.exit_code is ExitCode.DEVICE
    assert "float32" in (found.remedy or "")


def ran(code: str, limit_s: float = 60.0) -> child.Told:
    return child.run(load(None, env={}, flags={"model": "demo"}), limit_s=limit_s, code=code)


STEP = "import json; print(json.dumps({'stage': 'build'}), flush=True); "


def test_a_trial_that_hangs_is_ended_and_its_stage_named() -> None:
    seen: list[str] = []
    code = STEP + "import threading; threading.Event().wait()"
    told = child.run(load(None, env={}, flags={}), limit_s=1.0, code=code, on_stage=seen.append)
    assert told.trouble == "hangs in stage `build`: nothing for 1 s"
    assert seen == ["build"]


@pytest.mark.parametrize(
    ("end", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "by the kernel if memory ran out"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "does not suit the processor"),
        ("import sys; sys.exit('last words')", "exit code 1 (last words)"),
        ("import sys; sys.exit('a\\nloading demo hangs in stage `build` (limit)\\nFile\\nb\\nc\\nd')", "(loading demo"),
    ],
)
def test_a_trial_that_dies_is_told_with_its_stage_and_its_end(end: str, words: str) -> None:
    told = ran(STEP + end)
    assert "ended in stage `build`" in (told.trouble or "")
    assert words in (told.trouble or "")
    finding = run._failed(told, load(None, env={}, flags={}))
    assert finding
    assert finding.exit_code is ExitCode.MODEL


def test_a_checkpoint_that_is_none_is_the_trials_problem(tmp_path: Path) -> None:
    """The weights are there, and their hash is not known: only the load can tell."""
    (tmp_path / "mine.pt").write_bytes(b"not weights")
    done = run.examine(run.Wishes(flags={"model": str(tmp_path / "mine.pt"), "device": "cpu"}))
    (problem,) = [f for f in done.findings if f.level == "problem"]
    assert (problem.section, problem.name, problem.exit_code) == ("trial", "read", ExitCode.MODEL)
    assert "cut short" in problem.what
    assert {"torch", "torchvision", "device"} <= set(done.ms)


def test_a_comparison_that_fails_does_not_make_the_machine_ill() -> None:
    told = child.Told(trial={"step": "x"}, stage="official", error={"reason": "out of memory", "exit_code": 1})
    finding = run._failed(told, load(None, env={}, flags={}))
    assert finding
    assert (finding.section, finding.level) == ("compare", "warning")


def test_what_the_loader_logs_is_understood_as_its_stages() -> None:
    """The times of a load come from its log: here the words must be those that are looked for."""
    from sam_poll.doctor.trial import Stages
    from sam_poll.engines.loader import Stages as Loader

    events: list[dict[str, Any]] = []
    read: list[bool] = []
    with Stages(lambda **event: events.append(event)).of_the_loader(lambda: read.append(True)):
        loader = Loader("name: odd …", 60, None)
        for name in ("import", "to device", "read"):
            with loader.stage(name):
                assert read == ([True] if name == "read" else [])
    assert [event.get("stage") or event["took"] for event in events] == [
        name for name in ("import", "to device", "read") for _ in range(2)
    ]


# ── report ──


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_report_says_everything_at_any_width(width: int) -> None:
    findings = [
        Finding("share", "rename", "problem", "words " * 20, "/a/long/path", "do this"),
        Finding("trial", "load", "ok", "fine\x1b[2J"),
    ]
    console = Console(width=width, record=True, file=io.StringIO())
    report.show(findings, {"torch": 1234.5, "read": 3.2}, console)
    text = console.export_text()
    assert text.split().count("words") == 20
    for word in ("problem", "rename", "/a/long/path", "→", "1,234", "not", "healthy:", "75"):
        assert word in text
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= width


def test_json_has_every_finding_and_the_sum() -> None:
    findings = [Finding("device", "card", "problem", "x", "y", "z"), Finding("trial", "load", "warning", "w")]
    told = json.loads(report.as_json(findings, {"torch": 1.25}, {"device": {"torch": "2"}}))
    assert (told["healthy"], told["exit_code"]) == (False, 70)
    assert told["counts"] == {"ok": 0, "warning": 1, "problem": 1}
    assert told["findings"][0]["remedy"] == "z"
    assert told["device"] == {"torch": "2"}


def test_the_device_of_the_plan_is_read_as_the_daemon_would_choose_it() -> None:
    assert attempt.reading(load(None, env={}, flags={"device": "cpu"})) is None
    assert devices.choose("cpu", "auto").half is None
    wait_until(lambda: attempt.waiter("cpu")() is None)
