"""What a plan says of itself before anything compiles, against what was compiled then."""

import described_models as models
import jax
import numpy as np
import pytest
from target_cases import available

import txcore as tx
from txcore.train.steps import proof

PP = tx.PP("pipe", microbatches=4)
ADAMW = tx.optim.adamw(0.01, clip_norm=1.0)
PLANS = {
    "TP": ((1, 4, 1), tx.Plan(data_parallel=tx.DP("data"), tensor_parallel=models.TP)),
    "DP x TP": ((2, 2, 1), tx.Plan(data_parallel=tx.DP("data"), tensor_parallel=models.TP)),
    "all three": (
        (2, 2, 2),
        tx.Plan(data_parallel=tx.DP("data"), tensor_parallel=models.TP, pipeline=PP),
    ),
}
for shard in ("optimizer", "gradients", "parameters"):
    sharded = tx.DP("data", shard=shard)
    PLANS[f"{shard} x TP"] = (
        (2, 2, 1),
        tx.Plan(data_parallel=sharded, tensor_parallel=models.TP),
    )
PLANS["compressed"] = (
    (2, 2, 1),
    tx.Plan(data_parallel=tx.DP("data", compression="int8"), tensor_parallel=models.TP),
)


def engine_on(shape, plan, optimizer=ADAMW):
    return tx.Engine(mesh=models.mesh(*shape), plan=plan, optimizer=optimizer)


def bytes_of(tree):
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))


@pytest.fixture
def compiled_step(monkeypatch):
    """Return a function that gives a step's memory as its compiler sees it, and the report."""
    report_on, found = proof.report_on, []

    def keep(compiled, state, options):
        found.append(compiled)
        return report_on(compiled, state, options)

    monkeypatch.setattr(proof, "report_on", keep)

    def compile_step(engine, state, batch, **target):
        report = engine.audit(models.step, state, batch, **target)
        return found[-1].call.memory_analysis(), report

    return compile_step


def check_figures(described, memory, report, state, batch):
    """Compare arguments and collectives: what a device is given, and what it sends."""
    rest = {n: x for n, x in state.arrays.items() if n not in KEPT}
    lying = ("parameters", "optimizer state", "communication state")
    given = sum(described.memory.get(name, 0) for name in lying)
    assert memory.argument_size_in_bytes == given + bytes_of(rest) + batch
    lines = [line for line in report.plan if line.payload_bytes]
    assert [line.what for line in lines] == [one.what for one in described.collectives]
    for line, one in zip(lines, described.collectives, strict=True):
        assert line.payload_bytes == one.payload_bytes
        assert line.found_bytes == one.payload_bytes or one.at_most
    assert report.exact


KEPT = ("stored_params", "opt_state", "comm_state")


@pytest.mark.parametrize("case", PLANS)
def test_the_figures_are_those_of_the_compiled_step(case, compiled_step):
    shape, plan = PLANS[case]
    engine, batch = engine_on(shape, plan), models.batch()
    state = engine.create_state(models.params())
    described = plan.describe(models.params(), engine.mesh, optimizer=ADAMW)
    memory, report = compiled_step(engine, state, batch)
    check_figures(described, memory, report, state, bytes_of(batch) // shape[0])


@pytest.mark.parametrize("case", ["optimizer x TP", "all three"])
def test_they_are_those_of_a_step_for_eight_h100(case, compiled_step):
    target, sizes = available("cuda:h100:8"), {"data": 2, "model": 2, "pipe": 2}
    engine = engine_on((1, 1, 1), PLANS[case][1])
    state = engine.create_state(models.params())
    shard = models.batch(8)
    memory, report = compiled_step(engine, state, shard, target=target, mesh=sizes)
    described = PLANS[case][1].describe(models.params(), models.mesh(2, 2, 2), optimizer=ADAMW)
    check_figures(described, memory, report, state, bytes_of(shard))
