"""What the engines of `transformers` have in common: its prompt encoders and mask decoders.

They take prompts as objects of pictures, with one mask input for each picture. Prompts with rough
shapes are therefore given as one object each of as many pictures, which all are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from sam_poll.engines.base import PromptBatch


def sparse(encoder: Any, prompts: PromptBatch) -> tuple[Tensor, Tensor]:
    """Return the sparse and dense embeddings of `encoder`.

    They are 1×n×tokens×C and 1×C×h×w; with mask inputs n×1×tokens×C and n×C×h×w.
    """
    pictures = 0 if prompts.masks is None else 1  # where the dimension that is new belongs
    has_points = prompts.points.shape[1] > 0
    embedded: tuple[Tensor, Tensor] = encoder(
        input_points=prompts.points.unsqueeze(pictures) if has_points else None,
        input_labels=prompts.labels.unsqueeze(pictures) if has_points else None,
        input_boxes=None if prompts.boxes is None else prompts.boxes.unsqueeze(pictures),
        input_masks=prompts.masks,
    )
    return embedded


def masks(
    decoder: Any,
    image: Tensor,
    high_res: Sequence[Tensor],
    pe: Tensor,
    sparse: Tensor,
    dense: Tensor,
    many: bool,
) -> tuple[Tensor, Tensor]:
    """Return logits (n×m×h×w) and predicted IoUs (n×m) of `decoder`.

    `image` and `high_res` are of one picture; `sparse` and `dense` are those of `sparse`.
    """
    pictures = len(sparse)
    if pictures > 1:
        image, pe, *high_res = (
            tensor.expand(pictures, -1, -1, -1) for tensor in (image, pe, *high_res)
        )
    logits, iou, _, _ = decoder(
        image_embeddings=image,
        image_positional_embeddings=pe,
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=many,
        high_resolution_features=list(high_res),
    )
    return logits.flatten(0, 1), iou.flatten(0, 1)
