"""The pages: each request is answered from the shared view of the share, or from one file of it.

Templates escape everything; names of the share are shown with unprintable characters escaped, and
are in addresses as `names.encode` writes them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from functools import partial
from typing import Any
from urllib.parse import urlencode

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles

from sam_poll import __version__
from sam_poll.config.settings import SettingInForce
from sam_poll.core.alarms import REMEDIES
from sam_poll.core.errors import InputError, SamPollError
from sam_poll.core.files import NO_FILE, remedy_of
from sam_poll.core.text import shown
from sam_poll.formats.overlay import colour
from sam_poll.imaging import source_file
from sam_poll.integrations.http.errors import (
    BadRequestError,
    MethodError,
    NotFoundError,
    UnavailableError,
    response,
    status_of,
)
from sam_poll.integrations.ui import live, names
from sam_poll.integrations.ui.access import (
    CSRF_HEADER,
    DOCTOR,
    LOGIN,
    PREFIX,
    Sessions,
    check_form,
)
from sam_poll.integrations.ui.answers import (
    AnswerFacts,
    AnswerFilter,
    file_of,
    picture_of,
    read_answer,
)
from sam_poll.integrations.ui.doctor import Doctor
from sam_poll.integrations.ui.editor import Editor, Place, Target, check_version, version_of
from sam_poll.integrations.ui.pictures import THUMBNAIL_SIDE, VIEW_SIDE, Pictures
from sam_poll.integrations.ui.preview import Previewer
from sam_poll.integrations.ui.share_index import AnswerEntry, ShareIndex, ShareView
from sam_poll.runtime import console
from sam_poll.share.status import retry_jobs

FAILURES_PER_PAGE = 20
WAITING_PER_PAGE = 20
ANSWERS_PER_PAGE = 24
_FOLDERS = ("input", "work", "output", "done", "failed")
_LONGEST_QUERY = 500


@dataclass
class Ui:
    """What the pages are made from."""

    index: ShareIndex
    facts: AnswerFacts
    pictures: Pictures
    editor: Editor
    previewer: Previewer
    doctor: Doctor
    in_force: Sequence[SettingInForce]
    read_only: bool
    sessions: Sessions
    cookie_name: str
    is_stopping: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list: its entries, its number from 1, the number of pages and of all entries."""

    entries: Sequence[Any]
    number: int
    pages: int
    total: int

    @classmethod
    def of(cls, entries: Sequence[Any], number: int, size: int) -> Page:
        """Return a page; the nearest one where there is none of this number."""
        pages = max(1, math.ceil(len(entries) / size))
        number = min(max(1, number), pages)
        start = (number - 1) * size
        return cls(entries[start : start + size], number, pages, len(entries))


class Pages:
    """The endpoints. Those that are `def` may touch the share, and run on threads."""

    def __init__(self, ui: Ui) -> None:
        self._ui = ui
        self._templates = _templates()

    def render(self, request: Request, template: str, status: int = 200, **values: Any) -> Response:
        """Return a page made from a template."""
        session = getattr(request.state, "session", None)
        common = {
            "csrf": session.csrf if session else "",
            "read_only": self._ui.read_only,
            "need_login": self._ui.sessions.need_login,
            "version": __version__,
            "prefix": PREFIX,
        }
        text = self._templates.get_template(template).render(**common, **values)
        # Names are escaped before; this is for what came another way.
        return Response(text.encode("utf-8", "backslashreplace"), status, media_type="text/html")

    # ── overview ──

    async def overview(self, request: Request) -> Response:
        """Show the overview; for htmx its changing part only."""
        return self._overview(request)

    def _overview(self, request: Request, message: str = "") -> Response:
        view = self._ui.index.view()
        query = request.query_params
        kind = names.decode(query.get("kind", ""))
        failures = [one for one in view.failures if one.kind == kind] if kind else view.failures
        values: dict[str, Any] = {
            "view": view,
            "folders": [(name, view.status.get(name)) for name in _FOLDERS],
            "kind": kind if failures else "",
            "failures": Page.of(failures or view.failures, _number(query, "f"), FAILURES_PER_PAGE),
            "waiting": Page.of(view.waiting.paths, _number(query, "w"), WAITING_PER_PAGE),
            "workers": _workers(view),
            "alarms": _alarms(view),
            "rate": _rate(view),
            "query": _query(query),
        }
        is_part = request.headers.get("hx-request") == "true"
        answer = self.render(
            request, "overview_part.html" if is_part else "overview.html", **values
        )
        if message:
            answer.headers["X-Message"] = json.dumps(message)
        return answer

    async def retry(self, request: Request) -> Response:
        """Put one failed job back, or all of a kind (POST)."""
        form = await check_form(request)
        job = str(form.get("job", ""))
        kind = names.decode(str(form.get("kind", "")))
        view = self._ui.index.view()
        if job:
            identities = [names.decode(job)]
        else:
            identities = [one.id for one in view.failures if one.kind == kind]
        count = await _in_thread(partial(self._retry, identities))
        what = f"{console.count(count, 'job')} put back into in/"
        left = len(identities) - count
        if left:
            what += f"; {left} could not be: a file of its name waits there, or it has moved"
        if CSRF_HEADER not in request.headers:
            return RedirectResponse(_url(f"{PREFIX}/", _query(request.query_params)), 303)
        return self._overview(request, what)

    def _retry(self, identities: Sequence[str]) -> int:
        layout = self._ui.index.layout
        for identity in identities:
            names.below(layout.failed, identity)
        count = retry_jobs(layout, identities)
        self._ui.index.refresh()
        return count

    async def events(self, request: Request) -> Response:
        """Send an event whenever the share has changed."""
        seen = _number(request.query_params, "seen")
        stream = live.events(self._ui.index, self._ui.is_stopping, seen)
        return StreamingResponse(stream, media_type=live.MEDIA_TYPE)

    # ── answers ──

    async def answers(self, request: Request) -> Response:
        """Show the answers, newest first."""
        view = self._ui.index.view()
        query = request.query_params
        chosen, problem = _filter_of(query)
        facts = self._ui.facts
        missing = 0
        if chosen.needs_facts:
            facts.want()
            missing = facts.missing()
        found = [entry for entry in view.answers if chosen.matches(entry, facts.of)]
        return self.render(
            request,
            "answers_part.html" if request.headers.get("hx-request") == "true" else "answers.html",
            view=view,
            page=Page.of(found, _number(query, "page"), ANSWERS_PER_PAGE),
            chosen=chosen,
            problem=problem,
            missing=missing,
            labels=facts.labels,
            query=_query(query),
            given=query,
        )

    def answer(self, request: Request, key: str) -> Response:
        """Show one answer large."""
        entry = self._entry(key)
        layout = self._ui.index.layout
        answer, problem = None, None
        try:
            answer = read_answer(layout, entry)
        except (InputError, OSError) as error:
            problem = str(error)
        picture = picture_of(layout, entry, answer)
        size = answer.size if answer else None
        if picture and not size:
            size = self._size(picture)
        colours = [_hex(colour(one.number)) for one in answer.objects] if answer else []
        return self.render(
            request,
            "answer.html",
            entry=entry,
            answer=answer,
            objects=list(zip(answer.objects, colours, strict=True)) if answer else [],
            problem=problem,
            picture=picture,
            size=size,
            data=_data(answer, colours),
        )

    def thumbnail(self, key: str, v: str = "") -> Response:
        """Return an answer's picture with its masks, small."""
        entry = self._entry(key)
        layout = self._ui.index.layout
        answer = read_answer(layout, entry)
        picture = picture_of(layout, entry, answer)
        if picture is None:
            raise names.not_found("the picture of this answer is not in done/")
        body = self._ui.pictures.thumbnail(
            picture, answer, (entry.id, entry.modified), THUMBNAIL_SIDE
        )
        return _jpeg(body, kept=bool(v))

    def answer_picture(self, key: str) -> Response:
        """Return an answer's picture."""
        entry = self._entry(key)
        layout = self._ui.index.layout
        try:
            answer = read_answer(layout, entry)
        except (InputError, OSError):
            answer = None
        picture = picture_of(layout, entry, answer)
        if picture is None:
            raise names.not_found("the picture of this answer is not in done/")
        return _jpeg(self._ui.pictures.view(picture, VIEW_SIDE))

    def answer_file(self, key: str, number: int) -> Response:
        """Return one of an answer's files, to be saved."""
        entry = self._entry(key)
        if not 0 <= number < len(entry.suffixes):
            raise names.not_found()
        path = file_of(self._ui.index.layout, entry, entry.suffixes[number])
        file = path.open()

        def pieces() -> Any:
            with file:
                while block := file.read(1 << 18):
                    yield block

        plain = path.name.encode("ascii", "replace").decode().translate(_QUOTABLE)
        headers = {"Content-Disposition": f'attachment; filename="{plain}"'}
        return StreamingResponse(pieces(), 200, headers, "application/octet-stream")

    def _entry(self, key: str) -> AnswerEntry:
        identity = names.decode(key)
        for entry in self._ui.index.view().answers:
            if entry.id == identity:
                return entry
        raise names.not_found("there is no such answer in out/ any more")

    def _size(self, picture: Any) -> Any:
        try:
            return self._ui.pictures.size(picture)
        except SamPollError:
            return None

    # ── editor ──

    def edit(self, request: Request, place: Place, key: str) -> Response:
        """Show the editor for a waiting, failed or answered picture."""
        ui = self._ui
        target = self._target(place, key)
        picture_version = version_of(target.picture)
        size = ui.pictures.size(target.picture)
        objects, texts, note = ui.editor.present_prompt(target, size)
        ui.previewer.prepare()
        labels = sorted({str(one["label"]) for one in objects})
        data = {
            "width": size.width,
            "height": size.height,
            "objects": objects,
            "texts": texts,
            "labels": labels,
        }
        return self.render(
            request,
            "editor.html",
            target=target,
            key=key,
            size=size,
            picture_version=picture_version,
            note=note,
            data=json.dumps(data),
            job=self._report_of(target),
        )

    def _report_of(self, target: Target) -> Any:
        if target.place != "failed":
            return None
        failures = self._ui.index.view().failures
        return next((one.report for one in failures if one.id == target.key), None)

    def edited_picture(self, place: Place, key: str) -> Response:
        """Return the picture of an editor."""
        target = self._target(place, key)
        return _jpeg(self._ui.pictures.view(target.picture, VIEW_SIDE))

    async def preview(
        self, request: Request, place: Place, key: str, version: str = ""
    ) -> Response:
        """Return the masks of a prompt that is not saved yet (POST)."""
        body = await request.body()
        made = await _in_thread(partial(self._preview, place, key, version, body))
        return Response(made, media_type="application/json")

    def _preview(self, place: Place, key: str, version: str, body: bytes) -> bytes:
        target = self._target(place, key)
        check_version(target.picture, version)
        requested = self._ui.editor.parse_request(body, self._ui.pictures.size(target.picture))
        data, _ = source_file.read(target.picture)
        return self._ui.previewer.preview(data, requested)

    async def save(self, request: Request, place: Place, key: str, version: str = "") -> Response:
        """Save objects as a prompt (POST)."""
        body = await request.body()
        return _json(await _in_thread(partial(self._save, place, key, version, body)), 201)

    def _save(self, place: Place, key: str, version: str, body: bytes) -> dict[str, str]:
        target = self._target(place, key)
        check_version(target.picture, version)
        view = self._ui.index.view()
        path = self._ui.editor.save(target, body, self._ui.pictures.size(target.picture))
        # An answer of this name that is there already is not the one of this prompt.
        before = _state_of(view, path)
        known = [one.modified for one in (*before["answers"], before["failure"]) if one]
        after = f"?after={max(known)!r}" if known else ""
        self._ui.index.refresh()
        return {"saved": shown(path), "next": f"{PREFIX}/jobs/{names.encode(path)}{after}"}

    async def upload(self, request: Request, name: str = "") -> Response:
        """Write a picture into `in/` (POST: the file's bytes)."""
        body = await request.body()
        path = await _in_thread(partial(self._ui.editor.upload, name, body))
        return _json({"next": f"{PREFIX}/edit/waiting/{names.encode(path)}"}, 201)

    async def job(self, request: Request, key: str) -> Response:
        """Show what has become of a saved prompt."""
        path = names.decode(key)
        return self.render(
            request,
            "job_part.html" if request.headers.get("hx-request") == "true" else "job.html",
            path=path,
            query=_query(request.query_params),
            **_state_of(self._ui.index.view(), path, _after(request.query_params)),
        )

    def _target(self, place: Place, key: str) -> Target:
        editor = self._ui.editor
        if place == "waiting":
            return editor.waiting(names.decode(key))
        if place == "failed":
            return editor.failed(names.decode(key))
        return editor.answered(self._entry(key))

    # ── settings, doctor, login ──

    async def settings(self, request: Request) -> Response:
        """Show the settings in force."""
        return self.render(request, "settings.html", settings=self._ui.in_force)

    async def doctor(self, request: Request) -> Response:
        """Show the findings of the last run."""
        is_part = request.headers.get("hx-request") == "true"
        template = "doctor_part.html" if is_part else "doctor.html"
        return self.render(request, template, state=self._ui.doctor.state)

    async def run_doctor(self, request: Request) -> Response:
        """Start a run (POST)."""
        await check_form(request)
        self._ui.doctor.start()
        if CSRF_HEADER not in request.headers:
            return RedirectResponse(DOCTOR, 303)
        return self.render(request, "doctor_part.html", state=self._ui.doctor.state)

    async def login_page(self, request: Request) -> Response:
        """Show the form for the token."""
        if not self._ui.sessions.need_login:
            return RedirectResponse(f"{PREFIX}/", 303)
        return self.render(request, "login.html", wrong=False, next=_next_of(request))

    async def login(self, request: Request) -> Response:
        """Check the token; set the session's cookie (POST)."""
        form = await request.form()
        sessions = self._ui.sessions
        if not sessions.accepts(str(form.get("token", ""))):
            return self.render(request, "login.html", 401, wrong=True, next=_next_of(request))
        answer = RedirectResponse(_next_of(request), 303)
        answer.headers["Set-Cookie"] = sessions.set_cookie(self._ui.cookie_name, sessions.new())
        return answer

    async def logout(self, request: Request) -> Response:
        """Delete the session's cookie (POST)."""
        await check_form(request)
        answer = RedirectResponse(LOGIN, 303)
        answer.delete_cookie(self._ui.cookie_name)
        return answer


# ── helpers ──

_QUOTABLE = {ord('"'): "_", ord("\\"): "_", **dict.fromkeys((*range(32), 127), "_")}


async def _in_thread(work: Callable[[], Any]) -> Any:
    return await run_in_threadpool(work)


def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("sam_poll", "data/ui/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        shown=shown, key=names.encode, ago=_ago, moment=_moment, grouped=_grouped, score=_score
    )
    made.globals.update(url=_url)
    return made


def _number(query: Any, name: str) -> int:
    text = query.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 1


def _query(query: Any) -> dict[str, str]:
    """Return the parameters of an address, so that a link can change one of them."""
    return {name: value[:_LONGEST_QUERY] for name, value in query.items() if value}


def _hex(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _url(path: str, query: dict[str, str], **changed: Any) -> str:
    """Return an address with the present parameters, some of them changed; None removes one."""
    merged = {**query, **{name: str(value) for name, value in changed.items() if value}}
    kept = {name: value for name, value in merged.items() if changed.get(name, "") is not None}
    text = urlencode(kept, errors="replace")
    return f"{path}?{text}" if text else path


def _filter_of(query: Any) -> tuple[AnswerFilter, str | None]:
    """Return the filter of a query, and what is wrong with it."""
    problem = None
    below: float | None = None
    if text := query.get("below", ""):
        try:
            below = float(text)
        except ValueError:
            problem = "the score is a number between 0 and 1"
    since, until = query.get("from", ""), query.get("to", "")
    times: list[float | None] = []
    for text, days in ((since, 0), (until, 1)):
        try:
            day = date.fromisoformat(text) + timedelta(days=days) if text else None
            times.append(datetime(day.year, day.month, day.day).timestamp() if day else None)
        except (ValueError, OverflowError):
            times.append(None)
            problem = "a date is written as 2026-12-31"
    folder = query.get("folder")
    chosen = AnswerFilter(
        folder=None if folder in (None, "*") else names.decode(folder).lstrip("/"),
        label=query.get("label", ""),
        below=below,
        since=times[0],
        until=times[1],
    )
    return chosen, problem


def _workers(view: ShareView) -> list[dict[str, Any]]:
    """Return the daemons for display. What they wrote is untrusted, every user may have."""
    workers = view.status.get("workers", [])
    rows = []
    for worker, row in zip(workers, console.worker_rows(workers), strict=True):
        peak = worker.get("peak_mib")
        rows.append(
            {
                "name": row[0],
                "host": row[1],
                "model": row[3],
                "device": row[4],
                "beat": row[5],
                "alive": worker.get("alive") is True,
                "step": shown(worker.get("step") or ""),
                "peak": f"{peak:.0f} MiB" if isinstance(peak, int | float) else "",
                "at_work": shown(worker.get("at_work", "")),
                "held": console.held_lines(worker) if worker.get("alive") else [],
            }
        )
    return rows


def _alarms(view: ShareView) -> list[dict[str, Any]]:
    return [
        {**alarm, "worker": worker.get("worker"), "remedy": REMEDIES.get(alarm["kind"], "")}
        for worker in view.status.get("workers", [])
        if worker.get("alive")
        for alarm in console.alarms_of(worker)
    ]


def _rate(view: ShareView) -> float:
    """Return the jobs per second of all living daemons."""
    rates = [one.get("rate") for one in view.status.get("workers", []) if one.get("alive")]
    return sum(rate for rate in rates if isinstance(rate, int | float) and math.isfinite(rate))


def _after(query: Any) -> float:
    try:
        return float(query.get("after", "0"))
    except ValueError:
        return 0.0


def _state_of(view: ShareView, path: str, after: float = 0.0) -> dict[str, Any]:
    """Return what has become of the prompt at a path in `in/`: reports and answers after a time."""
    stem = path.rpartition(".")[0]
    name = path.rpartition("/")[2]
    folder = path.rpartition("/")[0]
    failure = next(
        (
            one
            for one in view.failures
            if one.modified > after
            and one.id.rpartition("/")[0] == folder
            and name in one.report.files
        ),
        None,
    )
    answers = [
        one
        for one in view.answers
        if one.modified > after and (one.id == stem or one.id.startswith(f"{stem}~"))
    ]
    return {"failure": failure, "answers": answers}


def _data(answer: Any, colours: Sequence[str]) -> str:
    """Return an answer's objects as JSON for the canvas."""
    if answer is None:
        return json.dumps({"objects": []})
    objects = [
        {
            "number": one.number,
            "label": shown(one.label),
            "score": one.score,
            "colour": tint,
            "parts": [[polygon.tolist() for polygon in part] for part in one.parts],
        }
        for one, tint in zip(answer.objects, colours, strict=True)
    ]
    return json.dumps({"objects": objects})


def _jpeg(body: bytes, *, kept: bool = False) -> Response:
    keep = "private, max-age=86400, immutable" if kept else "private, no-cache"
    return Response(body, headers={"Cache-Control": keep}, media_type="image/jpeg")


def _json(content: Any, status: int = 200) -> Response:
    return Response(json.dumps(content).encode("ascii"), status, media_type="application/json")


def _next_of(request: Request) -> str:
    """Return the page to go to after the login: one of these pages, never another address."""
    path = request.query_params.get("next", "")
    is_own = path.startswith(f"{PREFIX}/") and "\\" not in path and "//" not in path
    return path if is_own and path.isascii() and path.isprintable() else f"{PREFIX}/"


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "?"


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", "\u202f")


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def create_app(ui: Ui) -> FastAPI:
    """Return the ASGI application of the pages."""
    app = FastAPI(
        title="sam_poll", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    pages = Pages(ui)

    async def to_overview() -> Response:
        return RedirectResponse(f"{PREFIX}/", 307)

    gets: dict[str, Callable[..., Any]] = {
        "": to_overview,
        "/": pages.overview,
        "/events": pages.events,
        "/answers": pages.answers,
        "/answers/{key}": pages.answer,
        "/answers/{key}/thumbnail": pages.thumbnail,
        "/answers/{key}/picture": pages.answer_picture,
        "/answers/{key}/files/{number}": pages.answer_file,
        "/edit/{place}/{key}": pages.edit,
        "/edit/{place}/{key}/picture": pages.edited_picture,
        "/jobs/{key}": pages.job,
        "/settings": pages.settings,
        "/doctor": pages.doctor,
        "/login": pages.login_page,
    }
    posts: dict[str, Callable[..., Any]] = {
        "/retry": pages.retry,
        "/edit/{place}/{key}": pages.save,
        "/edit/{place}/{key}/preview": pages.preview,
        "/upload": pages.upload,
        "/doctor": pages.run_doctor,
        "/login": pages.login,
        "/logout": pages.logout,
    }
    for path, endpoint in gets.items():
        app.add_api_route(PREFIX + path, endpoint, methods=["GET"], response_class=Response)
    for path, endpoint in posts.items():
        app.add_api_route(PREFIX + path, endpoint, methods=["POST"], response_class=Response)
    static = StaticFiles(packages=[("sam_poll", "data/ui/static")])
    app.mount(f"{PREFIX}/static", static)

    def refused(request: Request, error: Any) -> Response:
        wants_page = "text/html" in request.headers.get("accept", "")
        if wants_page and not request.headers.get("hx-request"):
            return pages.render(request, "error.html", status_of(error), error=error)
        return response(error)

    def unusable(request: Request, error: Any) -> Response:
        """Answer a request that an error of the share has ended."""
        if error.errno in NO_FILE or isinstance(error, FileNotFoundError):
            return refused(request, names.not_found())
        reason = f"the share cannot be used: {error.strerror or error}"
        return refused(request, UnavailableError(reason, remedy=remedy_of(error)))

    def not_routed(request: Request, error: Any) -> Response:
        if error.status_code == 400:
            remedy = "reload the page, and try again"
            return refused(request, BadRequestError("the form cannot be read", remedy=remedy))
        kind = MethodError if error.status_code == 405 else NotFoundError
        return refused(request, kind("there is no such page", remedy="go back to the overview"))

    def wrong_address(request: Request, error: Any) -> Response:
        return refused(request, names.not_found())

    app.add_exception_handler(RequestValidationError, wrong_address)
    app.add_exception_handler(SamPollError, refused)
    app.add_exception_handler(OSError, unusable)
    app.add_exception_handler(HTTPException, not_routed)
    return app
