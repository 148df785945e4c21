"""Who may see and change what: login, session, CSRF, host, origin, read-only."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from sam_poll.integrations.ui import access
from sam_poll.integrations.ui.access import SESSION_S, Sessions
from sam_poll.integrations.ui.names import encode
from tests.conftest import Share, picture_bytes
from tests.support.ui_site import TOKEN, running_ui

PAGES = ("/ui/", "/ui/answers", "/ui/settings", "/ui/doctor", "/ui/events")


def stranger(url: str, **more: Any) -> httpx.Client:
    return httpx.Client(base_url=url, timeout=60, trust_env=False, **more)


def test_every_page_has_a_strict_policy_and_no_inline_script(share: Share) -> None:
    share.drop("dog.jpg", picture_bytes())
    with running_ui(share) as site:
        for path in (*PAGES[:-1], site.edit("waiting", "dog.jpg"), "/ui/nowhere"):
            answer = site.client.get(path, headers={"Accept": "text/html"})
            policy = answer.headers["content-security-policy"]
            assert "script-src 'self';" in policy
            assert "unsafe" not in policy
            assert not re.search(r"<script(?![^>]* src=)", answer.text)
            assert not re.search(r'\s(on\w+|style)="', answer.text)
            assert not re.search(r'(src|href|hx-get)="(https?:)?//', answer.text)


def test_the_cookie_is_hidden_from_scripts_and_from_other_sites(share: Share) -> None:
    with running_ui(share) as site:
        with stranger(site.url) as client:
            cookie = client.get("/ui/").headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie


def test_changes_need_the_csrf_token_of_the_session(share: Share) -> None:
    with running_ui(share) as site, stranger(site.url) as other:
        other.get("/ui/")
        token = site.csrf
        for client, headers in (
            (site.client, {}),
            (site.client, {"X-CSRF-Token": "x"}),
            (other, {"X-CSRF-Token": token}),
        ):
            answer = client.post("/ui/upload?name=a.jpg", content=picture_bytes(), headers=headers)
            assert answer.status_code == 403
        assert share.tree("input") == []
        assert site.post("/ui/upload?name=a.jpg", content=picture_bytes()).status_code == 201


def test_forms_need_the_token_in_a_field_or_the_header(share: Share) -> None:
    share.pair("dog", prompt={"box": 1})
    share.run_once()
    with running_ui(share) as site:
        site.wait_for("dog.jpg")
        token, page = site.csrf, {"Accept": "text/html"}
        for path in ("/ui/retry", "/ui/doctor", "/ui/logout"):
            for data in ({}, {"csrf": "x"}):
                answer = site.client.post(path, data={"job": encode("dog"), **data}, headers=page)
                assert answer.status_code == 403, path
                assert "reload the page" in answer.text
                assert "<html" in answer.text
        assert "dog.jpg" in share.tree("failed")
        form = {"job": encode("dog"), "csrf": token}
        answer = site.client.post("/ui/retry", data=form, headers=page)
        assert (answer.status_code, answer.headers["location"]) == (303, "/ui/")
        assert share.tree("failed") == []


def test_a_form_that_cannot_be_read_is_refused_as_one(share: Share) -> None:
    with running_ui(share) as site:
        kind = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = site.client.post("/ui/retry", content=b"no parts", headers=kind)
        assert answer.status_code == 400
        assert "the form cannot be read" in answer.text


def test_other_origins_and_hosts_are_refused(share: Share) -> None:
    with running_ui(share) as site:
        headers = {"X-CSRF-Token": site.csrf}
        for more in ({"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            answer = site.client.post("/ui/retry", data={"job": "eA"}, headers=headers | more)
            assert answer.status_code == 403
        assert site.client.get("/ui/", headers={"Host": "evil.example"}).status_code == 421


def test_without_the_token_nothing_is_shown(share: Share) -> None:
    share.pair("dog")
    share.run_once()
    with running_ui(share, token=TOKEN) as site, stranger(site.url) as client:
        for path in PAGES:
            page = client.get(path, headers={"Accept": "text/html"})
            assert page.status_code == 303
            assert page.headers["location"].startswith("/ui/login")
            assert client.get(path).status_code == 401
        assert client.post("/ui/upload?name=a.jpg", content=b"x").status_code == 401
        wrong = client.post("/ui/login", data={"token": "wrong"})
        assert wrong.status_code == 401
        assert "The token is wrong" in wrong.text
        assert "set-cookie" not in wrong.headers
        right = client.post("/ui/login?next=/ui/answers", data={"token": TOKEN})
        assert right.status_code == 303
        assert right.headers["location"] == "/ui/answers"
        assert "dog" in site.wait_for("dog")
        assert client.get("/ui/answers").status_code == 200


@pytest.mark.parametrize("target", ["https://evil.example", "//evil.example", "/ui/..//x", "/x"])
def test_the_login_leads_to_its_own_pages_only(share: Share, target: str) -> None:
    with running_ui(share, token=TOKEN) as site, stranger(site.url) as client:
        answer = client.post("/ui/login", params={"next": target}, data={"token": TOKEN})
        assert answer.headers["location"] == "/ui/"


def test_logging_out_ends_the_session(share: Share) -> None:
    with running_ui(share, token=TOKEN) as site:
        answer = site.client.post("/ui/logout", data={"csrf": site.csrf})
        assert (answer.status_code, answer.headers["location"]) == (303, "/ui/login")
        assert site.client.get("/ui/").status_code == 401
        again = site.client.post("/ui/logout", data={"csrf": "of a session that is over"})
        assert (again.status_code, again.headers["location"]) == (303, "/ui/login")


@pytest.mark.parametrize("form", [{}, {"csrf": "wrong"}, {"csrf": "é"}])
def test_another_page_cannot_log_out(share: Share, form: dict[str, str]) -> None:
    with running_ui(share, token=TOKEN) as site:
        assert site.client.post("/ui/logout", data=form).status_code == 403
        assert site.client.get("/ui/").status_code == 200


def test_read_only_shows_and_changes_nothing(share: Share) -> None:
    share.pair("dog", prompt={"box": 1})
    share.drop("cat.jpg", picture_bytes())
    share.run_once()
    with running_ui(share, read_only=True) as site:
        text = site.wait_for("dog.jpg")
        assert "Retry" not in text
        assert "upload-file" not in text
        before = {folder: share.tree(folder) for folder in ("input", "failed")}
        for path in (
            "/ui/retry",
            "/ui/upload?name=a.jpg",
            "/ui/doctor",
            site.edit("waiting", "cat.jpg"),
        ):
            answer = site.post(path, content=b"{}")
            assert answer.status_code == 403, path
            assert answer.json()["code"] == "read_only"
        assert {folder: share.tree(folder) for folder in ("input", "failed")} == before


def test_sessions_end_by_time_and_cannot_be_forged() -> None:
    now = [1000.0]
    sessions = Sessions(TOKEN, lambda: now[0])
    cookie = sessions.new().cookie
    assert sessions.check(cookie)
    assert Sessions(TOKEN, lambda: now[0]).check(cookie), "a restart ends no session"
    assert not Sessions("another-token-for-tests", lambda: now[0]).check(cookie)
    assert not Sessions(None).check(cookie)
    for forged in ("", ".", "1.2", cookie + "x", "9" + cookie, "\udcff", cookie[:-1] + "é"):
        assert not sessions.check(forged)
    now[0] += SESSION_S
    assert not sessions.check(cookie)


def test_only_so_many_bodies_are_taken_at_once(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access, "MOST_CHANGES", 0)
    with running_ui(share) as site:
        answer = site.post("/ui/upload?name=a.jpg", content=picture_bytes())
        assert answer.status_code == 429
        assert share.tree("input") == []
