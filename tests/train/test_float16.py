"""Training in float16: what an overflow leaves alone, and that any plan gives the same numbers."""

import float16_steps as f16
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toys

import txcore as tx


def own_sgd():
    """An optimizer of a user's own, which knows no grad_scale."""

    def update(grads, opt_state, params, *, step):
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), {"n": opt_state["n"] + 1}

    return tx.optim.Optimizer(lambda params: {"n": np.int32(0)}, update)


OPTIMIZERS = {
    "sgd": lambda: tx.optim.sgd(tx.optim.warmup(0.1, 10), momentum=0.9, clip_norm=1.0),
    "adamw": lambda: tx.optim.adamw(1e-2, weight_decay=0.1),
    "optax": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "own": own_sgd,
}


@tx.step_fn
def busy_step(state, batch):
    """A step that changes all it can: `extra` before and after the update, and a weight decay."""
    state = state.replace(extra={**state.extra, "before": state.extra["before"] + 1})
    state, metrics = f16.train_step.fn(state, batch)
    metrics["norm"] = tx.optim.global_norm(state.stored_params)
    decayed = jax.tree.map(lambda p: 0.99 * p, state.stored_params)
    extra = {**state.extra, "after": state.extra["after"] + 1}
    return state.replace(stored_params=decayed, extra=extra), metrics


@pytest.mark.parametrize(
    "optimizer,n", [("sgd", 1), ("sgd", 4), ("adamw", 2), ("optax", 2), ("own", 2)]
)
def test_an_overflowed_step_changes_nothing_but_the_scale(optimizer, n):
    engine = f16.engine(n, optimizer=OPTIMIZERS[optimizer](), precision=f16.policy(initial=256))
    state = engine.create_state(toys.params(), extra={"before": np.int32(0), "after": np.int32(0)})
    state, _ = busy_step(state, toys.batch())
    assert (int(state.step), int(state.extra["after"])) == (1, 1)
    before = f16.on_host(state.arrays)
    # One example of the last device alone: all skip the step together.
    state, metrics = busy_step(state, f16.huge(toys.batch(), 15))
    after = f16.on_host(state.arrays)
    scaling, old = after.pop("loss_scaling"), before.pop("loss_scaling")
    assert (scaling.scale, scaling.good_steps, scaling.skipped_steps) == (128, 0, 1)
    assert (old.scale, old.good_steps, old.skipped_steps) == (256, 1, 0)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    # What the step itself saw after the update was the old parameters too.
    np.testing.assert_allclose(metrics["norm"], tx.optim.global_norm(before["stored_params"]))
    state, _ = busy_step(state, toys.batch())
    assert (int(state.step), int(state.extra["before"])) == (2, 2)
    assert np.isfinite(state.params["w1"]).all()
    assert (np.asarray(state.params["w1"]) != before["stored_params"]["w1"]).any()


def test_at_the_minimum_nothing_changes_at_all():
    state = f16.engine(precision=f16.policy(initial=2, minimum=2)).create_state(toys.params())
    before = f16.on_host(state.arrays)
    for _ in range(3):
        state, _ = f16.train_step(state, f16.huge(toys.batch(), 0))
    after = f16.on_host(state.arrays)
    assert after["loss_scaling"]._asdict() == {
        "scale": 2,
        "good_steps": 0,
        "skipped_steps": 3,
        "culprit": 0,
    }
    jax.tree.map(
        np.testing.assert_array_equal,
        {**after, "loss_scaling": None},
        {**before, "loss_scaling": None},
    )


def test_the_random_keys_of_a_skipped_step_come_again():
    @tx.step_fn
    def step(state, batch):
        drawn = jax.vmap(jax.random.bits)(state.example_keys(batch)).sum()
        state, metrics = f16.train_step.fn(state, batch)
        return state, {**metrics, "drawn": tx.psum(drawn, "data")}

    state = f16.engine(precision=f16.policy(initial=256)).create_state(toys.params())
    drawn = []
    for batch in (f16.huge(toys.batch(), 0), toys.batch(), toys.batch()):
        state, metrics = step(state, batch)
        drawn.append(int(metrics["drawn"]))
    assert drawn[0] == drawn[1] != drawn[2]


def accumulating(microbatches):
    """The step with gradients added up over microbatches in a loop."""

    @tx.step_fn
    def step(state, batch):
        count = tx.psum(jnp.sum(batch["mask"]), "data")

        def split(x):
            return x.reshape(microbatches, -1, *x.shape[1:])

        def add(total, part):
            def loss_of(params):
                return f16.local_loss(state, params, part, count)

            both = tx.value_and_grad(loss_of, loss_scale=state.loss_scale)(state.params)
            return jax.tree.map(jnp.add, total, both), None

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params))
        (loss, grads), _ = jax.lax.scan(add, tx.vary(zeros, "data"), jax.tree.map(split, batch))
        state = state.apply_gradients(grads=tx.pmean(grads, "data"))
        return state, {"loss": tx.pmean(loss, "data")}

    return step


BATCHES = [toys.batch(seed=i) for i in range(4)]
# The local sums are rounded to float16 (2**-11) in another order; of gradients that cancel,
# that is a share of the largest.
LOOSE = {"rtol": 5e-3, "atol": 5e-3}


@pytest.mark.parametrize(
    "step,n",
    [(f16.train_step, 2), (f16.train_step, 4), (accumulating(2), 4)],
    ids=["whole on 2", "whole on 4", "microbatches on 4"],
)
def test_any_number_of_devices_gives_the_same_numbers(step, n):
    engines = [f16.engine(k, precision=f16.policy(initial=1024)) for k in (1, n)]
    tx.testing.assert_plans_agree(step, toys.params(), BATCHES, engines=engines, **LOOSE)


def test_microbatches_give_the_numbers_of_the_whole_batch():
    ends = []
    for step in (f16.train_step, accumulating(4)):
        state = f16.engine(2, precision=f16.policy(initial=1024)).create_state(toys.params())
        for batch in BATCHES:
            state, metrics = step(state, batch)
        ends.append(f16.on_host((state.stored_params, metrics)))
        assert int(state.step) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-3), *ends)


def test_the_parity_kit_compares_the_scale():
    engines = [f16.engine(precision=f16.policy(initial=scale)) for scale in (512, 1024)]
    with pytest.raises(AssertionError, match=r"step 0: loss_scaling\.scale differs"):
        tx.testing.assert_plans_agree(
            f16.train_step, toys.params(), BATCHES, engines=engines, **LOOSE
        )
    engines = [f16.engine(precision=f16.policy(initial=512)), f16.engine(precision="float32")]
    tx.testing.assert_plans_agree(f16.train_step, toys.params(), BATCHES, engines=engines, **LOOSE)


def test_the_loss_curve_is_that_of_float32():
    """Within 2% of the loss at every step, and 1e-3 where little is left of it."""
    curves = {}
    for precision in ("float32", f16.policy(initial=1024)):
        state = f16.engine(2, precision=precision).create_state(toys.params())
        curve = curves[state.precision.compute] = []
        for i in range(200):
            state, metrics = f16.train_step(state, toys.batch(seed=i % 10))
            curve.append(float(metrics["loss"]))
    assert curves["float32"][-1] < curves["float32"][0] / 20
    assert int(state.loss_scaling.skipped_steps) == 0
    np.testing.assert_allclose(curves["float16"], curves["float32"], rtol=0.02, atol=1e-3)


def test_one_program_for_every_scale_and_what_went_in_is_donated():
    engine = f16.engine(2, precision=f16.policy(initial=256, growth_interval=1))
    first = engine.create_state(toys.params())
    state, _ = f16.train_step(first, toys.batch())
    assert first.loss_scaling.scale.is_deleted()
    seconds, structure = engine.compile_seconds, jax.tree.structure(state)
    for batch in (toys.batch(), f16.huge(toys.batch(), 3), toys.batch()):
        state, _ = f16.train_step(state, batch)
        assert jax.tree.structure(state) == structure
    assert engine.compile_seconds == seconds
    assert float(state.loss_scale) == 256 * 2 * 2 / 2 * 2
    assert {x.dtype.name for x in state.loss_scaling} == {"float32", "int32"}
    assert len(jax.tree.leaves(state.arrays["loss_scaling"])) == 4


def rows(report):
    """The compiled collectives; in which order XLA merged the tags' operands is its own affair."""
    return [
        (r.kind, r.axes, r.dtype, r.payload_bytes, sorted(r.tags), r.origin)
        for r in report.collectives
    ]


@pytest.mark.parametrize("n", [1, 4])
def test_the_audit_is_exact_and_finds_what_it_finds_in_float32(n):
    reports = []
    for precision in ("float32", "float16"):
        engine = f16.engine(n, precision=precision)
        state = engine.create_state(toys.params())
        reports.append(engine.audit(f16.train_step, state, toys.batch()))
        assert reports[-1].exact
    assert rows(reports[0]) == rows(reports[1])
    assert len(rows(reports[1])) == (2 if n > 1 else 0)


def test_on_a_target_that_is_not_here():
    engine = f16.engine(2)
    state = engine.create_state(toys.params())
    report = engine.audit(f16.train_step, state, toys.batch(), target="cpu:8", mesh={"data": 8})
    assert report.exact


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_precisions_keep_no_scale_and_run_the_same_step(precision):
    state = f16.engine(2, precision=precision).create_state(toys.params())
    assert state.loss_scale is None
    assert jax.tree.leaves(state.arrays["loss_scaling"]) == []
    new, loss = toys.reference_step(toys.params(), toys.batch())
    state, metrics = f16.train_step(state, toys.batch())
    tolerance = 1e-5 if precision == "float32" else 0.05
    np.testing.assert_allclose(metrics["loss"], loss, rtol=tolerance)
    np.testing.assert_allclose(state.params["w1"], new["w1"], rtol=tolerance, atol=tolerance)


def test_evaluation_is_not_scaled_and_changes_no_scale():
    def eval_step(state, batch):
        loss = f16.local_loss(state, state.params, batch)
        return {"loss": tx.pmean(loss, "data"), "scale": state.loss_scale}

    engine = f16.engine(2)
    state = engine.create_state(toys.params())
    metrics = engine.evaluate(eval_step, state, [toys.batch()])
    np.testing.assert_allclose(
        metrics["loss"], toys.reference_step(toys.params(), toys.batch())[1], rtol=5e-3
    )
    assert metrics["scale"] == float(state.loss_scale) == 65536


def test_fit_logs_the_scale_and_goes_on():
    seen = []
    engine = f16.engine(2, loggers=[seen.append], precision=f16.policy(initial=256))

    @tx.step_fn
    def step(state, batch):
        state, metrics = f16.train_step.fn(state, batch)
        return state, {**metrics, "loss_scale": state.loss_scale}

    data = [toys.batch(), f16.huge(toys.batch(), 0), toys.batch()]
    state = engine.fit(step, engine.create_state(toys.params()), data, epochs=1)
    scales = [record.metrics["loss_scale"] for record in seen if record.kind == "step"]
    assert scales == [256, 128, 128]
    assert int(state.step) == 2  # completed updates; with the skipped ones the batches seen
    assert int(state.loss_scaling.skipped_steps) == 1


def test_a_step_that_trains_nothing_needs_no_scale():
    @tx.step_fn
    def step(state, batch):
        mean = tx.pmean(jnp.mean(batch["x"]), "data")
        return state.replace(extra=0.9 * state.extra + 0.1 * mean), {}

    state = f16.engine(2).create_state(toys.params(), extra=np.float32(0))
    state, _ = step(state, toys.batch())
    np.testing.assert_allclose(state.extra, 0.1 * toys.batch()["x"].mean(), rtol=1e-6)


def test_the_scale_keeps_gradients_that_float16_would_lose():
    """d mean(1e-4 * 1e-4 * w): 1e-8 is below the smallest float16, 6e-8."""

    @tx.step_fn
    def step(state, batch):
        def loss_of(w):
            # Of the batch, since XLA multiplies two constants beforehand, and loses them.
            return jnp.mean(state.precision.cast(w) * batch["small"] * batch["small"])

        grads = tx.grad(loss_of, loss_scale=state.loss_scale)(state.params)
        return state.apply_gradients(grads=tx.pmean(grads, "data")), {}

    batch = {"small": np.full(4, 1e-4, np.float16)}
    moved = {}
    for scale in (1.0, 2.0**14):
        precision = tx.Precision("float16", loss_scale=scale)
        engine = f16.engine(optimizer=tx.optim.sgd(1e8), precision=precision)
        state, _ = step(engine.create_state(np.float32(0)), batch)
        moved[scale] = float(state.params)
    assert moved[1.0] == 0
    np.testing.assert_allclose(moved[2.0**14], -1, rtol=1e-2)
