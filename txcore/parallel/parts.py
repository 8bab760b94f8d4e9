"""This device's part of an array, and arrays typed as they were."""

import jax
from jax import lax

from txcore import _compat, varying
from txcore.collectives import axis_index, axis_size
from txcore.layout import Split


def take_part(x: jax.Array, split: Split) -> jax.Array:
    """Return this device's part of an array that is whole."""
    dim, axes = split
    length = x.shape[dim] // axis_size(axes)
    return lax.dynamic_slice_in_dim(x, axis_index(axes) * length, length, dim)


def typed_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """Return an array typed as varying along the axes of another alone.

    What a barrier returns is typed alike by jax 0.10, whatever went in.
    """
    added = _compat.varying_axes(x) - _compat.varying_axes(like)
    return varying.claim(x, "", (), drop=added) if added else x
