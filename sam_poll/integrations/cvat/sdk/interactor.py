"""An interaction function for CVAT's agents: a mask from clicks and a box, without Nuclio.

    cvat-cli function create-native NAME --function-module sam_poll.cvat.interactor -p model=str:…
    cvat-cli function run-agent ID --function-module sam_poll.cvat.interactor -p model=str:…

Without a click or a box, everything is segmented, and each object is a separate shape.

Limitations: an SDK before 2.7x has no interaction functions; the function then ends with an error
at the start.
"""

# Annotations are no text here: `cvat-cli --function-file` executes this file without an entry in
# `sys.modules`, where `dataclasses` would look for the names in them.
from dataclasses import dataclass
from typing import Any

import cvat_sdk.auto_annotation as cvataa
from cvat_sdk import models

from sam_poll.core.errors import PromptError, SettingsError
from sam_poll.core.types import AutomaticMaskRequest, Box, Mask, Point, Prompt
from sam_poll.formats.common import published_score
from sam_poll.formats.cvat import flat
from sam_poll.integrations.cvat.sdk import common
from sam_poll.pipeline.predictor import Predictor, PreparedImage


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters that `-p` accepts."""

    model: str = ""
    model_cfg: str = ""
    device: str = ""
    precision: str = ""
    config: str = ""
    points_per_side: int = AutomaticMaskRequest().points_per_side


def create(**parameters: Any) -> "Interactor":
    """Return the function, its network loaded. Raises FunctionError, which `cvat-cli` prints."""
    with common.sdk_errors():
        chosen = common.read_parameters(Parameters, parameters)
        if not hasattr(cvataa, "InteractionFunctionSpec"):
            raise SettingsError(
                "this cvat-sdk has no interaction functions",
                remedy="install a newer one, if the server is new enough; "
                "else use the Nuclio functions in docker/nuclio",
            )
        predictor = common.load_predictor(
            config=chosen.config,
            model=chosen.model,
            model_cfg=chosen.model_cfg,
            device=chosen.device,
            precision=chosen.precision,
        )
        request = common.automatic_mask_request(points_per_side=chosen.points_per_side)
        return Interactor(predictor, request)


class Interactor:
    """An interaction function as the SDK expects it: `spec`, `preprocess_image`, `detect`."""

    def __init__(
        self, predictor: Predictor, everything: AutomaticMaskRequest | None = None
    ) -> None:
        self._predictor = predictor
        self._everything = everything or AutomaticMaskRequest()

    @property
    def spec(self) -> Any:
        """Return the specification: points of both kinds and a box, all optional."""
        return cvataa.InteractionFunctionSpec(
            min_pos_points=0, min_neg_points=0, min_bounding_boxes=0
        )

    def preprocess_image(self, context: Any, image: Any) -> PreparedImage:
        """Return the encoded picture, which further clicks on it use again."""
        with common.sdk_errors():
            return self._predictor.embed(common.picture_of(image))

    def detect(self, context: Any, pp_image: PreparedImage, prompts: Any) -> list[Any]:
        """Return the object's mask with its confidence; without a prompt, every object's mask.

        Empty masks are left out.
        """
        with common.sdk_errors():
            prompt = _prompt(prompts)
            if prompt is None:
                masks = self._predictor.everything(pp_image, self._everything)
            else:
                masks = self._predictor.predict(pp_image, [prompt])
            return [_shape(mask) for mask in masks if mask.pixels.size]


def _prompt(prompts: Any) -> Prompt | None:
    """Return the prompt; None if there is nothing. Raises PromptError for negative points only."""
    positive = tuple(Point(x, y, 1) for x, y in prompts.pos_points)
    negative = tuple(Point(x, y, 0) for x, y in prompts.neg_points)
    points = positive + negative
    box = None
    if prompts.bounding_box is not None:
        (ax, ay), (bx, by) = prompts.bounding_box
        box = Box(min(ax, bx), min(ay, by), max(ax, bx), max(ay, by))
    if negative and not positive and box is None:
        raise PromptError(
            "there are negative points only",
            place="neg_points",
            remedy="add a positive point, or a box",
        )
    return Prompt(points=points, box=box) if points or box else None


def _shape(mask: Mask) -> Any:
    score = published_score(mask.score)
    attributes = []
    if score is not None:
        kind = cvataa.InteractionResultAttributes.CONFIDENCE
        attributes.append(models.AttributeValRequest(spec_id=int(kind), value=str(score)))
    return cvataa.InteractionResultShape(
        type="mask", points=[float(value) for value in flat(mask)], attributes=attributes
    )
