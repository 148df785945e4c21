"""What every engine must do, whatever network it runs: one class, run for each of them.

A subclass provides the fixture `engine`. Pictures are drawn, not read.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from sam_poll.core.errors import PromptError
from sam_poll.core.protocols import Engine
from sam_poll.core.types import (
    Box,
    Logits,
    PackedLevel,
    Picture,
    Point,
    Prompt,
    RgbArray,
    Size,
)

CLICK = Prompt(label="click", points=(Point(30, 40),))
CLICKS = Prompt(label="clicks", points=(Point(30, 40), Point(80.5, 20, label=0), Point(35, 45)))
BOX = Prompt(label="box", box=Box(10, 20, 90.5, 70))
BOTH = Prompt(label="both", points=(Point(50, 40), Point(95, 75, label=0)), box=Box(10, 20, 90, 70))
PROMPTS = (
    CLICK,
    BOX,
    CLICKS,
    BOTH,
    Prompt(box=Box(0, 0, 120, 80)),
    Prompt(points=(Point(119, 79),)),
)


def drawn(width: int, height: int, seed: int = 0) -> RgbArray:
    """Return a picture with structure at all scales, as photos have, and a bright ellipse."""
    random = np.random.default_rng(seed)
    field = np.zeros((height, width, 3))
    for cells in (2, 5, 13, 37, 101):
        coarse = random.normal(size=(cells + 1, cells + 1, 3))
        rows, columns = (np.linspace(0, cells, length) for length in (height, width))
        top, left = (places.astype(int).clip(0, cells - 1) for places in (rows, columns))
        down, right = (rows - top)[:, None, None], (columns - left)[None, :, None]
        upper = coarse[top][:, left] * (1 - right) + coarse[top][:, left + 1] * right
        lower = coarse[top + 1][:, left] * (1 - right) + coarse[top + 1][:, left + 1] * right
        field += (upper * (1 - down) + lower * down) / np.sqrt(cells)
    y, x = np.mgrid[:height, :width]
    field += (
        2.0
        * (np.hypot((x - width / 2) / (width / 3), (y - height / 2) / (height / 4)) < 1)[..., None]
    )
    return np.clip(110 + 45 * field, 0, 255).astype(np.uint8)


def picture(width: int = 120, height: int = 80, seed: int = 0) -> Picture:
    return Picture(
        drawn(width, height, seed), Size(width, height), digest=f"{width}x{height}#{seed}"
    )


def assert_close(found: list[Logits], expected: list[Logits], tolerance: float = 1e-3) -> None:
    """Compare logits; another order of summation, as in a batch, changes the last digits."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.pixels, other.pixels, atol=tolerance)
        assert one.score == pytest.approx(other.score, abs=tolerance)
        assert one.frame == other.frame


class EngineContract:
    """The tests of every engine; a subclass provides the fixture `engine`."""

    def test_info_names_the_network_and_the_step(self, engine: Engine) -> None:
        info = engine.info
        assert info.name
        families = ("sam1", "sam2", "sam-hq", "mobile-sam", "edgetam", "sam3", "fake")
        assert info.family in families
        assert info.side % 16 == 0
        assert str(info.side) in info.step
        assert info.precision in info.step
        assert engine.batch >= 1

    @pytest.mark.parametrize(
        "size", [(120, 80), (80, 120), (641, 427), (1, 1), (3, 2), (900, 4), (2, 700)]
    )
    def test_a_prepared_picture_fills_its_frames_region(
        self, engine: Engine, size: tuple[int, int]
    ) -> None:
        source = picture(*size)
        prepared = engine.prepare(source)
        frame = prepared.frame
        assert frame.size == source.size
        assert frame.side == engine.info.side
        assert max(frame.region) == frame.side
        assert min(frame.region) >= 1
        assert prepared.pixels.shape == (frame.region.height, frame.region.width, 3)
        assert prepared.pixels.dtype == np.uint8
        assert prepared.digest == source.digest

    @pytest.mark.parametrize("size", [(1, 1), (3, 2), (900, 4), (2, 700), (641, 427)])
    def test_every_size_is_answered(self, engine: Engine, size: tuple[int, int]) -> None:
        [embedding] = engine.encode([engine.prepare(picture(*size))])
        prompts = [Prompt(points=(Point(0, 0),)), Prompt(box=Box(0, 0, *size))]
        for logits in engine.decode(embedding, prompts):
            assert np.isfinite(logits.pixels).all()

    def test_the_picture_stays_as_it_was_and_may_be_read_only(self, engine: Engine) -> None:
        source = picture()
        before = source.pixels.copy()
        source.pixels.flags.writeable = False
        engine.encode([engine.prepare(source)])
        np.testing.assert_array_equal(source.pixels, before)

    def test_a_view_of_another_array_is_as_good_as_a_copy(self, engine: Engine) -> None:
        source = picture()
        turned = source.pixels[::-1, :, ::-1]
        view, copy = (Picture(pixels, source.size, "x") for pixels in (turned, turned.copy()))
        np.testing.assert_array_equal(engine.prepare(view).pixels, engine.prepare(copy).pixels)

    def test_a_picture_of_the_networks_own_size_may_be_read_only(self, engine: Engine) -> None:
        side = engine.info.side
        source = picture(side, side)
        source.pixels.flags.writeable = False
        prepared = engine.prepare(source)
        np.testing.assert_array_equal(prepared.pixels, source.pixels)
        engine.encode([prepared])

    def test_a_reduced_picture_keeps_the_full_pictures_coordinates(self, engine: Engine) -> None:
        source = picture(400, 300)
        reduced = Picture(np.ascontiguousarray(source.pixels[::2, ::2]), source.size, source.digest)
        assert engine.prepare(reduced).frame == engine.prepare(source).frame

    def test_prepare_is_safe_from_many_threads(self, engine: Engine) -> None:
        sources = [picture(150 + 10 * seed, 100, seed) for seed in range(8)]
        alone = [engine.prepare(source).pixels for source in sources]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(engine.prepare, sources * 4))
        for index, prepared in enumerate(together):
            np.testing.assert_array_equal(prepared.pixels, alone[index % len(alone)])

    def test_a_batch_is_answered_in_its_order_as_each_alone(self, engine: Engine) -> None:
        prepared = [
            engine.prepare(picture(120, 80 + 20 * seed, seed)) for seed in range(engine.batch + 2)
        ]
        together = engine.encode(prepared)
        assert [embedding.frame for embedding in together] == [one.frame for one in prepared]
        for embedding, one in zip(together, prepared, strict=True):
            [alone] = engine.encode([one])
            assert_close(engine.decode(embedding, [CLICK, BOX]), engine.decode(alone, [CLICK, BOX]))
            assert embedding.nbytes == alone.nbytes > 0

    def test_a_packed_embedding_is_decoded_as_before_and_each_time_the_same(
        self, engine: Engine
    ) -> None:
        for size in ((120, 80), (80, 120), (3, 2)):
            [embedding] = engine.encode([engine.prepare(picture(*size))])
            packed = engine.pack(embedding)
            first, second = engine.unpack(packed), engine.unpack(engine.pack(embedding))
            assert first
            assert second
            assert first.frame == embedding.frame
            assert (packed.size, packed.side) == (embedding.frame.size, embedding.frame.side)
            assert packed.precision == engine.info.precision
            assert {level.dtype for level in packed.levels} <= {"float16", "bfloat16"}
            prompts = [Prompt(points=(Point(1, 1),)), Prompt(box=Box(0, 0, *size))]
            found = engine.decode(first, prompts)
            # Half precision has 11 bits; logits are up to some tens.
            assert_close(found, engine.decode(embedding, prompts), tolerance=0.15)
            assert_close(found, engine.decode(second, prompts), tolerance=0)

    def test_a_packed_embedding_of_another_form_is_not_used(self, engine: Engine) -> None:
        [embedding] = engine.encode([engine.prepare(picture())])
        packed = engine.pack(embedding)
        level = packed.levels[0]
        cut = PackedLevel(level.data[:2], level.dtype, level.computed, (1, 1, 1, 1))
        assert engine.unpack(replace(packed, levels=(cut, *packed.levels[1:]))) is None
        assert engine.unpack(replace(packed, levels=packed.levels * 2)) is None

    def test_nothing_in_gives_nothing_out(self, engine: Engine) -> None:
        assert engine.encode([]) == []
        [embedding] = engine.encode([engine.prepare(picture())])
        assert engine.decode(embedding, []) == []

    def test_prompts_of_all_forms_are_answered_in_their_order_as_each_alone(
        self, engine: Engine
    ) -> None:
        [embedding] = engine.encode([engine.prepare(picture())])
        together = engine.decode(embedding, PROMPTS)
        alone = [logits for prompt in PROMPTS for logits in engine.decode(embedding, [prompt])]
        assert_close(together, alone)
        assert_close(engine.decode(embedding, PROMPTS[::-1]), together[::-1])

    def test_more_prompts_than_fit_into_one_call_are_all_answered(self, engine: Engine) -> None:
        [embedding] = engine.encode([engine.prepare(picture())])
        many = [Prompt(points=(Point(2 + index % 100, 3 + index % 70),)) for index in range(37)]
        found = engine.decode(embedding, many)
        assert_close([found[0], found[36]], engine.decode(embedding, [many[0], many[36]]))

    def test_logits_are_what_the_contract_says(self, engine: Engine) -> None:
        [embedding] = engine.encode([engine.prepare(picture())])
        for logits in engine.decode(embedding, PROMPTS):
            assert logits.pixels.dtype == np.float32
            assert logits.pixels.ndim == 2
            assert np.isfinite(logits.pixels).all()
            assert isinstance(logits.score, float)
            assert np.isfinite(logits.score)
            assert logits.frame == embedding.frame

    def test_the_same_question_gets_the_same_answer(self, engine: Engine) -> None:
        prepared = engine.prepare(picture())
        first, second = (engine.decode(engine.encode([prepared])[0], PROMPTS) for _ in range(2))
        assert_close(first, second, tolerance=0)

    def test_a_prompt_without_point_and_box_is_refused_with_its_place(self, engine: Engine) -> None:
        [embedding] = engine.encode([engine.prepare(picture())])
        with pytest.raises(PromptError, match=r"objects\[1\]"):
            engine.decode(embedding, [CLICK, Prompt()])

    def test_candidates_reach_both_thresholds_and_with_none_every_point_has_some(
        self, engine: Engine
    ) -> None:
        [embedding] = engine.encode([engine.prepare(picture())])
        points = [(20.0 + 3 * index, 15.0 + 2 * index) for index in range(21)]
        found = engine.candidates(embedding, points, iou=0, stability=0)
        assert 0 < len(found) <= 3 * len(points)
        for candidate in found:
            assert candidate.frame == embedding.frame
            assert candidate.size == embedding.frame.size
            assert 0 <= candidate.stability <= 1 + 1e-6
            assert isinstance(candidate.score, float)
            assert candidate.edge.dtype == np.float32
            box = candidate.box
            assert 0 <= box.x0 < box.x1 <= 120
            assert 0 <= box.y0 < box.y1 <= 80
        for name, option in (("score", "iou"), ("stability", "stability")):
            values = np.sort(
                [value for c in found if (value := getattr(c, name)) > 0] or [0.0, 0.0]
            )
            place = int(np.argmax(np.diff(values)))  # a threshold far from all values
            least = float(values[place : place + 2].mean())
            best = engine.candidates(
                embedding, points, **{"iou": 0.0, "stability": 0.0, option: least}
            )
            expected = [c for c in found if not least or getattr(c, name) >= least]
            assert [c.score for c in best] == pytest.approx([c.score for c in expected], abs=1e-5)
            assert [c.stability for c in best] == pytest.approx(
                [c.stability for c in expected], abs=1e-5
            )

    def test_no_points_have_no_candidates(self, engine: Engine) -> None:
        [embedding] = engine.encode([engine.prepare(picture())])
        assert engine.candidates(embedding, [], iou=0, stability=0) == []
