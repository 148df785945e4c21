"""Sick surroundings, each a function that runs daemons over a fresh share below `root` and raises
ChaosError.

A full disk, a share that goes read-only or away, folders that are removed, a job that kills its
process, a device that fails. Those that mount (`MOUNTING`) need root; `cannot_mount` says why not.

Limitations: a run that is killed in the middle leaves its mounts below `root`
behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.chaos_daemon import MAGENTA
from tools.chaos_jobs import File, drop_pair, key_of, pair
from tools.chaos_share import (
    ChaosError,
    Daemon,
    at_work,
    broken,
    files_below,
    judge,
    located,
    new_share,
    temporaries,
    wait_for,
)

_WRAPPED = "tools.chaos_daemon"
_FEW = 6


# ── mounts ──


def mount(*arguments: object) -> None:
    """`mount`; OSError says what it said."""
    done = subprocess.run(
        ["mount", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OSError(done.stderr.strip() or "mount failed")


def unmount(path: Path) -> None:
    """Take one mount away, also one that is in use."""
    subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


def cannot_mount() -> str | None:
    """Why the mounting scenarios cannot run here; None: they can."""
    if os.geteuid():
        return "mounting needs root"
    with tempfile.TemporaryDirectory(prefix="sam_poll-chaos-") as folder:
        try:
            mount("-t", "tmpfs", "-o", "size=64k", "none", folder)
        except OSError as error:
            return f"nothing can be mounted here: {error}"
        unmount(Path(folder))
    return None


@contextlib.contextmanager
def _disk(root: Path, size: str) -> Iterator[tuple[Path, Path]]:
    """A small tmpfs: (where it stays mounted, `root/share`, where it is mounted too and can be
    taken away).
    """
    below, share = root / "disk", root / "share"
    for folder in (below, share, root / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    mount("-t", "tmpfs", "-o", f"size={size}", "none", below)
    try:
        (below / "in").mkdir()
        mount("--bind", below, share)
        yield below, share
    finally:
        for _ in range(3):
            unmount(share)
        unmount(below)


# ── what all of them look at ──


def _answered(share: Path, files: list[File]) -> Callable[[], bool]:
    """Whether all these files have ended where they must, and nothing is left over."""

    def look() -> bool:
        places = located(share)
        ended = all(
            [p.split("/")[0] in f.ends for p in places.get(f.key, [])] == [True] for f in files
        )
        return ended and not at_work(share) and not temporaries(share)

    return look


def _alarmed(daemon: Daemon, *words: str) -> Callable[[], bool]:
    """Whether one of these words stands in an alarm of the daemon's log."""

    def look() -> bool:
        if not daemon.alive:
            raise ChaosError(f"the daemon ended with {daemon.process.returncode}: {daemon.tail()}")
        return any(daemon.says(word) for word in words)

    return look


def _whole(share: Path) -> None:
    for path in files_below(share / "out"):
        if fault := broken(path, path.read_bytes()):
            raise ChaosError(f"{path}: {fault}")


def _finish(daemon: Daemon, share: Path, files: list[File]) -> None:
    """Wait for all answers, stop the daemon, and hold the share to everything."""
    wait_for(_answered(share, files), f"all is answered\n{daemon.tail(12)}", 90, every=0.1)
    daemon.stop()
    daemon.lines()
    judge(share, files).hold()


# ── a sick share ──


def full_disk(root: Path) -> None:
    """The disk is full: answers wait with an alarm, nothing fails, and all goes on once there is
    room.
    """
    with _disk(root, "2m") as (disk, share):
        files = drop_pair(share, "first", 1)
        with Daemon(share) as daemon:
            wait_for(_answered(share, files), "the first is answered")
            waiting = [file for n in range(_FEW) for file in pair(f"cam1/full{n}", 100 + n)]
            for n, file in enumerate(waiting):
                (disk / f"aside{n}").write_bytes(file.body)
            (disk / "in/cam1").mkdir()
            _fill(disk / "filler")
            for n, file in enumerate(waiting):
                (disk / f"aside{n}").rename(disk / "in" / file.name)
            wait_for(
                _alarmed(daemon, "alarm (output)", "alarm (share)", "alarm (lease)"),
                "an alarm tells of it",
            )
            _none_failed(share, waiting)
            _whole(share)
            if any(path.stem.startswith("full") for path in files_below(share / "out")):
                raise ChaosError("there was room for an answer on a full disk")
            (disk / "filler").unlink()
            _finish(daemon, share, files + waiting)
            wait_for(lambda: daemon.says("is over after"), "the alarm ends", 1)


def _fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file:
        for size in (65536, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\0" * size)


def _none_failed(share: Path, files: list[File]) -> None:
    keys = {file.key for file in files}
    wrong = [
        p
        for key, found in located(share).items()
        for p in found
        if key in keys and p.startswith("failed/")
    ]
    if wrong:
        raise ChaosError(f"the surroundings are sick, and jobs were failed for it: {wrong}")


def read_only(root: Path) -> None:
    """The share becomes read-only while jobs come: an alarm, no job fails, and all goes on when it
    can be written.
    """
    with _disk(root, "8m") as (disk, share):
        files = drop_pair(share, "first", 1)
        with Daemon(share) as daemon:
            wait_for(_answered(share, files), "the first is answered")
            with _cannot_write(disk, share):
                # Others can write: it is this machine's mount that is ill.
                for n in range(_FEW):
                    files += drop_pair(disk, f"ill{n}", 200 + n)
                wait_for(_alarmed(daemon, "alarm ("), "an alarm tells of it")
                _none_failed(share, files)
            _finish(daemon, share, files)
            wait_for(lambda: daemon.says("is over after"), "the alarm ends", 1)


@contextlib.contextmanager
def _cannot_write(disk: Path, share: Path) -> Iterator[None]:
    """`share` is read-only within this. A mount with files open for writing refuses that, so it
    gets one on top.
    """
    mount("--bind", disk, share)
    mount("-o", "remount,bind,ro", share)
    try:
        yield
    finally:
        unmount(share)


def share_away(root: Path) -> None:
    """The share is unmounted and comes back; the bare folder below it, with decoys in it, is left
    as it is.
    """
    _away(root, {})


def share_away_with_sentinel(root: Path) -> None:
    """The same where the setting `sentinel` is used."""
    _away(root, {"sentinel": root / "share/is-the-share"})


def _away(root: Path, more: dict[str, Any]) -> None:
    with _disk(root, "8m") as (disk, share):
        unmount(share)
        decoys = _decoys(share)
        before = _picture_of(share)
        mount("--bind", disk, share)
        (disk / "is-the-share").touch()
        files = drop_pair(share, "first", 1)
        with Daemon(share, **more) as daemon:
            wait_for(_answered(share, files), "the first is answered")
            unmount(share)
            for n in range(_FEW):
                files += drop_pair(disk, f"away{n}", 300 + n)
            wait_for(_alarmed(daemon, "alarm (share)"), "the scan's alarm tells of it")
            wait_for(
                _alarmed(daemon, "alarm (lease)"), "the alarm of the signs of life tells of it"
            )
            if _picture_of(share) != before:
                raise ChaosError(f"the bare folder was touched: {before} → {_picture_of(share)}")
            mount("--bind", disk, share)
            _finish(daemon, share, files)
        unmount(share)
        if _picture_of(share) != before:
            raise ChaosError(f"the bare folder was touched: {before} → {_picture_of(share)}")
        if any(file.key in located(disk) for file in decoys):
            raise ChaosError("a decoy came onto the share")


def _decoys(folder: Path) -> list[File]:
    """A pair that looks like a job, and all five folders, below an unmounted share."""
    for name in ("in", "work", "out", "done", "failed"):
        (folder / name).mkdir()
    files = pair("decoy", 7)
    for file in files:
        (folder / "in" / file.name).write_bytes(file.body)
    return files


def _picture_of(folder: Path) -> list[tuple[str, str]]:
    """All files and folders and their contents."""
    return sorted(
        (str(p.relative_to(folder)), key_of(p.read_bytes()) if p.is_file() else "")
        for p in folder.rglob("*")
    )


def started_away(root: Path) -> None:
    """A daemon that starts while the share is not mounted ends with 75, and leaves the bare folder
    as it is.
    """
    with _disk(root, "8m") as (disk, share):
        unmount(share)
        _decoys(share)
        before = _picture_of(share)
        (disk / "is-the-share").touch()
        with Daemon(share, sentinel=share / "is-the-share") as daemon:
            daemon.ended(75)
        if _picture_of(share) != before:
            raise ChaosError(f"the bare folder was touched: {before} → {_picture_of(share)}")


def folders_removed(root: Path) -> None:
    """`in/`, then a subfolder of it, is removed and made again while the daemon runs: it goes
    on.
    """
    share = new_share(root)
    files = drop_pair(share, "first", 1)
    with Daemon(share) as daemon:
        wait_for(_answered(share, files), "the first is answered")
        shutil.rmtree(share / "in")
        wait_for(_alarmed(daemon, "alarm (share)", "alarm (read)"), "an alarm tells of it")
        (share / "in").mkdir()
        files += drop_pair(share, "second", 2) + drop_pair(share, "cam1/third", 3)
        wait_for(
            _answered(share, files), f"all is answered after in/ was away\n{daemon.tail()}", 90
        )
        shutil.rmtree(share / "in/cam1")
        files += drop_pair(share, "cam1/fourth", 4)
        wait_for(_answered(share, files), "all is answered after cam1/ was away", 90)
        for folder in ("out", "done", "failed"):
            shutil.rmtree(share / folder)
        last = drop_pair(share, "cam1/fifth", 5)
        _finish(daemon, share, last)


# ── a sick job, a sick device ──


def poison(root: Path, attempts: int = 3) -> int:
    """A job that kills its process ends in failed/ after `attempts` runs; all others are answered.
    Returns the runs.
    """
    share, tally = new_share(root), root / "tally"
    tally.touch()
    files = [file for n in range(_FEW) for file in drop_pair(share, f"good{n}", 400 + n)]
    bad = pair("bad", 9, end="failed", colour=MAGENTA)
    for file in bad:
        (share / "in" / file.name).write_bytes(file.body)
    files += bad + [file for n in range(_FEW) for file in drop_pair(share, f"more{n}", 500 + n)]
    done = _answered(share, files)
    for _ in range(2 * attempts + 2):
        with Daemon(share, module=_WRAPPED, attempts=attempts, CHAOS_POISON=tally) as daemon:
            while daemon.alive and not done():
                time.sleep(0.1)
            if done():
                daemon.stop()
                break
            daemon.ended(-signal.SIGABRT)
            daemon.killed = True
            daemon.lines()
    else:
        raise ChaosError(
            f"the poisonous job was run {len(tally.read_text().splitlines())} times: "
            f"{daemon.tail()}"
        )
    judge(share, files).hold()
    reasons = [
        path.read_text() for path in files_below(share / "failed") if path.name == "bad.error.json"
    ]
    if len(reasons) != 1 or '"code": "poison"' not in reasons[0]:
        raise ChaosError(f"its reason is not poison: {reasons}")
    runs = len(tally.read_text().splitlines())
    if runs != attempts:
        raise ChaosError(f"the poisonous job was run {runs} times, not {attempts}")
    return runs


def device_error(root: Path) -> None:
    """The device fails: exit 70, the job stays claimed, and the next daemon answers it."""
    share = new_share(root)
    files = [file for n in range(3) for file in drop_pair(share, f"job{n}", 600 + n)]
    with Daemon(share, module=_WRAPPED, CHAOS_DEVICE=root / "has-failed") as daemon:
        daemon.ended(70)
    places = located(share)
    if not any(p.startswith("work/") for file in files for p in places.get(file.key, [])):
        raise ChaosError(f"no job stayed claimed: {places}")
    _none_failed(share, files)
    with Daemon(share, module=_WRAPPED, CHAOS_DEVICE=root / "has-failed") as daemon:
        _finish(daemon, share, files)


PLAIN = {f.__name__: f for f in (folders_removed, poison, device_error)}
MOUNTING = {
    f.__name__: f
    for f in (full_disk, read_only, share_away, share_away_with_sentinel, started_away)
}


def main() -> int:
    """Run all that can run here; 0 if all were survived."""
    faults, why = 0, cannot_mount()
    for name, scenario in {**PLAIN, **MOUNTING}.items():
        if name in MOUNTING and why:
            print(f"{name}: left out, {why}")
            continue
        root, started = Path(tempfile.mkdtemp(prefix="sam_poll-chaos-")), time.monotonic()
        try:
            scenario(root)
        except ChaosError as error:
            faults += 1
            print(f"{name}: {error}\n  everything lies in {root}")
        else:
            shutil.rmtree(root)
            print(f"{name}: survived, {time.monotonic() - started:.0f} s", flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
