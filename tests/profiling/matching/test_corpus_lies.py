"""Where tag, mark, name and traced program contradict one another, nothing passes."""

import jax
import jax.numpy as jnp
import pytest
from audit_cases import P, mesh_of, on, shape, tag, vary
from corpus.corpus_checks import check_lie
from corpus.corpus_lies import LIES
from jax import lax

from txcore.profiling import audit, audit_compiled, audit_text

AXES = ("data", "model")


@pytest.mark.parametrize("name", LIES)
def test_lie(name):
    program = LIES[name]
    fn, args = program.build(mesh_of(**program.axes))
    check_lie(program, audit(fn, *args), "cpu")


def test_the_corpus_is_as_large_as_promised():
    assert len(LIES) >= 10


def traced(body):
    mesh = mesh_of(data=4, model=2)

    def tagged(x):
        with tag("psum/x"):
            return vary(body(x), *AXES)

    return jax.jit(on(mesh, P(AXES), P(AXES))(tagged)).trace(shape(mesh, P(AXES), 8, 16))


def repeated(body, length):
    return lambda x: lax.scan(lambda c, _: (vary(body(c), *AXES), None), x, None, length=length)[0]


def psum(x):
    return lax.psum(x * 2, "data")


def ring(by):
    return lambda x: lax.ppermute(x, "data", [(i, (i + by) % 4) for i in range(4)])


# What was compiled, and what another trace declares under the same tag.
OTHERS = {
    "over more devices": (lambda x: lax.psum(x * 2, AXES), psum),
    "over another axis": (lambda x: lax.psum(x * 2, "model"), psum),
    "of more elements": (lambda x: lax.psum(jnp.concatenate([x, x * x]), "data")[:1], psum),
    "of another kind": (lambda x: lax.ppermute(x * 2, "data", [(0, 1)]), psum),
    "twice": (lambda x: psum(vary(psum(x), *AXES)), psum),
    "in more trips": (repeated(psum, 5), repeated(psum, 3)),
    "to another neighbour": (ring(1), ring(3)),
    "though none is declared": (psum, lambda x: x * 2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_from_what_is_declared_under_its_tag(name):
    compiled, declared = (traced(body) for body in OTHERS[name])
    report = audit_compiled(compiled.lower().compile(), declared.jaxpr)
    assert not report.ok
    assert report.unexplained
    assert audit_compiled(declared.lower().compile(), declared.jaxpr).ok


def module(*lines):
    """A module for 8 partitions with the given instructions; `%p` is its parameter."""
    text = "\n".join(f"  {line}" for line in lines)
    return (
        "HloModule m, num_partitions=8\n\n"
        "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n"
        "  %b = f32[] parameter(1)\n  ROOT %s = f32[] add(%a, %b)\n}\n\n"
        f"ENTRY %main (p: f32[16]) -> f32[16] {{\n  %p = f32[16]{{0}} parameter(0)\n{text}\n}}\n"
    )


def all_reduce(op_name="jit(f)/shard_map/psum", attributes='txcore="psum/x"'):
    return module(
        "ROOT %r = f32[16]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, "
        f"use_global_device_ids=true, to_apply=%add, frontend_attributes={{{attributes}}}, "
        f'metadata={{op_name="{op_name}"}}'
    )


MARK = 'is_spmd_generated="true"'
CONTRADICTIONS = {
    "mark against tag and name": all_reduce(attributes=f'{MARK},txcore="psum/x"'),
    "mark against name": all_reduce(attributes=MARK),
    "mark and nothing else": all_reduce(op_name="", attributes=MARK),
    "name against tag": all_reduce(op_name="jit(f)/dot_general"),
    "name of a function": all_reduce(op_name="jit(psum)/reduce_sum", attributes=""),
    "name of an argument": all_reduce(op_name="psum", attributes=""),
    "name of a scope": all_reduce(op_name="jit(f)/psum/reduce_sum", attributes=""),
    "one name of two merged": all_reduce(op_name="jit(f)/(shard_map/psum:reduce_sum)"),
    "no name and no tag": all_reduce(op_name="", attributes=""),
    "tag and a name of no path": all_reduce(op_name="jit(f)/transpose(jvp())/mul"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_text_whose_witnesses_contradict_one_another(name):
    report = audit_text(CONTRADICTIONS[name])
    assert not report.ok
    assert [c.explained for c in report.collectives] == [False]


def test_text_whose_witnesses_agree_passes():
    assert audit_text(all_reduce()).ok
    assert audit_text(all_reduce(attributes="")).ok
