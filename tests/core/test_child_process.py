"""Child processes: their import path, their end with the parent, their standard output."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sam_poll.core import child_process

MODULE = """
import sys
from sam_poll.core import child_process

messages = child_process.reserve_stdout()
print("from a library", flush=True)
messages.write(repr((__name__, sys.argv[1:], sys.path)))
messages.flush()
child_process.end_with_parent()
import threading
threading.Event().wait(60)
sys.exit(9)
"""


def test_a_child_has_the_parents_import_path_and_ends_when_its_input_is_closed(
    tmp_path: Path,
) -> None:
    """The current directory is not on the path, although a module there has the name."""
    modules, current = tmp_path / "modules", tmp_path / "current"
    for folder, text in ((modules, MODULE), (current, "raise SystemExit('the wrong module')")):
        folder.mkdir()
        (folder / "a_child.py").write_text(text)
    sys.path.append(str(modules))
    try:
        command = child_process.command("a_child", "--flag", "a value")
        path = list(sys.path)
    finally:
        sys.path.remove(str(modules))
    with subprocess.Popen(
        command,
        cwd=current,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, repr(("__main__", ["--flag", "a value"], path)))
    assert err == "from a library\n"
