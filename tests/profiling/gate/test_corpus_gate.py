"""Under the gate the added corpus does not get to run, and the error names class and line."""

import jax
import jax.numpy as jnp
import pytest
from audit_cases import mesh_of
from corpus.corpus_added import ADDED

from txcore.profiling import AutoShardingError, no_auto_collectives


def on_arrays(program):
    """Return a program's function and ones in the place of its arguments' shapes."""
    fn, shapes = program.build(mesh_of(**program.axes))
    arrays = jax.tree.map(lambda s: jax.device_put(jnp.ones(s.shape, s.dtype), s.sharding), shapes)
    return fn if program.eager else jax.jit(fn), arrays


@pytest.mark.parametrize("name", ADDED)
def test_added(name):
    program = ADDED[name]
    fn, arrays = on_arrays(program)
    if program.origin == "autodiff":
        with no_auto_collectives():
            fn(*arrays)
        return
    with no_auto_collectives(), pytest.raises(AutoShardingError) as error:
        fn(*arrays)
    if program.limit("gate"):
        called_at = str(error.value).partition("called at ")[2].split()[0]
        assert "test_corpus_gate.py:" in called_at
        return
    rows = [c for c in error.value.report.collectives if c.origin == program.origin]
    assert rows
    assert {c.source for c in rows} <= program.marked()


def test_a_device_put_can_be_allowed():
    fn, arrays = on_arrays(ADDED["device_put"])
    with no_auto_collectives(allow={"reshard"}):
        assert fn(*arrays).is_fully_replicated
