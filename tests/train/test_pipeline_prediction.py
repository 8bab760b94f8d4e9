"""A plan predicts what a pipeline sends: its permutes, and the sums over its stages."""

import os

import jax
import jax.numpy as jnp
import pipeline_plans as models
import pytest
from target_cases import available

import txcore as tx

SCHEDULES = {
    "gpipe": {"schedule": "gpipe"},
    "1f1b": {},
    "interleaved": {"schedule": "interleaved", "chunks": 2},
    "zb-h1": {"schedule": "zb-h1"},
}
SWEEP = "TXCORE_ALL_PIPELINES"
SOME = [("1f1b", "cud"), ("zb-h1", "cud"), ("interleaved", "tpu")]
ENDS = {"ends' gradients", "loss of the last stage"}
SIZES = {"data": 2, "model": 2, "pipe": 2}


def predict(plan, mesh, rows, **options):
    """Return the bytes of each thing that a plan predicts, from shapes alone."""
    params = plan.as_stored(jax.eval_shape(models.init))
    x = jax.ShapeDtypeStruct((rows // 4, models.LENGTH, models.WIDTH), jnp.float32)
    found = {}
    for one in plan.predict(params, mesh, activation=x, **options):
        found[one.what] = found.get(one.what, 0) + one.payload_bytes
    return found


def check(engine, target, dp=None):
    """Compare a prediction, the audit against the plan, and the audit's own rows."""
    plan, state = engine.plan, engine.create_state(models.init())
    report = engine.audit(models.step, state, models.make_batch(rows=8), **target)
    assert report.exact, str(report)
    mesh = tx.MeshSpec(jax.devices()[:8], tuple(SIZES), tuple(SIZES.values()))
    wanted = predict(plan, mesh, rows=8 if target else 4, clips=engine.optimizer.clips)
    planned = [line for line in report.plan if line.payload_bytes]
    for what in wanted:
        lines = [line for line in planned if line.what == what]
        assert sum(line.payload_bytes for line in lines) == wanted[what], what
        assert sum(line.found_bytes for line in lines) == wanted[what], (what, str(report))
        assert {line.times for line in lines} == {1}
    along_pipe = [row for row in report.collectives if row.axes == ("pipe",)]
    permutes = [row for row in along_pipe if row.kind == "collective-permute"]
    sent = sum(row.payload_bytes * row.trips for row in permutes)
    assert sent == wanted["activations"] + wanted["cotangents"]
    # The sums of aux come on top, which the model knows alone; XLA combines them with the others.
    beyond = [line for line in report.plan if line.axes == ("pipe",) and not line.payload_bytes]
    assert {line.what.split(".")[0] for line in beyond} <= {"psum/loss"}
    sums = sum(row.payload_bytes for row in along_pipe if row.kind == "all-reduce")
    assert sums == sum(wanted[what] for what in ENDS) + sum(line.found_bytes for line in beyond)
    return wanted


@pytest.mark.parametrize("target", ["cuda:h100:8", "tpu:v5e:2x4"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_each_schedule_sends_what_is_predicted_on_machines_that_are_not_here(name, target):
    if SWEEP not in os.environ and (name, target[:3]) not in SOME:
        pytest.skip(f"set {SWEEP}=1 for every schedule on every machine")
    engine = models.make_engine(models.make_plan(pp=SCHEDULES[name]), pipe=2, model=2)
    check(engine, {"target": available(target), "mesh": SIZES})


@pytest.mark.parametrize("name", ["interleaved"])
def test_a_schedule_sends_what_is_predicted_here(name):
    optimizer = tx.optim.adamw(0.01, clip_norm=1.0)
    plan = models.make_plan(pp=SCHEDULES[name])
    wanted = check(models.make_engine(plan, **SIZES, optimizer=optimizer), {})
    # By hand: 2 rows of 3 tokens and 8 numbers, 18 - 2 ticks of which something arrives.
    microbatch = 1 * models.LENGTH * models.WIDTH * 4
    assert wanted["activations"] % microbatch == 0
    assert wanted["ends' gradients"] == 2 * models.WORDS * models.WIDTH * 4
    assert wanted["loss of the last stage"] == 4


def test_a_pipeline_of_one_device_predicts_nothing_of_its_own():
    mesh = tx.MeshSpec(jax.devices()[:2], ("data", "model", "pipe"), (2, 1, 1))
    assert set(predict(models.make_plan(pp={}), mesh, rows=8)) == {"gradients"}
