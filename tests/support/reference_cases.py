"""Sizes of pictures and prompts on which the engines and the official predictors are compared."""

from __future__ import annotations

from sam_poll.core.types import Box, Point, Polygon, Prompt

SIZES = [(641, 427), (427, 641), (1500, 1001), (33, 21), (640, 640), (301, 900)]


def prompts_for(size: tuple[int, int]) -> list[Prompt]:
    """Return one prompt of each form, placed by the picture's size, off the pixel grid."""
    width, height = size

    def point(x: float, y: float, label: int = 1) -> Point:
        return Point(x * width, y * height, label)

    box = Box(0.21 * width, 0.13 * height, 0.83 * width, 0.77 * height)
    return [
        Prompt(points=(point(0.5, 0.5),)),
        Prompt(points=(point(0.9, 0.2),)),
        Prompt(points=(point(0.4, 0.5), point(0.6, 0.45), point(0.1, 0.9, 0))),
        Prompt(box=box),
        Prompt(box=Box(0, 0, width, height)),
        Prompt(points=(point(0.5, 0.4), point(0.3, 0.3, 0)), box=box),
    ]


def rough_prompts_for(size: tuple[int, int]) -> list[Prompt]:
    """Return prompts with a rough shape: two that share a call, and one with points, too."""
    width, height = size

    def shape(*corners: tuple[float, float]) -> Polygon:
        return Polygon(tuple((x * width, y * height) for x, y in corners))

    box = Box(0.21 * width, 0.13 * height, 0.83 * width, 0.77 * height)
    bent = shape((0.25, 0.2), (0.8, 0.15), (0.5, 0.4), (0.75, 0.7), (0.3, 0.6))
    small = shape((0.5, 0.5), (0.7, 0.55), (0.6, 0.75))
    points = (Point(0.4 * width, 0.3 * height), Point(0.1 * width, 0.9 * height, 0))
    return [
        Prompt(box=box, shape=bent),
        Prompt(box=Box(0, 0, width, height), shape=small),
        Prompt(points=points, box=box, shape=small),
    ]
