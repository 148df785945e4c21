"""`make` builds its environment in steps: an interrupted one goes on, a finished one is left alone.

A shell script stands in for Python: it writes down what it is called with, and fails where it is
told to."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support import optional
from tests.support.paths import ROOT

PYTHON = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"${FAIL:-nothing fails}"*) exit 1 ;;
esac
"""


class Checkout:
    """A checkout with a Makefile and a Python that installs nothing."""

    def __init__(self, folder: Path) -> None:
        make = shutil.which("make")
        if make is None:
            optional.lacking("make", "make")
        self.folder = folder
        self.log = folder / "log"
        self._make = make
        for name in ("Makefile", "constraints.txt", "pyproject.toml", "setup.py"):
            shutil.copyfile(ROOT / name, folder / name)
        self.python = folder / "python"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)
        self.stamp = folder / ".venv" / ".installed"

    def make(self, *targets: str, fail: str = "", **env: str) -> tuple[int, list[str]]:
        """Run make; its exit status and what Python was called with, without pip's flags."""
        self.log.write_text("")
        outside = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PIP_", "MAKE"))
        }
        done = subprocess.run(
            [self._make, *(targets or ["venv"]), f"PYTHON={self.python}"],
            cwd=self.folder,
            env={**outside, "LOG": str(self.log), "FAIL": fail or "nothing fails", **env},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, [
            line for line in self.log.read_text().splitlines() if "--version" not in line
        ]

    def steps(self, *, fail: str = "") -> list[str]:
        """What a run of `make venv` installed, by a word of each call."""
        words = (
            "torchvision",
            "sam2",
            "--editable",
            "datumaro",
            "tools.headless_opencv",
            "--upgrade pip",
            "-m venv",
        )
        _, calls = self.make(fail=fail)
        return [
            next(word for word in words if word in call)
            for call in calls
            if not call.startswith("-c ")
        ]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


ALL = [
    "-m venv",
    "--upgrade pip",
    "torchvision",
    "sam2",
    "--editable",
    "datumaro",
    "tools.headless_opencv",
]


def test_torch_comes_before_sam2_and_opencv_is_looked_at_last(checkout: Checkout) -> None:
    assert checkout.steps() == ALL


def test_a_second_run_installs_nothing(checkout: Checkout) -> None:
    checkout.make()
    assert checkout.steps() == []
    code, calls = checkout.make("demo")
    assert (code, calls) == (0, ["-m tools.demo"])


@pytest.mark.parametrize("step", ALL[1:5] + ALL[6:])
def test_what_was_interrupted_goes_on_with_its_step(checkout: Checkout, step: str) -> None:
    assert checkout.steps(fail=step)[-1] == step
    assert checkout.steps() == ALL[ALL.index(step) :]


def test_an_environment_without_pip_is_made_again(checkout: Checkout) -> None:
    """`python -m venv` was interrupted before it had put pip in."""
    assert checkout.steps(fail="-m pip") == ["-m venv", "--upgrade pip"]
    assert checkout.make(fail="pip --version")[1][1].startswith("-m venv")


def test_other_dependencies_do_not_install_torch_again(checkout: Checkout) -> None:
    checkout.make()
    later = checkout.stamp.stat().st_mtime + 10
    os.utime(checkout.folder / "pyproject.toml", (later, later))
    assert checkout.steps() == ["--editable", "datumaro", "tools.headless_opencv"]


def test_torch_comes_from_the_index_that_is_named_and_all_else_from_the_usual_one(
    checkout: Checkout,
) -> None:
    _, calls = checkout.make("venv", "TORCH_INDEX=https://example.org/whl/cpu")
    (call,) = [call for call in calls if "index-url" in call]
    assert "--extra-index-url https://example.org/whl/cpu torch>=" in call


@pytest.mark.parametrize("chosen", ["constraints.txt", ""])
def test_versions_are_those_of_the_constraints_unless_they_are_switched_off(
    checkout: Checkout, chosen: str
) -> None:
    _, calls = checkout.make("venv", f"CONSTRAINTS={chosen}")
    for word in ("torchvision", "--editable"):
        (call,) = [call for call in calls if word in call]
        assert ("--constraint constraints.txt" in call) is bool(chosen)


def test_an_environment_of_an_older_makefile_is_looked_at_and_not_built_again(
    checkout: Checkout,
) -> None:
    checkout.make()
    for file in checkout.stamp.parent.glob(".*"):
        if file != checkout.stamp:
            file.unlink()
    assert checkout.steps() == ["tools.headless_opencv"]


def test_pip_keeps_downloads_in_the_environment_where_there_is_no_home(checkout: Checkout) -> None:
    checkout.python.write_text(PYTHON + 'echo "cache: $PIP_CACHE_DIR" >> "$LOG"\n')
    inside = f"cache: {checkout.folder / '.venv' / '.pip-cache'}"
    assert inside in checkout.make(HOME=str(checkout.folder / "nobody"))[1]
    shutil.rmtree(checkout.folder / ".venv")
    assert inside not in checkout.make(HOME=str(checkout.folder))[1]
