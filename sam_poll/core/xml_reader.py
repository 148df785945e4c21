"""Parse untrusted XML in which nothing can expand: a document type declaration is refused.

Limitations: a tree of deeply nested elements is accepted, and ElementTree's functions may run out
of stack on it: code that walks a tree must handle RecursionError. Code that parses with a target
need not.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any, NoReturn

from defusedxml import DTDForbidden
from defusedxml.ElementTree import DefusedXMLParser

from sam_poll.core.errors import IncompletePromptError, InputError

# Bytes fed at a time. A stopped parser continues to the end of a piece; but with small pieces a
# long attribute is scanned repeatedly (30 MB of run lengths: 0.8 s in pieces of 1 MiB, 7.7 s in
# pieces of 64 KiB).
_PIECE = 1 << 20
# "no element found", "unclosed token", "partial character", "unclosed CDATA section": errors of
# expat at the end of a truncated document.
_CUT_OFF = frozenset({3, 5, 6, 20})


def parse(data: bytes, target: Any = None) -> Any:
    """Parse a document; return what `target.close()` returns, or without a target its root element.

    `target` has ElementTree's interface: start, end, data, close. Raises InputError, without a
    place, where the document is not well-formed or has a document type declaration;
    IncompletePromptError where only its end is missing; and the errors of `target`.
    """
    # Windows creates a copied file at its full length, and fills it afterwards.
    if data.endswith(bytes(4)):
        raise IncompletePromptError("is not well-formed XML: it ends in zero bytes")
    parser = DefusedXMLParser(target=target or ET.TreeBuilder(), forbid_dtd=True)
    view = memoryview(data)
    try:
        for at in range(0, len(data), _PIECE):
            parser.feed(view[at : at + _PIECE])
        return parser.close()
    except DTDForbidden:  # entities could expand without limit, and CVAT writes none
        raise InputError("has a document type declaration, which is not supported") from None
    # LookupError and ValueError: an unknown encoding
    except (ET.ParseError, LookupError, ValueError) as error:
        if isinstance(error, ET.ParseError) and error.code in _CUT_OFF:
            raise IncompletePromptError(f"is not well-formed XML: {error}") from None
        raise InputError(f"is not well-formed XML: {error}") from None


def root_tag(data: bytes) -> str | None:
    """Return the name of a document's root element.

    None where `data` does not begin as XML, or has a document type declaration.
    """
    try:
        parse(data[:_PIECE], _Root())
    except _RootTag as root:
        return root.tag
    except InputError:
        return None
    return None


class _RootTag(Exception):  # noqa: N818  not an error: it ends the parsing
    def __init__(self, tag: str) -> None:
        super().__init__(tag)
        self.tag = tag


class _Root:
    def start(self, tag: str, attributes: dict[str, str]) -> NoReturn:
        raise _RootTag(tag)

    def close(self) -> None:
        """Do nothing: there was no element."""
