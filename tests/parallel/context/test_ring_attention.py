"""Ring attention: values and gradients against float64 NumPy, what it sends and what it holds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.profiling import audit

pytestmark = pytest.mark.sampled(2)

SEQUENCE = P(None, "context")


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def attention_in_float64(q, k, v, cotangent, causal):
    """The output, and the gradients of its product with a cotangent."""
    heads, groups, features = q.shape[2], k.shape[2], q.shape[3]
    wide_k, wide_v = (np.repeat(x, heads // groups, axis=2) for x in (k, v))
    scores = np.einsum("bqhf,bkhf->bhqk", q, wide_k) / np.sqrt(features)
    if causal:
        tokens = q.shape[1]
        scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhqk,bkhv->bqhv", weights, wide_v)
    of_v = np.einsum("bhqk,bqhv->bkhv", weights, cotangent)
    of_weights = np.einsum("bqhv,bkhv->bhqk", cotangent, wide_v)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdims=True))
    of_scores /= np.sqrt(features)
    of_q = np.einsum("bhqk,bkhf->bqhf", of_scores, wide_k)
    of_k = np.einsum("bhqk,bqhf->bkhf", of_scores, q)

    def add_heads(x):
        return x.reshape(*x.shape[:2], groups, heads // groups, x.shape[3]).sum(3)

    return out, (of_q, add_heads(of_k), add_heads(of_v))


def loss_of(q, k, v, cotangent, causal):
    out = tx.context.ring_attention(q, k, v, axis="context", causal=causal)
    return jnp.sum(out * cotangent), out


def differentiate(q, k, v, cotangent, causal):
    both = jax.value_and_grad(loss_of, argnums=(0, 1, 2), has_aux=True)
    (_, out), grads = both(q, k, v, cotangent, causal)
    return out, grads


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("check_vma", [True, False], ids=["vma", "no_vma"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("n,groups", [(1, 4), (2, 1), (4, 2), (3, 4)])
def test_values_and_gradients(n, groups, causal, check_vma):
    tokens = 24
    q, k = normal(0, 2, tokens, 4, 6), normal(1, 2, tokens, groups, 6)
    v, cotangent = normal(2, 2, tokens, groups, 5), normal(3, 2, tokens, 4, 5)
    wanted, wanted_grads = attention_in_float64(q, k, v, cotangent, causal)

    out, grads = tx.testing.run_sharded(
        partial(differentiate, causal=causal),
        *(np.float32(tx.context.split_chunks(x, n)) for x in (q, k, v, cotangent)),
        axes={"context": n},
        in_specs=(SEQUENCE,) * 4,
        out_specs=SEQUENCE,
        check_vma=check_vma,
    )
    np.testing.assert_allclose(tx.context.merge_chunks(out, n), wanted, rtol=1e-4, atol=1e-5)
    for got, grad in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(tx.context.merge_chunks(got, n), grad, rtol=1e-4, atol=2e-5)


def test_positions_are_those_of_the_chunks():
    order = tx.context.split_chunks(np.arange(24), 3, dim=0)
    got = tx.testing.run_sharded(
        lambda x: tx.context.positions("context", x.shape[0]), np.zeros(24), axes={"context": 3}
    )
    np.testing.assert_array_equal(got, order)


def test_very_large_scores_do_not_overflow():
    q = np.full((1, 8, 1, 4), 100, np.float32)
    v = normal(0, 1, 8, 1, 4)
    out, _ = tx.testing.run_sharded(
        partial(differentiate, causal=False),
        q,
        q,
        np.float32(v),
        q,
        axes={"context": 4},
        in_specs=(SEQUENCE,) * 4,
        out_specs=SEQUENCE,
    )
    np.testing.assert_allclose(out, np.broadcast_to(v.mean(1, keepdims=True), v.shape), rtol=1e-4)


def compiled(n, tokens, causal=True, heads=1):
    mesh = jax.make_mesh((n,), ("context",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    mapped = jax.shard_map(
        partial(differentiate, causal=causal),
        mesh=mesh,
        in_specs=(SEQUENCE,) * 4,
        out_specs=SEQUENCE,
    )
    shape = jax.ShapeDtypeStruct(
        (1, tokens, heads, 8), jnp.float32, sharding=NamedSharding(mesh, SEQUENCE)
    )
    return jax.jit(mapped), [shape] * 4


@pytest.mark.parametrize("causal", [True, False])
def test_it_sends_permutes_alone(causal):
    """Forward n - 1 exchanges of two arrays; backward n - 1 of four, and two that go home."""
    f, args = compiled(4, 32, causal)
    report = audit(f, *args)
    assert report.exact, str(report)
    assert {c.kind for c in report.collectives} == {"collective-permute"}
    sent = sum(c.payload_bytes for c in report.collectives)
    of_one = 8 * 1 * 8 * 4  # this device's keys
    assert sent == (3 * 2 + 3 * 4 + 2) * of_one


def test_memory_shrinks_with_the_devices():
    """Few matrices of a device's queries with one device's keys are held at a time: 1 / n^2 each.

    One device alone holds two; in a ring XLA holds also those of halves that are merged.
    """
    held = {}
    for n, matrices in ((1, 2), (2, 6.5), (4, 9.5)):
        f, args = compiled(n, 1024)
        held[n] = f.lower(*args).compile().memory_analysis().temp_size_in_bytes
        assert held[n] <= matrices * (1024 // n) ** 2 * 4
    assert held[4] < 0.5 * held[2]


REFUSED = {
    "three dims": (
        lambda x: tx.context.ring_attention(x[0], x[0], x[0], axis="context"),
        "context.ring_attention needs q, k and v of shape (batch, tokens, heads, features), got "
        "(3, 6, 4), (3, 6, 4) and (3, 6, 4)",
    ),
    "an odd number of tokens": (
        lambda x: tx.context.ring_attention(x, x, x, axis="context"),
        "context.ring_attention needs an even number of tokens on each device with causal=True, "
        "got 3: each holds two chunks (context.split_chunks); pad the sequence",
    ),
    "heads that do not divide": (
        lambda x: tx.context.ring_attention(x, x[:, :, :4], x[:, :, :4], axis="context"),
        "context.ring_attention needs heads of k and v that divide those of q, got (1, 3, 6, 4), "
        "(1, 3, 4, 4) and (1, 3, 4, 4)",
    ),
    "other tokens": (
        lambda x: tx.context.ring_attention(x, x[:, :2], x[:, :2], axis="context"),
        "context.ring_attention needs q, k and v of the same batch and tokens, k and v of the same "
        "heads, q and k of the same features, got (1, 3, 6, 4), (1, 2, 6, 4) and (1, 2, 6, 4)",
    ),
    "an odd number of positions": (
        lambda x: x + tx.context.positions("context", x.shape[1])[None, :, None, None],
        "context.positions needs an even number of tokens on each device, got 3: each holds two "
        "chunks; pad the sequence",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    f, text = REFUSED[case]
    x = np.ones((1, 6, 6, 4), np.float32)
    with pytest.raises(ValueError) as found:
        tx.testing.run_sharded(f, x, axes={"context": 2}, in_specs=SEQUENCE, out_specs=SEQUENCE)
    assert str(found.value) == text


def test_a_sequence_that_the_devices_do_not_divide():
    with pytest.raises(ValueError) as found:
        tx.context.split_chunks(np.arange(10), 4, dim=0)
    assert str(found.value) == (
        "context.split_chunks needs a sequence that 2 x 4 devices divide, got 10 tokens: pad it to "
        "16"
    )
