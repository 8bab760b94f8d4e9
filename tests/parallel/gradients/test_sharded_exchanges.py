"""Shards with buckets, algorithms and compressions: exact, as predicted, with plain DP's curve.

A device's part of a gradient is made early under shard="gradients" (in each trip of a loop over
microbatches) and "parameters" (in the backward pass, each by itself). TXCORE_ALL_PLANS=1 runs every
combination.
"""

import itertools
import os

import numpy as np
import pytest
import test_exchange_plans as plans

import txcore as tx
from txcore.parallel.gradients.algorithms import pieces

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

ALL = os.environ.get("TXCORE_ALL_PLANS") == "1"
DATA = tuple(plans.AXES)
BUCKETS = tx.Buckets(plans.KIB / 4, plans.KIB / 10)
INT8 = tx.compression.int8(feedback=False)
KEPT = [tx.compression.powersgd(1, start=2), tx.compression.top_k(0.5), "int8"]
SHARDS = [(None, None)]
SHARDS += itertools.product(["optimizer", "gradients", "parameters"], [None, "device"])
HOW = [{"algorithm": name} for name in (None, *plans.NAMES)]
HOW += [{"compression": own} for own in ("bf16", "fp16", INT8, *KEPT)]
# (shard, shard axis, buckets, how, microbatches)
SAMPLE = [
    (None, None, BUCKETS, {"compression": "int8"}, None),
    (None, None, BUCKETS, {"compression": KEPT[0]}, 2),
    ("optimizer", None, BUCKETS, {"compression": KEPT[1]}, None),
    ("optimizer", "device", BUCKETS, {"compression": "int8"}, 2),
    ("optimizer", "device", None, {"compression": "fp16"}, None),
    ("gradients", None, BUCKETS, {"algorithm": "recursive_doubling"}, 2),
    ("gradients", "device", BUCKETS, {"algorithm": "ring"}, 2),
    ("gradients", "device", BUCKETS, {"compression": INT8}, 2),
    ("gradients", "device", BUCKETS, {"algorithm": None}, None),
    ("parameters", None, None, {"algorithm": "ring"}, 2),
    ("parameters", "device", None, {"algorithm": "chunked"}, 2),
    ("parameters", "device", None, {"compression": INT8}, None),
    ("parameters", None, None, {"compression": "fp16"}, 2),
]


def every_case():
    for (shard, axis), buckets, how, parts in itertools.product(
        SHARDS, [None, BUCKETS], HOW, [None, 2]
    ):
        keeps = how.get("compression") in KEPT
        early = shard in ("gradients", "parameters")
        if not (early and keeps) and not (shard == "parameters" and buckets is not None):
            yield shard, axis, buckets, how, parts


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(pieces, "CHUNK_BYTES", 128)


def step_of(parts):
    @tx.step_fn
    def step(state, batch):
        loss, grads = tx.value_and_grad(plans.loss_of, microbatches=parts)(state.params, batch)
        grads, state = state.sync_gradients(grads)
        state = state.apply_gradients(grads=grads)
        return state, {"loss": tx.pmean(loss, DATA, name="loss")}

    return step


def curve(trainer, step):
    state, losses = trainer.create_state(plans.params()), []
    for i in range(4):
        state, metrics = step(state, plans.batch(i % 2))
        losses.append(float(metrics["loss"]))
    return losses


@pytest.fixture(scope="module")
def plain():
    return curve(plans.engine(), step_of(None))


def tolerance_of(how):
    compression = how.get("compression")
    if compression in KEPT[:2]:
        return None  # another curve
    return 0.03 if compression or how.get("algorithm") == "bf16_wire" else 1e-5


@pytest.mark.parametrize("shard, axis, buckets, how, parts", every_case() if ALL else SAMPLE)
def test_as_predicted_with_the_curve_of_plain_dp(shard, axis, buckets, how, parts, plain):
    trainer = plans.engine(shard=shard, shard_axis=axis, buckets=buckets, **how)
    step = step_of(parts)
    report = trainer.audit(step, trainer.create_state(plans.params()), plans.batch())
    assert report.exact, report
    known = {"parameters", "parameters again", "gradient norm", "pmean/loss"}
    assert {line.what for line in report.plan} - {"gradients"} <= known
    for line in plans.gradient_lines(report):
        assert (line.found_bytes, line.factor, line.times) == (line.payload_bytes, "mean", 1), line
    if (rtol := tolerance_of(how)) is not None:
        np.testing.assert_allclose(curve(trainer, step), plain, rtol=rtol)


def test_compressed_buckets_are_their_own_collectives():
    trainer = plans.engine(buckets=BUCKETS, compression="int8")
    report = trainer.audit(step_of(None), trainer.create_state(plans.params()), plans.batch())
    sent = {kind: [] for kind in ("all-to-all", "all-gather")}
    for row in report.collectives:
        if row.kind in sent:
            sent[row.kind].append(row.payload_bytes)
    # w2: 48 elements, 12 a device; w1: 96, 24; b2 and b1: 19, 5. Each share with a scale of 4.
    assert sorted(sent["all-to-all"]) == [4 * (5 + 4), 4 * (12 + 4), 4 * (24 + 4)]
    assert sum(sent["all-gather"]) == sum(sent["all-to-all"])


@pytest.mark.parametrize("compression, bits", [("bf16", 8), ("fp16", 11), (INT8, 7)])
def test_gathered_parameters_have_the_mean_of_rounded_gradients(compression, bits):
    """Against float64: one rounding of each device's, none of the mean."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 64, 6)).astype(np.float32)

    @tx.step_fn
    def step(state, batch):
        loss = lambda w: (w * batch["x"][0]).sum()  # noqa: E731
        grads = tx.grad(loss)(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {}

    trainer = plans.engine(shard="parameters", compression=compression, optimizer=tx.optim.sgd(1.0))
    state = trainer.create_state(np.zeros((64, 6), np.float32))
    state, _ = step(state, {"x": x})
    wanted = -np.float64(x).mean(0)
    error = np.abs(np.asarray(state.stored_params) - wanted)
    assert 0 < error.max() < 2.0**-bits * np.abs(x).max()


@tx.step_fn
def by_layers(state, batch):
    def loss_of(shards, batch):
        first = {name: shards[name] for name in ("w1", "b1")}
        hidden = tx.zero.layer(lambda p, x: x @ p["w1"] + p["b1"])(first, batch["x"])
        hidden = tx.zero.layers(lambda p, x: x + p, [shards["b1"]], hidden)
        out = hidden @ tx.zero.gather(shards["w2"])
        return tx.example_mean(out.sum(-1), axis=DATA)

    loss, grads = tx.value_and_grad(loss_of)(state.shards, batch)
    grads, state = state.sync_gradients(grads)
    state = state.apply_gradients(grads=grads)
    return state, {"loss": tx.pmean(loss, DATA, name="loss")}


@pytest.mark.parametrize("step", [plans.train_step, by_layers])
def test_gathers_name_the_users_line(step):
    trainer = plans.engine(shard="parameters")
    report = trainer.audit(step, trainer.create_state(plans.params()), plans.batch())
    own = ("test_exchange_plans.py:", "test_sharded_exchanges.py:")
    assert [row.source for row in report.collectives if not row.source.startswith(own)] == []


@pytest.mark.parametrize("how", [{}, {"compression": "bf16"}], ids=str)
def test_the_factor_of_delayed_buckets_is_read(how):
    """What is averaged is no gradient of this step, and is unpacked of a bucket."""
    trainer = plans.engine(delay=1, buckets=BUCKETS, **how)
    report = trainer.audit(plans.train_step, trainer.create_state(plans.params()), plans.batch())
    assert report.exact, report
    assert {line.factor for line in plans.gradient_lines(report)} == {"mean"}
