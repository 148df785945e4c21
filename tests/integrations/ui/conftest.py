"""Chromium, driven by Playwright; where there is none, the tests that need it are skipped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support import optional
from tests.support.ui_site import Site

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if program is None:
        optional.lacking("Chromium", "chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The sandbox needs rights that containers often lack; only our own pages are opened.
        running = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def tab(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open pages of a site; the test fails if one of them reports an error or asks elsewhere."""
    contexts: list[Any] = []
    problems: list[str] = []

    def opened(site: Site, path: str = "/ui/", context: Any = None, **options: Any) -> Any:
        if context is None:
            context = browser.new_context(base_url=site.url, **options)
            context.set_default_timeout(30_000)
            contexts.append(context)
            site.before_end.append(context.close)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: _keep(problems, message))
        page.on("request", lambda request: _check_address(problems, site, request.url))
        page.on("dialog", lambda dialog: dialog.accept())
        page.goto(path)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems, problems


def _keep(problems: list[str], message: Any) -> None:
    # Refused requests, and a stream that has ended with the server, are reported by the browser and
    # by htmx, too; the tests look at what the page says.
    reported = "Failed to load resource" in message.text or message.text == "[object Event]"
    if message.type == "error" and not reported:
        problems.append(message.text)


def _check_address(problems: list[str], site: Site, address: str) -> None:
    if not address.startswith((site.url, "data:", "blob:")):
        problems.append(f"a request to {address}")
