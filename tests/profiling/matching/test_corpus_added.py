"""Communication that gets in unasked is flagged, with its class, file and line."""

import pytest
from audit_cases import mesh_of
from corpus.corpus_added import ADDED
from corpus.corpus_checks import check_added

from txcore.profiling import AutoShardingError, assert_no_auto_sharding, audit

COMPILED = [name for name, program in ADDED.items() if not program.only_when_run]
FLAGGED = [name for name in COMPILED if ADDED[name].origin in ("partitioner", "boundary")]


@pytest.mark.parametrize("name", COMPILED)
def test_added(name):
    program = ADDED[name]
    fn, args = program.build(mesh_of(**program.axes))
    check_added(program, audit(fn, *args), "cpu")


def test_the_error_names_the_line():
    program = ADDED["matmul_over_a_sharded_dim"]
    fn, args = program.build(mesh_of(**program.axes))
    with pytest.raises(AutoShardingError, match="exactly the declared collectives") as error:
        assert_no_auto_sharding(fn, *args)
    (place,) = program.marked()
    assert f"1 of 1 collective unexplained: all-reduce over data at {place}" in str(error.value)
    assert not error.value.report.ok


def test_what_moves_only_when_run_is_in_no_compiled_program():
    """Here the audit has nothing to see, and says so; the gate is for it."""
    for program in ADDED.values():
        if program.only_when_run:
            fn, args = program.build(mesh_of(**program.axes))
            assert audit(fn, *args).collectives == ()


def test_the_corpus_is_as_large_as_promised():
    assert len(FLAGGED) >= 25
    assert sum(len(program.marked()) for program in ADDED.values()) == len(ADDED) + 1
