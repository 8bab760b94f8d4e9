"""psum and pmean: sum and mean over the devices of an axis."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore import _compat, varying
from txcore.collectives import _leaves
from txcore.collectives._algorithms import Algorithm, check_algorithm, check_ring_leaf
from txcore.collectives._calls import explain_calls
from txcore.collectives._leaves import Leaf
from txcore.kernels.ring import ring_all_reduce


@explain_calls
def psum(
    x: Any,
    axis: str | tuple[str, ...],
    *,
    algorithm: Algorithm | None = None,
    name: str | None = None,
) -> Any:
    """Sum `x` over all devices along `axis`; every device gets the sum (all-reduce).

    Equation: `y[i] = sum_j x[j]`. The result is invariant along `axis`.

    Transpose: with varying axes tracked (check_vma=True, the default), identity: the
    cotangent, which is invariant, is cast to varying (Megatron's g). With check_vma=False
    jax transposes psum to psum, so differentiating a summed loss inside gains a factor of
    the axis size.

    Args:
      x: pytree of numeric arrays, any shape, each varying along `axis`.
      axis: mesh axis name, or a tuple of names to sum over together.
      algorithm: None for XLA's own; "remote_dma" for Pallas kernels, over one axis, of float32,
        bfloat16 or int32: a ring of TPUs by remote DMA, or the switch of a node of GPUs.
      name: label of the operation's tag; letters, digits and `_ . / -`.

    Returns:
      The sums, with the structure, shapes and dtypes of `x` (bool counts as int32). They are
      taken in the dtype of `x`, as `jax.lax.psum` and `np.sum(x, dtype=x.dtype)` take them: an
      integer wraps around and float16 becomes inf beyond the largest; cast `x` first where a sum
      may get there. Along an axis of size 1 a value that does not vary is returned unchanged.

    Raises:
      ValueError: a leaf does not vary along `axis` (it would be multiplied by the size).
      TypeError: a leaf is a Python number or no array.
      NameError: `axis` is not bound here.
      NotImplementedError: `algorithm="remote_dma"` on a device that has no such kernels.

    Example:
      >>> def f(x):
      ...     return tx.psum(x, "data")
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 4}, out_specs=P())
      array([6.], dtype=float32)

    References:
      Shoeybi et al., Megatron-LM, 2019, section 3 (the conjugate f and g).
    """
    return _reduce_leaves("psum", x, axis, algorithm, name, mean=False)


@explain_calls
def pmean(
    x: Any,
    axis: str | tuple[str, ...],
    *,
    algorithm: Algorithm | None = None,
    name: str | None = None,
) -> Any:
    """Average `x` over all devices along `axis`; every device gets the mean (all-reduce).

    Equation: `pmean(x) = psum(x) / axis_size`. The result is invariant along `axis`. Where the
    mean can be represented, the sum does not overflow: integers are made floating point before it
    (an int32 of more than 24 bits is rounded), and float16 is summed and sent as float32, twice
    the bytes. bfloat16 has float32's range, and is sent as it is.

    Transpose: the cotangent divided by the axis size, cast to varying. With check_vma=False
    pmean itself, so a gradient taken inside gains a factor of the axis size.

    Args:
      x: pytree of numeric arrays, any shape, each varying along `axis`.
      axis: mesh axis name, or a tuple of names to average over together.
      algorithm: None for XLA's own; "remote_dma" for Pallas kernels, over one axis, of float32,
        bfloat16 or int32: a ring of TPUs by remote DMA, or the switch of a node of GPUs.
      name: label of the operation's tag; letters, digits and `_ . / -`.

    Returns:
      The means, with the structure and shapes of `x`, and its dtypes; integers become floating
      point.

    Raises:
      ValueError, TypeError, NameError, NotImplementedError: as `psum`.

    Example:
      >>> def f(x):
      ...     return tx.pmean(x, "data")
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 4}, out_specs=P())
      array([1.5], dtype=float32)
    """
    return _reduce_leaves("pmean", x, axis, algorithm, name, mean=True)


def _reduce_leaves(
    op: str,
    x: Any,
    axis: str | tuple[str, ...],
    algorithm: Algorithm | None,
    name: str | None,
    *,
    mean: bool,
) -> Any:
    axes = _leaves.check_axes(op, axis)
    check_algorithm(op, algorithm)

    def reduce_leaf(leaf: Leaf) -> jax.Array:
        leaf = _leaves.claim_differing(op, leaf, axes, mean=mean)
        kept = _leaves.reduced_axes(op, leaf, axes, mean=mean)
        if algorithm and kept:
            return _reduce_round(op, leaf, kept, mean=mean)
        if mean:
            return _leaves.mean_of(leaf.value, kept, lambda value: _psum_leaf(value, kept))
        return _psum_leaf(leaf.value, kept)

    return _leaves.map_leaves(op, x, reduce_leaf, name=name, verb="reduce")


def _psum_leaf(value: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    if value.dtype == jnp.bool_:
        value = value.astype(jnp.int32)
    return lax.psum(_leaves.in_one_state(value, axes), axes) if axes else value


def _reduce_round(op: str, leaf: Leaf, axes: tuple[str, ...], *, mean: bool) -> jax.Array:
    """Reduce a leaf round a ring by remote DMA."""
    several = tuple(a for a in axes if _compat.axis_size(a) != 1)
    lone = tuple(a for a in axes if a not in several)

    def add(value: jax.Array) -> jax.Array:
        if value.dtype == jnp.bool_:
            value = value.astype(jnp.int32)
        if several:
            ring = check_ring_leaf(op, leaf._replace(value=value), several)
            value = ring_all_reduce(value, ring)
        return _psum_leaf(value, lone)

    if not mean:
        return add(leaf.value)
    # No reduction of jax tells that a kernel's result is one.
    return varying.claim(_leaves.mean_of(leaf.value, axes, add), varying.MEAN, several)
