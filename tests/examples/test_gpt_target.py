"""The small GPT on machines that are not here: exact, and what formula and plan predict."""

import numpy as np
import pytest
from gpt_modules import gpt
from target_cases import available

import txcore as tx

MESH = {"data": 2, "context": 1, "pipe": 2, "model": 2}
ROWS = 4


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda:h100:8", "tpu:v5e:2x4"])
def test_the_audit_is_exact_and_as_predicted(target):
    """`python benchmarks/gpt_targets.py` does the same for 512 chips."""
    config = gpt.model.GPT(length=16, width=32, layers=2, heads=4, kv_heads=4)
    plan = tx.Plan(
        data_parallel=tx.DP("data"),
        tensor_parallel=tx.TP("model", rules=config.tensor_rules),
        pipeline=tx.PP("pipe", microbatches=2),
        context="context",
    )
    engine = tx.Engine(
        mesh=gpt.cli.make_mesh(dict.fromkeys(MESH, 1), 1),
        plan=plan,
        optimizer=tx.optim.adamw(1e-3, clip_norm=1.0),
        precision="bfloat16",
    )
    state = engine.create_state(gpt.model.init(config))
    batch = {key: np.zeros((ROWS, config.length), np.int32) for key in ("tokens", "labels")}
    step = gpt.train.make_steps(config)[0]
    report = engine.audit(step, state, batch, target=available(target), mesh=MESH)
    assert report.exact, str(report)
    formula = gpt.communication.predict(config, plan, MESH, 2 * ROWS, "bfloat16")
    beyond = [line for line in report.plan if not line.payload_bytes and "loss" not in line.what]
    assert sum(line.found_bytes for line in beyond) == sum(sent.payload_bytes for sent in formula)
    assert all(line.found_bytes == line.payload_bytes for line in report.plan if line.payload_bytes)
