"""Sums of values that an all_gather made equal are found; right programs raise no alarm."""

import jax
import jax.numpy as jnp
import pytest
from audit_cases import P, mesh_of, on, tag, vary
from jax import lax

from txcore.profiling.declared.gathered_sums import Finding, find_wrong_reductions


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
        lambda c: vary(total(c), "data") * x.sum(), gather(x).sum()),
    "a branch that differs": lambda x: total(
        lax.cond(jnp.asarray(True), lambda v: gather(v).sum(), lambda v: v.sum(), x)),
    "a predicate that differs": lambda x: total(
        lax.cond(x.sum() > 0, lambda v: v * 2, lambda v: v * 3, gather(x).sum())),
    "permuted": lambda x: total(lax.ppermute(gather(x), "data", [(0, 1)]).sum()),
    "pmax": lambda x: lax.pmax(gather(x).sum(), "data"),
}  # fmt: skip


def scan_body(step, start, length=3):
    """What a scan stacks up of its carry, so that each trip's counts."""
    return lax.scan(lambda carry, _: (step(carry), carry), start, None, length=length)[1]


def once(x):
    return vary(total(x), "data")


@jax.custom_vjp
def summed(x):
    return once(x)


summed.defvjp(lambda x: (once(x), x), lambda x, g: (g * x,))


def asked(x):
    """Sum what is equal, cast just before: the number of devices times it is meant."""
    x = total(x)
    with tag("vary/again"):
        x = lax.pcast(x, "data", to="varying")
    return total(x)


# A sum over the devices that is summed over them again: n times the truth from the second on.
AGAIN = {
    "scan": lambda x: loop(once, x),
    "scan twice": lambda x: scan_body(once, x, 2),
    "scan of a tree": lambda x: loop(lambda c: (once(c[0]), c[1] + 1), (x, vary(0.0, "data")))[0],
    "scan with arithmetic": lambda x: loop(lambda c: once(c * 2 - 1), x),
    "scan of microbatches": lambda x: lax.scan(
        lambda c, part: (once(c + part), None), vary(jnp.zeros(4), "data"), x)[0],
    "scan under remat": lambda x: loop(jax.checkpoint(once), x),
    "scan under jit": jax.jit(lambda x: loop(jax.jit(once), x)),
    "scan of a custom_vjp": lambda x: loop(summed, x),
    "scan in a scan": lambda x: loop(lambda c: loop(once, c), x),
    "after a scan": lambda x: total(loop(once, x)),
    "scan after one": lambda x: loop(lambda c: once(c), once(x)),
    "scan with a cond": lambda x: loop(
        lambda c: lax.cond(jnp.asarray(True), once, lambda v: once(v * 2), c), x),
    "while": lambda x: loop_while(once, x),
    "fori": lambda x: lax.fori_loop(0, 3, lambda i, c: once(c) * (i + 1), x),
    "cond": lambda x: total(lax.cond(jnp.asarray(True), once, lambda v: once(v * 2), x)),
    "plain": lambda x: total(jnp.sin(once(x)) + 1),
    "jit": lambda x: total(jax.jit(once)(x)),
    "remat": lambda x: total(jax.checkpoint(once)(x)),
    "custom_vjp": lambda x: total(summed(x)),
    "closed_call": lambda x: total(jax.named_call(once, name="inner")(x)),
    "vmap": lambda x: jax.vmap(lambda row: total(once(row)))(x),
    "a sum as a term": lambda x: total(once(x) + x),
    "a term under jit": lambda x: total(jax.jit(lambda v: v - once(v))(x)),
    "a term after a scan": lambda x: total(x - loop(once, x)),
    "a term in both branches": lambda x: total(x + lax.cond(
        jnp.asarray(True), once, lambda v: -once(v), x)),
    "a carry with a gathered term": lambda x: loop(lambda c: once(c) + x.sum(), gather(x).sum()),
}  # fmt: skip

ONCE = {
    "scan of local values": lambda x: lax.scan(
        lambda c, part: (c + total(part), None), jnp.zeros(4), x)[0],
    "scan of means": lambda x: loop(lambda c: vary(lax.pmean(c, "data"), "data"), x),
    "while of means": lambda x: loop_while(lambda c: vary(lax.pmean(c, "data"), "data"), x),
    "scan of one trip": lambda x: lax.scan(lambda c, _: (once(c), None), x, None, length=1)[0],
    "scan that sums and goes on locally": lambda x: loop(lambda c: once(c) * x, x),
    "a product with a sum": lambda x: total(x * once(x)),
    "a difference for each example": lambda x: total((x - once(x.sum())).sum()),
    "a share of a sum": lambda x: total(x + once(x) / 4),
    "added on one device": lambda x: total(x + jnp.where(lax.axis_index("data") == 0, once(x), 0)),
    "a mean of a term": lambda x: lax.pmean(x + once(x), "data"),
    "one branch sums": lambda x: lax.cond(
        jnp.asarray(True), lambda v: vary(v, "data"), once,
        lax.cond(jnp.asarray(True), once, lambda v: v, x)),
    "scattered, then summed": lambda x: total(lax.psum_scatter(
        jnp.resize(x, 4), "data", tiled=True).sum()),
    "a sum that is asked for": asked,
}  # fmt: skip


def findings(body, **options):
    mesh = mesh_of(data=4, model=2)
    fn = on(mesh, P("data"), P(("data", "model")), **options)(
        lambda x: vary(jnp.sum(body(x)), "data", "model")[None]
    )
    return find_wrong_reductions(jax.jit(fn).trace(jnp.ones((8, 4))).jaxpr)


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


@pytest.mark.parametrize("name", AGAIN)
def test_again(name):
    found = findings(AGAIN[name])
    assert {f.problem for f in found} <= {"again", "equal", "gathered"}
    assert {f.axis for f in found} == {"data"}


@pytest.mark.parametrize("name", ONCE)
def test_once(name):
    assert findings(ONCE[name]) == []


def test_wrong_without_varying_types():
    body = lambda x: jnp.sum(total(gather(x)))  # noqa: E731
    mesh = mesh_of(data=4, model=2)
    fn = on(mesh, P("data"), P(), check_vma=False)(body)
    (found,) = find_wrong_reductions(jax.make_jaxpr(fn)(jnp.ones((8, 4))))
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
    assert find_wrong_reductions(jax.make_jaxpr(jnp.sin)(1.0)) == []
