"""tx.zero alone, in a shard_map of one's own: against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.profiling import audit

RNG = np.random.default_rng(0)
W = [RNG.normal(size=(8, 8)).astype(np.float32) for _ in range(4)]
X = RNG.normal(size=(8, 8)).astype(np.float32)


def mesh_of(n):
    return jax.make_mesh((n,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def truth(weights, x):
    """Loss mean(x**2) of four layers tanh(x @ w), and its gradients."""
    weights, states = [np.float64(w) for w in weights], [np.float64(x)]
    for w in weights:
        states.append(np.tanh(states[-1] @ w))
    cotangent, grads = 2 * states[-1] / states[-1].size, []
    for w, before, after in zip(weights[::-1], states[-2::-1], states[:0:-1], strict=True):
        inner = cotangent * (1 - after**2)
        grads.insert(0, before.T @ inner)
        cotangent = inner @ w.T
    return np.mean(states[-1] ** 2), grads


def block(w, x):
    return jnp.tanh(x @ w)


def whole(shards, x):
    for w in tx.zero.gather(shards):
        x = block(w, x)
    return jnp.mean(x**2)


def by_layer(shards, x):
    for shard in shards:
        x = tx.zero.layer(block)(shard, x)
    return jnp.mean(x**2)


def by_two_layers(shards, x):
    return jnp.mean(tx.zero.layers(block, shards, x) ** 2)


def in_a_scan(shards, x):
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *shards)
    return jnp.mean(jax.lax.scan(lambda x, s: (tx.zero.layer(block)(s, x), None), x, stack)[0] ** 2)


LOSSES = [whole, by_layer, by_two_layers, in_a_scan]


def differentiate(loss, n, dim=0):
    """The loss and the gradients of its weights, of which each device has a part."""

    def f(parts, x):
        shards = [tx.zero.Shard(part, dim - 2, ("data",), f"w{i}") for i, part in enumerate(parts)]
        value, grads = tx.value_and_grad(loss, axis="data")(shards, x)
        return tx.pmean(value, "data"), grads

    spec = [P("data") if dim == 0 else P(None, "data")] * 4
    return jax.shard_map(f, mesh=mesh_of(n), in_specs=(spec, P("data")), out_specs=(P(), spec))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n, dim", [(2, 1), (4, 0)])
def test_gradients_as_in_numpy(loss, n, dim):
    value, grads = jax.jit(differentiate(loss, n, dim))(W, X)
    wanted, of_weights = truth(W, X)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    for ours, theirs in zip(grads, of_weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_all_that_is_sent_is_tagged(loss):
    report = audit(differentiate(loss, 4), W, X)
    assert report.exact, report
    sent = [(c.kind, c.tags) for c in report.collectives]
    assert {kind for kind, _ in sent} == {"all-gather", "reduce-scatter", "all-reduce"}
    tags = {tag.split(".")[0] for _, own in sent for tag in own}
    assert tags == {"all_gather/params", "reduce_scatter/grads", "pmean"}


def test_closed_over_values_have_gradients():
    """What a layer takes from outside, floating-point or not, through tx.zero.layers."""

    def loss(shards, x, scale):
        keep = jnp.arange(8) % 2  # an integer
        return jnp.mean(tx.zero.layers(lambda w, x: block(w, x * scale) * keep, shards, x) ** 2)

    def plain(weights, x, scale):
        for w in weights:
            x = block(w, x * scale) * (jnp.arange(8) % 2)
        return jnp.mean(x**2)

    def f(parts, x, scale):
        shards = [tx.zero.Shard(part, -2, ("data",), "w") for part in parts]
        grads = tx.grad(loss, (0, 2), axis="data")(shards, x, scale)
        return grads[0], tx.pmean(grads[1], "data")

    spec = [P("data")] * 4
    mapped = jax.shard_map(
        f, mesh=mesh_of(2), in_specs=(spec, P("data"), P()), out_specs=(spec, P())
    )
    scale = np.float32(1.5)
    ours = jax.jit(mapped)(W, X, scale)
    theirs = jax.grad(plain, (0, 2))(W, X, scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


@pytest.mark.parametrize("outer", [lambda f: f, jax.jit, jax.checkpoint])
def test_a_layer_takes_arguments_of_any_kind(outer):
    """Numbers, integers, keys, None, and arrays from outside, some of them differentiated."""

    def mixed(w, x, scale, mask, key, power, name):
        assert (power, name) == (2, None)
        keep = jax.random.bernoulli(key, 0.5, x.shape[1:])
        return jnp.where(keep, block(w, x * scale), 0) * mask[:, None] ** power

    def run(w, x, scale, mask, key, layer):
        y = layer(mixed)(w, x, scale, mask, key, 2, None)
        return jnp.mean(layer(lambda w, y: block(w, y * scale))(w, y) ** 2)

    def f(part, x, scale, mask, seed):
        shard, key = tx.zero.Shard(part, -2, ("data",), "w"), jax.random.key(seed)
        loss = outer(lambda s, scale: run(s, x, scale, mask, key, tx.zero.layer))
        grads = tx.grad(loss, (0, 1), axis="data")(shard, scale)
        return grads[0], tx.pmean(grads[1], "data")

    spec, mask = P("data"), np.arange(8) % 3
    mapped = jax.shard_map(
        f, mesh=mesh_of(2), in_specs=(spec, spec, P(), spec, P()), out_specs=(spec, P())
    )
    scale = np.float32(1.5)
    ours = jax.jit(mapped)(W[0], X, scale, mask, 7)
    key = jax.random.key(7)
    plain = lambda w, scale: run(w, X, scale, mask, key, lambda f: f)  # noqa: E731
    theirs = jax.grad(plain, (0, 1))(W[0], scale)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), ours, theirs)


@pytest.mark.parametrize(
    "make", [jax.jit, jax.checkpoint, lambda f: jax.jit(jax.vmap(f, (None, 0)))]
)
def test_under_other_transformations(make):
    def f(part, x):
        shard = tx.zero.Shard(part, -2, ("data",), "w")
        loss = lambda shard, x: jnp.sum(block(tx.zero.gather(shard), x))  # noqa: E731
        value = make(loss)(shard, x[None] if make not in (jax.jit, jax.checkpoint) else x)
        return jnp.sum(value)[None]

    mapped = jax.shard_map(f, mesh=mesh_of(2), in_specs=(P("data"), P("data")), out_specs=P("data"))
    wanted = np.tanh(np.float64(X) @ np.float64(W[0])).reshape(2, -1).sum(1)
    np.testing.assert_allclose(jax.jit(mapped)(W[0], X), wanted, rtol=1e-5)


def test_without_tracked_types():
    """With check_vma=False the gather's own transpose counts, not jax's."""

    def f(part, x):
        shard = tx.zero.Shard(part, -2, ("data",), "w")
        return tx.grad(lambda s: jnp.mean(block(tx.zero.gather(s), x) ** 2), axis="data")(shard)

    mapped = jax.shard_map(
        f, mesh=mesh_of(4), in_specs=(P("data"), P("data")), out_specs=P("data"), check_vma=False
    )
    theirs = jax.grad(lambda w: jnp.mean(block(w, X) ** 2))(W[0])
    np.testing.assert_allclose(jax.jit(mapped)(W[0], X), theirs, rtol=1e-4, atol=1e-7)


def test_a_stack_whose_layers_are_split_is_refused():
    def f(part):
        shard = tx.zero.Shard(part, -3, ("data",), "blocks.w")
        return jax.lax.map(lambda s: tx.zero.gather(s), shard)

    mapped = jax.shard_map(f, mesh=mesh_of(2), in_specs=P("data"), out_specs=P("data"))
    text = r"needs the dim that is split \(-3, .*\) of blocks.w, got a part of shape \(8, 8\)"
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(mapped, np.stack(W))


def test_layers_needs_a_list():
    with pytest.raises(TypeError, match=r"needs a list or tuple.*got dict: for a stack of layers"):
        tx.zero.layers(block, {"w": W[0]}, X)


def test_what_is_whole_goes_through():
    assert tx.zero.layers(block, [], X) is X
    np.testing.assert_allclose(tx.zero.layers(block, W, X), through(), rtol=1e-5)
    assert tx.zero.gather({"w": W[0]})["w"] is W[0]


def through():
    x = np.float64(X)
    for w in W:
        x = np.tanh(x @ np.float64(w))
    return x


def largest_at_once(loss, n=4, layers=8, size=256):
    """Bytes of temporaries of the loss's gradients, in whole layers."""

    def f(parts, x):
        shards = [tx.zero.Shard(part, -2, ("data",), f"w{i}") for i, part in enumerate(parts)]
        return tx.grad(loss, axis="data")(shards, x)

    spec = [P("data")] * layers
    mapped = jax.shard_map(f, mesh=mesh_of(n), in_specs=(spec, P("data")), out_specs=spec)
    shapes = [jax.ShapeDtypeStruct((size, size), jnp.float32)] * layers
    x = jax.ShapeDtypeStruct((4 * n, size), jnp.float32)
    compiled = jax.jit(mapped).lower(shapes, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * size * size)


def test_two_layers_at_most_are_whole():
    """With the whole gradient of one, before its parts are made, and activations of 1/64 layer."""
    assert largest_at_once(by_layer) < 2.6
    assert largest_at_once(by_layer, layers=16) < 2.8
    assert largest_at_once(by_two_layers) < 3.6
    # Whatever the depth.
    assert largest_at_once(by_two_layers, layers=16) < 4.0
    assert largest_at_once(whole) >= 8
