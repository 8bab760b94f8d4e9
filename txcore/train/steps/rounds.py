"""The end of a round of local SGD before its last step is made."""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from txcore.parallel import local_sgd
from txcore.train.options import Options
from txcore.train.state.layout import state_specs
from txcore.train.state.state import TrainState


def steps_begun(options: Options, state: TrainState) -> int:
    """Return how many steps of an unfinished round a state holds; 0 without local SGD."""
    rounds = options.plan.rounds(options.mesh)
    return 0 if rounds is None else int(state.step) % rounds.every


def end_round(options: Options, state: TrainState) -> TrainState:
    """Average what the devices have done since the last exchange, as `Engine.end_round` says."""
    plan, mesh, params = options.plan, options.mesh, state.stored_params
    rounds = plan.rounds(mesh)
    if rounds is None or not steps_begun(options, state):
        return state
    kept = plan.kept(params, mesh, options.optimizer)
    specs = state_specs(state.arrays, plan.layouts(params, mesh), kept)
    own = specs["comm_state"][local_sgd.KEY]
    leaves, treedef = jax.tree.flatten((specs["stored_params"], own))
    run = _make_averaging(rounds, mesh.mesh, treedef, tuple(leaves))
    params, local = run(params, state.comm_state[local_sgd.KEY], state.step)
    comm_state = {**state.comm_state, local_sgd.KEY: local}
    return state.replace(stored_params=params, comm_state=comm_state)


@lru_cache(maxsize=16)
def _make_averaging(
    rounds: local_sgd.Rounds, mesh: Mesh, treedef: Any, leaves: tuple[P, ...]
) -> Any:
    specs = jax.tree.unflatten(treedef, leaves)

    def run(params: Any, kept: local_sgd.Local, step: jax.Array) -> Any:
        return local_sgd.average(rounds, params, kept, jnp.asarray(step))

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(*specs, P()), out_specs=specs)
    return jax.jit(mapped)
