"""Meshes and helpers that the tests of the audit share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from txcore import _compat, tags


def mesh_of(**axes):
    devices = np.array(jax.devices()).reshape(tuple(axes.values()))
    return Mesh(devices, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def tag(text):
    return tags.tag_scope(text)


def on(mesh, in_specs, out_specs, **options):
    """Decorate a function with shard_map."""
    return lambda f: jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)


def shape(mesh, spec, *dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))


def vary(x, *axes):
    missing = tuple(a for a in axes if a not in _compat.varying_axes(x))
    return lax.pcast(x, missing, to="varying") if missing else x


__all__ = ["P", "mesh_of", "on", "shape", "tag", "vary"]
