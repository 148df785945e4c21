"""The finish stage: masks at full resolution, output formats, delivery to the source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from loguru import logger

from sam_poll.core.protocols import Format
from sam_poll.core.types import AutomaticMaskRequest, Mask, Result
from sam_poll.imaging import automatic_masks, found_objects
from sam_poll.imaging import masks as full_size_masks
from sam_poll.pipeline.run_context import RunContext
from sam_poll.pipeline.task import StageTimer, Task, log_answer, result_of


class FinishStage:
    """Makes and delivers the outputs of tasks; on the finish pool."""

    def __init__(
        self,
        context: RunContext,
        formats: Mapping[str, Format],
        on_result: Callable[[Result], None] | None,
    ) -> None:
        self._context = context
        self._formats = formats
        self._on_result = on_result

    def run(self, task: Task) -> None:
        """Keep a new embedding, make the masks and outputs of a task and deliver them."""
        kept = self._keep(task)
        with StageTimer(task, "masks"):
            masks = self._masks(task)
        task.packed_masks, task.found = [], None
        result = result_of(task, masks, kept)
        names = self._formats if task.job.formats is None else task.job.formats
        with StageTimer(task, "formats"):
            documents = [document for name in names for document in self._formats[name](result)]
        if not self._context.deliver(task, documents, len(masks)):
            return
        log_answer(result, documents)
        if self._on_result:
            try:
                self._on_result(result)
            except Exception:  # noqa: BLE001  the job is answered; a listener cannot undo that
                logger.exception("the result's listener failed")
        self._context.slots.release()

    def _keep(self, task: Task) -> str | None:
        """Write a new embedding to the disk; of a job that requests it, return its file's name."""
        stored, task.stored = task.stored, None
        if stored is None:
            return None
        if stored.packed is None:
            return stored.key.name
        with StageTimer(task, "cache"):
            kept = self._context.stored.keep(stored)
        return stored.key.name if kept else None

    def _masks(self, task: Task) -> list[Mask]:
        request = task.job.prompts
        on_step = partial(self._context.step, task)
        if task.found:
            objects = task.found.objects
            task.notes += task.found.notes + found_objects.notes_on_same_masks(objects)
            return found_objects.masks(objects, on_step=on_step)
        if isinstance(request, AutomaticMaskRequest):
            return automatic_masks.masks(task.packed_masks, request, on_step=on_step)
        pairs = zip(task.logits, task.prompts, strict=True)
        return [full_size_masks.mask_of(logits, prompt.label) for logits, prompt in pairs]
