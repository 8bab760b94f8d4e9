"""Optimizers and a step of each precision where jax promotes neither ranks nor dtypes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import txcore as tx
from txcore import kernels

PARAMS = {"w": (3, 4), "b": (4,), "scale": ()}
OPTIMIZERS = {
    "sgd": tx.optim.sgd(0.1, weight_decay=0.1),
    "momentum": tx.optim.sgd(tx.optim.cosine(0.1, 9, 2), momentum=0.9, clip_norm=1.0),
    "adamw": tx.optim.adamw(tx.optim.warmup(0.1, 3), clip_norm=1.0),
    "optax": tx.optim.from_optax(optax.adamw(0.1)),
}


@contextlib.contextmanager
def nothing_promoted():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def tree(dtype, seed=0):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.normal(size=shape), dtype) for name, shape in PARAMS.items()}


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "dtype, grad_dtype",
    [("float32", "float16"), ("bfloat16", "float32"), ("float16", "float16")],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_is_the_same_program(name, dtype, grad_dtype):
    optimizer, params, grads = OPTIMIZERS[name], tree(dtype), tree(grad_dtype, 1)

    def lowered():
        def update(params, grads, step, scale):
            state = optimizer.init(params)
            return optimizer.update(grads, state, params, step=step, grad_scale=scale)

        return jax.jit(update).lower(params, grads, jnp.int32(3), jnp.float32(0.5)).as_text()

    want = lowered()
    with nothing_promoted():
        assert lowered() == want


@pytest.mark.parametrize("dtypes", [("float16",), ("bfloat16", "float32"), ("float32", "float64")])
def test_norms_and_clipping(dtypes):
    with jax.enable_x64("float64" in dtypes):
        grads = [tree(dtype, i) for i, dtype in enumerate(dtypes)]
        exact = np.sqrt(
            sum((np.asarray(leaf, np.float64) ** 2).sum() for leaf in jax.tree.leaves(grads))
        )
        with nothing_promoted():
            np.testing.assert_allclose(tx.optim.global_norm(grads), exact, rtol=1e-6)
            clipped = tx.optim.clip_by_global_norm(grads, 0.5)
        for got, leaf in zip(jax.tree.leaves(clipped), jax.tree.leaves(grads), strict=True):
            assert got.dtype == leaf.dtype
            want = np.asarray(leaf, np.float64) * 0.5 / exact
            np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=1e-2)


@tx.step_fn
def train_step(state, batch):
    def loss(params, batch):
        p, x = state.precision.cast(params), state.precision.cast(batch["x"])
        y = kernels.dense(x, p["w"], p["b"], activation="gelu", dropout=0.3, keys=keys)
        y = y * p["scale"]
        return jnp.mean(kernels.cross_entropy(y, batch["label"])).astype(y.dtype)

    keys = state.example_keys(batch)
    value, grads = tx.value_and_grad(loss, loss_scale=state.loss_scale)(state.params, batch)
    grads, state = state.sync_gradients(grads)
    metrics = {"loss": tx.pmean(value, "data"), "norm": tx.optim.global_norm(grads)}
    return state.apply_gradients(grads=grads), metrics


@pytest.mark.parametrize(
    "precision, name", [("float32", "adamw"), ("bfloat16", "momentum"), ("float16", "optax")]
)
def test_a_step_of_each_precision_is_the_same(precision, name):
    devices = jax.devices()[:2]

    def run():
        engine = tx.Engine(
            mesh=tx.MeshSpec(devices, axes=("data",)),
            plan=tx.Plan(data_parallel=tx.DP("data")),
            optimizer=OPTIMIZERS[name],
            precision=tx.Precision(precision, 256.0 if precision == "float16" else None),
            on_nonfinite="skip",
        )
        state = engine.create_state(tree("float32"))
        x = np.random.default_rng(2).normal(size=(8, 3)).astype(np.float32)
        batch = {"x": x, "label": np.arange(8, dtype=np.int32) % 4}
        state, metrics = train_step(state, batch)
        assert int(state.step) == 1  # not skipped
        return jax.device_get((state.stored_params, metrics))

    want = run()
    with nothing_promoted():
        assert_same(run(), want)
