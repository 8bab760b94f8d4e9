"""The kernels for TPUs, simulated: against float64, with races and unwritten memory detected."""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import kernel_oracles as oracles
import machine
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from txcore import kernels
from txcore.kernels.bucket import mosaic as bucket
from txcore.kernels.bucket import mosaic_copies
from txcore.kernels.conv import strips
from txcore.kernels.conv.api import KERNELS as CONV
from txcore.kernels.cross_entropy.blocks import LossTiles
from txcore.kernels.dense import pallas as dense
from txcore.kernels.dense.api import KERNELS as DENSE
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.dropout import pallas as dropout
from txcore.kernels.optimizer.api import SGD_MOMENTUM
from txcore.kernels.optimizer.mosaic import Config

pytestmark = machine.cpu_only("it simulates a TPU")

TWO_CORES = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
)
SGD = {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
ADAM = {"learning_rate": 1e-2, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
LABELS = np.array([3, 0, 46, 17, 5, 8, 10, 29, 1] * 2)


def normals(*shapes):
    random = np.random.default_rng(0)
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def assert_close(got, truth):
    for array, true in zip(got, truth, strict=True):
        np.testing.assert_allclose(np.asarray(array, np.float64), true, rtol=1e-5, atol=1e-5)


def with_gradients(op, args):
    """Return an op's result, and the gradients of its sum of squares by half."""
    out, transpose = jax.vjp(op, *args)
    return out, *transpose(out)


@pytest.fixture
def simulated():
    """Run Pallas on a simulated TPU of two cores, and assert afterwards that they did not race.

    Memory that nothing has written is NaN, also where a block reaches over an array's end.
    """
    with pltpu.force_tpu_interpret_mode(TWO_CORES):
        yield
    assert not interpreter.races.races_found


@pytest.mark.parametrize("copies", [1, 3])
def test_the_updates(simulated, copies):
    # Whole blocks: jax 0.12 cannot simulate an aliased array whose last block is cut off.
    p, g, v = normals((1024 * copies,), (1024 * copies,), (1024 * copies,))
    options = {"implementation": "mosaic_tpu", "config": Config(1024)}
    assert_close(
        kernels.sgd_momentum(p, g, v, **SGD, **options), oracles.sgd_momentum(p, g, v, **SGD)
    )
    m, v = v, jnp.abs(v)
    got = kernels.adamw(p, g, m, v, step=5, **ADAM, **options)
    assert_close(got, oracles.adamw(p, g, m, v, step=5, **ADAM))


def test_the_norm_adds_up_one_block_after_the_other(simulated):
    (x,) = normals((2500,))
    got = kernels.squared_norm(x, implementation="mosaic_tpu", config=Config(1024))
    assert float(got) == pytest.approx(float((np.asarray(x, np.float64) ** 2).sum()), rel=1e-6)


def test_a_dense_layer_in_several_tiles(simulated):
    args = normals((33, 40), (40, 50), (50,))
    options = {"implementation": "mosaic_tpu", "config": dense.Config(16, 16, 16)}
    op = partial(kernels.dense, activation="relu", **options)
    out, truths = oracles.dense(*args, g=lambda out: out, activation="relu")
    assert_close(with_gradients(op, args), (out, *truths))


def test_dropout_in_several_tiles(simulated):
    (x,), keys = normals((20, 300)), jax.random.split(jax.random.key(0), 20)
    config = dropout.Config(16, 128)
    got = kernels.dropout(x, keys, 0.3, implementation="mosaic_tpu", config=config)
    kept = np.stack([jax.random.bits(key, (300,)) for key in keys]) >= round(0.3 * 2**32)
    assert_close([got], [np.where(kept, np.asarray(x, np.float64) / 0.7, 0)])


CONVS: dict[str, Any] = {
    "pool": ((5, 8, 9, 1), (5, 5, 1, 6), {"activation": "relu", "pool": 2}),
    "valid": ((5, 7, 6, 3), (2, 3, 3, 4), {"pool": 2, "padding": "VALID"}),
    "plain": ((5, 4, 6, 2), (3, 3, 2, 3), {}),
}


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_in_several_blocks_of_images(simulated, name):
    x, w, options = CONVS[name]
    args = normals(x, w, w[3:])
    op = partial(kernels.conv2d, implementation="mosaic_tpu", config=strips.Config(2, 3), **options)
    out, truths = oracles.conv2d(*args, g=lambda out: out, **options)
    assert_close(with_gradients(op, args), (out, *truths))


# Pieces of 1024 that start anywhere in a tile, ends of less, arrays of less, and two dtypes.
LEAVES = [(3000, "float32"), (3, "bfloat16"), (1024, "float32"), (1500, "bfloat16"), (5, "float32")]


@pytest.mark.parametrize("count", [1, 5])
def test_packing_and_unpacking_by_pieces(simulated, count):
    leaves = [normals((size,))[0].astype(dtype) for size, dtype in LEAVES[:count]]
    config = bucket.Config(1024)
    scale = jnp.float32(1 / 3)
    flat = bucket.pack(*leaves, scale, config=config, dtype="bfloat16", scaled=True)
    exact = np.concatenate([np.asarray(x, np.float64) for x in leaves]) * np.float64(scale)
    wanted = exact.astype(np.float32).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(flat), wanted)
    shapes, dtypes = zip(*(((size,), dtype) for size, dtype in LEAVES[:count]), strict=True)
    back = bucket.unpack(flat, config=config, shapes=shapes, dtypes=dtypes)
    np.testing.assert_array_equal(np.concatenate(back).astype(jnp.bfloat16), wanted)


def test_a_piece_that_is_read_before_it_arrives_is_found(monkeypatch):
    """The planted race: nobody waits for what arrives."""

    class NoWait:
        def __init__(self, copy):
            self.start = copy.start

        def wait(self):
            pass

    fetch = mosaic_copies.Pipe.fetch
    monkeypatch.setattr(mosaic_copies.Pipe, "fetch", lambda *a: NoWait(fetch(*a)))
    (x,) = normals((2048,))
    raised = ""
    eager = dataclasses.replace(TWO_CORES, dma_execution_mode="eager")
    try:
        with pltpu.force_tpu_interpret_mode(eager):
            config = bucket.Config(1024)
            jax.block_until_ready(bucket.pack(x, config=config, dtype="float32", scaled=False))
    except jax.errors.JaxRuntimeError as error:
        raised = str(error)
    assert "RACE DETECTED" in raised or interpreter.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_in_several_tiles(simulated, smoothing):
    (logits,) = normals((18, 47))
    options = {"implementation": "mosaic_tpu", "config": LossTiles(16, 16)}
    op = partial(kernels.cross_entropy, labels=LABELS, label_smoothing=smoothing, **options)
    out, truths = oracles.smoothed_cross_entropy(logits, LABELS, lambda out: out, smoothing)
    assert_close(with_gradients(op, [logits]), (out, *truths))


def test_a_linear_loss_in_several_tiles(simulated):
    args = normals((18, 20), (20, 47), (47,))
    options = {"implementation": "mosaic_tpu", "config": LossTiles(16, 16, 16, block=20)}
    op = partial(kernels.linear_cross_entropy, labels=LABELS, **options)
    out, truths = oracles.linear_cross_entropy(*args, LABELS, lambda out: out)
    assert_close(with_gradients(op, args), (out, *truths))


def test_a_planted_race_is_found():
    """Both cores add to one block: the simulator sees what it looks for."""
    from jax.experimental import pallas as pl

    def add(x_ref, out_ref):
        out_ref[...] = out_ref[...] + x_ref[...]

    def run():
        return pl.pallas_call(
            add,
            jax.ShapeDtypeStruct((8, 128), jnp.float32),
            grid=(4,),
            in_specs=[pl.BlockSpec((8, 128), lambda i: (i, 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i: (0, 0)),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        )(jnp.ones((32, 128)))

    raised = ""
    try:
        with pltpu.force_tpu_interpret_mode(TWO_CORES):
            jax.block_until_ready(run())
    except jax.errors.JaxRuntimeError as error:  # before jax 0.12 it is noted, and the run goes on
        raised = str(error)
    assert "RACE DETECTED" in raised or interpreter.races.races_found
    pltpu.reset_tpu_interpret_mode_state()


def on_tpu(op, shapes, dtype="bfloat16", **options):
    settings = tuple(sorted(options.items()))
    return Problem(op, "tpu", "TPU v5 lite", shapes, (dtype,) * len(shapes), settings)


def test_a_dtype_that_a_tpu_does_not_load_is_refused():
    reason = "its kernel computes in bfloat16 and float32, and got float16"
    what = on_tpu("sgd_momentum", ((8,),) * 3, "float16", dtypes=("float32",))
    assert SGD_MOMENTUM["mosaic_tpu"].refuse(what) == reason
    what = on_tpu("sgd_momentum", ((8,),) * 3, "float32", dtypes=("float32", "float16"))
    assert SGD_MOMENTUM["mosaic_tpu"].refuse(what) == reason


def test_a_convolution_that_does_not_fit_or_cuts_its_lanes_is_refused():
    options = {"activation": None, "pool": None, "padding": "SAME"}
    small = on_tpu("conv2d", ((8, 14, 14, 32), (3, 3, 32, 64), (64,)), **options)
    large = on_tpu("conv2d", ((8, 224, 224, 3), (3, 3, 3, 64), (64,)), **options)
    refuse = CONV["mosaic_tpu"].refuse
    assert refuse(small) is None
    assert re.fullmatch(
        r"its kernel holds 128 whole images in a TPU's vector memory, and the \d+ bytes of them "
        rf"are more than {60 << 20} \(use smaller images or fewer channels\)",
        refuse(large),
    )
    device = AbstractDevice(device_kind="TPU v5 lite", num_cores=None, platform="tpu")
    mesh = AbstractMesh((1,), ("i",), (AxisType.Auto,), abstract_device=device)
    x, w, b = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((9, 6, 6, 1), (3, 3, 1, 4), (4,)))
    cut = {"implementation": "mosaic_tpu", "config": strips.Config(1, images=4)}
    text = (
        "images of Config needs a multiple of 128 on a TPU, or the whole batch of 9, got 4: leave"
    )
    with jax.sharding.use_abstract_mesh(mesh), pytest.raises(ValueError, match=text):
        jax.eval_shape(partial(kernels.conv2d, **cut), x, w, b)


@pytest.mark.parametrize("shapes", [((8, 20_000), (20_000, 16)), ((20_000, 8), (8, 16))])
def test_factors_that_do_not_fit_into_vector_memory_are_refused(shapes):
    what = on_tpu("dense", (*shapes, shapes[1][1:]), activation=None, dropout=0.0)
    held = (256 + 256) * 20_000 * 2
    assert DENSE["mosaic_tpu"].refuse(what) == (
        "its kernel holds whole rows and columns of its factors in a TPU's vector memory, and "
        f"{held} bytes of them are more than {8 << 20} (use fewer features or smaller batches)"
    )
    small = on_tpu("dense", ((8, 4096), (4096, 16), (16,)), activation=None, dropout=0.0)
    assert DENSE["mosaic_tpu"].refuse(small) is None
