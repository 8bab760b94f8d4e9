"""Threefry against its published answers, against jax's own, and the statistics of its masks."""

import itertools

import dropout_oracles as oracles
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from txcore import kernels
from txcore.kernels.common import random_bits

# Random123's kat_vectors, "threefry2x32 20": counter, key, result.
KNOWN = [
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
]


def words_of(pair):
    return tuple(jnp.uint32(word) for word in pair)


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_the_published_answers(counter, key, result):
    got = random_bits.threefry2x32(words_of(key), words_of(counter))
    assert tuple(int(word) for word in got) == result
    assert tuple(int(word) for word in oracles.threefry(key, counter)) == result


def test_jax_gives_the_same_bits():
    keys = jax.random.split(jax.random.key(7), 3)
    words = jax.random.key_data(keys)
    counters = jnp.arange(101, dtype=jnp.uint32)
    got = random_bits.bits((words[:, :1], words[:, 1:]), counters)
    want = jax.vmap(lambda key: jax.random.bits(key, (101,)))(keys)
    np.testing.assert_array_equal(got, want)


def test_the_first_half_of_jax_bits_is_that_of_fewer():
    words = np.array([1, 2], np.uint32)
    np.testing.assert_array_equal(oracles.keep(words, 7, 0.5), oracles.keep(words, 20, 0.5)[:7])


@pytest.mark.parametrize("rate", [0.0, 1e-12, 0.1, 1 / 3, 0.5, 0.999, 1 - 1e-16])
def test_the_mean_is_kept_at_every_rate(rate):
    share = random_bits.keep_share(rate)
    assert share == pytest.approx(1 - rate, abs=2**-32)
    assert share > 0
    kept = kernels.dropout(jnp.ones((1, 64)), jax.random.split(jax.random.key(0), 1), rate)
    assert set(np.unique(kept)) <= {0.0, np.float32(1 / share)}


@pytest.fixture(scope="module")
def mask():
    keys = jax.random.split(jax.random.key(3), 400)
    return np.asarray(kernels.dropout(jnp.ones((400, 500)), keys, 0.25)) > 0


def deviations(count, n, p=0.75):
    """Return how many binomial standard deviations `count` of n lies from its mean."""
    return abs(count - n * p) / np.sqrt(n * p * (1 - p))


def test_the_kept_share(mask):
    assert deviations(mask.sum(), mask.size) < 4
    assert deviations(mask.sum(0), 400).max() < 5  # of 500 features
    assert deviations(mask.sum(1), 500).max() < 5  # of 400 examples


@pytest.mark.parametrize("dim", [0, 1], ids=["examples", "features"])
def test_neighbours_are_independent(mask, dim):
    both = 0.75**2
    for step in (1, 2, 4, 32, 128):
        a, b = (np.moveaxis(mask, dim, 0)[i:j] for i, j in ((step, None), (None, -step)))
        assert deviations((a & b).sum(), a.size, both) < 5


def test_keys_are_independent(mask):
    other = jax.random.split(jax.random.key(4), 400)
    mask2 = np.asarray(kernels.dropout(jnp.ones((400, 500)), other, 0.25)) > 0
    assert deviations((mask & mask2).sum(), mask.size, 0.75**2) < 4


def test_no_two_rows_are_the_same(mask):
    packed = {row.tobytes() for row in np.packbits(mask, 1)}
    assert len(packed) == len(mask)


def test_longer_keys_are_hashed_and_all_of_their_words_count():
    words = jnp.array([1, 2, 3, 4], jnp.uint32)
    seen = set()
    for changed in itertools.chain([None], range(4)):
        data = words if changed is None else words.at[changed].add(1)
        key = jax.random.wrap_key_data(data, impl="rbg")
        seen.add(np.asarray(kernels.dropout(jnp.ones(64), key, 0.5)).tobytes())
    assert len(seen) == 5
