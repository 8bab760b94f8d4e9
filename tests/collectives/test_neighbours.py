"""Collectives where jax itself has had bugs: partly manual meshes, rows on an axis of the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, sharded, shards
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import txcore as tx

TWO = {"data": 2, "model": 2}
X = shards({"model": 2}, (4, 4))
checks = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)


def make_mesh(kind, sizes=TWO):
    shape = tuple(sizes.values())
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, tuple(sizes), axis_types=(kind,) * len(shape))


def place(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def skip_jax_bug(kind, uses_reduce_scatter, since=(0, 11)):
    if kind == AxisType.Explicit and uses_reduce_scatter and jax.__version_info__ >= since:
        pytest.skip("jax fails in lowering lax.psum_scatter on a mesh that is Explicit in part")


@checks
@kinds
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_mesh_that_is_manual_in_part(case, kind, check_vma):
    skip_jax_bug(kind, "scatter" in case.op)
    mesh = make_mesh(kind)
    f = jax.shard_map(
        lambda x: case.call(x[0], "model")[None],
        mesh=mesh,
        in_specs=P("model"),
        out_specs=P("model"),
        axis_names={"model"},
        check_vma=check_vma,
    )
    got = jax.jit(f)(place(X, mesh, "model"))
    np.testing.assert_array_equal(got, case.expect(X, {"model": 2}, ("model",)))


@checks
@kinds
@pytest.mark.parametrize("case", [c for c in CASES if c.linear and not c.kwargs], ids=str)
def test_rows_on_an_axis_of_the_mesh(case, kind, check_vma):
    """vmap around a shard_map, with spmd_axis_name (jax issue 34249 is vmap's without)."""
    skip_jax_bug(kind, case.op in ("reduce_scatter", "psum_scatter", "all_gather"), (0, 10))
    mesh = make_mesh(kind)
    rows = np.stack([X, 2 * X + 1])
    f = jax.shard_map(
        lambda x: case.call(x[0], "model")[None],
        mesh=mesh,
        in_specs=P("model"),
        out_specs=P("model"),
        check_vma=check_vma,
    )
    f = jax.vmap(f, spmd_axis_name="data")

    @jax.jit
    def value_and_gradient(rows):
        return f(rows), jax.grad(lambda rows: (f(rows) ** 2).sum() / 2)(rows)

    value, gradient = value_and_gradient(place(rows, mesh, "data", "model"))
    wanted = np.stack([case.expect(row, {"model": 2}, ("model",)) for row in rows])
    np.testing.assert_array_equal(value, wanted)
    # The gradient is the transpose of what the value is, by <f(e), y> for each unit e.
    units = np.eye(X.size).reshape(-1, *X.shape)
    images = np.stack([case.expect(unit, {"model": 2}, ("model",)).ravel() for unit in units])
    by_unit = wanted.reshape(2, -1) @ images.T
    np.testing.assert_allclose(gradient.reshape(2, -1), by_unit, rtol=1e-5, atol=1e-5)


@checks
def test_a_shard_map_inside_of_another(check_vma):
    def outer(x):
        inner = jax.shard_map(
            lambda x: tx.psum(x, "model"),
            in_specs=P("model"),
            out_specs=P(),
            axis_names={"model"},
            check_vma=check_vma,
        )
        return tx.psum(inner(x), "data")

    f = jax.shard_map(
        outer,
        mesh=make_mesh(AxisType.Auto),
        in_specs=P("data"),
        out_specs=P(),
        axis_names={"data"},
        check_vma=check_vma,
    )
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.testing.assert_array_equal(jax.jit(f)(x), x.reshape(4, 3).sum(0, keepdims=True))


@checks
@pytest.mark.parametrize("case", [c for c in CASES if not c.kwargs], ids=str)
def test_without_jit(case, check_vma):
    f = sharded(lambda x: case.call(x, "model"), {"model": 2}, check_vma=check_vma, jit=False)
    np.testing.assert_array_equal(f(X), case.expect(X, {"model": 2}, ("model",)))


@checks
@kinds
def test_the_backward_pass_of_a_custom_vjp(kind, check_vma):
    """jax issue 19175: a psum there is right where the cotangent differs, and refused where not."""

    def loss_of(reduce_loss):
        @jax.custom_vjp
        def loss(w, x):
            value = (w * x).sum()
            return tx.psum(value, "data") if reduce_loss else value

        def backward(kept, cotangent):
            w, x = kept
            by_w = tx.psum(cotangent * (w if reduce_loss else x), "data", name="by_w")
            return by_w, cotangent * w

        loss.defvjp(lambda w, x: (loss(w, x), (w, x)), backward)
        return loss

    mesh = make_mesh(kind, {"data": 4})
    x, w = shards({"data": 4}, (3,)), np.ones(3, np.float32)

    def run(loss):
        f = jax.shard_map(
            lambda w, x: jax.grad(loss)(w, x[0]),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
        return jax.jit(f)(place(w, mesh), place(x, mesh, "data"))

    np.testing.assert_array_equal(run(loss_of(False)), x.sum(0))
    if check_vma:
        with pytest.raises(ValueError, match="over axis 'data': by_w does not vary along it"):
            run(loss_of(True))


@checks
def test_an_explicit_mesh_that_is_set(check_vma):
    """jax issue 29162: gradients of each example inside of a shard_map, with and without jit."""
    mesh = make_mesh(AxisType.Explicit, {"data": 4})
    x, w = shards({"data": 4}, (3,)), np.arange(3, dtype=np.float32)

    def gradient(w, x):
        each = jax.vmap(jax.grad(lambda w, row: jnp.sum(w * row) ** 2 / 2), (None, 0))
        return tx.psum(each(tx.vary(w, "data"), x).sum(0), "data")

    with jax.set_mesh(mesh):
        f = jax.shard_map(gradient, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma)
        given = place(w, mesh), place(x, mesh, "data")
        wanted = np.einsum("bi,bj,j->i", x, x, w)
        np.testing.assert_allclose(f(*given), wanted, rtol=1e-5)
        np.testing.assert_allclose(jax.jit(f)(*given), wanted, rtol=1e-5)


@checks
def test_the_transpose_of_a_cast_is_the_sum(check_vma):
    """tx.vary of an equal value: psum under check_vma, the identity without."""
    weights = shards({"data": 4}, (3,))

    def f(x):
        return jax.grad(lambda w: (tx.vary(w, "data") * x).sum())(jnp.ones(3))

    got = sharded(f, {"data": 4}, check_vma=check_vma)(weights)
    wanted = oracle.psum(weights) if check_vma else weights
    np.testing.assert_array_equal(got, wanted)
