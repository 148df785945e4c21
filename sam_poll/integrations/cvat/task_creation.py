"""Creation of a CVAT task with pictures of the server's share, in steps that can be repeated.

    note the tasks of this name → create the task → import the pictures → wait for the import

Each step is recorded in the journal before and after it is done, so that a run that was cut off
anywhere is continued by the next one, and no task is created twice. The journal's state has the
keys `name`, `before` (the tasks of this name that existed before this one) and `finished` (the
tasks that this journal has created earlier), then `task`, `request` (of the import) and `asked`
(that an import may have begun).

Limitations: if the answer to the request that creates the task is lost while another user creates
one of the same name, the command ends with an error and a person must decide which task is whose.
"""

from __future__ import annotations

from collections.abc import Mapping
from threading import Event
from time import monotonic
from typing import Any

from sam_poll.core.errors import CvatError, ExitCode
from sam_poll.core.text import shown
from sam_poll.integrations.cvat.client import CvatClient
from sam_poll.integrations.cvat.journal import Journal
from sam_poll.integrations.cvat.transport import RequestFailedError

MOUNT = (
    "mount the share in cvat_server and cvat_worker_import (docs/cvat.md), so that these paths "
    "exist there; give --share-prefix if it is mounted in a subfolder"
)
_IMPORT_TIMEOUT_S = 3600.0
# Polls of a server that neither works on the pictures nor has them, before the import is given up.
_MAX_IDLE_POLLS = 30
_IN_PROGRESS = ("queued", "started")


class TaskCreation:
    """Creates tasks of one name."""

    def __init__(self, client: CvatClient, journal: Journal, name: str) -> None:
        self._client = client
        self._journal = journal
        self._name = name

    @property
    def known(self) -> list[int]:
        """Return the numbers of the tasks that this journal has created, the latest last.

        They may have been deleted since, and the latest may have no pictures yet.
        """
        state = self._journal.read_state()
        latest = [state["task"]] if isinstance(state.get("task"), int) else []
        return [*state.get("finished", ()), *latest]

    def task_with(self, names: list[str], spec: Mapping[str, Any]) -> int:
        """Return the number of a new task with these pictures, which the server has imported.

        `spec` is the task as the API takes it, without its name. If an earlier run has begun a task
        and could not complete it, that task is completed; if it had requested its pictures already,
        the task may have those instead.
        """
        state = self._journal.read_state()
        task = self._begun_task(state)
        if task is None:
            state = self._begin()
            task = self._create(state, {"name": self._name, **spec})
        if state.get("task") != task:
            state = {**state, "task": task, "request": None}
            self._journal.write_state(state)
        if not self._has_pictures(task):
            self._import_pictures(state, task, names)
        return task

    def _begin(self) -> dict[str, Any]:
        """Record that a task is about to be created."""
        existing = self._client.tasks_named(self._name)
        begun = {
            "name": self._name,
            "before": [entry["id"] for entry in existing],
            "finished": self.known,
        }
        self._journal.write_state(begun)
        return begun

    def _begun_task(self, state: Mapping[str, Any]) -> int | None:
        """Return the task without pictures that an earlier run has begun.

        It is found even if its number was lost with the server's answer.
        """
        if not isinstance(state.get("task"), int):
            return self._unreported_task(state) if "before" in state else None
        try:
            has_pictures = self._has_pictures(state["task"])
        except RequestFailedError as failure:
            if failure.kind != ExitCode.CVAT_NOT_FOUND:
                raise
            return None  # deleted since
        return None if has_pictures else int(state["task"])

    def _unreported_task(self, state: Mapping[str, Any]) -> int | None:
        """Return the task that the server has created although its answer was lost.

        It is the one task of this name, without pictures and owned by the user, that is not
        in `before`.
        """
        user = self._client.current_user().get("id")
        candidates = [
            entry
            for entry in self._client.tasks_named(self._name)
            if entry["id"] not in state["before"]
            and (entry.get("owner") or {}).get("id") in (user, None)
            and not entry.get("size")
        ]
        if len(candidates) > 1:
            numbers = ", ".join(str(entry["id"]) for entry in candidates)
            raise CvatError(
                f"tasks {numbers} have this name and no pictures: "
                "it is not known which of them this command has created",
                ExitCode.CVAT_CONFLICT,
                place=f"task {self._name!r}",
                remedy="delete the empty ones, and run the same command again",
            )
        return int(candidates[0]["id"]) if candidates else None

    def _create(self, state: Mapping[str, Any], spec: Mapping[str, Any]) -> int:
        retries = 0
        while True:
            try:
                return self._client.create_task(spec)
            except RequestFailedError as failure:
                if not self._client.wait_before_retry(retries, failure):
                    raise
            retries += 1
            task = self._unreported_task(state)
            if task is not None:
                return task

    def _has_pictures(self, task: int) -> bool:
        return bool(self._client.task(task).get("size"))

    def _import_pictures(self, state: dict[str, Any], task: int, names: list[str]) -> None:
        """Have the server import the pictures into the task, and wait until it has."""
        progress = "unknown"
        if "asked" in state:
            progress = self._client.import_status(task, state.get("request")).state
        if progress not in _IN_PROGRESS and not self._has_pictures(task):
            self._journal.write_state({**state, "asked": True})
            request = self._request_import(task, names)
            state = {**state, "asked": True, "request": request}
            self._journal.write_state(state)
        self._wait_for_import(task, state.get("request"))

    def _request_import(self, task: int, names: list[str]) -> str | None:
        """Return the number of the import request, or None if it was lost."""
        retries = 0
        while True:
            try:
                return self._client.add_pictures(task, names)
            except RequestFailedError as failure:
                if not self._client.wait_before_retry(retries, failure):
                    raise
            retries += 1
            if self._client.import_status(task, None).state in _IN_PROGRESS:
                return None
            if self._has_pictures(task):
                return None

    def _wait_for_import(self, task: int, request: str | None) -> None:
        pause = Event()
        idle_polls = 0
        deadline = monotonic() + _IMPORT_TIMEOUT_S
        while True:
            status = self._client.import_status(task, request)
            if status.state == "failed":
                message = shown(" ".join(status.message.split()))[:200]
                raise CvatError(
                    f"the server could not import the pictures: {message or 'no reason given'}",
                    ExitCode.CVAT_REFUSED,
                    place=f"task {task}",
                    remedy=f"{MOUNT}; then run the same command again",
                )
            if status.state not in _IN_PROGRESS:
                if self._has_pictures(task):
                    return
                idle_polls += 1
            if idle_polls > _MAX_IDLE_POLLS or monotonic() > deadline:
                raise CvatError(
                    "the server has not imported the pictures; "
                    f"its state is {shown(status.state)!r}",
                    ExitCode.CVAT_TIMEOUT,
                    place=f"task {task}",
                    remedy="check cvat_worker_import's log; the same command continues waiting",
                )
            pause.wait(self._client.limits.poll_s)
