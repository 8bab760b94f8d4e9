"""Every implementation of conv2d under jax's transformations, and inside shard_map."""

import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from conv_cases import ALL, cut_out, each_variant, inside_nans
from jax import lax
from jax.sharding import PartitionSpec as P
from kernel_cases import conv_case

import txcore as tx
from txcore.profiling.audit import audit_compiled

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

CASE = conv_case("relu-pool", (4, 7, 6, 3), (3, 2, 3, 4), activation="relu", pool=2)
MORE = conv_case("5x5-valid", (4, 9, 8, 1), (5, 5, 1, 6), activation="relu", padding="VALID")
CASES = (CASE, MORE) if ALL else (CASE,)
AXIS = "data"


@pytest.fixture(scope="module")
def mesh():
    return machine.mesh(data=2)


def loss_of(op):
    return lambda *args: (op(*args) ** 2).sum()


def gradients(op, args):
    return jax.grad(loss_of(op), (0, 1, 2))(*args)


def plain(case, function):
    """Return what `function` gives of plain jax's convolution."""
    return jax.jit(lambda *args: function(case.plain, args))


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, want)


def of_rows(function, rows):
    """Return a function's results on several lists of arguments, stacked."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[function(*row) for row in rows])


@each_variant(*CASES, guesses_only=True)
def test_vmap_of_images_of_filters_and_of_both(case, variant, dtype):
    rows = [case.args(dtype, seed) for seed in range(3)]
    stacked = [jnp.stack(column) for column in zip(*rows, strict=True)]
    shared, op = rows[0], variant.op(**case.options)
    mapped = {(0, None, None): [], (None, 0, 0): [], (0, 0, 0): []}

    def each(*stacked):
        chosen = (
            [s if axis == 0 else a for s, a, axis in zip(stacked, shared, axes, strict=True)]
            for axes in mapped
        )
        return [jax.vmap(op, axes)(*args) for axes, args in zip(mapped, chosen, strict=True)]

    for axes, got in zip(mapped, jax.jit(each)(*stacked), strict=True):
        mixed = [
            [a if axis == 0 else s for a, s, axis in zip(row, shared, axes, strict=True)]
            for row in rows
        ]
        assert_close(got, of_rows(plain(case, lambda op, args: op(*args)), mixed))


@each_variant(*CASES, guesses_only=not ALL)
def test_gradients_by_example(case, variant, dtype):
    x, w, b = case.args(dtype)
    op = variant.op(**case.options)
    by_example = jax.jit(jax.vmap(lambda row: gradients(op, (row[None], w, b))))
    want = of_rows(plain(case, gradients), [(row[None], w, b) for row in x])
    assert_close(by_example(x), want)


@each_variant(*CASES, guesses_only=not ALL)
def test_gradients_through_scan_and_remat_of_vmap(case, variant, dtype):
    x, w, b = case.args(dtype)
    op = jax.checkpoint(variant.op(**case.options))

    def loss(x, w, b):
        def add(total, rows):
            each = jax.vmap(lambda row: loss_of(op)(row[None], w, b))
            return total + each(rows).sum(), None

        return lax.scan(add, 0.0, x.reshape(2, 2, *x.shape[1:]))[0]

    got = jax.jit(jax.grad(loss, (0, 1, 2)))(x, w, b)
    assert_close(got, plain(case, gradients)(x, w, b))


def invariant_weights(op, x, w, b):
    return gradients(op, (x, w, b))  # autodiff adds the devices' parts up


def varying_weights(op, x, w, b):
    w, b = tx.vary((w, b), AXIS)
    dx, dw, db = gradients(op, (x, w, b))
    return dx, *tx.psum((dw, db), AXIS, name="weights")


def sharded_weights(op, x, w, b):
    return jax.grad(lambda x, w, b: loss_of(op)(tx.vary(x, AXIS), w, b), (0, 1, 2))(x, w, b)


BATCH, WHOLE = P(AXIS), P()
FEATURES = (P(None, None, None, AXIS), P(AXIS))
# What runs on a device, the layout of (x, w, b) and of their gradients, and who adds them up.
LAYOUTS = {
    "invariant": (invariant_weights, (BATCH, WHOLE, WHOLE), "autodiff"),
    "varying": (varying_weights, (BATCH, WHOLE, WHOLE), "txcore"),
    "sharded": (sharded_weights, (WHOLE, *FEATURES), "txcore"),
}


def compiled_and_audited(on_device, mesh, specs, args, check_vma=True):
    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=check_vma
    )
    traced = jax.jit(mapped).trace(*args)
    compiled = traced.lower().compile()
    return compiled, audit_compiled(compiled, traced.jaxpr)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_variant(*CASES, guesses_only=True)
def test_shard_map_gives_the_gradients_and_adds_no_collective(case, variant, dtype, layout, mesh):
    function, specs, adder = LAYOUTS[layout]
    args = case.args(dtype)
    op = variant.op(**case.options)
    compiled, report = compiled_and_audited(lambda *args: function(op, *args), mesh, specs, args)
    assert report.ok, str(report)
    assert {row.origin for row in report.collectives} == {adder}
    assert report.exact == (adder == "txcore")
    placed = jax.device_put(args, [jax.NamedSharding(mesh, spec) for spec in specs])
    assert_close(compiled(*placed), plain(case, gradients)(*args))


@each_variant(*CASES, guesses_only=True)
def test_shard_map_without_checks_and_operands_among_nans(case, variant, dtype, mesh):
    args = case.args(dtype)
    op = variant.op(**case.options)

    def on_device(x, w, b):
        grads = gradients(lambda *a: op(*map(cut_out, a)), tuple(map(inside_nans, (x, w, b))))
        dx, dw, db = map(cut_out, grads)
        return dx, *lax.psum((dw, db), AXIS)

    specs = (BATCH, WHOLE, WHOLE)
    compiled, report = compiled_and_audited(on_device, mesh, specs, args, check_vma=False)
    assert report.ok, str(report)
    assert {row.origin for row in report.collectives} == {"user"}
    placed = jax.device_put(args, [jax.NamedSharding(mesh, spec) for spec in specs])
    assert_close(compiled(*placed), plain(case, gradients)(*args))
