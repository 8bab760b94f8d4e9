"""Sums of values that an all_gather made equal are found; right programs raise no alarm."""

import jax
import jax.numpy as jnp
import pytest
from audit_cases import P, mesh_of, on, tag, vary
from jax import lax

from txcore.profiling.declared.gathered_sums import Finding, wrong_reductions


def gather(x, axis="data"):
    return lax.all_gather(x, axis, tiled=True)


def total(x):
    return lax.psum(x, "data")


@jax.custom_vjp
def gathered_sum(x):
    return gather(x).sum()


gathered_sum.defvjp(lambda x: (gathered_sum(x), x), lambda x, g: (g * x,))


def loop(step, start):
    return lax.scan(lambda carry, _: (step(carry), None), start, None, length=3)[0]


def loop_while(step, start):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, step(s[1])), (0, start))[1]


WRONG = {
    "psum": lambda x: total(gather(x).sum()),
    "of a function": lambda x: total(jnp.sin(gather(x)) @ jnp.ones((4, 2))),
    "with constants": lambda x: total(gather(x) * 3 + vary(jnp.ones(4), "data")),
    "reduce_scatter": lambda x: lax.psum_scatter(gather(x) * 2, "data", tiled=True).sum(),
    "inside a scan": lambda x: loop(lambda c: vary(total(gather(x).sum()) + 0 * c, "data"),
                                    vary(0.0, "data")),
    "of a scan": lambda x: total(loop(lambda c: c * 2 + gather(x).sum(), gather(x).sum())),
    "of a while": lambda x: total(loop_while(lambda c: c + gather(x).sum(), gather(x).sum())),
    "of a cond": lambda x: total(lax.cond(jnp.asarray(True), lambda v: gather(v).sum(),
                                          lambda v: gather(v).sum() * 2, x)),
    "under jit": lambda x: jax.jit(lambda v: total(gather(v).sum()))(x),
    "under remat": jax.checkpoint(lambda x: total(gather(x).sum())),
    "of a custom_vjp": lambda x: total(gathered_sum(x)),
    "divided by something else": lambda x: total(gather(x).sum()) / 2,
    "divided, and used": lambda x: (lambda s: s / 4 + s)(total(gather(x).sum())),
    "over both axes": lambda x: lax.psum(gather(vary(x, "model")).sum(), ("data", "model")),
}  # fmt: skip

RIGHT = {
    "of local values": lambda x: total(x.sum()),
    "mixed with local values": lambda x: total((gather(x)[:2] * x).sum()),
    "gathered along another axis": lambda x: total(gather(vary(x, "model"), "model").sum()),
    "with the index": lambda x: total(gather(x).sum() * lax.axis_index("data")),
    "picked by the index": lambda x: total(
        lax.dynamic_index_in_dim(gather(x), lax.axis_index("data")).sum()),
    "lax.pmean": lambda x: lax.pmean(gather(x).sum(), "data"),
    "autodiff": jax.grad(lambda x: (gather(x) ** 2).sum()),
    "autodiff in a scan": jax.grad(
        lambda x: loop(lambda c: c + (gather(x) ** 2).sum(), x.sum() * 0)),
    "autodiff in remat": jax.grad(jax.checkpoint(lambda x: jnp.sin(gather(x)).sum())),
    "a carry that comes to differ": lambda x: total(loop(lambda c: c + x.sum(), gather(x).sum())),
    "inside, a carry that comes to differ": lambda x: loop(
        lambda c: vary(total(c), "data") + x.sum(), gather(x).sum()),
    "a branch that differs": lambda x: total(
        lax.cond(jnp.asarray(True), lambda v: gather(v).sum(), lambda v: v.sum(), x)),
    "a predicate that differs": lambda x: total(
        lax.cond(x.sum() > 0, lambda v: v * 2, lambda v: v * 3, gather(x).sum())),
    "permuted": lambda x: total(lax.ppermute(gather(x), "data", [(0, 1)]).sum()),
    "pmax": lambda x: lax.pmax(gather(x).sum(), "data"),
}  # fmt: skip


def findings(body, **options):
    mesh = mesh_of(data=4, model=2)
    fn = on(mesh, P("data"), P(("data", "model")), **options)(
        lambda x: vary(jnp.sum(body(x)), "data", "model")[None]
    )
    return wrong_reductions(jax.jit(fn).trace(jnp.ones((8, 4))).jaxpr)


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name):
    found, *others = findings(WRONG[name])
    # Both axes' sums are wrong: nothing differs along the other one.
    assert [f.axis for f in others] == (["model"] if name == "over both axes" else [])
    assert (found.axis, found.problem) == ("data", "gathered")
    assert found.primitive in ("psum", "psum_invariant", "reduce_scatter")
    assert found.source.startswith("test_gathered_sums.py:")


@pytest.mark.parametrize("name", RIGHT)
def test_right(name):
    assert findings(RIGHT[name]) == []


def test_wrong_without_varying_types():
    body = lambda x: jnp.sum(total(gather(x)))  # noqa: E731
    mesh = mesh_of(data=4, model=2)
    fn = on(mesh, P("data"), P(), check_vma=False)(body)
    (found,) = wrong_reductions(jax.make_jaxpr(fn)(jnp.ones((8, 4))))
    assert found.axis == "data"


def test_the_finding_names_tag_and_line():
    def body(x):
        with tag("psum/loss"):
            return lax.psum(gather(x).sum(), "data")

    (found,) = findings(body)
    line = body.__code__.co_firstlineno + 2
    assert found == Finding("psum/loss", "data", found.primitive, f"test_gathered_sums.py:{line}")


def test_txcores_mean_is_right():
    def body(x):
        with tag("pmean/loss"):
            return lax.psum(gather(x).sum(), "data") * 0.25

    assert findings(body) == []


def test_a_program_without_shard_map():
    assert wrong_reductions(jax.make_jaxpr(jnp.sin)(1.0)) == []
