"""One more user of the share, as a process: plants links, pipes, folders, hard links and junk, and
takes them away.

    python -m tools.torture_users SHARE OUTSIDE --seed S --user UID

It touches nothing that is another's: it makes names that are free, also those that the daemons use
for themselves, and removes what it has made. It ends when its stdin is closed, and then prints what
it did as JSON; `changed` names its own plain files outside of `in/` and `work/`, but for the
daemons' own names, that somebody has written to or taken away.

Limitations: what it may not do is passed over in silence; `planted` says what it
did."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import stat
import sys
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tools.torture_names import BLOCKED, MARK

_PAUSE_S = 0.25
_FOLDERS = ("in", "work", "out", "done", "failed")
_OWN = (
    "in/.sam_poll-probe",
    "work/.sam_poll-probe",
    "out/.sam_poll-probe",
    "done/.sam_poll-probe",
    "failed/.sam_poll-probe",
    "work/.sam_poll-share",
    "work/.sam_poll-mosaic",
    "work/.sam_poll-1.tmp",
    "work/.annotations.xml",
    "work/.sam_poll-worker-dead-1-abcdef-0.json",
)
"""Names that the daemons use for themselves."""
_KINDS = ("own_name", "own_name", "in_the_way", "claim", "worker", "picture", "junk", "mirror")


@dataclass
class Planted:
    """A thing of ours: where, what it is, when it goes again."""

    path: Path
    mark: tuple[int, int]
    until: float
    body: bytes | None = None
    inside: tuple[str, ...] = ()
    """What we have put into a folder, the deepest first. What others put there stays."""


class User:
    """Plants and takes away, by its own chance."""

    def __init__(
        self, share: Path, outside: Path, seed: str, without: Collection[str] = ()
    ) -> None:
        self._share, self._outside = share, outside
        self._rng = random.Random(seed)
        self._name = seed.rpartition(" ")[2]
        self._things: list[Planted] = []
        self._count = 0
        self._kinds = [kind for kind in _KINDS if kind not in without]
        self.planted: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.changed: list[str] = []

    def act(self) -> None:
        """One thing is planted; those whose time has come go."""
        kind = self._rng.choice(self._kinds)
        try:
            getattr(self, f"_{kind}")()
            self.planted[kind] += 1
        except OSError as error:
            self.refused[f"{kind}: {error.strerror}"] += 1
        self.take_away(time.monotonic())

    def take_away(self, now: float) -> None:
        """What has lain long enough; `inf`: everything."""
        for thing in [t for t in self._things if t.until <= now]:
            self._things.remove(thing)
            self._take(thing)

    def _take(self, thing: Planted) -> None:
        where = str(thing.path.relative_to(self._share))
        try:
            found = thing.path.lstat()
        except OSError:
            if (
                thing.body is not None
                and not where.startswith(("in/", "work/"))
                and "/.sam_poll-" not in where
            ):
                self.changed.append(f"{where} of a user is gone")
            return
        if (found.st_dev, found.st_ino) != thing.mark:
            return
        if (
            thing.body is not None
            and stat.S_ISREG(found.st_mode)
            and thing.path.read_bytes() != thing.body
        ):
            self.changed.append(f"{where} of a user has other bytes")
        for path in (*(thing.path / name for name in thing.inside), thing.path):
            with contextlib.suppress(OSError):
                if stat.S_ISDIR(path.lstat().st_mode):
                    path.rmdir()
                else:
                    path.unlink()

    # ── what is planted ──

    def _own_name(self) -> None:
        self._put_something(self._share / self._rng.choice(_OWN))

    def _in_the_way(self) -> None:
        """Where answers, or what is done and failed, would go. A plain file in work/ would be put
        into in/.
        """
        root = self._rng.choice(["out", "done", "failed", "work"])
        self._put_something(self._share / root / self._rng.choice(BLOCKED), plain=root != "work")

    def _mirror(self) -> None:
        """A link in in/ to a folder outside, and a real folder of its name in work/ and failed/."""
        name = self._new("mirror")
        self._link(self._share / "in" / name, self._outside / "folder")
        for root in ("work", "failed"):
            folder = self._share / root / name
            folder.mkdir()
            self._keep(folder, inside=("left.jpg",))
            (folder / "left.jpg").write_bytes(MARK)

    def _claim(self) -> None:
        """What looks like a dead daemon's claim."""
        name = self._new("claim")
        outer = self._share / "work" / f".{name}.jpg"
        inner = outer / "g1.a1.n1@dead-1-abcdef-0"
        outer.mkdir(mode=0o777)
        names = (".answered", ".report", f"{name}.jpg")
        self._keep(outer, inside=(*(f"{inner.name}/{n}" for n in names), inner.name))
        if self._rng.random() < 0.5:
            inner.symlink_to(self._outside / "folder")
            return
        inner.mkdir(mode=0o777)
        (inner / ".answered").symlink_to(self._outside / f"new {name}")
        with contextlib.suppress(OSError):
            os.mkfifo(inner / ".report")
        (inner / f"{name}.jpg").symlink_to(self._outside / "real.png")

    def _worker(self) -> None:
        """Beside or in place of a daemon's sign of life."""
        signs = [
            p for p in (self._share / "work").iterdir() if p.name.startswith(".sam_poll-worker-")
        ]
        name = f".sam_poll-worker-{self._new('w')}-1-a-0.json"
        if signs and self._rng.random() < 0.7:
            name = self._rng.choice(signs).name
        worker = name[len(".sam_poll-worker-") : -len(".json")]
        self._put_something(
            self._share
            / "work"
            / self._rng.choice([name, f".sam_poll-{worker}.tmp", f"{name}.tmp"])
        )

    def _picture(self) -> None:
        """A link, a pipe, a folder or a device's name as a picture, with a prompt beside it:
        nothing may answer it.
        """
        name = self._new("picture")
        self._put_something(self._share / "in" / f"{name}.png", plain=False)
        prompt = {"label": MARK.decode(), "box": {"x0": 1, "y0": 1, "x1": 9, "y1": 9}}
        path = self._share / "in" / f"{name}.json"
        path.write_text(json.dumps(prompt))
        self._keep(path)

    def _junk(self) -> None:
        root = self._share / self._rng.choice(_FOLDERS)
        name = self._rng.choice(["junk.bin", "é junk", "junk.png.part"])
        self._put_something(root / (self._rng.choice(["", "."]) + self._new(name)))

    def _put_something(self, path: Path, *, plain: bool = True) -> None:
        kinds = [
            "link",
            "link",
            "folder_link",
            "dangling",
            "pipe",
            "folder",
            *(["hard", "file"] if plain else []),
        ]
        kind = self._rng.choice(kinds)
        if kind == "link":
            self._link(
                path, self._outside / self._rng.choice(["real.png", "text.json", "writable.bin"])
            )
        elif kind == "folder_link":
            self._link(path, self._outside / self._rng.choice(["folder", "open"]))
        elif kind == "dangling":
            self._link(path, self._outside / self._new("new"))
        elif kind == "pipe":
            os.mkfifo(path)
            self._keep(path)
        elif kind == "folder":
            path.mkdir()
            self._keep(path, inside=("x/open.json", "x"))
            (path / "x").mkdir()
            os.mkfifo(path / "x/open.json")
        elif kind == "hard":
            os.link(self._outside / "writable.bin", path)
            self._keep(path)
        else:
            body = MARK + os.urandom(8)
            with path.open("xb") as file:
                file.write(body)
            self._keep(path, body)

    def _link(self, path: Path, target: Path) -> None:
        path.symlink_to(target)
        self._keep(path)

    def _keep(self, path: Path, body: bytes | None = None, inside: tuple[str, ...] = ()) -> None:
        found = path.lstat()
        until = time.monotonic() + self._rng.uniform(1, 8)
        self._things.append(Planted(path, (found.st_dev, found.st_ino), until, body, inside))

    def _new(self, what: str) -> str:
        self._count += 1
        return f"planted {self._name}-{self._count} {what}"


def main() -> int:
    """Be that user until stdin is closed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("share", type=Path)
    parser.add_argument("outside", type=Path)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--user", type=int)
    parser.add_argument("--without", action="append", default=[])
    given = parser.parse_args()
    os.umask(0)
    if given.user:
        os.setgroups([])
        os.setgid(given.user)
        os.setuid(given.user)
    user = User(given.share, given.outside, given.seed, given.without)
    try:
        while not select.select([sys.stdin], [], [], user._rng.uniform(0, 2 * _PAUSE_S))[0]:
            user.act()
    finally:
        user.take_away(float("inf"))
    print(json.dumps({"planted": user.planted, "refused": user.refused, "changed": user.changed}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
