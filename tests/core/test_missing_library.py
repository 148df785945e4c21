"""A shared library that this machine lacks: every command names the remedies, and the Makefile
applies one.

A package `cv2` that fails to import stands in for OpenCV without its libraries, a package `pip` for
the installer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sam_poll.core import missing_library
from sam_poll.core.errors import ExitCode
from tests.support.paths import ROOT

MISSING = "cannot open shared object file: No such file or directory"
HEADLESS = "opencv-python-headless==4.12.0.88"
COMMANDS = {
    "watch": ["sam_poll", "watch", "in", "--once", "-m", "fake"],
    "predict": ["sam_poll", "predict", "dog.jpg", "--everything", "-o", "answers"],
    "check": ["sam_poll", "check", "dog.jpg"],
    "doctor": ["sam_poll", "doctor", "--quick"],
    "mosaic": ["sam_poll", "mosaic", "dog.jpg", "-o", "answers"],
    "serve": ["sam_poll", "serve"],
    "sam_predict_poll": [
        "waikato",
        "--model",
        "fake",
        "--prediction_in",
        "in",
        "--prediction_out",
        "out",
    ],
    "sam_predict_redis": [
        "redis_waikato",
        "--model",
        "fake",
        "--redis_in",
        "a",
        "--redis_out",
        "b",
    ],
}
STARTS = {
    "sam_poll": "cli.main:main",
    "waikato": "cli.waikato_poll:main",
    "redis_waikato": "cli.waikato_redis:predict_main",
}


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder for `sys.path` with an OpenCV of a known version that lacks a library."""
    (tmp_path / "cv2").mkdir()
    without(tmp_path, "libGL.so.1")
    metadata = tmp_path / "opencv_python-4.12.0.88.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: opencv-python\nVersion: 4.12.0.88\n"
    )
    (tmp_path / "in").mkdir()
    return tmp_path


def without(machine: Path, library: str) -> None:
    line = f"raise ImportError({f'{library}: {MISSING}'!r}, name='cv2', path='cv2.abi3.so')\n"
    (machine / "cv2" / "__init__.py").write_text(line)


def run(machine: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {
        **os.environ,
        "PYTHONPATH": f"{machine}{os.pathsep}{ROOT}",
        "COLUMNS": "1000",
        "NO_COLOR": "1",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=machine,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


def command(machine: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program by what pyproject.toml says it starts with."""
    module, _, function = STARTS[arguments[0]].partition(":")
    return run(
        machine, "-c", f"from sam_poll.{module} import {function}; {function}()", *arguments[1:]
    )


# ── the installed program ──


@pytest.mark.slow
@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_every_program_names_both_remedies_and_is_no_bug(
    machine: Path, arguments: list[str]
) -> None:
    done = command(machine, *arguments)
    assert done.returncode == ExitCode.MODEL, done.stderr
    assert "OpenCV cannot be loaded: the shared library libGL.so.1 is missing" in done.stderr
    assert "apt install libgl1 libglib2.0-0" in done.stderr
    assert f"-m pip install --force-reinstall --no-deps {HEADLESS}" in done.stderr
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr


@pytest.mark.parametrize("library", ["libxcb.so.1", "libgthread-2.0.so.0", "libSM.so.6"])
def test_any_missing_library_of_a_desktop_is_reported(machine: Path, library: str) -> None:
    without(machine, library)
    done = command(machine, *COMMANDS["check"])
    assert done.returncode == ExitCode.MODEL
    assert f"the shared library {library} is missing" in done.stderr


def test_the_doctor_reports_it_as_json(machine: Path) -> None:
    done = command(machine, *COMMANDS["doctor"], "--json")
    told = json.loads(done.stdout)
    (finding,) = told["findings"]
    assert (told["exit_code"], finding["section"], finding["level"]) == (
        ExitCode.MODEL,
        "machine",
        "problem",
    )
    assert "apt install" in finding["remedy"]
    assert HEADLESS in finding["remedy"]


def test_help_and_version_need_no_opencv(machine: Path) -> None:
    for arguments in (["sam_poll", "--help"], ["sam_poll", "--version"], ["waikato", "--help"]):
        assert command(machine, *arguments).returncode == 0


def test_a_library_of_another_package_is_reported_with_that_package() -> None:
    error = missing_library.explained(
        ImportError(f"libexpat.so.1: {MISSING}", name="rasterio._base")
    )
    assert error is not None
    assert "rasterio cannot be loaded" in error.reason
    assert "apt install libexpat1" in (error.remedy or "")
    unknown = missing_library.explained(ImportError(f"libodd-2.so.3: {MISSING}"))
    assert unknown is not None
    assert "libodd-2.so.3" in unknown.reason


def test_musl_says_it_in_other_words() -> None:
    assert (
        missing_library.library_in("Error loading shared library libGL.so.1: No such file")
        == "libGL.so.1"
    )


@pytest.mark.parametrize(
    "error", [ImportError("cannot import name 'x' from 'y'"), ValueError(f"libGL.so.1: {MISSING}")]
)
def test_any_other_error_stays_a_surprise(error: Exception) -> None:
    assert missing_library.explained(error) is None


# ── the Makefile's step ──


def installer(machine: Path, then: str) -> Path:
    """Install a fake pip that records its arguments and replaces OpenCV by `then`."""
    (machine / "pip").mkdir()
    (machine / "pip" / "__init__.py").touch()
    (machine / "pip" / "__main__.py").write_text(
        f"import pathlib, sys\npathlib.Path('asked').write_text(' '.join(sys.argv[1:]))\n"
        f"pathlib.Path('cv2/__init__.py').write_text({then!r})\n"
    )
    return machine / "asked"


def headless(machine: Path) -> subprocess.CompletedProcess[str]:
    return run(machine, "-m", "tools.headless_opencv")


def test_the_headless_wheel_of_the_same_version_is_put_over_opencv_and_one_line_says_so(
    machine: Path,
) -> None:
    asked = installer(machine, then="")
    done = headless(machine)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "libGL.so.1 is missing" in line
    assert HEADLESS in line
    assert {"install", "--force-reinstall", "--no-deps", HEADLESS} <= set(asked.read_text().split())


def test_half_an_opencv_is_replaced_too(machine: Path) -> None:
    (machine / "cv2" / "__init__.py").write_text("from cv2 import nothing_is_here\n")
    asked = installer(machine, then="")
    assert headless(machine).returncode == 0
    assert HEADLESS in asked.read_text()


def test_an_opencv_that_works_is_left_alone(machine: Path) -> None:
    (machine / "cv2" / "__init__.py").write_text("")
    asked = installer(machine, then="")
    done = headless(machine)
    assert (done.returncode, done.stdout) == (0, "")
    assert not asked.exists()


def test_what_the_headless_wheel_does_not_mend_ends_the_build(machine: Path) -> None:
    installer(machine, then="raise ImportError('another thing')\n")
    done = headless(machine)
    assert done.returncode == 1
    assert "another thing" in done.stderr


def test_a_read_only_container_is_told_which_folder_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(FileNotFoundError) as caught:
        tempfile.gettempdir()
    explained = missing_library.explained(caught.value)
    assert explained is not None
    assert explained.exit_code == ExitCode.MODEL
    assert "--tmpfs /tmp" in (explained.remedy or "")
