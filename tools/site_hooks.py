"""What the site needs beyond the pages: files outside of docs/ that pages link to come along.

On a code host a page's link to `../docker/compose.yaml` opens that file. On the site the file is
put below `files/`, and the link leads there; a Markdown file becomes a page. A link to a file
that is not there stays as it is, and a strict build fails on it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "files"

_CODE = re.compile(r"^( *)```.*?^\1```|`[^`\n]+`", re.DOTALL | re.MULTILINE)
_TARGET = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)")


def outside(target: str, page: str) -> str | None:
    """Return the path below the checkout of a link's target, if that is a file outside of docs/.

    `page` is the source of the link, relative to docs/, or below `files/`.
    """
    folder = posixpath.dirname(page)
    start = folder.removeprefix(FOLDER) if folder.split("/")[0] == FOLDER else f"docs/{folder}"
    path = posixpath.normpath(posixpath.join(start.lstrip("/"), target))
    if path.startswith(("docs/", "..")) or not (ROOT / path).is_file():
        return None
    return path


def site_path(path: str) -> str:
    """Return where a file of the checkout is in the site's sources."""
    return path.removeprefix("docs/") if path.startswith("docs/") else f"{FOLDER}/{path}"


def links(text: str) -> list[str]:
    """Return the targets of a page's relative links, without anchors."""
    return _TARGET.findall(_CODE.sub("", text))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the pages link to outside of docs/, and what the pages among those link to."""
    pages = [file for file in files if file.is_documentation_page()]
    while pages:
        file = pages.pop()
        for target in links(file.content_string):
            path = outside(target, file.src_uri)
            if path is None or files.get_file_from_path(site_path(path)):
                continue
            made = File.generated(
                config,
                site_path(path),
                abs_src_path=str(ROOT / path),
                inclusion=InclusionLevel.NOT_IN_NAV,
            )
            files.append(made)
            if made.is_documentation_page():
                pages.append(made)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links that leave docs/ lead to the files that came along."""
    here = posixpath.dirname(page.file.src_uri)

    def replaced(found: re.Match[str]) -> str:
        target = found[1]
        path = outside(target, page.file.src_uri)
        if path is None and page.file.src_uri.startswith(FOLDER + "/"):
            start = posixpath.dirname(page.file.src_uri.removeprefix(FOLDER + "/"))
            path = posixpath.normpath(posixpath.join(start, target))
        return target if path is None else posixpath.relpath(site_path(path), here or ".")

    parts, end = [], 0
    for code in _CODE.finditer(markdown):
        parts += [_TARGET.sub(replaced, markdown[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, _TARGET.sub(replaced, markdown[end:])])
