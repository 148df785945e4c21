"""The module `sam2` comes from the distribution `sam2`, or from the wheel `rf-sam-2`, whose network
is that of `sam2` 1.1.0, byte by byte. (Its image predictor has one more option.)
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import sam2

from sam_poll.core import distributions

# SHA-256 over the lines "path SHA-256" of the files of sam2 1.1.0
OFFICIAL = {
    "modeling/**/*.py": "ea35beefa61ad3aaf6ee1b2227f7060eaa1504fe83b022c84e7ff414abbbbe1f",
    "configs/**/*.yaml": "1b616ca4eb2e15594bde28c0381ace77e8a17620f340747e8eeab4a31d19620b",
    "build_sam.py": "7767ef6eb71d45dfe89998f5344bef2001afdf1890a6afb5e2dc7c69c83db070",
    "utils/amg.py": "559efbdaa5c2b7f8aaa7775783164fc1993df8b8347be9527a38714732833b26",
}


def digest(package: Path, pattern: str) -> str:
    """Return one SHA-256 for all files of the pattern, with their places."""
    lines = [
        f"{path.relative_to(package).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        for path in sorted(package.glob(pattern))
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("pattern", OFFICIAL)
def test_the_installed_network_is_the_official_one(pattern: str) -> None:
    assert digest(Path(sam2.__path__[0]), pattern) == OFFICIAL[pattern]


def test_it_is_installed_once() -> None:
    assert len(distributions.installed(*distributions.SAM2)) == 1
