"""Derivatives in both modes, against the transposed matrix of the NumPy oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, as_tuple, sharded, shards, world

import txcore as tx

LINEAR = [c for c in CASES if c.linear]
MESHES = [
    ({"data": 2}, "data"),
    ({"data": 2, "model": 2}, "model"),
    ({"data": 2, "model": 2}, ("data", "model")),
    ({"data": 2, "one": 1}, ("data", "one")),
]


def matrix(case, sizes, axis):
    """The Jacobian of the oracle, column by column."""
    shape = (world(sizes), 4, 4)
    basis = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    columns = [case.expect(e, sizes, as_tuple(axis)) for e in basis]
    return np.stack(columns, axis=-1).reshape(*columns[0].shape, *shape)


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
@pytest.mark.parametrize("sizes,axis", MESHES, ids=str)
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_both_modes_equal_the_matrix(case, sizes, axis, check_vma):
    f = sharded(lambda v: case.call(v, axis), sizes, check_vma=check_vma)
    x = jnp.asarray(shards(sizes, (4, 4)))
    wanted = matrix(case, sizes, axis)
    rng = np.random.default_rng(1)
    v, u = rng.normal(size=x.shape), rng.normal(size=wanted.shape[: x.ndim])

    @jax.jit  # one program instead of five to compile
    def both_modes(x, v, u):
        return jax.jvp(f, (x,), (v,))[1], jax.vjp(f, x)[1](u)[0]

    forward, reverse = both_modes(x, jnp.float32(v), jnp.float32(u))
    np.testing.assert_allclose(forward, np.tensordot(wanted, v, x.ndim), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(reverse, np.tensordot(u, wanted, u.ndim), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrapper", [jax.checkpoint, jax.jit], ids=["remat", "jit"])
@pytest.mark.parametrize("case", LINEAR, ids=str)
def test_reverse_mode_inside_the_step(case, wrapper):
    """Gradients taken inside shard_map, as a training step does."""
    sizes = {"data": 2}

    def loss(v):
        return jnp.sum(wrapper(lambda w: case.call(w, "data"))(v) ** 2)

    x = shards(sizes, (4, 4))
    got = sharded(jax.grad(loss), sizes)(x)
    # Each device differentiates its own loss; what the transpose brings from the others is
    # their cotangent, so the result is the derivative of the sum over the devices, except that
    # an invariant result is one value, which is counted once.
    y = case.expect(np.float64(x), sizes, ("data",))
    cotangent = 2 * y
    if case.op in ("psum", "pmean", "broadcast") or case.kwargs.get("invariant"):
        cotangent = np.concatenate([cotangent[:1], 0 * cotangent[1:]])
    wanted = np.tensordot(cotangent, matrix(case, sizes, "data"), y.ndim)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)


def test_scan_of_gradients():
    sizes = {"data": 2}

    def f(x):
        def body(carry, row):
            g = jax.grad(lambda r: jnp.sum(tx.psum(r, "data") ** 2))(row)
            return carry + g, None

        return jax.lax.scan(body, jnp.zeros_like(x[0]), x)[0]

    x = shards(sizes, (3, 4))
    wanted = 2 * np.broadcast_to(x.sum((0, 1)), (2, 4))
    np.testing.assert_allclose(sharded(f, sizes)(x), wanted)


def test_vary_keeps_gradients_local_and_its_transpose_reduces():
    sizes = {"data": 4}
    x = shards(sizes, (4,))

    def gradients(cast):
        def f(v):
            w = jnp.ones(4)
            return (
                jax.grad(lambda w: jnp.sum(cast(w) * v))(w)
                if cast
                else jax.grad(lambda w: jnp.sum(w * v))(tx.vary(w, "data"))
            )

        return sharded(f, sizes)(x)

    np.testing.assert_array_equal(gradients(None), x)  # cast before: local
    summed = gradients(lambda w: tx.vary(tx.vary(w, "data"), "data"))  # cast inside: summed
    np.testing.assert_array_equal(summed, np.broadcast_to(x.sum(0), x.shape))


def test_pmax_has_no_derivative():
    with pytest.raises(NotImplementedError, match="pmax"):
        sharded(jax.grad(lambda v: jnp.sum(tx.pmax(v, "data"))), {"data": 2})(
            shards({"data": 2}, (4,))
        )
