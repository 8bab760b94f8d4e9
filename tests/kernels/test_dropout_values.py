"""dropout by itself: values, gradients, shapes, what is kept for the backward pass, bad calls."""

import re

import dropout_oracles as oracles
import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from txcore import kernels
from txcore.kernels.dropout.pallas import Config

pytestmark = pytest.mark.sampled(2)

KEYS = jax.random.split(jax.random.key(5), 4)
WORDS = jax.random.key_data(KEYS)
IMPLEMENTATIONS = ["xla", "pallas"]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def sample(*shape, dtype=jnp.float32, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, np.float64], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 37), (4, 3, 5, 2), (4, 130)])
def test_forward_and_gradient_equal_the_oracle(shape, dtype, implementation):
    with jax.enable_x64(dtype is np.float64):
        x, g = sample(*shape, dtype=dtype), sample(*shape, dtype=dtype, seed=1)
        out, vjp = jax.vjp(
            lambda x: kernels.dropout(x, KEYS, 0.3, implementation=implementation), x
        )
        truth, true_dx = oracles.dropout(x, WORDS, 0.3, g)
        tolerance = float(jnp.finfo(dtype).eps)
        for got, true in ((out, truth), (vjp(g)[0], true_dx)):
            assert (got.dtype, got.shape) == (dtype, shape)
            np.testing.assert_array_equal(np.asarray(got) == 0, true == 0)
            np.testing.assert_allclose(np.asarray(got, np.float64), true, rtol=tolerance)


@pytest.mark.parametrize("config", [Config(16, 16), Config(64, 1024)])
def test_the_mask_is_the_same_for_every_configuration(config):
    x = sample(4, 5, 9)
    got = kernels.dropout(x, KEYS, 0.5, implementation="pallas", config=config)
    np.testing.assert_array_equal(got, kernels.dropout(x, KEYS, 0.5))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_mask_belongs_to_its_example(implementation):
    def drop(x, keys, **options):
        return kernels.dropout(x, keys, 0.5, implementation=implementation, **options)

    x = sample(4, 30)
    whole = drop(x, KEYS)
    np.testing.assert_array_equal(
        jnp.concatenate([drop(x[:1], KEYS[:1]), drop(x[1:], KEYS[1:])]), whole
    )
    np.testing.assert_array_equal(jax.vmap(drop)(x, KEYS), whole)
    np.testing.assert_array_equal(drop(x[2], KEYS[2]), whole[2])
    np.testing.assert_array_equal(
        drop(x.reshape(2, 2, 30), KEYS.reshape(2, 2)), whole.reshape(2, 2, 30)
    )
    np.testing.assert_array_equal(drop(x, WORDS), whole)
    np.testing.assert_array_equal(drop(x[:, 11:], KEYS, offset=11), whole[:, 11:])
    np.testing.assert_array_equal(jax.jit(drop)(x, KEYS), whole)


def residual_bytes(function, *args):
    """Return the bytes of what the backward pass is given, besides constants of a few words."""
    _, vjp = jax.vjp(function, *args)
    return sum(leaf.nbytes for leaf in jax.tree.leaves(vjp) if hasattr(leaf, "nbytes"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_of_the_size_of_x_is_kept(implementation):
    x = sample(4, 1000)
    kept = residual_bytes(
        lambda x: kernels.dropout(x, WORDS, 0.5, implementation=implementation), x
    )
    assert 0 < kept <= 64  # four keys and the offset
    mask = jax.random.bernoulli(KEYS[0], 0.5, x.shape)
    assert residual_bytes(lambda x: jnp.where(mask, x, 0), x) >= 4000  # the count does count


def test_a_dropped_nan_is_gone_and_its_gradient_too():
    dropped = ~oracles.keep(np.asarray(WORDS), 30, 0.5)
    x = jnp.where(dropped, jnp.nan, sample(4, 30))
    out, vjp = jax.vjp(lambda x: kernels.dropout(x, KEYS, 0.5), x)
    assert not np.isnan(out).any()
    assert not np.asarray(vjp(jnp.where(dropped, jnp.inf, 1.0))[0])[dropped].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_keys_get_no_gradient(implementation):
    _, vjp = jax.vjp(
        lambda x, words, offset: kernels.dropout(
            x, words, 0.5, offset=offset, implementation=implementation
        ),
        sample(4, 3),
        WORDS,
        jnp.int32(2),
    )
    _, for_words, for_offset = vjp(jnp.ones((4, 3)))
    assert {for_words.dtype, for_offset.dtype} == {jax.dtypes.float0}
    loss = jax.grad(lambda x, keys: kernels.dropout(x, keys, 0.5).sum())
    assert loss(sample(4, 3), KEYS).shape == (4, 3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rate_zero_and_empty_inputs(implementation):
    x = sample(4, 3)
    np.testing.assert_array_equal(kernels.dropout(x, KEYS, 0, implementation=implementation), x)
    for shape, keys in (((0, 3), KEYS[:0]), ((4, 0), KEYS)):
        out = kernels.dropout(jnp.zeros(shape), keys, 0.5, implementation=implementation)
        assert out.shape == shape


X = jnp.zeros((4, 6))
BAD = {
    "traced rate": (
        TypeError,
        lambda: jax.jit(lambda rate: kernels.dropout(X, KEYS, rate))(0.5),
        "dropout: rate needs a Python number, since it is part of the compiled program, got ",
    ),
    "rate of one": (
        ValueError,
        lambda: kernels.dropout(X, KEYS, 1.0),
        "dropout: rate needs a finite number in [0, 1), got 1.0",
    ),
    "negative rate": (
        ValueError,
        lambda: kernels.dropout(X, KEYS, -0.1),
        "dropout: rate needs a finite number in [0, 1), got -0.1",
    ),
    "rate that is no number": (
        ValueError,
        lambda: kernels.dropout(X, KEYS, float("nan")),
        "in [0, 1), got nan",
    ),
    "one key": (
        ValueError,
        lambda: kernels.dropout(X, jax.random.split(KEYS[0], 3), 0.5),
        "dropout: keys needs x's first dims, got x (4, 6), keys (3,): pass one key for each "
        "example, for example jax.random.split(key, len(x))",
    ),
    "seeds": (
        TypeError,
        lambda: kernels.dropout(X, jnp.arange(4), 0.5),
        "dropout: keys needs typed keys or their words, uint32 of shape (..., 2), got int32 of "
        "shape (4,): make them by jax.random.split(jax.random.key(seed), n) or "
        "state.example_keys(batch)",
    ),
    "three words": (
        TypeError,
        lambda: kernels.dropout(X, jnp.zeros((4, 3), jnp.uint32), 0.5),
        "dropout: keys needs typed keys or their words, uint32 of shape (..., 2), got uint32 "
        "of shape (4, 3): make them by jax.random.split(jax.random.key(seed), n) or "
        "state.example_keys(batch)",
    ),
    "integers": (
        TypeError,
        lambda: kernels.dropout(X.astype(int), KEYS, 0.5),
        "dropout: x needs a floating-point dtype, got int32: cast it, for example "
        "x.astype(jnp.float32)",
    ),
    "negative offset": (
        ValueError,
        lambda: kernels.dropout(X, KEYS, 0.5, offset=-1),
        "dropout: offset needs to be at least 0, and offset + elements at most 2**32, the "
        "counters of a key, got offset -1 and 6 elements for each key: give parts of x keys of "
        "their own",
    ),
    "offset past the last": (
        ValueError,
        lambda: kernels.dropout(X, KEYS, 0.5, offset=2**32 - 5),
        "got offset 4294967291 and 6 elements",
    ),
    "fractional offset": (
        TypeError,
        lambda: kernels.dropout(X, KEYS, 0.5, offset=0.5),
        "dropout: offset needs an integer scalar, got float32 of shape (): pass "
        "tx.axis_index(axis) * features, say",
    ),
    "implementation": (
        NotImplementedError,
        lambda: kernels.dropout(X, KEYS, 0.5, implementation="triton_ir"),
        "dropout: implementation='triton_ir' was asked for, but dropout has no triton_ir kernel: "
        "pass 'xla' or 'pallas_triton' or 'mosaic_tpu', or leave implementation out to have one "
        "chosen",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_refused(bad):
    error, call, text = BAD[bad]
    with pytest.raises(error, match=re.escape(text)):
        call()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("devices", [1, 2, 4])
def test_the_mask_is_the_same_on_any_number_of_devices(devices, checked, implementation):
    mesh = machine.mesh(data=devices)
    x = sample(4, 3, 7)

    def on_device(x, keys):
        out, vjp = jax.vjp(
            lambda x: kernels.dropout(x, keys, 0.5, implementation=implementation), x
        )
        return out, vjp(out)[0]

    mapped = jax.shard_map(
        on_device, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=checked
    )
    jax.tree.map(np.testing.assert_array_equal, jax.jit(mapped)(x, KEYS), on_device(x, KEYS))


def test_shards_that_would_repeat_a_mask_are_refused():
    mesh = machine.mesh(model=2)

    def mapped(offset):
        return jax.shard_map(
            lambda x, keys: kernels.dropout(x, keys, 0.5, offset=offset()),
            mesh=mesh,
            in_specs=(P(None, "model"), P()),
            out_specs=P(None, "model"),
        )

    text = (
        "dropout: x varies along mesh axis 'model' and needs keys or an offset that do, got "
        "neither, so that all its shards would drop the same 4 elements of a row: pass "
        "offset=tx.axis_index('model') * 4 where the axis splits the features, or keys that "
        "differ along it (jax.random.fold_in with tx.axis_index('model'))"
    )
    x = sample(4, 8)
    with pytest.raises(ValueError, match=re.escape(text)):
        jax.jit(mapped(lambda: 0))(x, KEYS)
    whole = jax.jit(mapped(lambda: jax.lax.axis_index("model") * 4))(x, KEYS)
    np.testing.assert_array_equal(whole, kernels.dropout(x, KEYS, 0.5))
