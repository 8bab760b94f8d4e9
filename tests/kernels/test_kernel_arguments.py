"""What the ops refuse, and the words they use."""

import importlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from txcore import kernels

X, W, B = jnp.zeros((2, 6, 6, 3)), jnp.zeros((3, 3, 3, 4)), jnp.zeros(4)
M = jnp.zeros((5, 7))
ADAM = {"step": 0, "learning_rate": 0.1, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
SGD = {"learning_rate": 0.1, "momentum": 0.9}
V = jnp.zeros(3)

BAD = {
    "image without batch": (
        ValueError,
        lambda: kernels.conv2d(X[0], W, B),
        "conv2d: x needs the dims (batch, height, width, in_channels), w (filter_height, "
        "filter_width, in_channels, out_channels) and b (out_channels,), got x (6, 6, 3), w "
        "(3, 3, 3, 4), b (4,): add a batch dim to a single image, or use jax.vmap for more "
        "batch dims",
    ),
    "channels first": (
        ValueError,
        lambda: kernels.conv2d(jnp.zeros((2, 3, 6, 6)), W, B),
        "conv2d: x and w need the same in_channels (x's last dim, w's dim 2), got x (2, 3, 6, "
        "6), w (3, 3, 3, 4), b (4,): transpose x to NHWC and w to HWIO",
    ),
    "bias of another size": (
        ValueError,
        lambda: kernels.conv2d(X, W, jnp.zeros(5)),
        "conv2d: b needs w's out_channels (w's last dim), got x (2, 6, 6, 3), w (3, 3, 3, 4), "
        "b (5,): pass one bias for each of w's filters",
    ),
    "two dtypes": (
        TypeError,
        lambda: kernels.conv2d(X, W.astype(jnp.bfloat16), B),
        "conv2d: x, w, b need one dtype, got x float32, w bfloat16, b float32: cast them to "
        "the one to compute in",
    ),
    "integer images": (
        TypeError,
        lambda: kernels.conv2d(X.astype(jnp.uint8), W, B),
        "conv2d: x needs a floating-point dtype, got uint8: cast it, for example "
        "x.astype(jnp.float32)",
    ),
    "activation": (
        ValueError,
        lambda: kernels.conv2d(X, W, B, activation="gelu"),
        "conv2d: activation needs one of None, 'relu', got 'gelu'",
    ),
    "pool": (
        ValueError,
        lambda: kernels.conv2d(X, W, B, pool=3),
        "conv2d: pool needs one of None, 2, got 3",
    ),
    "padding": (
        ValueError,
        lambda: kernels.conv2d(X, W, B, padding=1),
        "conv2d: padding needs one of 'SAME', 'VALID', got 1",
    ),
    "filter larger than the image": (
        ValueError,
        lambda: kernels.conv2d(X, jnp.zeros((7, 7, 3, 4)), B, padding="VALID"),
        "conv2d: pool=None needs an output of at least 1x1 before pooling, and w needs no dim "
        "of 0, got an output of 0x0 from x (2, 6, 6, 3), w (7, 7, 3, 4) with padding='VALID': "
        "use larger images, a smaller filter, padding='SAME' or pool=None",
    ),
    "nothing to pool": (
        ValueError,
        lambda: kernels.conv2d(X[:, :1], W, B, pool=2),
        "conv2d: pool=2 needs an output of at least 2x2 before pooling, and w needs no dim of "
        "0, got an output of 1x6 from x (2, 1, 6, 3), w (3, 3, 3, 4) with padding='SAME': use "
        "larger images, a smaller filter, padding='SAME' or pool=None",
    ),
    "dense unflattened": (
        ValueError,
        lambda: kernels.dense(X, M, jnp.zeros(7)),
        "dense: w needs x's last dim as its first, and b's length as its last, got x (2, 6, 6, "
        "3), w (5, 7), b (7,): flatten images first, and transpose a weight stored as (out, in)",
    ),
    "dense bias": (
        ValueError,
        lambda: kernels.dense(M, M.T, M),
        "dense: x needs the dims (..., in_features), w (in_features, out_features) and b "
        "(out_features,), got x (5, 7), w (7, 5), b (5, 7): reshape them to these dims",
    ),
    "dense dtype": (
        TypeError,
        lambda: kernels.dense(M, M.T, jnp.zeros(5, jnp.float16)),
        "dense: x, w, b need one dtype, got x float32, w float32, b float16: cast them to the "
        "one to compute in",
    ),
    "one-hot labels": (
        TypeError,
        lambda: kernels.cross_entropy(M, M),
        "cross_entropy: labels needs an integer dtype, got float32: pass the class index, not "
        "a one-hot row (jnp.argmax(labels, -1) gives it)",
    ),
    "labels of another length": (
        ValueError,
        lambda: kernels.cross_entropy(M, jnp.zeros(4, int)),
        "cross_entropy: logits needs the dims (..., classes) with at least one class, and "
        "labels the same dims without classes, got logits (5, 7), labels (4,): pass one class "
        "index for each row of logits",
    ),
    "no class": (
        ValueError,
        lambda: kernels.cross_entropy(jnp.zeros((5, 0)), jnp.zeros(5, int)),
        "with at least one class",
    ),
    "velocity of another shape": (
        ValueError,
        lambda: kernels.sgd_momentum(V, V, M, **SGD),
        "sgd_momentum: param, grad, velocity need one shape, got param (3,), grad (3,), "
        "velocity (5, 7): pass the state that belongs to this parameter",
    ),
    "momentum of one": (
        ValueError,
        lambda: kernels.sgd_momentum(V, V, V, learning_rate=0.1, momentum=1.0),
        "sgd_momentum: momentum needs a finite number in [0, 1), got 1.0",
    ),
    "negative rate": (
        ValueError,
        lambda: kernels.adamw(V, V, V, V, **{**ADAM, "learning_rate": -1}),
        "adamw: learning_rate needs a finite number of at least 0, got -1",
    ),
    "b2 of one": (
        ValueError,
        lambda: kernels.adamw(V, V, V, V, **{**ADAM, "b2": 1}),
        "adamw: b2 needs a finite number in [0, 1), got 1",
    ),
    "eps": (
        ValueError,
        lambda: kernels.adamw(V, V, V, V, **{**ADAM, "eps": float("nan")}),
        "adamw: eps needs a finite number of at least 0, got nan",
    ),
    "integer param": (
        TypeError,
        lambda: kernels.adamw(V.astype(int), V, V, V, **ADAM),
        "adamw: param needs a floating-point dtype, got int32: cast it, for example "
        "param.astype(jnp.float32)",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_refused(bad):
    error, call, text = BAD[bad]
    with pytest.raises(error, match=re.escape(text)):
        call()


@pytest.mark.parametrize(
    "op, call",
    {
        "conv2d": lambda name: kernels.conv2d(X, W, B, implementation=name),
        "dense": lambda name: kernels.dense(M, M.T, jnp.zeros(5), implementation=name),
        "cross_entropy": lambda name: kernels.cross_entropy(
            M, jnp.zeros(5, int), implementation=name
        ),
    }.items(),
)
def test_each_op_hands_its_implementation_on(op, call):
    asked = f"{op}: implementation='triton_ir' was asked for, but "
    missing = f"{asked}{op} has no triton_ir kernel: pass "
    with pytest.raises(NotImplementedError, match=re.escape(missing)):
        call("triton_ir")
    unknown = f"{op}: implementation needs to be None or one of 'xla', 'pallas', 'pallas_triton', "
    with pytest.raises(ValueError, match=re.escape(unknown)):
        call("cuda")


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_compiler_options(platform):
    options = kernels.compiler_options(platform)
    assert bool(options) == (platform != "tpu")
    if platform == jax.default_backend():  # an option that jax does not know would raise here
        f = jax.jit(lambda: kernels.conv2d(X, W, B), compiler_options=options)
        assert f().shape == (2, 6, 6, 4)


YNN, SUMS = "xla_cpu_experimental_ynn_fusion_type", "LIBRARY_FUSION_TYPE_REDUCE"
BOTH = f"{SUMS},LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"


@pytest.mark.parametrize(
    ("flags", "dtype", "value"),
    [
        ("fpu avx2 avx512_bf16", "float32", SUMS),
        ("fpu avx2 avx512_bf16", "bfloat16", SUMS),
        ("fpu amx_bf16 avx512_bf16 amx_tile", "float32", SUMS),
        ("fpu amx_bf16 avx512_bf16 amx_tile", "bfloat16", BOTH),
        ("fpu amx_bf16 avx512_bf16 amx_tile", "float16", SUMS),
        (None, "bfloat16", SUMS),  # as on macOS
    ],
)
def test_products_in_bfloat16_go_to_the_library_where_the_machine_has_amx(
    monkeypatch, tmp_path, flags, dtype, value
):
    info = tmp_path / "cpuinfo"
    if flags is not None:
        info.write_text(f"model name\t: a CPU\nflags\t\t: {flags}\nbugs\t\t:\n\n" * 2)
    module = importlib.import_module("txcore.kernels.common.compiler_options")
    monkeypatch.setattr(module, "_CPU_INFO", info)
    monkeypatch.setattr(module, "cpu_features", module.cpu_features.__wrapped__)
    options = kernels.compiler_options("cpu", dtype)
    assert options == {YNN: value}
    compiled = jax.jit(lambda x: jnp.sum(x @ x), compiler_options=options)  # XLA takes the value
    assert compiled(jnp.ones((4, 4), jnp.bfloat16)) == 64


def test_what_xla_flags_names_is_left_out(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to=x --{YNN}=LIBRARY_FUSION_TYPE_DOT")
    assert kernels.compiler_options("cpu") == {}
    assert kernels.compiler_options("cuda")
    monkeypatch.setenv("XLA_FLAGS", f"--{YNN}_of_another=1")
    assert kernels.compiler_options("cpu") == {YNN: SUMS}


def test_the_bare_name_is_refused():
    code = "import sys; sys.path.insert(0, '.'); import kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'kernels' is installed as txcore.kernels: write 'import txcore.kernels'" in done.stderr


def test_numpy_dtypes_pass():
    out = kernels.dense(np.ones((2, 5), np.float32), np.ones((5, 3), np.float32), np.zeros(3, "f4"))
    np.testing.assert_array_equal(out, np.full((2, 3), 5.0))
