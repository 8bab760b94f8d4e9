"""What an audit says of explicit programs; the programs themselves are in the corpus."""

import jax.numpy as jnp
from audit_cases import P, mesh_of, on, shape, tag, vary
from jax import lax

from txcore.profiling import audit


def test_plain_jax_is_the_users():
    mesh = mesh_of(data=8)
    fn = on(mesh, P("data"), P())(lambda x: (lax.psum(x, "data"), lax.pmean(x * 2, "data")))
    report = audit(fn, shape(mesh, P("data"), 8, 16))
    assert {c.origin for c in report.collectives} == {"user"}
    assert report.exact
    assert report.payload_bytes == 2 * 64


def test_no_collective_is_said_plainly():
    report = audit(jnp.sin, jnp.ones(3))
    assert str(report) == "proved: no collective in the program"
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
