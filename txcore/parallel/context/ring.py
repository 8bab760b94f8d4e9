"""Ring attention: keys and values go round the devices, and queries stay.

A softmax over all keys is put together from those over each device's, by their maxima and sums
(the online softmax). The backward pass goes round once more: it computes the scores anew from what
arrives, so that no device ever holds another's keys, values or scores for longer than one exchange.
"""

from functools import partial

import jax
import jax.numpy as jnp

from txcore.collectives import axis_index, axis_size, shift
from txcore.kernels.common.checks import accumulator
from txcore.parallel.context.local import Given, How, Partial, attend, find_gradients, over_rows
from txcore.parallel.zero.order import after
from txcore.varying import match_varying


def ring_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    axis: str,
    causal: bool = True,
    scale: float | None = None,
    name: str = "ring_attention",
) -> jax.Array:
    """Compute attention over a sequence that is split over a mesh axis.

    Equation: `softmax(scale * q k^T + mask) v` over the whole sequence. Each device has the tokens
    of `split_chunks`, so that with `causal` all compute the same number of scores: half of those of
    full attention. n - 1 exchanges carry keys and values forward; backward, n carry their
    gradients too. Scores and sums are float32 or wider.

    Transpose: the same ring, with the gradients of keys and values travelling along.

    Args:
      q: shape (batch, tokens, heads, features), this device's tokens; without `causal` any split
        of the sequence.
      k: shape (batch, tokens, groups, features); `groups` divides `heads` (grouped-query
        attention).
      v: shape (batch, tokens, groups, values).
      axis: the sequence's mesh axis.
      causal: whether a token sees itself and those before it alone.
      scale: of the scores; None for 1 / sqrt(features).
      name: label of the operations' tags.

    Returns:
      Shape (batch, tokens, heads, values), in the dtype of `q`.

    Raises:
      ValueError: the shapes do not fit each other, or `causal` with an odd number of tokens.
      NameError: `axis` is not bound here.

    Example:
      >>> def f(x):
      ...     return tx.context.ring_attention(x, x, x, axis="context")
      >>> x = np.ones((1, 8, 2, 4), np.float32)
      >>> y = tx.testing.run_sharded(f, x, axes={"context": 2}, in_specs=P(None, "context"),
      ...                            out_specs=P(None, "context"))
      >>> bool(np.allclose(y, 1))
      True

    References:
      Liu et al., "Ring attention with blockwise transformers for near-infinite context", 2023;
      Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    _check_shapes(q, k, v, axis, causal)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = match_varying(q, k, v)
    how = How(axis, causal, float(scale), name)
    return _attend_over_ring(how, q, k, v)


def _check_shapes(q: jax.Array, k: jax.Array, v: jax.Array, axis: str, causal: bool) -> None:
    shapes = f"{q.shape}, {k.shape} and {v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(
            "context.ring_attention needs q, k and v of shape (batch, tokens, heads, features), "
            f"got {shapes}"
        )
    same = q.shape[:2] == k.shape[:2] == v.shape[:2] and k.shape[2] == v.shape[2]
    if not same or q.shape[3] != k.shape[3]:
        raise ValueError(
            "context.ring_attention needs q, k and v of the same batch and tokens, k and v of the "
            f"same heads, q and k of the same features, got {shapes}"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"context.ring_attention needs heads of k and v that divide those of q, got {shapes}"
        )
    if causal and q.shape[1] % 2 and axis_size(axis) > 1:
        raise ValueError(
            "context.ring_attention needs an even number of tokens on each device with "
            f"causal=True, got {q.shape[1]}: each holds two chunks (context.split_chunks); pad the "
            "sequence"
        )


# Inside, tokens are the last dim but one: matrices lie whole in memory, which CPUs need for speed.
def _split_heads(q: jax.Array, groups: int) -> jax.Array:
    """Return (batch, tokens, heads, x) as (batch, groups, heads in each, tokens, x)."""
    batch, tokens, heads, features = q.shape
    parts = q.reshape(batch, tokens, groups, heads // groups, features)
    return parts.transpose(0, 2, 3, 1, 4)


def _join_heads(x: jax.Array) -> jax.Array:
    """Return (batch, groups, heads in each, tokens, x) as (batch, tokens, heads, x)."""
    batch, groups, shared, tokens, features = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(batch, tokens, groups * shared, features)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_over_ring(how: How, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _attend_forward(how, q, k, v)[0]


# Alone, a device does all of it for one row after the other, the transpositions too.
def _attend_forward(
    how: How, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    run = partial(_go_round, how)
    out, log_sum = over_rows(run, q, k, v) if axis_size(how.axis) == 1 else run(q, k, v)
    return out, (q, k, v, out, log_sum)


def _attend_backward(
    how: How, kept: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    run, given = partial(_go_round_again, how), (*kept, cotangent)
    grads: tuple[jax.Array, jax.Array, jax.Array]
    grads = over_rows(run, *given) if axis_size(how.axis) == 1 else run(*given)
    return grads


def _go_round(how: How, q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    n, rank = axis_size(how.axis), axis_index(how.axis)
    groups = k.shape[2]
    mine = _split_heads(q, groups)
    there_k, there_v = (x.swapaxes(1, 2) for x in (k, v))
    result = attend(how, mine, there_k, there_v, masked=how.causal)
    for distance in range(1, n):
        there_k, there_v = shift((there_k, there_v), how.axis, by=1, name=how.name)
        if how.causal:
            result = _add_half(how, result, mine, there_k, there_v, rank >= distance)
        else:
            result = _merge_partials(result, attend(how, mine, there_k, there_v, masked=False))
    log_sum = result.highest + jnp.log(result.normaliser)
    return _join_heads((result.total / result.normaliser).astype(q.dtype)), log_sum


def _merge_partials(a: Partial, b: Partial) -> Partial:
    """Put two sums over different keys together."""
    highest = jnp.maximum(a.highest, b.highest)
    of_a, of_b = jnp.exp(a.highest - highest), jnp.exp(b.highest - highest)
    return Partial(
        a.total * of_a + b.total * of_b,
        a.normaliser * of_a + b.normaliser * of_b,
        highest,
    )


def _add_half(
    how: How,
    result: Partial,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    is_earlier: jax.Array,
) -> Partial:
    """Add what causal attention sees of another device's two chunks.

    Of a device before this one (`is_earlier`) both chunks of queries see its first chunk alone; of
    one behind, only the second chunk of queries sees anything, and both of its chunks. So the
    second queries see the first keys in any case, and one more product depends on who it is.
    """
    first, second = _split_halves(result)
    (q1, q2), (k1, k2), (v1, v2) = _split_halves(q), _split_halves(k), _split_halves(v)
    second = _merge_partials(second, attend(how, q2, k1, v1, masked=False))
    other = attend(
        how,
        jnp.where(is_earlier, q1, q2),
        jnp.where(is_earlier, k1, k2),
        jnp.where(is_earlier, v1, v2),
        masked=False,
    )
    first = _select_tree(is_earlier, _merge_partials(first, other), first)
    second = _select_tree(is_earlier, second, _merge_partials(second, other))
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=-2), first, second)


def _split_halves(tree):  # type: ignore[no-untyped-def]
    """Return the first and the second chunk of each array."""
    half = jax.tree.leaves(tree)[0].shape[-2] // 2
    first = jax.tree.map(lambda x: x[..., :half, :], tree)
    return first, jax.tree.map(lambda x: x[..., half:, :], tree)


def _select_tree(flag, then, otherwise):  # type: ignore[no-untyped-def]
    return jax.tree.map(partial(jnp.where, flag), then, otherwise)


def _go_round_again(
    how: How,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    log_sum: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    n, rank, groups = axis_size(how.axis), axis_index(how.axis), k.shape[2]
    if n > 1:
        # Or XLA takes these exchanges for those of the forward pass, and keeps what arrived there
        # until now: the whole sequence's keys and values.
        k, v = after((k, v), cotangent)
    wide = accumulator(q.dtype)
    inner = jnp.sum(out.astype(wide) * cotangent.astype(wide), axis=-1, keepdims=True)
    given = Given(
        q=_split_heads(q, groups),
        cotangent=_split_heads(cotangent, groups),
        log_sum=log_sum,
        inner=_split_heads(inner, groups),
    )
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    of_q, of_k, of_v = find_gradients(how, given, k, v, masked=how.causal)
    there = (k, v, of_k, of_v)
    for distance in range(1, n):
        there = shift(there, how.axis, by=1, name=f"{how.name}.backward")
        there_k, there_v, there_of_k, there_of_v = there
        if how.causal:
            more = _half_gradients(how, given, there_k, there_v, rank >= distance)
        else:
            more = find_gradients(how, given, there_k, there_v, masked=False)
        of_q = of_q + more[0]
        there = (there_k, there_v, there_of_k + more[1], there_of_v + more[2])
    of_k, of_v = shift(there[2:], how.axis, by=1, name=f"{how.name}.home") if n > 1 else there[2:]
    of_k, of_v = of_k.swapaxes(1, 2), of_v.swapaxes(1, 2)
    return _join_heads(of_q.astype(q.dtype)), of_k.astype(k.dtype), of_v.astype(v.dtype)


def _half_gradients(
    how: How, given: Given, k: jax.Array, v: jax.Array, is_earlier: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of what `_add_half` adds."""
    (k1, k2), (v1, v2) = _split_halves(k), _split_halves(v)
    first, second = _split_halves(given)
    of_q2, of_k1, of_v1 = find_gradients(how, second, k1, v1, masked=False)
    other = find_gradients(
        how,
        _select_tree(is_earlier, first, second),
        jnp.where(is_earlier, k1, k2),
        jnp.where(is_earlier, v1, v2),
        masked=False,
    )
    nothing = jax.tree.map(jnp.zeros_like, other)
    if_earlier = _select_tree(is_earlier, other, nothing)
    if_later = _select_tree(is_earlier, nothing, other)
    return (
        jnp.concatenate([if_earlier[0], of_q2 + if_later[0]], axis=-2),
        jnp.concatenate([of_k1 + if_earlier[1], if_later[1]], axis=-2),
        jnp.concatenate([of_v1 + if_earlier[2], if_later[2]], axis=-2),
    )


_attend_over_ring.defvjp(_attend_forward, _attend_backward)
