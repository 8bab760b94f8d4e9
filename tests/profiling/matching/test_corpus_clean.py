"""Explicit programs are not flagged, and their bytes are those counted by hand."""

import pytest
from audit_cases import mesh_of
from corpus.corpus_checks import check_clean
from corpus.corpus_clean import CLEAN

from txcore.profiling import audit

ON_CPU = [name for name, program in CLEAN.items() if "cpu" in program.platforms]


@pytest.mark.parametrize("name", ON_CPU)
def test_clean(name):
    program = CLEAN[name]
    fn, args = program.build(mesh_of(**program.axes))
    check_clean(program, audit(fn, *args), "cpu")


def test_the_corpus_is_as_large_as_promised():
    assert len(ON_CPU) >= 25
    kinds = {move.kind for program in CLEAN.values() for move in program.moves}
    assert kinds == {
        *("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"),
        *("collective-broadcast", "ragged-all-to-all"),
    }
