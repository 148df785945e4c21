"""Fixtures for tests against the CVAT stand-in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.cvat_server import StandIn, served


@pytest.fixture
def memory() -> StandIn:
    return StandIn()


@pytest.fixture
def host(memory: StandIn) -> Iterator[str]:
    with served(memory) as address:
        yield address
