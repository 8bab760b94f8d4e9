"""Parameters stored in parts over a second axis: the same run as on one device."""

import functools
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import split_models as models
from jax.sharding import PartitionSpec as P
from split_models import MESHES

import txcore as tx
from txcore.profiling import no_auto_collectives
from txcore.profiling.report import PlanLine

pytestmark = pytest.mark.sampled(2)


def close(tree, truth, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), tree, truth)


def leaves(tree):
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in found]


@functools.cache
def engine_on(shape):
    """One engine for each mesh, whose step is compiled once."""
    return models.engine(shape)


def run(engine, steps=3, start=None):
    state, losses = start or engine.create_state(models.params()), []
    for seed in range(steps):
        state, metrics = models.train_step(state, models.batch(seed))
        losses.append(float(metrics["loss"]))
    return state, losses


@pytest.mark.parametrize("shape", [(1, 1), *MESHES, (1, 8)])
def test_the_same_curve_as_in_numpy(shape):
    state, losses = run(engine_on(shape))
    truth = models.Truth(models.params())
    close(losses, [truth.step(models.batch(seed)) for seed in range(3)])
    close(models.host(state.stored_params), truth.p)
    close(models.host(state.opt_state["velocity"]), truth.v)


def test_each_device_holds_its_part_alone():
    state = models.engine((2, 2), tx.optim.adamw(0.1)).create_state(models.params())
    for tree in (state.stored_params, state.opt_state["m"], state.opt_state["v"]):
        sizes = jax.tree.map(lambda x: x.addressable_shards[0].data.shape, tree)
        assert sizes == {
            "mlp": {"w1": (6, 4), "b1": (4,), "w2": (4, 3)},
            "b2": (3,),
            "scale": (6,),
        }
    jax.tree.map(np.testing.assert_array_equal, models.host(state.stored_params), models.params())


@functools.cache
def run_adamw(shape):
    return run(models.engine(shape, tx.optim.adamw(0.01, clip_norm=1.0)))[0]


@pytest.mark.parametrize("shape", MESHES)
def test_adamw_is_that_of_one_device(shape):
    ours, one = (run_adamw(s) for s in (shape, (1, 1)))
    close(models.host(ours.stored_params), models.host(one.stored_params))
    close(models.host(ours.opt_state), models.host(one.opt_state))


@pytest.mark.parametrize("shape", MESHES)
def test_clipping_takes_the_norm_of_the_whole(shape):
    truth = models.Truth(models.params(), clip=0.5)
    optimizer = tx.optim.sgd(0.1, momentum=0.9, clip_norm=0.5)
    state, losses = run(models.engine(shape, optimizer))
    close(losses, [truth.step(models.batch(seed)) for seed in range(3)])
    close(models.host(state.stored_params), truth.p)


@pytest.mark.parametrize("shape", MESHES)
def test_clipping_and_norm_by_hand(shape):
    @tx.step_fn
    def step(state, b):
        grads = tx.grad(models.loss_of)(state.params, b)
        grads, state = state.sync_gradients(grads)
        clipped = tx.optim.clip_by_global_norm(grads, 0.5)
        metrics = {"before": tx.optim.global_norm(grads), "after": tx.optim.global_norm(clipped)}
        return state.apply_gradients(grads=clipped), metrics

    truth = models.Truth(models.params(), momentum=0.0, clip=0.5)
    truth.step(models.batch())
    engine = models.engine(shape, tx.optim.sgd(0.1))
    state, metrics = step(engine.create_state(models.params()), models.batch())
    close(models.host(metrics), {"before": truth.norm, "after": 0.5})
    close(models.host(state.stored_params), truth.p)


@pytest.mark.parametrize("before", [(1, 1), *MESHES])
def test_resumed_on_every_other_mesh(before, tmp_path):
    """Saved after two steps, and gone on with elsewhere: as four in NumPy."""
    batches = [models.batch(seed) for seed in range(4)]
    start, others = models.params(), models.params(seed=9)
    truth = models.Truth(start)
    for b in batches:
        truth.step(b)

    def fit(shape, params, folder, steps):
        engine = engine_on(shape)
        with tx.Checkpoints(folder, every=4) as checkpoints:
            state = engine.create_state(params)
            return engine.fit(
                models.train_step, state, batches, steps=steps, checkpoints=checkpoints
            )

    fit(before, start, tmp_path / "run", 2)
    for after in ((1, 1), *MESHES):
        folder = tmp_path / f"on {after}"
        shutil.copytree(tmp_path / "run", folder)
        state = fit(after, others, folder, 4)
        assert int(state.step) == 4
        close(models.host(state.stored_params), truth.p)
        close(models.host(state.opt_state["velocity"]), truth.v)
        loaded = tx.load_params(folder, start)
        jax.tree.map(np.testing.assert_array_equal, loaded, models.host(state.stored_params))


def overflowing(part):
    """Parameters whose gradients overflow float16 in the parts of w1 and b1 of one device alone.

    Its hidden units are 0, so that the outputs are those of the others.
    """
    start = models.params()
    columns = slice(part * 4, part * 4 + 4)
    start["mlp"]["w1"][:, columns] = 0
    start["mlp"]["b1"][columns] = 0
    start["mlp"]["w2"][columns] = 3e4
    return start


@pytest.mark.parametrize("shape", [(1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize("part", [0, 1])
def test_an_overflow_on_one_shard_skips_the_step_on_all(shape, part):
    scale = tx.LossScale(initial=2.0**10, growth_interval=100)
    engine = models.engine(shape, precision=tx.Precision("float16", loss_scale=scale))
    start = overflowing(part)

    @tx.step_fn
    def step(state, b):
        def loss(p):
            return models.loss_of(p, b, state.precision.cast)

        loss, grads = tx.value_and_grad(loss, loss_scale=state.loss_scale)(state.params)
        grads, state = state.sync_gradients(grads)
        bad = ~jnp.all(jnp.isfinite(grads["mlp"]["w1"]))
        bad = tx.all_gather(bad[None], "model", invariant=True)
        return state.apply_gradients(grads=grads), {"bad": bad}

    state = engine.create_state(start)
    state, seen = step(state, models.batch())
    assert np.asarray(seen["bad"]).tolist() == [part == 0, part == 1]
    for device in range(int(np.prod(shape))):
        scaling = jax.tree.map(
            lambda x, d=device: x.addressable_shards[d].data.item(), state.loss_scaling
        )
        assert (scaling.skipped_steps, scaling.scale, scaling.good_steps) == (1, 2.0**9, 0)
        assert scaling.culprit == [path for path, _ in leaves(start)].index("mlp/b1")
    jax.tree.map(np.testing.assert_array_equal, models.host(state.stored_params), start)
    assert int(state.step) == 0


def test_a_step_goes_on_after_an_overflow():
    """The next scale is small enough: what is trained is what one device trains."""

    def curve(shape):
        scale = tx.LossScale(initial=2.0**16, growth_interval=100)
        engine = models.engine(shape, precision=tx.Precision("float16", loss_scale=scale))
        start = models.params()
        start["mlp"]["w2"] *= 8
        state = engine.create_state(start)
        state, losses = run(engine, 6, state)
        return losses, [np.asarray(x).item() for x in state.loss_scaling]

    (ours, scaling), (one, same) = curve((2, 2)), curve((1, 1))
    assert scaling == same
    assert scaling[2] > 0
    np.testing.assert_allclose(ours, one, rtol=2e-2)


def test_skipping_where_one_part_is_not_finite():
    """on_nonfinite="skip" in float32, by the same decision; "stop" names the parameter."""
    start = models.params()
    start["mlp"]["b1"][5] = np.nan

    @tx.step_fn
    def step(state, b):
        loss, grads = tx.value_and_grad(models.loss_of)(state.params, b)
        grads, state = state.sync_gradients(grads)
        own = tx.axis_index("model") == 1
        bad = jnp.where(own, jnp.float32(jnp.nan), grads["mlp"]["b1"])
        grads["mlp"]["b1"] = bad
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    engine = models.engine((2, 2), on_nonfinite="skip")
    state, _ = step(engine.create_state(models.params()), models.batch())
    assert int(state.loss_scaling.skipped_steps) == 1
    jax.tree.map(np.testing.assert_array_equal, models.host(state.stored_params), models.params())

    engine = models.engine((2, 2))
    with pytest.raises(FloatingPointError, match=re.escape("params['mlp']['b1'] (8 of 8 elem")):
        engine.fit(step, engine.create_state(start), [models.batch()], steps=1)


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    @tx.step_fn
    def step(state, b):
        params = state.stored_params
        broken = jnp.where(tx.axis_index("model") == 1, jnp.nan, params["mlp"]["b1"])
        params = {**params, "mlp": {**params["mlp"], "b1": broken}}
        return state.replace(stored_params=params, step=state.step + 1), {"loss": jnp.float32(1)}

    engine = models.engine((2, 2))
    state, b = engine.create_state(models.params()), [models.batch()]
    named = re.escape("params['mlp']['b1'] (4 of 8 elem")
    with (
        pytest.raises(FloatingPointError, match=named),
        tx.Checkpoints(tmp_path, every=1) as checkpoints,
    ):
        engine.fit(step, state, b, steps=1, checkpoints=checkpoints)


@pytest.mark.parametrize("shape", MESHES)
def test_evaluation(shape):
    engine = engine_on(shape)
    state = engine.create_state(models.params())
    b = {**models.batch(), "mask": np.arange(16) < 11}
    metrics = engine.evaluate(models.eval_step, state, [b])
    real = {name: b[name][:11] for name in ("x", "y")}
    close(metrics["loss"], models.Truth(models.params()).gradients(real)[0])


def test_copies_of_parts_are_compared():
    engine = engine_on((2, 2))
    state = engine.create_state(models.params())
    batches = [models.batch(seed) for seed in range(3)]
    state = engine.fit(models.train_step, state, batches, steps=3, check_replicas_every=1)
    whole = state.stored_params["mlp"]["w1"]
    shards = [np.array(s.data) for s in whole.addressable_shards]
    shards[3][0, 0] += 1  # the second copy of the second part
    devices = [s.device for s in whole.addressable_shards]
    placed = [jax.device_put(x, device) for x, device in zip(shards, devices, strict=True)]
    broken = jax.make_array_from_single_device_arrays(whole.shape, whole.sharding, placed)
    params = {**state.stored_params, "mlp": {**state.stored_params["mlp"], "w1": broken}}
    text = re.escape("stored_params['mlp']['w1'] float32[6,8]: device 3 differs from device 1")
    with pytest.raises(tx.launch.MismatchError, match=text):
        engine.check_replicas(state.replace(stored_params=params))


def test_fields_are_replaced_in_their_layouts():
    engine = engine_on((2, 2))
    state = engine.create_state(models.params())
    new = state.replace(stored_params=models.params(seed=5))
    assert new.stored_params["mlp"]["w1"].addressable_shards[0].data.shape == (6, 4)
    jax.tree.map(np.testing.assert_array_equal, models.host(new.stored_params), models.params(5))
    new, _ = models.train_step(new, models.batch())
    truth = models.Truth(models.params(5))
    truth.step(models.batch())
    close(models.host(new.stored_params), truth.p)


def test_two_axes_in_one_spec_and_dims_of_two_axes():
    """A table split over both axes of a dim, and one with a dim for each."""
    mesh = tx.MeshSpec(jax.devices()[:8], axes=("data", "a", "b"), shape=(2, 2, 2))
    rules = {"rows": P(("a", "b")), "both": P("b", "a")}
    engine = tx.Engine(
        mesh=mesh,
        plan=tx.Plan(data_parallel=tx.DP("data"), params=rules),
        optimizer=tx.optim.sgd(1.0, clip_norm=1.0),
    )
    rng = np.random.default_rng(0)
    start = {"rows": rng.normal(size=8), "both": rng.normal(size=(4, 6)), "whole": np.ones(3)}
    start = jax.tree.map(np.float32, start)

    def loss_of(p, b):
        squares = [jnp.sum(leaf**2) for leaf in (p["rows"], p["both"])]
        whole = tx.psum(sum(squares), ("a", "b")) + jnp.sum(p["whole"] ** 2)
        return tx.example_mean(b * whole, axis="data")

    @tx.step_fn
    def step(state, b):
        loss, grads = tx.value_and_grad(loss_of)(state.params, b)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    state = engine.create_state(start)
    report = engine.audit(step, state, np.ones(4, np.float32))
    assert report.exact, report
    norms = [line for line in report.plan if line.what == "gradient norm"]
    assert [(line.axes, line.found_bytes) for line in norms] == [(("a", "b"), 4)]
    state, metrics = step(state, np.ones(4, np.float32))
    squares = sum(float((x**2).sum()) for x in start.values())
    close(float(metrics["loss"]), squares)
    norm = 2 * np.sqrt(squares)
    close(models.host(state.stored_params), jax.tree.map(lambda x: x - 2 * x / norm, start))


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("clip_norm, on_nonfinite", [(None, "stop"), (1.0, "skip")])
def test_the_audit_is_exact_and_as_predicted(shape, clip_norm, on_nonfinite):
    data, model = shape
    optimizer = tx.optim.adamw(0.1, clip_norm=clip_norm)
    engine = models.engine(shape, optimizer, on_nonfinite=on_nonfinite)
    state = engine.create_state(models.params())
    report = engine.audit(models.train_step, state, models.batch())
    assert report.exact, report
    wanted = []
    if data > 1:
        parts = 4 * ((48 + 8 + 24) // model + 3 + 6)
        wanted.append(
            PlanLine("gradients", "all-reduce", ("data",), "float32", parts, parts, factor="mean")
        )
    if model > 1 and clip_norm is not None:
        wanted.append(PlanLine("gradient norm", "all-reduce", ("model",), "float32", 4, 4))
    if model > 1 and on_nonfinite == "skip":
        wanted.append(PlanLine("finite gradients", "all-reduce", ("model",), "int32", 4, 4))
    beyond = []
    if model > 1:  # this part of the examples: outputs, and the gradient of their inputs
        rows = 16 // data
        beyond += [PlanLine("psum/outputs", "all-reduce", ("model",), "float32", 0, 4 * rows * 3)]
        beyond += [PlanLine("vary/inputs", "all-reduce", ("model",), "float32", 0, 4 * rows * 6)]
    if data > 1:
        beyond += [PlanLine("pmean/loss", "all-reduce", ("data",), "float32", 0, 4)]
    assert list(report.plan[: len(wanted)]) == wanted
    assert sorted(report.plan[len(wanted) :], key=str) == sorted(beyond, key=str)


def test_an_optax_optimizer_that_is_declared_elementwise():
    optimizer = tx.optim.from_optax(optax.adam(0.01), elementwise=True)
    ours, one = (run(models.engine(s, optimizer))[0] for s in ((2, 2), (1, 1)))
    close(models.host(ours.stored_params), models.host(one.stored_params))
    moments = ours.opt_state[0].mu
    assert moments["mlp"]["w1"].addressable_shards[0].data.shape == (6, 4)
    close(models.host(ours.opt_state), models.host(one.opt_state))


def test_an_optax_optimizer_whose_state_leaves_parameters_out():
    masked = optax.masked(optax.trace(0.9), {"mlp": True, "b2": False, "scale": False})
    optimizer = tx.optim.from_optax(optax.chain(masked, optax.scale(-0.1)), elementwise=True)
    ours, one = (run(models.engine(s, optimizer))[0] for s in ((2, 2), (1, 1)))
    close(models.host(ours.stored_params), models.host(one.stored_params))
    trace = ours.opt_state[0].inner_state.trace
    assert trace["mlp"]["w2"].addressable_shards[0].data.shape == (4, 3)


def test_the_parity_kit_compares_parts():
    engines = (models.engine((1, 1)), models.engine((2, 2)))
    batches = [models.batch(seed) for seed in range(2)]
    tx.testing.assert_plans_agree(models.train_step, models.params(), batches, engines=engines)

    @tx.step_fn
    def wrong(state, b):
        grads = tx.grad(models.loss_of)(state.params, b)
        grads, state = state.sync_gradients(grads)
        grads["mlp"]["w1"] = grads["mlp"]["w1"] / tx.axis_size("model")
        return state.apply_gradients(grads=grads), {}

    text = re.escape("gradients of params['mlp']['w1'] differs between the plans: 48 of 48")
    with pytest.raises(AssertionError, match=text):
        tx.testing.assert_plans_agree(wrong, models.params(), batches, engines=engines)


def test_no_program_of_a_run_has_a_collective_of_the_compiler(tmp_path):
    engine = models.engine((2, 2))
    batches = [models.batch(seed) for seed in range(2)]
    with no_auto_collectives(), tx.Checkpoints(tmp_path, every=1) as checkpoints:
        engine.fit(
            models.train_step,
            engine.create_state(models.params()),
            batches,
            steps=2,
            checkpoints=checkpoints,
            check_replicas_every=1,
        )
