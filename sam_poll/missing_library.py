"""Explain an import that fails because a shared library of the system is missing.

Wheels bring most of the libraries that they link to, but not all: `opencv-python` needs those of a desktop, `rasterio`
needs Expat. Imports nothing heavy. Limitations: the packages named are those of Debian and Ubuntu.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version

from sam_poll.errors import InstallationError

# What `opencv-python` 4 and 5 need to be imported; libgl1 brings libxcb1 along.
OPENCV_PACKAGES = "libgl1 libglib2.0-0"
PACKAGES = {"libexpat.so.1": "libexpat1"}
# The wheels of the module cv2 that link to the libraries of a desktop, and the one of each that does not.
_HEADLESS = {
    "opencv-python": "opencv-python-headless",
    "opencv-contrib-python": "opencv-contrib-python-headless",
}
# The words of glibc ("libGL.so.1: cannot open shared object file") and of musl ("Error loading shared library libGL…").
_LIBRARY = re.compile(r"\b(lib[\w.+-]*\.so[.\d]*): cannot open|Error loading shared library (lib[\w.+-]*\.so[.\d]*)")


def library_in(text: str) -> str | None:
    """Return the name of the shared library that an import's error says is missing; None if it says something else."""
    found = _LIBRARY.search(text)
    return (found[1] or found[2]) if found else None


def headless_requirement() -> str:
    """Return the requirement of the headless wheel in the version of the OpenCV that is installed."""
    for name, headless in _HEADLESS.items():
        try:
            return f"{headless}=={version(name)}"
        except PackageNotFoundError:
            continue
    return "opencv-python-headless"


def headless_command() -> list[str]:
    """Return the command that replaces the files of OpenCV by those of the headless wheel.

    `--force-reinstall`: both wheels own the same files, so that pip cannot tell whose files lie there.
    `--no-deps`: all else is installed. The metadata of `opencv-python` stays, which satisfies what asks for it.
    """
    return [sys.executable, "-m", "pip", "install", "--force-reinstall", "--no-deps", headless_requirement()]


def explained(error: Exception) -> InstallationError | None:
    """Return the reason and the remedy of an ImportError; None if no shared library is missing."""
    library = library_in(str(error)) if isinstance(error, ImportError) else None
    if library is None:
        return None
    assert isinstance(error, ImportError)
    module = (error.name or "").partition(".")[0]
    if module == "cv2":
        command = " ".join(headless_command())
        return InstallationError(
            f"OpenCV cannot be loaded: the shared library {library} is missing",
            remedy=f"as root: apt install {OPENCV_PACKAGES}; or, without root: {command}",
        )
    package = PACKAGES.get(library)
    remedy = f"install the package that contains it{f': apt install {package}' if package else ''}"
    return InstallationError(
        f"{module or 'a package'} cannot be loaded: the shared library {library} is missing", remedy=remedy
    )
