"""Means over the tokens of the global batch, against NumPy in float64, and their guards."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax import lax
from jax.sharding import PartitionSpec as P

import txcore as tx

RNG = np.random.default_rng(0)
LENGTHS = np.array([5, 1, 3, 0, 0, 0, 2, 5])  # of four devices the third has one example, of none
VALUES = RNG.normal(size=(8, 5)).astype(np.float32)
MASK = (np.arange(5) < LENGTHS[:, None]).astype(np.float32)
ROWS = np.array([1, 1, 1, 0, 0, 0, 1, 0], np.float32)
WEIGHTS = RNG.random((8, 5)).astype(np.float32)
CASES = {
    "tokens": (MASK, None, MASK),
    "examples": (ROWS, None, np.repeat(ROWS[:, None], 5, 1)),
    "weights of tokens": (None, WEIGHTS, WEIGHTS),
    "weights of examples": (MASK, WEIGHTS[:, 0], MASK * WEIGHTS[:, :1]),
    "all": (MASK, WEIGHTS, MASK * WEIGHTS),
    "none real": (0 * MASK, None, 0 * MASK),
    "all real": (None, None, np.ones_like(MASK)),
}
kinds = pytest.mark.parametrize("dtype", [jnp.float32, jnp.int32, jnp.bool_], ids=str)


def mean_of(values, share):
    """The weighted mean in float64, and its gradient by the values."""
    share = np.float64(share)
    share = share / share.sum() if share.sum() else share
    return (share * values).sum(where=share > 0), share


@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_mean_and_its_gradient(name, n, check_vma):
    mask, weights, share = CASES[name]
    values = np.where(share, VALUES, np.nan).astype(np.float32) if share.any() else VALUES
    given = {"values": values, "mask": mask, "weights": weights}
    given = {k: v for k, v in given.items() if v is not None}

    def mean_and_gradient(given):
        def loss(values):
            rest = {k: v for k, v in given.items() if k != "values"}
            return tx.example_mean(values, axis="data", **rest)

        mean, gradient = jax.value_and_grad(loss)(given["values"])
        return tx.pmean(mean, "data"), gradient / n  # pmean's share of each device

    got, gradient = tx.testing.run_sharded(
        mean_and_gradient,
        given,
        axes={"data": n},
        out_specs=(P(), P("data")),
        check_vma=check_vma,
    )
    wanted, by_value = mean_of(values, share)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, by_value, rtol=1e-5, atol=1e-9)


@kinds
def test_the_mask_may_be_of_any_kind_under_strict_promotion(dtype):
    def f(values, mask):
        return tx.pmean(
            tx.example_mean(values.astype(jnp.bfloat16), mask.astype(dtype), axis="data"), "data"
        )

    with jax.numpy_dtype_promotion("strict"):
        got = tx.testing.run_sharded(f, VALUES, MASK, axes={"data": 4}, out_specs=P())
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, mean_of(VALUES, MASK)[0], rtol=2**-7)


@pytest.mark.parametrize(
    "values, options, text",
    [
        (
            (),
            {},
            "tx.example_mean needs values of shape (batch,), or (batch, length), got a scalar",
        ),
        (
            (2, 5),
            {"mask": jnp.ones(5)},
            "tx.example_mean needs a mask (and weights) of the shape of values or of its first "
            "dims, got (5,) for values of shape (2, 5): (batch,) for examples, (batch, length) for "
            "tokens",
        ),
        ((2,), {"mask": jnp.ones((2, 5))}, "got (2, 5) for values of shape (2,)"),
        ((2,), {"weights": jnp.ones(())}, "got () for values of shape (2,)"),
    ],
)
def test_shapes_that_do_not_fit(values, options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        tx.testing.run_sharded(
            lambda x: tx.example_mean(jnp.ones(values), axis="data", **options) + x,
            np.zeros(2, np.float32),
            axes={"data": 2},
        )


# In a step: a linear model of each token, whose loss is the mean over the real ones.
X = RNG.normal(size=(8, 5, 3)).astype(np.float32)
BATCH = {"x": X, "mask": MASK}
W = np.float32([0.3, -0.2, 0.5])


def losses(w, batch):
    return (batch["x"] @ w - 1) ** 2


def in_float64(x, share):
    """The loss and its gradient, by hand."""
    share = np.float64(share) / share.sum()
    error = np.float64(x) @ np.float64(W) - 1
    return (share * error**2).sum(), np.einsum("bl,bld->d", 2 * share * error, np.float64(x))


def train(n, loss_and_grads, batch=BATCH):
    @tx.step_fn
    def step(state, batch):
        loss, grads = loss_and_grads(state, batch)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    engine = toys.engine(n, optimizer=tx.optim.sgd(1.0))
    state, metrics = step(engine.create_state(W), batch)
    return float(metrics["loss"]), W - np.asarray(state.stored_params)


def at_once(state, batch):
    return tx.value_and_grad(
        lambda w: tx.example_mean(losses(w, batch), batch["mask"], axis="data")
    )(state.params)


def added_up(split, counts_each=False):
    """Accumulate over the parts that `split` makes, with the count of the whole batch."""

    def loss_and_grads(state, batch):
        count = None if counts_each else tx.psum(batch["mask"].sum(), "data")

        def add(total, part):
            def loss(w):
                return tx.example_mean(losses(w, part), part["mask"], axis="data", count=count)

            return jax.tree.map(jnp.add, total, tx.value_and_grad(loss)(state.params)), None

        zeros = tx.vary((jnp.float32(0), jnp.zeros(3)), "data")
        return lax.scan(add, zeros, jax.tree.map(split, batch))[0]

    return loss_and_grads


def microbatches(leaf):
    return leaf.reshape(2, -1, *leaf.shape[1:])


def chunks(leaf):
    """The tokens of all examples in five parts, one after the other."""
    return jnp.moveaxis(leaf[:, :, None], 1, 0)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("how", [at_once, added_up(microbatches), added_up(chunks)])
def test_a_step_over_tokens(how, n):
    loss, gradient = in_float64(X, MASK)
    got, moved = train(n, how)
    assert got == pytest.approx(loss, rel=1e-5)
    np.testing.assert_allclose(moved, gradient, rtol=1e-4, atol=1e-6)


PART = "counts what is real in one part of the batch, inside a loop over the parts: a mean of means"


@pytest.mark.parametrize(
    "n, split, text",
    [
        (1, microbatches, "needs the mask of the whole batch, 8 examples on this device, got 4"),
        (4, microbatches, "needs the mask of the whole batch, 2 examples on this device, got 1"),
        (4, chunks, PART),  # on one device the data are not followed
    ],
)
def test_parts_that_count_their_own_tokens_are_refused(n, split, text):
    with pytest.raises(ValueError, match=re.escape(text)) as caught:
        train(n, added_up(split, counts_each=True))
    assert "Take count = tx.psum(jnp.sum(mask), 'data') of the whole batch's mask" in str(
        caught.value
    )


# Evaluation over batches of different numbers of tokens.
PARTS = [{"x": (1 + i) * X, "mask": np.roll(MASK, i) * (np.arange(5) < 5 - i)} for i in range(3)]
TOKEN_LOSS = np.average(
    np.concatenate([losses(np.float64(W), part) for part in PARTS]).ravel(),
    weights=np.concatenate([part["mask"] for part in PARTS]).ravel(),
)


def evaluate(n, step, batches):
    engine = toys.engine(n)
    return engine.evaluate(step, engine.create_state(W), batches)


def added(state, batch, mask="mask"):
    each, kept = losses(state.params, batch), batch[mask]
    return {"loss": tx.Mean(*tx.psum((jnp.sum(each * kept), jnp.sum(kept)), "data"))}


def averaged(state, batch, **options):
    options = {"mask": batch["tokens"]} | {k: batch[v] for k, v in options.items()}
    mean = tx.example_mean(losses(state.params, batch), axis="data", **options)
    return {"loss": tx.pmean(mean, "data")}


@pytest.mark.parametrize("n", [1, 2, 4])
def test_evaluations_add_up_totals_and_counts(n):
    assert evaluate(n, added, PARTS)["loss"] == pytest.approx(TOKEN_LOSS, rel=1e-5)
    padding = {"x": X, "mask": 0 * MASK}
    got = evaluate(n, added, [padding, *PARTS, padding])
    assert got["loss"] == pytest.approx(TOKEN_LOSS, rel=1e-5)
    text = "needs at least one real example, got none in data: there is nothing to average metrics"
    with pytest.raises(ValueError, match=text + re.escape("['loss'] over")):
        evaluate(n, added, [padding])


def test_totals_beside_a_mean_over_examples():
    def step(state, batch):
        rows = tx.example_mean(batch["x"][:, 0, 0], batch["mask"], axis="data")
        return {**added(state, batch, "tokens"), "rows": tx.pmean(rows, "data")}

    rows = [np.roll(ROWS, i) for i in range(3)]
    batches = [
        {"x": part["x"], "tokens": part["mask"], "mask": mask}
        for part, mask in zip(PARTS, rows, strict=True)
    ]
    got = evaluate(4, step, batches)
    assert got["loss"] == pytest.approx(TOKEN_LOSS, rel=1e-5)
    firsts = np.concatenate([part["x"][:, 0, 0] for part in PARTS])
    assert got["rows"] == pytest.approx(np.average(firsts, weights=np.concatenate(rows)), rel=1e-5)


@pytest.mark.parametrize(
    "step, what",
    [
        (averaged, "tokens"),
        (lambda s, b: averaged(s, b, weights="tokens"), "weights"),
        (
            lambda s, b: {
                "m": tx.pmean(tx.example_mean(b["x"][:, 0, 0], b["real"], axis="data"), "data")
            },
            "a mask that is not batch['mask']",
        ),
    ],
    ids=["tokens", "weights", "examples"],
)
def test_a_mean_of_means_is_refused(step, what):
    """Of one batch it is right; over several it would not be that of the data."""
    batches = [{"x": p["x"], "tokens": p["mask"], "real": np.roll(ROWS, 3)} for p in PARTS]
    got = evaluate(4, step, batches[:1])
    if what == "tokens":
        alone = np.average(losses(np.float64(W), PARTS[0]), weights=PARTS[0]["mask"])
        assert got["loss"] == pytest.approx(alone, rel=1e-5)
    text = (
        f"takes a mean that weighs by {what}: over several batches that would be a mean of means. "
        "Return it as tx.Mean(total, count), which are added up: tx.Mean(*tx.psum((jnp.sum(values "
        "* mask), jnp.sum(mask)), axis))"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        evaluate(4, step, batches)


def test_a_training_step_reports_the_quotient():
    @tx.step_fn
    def step(state, batch):
        metrics = added(state, batch)
        _, grads = at_once(state, batch)
        return state.apply_gradients(grads=tx.pmean(grads, "data")), metrics

    engine = toys.engine(2)
    state, metrics = step(engine.create_state(W), BATCH)
    assert float(metrics["loss"]) == pytest.approx(in_float64(X, MASK)[0], rel=1e-5)
    _, metrics = step(state, {**BATCH, "mask": 0 * MASK})
    assert float(metrics["loss"]) == 0
