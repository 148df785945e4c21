"""An auto-annotation function for CVAT's SDK.

    cvat-cli task auto-annotate ID --function-module sam_poll.cvat.function \
        -p model=str:sam2.1_hiera_tiny

Three modes: `everything` segments every object, with one label; `text` finds all objects of some
kinds, with a model that takes words, and labels them with their texts; `boxes` makes masks of the
boxes and points that a task or an annotation file has. The parameters are those of `Parameters`,
given as `-p NAME=TYPE:VALUE`.

Limitations: a frame whose picture or prompts are refused gets no shapes, only a line in the log, so
that the other frames are not lost with it. Boxes drawn after the start are not seen.
"""

# Annotations are no text here: `cvat-cli --function-file` executes this file without an entry in
# `sys.modules`, where `dataclasses` would look for the names in them.
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cvat_sdk.auto_annotation as cvataa
from cvat_sdk import models
from loguru import logger

from sam_poll.core.errors import InputError, PromptError, UsageError
from sam_poll.core.text import shown
from sam_poll.core.types import AutomaticMaskRequest, ConceptRequest, Mask, Prompt, Size
from sam_poll.formats.common import published_score
from sam_poll.formats.cvat import flat
from sam_poll.formats.registry import FormatOptions
from sam_poll.integrations.cvat import shapes
from sam_poll.integrations.cvat.sdk import boxes, common
from sam_poll.integrations.cvat.sdk.boxes import FramePrompts
from sam_poll.pipeline.predictor import Predictor
from sam_poll.prompts import parser

SCORE_ID = 1  # the number of the attribute `score` in this function's specification
# The SDK should have the server's version; a server whose shapes have no score ignores it.
_HAS_NATIVE_SCORE = "score" in models.LabeledShapeRequest.attribute_map
_DEFAULT = AutomaticMaskRequest()
_NUMBERS = ("points_per_side", "min_area", "iou", "stability")
_OF_EVERYTHING = frozenset({*_NUMBERS, "label"})
_OF_TEXT = frozenset({"texts", "threshold"})
_OF_BOXES = frozenset({"task", "host", "annotations"})
_OF_MODE = {"everything": _OF_EVERYTHING, "text": _OF_TEXT, "boxes": _OF_BOXES}


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters that `-p` accepts.

    `score`: declare the label attribute `score`, which the task must then have (or
    `--allow-unmatched-labels` be given); with `task` it is looked up. The numbers are those of
    everything mode.
    """

    mode: str = "everything"
    model: str = ""
    model_cfg: str = ""
    device: str = ""
    precision: str = ""
    config: str = ""
    label: str = "object"
    texts: str = ""
    threshold: float = ConceptRequest().threshold
    task: int = 0
    host: str = ""
    annotations: str = ""
    score: bool = False
    points_per_side: int = _DEFAULT.points_per_side
    min_area: int = _DEFAULT.min_area
    iou: float = _DEFAULT.iou
    stability: float = _DEFAULT.stability


def create(**parameters: Any) -> "Detector":
    """Return the function, its network loaded. Raises FunctionError, which `cvat-cli` prints."""
    with common.sdk_errors():
        chosen = common.read_parameters(Parameters, parameters)
        spec = detection_spec(chosen, frozenset(parameters))
        predictor = common.load_predictor(
            config=chosen.config,
            model=chosen.model,
            model_cfg=chosen.model_cfg,
            device=chosen.device,
            precision=chosen.precision,
        )
        if spec.concept is not None:
            _check_concept(predictor, spec.concept)
        return Detector(predictor, spec)


@dataclass(frozen=True, slots=True)
class DetectionSpec:
    """What is segmented on each frame: the prompts in `boxes`, else `concept`, else `everything`.

    `labels` are all that shapes can have; shapes of those in `scored` have a score.
    """

    labels: tuple[str, ...]
    scored: frozenset[str] = frozenset()
    everything: AutomaticMaskRequest = _DEFAULT
    concept: ConceptRequest | None = None
    boxes: FramePrompts | None = None


class Detector:
    """A detection function as the SDK expects it: `spec` and `detect`."""

    def __init__(self, predictor: Predictor, spec: DetectionSpec) -> None:
        self._predictor = predictor
        self._spec = spec
        self._ids = {name: number for number, name in enumerate(spec.labels, 1)}
        self._warned = False  # that a frame has no boxes

    @property
    def spec(self) -> cvataa.DetectionFunctionSpec:
        """Return the labels, each of type mask.

        The SDK thus refuses, at the start, a task whose label allows rectangles only.
        """
        labels = []
        for name, number in self._ids.items():
            attributes = []
            if name in self._spec.scored:
                attributes.append(cvataa.text_attribute_spec(shapes.SCORE, SCORE_ID))
            labels.append(cvataa.label_spec(name, number, type="mask", attributes=attributes))
        return cvataa.DetectionFunctionSpec(labels=labels)

    def detect(self, context: Any, image: Any) -> list[models.LabeledShapeRequest]:
        """Return one frame's masks, or polygons if the caller requests them.

        Masks whose predicted IoU is below the caller's threshold are left out.
        """
        name, threshold = context.frame_name, context.conf_threshold
        with common.sdk_errors():
            try:
                masks = self._masks(name, image, threshold)
            except InputError as error:
                logger.warning("{}: no shapes: {}", shown(name), shown(error))
                return []
        entries: list[models.LabeledShapeRequest] = []
        for mask in masks:
            if not mask.pixels.size:
                logger.warning("{}: the mask of {!r} is empty", shown(name), mask.label)
            elif threshold is None or mask.score >= threshold:
                entries += self._shapes(mask, "polygon" if context.conv_mask_to_poly else "mask")
        return entries

    def _masks(self, name: str, image: Any, threshold: float | None) -> list[Mask]:
        spec = self._spec
        if spec.concept is not None:
            concept = spec.concept
            if threshold is not None:
                concept = replace(concept, threshold=threshold)
            prepared = self._predictor.embed(common.picture_of(image))
            masks, _ = self._predictor.find(prepared, concept)
            return masks
        if spec.boxes is None:
            request = spec.everything
            if threshold is not None:
                request = replace(request, iou=threshold)
            prepared = self._predictor.embed(common.picture_of(image))
            return self._predictor.everything(prepared, request, spec.labels[0])
        prompts_for = spec.boxes.find(name)
        if prompts_for is None:
            if not self._warned:
                logger.warning(
                    "{}: there are no boxes for it; further such frames are not logged", shown(name)
                )
            self._warned = True
            return []
        picture = common.picture_of(image)
        size = common.size_of(picture)
        prompts = [prompt for prompt in prompts_for(size) if _fits(prompt, size, name)]
        if not prompts:
            return []
        return self._predictor.predict(self._predictor.embed(picture), prompts)

    def _shapes(self, mask: Mask, form: shapes.Form) -> Sequence[models.LabeledShapeRequest]:
        score = published_score(mask.score)
        own_score = {}
        if score is not None and _HAS_NATIVE_SCORE:
            own_score = {"score": score}
        options = FormatOptions()
        point_lists = shapes.points_of(
            mask,
            form,
            flat(mask),
            tolerance_px=options.tolerance_px,
            min_area_px=options.min_area_px,
        )
        shape: Callable[..., models.LabeledShapeRequest]
        shape = cvataa.mask if form == "mask" else cvataa.polygon
        entries = []
        for points in point_lists:
            attributes = []  # a new list for each shape: the SDK changes what it is given
            if score is not None and mask.label in self._spec.scored:
                attributes.append(models.AttributeValRequest(spec_id=SCORE_ID, value=str(score)))
            coordinates = [float(value) for value in points]
            entries.append(
                shape(self._ids[mask.label], coordinates, attributes=attributes, **own_score)
            )
        return entries


def _check_concept(predictor: Predictor, concept: ConceptRequest) -> None:
    """Raise UsageError where the network does not take the texts: no frame would get shapes."""
    try:
        predictor.check_concept(concept)
    except PromptError as error:
        raise UsageError(error.reason, place="-p texts", remedy=error.remedy) from None


def _fits(prompt: Prompt, size: Size, name: str) -> bool:
    """Return whether a prompt fits the picture. One that does not is logged and left out."""
    try:
        parser.fit((prompt,), size)
    except PromptError as error:
        logger.warning("{}: {!r} is left out: {}", shown(name), prompt.label, shown(error))
        return False
    return True


def detection_spec(chosen: Parameters, given: frozenset[str]) -> DetectionSpec:
    """Return what the parameters request; `given` are the names of those that were given.

    Raises UsageError if parameters contradict each other, and the errors of reading boxes.
    """
    if chosen.mode not in _OF_MODE:
        raise UsageError(
            f"there is no mode {chosen.mode!r}",
            place="-p mode",
            remedy=f"one of {', '.join(_OF_MODE)}",
        )
    of_others = (names for mode, names in _OF_MODE.items() if mode != chosen.mode)
    unfit = given & frozenset().union(*of_others)
    if unfit:
        raise UsageError(
            f"has no meaning in mode {chosen.mode}", place=f"-p {min(unfit)}", remedy="leave it out"
        )
    if chosen.mode == "everything":
        return _everything_spec(chosen)
    if chosen.mode == "text":
        return _text_spec(chosen)
    if bool(chosen.task) == bool(chosen.annotations):
        raise UsageError(
            "the boxes must come from one source",
            place="-p mode",
            remedy="give either task=int:ID, or annotations=str:FILE",
        )
    if chosen.task:
        prompts = boxes.from_task(chosen.task, chosen.host)
    else:
        prompts = boxes.from_file(Path(chosen.annotations))
    scored = frozenset(prompts.labels) if chosen.score else prompts.scored
    return DetectionSpec(prompts.labels, scored, boxes=prompts)


def _everything_spec(chosen: Parameters) -> DetectionSpec:
    if not chosen.label.strip():
        raise UsageError(
            "is empty", place="-p label", remedy="give the name of a label of the task"
        )
    return DetectionSpec(
        (chosen.label,),
        frozenset({chosen.label}) if chosen.score else frozenset(),
        everything=common.automatic_mask_request(
            **{name: getattr(chosen, name) for name in _NUMBERS}
        ),
    )


def _text_spec(chosen: Parameters) -> DetectionSpec:
    texts = [text.strip() for text in chosen.texts.split(",")]
    try:
        concept = parser.concept_of(texts, chosen.threshold)
    except PromptError as error:
        name = "threshold" if error.place == "threshold" else "texts"
        raise UsageError(error.reason, place=f"-p {name}", remedy=error.remedy) from None
    scored = frozenset(texts) if chosen.score else frozenset()
    return DetectionSpec(concept.texts, scored, concept=concept)
