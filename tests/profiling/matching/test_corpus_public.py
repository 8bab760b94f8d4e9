"""Programs of jax's documentation and of public issues get the verdict that was derived by hand."""

import re
from collections import Counter

import jax
import numpy as np
import pytest
from corpus import public_issues, public_manual, public_models, public_shardings  # noqa: F401
from corpus.corpus_public import AS_COMPILED, PUBLIC, SUM

from txcore.profiling.audit import audit_program
from txcore.profiling.program import compile_program

pytestmark = pytest.mark.usefixtures("unoptimized")
SUMS = ("all-reduce", "reduce-scatter")
COLLECTIVE = re.compile(
    r" (?:all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def compile_public(program):
    mesh = program.mesh_of(np.array(jax.devices()))
    with jax.set_mesh(mesh):
        fn, args = program.build(mesh)
        compiled = compile_program(fn, args)
        return compiled, audit_program(compiled)


@pytest.mark.parametrize("name", PUBLIC)
def test_public(name):
    program = PUBLIC[name]
    compiled, report = compile_public(program)
    wanted = program.status
    if wanted == AS_COMPILED:
        wanted = "failed" if COLLECTIVE.search(compiled.compiled.as_text()) else "proved"
    assert report.status == wanted, f"{program.source}\n{report}"
    blamed = {row.source for row in report.unexplained}
    assert blamed <= set(program.span())
    if program.status == AS_COMPILED:
        assert bool(blamed) == (wanted == "failed")
        return
    assert blamed == program.marked(), report
    if program.moves is not None:
        assert bytes_of_rows(report, program.moves) == bytes_of_moves(program.moves), report


def bytes_of_moves(moves):
    return _add((m.kind, m.axes, m.payload * m.trips) for m in moves)


def bytes_of_rows(report, moves):
    """Add up what was asked for; a reshard's sum may be of either kind."""
    found = []
    for row in report.collectives:
        if row.explained:
            kind = SUM if row.kind in SUMS and row.origin == "reshard" else row.kind
            found.append((kind, row.axes, row.payload_bytes * row.trips))
    return _add(found)


def _add(rows):
    total = Counter()
    for kind, axes, payload in rows:
        total[kind, frozenset(axes)] += payload
    return total


def test_the_corpus_holds_what_it_promises():
    assert len(PUBLIC) >= 70
    assert {"201/sharding", "201/shard-map", "301/sharding-ad"} <= {
        p.source for p in PUBLIC.values()
    }
    issues = {p.source for p in PUBLIC.values() if re.search(r"/\S+ \d+$", p.source)}
    assert len(issues) >= 15
    assert {p.status for p in PUBLIC.values()} == {"proved", "not proved", "failed", AS_COMPILED}
