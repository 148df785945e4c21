"""What the chaos runs drop: a seeded plan of pictures and prompts, and the one who drops them.

Every file has bytes of its own (a prompt's label is its job's name), so that the verdict can follow
each by its content. The plan says where each file must end; what depends on the moment by design is
not planned.

Limitations: a slow writer that this machine stops for longer than the settle time
is taken for finished; such files are listed in `Dropper.stalled`, and the verdict lets them end in
either place."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

WIDTH, HEIGHT = 64, 48
FOLDERS = ("", "", "cam1", "cam1/day 2", "straße", "🐕")
ENDINGS = (".jpg", ".png", ".bmp", ".tif", ".webp", ".JPG", ".jpeg", ".PNG")
BROKEN_PROMPTS = (
    '{"label": "%s", "box": ',
    '{"label": "%s", "bbox": {"x0": 1, "y0": 1, "x1": 9, "y1": 9}}',
    '{"label": "%s", "points": [{"x": NaN, "y": 3}]}',
    '{"label": "%s", "points": [{"x": 9000, "y": 3}]}',
    '{"label": "%s", "points": [{"x": 9, "y": 3, "label": 0}]}',
    '{"label": "%s", "box": {"x0": 300, "y0": 10, "x1": 400, "y1": 30}}',
)
_PAUSE_S = 0.03  # between two parts of a slow writer's file
_TRIES = 100


@dataclass(frozen=True)
class File:
    """One file to drop. `name` is relative to `in/`; `ends` are the folders it may lie in at the
    end.
    """

    name: str
    body: bytes
    ends: frozenset[str]
    how: str = "rename"  # rename | write | slow

    @property
    def key(self) -> str:
        """What names its content."""
        return key_of(self.body)


@dataclass(frozen=True)
class Drop:
    """Files that belong together, in the order they come. `after`: a prompt that must lie in
    `done/` first.
    """

    files: tuple[File, ...]
    prompts: int = 1
    after: str | None = None


@dataclass
class Plan:
    """All drops of a run."""

    drops: list[Drop] = field(default_factory=list)

    @property
    def files(self) -> list[File]:
        return [file for drop in self.drops for file in drop.files]

    @property
    def jobs(self) -> int:
        """Prompts in all."""
        return sum(drop.prompts for drop in self.drops)


def key_of(body: bytes) -> str:
    """A name for some bytes."""
    return hashlib.blake2b(body, digest_size=12).hexdigest()


def picture(ending: str, seed: int, *, colour: tuple[int, int, int] | None = None) -> bytes:
    """A small picture of its own noise, or (`colour`: red, green, blue) of one colour."""
    pixels: Any
    if colour:
        pixels = np.full((HEIGHT, WIDTH, 3), colour[::-1], np.uint8)
    else:
        coarse = np.random.default_rng(seed).integers(
            0, 255, (HEIGHT // 4, WIDTH // 4, 3), np.uint8
        )
        pixels = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_NEAREST)
    return bytes(cv2.imencode(ending.lower(), pixels)[1].tobytes())


def prompt(rng: random.Random, label: str, **more: Any) -> bytes:
    """A prompt of some form, with `label` in it."""
    x, y = rng.randint(4, 20), rng.randint(4, 16)
    box = {"x0": x, "y0": y, "x1": x + rng.randint(9, 40), "y1": y + rng.randint(9, 30)}
    points = [{"x": rng.randint(1, WIDTH - 1), "y": rng.randint(1, HEIGHT - 1), "label": 1}]
    extreme = [{"x": 5, "y": 20}, {"x": 30, "y": 4}, {"x": 55, "y": 21}, {"x": 31, "y": 40}]
    forms: list[dict[str, Any]] = [
        {"box": box},
        {"points": points},
        {"box": box, "points": [*points, {"x": x + 2, "y": y + 2, "label": 0}]},
        {"extreme_points": extreme},
    ]
    form = rng.choice(forms)
    body: dict[str, Any] = {"label": label, **form}
    if rng.random() < 0.2:
        body = {"objects": [body, {"label": "second", "points": points}]}
    return json.dumps({**body, **more}).encode()


def plan(count: int, seed: int, *, late: bool = False) -> Plan:
    """At least `count` prompts' worth of drops. `late`: also further prompts for pictures long
    answered (10 s each).
    """
    rng = random.Random(seed)
    made = Plan()
    plain: list[Drop] = []
    while made.jobs < count:
        drop = _drop(rng, f"j{len(made.drops):05d}", seed * 1_000_003 + len(made.drops), plain)
        made.drops.append(drop)
    if late:
        made.drops += [
            _late(rng, drop, n) for n, drop in enumerate(plain[:: max(1, len(plain) // 20)][:20])
        ]
    return made


def _drop(rng: random.Random, stem: str, seed: int, plain: list[Drop]) -> Drop:
    kind = rng.choices(
        ["pair", "several", "picture", "prompt", "lone", "alone", "encore"], [68, 12, 5, 7, 2, 1, 5]
    )[0]
    folder = rng.choice(FOLDERS)
    base = f"{folder}/{stem}" if folder else stem
    ending = rng.choice(ENDINGS)
    body = picture(ending, seed)
    if kind == "encore" and plain:
        return _encore(rng, plain.pop(rng.randrange(len(plain))), stem, seed)
    if kind == "several":
        return _several(rng, base, ending, body)
    if kind == "picture":
        bad = body[: len(body) * 2 // 3] if rng.random() < 0.3 else f"no picture: {stem}".encode()
        return _pair(rng, base, ending, bad, prompt(rng, base), "failed", "failed")
    if kind == "prompt":
        # Its picture comes first: a broken prompt that lies alone is refused alone, and its picture
        # waits.
        bad = (rng.choice(BROKEN_PROMPTS) % stem).encode()
        first = File(base + ending, body, frozenset({"failed", "in"}), _how(rng))
        return Drop((first, File(base + ".json", bad, frozenset({"failed"}))))
    if kind == "lone":
        return Drop((File(base + ending, body, frozenset({"in"}), _how(rng)),), prompts=0)
    if kind == "alone":
        return Drop(
            (File(base + ".json", prompt(rng, base), frozenset({"in"}), _how(rng)),), prompts=0
        )
    drop = _pair(
        rng,
        base,
        ending,
        body,
        prompt(rng, base, **_about(rng, base + ending, body)),
        "done",
        "done",
    )
    plain.append(drop)
    return drop


def _pair(
    rng: random.Random,
    base: str,
    ending: str,
    body: bytes,
    text: bytes,
    picture_end: str,
    prompt_end: str,
) -> Drop:
    name = rng.choice([base + ".json", base + ".json", base + ".prompt", base + ending + ".json"])
    files = [
        File(base + ending, body, frozenset({picture_end}), _how(rng)),
        File(name, text, frozenset({prompt_end}), _how(rng)),
    ]
    rng.shuffle(files)
    return Drop(tuple(files))


def _several(rng: random.Random, base: str, ending: str, body: bytes) -> Drop:
    names = [base + ".json", base + ".left.json", base + ".b.prompt", base + ending + ".json"][
        : rng.randint(2, 4)
    ]
    files = [File(name, prompt(rng, name), frozenset({"done"}), _how(rng)) for name in names]
    files.append(File(base + ending, body, frozenset({"done"}), _how(rng)))
    return Drop(tuple(files), prompts=len(names))


def _encore(rng: random.Random, before: Drop, stem: str, seed: int) -> Drop:
    """Another picture and prompt under the names of an answered pair: they become `~2`. The picture
    comes first.
    """
    text, old = _prompt_and_picture(before)
    files = (
        File(old.name, picture(os.path.splitext(old.name)[1], seed), frozenset({"done"})),
        File(text.name, prompt(rng, f"{stem} again"), frozenset({"done"})),
    )
    return Drop(files, after=text.name)


def _late(rng: random.Random, before: Drop, number: int) -> Drop:
    text, old = _prompt_and_picture(before)
    base = os.path.splitext(old.name)[0]
    return Drop(
        (File(f"{base}.late.json", prompt(rng, f"late {number}"), frozenset({"done"})),),
        after=text.name,
    )


def _prompt_and_picture(drop: Drop) -> tuple[File, File]:
    first, second = drop.files
    return (first, second) if first.name.endswith((".json", ".prompt")) else (second, first)


def _how(rng: random.Random) -> str:
    return rng.choices(["rename", "write", "slow"], [6, 2, 2])[0]


def _about(rng: random.Random, name: str, body: bytes) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if rng.random() < 0.2:
        more["image"] = os.path.basename(name)
    if rng.random() < 0.2:
        more["image_sha256"] = hashlib.sha256(body).hexdigest()
    if rng.random() < 0.2:
        more["image_bytes"] = len(body)
    return more


class Dropper:
    """Drops a plan's files, as far as `allow` lets it, in a thread of its own; `hurry` leaves out
    slow writing.
    """

    def __init__(self, plan: Plan, share: Path, settle_s: float, *, hurry: bool = False) -> None:
        self._share = share
        self._settle_s = settle_s
        self._hurry = hurry
        self.waiting = list(plan.drops)
        """Drops still to come."""
        self._quota = 0
        self._more = threading.Condition()
        self._stop = False
        self.dropped = 0
        """Drops that lie in `in/` whole."""
        self.stalled: set[str] = set()
        """Keys of files whose writer was held up for longer than the settle time."""
        self._thread = threading.Thread(target=self._run, name="dropper", daemon=True)

    def __enter__(self) -> Dropper:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        with self._more:
            self._stop = True
            self._more.notify()
        self._thread.join(30)

    @property
    def left(self) -> int:
        """How many drops are still to come."""
        return len(self.waiting)

    def allow(self, drops: int) -> None:
        """So many drops may have been made in all."""
        with self._more:
            self._quota = max(self._quota, drops)
            self._more.notify()

    def drop_ready(self) -> int:
        """Drop, in this thread, all that need not wait for others. Returns how many."""
        ready = [d for d in self.waiting if self._may(d)]
        for drop in ready:
            self._put(drop)
        return len(ready)

    def _run(self) -> None:
        while True:
            with self._more:
                if not self._more.wait_for(
                    lambda: self._stop or (self.waiting and self.dropped < self._quota), 0.5
                ):
                    continue
                if self._stop:
                    return
            drop = self._next()
            if drop is None:
                time.sleep(0.2)  # all that is left waits for an answer
                continue
            self._put(drop)

    def _next(self) -> Drop | None:
        return next((drop for drop in self.waiting if self._may(drop)), None)

    def _may(self, drop: Drop) -> bool:
        return drop.after is None or (self._share / "done" / drop.after).exists()

    def _put(self, drop: Drop) -> None:
        for file in drop.files:
            path = self._share / "in" / file.name
            self._again(lambda path=path: path.parent.mkdir(parents=True, exist_ok=True))  # type: ignore[misc]
            if file.how == "rename" or self._hurry:
                move_in(self._share, file.name, file.body)
            elif file.how == "write":
                self._again(lambda path=path, file=file: path.write_bytes(file.body))  # type: ignore[misc]
            else:
                self._write_slowly(path, file)
        self.waiting.remove(drop)
        self.dropped += 1

    def _write_slowly(self, path: Path, file: File) -> None:
        last = time.monotonic()
        with path.open("wb", buffering=0) as out:
            for part in _parts(file.body, 4):
                out.write(part)
                now = time.monotonic()
                if now - last > self._settle_s * 0.8:
                    self.stalled.add(file.key)
                last = now
                time.sleep(_PAUSE_S)

    def _again(self, act: Callable[[], object]) -> None:
        for attempt in range(_TRIES):
            try:
                act()
                return
            except FileNotFoundError:
                if attempt == _TRIES - 1:
                    raise
                time.sleep(0.02)


def move_in(share: Path, name: str, body: bytes) -> None:
    """Write a file beside the share's folders and rename it into `in/`."""
    aside = share / "aside" / f"{key_of(body)}-{threading.get_ident()}"
    aside.parent.mkdir(exist_ok=True)
    aside.write_bytes(body)
    aside.rename(share / "in" / name)


def drop_pair(share: Path, stem: str, seed: int, **more: Any) -> list[File]:
    """A picture and its prompt, renamed into `in/`; returns both. `colour` as for `picture`."""
    (share / "in" / stem).parent.mkdir(parents=True, exist_ok=True)
    files = pair(stem, seed, **more)
    for file in files:
        move_in(share, file.name, file.body)
    return files


def pair(
    stem: str, seed: int, *, end: str = "done", colour: tuple[int, int, int] | None = None
) -> list[File]:
    """A picture and its prompt."""
    rng = random.Random(seed)
    return [
        File(f"{stem}.png", picture(".png", seed, colour=colour), frozenset({end})),
        File(f"{stem}.json", prompt(rng, stem), frozenset({end})),
    ]


def _parts(body: bytes, count: int) -> Iterator[bytes]:
    step = max(1, -(-len(body) // count))
    for start in range(0, len(body), step):
        yield body[start : start + step]
