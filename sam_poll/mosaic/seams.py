"""Which labels on the two sides of a seam, or around a corner where four tiles meet, are one object.

Both tiles have seen the same pixels along their seam. Labels are matched by contact: the pixels of the two lines at the
seam that both views give to them. A label is joined to the one it has the longest contact with, if the two views agree
on at least half of the lesser one in a band along the seam as well.

Two tiles that meet at a corner have no seam, but both look into the two tiles between them. An object that goes on from
the one to the other is usually seen by one of those; where it is seen by none, these two views are all there is.

What can still go wrong here: two objects that one of the tiles has taken for one become one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.integer]

SAME = 0.5  # of the lesser label in the band that both views must agree on


class Joined:
    """Union-find over labels 0 … count-1; the least of a set stands for it."""

    def __init__(self, count: int) -> None:
        self._parents = np.arange(count, dtype=np.int64)

    def find(self, label: int) -> int:
        """The label that stands for the set of this one."""
        parents = self._parents
        root = label
        while parents[root] != root:
            root = int(parents[root])
        while parents[label] != root:
            parents[label], label = root, int(parents[label])
        return root

    def join(self, one: int, other: int) -> bool:
        """Make one set of two; False where they are one already."""
        a, b = self.find(one), self.find(other)
        self._parents[max(a, b)] = min(a, b)
        return a != b

    def roots(self) -> Labels:
        """For every label the one that stands for its set."""
        return np.array([self.find(label) for label in range(len(self._parents))], dtype=np.int64)


def matches(one: Numbers, other: Numbers, seam: int) -> Iterator[tuple[int, int]]:
    """Labels that are one object: two views of the same band (H×W, 0 is nothing), whose columns from `seam` on lie on
    the other side. Transpose the band of a seam that runs across."""
    lines = slice(max(0, seam - 1), seam + 1)
    contact = _shared(one[:, lines], other[:, lines])
    best: dict[tuple[bool, int], tuple[int, int]] = {}
    for (a, b), length in contact.items():
        for key, rival in (((True, a), b), ((False, b), a)):
            if key not in best or length > best[key][0]:
                best[key] = (length, rival)
    chosen = {(a, b) for a, b in contact if best[True, a][1] == b or best[False, b][1] == a}
    yield from sorted(_agreed(one, other, chosen))


def around(one: Numbers, other: Numbers) -> Iterator[tuple[int, int]]:
    """Labels that are one object: two tiles' views of the corner of a third, with the seam to the `one` on its left and
    the seam to the `other` above. A label comes out of its own tile, and goes on into the other's."""
    enters = _shared(one[:, :1], other[:, :1])
    leaves = _shared(one[:1], other[:1])
    yield from sorted(_agreed(one, other, enters.keys() & leaves.keys()))


def _agreed(one: Numbers, other: Numbers, pairs: Collection[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Those of the pairs on which the two views agree."""
    if pairs:
        shared, size_one, size_other = _shared(one, other), _sizes(one), _sizes(other)
        for a, b in pairs:
            if shared[a, b] >= SAME * min(size_one[a], size_other[b]):
                yield a, b


def _shared(one: Numbers, other: Numbers) -> dict[tuple[int, int], int]:
    """How many pixels each label has in common with each of the other view's."""
    both = (one > 0) & (other > 0)
    pairs, counts = np.unique((one[both].astype(np.int64) << 32) | other[both], return_counts=True)
    return {(pair >> 32, pair & 0xFFFFFFFF): count for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True)}


def _sizes(labels: Numbers) -> dict[int, int]:
    names, counts = np.unique(labels, return_counts=True)
    return dict(zip(names.tolist(), counts.tolist(), strict=True))
