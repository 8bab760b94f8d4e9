"""Context, stages and layers over real processes: the numbers of one device.

Two ranks of two devices. The first axis of the mesh lies over the processes: the ring of attention,
the permutes between stages, and the sums of layers go through gloo.
"""

import pathlib
import sys

import jax
import numpy as np
import test_ranks_agree as ranks

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "compositions"))

import composed_plans as plans
from composed_worker import STEPS

WORKER = pathlib.Path(__file__).with_name("composed_worker.py")
CASES = {
    "context": {"axes": ["context", "data"], "model": "gpt", "context": 2, "data": 2},
    "pipe": {"axes": ["pipe", "model"], "model": "mlp", "pipe": 2, "mp": 2, "schedule": "1f1b"},
}


def alone(case):
    """Return losses, evaluation and parameters of one device."""
    case = case.on_one_device()
    model = case.make_model()
    engine = case.make_engine(model)
    state, step = engine.create_state(model.params), plans.make_step(model)
    losses, batches = [], [model.make_batch(i) for i in range(STEPS)]
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    evaluated = engine.evaluate(plans.make_eval_step(model), state, batches[:2])["loss"]
    return losses, float(evaluated), jax.tree.map(np.asarray, state.stored_params)


def test_what_lies_over_processes_computes_what_one_device_does():
    # One run of all, since starting two ranks takes longer than all this.
    rows = ranks.found(ranks.run([["train", {"cases": CASES}]], 2, 2, seconds=600, worker=WORKER))
    for name, options in CASES.items():
        case = plans.Case(**{key: value for key, value in options.items() if key != "axes"})
        losses, evaluated, params = alone(case)
        found = [row["train"][name] for row in rows]
        for one in found:
            np.testing.assert_allclose(one["losses"], losses, rtol=2e-5, err_msg=name)
            np.testing.assert_allclose(one["evaluated"], evaluated, rtol=2e-5, err_msg=name)
            assert one["exact"]
        assert len({one["digest"] for one in found}) == 1
        for own, leaf in zip(found[0]["params"], jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(own, leaf.ravel(), rtol=2e-4, atol=2e-6, err_msg=name)
