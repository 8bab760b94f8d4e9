"""Random numbers of local examples: state.device_key, and the warning where devices share them."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax import lax
from jax import random as r

import txcore as tx
from txcore.train.numerics import prng


def drop(x, key):
    return jnp.where(r.bernoulli(key, 0.5, x.shape), x / 0.5, 0)


def image(x):
    return jnp.broadcast_to(x[:, :, None, None], (*x.shape, 3, 3))


def hidden(state, batch):
    return batch["x"] @ state.params["w1"]


def scanned_in_time(state, batch):
    x = hidden(state, batch)

    def body(carry, key):
        return jnp.tanh(drop(carry + x, key)), None

    return lax.scan(body, x, r.split(state.key, 3))[0]


def in_microbatches(state, batch):
    parts = batch["x"].reshape(2, -1, 4)

    def body(total, part):
        x, i = part
        return total + drop(x, r.fold_in(state.key, i)).sum(), None

    return lax.scan(body, batch["y"][0], (parts, jnp.arange(2)))[0]


def differentiated(state, batch):
    def loss(w):
        return (jax.checkpoint(drop)(batch["x"] @ w, state.key) ** 2).sum()

    return jax.grad(loss)(state.params["w1"])


def mixed_up(state, batch):
    share = r.beta(state.key, 0.2, 0.2, (len(batch["x"]), 1))
    return share * batch["x"] + (1 - share) * batch["x"][::-1]


SHARED = {
    "dropout": lambda s, b: drop(hidden(s, b), s.key),
    "keys split": lambda s, b: jax.vmap(drop)(b["x"], r.split(s.key, len(b["x"]))),
    "key of layer": lambda s, b: drop(b["x"], r.fold_in(s.key, 3)),
    "raw key": lambda s, b: drop(b["x"], r.key_data(s.key)),
    "noise": lambda s, b: b["x"] + 0.1 * r.normal(s.key, b["x"].shape),
    "reparametrised": lambda s, b: b["x"] + jnp.exp(b["x"]) * r.normal(s.key, b["x"].shape),
    "sampled": lambda s, b: r.categorical(s.key, hidden(s, b)),
    "flipped": lambda s, b: jnp.where(
        r.bernoulli(s.key, 0.5, (len(b["x"]), 1, 1, 1)), image(b["x"]), 0
    ),
    "mixed up": mixed_up,
    "scan": scanned_in_time,
    "microbatches": in_microbatches,
    "backward": differentiated,
}


def per_example(state, batch):
    return jax.vmap(drop)(hidden(state, batch), state.example_keys(batch))


def part_of_all(state, batch):
    """One mask for the global batch, of which each device takes its rows."""
    rows = len(batch["x"])
    mask = r.bernoulli(state.key, 0.5, (rows * tx.axis_size("data"), 8))
    mine = lax.dynamic_slice_in_dim(mask, tx.axis_index("data") * rows, rows)
    return jnp.where(mine, hidden(state, batch), 0)


def noisy_gradient(state, batch):
    grads = jax.grad(lambda w: ((batch["x"] @ w) ** 2).sum())(state.params["w1"])
    return grads + r.normal(state.key, grads.shape)


RIGHT = {
    "example_keys": per_example,
    "device_key": lambda s, b: drop(hidden(s, b), s.device_key()),
    "axis_index": lambda s, b: drop(b["x"], r.fold_in(s.key, tx.axis_index("data"))),
    "part of all": part_of_all,
    "noise on weights": lambda s, b: b["x"] @ (s.params["w1"] + r.normal(s.key, (4, 8))),
    "dropped weights": lambda s, b: b["x"] @ drop(s.params["w1"], s.key),
    "noise on gradients": noisy_gradient,
    "one for all examples": lambda s, b: hidden(s, b) * r.bernoulli(s.key, 0.5, (8,)),
    "channels of all": lambda s, b: image(b["x"]) * r.bernoulli(s.key, 0.5, (1, 4, 1, 1)),
    "one coin": lambda s, b: jnp.where(r.bernoulli(s.key), b["x"], -b["x"]),
    "projection": lambda s, b: jnp.cos(b["x"] @ r.normal(s.key, (4, 7)) + r.uniform(s.key, (7,))),
    "order": lambda s, b: b["x"][r.permutation(s.key, len(b["x"]))],
}


def warned(value, n, **options):
    axes = options.get("plan", tx.Plan(data_parallel=tx.DP("data"))).data_axes

    @tx.step_fn
    def step(state, batch):
        mean = jnp.mean(value(state, batch).astype(jnp.float32))
        return state.replace(step=state.step + 1), {"x": tx.pmean(mean, axes)}

    state = toys.engine(n, **options).create_state(toys.params())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            state, _ = step(state, toys.batch())
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", SHARED)
def test_a_draw_that_devices_share_is_warned_of_once(name):
    (text,) = warned(SHARED[name], 2)
    assert text.startswith("step draws random numbers of shape (")
    assert "for its examples (test_device_keys.py:" in text
    assert (
        "from a key that is the same on every device along axis 'data': each device gets the same "
        "ones, such as one dropout mask for the examples of all. Give each example a key, of keys "
        "= state.example_keys(batch) (the same numbers under every plan), or draw from "
        "state.device_key() in place of state.key (docs/models.md)"
    ) in text


@pytest.mark.parametrize("name", RIGHT)
def test_no_false_alarm(name):
    assert warned(RIGHT[name], 2) == []


def test_each_data_axis_counts():
    """A key that differs along one of two data axes is the same along the other."""
    options = {
        "mesh": toys.mesh(4, ("a", "b"), (2, 2)),
        "plan": tx.Plan(data_parallel=tx.DP(("a", "b"))),
    }

    def along_a(state, batch):
        return drop(batch["x"], r.fold_in(state.key, tx.axis_index("a")))

    (text,) = warned(along_a, 0, **options)
    assert "the same on every device along axis 'b'" in text
    assert warned(RIGHT["device_key"], 0, **options) == []


def test_one_device_shares_with_nobody():
    assert warned(SHARED["dropout"], 1) == []


def masks(n, get):
    """Bits that each device draws in two steps, one row a device."""
    mesh, plan = toys.mesh(n), tx.Plan(data_parallel=tx.DP(axis="data"))
    engine = toys.engine(0, mesh=mesh, plan=plan)
    kept = []

    def eval_step(state, batch):
        bits = tx.vary(r.bits(get(state), (1, 4), jnp.uint16), "data")
        return {"bits": tx.all_gather(bits.astype(jnp.float32), "data", invariant=True)}

    state = engine.create_state(toys.params())
    for _ in range(2):
        kept.append(np.asarray(engine.evaluate(eval_step, state, [toys.batch()])["bits"]))
        state = state.replace(step=state.step + 1)
    return np.concatenate(kept)


def test_each_shard_and_step_has_a_key_of_its_own():
    bits = masks(4, lambda s: s.device_key())
    assert len(np.unique(bits, axis=0)) == 8  # 4 devices, 2 steps
    shared = masks(4, lambda s: s.key)
    assert len(np.unique(shared, axis=0)) == 2


def test_a_device_key_is_no_example_s_key():
    key = prng.step_key(jnp.uint32(0), jnp.int32(0))
    device = r.key_data(prng.device_key(key, ()))
    examples = r.key_data(prng.example_keys(key, 4096, ()))
    assert not (examples == device).all(-1).any()
    assert (device != r.key_data(key)).any()


def test_outside_a_step_there_are_no_shards():
    text = "state.device_key needs to be called inside a step decorated with @tx.step_fn"
    with pytest.raises(RuntimeError, match=re.escape(text)):
        toys.engine(2).create_state(toys.params()).device_key()
