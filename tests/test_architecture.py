"""The house keeps its shape: imports point downward, siblings do not know each other, help starts without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "sam_poll"

# A room may import rooms of a lower level only. Rooms not named here fail the test: decide where a new one belongs.
LEVELS = [
    {"sam_poll.safe_root"},
    {"sam_poll", "sam_poll.errors", "sam_poll.safe_path", "sam_poll.streams"},
    {
        "sam_poll.types",
        "sam_poll.fs",
        "sam_poll.complaints",
        "sam_poll.wire",
        "sam_poll.xml_safely",
        "sam_poll.tiff_kinds",
        "sam_poll.missing_library",
    },
    {
        "sam_poll.yaml_lines",
        "sam_poll.foreign",
        "sam_poll.prompt_forms",
        "sam_poll.geometry",
        "sam_poll.png",
        "sam_poll.headers",
        "sam_poll.sidecars",
        "sam_poll.stats",
        "sam_poll.alarms",
        "sam_poll.embeddings",
        "sam_poll.base64_text",
    },
    {"sam_poll.tiff_samples"},
    {"sam_poll.images", "sam_poll.prompts", "sam_poll.bytesof", "sam_poll.tasks", "sam_poll.everything"},
    {"sam_poll.annotations", "sam_poll.endings"},
    {"sam_poll.engines", "sam_poll.formats", "sam_poll.pipeline", "sam_poll.doors", "sam_poll.mosaic"},
    {"sam_poll.setting_kinds", "sam_poll.member", "sam_poll.predictor"},
    {"sam_poll.settings", "sam_poll.console", "sam_poll.health", "sam_poll.fleet"},
    {"sam_poll.metrics", "sam_poll.reporting", "sam_poll.given"},
    {"sam_poll.oneoff", "sam_poll.app"},
    {"sam_poll.cvat", "sam_poll.mosaic_cli", "sam_poll.redis_run", "sam_poll.cluster_run"},
    {
        "sam_poll.bench",
        "sam_poll.doctor",
        "sam_poll.serve",
        "sam_poll.redis_cli",
        "sam_poll.cluster_cli",
        "sam_poll.redis_waikato",
    },
    {"sam_poll.cli"},
    {"sam_poll.waikato", "sam_poll.__main__"},
]
# Within one room, modules may know each other; of its siblings, only these may be known.
ROOMS = (
    "sam_poll.engines",
    "sam_poll.formats",
    "sam_poll.doors",
    "sam_poll.bench",
    "sam_poll.annotations",
    "sam_poll.cvat",
    "sam_poll.mosaic",
    "sam_poll.serve",
    "sam_poll.doctor",
)


# What acts on a path by its whole name, and so would follow a link that somebody has planted on the way there.
BY_NAME = {
    *("open", "stat", "lstat", "scandir", "listdir", "walk", "mkdir", "makedirs", "rename", "replace", "link"),
    *("unlink", "remove", "rmdir", "chmod", "chown", "truncate", "copyfile", "copy", "move", "rmtree"),
}


def room(module: str) -> str:
    return next((r for r in ROOMS if module == r or module.startswith(r + ".")), module)


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
    known = {m for m in modules() if m.startswith("sam_poll.formats.")}
    for module in known:
        assert not imported(modules()[module], known) - {module}, module


def test_help_starts_without_torch_and_opencv() -> None:
    code = "import sys, sam_poll.cli; sys.exit(bool({'torch', 'cv2', 'numpy', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("module", sorted(modules()))
def test_every_module_says_what_it_is_for(module: str) -> None:
    text = modules()[module].read_text()
    if text.strip():
        assert ast.get_docstring(ast.parse(text)), module


def test_the_share_is_touched_through_safe_paths_only() -> None:
    """In the rooms that work on the share, nothing of `os` or `shutil` acts on a path by its name."""
    found = []
    for module, path in modules().items():
        if not module.startswith(("sam_poll.doors.", "sam_poll.mosaic.")) and module != "sam_poll.fs":
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
