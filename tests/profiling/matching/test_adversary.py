"""Programs that an adversary found the audit wrong about, each with what is right."""

import jax
import jax.numpy as jnp
import pytest
from audit_cases import P, mesh_of, on, shape
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding

from txcore.profiling import audit, audit_text

ALONG = P("data")


def shift(v):
    return lax.ppermute(v, "data", [(i, (i + 1) % 8) for i in range(8)])


def exchange(v):
    return lax.all_to_all(v, "data", 1, 0, tiled=True)


def explicit():
    devices = mesh_of(data=8).devices
    return Mesh(devices, ("data",), axis_types=(AxisType.Explicit,))


def dead_beside_a_hoisted_one(v):
    shift(v)
    return lax.scan(lambda c, _: (c * 0.5 + shift(jnp.sin(v)).sum(), None), v, None, length=3)[0]


def in_and_before_a_scan(v):
    before = shift(v)
    return before + lax.scan(lambda c, _: (c * 0.5 + shift(v).sum(), None), v, None, length=3)[0]


def in_and_before_a_while(v):
    def step(state):
        return state[0] + 1, state[1] * 0.5 + shift(v).sum()

    return shift(v) + lax.while_loop(lambda s: s[0] < 3, step, (0, v))[1]


def in_a_scan_of_no_trips(v):
    return lax.scan(lambda c, _: (c + lax.psum(c, "data"), None), v, None, length=0)[0]


def of_no_elements(v):
    return v + lax.psum(v[:0], "data").sum() + lax.all_gather(v[:0], "data").sum()


def in_a_scope_that_opens_a_bracket(v):
    with jax.named_scope("a(b"):
        return v + lax.psum(v, "data")


def in_a_root_finder(v):
    return lax.custom_root(
        lambda u: u * 2 - lax.psum(v, "data"), v, lambda f, x: x - f(x), lambda g, y: y / g(y)
    )


@pytest.mark.parametrize(
    "body",
    [
        dead_beside_a_hoisted_one,
        in_and_before_a_scan,
        in_and_before_a_while,
        in_a_scan_of_no_trips,
        of_no_elements,
        in_a_scope_that_opens_a_bracket,
        in_a_root_finder,
    ],
)
def test_what_is_declared_is_not_flagged(body):
    mesh = mesh_of(data=8)
    program = on(mesh, ALONG, ALONG, check_vma=False)(body)
    report = audit(program, shape(mesh, ALONG, 8, 16))
    assert report.ok, str(report)


def test_of_three_equal_calls_with_two_operands_none_is_missing():
    mesh = mesh_of(data=8)
    columns = P(None, "data")

    def body(v):
        return exchange(v) + 2 * exchange(v) + exchange(jnp.sin(v))

    program = on(mesh, columns, ALONG, check_vma=False)(body)
    report = audit(program, shape(mesh, columns, 64, 64))
    assert report.ok, str(report)
    assert [c.payload_bytes for c in report.collectives] == [64 * 8 * 4] * 2


def test_a_dead_reshard_explains_no_gather_at_an_edge():
    mesh = explicit()
    whole = NamedSharding(mesh, P())

    def fn(x):
        jax.sharding.reshard(x, whole)
        return jnp.sin(x)

    report = audit(jax.jit(fn, out_shardings=whole), shape(mesh, ALONG, 8, 16))
    assert [c.kind for c in report.unexplained] == ["all-gather"]


def test_two_equal_reshards_do_not_explain_a_gather_at_an_edge():
    mesh = explicit()
    whole = NamedSharding(mesh, P())

    def fn(x):
        return jax.sharding.reshard(x, whole) + 1, jax.sharding.reshard(x, whole) * 2, jnp.sin(x)

    report = audit(jax.jit(fn, out_shardings=whole), shape(mesh, ALONG, 8, 16))
    assert not report.ok


def test_a_dump_that_was_cut_off_is_no_proof():
    assert not audit_text("HloModule m, num_partitions=2\n").ok
    text = "HloModule m\nENTRY %e (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
    assert not audit_text(text).ok
