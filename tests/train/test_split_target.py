"""Parameters stored in parts, on machines that are not here: exact, and as the plan predicts."""

import pytest
import split_models as models
from jax.sharding import PartitionSpec as P
from target_cases import available

import txcore as tx
from txcore.profiling.report import PlanLine


@pytest.mark.parametrize("target", ["cpu:8", "cuda:h100:8", "tpu:v5e:2x4"])
@pytest.mark.parametrize("data, model", [(4, 2), (1, 8)])
def test_the_audit_is_exact_and_as_predicted(target, data, model):
    """From an engine of one device, whose state holds every parameter whole."""
    optimizer = tx.optim.adamw(0.1, clip_norm=1.0)
    engine = models.engine((1, 1), optimizer, on_nonfinite="skip")
    state = engine.create_state(models.params())
    sizes = {"data": data, "model": model}
    batch = models.batch(size=4)
    report = engine.audit(models.train_step, state, batch, target=available(target), mesh=sizes)
    assert report.exact, report
    wanted = []
    if data > 1:
        sent = 4 * ((48 + 8 + 24) // model + 3 + 6)
        wanted.append(
            PlanLine("gradients", "all-reduce", ("data",), "float32", sent, sent, factor="mean")
        )
    if model > 1:
        wanted.append(PlanLine("gradient norm", "all-reduce", ("model",), "float32", 4, 4))
        wanted.append(PlanLine("finite gradients", "all-reduce", ("model",), "int32", 4, 4))
    assert list(report.plan[: len(wanted)]) == wanted
    beyond = {line.what for line in report.plan[len(wanted) :]}
    assert beyond == ({"psum/outputs", "vary/inputs"} if model > 1 else set()) | (
        {"pmean/loss"} if data > 1 else set()
    )


def test_parts_that_the_target_cannot_share():
    engine = models.engine((1, 1), rules={"mlp/w1": P("model", None)})
    state = engine.create_state(models.params())
    text = r"needs dim 0 of params\['mlp'\]\['w1'\], shape \(6, 8\), divisible by the 4 devices"
    given = {"target": "cpu:8", "mesh": {"data": 2, "model": 4}}
    with pytest.raises(ValueError, match=text):
        engine.audit(models.train_step, state, models.batch(size=4), **given)
