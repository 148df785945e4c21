"""`make lock` and what it has written: constraints.txt."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT
from tests.support.project_file import constraints, project
from tools import lock


def pinned(python: str) -> dict[str, str]:
    """The versions for Linux on x86-64 with this Python, by name."""
    place = {
        "python_version": python,
        "python_full_version": f"{python}.2",
        "sys_platform": "linux",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "platform_system": "Linux",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "extra": "",
    }
    found: dict[str, str] = {}
    for wanted in map(Requirement, constraints()):
        if wanted.marker is None or wanted.marker.evaluate(place):
            (version,) = wanted.specifier
            assert version.operator == "=="
            assert canonicalize_name(wanted.name) not in found, f"{wanted.name} twice"
            found[canonicalize_name(wanted.name)] = version.version
    return found


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_what_the_project_and_its_extras_name_is_pinned_to_a_version_that_fits(python: str) -> None:
    """A change of dependencies needs `make lock`."""
    versions, told = pinned(python), project()
    extras = {
        name: lines for name, lines in told["optional-dependencies"].items() if name != "fuzz"
    }
    for line in [*told["dependencies"], *(line for lines in extras.values() for line in lines)]:
        wanted = Requirement(line)
        if wanted.name != "sam_poll":
            version = versions[canonicalize_name(wanted.name)]
            assert wanted.specifier.contains(version), f"{line}: {version}"


def test_libraries_of_one_build_of_torch_are_not_pinned() -> None:
    """Builds for CPUs and for CUDA 12.6 have others, which they name exactly."""
    text = "nvidia-cublas==13.1\ncuda-toolkit==13\ntriton==3.8\ntorch==2\n# a note\n"
    assert lock.without_torchs_own(text) == f"{lock.HEAD}torch==2\n"
    assert not [line for line in constraints() if re.match(r"nvidia|cuda|triton", line)]


def test_torch_is_one_that_has_a_build_for_cuda_12_6() -> None:
    major, minor, *_ = map(int, pinned("3.12")["torch"].split("."))
    assert (major, minor) <= (2, 14)


def test_without_uv_the_remedy_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    kept = tmp_path / "constraints.txt"
    shutil.copy(ROOT / "constraints.txt", kept)
    monkeypatch.setattr(lock, "FILE", kept)
    monkeypatch.setattr("sys.argv", ["lock", "--uv", str(tmp_path / "none")])
    assert lock.main() == 1
    assert "pip install uv" in capsys.readouterr().err
    assert kept.read_text() == (ROOT / "constraints.txt").read_text()
