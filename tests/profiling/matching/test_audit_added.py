"""What an audit says of communication that nobody declared; the programs are in the corpus."""

import contextlib
import re

import jax
import jax.numpy as jnp
import pytest
from audit_cases import P, mesh_of, on, shape, tag, vary
from corpus.corpus_lies import LIES
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

from txcore.profiling import audit, audit_compiled


def test_a_real_psum_under_the_same_tag_stays_explained():
    fn, args = LIES["sum_under_the_tag_of_a_real_one"].build(mesh_of(data=8))
    report = audit(fn, *args)
    assert [c.explained for c in report.collectives] == [True, False]
    assert {c.tags for c in report.collectives} == {("psum/x",)}
    assert not report.missing


def psums(*tags):
    """A program with a psum of another operand of 16 elements under each tag."""

    def body(x):
        out = x
        for i, name in enumerate(tags):
            with tag(name):
                out = vary(lax.psum(jnp.sin(out * (i + 1)), "data"), "data")
        return out

    mesh = mesh_of(data=8)
    return jax.jit(on(mesh, P("data"), P("data"))(body)).trace(shape(mesh, P("data"), 8, 16))


def test_what_the_trace_does_not_declare_is_flagged_though_its_line_looks_right():
    wide, narrow = psums("psum/a", "psum/b"), psums("psum/a")
    report = audit_compiled(wide.lower().compile(), narrow.jaxpr)
    assert {c.tags: c.explained for c in report.collectives} == {
        ("psum/a",): True,
        ("psum/b",): False,
    }
    (row,) = report.unexplained
    assert row.origin == "partitioner"
    assert row.note == "claims the tag psum/b, but the traced program does not declare it"
    assert "psum/b" in report.verdict()


def test_of_two_alike_under_one_tag_one_is_flagged():
    report = audit_compiled(psums("psum/a", "psum/a").lower().compile(), psums("psum/a").jaxpr)
    assert sorted(c.explained for c in report.collectives) == [False, True]
    assert "claims the tag psum/a, but the traced program does not declare it" in report.verdict()


def test_what_is_declared_and_not_compiled_is_missing():
    report = audit_compiled(jax.jit(jnp.sin).lower(1.0).compile(), psums("psum/a").jaxpr)
    (gone,) = report.missing
    assert (gone.kind, gone.tag, gone.axes) == ("all-reduce", "psum/a", ("data",))
    assert not report.ok
    line = r"failed: 1 declared but missing: psum/a over data at test_audit_added.py:\d+"
    assert re.fullmatch(line, report.verdict())


def test_the_flag_names_file_line_axis_and_bytes():
    def fn(x):
        return x.sum()

    report = audit(fn, shape(mesh_of(data=8), P("data"), 64))
    (row,) = report.unexplained
    assert row.source == f"test_audit_added.py:{fn.__code__.co_firstlineno + 1}"
    assert (row.axes, row.group_size, row.payload_bytes) == (("data",), 8, 4)


def test_autodiffs_own_reduction_is_a_class_of_its_own():
    mesh = mesh_of(data=4, model=2)

    def step(w, x):
        return jax.grad(lambda w: ((x @ w) ** 2).sum())(w)

    fn = on(mesh, (P(), P("data")), P())(step)
    report = audit(fn, shape(mesh, P(), 4, 4), shape(mesh, P("data"), 8, 4))
    (row,) = report.collectives
    assert (row.kind, row.origin, row.axes) == ("all-reduce", "autodiff", ("data",))
    assert report.ok
    assert not report.exact
    assert str(report).endswith("nothing was added, but 1 is left to autodiff")


@pytest.mark.parametrize("name", [None, "psum/loss"])
def test_autodiffs_reduction_merged_with_a_users_is_told_apart(name):
    mesh = mesh_of(data=4, model=2)

    def step(w, x):
        grads = jax.grad(lambda w: ((x @ w) ** 2).sum())(w)
        with tag(name) if name else contextlib.nullcontext():
            return grads, lax.psum(x.sum(), "data")

    fn = on(mesh, (P(), P("data")), P())(step)
    report = audit(fn, shape(mesh, P(), 4, 4), shape(mesh, P("data"), 8, 4))
    first, second = report.collectives
    assert first.op == second.op
    assert {first.origin: first.payload_bytes, second.origin: second.payload_bytes} == {
        "autodiff": 64,
        "txcore" if name else "user": 4,
    }
    assert first.note == second.note == "merged into one op with others"
    assert report.ok
    assert not report.exact


def test_autodiffs_reduction_inside_a_scan_is_autodiffs():
    mesh = mesh_of(data=8)

    def step(w, x):
        def loss(w):
            y, _ = lax.scan(lambda c, _: (jnp.sin(c @ w), None), x, None, length=3)
            return y.sum()

        return jax.grad(loss)(w)

    fn = on(mesh, (P(), P("data")), P())(step)
    report = audit(fn, shape(mesh, P(), 4, 4), shape(mesh, P("data"), 8, 4))
    assert {c.origin for c in report.collectives} == {"autodiff"}
    assert report.ok


def test_a_compiled_without_its_trace_is_not_called_checked():
    mesh = mesh_of(data=8)
    fn = on(mesh, P("data"), P())(lambda x: lax.psum(x, "data"))
    compiled = jax.jit(fn).lower(shape(mesh, P("data"), 8)).compile()
    report = audit(compiled)
    assert report.ok
    assert not report.checked
    assert not report.exact
    assert [c.axes for c in report.collectives] == [("data",)]
    assert "no traced program to compare with" in str(report)


def test_an_explicit_reshard_is_asked_for():
    mesh = Mesh(jax.devices(), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))
        report = audit(lambda x: jax.sharding.reshard(x, P()), x)
    # Since 0.11 the op is named by the argument: it looks like a reshard at the jit's edge.
    assert {c.origin for c in report.collectives} <= {"reshard", "boundary"}


@pytest.mark.parametrize(
    "args, message",
    [
        ((3,), "needs a jax function or a jax.stages.Compiled, but got a int"),
        (("HloModule m",), "or audit_text(hlo) for text"),
    ],
)
def test_what_is_no_function_is_refused(args, message):
    with pytest.raises(TypeError) as error:
        audit(*args)
    assert message in str(error.value)


def test_arguments_for_a_compiled_function_are_refused():
    compiled = jax.jit(jnp.sin).lower(1.0).compile()
    with pytest.raises(TypeError, match="compiled for its arguments, but got 1 more"):
        audit(compiled, 1.0)
