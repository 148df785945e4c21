"""A CVAT server that is none: tasks, labels, frames and annotations in memory, behind the paths that `cvat_sdk` asks.

It refuses what a real one was seen to refuse: unknown labels, masks whose run lengths do not fill their box, frames
out of range, shapes that a label's type does not allow, files that are not on its share. It drops unknown attributes
without a word. Beyond that it refuses what we must never send: empty runs, and masks over a frame's edge. Faults can be
put before any request, or after it, when the deed is done and its answer gets lost.

What can still go wrong here: a real server may refuse more.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2

TOKEN, USER, PASSWORD = "tok-5ecret-3f9a", "ann", "pa55-w0rd-77b1"
SESSION, CSRF, KEY = "session-1c2d", "csrf-9e8f", "key-4b5a"
POINTS = {"rectangle": (4, 4), "points": (2, None), "polygon": (6, None), "polyline": (4, None), "ellipse": (4, 4)}
Json = Any


class Refusal(Exception):
    """An answer other than the deed."""

    def __init__(self, status: int, body: Json, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status, self.body, self.headers = status, body, headers or {}


@dataclass
class Fault:
    """What happens to a request. `after`: the deed is done first. Kinds: a status, `cut` (the connection ends in the
    middle of the body), `drop` (before any answer), `silent` (no answer for as long as the client waits)."""

    kind: int | str
    after: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    body: Json = None


@dataclass
class Task:
    """A task; its frames are (name, picture file)."""

    id: int
    name: str
    labels: list[dict[str, Json]]
    frames: list[tuple[str, bytes]] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)
    shapes: list[dict[str, Json]] = field(default_factory=list)
    tracks: list[dict[str, Json]] = field(default_factory=list)
    project: int | None = None
    state: tuple[str, str] | None = None

    def plain(self) -> list[tuple[Any, ...]]:
        """The shapes without what depends on the way they came: their numbers."""
        keys = ("frame", "type", "label_id", "points", "group", "source", "z_order", "occluded")
        made = [(*(json.dumps(s[k]) for k in keys), json.dumps(sorted(map(str, s["attributes"])))) for s in self.shapes]
        return sorted(made)


class StandIn:
    """The server's memory, and what has been asked of it (`log`: method and path with query)."""

    def __init__(self, share: Path | None = None, *, old: bool = False) -> None:
        self.share, self.old = share, old
        self.tasks: dict[int, Task] = {}
        self.projects: dict[int, list[dict[str, Json]]] = {}
        self.log: list[str] = []
        self.bodies: list[Json] = []
        self.faults: dict[int, Fault] = {}
        self.when: Callable[[str, str], Fault | None] = lambda method, path: None
        self.version = "2.80.0"
        self.let_go = threading.Event()
        self.lock = threading.RLock()
        self._numbers = iter(range(1, 1 << 30))

    # ── what tests put in ──

    def number(self) -> int:
        return next(self._numbers)

    def labels(self, *specs: Json) -> list[dict[str, Json]]:
        """Labels out of names, or specs as the API takes them."""
        made = []
        for spec in specs:
            spec = {"name": spec, "attributes": [score_spec()]} if isinstance(spec, str) else spec
            attributes = [{**a, "id": self.number()} for a in spec.get("attributes", ())]
            made.append({"type": "any", **spec, "id": self.number(), "attributes": attributes, "has_parent": False})
        return made

    def add_task(self, name: str, frames: list[tuple[str, bytes]], *labels: Json) -> Task:
        task = Task(self.number(), name, self.labels(*labels), frames)
        self.tasks[task.id] = task
        return task

    def draw(self, task: Task, frame: int, kind: str, label: str, points: list[float], **more: Json) -> int:
        """A shape as a person draws it; its number."""
        wanted = next(one for one in task.labels if one["name"] == label)
        shape = {"type": kind, "frame": frame, "label_id": wanted["id"], "points": points, "source": "manual", **more}
        return self._add(task, shape)["id"]

    def writes(self) -> list[str]:
        """The requests so far that change something, logging in left out."""
        return [line for line in self.log if not line.startswith("GET") and "/auth/" not in line]

    # ── what a client asks ──

    def answer(self, method: str, path: str, query: dict[str, str], body: Json) -> Json:
        with self.lock:
            for pattern, verbs in _ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method in verbs:
                    numbers = [int(group) for group in found.groups() if group.isdecimal()]
                    return getattr(self, verbs[method])(*numbers, query=query, body=body)
        raise Refusal(404, {"detail": "Not found."})

    def about(self, **_: Json) -> Json:
        return {"name": "CVAT", "description": "", "version": self.version}

    def login(self, body: Json, **_: Json) -> Json:
        if (body["username"], body["password"]) != (USER, PASSWORD):
            # what an unfriendly proxy may do: quote what it was sent
            raise Refusal(400, {"non_field_errors": [f"Unable to log in with {body['username']} {body['password']}"]})
        return {"key": KEY}

    def me(self, **_: Json) -> Json:
        return {"url": "", "id": 1, "username": USER, "first_name": "", "last_name": ""}

    def list_labels(self, query: dict[str, str], **_: Json) -> Json:
        if "task_id" in query:
            labels = self._task(int(query["task_id"])).labels
        elif int(query["project_id"]) in self.projects:
            labels = self.projects[int(query["project_id"])]
        else:
            raise Refusal(404, {"detail": "Not found."})
        return self._page(labels, query)

    def list_tasks(self, query: dict[str, str], **_: Json) -> Json:
        return self._page([self._shown(t) for t in self.tasks.values() if t.name == query.get("name", t.name)], query)

    def create_task(self, body: Json, **_: Json) -> Json:
        project = body.get("project_id")
        if project is not None and body.get("labels"):
            raise Refusal(400, {"labels": ["Can't set labels to a task inside a project."]})
        labels = self.projects[project] if project is not None else self.labels(*body["labels"])
        task = Task(self.number(), body["name"], labels, project=project)
        self.tasks[task.id] = task
        return self._shown(task)

    def get_task(self, number: int, **_: Json) -> Json:
        return self._shown(self._task(number))

    def get_status(self, number: int, **_: Json) -> Json:
        state, message = self._task(number).state or ("unknown", "")
        return {"state": state.capitalize(), "message": message}

    def get_request(self, number: int, **_: Json) -> Json:
        state = self._task(number).state
        if state is None:
            raise Refusal(404, {"detail": "Not found."})
        return {"id": f"rq-{number}", "status": state[0], "message": state[1], "operation": {"type": "create:task"}}

    def list_requests(self, query: dict[str, str], **_: Json) -> Json:
        task = self._task(int(query["task_id"]))
        return self._page([self.get_request(task.id)] if task.state else [], query)

    def add_data(self, number: int, body: Json, **_: Json) -> Json:
        task = self._task(number)
        if task.frames:
            raise Refusal(400, "Adding more data is not allowed")
        assert self.share is not None
        files = [(name, self.share / name) for name in sorted(body["server_files"])]
        lost = [name for name, file in files if not file.is_file()]
        if lost:
            task.state = ("failed", f"FileNotFoundError: [Errno 2] No such file: '/home/django/share/{lost[0]}'")
        else:
            task.frames, task.state = [(name, file.read_bytes()) for name, file in files], ("finished", "")
        return {} if self.old else {"rq_id": f"rq-{number}"}

    def get_frame(self, number: int, query: dict[str, str], **_: Json) -> Json:
        task = self._task(number)
        if query.get("type") != "frame" or int(query["number"]) >= len(task.frames):
            raise Refusal(400, "unexpected frame")
        return task.frames[int(query["number"])][1]

    def get_meta(self, number: int, **_: Json) -> Json:
        task = self._task(number)
        frames = []
        for name, data in task.frames:
            height, width = cv2.imdecode(_bytes(data), cv2.IMREAD_COLOR).shape[:2]
            frames.append({"name": name, "width": width, "height": height, "related_files": 0})
        return {"size": len(frames), "frames": frames, "deleted_frames": task.deleted, "start_frame": 0}

    def get_annotations(self, number: int, **_: Json) -> Json:
        task = self._task(number)
        return {"version": 0, "tags": [], "shapes": task.shapes, "tracks": task.tracks}

    def put_annotations(self, number: int, body: Json, **_: Json) -> Json:
        task = self._task(number)
        self._check_all(task, body["shapes"])
        task.shapes = []
        return {**body, "shapes": [self._add(task, shape) for shape in body["shapes"]]}

    def patch_annotations(self, number: int, query: dict[str, str], body: Json, **_: Json) -> Json:
        task, shapes = self._task(number), body["shapes"]
        self._check_all(task, shapes)
        ids = {shape.get("id") for shape in shapes}
        if query["action"] in ("delete", "update"):
            task.shapes = [shape for shape in task.shapes if shape["id"] not in ids]
        if query["action"] in ("create", "update"):
            shapes = [self._add(task, shape) for shape in shapes]
        return {**body, "shapes": shapes}

    def list_share(self, query: dict[str, str], **_: Json) -> Json:
        assert self.share is not None
        folder = self.share / query.get("directory", "/").strip("/")
        if not folder.is_dir():
            raise Refusal(400, f"{folder.name} is an invalid directory")
        kinds = {True: "DIR", False: "REG"}
        return [{"name": p.name, "type": kinds[p.is_dir()], "mime_type": "image"} for p in sorted(folder.iterdir())]

    # ── parts ──

    def _task(self, number: int) -> Task:
        if number not in self.tasks:
            raise Refusal(404, {"detail": "Not found."})
        return self.tasks[number]

    def _shown(self, task: Task) -> Json:
        size = len(task.frames)
        return {"id": task.id, "name": task.name, "size": size, "project_id": task.project, "owner": {"id": 1}}

    def _page(self, entries: list[Json], query: dict[str, str]) -> Json:
        size, page = min(2, int(query.get("page_size", 10))), int(query.get("page", 1))  # small, so that paging shows
        some = entries[(page - 1) * size : page * size]
        following = "next" if page * size < len(entries) else None
        return {"count": len(entries), "next": following, "previous": None, "results": some}

    def _check_all(self, task: Task, shapes: list[Json]) -> None:
        for shape in shapes:
            self._check(task, shape)

    def _check(self, task: Task, shape: Json) -> None:
        label = next((one for one in task.labels if one["id"] == shape["label_id"]), None)
        if label is None:
            raise Refusal(400, f"label_id {shape['label_id']} is not found in the task")
        if label["type"] not in ("any", shape["type"]):
            raise Refusal(400, f"label {label['name']} does not allow {shape['type']}")
        if not 0 <= shape["frame"] < len(task.frames):
            raise Refusal(400, f"frame {shape['frame']} is out of range")
        points = shape["points"]
        if shape["type"] == "mask":
            self._check_mask(points, *cv2.imdecode(_bytes(task.frames[shape["frame"]][1]), cv2.IMREAD_COLOR).shape[:2])
            return
        least, most = POINTS[shape["type"]]
        if len(points) < least or len(points) % 2 or (most and len(points) > most):
            raise Refusal(400, f"{shape['type']} of {len(points)} numbers")

    def _check_mask(self, points: list[float], height: int, width: int) -> None:
        """Whole run lengths that fill a box on the picture, with a zero only where the first pixel is set."""
        *runs, left, top, right, bottom = points
        if sum(runs) != (right - left + 1) * (bottom - top + 1) or any(run != int(run) for run in runs):
            raise Refusal(400, "the mask does not fill its box")
        if not runs or min(runs) < 0 or 0 in runs[1:]:
            raise Refusal(400, "the mask has empty runs")
        if not (0 <= left <= right < width and 0 <= top <= bottom < height):
            raise Refusal(400, "the mask leaves its frame")

    def _add(self, task: Task, shape: Json) -> Json:
        label = next(one for one in task.labels if one["id"] == shape["label_id"])
        known = {attribute["id"] for attribute in label["attributes"]}
        defaults = {"occluded": False, "outside": False, "z_order": 0, "rotation": 0.0, "group": 0, "elements": []}
        kept = [a for a in shape.get("attributes", ()) if a["spec_id"] in known]
        points = [float(value) for value in shape["points"]]
        made = {**defaults, **shape, "id": self.number(), "points": points, "attributes": kept}
        task.shapes.append(made)
        return made


_ROUTES: list[tuple[str, dict[str, str]]] = [
    (r"/api/server/about", {"GET": "about"}),
    (r"/api/auth/login", {"POST": "login"}),
    (r"/api/users/self", {"GET": "me"}),
    (r"/api/labels", {"GET": "list_labels"}),
    (r"/api/server/share", {"GET": "list_share"}),
    (r"/api/requests", {"GET": "list_requests"}),
    (r"/api/requests/rq-(\d+)", {"GET": "get_request"}),
    (r"/api/tasks", {"GET": "list_tasks", "POST": "create_task"}),
    (r"/api/tasks/(\d+)", {"GET": "get_task"}),
    (r"/api/tasks/(\d+)/status", {"GET": "get_status"}),
    (r"/api/tasks/(\d+)/data/", {"GET": "get_frame", "POST": "add_data"}),
    (r"/api/tasks/(\d+)/data/meta", {"GET": "get_meta"}),
    (
        r"/api/tasks/(\d+)/annotations/",
        {"GET": "get_annotations", "PUT": "put_annotations", "PATCH": "patch_annotations"},
    ),
]


def _handler(memory: StandIn) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # head and body of an answer in one packet

        def _serve(self) -> None:
            parts = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(parts.query))
            length = int(self.headers.get("Content-Length") or 0)
            sent = self.rfile.read(length)
            body = json.loads(sent) if sent else {}
            with memory.lock:
                memory.log.append(f"{self.command} {self.path}")
                memory.bodies.append(body)
                fault = memory.faults.pop(len(memory.log), None) or memory.when(self.command, self.path)
            status, answer, headers = 200, None, {}
            if not fault or fault.after:
                status, answer, headers = self._deed(parts.path, query, body)
            if fault:
                self._fail(fault, answer)
                return
            self._send(status, answer, headers)

        def _deed(self, path: str, query: dict[str, str], body: Json) -> tuple[int, Json, dict[str, str]]:
            open_to_all = path in ("/api/server/about", "/api/auth/login")
            try:
                if not open_to_all and not self._is_known():
                    raise Refusal(401, {"detail": f"Invalid token {self.headers.get('Authorization')}"})
                return 200, memory.answer(self.command, path, query, body), {}
            except Refusal as refusal:
                return refusal.status, refusal.body, refusal.headers

        def _is_known(self) -> bool:
            said = self.headers.get("Authorization", "")
            if said:
                return said in (f"Bearer {TOKEN}", f"Token {TOKEN}", f"Token {KEY}")
            cookie = self.headers.get("Cookie", "")
            safe = self.command == "GET" or self.headers.get("X-CSRFToken") == CSRF
            return f"sessionid={SESSION}" in cookie and safe

        def _fail(self, fault: Fault, answer: Json) -> None:
            if fault.kind == "silent":
                memory.let_go.wait(30)
                self._close()
            elif fault.kind == "drop":
                self._close()
            elif fault.kind == "cut":
                whole = json.dumps(answer).encode() if not isinstance(answer, bytes) else answer
                self.send_response(200)
                self.send_header("Content-Length", str(len(whole) + 10))
                self.end_headers()
                self.wfile.write(whole[: len(whole) // 2])
                self._close()
            else:
                self._send(int(fault.kind), fault.body or {"detail": "as the test wants it"}, fault.headers)

        def _close(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

        def _send(self, status: int, answer: Json, headers: dict[str, str]) -> None:
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "image/png" if isinstance(answer, bytes) else "application/vnd.cvat+json")
            self.send_header("Content-Length", str(len(body)))
            if self.path == "/api/auth/login" and status == 200:
                self.send_header("Set-Cookie", f"sessionid={SESSION}; Path=/")
                self.send_header("Set-Cookie", f"csrftoken={CSRF}; Path=/")
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _serve

        def log_message(self, *args: Any) -> None:
            """Nothing on stderr."""

    return Handler


def _bytes(data: bytes) -> Any:
    import numpy as np

    return np.frombuffer(data, np.uint8)


def score_spec(kind: str = "text", values: tuple[str, ...] = ("",)) -> dict[str, Json]:
    """A label's attribute for scores."""
    return {"name": "score", "mutable": False, "input_type": kind, "values": list(values)}


@contextmanager
def served(memory: StandIn) -> Iterator[str]:
    """The stand-in behind a port of this machine; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(memory))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        memory.let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()
