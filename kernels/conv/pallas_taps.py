"""The convolution of few input channels in Pallas kernels: sums over taps, no matrix product.

Each element of a patch is multiplied by the weights of all features: an outer product, too thin
for a matrix unit. A program holds the sums of all corners of its pooling windows in registers, and
loads an element once for all the corners that it belongs to. Float32 is computed in float32.
"""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore.kernels.common import pallas_masked as masked
from txcore.kernels.conv.geometry import Blocks, Geometry, lies_within, split_index
from txcore.kernels.conv.pallas_kernels import choose_maximum

LARGEST_PATCH = 32  # filter elements of one feature: more do not fit into a program's registers


def forward(*refs: Any, geometry: Geometry, blocks: Blocks) -> None:
    """Compute a block of the result, and which element of each pooling window it came from.

    Args:
      *refs: flat images, filter and bias; the result, shape (windows * features,); and, with a
        pool or ReLU, the choice in the same shape.
      geometry: the convolution.
      blocks: the block's size.
    """
    from jax.experimental import pallas as pl

    x_ref, w_ref, b_ref, *out_refs = refs
    window = masked.count_from(pl.program_id(0) * blocks.pixels, blocks.pixels)[:, None]
    feature = masked.count_from(pl.program_id(1) * blocks.channels, blocks.channels)[None, :]
    real, present = window < geometry.window_count, feature < geometry.features
    place = split_index(window, *geometry.pooled_size)
    corners = list(product(range(geometry.pool), repeat=2))
    wide = geometry.accumulator

    def add_row(row: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        more = list(sums)
        for column, channel in _row_of_patch(geometry):
            x = _load_element(x_ref, geometry, place, (row, column, channel), real)
            for number, (i, j) in enumerate(corners):
                if 0 <= column - j < geometry.columns:
                    tap = ((row - i) * geometry.columns + column - j) * geometry.channels + channel
                    meets = (row >= i) & (row - i < geometry.rows)
                    weights = masked.load(w_ref, tap * geometry.features + feature, present & meets)
                    # A weight of 0 is not enough: 0 times a NaN outside of the filter is NaN.
                    more[number] += jnp.where(meets, x, 0) * weights.astype(wide)
        return tuple(more)

    zero = jnp.zeros((blocks.pixels, blocks.channels), wide)
    # A loop over the patch's rows: unrolled, it takes the compiler half a minute.
    sums = lax.fori_loop(0, geometry.rows + geometry.pool - 1, add_row, (zero,) * len(corners))
    bias = masked.load(b_ref, feature, present).astype(wide)
    results = choose_maximum(sums, bias, geometry.relu)
    for ref, result in zip(out_refs, results, strict=False):
        masked.store(ref, window * geometry.features + feature, result, real & present)


def filter_gradient(*refs: Any, geometry: Geometry, blocks: Blocks, steps: int) -> None:
    """Add up the gradients of one row of the filter, and of the bias, over some of the windows.

    Args:
      *refs: the flat images, cotangent and choice (where there is one); the sums, shape
        (splits * rows * (columns * channels + 1) * features,), the bias's after each row's.
      geometry: the convolution.
      blocks: the block's size.
      steps: how many blocks of windows each split adds up.
    """
    from jax.experimental import pallas as pl

    x_ref, g_ref, *choice_ref, sums_ref = refs
    part, filter_row, count = pl.program_id(0), pl.program_id(1), blocks.windows
    feature = masked.count_from(pl.program_id(2) * blocks.channels, blocks.channels)[None, :]
    present = feature < geometry.features
    corners = list(product(range(geometry.pool), repeat=2))

    def add_windows(index: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        window = masked.count_from((part * steps + index) * count, count)[:, None]
        real = window < geometry.window_count
        at = window * geometry.features + feature
        g = masked.load(g_ref, at, real & present).astype(geometry.accumulator)
        passed = [g] * len(corners)
        if choice_ref:
            choice = masked.load(choice_ref[0], at, real & present, -1).astype(jnp.int32)
            passed = [jnp.where(choice == number, g, 0) for number in range(len(corners))]
        place, more = split_index(window, *geometry.pooled_size), list(sums)
        for i in range(geometry.pool):
            for column, channel in _row_of_patch(geometry):
                x = _load_element(x_ref, geometry, place, (filter_row + i, column, channel), real)
                for j in range(geometry.pool):
                    if 0 <= column - j < geometry.columns:
                        tap = (column - j) * geometry.channels + channel
                        more[tap] += x * passed[i * geometry.pool + j]
        more[-1] += sum(passed[1:], passed[0])
        return tuple(more)

    taps = geometry.columns * geometry.channels
    zero = jnp.zeros((count, blocks.channels), geometry.accumulator)
    sums = lax.fori_loop(0, steps, add_windows, (zero,) * (taps + 1))
    feature, present = feature[0], present[0]
    first = (part * geometry.rows + filter_row) * (taps + 1)
    for tap, total in enumerate(sums):
        place = (first + tap) * geometry.features + feature
        masked.store(sums_ref, place, jnp.sum(total, 0), present)


def _row_of_patch(geometry: Geometry) -> list[tuple[int, int]]:
    """List the elements (column, channel) in one row of the patch that a pooling window reads."""
    return list(product(range(geometry.columns + geometry.pool - 1), range(geometry.channels)))


def _load_element(
    x_ref: Any, geometry: Geometry, place: Any, element: tuple[Any, int, int], real: jax.Array
) -> jax.Array:
    """Load one element of every window's patch, shape (windows, 1); zero outside of its image."""
    image, row, column = place
    row = row * geometry.pool + (element[0] - geometry.padding_before[0])
    column = column * geometry.pool + (element[1] - geometry.padding_before[1])
    inside = real & lies_within(row, column, geometry.height, geometry.width)
    pixel = (image * geometry.height + row) * geometry.width + column
    x = masked.load(x_ref, pixel * geometry.channels + element[2], inside)
    return x.astype(geometry.accumulator)
