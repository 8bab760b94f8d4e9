"""Convolutions whose gradients are computed in a loop: in microbatches, in a pipeline's ticks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from txcore import kernels

USUAL = "b01f_01io->b01f"


def labels_of(convolve, padding):
    """Return the dim labels of the convolutions of a loop over gradients, as XLA compiles it."""

    def loss_of(w, x):
        return jnp.sum(convolve(x, w, padding) ** 2)

    def sum_gradients(w, batches):
        def body(total, x):
            of_w, of_x = jax.grad(loss_of, (0, 1))(w, x)
            return total + of_w, of_x

        return jax.lax.scan(body, jnp.zeros_like(w), batches)

    w, x = np.zeros((5, 5, 4, 8), np.float32), np.zeros((2, 3, 14, 14, 4), np.float32)
    text = jax.jit(sum_gradients).lower(w, x).compile().as_text()
    return re.findall(r"convolution\(.*dim_labels=(\S+?)[,\s]", text)


def convolve_plainly(x, w, padding):
    dims = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=dims)


def convolve_directly(x, w, padding):
    return kernels.conv2d(x, w, np.zeros(8, np.float32), padding=padding, implementation="xla")


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_gradients_have_the_form_that_xla_is_fast_at(padding):
    """Those of autodiff have another, which is 20 times slower, and in a loop XLA leaves it."""
    found = labels_of(convolve_directly, padding)
    assert len(found) == 3
    assert set(found) == {USUAL}
    assert set(labels_of(convolve_plainly, padding)) != {USUAL}
