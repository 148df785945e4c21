"""Wrap the prose of Markdown pages at 100 columns: `python -m tools.wrap_docs`.

Only paragraphs that have a longer line are wrapped anew, so that a change of one sentence stays a
small difference. Tables, code, headings and pictures are left alone, and so is what cannot be
broken: code in backticks, and addresses.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100

# A word ends at a space, but not at one within backticks.
_WORD = re.compile(r"(?:`[^`]*`|[^\s`]|`)+")
# At the beginning of a line these would be a list, a heading, a quotation, a table or a rule.
_MARKER = re.compile(r"(?:[-+*>|]|#{1,6}|\d+[.)]|[-=*_]{2,})$|[>|]")


def wrapped(text: str) -> str:
    """Return a page with its too long paragraphs wrapped."""
    lines = text.split("\n")
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for before, token in reversed(list(itertools.pairwise(tokens))):
        if before.type != "paragraph_open" or before.map is None:
            continue
        start, end = before.map
        if any(len(line) > WIDTH for line in lines[start:end]):
            lines[start:end] = _paragraph(lines[start:end], token.content)
    return "\n".join(lines)


def _paragraph(lines: list[str], content: str) -> list[str]:
    """Return a paragraph's lines anew; what is before it (a list's mark) stays."""
    first = content.split("\n")[0]
    prefix = lines[0][: lines[0].index(first)]
    indent = re.sub(r"[^>\s]", " ", prefix)
    if any(line.endswith(("  ", "\\")) for line in lines) or content.startswith("!["):
        return lines
    made, line = [], prefix
    for word in _words(content):
        if line in (prefix, indent):
            line += word
        elif len(line) + 1 + len(word) <= WIDTH:
            line += f" {word}"
        else:
            made.append(line)
            line = indent + word
    return [*made, line]


def _words(content: str) -> list[str]:
    words: list[str] = []
    for word in _WORD.findall(content):
        if words and _MARKER.match(word):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def pages() -> list[Path]:
    """Return the Markdown files of the project."""
    folders = ("docs", "examples", "docker", "benchmarks", "sam_poll")
    return sorted(
        [*ROOT.glob("*.md"), *(page for name in folders for page in (ROOT / name).rglob("*.md"))]
    )


def main() -> int:
    """Wrap all pages."""
    for page in pages():
        text = page.read_text("utf-8")
        if wrapped(text) != text:
            page.write_text(wrapped(text), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
