"""Reads a YAML file into plain values and remembers the line of every key.

PyYAML's own `safe_load` follows YAML 1.1, where `on` is true, `12:30` is 750, `010` is 8 and `1e3` is a text, keeps the
last of two equal keys, and forgets lines. Here a plain word is `null`, `true`, `false`, a decimal number or a text, as
in YAML 1.2, and equal keys are complaints. Anchors, aliases and tags are refused: settings need none, and an alias can
grow a small file without bounds.

What can still go wrong here: nothing known; any text gives values or NotYaml.
"""

from __future__ import annotations

import re
from typing import Any, TypeAlias

import yaml

from sam_poll.complaints import Complaint, Loc, quoted

Lines: TypeAlias = dict[Loc, int]

_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    spelled: value
    for word, value in (("true", True), ("false", False))
    for spelled in (word, word.title(), word.upper())
}
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF|nan|NaN|NAN)")
_TAG = "tag:yaml.org,2002:"


class NotYaml(Exception):  # noqa: N818 - a word, not a fault of ours
    """The text is no YAML that we read; `line` counts from 1."""

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


class _Loader(yaml.SafeLoader):
    """Only its scanner, parser and composer are used; what a word means is decided by `scalar`."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way of saying so

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise NotYaml("aliases (*name) are not read here", self.peek_event().start_mark.line + 1)
        return super().compose_node(parent, index)


def scalar(text: str) -> Any:
    """What a plain word means: None, bool, int, float or str. Long integers become float: it has no limit of digits."""
    text = text.strip()
    if text in _WORDS:
        return _WORDS[text]
    if re.fullmatch(r"[-+]?[0-9]{1,18}", text, re.ASCII):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return float(text.replace(".", "", 1)) if _NOT_FINITE.fullmatch(text) else text


def read_yaml(text: str) -> tuple[Any, Lines, list[Complaint]]:
    """The values, the line of every key and entry, and complaints about keys given twice. Raises NotYaml."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: Lines = {}
        found: list[Complaint] = []
        return (None if node is None else _value(node, (), lines, found)), lines, found
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        said = re.sub(r"\s+", " ", f"{error.context or ''} {error.problem or ''}".strip())
        raise NotYaml(f"not YAML: {said}", mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise NotYaml("holds a character that YAML does not allow", line) from None
    except RecursionError:
        raise NotYaml("nested too deeply") from None


def _value(node: yaml.Node, loc: Loc, lines: Lines, found: list[Complaint]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(loc, line)
    kind = "str" if isinstance(node, yaml.ScalarNode) else "seq" if isinstance(node, yaml.SequenceNode) else "map"
    if node.tag != _TAG + kind:
        raise NotYaml(f"the tag {quoted(node.tag.replace(_TAG, '!!'))} is not read here", line)
    if isinstance(node, yaml.ScalarNode):
        return scalar(node.value) if node.style is None else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_value(entry, (*loc, index), lines, found) for index, entry in enumerate(node.value)]
    made: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise NotYaml("a key must be a word", key_node.start_mark.line + 1)
        key = key_node.value
        if key in made:
            found.append(Complaint((*loc, key), f"given twice, first in line {lines[(*loc, key)]}", "keep one of them"))
        lines[(*loc, key)] = key_node.start_mark.line + 1
        made[key] = _value(value_node, (*loc, key), lines, found)
    return made
