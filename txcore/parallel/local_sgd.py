"""Local SGD: each device trains parameters of its own for some steps; then they are averaged.

What a state stores is the last average, the same on every device. Each device keeps the difference
of its own parameters from it, and its optimizer's state, as copies (`txcore.kept`).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from txcore import _compat, varying
from txcore.collectives import pmean
from txcore.kept import Kept, as_copy, own_copy
from txcore.kernels.common import checks
from txcore.layout import mirrored_specs
from txcore.optim import Optimizer

KEY = "local"  # of `state.comm_state`


@dataclass(frozen=True)
class Rounds:
    """State how local steps are made one model's.

    Attributes:
      every: steps from one average to the next.
      outer: what makes a step of the average's difference; None takes the average itself.
      axes: the data axes of more than one device.
    """

    every: int
    outer: Optimizer | None
    axes: tuple[str, ...]


class Local(NamedTuple):
    """Hold what is kept between two averages; inside of a step without the copies' dim.

    Attributes:
      difference: of this device's parameters from the stored ones, float32 or wider.
      opt_state: of this device's optimizer.
      outer: of the outer optimizer, the same on every device; () without one.
    """

    difference: Any
    opt_state: Any
    outer: Any


def keep_local(rounds: Rounds, optimizer: Optimizer, params: Any, layouts: Any, copies: int) -> Any:
    """Return what local SGD keeps, as a `Local` of `Kept`.

    Args:
      rounds: how it averages.
      optimizer: of each device's own steps.
      params: pytree of the parameters, arrays or shapes, each of them whole.
      layouts: pytree of `Layout` like them.
      copies: the devices that train parameters of their own.
    """
    stored = jax.tree.map(lambda layout: layout.stored, layouts)

    def difference(param: Any, spec: P) -> Kept:
        shape = copies, *np.shape(param)
        return Kept(
            shape, checks.accumulator_of(param).name, P(rounds.axes or None, *spec), rounds.axes
        )

    def own(path: Any, leaf: Any, spec: P) -> Kept:
        one = _keep_leaf(f"state.opt_state{jax.tree_util.keystr(path)}", leaf, spec)
        return Kept(
            (copies, *one.shape), one.dtype, P(rounds.axes or None, *spec), rounds.axes, one.initial
        )

    def shared(path: Any, leaf: Any, spec: P) -> Kept:
        return _keep_leaf(f"the outer optimizer's state{jax.tree_util.keystr(path)}", leaf, spec)

    over_paths = jax.tree_util.tree_map_with_path
    opt_state = _start_state(optimizer, params)
    specs = mirrored_specs("state.opt_state", opt_state, params, layouts)
    outer = () if rounds.outer is None else _start_state(rounds.outer, params)
    of_outer = mirrored_specs("the outer optimizer's state", outer, params, layouts)
    return Local(
        jax.tree.map(difference, params, stored),
        over_paths(own, opt_state, specs),
        over_paths(shared, outer, of_outer),
    )


def _start_state(optimizer: Optimizer, params: Any) -> Any:
    """Return the state that an optimizer begins with; of shapes its shapes."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(params)):
        return jax.eval_shape(optimizer.init, params)
    return optimizer.init(params)


def _keep_leaf(where: str, leaf: Any, spec: P) -> Kept:
    if _compat.is_key_array(leaf):
        raise TypeError(
            f"DP(sync_every=...) needs optimizers whose state holds numbers, got PRNG keys in "
            f"{where}: keep their jax.random.key_data"
        )
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return Kept(leaf.shape, leaf.dtype.name, spec)

    def initial(shape: tuple[int, ...]) -> np.ndarray:
        return np.broadcast_to(np.asarray(leaf), shape)

    return Kept(np.shape(leaf), jnp.result_type(leaf).name, spec, initial=initial)


def own_params(params: Any, kept: Local) -> Any:
    """Return the parameters that this device trains, typed as varying along the data axes.

    Args:
      params: the stored ones.
      kept: what `state.comm_state` holds on this device.
    """

    def one(param: jax.Array, difference: jax.Array) -> jax.Array:
        difference = own_copy(difference)
        return (param.astype(difference.dtype) + difference).astype(param.dtype)

    return jax.tree.map(one, params, kept.difference)


def update_local(
    rounds: Rounds, optimizer: Optimizer, grads: Any, params: Any, kept: Local, step: jax.Array
) -> tuple[Any, Local]:
    """Make a local step, and average where it is the last of its round.

    Args:
      rounds: how to average.
      optimizer: of the local steps.
      grads: pytree like the parameters, local to this device.
      params: the stored parameters, the same on every device.
      kept: what `state.comm_state` holds on this device.
      step: int32 scalar, the steps made before this one.

    Returns:
      The stored parameters and what is kept after the step.
    """
    own = own_params(params, kept)
    opt_state = jax.tree.map(own_copy, kept.opt_state)
    own, opt_state = optimizer.update(grads, opt_state, own, step=step)
    moved = jax.tree.map(lambda new, old: _widen(new) - _widen(old), own, params)
    given = Local(jax.tree.map(as_copy, moved), jax.tree.map(as_copy, opt_state), kept.outer)
    is_last = (step + 1) % rounds.every == 0
    return lax.cond(
        is_last,
        lambda params, kept: average(rounds, params, kept, step + 1),
        lambda params, kept: (params, kept),
        params,
        given,
    )


def average(rounds: Rounds, params: Any, kept: Local, steps: jax.Array) -> tuple[Any, Local]:
    """Average the devices' parameters, and make the outer optimizer's step: one exchange.

    Equation: with d_i the difference of device i from the stored parameters p, `p + pmean(d)`; with
    an outer optimizer its step from p with the gradient `-pmean(d)`. Every device goes on from
    there, each with the state that its own optimizer has.

    Args:
      rounds: how to average.
      params: the stored parameters p.
      kept: what `state.comm_state` holds on this device.
      steps: int32 scalar, made so far; schedules of the outer optimizer count rounds.

    Returns:
      The stored parameters, and what is kept: with differences of zero.

    References:
      Stich, "Local SGD converges fast and communicates little", 2019; Douillard et al., "DiLoCo:
      distributed low-communication training of language models", 2023, algorithm 1.
    """
    moved = jax.tree.map(own_copy, kept.difference)
    if rounds.axes:
        moved = pmean(moved, rounds.axes, name="params")
    outer = kept.outer
    if rounds.outer is None:
        params = jax.tree.map(lambda p, m: (_widen(p) + m).astype(p.dtype), params, moved)
    else:
        grads = jax.tree.map(lambda m: -m, moved)
        number = (steps - 1) // rounds.every
        params, outer = rounds.outer.update(grads, outer, params, step=number)
    zeros = jax.tree.map(_zeros_like, kept.difference)
    return params, Local(zeros, kept.opt_state, outer)


def _zeros_like(x: jax.Array) -> jax.Array:
    return varying.match_varying(jnp.zeros(x.shape, x.dtype), x)[0]


def _widen(x: jax.Array) -> jax.Array:
    return x.astype(checks.accumulator_of(x))
