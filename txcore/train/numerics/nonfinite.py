"""Find NaN and infinity in training, and act as the policy says."""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from txcore.layout import axes_of
from txcore.train.numerics.loss_scale import LossScale, first_nonfinite
from txcore.train.state.state import TrainState

Policy = Literal["stop", "skip", "ignore"]

_ADVICE = (
    "Lower the learning rate, clip the gradients or look at that batch; "
    "Engine(on_nonfinite='skip') leaves out such steps"
)

_LOG = logging.getLogger("txcore")


def check_policy(policy: Any) -> None:
    """Refuse a value that is not a policy."""
    if policy not in get_args(Policy):
        raise ValueError(f"Engine needs on_nonfinite= 'stop', 'skip' or 'ignore', got {policy!r}")


def check_loss(steps: int, metrics: dict[str, Any], state: TrainState, policy: Policy) -> None:
    """Stop the run if the loss of a finished step is not finite and the policy says so.

    Args:
      steps: the number of finished steps.
      metrics: those of the last step, on the host.
      state: the newest state.
      policy: what to do about a loss that is not finite.

    Raises:
      FloatingPointError: it is not finite, and the policy is to stop, unless there is a loss scale
        that can be lowered.
    """
    loss = metrics.get("loss")
    if type(loss) is float and math.isfinite(loss):  # as it is in nearly all steps
        return
    if policy == "ignore" or np.all(np.isfinite(jax.tree.leaves(loss))):
        return
    lowest = _describe_least_scale(state)
    if state.loss_scaling is not None and (policy == "skip" or not lowest):
        _LOG.warning("txcore: the loss of step %d is %s; %s", steps, loss, describe_skipped(state))
        return
    raise FloatingPointError(
        f"the loss of step {steps} is {loss}. {lowest}{_describe_place(state)}. {_ADVICE}"
    )


def check_parameters(steps: int, state: TrainState, policy: Policy) -> None:
    """Refuse to save parameters that are not finite: they may be NaN where the loss is not.

    Args:
      steps: the number of finished steps.
      state: the state after them; every process has to come, since each may hold parts alone.
      policy: under "ignore" nothing is refused.

    Raises:
      FloatingPointError: a parameter is not finite.
    """
    if policy != "ignore" and _any_nonfinite(jax.tree.leaves(state.stored_params)):
        raise FloatingPointError(
            f"the parameters of step {steps} are not saved. {_describe_place(state)}. {_ADVICE}"
        )


def _any_nonfinite(leaves: list[jax.Array]) -> bool:
    """Tell whether any array on a mesh is not finite, alike on every process."""
    named = [leaf.sharding for leaf in leaves if isinstance(leaf.sharding, NamedSharding)]
    if not named:
        return False
    look = _first_nonfinite_on(named[0].mesh, tuple(sharding.spec for sharding in named))
    return int(look(leaves)) >= 0


@functools.lru_cache(maxsize=16)
def _first_nonfinite_on(mesh: Mesh, specs: tuple[P, ...]) -> Callable[[list[jax.Array]], Any]:
    axes = tuple(dict.fromkeys(axis for spec in specs for axis in axes_of(spec)))
    look = functools.partial(first_nonfinite, axes=axes)
    return jax.jit(jax.shard_map(look, mesh=mesh, in_specs=(list(specs),), out_specs=P()))


def _describe_least_scale(state: TrainState) -> str:
    """Return a sentence if the loss scale is at its minimum, else ""."""
    policy = state.precision.scaling
    if policy is None or state.loss_scaling is None:
        return ""
    scale = float(np.asarray(state.loss_scaling.scale))
    if not isinstance(policy, LossScale):
        return f"The loss scale is {scale:g}, and constant. "
    return f"The loss scale is {scale:g}, its minimum. " if scale <= policy.minimum else ""


def describe_skipped(state: TrainState) -> str:
    """Describe the skipped steps, and the gradient that made the last one skip.

    Args:
      state: a state with loss scaling, not yet donated.

    Returns:
      "no step was skipped", or "3 steps were skipped, the last because the gradient of
      params['w'] was not finite".
    """
    assert state.loss_scaling is not None
    count, culprit = (
        int(np.asarray(x)) for x in (state.loss_scaling.skipped_steps, state.loss_scaling.culprit)
    )
    if not count:
        return "no step was skipped"
    path = jax.tree_util.tree_flatten_with_path(state.stored_params)[0][culprit][0]
    steps = "1 step was" if count == 1 else f"{count} steps were"
    return (
        f"{steps} skipped, the last because the gradient of params{jax.tree_util.keystr(path)} "
        "was not finite"
    )


def has_nonfinite_parameter(state: TrainState) -> bool:
    """Tell whether a parameter is not finite, alike on every process; all have to come."""
    leaves = jax.tree.leaves(state.stored_params)
    if all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves):
        return bool(find_nonfinite_parameters(state))
    return _any_nonfinite(leaves)  # each process has parts alone


def find_nonfinite_parameters(state: TrainState) -> list[str]:
    """Return the names of the parameters of which this process holds a part that is not finite."""
    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state.stored_params)[0]:
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        shards = {str(shard.index): shard.data for shard in leaf.addressable_shards}
        bad = sum(int((~np.isfinite(np.asarray(data))).sum()) for data in shards.values())
        if bad:
            of = sum(data.size for data in shards.values())
            found.append(f"params{jax.tree_util.keystr(path)} ({bad} of {of} elements)")
    return found


def _describe_place(state: TrainState) -> str:
    found = find_nonfinite_parameters(state)
    if not found:
        leaves = jax.tree.leaves(state.stored_params)
        here = all(leaf.is_fully_addressable or leaf.is_fully_replicated for leaf in leaves)
        what = "The parameters" if here else "The parts of the parameters that this rank holds"
        return f"{what} are finite: the batch or the loss itself made it"
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f"Not finite after it: {', '.join(found[:3])}{more}"
