"""`make lock`: write constraints.txt, the versions that CI and the images install.

uv resolves the extra `dev`, which names all others, once for all supported versions of Python. What
constraints.txt has and still fits is kept; to take a newer version of a package, remove its line.
torch's own libraries (CUDA, triton) are left out: each build of torch names its own exactly.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "constraints.txt"
OLDEST_PYTHON = "3.10"
# 2.14 is the last torch with a build for CUDA 12.6, which Volta, Pascal and Maxwell cards need.
NEWEST = ("torch<2.15", "torchvision<0.30")
OF_TORCH = re.compile(r"(nvidia|cuda)-|triton==")
HEAD = """\
# The versions that the tests ran with. Made by `make lock`; not for the package's users.
"""


def resolve(uv: str) -> str:
    """Return the pinned versions, a line each with its marker. Raises CalledProcessError."""
    command = [uv, "pip", "compile", "--quiet", "--universal", "--no-annotate", "--no-header"]
    options = ["--python-version", OLDEST_PYTHON, "--extra", "dev", "--constraint", "-"]
    # The file that is there is read for the versions to keep, and written.
    subprocess.run(
        [*command, *options, "--output-file", str(FILE), str(ROOT / "pyproject.toml")],
        input="\n".join(NEWEST),
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return FILE.read_text("utf-8")


def without_torchs_own(text: str) -> str:
    """Return the lines of packages that are not libraries of one build of torch."""
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    return HEAD + "".join(f"{line}\n" for line in lines if not OF_TORCH.match(line))


def main() -> int:
    """Rewrite constraints.txt; 1 where uv is missing or finds no versions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--uv", default="uv", help="the program")
    uv = parser.parse_args().uv
    try:
        text = resolve(uv)
    except FileNotFoundError:
        print(f"error: {uv} is not installed; try: pip install uv", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return int(error.returncode)
    FILE.write_text(without_torchs_own(text), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
