"""value_and_grad(microbatches=): the step of the whole batch, in parts, reduced once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.testing import run_sharded


def step_of(loss, microbatches, **options):
    @tx.step_fn
    def step(state, batch):
        both = tx.value_and_grad(
            loss, microbatches=microbatches, loss_scale=state.loss_scale, **options
        )
        value, grads = both(state.params, batch)
        grads, state = state.sync_gradients(grads)
        state = state.apply_gradients(grads=grads)
        return state, {"loss": tx.pmean(value, "data", name="loss")}

    return step


def plain_loss(params, batch):
    return jnp.mean(toys.losses(params, batch))


def counted_loss(params, batch, count):
    values = toys.losses(params, batch)
    return tx.example_mean(values, batch["mask"], axis="data", count=count)


def weighted_loss(params, batch):
    """With another term, twice the counts, and a mask that is computed."""
    values, mask = toys.losses(params, batch), batch["mask"] > 0
    first = tx.example_mean(values, mask, axis="data", weights=jnp.abs(batch["y"]) * mask)
    decay = 0.01 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
    return first + 0.5 * tx.example_mean(values**2, mask, axis="data") + decay


@pytest.mark.parametrize("n, microbatches", [(1, 8), (2, 1), (4, 2), (4, 8)])
def test_the_curve_of_one_device_in_float64(n, microbatches):
    """The last batch is uneven: some devices and some parts have no real example at all."""
    engine, params = toys.engine(n), toys.params()
    state, step = engine.create_state(params), step_of(toys.local_loss, microbatches)
    for seed, masked in enumerate([0, 3, 0, 21]):
        batch = toys.batch(32, seed=seed, masked=masked)
        params, wanted = toys.reference_step(params, batch)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)
    for name, wanted in params.items():
        np.testing.assert_allclose(state.stored_params[name], wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [plain_loss, weighted_loss])
def test_as_the_whole_batch(loss):
    batches = [toys.batch(32, seed=s, masked=0 if loss is plain_loss else 5 * s) for s in (0, 1)]
    ends = []
    for n, microbatches in ((1, None), (4, 4)):
        engine = toys.engine(n, optimizer=tx.optim.sgd(0.01, momentum=0.9))
        state, step = engine.create_state(toys.params()), step_of(loss, microbatches)
        for batch in batches:
            state, metrics = step(state, batch)
        ends.append(jax.tree.map(np.asarray, (state.arrays, metrics)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), *ends)


def test_a_given_count_is_that_of_the_whole_batch():
    @tx.step_fn
    def step(state, batch):
        count = tx.psum(batch["mask"].sum(), "data", name="count")
        loss = jax.checkpoint(functools.partial(counted_loss, count=count))
        value, grads = tx.value_and_grad(loss, microbatches=4)(state.params, batch)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(value, "data")}

    batch = toys.batch(32, masked=11)
    state, metrics = step(toys.engine(2).create_state(toys.params()), batch)
    params, wanted = toys.reference_step(toys.params(), batch)
    np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)
    np.testing.assert_allclose(state.stored_params["w1"], params["w1"], rtol=1e-4, atol=1e-6)


def test_what_jax_keeps_of_an_inner_function_is_of_its_microbatch():
    """jax.jit keeps a trace by its shapes: a part as large as a whole batch has another factor."""
    inner = jax.jit(counted_loss)

    def f(w, x):
        batch = {"x": x, "y": x.sum(1), "mask": x[:, 0] < 99}
        loss = functools.partial(inner, count=jnp.float32(32))
        value, _ = tx.value_and_grad(loss, axis="data", microbatches=2)(w, batch)
        half = jax.tree.map(lambda a: a[:8], batch)
        alone = tx.value_and_grad(functools.partial(inner, count=jnp.float32(16)), axis="data")
        return tx.pmean((value, alone(w, half)[0]), "data")

    x = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    specs = {"in_specs": (P(), P("data")), "out_specs": P(), "axes": {"data": 2}}
    value, half = run_sharded(f, toys.params(), x, **specs)
    losses = np.asarray(toys.losses(toys.params(), {"x": x, "y": x.sum(1)}))
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(half, losses.reshape(2, 2, 8)[:, 0].mean(), rtol=1e-5)


@pytest.mark.parametrize("loss", [plain_loss, toys.local_loss])
def test_the_audit_is_exact_and_the_gradients_are_sent_once(loss):
    engine = toys.engine(8)
    state = engine.create_state(toys.params())
    report = engine.audit(step_of(loss, 4), state, toys.batch(64))
    assert report.exact, report
    assert {row.trips for row in report.collectives} == {1}
    (line, *beyond) = report.plan
    assert (line.payload_bytes, line.found_bytes, line.times, line.factor) == (160, 160, 1, "mean")
    counts = {"psum/example_count"} if loss is toys.local_loss else set()
    assert {row.what for row in beyond} == {"pmean/loss"} | counts


def trapped(state, batch):
    """One reduction a microbatch."""
    parts = jax.tree.map(lambda a: a.reshape(4, -1, *a.shape[1:]), batch)

    def add(total, part):
        grads = tx.pmean(tx.grad(plain_loss)(state.params, part), "data", name="grads")
        return jax.tree.map(lambda t, g: t + g / 4, total, grads), None

    zeros = jax.tree.map(jnp.zeros_like, state.stored_params)
    return state.apply_gradients(grads=jax.lax.scan(add, zeros, parts)[0]), {}


def trapped_in_a_bucket(state, batch):
    parts = jax.tree.map(lambda a: a.reshape(4, -1, *a.shape[1:]), batch)

    def add(total, part):
        grads = tx.grad(plain_loss)(state.params, part)
        flat = jnp.concatenate([grads["w1"].ravel(), grads["w2"].ravel()])
        return total + tx.pmean(flat, "data", name="bucket") / 4, None

    flat, _ = jax.lax.scan(add, jnp.zeros(40), parts)
    grads = {"w1": flat[:32].reshape(4, 8), "w2": flat[32:].reshape(8, 1)}
    return state.apply_gradients(grads=grads), {}


@pytest.mark.parametrize("step", [trapped, trapped_in_a_bucket])
def test_one_reduction_a_microbatch_is_found(step):
    engine = toys.engine(2)
    report = engine.audit(tx.step_fn(step), engine.create_state(toys.params()), toys.batch(32))
    (line,) = report.plan
    assert (line.payload_bytes, line.found_bytes, line.times) == (160, 160, 4)
    assert {row.trips for row in report.collectives} == {4}
    assert report.verdict() == (
        f"proved: {len(report.collectives)} collective{'s'[: len(report.collectives) > 1]}, "
        f"640 B payload a call, all declared ({len(report.collectives)} txcore), as the plan "
        "predicts, but 4 times the gradients, once in each trip of a loop: add up what it "
        "computes, and reduce the sum after it; nothing was added"
    )


def test_aux_is_stacked():
    def loss(params, batch):
        values = toys.losses(params, batch)
        return values.mean(), {"worst": values.max(), "each": values}

    def f(w, x):
        batch = {"x": x, "y": x.sum(1)}
        options = {"has_aux": True, "axis": "data", "microbatches": 4}
        (_, aux), grads = tx.value_and_grad(loss, **options)(w, batch)
        alone, same = tx.grad(loss, **options)(w, batch)
        np.testing.assert_equal(jax.tree.map(jnp.shape, alone), jax.tree.map(jnp.shape, grads))
        return aux, same["each"] - aux["each"]

    x = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    specs = {"in_specs": (P(), P("data")), "axes": {"data": 2}}
    aux, zero = run_sharded(f, toys.params(), x, out_specs=P("data"), **specs)
    wanted = np.asarray(toys.losses(toys.params(), {"x": x, "y": x.sum(1)})).reshape(8, 4)
    np.testing.assert_allclose(aux["each"], wanted, rtol=1e-5)
    np.testing.assert_allclose(aux["worst"], wanted.max(1), rtol=1e-5)
    assert not zero.any()


def test_batch_statistics_are_carried_from_part_to_part():
    """Running means of what each microbatch of the global batch holds, in order."""

    @tx.step_fn
    def step(state, batch):
        def loss(params, running, part):
            mean, _ = tx.batch_moments(part["x"], "data")
            seen = jnp.where(jnp.isfinite(mean), 0.9 * running["mean"] + 0.1 * mean, 0)
            sums = {"count": running["count"] + (part["y"] > 0).sum(), "mean": seen}
            return plain_loss(params, part), sums

        start = {**state.extra, "count": jnp.int32(0)}
        options = {"has_aux": True, "microbatches": 4, "carry": 1}
        (value, end), grads = tx.value_and_grad(loss, **options)(state.params, start, batch)
        grads, state = state.sync_gradients(grads)
        state = state.apply_gradients(grads=grads).replace(extra={"mean": end["mean"]})
        return state, {"loss": tx.pmean(value, "data"), "positive": tx.psum(end["count"], "data")}

    batch, engine = toys.batch(32), toys.engine(2)
    extra = {"mean": np.zeros(4, np.float32)}
    state, metrics = step(engine.create_state(toys.params(), extra), batch)
    running, parts = np.zeros(4), batch["x"].reshape(2, 4, 4, 4)  # devices, microbatches
    for i in range(4):
        running = 0.9 * running + 0.1 * parts[:, i].reshape(8, 4).astype(np.float64).mean(0)
    np.testing.assert_allclose(state.extra["mean"], running, rtol=1e-5, atol=1e-7)
    assert metrics["positive"] == (batch["y"] > 0).sum()


def test_each_example_keeps_its_key():
    def loss(params, batch, keys):
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5))(keys)
        return jnp.mean(toys.losses(params, batch) * kept)

    def run(n, microbatches):
        @tx.step_fn
        def step(state, batch):
            both = tx.value_and_grad(loss, microbatches=microbatches)
            value, grads = both(state.params, batch, state.example_keys(batch))
            grads, state = state.sync_gradients(grads)
            return state.apply_gradients(grads=grads), {"loss": tx.pmean(value, "data")}

        return float(step(toys.engine(n).create_state(toys.params()), toys.batch(32))[1]["loss"])

    assert run(1, None) == pytest.approx(run(4, 4), rel=1e-5)


def test_sums_are_wider_than_the_parameters():
    """256 times 1/256 + 1 in bfloat16 would end at 1, whatever is added to it."""
    params = {"w": jnp.ones(4, jnp.bfloat16)}

    def f(w, x):
        loss = lambda w, x: jnp.mean(x) * w["w"].sum()  # noqa: E731
        return tx.pmean(tx.grad(loss, axis="data", microbatches=256)(w, x), "data")

    x = np.where(np.arange(512) % 256 == 0, 256.0, 1.0).astype(np.float32)
    specs = {"in_specs": (P(), P("data")), "out_specs": P(), "axes": {"data": 2}}
    grads = run_sharded(f, params, x.astype(jnp.bfloat16), **specs)
    assert grads["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(grads["w"].astype(np.float32), x.mean(), rtol=2**-8)


def test_float16_is_unscaled_and_one_overflow_skips_the_step():
    def loss(params, batch):
        half = jax.tree.map(lambda p: p.astype(jnp.float16), params)
        return toys.local_loss(half, jax.tree.map(lambda x: x.astype(jnp.float16), batch))

    # Of the whole batch it is the largest that no gradient overflows with.
    engine = toys.engine(2, precision=tx.Precision("float16", loss_scale=2.0**13))
    state, step = engine.create_state(toys.params()), step_of(loss, 16)
    batch = toys.batch(32, masked=0)
    plain, _ = step_of(loss, None)(engine.create_state(toys.params()), batch)
    state, _ = step(state, batch)
    assert int(state.loss_scaling.skipped_steps) == int(plain.loss_scaling.skipped_steps) == 0
    wanted = plain.stored_params["w1"]
    np.testing.assert_allclose(state.stored_params["w1"], wanted, rtol=2e-3, atol=2e-3)
    batch["x"][5] = np.inf
    state, _ = step(state, batch)
    assert int(state.loss_scaling.skipped_steps) == 1


SHAPES = {"x": np.ones((8, 4), np.float32), "y": np.ones(8, np.float32)}


@pytest.mark.parametrize(
    "args, options, text",
    [
        ((SHAPES,), {"microbatches": 0}, "needs microbatches= a count from 1 on, got 0"),
        ((SHAPES,), {"microbatches": 2.5}, "needs microbatches= a count from 1 on, got 2.5"),
        ((SHAPES,), {"microbatches": 3}, "a divisor of the 4 examples of this device, got 3"),
        ((), {"microbatches": 2}, "needs an argument to split, got none but what is different"),
        (
            ({**SHAPES, "w": np.ones((4, 2), np.float32)},),
            {"microbatches": 2},
            "needs the same number of examples in all that it splits, got 2 in argument 1['w'], "
            "4 in argument 1['x']",
        ),
        (
            (SHAPES, np.float32(3)),
            {"microbatches": 2},
            "but argument 2, float32[], has no rows: let",
        ),
        ((SHAPES,), {"carry": 1}, "has_aux=True, whose aux is the argument's next value, got carr"),
        ((SHAPES,), {"carry": 1, "microbatches": 2}, "got carry=1, microbatches=2 and has_aux=Fal"),
        (
            (SHAPES,),
            {"carry": 0, "microbatches": 2, "has_aux": True},
            "needs carry= an argument that is not differentiated, got 0",
        ),
        (
            (SHAPES,),
            {"carry": 2, "microbatches": 2, "has_aux": True},
            "needs carry= one of the 2 arguments that is not differentiated, got 2",
        ),
    ],
)
def test_refused(args, options, text):
    def f(w, *args):
        loss = lambda w, *rest: plain_loss(w, SHAPES)  # noqa: E731
        return tx.value_and_grad(loss, axis="data", **options)(w, *args)

    specs = [jax.tree.map(lambda x: P("data") if x.ndim else P(), a) for a in args]
    with pytest.raises(ValueError, match=re.escape(text)):
        run_sharded(f, toys.params(), *args, axes={"data": 2}, in_specs=(P(), *specs))


def test_what_all_examples_share_is_not_split():
    """A table of classes with as many rows as there are examples would be cut in parts."""

    @tx.step_fn
    def step(state, batch):
        loss = lambda params, batch, table: plain_loss(params, batch) * table.sum()  # noqa: E731
        _, grads = tx.value_and_grad(loss, microbatches=2)(state.params, batch, state.extra)
        return state.apply_gradients(grads=tx.pmean(grads, "data")), {}

    state = toys.engine(2).create_state(toys.params(), np.ones(8, np.float32))
    with pytest.raises(
        ValueError, match=r"argument 2, float32\[8\], is the same along axis 'data': let"
    ):
        step(state, toys.batch(16))


def by_parameters(params, batch):
    weights = jax.nn.sigmoid(batch["x"] @ params["w1"])[:, 0]
    return tx.example_mean(toys.losses(params, batch), axis="data", weights=weights)


def row_by_row(params, batch):
    """Means over halves of the part."""
    halves = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
    return jax.lax.map(lambda half: toys.local_loss(params, half), halves).mean()


@pytest.mark.parametrize(
    "loss, text",
    [
        (jax.checkpoint(toys.local_loss), "inside of a function that jax traces by itself"),
        (jax.jit(toys.local_loss), "inside of a function that jax traces by itself"),
        (by_parameters, "by what it differentiates or carries from one to the next"),
        (row_by_row, "needs the mask of the whole batch, 4 examples on this device, got 2"),
        (
            tx.value_and_grad(lambda p, b: 0.0, axis="data", microbatches=2),
            "needs one loop over microbatches, got microbatches= inside of another's",
        ),
    ],
)
def test_a_count_that_is_not_of_the_whole_batch_is_refused(loss, text):
    for _ in range(2):  # jax keeps what it has traced
        state = toys.engine(2).create_state(toys.params())
        with pytest.raises(ValueError, match=re.escape(text)):
            step_of(loss, 4)(state, toys.batch(32))
