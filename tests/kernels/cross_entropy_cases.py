"""The losses in every implementation and configuration, on problems of every size."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_oracles import linear_cross_entropy as linear_oracle
from kernel_oracles import smoothed_cross_entropy as logits_oracle
from machine import ON_CPU

from txcore import kernels
from txcore.kernels.cross_entropy import api
from txcore.kernels.cross_entropy.blocks import ClassBlocks, LossTiles
from txcore.kernels.cross_entropy.pallas_rows import LossRuns
from txcore.kernels.dispatch import registry
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.linear_cross_entropy import api as linear_api

# Smaller than what anyone would take, so that little takes several blocks, the last of them odd.
SMALL = {"xla": ClassBlocks(13), "pallas_triton": LossTiles(16, 16, 16, block=15)}
SMALL["mosaic_tpu"] = SMALL["pallas_triton"]
SMALL_OF_LOGITS = {**SMALL, "pallas_triton": LossRuns(16, programs=2)}


@dataclass(frozen=True)
class Variant:
    implementation: Any
    config: Any

    @property
    def options(self):
        return {"implementation": self.implementation, "config": self.config}

    def __str__(self):
        sizes = vars(self.config).values()
        return "-".join([self.implementation, *map(str, sizes)])


def bodies(table):
    """Return an op's implementations that run here, without those that only have another name."""
    return {
        name: kernel
        for name, kernel in table.items()
        if name != "mosaic_tpu" or (ON_CPU and kernel.run is not table["pallas_triton"].run)
    }


def variants(table, shapes):
    """Return all that the registry offers for these shapes."""
    problem = Problem("op", *registry.current_device(), shapes, ("float32",) * len(shapes), ())
    kernels = bodies(table)
    return [Variant(name, c) for name, kernel in kernels.items() for c in kernel.configs(problem)]


@dataclass(frozen=True)
class Loss:
    """One op on one shape: (rows, classes), or (rows, features, classes) behind a linear layer."""

    rows: tuple[int, ...]
    classes: int
    features: int | None = None

    @property
    def table(self):
        return api.KERNELS if self.features is None else linear_api.KERNELS

    @property
    def shapes(self):
        if self.features is None:
            return ((*self.rows, self.classes),)
        return ((*self.rows, self.features), (self.features, self.classes), (self.classes,))

    @property
    def small(self):
        return SMALL_OF_LOGITS if self.features is None else SMALL

    @property
    def labels(self):
        random = np.random.default_rng(7)
        return jnp.asarray(random.integers(self.classes, size=self.rows), jnp.int32)

    def args(self, dtype=jnp.float32, seed=0):
        random = np.random.default_rng(seed)
        return [jnp.asarray(random.normal(size=s), dtype) for s in self.shapes]

    def op(self, *args, labels=None, **options):
        labels = self.labels if labels is None else labels
        op: Any = kernels.cross_entropy if self.features is None else kernels.linear_cross_entropy
        return op(*args, labels, **options)

    def plain(self, *args, label_smoothing=0.0):
        logits = args[0] if self.features is None else args[0] @ args[1] + args[2]
        nll = -jax.nn.log_softmax(logits)
        label = jnp.take_along_axis(nll, self.labels[..., None], -1)[..., 0]
        return (1 - label_smoothing) * label + label_smoothing * nll.mean(-1)

    def oracle(self, *args, g, label_smoothing=0.0):
        if self.features is None:
            return logits_oracle(*args, self.labels, g, label_smoothing)
        return linear_oracle(*args, self.labels, g, label_smoothing)

    def __str__(self):
        return "x".join(map(str, [*self.rows, self.features or "logits", self.classes]))


def offered(*losses):
    """Return every loss with every configuration that the registry offers for it."""
    return _parameters([(loss, v) for loss in losses for v in variants(loss.table, loss.shapes)])


def blocked(*losses):
    """Return every loss with every implementation in small blocks."""
    return _parameters(
        [(loss, Variant(n, loss.small[n])) for loss in losses for n in bodies(loss.table)]
    )


def blocked_or_not(*losses):
    """Return every loss with every implementation in small blocks, and in XLA's single one."""
    whole = [(loss, Variant("xla", ClassBlocks(loss.classes))) for loss in losses]
    return [*_parameters(whole), *blocked(*losses)]


def _parameters(pairs):
    return [pytest.param(loss, v, id=f"{loss}-{v}") for loss, v in pairs]


def with_options(loss, variant, **options):
    return partial(loss.op, **variant.options, **options)
