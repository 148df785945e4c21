"""Read YAML into plain values, with the line number of every key.

PyYAML's own `safe_load` follows YAML 1.1, where `on` is true, `12:30` is 750, `010` is 8 and `1e3`
is a text; it keeps the last of two equal keys, and drops line numbers. This reader takes a plain
word as `null`, `true`, `false`, a decimal number or a text, as in YAML 1.2, and reports equal keys.
Anchors, aliases and tags are refused: settings need none, and aliases can make a small file expand
without limit. Every text gives values or YamlError.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, TypeAlias

import yaml

from sam_poll.core.validation import Loc, ValidationIssue, quoted

Lines: TypeAlias = dict[Loc, int]

_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    spelled: value
    for word, value in (("true", True), ("false", False))
    for spelled in (word, word.title(), word.upper())
}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF|nan|NaN|NAN)")
_TAG = "tag:yaml.org,2002:"


class YamlError(Exception):
    """The text is not YAML that this reader accepts; `line` counts from 1."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


class _Loader(yaml.SafeLoader):
    """Only its scanner, parser and composer are used; `scalar` interprets plain words."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way of saying so

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise YamlError("aliases (*name) are not supported", event.start_mark.line + 1)
        return super().compose_node(parent, index)


def scalar(text: str) -> Any:
    """Return the value of a plain word: None, bool, int, float or str.

    Integers of more than 18 digits become float, whose number of digits is not limited.
    """
    text = text.strip()
    if text in _WORDS:
        return _WORDS[text]
    if re.fullmatch(r"[-+]?[0-9]{1,18}", text, re.ASCII):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "", 1)) if _NOT_FINITE.fullmatch(text) else text


class YamlDocument(NamedTuple):
    """A YAML file: values, the line of every key and entry, and an issue for each repeated key."""

    values: Any
    lines: Lines
    issues: list[ValidationIssue]


def read_yaml(text: str) -> YamlDocument:
    """Read a YAML text. Raises YamlError."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: Lines = {}
        issues: list[ValidationIssue] = []
        values = None if node is None else _value(node, (), lines, issues)
        return YamlDocument(values, lines, issues)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = re.sub(r"\s+", " ", f"{error.context or ''} {error.problem or ''}".strip())
        raise YamlError(f"not YAML: {message}", mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError("contains a character that YAML does not allow", line) from None
    except RecursionError:
        raise YamlError("nested too deeply") from None


def _value(node: yaml.Node, loc: Loc, lines: Lines, issues: list[ValidationIssue]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(loc, line)
    if node.tag != _TAG + _default_tag(node):
        tag = quoted(node.tag.replace(_TAG, "!!"))
        raise YamlError(f"the tag {tag} is not supported", line)
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [
            _value(entry, (*loc, index), lines, issues) for index, entry in enumerate(node.value)
        ]
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise YamlError("a key must be a word", key_node.start_mark.line + 1)
        key = key_node.value
        if key in values:
            issues.append(
                ValidationIssue(
                    (*loc, key),
                    f"given twice, first in line {lines[(*loc, key)]}",
                    "keep one of them",
                )
            )
        lines[(*loc, key)] = key_node.start_mark.line + 1
        values[key] = _value(value_node, (*loc, key), lines, issues)
    return values


def _default_tag(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "str"
    return "seq" if isinstance(node, yaml.SequenceNode) else "map"
