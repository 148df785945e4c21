"""The house keeps its shape: imports point downward, siblings do not know each other, help starts
without torch.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGE = ROOT / "sam_poll"

# Lowest first. A package imports packages of lower levels only; those of one level do not know each
# other. Packages that are not named here fail the test: decide where a new one belongs.
LEVELS = [
    {"core"},
    {"prompts"},
    {"imaging"},
    {"share", "formats", "engines"},
    {"pipeline"},
    {"mosaic"},
    {"config"},
    {"runtime"},
    {"integrations", "diagnostics"},
    {"cvat", "cli"},
    {"", "__main__"},
]


# What acts on a path by its whole name, and so would follow a link that somebody has planted on the
# way there.
BY_NAME = {
    *(
        "open",
        "stat",
        "lstat",
        "scandir",
        "listdir",
        "walk",
        "mkdir",
        "makedirs",
        "rename",
        "replace",
        "link",
    ),
    *(
        "unlink",
        "remove",
        "rmdir",
        "chmod",
        "chown",
        "truncate",
        "copyfile",
        "copy",
        "move",
        "rmtree",
    ),
}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def level(module: str) -> int:
    return next(n for n, names in enumerate(LEVELS) if room(module) in names)


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ["sam_poll", *path.relative_to(PACKAGE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: set[str]) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in names if name in known}


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_downward(module: str) -> None:
    known = set(modules())
    for other in imported(modules()[module], known) - {"sam_poll"}:
        if room(other) != room(module):
            assert level(other) < level(module), f"{module} imports {other}, which is not below it"


def test_formats_do_not_know_each_other() -> None:
    known = {m for m in modules() if m.startswith("sam_poll.formats.")} - {
        "sam_poll.formats.registry",
        "sam_poll.formats.common",
        "sam_poll.formats.merge.common",
    }
    for module in known:
        assert not imported(modules()[module], known) - {module}, module


def test_help_starts_without_torch_and_opencv() -> None:
    code = (
        "import sys, sam_poll.cli.main; "
        "sys.exit(bool({'torch', 'cv2', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", sorted(modules()))
def test_every_module_says_what_it_is_for(module: str) -> None:
    text = modules()[module].read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), module


def test_the_share_is_touched_through_safe_paths_only() -> None:
    """In the rooms that work on the share, nothing of `os` or `shutil` acts on a path by its
    name.
    """
    found = []
    for module, path in modules().items():
        if (
            not module.startswith(("sam_poll.share.", "sam_poll.mosaic."))
            and module != "sam_poll.core.files"
        ):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            call = node.func
            by_module = isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name)
            if by_module and call.value.id in ("os", "shutil") and call.attr in BY_NAME:
                found.append(f"{module}:{node.lineno} {call.value.id}.{call.attr}")
            if isinstance(call, ast.Name) and call.id == "open":
                found.append(f"{module}:{node.lineno} open")
    assert not found


def test_no_test_file_imports_another_one() -> None:
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                assert not [n for n in names if re.match(r"tests\.(\w+\.)*test_", n)], path


def test_nothing_lies_loose_at_the_top_of_the_package() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
