"""Tests of the batches in which shapes are uploaded; whole uploads are in test_masks, test_push."""

from __future__ import annotations

import json

import pytest

from sam_poll.integrations.cvat import shapes, upload


@pytest.mark.parametrize(
    "points", [[8000, 0] * 30_000, [8765.43] * 60_000, [8765.43] * 4000, [1] * 8]
)
def test_batches_stay_below_the_default_limit_of_a_proxy(points: list[float]) -> None:
    label = shapes.Label(1_000_000, "dog", "any", shapes.Attribute(1_000_000))
    one = shapes.entry(100_000, label, "mask", points, 0.98765)
    count = 100 if len(points) > 10_000 else 1000
    batches = list(upload.batches([one] for _ in range(count)))
    assert sum(map(len, batches)) == count
    assert max(len(json.dumps(batch)) for batch in batches) < 1 << 20
