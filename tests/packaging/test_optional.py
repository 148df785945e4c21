"""What optional parts need is missing: their tests are skipped in one line that names the package,
and fail in CI.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

NO_EXPAT = (
    'raise ImportError("libexpat.so.1: cannot open shared object file: No such file or '
    'directory")\n'
)
LINE = "there is no libexpat.so.1: apt install libexpat1"


def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, ci: bool = False, **files: str
) -> tuple[int, str]:
    """Run files of tests in a process of their own, with the hooks; its exit status and what it
    prints.
    """
    monkeypatch.setenv("CI", str(ci).lower())
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.support.optional",
        "-p",
        "no:cacheprovider",
        "-ra",
        str(folder),
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


@pytest.mark.slow
def test_files_that_need_a_missing_library_are_skipped_in_one_line_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = "def test_plain():\n    pass\n"
    code, said = run(tmp_path, monkeypatch, test_a=NO_EXPAT, test_b=NO_EXPAT, test_c=plain)
    assert code == 0, said
    assert said.count(LINE) == 1
    assert "1 passed, 2 skipped" in said


@pytest.mark.slow
def test_a_test_or_a_fixture_that_needs_a_missing_library_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = (
        f"import pytest\n@pytest.fixture\ndef raster():\n    {NO_EXPAT}def "
        "test_raster(raster):\n    pass\n"
    )
    code, said = run(
        tmp_path, monkeypatch, test_a=f"def test_body():\n    {NO_EXPAT}", test_b=fixture
    )
    assert code == 0, said
    assert "2 skipped" in said
    assert LINE in said


@pytest.mark.slow
def test_programs_that_are_missing_make_one_line_for_all_their_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = (
        "@pytest.fixture\ndef server():\n    optional.lacking('redis-server', 'redis-server')\n"
    )
    tests = "".join(f"def test_{n}(server):\n    pass\n" for n in range(3))
    code, said = run(
        tmp_path,
        monkeypatch,
        test_a=f"import pytest\nfrom tests.support import optional\n{fixture}{tests}",
    )
    assert code == 0, said
    assert said.count("there is no redis-server: apt install redis-server") == 1


@pytest.mark.slow
def test_ci_must_have_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (NO_EXPAT, f"def test_body():\n    {NO_EXPAT}"):
        code, said = run(tmp_path, monkeypatch, ci=True, test_a=text)
        assert code != 0
        assert "libexpat.so.1" in said


@pytest.mark.slow
def test_any_other_import_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = run(tmp_path, monkeypatch, test_a="import there_is_no_such_module\n")
    assert code != 0
    assert "there_is_no_such_module" in said


@pytest.mark.slow
def test_a_program_that_is_missing_skips_and_in_ci_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "from tests.support import optional\ndef test_it():\n    "
        "optional.lacking('redis-server', 'redis-server')\n"
    )
    code, said = run(tmp_path, monkeypatch, test_a=text)
    assert code == 0, said
    assert "there is no redis-server: apt install redis-server" in said
    code, said = run(tmp_path, monkeypatch, ci=True, test_a=text)
    assert code == 1
    assert "CI must have one" in said
