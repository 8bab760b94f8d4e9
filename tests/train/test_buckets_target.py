"""Gradients in buckets, on machines that are not here: exact, as predicted, none combined."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from target_cases import available

import txcore as tx
from txcore.parallel.gradients.algorithms import ALGORITHMS

TARGETS = ["cpu:8", "cuda:h100:8", "tpu:v5e:2x4"]
AXES = {"node": 2, "device": 4}
MIB = 1 << 18  # float32s
SIZES = {"a": MIB // 4, "b": MIB // 2, "c": MIB // 8, "d": MIB, "e": 3}
BUCKETS = tx.Buckets(mb=0.75, first_mb=0.25)  # e | d | c b | a

# How often a kind of collective stands in the program of one bucket over two axes, by a ring of 8.
COUNTS = {
    "plain": 1,
    "chunked": 1,
    "reduce_scatter_all_gather": 2,
    "hierarchical": 3,
    "bf16_wire": 2,
}


def params():
    return {name: np.zeros(n, np.float32) for name, n in SIZES.items()}


def loss_of(params, batch):
    values = [jnp.sum(p) * batch[:, i] for i, p in enumerate(params.values())]
    return tx.example_mean(sum(v**2 for v in values), axis=tuple(AXES))


@tx.step_fn
def train_step(state, batch):
    grads = tx.grad(loss_of)(state.params, batch)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {}


def audited(target, **options):
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:1], tuple(AXES), (1, 1)),
        plan=tx.Plan(data_parallel=tx.DP(tuple(AXES), **options)),
        optimizer=tx.optim.sgd(0.1),
    )
    state, batch = engine.create_state(params()), np.zeros((2, 5), np.float32)
    report = engine.audit(train_step, state, batch, target=available(target), mesh=AXES)
    assert report.exact, report
    for line in report.plan:
        assert line.what in ("gradients", "parameters")
        assert line.found_bytes == line.payload_bytes, line
    return report


@pytest.mark.parametrize("algorithm", [None, *ALGORITHMS])
@pytest.mark.parametrize("target", TARGETS)
def test_the_audit_is_exact_and_as_predicted(target, algorithm):
    report = audited(target, buckets=BUCKETS, algorithm=algorithm)
    count = len(report.collectives)
    if algorithm in COUNTS:
        assert count <= 4 * COUNTS[algorithm]
        if algorithm == "plain" and (target != "cpu:8" or jax.__version_info__ >= (0, 11)):
            assert sorted(row.payload_bytes for row in report.collectives) == [
                4 * SIZES["e"],
                4 * SIZES["a"],
                4 * (SIZES["b"] + SIZES["c"]),
                4 * SIZES["d"],
            ]


@pytest.mark.parametrize("target", TARGETS)
def test_without_buckets_xla_combines_all(target):
    assert len(audited(target, algorithm="plain").collectives) == 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("algorithm", ["plain", "hierarchical", "bf16_wire"])
def test_shards_in_buckets(target, algorithm):
    report = audited(target, shard="optimizer", buckets=BUCKETS, algorithm=algorithm)
    assert any(line.kind != "all-reduce" for line in report.plan)
