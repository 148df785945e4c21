"""Coverage-guided fuzzing of what strangers can hand in: prompt files and pictures. `make fuzz`
runs it.

Each target runs in a process of its own for its share of the time, begins with the catalogue of bad
input (tests/support/bad_inputs.py), and stops at the first exception that is not one of our errors,
at a crash of a picture library, at an input that takes 30 s, and at one that takes 256 MiB. The
input that did it is kept and named.

Limitations: libFuzzer sees which lines of sam_poll are reached, not those of
OpenCV's own code, so pictures are guided by the reading of headers only; after the time given,
nothing is proved but that nothing was found."""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGETS = ("prompts", "pictures")
LONGEST = 100_000  # bytes of an input
SLICE_S = 120  # of one process
MOST_MIB = 256  # that one input may take; pictures have up to a megapixel here
MISSING = """atheris is not installed: make fuzz needs it beside the development tools.
    .venv/bin/python -m pip install '.[fuzz]'
It has wheels for Linux on x86-64; elsewhere, tests/end_to_end/test_fuzz.py is what there is."""


def main() -> int:
    """Run all targets, print what was done, end with 1 if one of them found something."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=int, default=600, help="for all targets together (default: 600)"
    )
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one")
    parser.add_argument(
        "--findings", type=Path, default=Path("fuzz-findings"), help="where inputs are kept"
    )
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if importlib.util.find_spec("atheris") is None:
        print(MISSING, file=sys.stderr)
        return 2
    if given.inside:
        _fuzz(given.inside[0], given.seconds, given.findings, Path(given.inside[1]))
    targets = given.target or list(TARGETS)
    return (
        1
        if sum(
            [
                _run(target, max(1, given.seconds // len(targets)), given.findings)
                for target in targets
            ]
        )
        else 0
    )


def _run(target: str, seconds: int, findings: Path) -> int:
    """One target, in one process after another with a common corpus, until the time is over or
    something is found.

    One after another, because what atheris hooks into (`bytes.find` and the like) keeps memory for
    each call."""
    findings.mkdir(exist_ok=True)
    before = set(findings.iterdir())
    runs = 0
    left = seconds
    code = 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory() as scratch:
        while left > 0 and not code:
            command = [sys.executable, "-m", "tools.fuzz", "--inside", target, scratch]
            command += ["--seconds", str(min(left, SLICE_S)), "--findings", str(findings)]
            done = subprocess.run(command, env=environment, capture_output=True, check=False)
            said, code, left = done.stderr.decode(errors="replace"), done.returncode, left - SLICE_S
            runs += max(
                map(int, re.findall(r"^(?:#|stat::number_of_executed_units: )(\d+)", said, re.M)),
                default=0,
            )
    covered = re.findall(r"cov: (\d+) ft: (\d+)", said) or [("?", "?")]
    print(
        f"fuzz {target}: {runs:,} executions in {seconds} s, {covered[-1][0]} places and "
        f"{covered[-1][1]} features "
        f"covered, crashes: {int(code != 0)}",
        flush=True,
    )
    for path in sorted(set(findings.iterdir()) - before):
        print(f"  kept: {path}")
    if code:
        print("\n".join(said.splitlines()[-40:]))
    elif not any(findings.iterdir()):
        findings.rmdir()
    return int(code != 0)


# ── in the fuzzing process ──


def _fuzz(target: str, seconds: int, findings: Path, scratch: Path) -> None:
    """Never returns: libFuzzer ends the process, which is why the scratch folder is the parent's to
    remove.
    """
    import atheris

    with atheris.instrument_imports(include=["sam_poll"]):
        from sam_poll.imaging import decode as images
        from sam_poll.prompts import parser as prompts  # noqa: F401  instrumented as they are imported

    from tests.support.bad_inputs import FAMILIES

    test: Callable[[bytes], None] = {"prompts": _prompt, "pictures": _picture}[target]
    endings = (".json",) if target == "prompts" else tuple(images.ENDINGS)
    corpus = scratch / "corpus"
    corpus.mkdir(exist_ok=True)
    bodies = [
        item for family in FAMILIES.values() for case in family for item in case.files.items()
    ]
    for number, (name, body) in enumerate(bodies):
        if isinstance(body, bytes) and name.lower().endswith(endings) and len(body) < LONGEST:
            (corpus / str(number)).write_bytes(body)
    flags = [f"-max_total_time={seconds}", f"-artifact_prefix={findings}/{target}-", "-timeout=30"]
    flags += ["-rss_limit_mb=6144", "-print_final_stats=1", f"-max_len={LONGEST}"]
    mutator = {}
    if target == "prompts":
        (scratch / "words").write_text("".join(f'"{word}"\n' for word in _words()))
        flags.append(f"-dict={scratch / 'words'}")
    else:
        mutator = {"custom_mutator": _mutated}
    atheris.Setup([sys.argv[0], *flags, str(corpus)], test, **mutator)
    atheris.Fuzz()


def _words() -> list[str]:
    """The keys of prompt files, and numbers and texts that are often mishandled."""
    from sam_poll.prompts.schema import KNOWN_KEYS

    keys = {f'\\"{key}\\"' for keys in KNOWN_KEYS.values() for key in keys}
    return [
        *sorted(keys),
        "NaN",
        "Infinity",
        "1e999",
        "-0.0",
        "null",
        "true",
        r"\\ud800",
        r"\\u0000",
        "[[[[",
        "}}",
    ]


def _prompt(data: bytes) -> None:
    from sam_poll.core.errors import PromptError
    from sam_poll.core.types import AutomaticMaskRequest, Size
    from sam_poll.prompts.parser import fit, parse

    try:
        asked = parse(data).prompts
        if not isinstance(asked, AutomaticMaskRequest):
            fit(asked, Size(640, 480))
    except PromptError as error:
        _check_words(error, error.place)


def _picture(data: bytes) -> None:
    from sam_poll.core.errors import PictureError
    from sam_poll.imaging.decode import decode

    before = _mebibytes()
    try:
        for min_decode_side in (None, 16):
            picture = decode(data, min_decode_side=min_decode_side, max_pixels=10**6)
            assert min_decode_side or picture.pixels.shape == (
                picture.size.height,
                picture.size.width,
                3,
            )
    except PictureError as error:
        _check_words(error, "the picture's name, which the pipeline adds")

    # libFuzzer's own limit looks once a second, and would name another input.
    assert _mebibytes() - before < MOST_MIB, f"took {_mebibytes() - before} MiB"


def _mebibytes() -> int:
    """The most memory that this process has had so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _check_words(error: Any, place: str | None) -> None:
    assert error.reason
    assert place
    assert error.remedy
    assert str(error).isprintable()
    assert len(str(error)) < 2000


def _mutated(data: bytes, max_size: int, seed: int) -> bytes:
    """libFuzzer's own mutation; half of the PNGs get their checksums put right, else they would all
    be refused alike; and some files get a hole, or a number of their header made huge."""
    import atheris

    from tests.support.bad_inputs import with_checksums

    dice = random.Random(seed)
    data = atheris.Mutate(data, len(data) if dice.random() < 0.5 else max_size)
    at = dice.randrange(len(data) or 1)
    if dice.random() < 0.1:
        data = data[:at] + bytes(min(600, len(data) - at)) + data[at + 600 :]
    elif dice.random() < 0.2:
        at = dice.randrange(min(len(data), 200) or 1)
        value = dice.choice(
            [b"\xff", b"\xff\xff", b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\0\0\0\0"]
        )
        data = data[:at] + value + data[at + len(value) :]
    return with_checksums(data)[:max_size] if dice.random() < 0.5 else data


if __name__ == "__main__":
    sys.exit(main())
