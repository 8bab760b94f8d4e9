"""Every implementation and configuration of conv2d, and the shapes that they are held to.

A few of each kind always; all of them with TXCORE_ALL_KERNELS=1 in the environment.
"""

import math
import os
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import kernel_oracles as oracles
import numpy as np
import pytest
from kernel_cases import Case, conv_case

from txcore import varying
from txcore.kernels.conv import strips
from txcore.kernels.conv.api import KERNELS
from txcore.kernels.conv.geometry import Blocks
from txcore.kernels.conv.pallas_taps import LARGEST_PATCH
from txcore.kernels.dispatch import registry, tuned
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.dispatch.tuning_file import label_candidate

ALL = os.environ.get("TXCORE_ALL_KERNELS") == "1"
# Several programs along every axis of each kernel's grid, and sums in several parts.
SMALL_BLOCKS = Blocks(pixels=16, channels=16, depth=16, splits=3)
SMALL_TAPS = Blocks(pixels=16, channels=16, splits=3, form="taps", windows=16)


@dataclass(frozen=True)
class Variant:
    implementation: registry.Implementation
    config: Any
    first: bool  # the implementation's best guess

    def __str__(self):
        return label_candidate(self.implementation, tuned.fields_of(self.config))

    def op(self, **options):
        """Return conv2d by this implementation and configuration."""
        options = {"activation": None, "pool": None, "padding": "SAME", **options}

        def conv2d(x, w, b):
            return registry.run_op(
                "conv2d",
                KERNELS,
                *varying.match_varying(x, w, b),
                implementation=self.implementation,
                config=self.config,
                **options,
            )

        return conv2d


def problem(case: Case, dtype: Any) -> Problem:
    options = {"activation": None, "pool": None, "padding": "SAME", **case.options}
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in case.shapes]
    return Problem.from_call("conv2d", registry.current_device(), shapes, options)


def variants(case: Case, dtype: Any = jnp.float32) -> list[Variant]:
    """Return the ways to compute a case: for each implementation every configuration of its own."""
    found = []
    for name, kernel in KERNELS.items():
        asked = problem(case, dtype)
        if kernel.refuse(asked) is None:
            configs = list(dict.fromkeys(kernel.configs(asked)))
            if name == "xla":  # the cases are small: a loop over the images all the same
                configs = [replace(c, images=1) if c.images else c for c in configs]
            if (
                name == "pallas_triton"
            ):  # its blocks differ in size only: the smallest stand for all
                taps = [SMALL_TAPS] if math.prod(case.shapes[1][:3]) <= LARGEST_PATCH else []
                configs = [SMALL_BLOCKS, *taps, *(configs if ALL else [])]
            if name == "mosaic_tpu":  # several blocks of images, the last one cut off
                more = [replace(c, images=4) for c in configs if c.windows > 1]
                configs = [strips.Config(1, images=4), *(more if ALL else [])]
            found += [Variant(name, config, i == 0) for i, config in enumerate(configs)]
    return found


def each_variant(*cases: Case, dtypes: Any = (jnp.float32,), guesses_only: bool = False):
    """Parametrize a test over (case, variant, dtype)."""
    return pytest.mark.parametrize(
        "case, variant, dtype",
        [
            pytest.param(case, v, dtype, id=f"{case.name}-{v}-{dtype.__name__}")
            for case in cases
            for dtype in dtypes
            for v in variants(case, dtype)
            if v.first or ALL or not guesses_only
        ],
    )


def cotangent(out: Any, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=out.shape), out.dtype)


def forward_and_gradients(op: Any, seed: int = 1):
    """Return a compiled function: the op's output, and the gradients for a random cotangent."""

    def run(*args):
        out, vjp = jax.vjp(op, *args)
        return out, *vjp(cotangent(out, seed))

    return jax.jit(run)


def truths(case: Case, args: Any, seed: int = 1) -> tuple[np.ndarray, ...]:
    """Return the same in float64; the cotangent is rounded to the operands' dtype there too."""
    dtype = args[0].dtype

    def g(out):
        return cotangent(jax.ShapeDtypeStruct(out.shape, dtype), seed)

    out, gradients = case.oracle(*args, g=g)
    return out, *gradients


def inside_nans(array: jax.Array) -> jax.Array:
    """Return an array with a border of NaNs around it along each dim."""
    return jnp.pad(array, [(1, 2)] * array.ndim, constant_values=jnp.nan)


def cut_out(array: jax.Array) -> jax.Array:
    return array[tuple(slice(1, size - 2) for size in array.shape)]


POOLED = conv_case("5x5-pool", (3, 9, 7, 1), (5, 5, 1, 6), activation="relu", pool=2)
VALID = conv_case("2x4-valid", (1, 8, 9, 3), (2, 4, 3, 5), pool=2, padding="VALID")
WIDE = conv_case("32-64", (9, 5, 6, 32), (3, 3, 32, 64), activation="relu")
PLAIN = conv_case("3x3-plain", (8, 6, 5, 2), (3, 3, 2, 3))
FEW = (POOLED, VALID, WIDE, PLAIN)
MANY = tuple(
    conv_case(
        f"{batch}x{height}x{width}-{rows}x{columns}x{channels}x{features}-{activation}-{pool}-{padding}",
        (batch, height, width, channels),
        (rows, columns, channels, features),
        activation=activation,
        pool=pool,
        padding=padding,
    )
    for i, (rows, columns) in enumerate(((3, 3), (5, 5), (2, 4), (1, 1)))
    for j, (batch, height, width) in enumerate(((1, 7, 7), (3, 10, 6), (8, 6, 9), (9, 5, 8)))
    for channels, features in (
        ((1, 4), (2, 3), (3, 17), (4, 1), (5, 5), (32, 64))[(i + j) % 6 :: 3]
    )
    for activation, pool, padding in (
        (None, None, "SAME"),
        ("relu", 2, "VALID"),
        ((None, 2, "SAME"), ("relu", None, "VALID"), ("relu", 2, "SAME"))[(i + j) % 3],
    )
)
MNIST = (
    conv_case("mnist-1", (8, 28, 28, 1), (3, 3, 1, 32), activation="relu", pool=2),
    conv_case("mnist-2", (8, 14, 14, 32), (3, 3, 32, 64), activation="relu", pool=2),
    conv_case("mnist-5x5", (8, 28, 28, 1), (5, 5, 1, 32), activation="relu", pool=2),
)


def strokes(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Return images as MNIST's: a few smooth strokes in 256 levels on a background of zeros."""
    random = np.random.default_rng(seed)
    _, height, width, channels = shape
    time = np.linspace(0, 1, 60)[:, None]
    images = np.zeros(shape)
    rows, columns = np.mgrid[:height, :width]
    for image in images:
        for channel in range(channels):
            a, b, c = random.uniform(0.2, 0.8, (3, 2)) * (height, width)
            path = (1 - time) ** 2 * a + 2 * time * (1 - time) * b + time**2 * c
            far = (rows[..., None] - path[:, 0]) ** 2 + (columns[..., None] - path[:, 1]) ** 2
            ink = np.clip(1.6 - far.min(-1) / 2.5, 0, 1)
            image[..., channel] = np.round(255 * ink) / 255
    return images


def realistic(case: Case, dtype: Any, seed: int) -> list[jax.Array]:
    """Return operands as in training: strokes, or what a first layer made of them; He's weights."""
    random = np.random.default_rng(seed)
    x_shape, w_shape, b_shape = case.shapes
    x = strokes((*x_shape[:3], 1), seed)
    if x_shape[3] > 1:  # twice the size, for the pool to halve
        first = random.normal(size=(3, 3, 1, x_shape[3])) * np.sqrt(2 / 9)
        x = strokes((x_shape[0], 2 * x_shape[1], 2 * x_shape[2], 1), seed)
        layer = partial(oracles.conv2d, activation="relu", pool=2, g=np.zeros_like)
        x, _ = layer(x, first, random.normal(size=x_shape[3]) * 0.1)
    w = random.normal(size=w_shape) * np.sqrt(2 / np.prod(w_shape[:3]))
    b = random.normal(size=b_shape) * 0.1
    return [jnp.asarray(a, dtype) for a in (x, w, b)]
