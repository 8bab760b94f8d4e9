"""Leaves of a batch have one row for each example, at least one, and the mask is 0 and 1."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from guard_data import MASK, PARAMS, SQUARES, X, Y, errors, f64, weighted
from jax.sharding import PartitionSpec as P

import txcore as tx

LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 3], np.int32)
CLASS_WEIGHTS = np.array([1, 2, 4, 9], np.float32)
DECLARED = "Plan(batch={'cw': P()})"


def engine(n, **batch):
    return toys.engine(n, plan=tx.Plan(data_parallel=tx.DP("data"), batch=batch))


def eval_step(state, batch):
    return {"mse": tx.pmean(tx.example_mean(errors(state.params, batch), axis="data"), "data")}


def evaluated(n, batches, step=eval_step, **batch):
    made = engine(n, **batch)
    return made.evaluate(step, made.create_state(PARAMS), batches)


UNEQUAL = {
    "shared by all": (
        {"x": X, "y": LABELS, "cw": CLASS_WEIGHTS},
        "batch['cw'] has 4 rows, but batch['x'] has 8: all leaves of a batch need one row for "
        f"each example. What all examples share (class weights) is declared, {DECLARED}",
    ),
    "fewer labels": ({"x": X, "y": Y[:4]}, "batch['y'] has 4 rows, but batch['x'] has 8"),
    "more": ({"aux": np.zeros(16), "x": X, "y": Y}, "batch['aux'] has 16 rows, but batch['x'] has"),
    "a scalar": (
        {"x": X, "y": Y, "cw": np.float32(3)},
        "batch['cw'] needs to be an array with one row for each example, got a scalar array",
    ),
    "of a tuple": (
        (X, Y[:4]),
        "batch[1] has 4 rows, but batch[0] has 8: all leaves of a batch need one row for each "
        "example. What all examples share (class weights) is declared, as a leaf of a dict batch, "
        "by Plan(batch={key: P()})",
    ),
    "none": (
        {"x": X[:0], "y": Y[:0]},
        "batch['x'] has no rows: a batch needs at least one example",
    ),
    "weights as the mask": (
        {"x": X, "y": Y, "mask": np.float32([1, 2.5, 0, 1, 1, 1, 1, 1])},
        "batch['mask'] needs 1 for real examples and 0 for padding, got 2.5: give weights in a "
        "leaf of another name, to tx.example_mean(..., weights=...)",
    ),
}


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("name", UNEQUAL)
def test_refused_on_any_number_of_devices(name, n):
    batch, text = UNEQUAL[name]
    made = engine(n)
    state = made.create_state(PARAMS)
    for call in (toys.train_step, lambda s, b: made.evaluate(eval_step, s, [b])):
        with pytest.raises(ValueError, match=re.escape(text)):
            call(state, batch)


def test_refused_of_an_example_batch_for_a_target():
    made = engine(1)
    state = made.create_state(PARAMS)
    with pytest.raises(ValueError, match=re.escape("batch['y'] has 4 rows, but batch['x'] has 8")):
        made.audit(toys.train_step, state, {"x": X, "y": Y[:4]}, target="cpu:8", mesh={"data": 8})


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_advice_works(n):
    """Class weights, declared: the weighted cross-entropy of float64."""

    def step(state, batch):
        logits = batch["x"] @ jnp.stack([state.params["w"]] * 4, 1) * jnp.arange(4.0)
        losses = -jax.nn.log_softmax(logits)[jnp.arange(batch["y"].size), batch["y"]]
        weights = batch["cw"][batch["y"]]
        mean = tx.example_mean(losses, axis="data", weights=weights)
        return {"loss": tx.pmean(mean, "data")}

    batch = {"x": X, "y": LABELS, "cw": CLASS_WEIGHTS}
    logits = (f64(X) @ PARAMS["w"])[:, None] * np.arange(4)
    losses = np.log(np.exp(logits).sum(1)) - np.take_along_axis(logits, LABELS[:, None], 1)[:, 0]
    truth = np.average(losses, weights=CLASS_WEIGHTS[LABELS])
    assert evaluated(n, [batch], step, cw=P())["loss"] == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_batches_are_weighed_by_their_rows(n):
    """Whichever leaf comes first, and where each leaf's layout is declared."""
    last = {"aux": np.zeros(16), "x": 3 * X[:4], "y": Y[:4]}
    got = evaluated(n, [{"aux": np.zeros(16), "x": X, "y": Y}, last], aux=P())
    each = [SQUARES, f64((3 * X[:4]) @ PARAMS["w"] + PARAMS["b"] - Y[:4]) ** 2]
    truth = np.concatenate(each).mean()
    assert got["mse"] == pytest.approx(truth, rel=1e-5)
    whole = P("data")
    got = evaluated(n, [{"x": X, "y": Y}, {"x": 3 * X[:4], "y": Y[:4]}], x=whole, y=whole)
    assert got["mse"] == pytest.approx(truth, rel=1e-5)


def test_a_mask_of_something_else_is_not_a_batchs_mask():
    batch = {"x": X, "y": Y, "mask": np.ones((8, 5), np.float32)}
    text = (
        "engine.evaluate weighs batches by the real examples in batch['mask'], 1 or 0 for each in "
        "shape (batch,), got (4, 5): return every metric as tx.Mean(total, count), which are added "
        "up over the batches, or give a mask of something else (of tokens) another name"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        evaluated(2, [batch])
    batch["tokens"] = batch.pop("mask")
    assert evaluated(2, [batch])["mse"] == pytest.approx(SQUARES.mean(), rel=1e-5)


@pytest.mark.parametrize("values", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("mask", [jnp.bool_, jnp.int32, jnp.uint8, jnp.float32, jnp.bfloat16])
def test_a_masked_mean_under_strict_promotion(mask, values):
    def mean(v, m):
        return tx.pmean(tx.example_mean(v.astype(values), m.astype(mask), axis="data"), "data")

    with jax.numpy_dtype_promotion("strict"):
        got = tx.testing.run_sharded(mean, SQUARES, MASK, axes={"data": 4}, out_specs=P())
    assert got == pytest.approx(weighted(MASK)[0], rel=1e-2)
    assert got.dtype == np.float32


@pytest.mark.parametrize("mask", [jnp.bool_, jnp.int32, jnp.float32])
def test_a_masked_mean_of_nan_in_padding_and_of_no_example(mask):
    def mean(v, m):
        return tx.pmean(tx.example_mean(v, m.astype(mask), axis="data"), "data")

    options = {"axes": {"data": 4}, "out_specs": P()}
    values = np.where(MASK == 0, np.nan, SQUARES)
    got = tx.testing.run_sharded(mean, values, MASK, **options)
    assert got == pytest.approx(weighted(MASK)[0], rel=1e-6)
    assert tx.testing.run_sharded(mean, SQUARES, 0 * MASK, **options) == 0


def test_a_local_count_is_refused_outside_a_step():
    def mean(v, m):
        return tx.pmean(tx.example_mean(v, m, axis="data", count=m.sum()), "data")

    text = "what it is given varies along axis 'data': it is the number of one device. Write count"
    with pytest.raises(ValueError, match=re.escape(text)):
        tx.testing.run_sharded(mean, SQUARES, MASK, axes={"data": 4}, out_specs=P())


def test_clipping_outside_a_step_goes_by_types():
    def clipped(x, **options):
        return tx.optim.clip_by_global_norm(x, 1.0, **options)

    x = np.arange(8.0)
    text = (
        "clip_by_global_norm needs gradients that are whole and equal on every device, got "
        "leaf itself that varies along data: reduce it first (tx.pmean), or pass parts=True if "
        "each device's own norm is meant"
    )
    with pytest.raises(ValueError, match=re.escape(text)):
        tx.testing.run_sharded(clipped, x, axes={"data": 2})
    parts = tx.testing.run_sharded(lambda x: clipped(x, parts=True), x, axes={"data": 2})
    for part, own in zip(np.split(parts, 2), np.split(x, 2), strict=True):
        np.testing.assert_allclose(part, own / np.linalg.norm(own), rtol=1e-6)
    whole = tx.testing.run_sharded(
        lambda x: clipped(tx.pmean(x, "data")), x, axes={"data": 2}, out_specs=P()
    )
    mean = (x[:4] + x[4:]) / 2
    np.testing.assert_allclose(whole, mean / np.linalg.norm(mean), rtol=1e-6)
