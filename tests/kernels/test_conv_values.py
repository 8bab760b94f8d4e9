"""Every implementation and configuration of conv2d gives what float64 NumPy gives."""

import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from conv_cases import (
    ALL,
    FEW,
    MANY,
    MNIST,
    PLAIN,
    POOLED,
    VALID,
    WIDE,
    cut_out,
    each_variant,
    forward_and_gradients,
    inside_nans,
    realistic,
    truths,
)
from jax.test_util import check_grads
from kernel_cases import conv_case

pytestmark = pytest.mark.sampled(2)

FLOATS = (jnp.float32, jnp.bfloat16, jnp.float16)
# Of a result's largest element; a half-precision result is rounded once.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2**-7, jnp.float16: 2**-10, jnp.float64: 1e-13}


def compare(case, variant, dtype):
    """Hold the results on operands cut out of NaNs to the oracle's."""
    args = case.args(dtype)
    op = variant.op(**case.options)
    got = forward_and_gradients(lambda *a: op(*map(cut_out, a)))(*map(inside_nans, args))
    want = truths(case, args)
    for result, truth, like in zip(got, want, (args[0], *args), strict=True):
        assert result.dtype == like.dtype
        result = result if result.shape == truth.shape else cut_out(result)
        np.testing.assert_allclose(
            np.asarray(result, np.float64), truth, atol=TOLERANCE[dtype] * abs(truth).max()
        )


@each_variant(*(MANY if ALL else (POOLED, VALID, WIDE)))
def test_float32_among_nans(case, variant, dtype):
    compare(case, variant, dtype)


# Without a pool: which of two elements that round to one is the maximum, none has to tell.
@each_variant(*((PLAIN, WIDE) if ALL else (PLAIN,)), dtypes=FLOATS[1:])
def test_half_precision_among_nans(case, variant, dtype):
    compare(case, variant, dtype)


@each_variant(*(FEW if ALL else (POOLED,)), dtypes=(jnp.float64,))
def test_float64_among_nans(case, variant, dtype):
    with jax.enable_x64(True):
        compare(case, variant, dtype)


@each_variant(*(FEW if ALL else (POOLED,)), guesses_only=True, dtypes=(jnp.float64,))
def test_gradients_are_those_of_finite_differences(case, variant, dtype):
    with jax.enable_x64(True):
        op = jax.jit(variant.op(**case.options))
        check_grads(op, case.args(dtype), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


def skip_where_the_library_spreads_it(variant):
    if variant.implementation == "xla" and not machine.ON_CPU:
        pytest.skip("cuDNN may take an algorithm of tiles, over which a NaN spreads")
    if variant.implementation == "mosaic_tpu" and variant.config.windows > 1:
        pytest.skip("a NaN spreads over the strip of windows that reads it")


@each_variant(
    conv_case("local", (3, 8, 8, 2), (3, 3, 2, 4)),
    conv_case("local-pool", (3, 8, 8, 1), (3, 3, 1, 4), activation="relu", pool=2),
)
def test_what_is_not_finite_stays_in_the_windows_that_hold_it(case, variant, dtype):
    skip_where_the_library_spreads_it(variant)
    x, w, b = case.args(dtype)
    op = jax.jit(variant.op(**case.options))
    row = slice(1, 3) if "pool" in case.name else slice(3, 6)  # rows 3 to 5 before the pool
    clean = op(x, w, b)
    for bad in (np.inf, np.nan):
        spoilt = np.array(op(x.at[1, 4, 4, 0].set(bad), w, b))
        assert not np.isfinite(spoilt[1, row, row]).all()
        spoilt[1, row, row] = clean[1, row, row]
        np.testing.assert_allclose(spoilt, clean, rtol=1e-6, atol=1e-6)


@each_variant(conv_case("local", (3, 8, 8, 2), (3, 3, 2, 4)), guesses_only=True)
def test_a_cotangent_that_is_not_finite_stays_with_the_pixels_that_it_reaches(case, variant, dtype):
    skip_where_the_library_spreads_it(variant)
    x, w, b = case.args(dtype)
    op = variant.op(**case.options)
    image_gradient = jax.jit(lambda g: jax.vjp(op, x, w, b)[1](g)[0])
    g = jnp.ones((3, 8, 8, 4))
    clean, spoilt = (np.array(image_gradient(a)) for a in (g, g.at[1, 4, 4, 0].set(jnp.inf)))
    assert not np.isfinite(spoilt[1, 3:6, 3:6]).any()
    spoilt[1, 3:6, 3:6] = clean[1, 3:6, 3:6]
    np.testing.assert_allclose(spoilt, clean, rtol=1e-6, atol=1e-6)


@each_variant(conv_case("tied", (1, 4, 4, 1), (1, 1, 1, 1), pool=2))
@pytest.mark.parametrize("activation", [None, "relu"] if ALL else [None])
def test_a_tied_maximum_passes_its_gradient_to_its_first_place_only(
    case, variant, dtype, activation
):
    image = np.array([[5, 5, 1, 2], [5, 5, 2, 2], [3, 4, 7, 0], [4, 1, 7, 7]], np.float32)
    first = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], np.float32)
    op = variant.op(activation=activation, pool=2)
    one, zero = jnp.ones((1, 1, 1, 1)), jnp.zeros(1)
    gradient = jax.jit(jax.grad(lambda x: op(x, one, zero).sum()))
    np.testing.assert_array_equal(gradient(image[None, :, :, None])[0, :, :, 0], first)
    # A window of NaNs passes all of it on, if nothing says that it is not positive.
    total = float(gradient(jnp.full((1, 4, 4, 1), jnp.nan)).sum())
    assert total == (0.0 if activation else 4.0)


SEEDS = range(5 if ALL else 3)
ALLOWED = 2 if machine.ON_CPU else 3  # cuDNN's choice of an algorithm moves it: 2.5 on an H100
RATIO_CASES = [(case, dtype) for case in MNIST for dtype in FLOATS]
ALWAYS = [(MNIST[1], jnp.float32), (MNIST[0], jnp.bfloat16)]


def norm(got, truth):
    return float(np.linalg.norm(np.asarray(got, np.float64) - truth))


@pytest.fixture(scope="module")
def plain_errors():
    """Return a function: plain jax's errors on a case, and the truths, for each seed."""
    known = {}

    def errors(case, dtype):
        if (case.name, dtype) not in known:
            plain = forward_and_gradients(case.plain)
            known[case.name, dtype] = [
                (args, want, list(map(norm, plain(*args), want)))
                for args in (realistic(case, dtype, seed) for seed in SEEDS)
                for want in [truths(case, args)]
            ]
        return known[case.name, dtype]

    return errors


@pytest.mark.parametrize(
    "case, variant, dtype",
    [
        mark
        for case, dtype in (RATIO_CASES if ALL else ALWAYS)
        for mark in each_variant(case, dtypes=(dtype,)).args[1]
    ],
)
def test_the_error_is_at_most_twice_that_of_plain_jax(case, variant, dtype, plain_errors):
    run = forward_and_gradients(variant.op(**case.options))
    for args, want, plain in plain_errors(case, dtype):
        ours = list(map(norm, run(*args), want))
        ratios = dict(zip(("out", "dx", "dw", "db"), np.divide(ours, plain), strict=True))
        assert max(ratios.values()) <= ALLOWED, ratios
