"""reduce_scatter: sum over devices, each keeps one shard of the sum."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from txcore import _compat, varying
from txcore.collectives import _leaves
from txcore.collectives._algorithms import Algorithm, check_algorithm, check_ring_leaf
from txcore.collectives._calls import explain_calls
from txcore.collectives._leaves import Leaf
from txcore.kernels.ring import ring_reduce_scatter


@explain_calls
def reduce_scatter(
    x: Any,
    axis: str | tuple[str, ...],
    *,
    dim: int = 0,
    mean: bool = False,
    algorithm: Algorithm | None = None,
    name: str | None = None,
) -> Any:
    """Sum `x` over all devices along `axis` and keep this device's shard of the sum.

    Equation: `y[i] = split(sum_j x[j], n, dim)[i]`: `psum`, then a slice, at the price of
    half a psum. The result varies along `axis`. Also named `psum_scatter`.

    Transpose: `all_gather` over the same axis and dim (divided by the size if `mean`).

    Args:
      x: pytree of numeric arrays, each varying along `axis`; `dim` divisible by the size.
      axis: mesh axis name, or a tuple of names, scattered in row-major order.
      dim: the array dim to scatter.
      mean: divide by the axis size; integers become floating point, and the sum does not
        overflow, as for `pmean`.
      algorithm: None for XLA's own; "remote_dma" for Pallas kernels, over one axis, of float32,
        bfloat16 or int32: a ring of TPUs by remote DMA, or the switch of a node of GPUs.
      name: label of the operation's tag; letters, digits and `_ . / -`.

    Returns:
      This device's shards; `dim` is shorter by the axis size. Bool counts as int32.

    Raises:
      ValueError: a leaf does not vary along `axis`, lacks `dim`, or its dim is indivisible.
      TypeError: a leaf is a Python number or no array.
      NameError: `axis` is not bound here.
      NotImplementedError: `algorithm="remote_dma"` on a device that has no such kernels.

    Example:
      >>> def f(x):
      ...     return tx.reduce_scatter(x, "data")
      >>> x = np.arange(8.0)  # device 0 holds 0..3, device 1 holds 4..7
      >>> tx.testing.run_sharded(f, x, axes={"data": 2}, out_specs=P("data"))
      array([ 4.,  6.,  8., 10.], dtype=float32)
    """
    axes = _leaves.check_axes("reduce_scatter", axis)
    check_algorithm("reduce_scatter", algorithm)

    def scatter_leaf(leaf: Leaf) -> jax.Array:
        at = _leaves.check_dim("reduce_scatter", "dim", dim, leaf)
        _leaves.check_divisible("reduce_scatter", "dim", at, leaf, axes)
        leaf = _leaves.claim_differing("reduce_scatter", leaf, axes, mean=mean)
        kept = _leaves.reduced_axes("reduce_scatter", leaf, axes, mean=mean)
        parts = _compat.unreduced_axes(leaf.value)
        kept = tuple(a for a in kept if _compat.axis_size(a) != 1 or a in parts)
        value = _leaves.in_one_state(leaf.value, kept)

        def add_over_devices(value: jax.Array) -> jax.Array:
            if value.dtype == jnp.bool_:
                value = value.astype(jnp.int32)
            if not kept:
                return value
            if algorithm:
                ring = check_ring_leaf("reduce_scatter", leaf._replace(value=value), kept)
                return ring_reduce_scatter(value, ring, dim=at)
            return lax.psum_scatter(value, kept, scatter_dimension=at, tiled=True)

        if not mean:
            return add_over_devices(value)
        part = _leaves.mean_of(value, kept, add_over_devices)
        # No reduction of jax tells that a kernel's result is one.
        return varying.claim(part, varying.MEAN_SHARD, kept) if algorithm and kept else part

    return _leaves.map_leaves("reduce_scatter", x, scatter_leaf, name=name, verb="reduce")


psum_scatter = reduce_scatter
