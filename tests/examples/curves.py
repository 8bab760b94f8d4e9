"""The MNIST script with two more models, and in float64 where JAX_ENABLE_X64 is set."""

import pathlib
import sys
from unittest import mock

import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples" / "mnist"))

import models
import train

from txcore.train.numerics import precision

MODELS = {
    # cnn3x3 with few channels: XLA has no fast convolution in float64 on CPU.
    "small-cnn": (models.Conv(3, 4), models.Conv(3, 8), models.Dense(32), models.Dropout(0.25)),
    # Without a ReLU and a maximum: nothing in it that rounding could decide.
    "softmax": (models.Dropout(0.25),),
}


def main(argv: list[str] | None = None) -> int:
    """Run the script in jax's default floating-point dtype."""
    default = {"float32": jnp.result_type(float)}
    with mock.patch.dict(models.MODELS, MODELS), mock.patch.dict(precision.POLICIES, default):
        return train.main(argv)


if __name__ == "__main__":
    sys.exit(main())
