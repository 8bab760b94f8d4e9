"""Convolutions in parts: values and gradients against float64 NumPy, and the sums they send."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore import kernels
from txcore.profiling import audit

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 6, 5, 3))
WEIGHTS = (
    RNG.normal(size=(3, 3, 3, 4)),
    RNG.normal(size=4),
    RNG.normal(size=(3, 3, 4, 2)),
    RNG.normal(size=2),
)
SPECS = (P(None, None, None, "model"), P("model"), P(None, None, "model"), P())


def conv(x, w, b):
    """The convolution with zeros around, in NumPy."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    return np.einsum("bhwcij,ijco->bhwo", windows, w) + b


def pool(y):
    y = y[:, : y.shape[1] // 2 * 2, : y.shape[2] // 2 * 2]
    return np.max([y[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)


def truth(pools, x, w1, b1, w2, b2):
    first = np.maximum(conv(x, w1, b1), 0)
    second = conv(pool(first) if pools else first, w2, b2)
    return pool(np.maximum(second, 0)) if pools else second


def gradients(pools, cotangent):
    """Central differences of the outputs' product with a cotangent."""
    given = [X, *WEIGHTS]
    found = []
    for place, array in enumerate(given):
        grad = np.zeros_like(array)
        for at in np.ndindex(array.shape):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [a.copy() for a in given]
                moved[place][at] += step
                ends.append((truth(pools, *moved) * cotangent).sum())
            grad[at] = (ends[0] - ends[1]) / 2e-6
        found.append(grad)
    return found


@pytest.mark.parametrize("model", [1, 2, 4])
@pytest.mark.parametrize("pools", [False, True], ids=["plain", "pool"])
@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
def test_by_output_then_by_input_channels(model, pools, check_vma):
    known = truth(pools, X, *WEIGHTS)
    cotangent = np.random.default_rng(1).normal(size=known.shape)
    fused = {"pool": 2} if pools else {}

    def loss_of(x, w1, b1, w2, b2):
        x = tx.tensor.column_conv(x, w1, b1, axis="model", activation="relu", **fused)
        last = {"activation": "relu", **fused} if pools else {}
        y = tx.tensor.row_conv(x, w2, b2, axis="model", **last)
        return jnp.sum(y * cotangent), y

    both = jax.value_and_grad(loss_of, argnums=range(5), has_aux=True)
    with jax.enable_x64(True):
        (_, y), grads = tx.testing.run_sharded(
            both,
            *(X, *WEIGHTS),
            axes={"model": model},
            in_specs=(P(), *SPECS),
            out_specs=((P(), P()), (P(), *SPECS)),
            check_vma=check_vma,
        )
    np.testing.assert_allclose(y, known, rtol=1e-9, atol=1e-9)
    for got, want in zip(grads, gradients(pools, cotangent), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_equal_ones_in_a_window_pass_their_gradient_as_the_whole_convolution_does():
    """Images of MNIST are zero in most places: windows of equal values are the rule."""
    x = np.zeros((1, 4, 4, 4), np.float32)
    w, b = np.ones((1, 1, 4, 2), np.float32), np.ones(2, np.float32)
    weights = np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2)

    def whole(x):
        return jnp.sum(kernels.conv2d(x, w, b, activation="relu", pool=2) * weights)

    def split(x, w, b):
        y = tx.tensor.row_conv(x, w, b, axis="model", activation="relu", pool=2)
        return jnp.sum(y * weights)

    spec = P(None, None, None, "model")
    got = tx.testing.run_sharded(
        jax.grad(split),
        *(x, w, b),
        axes={"model": 2},
        in_specs=(spec, P(None, None, "model"), P()),
        out_specs=spec,
    )
    np.testing.assert_array_equal(got, jax.grad(whole)(x))


def test_a_pair_sends_one_sum_each_way():
    mesh = tx.MeshSpec(jax.devices()[:2], axes=("model",))

    def loss_of(x, w1, b1, w2, b2):
        x = tx.tensor.column_conv(x, w1, b1, axis="model", activation="relu")
        return jnp.sum(tx.tensor.row_conv(x, w2, b2, axis="model", activation="relu", pool=2))

    mapped = jax.shard_map(
        jax.grad(loss_of, argnums=range(5)),
        mesh=mesh.mesh,
        in_specs=(P(), *SPECS),
        out_specs=(P(), *SPECS),
    )
    placed = [
        jax.device_put(np.float32(x), mesh.sharding(*spec))
        for x, spec in zip((X, *WEIGHTS), (P(), *SPECS), strict=True)
    ]
    report = audit(mapped, *placed)
    assert report.exact
    assert [(c.kind, c.tags) for c in report.collectives] == [
        ("all-reduce", ("psum/row",)),
        ("all-reduce", ("vary/column",)),
    ]


@pytest.mark.parametrize("layer", ["column_conv", "row_conv"])
def test_filters_that_are_whole_are_refused(layer):
    function = getattr(tx.tensor, layer)
    with pytest.raises(ValueError, match=f"tensor.{layer} needs w this device's part along 'model"):
        tx.testing.run_sharded(
            lambda x, w, b: function(x, w, b, axis="model"),
            *map(np.float32, (X, WEIGHTS[0], WEIGHTS[1])),
            axes={"model": 2},
            in_specs=P(),
            out_specs=P(),
        )
