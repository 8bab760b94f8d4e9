"""One step under every plan with a pipeline: the same curve, all of it proved."""

import os
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pipeline_plans as models
import pytest

import txcore as tx

SWEEP = "TXCORE_ALL_PIPELINES"
RATE = 0.05
ZB, CHUNKS = {"schedule": "zb-h1"}, {"schedule": "interleaved", "chunks": 2}
# Plans as (options of DP, of PP, axis sizes).
FEW = {
    "one device": ({}, {}, {}),
    "dp x tp x zero bubble": ({}, ZB, {"data": 2, "model": 2, "pipe": 2}),
    "zero3 x interleaved": ({"shard": "parameters"}, CHUNKS, {"data": 2, "pipe": 2}),
    "chunks on one device": ({}, CHUNKS, {"model": 2}),
}
MANY = {
    "no pipeline": ({}, None, {"data": 4}),
    "1f1b": ({}, {}, {"pipe": 2}),
    "four stages": ({}, {}, {"pipe": 4}),
    "eight stages": ({}, {}, {"pipe": 8}),
    "gpipe": ({}, {"schedule": "gpipe", "chunks": 2}, {"pipe": 4}),
    "tp x interleaved": ({}, {"schedule": "interleaved", "chunks": 4}, {"pipe": 2, "model": 2}),
    "dp x pp": ({}, {}, {"data": 4, "pipe": 2}),
    "zero1": ({"shard": "optimizer"}, {}, {"data": 2, "model": 2, "pipe": 2}),
    "zero2 on one stage": ({"shard": "gradients"}, {}, {"data": 2, "model": 2}),
    "zero3": ({"shard": "parameters"}, {}, {"data": 2, "model": 2, "pipe": 2}),
    "zero3 on one stage": ({"shard": "parameters"}, CHUNKS, {"data": 2, "model": 2}),
    "buckets": ({"buckets": 0.001}, {}, {"data": 2, "pipe": 2}),
    "ring": ({"algorithm": "ring"}, {}, {"data": 4, "pipe": 2}),
    "zero1 in buckets": ({"shard": "optimizer", "buckets": 0.001}, ZB, {"data": 2, "pipe": 4}),
}


def whole_loss(params, batch, mask):
    """Return the model's loss as one would write it on one device."""
    x = params["embed"][batch["word"]]
    for i in range(models.LAYERS):
        w, b, u = (params["blocks"][n][i] for n in ("w", "b", "u"))
        x = x + jnp.tanh(x @ w + b) @ u
    losses, _ = models.last(params, x, batch)
    mask = jnp.broadcast_to(
        mask.reshape(mask.shape + (1,) * (losses.ndim - mask.ndim)), losses.shape
    )
    return jnp.sum(losses * mask) / jnp.sum(mask)


@pytest.fixture(scope="module", params=["tokens", "examples"])
def truth(request):
    """The kind of mask, with losses and parameters after plain float64 steps of SGD."""
    with jax.enable_x64(True):
        params, losses = models.init(dtype=np.float64), []
        run = jax.jit(jax.value_and_grad(whole_loss))
        for i in range(3):
            batch = models.make_batch(i, mask=request.param)
            loss, grads = run(params, batch, models.mask_of(batch).astype(np.float64))
            params = jax.tree.map(lambda p, g: p - RATE * g, params, grads)
            losses.append(float(loss))
        batch = models.make_batch(9, mask=request.param)
        evaluated = run(params, batch, models.mask_of(batch).astype(np.float64))[0]
        return request.param, losses, jax.device_get(params), float(evaluated)


def check(truth, dp, pp, sizes):
    mask, losses, params, evaluated = truth
    engine = models.make_engine(
        models.make_plan(dp=dp, pp=pp), **sizes, optimizer=tx.optim.sgd(RATE)
    )
    state, found = models.train(engine, steps=3, mask=mask)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    for own, wanted in zip(
        jax.tree.leaves(models.params_of(state)), jax.tree.leaves(params), strict=True
    ):
        np.testing.assert_allclose(own, wanted, atol=1e-5)
    batches = [models.make_batch(9, mask=mask)]
    result = engine.evaluate(models.eval_step, state, batches)
    np.testing.assert_allclose(result["loss"], evaluated, rtol=1e-5)
    report = engine.audit(models.step, state, batches[0])
    assert report.exact, str(report)


# Plans with one kind of mask alone: both kinds meet stages, and one device.
MASKS = {
    "dp x tp x zero bubble": "tokens",
    "zero3 x interleaved": "examples",
    "chunks on one device": "tokens",
}


@pytest.mark.parametrize("name", FEW)
def test_a_step_is_the_same_under_every_plan(truth, name):
    if SWEEP not in os.environ and MASKS.get(name, truth[0]) != truth[0]:
        pytest.skip(f"set {SWEEP}=1 for masks of both kinds with every plan")
    check(truth, *FEW[name])


@pytest.mark.skipif(SWEEP not in os.environ, reason=f"set {SWEEP}=1: takes minutes")
@pytest.mark.parametrize("name", MANY)
def test_a_step_is_the_same_under_many_plans(truth, name):
    check(truth, *MANY[name])


def test_layers_of_several_chunks_are_stored_so_and_checked():
    plan = models.make_plan(pp=CHUNKS)
    state = models.make_engine(plan, pipe=2).create_state(models.init())
    assert state.stored_params["blocks"]["w"].shape[:2] == (2, models.LAYERS // 2)
    shapes = plan.as_stored(jax.eval_shape(models.init))["blocks"]
    assert shapes["b"].shape == (2, 4, 2 * models.WIDTH)
    with pytest.raises(ValueError, match=r"a multiple of its 3 chunks, got shape \(8, 16\)"):
        models.make_plan(pp={**CHUNKS, "chunks": 3}).as_stored(models.init())
    three = models.make_engine(models.make_plan(tp=False, pp={}), pipe=3)
    text = r"needs a number of layers that 3 stages divide, got 8 in params\['blocks'\]\['b'\]"
    with pytest.raises(ValueError, match=text):
        three.create_state(models.init())


@tx.step_fn
def step_of_one_device(state, batch):
    def loss_of(params):
        return whole_loss(params, batch, models.mask_of(batch))

    loss, grads = tx.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), {"loss": loss}


def step_with(**options):
    """Return a step whose pipeline gets other options."""

    @tx.step_fn
    def other(state, batch):
        functions = (models.first, models.block, models.last)
        run = tx.pipeline.value_and_grad(*functions, has_aux=True, **options)
        (loss, _), grads = run(state.params, batch)
        return state.apply_gradients(grads=grads), {"loss": loss}

    return other


BAD = {
    "layers of a stage": (
        step_of_one_device,
        {},
        r"needs a loss that is the same along the pipe axis 'pipe', .* each device there has other "
        r"layers. Write tx.pipeline.value_and_grad\(first, block, last\)\(state.params, batch\)",
    ),
    "another axis": (
        step_with(axis="model"),
        {},
        "needs axis= that of the plan's pipeline, 'pipe', or none, got 'model'",
    ),
    "chunks": (
        step_with(schedule=tx.pipeline.make_schedule("1f1b", stages=2, microbatches=4)),
        CHUNKS,
        r"needs a schedule of 2 chunks a stage, in which the plan stores the layers, got '1f1b' "
        r"of 1: write PP\(..., chunks=1\)",
    ),
    "no pipeline": (
        step_with(axis="pipe"),
        None,
        r"needs a plan with a pipeline, .* to run along axis 'pipe', got one without: write "
        r"tx.Plan\(pipeline=tx.PP\('pipe', microbatches=...\)\)",
    ),
    "rows": (
        step_with(),
        {"microbatches": 3},
        r"needs batch\['next'\] with a multiple of 3 rows on each device.*got shape \(16, 3\)",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_step_that_does_not_fit_its_plan_is_refused_before_it_compiles(what):
    step, pp, text = BAD[what]
    engine = models.make_engine(models.make_plan(tp=False, pp=pp), pipe=2)
    state = engine.create_state(models.init())
    with pytest.raises(ValueError, match=text):
        engine.run(step, state, models.make_batch())


@pytest.mark.parametrize("sizes", [{}, {"pipe": 2}], ids=["one device", "pipeline"])
def test_float16_needs_its_scale_and_finds_gradients_that_it_could_not_hold(sizes):
    """A loss of 1e-5 of the usual: gradients below 6e-8 are zeros without a scale."""

    def tiny(params, x, batch):
        return models.last(params, x, batch)[0].astype(jnp.float32) * 1e-6

    def make_step(scaled):
        @tx.step_fn
        def step(state, batch):
            first, block, _ = models.cast_functions(state.precision)
            scale = state.loss_scale if scaled else None

            def last(params, x, batch):
                return tiny(state.precision.cast(params), x, batch)

            run = tx.pipeline.value_and_grad(first, block, last, loss_scale=scale)
            loss, grads = run(state.params, batch)
            norm = tx.optim.global_norm(grads)
            return state.apply_gradients(grads=grads), {"loss": loss, "norm": norm}

        return step

    norms = {}
    for precision in ("float32", "float16"):
        plan = models.make_plan(tp=False, pp={})
        engine = models.make_engine(plan, **sizes, precision=precision)
        state = engine.create_state(models.init())
        if precision == "float16":
            with pytest.raises(ValueError, match="a step in float16 needs tx"):
                engine.run(make_step(False), state, models.make_batch())
        _, metrics = engine.run(make_step(True), state, models.make_batch())
        norms[precision] = float(metrics["norm"])
    assert norms["float32"] < 1e-5
    np.testing.assert_allclose(norms["float16"], norms["float32"], rtol=1e-2)


def test_muon_takes_stacked_matrices_and_refuses_stacked_vectors():
    """A layer's bias is no matrix, though that of all layers has two dims."""
    optimizer = tx.optim.groups({"blocks/*": tx.optim.muon(0.02), "*": tx.optim.adamw(0.01)})
    engine = models.make_engine(models.make_plan(tp=False, pp=CHUNKS), pipe=2, optimizer=optimizer)
    state = engine.create_state(models.init())
    text = r"each layer's part of params\['blocks'\]\['b'\], stacked in shape \(2, 2, 16\), is none"
    with pytest.raises(ValueError, match=text):
        engine.run(models.step, state, models.make_batch())
    muon = {name: tx.optim.muon(0.02) for name in ("blocks/w", "blocks/u")}
    curves = []
    for pp, sizes in (({}, {}), (CHUNKS, {"pipe": 2, "data": 2})):
        optimizer = tx.optim.groups({**muon, "*": tx.optim.adamw(0.01)})
        plan = models.make_plan(tp=False, pp=pp, dp={"shard": "optimizer"})
        curves.append(models.train(models.make_engine(plan, **sizes, optimizer=optimizer), 3)[1])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)


OPTIONS = {
    "bf16 on the wire": {"compression": "bf16"},
    "delay": {"delay": 1},
    "local": {"sync_every": 2},
}


@pytest.mark.skipif(SWEEP not in os.environ, reason=f"set {SWEEP}=1: takes minutes")
@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_data_parallelism_are_under_a_pipeline_what_they_are_without(name):
    curves, ends = [], []
    for pp, sizes in ((None, {"data": 2}), ({}, {"data": 2, "pipe": 2})):
        plan = models.make_plan(tp=False, dp=OPTIONS[name], pp=pp)
        engine = models.make_engine(plan, **sizes)
        state, losses = models.train(engine, 4)
        report = engine.audit(models.step, state, models.make_batch())
        assert report.exact, str(report)
        assert all(line.ok for line in report.plan)
        curves.append(losses)
        ends.append(models.params_of(state))
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), *ends)


def test_dropout_by_the_examples_keys_is_the_same_in_a_pipeline():
    """Keys are a leaf of the batch; those of a layer follow from its number."""

    def block(params, x, batch, stage):
        layers = params["w"].shape[0]
        for i in range(layers):
            keys = jax.vmap(lambda key, i=i: jax.random.fold_in(key, stage * layers + i))(
                batch["keys"]
            )
            out = jnp.tanh(x @ params["w"][i] + params["b"][i]) @ params["u"][i]
            kept = jax.vmap(partial(jax.random.bernoulli, p=0.5, shape=x.shape[1:]))(keys)
            x = x + jnp.where(kept, out, 0)
        return x

    def last(params, x, batch):
        return models.last(params, x, batch)[0]

    @tx.step_fn
    def step(state, batch):
        batch = {**batch, "keys": state.example_keys(batch)}
        run = tx.pipeline.value_and_grad(models.first, block, last)
        loss, grads = run(state.params, batch)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    curves = []
    for pp, sizes in ((None, {}), ({"microbatches": 2}, {"pipe": 2, "data": 2})):
        engine = models.make_engine(models.make_plan(tp=False, pp=pp), **sizes)
        curves.append(models.train(engine, 2, mask="", step=step)[1])
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
