"""`make release-check`: build wheel and source archive, and use the wheel as its users will.

The wheel is installed into a virtual environment of its own and used from an empty folder, so that
a file that only the checkout has is missed. The libraries are those of the environment that runs
this; with --whole they are installed as well, which takes minutes and some GB.
"""

from __future__ import annotations

import argparse
import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

from sam_poll import __version__

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
# What is not Python and must be in the wheel
WANTED = (
    "sam_poll/py.typed",
    "sam_poll/data/demo/demo.pt",
    "sam_poll/data/ui/templates/base.html",
    "sam_poll/data/fonts/LICENSE.txt",
)
PICTURE = "tray"
SMOKE = """
import sam_poll
result = sam_poll.load("demo", device="cpu").predict("tray.jpg", {"everything": True})
assert result.objects, "nothing found"
print(len(result.objects), "objects from Python")
"""


class ReleaseError(Exception):
    """Why this is no release."""


def main() -> int:
    """Run all steps; 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--whole", action="store_true", help="install the libraries, too")
    whole = parser.parse_args().whole
    try:
        wheel, archive = build()
        check_contents(wheel, archive)
        check_changelog(ROOT / "CHANGELOG.md", __version__)
        with tempfile.TemporaryDirectory() as folder:
            use(wheel, Path(folder), whole=whole)
    except ReleaseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{wheel.name} and {archive.name} are good: {DIST}")
    return 0


def build() -> tuple[Path, Path]:
    """Return the new wheel and source archive, alone in `dist/`."""
    shutil.rmtree(DIST, ignore_errors=True)
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(DIST), str(ROOT)])
    (wheel,), (archive,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    return wheel, archive


def check_contents(wheel: Path, archive: Path) -> None:
    """Raise ReleaseError where a module or a data file is missing, or tests are in the wheel."""
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "sam_poll").rglob("*.py")}
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    missing = sorted((modules | set(WANTED)) - names)
    if missing:
        raise ReleaseError(f"the wheel lacks {', '.join(missing)}")
    foreign = {name.split("/")[0] for name in names} - {"sam_poll"}
    if [name for name in foreign if not name.endswith(".dist-info")]:
        raise ReleaseError(f"the wheel has more than the package: {', '.join(sorted(foreign))}")
    with tarfile.open(archive) as tar:
        inside = {name.partition("/")[2] for name in tar.getnames()}
    missing = sorted((modules | {"LICENSE", "README.md", *WANTED}) - inside)
    if missing:
        raise ReleaseError(f"the source archive lacks {', '.join(missing)}")


def check_changelog(changelog: Path, version: str) -> None:
    """Raise ReleaseError where the changelog has no section of this version."""
    if f"\n## {version}" not in changelog.read_text(encoding="utf-8"):
        raise ReleaseError(f"CHANGELOG.md has no section `## {version}`")


def use(wheel: Path, folder: Path, *, whole: bool) -> None:
    """Install the wheel into a new environment below `folder`, and use it there."""
    environment, share = folder / "venv", folder / "empty"
    share.mkdir()
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    if whole:
        run([*install, str(wheel)])  # all that a user types
    else:
        ours = sysconfig.get_paths()["purelib"]
        paths = sysconfig.get_paths(vars={"base": str(environment)})["purelib"]
        run([*install, "--no-deps", str(wheel)])
        # After the environment's own folder: the wheel's package is found first.
        (Path(paths) / "libraries.pth").write_text(ours + "\n")
    for ending in (".jpg", ".json"):
        shutil.copy(ROOT / "examples" / "demo" / "in" / (PICTURE + ending), share)
    program = str(environment / "bin" / "sam-poll")
    where = run([str(python), "-c", "import sam_poll; print(sam_poll.__file__)"], cwd=share)
    if not where.startswith(str(environment)):
        raise ReleaseError(f"the package that is used is not the wheel's: {where}")
    told = run([program, "--version"], cwd=share)
    if __version__ not in told:
        raise ReleaseError(f"`sam-poll --version` says {told}")
    for name in scripts(wheel):
        run([str(environment / "bin" / name), "--help"], cwd=share)
    run([program, "predict", "tray.jpg", "-m", "demo", "--device", "cpu", "-o", "out"], cwd=share)
    if not (share / "out" / "tray.mask.png").stat().st_size:
        raise ReleaseError("`sam-poll predict` has written no mask")
    print(run([str(python), "-c", SMOKE], cwd=share))


def scripts(wheel: Path) -> list[str]:
    """Return the names of the programs that a wheel installs."""
    with zipfile.ZipFile(wheel) as file:
        (entry,) = (n for n in file.namelist() if n.endswith(".dist-info/entry_points.txt"))
        points = configparser.ConfigParser()
        points.read_string(file.read(entry).decode())
    return list(points["console_scripts"])


def run(command: Sequence[str], cwd: Path = ROOT) -> str:
    """Run a command and return what it prints. Raises ReleaseError where it fails."""
    # PYTHONPATH would put the checkout before the wheel.
    given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise ReleaseError(f"{' '.join(command)} ended with {done.returncode}:\n{last}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
