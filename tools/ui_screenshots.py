"""Make the pictures of docs/ui.md again: `python -m tools.ui_screenshots [FOLDER]`.

A share with the demo's pictures, some failures and a running daemon, in Chromium."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).resolve().parent.parent
EXAMPLES = HERE / "examples" / "demo" / "in"
SAM_POLL = (sys.executable, "-m", "sam_poll")
ENV = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
WIDE = {"width": 1180, "height": 800}


@contextmanager
def running(*arguments: object) -> Iterator[str]:
    """Run a command; yields its first lines, up to the one that says that it is ready."""
    line = [*SAM_POLL, *map(str, arguments), "--log", "text"]
    process = subprocess.Popen(line, env=ENV, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        said = ""
        for text in process.stderr:
            said += text
            if re.search(r"watching |the page is at ", text):
                break
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield said
    finally:
        process.terminate()
        process.wait(60)


def fill(share: Path) -> None:
    """Drop the demo's pictures, and jobs that fail."""
    shutil.copytree(EXAMPLES, share / "in")
    outside = {"box": {"x0": 700, "y0": 40, "x1": 900, "y1": 300}}
    for name in ("camera3", "camera4"):
        shutil.copyfile(EXAMPLES / "tray.jpg", share / "in" / f"{name}.jpg")
        (share / "in" / f"{name}.json").write_text(json.dumps(outside))
    (share / "in" / "cut.jpg").write_bytes((EXAMPLES / "wide.jpg").read_bytes()[:9000])
    (share / "in" / "cut.json").write_text(json.dumps({"points": [{"x": 9, "y": 9}]}))
    command = [*SAM_POLL, "watch", share / "in", "--once", "-m", "demo"]
    subprocess.run(command, env=ENV, stderr=subprocess.DEVNULL, check=False)
    shutil.copyfile(EXAMPLES / "tray.jpg", share / "in" / "click-me.jpg")


def shoot(page: Page, path: Path) -> None:
    """Save a JPEG of a page: a PNG of its pictures' noise would be three times as large."""
    page.wait_for_timeout(800)
    page.screenshot(path=path, type="jpeg", quality=86)


def click_objects(page: Page, url: str) -> None:
    """Click two objects of the demo's tray in the editor."""
    page.goto(f"{url}/ui/")
    page.get_by_role("link", name="Click a prompt for click-me.jpg").click()
    page.wait_for_selector("#canvas[data-loaded=yes]")
    canvas = page.locator("#canvas").bounding_box()
    assert canvas
    scale = min(canvas["width"] / 640, canvas["height"] / 480)
    left = canvas["x"] + (canvas["width"] - 640 * scale) / 2
    top = canvas["y"] + (canvas["height"] - 480 * scale) / 2
    page.mouse.click(left + 260 * scale, top + 150 * scale)
    page.get_by_label("Label", exact=True).fill("plate")
    page.get_by_label("Label", exact=True).press("Enter")
    page.keyboard.press("n")
    page.mouse.move(left + 25 * scale, top + 215 * scale)
    page.mouse.down()
    page.mouse.move(left + 230 * scale, top + 425 * scale, steps=5)
    page.mouse.up()
    page.get_by_label("Label", exact=True).fill("napkin")
    page.get_by_label("Label", exact=True).press("Enter")
    page.wait_for_function("() => !document.querySelector('#objects').innerText.includes('…')")


def main(folder: Path) -> None:
    chromium = shutil.which("chromium")
    if not chromium:
        sys.exit("there is no chromium: apt install chromium")
    with tempfile.TemporaryDirectory() as scratch:
        share = Path(scratch) / "share"
        share.mkdir()
        fill(share)
        page_command = ("ui", share / "in", "-m", "demo", "--listen", "127.0.0.1:0")
        with (
            running("watch", share / "in", "-m", "demo"),
            running(*page_command) as said,
            sync_playwright() as playwright,
        ):
            url = re.search(r"at (http://[^/]+)", said)[1]  # type: ignore[index]
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport=WIDE)
            page.goto(f"{url}/ui/")
            page.locator(".dot.good").wait_for()
            shoot(page, folder / "ui-overview.jpg")
            click_objects(page, url)
            shoot(page, folder / "ui-editor.jpg")
            page = browser.new_page(viewport=WIDE, color_scheme="dark")
            page.goto(f"{url}/ui/answers")
            page.locator(".thumbs").get_by_text("tray").click()
            page.wait_for_selector("#canvas[data-loaded=yes]")
            shoot(page, folder / "ui-answer.jpg")
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "docs" / "images")
