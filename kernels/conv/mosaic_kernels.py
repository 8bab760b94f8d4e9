"""The convolution's three Pallas kernels for TPUs, over strips of pooling windows.

A program sees some images whole: (height, width * channels, images), the images in the lanes. It
copies them into zeros that stand for what lies outside. What a strip reads is then a slice of some
rows, which is copied to one matrix, the patch. The filters at all their places in the patch are the
other factor. So all outputs of a pooling window come from one product, and lie in registers when
they are compared.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore.kernels.conv.pallas_kernels import choose_maximum
from txcore.kernels.conv.strips import Strips


def forward(*refs: Any, strips: Strips) -> None:
    """Compute the results, and which element of each pooling window they came from.

    Args:
      *refs: images, placed filters and bias; the result and, with a pool or ReLU, the choice
        (`choose_maximum`); the padded images, and a patch.
      strips: the convolution.
    """
    x_ref, filters_ref, bias_ref, *out_refs, padded_ref, patch_ref = refs
    geometry, rows = strips.geometry, strips.windows * strips.features

    def compute_strip(row: Any, strip: Any) -> None:
        _load_patch(padded_ref, patch_ref, row, strip, strips)
        products = _multiply(filters_ref[...], patch_ref[...], (1, 0), strips)
        sums = [products[i * rows :][:rows] for i in range(geometry.pool**2)]
        found = choose_maximum(tuple(sums), bias_ref[...], geometry.relu)
        for ref, values in zip(out_refs, found, strict=False):
            for window in range(strips.windows):
                part = values[window * strips.features :][: geometry.features]
                ref[row, strip * strips.windows + window] = part.astype(ref.dtype)

    _pad_images(x_ref, padded_ref, strips)
    _clear(patch_ref)
    _for_each_strip(compute_strip, strips)


def data_gradient(*refs: Any, strips: Strips) -> None:
    """Compute the images' gradient: each strip adds to all that it read.

    Args:
      *refs: the placed filters' transpose, the cotangent and the choice (where there is one); the
        gradient; the sums over padded images, and a strip's cotangent.
      strips: the convolution.
    """
    filters_ref, g_ref, *choice_ref, dx_ref, sums_ref, strip_ref = refs
    top, inside = strips.geometry.padding_before[0], _columns_inside(strips)

    def add_strip(row: Any, strip: Any) -> None:
        _load_cotangent(g_ref, choice_ref, strip_ref, row, strip, strips)
        patch = _multiply(filters_ref[...], strip_ref[...], (1, 0), strips)
        for part, at in _rows_of_patch(row, strip, strips):
            sums_ref[at] = sums_ref[at] + patch[part]

    def write_row(row: Any, carry: None) -> None:
        dx_ref[row] = sums_ref[row + top, inside].astype(dx_ref.dtype)

    _clear_rows(sums_ref)
    _clear(strip_ref)
    _for_each_strip(add_strip, strips)
    lax.fori_loop(0, strips.geometry.height, write_row, None)


def filter_gradient(*refs: Any, strips: Strips) -> None:
    """Add up the gradient of the placed filters, one block of images after the other.

    Args:
      *refs: images, cotangent and choice (where there is one); the sums, and the cotangents' own
        for the bias; the padded images, a patch, and a strip's cotangent.
      strips: the convolution.
    """
    from jax.experimental import pallas as pl

    x_ref, g_ref, *choice_ref, sums_ref, bias_ref, padded_ref, patch_ref, strip_ref = refs
    block, batch = pl.program_id(0), strips.geometry.batch

    def keep_images(array: jax.Array) -> jax.Array:
        """Return zeros for what the last block holds behind the batch."""
        if batch % strips.images == 0:
            return array
        image = block * strips.images + lax.broadcasted_iota(jnp.int32, array.shape, 1)
        return jnp.where(image < batch, array, jnp.zeros_like(array))

    def add_strip(row: Any, strip: Any) -> None:
        _load_patch(padded_ref, patch_ref, row, strip, strips)
        _load_cotangent(g_ref, choice_ref, strip_ref, row, strip, strips)
        g = keep_images(strip_ref[...])
        bias_ref[...] += g
        sums_ref[...] += _multiply(g, keep_images(patch_ref[...]), (1, 1), strips)

    @pl.when(block == 0)
    def _() -> None:
        _clear(sums_ref)
        _clear(bias_ref)

    _pad_images(x_ref, padded_ref, strips)
    _clear(patch_ref)
    _clear(strip_ref)
    _for_each_strip(add_strip, strips)


def _clear(ref: Any) -> None:
    ref[...] = jnp.zeros(ref.shape, ref.dtype)


def _clear_rows(ref: Any) -> None:
    lax.fori_loop(0, ref.shape[0], lambda row, _: _clear(ref.at[row]), None)


def _for_each_strip(compute: Callable[[Any, Any], None], strips: Strips) -> None:
    """Call a function with the row and the number of each strip of the images."""
    height, width = strips.geometry.pooled_size

    def compute_row(row: Any, carry: None) -> None:
        lax.fori_loop(0, width // strips.windows, lambda strip, _: compute(row, strip), None)

    lax.fori_loop(0, height, compute_row, None)


def _columns_inside(strips: Strips) -> slice:
    """Return where a row of an image lies in a padded one."""
    geometry = strips.geometry
    first = geometry.padding_before[1] * geometry.channels
    return slice(first, first + geometry.width * geometry.channels)


def _pad_images(x_ref: Any, padded_ref: Any, strips: Strips) -> None:
    top, inside = strips.geometry.padding_before[0], _columns_inside(strips)

    def copy_row(row: Any, carry: None) -> None:
        padded_ref[row + top, inside] = x_ref[row].astype(padded_ref.dtype)

    _clear_rows(padded_ref)
    lax.fori_loop(0, strips.geometry.height, copy_row, None)


def _rows_of_patch(row: Any, strip: Any, strips: Strips) -> Iterator[tuple[slice, Any]]:
    """Yield where each row of a strip's patch lies in the patch, and in the padded images."""
    from jax.experimental import pallas as pl

    geometry = strips.geometry
    height, width = strips.patch_size
    length, step = width * geometry.channels, strips.windows * geometry.pool * geometry.channels
    columns = pl.ds(pl.multiple_of(strip * step, step), length)
    for i in range(height):
        yield slice(i * length, (i + 1) * length), (row * geometry.pool + i, columns)


def _load_patch(padded_ref: Any, patch_ref: Any, row: Any, strip: Any, strips: Strips) -> None:
    for part, at in _rows_of_patch(row, strip, strips):
        patch_ref[part] = padded_ref[at]


def _load_cotangent(
    g_ref: Any, choice_ref: list[Any], strip_ref: Any, row: Any, strip: Any, strips: Strips
) -> None:
    """Copy a strip's cotangent before pooling and ReLU: zero where another place was chosen."""
    for window in range(strips.windows):
        at = row, strip * strips.windows + window
        g = g_ref[at].astype(strip_ref.dtype)
        choice = choice_ref[0][at].astype(jnp.int32) if choice_ref else None
        for corner in range(strips.geometry.pool**2):
            passed = g if choice is None else jnp.where(choice == corner, g, jnp.zeros_like(g))
            place = (corner * strips.windows + window) * strips.features
            strip_ref[place : place + strips.geometry.features] = passed


def _multiply(
    left: jax.Array, right: jax.Array, dims: tuple[int, int], strips: Strips
) -> jax.Array:
    """Multiply in the convolution's dtype, contracting these dims; the sums are wide."""
    dtype, (of_left, of_right) = strips.geometry.dtype, dims
    return lax.dot_general(
        left.astype(dtype),
        right.astype(dtype),
        (((of_left,), (of_right,)), ((), ())),
        precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        preferred_element_type=strips.geometry.accumulator,
    )
