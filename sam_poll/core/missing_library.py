"""Explain an import that fails because of what the system, or the installation, lacks.

That is a shared library, a folder for temporary files, which torch wants when it is imported, or a
package of an extra.

Wheels contain most of the libraries they link to, but not all: `opencv-python` needs those of a
desktop, `rasterio` needs Expat. Imports nothing heavy.

Limitations: the packages named are those of Debian and Ubuntu.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version

from sam_poll.core.errors import InstallationError, ModelError, SamPollError

# Required to import `opencv-python` 4 and 5; libgl1 depends on libxcb1.
OPENCV_PACKAGES = "libgl1 libglib2.0-0"
PACKAGES = {"libexpat.so.1": "libexpat1"}
# The wheels of the module cv2 that link to the libraries of a desktop, and the one of each that
# does not.
_HEADLESS = {
    "opencv-python": "opencv-python-headless",
    "opencv-contrib-python": "opencv-contrib-python-headless",
}
# The words of glibc ("libGL.so.1: cannot open shared object file") and of musl ("Error loading
# shared library libGL…").
_LIBRARY = re.compile(
    r"\b(lib[\w.+-]*\.so[.\d]*): cannot open|Error loading shared library (lib[\w.+-]*\.so[.\d]*)"
)


# The words of Python's `tempfile`.
_NO_TEMPORARY_FOLDER = "No usable temporary directory found"


def library_in(text: str) -> str | None:
    """Return the name of the missing shared library in an import error's text; None without one."""
    match = _LIBRARY.search(text)
    return (match[1] or match[2]) if match else None


def headless_requirement() -> str:
    """Return the requirement of the headless wheel of the installed OpenCV version."""
    for name, headless in _HEADLESS.items():
        try:
            return f"{headless}=={version(name)}"
        except PackageNotFoundError:
            continue
    return "opencv-python-headless"


def headless_command() -> list[str]:
    """Return the command that replaces OpenCV's files by those of the headless wheel.

    `--force-reinstall`: both wheels own the same files, so that pip cannot tell whose files are
    installed. `--no-deps`: the dependencies are installed already. The metadata of `opencv-python`
    stays, which satisfies packages that require it.
    """
    return [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--force-reinstall",
        "--no-deps",
        headless_requirement(),
    ]


def explained(error: Exception) -> InstallationError | None:
    """Return an error with reason and remedy for an error caused by what the system lacks.

    None for any other error.
    """
    if isinstance(error, FileNotFoundError) and _NO_TEMPORARY_FOLDER in str(error):
        return InstallationError(
            "there is no folder for temporary files that may be written to",
            remedy="set TMPDIR to one; in a container with a read-only root: --tmpfs /tmp",
        )
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
    command = f": apt install {package}" if package else ""
    remedy = f"install the package that contains it{command}"
    return InstallationError(
        f"{module or 'a package'} cannot be loaded: the shared library {library} is missing",
        remedy=remedy,
    )


def missing_extra(
    error: ModuleNotFoundError, extra: str, user: str, kind: type[SamPollError] = ModelError
) -> Exception:
    """Return the error for a package of the extra `extra` that `user` ("this command") needs.

    A missing module of this program is a bug: the error itself is returned.
    """
    if (error.name or "").partition(".")[0] == "sam_poll":
        return error
    return kind(
        f"{user} needs the package {error.name}",
        place=extra,
        remedy=f"pip install 'sam_poll[{extra}]'",
    )
