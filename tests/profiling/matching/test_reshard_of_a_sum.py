"""jax's documented accumulation with reduced and unreduced types ("Autodiff and sharding").

Weights are reduced, so that gradients are unreduced, and one `jax.reshard` reduces them.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, reshard
from jax.sharding import PartitionSpec as P

from txcore.profiling import audit

LAYERS, WIDTH, MICROBATCHES = 3, 4, 5


def mesh_of(**axes):
    devices = np.array(jax.devices()[: int(np.prod(list(axes.values())))])
    return Mesh(
        devices.reshape(tuple(axes.values())),
        tuple(axes),
        axis_types=(AxisType.Explicit,) * len(axes),
    )


def predict(weights, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def loss(weights, x):
    return jnp.sum(predict(weights, x) ** 2)


def accumulate(weights, batches, zeros):
    def microbatch(total, x):
        return total + jax.grad(loss)(weights, x), None

    return lax.scan(microbatch, zeros, batches)[0]


@jax.jit
def reduced_step(weights, batches):
    zeros = reshard(jnp.zeros_like(weights), P(unreduced={"X"}))
    grads = reshard(accumulate(weights, batches, zeros), P())  # <-- the one all-reduce
    return reshard(weights, P()) - 0.01 * grads


@jax.jit
def replicated_step(weights, batches):
    return weights - 0.01 * accumulate(weights, batches, jnp.zeros_like(weights))


def arguments(mesh, **spec):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(LAYERS, WIDTH, WIDTH)).astype(np.float32) / 2
    batches = rng.normal(size=(MICROBATCHES, 4, WIDTH)).astype(np.float32)
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    return put(weights, P(**spec)), put(batches, P(None, "X", None))


@pytest.mark.parametrize("sizes", [{"X": 4}, {"X": 2, "Y": 2}], ids=str)
def test_the_documented_accumulation_is_exact(sizes):
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        args = arguments(mesh, reduced={"X"})
        report = audit(reduced_step, *args)
        assert report.exact, report
        [row] = report.collectives
        wanted = ("all-reduce", "reshard", ("X",), 4 * LAYERS * WIDTH**2, 1)
        assert (row.kind, row.origin, row.axes, row.payload_bytes, row.trips) == wanted
        assert report.missing == ()
        # the same numbers as with replicated weights, whose sums the partitioner adds in both loops
        weights, batches = arguments(mesh)
        got, plain = reduced_step(*args), replicated_step(weights, batches)
        np.testing.assert_allclose(np.asarray(got), np.asarray(plain), rtol=1e-5)
        replicated = audit(replicated_step, weights, batches)
        assert not replicated.ok
        assert {row.origin for row in replicated.collectives} == {"partitioner"}


def test_two_uses_of_reduced_weights_are_reduced_once():
    def fanout(weights, x):
        w = reshard(weights, P(None, None, None, reduced={"X"}))
        return loss(w, x[0]) + loss(w, x[1])

    mesh = mesh_of(X=4)
    with jax.set_mesh(mesh):
        report = audit(jax.jit(jax.grad(fanout)), *arguments(mesh))
    assert report.exact, report
    assert [(row.kind, row.origin) for row in report.collectives] == [("all-reduce", "reshard")]


def test_a_matmul_left_unreduced_and_resharded():
    def f(a, b):
        c = jnp.einsum("ij,jk->ik", a, b, out_sharding=P(None, None, unreduced={"X"}))
        return reshard(c + c, P(None, None))

    mesh = mesh_of(X=4)
    with jax.set_mesh(mesh):
        a = jax.device_put(jnp.ones((4, 8)), P(None, "X"))
        b = jax.device_put(jnp.ones((8, 4)), P("X", None))
        report = audit(jax.jit(f), a, b)
        np.testing.assert_array_equal(jax.jit(f)(a, b), np.full((4, 4), 16))
    assert report.exact, report
    assert [row.origin for row in report.collectives] == ["reshard"]


def test_layers_by_hand_pass_unreduced_gradients_through():
    """A shard_map takes reduced weights; its transpose gives the unreduced gradient, unsent."""
    mesh = mesh_of(X=4)

    def f(w, x):
        layer = jax.shard_map(
            lambda x, w: jnp.tanh(x @ lax.pcast(w, "X", to="varying")),
            mesh=mesh,
            in_specs=(P("X", None), P(None, None, reduced={"X"})),
            out_specs=P("X", None),
        )
        grads = jax.grad(lambda w, x: jnp.sum(layer(x, w) ** 2))(w, x)
        return reshard(grads, P())

    with jax.set_mesh(mesh):
        w = jax.device_put(jnp.eye(4), P(None, None, reduced={"X"}))
        x = jax.device_put(jnp.ones((8, 4)), P("X", None))
        report = audit(jax.jit(f), w, x)
    assert report.exact, report
    assert [(row.kind, row.origin) for row in report.collectives] == [("all-reduce", "reshard")]


def test_a_reshard_explains_one_sum_and_no_other():
    """Beside the reshard the partitioner sums an array of the same size over the same devices."""

    def f(weights, batches):
        zeros = reshard(jnp.zeros_like(weights), P(unreduced={"X"}))
        grads = reshard(accumulate(weights, batches, zeros), P())
        own = (batches[..., None] * batches[..., None, :]).sum((0, 1))
        return grads, jnp.broadcast_to(own, (LAYERS, WIDTH, WIDTH))

    mesh = mesh_of(X=4)
    with jax.set_mesh(mesh):
        report = audit(jax.jit(f), *arguments(mesh, reduced={"X"}))
    assert not report.ok
    assert sorted(row.origin for row in report.unexplained) == ["partitioner"]
