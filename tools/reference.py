"""Write the reference tables of the documentation from the code: `python -m tools.reference`.

A page has marks, `<!-- reference: NAME -->` and `<!-- end of reference -->`; what is between them
is made anew. A test holds that the pages are what this makes.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer.main

import sam_poll
from sam_poll.cli import main as program
from sam_poll.config.settings import Settings, env_name, keys
from sam_poll.core.errors import ExitCode
from sam_poll.core.telemetry import Telemetry
from sam_poll.prompts import schema
from tools.wrap_docs import wrapped

DOCS = Path(__file__).resolve().parent.parent / "docs"
MARKED = re.compile(
    r"(<!-- reference: ([\w-]+) -->\n).*?(<!-- end of reference -->)", flags=re.DOTALL
)

PIPE = r"\|"  # within a cell

# Values whose form is checked by code; the schema only knows that they are texts.
FORMS = {
    "model": "a name or a path",
    "model_cfg": "a path",
    "device": "auto, cpu, mps, cuda, cuda:0",
    "devices": "a list of devices",
    "formats": "a list of [format names](formats.md)",
    "watch.ignore": "a list of patterns",
    "health.metrics": "host:port, a port",
    "serve.listen": "host:port, or a port",
    "serve.hosts": "a list of host names",
    "serve.origins": "a list of origins, `https://example.org`",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(cell.replace('|', PIPE) for cell in row)} |" for row in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


# ── settings ──


def settings_table() -> str:
    """Return each key with its variable, default, allowed values and meaning."""
    whole = Settings.model_json_schema()
    rows = []
    for key, default in keys().items():
        part: dict[str, Any] = whole
        for name in key.split("."):
            part = _resolved(part["properties"][name], whole)
        shown = f"`{_default(default)}`"
        allowed = _allowed(part, FORMS.get(key))
        rows.append([f"`{key}`", f"`{env_name(key)}`", shown, allowed, part["description"]])
    return table(["key", "variable", "default", "allowed", "meaning"], rows)


def _resolved(part: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in part:
        return part
    return {**whole["$defs"][part["$ref"].rsplit("/", 1)[1]], **part}


def _default(value: object) -> str:
    """Return a default as config.yaml has it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    return f"{value:.0f}" if isinstance(value, float) and value.is_integer() else str(value)


def _allowed(part: dict[str, Any], form: str | None = None) -> str:
    if "anyOf" in part:
        either = [_allowed(one, form) for one in part["anyOf"]]
        return " or ".join(either)
    if "const" in part or "enum" in part:
        return ", ".join(map(str, part.get("enum") or [part["const"]]))
    if part["type"] in ("number", "integer"):
        return _number(part)
    known = {"null": "null", "boolean": "true, false"}
    return known.get(part["type"]) or form or {"path": "a path"}[part["format"]]


def _number(part: dict[str, Any]) -> str:
    kind = "a number" if part["type"] == "number" else "a whole number"
    if "exclusiveMinimum" in part:
        return f"{kind} above {part['exclusiveMinimum']}"
    low, high = part.get("minimum"), part.get("maximum")
    if low is None and high is None:
        return kind
    if low is None:
        return f"{kind} up to {high}"
    return f"{kind} from {low}" if high is None else f"{kind}, {low} – {high}"


# ── commands ──


def flags() -> str:
    """Return each command with its arguments and flags, as `--help` explains them."""
    parts = []
    for words, command in _commands(typer.main.get_command(program.app)):
        arguments = [_metavar(one) for one in command.params if _is_argument(one)]
        usage = " ".join(["sam-poll", *words, *arguments])
        help_ = re.sub(r"\s+", " ", command.help)
        parts.append(f"## `sam-poll {' '.join(words)}`\n\n{help_}\n\n```text\n{usage} [FLAGS]\n```")
        rows = [[_names(one), one.help or "", _flag_default(one)] for one in command.params]
        if rows:
            parts.append(table(["flag", "meaning", "default"], rows))
    return "\n\n".join(parts)


def _commands(group: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


def _is_argument(one: Any) -> bool:
    return not one.opts[0].startswith("-")


def _metavar(one: Any) -> str:
    name: str = one.metavar or one.name.upper() + ("…" if one.nargs < 0 else "")
    return name if one.required or name.startswith("[") else f"[{name}]"


def _names(one: Any) -> str:
    names = [_metavar(one)] if _is_argument(one) else one.opts
    return ", ".join(f"`{name}`" for name in names)


def _flag_default(one: Any) -> str:
    if one.required:
        return "required"
    if one.default in (None, False, ""):
        return ""
    return f"`{one.default:g}`" if isinstance(one.default, float) else f"`{one.default}`"


def exit_codes() -> str:
    """Return the table of exit codes."""
    rows = [[str(code.value), f"`{code.name}`", code.meaning] for code in ExitCode]
    return table(["code", "name", "when"], rows)


# ── prompt files ──


def prompt_schema() -> str:
    """Return the forms of a prompt file, and of what is in it, with all keys."""
    whole = schema.schema()
    files = [one["$ref"].rsplit("/", 1)[1] for one in whole["anyOf"]]
    parts = []
    for name in dict.fromkeys([*files, *whole["$defs"]]):
        part = whole["$defs"][name]
        required = part.get("required", [])
        rows = [
            [f"`{key}`", _type(one), _key_default(key, one, required), _meaning(one, whole)]
            for key, one in part["properties"].items()
        ]
        text = f"## {name}\n\n{part.get('description', '')}".rstrip()
        parts.append(f"{text}\n\n{table(['key', 'value', 'default', 'meaning'], rows)}")
    return "\n\n".join(parts)


def _type(part: dict[str, Any]) -> str:
    if "$ref" in part:
        name = part["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in part:
            return " or ".join(map(_type, part[several]))
    if "const" in part or "enum" in part:
        return ", ".join(f"`{json.dumps(one)}`" for one in part.get("enum") or [part["const"]])
    if part.get("type") == "array":
        return f"list of {_count(part)}{_type(part['items'])}"
    if part.get("type") in ("number", "integer"):
        return _number(part)
    if part.get("type") == "string":
        return f"text, at most {part['maxLength']:,} characters" if "maxLength" in part else "text"
    return str(part.get("type", "any"))


def _count(part: dict[str, Any]) -> str:
    least, most = part.get("minItems", 0), part.get("maxItems")
    if most is None:
        return f"{least} or more × " if least else ""
    return f"{least} × " if least == most else f"{least} – {most:,} × "


def _key_default(key: str, part: dict[str, Any], required: list[str]) -> str:
    if key in required:
        return "required"
    return f"`{json.dumps(part['default'])}`" if part.get("default") is not None else ""


def _meaning(part: dict[str, Any], whole: dict[str, Any]) -> str:
    return str(_resolved(part, whole).get("description", ""))


# ── metrics, Python ──


class _Share:
    waiting = orphans = recovered = 0
    oldest_s = last_scan = 0.0


def metrics() -> str:
    """Return the table of metrics, with their labels."""
    from sam_poll.runtime.metrics import MetricsCollector

    endings = {"counter": "_total", "info": "_info"}
    rows = []
    for metric in MetricsCollector(Telemetry(), _Share()).collect():
        labels = dict.fromkeys(name for sample in metric.samples for name in sample.labels)
        labels.pop("le", None)
        shown = f"{{{','.join(labels)}}}" if labels else ""
        name = metric.name + endings.get(metric.type, "")
        rows.append([f"`{name}{shown}`", metric.type, metric.documentation])
    return table(["metric", "kind", "meaning"], rows)


def api() -> str:
    """Return the public functions and classes with their signatures and docstrings."""
    parts = []
    for name in ("load", "Model", "Prediction", "PredictedObject"):
        value = getattr(sam_poll, name)
        if not inspect.isclass(value):
            parts.append(f"## `sam_poll.{name}`\n\n{_function(value)}")
            continue
        parts.append(f"## `{name}`\n\n{_docstring(value)}")
        for member, one in vars(value).items():
            if member.startswith("_"):
                continue
            if inspect.isfunction(one):
                parts.append(f"### `{name}.{member}`\n\n{_function(one)}")
                continue
            read = one.fget if isinstance(one, property) else getattr(one, "func", None)
            if read is not None:
                kind = inspect.signature(read).return_annotation
                parts.append(f"### `{name}.{member}`\n\n`{kind}`\n\n{_docstring(read)}")
    return "\n\n".join(parts)


def _function(function: Callable[..., Any]) -> str:
    """Return a function's signature, as its source has it, and its docstring."""
    (made,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(made, ast.FunctionDef)
    made.body = [ast.Expr(ast.Constant(...))]
    code = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--isolated", "--line-length=100", "-"],
        input=ast.unparse(made),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return f"```python\n{code}```\n\n{_docstring(function)}"


def _docstring(value: Any) -> str:
    """Return a docstring; pages that it names become links."""
    return re.sub(r"docs/([\w-]+\.md)", r"[\1](\1)", inspect.getdoc(value) or "")


BLOCKS: dict[str, Callable[[], str]] = {
    "settings": settings_table,
    "flags": flags,
    "exit-codes": exit_codes,
    "prompt-schema": prompt_schema,
    "metrics": metrics,
    "api": api,
}


def written(text: str) -> str:
    """Return a page with each marked part made anew."""
    return wrapped(
        MARKED.sub(lambda found: f"{found[1]}\n{BLOCKS[found[2]]()}\n\n{found[3]}", text)
    )


def main() -> int:
    """Rewrite the pages that have marks."""
    for page in DOCS.rglob("*.md"):
        text = page.read_text("utf-8")
        if MARKED.search(text):
            page.write_text(written(text), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
