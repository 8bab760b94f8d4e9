"""Draw operands whose results NumPy can compute, and count wrong elements."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from txcore.bench.operations import Segment

# Operands repeat after a prime number of elements, which is the length of no collective's block.
_PERIOD = 8191
_PIECE = _PERIOD * 128  # elements that are compared at once
_TOP = 5  # values are 0 to 4: sums of a few dozen are exact in every dtype

# The operand of a device by its position in the mesh: (position, start, stop) -> values.
Draw = Callable[[int, int, int], np.ndarray]


def draw_operand(seed: int) -> Draw:
    """Return a function that draws any piece of any device's operand, the same on all ranks.

    Example:
      >>> draw = draw_operand(0)
      >>> bool((draw(1, 3, 6) == draw(1, 0, 6)[3:]).all())
      True
    """

    @functools.cache
    def period(position: int) -> np.ndarray:
        return np.random.default_rng((seed, position)).integers(0, _TOP, _PERIOD, dtype=np.int8)

    def draw(position: int, start: int, stop: int) -> np.ndarray:
        return np.resize(np.roll(period(position), -(start % _PERIOD)), stop - start)

    return draw


def count_wrong(
    result: np.ndarray,
    segments: Sequence[Segment],
    group: Sequence[int],
    draw: Draw,
    *,
    epsilon: float,
) -> int:
    """Count the elements of a device's result that differ from NumPy's.

    Integers wrap around as NumPy's do. A float may differ from the float64 value by the rounding
    of its sums: `epsilon` of the value for each member.

    Args:
      result: that of one device, flat.
      segments: what the result has to be, in order.
      group: position in the mesh of each member of the device's group.
      draw: the function that draws the operands.
      epsilon: of the dtype in which the collective computes and sends; unused for integers.
    """
    wanted = sum(segment.length for segment in segments)
    wrong = abs(result.size - wanted)
    for values, found in _walk_pieces(result[:wanted], segments, group, draw):
        wrong += int(np.count_nonzero(_find_differences(found, values, epsilon * len(group))))
    return wrong


def _walk_pieces(
    result: np.ndarray, segments: Sequence[Segment], group: Sequence[int], draw: Draw
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (expected, found) for each piece of a result."""
    at = 0
    for segment in segments:
        for offset in range(0, segment.length, _PIECE):
            length = min(_PIECE, segment.length - offset)
            found = result[at + offset :][:length]
            start = segment.start + offset
            parts = [draw(group[member], start, start + length) for member in segment.members]
            yield (
                _combine_parts(parts[: len(parts)], segment.combine, result.dtype)[: found.size],
                found,
            )
        at += segment.length


def _combine_parts(parts: Sequence[np.ndarray], how: str, dtype: np.dtype) -> np.ndarray:
    if how == "max":
        return np.max(parts, axis=0)
    is_integer = jnp.issubdtype(dtype, jnp.integer)
    total = np.sum(parts, axis=0, dtype=dtype if is_integer else np.float64)
    return total / len(parts) if how == "mean" else total


def _find_differences(found: np.ndarray, values: np.ndarray, tolerance: float) -> np.ndarray:
    if jnp.issubdtype(found.dtype, jnp.integer):
        return found != values
    distance = np.abs(found.astype(np.float64) - values)
    return ~(distance <= tolerance * np.abs(values))  # a NaN is wrong, too
