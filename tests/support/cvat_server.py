"""A stand-in for a CVAT server: tasks and annotations in memory, behind the paths of `cvat_sdk`.

It refuses what a real server was seen to refuse: unknown labels, masks whose run lengths do not
fill their box, frames out of range, shapes that a label's type does not allow, files that are not
on its share, changes with a token that may only read, and changes of honeypots through the task. It
silently drops unknown attributes, and, if its version is before 2.57, the score of a shape. It also
refuses what must never be sent: empty runs, and masks that leave their frame. A fault can be set
before any request, or after it, so that the request is carried out and its answer is lost.

Shapes are kept by job, as a real server keeps them: what is written to a task is copied into each
annotation job that covers its frame. Read from the task, equal boxes and polygons of overlapping
jobs are one, and masks and points are not. A picture that has left the share makes every frame of
its chunk fail with 500. Labels of a task, project or job that does not exist are answered with 500.

It imports `CVAT 1.1` and exports `COCO 1.0` as far as these were seen to match names or to fail.

Limitations: a real server may refuse more.
"""

from __future__ import annotations

import json
import posixpath
import re
import socket
import threading
import urllib.parse
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2

TOKEN = "tok-5ecret-3f9a"
USER = "ann"
PASSWORD = "pa55-w0rd-77b1"
READER, ANNOTATOR = "tok-read-0nly-41d7", "tok-ann0tator-88c2"  # tokens with fewer permissions
NATIVE_SCORE_SINCE = (2, 57)  # the version of the server whose shapes have a score
SESSION = "session-1c2d"
CSRF = "csrf-9e8f"
KEY = "key-4b5a"
POINTS = {
    "rectangle": (4, 4),
    "points": (2, None),
    "polygon": (6, None),
    "polyline": (4, None),
    "ellipse": (4, 4),
}
Json = Any


class Refusal(Exception):
    """The answer to a request that is not carried out."""

    def __init__(self, status: int, body: Json, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status = status
        self.body = body
        self.headers = headers or {}


@dataclass
class Fault:
    """What happens to a request. `after`: it is carried out first.

    Kinds: an HTTP status, `cut` (the connection ends in the middle of the body), `drop` (it ends
    before any answer), `silent` (no answer for as long as the client waits).
    """

    kind: int | str
    after: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    body: Json = None


@dataclass
class Job:
    """A job: frames `start` to `stop`, to the task's last one if None. `assigned`: to ANNOTATOR."""

    id: int
    start: int = 0
    stop: int | None = None
    kind: str = "annotation"
    assigned: bool = False
    shapes: list[dict[str, Json]] = field(default_factory=list)

    def covers(self, frame: int) -> bool:
        return self.start <= frame and (self.stop is None or frame <= self.stop)


@dataclass
class Task:
    """A task; its frames are (name, picture file).

    `missing` are the frames whose pictures have left the share, `honeypots` those that the server
    has inserted to check annotators. The first job exists from the start.
    """

    id: int
    name: str
    labels: list[dict[str, Json]]
    jobs: list[Job]
    frames: list[tuple[str, bytes]] = field(default_factory=list)
    deleted: list[int] = field(default_factory=list)
    tracks: list[dict[str, Json]] = field(default_factory=list)
    project: int | None = None
    state: tuple[str, str] | None = None
    is_video: bool = False
    chunk_size: int = 36
    missing: set[int] = field(default_factory=set)
    honeypots: set[int] = field(default_factory=set)

    @property
    def annotation_jobs(self) -> list[Job]:
        return [job for job in self.jobs if job.kind == "annotation"]

    @property
    def shapes(self) -> list[dict[str, Json]]:
        """The shapes as they are read from the task; of a single job, the list itself."""
        if len(self.annotation_jobs) == 1:
            return self.annotation_jobs[0].shapes
        merged: list[dict[str, Json]] = []
        earlier: list[Json] = []  # of the jobs before
        for job in self.annotation_jobs:
            keys = [[s[k] for k in ("frame", "type", "label_id", "points")] for s in job.shapes]
            for shape, key in zip(job.shapes, keys, strict=True):
                if shape["type"] not in ("rectangle", "polygon") or key not in earlier:
                    merged.append(shape)
            earlier += keys
        return merged

    @shapes.setter
    def shapes(self, shapes: list[dict[str, Json]]) -> None:
        (job,) = self.annotation_jobs
        job.shapes = shapes

    def plain(self) -> list[tuple[Any, ...]]:
        """Return the shapes by job without their numbers, which depend on the order of requests."""
        keys = ("frame", "type", "label_id", "points", "group", "source", "z_order", "occluded")
        made = [
            (
                index,
                *(json.dumps(s[k]) for k in keys),
                json.dumps(s.get("score")),
                json.dumps(sorted(map(str, s["attributes"]))),
            )
            for index, job in enumerate(self.jobs)
            for s in job.shapes
        ]
        return sorted(made)


class StandIn:
    """The server's data and its requests: `log` (method, path, query), `bodies`, `headers`."""

    def __init__(self, share: Path | None = None, *, old: bool = False) -> None:
        self.share, self.old = share, old
        self.tasks: dict[int, Task] = {}
        self.projects: dict[int, list[dict[str, Json]]] = {}
        self.log: list[str] = []
        self.bodies: list[Json] = []
        self.headers: list[dict[str, str]] = []
        self.faults: dict[int, Fault] = {}
        self.when: Callable[[str, str], Fault | None] = lambda method, path: None
        self.version = "2.80.0"
        self.cookies: list[str] = []  # further ones of a login
        self.max_body = 1 << 30  # bytes; more is refused with 413, as a proxy does
        self.released = threading.Event()
        self.lock = threading.RLock()
        self._numbers = iter(range(1, 1 << 30))

    @property
    def has_native_score(self) -> bool:
        """Return whether shapes have a score of their own, without an attribute."""
        return tuple(map(int, self.version.split(".")[:2])) >= NATIVE_SCORE_SINCE

    # ── what tests put in ──

    def number(self) -> int:
        return next(self._numbers)

    def labels(self, *specs: Json) -> list[dict[str, Json]]:
        """Return labels made of names, or of specs as the API takes them."""
        made = []
        for spec in specs:
            spec = {"name": spec, "attributes": [score_spec()]} if isinstance(spec, str) else spec
            attributes = [{**a, "id": self.number()} for a in spec.get("attributes", ())]
            made.append(
                {
                    "type": "any",
                    **spec,
                    "id": self.number(),
                    "attributes": attributes,
                    "has_parent": False,
                }
            )
        return made

    def add_task(self, name: str, frames: list[tuple[str, bytes]], *labels: Json) -> Task:
        task = Task(self.number(), name, self.labels(*labels), [Job(self.number())], frames)
        self.tasks[task.id] = task
        return task

    def split(self, task: Task, segment_size: int, overlap: int) -> list[Job]:
        """Divide a task without shapes into jobs, as the server does when it makes a task."""
        count = len(task.frames)
        task.jobs = [
            Job(self.number(), start, min(start + segment_size, count) - 1)
            for start in range(0, max(count - overlap, 1), segment_size - overlap)
        ]
        return task.jobs

    def draw(
        self,
        task: Task,
        frame: int,
        kind: str,
        label: str,
        points: list[float],
        *,
        job: Job | None = None,
        **more: Json,
    ) -> int:
        """Add a shape as a person draws it, in one job or in all, and return its number.

        Returns the number in the first of several jobs.
        """
        chosen = next(one for one in task.labels if one["name"] == label)
        shape = {
            "type": kind,
            "frame": frame,
            "label_id": chosen["id"],
            "points": points,
            "source": "manual",
            **more,
        }
        return self._add(task, shape, job)["id"]

    def import_cvat(self, task: Task, body: bytes) -> None:
        """Import a file as `CVAT 1.1`: its masks replace the task's shapes.

        A picture is matched by its name without the extension, else by the `id` as the number of a
        frame.
        """
        frames = {
            posixpath.splitext(name)[0]: number for number, (name, _) in enumerate(task.frames)
        }
        labels = {label["name"]: label for label in task.labels}
        imported = []
        for image in ET.fromstring(body).iter("image"):
            stem = posixpath.splitext(image.attrib["name"])[0]
            frame = frames.get(stem, int(image.attrib["id"]))
            if not 0 <= frame < len(task.frames):
                raise Refusal(400, f"Could not match item id: '{stem}' with any task frame")
            for mask in image.iter("mask"):
                if mask.attrib["label"] not in labels:
                    raise Refusal(400, f"label {mask.attrib['label']} is not in the task")
                imported.append(_imported_mask(mask, frame, labels[mask.attrib["label"]]))
        self.put_annotations(task.id, {"shapes": imported})

    def export_coco(self, task: Task) -> list[dict[str, Json]]:
        """Return the annotations of an export as `COCO 1.0`.

        An attribute that a shape does not have is exported with its default value. The exporter
        takes an attribute `score` for a number, and fails on any other text.
        """
        labels = {label["id"]: label for label in task.labels}
        exported = []
        for shape in task.shapes:
            values = {a["spec_id"]: a["value"] for a in shape["attributes"]}
            attributes = {
                a["name"]: values.get(a["id"], a.get("default_value", ""))
                for a in labels[shape["label_id"]]["attributes"]
            }
            try:
                score = float(attributes.get("score", 1))
            except ValueError as error:
                raise Refusal(500, f"ValueError: {error}") from None
            exported.append({"image_id": shape["frame"], "attributes": attributes, "score": score})
        return exported

    def writes(self) -> list[str]:
        """Return the requests so far that change something, without logins."""
        return [
            line
            for line, body in zip(self.log, self.bodies, strict=True)
            if not line.startswith("GET") and "/auth/" not in line and not is_empty(body)
        ]

    # ── what a client asks ──

    def answer(
        self, method: str, path: str, query: dict[str, str], body: Json, token: str = TOKEN
    ) -> Json:
        with self.lock:
            if not self._may(token, method, path, query):
                raise Refusal(403, {"detail": "not authorized"})
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
            # a proxy may quote what it was sent
            raise Refusal(
                400,
                {
                    "non_field_errors": [
                        f"Unable to log in with {body['username']} {body['password']}"
                    ]
                },
            )
        return {"key": KEY}

    def me(self, **_: Json) -> Json:
        return {"url": "", "id": 1, "username": USER, "first_name": "", "last_name": ""}

    def list_labels(self, query: dict[str, str], **_: Json) -> Json:
        try:
            if "task_id" in query:
                labels = self._task(int(query["task_id"])).labels
            elif "job_id" in query:
                labels = self._job(int(query["job_id"]))[0].labels
            else:
                labels = self.projects[int(query["project_id"])]
        except (Refusal, KeyError):
            raise Refusal(500, {"detail": "matching query does not exist"}) from None
        return self._page(labels, query)

    def get_project(self, number: int, **_: Json) -> Json:
        if number not in self.projects:
            raise Refusal(404, {"detail": "Not found."})
        return {"id": number, "name": f"project {number}"}

    def list_tasks(self, query: dict[str, str], **_: Json) -> Json:
        tasks = [t for t in self.tasks.values() if t.name == query.get("name", t.name)]
        if "project_id" in query:
            tasks = [t for t in tasks if t.project == int(query["project_id"])]
        return self._page([self._shown(task) for task in tasks], query)

    def create_task(self, body: Json, **_: Json) -> Json:
        project = body.get("project_id")
        if project is not None and body.get("labels"):
            raise Refusal(400, {"labels": ["Can't set labels to a task inside a project."]})
        labels = self.projects[project] if project is not None else self.labels(*body["labels"])
        task = Task(self.number(), body["name"], labels, [Job(self.number())], project=project)
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
        return {
            "id": f"rq-{number}",
            "status": state[0],
            "message": state[1],
            "operation": {"type": "create:task"},
        }

    def list_requests(self, query: dict[str, str], **_: Json) -> Json:
        if self.old:
            raise Refusal(404, b"<html>no such page</html>")
        task = self._task(int(query["task_id"]))
        return self._page([self.get_request(task.id)] if task.state else [], query)

    def add_data(self, number: int, body: Json, **_: Json) -> Json:
        task = self._task(number)
        if task.frames:
            raise Refusal(400, "Adding more data is not allowed")
        assert self.share is not None
        files = [(name, self.share / name) for name in sorted(body["server_files"])]
        missing = [name for name, file in files if not file.is_file()]
        if missing:
            task.state = (
                "failed",
                f"FileNotFoundError: [Errno 2] No such file: '/home/django/share/{missing[0]}'",
            )
        else:
            task.frames = [(name, file.read_bytes()) for name, file in files]
            task.state = ("finished", "")
        return {} if self.old else {"rq_id": f"rq-{number}"}

    def get_frame(self, number: int, query: dict[str, str], **_: Json) -> Json:
        return self._frame(self._task(number), query, first=0)

    def get_job_frame(self, number: int, query: dict[str, str], **_: Json) -> Json:
        task, job = self._job(number)
        if not job.covers(int(query["number"])):
            raise Refusal(400, "the frame is not in the job")
        return self._frame(task, query, job.start)

    def get_meta(self, number: int, **_: Json) -> Json:
        task = self._task(number)
        return self._meta(task, range(len(task.frames)))

    def get_job_meta(self, number: int, **_: Json) -> Json:
        task, job = self._job(number)
        return self._meta(task, range(job.start, self._stop(task, job) + 1))

    def list_jobs(self, query: dict[str, str], **_: Json) -> Json:
        task = self.tasks.get(int(query["task_id"]))
        jobs = task.jobs if task else []
        return self._page([self.get_job(job.id) for job in jobs], query)

    def get_job(self, number: int, **_: Json) -> Json:
        task, job = self._job(number)
        return {
            "id": job.id,
            "task_id": task.id,
            "type": job.kind,
            "start_frame": job.start,
            "stop_frame": self._stop(task, job),
        }

    def get_layout(self, number: int, **_: Json) -> Json:
        task = self._task(number)
        return {"mode": "gt_pool", "honeypot_frames": sorted(task.honeypots)}

    def get_job_layout(self, number: int, **_: Json) -> Json:
        task, job = self._job(number)
        return {"honeypot_frames": sorted(filter(job.covers, task.honeypots))}

    def get_annotations(self, number: int, **_: Json) -> Json:
        task = self._task(number)
        return {"version": 0, "tags": [], "shapes": task.shapes, "tracks": task.tracks}

    def get_job_annotations(self, number: int, **_: Json) -> Json:
        task, job = self._job(number)
        tracks = task.tracks if job is task.jobs[0] else []
        return {"version": 0, "tags": [], "shapes": job.shapes, "tracks": tracks}

    def put_annotations(self, number: int, body: Json, **_: Json) -> Json:
        task = self._task(number)
        self._check_all(task, body["shapes"])
        for job in task.annotation_jobs:
            job.shapes = []
        return {**body, "shapes": [self._add(task, shape) for shape in body["shapes"]]}

    def patch_annotations(self, number: int, query: dict[str, str], body: Json, **_: Json) -> Json:
        task = self._task(number)
        if task.honeypots & {shape["frame"] for shape in body["shapes"]}:
            raise Refusal(400, "Annotations on validation frames cannot be edited here")
        return self._patch(task, None, query["action"], body)

    def patch_job_annotations(
        self, number: int, query: dict[str, str], body: Json, **_: Json
    ) -> Json:
        task, job = self._job(number)
        if not all(job.covers(shape["frame"]) for shape in body["shapes"]):
            raise Refusal(400, "a frame is not in the job")
        return self._patch(task, job, query["action"], body)

    def list_share(self, query: dict[str, str], **_: Json) -> Json:
        if self.share is None:
            raise Refusal(400, "there is no share")
        folder = self.share / query.get("directory", "/").strip("/")
        if not folder.is_dir():
            raise Refusal(400, f"{folder.name} is an invalid directory")
        kinds = {True: "DIR", False: "REG"}
        return [
            {"name": p.name, "type": kinds[p.is_dir()], "mime_type": "image"}
            for p in sorted(folder.iterdir())
        ]

    # ── parts ──

    def _task(self, number: int) -> Task:
        if number not in self.tasks:
            raise Refusal(404, {"detail": "Not found."})
        return self.tasks[number]

    def _job(self, number: int) -> tuple[Task, Job]:
        for task in self.tasks.values():
            for job in task.jobs:
                if job.id == number:
                    return task, job
        raise Refusal(404, {"detail": "Not found."})

    @staticmethod
    def _stop(task: Task, job: Job) -> int:
        return len(task.frames) - 1 if job.stop is None else job.stop

    def _may(self, token: str, method: str, path: str, query: dict[str, str]) -> bool:
        """Return whether the account has the permission for a request."""
        if token == READER:
            return method == "GET"
        if token != ANNOTATOR or path == "/api/users/self":
            return True
        found = re.fullmatch(r"/api/jobs/(\d+)(/annotations/|/data|/data/meta)?", path)
        number = found[1] if found else query.get("job_id") if path == "/api/labels" else None
        try:
            return number is not None and self._job(int(number))[1].assigned
        except Refusal:
            return True  # answered with "not found"

    def _frame(self, task: Task, query: dict[str, str], first: int) -> bytes:
        number = int(query["number"])
        if query.get("type") != "frame" or number >= len(task.frames):
            raise Refusal(400, "unexpected frame")
        chunk = (number - first) // task.chunk_size
        if any((gone - first) // task.chunk_size == chunk for gone in task.missing):
            raise Refusal(500, b"<html><h1>Server Error (500)</h1></html>")
        return task.frames[number][1]

    def _meta(self, task: Task, numbers: range) -> Json:
        frames = []
        for name, data in [task.frames[number] for number in numbers]:
            if task.is_video:
                name = task.frames[0][0]
            height, width = cv2.imdecode(_bytes(data), cv2.IMREAD_COLOR).shape[:2]
            frames.append({"name": name, "width": width, "height": height, "related_files": 0})
        return {
            "size": len(frames),
            "frames": frames[:1] if task.is_video else frames,
            "deleted_frames": [number for number in task.deleted if number in numbers],
            "start_frame": numbers.start,
        }

    def _patch(self, task: Task, job: Job | None, action: str, body: Json) -> Json:
        """Change shapes of a job, or of all jobs of a task."""
        shapes = body["shapes"]
        self._check_all(task, shapes)
        ids = {shape.get("id") for shape in shapes}
        if action in ("delete", "update"):
            for one in [job] if job else task.annotation_jobs:
                one.shapes[:] = [shape for shape in one.shapes if shape["id"] not in ids]
        if action in ("create", "update"):
            shapes = [self._add(task, shape, job) for shape in shapes]
        return {**body, "shapes": shapes}

    def _shown(self, task: Task) -> Json:
        size = len(task.frames)
        return {
            "validation_mode": "gt_pool" if task.honeypots else None,
            "id": task.id,
            "name": task.name,
            "size": size,
            "project_id": task.project,
            "owner": {"id": 1},
        }

    def _page(self, entries: list[Json], query: dict[str, str]) -> Json:
        size = min(2, int(query.get("page_size", 10)))  # small, so that there are several pages
        page = int(query.get("page", 1))
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
        if self.has_native_score and not 0 <= shape.get("score", 1.0) <= 1:
            raise Refusal(400, f"score {shape['score']} is not within 0 and 1")
        points = shape["points"]
        if shape["type"] == "mask":
            self._check_mask(
                points,
                *cv2.imdecode(_bytes(task.frames[shape["frame"]][1]), cv2.IMREAD_COLOR).shape[:2],
            )
            return
        least, most = POINTS[shape["type"]]
        if len(points) < least or len(points) % 2 or (most and len(points) > most):
            raise Refusal(400, f"{shape['type']} of {len(points)} numbers")

    def _check_mask(self, points: list[float], height: int, width: int) -> None:
        """Check for whole run lengths that fill a box on the picture, with a zero only first."""
        *runs, left, top, right, bottom = points
        if sum(runs) != (right - left + 1) * (bottom - top + 1) or any(
            run != int(run) for run in runs
        ):
            raise Refusal(400, "the mask does not fill its box")
        if not runs or min(runs) < 0 or 0 in runs[1:]:
            raise Refusal(400, "the mask has empty runs")
        if not (0 <= left <= right < width and 0 <= top <= bottom < height):
            raise Refusal(400, "the mask leaves its frame")

    def _add(self, task: Task, shape: Json, job: Job | None = None) -> Json:
        """Add a shape to a job, or to all jobs with its frame; return the first one made."""
        label = next(one for one in task.labels if one["id"] == shape["label_id"])
        known = {attribute["id"] for attribute in label["attributes"]}
        defaults = {
            "occluded": False,
            "outside": False,
            "z_order": 0,
            "rotation": 0.0,
            "group": 0,
            "elements": [],
        }
        kept = [a for a in shape.get("attributes", ()) if a["spec_id"] in known]
        points = [float(value) for value in shape["points"]]
        jobs = [job] if job else [j for j in task.annotation_jobs if j.covers(shape["frame"])]
        own_score = {"score": shape.get("score", 1.0)} if self.has_native_score else {}
        sent = {key: value for key, value in shape.items() if key != "score"}
        changes = {"points": points, "attributes": kept, **own_score}
        made = [{**defaults, **sent, "id": self.number(), **changes} for _ in jobs]
        for one, copy in zip(jobs, made, strict=True):
            one.shapes.append(copy)
        return made[0]


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
    (r"/api/tasks/(\d+)/validation_layout", {"GET": "get_layout"}),
    (r"/api/projects/(\d+)", {"GET": "get_project"}),
    (r"/api/jobs", {"GET": "list_jobs"}),
    (r"/api/jobs/(\d+)", {"GET": "get_job"}),
    (r"/api/jobs/(\d+)/data", {"GET": "get_job_frame"}),
    (r"/api/jobs/(\d+)/data/meta", {"GET": "get_job_meta"}),
    (r"/api/jobs/(\d+)/validation_layout", {"GET": "get_job_layout"}),
    (
        r"/api/jobs/(\d+)/annotations/",
        {"GET": "get_job_annotations", "PATCH": "patch_job_annotations"},
    ),
    (
        r"/api/tasks/(\d+)/annotations/",
        {"GET": "get_annotations", "PUT": "put_annotations", "PATCH": "patch_annotations"},
    ),
]


def _handler(memory: StandIn) -> type[BaseHTTPRequestHandler]:  # noqa: C901  one handler class
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # header and body of an answer in one packet

        def _serve(self) -> None:
            parts = urllib.parse.urlsplit(self.path)
            query = dict(urllib.parse.parse_qsl(parts.query))
            length = int(self.headers.get("Content-Length") or 0)
            sent = self.rfile.read(length)
            body = json.loads(sent) if sent else {}
            with memory.lock:
                memory.log.append(f"{self.command} {self.path}")
                memory.bodies.append(body)
                memory.headers.append(dict(self.headers))
                fault = memory.faults.pop(len(memory.log), None) or memory.when(
                    self.command, self.path
                )
            status = 200
            answer = None
            headers = {}
            if not fault or fault.after:
                status, answer, headers = self._carry_out(parts.path, query, body)
            if fault:
                self._fail(fault, answer)
                return
            self._send(status, answer, headers)

        def _carry_out(
            self, path: str, query: dict[str, str], body: Json
        ) -> tuple[int, Json, dict[str, str]]:
            open_to_all = path in ("/api/server/about", "/api/auth/login")
            try:
                if int(self.headers.get("Content-Length") or 0) > memory.max_body:
                    raise Refusal(413, b"<html><h1>413 Request Entity Too Large</h1></html>")
                if not open_to_all and not self._is_known():
                    raise Refusal(
                        401, {"detail": f"Invalid token {self.headers.get('Authorization')}"}
                    )
                token = self.headers.get("Authorization", "").partition(" ")[2]
                return 200, memory.answer(self.command, path, query, body, token), {}
            except Refusal as refusal:
                return refusal.status, refusal.body, refusal.headers

        def _is_known(self) -> bool:
            said = self.headers.get("Authorization", "")
            if said:
                kind, _, token = said.partition(" ")
                known = (TOKEN, READER, ANNOTATOR, *([KEY] if kind == "Token" else []))
                return kind in ("Bearer", "Token") and token in known
            cookie = self.headers.get("Cookie", "")
            safe = self.command == "GET" or self.headers.get("X-CSRFToken") == CSRF
            return f"sessionid={SESSION}" in cookie and safe

        def _fail(self, fault: Fault, answer: Json) -> None:
            if fault.kind == "silent":
                memory.released.wait(30)
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
                self._send(
                    int(fault.kind), fault.body or {"detail": "as the test wants it"}, fault.headers
                )

        def _close(self) -> None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)

        def _send(self, status: int, answer: Json, headers: dict[str, str]) -> None:
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header(
                "Content-Type",
                "image/png" if isinstance(answer, bytes) else "application/vnd.cvat+json",
            )
            self.send_header("Content-Length", str(len(body)))
            if self.path == "/api/auth/login" and status == 200:
                self.send_header("Set-Cookie", f"sessionid={SESSION}; Path=/")
                self.send_header("Set-Cookie", f"csrftoken={CSRF}; Path=/")
                for cookie in memory.cookies:
                    self.send_header("Set-Cookie", cookie)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _serve

        def log_message(self, *args: Any) -> None:
            """Write nothing on stderr."""

    return Handler


def _bytes(data: bytes) -> Any:
    import numpy as np

    return np.frombuffer(data, np.uint8)


def is_empty(body: Json) -> bool:
    """Return whether a request's body has no annotations: it changes nothing."""
    return isinstance(body, dict) and body.get("shapes") == body.get("tracks") == []


def score_spec(kind: str = "text", values: tuple[str, ...] = ("",)) -> dict[str, Json]:
    """Return a label's attribute for scores, whose default is the first of `values`."""
    return {
        "name": "score",
        "mutable": False,
        "input_type": kind,
        "values": list(values),
        "default_value": values[0],
    }


def _imported_mask(mask: ET.Element, frame: int, label: Json) -> dict[str, Json]:
    """Return a `<mask>` of a file as a shape."""
    left, top, width, height = (int(mask.attrib[k]) for k in ("left", "top", "width", "height"))
    numbers = {attribute["name"]: attribute["id"] for attribute in label["attributes"]}
    return {
        "type": "mask",
        "frame": frame,
        "label_id": label["id"],
        "points": [
            *map(int, mask.attrib["rle"].split(",")),
            left,
            top,
            left + width - 1,
            top + height - 1,
        ],
        "source": "file",
        "z_order": int(mask.get("z_order", "0")),
        "group": int(mask.get("group_id", "0")),
        "attributes": [
            {"spec_id": numbers[a.attrib["name"]], "value": a.text or ""}
            for a in mask.findall("attribute")
            if a.attrib["name"] in numbers
        ],
    }


@contextmanager
def served(memory: StandIn) -> Iterator[str]:
    """Serve the stand-in on a local port, and yield its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(memory))
    server.daemon_threads = True
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        memory.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
