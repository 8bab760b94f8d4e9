"""Which arrays are replicated, and what sharding would save: counted by hand on a 4 x 2 mesh."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from txcore.profiling.cost.replicated import Replicated, replicated

AXES = ("data", "model")


def on_mesh(shape, spec, dtype=jnp.float32):
    types = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), AXES, axis_types=types, devices=jax.devices())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def rows(fn, *args, at_least=0, **options):
    compiled = jax.jit(fn, **options).lower(*args).compile()
    return replicated(compiled, at_least=at_least)


def only(shape, spec, dtype=jnp.float32):
    found = rows(lambda x: x.ravel()[:1].sum(), on_mesh(shape, spec, dtype))
    assert len(found) <= 1
    return found[0] if found else None


def test_all_that_is_said_of_a_replicated_array():
    assert only((64, 48), P()) == Replicated(
        path="args[0]",
        shape=(64, 48),
        dtype="float32",
        bytes=64 * 48 * 4,
        axes=("data", "model"),
        shard_axes=("data", "model"),
        shard_dim=0,
        saved_bytes=64 * 48 * 4 * 7 // 8,
    )


@pytest.mark.parametrize(
    "shape, spec, axes, shard_axes, dim, saved",
    [
        ((64, 48), P("data"), AXES[1:], AXES[1:], 1, 64 * 48 * 4 // 4 // 2),
        ((64, 48), P(None, "model"), AXES[:1], AXES[:1], 0, 64 * 48 * 4 // 2 * 3 // 4),
        ((12, 5), P(), AXES, AXES[:1], 0, 240 * 3 // 4),  # 8 divides no dim, 4 does
        ((6, 5), P(), AXES, AXES[1:], 0, 120 // 2),
        ((8, 1000), P(), AXES, AXES, 1, 32000 * 7 // 8),  # the largest of two
    ],
)
def test_by_what_it_could_be_sharded(shape, spec, axes, shard_axes, dim, saved):
    row = only(shape, spec)
    assert (row.axes, row.shard_axes, row.shard_dim, row.saved_bytes) == (
        axes,
        shard_axes,
        dim,
        saved,
    )


@pytest.mark.parametrize(
    "shape, spec",
    [((64, 48), P("data", "model")), ((64, 48), P(AXES)), ((5, 7), P()), ((), P())],
)
def test_what_is_sharded_or_cannot_be_is_not_listed(shape, spec):
    assert only(shape, spec) is None


def test_narrow_types_and_keys_count_their_own_bytes():
    assert only((64,), P(), jnp.bfloat16).bytes == 128
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 16))
    keys = on_mesh((16,), P(), keys.dtype)
    assert [r.bytes for r in rows(lambda k: jax.random.key_data(k).sum(), keys)] == [16 * 8]


def step(params, moments, x):
    grad = x.sum(0) * params["w"]
    return {"w": params["w"] - grad}, {"w": moments["w"] + grad}, grad.sum()


def test_a_training_step_names_parameters_and_optimizer_state():
    w = on_mesh((256, 64), P())
    x = on_mesh((4, 256, 64), P("data"))
    whole = w.sharding
    found = rows(
        step, {"w": w}, {"w": w}, x, donate_argnums=(0,), out_shardings=(whole, whole, whole)
    )
    # The new parameters lie in the donated ones; the new moments have memory of their own.
    assert [r.path for r in found] == ["args[0]['w']", "args[1]['w']", "result[1]['w']", "args[2]"]
    assert found[0].saved_bytes == 256 * 64 * 4 * 7 // 8
    assert found[-1].axes == ("model",)


def test_small_ones_are_left_out():
    w = on_mesh((64, 48), P())
    saved = 64 * 48 * 4 * 7 // 8
    assert len(rows(jnp.sum, w, at_least=saved)) == 1
    assert rows(jnp.sum, w, at_least=saved + 1) == ()
    assert replicated(jnp.sum, w) == ()  # by default, under a mebibyte
    assert len(replicated(jnp.sum, on_mesh((1024, 1024), P()))) == 1


def test_unused_arguments_keywords_and_one_device():
    w = on_mesh((64, 48), P())
    compiled = jax.jit(lambda x, unused, *, k: x.sum() + k.sum()).lower(w, w, k=w).compile()
    assert [r.path for r in replicated(compiled, at_least=0)] == ["args[0]", "kwargs['k']"]
    assert replicated(jnp.sum, jnp.ones((64, 48)), at_least=0) == ()


def test_what_is_refused():
    with pytest.raises(ValueError, match="at least 0, but got -1"):
        replicated(jnp.sum, jnp.ones(3), at_least=-1)
    compiled = jax.jit(jnp.sum).lower(jnp.ones(3)).compile()
    with pytest.raises(TypeError, match="got 1 more: call replicated"):
        replicated(compiled, jnp.ones(3))
