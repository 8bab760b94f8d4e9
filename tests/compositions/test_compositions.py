"""Any composition of plans computes what one device does: gradients, curves, evaluations.

Truth is one device: its gradients in float64 by jax.grad (of the MLP by NumPy alone), its curve in
float32. TXCORE_ALL_PLANS=1 runs every composition of 1, 2, 4 and 8 devices along data, context,
pipe and model, each schedule; else a sample in which every two choices meet.
"""

import itertools
import os

import composed_plans as plans
import jax
import numpy as np
import pytest
from composed_plans import Case, with_options

ALL = os.environ.get("TXCORE_ALL_PLANS") == "1"

SAMPLE = [
    Case("gpt", 1, 2, 2, 2, "zb-h1", deep=2),
    Case("gpt", 1, 2, 2, 2, "interleaved"),
    Case("gpt", 2, 2, 1, 2, deep=4),
    Case("gpt", 2, 2, 2, 1, "gpipe", deep=2),
    Case("gpt", 1, 2, 2, 2, "1f1b", deep=2),
    Case("mlp", 2, 1, 2, 2, "interleaved"),
    Case("mlp", 1, 1, 2, 4, "gpipe", deep=2),
    Case("mlp", 4, 1, 2, 1, "1f1b", deep=2),
    Case("mlp", 2, 1, 4, 1, "zb-h1"),
    Case("cnn", 2, 1, 1, 4),
]


def choices(case):
    """Return what a case chooses: which axes are split, and the schedule of a pipeline."""
    found = {axis for axis in ("data", "context", "pipe", "mp") if getattr(case, axis) > 1}
    return found | ({case.schedule} if case.pipe > 1 else set()) | {case.model}


def test_every_two_choices_meet_in_the_sample():
    wanted = set()
    for case in plans.list_all():
        wanted |= {frozenset(pair) for pair in itertools.combinations(choices(case), 2)}
    met = {frozenset(pair) for case in SAMPLE for pair in itertools.combinations(choices(case), 2)}
    assert {tuple(sorted(pair)) for pair in wanted - met} == set()


@pytest.mark.parametrize("case", plans.list_all() if ALL else SAMPLE, ids=str)
def test_it_computes_what_one_device_does(case):
    truth, one, found = plans.true_gradients(case), plans.run_one_device(case), plans.run(case)
    error, rounding = (plans.largest_error(r.grads, truth) for r in (found, one))
    curve = np.max(np.abs(found.losses / one.losses - 1))
    evaluated = abs(found.evaluated / one.evaluated - 1)
    print(f"\n{case}: {error:.1e} ({rounding:.1e}), {curve:.1e}, {evaluated:.1e}")
    # Of 1e-5, or as much as one device's float32 differs from float64.
    assert error < max(1e-5, 4 * rounding)
    assert len(found.losses) == plans.STEPS
    assert curve < 2e-5
    assert evaluated < 2e-5


OPTIONS = [
    with_options(Case("mlp", 2, 1, 2, 2, "1f1b"), dp={"shard": "optimizer"}, optimizer="clipped")
]
if ALL:
    OPTIONS += [
        with_options(case, dp={"shard": shard}, optimizer=optimizer)
        for case in SAMPLE
        for shard in (("optimizer",) if case.pipe > 1 else ("optimizer", "gradients"))
        for optimizer in ("adamw", "clipped")
    ]


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_exact_options_change_nothing(case):
    """Sharded optimizers, buckets and clipping, on top of pipelines and tensor parallelism."""
    one, found = plans.run_one_device(case), plans.run(case)
    # Adam makes whole steps of gradients that are nearly 0.
    assert np.max(np.abs(found.losses / one.losses - 1)) < (
        1e-3 if case.optimizer == "adamw" else 2e-5
    )
    assert abs(found.evaluated / one.evaluated - 1) < 1e-3


LOSSY = [
    (with_options(Case("mlp", 2, 1, 2, 2, "1f1b"), precision="bfloat16"), 2e-2),
    (with_options(Case("mlp", 2, 1, 2, 2, "interleaved"), dp={"compression": "int8"}), 2e-2),
]
if ALL:
    LOSSY += [(with_options(case, precision="bfloat16"), 2e-2) for case in SAMPLE]
    LOSSY += [(with_options(case, dp={"compression": "int8"}), 2e-2) for case in SAMPLE]
    LOSSY += [(with_options(case, precision="float16"), 2e-2) for case in SAMPLE]


@pytest.mark.parametrize("case,within", LOSSY, ids=lambda value: str(value))
def test_lossy_options_stay_within_their_tolerance(case, within):
    one, found = plans.run_one_device(case), plans.run(case)
    assert np.max(np.abs(found.losses / one.losses - 1)) < within
    assert abs(found.evaluated / one.evaluated - 1) < within


def numpy_mlp(params, batch):
    """Return loss and gradients of the MLP, written out in NumPy."""
    x, mask = (batch[name].astype(np.float64) for name in ("x", "mask"))
    blocks, mask = params["blocks"], mask / mask.sum()
    xs, inners = [x @ params["in"]], []
    for up, b, down in zip(blocks["up"], blocks["b"], blocks["down"], strict=True):
        inners.append(np.tanh(xs[-1] @ up + b))
        xs.append(xs[-1] + inners[-1] @ down)
    logits = xs[-1] @ params["head"]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    rows = np.arange(len(p))
    loss = -(np.log(p[rows, batch["y"]]) * mask).sum()
    dlogits = p.copy()
    dlogits[rows, batch["y"]] -= 1
    dlogits *= mask[:, None]
    grads = {name: np.zeros_like(leaf) for name, leaf in blocks.items()}
    dx = dlogits @ params["head"].T
    for i in reversed(range(len(inners))):
        grads["down"][i] = inners[i].T @ dx
        dinner = (dx @ blocks["down"][i].T) * (1 - inners[i] ** 2)
        grads["up"][i], grads["b"][i] = xs[i].T @ dinner, dinner.sum(0)
        dx = dx + dinner @ blocks["up"][i].T
    return loss, {"in": x.T @ dx, "blocks": grads, "head": xs[-1].T @ dlogits}


def train_in_numpy(case):
    """Return (gradients of the first step, losses) of momentum in float64."""
    model = case.make_model()
    params = jax.tree.map(np.float64, model.params)
    velocity, losses, first = jax.tree.map(np.zeros_like, params), [], None
    for i in range(plans.STEPS):
        loss, grads = numpy_mlp(params, model.make_batch(i))
        first = grads if first is None else first
        losses.append(loss)
        velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, grads)
        params = jax.tree.map(lambda p, v: p - 0.05 * v, params, velocity)
    return first, np.array(losses)


def test_the_mlp_is_that_of_numpy():
    case = Case("mlp", 2, 1, 2, 2, "1f1b")
    grads, losses = train_in_numpy(case)
    found = plans.run(case)
    assert plans.largest_error(found.grads, grads) < 1e-5
    np.testing.assert_allclose(found.losses, losses, rtol=1e-5)
    assert plans.largest_error(plans.true_gradients(case), grads) < 1e-12
