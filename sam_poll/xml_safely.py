"""XML that strangers wrote, parsed so that nothing in it can expand: a document type is refused at its start.

What can still go wrong here: a tree of deeply nested elements is made without complaint, and ElementTree's functions
may run out of stack on it: who walks a tree must be ready for RecursionError. Who brings a target need not be.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any, NoReturn

from sam_poll.errors import IncompletePromptError, InputError

# Bytes. A parser that has been stopped runs on to the end of what it was given; but in small pieces a long attribute is
# gone through again and again (30 MB of run lengths: 0.8 s in pieces of 1 MiB, 7.7 s in pieces of 64 KiB).
_PIECE = 1 << 20
# "no element found", "unclosed token", "partial character", "unclosed CDATA section": what expat says at the end of a
# document of which the rest is missing.
_CUT_OFF = frozenset({3, 5, 6, 20})


class NoDoctype:
    """Ends parsing where a document type begins: entities could expand without end, and CVAT writes none.

    To be mixed into a parser's target."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> NoReturn:
        raise InputError("has a document type declaration, which no CVAT file has")


class _Tree(NoDoctype, ET.TreeBuilder):
    pass


def parse(data: bytes, target: NoDoctype | None = None) -> Any:
    """What `target` (ElementTree's interface: start, end, data, close) makes of a document; None: its root element.

    Raises InputError, without a place, for what is not well-formed or has a document type; IncompletePromptError where
    only its end is missing; and what `target` raises.
    """
    if data.endswith(bytes(4)):  # Windows makes a file as long as it is going to be, and fills it then
        raise IncompletePromptError("is not well-formed XML: it ends in zero bytes")
    parser = ET.XMLParser(target=target or _Tree())  # noqa: S314  document types are refused
    view = memoryview(data)
    try:
        for at in range(0, len(data), _PIECE):
            parser.feed(view[at : at + _PIECE])
        return parser.close()
    except (ET.ParseError, LookupError, ValueError) as error:  # the latter two: an encoding nobody knows
        if isinstance(error, ET.ParseError) and error.code in _CUT_OFF:
            raise IncompletePromptError(f"is not well-formed XML: {error}") from None
        raise InputError(f"is not well-formed XML: {error}") from None


def root_tag(data: bytes) -> str | None:
    """The name of a document's root element; None: what begins `data` is no XML, or has a document type."""
    try:
        parse(data[:_PIECE], _Root())
    except _Found as found:
        return found.tag
    except InputError:
        return None
    return None


class _Found(Exception):  # noqa: N818  no error: it ends the parsing
    def __init__(self, tag: str) -> None:
        super().__init__(tag)
        self.tag = tag


class _Root(NoDoctype):
    def start(self, tag: str, attributes: dict[str, str]) -> NoReturn:
        raise _Found(tag)

    def close(self) -> None:
        """Called where there was no element."""
