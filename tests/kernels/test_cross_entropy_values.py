"""The losses and their gradients in every block size, against float64 NumPy."""

import re

import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from cross_entropy_cases import (
    Loss,
    blocked,
    blocked_or_not,
    offered,
    with_options,
)
from jax.test_util import check_grads
from kernel_cases import both, cotangent, error

from txcore import kernels
from txcore.kernels.cross_entropy.blocks import ClassBlocks, LossTiles

pytestmark = pytest.mark.sampled(2)

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
ODD, ODD_LINEAR = Loss((18,), 37), Loss((18,), 37, features=7)
SMALL = blocked(ODD, ODD_LINEAR)
SIZES = [
    *blocked(Loss((5,), 1), Loss((2, 3), 10)),
    *blocked(Loss((3,), 1, features=2), Loss((2, 3), 10, features=5)),
    *offered(Loss((17,), 1300), Loss((17,), 1300, features=33)),
]


def check(loss, variant, dtype, tolerance, label_smoothing=0.0):
    args = loss.args(dtype)
    out, grads = both(with_options(loss, variant, label_smoothing=label_smoothing), args)
    truth, true_grads = loss.oracle(
        *args, g=lambda _: cotangent(out), label_smoothing=label_smoothing
    )
    assert (out.dtype, out.shape) == (jnp.promote_types(dtype, jnp.float32), loss.rows)
    np.testing.assert_allclose(out, truth, rtol=tolerance, atol=tolerance)
    for grad, true, arg in zip(grads, true_grads, args, strict=True):
        assert (grad.dtype, grad.shape) == (arg.dtype, arg.shape)
        np.testing.assert_allclose(grad, true, rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("loss, variant", SIZES)
def test_every_size_equals_the_oracle(loss, variant):
    check(loss, variant, jnp.float32, 1e-5)


@pytest.mark.parametrize("loss, variant", blocked_or_not(ODD, ODD_LINEAR))
def test_label_smoothing_equals_the_oracle(loss, variant):
    check(loss, variant, jnp.float32, 1e-5, 0.1)


@pytest.mark.parametrize("loss, variant", blocked(ODD))
def test_the_uniform_distribution_alone(loss, variant):
    check(loss, variant, jnp.float32, 1e-5, 1)


@pytest.mark.parametrize("loss, variant", SMALL)
def test_float64_keeps_its_precision(loss, variant):
    with jax.enable_x64(True):
        check(loss, variant, jnp.float64, 1e-13, 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("loss, variant", SMALL)
def test_error_is_at_most_twice_that_of_the_plain_expression(loss, variant, dtype):
    args = loss.args(dtype)
    smoothing = {"label_smoothing": 0.1}
    out, grads = both(with_options(loss, variant, **smoothing), args)
    plain, plain_grads = both(lambda *a: loss.plain(*a, **smoothing), args)
    truth, true_grads = loss.oracle(*args, g=lambda _: cotangent(out), **smoothing)
    _, plain_truth = loss.oracle(*args, g=lambda _: cotangent(plain), **smoothing)
    assert error(out, truth) <= 2 * error(plain, truth)
    for grad, true, bad, bad_true in zip(grads, true_grads, plain_grads, plain_truth, strict=True):
        assert grad.dtype == dtype
        assert error(grad, true) <= 2 * error(bad, bad_true)


@pytest.mark.parametrize("loss, variant", blocked(ODD))
def test_a_common_offset_of_the_logits_costs_no_digits(loss, variant):
    # In float32 next to 1e4 the sum of the exponentials' logarithm keeps three decimals.
    logits = loss.args()[0].round(1) + 1e4
    out, (grad,) = both(with_options(loss, variant, label_smoothing=0.1), [logits])
    truth, (true,) = loss.oracle(logits, g=lambda _: cotangent(out), label_smoothing=0.1)
    np.testing.assert_allclose(out, truth, rtol=1e-6)
    np.testing.assert_allclose(grad, true, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss, variant", SMALL)
def test_the_gradient_is_that_of_finite_differences(loss, variant):
    op = jax.jit(with_options(loss, variant, label_smoothing=0.1))
    with jax.enable_x64(True):
        check_grads(op, loss.args(jnp.float64), 1, ["rev"])


@pytest.mark.parametrize("loss, variant", blocked_or_not(Loss((4,), 27)))
def test_extreme_logits(loss, variant):
    logits = np.zeros((4, 27), np.float32)
    logits[0, :2] = 1e4, -1e4
    logits[1, :2] = 1e30, -1e30
    logits[2, 2:] = -np.inf
    logits[3, :26] = -np.inf  # one class is left
    labels = jnp.array([1, 1, 0, 26])
    out, vjp = jax.vjp(
        lambda x: kernels.cross_entropy(x, labels, **variant.options), jnp.asarray(logits)
    )
    np.testing.assert_allclose(out, [2e4, 2e30, np.log(2), 0], rtol=1e-6)
    (grad,) = vjp(jnp.ones(4))
    want = np.zeros((4, 27))
    want[:2, :2] = 1, -1
    want[2, :2] = -0.5, 0.5
    np.testing.assert_allclose(grad, want, atol=1e-6)


@pytest.mark.parametrize("loss, variant", blocked_or_not(Loss((2,), 27)))
def test_what_is_infinite_is_not_nan(loss, variant):
    logits = jnp.zeros((2, 27)).at[:, 20].set(-jnp.inf)
    infinite = kernels.cross_entropy(logits, jnp.array([20, 0]), **variant.options)
    np.testing.assert_allclose(infinite, [np.inf, np.log(26)], rtol=1e-6)
    smoothed = kernels.cross_entropy(
        logits, jnp.array([20, 0]), label_smoothing=0.1, **variant.options
    )
    np.testing.assert_array_equal(smoothed, [np.inf, np.inf])


@pytest.mark.parametrize("loss, variant", blocked_or_not(Loss((2,), 27)))
def test_where_all_classes_are_ruled_out_only_that_row_is_nan(loss, variant):
    logits = jnp.zeros((2, 27)).at[0].set(-jnp.inf)
    out = kernels.cross_entropy(logits, jnp.array([0, 0]), **variant.options)
    assert np.isnan(out).tolist() == [True, False]


@pytest.mark.parametrize("loss, variant", SMALL)
def test_nans_in_other_rows_and_labels_that_are_no_class_stay_where_they_are(loss, variant):
    args = loss.args()
    poisoned = [args[0].at[1].set(jnp.nan), *args[1:]]
    labels = loss.labels.at[2].set(loss.classes).at[3].set(-1)
    out, vjp = jax.vjp(
        lambda x: loss.op(x, *args[1:], labels=labels, **variant.options), poisoned[0]
    )
    (grad,) = vjp(cotangent(out))
    bad = np.isin(np.arange(18), [1, 2, 3])
    np.testing.assert_array_equal(np.isnan(out), bad)
    np.testing.assert_array_equal(np.isnan(grad), np.broadcast_to(bad[:, None], grad.shape))
    clean = loss.op(*args, **variant.options)
    np.testing.assert_allclose(out[~bad], clean[~bad], rtol=1e-6)


@pytest.mark.parametrize("loss, variant", SMALL)
@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint32])
def test_label_dtypes(loss, variant, dtype):
    got = loss.op(*loss.args(), labels=loss.labels.astype(dtype), **variant.options)
    np.testing.assert_array_equal(got, loss.op(*loss.args(), **variant.options))


@pytest.mark.parametrize("loss, variant", blocked(Loss((0,), 37), Loss((0,), 37, features=7)))
def test_an_empty_batch(loss, variant):
    out, grads = both(with_options(loss, variant), loss.args())
    assert out.shape == (0,)
    assert not any(np.asarray(g).any() for g in grads)


@pytest.mark.parametrize("loss, variant", blocked(ODD_LINEAR))
def test_no_bias_is_a_bias_of_zeros(loss, variant):
    x, w, b = loss.args()
    got = both(lambda x, w: loss.op(x, w, None, **variant.options), [x, w])
    want = both(lambda x, w: loss.op(x, w, 0 * b, **variant.options), [x, w])
    jax.tree.map(np.testing.assert_array_equal, got, want)


@machine.cpu_only("XLA fuses away or keeps other arrays elsewhere")
class TestMemory:
    """What XLA allocates besides arguments and results, for losses and gradients."""

    def widened_at_once(self, dtype):
        """XLA:CPU of jax 0.10 widens all of a bfloat16 array before it takes slices of it."""
        return dtype == jnp.bfloat16 and jax.__version_info__ < (0, 11)

    def temp_bytes(self, function, *shapes, dtype=jnp.bfloat16):
        args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        rows = shapes[0][:-1]
        labels = jax.ShapeDtypeStruct(rows, jnp.int32)

        def losses_and_gradients(labels, *args):
            out, vjp = jax.vjp(lambda *a: function(*a, labels), *args)
            return out, vjp(jnp.ones(rows))

        compiled = jax.jit(losses_and_gradients).lower(labels, *args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
    def test_the_probabilities_of_32768_classes_are_never_held(self, dtype):
        shape = (512, 32768)
        in_float32 = 4 * 512 * 32768  # 64 MiB
        share = 1.1 if self.widened_at_once(dtype) else 1 / 12
        assert self.temp_bytes(kernels.cross_entropy, shape, dtype=dtype) < in_float32 * share

        def whole(logits, labels):
            config = ClassBlocks(shape[1])
            return kernels.cross_entropy(logits, labels, implementation="xla", config=config)

        assert self.temp_bytes(whole, shape, dtype=dtype) >= in_float32

    @pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
    def test_the_logits_of_32768_classes_are_never_held(self, dtype):
        shapes = (2048, 256), (256, 32768), (32768,)
        in_float32 = 4 * 2048 * 32768  # 256 MiB
        used = self.temp_bytes(kernels.linear_cross_entropy, *shapes, dtype=dtype)
        assert used < in_float32 * (1 / 4 if self.widened_at_once(dtype) else 1 / 10)

        def one_after_the_other(x, w, b, labels):
            return kernels.cross_entropy(x @ w + b, labels)

        assert self.temp_bytes(one_after_the_other, *shapes, dtype=dtype) > in_float32 / 2

    def test_the_default_blocks_of_32768_classes_give_the_plain_loss(self):
        for loss in (Loss((65,), 32768), Loss((65,), 32768, features=3)):
            got = both(loss.op, loss.args())
            want = both(loss.plain, loss.args())
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want
            )


X, W, LABELS = jnp.zeros((5, 3)), jnp.zeros((3, 7)), jnp.zeros(5, int)


@pytest.mark.parametrize(
    "error, call, text",
    [
        (
            ValueError,
            lambda: kernels.cross_entropy(X, LABELS, label_smoothing=1.5),
            "cross_entropy: label_smoothing needs a Python number in [0, 1], known when the "
            "program is traced, got 1.5: pass 0.1, say, or leave it out for none",
        ),
        (
            ValueError,
            lambda: jax.jit(lambda s: kernels.cross_entropy(X, LABELS, label_smoothing=s))(0.1),
            "cross_entropy: label_smoothing needs a Python number in [0, 1], known when the "
            "program is traced, got ",
        ),
        (
            ValueError,
            lambda: kernels.linear_cross_entropy(X, W[0], None, LABELS),
            "linear_cross_entropy: x needs the dims (..., features), w (features, classes) with",
        ),
        (
            ValueError,
            lambda: kernels.linear_cross_entropy(X, W.T, None, LABELS),
            "linear_cross_entropy: w needs x's last dim as its first, and b's length as its last, "
            "got x (5, 3), w (7, 3), b (3,), labels (5,): transpose a weight stored as (classes, "
            "features)",
        ),
        (
            ValueError,
            lambda: kernels.linear_cross_entropy(X, W, None, LABELS[:4]),
            "linear_cross_entropy: labels needs x's dims without features, got x (5, 3), w (3, 7), "
            "b (7,), labels (4,): pass one class index for each row of x",
        ),
        (
            TypeError,
            lambda: kernels.linear_cross_entropy(X, W, jnp.zeros(7, jnp.float16), LABELS),
            "linear_cross_entropy: x, w, b need one dtype, got x float32, w float32, b "
            "float16: cast them to the one to compute in",
        ),
        (
            TypeError,
            lambda: kernels.linear_cross_entropy(X, W, None, X),
            "linear_cross_entropy: labels needs an integer dtype, got float32: pass the class "
            "index, not a one-hot row (jnp.argmax(labels, -1) gives it)",
        ),
        (
            TypeError,
            lambda: kernels.cross_entropy(
                X, LABELS, implementation="xla", config=LossTiles(16, 16)
            ),
            "cross_entropy: implementation='xla' needs config= a "
            "cross_entropy.blocks.ClassBlocks, got cross_entropy.blocks.LossTiles: "
            "leave config out for the best guess",
        ),
        (ValueError, lambda: ClassBlocks(0), "ClassBlocks: classes needs at least 1, got 0"),
        (
            ValueError,
            lambda: LossTiles(24, 16),
            "LossTiles: rows, classes and features need powers of two from 16, and block and warps "
            "at least 1, got LossTiles(rows=24",
        ),
    ],
)
def test_bad_arguments_are_refused(error, call, text):
    with pytest.raises(error, match=re.escape(text)):
        call()
