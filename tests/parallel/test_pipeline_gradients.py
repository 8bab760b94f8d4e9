"""A pipeline's loss and gradients are those of one device, in float64."""

import dataclasses
import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from pipeline_models import Case, largest_error, unsplit

import txcore as tx
from txcore.parallel.pipeline import run as run_module
from txcore.parallel.pipeline.buffers import plan_buffers
from txcore.parallel.pipeline.means import Means

CASES = [
    Case("1f1b", p=1, m=2, layers=2),
    Case("gpipe", p=2, m=3, tied=False, layers=4),
    Case("1f1b", p=4, m=4, d=2, kind="again", masked=True),
    Case("interleaved", p=2, m=3, v=2, d=2, masked=True),
    Case("zb-h1", p=4, m=3, layers=8),
    Case("zb-h1", p=2, m=4, d=2, tied=False, kind="again", masked=True),
]
SWEEP = "TXCORE_ALL_PIPELINES"
KINDS = [("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3)]
KINDS += [("zb-h1", 1)]


def check(case):
    with jax.enable_x64(True):
        loss, grads, evaluated = case.make_step()(*case.inputs())
        expected, gradients = case.reference()
        found = (loss, unsplit(grads), evaluated)
        assert largest_error(found, (expected, gradients, expected)) < 1e-10


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_are_those_of_one_device(case):
    check(case)


@pytest.mark.skipif(SWEEP not in os.environ, reason=f"set {SWEEP}=1: takes many minutes")
@pytest.mark.parametrize("tied,kind", [(1, "kept"), (0, "kept"), (0, "again"), (1, "scan")])
@pytest.mark.parametrize("name,v", KINDS)
@pytest.mark.parametrize("p,d", [*itertools.product((1, 2, 4), (1, 2))])
def test_every_pipeline_gives_the_gradients_of_one_device(name, v, p, d, tied, kind):
    m, masked = (3, True) if tied else (8, False)
    check(Case(name, p, m, v, d, bool(tied), kind, masked, layers=2 * p * v))


@pytest.fixture(scope="module")
def planted():
    """A pipeline that is right, with its inputs and the truth."""
    case = Case("1f1b", p=2, m=4, layers=4)
    with jax.enable_x64(True):
        yield case, case.make_step(), case.inputs(), case.reference()


def error_of(step, inputs, expected):
    loss, grads, _ = step(*inputs)
    return largest_error((loss, unsplit(grads)), expected)


def test_swapped_stages_and_shifted_labels_are_seen(planted):
    """The layers and labels of the tests tell each from the other."""
    _, step, (params, batch, _), expected = planted
    assert error_of(step, (params, batch, None), expected) < 1e-10
    swapped = {**params, "blocks": jax.tree.map(lambda a: np.roll(a, 2, 0), params["blocks"])}
    assert error_of(step, (swapped, batch, None), expected) > 0.1
    shifted = {**batch, "next": np.roll(batch["next"], 1)}
    assert error_of(step, (params, shifted, None), expected) > 0.1


def test_a_missing_division_by_the_microbatches_is_seen(planted, monkeypatch):
    case, _, inputs, expected = planted
    right = Means._take
    monkeypatch.setattr(Means, "_take", lambda *args: case.m * right(*args))
    assert abs(error_of(case.make_step(), inputs, expected) - (case.m - 1)) < 1e-10


def test_a_buffer_one_slot_too_small_is_seen(planted, monkeypatch):
    case, _, inputs, expected = planted

    def plan_small(schedule):
        buffers = plan_buffers(schedule)
        size = buffers.stash.size - 1
        stash = dataclasses.replace(buffers.stash, size=size, slot=buffers.stash.slot % size)
        return dataclasses.replace(buffers, stash=stash)

    monkeypatch.setattr(run_module, "plan_buffers", plan_small)
    assert error_of(case.make_step(), inputs, expected) > 1e-3


def ring_sum(x, axis):
    """Sum over two devices by a permute, which no device may leave out."""
    return x + tx.shift(x, axis, name="ring")


@pytest.mark.parametrize("add", [tx.psum, ring_sum], ids=["psum", "permute"])
def test_a_stage_may_communicate_over_another_axis(add):
    """Each half of a layer's width on one device of "model": devices that have no turn skip a
    psum, and join a permute. What a stage makes of zeros, NaN here, is dropped.
    """
    schedule = tx.pipeline.make_schedule("1f1b", stages=2, microbatches=2)
    rng = np.random.default_rng(0)
    w, u = rng.normal(size=(2, 4, 6)), rng.normal(size=(2, 6, 4))
    x = rng.normal(size=(4, 4))

    def normalize(x):
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True))

    def layer(chunk, x, batch, stage):
        x = tx.vary(x, "model", name="inputs") if add is tx.psum else x
        return add(jnp.tanh(normalize(x) @ chunk["w"][0]) @ chunk["u"][0], "model")

    def step(params, x):
        first = (lambda p, x: x) if add is tx.psum else (lambda p, x: tx.vary(x, "model"))
        differentiate = tx.pipeline.value_and_grad(
            first, layer, lambda p, x, batch: jnp.sum(x * x, -1), schedule, axis="pipe"
        )
        loss, grads = differentiate({"blocks": params}, x)
        return (loss if add is tx.psum else tx.pmean(loss, "model")), grads["blocks"]

    def whole(params, x):
        for s in range(2):
            x = jnp.tanh(normalize(x) @ params["w"][s]) @ params["u"][s]
        return jnp.mean(jnp.sum(x * x, -1))

    specs = {"w": P("pipe", None, "model"), "u": P("pipe", "model")}
    with jax.enable_x64(True):
        params = {"w": w, "u": u}
        expected, gradients = jax.device_get(jax.value_and_grad(whole)(params, x))
        loss, grads = tx.testing.run_sharded(
            step,
            *(params, x),
            axes={"pipe": 2, "model": 2},
            in_specs=(specs, P()),
            out_specs=(P(), specs),
        )
        if add is ring_sum:  # each device has a loss of its own, and their sum is differentiated
            grads = jax.tree.map(lambda a: a / 2, grads)
        assert largest_error((loss, grads), (expected, gradients)) < 1e-10
