"""The site builds strictly, holds all pages, and loads nothing from elsewhere."""

from __future__ import annotations

import html
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml

from tests.support.paths import ROOT
from tools import site_hooks

DOCS = ROOT / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site; the build fails on whatever `make docs` fails on."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
        config.plugins.on_shutdown()
    return folder


def built(site: Path) -> Iterator[tuple[Path, str]]:
    for file in sorted(site.rglob("*.html")):
        yield file, file.read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_page_is_in_the_site_and_in_its_navigation(site: Path) -> None:
    text = re.sub(r"!\S+", "", (ROOT / "mkdocs.yml").read_text("utf-8"))
    nav = re.findall(r"[\w/.-]+\.md", str(yaml.safe_load(text)["nav"]))
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(nav) == sorted(pages)
    for page in pages:
        name = "index" if page == "README.md" else page.removesuffix(".md")
        assert (site / f"{name}.html").is_file(), page


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for file, text in built(site):
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", text)
        assert tags
        for tag in tags:
            found = re.search(r'(?:src|href)="?(?:https?:)?//[^">]*', tag)
            assert not found or 'rel="canonical"' in tag, f"{file}: {tag}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text("utf-8")), style


def test_links_lead_to_files_and_anchors_of_the_site(site: Path) -> None:
    pages = dict(built(site))
    anchors = {file: set(re.findall(r'\bid="([^"]+)"', text)) for file, text in pages.items()}
    for file, text in pages.items():
        if file.name == "404.html":
            continue  # its links are absolute
        for target in re.findall(r'(?:href|src)="([^"]*)"', text):
            path, _, anchor = unquote(html.unescape(target)).partition("#")
            if re.match(r"[a-z]+:", path):
                continue
            there = (file.parent / path).resolve() if path else file
            there = there / "index.html" if there.is_dir() else there
            assert there.exists(), f"{file}: {target}"
            if anchor and not anchor.startswith("__"):
                assert anchor in anchors[there], f"{file}: {target}"


def test_no_list_and_no_table_is_left_as_running_text(site: Path) -> None:
    """Python's Markdown wants an empty line before a list, and four columns inside of one."""
    for file, text in built(site):
        for paragraph in re.findall(r"<p>(.*?)</p>", text, re.DOTALL):
            plain = re.sub(r"<code>.*?</code>", "", paragraph, flags=re.DOTALL)
            assert not re.search(r"^(?:[-*|] |\d+\. |```|#+ )", plain, re.MULTILINE), (
                f"{file}: {paragraph[:200]}"
            )


def test_files_outside_of_docs_are_told_from_pages_and_from_files_that_are_not_there() -> None:
    assert site_hooks.outside("../docker/compose.yaml", "usage.md") == "docker/compose.yaml"
    assert site_hooks.outside("../../docker/compose.yaml", "pt-BR/x.md") == "docker/compose.yaml"
    assert site_hooks.outside("../docker/nothing.yaml", "usage.md") is None
    assert site_hooks.outside("settings.md", "usage.md") is None
    assert site_hooks.outside("../../etc/passwd", "usage.md") is None


@pytest.mark.parametrize("text", ["[a](nothing.md)", "[a](../nothing.yaml)", "[a](README.md#no)"])
def test_a_strict_build_refuses_a_link_that_leads_nowhere(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "README.md").write_text(f"# Page\n\n{text}\n")
    config = load_config(
        str(ROOT / "mkdocs.yml"),
        docs_dir=str(tmp_path / "docs"),
        site_dir=str(tmp_path / "site"),
        nav=["README.md"],
        strict=True,
        theme={"name": "mkdocs"},
        plugins=[],
        extra_css=[],
    )
    with caplog.at_level(logging.WARNING), pytest.raises(Abort):
        build(config)
    assert text[4:-1].partition("#")[0] in caplog.text
