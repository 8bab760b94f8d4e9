"""Where a state's arrays lie on the mesh, by the layouts of its parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from txcore import _compat
from txcore.kept import specs_of
from txcore.layout import axes_of, mirrored_specs, split_axes
from txcore.mesh import MeshSpec
from txcore.optim import Optimizer
from txcore.plan import DP


def state_specs(arrays: dict[str, Any], layouts: Any, kept: Any) -> dict[str, Any]:
    """Return the spec of each leaf of a state.

    Args:
      arrays: the state's fields by name, of whole arrays or shapes.
      layouts: pytree of `Layout` like its parameters.
      kept: pytree of `Kept` like its communication's state.

    Returns:
      Pytrees of PartitionSpecs by name: the parameters as stored; the optimizer's state like the
      gradients, where it mirrors the parameters; the communication's as kept; the rest whole.

    Raises:
      ValueError: as `mirrored_specs`.
    """
    params = arrays["stored_params"]
    specs = {name: jax.tree.map(lambda _: P(), tree) for name, tree in arrays.items()}
    specs["stored_params"] = jax.tree.map(lambda layout: layout.stored, layouts)
    specs["opt_state"] = mirrored_specs("state.opt_state", arrays["opt_state"], params, layouts)
    specs["comm_state"] = specs_of(kept)
    return specs


def place_leaf(leaf: Any, mesh: MeshSpec, spec: P) -> jax.Array:
    """Copy a whole array to the mesh: each device gets its part, or all of it.

    Args:
      leaf: array of the host or of the devices, the same on every process.
      mesh: the devices and their axes.
      spec: how it is to lie there.

    Returns:
      The array on the mesh, which shares no memory with `leaf`.
    """
    if _compat.is_key_array(leaf):
        data = place_leaf(jax.random.key_data(leaf), mesh, spec)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    sharding = mesh.sharding(*spec)
    host = np.asarray(leaf)
    if jax.process_count() == 1:
        # device_put may alias an array that is there already, and a step donates it.
        return jnp.array(jax.device_put(host, sharding), copy=True)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def split_as(arrays: dict[str, Any], mesh: MeshSpec, specs: dict[str, Any]) -> dict[str, Any]:
    """Return arrays that every device holds whole, of which each then holds its part alone."""

    def split(x: jax.Array, spec: P) -> jax.Array:
        return jax.device_put(x, mesh.sharding(*spec)) if axes_of(spec) else x

    return {name: jax.tree.map(split, tree, specs[name]) for name, tree in arrays.items()}


def place_shapes(arrays: dict[str, Any], mesh: MeshSpec, specs: dict[str, Any]) -> dict[str, Any]:
    """Return the shapes of a state's arrays, laid out on `mesh`, whose devices need not be here."""

    def shape(x: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh.sharding(*spec))

    return {name: jax.tree.map(shape, tree, specs[name]) for name, tree in arrays.items()}


def check_optimizer(optimizer: Optimizer, layouts: Any, dp: DP | None) -> None:
    """Refuse an optimizer that needs whole leaves, or all examples' gradients, where it lacks them.

    Raises:
      ValueError: it does.
    """
    if optimizer.per_example and dp is not None and not dp.averages_each_step:
        raise ValueError(
            f"{dp} needs an optimizer that takes one gradient a parameter, got one with "
            "per_example=True, for which a step gathers those of all examples: write "
            f"DP({dp.axis!r})"
        )
    axes = split_axes(layouts)
    if not axes or optimizer.handles_shards:
        return
    names = ", ".join(map(repr, axes))
    if optimizer.per_example:
        raise ValueError(
            f"the plan splits parameters over {names}, and an optimizer with per_example=True "
            "needs each example's gradient whole, to clip it by its norm: store the parameters "
            "whole (leave Plan(params=...) out)"
        )
    raise ValueError(
        f"the plan splits parameters over {names}, and the optimizer is not known to be right on "
        "parts: optax's norms would be those of each part by itself. Use tx.optim.sgd or adamw; "
        "tx.optim.from_optax(..., elementwise=True) or Optimizer(..., handles_shards=True) if each "
        "element's update depends on that element alone; or store the parameters whole"
    )
