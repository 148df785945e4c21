"""What a release consists of: the version is one everywhere, and an incomplete wheel is refused."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from sam_poll import __version__
from tests.support.paths import ROOT
from tools import release_check


def packed(tmp_path: Path, without: str = "", extra: str = "") -> tuple[Path, Path]:
    """A wheel and a source archive with the names of all files that they should have, but one."""
    modules = [str(path.relative_to(ROOT)) for path in (ROOT / "sam_poll").rglob("*.py")]
    names = [*modules, *release_check.WANTED, "sam_poll-1.dist-info/METADATA"]
    wheel, archive = tmp_path / "a.whl", tmp_path / "a.tar.gz"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in {*names, extra} - {without, ""}:
            file.writestr(name, "")
    with tarfile.open(archive, "w:gz") as tar:
        for name in {*names, "LICENSE", "README.md"} - {without}:
            tar.addfile(tarfile.TarInfo(f"sam_poll-1/{name}"))
    return wheel, archive


def test_a_complete_wheel_and_archive_pass(tmp_path: Path) -> None:
    release_check.check_contents(*packed(tmp_path))


@pytest.mark.parametrize(
    ("without", "extra", "reason"),
    [
        ("sam_poll/data/demo/demo.pt", "", "wheel lacks sam_poll/data/demo/demo.pt"),
        ("sam_poll/cli/main.py", "", "wheel lacks sam_poll/cli/main.py"),
        ("LICENSE", "", "archive lacks LICENSE"),
        ("", "tests/conftest.py", "more than the package: sam_poll.*tests"),
    ],
)
def test_what_lacks_a_file_or_has_a_foreign_one_is_refused(
    tmp_path: Path, without: str, extra: str, reason: str
) -> None:
    with pytest.raises(release_check.ReleaseError, match=reason):
        release_check.check_contents(*packed(tmp_path, without, extra))


def test_a_version_without_notes_is_refused(tmp_path: Path) -> None:
    notes = tmp_path / "CHANGELOG.md"
    notes.write_text("# Changelog\n\n## 1.2.3 (2026-01-01)\n")
    release_check.check_changelog(notes, "1.2.3")
    with pytest.raises(release_check.ReleaseError, match=r"## 1\.2\.4"):
        release_check.check_changelog(notes, "1.2.4")


def test_the_version_is_the_same_in_the_citation() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__


def test_hosted_checks_run_what_everybody_runs_on_each_supported_python() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text())["jobs"]
    supported = [f"3.{minor}" for minor in range(10, 14)]
    assert jobs["check"]["strategy"]["matrix"]["python"] == supported
    assert [step["run"] for step in jobs["check"]["steps"] if "run" in step] == [".ci/run"]
    assert f'requires-python = ">={supported[0]}"' in (ROOT / "pyproject.toml").read_text()
    (made,) = (s["run"] for s in jobs["package"]["steps"] if "make" in s.get("run", ""))
    assert made.split()[1] + ":" in (ROOT / "Makefile").read_text()
    install, build = (step["run"] for step in jobs["docs"]["steps"] if "run" in step)
    extra = install.removeprefix("pip install ").strip("'")
    docs = (ROOT / "pyproject.toml").read_text().partition("\ndocs = [")[2].partition("\n]")[0]
    assert f'"{extra}"' in docs
    assert build.endswith("mkdocs build --strict")


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_forms_for_reports_have_what_the_site_requires(name: str) -> None:
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert form["name"]
    assert form["description"]
    for field in form["body"]:
        assert field["type"] == "textarea"
        assert field["attributes"]["label"]


def test_every_dependency_says_what_it_is_for() -> None:
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    start, end = lines.index("dependencies = ["), lines.index("[project.scripts]")
    packages = [line for line in lines[start:end] if line.startswith('  "')]
    assert len(packages) > 50
    assert [line for line in packages if "  # " not in line] == []
