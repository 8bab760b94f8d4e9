"""Muon against float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

import txcore as tx
from txcore.optim.muon import newton_schulz


def truth(x, iterations=5):
    """Newton-Schulz by the quintic of Jordan et al., in float64."""
    tall = x.shape[0] > x.shape[1]
    x = np.float64(x.T if tall else x)
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(iterations):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_singular_values_come_near_one(shape):
    x = np.random.default_rng(0).normal(size=shape)
    o = newton_schulz(jnp.asarray(x, jnp.float32), 5)
    np.testing.assert_allclose(o, truth(x), rtol=2e-4, atol=2e-5)
    values = np.linalg.svd(np.asarray(o), compute_uv=False)
    assert values.min() > 0.6
    assert values.max() < 1.3
    stack = newton_schulz(jnp.stack([jnp.asarray(x, jnp.float32), jnp.zeros(shape)]), 5)
    np.testing.assert_allclose(stack[0], o, rtol=1e-5, atol=1e-6)
    assert not stack[1].any()


@pytest.mark.parametrize("nesterov", [True, False])
def test_three_updates(nesterov):
    rng = np.random.default_rng(1)
    w = rng.normal(size=(4, 8)).astype(np.float32)
    optimizer = tx.optim.muon(0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    ours, state = {"w": jnp.asarray(w)}, optimizer.init({"w": w})
    theirs, velocity = np.float64(w), np.zeros_like(w, np.float64)
    for step in range(3):
        g = rng.normal(size=w.shape).astype(np.float32)
        ours, state = optimizer.update({"w": jnp.asarray(g)}, state, ours, step=jnp.int32(step))
        velocity = 0.9 * velocity + g
        ahead = g + 0.9 * velocity if nesterov else velocity
        theirs = theirs * (1 - 0.1 * 0.01) - 0.1 * np.sqrt(2) * truth(ahead)
    np.testing.assert_allclose(ours["w"], theirs, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(state["velocity"]["w"], velocity, rtol=1e-5, atol=1e-6)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"params\['b'\] has shape \(3,\). Give what is none to"):
        tx.optim.muon(0.1).init({"b": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="iterations must be a whole number from 1 on; got 0"):
        tx.optim.muon(0.1, iterations=0)
    assert repr(tx.optim.muon(0.1, momentum=0.9)) == "muon(0.1, momentum=0.9)"
