"""Under the gate the added corpus does not get to run, and the error names class and line."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from audit_cases import mesh_of
from corpus.corpus_added import ADDED

from txcore.profiling import AutoShardingError, no_auto_collectives

# The gate has the optimized module alone. XLA gives a reshard of an argument, a result or a
# shard_map's operand no line or that of its operand, and since jax 0.11 no name: only the module
# right after partitioning shows what wanted it, and only an audit has that.
WITHOUT_LINE = ("out_shardings", "shard_map_argument", "between_two_shard_maps", "explicit_reshard")


def on_arrays(program):
    """Return a program's function and ones in the place of its arguments' shapes."""
    fn, shapes = program.build(mesh_of(**program.axes))
    arrays = jax.tree.map(lambda s: jax.device_put(jnp.ones(s.shape, s.dtype), s.sharding), shapes)
    return fn if program.eager else jax.jit(fn), arrays


@pytest.mark.parametrize("name", ADDED)
def test_added(name):
    program = ADDED[name]
    fn, arrays = on_arrays(program)
    passes = program.origin == "autodiff"
    expected = contextlib.nullcontext() if passes else pytest.raises(AutoShardingError)
    with no_auto_collectives(), expected as error:
        fn(*arrays)
    if not passes and name not in WITHOUT_LINE:
        rows = [c for c in error.value.report.collectives if c.origin == program.origin]
        assert rows
        assert {c.source for c in rows} <= program.marked()


def test_a_device_put_can_be_allowed():
    fn, arrays = on_arrays(ADDED["device_put"])
    with no_auto_collectives(allow={"reshard"}):
        assert fn(*arrays).is_fully_replicated
