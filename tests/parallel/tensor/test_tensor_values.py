"""Layers in parts: values and gradients against float64 NumPy, on every way to split them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import txcore as tx

MESHES = [{"model": 1}, {"data": 2, "model": 4}]
BATCH, SEQUENCE, FEATURES, HIDDEN, VOCABULARY = 2, 8, 6, 12, 16
meshes = pytest.mark.parametrize("axes", MESHES, ids=str)
tracking = pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def assert_close(got, wanted):
    jax.tree.map(
        lambda g, w: np.testing.assert_allclose(np.asarray(g), w, rtol=3e-5, atol=3e-5), got, wanted
    )


X, COTANGENT = normal(0, BATCH, SEQUENCE, FEATURES), normal(1, BATCH, SEQUENCE, FEATURES)
W1, B1 = normal(2, FEATURES, HIDDEN), normal(3, HIDDEN)
W2, B2 = normal(4, HIDDEN, FEATURES), normal(5, FEATURES)
WEIGHTS = (W1, B1, W2, B2)
WEIGHT_SPECS = (P(None, "model"), P("model"), P("model"), P())


def two_layers_in_float64():
    """The output of x @ w1 + b1, squared, @ w2 + b2, and the gradients of its product with a
    cotangent."""
    x, cotangent, w1, b1, w2, b2 = (a.astype(np.float64) for a in (X, COTANGENT, *WEIGHTS))
    inner = x @ w1 + b1
    out = inner**2 @ w2 + b2
    of_inner = cotangent @ w2.T * 2 * inner
    grads = (
        of_inner @ w1.T,
        np.einsum("bsi,bso->io", x, of_inner),
        of_inner.sum((0, 1)),
        np.einsum("bsi,bso->io", inner**2, cotangent),
        cotangent.sum((0, 1)),
    )
    return out, grads


@tracking
@meshes
def test_a_column_and_a_row_layer(axes, check_vma):
    def loss_of(x, w1, b1, w2, b2, cotangent):
        inner = tx.tensor.column_dense(x, w1, b1, axis="model")
        out = tx.tensor.row_dense(inner**2, w2, b2, axis="model")
        return jnp.sum(out * cotangent), out

    both = jax.value_and_grad(loss_of, argnums=(0, 1, 2, 3, 4), has_aux=True)
    (_, out), grads = tx.testing.run_sharded(
        both,
        X,
        *WEIGHTS,
        COTANGENT,
        axes=axes,
        in_specs=(P(), *WEIGHT_SPECS, P()),
        out_specs=((P(), P()), (P(), *WEIGHT_SPECS)),
        check_vma=check_vma,
    )
    wanted, wanted_grads = two_layers_in_float64()
    assert_close(out, wanted)
    assert_close(grads, wanted_grads)


@pytest.mark.parametrize("overlap", [False, True], ids=["plain", "overlap"])
@tracking
@meshes
def test_sequence_parallel_layers(axes, check_vma, overlap):
    """Each device has some tokens before and after, and all of them between the two layers."""
    options = {"axis": "model", "overlap": overlap}

    def loss_of(x, w1, b1, w2, b2, cotangent):
        inner = tx.tensor.column_dense(x, w1, b1, gather_dim=1, **options)
        out = tx.tensor.row_dense(inner**2, w2, b2, scatter_dim=1, **options)
        return jnp.sum(out * cotangent), out

    def run(x, w1, b1, w2, b2, cotangent):
        differentiate = jax.value_and_grad(loss_of, argnums=(0, 1, 2, 3, 4), has_aux=True)
        (_, out), grads = differentiate(x, w1, b1, w2, b2, cotangent)
        return out, grads

    sequence = P(None, "model")
    out, grads = tx.testing.run_sharded(
        run,
        X,
        *WEIGHTS,
        COTANGENT,
        axes=axes,
        in_specs=(sequence, *WEIGHT_SPECS, sequence),
        out_specs=(sequence, (sequence, *WEIGHT_SPECS)),
        check_vma=check_vma,
    )
    wanted, wanted_grads = two_layers_in_float64()
    assert_close(out, wanted)
    assert_close(grads, wanted_grads)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_rings_of_any_length(n):
    x, w = normal(0, n * 2, 3), normal(1, 3, n * 3)

    def f(x, w):
        inner = tx.tensor.column_dense(x, w, axis="model", gather_dim=0, overlap=True)
        outer = tx.tensor.row_dense(inner, w.T, axis="model", scatter_dim=0, overlap=True)
        return inner, outer

    inner, outer = tx.testing.run_sharded(
        f,
        x,
        w,
        axes={"model": n},
        in_specs=(P("model"), P(None, "model")),
        out_specs=(P(None, "model"), P("model")),
    )
    assert_close(inner, np.float64(x) @ w)
    assert_close(outer, np.float64(x) @ w @ w.T)


TABLE = normal(6, VOCABULARY, FEATURES)
TOKENS = np.random.default_rng(7).integers(0, VOCABULARY, (BATCH, SEQUENCE))


@pytest.mark.parametrize("scatter_dim", [None, 1])
@tracking
@meshes
def test_an_embedding(axes, check_vma, scatter_dim):
    spec = P() if scatter_dim is None else P(None, "model")

    def loss_of(table, tokens, cotangent):
        out = tx.tensor.embedding(tokens, table, axis="model", scatter_dim=scatter_dim)
        return jnp.sum(out * cotangent), out

    def run(table, tokens, cotangent):
        (_, out), grad = jax.value_and_grad(loss_of, has_aux=True)(table, tokens, cotangent)
        return out, grad

    out, grad = tx.testing.run_sharded(
        run,
        TABLE,
        TOKENS,
        COTANGENT,
        axes=axes,
        in_specs=(P("model"), P(), spec),
        out_specs=(spec, P("model")),
        check_vma=check_vma,
    )
    wanted = np.zeros((VOCABULARY, FEATURES))
    np.add.at(wanted, TOKENS, np.float64(COTANGENT))
    assert_close(out, TABLE[TOKENS])
    assert_close(grad, wanted)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@tracking
@meshes
def test_a_cross_entropy(axes, check_vma, label_smoothing):
    logits, labels = 30 * normal(8, BATCH, SEQUENCE, VOCABULARY), TOKENS
    weights = normal(9, BATCH, SEQUENCE)

    def loss_of(logits, labels, weights):
        losses = tx.tensor.cross_entropy(
            logits, labels, axis="model", label_smoothing=label_smoothing
        )
        return jnp.sum(losses * weights), losses

    def run(logits, labels, weights):
        (_, losses), grad = jax.value_and_grad(loss_of, has_aux=True)(logits, labels, weights)
        return losses, grad

    parts = P(None, None, "model")
    losses, grad = tx.testing.run_sharded(
        run,
        logits,
        labels,
        weights,
        axes=axes,
        in_specs=(parts, P(), P()),
        out_specs=(P(), parts),
        check_vma=check_vma,
    )
    wide = np.float64(logits)
    shifted = wide - wide.max(-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    target = (1 - label_smoothing) * np.eye(VOCABULARY)[labels] + label_smoothing / VOCABULARY
    np.testing.assert_allclose(losses, -(target * log_softmax).sum(-1), rtol=1e-5, atol=1e-5)
    assert_close(grad, (np.exp(log_softmax) - target) * weights[..., None])


def test_rows_of_very_large_and_impossible_logits():
    logits = np.full((2, 4), -np.inf, np.float32)
    logits[0, 3], logits[1] = 5, [1e38, 0, 0, 0]

    def f(logits, labels):
        return tx.tensor.cross_entropy(logits, labels, axis="model")

    got = tx.testing.run_sharded(
        f,
        logits,
        np.array([3, 0]),
        axes={"model": 4},
        in_specs=(P(None, "model"), P()),
        out_specs=P(),
    )
    np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("label", [-1, VOCABULARY, 2**31 - 1])
def test_what_is_not_in_the_vocabulary_is_nan(label):
    logits, labels = normal(0, 2, VOCABULARY), np.array([0, label], np.int32)

    def f(logits, table, labels):
        losses = tx.tensor.cross_entropy(logits, labels, axis="model")
        return losses, tx.tensor.embedding(labels, table, axis="model")

    losses, rows = tx.testing.run_sharded(
        f,
        logits,
        TABLE,
        labels,
        axes={"model": 4},
        in_specs=(P(None, "model"), P("model"), P()),
        out_specs=P(),
    )
    np.testing.assert_array_equal(np.isnan(losses), [False, True])
    np.testing.assert_array_equal(np.isnan(rows).all(-1), [False, True])
    assert np.isfinite(rows[0]).all()


def test_half_precision_logits_are_summed_in_float32():
    logits = np.zeros((1, 512), np.float32)

    def f(logits, labels):
        return tx.tensor.cross_entropy(logits.astype(jnp.bfloat16), labels, axis="model")

    got = tx.testing.run_sharded(
        f,
        logits,
        np.array([7]),
        axes={"model": 4},
        in_specs=(P(None, "model"), P()),
        out_specs=P(),
    )
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, np.log(512), rtol=1e-6)
