"""Random bits as a function of a key and a counter: any kernel computes them in any order."""

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


@jax.jit  # so that a call outside of any compiled function is one program, not a hundred
def bits(key: Pair, counters: jax.Array) -> jax.Array:
    """Return 32 random bits for each counter: jax's own, `jax.random.bits(key, (n,))[counter]`.

    Args:
      key: two uint32 arrays, the words of `jax.random.key_data`.
      counters: uint32 array that broadcasts with the key's.

    Returns:
      A uint32 array of the broadcast shape.
    """
    # Of the two words of a block only one is used. Using both would not be faster on XLA:CPU,
    # which computes the whole block again for each of two results that are concatenated.
    counters = checks.lift_rank(counters, key[0])
    first, second = threefry2x32(key, (jnp.zeros_like(counters), counters))
    return first ^ second


def keep_share(rate: float) -> float:
    """Return the probability that `keep_mask` is true: 1 - rate to within 2**-32, never 0."""
    return 1 - _drop_threshold(rate) / 2**32


def keep_mask(key: Pair, counters: jax.Array, rate: float) -> jax.Array:
    """Tell for each counter whether dropout keeps it."""
    return bits(key, counters) >= np.uint32(_drop_threshold(rate))


def keep_mask_of_rows(words: jax.Array, offset: jax.Array, features: int, rate: float) -> jax.Array:
    """Return the mask of shape (..., features) for key words of shape (..., 2).

    A row's feature j has the counter `offset` + j.
    """
    counters = offset + jax.lax.iota(jnp.uint32, features)
    return keep_mask((words[..., 0:1], words[..., 1:2]), counters, rate)


def _drop_threshold(rate: float) -> int:
    return min(round(rate * 2**32), 2**32 - 1)


def read_key_words(op: str, keys: Any) -> jax.Array:
    """Return the two words of each key, shape (*keys.shape, 2), or refuse what is not a key.

    Keys with more than two words (those of jax's "rbg" generators) are hashed to two.
    """
    if _compat.is_key_array(keys):
        words = jax.random.key_data(keys)
    elif jnp.result_type(keys) == jnp.uint32 and jnp.shape(keys)[-1:] == (2,):
        words = jnp.asarray(keys)
    else:
        raise TypeError(
            f"{op}: keys needs typed keys or their words, uint32 of shape (..., 2), got "
            f"{jnp.result_type(keys)} of shape {jnp.shape(keys)}: make them by "
            "jax.random.split(jax.random.key(seed), n) or state.example_keys(batch)"
        )
    x, y = words[..., 0], words[..., 1]
    for i in range(2, words.shape[-1], 2):
        x, y = threefry2x32((x, y), (words[..., i], words[..., i + 1]))
    return jnp.stack([x, y], -1) if words.shape[-1] > 2 else words
