"""A checkpoint under any composition of plans resumes under any other: the same curve.

TXCORE_ALL_PLANS=1 runs every pair.
"""

import functools
import itertools
import os
import shutil

import composed_plans as plans
import numpy as np
import pytest
from composed_plans import Case, with_options

import txcore as tx

ALL = os.environ.get("TXCORE_ALL_PLANS") == "1"
STEPS, SAVED = 6, 3

# All of them of 4 layers.
CASES = {
    "one device": Case("mlp", deep=4, schedule="gpipe"),
    "data": with_options(Case("mlp", 4, deep=4), dp={"shard": "optimizer"}),
    "interleaved": Case("mlp", 2, 1, 2, 2, "interleaved"),
    "zb-h1": Case("mlp", 1, 1, 4, 2, "zb-h1"),
    "1f1b": with_options(Case("mlp", 2, 1, 2, 1, deep=2), dp={"shard": "optimizer"}),
    "tensor": with_options(Case("mlp", 2, 1, 1, 4, deep=4), dp={"shard": "parameters"}),
}
# Chunks to none and back, sharded optimizers and parameters to others.
SAMPLE = [("interleaved", "zb-h1"), ("1f1b", "tensor"), ("tensor", "interleaved")]


def train(case, folder, steps):
    """Train up to a number of steps, from the newest checkpoint; return the losses by step."""
    losses = {}

    def note(record):
        if record.kind == "step":
            losses[record.step] = record.metrics["loss"]

    model = case.make_model()
    engine = case.make_engine(model, loggers=[note])
    state = engine.create_state(model.params)
    data = [model.make_batch(i) for i in range(STEPS)]
    saves = tx.Checkpoints(folder, every=SAVED) if folder else None
    engine.fit(step_of(case.model, case.layers), state, data, steps=steps, checkpoints=saves)
    return losses


@functools.cache
def step_of(name, layers):
    return plans.make_step(Case(name, deep=layers).make_model())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return what makes a run that was saved under a plan, once for each."""

    @functools.cache
    def save(name):
        folder = tmp_path_factory.mktemp("saved") / "run"
        train(CASES[name], folder, SAVED)
        return folder

    return save


@functools.cache
def curve_of_one_device():
    return train(CASES["one device"], None, STEPS)


@pytest.mark.parametrize("before,after", [*itertools.permutations(CASES, 2)] if ALL else SAMPLE)
def test_resumed_under_another_composition(before, after, folders, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(folders(before), folder)
    losses = train(CASES[after], folder, STEPS)
    whole = curve_of_one_device()
    assert sorted(losses) == list(range(SAVED + 1, STEPS + 1))
    np.testing.assert_allclose([losses[i] for i in losses], [whole[i] for i in losses], rtol=1e-5)
