"""The five models, as lists of layers, and the two functions that run them."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import txcore as tx
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
    layers: tuple[Layer, ...],
    params: Any,
    images: jax.Array,
    keys: jax.Array | None = None,
    axis: str | None = None,
) -> jax.Array:
    """Compute the logits.

    Args:
      layers: the model.
      params: what `init` returned, in the dtype to compute in.
      images: [batch, 28, 28, 1], in the same dtype.
      keys: one random key for each image, to train with dropout; None evaluates.
      axis: the mesh axis over which the layers are split, by `split_rules`; None for whole ones.

    Returns:
      [batch, 10] in the same dtype.
    """
    x = images
    splits = dict.fromkeys(range(len(layers) + 1), "whole")
    if axis is not None:
        splits = split_layers(layers)
    for i, layer in enumerate(layers):
        match layer:
            case Conv(_, _, pool):
                conv = _split_by(splits[i], axis)
                x = conv(x, **params[f"conv{i}"], activation="relu", pool=2 if pool else None)
            case Dense():
                p, dropout = params[f"dense{i}"], _dropout_after(layers, i, keys)
                x = x.reshape(len(x), -1)
                x = _dense(x, p, splits[i], axis, activation="relu", **dropout)
            case Dropout(rate) if keys is not None and not _after_dense(layers, i):
                x = kernels.dropout(x, _layer_keys(keys, i), rate)
    p = params[f"dense{len(layers)}"]
    return _dense(x.reshape(len(x), -1), p, splits[len(layers)], axis)


def split_layers(layers: tuple[Layer, ...]) -> dict[int, str]:
    """Return how each layer with parameters is split: by columns, then by rows, and so on.

    Two layers make a pair, with one sum at its end; the last one, if it is left over, stays whole.

    Example:
      >>> split_layers(MODELS["mlp"])
      {0: 'columns', 1: 'rows', 2: 'whole'}
    """
    places = [i for i, layer in enumerate((*layers, Dense(CLASSES))) if not _is_dropout(layer)]
    splits = dict(zip(places, itertools.cycle(("columns", "rows")), strict=False))
    if len(places) % 2:
        splits[places[-1]] = "whole"
    return splits


def split_rules(layers: tuple[Layer, ...]) -> dict[str, int]:
    """Return which dim of which parameter `split_layers` splits, as `tx.TP` takes it.

    Example:
      >>> split_rules(MODELS["dense"])
      {'dense0/w': -1, 'dense0/b': -1, 'dense1/w': -2}
    """
    rules: dict[str, int] = {}
    for i, by in split_layers(layers).items():
        kind = "conv" if i < len(layers) and isinstance(layers[i], Conv) else "dense"
        if by == "columns":
            rules |= {f"{kind}{i}/w": -1, f"{kind}{i}/b": -1}
        elif by == "rows":
            rules[f"{kind}{i}/w"] = -2
    return rules


def _split_by(by: str, axis: str | None) -> Callable[..., jax.Array]:
    """Return the convolution of a layer that is split so."""
    if by == "whole" or axis is None:
        return kernels.conv2d
    split = tx.tensor.column_conv if by == "columns" else tx.tensor.row_conv
    return functools.partial(split, axis=axis)


def _dense(x: jax.Array, p: Any, by: str, axis: Any, **fused: Any) -> jax.Array:
    """Compute a dense layer, of which each device along the axis may have a part."""
    if by == "whole":
        return kernels.dense(x, **p, **fused)
    if by == "columns":
        first = tx.axis_index(axis) * p["w"].shape[1]  # of this device's features
        offset = {"offset": first} if "dropout" in fused else {}
        return kernels.dense(tx.tensor.enter(x, axis), **p, **fused, **offset)
    y = tx.tensor.row_dense(x, **p, axis=axis)
    y = jax.nn.relu(y) if "activation" in fused else y
    return kernels.dropout(y, fused["keys"], fused["dropout"]) if "keys" in fused else y


def _is_dropout(layer: Layer) -> bool:
    return isinstance(layer, Dropout)


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
