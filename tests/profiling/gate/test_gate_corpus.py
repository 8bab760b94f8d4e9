"""The gate's verdict on the corpus is the audit's; on what moves only when run it is its own."""

import jax
import numpy as np
import pytest
from audit_cases import mesh_of
from corpus.corpus_added import ADDED
from corpus.corpus_clean import CLEAN
from corpus.corpus_lies import LIES

from txcore.profiling import AutoShardingError, no_auto_collectives

EAGER = [name for name, program in ADDED.items() if program.eager]
REFUSED = ("boundary", "partitioner", "reshard")
COMPILED = [n for n, p in ADDED.items() if p.origin in REFUSED and not p.only_when_run]
ASKED = [n for n, p in ADDED.items() if p.origin not in REFUSED]
ON_CPU = [name for name, program in CLEAN.items() if "cpu" in program.platforms]


def built(program):
    fn, args = program.build(mesh_of(**program.axes))
    return fn if hasattr(fn, "lower") else jax.jit(fn), args


def compile_gated(program):
    fn, args = built(program)
    with no_auto_collectives():
        fn.lower(*args).compile()


@pytest.mark.parametrize("program", [*map(ADDED.get, COMPILED), *LIES.values()])
def test_what_nobody_asked_for_is_not_compiled(program):
    with pytest.raises(AutoShardingError) as error:
        compile_gated(program)
    assert error.value.report.checked


@pytest.mark.parametrize("name", EAGER)
def test_what_runs_op_by_op_is_refused_at_its_line(name):
    program = ADDED[name]
    fn, shapes = program.build(mesh_of(**program.axes))
    args = [jax.device_put(np.ones(s.shape, s.dtype), s.sharding) for s in shapes]
    with no_auto_collectives(), pytest.raises(AutoShardingError) as error:
        fn(*args)
    assert any(c.source in program.marked() for c in error.value.report.collectives)


@pytest.mark.parametrize("program", [*map(ADDED.get, ASKED), *(CLEAN[n] for n in ON_CPU)])
def test_what_somebody_asked_for_compiles(program):
    compile_gated(program)
