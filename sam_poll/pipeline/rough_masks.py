"""Read the mask files that the prompts of a job name; on the decode pool.

Limitations: a mask file that several jobs name is read for each of them.
"""

from __future__ import annotations

from dataclasses import replace

from sam_poll.core.errors import FileChangedError, IncompleteFileError, PictureError, PromptError
from sam_poll.core.safe_path import SafePath
from sam_poll.core.text import shown
from sam_poll.core.types import MaskFile, Request, RunLengths, Size
from sam_poll.imaging import source_file
from sam_poll.imaging.mask_reader import MAX_RUNS, read_mask
from sam_poll.prompts.mask_files import place_of

MAX_RUNS_TOGETHER = 4 * MAX_RUNS
"""Most run lengths of all mask files of a prompt together: 256 MB."""


def with_masks(request: Request, size: Size | None, max_pixels: int) -> Request:
    """Return the request with the masks of its mask files as shapes; each file is read once.

    `size`: that of the picture, which the masks must have; None: it is not known yet.

    Raises PromptError with the place of the mask; IncompleteFileError where the file is cut off;
    FileChangedError where it has just changed or gone; other errors of the share as OSError.
    """
    if not isinstance(request, tuple):
        return request
    masks: dict[SafePath, RunLengths] = {}
    prompts = []
    runs = 0
    for index, prompt in enumerate(request):
        if prompt.mask_file is not None:
            place = f"{place_of(request, index)}, {shown(prompt.mask_file.name)}"
            path = _path(prompt.mask_file)
            if path not in masks:
                masks[path] = _read(path, place, size, max_pixels)
                runs += len(masks[path].counts)
                if runs > MAX_RUNS_TOGETHER:
                    raise PromptError(
                        f"the masks so far have more than {MAX_RUNS_TOGETHER:,} run lengths",
                        place=place,
                        remedy="divide the objects among several prompts",
                    )
            prompt = replace(prompt, shape=masks[path], mask_file=None)
        prompts.append(prompt)
    return tuple(prompts)


def _path(file: MaskFile) -> SafePath:
    assert file.path is not None  # the job's source has found it
    return file.path


def _read(path: SafePath, place: str, size: Size | None, max_pixels: int) -> RunLengths:
    try:
        data, stamp = source_file.read(path)
        try:
            return read_mask(data, size=size, max_pixels=max_pixels)
        finally:
            source_file.check_unchanged(path, stamp)
    except FileNotFoundError as error:
        raise FileChangedError(
            "has gone while the job was processed", place=place, remedy="put it there again"
        ) from error
    except IncompleteFileError as error:
        error.place = place
        raise
    except PictureError as error:
        raise PromptError(
            error.reason, place=place, remedy=error.remedy, retriable=error.retriable
        ) from error
