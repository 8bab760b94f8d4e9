"""Random bits that are a function of a key and a counter, in any order and in any kernel."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from txcore import _compat
from txcore.kernels.common import checks

Pair = tuple[jax.Array, jax.Array]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry2x32(key: Pair, counter: Pair) -> Pair:
    """Encrypt a counter by Threefry-2x32 with 20 rounds, in plain integer arithmetic.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.

    Args:
      key: two uint32 arrays.
      counter: two uint32 arrays that broadcast with the key's.

    Returns:
      Two uint32 arrays of the broadcast shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from txcore.kernels.common import random_bits
      >>> zero = jnp.uint32(0)
      >>> [hex(word) for word in random_bits.threefry2x32((zero, zero), (zero, zero))]
      ['0x6b200159', '0x99ba4efe']
    """
    schedule = (*key, key[0] ^ key[1] ^ _PARITY)
    x, y = counter[0] + schedule[0], counter[1] + schedule[1]
    for group in range(5):
        for distance in _ROTATIONS[group % 2]:
            x = x + y
            y = x ^ ((y << distance) | (y >> (32 - distance)))
        x = x + schedule[(group + 1) % 3]
        y = y + schedule[(group + 2) % 3] + (group + 1)
    return x, y


@jax.jit  # one program where it is called outside of any, not a hundred
def bits(key: Pair, counters: jax.Array) -> jax.Array:
    """Return 32 random bits for each counter: jax's own, `jax.random.bits(key, (n,))[counter]`.

    Args:
      key: two uint32 arrays, the words of `jax.random.key_data`.
      counters: uint32 array that broadcasts with the key's.

    Returns:
      A uint32 array of the broadcast shape.
    """
    # One word a block costs XLA:CPU no more than both would: it computes the whole block for
    # each of two results that are put side by side.
    counters = checks.lift(counters, key[0])
    first, second = threefry2x32(key, (jnp.zeros_like(counters), counters))
    return first ^ second


def keep_share(rate: float) -> float:
    """Return the probability with which `keep` is true: 1 - rate to within 2**-32, never 0."""
    return 1 - _threshold(rate) / 2**32


def keep(key: Pair, counters: jax.Array, rate: float) -> jax.Array:
    """Tell for each counter whether dropout keeps it."""
    return bits(key, counters) >= np.uint32(_threshold(rate))


def keep_rows(words: jax.Array, offset: jax.Array, features: int, rate: float) -> jax.Array:
    """Return the mask of shape (..., features) for key words of shape (..., 2).

    A row's feature j has the counter `offset` + j.
    """
    counters = offset + jax.lax.iota(jnp.uint32, features)
    return keep((words[..., 0:1], words[..., 1:2]), counters, rate)


def _threshold(rate: float) -> int:
    return min(round(rate * 2**32), 2**32 - 1)


def key_words(op: str, keys: Any) -> jax.Array:
    """Return the two words of each key, shape (*keys.shape, 2), or refuse what is no key.

    Keys of more words (of jax's "rbg" generators) are hashed to two.
    """
    if _compat.is_key_array(keys):
        words = jax.random.key_data(keys)
    elif jnp.result_type(keys) == jnp.uint32 and jnp.shape(keys)[-1:] == (2,):
        words = jnp.asarray(keys)
    else:
        raise TypeError(
            f"{op}: keys must be typed keys (jax.random.key, state.example_keys) or their words, "
            f"uint32 of shape (..., 2); got {jnp.result_type(keys)} of shape {jnp.shape(keys)}."
        )
    x, y = words[..., 0], words[..., 1]
    for i in range(2, words.shape[-1], 2):
        x, y = threefry2x32((x, y), (words[..., i], words[..., i + 1]))
    return jnp.stack([x, y], -1) if words.shape[-1] > 2 else words
