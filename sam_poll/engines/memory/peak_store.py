"""Storage of measured memory peaks, in one small JSON file beside the downloaded models.

A key names all that a peak depends on: the model and the size of its weights, GPU and version of
torch, call, precision, side, and the number of pictures or prompts at once. Several processes may
share the file: each writes its own peaks together with those in the file.

Limitations: where two processes write at the same moment, the peaks of one are missing until its
next measurement. Where the file cannot be read or written, peaks are measured again after each
start; this is logged once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

from loguru import logger

from sam_poll.core.files import write_whole
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.engines.memory.plan import Call
from sam_poll.engines.memory.requirements import Key

NAME = "peaks.json"
FORMAT = "sam_poll peaks 1"
_MAX_BYTES = 16 << 20  # a larger file is refused
# Longest number in a key that is parsed; Python refuses to parse thousands of digits.
_MAX_DIGITS = 9
_MAX_MIB = 2**20  # 1 TiB; more than any GPU has


class PeakStore:
    """The stored peaks of one network on one device.

    Call `read` at the start, and `keep` after each measurement that exceeds the known peaks.
    """

    def __init__(self, path: Path, network: str) -> None:
        self._path = path
        self._network = network
        self._damaged = False  # the file is damaged, which has been logged
        self._unusable = False  # the file cannot be used, which has been logged

    def read(self) -> dict[Key, float]:
        """Return the stored peaks in MiB.

        Returns an empty dict where the file is missing, damaged, or of another format.
        """
        entries = self._entries().get(self._network)
        if not isinstance(entries, dict):
            return {}
        return {
            key: mib
            for text, value in entries.items()
            if (key := _key(text)) and (mib := _mib(value))
        }

    def keep(self, measured: dict[Key, float]) -> None:
        """Add `measured` to the file. A file of another format is left unchanged."""
        if self._unusable:
            return
        networks = self._entries()
        if self._unusable:
            return
        stored = networks.get(self._network)
        peaks = {_text(key): round(mib) for key, mib in sorted(measured.items())}
        networks[self._network] = {**(stored if isinstance(stored, dict) else {}), **peaks}
        body = json.dumps({"format": FORMAT, "peaks_mib": networks}, indent=1, sort_keys=True)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(SafePath.beside(self._path), body.encode())
        except OSError as error:
            self._give_up(f"cannot be written: {error.strerror}")

    def _entries(self) -> dict[str, Any]:
        """Return the file's peaks by network; empty where it cannot be read."""
        try:
            content = json.loads(SafePath.beside(self._path).read_bytes(_MAX_BYTES))
        except FileNotFoundError:
            return {}
        except OSError as error:
            self._give_up(f"cannot be read: {error.strerror}")
            return {}
        except (ValueError, RecursionError):
            if not self._damaged:
                logger.info("{} is damaged and will be overwritten", shown(self._path))
            self._damaged = True
            return {}
        peaks = (
            content.get("peaks_mib")
            if isinstance(content, dict) and content.get("format") == FORMAT
            else None
        )
        if not isinstance(peaks, dict):
            self._give_up("has another format, or that of a later version")
            return {}
        return peaks

    def _give_up(self, reason: str) -> None:
        if not self._unusable:
            logger.info("measured memory is not kept: {} {}", shown(self._path), reason)
        self._unusable = True


def _text(key: Key) -> str:
    return " ".join(str(part) for part in key)


def _key(text: str) -> Key | None:
    match text.split(" "):
        case [call, precision, side, count] if (
            call in get_args(Call) and _is_integer(side) and _is_integer(count)
        ):
            return call, precision, int(side), int(count)  # type: ignore[return-value]
    return None


def _is_integer(text: str) -> bool:
    return text.isdecimal() and len(text) <= _MAX_DIGITS


def _mib(value: object) -> float | None:
    """Return a plausible peak, above zero and less than any GPU has; None for other values."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 < value < _MAX_MIB else None
