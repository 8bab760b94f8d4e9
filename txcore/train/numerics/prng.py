"""Random keys that depend on the seed, the step and the example alone."""

from typing import Any

import jax
import jax.numpy as jnp

from txcore.collectives import _leaves, axis_index

# No example has this place: fold_in takes the uint32, and places count up from 0 as int32.
_DEVICES = 2**32 - 1


def step_key(seed: jax.Array, step: jax.Array) -> jax.Array:
    """Return the key of one step; `seed` is a uint32 scalar, `step` an int32 scalar.

    It is threefry's, whatever `jax_default_prng_impl` says: the bits that jax's "unsafe_rbg" draws
    for many keys at once depend on how many there are, and so on the number of devices.
    """
    return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)


def check_whole_batch(batch: Any, examples: int) -> None:
    """Refuse a part of a device's batch, whose keys would be those of its first examples."""
    sizes = [leaf.shape[:1] for leaf in jax.tree.leaves(batch)]
    if (examples,) not in sizes:
        raise ValueError(
            f"state.example_keys needs the whole batch of this device, {examples} "
            f"examples, got leading dims {sizes}: make the keys before splitting the batch "
            "into microbatches, and split them with it"
        )


def example_keys(key: jax.Array, count: int, row_axes: tuple[str, ...]) -> jax.Array:
    """Return a key for each of this device's `count` examples, shape (count,).

    Each is keyed by the example's index in the global batch, so that dropout drops the same
    units on any number of devices.
    """
    # Inside a step the axes are those with more than one device; without any, all is local.
    first = axis_index(row_axes) * count if row_axes else jnp.int32(0)
    places = first + jnp.arange(count, dtype=jnp.int32)
    data = _leaves.vary_leaf(jax.random.key_data(key), row_axes)
    key = jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, places)


def device_key(key: jax.Array, data_axes: tuple[str, ...]) -> jax.Array:
    """Return a key that differs on each data shard, and from the keys of all examples."""
    shard = axis_index(data_axes) if data_axes else jnp.int32(0)
    return jax.random.fold_in(jax.random.fold_in(key, _DEVICES), shard)
