"""Named shapes of the differentiable ops: the op, the plain jax expression, and the oracle."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import kernel_oracles as oracles
import numpy as np
from jax import lax

from txcore import kernels

LABELS = np.array([3, 0, 9, 3])


@dataclass(frozen=True)
class Case:
    name: str
    op: Callable[..., Any]
    plain: Callable[..., Any]
    oracle: Callable[..., Any]  # (*args, g) -> (out, cotangents of args)
    shapes: tuple[tuple[int, ...], ...]  # the first has the batch dim
    options: dict[str, Any] = field(default_factory=dict)

    def args(self, dtype: Any, seed: int = 0) -> list[jax.Array]:
        random = np.random.default_rng(seed)
        return [jnp.asarray(random.normal(size=shape), dtype) for shape in self.shapes]


def cotangent(out):
    return jnp.asarray(np.random.default_rng(1).normal(size=out.shape), out.dtype)


def both(function, args):
    """Return the output and the cotangents of the arguments."""

    def run(*args):
        out, vjp = jax.vjp(function, *args)
        return out, vjp(cotangent(out))

    return jax.jit(run)(*args)


def error(got, truth):
    return float(np.linalg.norm(np.asarray(got, np.float64) - truth))


def plain_conv2d(x, w, b, activation=None, pool=None, padding="SAME"):
    layout = ("NHWC", "HWIO", "NHWC")
    y = lax.conv_general_dilated(x, w, (1, 1), padding, dimension_numbers=layout) + b
    y = jax.nn.relu(y) if activation else y
    if pool is None:
        return y
    return lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def plain_dense(x, w, b, activation=None):
    return jax.nn.relu(x @ w + b) if activation else x @ w + b


def plain_cross_entropy(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]


def conv_case(name, x, w, **options):
    return Case(
        name,
        partial(kernels.conv2d, **options),
        partial(plain_conv2d, **options),
        partial(oracles.conv2d, **options),
        (x, w, (w[3],)),
        options,
    )


def dense_case(name, x, w, **options):
    return Case(
        name,
        partial(kernels.dense, **options),
        partial(plain_dense, **options),
        partial(oracles.dense, **options),
        (x, w, (w[1],)),
        options,
    )


CROSS_ENTROPY = Case(
    "cross_entropy",
    lambda logits: kernels.cross_entropy(logits, LABELS[: len(logits)]),
    lambda logits: plain_cross_entropy(logits, LABELS[: len(logits)]),
    lambda logits, g: oracles.cross_entropy(logits, g, LABELS),
    ((4, 10),),
)
FIRST_CONV = conv_case("conv-1", (4, 8, 8, 1), (5, 5, 1, 6), activation="relu", pool=2)
ODD_CONV = conv_case(
    "conv-odd", (4, 9, 7, 3), (3, 2, 3, 6), activation="relu", pool=2, padding="VALID"
)
RELU_DENSE = dense_case("dense-relu", (4, 13), (13, 5), activation="relu")
CASES = [FIRST_CONV, ODD_CONV, RELU_DENSE, CROSS_ENTROPY]
EVERY_CONV = [
    conv_case(
        f"conv-{channels}-{rows}x{columns}-{activation}-{pool}-{padding}",
        (2, 7, 6, channels),
        (rows, columns, channels, 4),
        activation=activation,
        pool=pool,
        padding=padding,
    )
    for channels, rows, columns in ((1, 5, 4), (3, 2, 3))
    for activation in (None, "relu")
    for pool in (None, 2)
    for padding in ("SAME", "VALID")
]
ALL_CASES = [
    *CASES,
    *EVERY_CONV,
    dense_case("dense-3d", (2, 3, 13), (13, 5)),
    dense_case("dense-vector", (13,), (13, 5), activation="relu"),
]
