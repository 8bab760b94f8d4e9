"""This device's part of each parameter, and the whole of them again."""

from typing import Any

import jax

from txcore.collectives import all_gather
from txcore.layout import Layout, Split, map_alike
from txcore.optim import Optimizer
from txcore.parallel.parts import take_part


def parts_to_update(params: Any, layouts: Any) -> Any:
    """Return of each parameter what this device has the gradient of, from all that it stores."""

    def take(tree: Any, split: Split) -> Any:
        return jax.tree.map(lambda x: take_part(x, split), tree)

    return map_alike(take, params, layouts, _split_for_update)


def as_stored(params: Any, layouts: Any, *, name: str = "params") -> Any:
    """Return what was updated in parts as it is stored: what is stored whole is gathered."""

    def gather(tree: Any, split: Split) -> Any:
        dim, axes = split
        return all_gather(tree, axes, dim=dim, invariant=True, name=name)

    return map_alike(gather, params, layouts, _split_for_update)


def update(
    optimizer: Optimizer,
    grads: Any,
    opt_state: Any,
    params: Any,
    layouts: Any,
    *,
    step: jax.Array,
) -> tuple[Any, Any]:
    """Update parameters of whose state this device has a part, in a shard_map of one's own.

    Args:
      optimizer: of `tx.optim`, elementwise: outside of a step a `clip_norm` refuses parts.
      grads: pytree of the averaged gradients, as `tx.sync_gradients(..., layouts=layouts)` gives
        them, or as they come through `tx.zero.gather`.
      opt_state: this device's part of it, whose leaves come in by `layout.gradient`.
      params: as stored: whole, or this device's parts.
      layouts: pytree of `txcore.layout.Layout` like them (`plan.layouts(params, mesh)`).
      step: int32 scalar, the updates so far.

    Returns:
      The new parameters, as stored, and the new opt_state. What is stored whole was gathered.

    Example:
      >>> plan = tx.Plan(data_parallel=tx.DP("data", shard="optimizer"))
      >>> layouts = plan.layouts({"w": np.zeros(4)}, tx.MeshSpec(jax.devices()[:2]))
      >>> def f(w, velocity, x):
      ...     grads = tx.grad(lambda w: jax.numpy.sum(w * x), axis="data")(w)
      ...     grads, _ = tx.sync_gradients({"w": grads}, "data", layouts=layouts)
      ...     sgd, kept = tx.optim.sgd(1.0, momentum=0.9), {"velocity": {"w": velocity}}
      ...     new, kept = tx.zero.update(sgd, grads, kept, {"w": w}, layouts, step=np.int32(0))
      ...     return new["w"]
      >>> tx.testing.run_sharded(f, np.zeros(4), np.zeros(4), np.array([1.0, 3.0]),
      ...     axes={"data": 2}, in_specs=(P(), P("data"), P("data")), out_specs=P())
      array([-2., -2., -2., -2.], dtype=float32)
    """
    parts = parts_to_update(params, layouts)
    parts, opt_state = optimizer.update(grads, opt_state, parts, step=step)
    return as_stored(parts, layouts), opt_state


def _split_for_update(layout: Layout) -> Split | None:
    return None if layout.gathered else layout.scattered
