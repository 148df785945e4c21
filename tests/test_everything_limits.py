"""Everything mode where it could break: which points are clicked, tiny and wide pictures, ties, edges, many objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from sam_poll import everything
from sam_poll.engines.fake import FakeEngine
from sam_poll.types import Candidate, Embedding, Everything, Picture, Size


def of(pixels: Any) -> Picture:
    return Picture(pixels, Size(pixels.shape[1], pixels.shape[0]), "x")


def encoded(engine: Any, picture: Picture) -> Any:
    [embedding] = engine.encode([engine.prepare(picture)])
    return embedding


class Clicked(FakeEngine):
    """Remembers the clicks, and in a picture of which size they were."""

    def __init__(self) -> None:
        super().__init__()
        self.clicks: list[tuple[Size, float, float]] = []

    def candidates(
        self, embedding: Embedding, points: Sequence[tuple[float, float]], *, iou: float, stability: float
    ) -> list[Candidate]:
        self.clicks += [(embedding.frame.size, x, y) for x, y in points]
        return super().candidates(embedding, points, iou=iou, stability=stability)


# ── which points ──


@pytest.mark.parametrize("crops", [0, 1])
def test_only_wanted_points_are_clicked_and_they_are_asked_for_in_the_pictures_pixels(crops: int) -> None:
    picture, engine, asked = of(np.zeros((400, 600, 3), np.uint8)), Clicked(), Everything(4, 0, crops=crops)
    embedding = encoded(engine, picture)
    found = everything.segment(engine, embedding, asked, picture=picture, wanted=lambda x, y: x > 500)
    whole = [(x, y) for size, x, y in engine.clicks if size == picture.size]
    assert whole == [(x, y) for x, y in everything.grid(4, picture.size) if x > 500]
    assert len(engine.clicks) == (12 if crops else 4), "and one of four columns in two of the four crops"
    assert found
    engine.clicks.clear()
    assert everything.segment(engine, embedding, asked, picture=picture, wanted=lambda x, y: False) == []
    assert engine.clicks == []
