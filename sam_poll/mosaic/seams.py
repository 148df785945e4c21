"""Matching of labels across a seam, and around a corner where four tiles meet.

Both tiles have labelled the same pixels along their seam. Labels are matched by their contact: the
pixels of the two lines at the seam that both tiles give to them. A label is joined to the one with
which it has the longest contact, if in a band along the seam, too, the two tiles agree on at least
half of the smaller label.

Two tiles that meet at a corner only have no seam, but the windows of both extend into the two tiles
between them. An object that extends from one to the other is usually labelled by one of the tiles
between; where it is not, only the views of the two tiles show it.

Limitations: two objects that one of the tiles has labelled as one become one object.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.integer]

SAME = 0.5  # fraction of the smaller label in the band on which both tiles must agree


class LabelSets:
    """A union-find structure over the labels 0 … count-1; the smallest of a set represents it."""

    def __init__(self, count: int) -> None:
        self._parents = np.arange(count, dtype=np.int64)

    def find(self, label: int) -> int:
        """Return the label that represents the set of `label`."""
        parents = self._parents
        root = label
        while parents[root] != root:
            root = int(parents[root])
        while parents[label] != root:
            parent = int(parents[label])
            parents[label] = root
            label = parent
        return root

    def join(self, one: int, other: int) -> bool:
        """Unite the sets of two labels; return False where they are one already."""
        a, b = self.find(one), self.find(other)
        self._parents[max(a, b)] = min(a, b)
        return a != b

    def roots(self) -> Labels:
        """Return, for every label, the label that represents its set."""
        return np.array([self.find(label) for label in range(len(self._parents))], dtype=np.int64)


def matches(one: Numbers, other: Numbers, seam: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs of labels that are one object, from two tiles' labels of the same band.

    `one` and `other` are H×W, 0 is no label. The columns from `seam` on belong to the other tile.
    For a horizontal seam transpose both.
    """
    lines = slice(max(0, seam - 1), seam + 1)
    contact = _shared(one[:, lines], other[:, lines])
    # The partner with the longest contact, by (whether the label is of `one`, label).
    best: dict[tuple[bool, int], tuple[int, int]] = {}
    for (a, b), length in contact.items():
        for key, partner in (((True, a), b), ((False, b), a)):
            if key not in best or length > best[key][0]:
                best[key] = (length, partner)
    chosen = {(a, b) for a, b in contact if best[True, a][1] == b or best[False, b][1] == a}
    yield from sorted(_agreed(one, other, chosen))


def around(one: Numbers, other: Numbers) -> Iterator[tuple[int, int]]:
    """Yield the pairs of labels that are one object, from two tiles' labels of a third's corner.

    The seam to the tile of `one` is on the left of the corner, the seam to the tile of `other`
    above it. A matching label touches both seams: it enters the corner at one and leaves it at the
    other.
    """
    enters = _shared(one[:, :1], other[:, :1])
    leaves = _shared(one[:1], other[:1])
    yield from sorted(_agreed(one, other, enters.keys() & leaves.keys()))


def _agreed(
    one: Numbers, other: Numbers, pairs: Collection[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Yield the pairs that share enough pixels of the smaller label (`SAME`)."""
    if pairs:
        shared = _shared(one, other)
        size_one = _sizes(one)
        size_other = _sizes(other)
        for a, b in pairs:
            if shared[a, b] >= SAME * min(size_one[a], size_other[b]):
                yield a, b


def _shared(one: Numbers, other: Numbers) -> dict[tuple[int, int], int]:
    """Return the number of pixels that each label of `one` shares with each label of `other`."""
    both = (one > 0) & (other > 0)
    pairs, counts = np.unique((one[both].astype(np.int64) << 32) | other[both], return_counts=True)
    return {
        (pair >> 32, pair & 0xFFFFFFFF): count
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)
    }


def _sizes(labels: Numbers) -> dict[int, int]:
    """Return the number of pixels of each label."""
    values, counts = np.unique(labels, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
