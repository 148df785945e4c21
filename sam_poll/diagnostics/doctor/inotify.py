"""inotify's limits for this user, and how much of them is used (inotify(7), proc(5)).

Limitations: processes of other users that share the limit of a user namespace cannot be read and
are not counted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sam_poll.diagnostics.doctor.findings import Finding

# What one more daemon takes: of instances one (watchdog 7; before it, one for each folder), of
# watches one for each folder, up to the limit of `doors.watch`.
_INSTANCES, _WATCHES = 1, 64


@dataclass(frozen=True, slots=True)
class Inotify:
    """Limits for one user, and how much of each is used now."""

    max_watches: int
    max_instances: int
    watches: int
    instances: int


def read(proc: Path = Path("/proc"), user: int | None = None) -> Inotify | None:
    """None where there is no inotify. Counts this user's processes."""
    limits = proc / "sys/fs/inotify"
    try:
        max_watches, max_instances = (
            int((limits / name).read_text()) for name in ("max_user_watches", "max_user_instances")
        )
    except (OSError, ValueError):
        return None
    watches = instances = 0
    for process in _processes(proc, os.getuid() if user is None else user):
        for info in _instances(process):
            instances += 1
            watches += info.count("inotify wd:")
    return Inotify(max_watches, max_instances, watches, instances)


def _processes(proc: Path, user: int) -> Iterator[Path]:
    for process in proc.iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdecimal() and process.stat().st_uid == user:
                yield process


def _instances(process: Path) -> Iterator[str]:
    """Read the kernel's information on each inotify descriptor of a process."""
    try:
        handles = list((process / "fd").iterdir())
    except OSError:  # it has ended, or is another's after all
        return
    for handle in handles:
        with contextlib.suppress(OSError):
            if os.readlink(handle) == "anon_inode:inotify":  # noqa: PTH115  it is no path
                yield (process / "fdinfo" / handle.name).read_text()


def finding(found: Inotify | None, rescan_s: float) -> Finding:
    """Return a finding on whether another daemon would get events."""
    if found is None:
        return Finding(
            "share",
            "inotify",
            "ok",
            f"not on this system; a full scan every {rescan_s:g} s finds all",
        )
    what = (
        f"{found.instances} of {found.max_instances} instances and {found.watches:,} of "
        f"{found.max_watches:,} "
        "watches used by this user"
    )
    short = {
        name: (most, most - used)
        for name, most, used, wanted in (
            ("max_user_instances", found.max_instances, found.instances, _INSTANCES),
            ("max_user_watches", found.max_watches, found.watches, _WATCHES),
        )
        if most - used < wanted
    }
    if not short:
        return Finding("share", "inotify", "ok", what)
    none = any(left <= 0 for _, left in short.values())
    which = "new files are" if none else "new files of some folders may be"
    what = (
        f"{what}: {'none' if none else 'few'} left, {which} found by the full scan every "
        f"{rescan_s:g} s only"
    )
    settings = " ".join(f"fs.inotify.{name}={2 * most}" for name, (most, _) in short.items())
    remedy = f"sysctl -w {settings}; the same into a file of /etc/sysctl.d, to last"
    return Finding("share", "inotify", "warning", what, "/proc/sys/fs/inotify", remedy)
