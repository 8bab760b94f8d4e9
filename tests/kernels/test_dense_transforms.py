"""dense with dropout under jax's transformations and plans gives what it gives alone."""

import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from txcore import kernels

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

RANDOM = np.random.default_rng(0)
X, W, B = (jnp.asarray(RANDOM.normal(size=s), jnp.float32) for s in ((8, 13), (13, 12), (12,)))
KEYS = jax.random.split(jax.random.key(5), 8)
IMPLEMENTATIONS = ["xla", "pallas"]


def loss(x, w, b, keys, implementation, activation="gelu", offset=0):
    out = kernels.dense(
        x,
        w,
        b,
        activation=activation,
        dropout=0.3,
        keys=keys,
        offset=offset,
        implementation=implementation,
    )
    return (out**2).sum()


def gradients(x, w, b, keys, implementation, **options):
    return jax.grad(loss, (0, 1, 2))(x, w, b, keys, implementation, **options)


@pytest.fixture(scope="module")
def want():
    return jax.jit(gradients, static_argnums=4)(X, W, B, KEYS, "xla")


def assert_close(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), got, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_examples_and_their_keys(implementation, want):
    by_row = jax.vmap(lambda x, key: gradients(x, W, B, key, implementation))
    dx, dw, db = jax.jit(by_row)(X, KEYS)
    assert_close((dx, dw.sum(0), db.sum(0)), want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_weights(implementation, want):
    twice = jax.vmap(lambda w: gradients(X, w, B, KEYS, implementation)[1])
    assert_close(jax.jit(twice)(jnp.stack([W, W])), jnp.stack([want[1]] * 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_remat_draws_the_same_mask(implementation, want):
    remat = jax.checkpoint(loss, static_argnums=4)
    got = jax.jit(jax.grad(remat, (0, 1, 2)), static_argnums=4)(X, W, B, KEYS, implementation)
    assert_close(got, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scan_over_microbatches_adds_up_to_the_whole(implementation, want):
    chunks = X.reshape(4, 2, 13), KEYS.reshape(4, 2)

    def total(w, b):
        def step(total, chunk):
            return total + loss(chunk[0], w, b, chunk[1], implementation), None

        return lax.scan(step, 0.0, chunks)[0]

    assert_close(jax.jit(jax.grad(total, (0, 1)))(W, B), want[1:])


@pytest.mark.parametrize("weights", ["invariant", "varying", "unchecked"])
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_data_parallel(implementation, devices, weights, want):
    def on_device(x, w, b, keys):
        if weights == "varying":
            w, b = (lax.pcast(a, ("data",), to="varying") for a in (w, b))
        dx, dw, db = gradients(x, w, b, keys, implementation)
        if weights != "invariant":  # then autodiff has added the devices' parts already
            dw, db = lax.psum((dw, db), "data")
        return dx, dw, db

    mapped = jax.shard_map(
        on_device,
        mesh=machine.mesh(data=devices),
        in_specs=(P("data"), P(), P(), P("data")),
        out_specs=(P("data"), P(), P()),
        check_vma=weights != "unchecked",
    )
    assert_close(jax.jit(mapped)(X, W, B, KEYS), want)


@pytest.fixture(scope="module")
def grid():
    return machine.mesh(data=2, model=2)


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_output_features_split_over_the_mesh(implementation, checked, grid, want):
    def on_device(x, w, b, keys):
        first = lax.axis_index("model") * w.shape[1]
        dx, dw, db = gradients(x, w, b, keys, implementation, offset=first)
        if not checked:
            dx, (dw, db) = lax.psum(dx, "model"), lax.psum((dw, db), "data")
        return dx, dw, db

    mapped = jax.shard_map(
        on_device,
        mesh=grid,
        in_specs=(P("data"), P(None, "model"), P("model"), P("data")),
        out_specs=(P("data"), P(None, "model"), P("model")),
        check_vma=checked,
    )
    assert_close(jax.jit(mapped)(X, W, B, KEYS), want)


def test_input_features_split_over_the_mesh(grid, want):
    def summed(x, w, b, keys):
        y = lax.psum(kernels.dense(x, w, jnp.zeros_like(b)), "model") + b
        return (kernels.dropout(jax.nn.gelu(y), keys, 0.3) ** 2).sum()

    mapped = jax.shard_map(
        jax.grad(summed, (0, 1, 2)),
        mesh=grid,
        in_specs=(P("data", "model"), P("model"), P(), P("data")),
        out_specs=(P("data", "model"), P("model"), P()),
    )
    odd = ((0, 0), (0, 1))  # 13 input features do not split in two
    dx, dw, db = jax.jit(mapped)(jnp.pad(X, odd), jnp.pad(W, odd[::-1]), B, KEYS)
    assert_close((dx[:, :13], dw[:13], db), want)


def test_shards_that_would_repeat_a_mask_are_refused(grid):
    mapped = jax.shard_map(
        lambda x, w, b, keys: loss(x, w, b, keys, "xla")[None],
        mesh=grid,
        in_specs=(P("data"), P(None, "model"), P("model"), P("data")),
        out_specs=P(("data", "model")),
    )
    text = (
        r"dense: w varies along mesh axis 'model' and needs keys or an offset that do, got "
        r"neither, .* the same 6 elements of a row: pass offset=tx.axis_index\('model'\) \* 6 where"
    )
    with pytest.raises(ValueError, match=text):
        jax.jit(mapped)(X, W, B, KEYS)


def test_operands_invariant_along_a_larger_mesh_share_one_mask(grid, want):
    mapped = jax.shard_map(
        lambda x, w, b, keys: gradients(x, w, b, keys, "xla"),
        mesh=grid,
        in_specs=P(),
        out_specs=P(),
    )
    assert_close(jax.jit(mapped)(X, W, B, KEYS), want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_collective_is_added(implementation, grid):
    mapped = jax.shard_map(
        lambda x, w, b, keys: kernels.dense(
            x, w, b, dropout=0.3, keys=keys, implementation=implementation
        ),
        mesh=grid,
        in_specs=(P("data"), P(), P(), P("data")),
        out_specs=P("data"),
    )
    hlo = jax.jit(mapped).lower(X, W, B, KEYS).compile().as_text()
    assert not any(op in hlo for op in ("all-reduce", "all-gather", "all-to-all", "permute"))
