"""The convolution's three Pallas kernels: implicit matrix products.

The matrix of patches is never stored. A program computes the indices of its patches' elements,
loads them from the images, and multiplies. Elements outside of an image or a block are masked, so
no operand is padded. Pallas' Triton lowering requires loads by index arrays and blocks whose sizes
are powers of two.
"""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore.kernels.common import pallas_masked as masked
from txcore.kernels.conv.geometry import Blocks, Geometry, lies_within, split_index


def forward(*refs: Any, geometry: Geometry, blocks: Blocks) -> None:
    """Compute a block of the result, and which element of each pooling window it came from.

    Args:
      *refs: flat images, filter and bias; the result, shape (windows * features,); and, with a
        pool or ReLU, the choice in the same shape (`choose_maximum`).
      geometry: the convolution.
      blocks: the block's size.
    """
    x_ref, w_ref, b_ref, out_ref, *choice_ref = refs
    window = _block_numbers(0, blocks.pixels)[:, None]
    feature = _block_numbers(1, blocks.channels)[None, :]
    image, row, column = split_index(window, *geometry.pooled_size)
    corners = [
        (image, row * geometry.pool + i, column * geometry.pool + j)
        for i, j in product(range(geometry.pool), repeat=2)
    ]
    real = window < geometry.window_count

    def add_products(index: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        depth = masked.count_from(index * blocks.depth, blocks.depth)
        inside = (depth[:, None] < geometry.depth) & (feature < geometry.features)
        weights = masked.load(w_ref, depth[:, None] * geometry.features + feature, inside)
        patches = (_load_patch(x_ref, geometry, corner, depth[None, :], real) for corner in corners)
        return tuple(
            s + _multiply_blocks(p, weights, geometry) for s, p in zip(sums, patches, strict=True)
        )

    zero = jnp.zeros((blocks.pixels, blocks.channels), geometry.accumulator)
    sums = lax.fori_loop(
        0, -(-geometry.depth // blocks.depth), add_products, (zero,) * len(corners)
    )
    bias = masked.load(b_ref, feature, feature < geometry.features).astype(zero.dtype)
    out, choice = choose_maximum(sums, bias, geometry.relu)
    inside = real & (feature < geometry.features)
    place = window * geometry.features + feature
    masked.store(out_ref, place, out, inside)
    if choice_ref:
        masked.store(choice_ref[0], place, choice, inside)


def data_gradient(*refs: Any, geometry: Geometry, blocks: Blocks) -> None:
    """Compute a block of the images' gradient: a convolution of the unpooled cotangent.

    Args:
      *refs: the flat filter, cotangent and choice (where there is one); the flat gradient.
      geometry: the convolution.
      blocks: the block's size.
    """
    w_ref, g_ref, *choice_ref, dx_ref = refs
    pixel = _block_numbers(0, blocks.pixels)[:, None]
    channel = _block_numbers(1, blocks.channels)[None, :]
    image, row, column = split_index(pixel, geometry.height, geometry.width)
    real = image < geometry.batch
    taps = geometry.rows * geometry.columns

    def add_products(index: Any, total: jax.Array) -> jax.Array:
        depth = masked.count_from(index * blocks.depth, blocks.depth)
        tap, feature = split_index(depth[:, None], geometry.features)
        inside = (tap < taps) & (channel < geometry.channels)
        place = (tap * geometry.channels + channel) * geometry.features + feature
        weights = masked.load(w_ref, place, inside)
        tap, feature = split_index(depth[None, :], geometry.features)
        i, j = split_index(tap, geometry.columns)
        source = (
            image,
            row + geometry.padding_before[0] - i,
            column + geometry.padding_before[1] - j,
        )
        g = _load_cotangent(g_ref, choice_ref, geometry, source, feature, real & (tap < taps))
        return total + _multiply_blocks(g, weights, geometry)

    zero = jnp.zeros((blocks.pixels, blocks.channels), geometry.accumulator)
    total = lax.fori_loop(0, -(-taps * geometry.features // blocks.depth), add_products, zero)
    place = pixel * geometry.channels + channel
    masked.store(dx_ref, place, total, real & (channel < geometry.channels))


def filter_gradient(*refs: Any, geometry: Geometry, blocks: Blocks, steps: int) -> None:
    """Add up a block of the filter's gradient over some of the pixels.

    Args:
      *refs: the flat images, cotangent and choice (where there is one); the sums, shape
        (splits * depth * features,).
      geometry: the convolution.
      blocks: the block's size.
      steps: how many blocks of pixels each split adds up.
    """
    from jax.experimental import pallas as pl

    x_ref, g_ref, *choice_ref, sums_ref = refs
    part, tile = pl.program_id(0), pl.program_id(1)
    tile_row, tile_column = split_index(tile, -(-geometry.features // blocks.channels))
    depth = tile_row * blocks.depth + masked.count_from(0, blocks.depth)[:, None]
    feature = tile_column * blocks.channels + masked.count_from(0, blocks.channels)[None, :]
    height, width = (size * geometry.pool for size in geometry.pooled_size)

    def add_products(index: Any, total: jax.Array) -> jax.Array:
        pixel = masked.count_from((part * steps + index) * blocks.pixels, blocks.pixels)
        places = split_index(pixel[None, :], height, width)
        patch = _load_patch(x_ref, geometry, places, depth, places[0] < geometry.batch)
        places = split_index(pixel[:, None], height, width)
        inside = (places[0] < geometry.batch) & (feature < geometry.features)
        g = _load_cotangent(g_ref, choice_ref, geometry, places, feature, inside)
        return total + _multiply_blocks(patch, g, geometry)

    zero = jnp.zeros((blocks.depth, blocks.channels), geometry.accumulator)
    total = lax.fori_loop(0, steps, add_products, zero)
    place = (part * geometry.depth + depth) * geometry.features + feature
    masked.store(sums_ref, place, total, (depth < geometry.depth) & (feature < geometry.features))


def choose_maximum(
    sums: tuple[jax.Array, ...], bias: jax.Array, relu: bool
) -> tuple[jax.Array, jax.Array]:
    """Return each window's maximum after ReLU, and which element it is: -1 where ReLU stops it.

    The gradient goes to that element: the first of equal ones, the last in a window with NaNs.
    """
    best, choice = sums[0], jnp.zeros(sums[0].shape, jnp.int32)
    for position, other in enumerate(sums[1:], 1):
        choice = jnp.where(other <= best, choice, position)
        # Not by jnp.maximum: on a GPU the maximum of a number and NaN is the number.
        best = jnp.where((other <= best) | (best != best), best, other)
    best = best + bias
    if relu:
        choice = jnp.where(best > 0, choice, -1)
        best = jnp.where(best <= 0, jnp.zeros_like(best), best)
    return best, choice


def _load_patch(x_ref: Any, geometry: Geometry, place: Any, depth: Any, real: Any) -> jax.Array:
    """Load the elements `depth` of the patches at `place`; zero outside of the image."""
    image, row, column = place
    tap, channel = split_index(depth, geometry.channels)
    i, j = split_index(tap, geometry.columns)
    row, column = row + i - geometry.padding_before[0], column + j - geometry.padding_before[1]
    inside = (
        real & (depth < geometry.depth) & lies_within(row, column, geometry.height, geometry.width)
    )
    pixel = (image * geometry.height + row) * geometry.width + column
    return masked.load(x_ref, pixel * geometry.channels + channel, inside)


def _load_cotangent(
    g_ref: Any, choice_ref: list[Any], geometry: Geometry, place: Any, feature: Any, real: Any
) -> jax.Array:
    """Load the cotangent before pooling and ReLU; zero where the forward pass chose another."""
    image, row, column = place
    (height, width), pool = geometry.pooled_size, geometry.pool
    inside = real & lies_within(row, column, height * pool, width * pool)
    row, in_row = split_index(row, pool)
    column, in_column = split_index(column, pool)
    index = ((image * height + row) * width + column) * geometry.features + feature
    if choice_ref:
        choice = masked.load(choice_ref[0], index, inside).astype(jnp.int32)
        inside = inside & (choice == in_row * pool + in_column)
    return masked.load(g_ref, index, inside)


def _multiply_blocks(left: jax.Array, right: jax.Array, geometry: Geometry) -> jax.Array:
    # HIGHEST, since a GPU would otherwise round float32 operands to the 10 bits of TF32.
    precision = lax.Precision.HIGHEST if geometry.dtype == jnp.float32 else None
    return jnp.dot(left, right, precision=precision, preferred_element_type=geometry.accumulator)


def _block_numbers(axis: int, size: int) -> jax.Array:
    """Return the numbers of this program's block along an axis of the grid."""
    from jax.experimental import pallas as pl

    return masked.count_from(pl.program_id(axis) * size, size)
