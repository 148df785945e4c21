"""The page in a real browser, from the side of its user."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sam_poll.core.types import ConceptRequest
from sam_poll.engines import concepts
from sam_poll.engines.fake import FakeEngine
from sam_poll.integrations.ui.names import encode
from tests.conftest import BOX, Daemon, Share, picture_bytes, wait_until
from tests.support.commands import watch_command
from tests.support.ui_site import TOKEN, running_ui

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

Tab = Callable[..., Any]
HTML = "<img src=x onerror=alert(1)>"
OUTSIDE = {"box": {"x0": 900, "y0": 1, "x1": 2000, "y1": 30}}
QUICK = {"settle_s": 0.0, "mode": "poll", "rescan_s": 0.1}


def click_in_picture(page: Any, x: float, y: float, **how: Any) -> None:
    """Click at a place given as fractions of the picture, which is fitted into the canvas."""
    canvas = page.locator("#canvas")
    width, height = (int(canvas.get_attribute(f"data-{side}")) for side in ("width", "height"))
    box = canvas.bounding_box()
    scale = min(box["width"] / width, box["height"] / height)
    position = {
        "x": (box["width"] - width * scale) / 2 + x * width * scale,
        "y": (box["height"] - height * scale) / 2 + y * height * scale,
    }
    canvas.click(position=position, **how)


def wait_for_preview(page: Any) -> None:
    page.wait_for_selector("#canvas[data-preview=done]")


def loaded(page: Any) -> None:
    page.wait_for_selector("#canvas[data-loaded=yes]")


def test_a_failure_is_retried_and_its_section_goes(share: Share, tab: Tab) -> None:
    share.pair("dog", prompt=OUTSIDE)
    share.run_once()
    share.drop("cat.jpg", picture_bytes())
    with running_ui(share) as site:
        site.wait_for("dog.jpg")
        page = tab(site)
        page.get_by_role("button", name="Retry dog").click()
        page.get_by_text("1 job put back into in/").wait_for()
        page.locator("#failures").wait_for(state="detached")
        assert share.tree("failed") == []
        share.drop("dog.json", BOX)
        share.run_once()
        page.locator(".thumbs").get_by_text("dog").wait_for()  # live, without a reload


def test_a_prompt_is_clicked_previewed_saved_and_answered(
    share: Share, tab: Tab, tmp_path: Path
) -> None:
    share.drop("cam1/dog.jpg", picture_bytes(width=320, height=240))
    with running_ui(share) as site, Daemon(share, **QUICK):
        site.wait_for("cam1/dog.jpg")
        page = tab(site)
        page.get_by_role("link", name="Click a prompt for cam1/dog.jpg").click()
        loaded(page)
        click_in_picture(page, 0.5, 0.5)
        wait_for_preview(page)
        assert "0.90" in page.locator("#objects").inner_text()
        click_in_picture(page, 0.7, 0.5, button="right")
        page.locator("#objects").get_by_text("0.95").wait_for()
        page.get_by_label("Label", exact=True).fill("dog")
        page.get_by_label("Label", exact=True).press("Enter")
        with page.expect_response(lambda answer: answer.request.method == "POST") as sent:
            page.get_by_role("button", name="Save").click()
        objects = json.loads(sent.value.request.post_data)["objects"]
        labels = [point["label"] for point in objects[0]["points"]]
        assert (objects[0]["label"], labels) == ("dog", [1, 0])
        page.get_by_text("Answered.").wait_for()
        assert share.tree("done") == ["cam1/dog.jpg", "cam1/dog.json"]
        preview = site.post(
            f"{site.edit('answered', 'cam1/dog')}/preview", json={"objects": objects}
        ).json()["objects"][0]
        mask = cv2.imread(str(share.output / "cam1/dog.mask.png"), cv2.IMREAD_GRAYSCALE)
        assert preview["area"] == np.count_nonzero(mask)
        page.locator(".thumbs a").click()
        loaded(page)


def test_a_rough_shape_is_shown_and_stays_when_its_object_is_clicked(
    share: Share, tab: Tab
) -> None:
    corners = [[40, 30], [200, 40], [180, 190], [50, 170]]
    mask = {"size": [240, 320], "counts": [240 * 250 + 60, 100, 240 * 70 - 160]}
    objects = [{"label": "dog", "polygon": corners}, {"label": "cat", "mask": mask}]
    share.drop("dog.jpg", picture_bytes(width=320, height=240))
    share.drop("dog.json", {"objects": objects})
    share.run_once()
    with running_ui(share) as site:
        site.wait_for("dog")
        page = tab(site)
        page.goto(site.edit("answered", "dog"))
        loaded(page)
        wait_for_preview(page)
        assert page.locator("#objects").inner_text().split() == ["dog", "0.95", "cat", "0.95"]
        click_in_picture(page, 0.2, 0.2, button="right")
        wait_for_preview(page)
        with page.expect_response(lambda answer: "preview" not in answer.url) as sent:
            page.get_by_role("button", name="Save").click()
        saved = json.loads(sent.value.request.post_data)["objects"]
        assert saved[0]["polygon"] == corners
        assert [point["label"] for point in saved[0]["points"]] == [0]
        assert saved[1]["mask"]["size"] == [240, 320]


def test_words_find_objects_in_place_of_clicks_and_are_saved_and_answered(
    share: Share, tab: Tab
) -> None:
    share.drop("dog.jpg", picture_bytes(width=320, height=240))
    with running_ui(share) as site, Daemon(share, **QUICK):
        site.wait_for("dog.jpg")
        page = tab(site)
        page.get_by_role("link", name="Click a prompt for dog.jpg").click()
        loaded(page)
        click_in_picture(page, 0.5, 0.5)
        wait_for_preview(page)
        words = page.get_by_label("Words instead of clicks")
        words.fill("dog, nothing, dog,")
        words.press("Enter")
        page.get_by_text("1 object found.").wait_for()
        assert page.locator("#objects").inner_text().split() == ["dog", "0.90"]
        page.get_by_role("button", name="Undo").click()  # the click is back
        assert words.input_value() == ""
        page.locator("#objects").get_by_text("object").wait_for()
        page.get_by_role("button", name="Redo").click()
        assert words.input_value() == "dog, nothing"
        page.get_by_role("button", name="Save").click()
        page.get_by_text("Answered.").wait_for()
        assert json.loads((share.done / "dog.json").read_text())["text"] == ["dog", "nothing"]
        page.goto(site.edit("answered", "dog"))
        loaded(page)
        page.get_by_text("1 object found.").wait_for()
        assert page.get_by_label("Words instead of clicks").input_value() == "dog, nothing"
        click_in_picture(page, 0.5, 0.5)  # clicks replace the words
        wait_for_preview(page)
        assert page.get_by_label("Words instead of clicks").input_value() == ""


def test_words_that_the_network_does_not_take_are_explained(share: Share, tab: Tab) -> None:
    class OfClicks(FakeEngine):
        def check_concept(self, request: ConceptRequest) -> None:
            raise concepts.refusal("demo", request)

    share.drop("dog.jpg", picture_bytes(width=320, height=240))
    with running_ui(share, engine=OfClicks()) as site:
        site.wait_for("dog.jpg")
        page = tab(site)
        page.get_by_role("link", name="Click a prompt for dog.jpg").click()
        loaded(page)
        page.get_by_label("Words instead of clicks").fill("dog")
        page.get_by_label("Words instead of clicks").press("Enter")
        page.get_by_text("No preview:").wait_for()
        assert "sam3" in page.get_by_role("status").inner_text()


@pytest.mark.slow
def test_ten_thousand_failures_are_paged(share: Share, tab: Tab) -> None:
    share.failed.mkdir()
    for number in range(10_000):
        body = {"code": "prompt", "reason": f"{number} is wrong", "files": [f"p{number:05}.jpg"]}
        path = share.failed / f"p{number:05}.error.json"
        path.write_text(json.dumps(body))
        os.utime(path, (number, number))
    with running_ui(share) as site:
        site.wait_for("Page 1 of 500")
        page = tab(site)
        page.get_by_text("p09999.jpg").wait_for()
        page.get_by_role("navigation", name="Pages of failures").get_by_text("Next").click()
        page.get_by_text("p09979.jpg").wait_for()
        assert page.locator("table.list tbody tr").count() <= 20


def test_markup_in_names_and_labels_is_text(share: Share, tab: Tab) -> None:
    share.pair(HTML, prompt=OUTSIDE)
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.json", {"label": HTML, **BOX})
    share.run_once()
    with running_ui(share) as site:
        site.wait_for("onerror")
        page = tab(site)
        page.get_by_text(f"{HTML}.jpg").first.wait_for()
        page.goto(site.edit("answered", "dog"))
        loaded(page)
        page.locator("#objects").get_by_text(HTML).wait_for()
        page.locator("#labels").get_by_text(HTML).wait_for()
        assert page.locator("img[src=x]").count() == 0


def test_a_wrong_token_is_refused_and_the_right_one_leads_on(share: Share, tab: Tab) -> None:
    with running_ui(share, token=TOKEN) as site:
        page = tab(site, "/ui/answers")
        page.get_by_label("Token").fill("wrong")
        page.get_by_role("button", name="Log in").click()
        page.get_by_text("The token is wrong").wait_for()
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("heading", name="Answers").wait_for()
        assert page.context.cookies()[0]["httpOnly"]
        page.get_by_role("button", name="Log out").click()
        page.get_by_label("Token").wait_for()


def test_logging_out_waits_for_no_script(share: Share, tab: Tab) -> None:
    with running_ui(share, token=TOKEN) as site:
        page = tab(site)
        page.context.route("**/*.js", lambda route: route.abort())
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Log in").click()
        page.get_by_role("button", name="Log out").click()
        page.get_by_label("Token").wait_for()


def test_retrying_and_checking_wait_for_no_script(share: Share, tab: Tab) -> None:
    for name in ("dog", "cat", "cow"):
        share.pair(name, prompt=OUTSIDE)
    share.run_once()
    with running_ui(share, doctor=("--share", str(share.input), "-m", "demo")) as site:
        site.wait_for("Retry all 3")
        context = tab(site).context
        context.route("**/*.js", lambda route: route.abort())
        page = tab(site, context=context)
        page.get_by_role("button", name="Retry dog").click()
        page.get_by_role("button", name="Retry all 2").click()
        page.locator("#failures").wait_for(state="detached")
        assert share.tree("failed") == []
        page.goto("/ui/doctor")
        page.get_by_role("button", name="Check now").click()
        page.get_by_text("Checking …").wait_for()


def test_two_tabs_both_hear_what_one_of_them_changes(share: Share, tab: Tab) -> None:
    share.pair("dog", prompt=OUTSIDE)
    share.run_once()
    with running_ui(share) as site:
        site.wait_for("dog.jpg")
        one = tab(site)
        other = tab(site, context=one.context)
        other.get_by_role("button", name="Retry dog").wait_for()
        one.get_by_role("button", name="Retry dog").click()
        other.locator("#failures").wait_for(state="detached")
        one.locator("#failures").wait_for(state="detached")


def start_daemon(share: Share) -> subprocess.Popen[bytes]:
    return subprocess.Popen(watch_command(share), stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_daemon_that_is_killed_and_started_again_is_seen(share: Share, tab: Tab) -> None:
    with running_ui(share) as site:
        page = tab(site)
        page.get_by_text("No daemon runs").wait_for()
        daemon = start_daemon(share)
        try:
            page.locator(".dot.good").wait_for(timeout=90_000)
            os.kill(daemon.pid, signal.SIGKILL)
            daemon.wait()
            page.locator(".dot.bad").wait_for()
            daemon = start_daemon(share)
            page.locator(".dot.good").wait_for(timeout=90_000)
        finally:
            daemon.kill()
            daemon.wait()


def test_everything_can_be_done_by_keyboard(share: Share, tab: Tab) -> None:
    share.drop("dog.jpg", picture_bytes(width=320, height=240))
    with running_ui(share) as site:
        site.wait_for("dog.jpg")
        page = tab(site)
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")  # skips to the content
        link = page.get_by_role("link", name="Click a prompt for dog.jpg")
        for _ in range(20):
            page.keyboard.press("Tab")
            if link.evaluate("link => link === document.activeElement"):
                break
        page.keyboard.press("Enter")
        loaded(page)
        page.locator("#canvas").focus()
        page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("Enter")
        wait_for_preview(page)
        page.keyboard.press("n")
        page.keyboard.press("x")
        for _ in range(3):
            page.keyboard.press("Shift+ArrowDown")
            page.keyboard.press("Shift+ArrowRight")
        page.keyboard.press("x")
        page.locator("#objects li").nth(1).get_by_text("0.95").wait_for()
        page.keyboard.press("Control+z")
        page.locator("#objects li").nth(1).get_by_text("no prompt").wait_for()
        page.keyboard.press("Control+y")
        page.locator("#objects li").nth(1).get_by_text("0.95").wait_for()
        page.keyboard.press("s")
        page.get_by_text("The prompt is in in/").wait_for()
        saved = json.loads((share.input / "dog.json").read_text())["objects"]
        assert saved[0]["points"][0]["label"] == 1
        assert saved[1]["box"]["x0"] < saved[1]["box"]["x1"]


def test_labels_are_remembered_and_chosen_by_number(share: Share, tab: Tab) -> None:
    for name in ("one.jpg", "two.jpg"):
        share.drop(name, picture_bytes())
    with running_ui(share) as site:
        page = tab(site, site.edit("waiting", "one.jpg"))
        loaded(page)
        page.get_by_label("Label", exact=True).fill("zebra")
        page.get_by_label("Label", exact=True).press("Enter")
        click_in_picture(page, 0.5, 0.5)
        page.locator("#save").click()
        page.get_by_text("The prompt is in in/").wait_for()
        page.goto(site.edit("waiting", "two.jpg"))
        page.locator("#labels").get_by_text("zebra").wait_for()
        page.locator("#canvas").focus()
        page.keyboard.press("1")
        page.locator("#objects").get_by_text("zebra").wait_for()


def test_a_box_is_dragged_and_objects_switched_off(share: Share, tab: Tab) -> None:
    share.drop("dog.jpg", picture_bytes(width=320, height=240))
    with running_ui(share) as site:
        page = tab(site, site.edit("waiting", "dog.jpg"))
        loaded(page)
        box = page.locator("#canvas").bounding_box()
        middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.move(*middle)
        page.mouse.down()
        page.mouse.move(middle[0] + 90, middle[1] + 70, steps=4)
        page.mouse.up()
        wait_for_preview(page)
        page.locator("#save").click()
        page.get_by_text("The prompt is in in/").wait_for()
        share.run_once()
        page.get_by_text("Answered.").wait_for()
        page.locator(".thumbs a").click()
        loaded(page)
        with_mask = page.locator("#canvas").screenshot()
        page.locator("#objects input").uncheck()
        wait_until(lambda: page.locator("#canvas").screenshot() != with_mask)


def test_clicks_in_a_picture_that_was_replaced_meanwhile_are_not_saved(
    share: Share, tab: Tab
) -> None:
    share.drop("dog.jpg", picture_bytes(width=320, height=240))
    with running_ui(share) as site:
        page = tab(site, site.edit("waiting", "dog.jpg"))
        loaded(page)
        share.drop("dog.jpg", picture_bytes(width=640, height=480))
        click_in_picture(page, 0.5, 0.5)
        page.get_by_text("No preview: dog.jpg: another picture has replaced").wait_for()
        page.get_by_role("button", name="Save").click()
        page.locator("#message").get_by_text("another picture has replaced").wait_for()
        assert share.tree("input") == ["dog.jpg"]
        page.reload()
        loaded(page)
        click_in_picture(page, 0.5, 0.5)
        page.get_by_role("button", name="Save").click()
        page.get_by_text("The prompt is in in/").wait_for()


def test_clicks_outlive_a_lost_connection_and_a_new_session(share: Share, tab: Tab) -> None:
    share.drop("dog.jpg", picture_bytes(width=320, height=240))
    with running_ui(share) as site:
        page = tab(site, site.edit("waiting", "dog.jpg"))
        loaded(page)
        page.context.set_offline(True)
        click_in_picture(page, 0.5, 0.5)
        page.get_by_text("No preview: the server cannot be reached").wait_for()
        page.context.set_offline(False)
        wait_for_preview(page)
        page.context.clear_cookies()  # what a restart of the page does to its sessions
        page.get_by_role("button", name="Save").click()
        page.get_by_text("The prompt is in in/").wait_for()


def test_a_picture_that_cannot_be_shown_says_why(share: Share, tab: Tab) -> None:
    damaged = bytearray(picture_bytes(width=320, height=240))
    damaged[-2000:] = bytes(2000)
    share.drop("dog.jpg", bytes(damaged))
    with running_ui(share) as site:
        page = tab(site, site.edit("waiting", "dog.jpg"))
        page.locator("#message").get_by_text("copy the file again").wait_for()


def test_a_connection_without_a_sign_of_life_is_said_and_opened_again(
    share: Share, tab: Tab
) -> None:
    with running_ui(share) as site:
        context = tab(site).context
        context.clock.install()
        page = tab(site, context=context)
        page.get_by_text("Nothing: every picture").wait_for()
        context.route("**/ui/events*", lambda route: None)  # a network that is cut
        context.clock.fast_forward(25_000)
        page.locator("body.offline").wait_for()
        context.unroute("**/ui/events*")
        context.clock.fast_forward(25_000)
        page.locator("body:not(.offline)").wait_for()


def test_a_picture_is_uploaded_and_opened_in_the_editor(
    share: Share, tab: Tab, tmp_path: Path
) -> None:
    (tmp_path / "mine.jpg").write_bytes(picture_bytes())
    (tmp_path / "mine.txt").write_bytes(b"text")
    with running_ui(share) as site:
        page = tab(site)
        page.locator("#upload-file").set_input_files(tmp_path / "mine.txt")
        page.get_by_text("not the name of a picture").wait_for()
        page.locator("#upload-file").set_input_files(tmp_path / "mine.jpg")
        page.get_by_role("heading", name="mine.jpg").wait_for()
        assert share.tree("input") == ["mine.jpg"]


def test_a_phone_shows_all_pages_without_scrolling_sideways(share: Share, tab: Tab) -> None:
    share.pair("a-very-long-name-" * 8, prompt=OUTSIDE)
    share.pair("dog")
    share.run_once()
    share.drop("cat.jpg", picture_bytes())
    with running_ui(share) as site:
        site.wait_for("dog")
        page = tab(site, viewport={"width": 390, "height": 844}, has_touch=True)
        for path in (
            "/ui/",
            "/ui/answers",
            f"/ui/answers/{encode('dog')}",
            site.edit("waiting", "cat.jpg"),
            "/ui/settings",
            "/ui/doctor",
        ):
            page.goto(path)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        page.goto(site.edit("waiting", "cat.jpg"))
        loaded(page)
        page.locator("#canvas").tap()
        wait_for_preview(page)


@pytest.mark.slow
def test_settings_and_doctor_are_pages(share: Share, tab: Tab) -> None:
    with running_ui(share, doctor=("--share", str(share.input), "-m", "demo")) as site:
        page = tab(site, "/ui/settings")
        page.get_by_text("command line, input").wait_for()
        page.get_by_role("link", name="Doctor").click()
        page.get_by_role("button", name="Check now").click()
        page.get_by_text("share · rename").wait_for(timeout=120_000)
        assert re.search("last checked", page.locator("#part").inner_text())


@pytest.mark.slow
def test_the_page_says_so_when_its_server_is_gone(share: Share, tab: Tab) -> None:
    with running_ui(share) as site:
        page = tab(site)
        page.get_by_text("Nothing: every picture").wait_for()
        site.before_end.clear()  # this page outlives it
    page.locator("body.offline").wait_for()
