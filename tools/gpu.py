"""`make gpu`: what a GPU has to show, in eight minutes, with one command.

Tests that need a GPU, the proof of 3.93 GiB, speed beside the loop and the bare network, a mosaic,
and our mask beside the official predictor's. Each step is a process with a time limit; one that
fails or is too slow takes nothing from the others. The figures are written after each step, to
benchmarks/results/gpu.json, and at the end put into docs/speed.md.

    python -m tools.gpu                # 0: all steps are good; 1: some are not; 4: no such device
    python -m tools.gpu --device cpu   # the same steps with the bundled model, as a rehearsal

Models that are not downloaded get random weights, which compute as long and as much.

Limitations: other programs on the GPU are not noticed; their memory and time are in the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defusedxml import ElementTree

from sam_poll import __version__
from sam_poll.core.errors import ExitCode, ModelError
from sam_poll.core.files import write_whole
from sam_poll.core.safe_path import SafePath
from sam_poll.engines import catalog, devices

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "gpu.json"
REHEARSAL = ROOT / "build" / "gpu-rehearsal.json"
PICTURE = ROOT / "examples" / "demo" / "in" / "tray.jpg"
PROOF = "tests/engines/memory/test_gpu_proof.py"
TOTAL_S = 480
# "sam2.1_hiera_large auto: <step>: peak 1234 MiB, …"; of the simulated GPU "…: 1234 MiB of 4024"
PROVED = re.compile(r"((?:sam2\.1_hiera|sam_vit)_\w+)(?: (\w+))?: (.+?): (?:peak )?(\d+) MiB")

Figures = dict[str, Any]


class StepError(Exception):
    """Why a step has no good result."""


@dataclass(frozen=True)
class Step:
    """A command, how long it may take, and what is read from its output.

    `read` gets the folder where the command was run and what it printed; it returns the figures.
    Raises StepError where they are missing or bad. `ends_with_0`: other exit codes are a failure.
    """

    name: str
    command: tuple[str, ...]
    limit_s: float
    read: Callable[[Path, str], Figures]
    ends_with_0: bool = True


def steps(device: str) -> list[Step]:
    """Return all steps, those first whose results are wanted most."""
    card = device != "cpu"
    pytest = ("pytest", "-q", "-s", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"))
    tests = [*_marked(), "-m", "gpu", "--junitxml=tests.xml"]
    proved = "four_gib and hiera" if card else "by_estimate and hiera_large"
    bench = ["bench", "--device", device, "--part", "speed", "--json", "bench.json"]
    if card:
        bench += [
            "--part",
            "latency",
            "--rounds",
            "2",
            "--size",
            "2048x1536",
            "--size",
            "5184x3888",
        ]
        bench += ["--model", "sam2.1_hiera_tiny", "--model", "sam2.1_hiera_large"]
    else:
        bench += ["--quick"]
    mosaic = ["--device", device, "--side", "6000" if card else "1500"]
    model = _compared(card)
    compare = ["doctor", "--model", model, "--device", device, "--compare", str(PICTURE)]
    return [
        Step("proof", (*pytest, str(ROOT / PROOF), "-k", proved), 120, read_proof),
        # The share and the settings are not what is looked at here: only this section counts.
        Step(
            "compare",
            ("sam_poll", *compare, "--json"),
            45,
            lambda _, printed: {"model": model, **read_compare(printed)},
            ends_with_0=False,
        ),
        Step("bench", ("sam_poll", *bench), 150, read_bench),
        Step("mosaic", ("benchmarks.mosaic", *mosaic), 45, read_mosaic),
        Step("tests", (*pytest, *tests), 120, lambda *seen: read_tests(*seen, card=card)),
    ]


def _marked() -> list[str]:
    """Return the files with tests for a GPU but the proof: to collect all takes a minute."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    others = [path for path in files if path != ROOT / PROOF]
    return [str(path) for path in others if "pytest.mark.gpu" in path.read_text("utf-8")]


def _compared(card: bool) -> str:
    """Return the model for the comparison: random weights have nothing to agree on."""
    wanted = ("sam2.1_hiera_large", "sam2.1_hiera_tiny") if card else ()
    return next((name for name in wanted if catalog.listed(name).path), "demo")


def read_proof(_: Path, printed: str) -> Figures:
    """Return the memory of each model and precision."""
    found = [
        {"model": model, "precision": precision, "step": step, "peak_mib": int(peak)}
        for model, precision, step, peak in PROVED.findall(printed)
    ]
    if not found:
        raise StepError("no model has run: were the tests skipped?")
    return {"runs": found}


def read_compare(printed: str) -> Figures:
    """Return what `sam-poll doctor --compare` finds."""
    report = _json(printed)
    found = [one for one in report["findings"] if one["section"] == "compare"]
    bad = [one["what"] for one in found if one["level"] != "ok"]
    if bad or not found:
        raise StepError("; ".join(bad) or "nothing was compared")
    return {"findings": [one["what"] for one in found], **report["compare"]}


def read_bench(folder: Path, _: str) -> Figures:
    """Return the report of `sam-poll bench`."""
    return _json((folder / "bench.json").read_text("utf-8"))


def read_mosaic(_: Path, printed: str) -> Figures:
    """Return the figures of `benchmarks.mosaic`."""
    return _json(printed[printed.find("{") :])


def read_tests(folder: Path, _: str, *, card: bool) -> Figures:
    """Return how many tests passed and which were skipped, which on a GPU none should be."""
    suite = ElementTree.parse(folder / "tests.xml").getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    reasons = {one.get("message") for one in suite.iter("skipped")}
    if card and counts["tests"] == counts["skipped"]:
        raise StepError(f"all tests were skipped: {', '.join(sorted(map(str, reasons)))}")
    return {**counts, "skipped_for": sorted(map(str, reasons))}


def _json(text: str) -> Figures:
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise StepError(f"no JSON came: {error}") from error


def run(step: Step, folder: Path, limit_s: float) -> tuple[Figures, Figures]:
    """Run a step in `folder` and return (how it ended, its figures or {})."""
    log = folder / f"{step.name}.log"
    begun = time.monotonic()
    try:
        printed = _printed(step, folder, limit_s, log)
        figures, why = step.read(folder, printed), None
    except (StepError, OSError, KeyError, AttributeError, TypeError) as error:
        figures, why = {}, str(error) or type(error).__name__
    ended = {"ok": why is None, "seconds": round(time.monotonic() - begun, 1), "limit_s": limit_s}
    return ({**ended, "why": why} if why else ended), figures


def _printed(step: Step, folder: Path, limit_s: float, log: Path) -> str:
    """Return the output of the step's command. Raises StepError at its limit or its failure."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    output = folder / f"{step.name}.out"
    # Files and not pipes: a daemon that the step leaves would hold a pipe open.
    with output.open("w") as out, log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *step.command],
            cwd=folder,
            env=env,
            stdout=out,
            stderr=errors,
            start_new_session=True,  # so that daemons and workers of the step end with it
        )
        try:
            process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            raise StepError(f"not ready after {limit_s:.0f} s{_last(log)}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    printed = output.read_text("utf-8", "replace")
    if process.returncode and step.ends_with_0:
        raise StepError(f"exit status {process.returncode}{_last(log, printed)}")
    return printed


def _last(log: Path, printed: str = "") -> str:
    """Return the last lines that say something, for a message."""
    lines = (printed + log.read_text("utf-8", "replace")).strip().splitlines()
    return "".join(f"\n    {line[:200]}" for line in lines[-5:])


def machine(device: str) -> Figures:
    """Return what the figures belong to."""
    import torch

    found: Figures = {
        "device": device,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device.startswith("cuda"):
        card = torch.cuda.get_device_properties(torch.device(device))
        found |= {"gpu": card.name, "gpu_mib": round(card.total_memory / 2**20)}
        found |= {"capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda}
    return found


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu: a rehearsal")
    parser.add_argument("--only", action="append", help="a step; may be repeated")
    parser.add_argument("--result", type=Path, help="file for the figures")
    parser.add_argument("--patience", type=float, default=1.0, help="factor of all time limits")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run the steps; see the module's text for the exit code."""
    args = parse(words)
    try:
        device = devices.choose(args.device, "auto").name
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return ExitCode.MODEL
    rehearsal = device == "cpu"
    target: Path = args.result or (REHEARSAL if rehearsal else RESULT)
    target.parent.mkdir(parents=True, exist_ok=True)
    report: Figures = {"sam_poll": __version__, "machine": machine(device), "steps": {}}
    chosen = [step for step in steps(device) if not args.only or step.name in args.only]
    with tempfile.TemporaryDirectory(prefix="sam_poll-gpu-") as folder:
        for step in chosen:
            limit_s = step.limit_s * args.patience
            print(f"{step.name}: at most {limit_s:.0f} s …", flush=True)
            ended, figures = run(step, Path(folder), limit_s)
            print(f"  {'good' if ended['ok'] else 'FAILED'} after {ended['seconds']} s", flush=True)
            if not ended["ok"]:
                print(f"  {ended['why']}", flush=True)
            report["steps"][step.name] = ended
            report[step.name] = figures
            write_whole(SafePath.beside(target), (json.dumps(report, indent=1) + "\n").encode())
    print(f"figures: {target}")
    if not rehearsal and target == RESULT:
        from benchmarks import publish

        publish.main()
        print(f"tables: {publish.PAGE}")
    return 0 if all(ended["ok"] for ended in report["steps"].values()) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted; the figures of the steps before are written")
