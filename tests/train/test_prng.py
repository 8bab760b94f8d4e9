"""Keys depend on seed, step and example alone, whatever jax's own generator is set to."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import txcore as tx
from txcore import kernels

SEED, RATE, SHAPE = 7, 0.5, (8, 16)
ROTATIONS = (13, 15, 26, 6, 17, 29, 16, 24)
SETTINGS = {
    "threefry": {},
    "threefry by whole arrays": {"jax_threefry_partitionable": False},
    "rbg": {"jax_default_prng_impl": "rbg"},
    "unsafe_rbg": {"jax_default_prng_impl": "unsafe_rbg"},
}


def threefry(key, counter):
    """Return a block of Threefry-2x32 with 20 rounds in Python's integers: Salmon et al., 2011."""
    k = (*key, key[0] ^ key[1] ^ 0x1BD11BDA)
    x, y = (counter[0] + k[0]) % 2**32, (counter[1] + k[1]) % 2**32
    for turn in range(20):
        r = ROTATIONS[turn % 8]
        x = (x + y) % 2**32
        y = ((y << r | y >> (32 - r)) % 2**32) ^ x
        if turn % 4 == 3:
            s = turn // 4 + 1
            x, y = (x + k[s % 3]) % 2**32, (y + k[(s + 1) % 3] + s) % 2**32
    return x, y


def example_key(step, example):
    """Return the words of an example's key: seed, step and place, each folded in."""
    return threefry(threefry((0, SEED), (0, step)), (0, example))


def kept(step):
    rows = [
        [np.bitwise_xor(*threefry(example_key(step, i), (0, j))) for j in range(SHAPE[1])]
        for i in range(SHAPE[0])
    ]
    return np.array(rows, np.uint64) >= RATE * 2**32


@contextlib.contextmanager
def set_to(settings):
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@tx.step_fn
def step(state, batch):
    keys = state.example_keys(batch)
    drawn = jax.vmap(lambda key: jax.random.uniform(key, (3,)))(keys)

    def loss(w):
        return jnp.mean(kernels.dropout(batch * w, keys, RATE))

    value, grads = tx.value_and_grad(loss)(state.params)
    grads, state = state.sync_gradients(grads)
    metrics = {"loss": value, "drawn": jnp.mean(drawn), "shared": state.params[0] * 0}
    metrics = tx.pmean(metrics, "data", name="metrics")
    metrics["shared"] = metrics["shared"] + jax.random.uniform(state.key)
    return state.apply_gradients(grads=grads), metrics


def two_steps(devices):
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:devices], axes=("data",)),
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.sgd(0.0),
        seed=SEED,
    )
    state, found = engine.create_state(np.arange(16, dtype=np.float32)), []
    for _ in range(2):
        state, metrics = step(state, np.ones(SHAPE, np.float32))
        found.append({name: float(value) for name, value in metrics.items()})
    return found


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_masks_on_any_number_of_devices(name):
    counts = [devices for devices in (1, 2, 4) if devices <= jax.device_count()]
    with set_to(SETTINGS[name]):
        found = [two_steps(devices) for devices in counts]
    for steps in found:
        for number, metrics in enumerate(steps):
            want = (kept(number) / (1 - RATE) * np.arange(16)).mean()
            assert metrics["loss"] == pytest.approx(want, rel=1e-6)
            assert metrics["drawn"] == pytest.approx(found[0][number]["drawn"], rel=1e-6)
            assert metrics["shared"] == found[0][number]["shared"]
    assert found[0][0]["drawn"] != found[0][1]["drawn"]


def test_the_keys_are_threefry_s_and_those_that_the_paper_gives():
    from txcore.train.numerics import prng

    with set_to({"jax_default_prng_impl": "unsafe_rbg"}):
        keys = prng.example_keys(prng.step_key(jnp.uint32(SEED), jnp.int32(3)), 5, ())
    assert str(jax.random.key_impl(keys)) == "threefry2x32"
    words = [example_key(3, i) for i in range(5)]
    np.testing.assert_array_equal(jax.random.key_data(keys), words)
