"""The requests to a CVAT server: user, tasks, jobs, labels, frames, annotations, pictures, changes.

The paths and parameters used here are the same in servers from 2.15 to 2.80. Answers are plain
JSON, checked for the fields that are used here (`response_checks`).

Limitations: a server of a later version may have changed a path or a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from loguru import logger

from sam_poll.core.errors import CvatError, ExitCode, SettingsError, UsageError
from sam_poll.core.missing_library import missing_extra
from sam_poll.core.text import shown
from sam_poll.integrations.cvat import response_checks
from sam_poll.integrations.cvat.credentials import Credentials, host_of
from sam_poll.integrations.cvat.response_checks import Answer
from sam_poll.integrations.cvat.transport import (
    RequestFailedError,
    RequestLimits,
    Transport,
    fits_header,
)

_PAGE_SIZE = 500
_NO_SHAPES: Answer = {"version": 0, "tags": [], "shapes": [], "tracks": []}


class ImportStatus(NamedTuple):
    """How far the server is with importing pictures.

    `state` is `queued`, `started`, `finished`, `failed` or `unknown`; `message` is the server's
    own text, empty if there is none.
    """

    state: str
    message: str = ""


class CvatClient:
    """An authenticated connection to a CVAT server."""

    def __init__(self, transport: Transport, host: str) -> None:
        self.host = host
        self.limits = transport.limits
        self.wait_before_retry = transport.wait_before_retry
        self._version: str | None = None
        self._transport = transport

    def version(self) -> str:
        """Return the server's version, which is requested once.

        The answer proves that the host is a CVAT server.
        """
        if self._version is None:
            answer = self._transport.read_json(self.host, "/api/server/about", tries=2)
            self._version = str(response_checks.mapping(answer, self.host).get("version", "?"))
        return self._version

    def current_user(self) -> Answer:
        """Return the authenticated user. Its answer proves that the credentials are valid."""
        answer = self._transport.read_json(self.host, "/api/users/self")
        return response_checks.mapping(answer, self.host)

    # ── a task, and its jobs ──
    #
    # With `job`, a request concerns one job of the task, and needs no permission for the task.

    def task(self, task: int) -> Answer:
        """Return the task itself, with `name`, `size` (frames), `project_id`, `owner` and more."""
        place = f"task {task}"
        answer = self._transport.read_json(place, f"/api/tasks/{task}")
        return response_checks.mapping(answer, place)

    def project(self, project: int) -> Answer:
        """Return the project itself."""
        place = f"project {project}"
        answer = self._transport.read_json(place, f"/api/projects/{project}")
        return response_checks.mapping(answer, place)

    def job(self, job: int) -> Answer:
        """Return a job, with `task_id`, `type`, `start_frame` and `stop_frame` (inclusive)."""
        place = f"job {job}"
        return response_checks.job(self._transport.read_json(place, f"/api/jobs/{job}"), place)

    def jobs(self, task: int) -> list[Answer]:
        """Return the jobs of a task, of all types, as `job` returns them."""
        place = f"task {task}: jobs"
        entries = self._all_pages(place, "/api/jobs", {"task_id": task})
        return [
            response_checks.job(entry, f"{place}[{index}]") for index, entry in enumerate(entries)
        ]

    def labels(
        self, *, task: int | None = None, project: int | None = None, job: int | None = None
    ) -> list[Answer]:
        """Return the labels of a task, a project or a job, with their attributes.

        Raises CvatError of the kind CVAT_NOT_FOUND if there is no such task, project or job. The
        server answers the request for labels with "internal error" then, so that the task, project
        or job itself is requested first.
        """
        query: dict[str, Any]
        if task is not None:
            self.task(task)
            place = f"task {task}: labels"
            query = {"task_id": task}
        elif job is not None:
            self.job(job)
            place = f"job {job}: labels"
            query = {"job_id": job}
        else:
            assert project is not None
            self.project(project)
            place = f"project {project}: labels"
            query = {"project_id": project}
        entries = self._all_pages(place, "/api/labels", query)
        return response_checks.labels(entries, place)

    def meta(self, task: int, *, job: int | None = None) -> Answer:
        """Return the frames: `frames` (name, width, height), `size`, `deleted_frames`."""
        place = f"{_place(task, job)}: frames"
        answer = self._transport.read_json(place, f"{_path(task, job)}/data/meta")
        return response_checks.frames(answer, place)

    def honeypot_frames(self, task: int, *, job: int | None = None) -> frozenset[int]:
        """Return the frames that the server has inserted to check annotators.

        Returns an empty set if there are none, if this account may not know them, and for servers
        that know no honeypots.
        """
        place = f"{_place(task, job)}: validation layout"
        try:
            answer = self._transport.read_json(place, f"{_path(task, job)}/validation_layout")
        except RequestFailedError as failure:
            if failure.kind in (ExitCode.CVAT_FORBIDDEN, ExitCode.CVAT_NOT_FOUND):
                return frozenset()
            raise
        return response_checks.frame_numbers(answer, "honeypot_frames", place)

    def annotations(self, task: int, *, job: int | None = None) -> Answer:
        """Return all annotations of a task, or of one of its jobs: `shapes`, `tracks`, `tags`."""
        place = f"{_place(task, job)}: annotations"
        answer = self._transport.read_json(place, f"{_path(task, job)}/annotations/")
        return response_checks.task_annotations(answer, place)

    def picture(
        self, task: int, frame: int, *, job: int | None = None, tries: int | None = None
    ) -> bytes:
        """Return a frame's picture file in its original quality.

        `frame` is the number in the task. A transient failure is retried, up to `tries` tries.
        """
        place = f"{_place(task, job)}: frame {frame}"
        path = f"/api/tasks/{task}/data/" if job is None else f"/api/jobs/{job}/data"
        return self._transport.read_bytes(
            place, path, tries=tries, number=frame, type="frame", quality="original"
        )

    def change_shapes(
        self, task: int, action: str, shapes: Sequence[Answer], *, job: int | None = None
    ) -> None:
        """Send one request that creates or deletes shapes; `action` is `create` or `delete`.

        Raises RequestFailedError; if it is `transient`, the server may have made the change.
        """
        place = f"{_place(task, job)}: annotations"
        body = {**_NO_SHAPES, "shapes": list(shapes)}
        path = f"{_path(task, job)}/annotations/"
        self._transport.write(place, "PATCH", path, body, action=action)

    def check_write_access(self, task: int, *, job: int | None = None) -> None:
        """Check that this account may change the annotations. Raises RequestFailedError.

        The request adds no shapes, so that it may be retried.
        """
        place = f"{_place(task, job)}: annotations"
        path = f"{_path(task, job)}/annotations/"
        self._transport.write_nothing(place, "PATCH", path, _NO_SHAPES, action="create")

    # ── making a task ──

    def tasks_named(self, name: str) -> list[Answer]:
        """Return the tasks of exactly this name."""
        entries = self._all_pages("tasks", "/api/tasks", {"name": name})
        return [
            task for task in entries if task.get("name") == name and isinstance(task.get("id"), int)
        ]

    def tasks_in_project(self, project: int) -> list[Answer]:
        """Return the tasks of a project."""
        place = f"project {project}: tasks"
        entries = self._all_pages(place, "/api/tasks", {"project_id": project})
        return [task for task in entries if isinstance(task.get("id"), int)]

    def create_task(self, spec: Answer) -> int:
        """Create a task without pictures and return its number.

        Raises RequestFailedError; if it is `transient`, the task may have been created.
        """
        place = "the new task"
        answer = self._transport.write(place, "POST", "/api/tasks", spec)
        number = response_checks.mapping(answer, place).get("id")
        if not isinstance(number, int):
            raise CvatError(response_checks.UNEXPECTED, ExitCode.CVAT_REFUSED, place=place)
        return number

    def add_pictures(self, task: int, names: Sequence[str]) -> str | None:
        """Request that the server import these files of its share into the task.

        Returns the number of the server's import request, or None if the server gives none.
        """
        body = {"image_quality": 70, "server_files": list(names), "use_cache": True}
        path = f"/api/tasks/{task}/data/"
        answer = self._transport.write(f"task {task}: pictures", "POST", path, body)
        number = answer.get("rq_id") if isinstance(answer, dict) else None
        return str(number) if number else None

    def import_status(self, task: int, request: str | None) -> ImportStatus:
        """Return how far the server is with importing the task's pictures.

        `request` is the number that `add_pictures` returned, or None if it is not known.
        """
        place = f"task {task}: pictures"
        if request:
            try:
                answer = self._transport.read_json(place, f"/api/requests/{quote(request, '')}")
                return _status(response_checks.mapping(answer, place), "status")
            except RequestFailedError as failure:
                if failure.kind != ExitCode.CVAT_NOT_FOUND:
                    raise
        # The request's number was lost with its answer, or the server has deleted the request.
        try:
            query = {"task_id": task, "action": "create"}
            entries = self._all_pages(place, "/api/requests", query)
        except RequestFailedError as failure:
            if failure.kind != ExitCode.CVAT_NOT_FOUND:
                raise
        else:
            return _status(entries[0], "status") if entries else ImportStatus("unknown")
        # A server that is too old to have requests.
        answer = self._transport.read_json(place, f"/api/tasks/{task}/status")
        return _status(response_checks.mapping(answer, place), "state")

    def share_names(self, folder: str) -> set[str] | None:
        """Return the names in a folder of the server's share.

        Returns an empty set if the share has no such folder, None if the share may not be listed.
        """
        place = f"share {folder or '/'}"
        directory = f"/{folder}".rstrip("/") + "/"
        try:
            entries = self._transport.read_json(place, "/api/server/share", directory=directory)
        except RequestFailedError as failure:
            logger.debug("{}", failure)
            if failure.kind == ExitCode.CVAT_REFUSED:  # `is an invalid directory`
                return set()
            if failure.kind in (ExitCode.CVAT_FORBIDDEN, ExitCode.CVAT_NOT_FOUND):
                return None
            raise
        if not isinstance(entries, list):
            return None
        return {str(entry.get("name")) for entry in entries if isinstance(entry, dict)}

    def _all_pages(self, place: str, path: str, query: Mapping[str, Any]) -> list[Answer]:
        results: list[Answer] = []
        page = 1
        while True:
            answer = response_checks.mapping(
                self._transport.read_json(place, path, page=page, page_size=_PAGE_SIZE, **query),
                place,
            )
            entries = response_checks.entries(answer, "results", place)
            results += entries
            if not answer.get("next") or not entries:
                return results
            page += 1


def connect(
    host: str | None,
    credentials: Credentials,
    *,
    organization: str | None = None,
    limits: RequestLimits | None = None,
) -> CvatClient:
    """Connect to a CVAT server and log in.

    Raises CvatError, SettingsError (httpx is not installed) and UsageError (no valid address).
    """
    address = host_of(host)
    if urlsplit(address).scheme not in ("http", "https"):
        raise UsageError(
            f"{shown(address)!r} is no address of a server",
            place="--host",
            remedy="give http:// or https:// and a host name",
        )
    if organization is not None and not fits_header(organization):
        raise UsageError(
            f"{shown(organization)!r} is no organization",
            place="--org",
            remedy="give the short name that its page shows",
        )
    try:
        transport = Transport(address, credentials, limits or RequestLimits(), organization)
    except ModuleNotFoundError as error:
        raise missing_extra(error, "cvat", "a connection to CVAT", SettingsError) from error
    connection = CvatClient(transport, address)
    transport.login(connection.version())
    connection.current_user()
    return connection


def _place(task: int, job: int | None) -> str:
    return f"task {task}" if job is None else f"task {task}, job {job}"


def _path(task: int, job: int | None) -> str:
    return f"/api/tasks/{task}" if job is None else f"/api/jobs/{job}"


def _status(answer: Answer, key: str) -> ImportStatus:
    state = str(answer.get(key, "unknown")).lower()
    return ImportStatus(state, str(answer.get("message") or ""))
