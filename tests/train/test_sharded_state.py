"""State in shards over the data axes (ZeRO): the same run as on one device, in less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sharded_models as models
from sharded_models import DATA, KINDS
from split_models import RULES

import txcore as tx

pytestmark = pytest.mark.sampled(2)

# (replica, data), (replica, data, model); with the axis that splits, None for both.
LAYOUTS = [((1, 2), None), ((1, 4), None), ((2, 4), None), ((2, 2), "data"), ((2, 2), "replica")]


def close(tree, truth, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), tree, truth)


def part_of(x):
    return x.addressable_shards[0].data.shape


@pytest.mark.parametrize("shard", KINDS)
@pytest.mark.parametrize("shape, axis", LAYOUTS)
def test_the_same_curve_as_in_numpy(shape, axis, shard):
    truth = models.Truth(models.params(), clip=0.5)
    optimizer = tx.optim.sgd(0.1, momentum=0.9, clip_norm=0.5)
    engine = models.engine(shape, optimizer, shard=shard, shard_axis=axis)
    state, losses = models.run(engine)
    close(losses, [truth.step(models.batch(seed)) for seed in range(3)])
    close(models.host(state.stored_params), truth.p)
    close(models.host(state.opt_state["velocity"]), truth.v)
    engine.check_replicas(state)


@pytest.mark.parametrize("shard", KINDS)
def test_with_parts_over_another_axis(shard):
    truth = models.Truth(models.params(), clip=0.5)
    optimizer = tx.optim.sgd(0.1, momentum=0.9, clip_norm=0.5)
    engine = models.engine((1, 2, 2), optimizer, shard=shard, rules=RULES)
    state, losses = models.run(engine)
    close(losses, [truth.step(models.batch(seed)) for seed in range(3)])
    close(models.host(state.stored_params), truth.p)
    assert part_of(state.opt_state["velocity"]["mlp"]["w1"]) == (3, 4)
    assert part_of(state.opt_state["velocity"]["mlp"]["b1"]) == (2,)


def test_each_device_holds_its_part_of_the_moments():
    state = models.engine((1, 4), tx.optim.adamw(0.1), shard="optimizer").create_state(
        models.params()
    )
    for name in ("m", "v"):
        assert jax.tree.map(part_of, state.opt_state[name]) == {
            "mlp": {"w1": (6, 2), "b1": (2,), "w2": (2, 3)},
            "b2": (3,),  # 4 devices divide neither 3 nor 6
            "scale": (6,),
        }
    assert part_of(state.stored_params["mlp"]["w1"]) == (6, 8)


@pytest.mark.parametrize("shard", KINDS)
@pytest.mark.parametrize("shape, axis", [((1, 4), None), ((2, 2), "data")])
def test_the_audit_is_exact_and_as_predicted(shape, axis, shard):
    optimizer = tx.optim.adamw(0.1, clip_norm=1.0)
    engine = models.engine(shape, optimizer, shard=shard, shard_axis=axis, on_nonfinite="skip")
    report = engine.audit(models.train_step, engine.create_state(models.params()), models.batch())
    assert report.exact, report
    found = [(n.what, n.kind, n.axes, n.payload_bytes, n.found_bytes) for n in report.plan]
    data = tuple(a for a in DATA if engine.mesh.shape[a] > 1)
    # Two devices divide "scale" too, four don't.
    split = 4 * (48 + 8 + 24 + (6 if axis else 0))
    whole = 4 * (48 + 8 + 24 + 6 + 3) - split
    wanted = [("gradients", "all-reduce", data, whole, whole)]
    wanted += [("gradients", "reduce-scatter", ("data",), split, split)]
    if axis:
        wanted += [("gradients", "all-reduce", ("replica",), split // 2, split // 2)]
    wanted += [("parameters", "all-gather", ("data",), split, split)]
    if (
        shard == "parameters"
    ):  # the backward pass needs the second layer's weights, and w1 for scale
        again = 4 * (48 + 24)
        wanted += [("parameters again", "all-gather", ("data",), split, again)]
    wanted += [("gradient norm", "all-reduce", ("data",), 4, 4)]
    wanted += [("finite gradients", "all-reduce", ("data",), 4, 4)]
    wanted += [("pmean/loss", "all-reduce", data, 0, 4)]
    assert found == wanted
    assert {line.factor for line in report.plan if line.what == "gradients"} == {"mean"}


def test_a_forgotten_reduction_names_the_remedy():
    @tx.step_fn
    def step(state, b):
        loss, grads = tx.value_and_grad(models.loss_of)(state.params, b)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, DATA)}

    engine = models.engine((1, 4), shard="optimizer")
    text = (
        r"needs the gradient of params\['mlp'\]\['b1'\] in its shape \(2,\) \(this device's part "
        r"along 'data'\), got \(8,\). Write grads, state = state.sync_gradients\(grads\)"
    )
    with pytest.raises(ValueError, match=text):
        step(engine.create_state(models.params()), models.batch())


def test_a_second_reduction_is_refused():
    @tx.step_fn
    def step(state, b):
        loss, grads = tx.value_and_grad(models.loss_of)(state.params, b)
        grads, state = state.sync_gradients(grads)
        grads["mlp"] = tx.pmean(grads["mlp"], "data")
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, DATA)}

    engine = models.engine((1, 4), shard="optimizer")
    text = (
        r"needs this device's part of the gradient of params\['mlp'\]\['b1'\] along 'data', got "
        r"what is the same on every device \(test_sharded_state.py:\d+\): it was reduced once more"
    )
    with pytest.raises(ValueError, match=text):
        step(engine.create_state(models.params()), models.batch())


def test_a_parameter_that_the_loss_does_not_use():
    @tx.step_fn
    def step(state, b):
        loss, grads = tx.value_and_grad(lambda p: models.loss_of(p["used"], b))(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, DATA)}

    engine = models.engine((1, 2), shard="optimizer")
    start = {"used": models.params(), "unused": np.ones(4, np.float32)}
    state, _ = step(engine.create_state(start), models.batch())
    np.testing.assert_array_equal(state.stored_params["unused"], np.ones(4))


@pytest.mark.parametrize("shard", KINDS)
def test_an_overflow_in_one_shard_skips_on_all(shard):
    engine = models.engine(
        (1, 4),
        tx.optim.adamw(0.1),
        shard=shard,
        precision=tx.Precision("float16", loss_scale=256.0),
    )
    state = engine.create_state(models.params())
    b = models.batch()
    b["x"][5, 2] = 1e5  # inf in float16, so that what one example adds is NaN
    before = models.host(state.stored_params)
    state, _ = models.train_step(state, b)
    assert (int(state.step), int(state.loss_scaling.skipped_steps)) == (0, 1)
    jax.tree.map(np.testing.assert_array_equal, models.host(state.stored_params), before)
    state, _ = models.train_step(state, models.batch())
    assert int(state.step) == 1


@pytest.mark.parametrize("shard", KINDS)
def test_a_nan_in_one_shard_is_skipped(shard):
    @tx.step_fn
    def step(state, b):
        loss, grads = tx.value_and_grad(models.loss_of)(state.params, b)
        grads, state = state.sync_gradients(grads)
        last = tx.axis_index("data") == 3
        w2 = grads["mlp"]["w2"]
        grads["mlp"]["w2"] = jnp.where(last & (b["x"][0, 0] > 1e3), jnp.nan, w2)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, DATA)}

    engine = models.engine((1, 4), shard=shard, on_nonfinite="skip")
    state, b = engine.create_state(models.params()), models.batch()
    before = models.host(state.stored_params)
    b["x"][12, 0] = 2e3  # the last device's first example
    state, _ = step(state, b)
    assert int(state.loss_scaling.skipped_steps) == 1
    jax.tree.map(np.testing.assert_array_equal, models.host(state.stored_params), before)


@pytest.mark.parametrize("shard", KINDS)
def test_norm_and_clipping_by_hand(shard):
    @tx.step_fn
    def step(state, b):
        grads = tx.grad(models.loss_of)(state.params, b)
        grads, state = state.sync_gradients(grads)
        clipped = tx.optim.clip_by_global_norm(grads, 0.5)
        metrics = {
            "before": tx.optim.global_norm(grads),
            "after": tx.optim.global_norm(clipped),
            "params": tx.optim.global_norm(state.stored_params),
        }
        return state.apply_gradients(grads=clipped), metrics

    truth = models.Truth(models.params(), momentum=0.0, clip=0.5)
    truth.step(models.batch())
    engine = models.engine((2, 2), tx.optim.sgd(0.1), shard=shard, shard_axis="data")
    state, metrics = step(engine.create_state(models.params()), models.batch())
    of_params = np.sqrt(sum((x.astype(float) ** 2).sum() for x in jax.tree.leaves(models.params())))
    close(models.host(metrics), {"before": truth.norm, "after": 0.5, "params": of_params})
    close(models.host(state.stored_params), truth.p)


def test_an_optimizer_of_whole_leaves_is_refused():
    with pytest.raises(ValueError, match="over 'data', and the optimizer is not known to be right"):
        models.engine((1, 2), optax.adam(0.1), shard="optimizer").create_state(models.params())
    optimizer = tx.optim.from_optax(optax.adam(0.1), elementwise=True)
    state, _ = models.run(models.engine((1, 2), optimizer, shard="optimizer"), 2)
    one, _ = models.run(models.engine((1, 1), optimizer), 2)
    close(models.host(state.stored_params), models.host(one.stored_params))


def plainly(state, b):
    """By jax's own value_and_grad, of all that state.params gathered."""
    return jax.value_and_grad(models.loss_of)(state.params, b)


def of_a_copy(state, b):
    """Of a tree that is not the one that state.params returned."""
    doubled = jax.tree.map(lambda x: 2 * x, state.params)
    loss, grads = tx.value_and_grad(lambda p: models.loss_of(jax.tree.map(lambda x: x / 2, p), b))(
        doubled
    )
    return loss, jax.tree.map(lambda g: 2 * g, grads)


def in_a_jit(state, b):
    return jax.jit(lambda p: tx.value_and_grad(models.loss_of)(p, b))(state.params)


def of_handles(state, b):
    """Of state.shards, by a layer that is all of the model, and by jax's own value_and_grad."""
    return jax.value_and_grad(tx.zero.layer(models.loss_of))(state.shards, b)


@pytest.mark.parametrize("shard", models.KINDS)
@pytest.mark.parametrize("differentiate", [plainly, of_a_copy, in_a_jit, of_handles])
def test_however_gradients_are_taken(differentiate, shard):
    @tx.step_fn
    def step(state, b):
        loss, grads = differentiate(state, b)
        grads, state = state.sync_gradients(grads)
        again = models.loss_of(state.params, b)  # outside of what is differentiated
        metrics = {"loss": loss, "again": again}
        return state.apply_gradients(grads=grads), tx.pmean(metrics, DATA)

    truth = models.Truth(models.params())
    engine = models.engine((2, 2), shard=shard, shard_axis="data")
    state, metrics = step(engine.create_state(models.params()), models.batch())
    loss = truth.step(models.batch())
    close(models.host(metrics), {"loss": loss, "again": loss})
    close(models.host(state.stored_params), truth.p)
    after = truth.gradients(models.batch())[0]
    close(engine.evaluate(models.eval_step, state, [models.batch()])["loss"], after)


@pytest.mark.parametrize("shard", models.KINDS)
def test_microbatches(shard):
    @tx.step_fn
    def step(state, b):
        loss, grads = tx.value_and_grad(models.loss_of, microbatches=2)(state.params, b)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, DATA, name="loss")}

    truth = models.Truth(models.params())
    engine = models.engine((1, 4), shard=shard)
    state = engine.create_state(models.params())
    report = engine.audit(step, state, models.batch())
    assert report.exact, report
    trips = {c.trips for c in report.collectives if c.kind == "reduce-scatter"}
    assert trips == {1 if shard == "optimizer" else 2}
    assert "once in each trip" not in report.verdict()
    state, metrics = step(state, models.batch())
    close(float(metrics["loss"]), truth.step(models.batch()))
    close(models.host(state.stored_params), truth.p)


def test_what_the_forward_pass_gathers_may_be_kept():
    plan = tx.Plan(data_parallel=tx.DP(DATA, shard="parameters", reshard_after_forward=False))
    engine = tx.Engine(mesh=models.mesh((1, 4)), plan=plan, optimizer=tx.optim.sgd(0.1))
    report = engine.audit(models.train_step, engine.create_state(models.params()), models.batch())
    assert report.exact, report
    assert len([c for c in report.collectives if c.kind == "all-gather"]) == 3  # w1, b1, w2
    assert "parameters again" not in {line.what for line in report.plan}
    with pytest.raises(ValueError, match="needs shard='parameters' with reshard_after_forward="):
        tx.DP("data", shard="optimizer", reshard_after_forward=False)
