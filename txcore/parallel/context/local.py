"""Attention of some queries to some keys, on one device: what a ring puts together."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from txcore.kernels.common.checks import accumulator
from txcore.kernels.dispatch.registry import current_device

# Causal attention in so many blocks of queries, each of which sees no keys behind it, computes
# 5/8 of the scores, and holds 1/4 of them at a time. Smaller blocks cost more than they save.
BLOCKS = 4
LEAST_TOKENS = {"cpu": 64}  # of a block; elsewhere a block is a kernel of its own
_LEAST_TOKENS = 256


class How(NamedTuple):
    """What is known when the program is made."""

    axis: str
    causal: bool
    scale: float
    name: str


class Partial(NamedTuple):
    """A softmax-weighted sum over some of the keys: not divided by its normaliser yet.

    Attributes:
      total: shape (batch, groups, heads in each, tokens, values), float32 or wider.
      normaliser: the same with 1 for `values`: the sum of the exponentials.
      highest: like it: the largest score so far.
    """

    total: jax.Array
    normaliser: jax.Array
    highest: jax.Array


class Given(NamedTuple):
    """What the backward pass of some queries needs, all with the tokens as the last dim but one."""

    q: jax.Array
    cotangent: jax.Array
    log_sum: jax.Array
    inner: jax.Array  # the sum of out * cotangent


def attend(how: How, q: jax.Array, k: jax.Array, v: jax.Array, *, masked: bool) -> Partial:
    """Attend to some keys.

    Args:
      how: with the scale.
      q: shape (batch, groups, heads in each, tokens, features).
      k: shape (batch, groups, tokens of keys, features).
      v: shape (batch, groups, tokens of keys, values).
      masked: whether they are the queries' own tokens, of which each sees those before it.
    """

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Partial:
        if not masked:
            return _attend_block(how, q, k, v, None)
        parts = []
        for block in cut_tokens(q.shape[-2]):
            mask = _causal_mask(block)
            seen = k[..., : block.stop, :], v[..., : block.stop, :]
            parts.append(_attend_block(how, _take_block(q, block), *seen, mask))
        return jax.tree.map(lambda *x: jnp.concatenate(x, axis=-2), *parts)

    return over_rows(run, q, k, v)


def find_gradients(
    how: How, given: Given, k: jax.Array, v: jax.Array, *, masked: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of some queries and of the keys and values that they see."""

    def run(given: Given, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        if not masked:
            return _block_gradients(how, given, k, v, None)
        parts = []
        for block in cut_tokens(k.shape[-2]):
            own = Given(*(_take_block(x, block) for x in given))
            seen = k[..., : block.stop, :], v[..., : block.stop, :]
            parts.append(_block_gradients(how, own, *seen, _causal_mask(block)))
        of_q, *of_seen = zip(*parts, strict=True)
        of_k, of_v = (_add_seen(part, k.shape[-2]) for part in of_seen)
        return jnp.concatenate(of_q, axis=-2), of_k, of_v

    return over_rows(run, given, k, v)


def over_rows(f: Callable[..., Any], *trees: Any) -> Any:
    """Return `f(*trees)`, on CPU by one row of the batch after the other.

    The scores of one row lie in a core's cache between the passes over them, which takes half the
    time of all rows at once.
    """
    if current_device()[0] != "cpu" or jax.tree.leaves(trees)[0].shape[0] == 1:
        return f(*trees)
    alone = jax.tree.map(lambda x: x[:, None], trees)
    return jax.tree.map(lambda x: x[:, 0], lax.map(lambda row: f(*row), alone))


def cut_tokens(tokens: int) -> list[range]:
    """Return the blocks of queries of causal attention.

    Example:
      >>> from txcore.parallel.context.local import cut_tokens
      >>> [(block.start, block.stop) for block in cut_tokens(128)]
      [(0, 64), (64, 128)]
    """
    least = LEAST_TOKENS.get(current_device()[0], _LEAST_TOKENS)
    counts = [n for n in range(1, BLOCKS + 1) if tokens % n == 0 and tokens // n >= least]
    size = tokens // max(counts, default=1)
    return [range(start, start + size) for start in range(0, tokens, size)]


def _take_block(x: jax.Array, block: range) -> jax.Array:
    return x[..., block.start : block.stop, :]


def _add_seen(parts: Sequence[jax.Array], tokens: int) -> jax.Array:
    """Add up gradients of the first keys, each of as many as its block sees."""
    *others, total = parts  # the last one sees all
    for part in others:
        missing = tokens - part.shape[-2]
        total = total + jnp.pad(part, [(0, 0)] * (part.ndim - 2) + [(0, missing), (0, 0)])
    return total


def _causal_mask(block: range) -> jax.Array:
    """Return which of the tokens up to a block's end each of its own sees."""
    return jnp.arange(block.start, block.stop)[:, None] >= jnp.arange(block.stop)[None, :]


def _attend_block(
    how: How, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None
) -> Partial:
    """Attend to some keys; `mask` of shape (tokens, tokens of k) is true where they are seen."""
    shape, q = q.shape[:4], _fold_heads(q)
    scores = _compute_scores(how, q, k, mask)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = _multiply_mixed("bgqk,bgkv->bgqv", weights, v)
    normaliser = jnp.sum(weights, axis=-1, keepdims=True)
    return Partial(*(x.reshape(*shape, -1) for x in (total, normaliser, highest)))


def _block_gradients(
    how: How, given: Given, k: jax.Array, v: jax.Array, mask: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    shape, given = given.q.shape, Given(*map(_fold_heads, given))
    weights = jnp.exp(_compute_scores(how, given.q, k, mask) - given.log_sum)
    of_v = _multiply_mixed("bgqk,bgqv->bgkv", weights, given.cotangent)
    of_weights = jnp.einsum(
        "bgqv,bgkv->bgqk", given.cotangent, v, preferred_element_type=weights.dtype
    )
    of_scores = how.scale * weights * (of_weights - given.inner)
    of_q = _multiply_mixed("bgqk,bgkf->bgqf", of_scores, k)
    of_k = _multiply_mixed("bgqk,bgqf->bgkf", of_scores, given.q)
    return of_q.reshape(shape), of_k, of_v


def _fold_heads(x: jax.Array) -> jax.Array:
    """Return (batch, groups, heads in each, tokens, x) with the rows of its heads in one dim.

    XLA for CPU is twice as slow with the dims apart.
    """
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _compute_scores(how: How, q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
    wide = accumulator(q.dtype)
    scores = how.scale * jnp.einsum("bgqf,bgkf->bgqk", q, k, preferred_element_type=wide)
    if mask is None:
        return scores
    mask = jnp.tile(mask, (q.shape[2] // mask.shape[0], 1))  # of each head
    return jnp.where(mask, scores, -jnp.inf)


def _multiply_mixed(equation: str, wide: jax.Array, given: jax.Array) -> jax.Array:
    """Multiply what is computed in float32 by what is given, as this is: sums are float32."""
    return jnp.einsum(equation, wide.astype(given.dtype), given, preferred_element_type=wide.dtype)
