"""Named problems of every op, for tests, benchmarks and `txcore tune`."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from txcore import kernels

Kind = Literal["float", "positive", "label", "key"]
Dims = tuple[int, ...]


@dataclass(frozen=True)
class Op:
    """Hold how an op is called and counted.

    Attributes:
      call: `call(*operands, **options)`, the public function.
      kinds: what each operand holds; the last kind stands for all further operands. A "label" is
        the number of a class, below the last dim of the operand before it.
      products: returns the number of multiplications in the matrix products of the forward pass,
        given the operands' dims. Elementwise operations are not counted.
      updates: for an update of arrays in place, the operands that its results replace.
      forgotten: the operands that the backward pass does not read.
    """

    call: Callable[..., Any]
    kinds: tuple[Kind, ...] = ("float",)
    products: Callable[..., int] = lambda *shapes, **options: 0
    updates: tuple[int, ...] = ()
    forgotten: tuple[int, ...] = ()


@dataclass(frozen=True)
class Shape:
    """Hold one named problem.

    Attributes:
      name: unique, for the command line and a benchmark's id.
      op: a name in `OPS`.
      shapes: the operands' dims.
      options: the op's options, without `implementation`.
      fixed: the operands that need no gradient in this use of the op: the images of a first layer,
        or the gradients whose norm is taken.
    """

    name: str
    op: str
    shapes: tuple[Dims, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    fixed: tuple[int, ...] = ()

    def call_op(self, *operands: jax.Array, **options: Any) -> Any:
        """Compute the op with the shape's options and further ones."""
        return OPS[self.op].call(*operands, **self.options, **options)

    def make_operands(self, dtype: Any = jnp.float32, seed: int = 0) -> list[jax.Array]:
        """Make random operands of their kinds: standard normal numbers, labels or keys.

        Args:
          dtype: of the floating-point operands.
          seed: of the random numbers.
        """
        random = np.random.default_rng(seed)
        made: list[jax.Array] = []
        for shape, kind in zip(self.shapes, self.kinds, strict=True):
            classes = made[-1].shape[-1] if kind == "label" else 0
            made.append(_make_operand(random, shape, kind, dtype, classes))
        return made

    def make_structs(self, dtype: Any = jnp.float32) -> list[jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of the operands, without making them."""
        dtypes = {"label": jnp.int32, "key": jax.eval_shape(jax.random.key, 0).dtype}
        return [
            jax.ShapeDtypeStruct(shape, dtypes.get(kind, dtype))
            for shape, kind in zip(self.shapes, self.kinds, strict=True)
        ]

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """What each operand holds."""
        kinds = OPS[self.op].kinds
        return (*kinds, *kinds[-1:] * len(self.shapes))[: len(self.shapes)]

    @property
    def differentiable(self) -> tuple[int, ...]:
        """The numbers of the operands that need gradients; none in an update."""
        floats = [i for i, kind in enumerate(self.kinds) if kind in ("float", "positive")]
        return tuple(i for i in floats if i not in self.fixed and not OPS[self.op].updates)

    def count_flops(self, *, backward: bool = False) -> int:
        """Return the floating-point operations of the matrix products, two a multiplication.

        Args:
          backward: whether to add those of the gradients: as many again for each of the two
            factors that needs one.
        """
        forward = 2 * OPS[self.op].products(*self.shapes, **self.options)
        factors = len([i for i in (0, 1) if i in self.differentiable])
        return forward * (1 + factors) if backward else forward

    def count_bytes(self, dtype: Any = jnp.float32, *, backward: bool = False) -> int:
        """Return the least bytes that memory must move: each operand read, each result written.

        Args:
          dtype: of the floating-point operands.
          backward: whether to add those of the backward pass, where there is one: it reads the
            operands and the results' gradients, and writes the operands' gradients.
        """
        operands = self.make_structs(dtype)
        results = jax.eval_shape(self.call_op, *operands)
        read, written = _bytes_of(operands), _bytes_of(results)
        if not (backward and self.differentiable):
            return read + written
        again = [x for i, x in enumerate(operands) if i not in OPS[self.op].forgotten]
        gradients = [operands[i] for i in self.differentiable]
        return read + written + _bytes_of(again) + written + _bytes_of(gradients)


def _make_operand(
    random: np.random.Generator, shape: Dims, kind: Kind, dtype: Any, classes: int
) -> jax.Array:
    if kind == "label":
        return jnp.asarray(random.integers(0, classes, shape), jnp.int32)
    if kind == "key":
        return jax.random.split(jax.random.key(int(random.integers(1 << 31))), shape)
    numbers = random.standard_normal(shape, np.float32)
    return jnp.asarray(np.abs(numbers) if kind == "positive" else numbers, dtype)


def _bytes_of(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _call_dense(
    x: jax.Array, w: jax.Array, b: jax.Array, keys: jax.Array | None = None, **options: Any
) -> jax.Array:
    return kernels.dense(x, w, b, keys=keys, **options)


def _call_pack(*arrays: jax.Array, **options: Any) -> jax.Array:
    return kernels.pack(arrays, **options)


def _call_unpack(flat: jax.Array, *, shapes: tuple[Dims, ...], **options: Any) -> Any:
    like = [jax.ShapeDtypeStruct(shape, flat.dtype) for shape in shapes]
    return kernels.unpack(flat, like, **options)


def _conv_products(x: Dims, w: Dims, b: Dims, *, padding: str = "SAME", **_: Any) -> int:
    lost = (w[0] - 1, w[1] - 1) if padding == "VALID" else (0, 0)
    return x[0] * (x[1] - lost[0]) * (x[2] - lost[1]) * math.prod(w)


def _dense_products(x: Dims, w: Dims, *rest: Dims, **_: Any) -> int:
    return math.prod(x[:-1]) * math.prod(w)


OPS: Mapping[str, Op] = {
    "conv2d": Op(kernels.conv2d, products=_conv_products),
    "dense": Op(_call_dense, ("float", "float", "float", "key"), _dense_products),
    "dropout": Op(kernels.dropout, ("float", "key"), forgotten=(0,)),
    "cross_entropy": Op(kernels.cross_entropy, ("float", "label")),
    "linear_cross_entropy": Op(
        kernels.linear_cross_entropy, ("float", "float", "float", "label"), _dense_products
    ),
    "pack": Op(_call_pack),
    "unpack": Op(_call_unpack),
    "squared_norm": Op(kernels.squared_norm),
    "sgd_momentum": Op(kernels.sgd_momentum, updates=(0, 2)),
    "adamw": Op(kernels.adamw, ("float", "float", "float", "positive"), updates=(0, 2, 3)),
}

_SGD = {"learning_rate": 0.02, "momentum": 0.9}
_ADAMW = {
    "step": 9,
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
}
_CNN3X3: tuple[Dims, ...] = (
    *((3, 3, 1, 32), (32,), (3, 3, 32, 64), (64,)),
    *((3136, 128), (128,), (128, 10), (10,)),
)
_BUCKETS = {"10k": 10_000, "100k": 100_000, "cnn3x3": 421_642, "1M": 1_000_000, "10M": 10_000_000}


def conv_shape(name: str, x: Dims, w: Dims, *, first: bool = False, **options: Any) -> Shape:
    """Describe a convolution; the images of a first layer need no gradient."""
    return Shape(name, "conv2d", (x, w, w[3:]), options, fixed=(0,) if first else ())


def dense_shape(name: str, x: Dims, features: int, *, first: bool = False, **options: Any) -> Shape:
    """Describe a dense layer; the inputs of a first layer need no gradient."""
    keys = (x[:-1],) if "dropout" in options else ()
    shapes = (x, (x[-1], features), (features,), *keys)
    return Shape(name, "dense", shapes, options, fixed=(0,) if first else ())


def loss_shape(name: str, logits: Dims, **options: Any) -> Shape:
    """Describe a loss of logits."""
    return Shape(name, "cross_entropy", (logits, logits[:-1]), options)


def linear_loss_shape(name: str, x: Dims, classes: int, **options: Any) -> Shape:
    """Describe a linear layer and its loss in one op."""
    shapes = (x, (x[-1], classes), (classes,), x[:-1])
    return Shape(name, "linear_cross_entropy", shapes, options)


def bucket_shapes(name: str, elements: int) -> Iterator[Shape]:
    """Describe the updates of a flat bucket, and its norm."""
    yield Shape(f"sgd-{name}", "sgd_momentum", ((elements,),) * 3, _SGD)
    yield Shape(f"adamw-{name}", "adamw", ((elements,),) * 4, _ADAMW)
    yield Shape(f"norm-{name}", "squared_norm", ((elements,),), fixed=(0,))


def packing_shapes(name: str, leaves: tuple[Dims, ...]) -> Iterator[Shape]:
    """Describe the packing of gradients into a bucket, and the unpacking of parameters."""
    flat = (sum(map(math.prod, leaves)),)
    yield Shape(f"pack-{name}", "pack", leaves, fixed=tuple(range(len(leaves))))
    yield Shape(f"unpack-{name}", "unpack", (flat,), {"shapes": leaves})


def mnist_shapes(batch: int) -> Iterator[Shape]:
    """Describe the layers of the MNIST example's models; a layer of two models is listed once."""
    end, image, half = f"-b{batch}", (batch, 28, 28, 1), (batch, 14, 14, 32)
    relu: dict[str, Any] = {"activation": "relu"}
    pooled: dict[str, Any] = {**relu, "pool": 2}
    yield conv_shape(f"cnn-conv1{end}", image, (5, 5, 1, 32), first=True, **pooled)
    yield conv_shape(f"cnn-conv2{end}", half, (5, 5, 32, 64), **pooled)
    yield conv_shape(f"cnn3x3-conv1{end}", image, (3, 3, 1, 32), first=True, **pooled)
    yield conv_shape(f"cnn3x3-conv2{end}", half, (3, 3, 32, 64), **pooled)
    yield conv_shape(f"dropout-cnn-conv1{end}", image, (3, 3, 1, 32), first=True, **relu)
    yield conv_shape(f"dropout-cnn-conv2{end}", (batch, 28, 28, 32), (3, 3, 32, 64), **pooled)
    yield dense_shape(f"cnn-dense{end}", (batch, 7 * 7 * 64), 128, **relu)
    yield dense_shape(f"cnn3x3-dense{end}", (batch, 7 * 7 * 64), 128, dropout=0.25, **relu)
    yield dense_shape(f"dropout-cnn-dense{end}", (batch, 14 * 14 * 64), 256, dropout=0.5, **relu)
    drop = ((batch, 14, 14, 64), (batch,))
    yield Shape(f"dropout-cnn-drop{end}", "dropout", drop, {"rate": 0.25})
    yield dense_shape(f"mlp-dense1{end}", (batch, 784), 256, first=True, **relu)
    yield dense_shape(f"mlp-dense2{end}", (batch, 256), 128, **relu)
    yield dense_shape(f"dense-dense{end}", (batch, 784), 128, first=True, **relu)
    yield dense_shape(f"logits{end}", (batch, 128), 10)
    yield dense_shape(f"dropout-cnn-logits{end}", (batch, 256), 10)
    yield loss_shape(f"loss{end}", (batch, 10))


_ALL: Sequence[Shape] = (
    *mnist_shapes(64),
    *mnist_shapes(256),
    conv_shape(
        "conv-odd", (7, 13, 11, 3), (3, 2, 3, 5), activation="relu", pool=2, padding="VALID"
    ),
    conv_shape("conv-wide", (8, 28, 28, 64), (3, 3, 64, 128), activation="relu"),
    dense_shape("dense-odd", (61, 391), 127, activation="relu"),
    dense_shape("dense-wide", (512, 1024), 4096, activation="relu"),
    dense_shape("dense-odd-drop", (61, 391), 127, dropout=0.1),
    Shape("drop-odd", "dropout", ((7, 13, 11), (7,)), {"rate": 0.1}),
    loss_shape("loss-odd", (61, 391)),
    loss_shape("loss-32k", (512, 32_000)),
    loss_shape("loss-32k-smooth", (512, 32_000), label_smoothing=0.1),
    linear_loss_shape("linear-loss-odd", (61, 67), 391),
    linear_loss_shape("linear-loss-32k", (512, 512), 32_000),
    *(shape for name, elements in _BUCKETS.items() for shape in bucket_shapes(name, elements)),
    *bucket_shapes("odd", 12_347),
    *packing_shapes("cnn3x3", _CNN3X3),
    *packing_shapes("odd", ((7, 13), (1,), (391,), (3, 5, 2))),
)
SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in _ALL}
MAIN = (
    *("cnn3x3-conv1-b64", "cnn3x3-conv2-b64", "cnn-dense-b64", "cnn3x3-dense-b64", "logits-b64"),
    *("dropout-cnn-drop-b64", "loss-b64", "loss-32k", "linear-loss-32k"),
    *("pack-cnn3x3", "unpack-cnn3x3", "sgd-cnn3x3", "norm-cnn3x3", "adamw-1M"),
)
