"""jax's pages on shardings: "Distributed arrays and automatic parallelization", "Explicit
sharding", "Autodiff and sharding"."""

import jax
import jax.numpy as jnp
from audit_cases import P, shape
from corpus.corpus_moves import scattered
from corpus.corpus_public import GRID, asked, public
from jax import lax
from jax.sharding import AxisType, NamedSharding, auto_axes, explicit_axes, reshard

SHARDING, AD, OLD = "201/sharding", "301/sharding-ad", "notebooks/explicit-sharding"


@public(SHARDING, axes=GRID, explicit=True)
def elementwise_follows_its_argument(mesh):
    return lambda x: jnp.sin(x).T, (shape(mesh, P("X", "Y"), 8, 4),)


@public(SHARDING, axes=GRID, explicit=True)
def outer_sum_of_two_shardings(mesh):
    args = shape(mesh, P("X", None), 4, 1), shape(mesh, P(None, "Y"), 1, 8)
    return lambda x, y: x + y, args


@public(SHARDING, "failed", axes=GRID, explicit=True)
def sum_over_a_sharded_dim(mesh):
    def fn(x):
        return x.sum(0)  # <-- here

    return fn, (shape(mesh, P("X", "Y"), 8, 4),)


@public(SHARDING, "proved", asked(8 * 16 * 4, "X"), axes=GRID, explicit=True)
def product_whose_result_is_asked_for_in_shards(mesh):
    args = shape(mesh, P(None, "X"), 8, 4), shape(mesh, P("X", None), 4, 16)
    return lambda x, y: jnp.dot(x, y, out_sharding=P("X", None)), args


@public(SHARDING, "failed", axes=GRID, explicit=True)
def product_with_weights_in_shards(mesh):
    def fn(x, y):
        return jnp.dot(x, y)  # <-- here

    return fn, (shape(mesh, P(None, None), 8, 4), shape(mesh, P("X", None), 4, 16))


@public(SHARDING, "failed", axes=GRID, explicit=True)
def sum_of_two_shardings_in_auto_axes(mesh):
    @auto_axes
    def add(x, y):
        return x + y  # <-- here

    def fn(x, y):
        return add(x, y, out_sharding=P("X", None))

    return fn, (shape(mesh, P("X", None), 4, 4), shape(mesh, P(None, "X"), 4, 4))


@public(OLD, axes=GRID, explicit=True)
def auto_over_one_axis_alone(mesh):
    twice = auto_axes(lambda y: y * 2, axes="X")
    return lambda x: twice(jnp.sin(x), out_sharding=P("X", "Y")) + 1, (
        shape(mesh, P("X", "Y"), 4, 4),
    )


@public(SHARDING, "failed", axes=GRID)
def automatic_product(mesh):
    def fn(x, y):
        return jnp.dot(x, y)  # <-- here

    return fn, (shape(mesh, P(None, "X"), 8, 4), shape(mesh, P("X", None), 4, 16))


@public(SHARDING, "failed", axes=GRID)
def automatic_product_with_a_constraint(mesh):
    def fn(x, y):
        z = jnp.dot(x, y)  # <-- here
        return lax.with_sharding_constraint(z, NamedSharding(mesh, P("X", None)))

    return fn, (shape(mesh, P(None, "X"), 8, 4), shape(mesh, P("X", None), 4, 16))


@public(SHARDING, axes=GRID)
def explicit_axes_within_auto(mesh):
    @explicit_axes
    def twice(y):
        return y * 2

    return lambda x: twice(jnp.sin(x), in_sharding=P("X", "Y")) + 1, (
        shape(mesh, P("X", "Y"), 4, 4),
    )


@public(SHARDING, "proved", scattered(8 * 16 * 4, "X"), axes=GRID, explicit=True)
def product_by_hand_scattered(mesh):
    @jax.shard_map(mesh=mesh, in_specs=(P(None, "X"), P("X", None)), out_specs=P("X", None))
    def matmul(x, y):
        return lax.psum_scatter(jnp.dot(x, y), "X", tiled=True)

    return matmul, (shape(mesh, P(None, "X"), 8, 4), shape(mesh, P("X", None), 4, 16))


@public(SHARDING, "proved", None, axes=GRID, explicit=True)
def reshard_onto_another_mesh_of_the_same_devices(mesh):
    def fn(x):
        other = jax.sharding.AbstractMesh((8,), ("A",), (AxisType.Explicit,))
        with jax.sharding.use_abstract_mesh(other):
            return reshard(x, P("A", None)) * 2

    return fn, (shape(mesh, P("X", "Y"), 8, 4),)


@public(SHARDING, "proved", None, axes=GRID, explicit=True)
def reshard_of_the_dims(mesh):
    return lambda x: reshard(x, P("Y", "X")) * 2, (shape(mesh, P("X", "Y"), 8, 8),)


# Autodiff and sharding


def loss(w, x):
    return jnp.sum((x @ w) ** 2)


def weights_and_rows(mesh):
    return shape(mesh, P(None, None), 4, 2), shape(mesh, P("X", None), 8, 4)


@public(AD, "failed", explicit=True)
def gradients_of_replicated_weights(mesh):
    def loss(w, x):
        return jnp.sum((x @ w) ** 2)  # <-- here

    return jax.grad(loss, argnums=(0, 1)), weights_and_rows(mesh)


@public(AD, "proved", asked(4 * 2 * 4, "X"), explicit=True)
def gradients_of_weights_cast_to_reduced(mesh):
    def fn(w, x):
        return loss(reshard(w, P(None, None, reduced={"X"})), x)

    return jax.grad(fn), weights_and_rows(mesh)


@public(AD, "proved", asked(4 * 2 * 4, "X"), explicit=True)
def two_uses_of_weights_cast_to_reduced(mesh):
    def fn(w, x1, x2):
        w = reshard(w, P(None, None, reduced={"X"}))
        return jnp.sum(x1 @ w) + jnp.sum(x2 @ w)

    w, x = weights_and_rows(mesh)
    return jax.grad(fn), (w, x, x)


def halves(mesh):
    return shape(mesh, P(None, "X"), 8, 8), shape(mesh, P("X", None), 8, 8)


@public(AD, "proved", asked(8 * 8 * 4, "X"), explicit=True)
def contraction_asked_for_whole(mesh):
    def fn(a, b):
        return jnp.einsum("ij,jk->ik", a, b, out_sharding=P(None, None))

    return fn, halves(mesh)


@public(AD, explicit=True)
def contraction_left_unreduced(mesh):
    def fn(a, b):
        return jnp.einsum("ij,jk->ik", a, b, out_sharding=P(None, None, unreduced={"X"}))

    return fn, halves(mesh)


@public(AD, "proved", asked(8 * 8 * 4, "X"), explicit=True)
def two_contractions_reduced_once(mesh):
    def fn(a, b):
        left = P(None, None, unreduced={"X"})
        c = jnp.einsum("ij,jk->ik", a, b, out_sharding=left)
        c2 = jnp.einsum("ij,jk->ik", 2 * a, b, out_sharding=left)
        return reshard(c + c2, P(None, None))

    return fn, halves(mesh)


def predict(weights, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def stacked(mesh, **spec):
    return shape(mesh, P(**spec), 3, 4, 4), shape(mesh, P(None, "X", None), 5, 8, 4)


@public(AD, "proved", asked(3 * 4 * 4 * 4, "X"), explicit=True)
def accumulation_of_unreduced_gradients(mesh):
    def fn(weights, batches):
        def microbatch(total, x):
            grads = jax.grad(lambda w, x: jnp.sum(predict(w, x) ** 2))(weights, x)
            return total + grads, None

        zeros = reshard(jnp.zeros_like(weights), P(unreduced={"X"}))
        grads = reshard(lax.scan(microbatch, zeros, batches)[0], P())
        return reshard(weights, P()) - 0.01 * grads

    return fn, stacked(mesh, reduced={"X"})


@public(AD, "failed", explicit=True)
def accumulation_of_replicated_gradients(mesh):
    def predict(weights, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]  # <-- here

    def fn(weights, batches):
        def microbatch(total, x):
            grads = jax.grad(lambda w, x: jnp.sum(predict(w, x) ** 2))(weights, x)
            return total + grads, None

        return weights - 0.01 * lax.scan(microbatch, jnp.zeros_like(weights), batches)[0]

    return fn, stacked(mesh)


def partial_product(mesh):
    @jax.shard_map(
        mesh=mesh,
        in_specs=(P(None, "X"), P("X", None)),
        out_specs=P(None, None, unreduced={"X"}),
    )
    def product(a, b):
        return lax.pcast(a @ b, "X", to="unreduced")

    return product


@public(AD, explicit=True)
def partial_product_by_hand(mesh):
    return partial_product(mesh), halves(mesh)


@public(AD, "proved", asked(8 * 8 * 4, "X"), explicit=True)
def gradients_through_a_partial_product(mesh):
    """The backward pass is free: the one sum is the forward reshard's."""
    product = partial_product(mesh)

    def fn(a, b):
        return jnp.sum(jnp.sin(reshard(product(a, b), P(None, None))))

    return jax.value_and_grad(fn, argnums=(0, 1)), halves(mesh)


@public(AD, explicit=True)
def layer_by_hand_with_reduced_weights(mesh):
    """What comes out is unreduced: nothing is sent."""

    @jax.shard_map(
        mesh=mesh,
        in_specs=(P("X", None), P(None, None, reduced={"X"})),
        out_specs=P("X", None),
    )
    def layer(x, w):
        return jnp.tanh(x @ lax.pcast(w, "X", to="varying"))

    grads = jax.grad(lambda w, x: jnp.sum(layer(x, w) ** 2))
    return grads, (shape(mesh, P(None, None, reduced={"X"}), 4, 4), shape(mesh, P("X", None), 8, 4))
