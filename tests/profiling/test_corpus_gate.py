"""The corpus under the gate: what communicates unasked does not get to run, the rest does."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from audit_cases import mesh_of
from corpus.corpus_added import ADDED
from corpus.corpus_clean import CLEAN
from corpus.corpus_lies import LIES

from txcore.profiling import AutoShardingError, no_auto_collectives

ON_CPU = [name for name, program in CLEAN.items() if "cpu" in program.platforms]


def on_arrays(program):
    """Return a program's function and ones in the place of its arguments' shapes."""
    fn, shapes = program.build(mesh_of(**program.axes))
    arrays = jax.tree.map(lambda s: jax.device_put(jnp.ones(s.shape, s.dtype), s.sharding), shapes)
    return fn if getattr(program, "eager", False) else jax.jit(fn), arrays


@pytest.mark.parametrize("name", ADDED)
def test_added(name):
    program = ADDED[name]
    fn, arrays = on_arrays(program)
    passes = program.origin == "autodiff"
    expected = contextlib.nullcontext() if passes else pytest.raises(AutoShardingError)
    with no_auto_collectives(), expected as error:
        fn(*arrays)
    if not passes and not program.limit("cpu"):
        rows = [c for c in error.value.report.collectives if c.origin == program.origin]
        assert {c.source for c in rows} == program.marked()


@pytest.mark.parametrize("name", [name for name in ADDED if ADDED[name].origin == "reshard"])
def test_a_reshard_can_be_allowed(name):
    fn, arrays = on_arrays(ADDED[name])
    with no_auto_collectives(allow={"reshard"}):
        fn(*arrays)


@pytest.mark.parametrize("name", LIES)
def test_lie(name):
    fn, arrays = on_arrays(LIES[name])
    with no_auto_collectives(), pytest.raises(AutoShardingError):
        fn(*arrays)


@pytest.mark.parametrize("name", ON_CPU)
def test_clean(name):
    fn, arrays = on_arrays(CLEAN[name])
    with no_auto_collectives():
        jax.block_until_ready(fn(*arrays))
