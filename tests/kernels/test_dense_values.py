"""dense with every activation, dropout and implementation, against float64 NumPy."""

import re
import warnings
from functools import partial

import dropout_oracles as oracles
import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jax.test_util import check_grads

from txcore import kernels
from txcore.kernels.dense import pallas, xla

pytestmark = pytest.mark.sampled(2)

KEYS = jax.random.split(jax.random.key(5), 6)
WORDS = jax.random.key_data(KEYS)
ACTIVATIONS = [None, "relu", "gelu", "tanh", "silu"]
IMPLEMENTATIONS = ["xla", "pallas"]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
GPU = AbstractMesh(
    (1,),
    ("i",),
    axis_types=(jax.sharding.AxisType.Auto,),
    abstract_device=AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu"),
)
PLAIN = {
    None: lambda y: y,
    "relu": jax.nn.relu,
    "gelu": jax.nn.gelu,
    "tanh": jnp.tanh,
    "silu": jax.nn.silu,
}


def arrays(rows, inputs, outputs, dtype=jnp.float32):
    random = np.random.default_rng(0)
    shapes = ((rows, inputs), (inputs, outputs), (outputs,), (rows, outputs))
    scales = (1, 1 / np.sqrt(inputs), 1, 1)
    return [
        jnp.asarray(scale * random.normal(size=shape), dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def layer(activation, rate=0.0, implementation=None, config=None, keys=None):
    return partial(
        kernels.dense,
        activation=activation,
        dropout=rate,
        keys=(KEYS if keys is None else keys) if rate else None,
        implementation=implementation,
        config=config,
    )


def both(function, x, w, b, g):
    def run(x, w, b, g):
        out, vjp = jax.vjp(function, x, w, b)
        return out, *vjp(g.astype(out.dtype))

    return jax.jit(run)(x, w, b, g)


def error(got, truth):
    return float(np.linalg.norm(np.asarray(got, np.float64) - truth))


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32_equals_the_oracle(implementation, activation, rate):
    args = arrays(6, 21, 19)
    out, *grads = both(layer(activation, rate, implementation), *args)
    truth, true_grads = oracles.dense(*args, activation, rate, WORDS)
    np.testing.assert_allclose(out, truth, rtol=1e-5, atol=1e-5)
    if rate and activation is None:  # nothing but dropout gives a zero
        np.testing.assert_array_equal(np.asarray(out) == 0, truth == 0)
    for got, true, arg in zip(grads, true_grads, args, strict=False):
        assert (got.dtype, got.shape) == (arg.dtype, arg.shape)
        np.testing.assert_allclose(got, true, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1), (6, 33, 130), (6, 64, 16)])
@pytest.mark.parametrize(
    "implementation, config",
    [
        ("xla", xla.Config(transposed_dx=False)),
        ("xla", xla.Config(transposed_dx=True)),
        ("pallas", pallas.Config(16, 16, 16)),
        ("pallas", pallas.Config(16, 64, 1024)),
    ],
    ids=str,
)
def test_every_configuration_at_odd_sizes(implementation, config, shape):
    args, keys = arrays(*shape), KEYS[: shape[0]]
    got = both(layer("gelu", 0.5, implementation, config, keys), *args)
    truth, true_grads = oracles.dense(*args, "gelu", 0.5, WORDS[: shape[0]])
    for a, b in zip(got, (truth, *true_grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float64_equals_the_oracle_to_its_own_precision(implementation):
    with jax.enable_x64(True):
        args = arrays(6, 21, 19, jnp.float64)
        got = both(layer("silu", 0.3, implementation), *args)
        truth, true_grads = oracles.dense(*args, "silu", 0.3, WORDS)
        for a, b in zip(got, (truth, *true_grads), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize(
    "implementation, activation",
    [("xla", None), ("xla", "relu"), ("xla", "gelu"), ("xla", "tanh"), ("pallas", "gelu")],
)
def test_error_is_at_most_twice_that_of_the_plain_expression(implementation, activation, dtype):
    args = arrays(6, 200, 50, dtype)
    mask = oracles.keep(WORDS, 50, 0.3)

    def plain(x, w, b):
        return jnp.where(mask, PLAIN[activation](x @ w + b) / 0.7, 0)

    truth, true_grads = oracles.dense(*args, activation, 0.3, WORDS)
    got, want = both(layer(activation, 0.3, implementation), *args), both(plain, *args)
    for a, b, true in zip(got, want, (truth, *true_grads), strict=True):
        assert a.dtype == dtype
        assert error(a, true) <= 2 * error(b, true)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_gradients_equal_finite_differences(activation, implementation):
    x, w, b, _ = arrays(6, 5, 4)
    function = jax.jit(layer(activation, 0.3, implementation))
    check_grads(function, (x, w, b), order=1, modes=["rev"], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_no_mask_is_kept_for_the_backward_pass(activation, implementation):
    x, w, b, _ = arrays(6, 8, 500)
    _, vjp = jax.vjp(layer(activation, 0.3, implementation), x, w, b)
    leaves = [leaf for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "nbytes")]
    beside = 0 if activation is None else 1  # ReLU's output, or the activation's input
    assert not any(leaf.dtype == bool for leaf in leaves)
    room = x.nbytes + w.nbytes + beside * 6 * 500 * 4 + WORDS.nbytes + 64
    assert sum(leaf.nbytes for leaf in leaves) <= room


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_around_the_operands_stays_outside(implementation):
    def inside(array):
        poisoned = jnp.full([size + 6 for size in array.shape], jnp.nan)
        where = tuple(slice(3, size + 3) for size in array.shape)
        return poisoned.at[where].set(array), where

    args = arrays(6, 21, 19)
    poisoned = [inside(array) for array in args]
    whole = [array for array, _ in poisoned]

    def run(*whole):
        x, w, b, g = (a[where] for a, (_, where) in zip(whole, poisoned, strict=True))
        return both(layer("gelu", 0.3, implementation), x, w, b, g)

    truth, true_grads = oracles.dense(*args, "gelu", 0.3, WORDS)
    for got, true in zip(jax.jit(run)(*whole), (truth, *true_grads), strict=True):
        np.testing.assert_allclose(got, true, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_leading_dims_and_their_keys(implementation):
    x, w, b, _ = arrays(6, 21, 19)
    flat = layer("relu", 0.3, implementation)(x, w, b)
    folded = kernels.dense(
        x.reshape(2, 3, 21),
        w,
        b,
        activation="relu",
        dropout=0.3,
        keys=KEYS.reshape(2, 3),
        implementation=implementation,
    )
    np.testing.assert_allclose(folded.reshape(6, 19), flat, rtol=1e-5, atol=1e-6)
    one = layer("relu", 0.3, implementation, keys=KEYS[2])(x[2], w, b)
    np.testing.assert_allclose(one, flat[2], rtol=1e-5, atol=1e-6)
    words = layer("relu", 0.3, implementation, keys=WORDS)(x, w, b)
    np.testing.assert_array_equal(words, flat)
    np.testing.assert_array_equal(
        np.asarray(flat) == 0,
        np.asarray(kernels.dropout(jax.nn.relu(x @ w + b), KEYS, 0.3)) == 0,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_empty_batch(implementation):
    x, w, b, _ = arrays(0, 5, 4)
    function = layer("gelu", 0.3, implementation, keys=KEYS[:0])
    out, vjp = jax.vjp(function, x, w, b)
    assert out.shape == (0, 4)
    dx, dw, db = vjp(out)
    assert dx.shape == (0, 5)
    assert not dw.any()
    assert not db.any()


@machine.cpu_only("it is a form for CPUs")
def test_the_transposed_product_runs_where_it_is_named_and_is_never_the_guess():
    def hlo(**named):
        x, w, b, g = arrays(64, 96, 32)
        op = partial(kernels.dense, **named)
        dx = jax.jit(lambda x, w, b, g: jax.vjp(op, x, w, b)[1](g)[0])
        return dx.lower(x, w, b, g).compile().as_text()

    assert "f32[96,64]" in hlo(implementation="xla", config=xla.Config(transposed_dx=True))
    assert "f32[96,64]" not in hlo()


X, W, B = jnp.zeros((6, 5)), jnp.zeros((5, 4)), jnp.zeros(4)
BAD = {
    "keys without dropout": (
        ValueError,
        lambda: kernels.dense(X, W, B, keys=KEYS),
        "dense: keys= needs a dropout rate above 0, got dropout=0: leave keys out, or pass the "
        "rate",
    ),
    "dropout without keys": (
        ValueError,
        lambda: kernels.dense(X, W, B, dropout=0.5),
        "dense: dropout needs keys, one for each row of x, got dropout=0.5 alone: pass "
        "keys=state.example_keys(batch) or jax.random.split(key, len(x)), or dropout=0.0 to "
        "evaluate",
    ),
    "one key for all": (
        ValueError,
        lambda: kernels.dense(X, W, B, dropout=0.5, keys=KEYS[0]),
        "dense: keys needs the shape of x without its last dim, got x (6, 5), keys (): pass "
        "one key for each row of x",
    ),
    "rate": (
        ValueError,
        lambda: kernels.dense(X, W, B, dropout=1, keys=KEYS),
        "dense: dropout needs a finite number in [0, 1), got 1.0",
    ),
    "traced rate": (
        TypeError,
        lambda: jax.jit(lambda rate: kernels.dense(X, W, B, dropout=rate, keys=KEYS))(0.5),
        "dense: dropout needs a Python number, since it is part of the compiled program, got ",
    ),
    "activation": (
        ValueError,
        lambda: kernels.dense(X, W, B, activation="swish"),
        "dense: activation needs one of None, 'relu', 'gelu', 'tanh', 'silu', got 'swish'",
    ),
    "config of the other": (
        TypeError,
        lambda: kernels.dense(X, W, B, implementation="xla", config=pallas.Config(16, 16, 16)),
        "dense: implementation='xla' needs config= a dense.xla.Config, got "
        "dense.pallas.Config: leave config out "
        "for the best guess",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_refused(bad):
    error, call, text = BAD[bad]
    with pytest.raises(error, match=re.escape(text)):
        call()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
def test_the_kernels_lower_for_a_gpu_that_is_not_here(dtype):
    x, w, b, g = arrays(64, 100, 50, dtype)
    words = jnp.zeros((64, 2), jnp.uint32)

    def step(x, w, b, g, words):
        function = layer("gelu", 0.3, "pallas", keys=words)
        dropped = kernels.dropout(g, words, 0.5, implementation="pallas")
        return jax.vjp(function, x, w, b)[1](dropped)

    with jax.sharding.use_abstract_mesh(GPU), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend", DeprecationWarning)
        traced = jax.jit(step).trace(x, w, b, g, words)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # dropout, the layer, its derivative at the activation, and the two products.
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 5
    assert not any(f"stablehlo.{name}" in text for name in ("while", "dot_general"))
