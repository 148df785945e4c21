"""The measured peaks, kept between runs in one small JSON file beside the downloaded models.

A key names all that a peak depends on: model and size of its weights, card and torch, call, precision, side, pictures
or prompts at once. Several processes may share the file: each writes what it and the file know.

What can still go wrong here: two processes that write in the same instant; one's news are then written at its next
measurement. A file that cannot be read or written costs nothing but measuring again, and is said once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from loguru import logger

from sam_poll.engines.memory import Call
from sam_poll.engines.needs import Key
from sam_poll.fs import shown, write_whole
from sam_poll.safe_path import SafePath

NAME = "peaks.json"
FORMAT = "sam_poll peaks 1"
_MAX_BYTES = 16 << 20


class Peaks:
    """One network's peaks on one device: `read` at the start, `keep` after each measurement that says more."""

    def __init__(self, path: Path, network: str) -> None:
        self._path = path
        self._network = network
        self._damaged = self._useless = False  # and it has been said

    def read(self) -> dict[Key, float]:
        """What is known, in MiB; nothing where the file is missing, damaged, or not ours."""
        entries = self._entries().get(self._network)
        if not isinstance(entries, dict):
            return {}
        return {key: mib for text, value in entries.items() if (key := _key(text)) and (mib := _mib(value))}

    def keep(self, measured: dict[Key, float]) -> None:
        """Writes `measured` into the file. A file that is not ours is left as it is."""
        if self._useless:
            return
        everything = self._entries()
        if self._useless:
            return
        known = everything.get(self._network)
        ours = {_text(key): round(mib) for key, mib in sorted(measured.items())}
        everything[self._network] = {**(known if isinstance(known, dict) else {}), **ours}
        body = json.dumps({"format": FORMAT, "peaks_mib": everything}, indent=1, sort_keys=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(SafePath.beside(self._path), body.encode())
        except OSError as error:
            self._give_up(f"cannot be written: {error.strerror}")

    def _entries(self) -> dict[str, Any]:
        try:
            content = json.loads(SafePath.beside(self._path).read_bytes(_MAX_BYTES))
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._give_up(f"cannot be read: {error.strerror}")
            return {}
        except (ValueError, RecursionError):
            if not self._damaged:
                logger.info("{} is damaged and will be written anew", shown(self._path))
            self._damaged = True
            return {}
        peaks = content.get("peaks_mib") if isinstance(content, dict) and content.get("format") == FORMAT else None
        if not isinstance(peaks, dict):
            self._give_up("is not ours, or a later version's")
            return {}
        return peaks

    def _give_up(self, why: str) -> None:
        if not self._useless:
            logger.info("measured memory is not kept: {} {}", shown(self._path), why)
        self._useless = True


def _text(key: Key) -> str:
    return " ".join(str(part) for part in key)


def _key(text: str) -> Key | None:
    match text.split(" "):
        case [call, precision, side, count] if call in get_args(Call) and _whole(side) and _whole(count):
            return call, precision, int(side), int(count)  # type: ignore[return-value]
    return None


def _whole(text: str) -> bool:
    return text.isdecimal() and len(text) < 10  # Python refuses to read numbers of thousands of digits


def _mib(value: object) -> float | None:
    """A believable peak: a number above zero, and less than any card has."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**20:
        return float(value)
    return None
