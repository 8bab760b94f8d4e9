"""Every op where jax is told to promote neither ranks nor dtypes."""

import contextlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from conv_cases import ALL, FEW, variants
from cross_entropy_cases import Loss, blocked
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore import _compat, kernels
from txcore.kernels.dense import xla as dense_xla

pytestmark = pytest.mark.sampled(3)

HALVES = [jnp.bfloat16, jnp.float16] if ALL else [jnp.bfloat16]
DTYPES = [jnp.float32, *HALVES]
KEYS = jax.random.split(jax.random.key(5), 6)
IMPLEMENTATIONS = ("xla", "pallas")


@contextlib.contextmanager
def nothing_promoted():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def conv_calls():
    for case in FEW:
        for variant in variants(case):
            yield f"{case.name}-{variant}", variant.op(**case.options), case.shapes


def dense_calls():
    shapes = (6, 13), (13, 5), (5,)
    for activation in (None, "relu", "gelu", "tanh", "silu") if ALL else ("relu", "gelu"):
        for name in IMPLEMENTATIONS:
            for rate in (0.0, 0.3):
                options = {"activation": activation, "dropout": rate, "implementation": name}
                keys = KEYS if rate else None
                op = partial(kernels.dense, keys=keys, **options)
                yield f"dense-{activation}-{rate}-{name}", op, shapes
    config = dense_xla.Config(transposed_dx=True)
    yield "dense-transposed", partial(kernels.dense, implementation="xla", config=config), shapes
    yield "dense-3d", kernels.dense, ((2, 3, 13), (13, 5), (5,))
    yield "dense-vector", kernels.dense, ((13,), (13, 5), (5,))


def loss_calls():
    for mark in blocked(
        *(Loss((18,), 37), Loss((2, 3), 10), Loss((18,), 37, features=7), Loss((2, 3), 10, 5))
    ):
        loss, variant = mark.values
        for smoothing in (0.0, 0.1):
            op = partial(loss.op, **variant.options, label_smoothing=smoothing)
            yield f"{loss}-{variant}-{smoothing}", op, loss.shapes
    for dtype in (jnp.uint8, jnp.uint32):
        loss = Loss((6,), 10)
        op = partial(loss.op, labels=loss.labels.astype(dtype))
        yield f"labels-{jnp.dtype(dtype)}", op, loss.shapes


def other_calls():
    for name in IMPLEMENTATIONS:
        some = {"implementation": name}
        drop = partial(kernels.dropout, keys=KEYS, rate=0.3, offset=jnp.int32(2), **some)
        yield f"dropout-{name}", drop, ((6, 3, 7),)
        yield f"norm-{name}", partial(kernels.squared_norm, **some), ((130,),)

        def packed(*arrays, some=some):
            flat = kernels.pack(arrays, dtype="float32", scale=0.5, **some)
            return kernels.unpack(flat, arrays, scale=jnp.float32(3), **some)

        if name == "xla" or machine.ON_CPU:  # an accelerator refuses to interpret it
            yield f"pack-{name}", packed, ((3, 2), (4,), (1,))


def update_calls():
    for name in IMPLEMENTATIONS:
        some = {"implementation": name, "cast": "bfloat16", "grad_scale": jnp.float32(0.5)}
        sgd = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "learning_rate": 0.1}
        yield f"sgd-{name}", partial(kernels.sgd_momentum, **sgd, **some), ((33, 7),) * 3
        adam = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
        rate = {"step": jnp.int32(5), "learning_rate": jnp.float32(0.1)}
        yield f"adamw-{name}", partial(kernels.adamw, **rate, **adam, **some), ((33, 7),) * 4


DIFFERENTIABLE = [*conv_calls(), *dense_calls(), *loss_calls(), *other_calls()]
UPDATES = list(update_calls())


def forward_and_gradients(op):
    """Return a function: the op's results, and the gradients for a cotangent of their own kind."""

    def run(*args):
        out, vjp = jax.vjp(op, *args)
        return out, vjp(jax.tree.map(lambda x: x / 2, out))

    return run


def without_kernels(text):
    """Leave out a GPU kernel's code, which says from which lines of Python it was traced."""
    return re.sub(r'ir = "[^"]*"', "", text)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "function, shapes",
    [
        *(pytest.param(forward_and_gradients(op), s, id=name) for name, op, s in DIFFERENTIABLE),
        *(pytest.param(op, s, id=name) for name, op, s in UPDATES),
    ],
)
def test_every_op_is_the_same_program(function, shapes, dtype):
    args = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]

    def lowered():  # a function of its own each time, for jax to trace it anew
        return jax.jit(lambda *args: function(*args)).lower(*args).as_text()

    want = lowered()
    with nothing_promoted():
        assert without_kernels(lowered()) == without_kernels(want)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_by_example_and_on_several_devices(dtype):
    x, w, b = (jnp.ones(s, dtype) for s in ((6, 13), (13, 5), (5,)))

    def loss(w, b, x, key, label):
        y = kernels.dense(x, w, b, activation="gelu", dropout=0.3, keys=key)
        return kernels.cross_entropy(y, label)

    def all_of(w, b, x, keys, labels):
        if _compat.varying_axes(x):  # else autodiff adds up the devices' gradients
            w, b = tx.vary((w, b), "data")
        return jax.vmap(jax.grad(loss, (0, 1)), (None, None, 0, 0, 0))(w, b, x, keys, labels)

    args = (w, b, x, KEYS, jnp.arange(6) % 5)
    want = jax.jit(all_of)(*args)
    mesh = machine.mesh(data=2)
    specs = (P(), P(), *(P("data"),) * 3)
    with nothing_promoted():
        mapped = jax.shard_map(all_of, mesh=mesh, in_specs=specs, out_specs=P("data"))
        got = jax.jit(mapped)(*args)
    for a, true in zip(got, want, strict=True):
        assert a.dtype == dtype
        a, true = (np.asarray(x, np.float32) for x in (a, true))
        np.testing.assert_allclose(a, true, rtol=2e-2, atol=1e-3)
