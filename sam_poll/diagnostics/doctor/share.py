"""Checks of the share: file system, events or polling, a rename through all folders, daemons.

The share is not changed, except for the probe file of `mount_check`, and only if all folders exist.

Limitations: a share that hangs blocks a thread of this process until it answers. If the process is
killed during the rename test, an empty probe file stays; no source takes it for a job, and the next
test removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from uuid import uuid4

from loguru import logger

from sam_poll.config.settings import Settings, absolute
from sam_poll.core.errors import ShareError
from sam_poll.core.files import remedy_of
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.diagnostics.doctor import inotify
from sam_poll.diagnostics.doctor.findings import CheckTimeout, Finding, run_check
from sam_poll.runtime.builders import folder_options_of, layout_of
from sam_poll.runtime.console import alarms_of, count
from sam_poll.share.claims import liveness
from sam_poll.share.intake.events import file_system, is_network
from sam_poll.share.layout import Layout
from sam_poll.share.mount_check import PROBE, SENTINEL, check_folders, world_writable_warning

LIMIT_S = 20.0  # for each check: a hanging NFS mount answers after minutes, or never
SKEW_S = 10.0  # a share's times are shown to people only (`status`); FAT's are 2 s wide
GIB = 2**30
_LITTLE = 1 * GIB  # bytes free; below, some thousand answers of 20 megapixels do not fit any more
_NOTHING = 16 * 2**20


def input_of(path: Path, limit_s: float = LIMIT_S) -> Path:
    """Return the input folder for `--share`, which names it or its parent.

    `check` reports a share that hangs.
    """
    try:
        reports = run_check("share", "folders", lambda: _below(path), limit_s)
    except CheckTimeout:
        return path
    return Path(reports[0].what) if reports and reports[0].name == "in" else path


def _below(path: Path) -> Iterator[Finding]:
    if (path / "in").is_dir():
        yield Finding("share", "in", "ok", str(path / "in"))


def check(settings: Settings, limit_s: float = LIMIT_S) -> list[Finding]:
    """Return all findings, up to the first check that hangs."""
    layout = layout_of(settings)
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("folders", partial(_folders, layout)),
        ("rights", partial(_rights, layout)),
        ("file system", partial(_file_system, layout)),
        ("new files", partial(_watching, settings)),
        ("rename", partial(_rename, layout, settings)),
        ("free space", partial(_space, layout)),
        ("clock", partial(_clock, layout)),
        ("daemons", partial(_daemons, layout, settings)),
    ]
    findings: list[Finding] = []
    for name, run in checks:
        if name == "clock" and any(f.level == "problem" and f.name == "rename" for f in findings):
            continue  # no file can be written there
        try:
            findings += run_check("share", name, run, limit_s, system_error="problem")
        except CheckTimeout as timeout:
            remedy = "check the file server and the network (`ls` hangs, too); then mount it again"
            what = f"the share hangs: {timeout}; no further check was made"
            return [*findings, Finding("share", name, "problem", what, str(layout.input), remedy)]
        if any(f.level == "problem" for f in findings if f.name == "folders"):
            break  # nothing else can be checked
    return findings


def _missing(layout: Layout) -> list[str]:
    return [name for name, folder in layout.folders.items() if not folder.is_dir()]


def _folders(layout: Layout) -> Iterator[Finding]:
    missing, place = _missing(layout), str(layout.input)
    if (
        "input" in missing
        and not os.path.lexists(layout.input.path)
        and not layout.input.path.parent.is_dir()
    ):
        remedy = f"mount it, or `mkdir -p {layout.input}`"
        raise ShareError("the share does not exist", place=place, remedy=remedy)
    if not missing:
        yield Finding("share", "folders", "ok", "all five exist", place)
        return
    what = f"not created yet: {', '.join(missing)}; the first `sam-poll watch` creates them"
    if (
        "input" in missing
    ):  # a daemon takes it for a new share, as it would take the bare mountpoint of an old one
        remedy = f"mount the share if this is its mountpoint; on a new one `mkdir {layout.input}`"
        yield Finding("share", "folders", "warning", what, place, remedy)
    else:
        yield Finding("share", "folders", "ok", what, place)
    for name in missing:
        yield from _check_creatable(name, layout.folders[name].path)


def _check_creatable(name: str, folder: Path) -> Iterator[Finding]:
    """Report a problem if a missing folder cannot be created."""
    if os.path.lexists(folder):
        what = "is a link to a missing file" if folder.is_symlink() else "is not a folder"
        remedy = f"move it away, or name another folder as `{name}`"
        yield Finding("share", name, "problem", what, str(folder), remedy)
        return
    above = _above(folder)
    if not above.is_dir():
        remedy = f"move that file away, or name another folder as `{name}`"
        yield Finding(
            "share",
            name,
            "problem",
            f"cannot be made: {above} is not a folder",
            str(folder),
            remedy,
        )
    elif not os.access(above, os.W_OK | os.X_OK):
        remedy = f"let user {os.getuid()} write there, or make it"
        yield Finding(
            "share",
            name,
            "problem",
            "cannot be made: no right to write above it",
            str(above),
            remedy,
        )


def _above(folder: Path) -> Path:
    """Return the folder itself, or its nearest existing parent."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def _rights(layout: Layout) -> Iterator[Finding]:
    report = world_writable_warning(layout)
    if report:
        yield Finding("share", "rights", "warning", report[0], str(layout.work), report[1])


def _file_system(layout: Layout) -> Iterator[Finding]:
    kinds = {
        name: file_system(folder.path) for name, folder in layout.folders.items() if folder.is_dir()
    }
    named = sorted({kind or "unknown" for kind in kinds.values()})
    network = [kind for kind in named if is_network(kind)]
    what = (
        f"{', '.join(named)} ({'over the network, or like it' if network else 'on this machine'})"
    )
    flags = {name: os.statvfs(layout.folders[name].path).f_flag for name in kinds}
    read_only = [name for name, flag in flags.items() if flag & os.ST_RDONLY]
    if read_only:
        place = str(layout.folders[read_only[0]])
        what = f"{what}; mounted read-only: {', '.join(read_only)}"
        yield Finding("share", "file system", "problem", what, place, "mount it for writing (`rw`)")
    else:
        yield Finding("share", "file system", "ok", what)


def _watching(settings: Settings) -> Iterator[Finding]:
    """Events or polling, and why; the decision is the daemon's own."""
    logger.disable("sam_poll.runtime.builders")  # its warning is a finding here
    try:
        options = folder_options_of(settings, once=False)
    finally:
        logger.enable("sam_poll.runtime.builders")
    kind = file_system(settings.folders.input)
    mode = settings.watch.mode
    every = f"{options.rescan_s:g} s"
    if options.mode != "events":
        why = (
            "watch.mode says so" if mode == "poll" else f"{kind} sends no events of other machines"
        )
        yield Finding("share", "new files", "ok", f"polling, a scan every {every}: {why}")
        return
    if is_network(kind):
        what = (
            f"events, but {kind} has none of other machines: their files are found by the "
            f"scan every {every}"
        )
        yield Finding("share", "new files", "warning", what, "watch.mode", "set it to auto or poll")
    else:
        yield Finding(
            "share",
            "new files",
            "ok",
            f"events of {kind or 'this system'}, and a full scan every {every}",
        )
    yield inotify.finding(inotify.read(), options.rescan_s)


def _rename(layout: Layout, settings: Settings) -> Iterator[Finding]:
    sentinel = settings.sentinel and absolute(settings.sentinel)
    if _missing(layout):
        yield from _predicted_errors(layout, sentinel)
        return
    check_folders(layout, sentinel)
    with contextlib.suppress(FileNotFoundError):
        (layout.work / SENTINEL).read_bytes(100)  # OSError: of another user, and not for us
    yield from _closed(layout, os.R_OK, "not readable")  # which a file that travels does not need
    yield Finding(
        "share", "rename", "ok", "a file was renamed through all five folders and removed"
    )


def _closed(layout: Layout, rights: int, what: str) -> Iterator[Finding]:
    """Report the existing folders for which this user lacks these rights."""
    for name, folder in layout.folders.items():
        if folder.is_dir() and not os.access(folder.path, rights):
            remedy = remedy_of(PermissionError(errno.EACCES, ""))
            yield Finding("share", name, "problem", what, str(folder), remedy)


def _predicted_errors(layout: Layout, sentinel: Path | None) -> Iterator[Finding]:
    """Report what the start of a daemon will refuse, as far as it is known now.

    Not all folders exist yet.
    """
    if sentinel and not sentinel.exists():
        remedy = "mount the share; on a new one make the file once, with touch"
        yield Finding(
            "share",
            "sentinel",
            "problem",
            "it is missing: the share counts as away",
            str(sentinel),
            remedy,
        )
    yield from _closed(layout, os.R_OK | os.W_OK | os.X_OK, "not readable and writable")
    here = _above(layout.input.path)
    apart = [
        name
        for name, folder in layout.folders.items()
        if _above(folder.path).stat().st_dev != here.stat().st_dev
    ]
    if not apart:
        yield Finding("share", "rename", "ok", "not tested: some folders are not created yet")
        return
    what = (
        f"`input` and {', '.join(f'`{name}`' for name in apart)} are on different file "
        "systems: renaming fails"
    )
    place = f"{here} → {_above(layout.folders[apart[0]].path)}"
    remedy = "put all five folders on one mount (in Docker: mount their parent, not each of them)"
    yield Finding("share", "rename", "problem", what, place, remedy)


def _space(layout: Layout) -> Iterator[Finding]:
    seen: set[int] = set()
    for name, folder in layout.folders.items():
        if not folder.is_dir() or folder.lstat().st_dev in seen:
            continue
        seen.add(folder.lstat().st_dev)
        usage, files = shutil.disk_usage(folder.path), os.statvfs(folder.path)
        what = f"{usage.free / GIB:,.1f} of {usage.total / GIB:,.1f} GiB free"
        inodes = files.f_files > 0 and files.f_favail == 0
        if usage.free < _NOTHING or inodes:
            what = f"{what}; no further file can be made" if inodes else what
            yield Finding(
                "share",
                "free space",
                "problem",
                what,
                str(folder),
                "free space: results cannot be written",
            )
        elif usage.free < _LITTLE:
            yield Finding(
                "share",
                "free space",
                "warning",
                what,
                str(folder),
                f"free space on the file system of `{name}`",
            )
        else:
            yield Finding("share", "free space", "ok", what)


def _clock(layout: Layout) -> Iterator[Finding]:
    """Compare the time that the share gives a new file with this machine's."""
    if _missing(layout):
        return
    before, stamped, after = _file_times(layout.input / f"{PROBE}-{uuid4().hex[:12]}")
    skew = 0.0 if before <= stamped <= after else min(stamped - before, stamped - after, key=abs)
    if abs(skew) <= SKEW_S:
        yield Finding(
            "share",
            "clock",
            "ok",
            f"the share's and this machine's differ by {abs(skew):.1f} s at most",
        )
        return
    what = (
        f"the share's clock is {abs(skew):,.0f} s {'ahead of' if skew > 0 else 'behind'} "
        "this machine's"
    )
    remedy = (
        "set both by NTP. No job is lost by it, but `sam-poll status` shows wrong ages, and may "
        "show daemons of other "
        "machines as dead that live"
    )
    yield Finding("share", "clock", "warning", what, str(layout.input), remedy)


def _file_times(probe: SafePath) -> tuple[float, float, float]:
    """Our time, the time that the share gives a new file, and ours again, in seconds."""
    before = time.time()
    try:
        with probe.create() as file:
            stamped = os.fstat(file.fileno()).st_mtime
        return before, stamped, time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _daemons(layout: Layout, settings: Settings) -> Iterator[Finding]:
    if layout.work.path.exists() and not layout.work.is_dir():
        return  # reported by `_folders`
    now = time.time()
    reports = [
        report
        for worker, path in sorted(liveness.heartbeat_files(layout.work))
        if (report := liveness.read_heartbeat(worker, path, now))
    ]
    living = [report for report in reports if report["alive"]]
    dead = f", {len(reports) - len(living)} dead" if len(living) < len(reports) else ""
    yield Finding(
        "share", "daemons", "ok", f"{count(len(living), 'daemon')} running{dead}", str(layout.work)
    )
    for report in living:
        name = shown(report["worker"])
        for alarm in alarms_of(report):
            what = f"alarm ({shown(alarm['kind'])}): {shown(alarm['message'])}"
            yield Finding("share", "daemons", "warning", what, name, "docs/operations.md, Alarms")
        lease_s = report.get("lease_s")
        if isinstance(lease_s, int | float) and lease_s != settings.lease_s:
            what = f"its lease_s is {lease_s:g}, here it is {settings.lease_s:g}"
            yield Finding(
                "share",
                "daemons",
                "warning",
                what,
                name,
                "give all daemons of a share the same lease_s",
            )
