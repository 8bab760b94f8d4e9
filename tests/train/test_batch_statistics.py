"""Batch statistics over devices: right values and gradients, and which reductions are refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax import lax
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.profiling import audit

RNG = np.random.default_rng(0)


def moments(x, mask=None, *, n, **options):
    def f(x, mask):
        return tx.batch_moments(x, "data", mask=mask, **options)

    if mask is None:
        return tx.testing.run_sharded(lambda x: f(x, None), x, axes={"data": n}, out_specs=P())
    return tx.testing.run_sharded(f, x, mask, axes={"data": n}, out_specs=P())


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, jnp.bfloat16])
def test_moments_are_those_of_the_whole_batch(n, dtype):
    x = (RNG.normal(3, [1, 0.5, 2], (16, 5, 3))).astype(dtype)
    mask = RNG.random(16) > 0.4
    wide = np.asarray(x, np.float64)
    for mean, var, all_ in (
        (*moments(x, n=n), wide.reshape(-1, 3)),
        (*moments(x, mask, n=n), wide[mask].reshape(-1, 3)),
    ):
        assert mean.dtype == var.dtype == np.float32
        np.testing.assert_allclose(mean, all_.mean(0), rtol=1e-5)
        np.testing.assert_allclose(var, all_.var(0), rtol=2e-5)


def test_channels_first_and_a_mask_of_tokens():
    x = RNG.normal(size=(8, 3, 4, 5)).astype(np.float32)
    mean, var = moments(x, n=4, dims=(0, -2, 3))
    np.testing.assert_allclose(mean, x.mean((0, 2, 3), np.float64), atol=1e-6)
    np.testing.assert_allclose(var, x.var((0, 2, 3), np.float64), rtol=1e-5)
    tokens = RNG.normal(size=(8, 6, 3)).astype(np.float32)
    real = np.arange(6) < RNG.integers(1, 7, (8, 1))
    tokens[~real] = np.nan
    mean, var = moments(tokens, real.astype(np.float32), n=4)
    np.testing.assert_allclose(mean, tokens[real].mean(0, np.float64), atol=1e-6)
    np.testing.assert_allclose(var, tokens[real].var(0, np.float64), rtol=1e-5)


def test_devices_and_batches_without_a_real_example():
    x = RNG.normal(size=(8, 3)).astype(np.float32)
    few = np.arange(8) < 3  # two of the four devices have padding alone
    mean, var = moments(x, few, n=4)
    np.testing.assert_allclose(mean, x[:3].mean(0, np.float64), atol=1e-6)
    np.testing.assert_allclose(var, x[:3].var(0, np.float64), rtol=1e-5)
    for n in (1, 4):
        assert [m.tolist() for m in moments(x, np.zeros(8), n=n)] == [[0.0] * 3] * 2


@pytest.mark.parametrize("mean", [100, 3000])
def test_a_mean_far_from_zero(mean):
    """In float32 E[x^2] - E[x]^2 has lost all digits there."""
    x = RNG.normal(mean, 0.5, (64, 4)).astype(np.float32)
    wide = np.asarray(x, np.float64)
    naive = (x**2).mean(0) - x.mean(0) ** 2
    found, var = moments(x, n=4, shift=mean)
    np.testing.assert_allclose(found, wide.mean(0), rtol=3e-7)
    np.testing.assert_allclose(var, wide.var(0), rtol=1e-4)
    assert np.abs(naive / wide.var(0) - 1).max() > 1e-3
    without = moments(x, n=4)[1]
    np.testing.assert_allclose(without, wide.var(0), atol=1e-6 * mean**2)
    assert (without >= 0).all()


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_the_gradient_goes_through_the_statistics_of_all(n, shift):
    """Ioffe and Szegedy, 2015, section 3: the gradient of (x - mean) / sqrt(var), by hand."""
    x = RNG.normal(2, 1, (16, 3)).astype(np.float32)
    weights = RNG.normal(size=(16, 3)).astype(np.float32)

    def f(x, weights):
        def loss(x):
            mean, var = tx.vary(tx.batch_moments(x, "data", shift=shift), "data")
            return (weights * (x - mean) / jnp.sqrt(var)).sum()

        return jax.grad(loss)(x)

    got = tx.testing.run_sharded(f, x, weights, axes={"data": n})
    x, weights = x.astype(float), weights.astype(float)
    hat = (x - x.mean(0)) / x.std(0)
    want = (weights - weights.mean(0) - hat * (weights * hat).mean(0)) / x.std(0)
    np.testing.assert_allclose(got, want, atol=5e-6)


def test_masked_rows_have_no_gradient():
    x = RNG.normal(size=(8, 2)).astype(np.float32)
    x[5:] = np.nan
    mask = np.arange(8) < 5

    def f(x, mask):
        return jax.grad(lambda x: sum(map(jnp.sum, tx.batch_moments(x, "data", mask=mask))))(x)

    got = tx.testing.run_sharded(f, x, mask, axes={"data": 4})
    real = x[:5].astype(float)
    np.testing.assert_allclose(got[:5], (1 + 2 * (real - real.mean(0))) / 5, atol=1e-6)
    assert (got[5:] == 0).all()


def test_one_collective_forward():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    f = jax.shard_map(
        lambda x, m: tx.batch_moments(x, "data", mask=m),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    x = jnp.ones((8, 5))
    (made,) = audit(f, x, jnp.ones(8)).collectives
    assert (made.kind, made.tags, made.payload_bytes) == (
        "all-reduce",
        ("psum/batch_moments",),
        44,
    )


WRONG = [
    (
        lambda x: tx.batch_moments(x.astype(jnp.int32), "data"),
        TypeError,
        "tx.batch_moments needs floating-point x, got int32: cast it first",
    ),
    (
        lambda x: tx.batch_moments(x, "data", dims=(0, 2)),
        ValueError,
        "tx.batch_moments needs dims= some dims of x to average over, each once, got (0, 2) for "
        "an x of 2 dims",
    ),
    (lambda x: tx.batch_moments(x, "data", dims=(0, -2)), ValueError, "each once, got (0, -2)"),
    (lambda x: tx.batch_moments(x[:, 0], "data"), ValueError, "got None for an x of 1 dims"),
    (
        lambda x: tx.batch_moments(x, "data", mask=x),
        ValueError,
        "tx.batch_moments needs mask= of x's first dims, all of them among dims (0,): got shape "
        "(2, 3) for an x of shape (2, 3)",
    ),
    (
        lambda x: tx.batch_moments(jnp.ones((2, 3)), "data"),
        ValueError,
        "tx.batch_moments over axis 'data': x does not vary along it",
    ),
]


@pytest.mark.parametrize("f,error,text", WRONG, ids=range(len(WRONG)))
def test_wrong_calls(f, error, text):
    with pytest.raises(error, match=re.escape(text)):
        tx.testing.run_sharded(f, np.ones((8, 3), np.float32), axes={"data": 4}, out_specs=P())


def loss_with(statistics):
    def loss_of(params, batch):
        hidden = batch["x"] @ params["w1"]
        mean, var = statistics(hidden)
        return (((hidden - mean) / jnp.sqrt(var + 1) @ params["w2"] - 1) ** 2).mean()

    return loss_of


def plain_jax(hidden):  # as flax computes them
    mean, square = lax.pmean(jnp.stack([hidden.mean(0), (hidden**2).mean(0)]), "data")
    return mean, square - mean**2


STATISTICS = {
    "plain jax": (plain_jax, False),
    "tx.pmean": (lambda h: (tx.pmean(h.mean(0), "data"), 1.0), False),
    "batch_moments": (lambda h: tx.batch_moments(h, "data"), False),
    "batch_moments, cast": (lambda h: tx.vary(tx.batch_moments(h, "data"), "data"), True),
}


@pytest.mark.parametrize("how", STATISTICS)
def test_statistics_inside_a_loss_are_let_through(how):
    statistics, is_exact = STATISTICS[how]
    loss_of = loss_with(statistics)

    @tx.step_fn
    def step(state, batch):
        loss, grads = tx.value_and_grad(loss_of)(state.params, batch)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    ends = []
    for n in (1, 4):
        engine = toys.engine(n)
        state = engine.create_state(toys.params())
        report = engine.audit(step, state, toys.batch())
        assert report.ok, str(report)
        state, metrics = step(state, toys.batch())
        ends.append(np.append(state.params["w1"], metrics["loss"]))
    assert report.exact == is_exact
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-5, atol=1e-6)


def of_stored(state, batch, loss_of):
    return jax.grad(loss_of)(state.stored_params, batch)


def cast_inside(state, batch, loss_of):
    return jax.grad(lambda p: loss_of(tx.vary(p, "data", name="w"), batch))(state.stored_params)


def mixed_with_a_statistic(state, batch, loss_of):
    """One cast value made of a statistic, whose gradient is right, and of stored parameters."""

    def loss(params):
        scale = params["w2"][:, 0] * tx.pmean((batch["x"] @ state.params["w1"]).mean(0), "data")
        return (batch["x"] @ params["w1"] * scale).mean()

    return jax.grad(loss)(state.stored_params)


def cast_and_averaged_again(state, batch, loss_of):
    grads = jax.grad(loss_of)(state.stored_params, batch)
    decayed = jax.tree.map(lambda g, p: g + 1e-4 * p, grads, state.params)
    return tx.pmean(decayed, "data")


def in_microbatches(state, batch, loss_of):
    parts = batch["x"].reshape(2, -1, 4)

    def body(total, x):
        grads = jax.grad(loss_of)(state.stored_params, {"x": x})
        return jax.tree.map(jnp.add, total, grads), None

    return lax.scan(body, jax.tree.map(jnp.zeros_like, state.stored_params), parts)[0]


MULTIPLIED = [of_stored, cast_inside, mixed_with_a_statistic, cast_and_averaged_again]


@pytest.mark.parametrize("gradients", [*MULTIPLIED, in_microbatches])
@pytest.mark.parametrize("how", ["none", "plain jax"])
def test_what_multiplies_a_gradient_is_refused(gradients, how):
    loss_of = loss_with(plain_jax if how == "plain jax" else lambda h: (0.0, 1.0))

    @tx.step_fn
    def step(state, batch):
        grads = gradients(state, batch, loss_of)
        return state.apply_gradients(grads=grads), {"loss": jnp.zeros(())}

    state = toys.engine(2).create_state(toys.params())
    text = (
        "its gradient comes out summed over the devices, not as their mean. Differentiate "
        "state.params in place of state.stored_params, and reduce the gradients yourself: loss, "
        "grads = tx.value_and_grad(loss_of)(state.params); grads, state = "
        "state.sync_gradients(grads)."
    )
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        step(state, toys.batch())
    assert "over axis 'data' into the backward pass (test_batch_statistics.py:" in str(caught.value)
    if gradients is cast_inside:
        assert "the transpose of vary/w" in str(caught.value)


@pytest.mark.parametrize("shift", [0.0, 2.5])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("real", [[1, 3, 0, 2], [0, 0, 1, 0], [4, 4, 4, 1]], ids=str)
def test_devices_with_different_numbers_of_examples(real, n, shift):
    """flax issue 2417: the mean of the devices' means is not that of the examples."""
    rng = np.random.default_rng(1)
    mask = (np.arange(4) < np.array(real)[:, None]).astype(np.float32).ravel()
    x = rng.normal(2, 1, (16, 3)).astype(np.float32) * (1 + np.arange(16) // 4)[:, None]
    weights = rng.normal(size=(16, 3)).astype(np.float32)
    x[mask == 0] = np.nan

    def f(x, mask, weights):
        def loss(x):
            mean, var = tx.vary(tx.batch_moments(x, "data", mask=mask, shift=shift), "data")
            hat = (jnp.where(mask[:, None], x, 0) - mean) / jnp.sqrt(var + 1)
            return (weights * mask[:, None] * hat).sum(), (mean, var)

        gradient, moments = jax.grad(loss, has_aux=True)(x)
        return gradient, jax.tree.map(lambda m: m[None], moments)

    got, (mean, var) = tx.testing.run_sharded(f, x, mask, weights, axes={"data": n})
    kept = mask != 0
    x, weights = x[kept].astype(float), weights[kept].astype(float)
    for rows, wanted in ((mean, x.mean(0)), (var, x.var(0))):
        np.testing.assert_allclose(rows, np.broadcast_to(wanted, rows.shape), rtol=2e-5, atol=1e-5)
    scale = np.sqrt(x.var(0) + 1)
    hat = (x - x.mean(0)) / scale
    wanted = (weights - weights.mean(0) - hat * (weights * hat).mean(0)) / scale
    np.testing.assert_allclose(got[kept], wanted, atol=1e-5)
    assert (got[~kept] == 0).all()
    if n == 4 and 0 not in real and len(set(real)) > 1:  # what flax does
        of_devices = [part.mean(0) for part in np.split(x, np.cumsum(real)[:-1])]
        assert np.abs(np.mean(of_devices, 0) - x.mean(0)).max() > 0.1
