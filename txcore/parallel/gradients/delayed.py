"""Gradients delayed by one step: their exchange need not wait for this step's backward pass."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from txcore.kept import Kept, as_copy, own_copy
from txcore.layout import same_structure

KEY = "delayed"  # of `state.comm_state`


def keep_delayed(params: Any, layouts: Any, axes: tuple[str, ...], copies: int) -> Any:
    """Return what is kept: the gradients of one step as each device has them, yet to be reduced.

    Args:
      params: pytree of the parameters, arrays or shapes, each of them whole.
      layouts: pytree of `Layout` like them.
      axes: the data axes of more than one device.
      copies: the devices along them.
    """

    def one(param: Any, layout: Any) -> Kept:
        shape = copies, *np.shape(param)
        return Kept(shape, jnp.result_type(param).name, P(axes or None, *layout.stored), axes)

    return jax.tree.map(one, params, layouts)


def take_delayed(grads: Any, comm_state: Any) -> tuple[Any, Any]:
    """Return the gradients of the step before, and the state that keeps these in their place.

    Args:
      grads: pytree of gradients, local to each device.
      comm_state: what the last step returned, with the gradients at `KEY`, each with a dim of 1
        in front.

    Raises:
      ValueError: it does not hold gradients like these.
    """
    before = comm_state.get(KEY) if isinstance(comm_state, dict) else None
    wanted = [(1, *np.shape(x)) for x in jax.tree.leaves(grads)]
    given = [np.shape(x) for x in jax.tree.leaves(before)]
    if not same_structure(before, grads) or given != wanted:
        raise ValueError(
            f"sync_gradients(delay=1) needs comm_state={{{KEY!r}: ...}} with the gradients of the "
            f"step before, of shapes {wanted}, got {given}: begin with zeros of these shapes, go "
            "on with the comm_state that it returns, and give it all gradients at once"
        )
    kept = jax.tree.map(lambda new, old: as_copy(jnp.asarray(new, old.dtype)), grads, before)
    return jax.tree.map(own_copy, before), {**comm_state, KEY: kept}


def keep_newest(comm_state: Any, newest: Any) -> Any:
    """Return a state of an undone step with the gradients that the step made.

    What made it to be undone are those of the step before: kept, they would undo every step.
    """
    if isinstance(newest, dict) and KEY in newest:
        return {**comm_state, KEY: newest[KEY]}
    return comm_state
