"""Intervals, against sets of moments."""

import itertools
import random

import pytest

from txcore.profiling.trace.spans import clip, intersect, length, subtract, unite


def moments(spans):
    return {moment for start, end in spans for moment in range(start, end)}


def draw(rng):
    return [(a, a + rng.randrange(-1, 9)) for a in (rng.randrange(40) for _ in range(8))]


@pytest.mark.parametrize("seed", range(40))
def test_unions_are_those_of_sets(seed):
    rng = random.Random(seed)
    first, second = draw(rng), draw(rng)
    a, b = unite(first), unite(second)
    assert moments(a) == moments(first)
    assert length(a) == len(moments(first))
    assert all(one[1] < other[0] for one, other in itertools.pairwise(a))
    assert moments(intersect(a, b)) == moments(first) & moments(second)
    assert moments(subtract(a, b)) == moments(first) - moments(second)
    for window in first:
        assert moments(clip(a, window)) == moments(a) & moments([window])
    assert length(intersect(a, b)) + length(subtract(a, b)) == length(a)
