"""Steps whose plan says how gradients are exchanged: as predicted, with plain DP's curve."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import txcore as tx
from txcore.parallel.gradients.algorithms import ALGORITHMS, pieces

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

KIB = 1 / 1024
AXES = {"node": 2, "device": 2}
NAMES = list(ALGORITHMS)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 128)


def params():
    rng = np.random.default_rng(0)
    sizes = {"b1": (16,), "b2": (3,), "w1": (6, 16), "w2": (16, 3)}
    made = {name: rng.normal(size=shape) / 3 for name, shape in sizes.items()}
    return {name: x.astype(np.float32) for name, x in made.items()}


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(16, n)).astype(np.float32) for name, n in (("x", 6), ("y", 3))}


def loss_of(params, batch):
    hidden = jnp.tanh(batch["x"] @ params["w1"] + params["b1"])
    out = hidden @ params["w2"] + params["b2"]
    return tx.example_mean(jnp.sum((out - batch["y"]) ** 2, -1), axis=tuple(AXES))


@tx.step_fn
def train_step(state, batch):
    loss, grads = tx.value_and_grad(loss_of)(state.params, batch)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, tuple(AXES), name="loss")}


def engine(sizes=AXES, *, optimizer=None, **options):
    count = int(np.prod(list(sizes.values())))
    return tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:count], tuple(sizes), tuple(sizes.values())),
        plan=tx.Plan(data_parallel=tx.DP(tuple(AXES), **options)),
        optimizer=optimizer or tx.optim.adamw(0.05, clip_norm=1.0),
    )


def curve(trainer, steps=4):
    state, losses = trainer.create_state(params()), []
    for i in range(steps):
        state, metrics = train_step(state, batch(i % 2))
        losses.append(float(metrics["loss"]))
    return losses, jax.tree.map(np.asarray, state.stored_params)


@functools.cache
def plain_curve():
    """Return the curve of plain data parallelism, which all others are held to."""
    return curve(engine())


def gradient_lines(report):
    return [line for line in report.plan if line.what == "gradients"]


@pytest.mark.parametrize("buckets", [None, tx.Buckets(0.25 * KIB, 0.1 * KIB)], ids=str)
@pytest.mark.parametrize("algorithm", NAMES)
def test_the_step_sends_what_the_plan_predicts(algorithm, buckets):
    trainer = engine(buckets=buckets, algorithm=algorithm)
    report = trainer.audit(train_step, trainer.create_state(params()), batch())
    assert report.exact, report
    lines = gradient_lines(report)
    predicted = trainer.plan.predict(params(), trainer.mesh)
    assert [(p.kind, p.axes, p.dtype, p.payload_bytes) for p in predicted] == [
        (line.kind, line.axes, line.dtype, line.payload_bytes) for line in lines
    ]
    for line in lines:
        assert line.found_bytes == line.payload_bytes
        assert line.factor == "mean", line
    assert {line.what for line in report.plan} == {"gradients", "pmean/loss"}


@pytest.mark.parametrize("algorithm", NAMES)
def test_the_curve_is_that_of_plain_data_parallelism(algorithm):
    wanted = plain_curve()
    found = curve(engine(buckets=0.1 * KIB, algorithm=algorithm))
    rtol = 0.02 if algorithm == "bf16_wire" else 1e-5
    np.testing.assert_allclose(found[0], wanted[0], rtol=rtol)
    for name, x in wanted[1].items():
        np.testing.assert_allclose(found[1][name], x, atol=10 * rtol, err_msg=name)


@pytest.mark.parametrize("shard_axis", [None, "device"])
@pytest.mark.parametrize("algorithm", ["plain", "ring", "hierarchical"])
def test_sharded_moments(algorithm, shard_axis):
    """Shards are averaged in buckets too; HSDP's then over the other axis."""
    options = {"shard": "optimizer", "shard_axis": shard_axis}
    trainer = engine(buckets=0.1 * KIB, algorithm=algorithm, **options)
    report = trainer.audit(train_step, trainer.create_state(params()), batch())
    assert report.exact, report
    for line in report.plan[:-1]:
        assert line.found_bytes == line.payload_bytes, line
        assert line.factor == ("mean" if line.what == "gradients" else ""), line
    np.testing.assert_allclose(curve(trainer)[0], plain_curve()[0], rtol=1e-5)


def test_an_axis_of_one_device_is_no_level():
    sizes = {"node": 1, "device": 4}
    trainer = engine(sizes, algorithm="hierarchical")
    report = trainer.audit(train_step, trainer.create_state(params()), batch())
    assert report.exact
    assert [line.kind for line in gradient_lines(report)] == ["reduce-scatter", "all-gather"]
    trainer = engine({"node": 1, "device": 1}, algorithm="hierarchical", buckets=1)
    report = trainer.audit(train_step, trainer.create_state(params()), batch())
    assert report.exact
    assert report.collectives == ()


def test_no_two_buckets_are_one_collective():
    trainer = engine(buckets=tx.Buckets(0.25 * KIB, 0.1 * KIB), algorithm="plain")
    layout = trainer.plan.bucket_layout(params(), trainer.mesh)
    assert [bucket.names for bucket in layout] == [("w2",), ("w1",), ("b2", "b1")]
    report = trainer.audit(train_step, trainer.create_state(params()), batch())
    found = [row for row in report.collectives if "pmean/grads" in " ".join(row.tags)]
    if jax.__version_info__ >= (0, 11):  # before, XLA for CPU removes barriers first
        assert sorted(row.payload_bytes for row in found) == [80, 192, 384]  # the loss with one
    assert sum(row.payload_bytes for row in found) == 656
