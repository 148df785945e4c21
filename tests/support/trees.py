"""Folders as dictionaries."""

from __future__ import annotations

from typing import Any

from tests.conftest import Share


def trees(share: Share) -> dict[str, Any]:
    """Everything on the share: paths, and the files' bytes."""
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(share.root.rglob("*"))}
