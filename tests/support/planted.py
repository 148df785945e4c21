"""A share that everybody may write to, an attacker who plants things in it, and commands run over
it as some user.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import BOX, picture_bytes, wait_until

# Forked from a process that has imported everything and done nothing else: a command begins at
# once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["tests.support.planted", "sam_poll.cli.main", "sam_poll.runtime.builders", "sam2"]
)

IS_ROOT = os.geteuid() == 0
USER, ATTACKER = 64123, 64124  # numbers that nobody has
WHO = ["root", "user"] if IS_ROOT else ["user"]
FOLDERS = ("in", "work", "out", "done", "failed")
SOON_S = 5.0  # how long an end may take that was asked for
PATIENCE = 3  # … on a machine that others use, too
LEASE_S = 2
DEAD = "dead-1-abcdef-0"  # a daemon of another machine that has ended
CLAIM = f"g1.a1.n1@{DEAD}"
MOSAIC = {"mosaic": {"tile": 64, "padding": 16, "points_per_side": 4}}
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "SAM_POLL_MODEL": "demo",
    "SAM_POLL_WATCH__SETTLE_S": "0",
    "SAM_POLL_WATCH__RESCAN_S": "0.3",
    "SAM_POLL_LEASE_S": str(LEASE_S),
    "SAM_POLL_LOG": "text",
    "SAM_POLL_LOG_LEVEL": "DEBUG",
}

XML = (
    '<annotations><version>1.1</version><image id="0" name="{}" width="64" height="48">'
    '<box label="a" xtl="5" ytl="5" xbr="40" ybr="40" z_order="0"/></image></annotations>'
)


def become(user: int) -> None:
    """Be an ordinary user from now on, who can read Python's own files wherever they are (in root's
    home, mostly).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    os.setgroups([])
    os.setgid(user)
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setuid(user)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    read_anywhere = 1 << 2  # CAP_DAC_READ_SEARCH
    if libc.capset(header, (ctypes.c_uint32 * 6)(read_anywhere, read_anywhere)):
        raise OSError(ctypes.get_errno(), "capset")


def _as_user(
    user: int | None, log: str, environment: dict[str, str], act: Callable[..., object], args: Any
) -> None:
    """In a process of its own: as this user, with the most careless umask."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for fd in (1, 2):
        os.dup2(out, fd)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(os.path.dirname(log))
    if user is not None:
        become(user)
    os.umask(0)
    os.environ.update(environment)
    act(args)


def _cli(args: Sequence[str]) -> None:
    from sam_poll.cli.main import app

    app(list(args))


def _commands(many: Sequence[Sequence[str]]) -> None:
    for args in many:
        sys.stdout.write(f"$ {args}\n")
        with contextlib.suppress(SystemExit):
            _cli(args)


def _doctor(folder: str) -> None:
    from sam_poll.cli.options import settings_of
    from sam_poll.diagnostics.doctor import share

    sys.stdout.write("\n".join(map(str, share.check(settings_of(Path(folder), None)))))


@dataclass
class Site:
    """A share with its five folders at 0777, and beside it what nobody may touch, a part for each
    row.
    """

    base: Path
    who: str
    rows: list[str] = field(default_factory=list)
    before: dict[str, tuple[object, ...]] = field(default_factory=dict)

    @property
    def share(self) -> Path:
        return self.base / "share"

    @property
    def outside(self) -> Path:
        return self.base / "outside"

    @property
    def owner(self) -> int | None:
        """Whom the commands run as, where it is another user than we are."""
        return USER if IS_ROOT and self.who == "user" else None

    def build(self) -> None:
        for name in FOLDERS:
            (self.share / name).mkdir(parents=True)
            (self.share / name).chmod(0o777)
        self.outside.mkdir()
        (self.base / "cache").mkdir()
        (self.base / "tmp").mkdir()
        pictures = self.base / "pictures"
        pictures.mkdir()
        for name in ("p1.jpg", "p2.jpg", "p3.jpg"):
            (pictures / name).write_bytes(picture_bytes(seed=7))
        (self.base / "drawn.xml").write_text(XML.format("p1.jpg"))
        for path in (self.base, self.share, self.outside, self.base / "cache", self.base / "tmp"):
            path.chmod(0o777 if path.name in ("cache", "tmp") else 0o755)
        if self.owner:
            for path in (self.base, *self.base.rglob("*")):
                os.chown(path, self.owner, self.owner)

    def drop(self, name: str, body: bytes | dict[str, Any] | str) -> Path:
        path = self.share / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = json.dumps(body) if isinstance(body, dict) else body
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        for each in (path, *path.parents):
            if each == self.share or each.parent == self.share:
                break
            with contextlib.suppress(FileNotFoundError):  # a daemon that runs may have taken it
                self._is_the_attackers(each, 0o777 if each.is_dir() else 0o666)
        return path

    def folder(self, name: str) -> Path:
        path = self.share / name
        path.mkdir()
        self._is_the_attackers(path, 0o777)
        return path

    def pair(
        self, stem: str, prompt: dict[str, Any] | None = None, ending: str = ".jpg", side: int = 64
    ) -> None:
        self.drop(f"{stem}{ending}", picture_bytes(ending, width=side, height=side))
        self.drop(f"{stem}.json", prompt or BOX)

    def _is_the_attackers(self, path: Path, mode: int | None = None) -> None:
        if mode is not None and not path.is_symlink():
            path.chmod(mode)
        if IS_ROOT:
            os.chown(path, ATTACKER, ATTACKER, follow_symlinks=False)

    # ── what is planted ──

    def target(self, row: str, kind: str) -> Path:
        """Something outside of its own for a row, so that what has been touched tells which row got
        through.
        """
        place = self.outside / f"{len(self.rows):03d} {kind} {row.replace('/', ':')}"[:200]
        self.rows.append(row)
        place.mkdir()
        (place / "file").write_text("keep")
        for name in ("a.jpg", "a.json", ".hidden", "sub/deep/file", f"{CLAIM}/x.jpg"):
            (place / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "folder" / name).write_text("keep")
        return place

    def plant(self, row: str, kind: str) -> None:
        """Put something of a kind into a name's place."""
        place, path = self.target(row, kind), self.share / row
        path.parent.mkdir(parents=True, exist_ok=True)
        for each in path.relative_to(self.share).parents:
            if len(each.parts) > 1:
                self._is_the_attackers(self.share / each, 0o777)
        KINDS[kind](path, place)
        if kind != "hard link":
            self._is_the_attackers(path, 0o666 if kind in ("pipe", "socket") else None)
        if self.owner:
            for each in (place, *place.rglob("*")):
                os.chown(each, self.owner, self.owner)

    # ── what is run ──

    def run(self, act: Callable[..., object], args: Any, log: str) -> Any:
        """Start in a process of its own; returns it."""
        environment = {
            **ENVIRONMENT,
            "SAM_POLL_CACHE": str(self.base / "cache"),
            "TMPDIR": str(self.base / "tmp"),
        }
        process = PROCESSES.Process(
            target=_as_user, args=(self.owner, str(self.base / log), environment, act, args)
        )
        process.start()
        return process

    def ends(self, process: Any, limit_s: float, log: str) -> None:
        """It ends by itself in this time, or soon after SIGTERM."""
        process.join(limit_s)
        if process.is_alive():
            os.kill(process.pid, signal.SIGTERM)
            process.join(SOON_S * PATIENCE)
        hangs = process.is_alive()
        if hangs:
            process.kill()
            process.join()
        assert not hangs, f"it hangs, SIGTERM or not:\n{self.said(log)[-3000:]}"
        assert "Traceback" not in self.said(log), self.said(log)[-5000:]

    def said(self, log: str) -> str:
        path = self.base / log
        return path.read_text(errors="replace") if path.exists() else ""

    def once(self, limit_s: float = 20.0) -> None:
        process = self.run(
            _cli, ["watch", str(self.share / "in"), "--once", "-f", "mask"], "once.log"
        )
        self.ends(process, limit_s, "once.log")

    def commands(self) -> None:
        """All that people run on a share; none of them may hang."""
        share, out = str(self.share / "in"), str(self.share / "out")
        pictures, drawn = str(self.base / "pictures"), str(self.base / "drawn.xml")
        many = [
            ["status", share],
            ["check", share],
            ["cvat", "prompts", drawn, "--images", pictures, "-o", share],
            ["retry", "*", "--in", share],
            ["merge", out, "-o", str(self.base / "merged.xml")],
            ["merge", out, "-o", f"{out}/merged.xml"],
            ["predict", pictures, "-o", out, "--box", "5,5,40,40"],
        ]
        self.ends(self.run(_commands, many, "commands.log"), 60, "commands.log")
        self.ends(self.run(_doctor, share, "doctor.log"), 60, "doctor.log")

    @contextmanager
    def watching(self) -> Iterator[Any]:
        """A daemon that has begun to watch; at the end it is told to end."""
        process = self.run(_cli, ["watch", str(self.share / "in"), "-f", "mask"], "watch.log")
        with contextlib.suppress(AssertionError):  # one that hangs at its start is told by `ends`
            wait_until(lambda: not process.is_alive() or "watching" in self.said("watch.log"))
        try:
            yield process
        finally:
            self.ends(process, 0, "watch.log")

    # ── what must not have changed ──

    def outside_now(self) -> dict[str, tuple[object, ...]]:
        found = {}
        for path in (self.base, self.outside, *sorted(self.outside.rglob("*"))):
            s = path.lstat()
            names = tuple(sorted(os.listdir(path))) if path.is_dir() else path.read_bytes()  # noqa: PTH208
            stamp = 0 if path == self.base else s.st_mtime_ns
            if path == self.base:
                names = tuple(n for n in names if not str(n).endswith((".log", "merged.xml")))
            found[str(path.relative_to(self.base))] = (s.st_mode, s.st_uid, s.st_gid, stamp, names)
        return found

    def check_outside(self) -> None:
        now = self.outside_now()
        touched = sorted(
            name for name in {*now, *self.before} if now.get(name) != self.before.get(name)
        )
        assert not touched, f"touched: {touched}"

    def check(self) -> None:
        """Nothing outside has changed, and nothing that was made is writable for everybody."""
        self.check_outside()
        for path in self.share.rglob("*"):
            mode = path.lstat().st_mode
            if (
                path.lstat().st_uid in (0, USER)
                and not path.is_symlink()
                and path.parent != self.share
            ):
                assert not mode & 0o002, f"{path} was made writable for everybody: {oct(mode)}"


def _folder_of_links(path: Path, place: Path) -> None:
    path.mkdir()
    (path / "link").symlink_to(place / "folder")
    (path / "file").symlink_to(place / "file")


ODD = {
    "nested": "[" * 100_000,
    "types": json.dumps(
        {
            **{
                "files": [3, {}, None],
                "lease_s": "x",
                "alarms": [1, {"kind": 3}],
                "picture": [["work"], 5],
            },
            **{
                "claim": 3,
                "waits": [],
                "id": "a/../../b",
                "name": [],
                "prompts": {"mosaic": {"tile": -1}},
            },
        }
    ),
    "leads out": json.dumps(
        {
            **{
                "files": ["../../outside/x", "/etc/passwd"],
                "picture": ["in", "../../outside/x"],
                "claim": "..",
            },
            **{"waits": "../x", "id": "../../outside/x", "name": "x", "prompts": {"mosaic": True}},
            **{"lease_s": float("inf"), "alarms": {"kind": "x"}},
        }
    ),
}


def _odd(name: str) -> Callable[[Path, Path], object]:
    return lambda path, place: path.write_text(ODD[name])


KINDS: dict[str, Callable[[Path, Path], object]] = {
    "link to a file": lambda path, place: path.symlink_to(place / "file"),
    "link to a folder": lambda path, place: path.symlink_to(place / "folder"),
    "dangling link": lambda path, place: path.symlink_to(place / "new"),
    "hard link": lambda path, place: os.link(place / "file", path),
    "folder of links": _folder_of_links,
    "pipe": lambda path, place: os.mkfifo(path),
    "socket": lambda path, place: os.mknod(path, stat.S_IFSOCK | 0o666),
    "JSON nested too deep": _odd("nested"),
    "JSON of wrong types": _odd("types"),
    "JSON that leads out": _odd("leads out"),
}


def mosaic_folder(picture: str, prompt: str) -> str:
    """The name of the folder in which a mosaic is made."""
    label, name = (
        hashlib.sha256(text.encode()).hexdigest()[:16] for text in (f".{picture}", prompt)
    )
    return f"work/.sam_poll-mosaic/{label}-{name}"


@contextmanager
def site(who: str) -> Iterator[Site]:
    """In a folder of its own, which other users may enter."""
    base = Path(tempfile.mkdtemp(prefix="planted-"))
    try:
        made = Site(base, who)
        made.build()
        yield made
    finally:
        shutil.rmtree(base, ignore_errors=True)
