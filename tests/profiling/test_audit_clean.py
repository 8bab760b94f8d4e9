"""Explicit programs: nothing flagged, and the payload is what is counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from audit_cases import P, mesh_of, on, shape, tag, vary
from jax import lax

from txcore.profiling import assert_no_auto_sharding, audit

CLEAN = {}
AXES = ("data", "model", "pipe")


def clean(payload):
    """Register a program and its payload in bytes, counted by hand."""

    def register(build):
        CLEAN[build.__name__] = (build, payload)
        return build

    return register


def rows(mesh, dtype=jnp.float32):
    """Eight rows of 16: each device holds one row, 16 elements, 64 bytes of float32."""
    return shape(mesh, P(AXES), 8, 16, dtype=dtype)


def per_device(mesh, body):
    return on(mesh, P(AXES), P(AXES))(body), (rows(mesh),)


@clean(64)
def psum(mesh):
    def body(x):
        with tag("psum/x"):
            return vary(lax.psum(x, "data"), *AXES)

    return per_device(mesh, body)


@clean(64)
def psum_over_three_axes(mesh):
    def body(x):
        with tag("psum/x"):
            return vary(lax.psum(x, AXES), *AXES)

    return per_device(mesh, body)


@clean(64 + 64)
def pmax_and_pmin(mesh):
    def body(x):
        with tag("pmax/x"):
            largest = lax.pmax(x, "model")
        with tag("pmin/x"):
            return vary(largest, *AXES) + vary(lax.pmin(x, ("data", "pipe")), *AXES)

    return per_device(mesh, body)


@clean(2 * 64)
def all_gather(mesh):
    def body(x):
        with tag("all_gather/x"):
            return lax.all_gather(x, "model", tiled=True)[:1] * 2

    return per_device(mesh, body)


@clean(8 * 64)
def invariant_all_gather(mesh):
    def body(x):
        with tag("all_gather/x"):
            return lax.all_gather(x, AXES, tiled=True, to="invarying")

    return on(mesh, P(AXES), P())(body), (rows(mesh),)


@clean(64)
def reduce_scatter(mesh):
    def body(x):
        with tag("reduce_scatter/x"):
            return lax.psum_scatter(x, "pipe", scatter_dimension=1, tiled=True)

    return per_device(mesh, body)


@clean(64)
def all_to_all(mesh):
    def body(x):
        with tag("all_to_all/x"):
            return lax.all_to_all(x, "data", 1, 0, tiled=True)

    return per_device(mesh, body)


@clean(64 + 64)
def ppermute(mesh):
    def body(x):
        with tag("ppermute/x"):
            x = lax.ppermute(x, "data", [(0, 1), (1, 0)])
        with tag("ppermute/y"):  # moves along one of the two axes that it names
            return lax.ppermute(x, ("data", "model"), [(0, 1), (2, 3)])

    return per_device(mesh, body)


@clean(64 + 8 + 4)
def combined_tree(mesh):
    """Three psums of a tree, which the compiler combines into one op."""

    def body(x):
        tree = {"w": x, "b": x[0, :2], "loss": x.sum()}
        out = {}
        for name, leaf in tree.items():
            with tag(f"psum/{name}"):
                out[name] = lax.psum(leaf, AXES)
        return out

    return on(mesh, P(AXES), P())(body), (rows(mesh),)


@clean(7 * 64)
def scan(mesh):
    def body(x):
        def step(carry, _):
            with tag("psum/x"):
                return vary(lax.psum(carry, "data"), *AXES) * 0.5, None

        return lax.scan(step, x, None, length=7)[0]

    return per_device(mesh, body)


@clean(5 * 3 * 64)
def nested_scan(mesh):
    def body(x):
        def inner(carry, _):
            with tag("psum/x"):
                return vary(lax.psum(carry, "data"), *AXES) * 0.5, None

        def outer(carry, _):
            return jnp.sin(lax.scan(inner, carry, None, length=3)[0]), None

        return lax.scan(outer, x, None, length=5)[0]

    return per_device(mesh, body)


@clean(2 * 64 + 2 * 64)
def remat(mesh):
    """The gathered weights are gathered again in the backward pass, and scattered once."""

    def body(w):
        @jax.checkpoint
        def loss(w):
            with tag("all_gather/w"):
                whole = lax.all_gather(w, "data", tiled=True)
            return jnp.sin(whole).sum()

        return jax.grad(loss)(w)

    return per_device(mesh, body)


@clean(64 + 64)
def custom_vjp(mesh):
    @jax.custom_vjp
    def total(x):
        with tag("psum/forward"):
            return vary(lax.psum(x, "data"), *AXES)

    def backward(_, g):
        with tag("psum/backward"):
            return (vary(lax.psum(g, "data"), *AXES),)

    total.defvjp(lambda x: (total(x), None), backward)

    def body(x):
        value, grad = jax.value_and_grad(lambda x: jnp.sin(total(x)).sum())(x)
        return value + grad

    return per_device(mesh, body)


@clean(64 + 64)
def both_branches_of_cond(mesh):
    def reduce(name, factor):
        def branch(x):
            with tag(f"psum/{name}"):
                return lax.psum(x * factor, "data")

        return branch

    def body(x, p):
        return vary(lax.cond(p[0] > 0, reduce("yes", 1.0), reduce("no", 2.0), x), *AXES)

    args = rows(mesh), shape(mesh, P(), 1)
    return on(mesh, (P(AXES), P()), P(AXES))(body), args


@clean(32)
def bfloat16_sum(mesh):
    """Counted in the declared dtype, whatever the platform promotes it to."""

    def body(x):
        with tag("psum/x"):
            return vary(lax.psum(x, "data"), *AXES)

    return on(mesh, P(AXES), P(AXES))(body), (rows(mesh, jnp.bfloat16),)


@clean(64)
def dead_collective(mesh):
    """Nothing uses the first psum: the compiler leaves it out, and it is not missed."""

    def body(x):
        with tag("psum/dead"):
            lax.psum(x[0, :3], "data")
        with tag("psum/x"):
            return vary(lax.psum(x, "data"), *AXES)

    return per_device(mesh, body)


@clean(64)
def deduplicated(mesh):
    """Two psums of one operand become one op with the first tag."""

    def body(x):
        with tag("psum/a"):
            a = lax.psum(x, "data")
        with tag("psum/b"):
            return vary(a + lax.psum(x, "data"), *AXES)

    return per_device(mesh, body)


@clean(64)
def unchecked_types(mesh):
    def body(x):
        with tag("psum/x"):
            return lax.psum(x, "data")

    return on(mesh, P(AXES), P(AXES), check_vma=False)(body), (rows(mesh),)


@pytest.mark.parametrize("name", CLEAN)
def test_clean_program(name):
    build, payload = CLEAN[name]
    fn, args = build(mesh_of(data=2, model=2, pipe=2))
    report = assert_no_auto_sharding(fn, *args)
    assert {c.origin for c in report.collectives} == {"txcore"}
    assert report.exact
    assert report.payload_bytes == payload


def test_plain_jax_is_the_users():
    mesh = mesh_of(data=8)
    fn = on(mesh, P("data"), P())(lambda x: (lax.psum(x, "data"), lax.pmean(x * 2, "data")))
    report = audit(fn, shape(mesh, P("data"), 8, 16))
    assert {c.origin for c in report.collectives} == {"user"}
    assert report.exact
    assert report.payload_bytes == 2 * 64


def test_no_collective_is_said_plainly():
    report = audit(jnp.sin, jnp.ones(3))
    assert str(report) == "proof: no collective in the program"
    assert report.exact


def test_wire_bytes_are_nccl_tests_bus_factors():
    mesh = mesh_of(data=4, model=2)

    def body(x):
        return (
            vary(lax.psum(x, "data"), "data", "model"),
            lax.all_gather(x, "data", tiled=True),
            lax.psum_scatter(x, "data", scatter_dimension=1, tiled=True),
            lax.all_to_all(x, "data", 1, 0, tiled=True),
            lax.ppermute(x, "data", [(i, (i + 1) % 4) for i in range(4)]),
        )

    spec = P(("data", "model"))
    report = audit(on(mesh, spec, spec)(body), shape(mesh, spec, 8, 16))
    size = 64  # bytes on each device
    assert {c.kind: (c.payload_bytes, c.wire_bytes) for c in report.collectives} == {
        "all-reduce": (size, size * 2 * 3 // 4),
        "all-gather": (4 * size, 4 * size * 3 // 4),
        "reduce-scatter": (size, size * 3 // 4),
        "all-to-all": (size, size * 3 // 4),
        "collective-permute": (size, size),
    }


def test_a_row_says_where_and_what():
    mesh = mesh_of(data=4, model=2)

    def body(x):
        with tag("psum/grads.w1"):
            return lax.psum(x, "data")

    report = audit(on(mesh, P("data"), P())(body), shape(mesh, P("data"), 8, dtype=jnp.bfloat16))
    (row,) = report.collectives
    assert row.kind == "all-reduce"
    assert row.tags == ("psum/grads.w1",)
    assert (row.axes, row.group_size) == (("data",), 4)
    assert (row.dtype, row.trips) == ("bfloat16", 1)
    assert row.source == f"test_audit_clean.py:{body.__code__.co_firstlineno + 2}"
    assert "psum" in row.op_name


def test_trips_of_a_while_loop_do_not_matter_for_the_match():
    mesh = mesh_of(data=8)

    def body(x, n):
        def step(state):
            with tag("psum/x"):
                return state[0] + 1, vary(lax.psum(state[1], "data"), "data") * 0.1

        return lax.while_loop(lambda state: state[0] < n[0], step, (0, x))[1]

    fn = on(mesh, (P("data"), P()), P("data"))(body)
    args = shape(mesh, P("data"), 8), shape(mesh, P(), 1, dtype=jnp.int32)
    report = audit(fn, *args)
    (row,) = report.collectives
    assert report.exact
    assert not row.trips_known
    assert "1+" in str(report)


def test_a_sum_of_constants_may_be_folded():
    mesh = mesh_of(data=8)

    def body(x):
        count = lax.psum(vary(jnp.ones(7), "data"), "data")
        return lax.psum(x, "data") / count[0]

    assert audit(on(mesh, P("data"), P())(body), shape(mesh, P("data"), 8)).ok
