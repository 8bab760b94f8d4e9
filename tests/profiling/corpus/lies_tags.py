"""The partitioner's op carries the user's tag."""

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape, tag
from corpus.corpus_claims import lie
from jax import lax
from jax.sharding import NamedSharding


@lie()
def partial_auto_gather(mesh):
    """The partitioner gathers along model, at the shard_map's edge or before the user's gather."""

    def fn(x):
        def body(x):
            with tag("all_gather/x"):
                return lax.all_gather(x, "data", tiled=True)  # <-- here

        return on(mesh, P("data"), P("data"), axis_names={"data"})(body)(x)  # <-- here

    return fn, (shape(mesh, P("data", "model"), 8, 8),)


@lie()
def partial_auto_matmul(mesh):
    """Under one tag the partitioner sums over model, then the user over data."""

    def body(x, w):
        with tag("psum/x"):
            return lax.psum(x @ w, "data")  # <-- here

    fn = on(mesh, (P("data"), P()), P(), axis_names={"data"})(body)
    return fn, (shape(mesh, P("data", "model"), 8, 8), shape(mesh, P("model"), 8, 8))


@lie()
def matmul_under_a_tag(mesh):
    def fn(x, w):
        with tag("psum/x"):
            return x @ w  # <-- here

    return fn, (shape(mesh, P(None, "data"), 8, 8), shape(mesh, P("data"), 8, 8))


@lie()
def sharding_constraint_under_a_tag(mesh):
    def fn(x):
        with tag("all_gather/x"):
            y = lax.with_sharding_constraint(x * 2, NamedSharding(mesh, P()))  # <-- here
            return jnp.sin(y)

    return fn, (shape(mesh, P("data"), 8, 8),)


@lie()
def jitted_function_under_a_tag(mesh):
    @jax.jit
    def mean(x):
        return x.mean(0)  # <-- here

    def fn(x):
        with tag("psum/mean"):
            return mean(x)

    return fn, (shape(mesh, P("data"), 8, 8),)


@lie()
def mean_under_a_tag_outside_any_shard_map(mesh):
    def fn(x):
        with tag("pmean/loss"):
            return jnp.sin(x).mean()  # <-- here

    return fn, (shape(mesh, P(("data", "model")), 8, 8),)


@lie()
def boundary_under_a_tag(mesh):
    def fn(x):
        with tag("all_gather/x"):
            return on(mesh, P(), P())(lambda x: x * 2)(jnp.sin(x))  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


@lie()
def gradient_under_a_tag(mesh):
    def fn(w, x):
        def loss(w):
            with tag("psum/grads"):
                return jnp.sin(x @ w).sum()  # <-- here

        return jax.grad(loss)(w)

    return fn, (shape(mesh, P(), 4, 4), shape(mesh, P("data"), 8, 4))
