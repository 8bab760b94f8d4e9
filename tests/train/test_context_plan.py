"""Context parallelism in a plan: the sequence in parts, and the numbers of all in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import txcore as tx

AXES = ("data", "context")
MESHES = [(1, 1), (1, 4), (2, 2), (4, 2), (2, 1)]
ROWS, LENGTH, FEATURES = 8, 16, 3
RNG = np.random.default_rng(0)
W = RNG.normal(size=FEATURES)
MASKS = {
    "none": None,
    "examples": np.array([1, 1, 1, 0, 1, 0, 0, 1], np.float32),
    "tokens": (RNG.random((ROWS, LENGTH)) < 0.6).astype(np.float32),
}


def make_batch(mask, seed=1):
    rng = np.random.default_rng(seed)
    batch = {"x": rng.normal(size=(ROWS, LENGTH, FEATURES)), "y": rng.normal(size=(ROWS, LENGTH))}
    batch = {key: leaf.astype(np.float32) for key, leaf in batch.items()}
    return batch if mask is None else {**batch, "mask": mask}


def in_order(batch, n):
    """Return a batch as n devices of the context axis hold it."""
    return {k: v if v.ndim < 2 else tx.context.split_chunks(v, n) for k, v in batch.items()}


def truth(w, batch):
    """Loss and gradient of the mean squared error over all real tokens, in float64."""
    x, y = batch["x"].astype(np.float64), batch["y"].astype(np.float64)
    mask = batch.get("mask", np.ones(ROWS))
    kept = np.broadcast_to(mask if mask.ndim == 2 else mask[:, None], y.shape)
    error = x @ w - y
    total = kept.sum()
    return (kept * error**2).sum() / total, 2 * np.einsum("rl,rlf->f", kept * error, x) / total


def errors_of(params, batch):
    return (batch["x"] @ params["w"] - batch["y"]) ** 2


def make_step(microbatches=None):
    @tx.step_fn
    def step(state, batch):
        def loss_of(params, batch):
            return tx.example_mean(errors_of(params, batch), batch.get("mask"), axis=AXES)

        both = tx.value_and_grad(loss_of, microbatches=microbatches)
        loss, grads = both(state.params, batch)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, AXES)}

    return step


def eval_step(state, batch):
    errors, mask = errors_of(state.params, batch), batch.get("mask")
    if mask is not None and mask.ndim == 2:
        return {"loss": tx.Mean(*tx.psum((jnp.sum(errors * mask), jnp.sum(mask)), AXES))}
    return {"loss": tx.pmean(tx.example_mean(errors, mask, axis=AXES), AXES)}


def make_engine(shape, **options):
    devices = jax.devices()[: shape[0] * shape[1]]
    return tx.Engine(
        mesh=tx.MeshSpec(devices, axes=AXES, shape=shape),
        plan=tx.Plan(data_parallel=tx.DP("data", **options), context="context"),
        optimizer=tx.optim.sgd(1.0),
    )


CASES = [(shape, None, "none") for shape in MESHES] + [
    ((1, 4), 2, "examples"),
    ((2, 2), None, "examples"),
    ((2, 2), None, "tokens"),
    ((2, 2), 2, "tokens"),
    ((1, 1), 2, "tokens"),
]


@pytest.mark.parametrize("shape,microbatches,kind", CASES, ids=str)
def test_loss_and_gradients_are_those_of_all_tokens(shape, microbatches, kind):
    batch, engine = make_batch(MASKS[kind]), make_engine(shape)
    state = engine.create_state({"w": W.astype(np.float32)})
    step, given = make_step(microbatches), in_order(batch, shape[1])
    evaluated = engine.evaluate(eval_step, state, [given])["loss"]
    state, metrics = step(state, given)
    loss, gradient = truth(W, batch)
    np.testing.assert_allclose([metrics["loss"], evaluated], loss, rtol=1e-5)
    np.testing.assert_allclose(W - state.params["w"], gradient, rtol=1e-5, atol=1e-6)
    report = engine.audit(step, state, given)
    assert report.exact, str(report)
    assert report.status == "proved"


@pytest.mark.parametrize(
    "options",
    [{"shard": "optimizer"}, {"shard": "gradients"}, {"shard": "parameters"}, {"buckets": 1.0}]
    + [{"algorithm": "ring"}, {"delay": 1}, {"compression": "bf16"}],
    ids=str,
)
def test_with_every_way_of_data_parallelism(options):
    batch, engine = make_batch(MASKS["tokens"]), make_engine((2, 2), **options)
    wide = np.repeat(W[:, None], 4, 1).astype(np.float32)  # of a dim that two devices divide
    state, step = engine.create_state({"w": wide}), make_step()
    batch = {**batch, "y": np.repeat(batch["y"][..., None], 4, -1)}
    for _ in range(2 if options.get("delay") else 1):
        state, metrics = step(state, in_order(batch, 2))
    narrow = {**batch, "y": batch["y"][..., 0]}
    loss, gradient = truth(W, narrow)
    tolerance = 1e-2 if "compression" in options else 1e-5
    if not options.get("delay"):
        np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
        moved = W[:, None] - np.asarray(state.stored_params["w"])
        of_all = np.repeat(gradient[:, None], 4, 1) / 4
        np.testing.assert_allclose(moved, of_all, rtol=tolerance, atol=tolerance)
    assert engine.audit(step, state, in_order(batch, 2)).exact


def test_padded_batches_weigh_by_their_real_examples():
    engine = make_engine((2, 2))
    state = engine.create_state({"w": W.astype(np.float32)})
    whole, part = make_batch(None, 2), {k: v[:3] for k, v in make_batch(None, 3).items()}
    data = [in_order(tx.pad_batch(batch, ROWS), 2) for batch in (whole, part)]
    found = engine.evaluate(eval_step, state, data)["loss"]
    both = {key: np.concatenate([whole[key], part[key]]) for key in whole}
    error = both["x"].astype(np.float64) @ W - both["y"]
    np.testing.assert_allclose(found, (error**2).mean(), rtol=1e-5)


def test_random_numbers_of_tokens_and_of_examples_are_those_of_one_device():
    found = {}

    def draw(state, batch):
        keys = state.example_keys(batch)
        of_tokens = tx.context.token_keys(keys, "context", batch["x"].shape[1])
        noise = jax.vmap(jax.vmap(jax.random.normal))(of_tokens) * batch["y"]
        share = jax.vmap(jax.random.uniform)(keys)[:, None] * batch["y"]
        return tx.pmean(jnp.mean(noise), AXES), tx.pmean(jnp.mean(share), AXES)

    for shape in [(1, 1), (2, 2), (1, 4)]:
        engine = make_engine(shape)
        state = engine.create_state({"w": W.astype(np.float32)})

        def step(state, batch):
            return dict(zip(("tokens", "examples"), draw(state, batch), strict=True))

        batch = in_order(make_batch(None), shape[1])
        found[shape] = engine.evaluate(step, state, [batch])
    for shape, numbers in found.items():
        for name, value in found[1, 1].items():
            np.testing.assert_allclose(numbers[name], value, rtol=1e-5, err_msg=str(shape))


def test_the_batch_is_split_over_rows_and_sequences():
    plan = tx.Plan(data_parallel=tx.DP("data"), context="context", batch={"image": P("data")})
    mesh = tx.MeshSpec(jax.devices()[:4], axes=AXES, shape=(2, 2))
    batch = {"x": np.zeros((4, 8, 3)), "mask": np.zeros(4), "image": np.zeros((4, 5))}
    specs = plan.batch_specs(batch, mesh)
    assert specs == {"x": P("data", "context"), "mask": P("data"), "image": P("data")}
    assert plan.data_axes == AXES
    assert plan.row_axes == ("data",)
    alone = tx.Plan(context="context")
    assert alone.batch_specs(batch, mesh)["x"] == P(None, "context")


def test_a_target_is_given_whole_sequences_of_one_shard():
    engine = make_engine((1, 1))
    state = engine.create_state({"w": W.astype(np.float32)})
    shard = make_batch(MASKS["tokens"])
    report = engine.audit(make_step(), state, shard, target="cpu:8", mesh={"data": 2, "context": 4})
    assert report.exact
    assert {c.group_size for c in report.collectives} == {8}


REFUSED = [
    ({"context": "data"}, "an axis of its own, got 'data', which data_parallel= has"),
    ({"tensor_parallel": tx.TP("context", rules={"*": -1})}, "which tensor_parallel= has"),
    ({"pipeline": tx.PP("context", microbatches=2)}, "which pipeline= has"),
    ({"data_parallel": tx.DP("data", sync_every=2)}, "averaged in each step.*sync_every=2"),
    ({"data_parallel": tx.DP("data", reduction="adasum")}, "reduction='adasum'"),
    ({"params": {"w": P("context")}}, "other axes than the data axes, got 'context'"),
]


@pytest.mark.parametrize("options,text", REFUSED, ids=[text for _, text in REFUSED])
def test_plans_that_cannot_be_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        tx.Plan(**{"data_parallel": tx.DP("data"), "context": "context", **options})


def test_an_axis_that_the_mesh_lacks_is_refused():
    with pytest.raises(ValueError, match=r"Plan\(context='seq'\)"):
        tx.Engine(
            mesh=tx.MeshSpec(jax.devices()[:2], axes=("data",)),
            plan=tx.Plan(data_parallel=tx.DP("data"), context="seq"),
            optimizer=tx.optim.sgd(1.0),
        )


def test_a_sequence_that_the_devices_do_not_divide_is_refused():
    engine = make_engine((1, 4))
    state = engine.create_state({"w": W.astype(np.float32)})
    batch = {key: leaf[:, :15] for key, leaf in make_batch(None).items()}
    with pytest.raises(ValueError, match="15 in dim 1, which 4 devices along axis 'context'"):
        make_step()(state, batch)
