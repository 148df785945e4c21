"""The pages: what they show of a share, and what their buttons do."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from sam_poll.core.alarms import Alarms
from sam_poll.core.safe_path import SafePath
from sam_poll.core.telemetry import Telemetry
from sam_poll.core.types import Size
from sam_poll.formats import registry
from sam_poll.integrations.ui.names import encode
from sam_poll.integrations.ui.share_index import ShareIndex
from sam_poll.share.folder_options import FolderOptions
from sam_poll.share.source import FolderSource
from tests.conftest import BOX, Share, picture_bytes, wait_until
from tests.support.results import rectangle, result_of
from tests.support.rough_masks import mask_bytes
from tests.support.ui_site import Site, running_ui

OUTSIDE = {"box": {"x0": 900, "y0": 1, "x1": 2000, "y1": 30}}
HTML = "<img src=x onerror=alert(1)>"


@pytest.fixture
def site(share: Share) -> Iterator[Site]:
    with running_ui(share) as running:
        yield running


def objects(label: str = "dog") -> dict[str, Any]:
    return {"objects": [{"label": label, **BOX}]}


# ── overview ──


def test_failures_stand_above_the_rest_with_reason_and_remedy(share: Share) -> None:
    share.pair("cam1/dog", prompt=OUTSIDE)
    share.pair("cat")
    share.run_once()
    with running_ui(share) as site:
        text = site.wait_for("dog.jpg")
        assert "900 is outside the picture, which is 64×48" in text
        assert "coordinates are pixels" in text
        assert text.index('id="failures"') < text.index('id="latest"')
        assert "box.x0:" in text


def test_without_failures_there_is_no_section_for_them(share: Share, site: Site) -> None:
    share.pair("cat")
    share.run_once()
    assert 'id="failures"' not in site.wait_for("cat")


def test_waiting_files_are_listed_with_what_they_wait_for(share: Share, site: Site) -> None:
    share.drop("dog.jpg", picture_bytes())
    share.drop("lonely.json", BOX)
    text = site.wait_for("lonely.json")
    assert "its prompt" in text
    assert "no picture of its name is beside it" in text


def test_a_failed_job_is_retried_and_its_report_removed(share: Share, site: Site) -> None:
    share.pair("cam1/dog", prompt=OUTSIDE)
    share.run_once()
    site.wait_for("dog.jpg")
    answer = site.post("/ui/retry", data={"job": encode("cam1/dog")})
    assert answer.status_code == 200
    assert "1 job put back" in answer.headers["x-message"]
    assert share.tree("input") == ["cam1/dog.jpg", "cam1/dog.json"]
    assert share.tree("failed") == []


def test_all_jobs_that_failed_for_one_reason_are_retried_together(share: Share, site: Site) -> None:
    for number in range(3):
        share.pair(f"dog{number}", prompt={"box": {**OUTSIDE["box"], "x0": 900 + number}})
    share.pair("cut", prompt={"box": 1})
    share.run_once()
    text = site.wait_for("Retry all 3")
    kind = re.search(r'name="kind" value="([^"]+)">\s*<button[^>]*>Retry all 3', text)
    assert kind
    assert site.post("/ui/retry", data={"kind": kind[1]}).status_code == 200
    assert share.tree("failed") == ["cut.error.json", "cut.jpg", "cut.json"]
    assert len(share.tree("input")) == 6


def test_a_job_whose_name_is_taken_stays_and_the_page_says_so(share: Share, site: Site) -> None:
    share.pair("dog", prompt=OUTSIDE)
    share.run_once()
    site.wait_for("dog.jpg")
    share.drop("dog.jpg", b"new")
    answer = site.post("/ui/retry", data={"job": encode("dog")})
    assert "1 could not be" in answer.headers["x-message"]
    assert (share.input / "dog.jpg").read_bytes() == b"new"


@pytest.mark.slow
def test_ten_thousand_failures_are_paged(share: Share) -> None:
    share.failed.mkdir()
    for number in range(10_000):
        body = {"code": "prompt", "reason": f"{number} is wrong", "files": [f"p{number:05}.jpg"]}
        path = share.failed / f"p{number:05}.error.json"
        path.write_text(json.dumps(body))
        os.utime(path, (number, number))
    with running_ui(share) as site:
        text = site.wait_for("Page 1 of 500")
        assert "p09999.jpg" in text
        assert "p09979.jpg" not in text
        assert "p00000.jpg" in site.page("/ui/?f=500")
        assert "Retry all 10\u202f000" in text
        assert len(text) < 100_000


def test_pages_do_not_read_the_share(share: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    share.pair("dog", prompt=OUTSIDE)
    share.pair("cat")
    share.run_once()
    with running_ui(share) as site:
        site.wait_for("dog.jpg")
        monkeypatch.setattr(ShareIndex, "scan", lambda self: None)

        def refuse(*args: Any, **more: Any) -> Any:
            raise AssertionError("the share was read for a page")

        for name in ("scandir", "open", "lstat"):
            monkeypatch.setattr(SafePath, name, refuse)
        for _ in range(3):
            assert "dog.jpg" in site.page("/ui/")
            assert "cat" in site.page("/ui/answers")


def test_pages_open_before_the_share_has_been_read(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShareIndex, "scan", lambda self: None)
    with running_ui(share) as site:
        assert "in/ is being read" in site.page("/ui/")
        assert "out/ is being read" in site.page("/ui/answers")
        assert "No daemon runs" not in site.page("/ui/")


def test_a_share_that_is_away_is_reported(share: Share, site: Site) -> None:
    site.wait_for("Nothing: every picture has its prompt")
    share.input.rename(share.root / "elsewhere")
    assert "mount the share" in site.wait_for("The share cannot be read")
    (share.root / "elsewhere").rename(share.input)
    wait_until(lambda: "cannot be read" not in site.page("/ui/"))


def test_daemons_and_alarms_are_shown_with_remedies(share: Share, site: Site) -> None:
    alarms = Alarms()
    alarms.raise_("output", "the disk is full")
    assert "No daemon runs" in site.wait_for("Nothing: every picture")
    state = Telemetry(alarms=alarms).state
    with FolderSource(share.layout, FolderOptions(lease_s=2.0), state=state):
        text = site.wait_for("the disk is full")
        assert "free disk space" in text
        assert socket.gethostname() in text
        assert "loading" in text
    wait_until(lambda: "the disk is full" not in site.page("/ui/"))


# ── names and labels of others ──


def test_names_and_labels_are_shown_as_text(share: Share) -> None:
    share.pair(HTML.replace("/", ""), prompt=OUTSIDE)
    share.drop("dog.jpg", picture_bytes())
    share.drop("dog.json", {"objects": [{"label": HTML, **BOX}]})
    share.drop(f"{HTML}2.jpg", picture_bytes())
    share.drop("new\nline\udcff.json", BOX)
    share.run_once()
    (opex,) = registry.load(["opex"], registry.FormatOptions())
    size = Size(64, 48)
    result = result_of(size, [rectangle(size, 5, 5, 30, 30, label=HTML)], name="done/dog.jpg")
    (share.output / "dog.opex.json").write_bytes(opex(result)[0].body)
    with running_ui(share) as site:
        site.wait_for("dog")
        pages = [site.page(path) for path in ("/ui/", "/ui/answers", "/ui/settings")]
        pages.append(site.page(f"/ui/answers/{encode('dog')}"))
        pages.append(site.page(site.edit("failed", HTML)))
        pages.append(site.page(site.edit("answered", "dog")))
        for text in pages:
            assert "<img src=x" not in text
        assert "&lt;img src=x onerror=alert(1)&gt;" in pages[0]
        assert "&lt;img src=x onerror=alert(1)&gt;" in pages[3]
        assert r"new\nline\udcff.json" in pages[0]


def test_malformed_reports_and_heartbeats_do_no_harm(share: Share) -> None:
    for folder in (share.failed, share.work):
        folder.mkdir(exist_ok=True)
    bodies = [b"", b"[]", b'{"files": [5, "../x"], "reason": {}}', b"\xff", b"[" * 100_000]
    for number, body in enumerate(bodies):
        (share.failed / f"f{number}.error.json").write_bytes(body)
        (share.work / f".sam_poll-worker-w{number}.json").write_bytes(body)
    heartbeat = {"model": [HTML], "rate": "fast", "peak_mib": {}, "alarms": [{"kind": HTML}, 5]}
    (share.work / ".sam_poll-worker-w9.json").write_text(json.dumps(heartbeat))
    with running_ui(share) as site:
        text = site.wait_for("f4")
        assert "the report has no reason" in text
        assert "<img src=x" not in text


def test_addresses_that_lead_nowhere_are_refused(share: Share, site: Site, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(picture_bytes())
    share.drop("dog.jpg", picture_bytes())
    (share.input / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    os.mkfifo(share.input / "pipe.jpg")
    keys = ["../../secret.jpg", "..", "/etc/passwd", "link.jpg", "pipe.jpg", ".x/y.jpg", "", "a\0b"]
    for key in keys:
        for place in ("waiting", "failed", "answered"):
            answer = site.client.get(site.edit(place, key))
            assert answer.status_code in (404, 405), (place, key)
    for path in ("/ui/answers/%FF", "/ui/answers/!!!", "/ui/edit/elsewhere/x", "/ui/x", "/other"):
        assert site.client.get(path).status_code == 404, path
    for path in ("/ui/static/../templates/base.html", "/ui/static/%2e%2e/templates/base.html"):
        assert site.client.get(path).status_code == 404, path


def test_a_link_planted_in_done_is_not_followed(share: Share, site: Site, tmp_path: Path) -> None:
    share.pair("dog")
    share.run_once()
    site.wait_for("dog")
    (tmp_path / "secret.jpg").write_bytes(picture_bytes(seed=5))
    (share.done / "dog.jpg").unlink()
    (share.done / "dog.jpg").symlink_to(tmp_path / "secret.jpg")
    key = encode("dog")
    for path in (f"/ui/answers/{key}/picture", f"/ui/answers/{key}/thumbnail"):
        assert site.client.get(path).status_code in (404, 422), path


# ── answers ──


def test_answers_are_filtered_by_folder_and_date(share: Share) -> None:
    share.pair("cam1/dog")
    share.pair("cat")
    share.run_once()
    os.utime(share.output / "cat.mask.png", (0, 0))
    with running_ui(share) as site:
        site.wait_for("cam1/dog")
        inside = site.page("/ui/answers", params={"folder": encode("/cam1")})
        assert "cam1/dog" in inside
        assert ">cat<" not in inside
        old = site.page("/ui/answers", params={"from": "1970-01-01", "to": "1970-01-02"})
        assert ">cat<" in old
        assert ">cam1/dog<" not in old
        wrong = site.page("/ui/answers", params={"from": "yesterday", "below": "x"})
        assert "a date is written as" in wrong


def test_answers_are_filtered_by_label_and_score(share: Share) -> None:
    (opex,) = registry.load(["opex"], registry.FormatOptions())
    size = Size(64, 48)
    share.output.mkdir()
    for name, label, score in (("one", "dog", 0.9), ("two", "cat", 0.4)):
        result = result_of(size, [rectangle(size, 5, 5, 30, 30, label=label, score=score)])
        (share.output / f"{name}.opex.json").write_bytes(opex(result)[0].body)
    with running_ui(share) as site:
        site.wait_for("one")
        wait_until(lambda: ">one<" in site.page("/ui/answers", params={"label": "dog"}))
        assert ">two<" not in site.page("/ui/answers", params={"label": "dog"})
        low = site.page("/ui/answers", params={"below": "0.5"})
        assert ">two<" in low
        assert ">one<" not in low


def test_one_answer_shows_its_objects_files_and_picture(share: Share) -> None:
    share.pair("dog")
    share.run_once()
    with running_ui(share) as site:
        site.wait_for("dog")
        key = encode("dog")
        text = site.page(f"/ui/answers/{key}")
        assert ".mask.png" in text
        file = site.client.get(f"/ui/answers/{key}/files/0")
        assert file.content == (share.output / "dog.mask.png").read_bytes()
        assert file.headers["content-disposition"].startswith("attachment")
        assert site.client.get(f"/ui/answers/{key}/files/1").status_code == 404
        for path in ("picture", "thumbnail"):
            picture = site.client.get(f"/ui/answers/{key}/{path}")
            assert picture.headers["content-type"] == "image/jpeg"
            decoded = cv2.imdecode(np.frombuffer(picture.content, np.uint8), cv2.IMREAD_COLOR)
            assert decoded.shape == (48, 64, 3)


def test_an_answer_file_that_is_none_is_named(share: Share) -> None:
    share.output.mkdir()
    (share.output / "dog.opex.json").write_text("{}")
    with running_ui(share) as site:
        site.wait_for("dog")
        assert "not an answer in the format opex" in site.page(f"/ui/answers/{encode('dog')}")


# ── editor ──


def test_a_prompt_is_saved_beside_its_waiting_picture_and_answered(
    share: Share, site: Site
) -> None:
    share.drop("cam1/dog.jpg", picture_bytes())
    address = site.edit("waiting", "cam1/dog.jpg")
    assert "dog.jpg" in site.page(address)
    answer = site.post(address, json=objects())
    assert answer.status_code == 201, answer.text
    assert share.tree("input") == ["cam1/dog.jpg", "cam1/dog.json"]
    saved = json.loads((share.input / "cam1/dog.json").read_text())
    assert saved["image"] == "dog.jpg"
    assert saved["image_size"] == {"width": 64, "height": 48}
    assert "The prompt is in in/" in site.page(answer.json()["next"])
    assert share.run_once().answered == 1
    site.wait_for("Answered", answer.json()["next"])


@pytest.mark.parametrize("name", ["new\nline", os.fsdecode(b"not utf-8 \xff")])
def test_a_picture_whose_name_no_prompt_can_hold_is_found_by_the_prompts_own(
    share: Share, site: Site, name: str
) -> None:
    share.drop(f"{name}.jpg", picture_bytes())
    saved = site.post(site.edit("waiting", f"{name}.jpg"), json=objects())
    assert saved.status_code == 201, saved.text
    assert "image" not in json.loads((share.input / f"{name}.json").read_text())
    assert share.run_once().answered == 1
    site.wait_for("Answered", saved.json()["next"])
    again = site.post(site.edit("answered", name), json=objects())
    assert again.status_code == 201, again.text
    assert share.run_once().answered == 1
    answer = json.dumps({"meta": {"image": f"done/{name}.jpg"}, "objects": []})
    (share.output / f"{name}.opex.json").write_text(answer)
    (share.done / f"{name}.bmp").write_bytes(picture_bytes())  # the prompt's name is for both now
    wait_until(lambda: ".opex.json" in site.page(f"/ui/answers/{encode(name)}"))
    again = site.post(site.edit("answered", name), json=objects())
    assert "another picture of this name" in again.json()["reason"]


def test_a_preview_is_the_answers_mask(share: Share, site: Site) -> None:
    share.drop("dog.jpg", picture_bytes())
    address = site.edit("waiting", "dog.jpg")
    body = {"objects": [{"label": "dog", "points": [{"x": 30, "y": 20, "label": 1}]}]}
    preview = site.post(f"{address}/preview", json=body).json()
    site.post(address, json=body)
    share.run_once()
    mask = cv2.imread(str(share.output / "dog.mask.png"), cv2.IMREAD_GRAYSCALE)
    drawn = np.zeros_like(mask)
    for part in preview["objects"][0]["parts"]:
        cv2.fillPoly(drawn, [np.rint(polygon).astype(np.int32) for polygon in part], 255)
    both = np.count_nonzero((mask > 0) & (drawn > 0))
    assert both / np.count_nonzero((mask > 0) | (drawn > 0)) > 0.98
    assert preview["objects"][0]["area"] == np.count_nonzero(mask)
    assert preview["objects"][0]["score"] == 0.9


def test_a_further_click_does_not_encode_again(share: Share) -> None:
    from sam_poll.engines.fake import FakeEngine

    engine = FakeEngine()
    share.drop("dog.jpg", picture_bytes())
    with running_ui(share, engine=engine) as site:
        address = f"{site.edit('waiting', 'dog.jpg')}/preview"
        for x in (10, 20, 30):
            click = {"label": "dog", "points": [{"x": x, "y": 20, "label": 1}]}
            assert site.post(address, json={"objects": [click]}).status_code == 200
    assert engine.calls["encode"] == 1
    assert engine.calls["decode"] == 3


def test_a_failed_jobs_prompt_is_replaced_and_retried(share: Share, site: Site) -> None:
    share.pair("cam1/dog", prompt=OUTSIDE)
    share.run_once()
    site.wait_for("dog.jpg")
    address = site.edit("failed", "cam1/dog")
    assert "1 object of the present prompt left out" in site.page(address)
    answer = site.post(address, json=objects())
    assert answer.status_code == 201, answer.text
    assert share.tree("failed") == []
    assert share.run_once().answered == 1


def test_a_mask_file_is_no_picture_and_its_object_is_left_out(share: Share, site: Site) -> None:
    share.drop("cam1/dog.jpg", picture_bytes())
    share.drop("cam1/dog.rough.png", mask_bytes())
    site.wait_for("dog.jpg")
    assert "Click a prompt for cam1/dog.rough.png" not in site.page("/ui/")
    objects_too = {"objects": [BOX, {"mask": "dog.rough.png"}, {"mask": "dog.gone.rough.png"}]}
    share.drop("cam1/dog.json", objects_too)
    share.run_once()
    site.wait_for("dog.gone.rough.png is not beside the picture")
    text = site.page(site.edit("failed", "cam1/dog"))
    assert "2 objects of the present prompt left out: with a mask in a file" in text
    assert "&#34;x0&#34;: 10" in text


def test_an_answered_picture_gets_a_further_job(share: Share, site: Site) -> None:
    share.pair("dog")
    share.run_once()
    site.wait_for("dog")
    address = site.edit("answered", "dog")
    text = site.page(address)
    assert "&#34;x0&#34;: 10" in text  # the present prompt
    answer = site.post(address, json=objects("cat"))
    assert answer.status_code == 201, answer.text
    assert "The prompt is in in/" in site.page(answer.json()["next"])
    assert share.tree("input") == ["dog.json"]
    share.run_once()
    assert share.tree("done") == ["dog.jpg", "dog.json", "dog~2.json"]
    site.wait_for("Answered", answer.json()["next"])
    assert "cat" in site.page(address)


def test_a_picture_that_is_not_the_newest_of_its_name_gets_no_further_job(share: Share) -> None:
    for seed in (1, 2):
        share.pair("dog", seed=seed)
        share.run_once()
    with running_ui(share) as site:
        site.wait_for("dog~2")
        answer = site.post(site.edit("answered", "dog"), json=objects())
        assert answer.status_code == 422
        assert "a newer picture of this name" in answer.json()["reason"]
        assert share.tree("input") == []


def test_saving_names_what_is_wrong(share: Share, site: Site) -> None:
    share.drop("dog.jpg", picture_bytes())
    address = site.edit("waiting", "dog.jpg")
    for body, reason in (
        (OUTSIDE, "is outside"),
        ({"everything": True}, "objects or words are expected"),
        ({"objects": []}, ""),
        ({"objects": [BOX, {"mask": "dog.rough.png"}]}, "a mask in a file cannot be saved here"),
        ({"objects": [{"label": "a\nb", **BOX}]}, "control characters"),
    ):
        answer = site.post(address, json=body)
        assert answer.status_code == 422, body
        assert reason in answer.json()["reason"]
    assert site.post(address, content=b"\xff").status_code == 422
    (share.input / "dog.jpg").unlink()
    assert site.post(address, json=objects()).status_code == 404
    assert share.tree("input") == []


def test_a_second_prompt_does_not_replace_the_first(share: Share, site: Site) -> None:
    share.drop("dog.jpg", picture_bytes())
    for _ in range(2):
        assert site.post(site.edit("waiting", "dog.jpg"), json=objects()).status_code == 201
    assert share.tree("input") == ["dog.2.json", "dog.jpg", "dog.json"]
    assert share.run_once().answered == 2


def test_an_upload_is_dropped_into_in(share: Share, site: Site) -> None:
    body = picture_bytes()
    for expected in ("dog.jpg", "dog-2.jpg"):
        answer = site.post("/ui/upload", params={"name": "dog.jpg"}, content=body)
        assert answer.status_code == 201, answer.text
        assert (share.input / expected).read_bytes() == body
        assert expected in site.page(answer.json()["next"])


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("../dog.jpg", picture_bytes(), "not a plain file name"),
        ("a\nb.jpg", picture_bytes(), "not a plain file name"),
        ("dog.txt", picture_bytes(), "not the name of a picture"),
        ("dog.jp2", picture_bytes(), "a JPEG 2000 is not read"),
        (".dog.jpg", picture_bytes(), "ignore files of this name"),
        ("dog.jpg", b"no picture", ""),
        ("dog.jpg", picture_bytes()[:-50], "truncated"),
        ("", picture_bytes(), "not a plain file name"),
    ],
)
def test_uploads_that_the_folder_would_not_take_are_refused(
    share: Share, site: Site, name: str, body: bytes, reason: str
) -> None:
    answer = site.post("/ui/upload", params={"name": name}, content=body)
    assert answer.status_code == 422
    assert reason in answer.json()["reason"]
    assert share.tree("input") == []


def test_uploads_obey_the_limits(share: Share) -> None:
    with running_ui(share, serve__body_mib=1, limits__picture_mpx=0.001) as site:
        large = site.post("/ui/upload", params={"name": "dog.jpg"}, content=b"x" * (2 << 20))
        assert large.status_code == 413
        assert (
            site.post("/ui/upload", params={"name": "dog.jpg"}, content=picture_bytes()).status_code
            == 422
        )


# ── settings, doctor ──


def test_settings_name_their_source(share: Share) -> None:
    with running_ui(share, lease_s=7) as site:
        text = site.page("/ui/settings")
        assert re.search(r"<code>lease_s</code>.*?7.0.*?command line, lease_s", text, re.DOTALL)
        assert re.search(r"<code>formats</code>.*?\[mask, opex\].*?default", text, re.DOTALL)


@pytest.mark.slow
def test_doctor_runs_on_demand(share: Share) -> None:
    arguments = ("--share", str(share.input), "-m", "demo")
    with running_ui(share, doctor=arguments) as site:
        assert "Check now" in site.page("/ui/doctor")
        assert "Checking" in site.post("/ui/doctor").text
        wait_until(lambda: "last checked" in site.page("/ui/doctor"), timeout=120)
        assert "share · rename" in site.page("/ui/doctor")
