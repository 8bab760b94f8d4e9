"""all_gather: concatenate the shards of all devices along an axis."""

from typing import Any

import jax
from jax import lax

from txcore import _compat
from txcore.collectives import _leaves
from txcore.collectives._algorithms import Algorithm, check_algorithm, check_ring_leaf
from txcore.collectives._calls import explain_calls
from txcore.collectives._leaves import Leaf
from txcore.kernels.ring import ring_all_gather


@explain_calls
def all_gather(
    x: Any,
    axis: str | tuple[str, ...],
    *,
    dim: int = 0,
    invariant: bool = False,
    algorithm: Algorithm | None = None,
    name: str | None = None,
) -> Any:
    """Concatenate the shards of all devices along `axis`, on every device.

    Equation: `y[i] = concatenate([x[0], ..., x[n-1]], dim)`.

    Transpose: `reduce_scatter` over the same axis and dim. With `invariant=True` the
    result's cotangent is the same on every device, and the transpose only slices it: no
    collective in the backward pass. With check_vma=False there is no such type, and the
    transpose is `reduce_scatter` again: a factor of the axis size for a gradient taken inside.

    Args:
      x: pytree of arrays, each with at least one dim.
      axis: mesh axis name, or a tuple of names, gathered in row-major order.
      dim: the array dim to concatenate along.
      invariant: type the result as invariant along `axis`, so that it can leave a
        `shard_map` through `P()`. Reducing it again is then refused.
      algorithm: None for XLA's own; "remote_dma" for Pallas kernels, over one axis, of float32,
        bfloat16 or int32: a ring of TPUs by remote DMA, or the switch of a node of GPUs.
      name: label of the operation's tag; letters, digits and `_ . / -`.

    Returns:
      The gathered arrays; `dim` is longer by the axis size.

    Raises:
      ValueError: a leaf does not have `dim`.
      TypeError: a leaf is no array.
      NameError: `axis` is not bound here.
      NotImplementedError: `algorithm="remote_dma"` on a device that has no such kernels.

    Example:
      >>> def f(x):
      ...     return tx.all_gather(x, "data", invariant=True)
      >>> tx.testing.run_sharded(f, np.arange(4.0), axes={"data": 4}, out_specs=P())
      array([0., 1., 2., 3.], dtype=float32)
    """
    axes = _leaves.check_axes("all_gather", axis)
    check_algorithm("all_gather", algorithm)

    def gather_leaf(leaf: Leaf) -> jax.Array:
        at = _leaves.check_dim("all_gather", "dim", dim, leaf)
        _leaves.refuse_unreduced("all_gather", leaf, axes)
        value, kept = _leaves.moved_axes("all_gather", leaf, axes)
        if algorithm and kept:
            ring = check_ring_leaf("all_gather", leaf, kept)
            whole = ring_all_gather(value, ring, dim=at, invariant=invariant)
            lone = tuple(a for a in axes if a not in kept) if invariant else ()
            return _gather_invariant(whole, lone, at)
        if invariant:
            return _gather_invariant(leaf.value, axes, at)
        return lax.all_gather(value, kept, axis=at, tiled=True) if kept else value

    return _leaves.map_leaves("all_gather", x, gather_leaf, name=name, verb="gather")


def _gather_invariant(x: jax.Array, axes: tuple[str, ...], dim: int) -> jax.Array:
    # An axis of size 1 along which x varies stays in: only a gather makes it invariant.
    kept = tuple(a for a in axes if _compat.axis_size(a) != 1 or _leaves.varies_along(x, a))
    if not kept:
        return x
    x = _leaves.vary_leaf(x, kept)
    return _compat.all_gather_invariant(x, kept, dim)
