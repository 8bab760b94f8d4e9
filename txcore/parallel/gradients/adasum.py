"""Adasum: a sum of gradients that averages what they agree on and adds what they do not."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore.collectives import _leaves, all_gather, axis_index, axis_size, pmean, ppermute
from txcore.kernels.common import checks
from txcore.parallel.gradients.algorithms import is_power_of_two


def adasum(tree: Any, axis: str | tuple[str, ...], *, name: str = "grads") -> Any:
    """Combine the devices' gradients in pairs, then the pairs, until there is one.

    Equation: `(1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b` of each pair, for each leaf by itself:
    a + b where they are orthogonal, their mean where they are equal. Device i is joined with i + 1,
    i + 2, i + 4, ... in groups of 2, 4, 8, ... It is not linear, and so has no transpose.

    Each joining halves the vector that a device works on (recursive halving by `ppermute`, the
    products of the parts by an all_gather of three numbers a leaf), and an all_gather makes it
    whole: of N devices and S bytes each sends 2 (N - 1) / N S.

    Args:
      tree: pytree of gradients, local to each device; floating point.
      axis: the data axes, of a power of two devices.
      name: label of the operations' tags.

    Returns:
      The combined gradients in their dtypes, the same on every device; computed in float32 or
      wider.

    Raises:
      ValueError: the devices are no power of two.
      TypeError: a leaf is not floating-point.

    Example:
      >>> from txcore.parallel.gradients.adasum import adasum
      >>> def f(x):
      ...     return adasum(x[0], "data")
      >>> x = np.array([[3.0, 0.0], [0.0, 4.0]])
      >>> tx.testing.run_sharded(f, x, axes={"data": 2}, out_specs=P())
      array([3., 4.], dtype=float32)

    References:
      Maleki et al., "Scaling distributed training with adaptive summation", 2020, equation 7 and
      algorithm 1.
    """
    axes = _leaves.check_axes("adasum", axis)
    devices = axis_size(axes)
    if not is_power_of_two(devices):
        raise ValueError(
            f"adasum needs 1, 2, 4, 8, ... devices over {_leaves.names_of(axes)}, got {devices}: "
            "take a power of two, or their mean"
        )
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"adasum needs floating-point gradients, got {jnp.result_type(leaf)} at "
                f"{jax.tree_util.keystr(path) or 'the tree'}"
            )
    leaves = jax.tree.leaves(tree)
    if devices == 1 or not leaves:
        return pmean(tree, axes, name=name)
    combined: list[Any] = list(leaves)
    for dtype in dict.fromkeys(checks.accumulator_of(leaf) for leaf in leaves):
        places = [i for i, leaf in enumerate(leaves) if checks.accumulator_of(leaf) == dtype]
        done = _combine_leaves([leaves[i] for i in places], axes, devices, dtype, name)
        for i, leaf in zip(places, done, strict=True):
            combined[i] = leaf
    return jax.tree.unflatten(jax.tree.structure(tree), combined)


def packed_columns(shapes: list[tuple[int, ...]], devices: int) -> list[int]:
    """Return how many columns each leaf takes in a matrix of a row for each device, padded."""
    return [-(-math.prod(shape) // devices) for shape in shapes]


def _combine_leaves(
    leaves: list[Any], axes: tuple[str, ...], devices: int, dtype: Any, name: str
) -> list[Any]:
    columns = packed_columns([x.shape for x in leaves], devices)
    pairs = zip(leaves, columns, strict=True)
    own = jnp.concatenate([_as_rows(x, devices, n, dtype) for x, n in pairs], axis=1)
    index, distance = axis_index(axes), 1
    while distance < devices:
        own = _join_pairs(own, columns, index, distance, axes, name)
        distance *= 2
    whole = all_gather(own, axes, invariant=True, name=name)
    # A device halves by its lowest bit first, which so is the highest of the row that it ends with.
    bits = devices.bit_length() - 1
    order = [int(f"{row:0{bits}b}"[::-1], 2) for row in range(devices)]
    rows = jnp.split(whole[np.array(order)], np.cumsum(columns)[:-1], axis=1)
    return [
        jnp.ravel(row)[: x.size].reshape(x.shape).astype(x.dtype)
        for row, x in zip(rows, leaves, strict=True)
    ]


def _as_rows(x: jax.Array, devices: int, columns: int, dtype: Any) -> jax.Array:
    flat = jnp.pad(jnp.ravel(x).astype(dtype), (0, devices * columns - x.size))
    return flat.reshape(devices, columns)


def _join_pairs(
    own: jax.Array,
    columns: list[int],
    index: jax.Array,
    distance: int,
    axes: tuple[str, ...],
    name: str,
) -> jax.Array:
    """Return this device's half of what it and the device at a distance have together."""
    devices, half = axis_size(axes), own.shape[0] // 2
    is_upper = (index // distance) % 2 == 1
    first, second = own[:half], own[half:]
    kept, sent = jnp.where(is_upper, second, first), jnp.where(is_upper, first, second)
    pairs = [(i, i ^ distance) for i in range(devices)]
    received = ppermute(sent, axes, pairs, name=name)
    # The lower one's vector is a on both, so that both compute the same.
    a, b = jnp.where(is_upper, received, kept), jnp.where(is_upper, kept, received)
    ends = np.cumsum(columns)[:-1]
    parts = [
        jnp.stack([jnp.sum(part) for part in jnp.split(product, ends, axis=1)])
        for product in (a * a, a * b, b * b)
    ]
    # Of each of the group's devices the products of its half; added up in the same order on all.
    products = all_gather(jnp.stack(parts)[None], axes, name=f"{name}.products")
    groups = products.reshape(-1, 2 * distance, *products.shape[1:]).sum(1)
    aa, ab, bb = groups[index // (2 * distance)]
    of_a, of_b = _weigh_gradient(ab, aa), _weigh_gradient(ab, bb)
    halves = zip(jnp.split(a, ends, axis=1), jnp.split(b, ends, axis=1), strict=True)
    joined = [of_a[i] * one + of_b[i] * other for i, (one, other) in enumerate(halves)]
    return jnp.concatenate(joined, axis=1)


def _weigh_gradient(ab: jax.Array, squared: jax.Array) -> jax.Array:
    """Return 1 - a.b / 2|a|^2, 1 of a gradient of zeros."""
    none = squared == 0
    return 1 - jnp.where(none, 0, ab / (2 * jnp.where(none, 1, squared)))
