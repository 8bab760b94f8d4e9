"""create_state and models of other libraries: split first where they hold more than arrays."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import txcore as tx

eqx: Any = pytest.importorskip("equinox")
nn: Any = pytest.importorskip("flax.linen")
nnx: Any = pytest.importorskip("flax.nnx")

X = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
BATCH = {"x": X, "y": X.sum(1)}
W = {"w": np.ones(3, np.float32)}


@pytest.fixture(scope="module")
def engine():
    return toys.engine(2)


def says(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}")


EQX = ": an equinox module holds more than arrays. Write params, static = eqx.partition(model, eqx."
NNX = ": an nnx module holds more than parameters. Write graph, params, rest = nnx.split(model, nnx"


class Dropping(nnx.Module):
    def __init__(self):
        self.layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.1, rngs=nnx.Rngs(1))


class Normed(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))


def mlp():
    return eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))


@pytest.mark.parametrize(
    "params, text",
    [
        (mlp, f"create_state needs arrays, got custom_jvp at params.activation{EQX}"),
        (
            lambda: {"w": W["w"], "net": mlp()},
            f"create_state needs arrays, got custom_jvp at params['net'].activation{EQX}",
        ),
        (
            lambda: eqx.nn.Dropout(0.5),
            f"create_state needs arrays, got float at params.p{EQX}",
        ),
        (Normed, f"create_state needs arrays to train, got nnx.BatchStat at params.norm.mean{NNX}"),
        (
            lambda: nnx.state(Normed()),
            "create_state needs arrays to train, got nnx.BatchStat at params['norm']['mean']" + NNX,
        ),
        (
            Dropping,
            f"create_state needs arrays to train, got nnx.RngCount at params.drop.rngs.count{NNX}",
        ),
        (
            lambda: {"a": nn.Dense(3)},
            "create_state needs arrays, got Dense at params['a']: a linen module holds no arrays. "
            "Pass model.init(key, x)['params']",
        ),
        (
            lambda: {"k": jax.random.key(0)},
            "create_state needs arrays to train, got PRNG keys at params['k']: pass them in extra=",
        ),
        (
            lambda: {"k": "a"},
            "create_state needs arrays, got str at params['k']: convert it with n",
        ),
        (
            lambda: {"k": np.array(["a"])},
            "create_state needs arrays of numbers, got <U1 at params['k']: encode it as numbers",
        ),
    ],
)
def test_models_that_hold_more_than_arrays(params, text, engine):
    with says(TypeError, text):
        engine.create_state(params())


def test_what_the_errors_advise_works(engine):
    params, static = eqx.partition(mlp(), eqx.is_inexact_array)

    def train(state, batch):
        def loss_of(params):
            out = jax.vmap(eqx.combine(params, static))(batch["x"])[:, 0]
            return jnp.mean((out - batch["y"]) ** 2)

        loss, grads = tx.value_and_grad(loss_of)(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    state, first = tx.step_fn(train)(engine.create_state(params), BATCH)
    state, second = tx.step_fn(train)(state, BATCH)
    assert second["loss"] < first["loss"]

    graph, params, rest = nnx.split(Dropping(), nnx.Param, ...)
    state = engine.create_state(params, extra=rest)

    def drop(state, batch):
        model = nnx.merge(graph, state.params, state.extra)
        out = model.layer(batch["x"][:, :2])
        return {"out": tx.pmean(out.mean(), "data")}

    want = X[:, :2] @ np.asarray(params["layer"]["kernel"][...])
    found = engine.evaluate(drop, state, [BATCH])["out"]
    assert found == pytest.approx(want.mean(), abs=1e-6)


def test_models_of_arrays_alone_are_pytrees(engine):
    linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    stored = engine.create_state(linear).stored_params
    np.testing.assert_array_equal(stored.weight, linear.weight)
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    stored = engine.create_state(layer).stored_params
    np.testing.assert_array_equal(stored.kernel[...], layer.kernel[...])
