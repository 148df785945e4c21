"""Skip the tests of optional parts where this machine lacks what they need; with CI=true they fail.

The hooks below skip a test, or a whole file, whose import fails because a shared library of the
system is missing: `rasterio` needs Expat, which not every machine has. `tests/conftest.py` hands
them to pytest."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any, NoReturn

import pytest

from sam_poll.core.missing_library import PACKAGES, library_in

_INSTALL = ": apt install "


def lacking(what: str, package: str) -> NoReturn:
    """Skip what is running, in one line that names Debian's package; with CI=true fail instead."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"there is no {what}, and CI must have one{_INSTALL}{package}")
    pytest.skip(f"there is no {what}{_INSTALL}{package}", allow_module_level=True)


def _reason(text: str) -> str | None:
    """Return the line for an import's error text; None if it is not about a library that an
    optional part needs.
    """
    library = library_in(text)
    package = PACKAGES.get(library or "")
    if package is None or os.environ.get("CI") == "true":
        return None
    return f"there is no {library}{_INSTALL}{package}"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, Any, pytest.CollectReport]:
    """Skip a file of tests that cannot be imported for lack of a library."""
    report = yield
    reason = _reason(str(report.longrepr)) if report.failed else None
    if reason:
        report.outcome = "skipped"
        report.longrepr = (__file__, None, f"Skipped: {reason}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, pytest.TestReport]:
    """Give all skips for one package the same place, so that pytest's summary counts them in one
    line.
    """
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple) and _INSTALL in report.longrepr[2]:
        report.longrepr = (__file__, None, report.longrepr[2])
    return report


def _skip_for_a_library(error: ImportError) -> None:
    reason = _reason(str(error))
    if reason:
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, Any, Any]:
    """Skip a test whose fixture imports what cannot be imported for lack of a library."""
    try:
        return (yield)
    except ImportError as error:
        _skip_for_a_library(error)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Skip a test that imports what cannot be imported for lack of a library."""
    try:
        return (yield)
    except ImportError as error:
        _skip_for_a_library(error)
        raise
