"""The loss scale's automaton: against a model in NumPy, and against PyTorch's GradScaler."""

import re

import float16_steps as f16
import numpy as np
import pytest

import txcore as tx


def model(
    good, *, initial, growth_interval=2000, growth_factor=2.0, backoff_factor=0.5, minimum=1.0
):
    """(scale, good steps, skipped steps, updates) after each step, in float64."""
    scale, streak, skipped, updates = np.float64(initial), 0, 0, 0
    for fine in good:
        if not fine:
            scale, streak, skipped = max(scale * backoff_factor, minimum), 0, skipped + 1
        else:
            streak, updates = streak + 1, updates + 1
            if streak == growth_interval:
                streak, scale = 0, scale * growth_factor
        yield scale, streak, skipped, updates


def run(precision, good, n=1):
    """The same of an engine whose gradients overflow where `good` says no."""
    state = f16.engine(n, precision=precision).create_state(np.float32(0))
    for fine in good:
        state, _ = f16.step_on_w(state, np.full(4, 1.0 if fine else np.inf, np.float32))
        yield (*map(float, state.loss_scaling[:3]), int(state.step))


POLICIES = [
    {"initial": 2.0**10, "growth_interval": 3},
    {"initial": 2.0**10, "growth_interval": 1, "minimum": 64},
    {"initial": 300.0, "growth_interval": 2, "growth_factor": 1.5, "backoff_factor": 0.25},
    {"initial": 4.0, "growth_interval": 5, "minimum": 4.0},
]


@pytest.mark.parametrize("options", POLICIES, ids=str)
@pytest.mark.parametrize("share", [0.2, 0.6])
def test_random_overflows_give_the_scales_of_the_model(options, share):
    good = np.random.default_rng(0).random(60) > share
    expected = list(model(good, **options))
    assert len({row[0] for row in expected}) > 1
    np.testing.assert_allclose(list(run(f16.policy(**options), good)), expected, rtol=1e-5)


def test_the_defaults_are_those_of_gradscaler():
    scale = tx.LossScale()
    assert (scale.initial, scale.growth_interval) == (65536.0, 2000)
    assert (scale.growth_factor, scale.backoff_factor, scale.minimum) == (2.0, 0.5, 1.0)
    assert tx.Precision("float16").scaling == scale


# What torch.amp.GradScaler 2.13 (CPU) gives, after each step, where 0 is a gradient of inf.
GRADSCALER = [
    (
        {"initial": 1024.0, "growth_interval": 3},
        "0111101110111111010011111111111",
        [512, 512, 512, 1024, 1024, 512, 512, 512, 1024, 512, 512, 512, 1024, 1024, 1024, 2048]
        + [1024, 1024, 512, 256, 256, 256, 512, 512, 512, 1024, 1024, 1024, 2048, 2048, 2048],
    ),
    (
        {"initial": 100.0, "growth_interval": 2, "growth_factor": 1.5, "backoff_factor": 0.25},
        "0111101110111111",
        [25, 25, 37.5, 37.5, 56.25, 14.0625, 14.0625, 21.09375, 21.09375, 5.2734375, 5.2734375]
        + [7.91015625, 7.91015625, 11.865234375, 11.865234375, 17.7978515625],
    ),
]


@pytest.mark.parametrize("options,pattern,scales", GRADSCALER, ids=["defaults", "all options"])
def test_the_scales_are_those_of_gradscaler(options, pattern, scales):
    good = [c == "1" for c in pattern]
    assert [row[0] for row in run(f16.policy(**options), good)] == scales


def test_a_scale_that_float32_cannot_double_stays():
    precision = f16.policy(initial=2.0**126, growth_interval=1)
    state = f16.engine(precision=precision).create_state(np.float32(0))
    scales = []
    for _ in range(3):  # gradients of 0: no scale makes them overflow
        state, _ = f16.step_on_w(state, np.zeros(4, np.float32))
        scales.append(float(state.loss_scale))
    assert scales == [2.0**127] * 3  # GradScaler's too
    assert int(state.loss_scaling.skipped_steps) == 0


def test_a_fixed_scale_never_changes_and_skips_all_the_same():
    precision = tx.Precision("float16", loss_scale=256)
    rows = list(run(precision, [True, False, False, True, True]))
    assert rows == [(256, 1, 0, 1), (256, 0, 1, 1), (256, 0, 2, 1), (256, 1, 2, 2), (256, 2, 2, 3)]


def test_the_scale_is_the_same_on_any_number_of_devices():
    good = np.random.default_rng(1).random(20) > 0.5
    precision = f16.policy(initial=64.0, growth_interval=2)
    assert list(run(precision, good, n=1)) == list(run(precision, good, n=4))


BAD = [
    (lambda: tx.LossScale(initial=0), "LossScale needs initial= a finite number above 0, got 0"),
    (lambda: tx.LossScale(initial=float("inf")), "initial= a finite number above 0, got inf"),
    (lambda: tx.LossScale(initial=1e300), "initial= a finite number above 0, got 1e+300"),
    (lambda: tx.LossScale(initial="big"), "initial= a finite number above 0, got 'big'"),
    (lambda: tx.LossScale(minimum=float("nan")), "minimum= a finite number above 0, got nan"),
    (lambda: tx.LossScale(initial=2, minimum=4), "needs initial= at least minimum=4, got 2"),
    (lambda: tx.LossScale(growth_interval=0), "growth_interval= steps from 1 on, got 0"),
    (lambda: tx.LossScale(growth_interval=2.0), "growth_interval= steps from 1 on, got 2.0"),
    (lambda: tx.LossScale(growth_interval=True), "growth_interval= steps from 1 on, got True"),
    (lambda: tx.LossScale(growth_factor=1), "needs growth_factor= above 1, got 1"),
    (lambda: tx.LossScale(backoff_factor=0), "backoff_factor= a finite number above 0, got 0"),
    (
        lambda: tx.LossScale(backoff_factor=1.0),
        "needs backoff_factor= below 1, got 1.0: for a scale that does not change, pass "
        "Precision('float16', loss_scale=1024.0)",
    ),
    (
        lambda: tx.Precision("bfloat16", loss_scale=1024.0),
        "Precision('bfloat16') keeps no loss scale, since it has the exponents of float32, got "
        "loss_scale=1024.0: leave it out",
    ),
    (
        lambda: tx.Precision("float32", loss_scale=tx.LossScale()),
        "Precision('float32') keeps no loss scale",
    ),
    (
        lambda: tx.Precision("float16", loss_scale=-1.0),
        "Precision needs loss_scale= a finite number above 0, got -1.0",
    ),
    (
        lambda: tx.Precision("float16", loss_scale="dynamic"),
        "Precision needs loss_scale= a finite number above 0, got 'dynamic'",
    ),
]


@pytest.mark.parametrize("call,text", BAD, ids=[text[-40:] for _, text in BAD])
def test_bad_options(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()
