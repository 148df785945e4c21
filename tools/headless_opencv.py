"""Put `opencv-python-headless` over `opencv-python` where OpenCV cannot be imported; the Makefile
runs this.

`opencv-python` links to the libraries of a desktop, which a server or a container does not have.
The headless wheel of the same version has the same module without them, and needs no root to be
installed."""

from __future__ import annotations

import subprocess
import sys

from sam_poll.core.missing_library import headless_command, headless_requirement, library_in


def import_error() -> str | None:
    """Return why `import cv2` fails in a fresh process, in a few words; None if it does not."""
    done = subprocess.run(
        [sys.executable, "-c", "import cv2"], capture_output=True, text=True, check=False
    )
    if not done.returncode:
        return None
    library = library_in(done.stderr)
    if library:
        return f"{library} is missing"
    lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
    return lines[-1]


def main() -> int:
    """Return 0 if OpenCV can be imported, at once or after the headless wheel has been
    installed.
    """
    why = import_error()
    if why is None:
        return 0
    # Also where something else is wrong: an installation that was interrupted leaves half of the
    # files.
    print(
        f"OpenCV: {why}; installing {headless_requirement()} instead (the same module, without "
        "windows)",
        flush=True,
    )
    code = subprocess.run(
        [*headless_command(), "--disable-pip-version-check", "--quiet"], check=False
    ).returncode
    if code:
        return code
    why = import_error()
    if why is not None:
        print(f"error: OpenCV cannot be imported: {why}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
