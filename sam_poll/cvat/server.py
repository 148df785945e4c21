"""What is asked of a CVAT server: who we are, a task's labels, frames, annotations and pictures, and changes to them.

Paths and parameters are those that SDK and server have had unchanged from 2.15 to 2.80. What comes back is the JSON it
is, looked at for what we need of it. What can still go wrong here: a server of another version than the SDK
that has changed one of them; that both differ is said at the start.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loguru import logger

from sam_poll.cvat import answers
from sam_poll.cvat.answers import Answer
from sam_poll.cvat.calls import Calls, FailedError, Limits
from sam_poll.cvat.credentials import Credentials, host_of
from sam_poll.errors import CvatError, ExitCode, SettingsError, UsageError

_PAGE = 500


class Server:
    """A CVAT server that we are known to."""

    def __init__(self, calls: Calls, host: str) -> None:
        self._calls, self._api, self.host = calls, calls.client.api_client, host
        self.pause, self.limits = calls.pause, calls.limits

    def version(self) -> str:
        """The server's version; also the proof that there is a CVAT server."""
        about = self._calls.read(self.host, self._api.server_api.retrieve_about_endpoint, tries=2)
        return str(answers.mapping(about, self.host).get("version", "?"))

    def myself(self) -> Answer:
        """The user we are; the proof that the credentials are good."""
        return answers.mapping(self._calls.read(self.host, self._api.users_api.retrieve_self_endpoint), self.host)

    # ── a task ──

    def task(self, task: int) -> Answer:
        """The task itself: `name`, `size` (frames), `project_id`, `owner` …"""
        what = f"task {task}"
        return answers.mapping(self._calls.read(what, self._api.tasks_api.retrieve_endpoint, id=task), what)

    def labels(self, *, task: int | None = None, project: int | None = None) -> list[Answer]:
        """The labels of a task, or of a project, with their attributes."""
        what = f"task {task}: labels" if task is not None else f"project {project}: labels"
        key = {"task_id": task} if task is not None else {"project_id": project}
        return answers.labels(self._pages(what, self._api.labels_api.list_endpoint, key), what)

    def meta(self, task: int) -> Answer:
        """The task's frames: `frames` (name, width, height of each), `size`, `deleted_frames`."""
        what = f"task {task}: frames"
        return answers.frames(self._calls.read(what, self._api.tasks_api.retrieve_data_meta_endpoint, id=task), what)

    def annotations(self, task: int) -> Answer:
        """All annotations: `shapes`, `tracks`, `tags`."""
        what = f"task {task}: annotations"
        endpoint = self._api.tasks_api.retrieve_annotations_endpoint
        return answers.drawn(self._calls.read(what, endpoint, id=task), what)

    def picture(self, task: int, frame: int) -> bytes:
        """A frame's picture file in its original quality."""
        what, endpoint = f"task {task}: frame {frame}", self._api.tasks_api.retrieve_data_endpoint
        return self._calls.read_bytes(what, endpoint, id=task, number=frame, type="frame", quality="original")

    def change(self, task: int, action: str, shapes: Sequence[Answer]) -> None:
        """`create` or `delete` these shapes, once. FailedError with `transient`: it may have been done."""
        endpoint = self._api.tasks_api.partial_update_annotations_endpoint
        body = {"version": 0, "tags": [], "shapes": list(shapes), "tracks": []}
        self._calls.write(f"task {task}: annotations", endpoint, action=action, id=task, body=body)

    # ── making a task ──

    def tasks_named(self, name: str) -> list[Answer]:
        """The tasks of exactly this name."""
        found = self._pages("tasks", self._api.tasks_api.list_endpoint, {"name": name})
        return [task for task in found if task.get("name") == name and isinstance(task.get("id"), int)]

    def create_task(self, spec: Answer) -> int:
        """A new task without pictures; its number. FailedError with `transient`: it may have been made."""
        what = "the new task"
        made = self._calls.write(what, self._api.tasks_api.create_endpoint, body=dict(spec))
        number = answers.mapping(made, what).get("id")
        if not isinstance(number, int):
            raise CvatError(answers.STRANGE, ExitCode.CVAT_REFUSED, place=what)
        return number

    def add_pictures(self, task: int, names: Sequence[str]) -> str | None:
        """Have the server take these files of its share into the task. The number of the request, if it has one."""
        body = {"image_quality": 70, "server_files": list(names), "use_cache": True}
        answer = self._calls.write(
            f"task {task}: pictures", self._api.tasks_api.create_data_endpoint, id=task, body=body
        )
        number = answer.get("rq_id") if isinstance(answer, dict) else None
        return str(number) if number else None

    def intake(self, task: int, request: str | None) -> tuple[str, str]:
        """How far the server is with the pictures: `queued`, `started`, `finished`, `failed` or `unknown`; and why."""
        what, requests = f"task {task}: pictures", _requests_of(self._api)
        if requests is None:
            answer = self._calls.read(what, self._api.tasks_api.retrieve_status_endpoint, id=task)
            return _state(answers.mapping(answer, what), "state")
        if request:
            try:
                answer = self._calls.read(what, requests.retrieve_endpoint, id=request)
                return _state(answers.mapping(answer, what), "status")
            except FailedError as failure:
                if failure.kind != ExitCode.CVAT_NOT_FOUND:
                    raise
        # Its answer got lost, or it was so long ago that the server has forgotten it.
        found = self._pages(what, requests.list_endpoint, {"task_id": task, "action": "create"})
        return _state(found[0], "status") if found else ("unknown", "")

    def shared(self, folder: str) -> set[str] | None:
        """The names in a folder of the server's share, none where it has no such folder; None where we may not look."""
        what, path = f"share {folder or '/'}", f"/{folder}".rstrip("/") + "/"
        try:
            found = self._calls.read(what, self._api.server_api.list_share_endpoint, directory=path)
        except FailedError as failure:
            logger.debug("{}", failure)
            if failure.kind == ExitCode.CVAT_REFUSED:  # `is an invalid directory`
                return set()
            if failure.kind in (ExitCode.CVAT_FORBIDDEN, ExitCode.CVAT_NOT_FOUND):
                return None
            raise
        if not isinstance(found, list):
            return None
        return {str(entry.get("name")) for entry in found if isinstance(entry, dict)}

    def _pages(self, what: str, endpoint: Any, params: Mapping[str, Any]) -> list[Answer]:
        results: list[Answer] = []
        page = 1
        while True:
            answer = answers.mapping(self._calls.read(what, endpoint, page=page, page_size=_PAGE, **params), what)
            some = answers.entries(answer, "results", what)
            results += some
            if not answer.get("next") or not some:
                return results
            page += 1


def connect(
    host: str | None, credentials: Credentials, *, organization: str | None = None, limits: Limits | None = None
) -> Server:
    """A server that has been reached and knows us. CvatError, SettingsError (no SDK here), UsageError (no address)."""
    address, limits = host_of(host), limits or Limits()
    try:
        from cvat_sdk import Client
        from cvat_sdk.core.exceptions import InvalidHostException
        from cvat_sdk.version import VERSION
    except ImportError as error:
        remedy = "pip install 'sam_poll[cvat]', with cvat-sdk of the server's version"
        raise SettingsError(f"CVAT needs the package cvat_sdk ({error})", remedy=remedy) from None
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it would repeat what we say
    try:
        client = Client(address, check_server_version=False)
    except InvalidHostException as error:
        raise UsageError(str(error), place="--host", remedy="http:// or https:// and a name") from None
    _limit(client.api_client, limits)
    if organization is not None:
        client.organization_slug = organization
    calls = Calls(client, credentials, limits)
    server = Server(calls, address)
    _compare(server.version(), VERSION)
    calls.login()
    server.myself()
    return server


def _limit(api: Any, limits: Limits) -> None:
    """Time limits on each request of the SDK, and no repetitions nor redirections of its own: a redirected request
    would carry our credentials to whoever answered."""
    from urllib3 import Retry

    api.configuration.retries = Retry(total=None, connect=0, read=0, status=0, other=0, redirect=False)
    rest = type(api.rest_client)(api.configuration)
    request = rest.request

    def limited(*args: Any, **more: Any) -> Any:
        if not more.get("_request_timeout"):
            more["_request_timeout"] = (limits.connect_s, limits.read_s)
        return request(*args, **more)

    rest.request = limited
    api.rest_client = rest


def _requests_of(api: Any) -> Any:
    """The SDK's part for what a server works on; None where it has none yet."""
    try:
        return api.requests_api
    except (AttributeError, TypeError):  # the latter is what 2.15 says of a part that it does not know
        return None


def _compare(server: str, sdk: str) -> None:
    if server.split(".")[:2] != sdk.split(".")[:2]:
        short = ".".join(server.split(".")[:2])
        logger.warning(
            "the server is CVAT {}, cvat-sdk is {}: if something fails, `pip install 'cvat-sdk~={}.0'`",
            server,
            sdk,
            short,
        )


def _state(answer: Answer, key: str) -> tuple[str, str]:
    return str(answer.get(key, "unknown")).lower(), str(answer.get("message") or "")


def names_of(entries: Iterable[Answer]) -> list[str]:
    """The names of labels or attributes, in their order."""
    return [str(entry.get("name")) for entry in entries]
