"""Derivatives that the matrix (test_matrix.py) has no cell for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import sharded, shards

import txcore as tx


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
