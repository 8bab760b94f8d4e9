"""A checkpoint under any composition of plans resumes under any other: the same curve.

TXCORE_ALL_PLANS=1 runs every pair.
"""

import functools
import itertools
import os
import shutil

import composed_plans as plans
import jax
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


def train(case, folder, steps, ended=None):
    """Train up to a number of steps, from the newest checkpoint; return the losses by step.

    With `ended` return the state too.
    """
    losses = {}

    def note(record):
        if record.kind == "step":
            losses[record.step] = record.metrics["loss"]

    model = case.make_model()
    engine = case.make_engine(model, loggers=[note])
    state = engine.create_state(model.params)
    data = [model.make_batch(i) for i in range(STEPS)]
    saves = tx.Checkpoints(folder, every=SAVED) if folder else None
    step = step_of(case.model, case.layers)
    state = engine.fit(step, state, data, steps=steps, checkpoints=saves)
    return losses if ended is None else (losses, state)


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


def test_what_powersgd_has_left_over_goes_with_its_layers(tmp_path):
    """Other chunks, and back: its factors, of other layers then, are where it begins to iterate."""
    powersgd = {"compression": tx.compression.powersgd(rank=2)}
    one = with_options(Case("mlp", 2, 1, 2, 1, "1f1b", deep=2), dp=powersgd)
    chunks = with_options(Case("mlp", 2, 1, 2, 1, "interleaved"), dp=powersgd)
    _, saved = train(one, tmp_path / "run", SAVED, ended=True)
    shutil.copytree(tmp_path / "run", tmp_path / "same")
    _, read = train(chunks, tmp_path / "run", SAVED, ended=True)
    before, after = (state.comm_state["compression"] for state in (saved, read))
    for part in ("errors", "own"):
        pairs = zip(jax.tree.leaves(before[part]), jax.tree.leaves(after[part]), strict=True)
        for left, there in pairs:
            np.testing.assert_array_equal(np.asarray(there).reshape(left.shape), left)
    other, _ = train(chunks, tmp_path / "run", STEPS, ended=True)
    same, _ = train(one, tmp_path / "same", STEPS, ended=True)
    assert other.keys() == same.keys()
    assert other[SAVED + 1] == same[SAVED + 1]
    np.testing.assert_allclose([*other.values()], [*same.values()], rtol=2e-3)
