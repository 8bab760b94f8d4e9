"""The means of flat arrays by any algorithm, with the derivatives of the plain one."""

import functools

import jax

from txcore.collectives import pmean
from txcore.collectives._leaves import mean_dtype
from txcore.parallel.gradients.algorithms.plain import plain_blocks, plain_mean
from txcore.parallel.gradients.algorithms.record import Algorithm, Axes


def mean_flat(algorithm: Algorithm, flat: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average a flat array over axes by an algorithm; every device gets the mean.

    Equation: `pmean(flat, axes)`, up to the order of the sums and what `bf16_wire` rounds.

    Transpose: that of `pmean`, whatever the algorithm.

    Args:
      algorithm: one of `ALGORITHMS`.
      flat: shape (n,), floating point; varies along all of `axes`. float16 is summed and sent as
        float32, as by `pmean`.
      axes: mesh axes, each of them of more than one device.
      name: label of the operations' tags.

    Returns:
      Shape (n,), of the same dtype; equal along `axes`.
    """
    if not axes or not flat.size:
        return pmean(flat, axes, name=name) if axes else flat
    wide = flat.astype(mean_dtype(flat.dtype))
    return _mean_flat(wide, algorithm, axes, name).astype(flat.dtype)


def mean_blocks(algorithm: Algorithm, blocks: jax.Array, axes: Axes, name: str) -> jax.Array:
    """Average blocks over axes by an algorithm; each device gets the mean of its own block.

    Equation: `reduce_scatter(blocks, axes, mean=True)[0]`. Transpose: that of `reduce_scatter`.

    Args:
      algorithm: one of `ALGORITHMS`.
      blocks: shape (N, k), one for each device in row-major order of `axes`; varies along them.
      axes: mesh axes, each of them of more than one device.
      name: label of the operations' tags.

    Returns:
      Shape (k,), of the same dtype.
    """
    if not axes or not blocks.size:
        return plain_blocks(blocks, axes, name) if axes else blocks[0]
    wide = blocks.astype(mean_dtype(blocks.dtype))
    return _mean_blocks(wide, algorithm, axes, name).astype(blocks.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _mean_flat(flat: jax.Array, algorithm: Algorithm, axes: Axes, name: str) -> jax.Array:
    return algorithm.mean_flat(flat, axes, name)


@_mean_flat.defjvp
def _mean_flat_jvp(
    algorithm: Algorithm,
    axes: Axes,
    name: str,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    tangent = plain_mean(*tangents, axes, f"{name}/tangent")
    return _mean_flat(*primals, algorithm, axes, name), tangent


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _mean_blocks(blocks: jax.Array, algorithm: Algorithm, axes: Axes, name: str) -> jax.Array:
    return algorithm.mean_blocks(blocks, axes, name)


@_mean_blocks.defjvp
def _mean_blocks_jvp(
    algorithm: Algorithm,
    axes: Axes,
    name: str,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    tangent = plain_blocks(*tangents, axes, f"{name}/tangent")
    return _mean_blocks(*primals, algorithm, axes, name), tangent
