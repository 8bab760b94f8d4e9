"""Two layers in Megatron's way over a model axis: the gradients and what is made of their parts.

The truth is written out in float64 NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import txcore as tx

RNG = np.random.default_rng(0)
BATCH = {"x": RNG.normal(size=(8, 4)), "y": RNG.normal(size=8)}
PARAMS = {"w": 0.5 * RNG.normal(size=(4, 8)), "v": RNG.normal(size=8)}
MESHES = [(1, 1), (1, 2), (2, 2), (1, 4)]


def truth():
    """The gradients of the mean squared error."""
    x, y, w, v = BATCH["x"], BATCH["y"], PARAMS["w"], PARAMS["v"]
    first = np.tanh(x @ w)
    between = np.tanh(first @ w.T) + x
    second = np.tanh(between @ w)
    to_output = 2 * (second @ v - y) / 8
    to_second = np.outer(to_output, v) * (1 - second**2)
    to_between = (to_second @ w.T) * (1 - (between - x) ** 2)
    to_first = (to_between @ w) * (1 - first**2)
    of_w = x.T @ to_first + to_between.T @ first + between.T @ to_second
    return {"w": of_w, "v": second.T @ to_output}


GRADS = truth()
NORM = sum((g**2).sum() for g in GRADS.values())


def part(x):
    """This device's columns."""
    size = x.shape[-1] // tx.axis_size("model")
    return lax.dynamic_slice_in_dim(x, tx.axis_index("model") * size, size, axis=-1)


def parts(tree):
    return jax.tree.map(part, tree)


def whole(tree):
    def gather(x):
        return tx.all_gather(x, "model", dim=x.ndim - 1, invariant=True)

    return jax.tree.map(gather, tree)


def squares(tree):
    return sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))


def megatron(p, batch):
    """The loss of parts of the parameters, whole by two psums."""
    hidden = jnp.tanh(tx.vary(batch["x"], "model") @ p["w"])
    between = jnp.tanh(tx.psum(hidden @ p["w"].T, "model")) + batch["x"]
    hidden = jnp.tanh(tx.vary(between, "model") @ p["w"])
    return jnp.mean((tx.psum(hidden @ p["v"], "model") - batch["y"]) ** 2)


def gathered(p, batch):
    """Another loss: the hidden values are gathered, so that each device computes all of it."""
    hidden = jnp.tanh(tx.vary(batch["x"], "model") @ part(p["w"]))
    hidden = tx.all_gather(hidden, "model", dim=1)
    return jnp.mean((hidden @ p["v"] - batch["y"]) ** 2)


def of_parts(state, batch):
    grads = tx.grad(megatron)(parts(tx.vary(state.params, "model")), batch)
    grads, state = state.sync_gradients(grads)
    metrics = {
        "norm": tx.psum(squares(grads), "model"),
        "mean": 32 * tx.pmean(jnp.mean(grads["w"] ** 2), "model")
        + 8 * tx.pmean(jnp.vdot(grads["v"], grads["v"]) / grads["v"].size, "model"),
    }
    return state.apply_gradients(grads=whole(grads)), metrics


def of_whole_cast_outside(state, batch):
    grads = tx.grad(lambda p: megatron(parts(p), batch))(tx.vary(state.params, "model"))
    grads, state = state.sync_gradients(tx.psum(grads, "model"))
    return state.apply_gradients(grads=grads), {"norm": squares(grads)}


def of_whole_cast_inside(state, batch):
    grads = tx.grad(lambda p: megatron(parts(tx.vary(p, "model")), batch))(state.params)
    grads, state = state.sync_gradients(grads)
    own = parts(grads)
    metrics = {"norm": tx.psum(squares(own), "model"), "max": tx.pmax(jnp.max(own["v"]), "model")}
    return state.apply_gradients(grads=whole(own)), metrics


def run(step, shape):
    mesh = tx.MeshSpec(jax.devices()[: np.prod(shape)], axes=("data", "model"), shape=shape)
    engine = tx.Engine(
        mesh=mesh, plan=tx.Plan(data_parallel=tx.DP("data")), optimizer=tx.optim.sgd(0.1)
    )
    float32 = jax.tree.map(np.float32, (PARAMS, BATCH))
    state, metrics = tx.step_fn(step)(engine.create_state(float32[0]), float32[1])
    return jax.tree.map(np.asarray, (state.stored_params, metrics))


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("step", [of_parts, of_whole_cast_outside, of_whole_cast_inside])
def test_gradients_of_parts(step, shape):
    params, metrics = run(step, shape)
    known = {"norm": NORM, "mean": NORM, "max": GRADS["v"].max()}
    jax.tree.map(
        lambda got, p, g: np.testing.assert_allclose(got, p - 0.1 * g, rtol=2e-5, atol=2e-6),
        *(params, PARAMS, GRADS),
    )
    for name, value in metrics.items():
        assert value == pytest.approx(known[name], rel=2e-5)


def test_summed_gradients_are_found_after_they_were_gathered():
    """Each device's gradient holds the others' parts: their sum is twice what it is to be."""

    def step(state, batch):
        grads = tx.grad(lambda p: gathered(tx.vary(p, "model"), batch))(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=whole(parts(grads))), {}

    with pytest.raises(ValueError, match="autodiff summed over axis 'model', 2 times those of the"):
        run(step, (2, 2))
