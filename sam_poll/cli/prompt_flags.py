"""Jobs from the flags of `predict`, and the checks of them that need no network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from sam_poll.core.errors import (
    PictureError,
    PromptError,
    SamPollError,
    ShareError,
    UsageError,
)
from sam_poll.core.safe_path import SafePath
from sam_poll.core.types import (
    AutomaticMaskRequest,
    Box,
    ConceptRequest,
    Job,
    Point,
    Polygon,
    Prompt,
    Request,
    RunLengths,
)
from sam_poll.core.validation import complaints
from sam_poll.imaging import decode, mask_reader, source_file
from sam_poll.imaging.headers import for_decoder
from sam_poll.pipeline.rough_masks import with_masks
from sam_poll.prompts import mask_files, parser
from sam_poll.prompts.parser import PromptFile
from sam_poll.prompts.schema import MAX_CORNERS, Label
from sam_poll.share.file_kinds import PROMPT_ENDINGS


def point_flag(text: str) -> Point:
    """Read `x,y` or `x,y,label`; label 1 is foreground (default), 0 background.

    Raises UsageError.
    """
    numbers = _numbers(text, "--point", "x,y or x,y,0 for background", (2, 3))
    if len(numbers) == 3 and numbers[2] not in (0, 1):
        raise UsageError(
            "a point's label is 1 (foreground) or 0 (background)", place=f"--point {text}"
        )
    return Point(numbers[0], numbers[1], int(numbers[2]) if len(numbers) == 3 else 1)


def label_flag(text: str) -> str:
    """Check a label by the rules of prompt files. Raises UsageError."""
    try:
        TypeAdapter(Label).validate_python(text)
    except ValidationError as error:
        (problem, *_) = complaints(error, text, lambda loc: ())
        raise UsageError(
            problem.reason, place=f"--label {text!r}", remedy="use a plain name on one line"
        ) from None
    return text


def texts_flag(texts: Sequence[str], threshold: float | None) -> ConceptRequest:
    """Check texts and their threshold by the rules of prompt files. Raises UsageError."""
    try:
        return parser.concept_of(texts, threshold)
    except PromptError as error:
        flag = "--threshold" if (error.place or "").startswith("threshold") else "--text"
        raise UsageError(error.reason, place=flag, remedy=error.remedy) from None


def box_flag(text: str) -> Box:
    """Read `x0,y0,x1,y1`. Raises UsageError."""
    x0, y0, x1, y1 = _numbers(text, "--box", "x0,y0,x1,y1", (4,))
    if x0 >= x1 or y0 >= y1:
        raise UsageError(
            "the box is empty or inside out", place=f"--box {text}", remedy="x0 < x1 and y0 < y1"
        )
    return Box(x0, y0, x1, y1)


def polygon_flag(text: str) -> Polygon:
    """Read `x,y,x,y,x,y,…` by the rules of prompt files. Raises UsageError."""
    numbers = _numbers(text, "--polygon", "x,y,x,y,x,y,…", range(6, 2 * MAX_CORNERS + 1, 2))
    corners = list(zip(numbers[::2], numbers[1::2], strict=True))
    try:
        shape = parser.shape_of({"polygon": corners})
    except PromptError as error:
        raise UsageError(error.reason, place="--polygon", remedy=error.remedy) from None
    assert isinstance(shape, Polygon)
    return shape


def mask_flag(path: Path) -> RunLengths:
    """Read a rough mask as `imaging.mask_reader` does. Raises UsageError."""
    place = f"--mask {path}"
    try:
        return mask_reader.read_mask(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror or error}", place=place) from None
    except PictureError as error:
        raise UsageError(error.reason, place=place, remedy=error.remedy) from None


def _numbers(text: str, flag: str, form: str, lengths: Collection[int]) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in lengths or any(n != n or abs(n) == float("inf") for n in numbers):
        raise UsageError("not the expected numbers", place=f"{flag} {text}", remedy=f"write {form}")
    return numbers


def prompts_of_flags(
    points: Sequence[str],
    boxes: Sequence[str],
    label: str,
    everything: bool = False,
    texts: Sequence[str] = (),
    threshold: float | None = None,
    polygons: Sequence[str] = (),
    masks: Sequence[Path] = (),
) -> Request:
    """Return the request that the flags describe, empty where there are none. Raises UsageError.

    All points, one box and one polygon or mask are one object; several boxes, or several polygons
    and masks, are several objects.
    """
    if threshold is not None and not texts:
        raise UsageError("--threshold goes with --text", remedy="name what to find with --text")
    if everything:
        if points or boxes or texts or polygons or masks:
            raise UsageError(
                "--everything needs no prompt: it cannot be combined with --point, --box, "
                "--polygon, --mask or --text"
            )
        return AutomaticMaskRequest()
    if texts:
        if points or boxes or polygons or masks:
            raise UsageError(
                "--text cannot be combined with --point, --box, --polygon or --mask",
                remedy="use --prompt FILE for a text with exemplars",
            )
        if label != ConceptRequest().label:
            raise UsageError(
                "--label cannot be combined with --text: each object is labelled with its text"
            )
        return texts_flag(texts, threshold)
    shapes: list[Polygon | RunLengths] = [*map(polygon_flag, polygons), *map(mask_flag, masks)]
    return _objects(
        label_flag(label), tuple(map(point_flag, points)), tuple(map(box_flag, boxes)), shapes
    )


def _objects(
    label: str,
    points: tuple[Point, ...],
    boxes: Sequence[Box],
    shapes: Sequence[Polygon | RunLengths],
) -> tuple[Prompt, ...]:
    if len(shapes) > 1 and (points or boxes):
        raise UsageError(
            "points and boxes cannot be combined with several polygons and masks: "
            "their objects would be ambiguous",
            remedy="use --prompt FILE",
        )
    if len(boxes) > 1 and (points or shapes):
        raise UsageError(
            f"{'points' if points else 'a polygon or mask'} cannot be combined with several boxes: "
            "their objects would be ambiguous",
            remedy="use --prompt FILE",
        )
    if len(boxes) > 1:
        return tuple(Prompt(label, box=box) for box in boxes)
    if len(shapes) > 1:
        return tuple(Prompt(label, shape=shape) for shape in shapes)
    if not points and not boxes and not shapes:
        return ()
    one = Prompt(label, points, next(iter(boxes), None), shape=next(iter(shapes), None))
    if one.box is None and one.shape is None and all(point.label == 0 for point in points):
        raise UsageError(
            "there is no foreground point", place="--point", remedy="add one, or a --box"
        )
    return (one,)


def jobs_for(
    pictures: Sequence[Path],
    given: Request,
    prompt_file: Path | None,
) -> list[Job]:
    """Make one job a picture, with the prompts of the flags, of the prompt file, or beside it.

    Outputs are named by the picture's stem, with a number where a stem occurs twice. A picture that
    does not exist gets a job with an error. Raises UsageError, PromptError.
    """
    if given and prompt_file:
        raise UsageError(
            "--prompt cannot be combined with --point, --box, --polygon, --mask, --text "
            "or --everything"
        )
    shared = PromptFile(given) if given else None
    if prompt_file:
        shared = _read_prompt(prompt_file)
    jobs: list[Job] = []
    used: set[str] = set()
    for picture in pictures:
        name, number = picture.stem, 2
        while name in used:
            name, number = f"{picture.stem}~{number}", number + 1
        used.add(name)
        file = picture.resolve()  # the pipeline follows no links, but a user may name one
        shown_name = picture.name or file.name  # `.` has no name
        if not os.path.lexists(file):
            error = PictureError("cannot be read: No such file or directory")
            jobs.append(Job(name, shown_name, SafePath.beside(file), (), error=error))
            continue
        prompt = shared or _prompt_beside(picture)
        jobs.append(
            Job(
                name,
                shown_name,
                SafePath.beside(file),
                prompt.prompts,
                image_size=prompt.image_size,
            )
        )
    return jobs


def errors_of(jobs: Sequence[Job], max_pixels: int) -> dict[Job, SamPollError]:
    """Find jobs that will certainly fail, by checks that are quick.

    These are files that cannot be opened, and, up to the first good one, pictures that are cut off,
    have no readable header or do not fit their prompts. If all jobs fail, no model is loaded;
    otherwise the pipeline rejects the remaining ones.
    """
    errors: dict[Job, SamPollError] = {}
    any_good = False
    for job in jobs:
        try:
            _check(job, None if any_good else max_pixels)
            any_good = True
        except OSError as error:
            errors[job] = PictureError(f"cannot be read: {error.strerror or error}")
        except SamPollError as error:
            errors[job] = error
    return errors


def _check(job: Job, max_pixels: int | None) -> None:
    assert isinstance(job.picture, SafePath)
    if job.error:
        raise job.error
    if max_pixels is None:
        source_file.check_openable(job.picture)
        return
    data, _ = source_file.read(job.picture)
    header = decode.read_header(data, max_pixels=max_pixels)
    for_decoder(data, header)
    parser.check_size(job.image_size, header.size, lambda: header.stored)
    parser.fit_request(job.prompts, header.size)


def make_writable(folder: Path) -> None:
    """Make the folder for the results and check that it is writable.

    Raises UsageError, ShareError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (FileExistsError, NotADirectoryError):
        raise UsageError(
            "is not a folder", place=f"-o {folder}", remedy="name a folder; it is created if needed"
        ) from None
    except OSError as error:
        reason = f"results cannot be written there: {error.strerror or error}"
        raise ShareError(
            reason, place=f"-o {folder}", remedy="name a folder that this user may write to"
        ) from error


def _prompt_beside(picture: Path) -> PromptFile:
    for ending in sorted(PROMPT_ENDINGS):
        beside = picture.with_suffix(ending)
        if beside.is_file():
            return _read_prompt(beside)
    raise UsageError(
        "no prompt",
        place=str(picture),
        remedy="give --point, --box, --polygon, --mask, --text, --everything or --prompt, "
        f"or put {picture.stem}.json beside it",
    )


def _read_prompt(path: Path) -> PromptFile:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(f"cannot be read: {error.strerror}", place=str(path)) from error
    try:
        read = parser.parse(data, mask_files=True)
        return replace(read, prompts=_with_masks(path, read.prompts))
    except PromptError as error:
        error.place = f"{path}: {error.place}" if error.place else str(path)
        raise


def _with_masks(prompt: Path, request: Request) -> Request:
    """Return the request of a prompt file with the masks of the mask files beside it."""
    paths = {name: prompt.with_name(name).resolve() for name in mask_files.names_in(request)}
    for name, path in paths.items():
        if not path.is_file():
            raise PromptError(
                f"{name} is not beside the prompt",
                place=mask_files.place_of_name(request, name),
                remedy="put the file there",
            )
    found = {name: SafePath.beside(path) for name, path in paths.items()}
    return with_masks(mask_files.located(request, found), None, decode.DEFAULT_MAX_PIXELS)
