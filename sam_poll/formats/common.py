"""What several output formats use: labels, notes, scores, painting order, YAML, CVAT's numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from sam_poll.core.types import Mask, Result
from sam_poll.core.yaml_reader import scalar

# CVAT matches an `<image>` to a frame by its name, and where no frame has that name by its `id`,
# which it takes for the frame's number. No task has this many frames: a picture that is not in the
# task is then refused with its name, instead of getting its masks onto another picture.
CVAT_FIRST_IMAGE_ID = 1_000_000


def labels_of(result: Result) -> list[str]:
    """Return the requested labels, each once, sorted.

    Labels of empty masks are included, so that the numbers of classes do not depend on the result.
    """
    return sorted({label_or_default(mask.label) for mask in result.masks})


def label_or_default(label: str) -> str:
    """Return the label, or `object` for an empty one, for formats that require a label."""
    return label or "object"


def left_out(number: int, mask: Mask) -> str:
    """Return the note for an object without a polygon: its mask is empty, or too small."""
    why = "every part of it is below the minimum area" if mask.pixels.size else "its mask is empty"
    return f"object {number} ({mask.label}) is left out: {why}"


def published_score(score: float) -> float | None:
    """Return a predicted IoU as it is written to files: within 0…1, with four digits.

    The network's prediction may be outside that range. None if it is not a finite number.
    """
    return round(min(max(float(score), 0.0), 1.0), 4) if math.isfinite(score) else None


def paint_order(masks: Sequence[Mask]) -> list[int]:
    """Return the masks' indices in painting order: largest area first, small ones on top.

    Of equal areas the earlier comes first.
    """
    areas = [mask.area for mask in masks]
    return sorted(range(len(masks)), key=lambda index: -areas[index])


def yaml_of(facts: Mapping[str, Any]) -> str:
    """Return YAML that every reader understands alike.

    Words that some readers take for numbers or truth values are quoted.
    """
    return yaml.dump(facts, Dumper=_Quoting, sort_keys=False, allow_unicode=True, width=1 << 20)


class _Quoting(yaml.SafeDumper):
    """Quotes words that YAML 1.1, as PyYAML does, or YAML 1.2 (`1e3`) takes for something else."""


def _quoted(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Double quotes escape unprintable characters; single quotes turn odd line ends into spaces.
    style = None if text.isprintable() and isinstance(scalar(text), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Quoting.add_representer(str, _quoted)
