"""A checkpoint of one plan with a pipeline goes on under any other, with the same curve."""

import functools
import itertools
import os

import jax
import numpy as np
import pipeline_plans as models
import pytest

import txcore as tx
from txcore.train.checkpoints import layers
from txcore.train.checkpoints.manifest import CheckpointError

SWEEP = "TXCORE_ALL_PIPELINES"
CHUNKS = {"schedule": "interleaved", "chunks": 2}
# Plans as (options of DP, of PP, axis sizes).
PLANS = {
    "one": ({}, None, {}),
    "dp-sharded x pp": ({"shard": "optimizer"}, {}, {"data": 2, "pipe": 2}),
    "chunks x tp": ({}, CHUNKS, {"pipe": 2, "model": 2}),
    "four chunks": ({}, {"schedule": "gpipe", "chunks": 4}, {"pipe": 2}),
    "pp4": ({}, {}, {"pipe": 4}),
    "zero3 chunks": ({"shard": "parameters"}, CHUNKS, {"data": 2, "pipe": 4}),
    "chunks on one device": ({}, CHUNKS, {}),
    "zb": ({}, {"schedule": "zb-h1"}, {"pipe": 2, "model": 2, "data": 2}),
}
# Each as what is saved and as what goes on, in another stacking of the layers.
SOME = [("one", "chunks x tp"), ("chunks x tp", "four chunks"), ("four chunks", "dp-sharded x pp")]
SOME += [("dp-sharded x pp", "one")]


class Runs:
    """Hold engines and what each has saved after two steps, made when first asked for."""

    def __init__(self, folder):
        self.folder, self.engines, self.saved = folder, {}, set()

    def engine(self, name):
        if name not in self.engines:
            dp, pp, sizes = PLANS[name]
            self.engines[name] = models.make_engine(models.make_plan(dp=dp, pp=pp), **sizes)
        return self.engines[name]

    def save(self, name):
        """Return the folder of a checkpoint after two steps."""
        to = self.folder / name.replace(" ", "_")
        if name not in self.saved:
            state, losses = models.train(self.engine(name), 2)
            np.testing.assert_allclose(losses, self.whole[1][:2], rtol=1e-5)
            to.mkdir()
            with tx.Checkpoints(to, every=2) as checkpoints:
                checkpoints.save(state, tx.train.Position(steps=2))
            self.saved.add(name)
        return to

    @functools.cached_property
    def whole(self):
        """The parameters and losses of four steps in a row on one device."""
        state, losses = models.train(self.engine("one"), 4)
        return models.params_of(state), losses


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("pipelines"))


def check(runs, saved, other):
    (end, curve), engine = runs.whole, runs.engine(other)
    with tx.Checkpoints(runs.save(saved), every=2) as checkpoints:
        state, position = checkpoints.restore(engine.create_state(models.init()))
    assert position.steps == 2
    state, losses = models.train(engine, 2, state=state, start=2)
    np.testing.assert_allclose(losses, curve[2:], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), models.params_of(state), end
    )


@pytest.mark.parametrize("saved,other", SOME)
def test_a_checkpoint_goes_on_under_another_plan(runs, saved, other):
    check(runs, saved, other)


@pytest.mark.skipif(SWEEP not in os.environ, reason=f"set {SWEEP}=1: takes minutes")
@pytest.mark.parametrize("saved,other", [*itertools.permutations(PLANS, 2)])
def test_a_checkpoint_of_any_plan_goes_on_under_any_other(runs, saved, other):
    check(runs, saved, other)


def test_parameters_of_chunks_are_loaded_as_stacked_layers(runs):
    folder = runs.save("four chunks")
    params = tx.load_params(folder, jax.eval_shape(models.init))
    assert params["blocks"]["w"].shape == models.init()["blocks"]["w"].shape
    engine = runs.engine("one")
    with tx.Checkpoints(runs.save("one"), every=2) as checkpoints:
        state, _ = checkpoints.restore(engine.create_state(models.init()))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, models.params_of(state)
    )


def test_other_layers_are_another_model(runs):
    engine = runs.engine("four chunks")
    text = (
        r"opt_state\['m'\]\['blocks'\]\['b'\] is float32\[8, 16\] in it and float32\[4, 4, 16\] in"
    )
    with (
        tx.Checkpoints(runs.save("one"), every=2) as checkpoints,
        pytest.raises(CheckpointError, match=text),
    ):
        checkpoints.restore(engine.create_state(models.init(layers=16)))


@pytest.mark.parametrize(
    "saved,own,dims,same",
    [
        ("float32[8, 4]", "float32[2, 4, 4]", 2, True),
        ("float32[2, 4, 4]", "float32[8, 4]", 1, True),
        ("float32[4, 2, 4]", "float32[2, 4, 4]", 2, True),
        ("float32[copies, 8, 4]", "float32[copies, 2, 4, 4]", 2, True),
        ("float32[8]", "float32[2, 4]", 2, True),
        ("float32[8, 4]", "float32[2, 2, 4]", 2, False),
        ("float32[8, 4]", "float32[2, 4, 2]", 2, False),
        ("float32[8, 4]", "bfloat16[2, 4, 4]", 2, False),
        ("float32[copies, 8, 4]", "float32[2, 4, 4]", 2, False),
        ("float32[2, 2, 2, 4]", "float32[8, 4]", 1, False),
        ("float32[]", "float32[]", 1, False),
    ],
)
def test_the_same_layers_are_known_by_their_types(saved, own, dims, same):
    assert layers.is_same("opt_state['mu']['blocks']['w']", saved, own, dims) is same
    assert not layers.is_same("opt_state['mu']['layers']['w']", saved, own, dims)
    assert not layers.is_same("extra['blocks']", saved, own, dims)
