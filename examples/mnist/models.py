"""The five models, as lists of layers, and the two functions that run them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore import kernels


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with ReLU, and 2x2 max-pooling if `pool`."""

    size: int
    channels: int
    pool: bool = True


@dataclasses.dataclass(frozen=True)
class Dense:
    """A fully connected layer with ReLU."""

    features: int


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of a share of the activations, in training only."""

    rate: float


Layer = Conv | Dense | Dropout
Params = dict[str, dict[str, np.ndarray]]

IMAGE = (28, 28, 1)
CLASSES = 10

# Each ends in a layer of ten logits. Convolutions keep the image's size.
MODELS: dict[str, tuple[Layer, ...]] = {
    "mlp": (Dense(256), Dense(128)),
    "cnn": (Conv(5, 32), Conv(5, 64), Dense(128)),
    "cnn3x3": (Conv(3, 32), Conv(3, 64), Dense(128), Dropout(0.25)),
    "dropout-cnn": (
        Conv(3, 32, pool=False),
        Conv(3, 64),
        Dropout(0.25),
        Dense(256),
        Dropout(0.5),
    ),
    "dense": (Dense(128),),
}


def layers_of(name: str, dropout: float | None = None) -> tuple[Layer, ...]:
    """Return a model's layers; `dropout` replaces every dropout rate, and 0 leaves them out."""
    if name not in MODELS:
        raise ValueError(f"--model needs one of {', '.join(MODELS)}, got {name!r}")
    layers = MODELS[name]
    if dropout is None:
        return layers
    if not 0 <= dropout < 1:
        raise ValueError(f"--dropout needs a number from 0 to below 1, got {dropout}")
    if dropout == 0:
        return tuple(x for x in layers if not isinstance(x, Dropout))
    if not any(isinstance(x, Dropout) for x in layers):
        raise ValueError(f"--dropout {dropout}: model {name} has no dropout; leave it out")
    return tuple(Dropout(dropout) if isinstance(x, Dropout) else x for x in layers)


def uses_dropout(layers: tuple[Layer, ...]) -> bool:
    """Tell whether a model needs random keys in training."""
    return any(isinstance(layer, Dropout) for layer in layers)


def init(layers: tuple[Layer, ...], seed: int) -> Params:
    """Return parameters, uniform within 1 / sqrt(fan-in) as PyTorch's layers start.

    In jax's default float. Drawn by NumPy: jax would first compile a program for each shape.

    LeCun et al., "Efficient BackProp", 1998, section 4.6.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    params: Params = {}
    shape: tuple[int, ...] = IMAGE
    for i, layer in enumerate((*layers, Dense(CLASSES))):
        match layer:
            case Conv(size, channels, pool):
                params[f"conv{i}"] = _weights(random, (size, size, shape[2], channels))
                shape = (shape[0] // (1 + pool), shape[1] // (1 + pool), channels)
            case Dense(features):
                params[f"dense{i}"] = _weights(random, (math.prod(shape), features))
                shape = (features,)
    return params


def _weights(random: np.random.Generator, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return {
        name: random.uniform(-bound, bound, size).astype(jnp.result_type(float))
        for name, size in (("w", shape), ("b", shape[-1:]))
    }


def apply(
    layers: tuple[Layer, ...], params: Any, images: jax.Array, keys: jax.Array | None = None
) -> jax.Array:
    """Compute the logits.

    Args:
      layers: the model.
      params: what `init` returned, in the dtype to compute in.
      images: [batch, 28, 28, 1], in the same dtype.
      keys: one random key for each image, to train with dropout; None evaluates.

    Returns:
      [batch, 10] in the same dtype.
    """
    x = images
    for i, layer in enumerate(layers):
        match layer:
            case Conv(_, _, pool):
                p = params[f"conv{i}"]
                x = kernels.conv2d(x, **p, activation="relu", pool=2 if pool else None)
            case Dense():
                p, dropout = params[f"dense{i}"], _dropout_after(layers, i, keys)
                x = kernels.dense(x.reshape(len(x), -1), **p, activation="relu", **dropout)
            case Dropout(rate) if keys is not None and not _after_dense(layers, i):
                x = kernels.dropout(x, _layer_keys(keys, i), rate)
    p = params[f"dense{len(layers)}"]
    return kernels.dense(x.reshape(len(x), -1), **p)


def _after_dense(layers: tuple[Layer, ...], i: int) -> bool:
    return i > 0 and isinstance(layers[i - 1], Dense)


def _dropout_after(layers: tuple[Layer, ...], i: int, keys: jax.Array | None) -> dict[str, Any]:
    """Return the options by which a dense layer does the dropout that follows it too."""
    match layers[i + 1 : i + 2]:
        case (Dropout(rate),) if keys is not None:
            return {"dropout": rate, "keys": _layer_keys(keys, i + 1)}
    return {}


def _layer_keys(keys: jax.Array, i: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, i)
