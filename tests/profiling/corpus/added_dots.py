"""Products, convolutions and sums that the partitioner completes with a sum."""

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape
from corpus.corpus_marks import added
from jax import lax


@added()
def matmul_over_a_sharded_dim(mesh):
    def fn(x, w):
        return x @ w  # <-- here

    return fn, (shape(mesh, P(None, "data"), 8, 8), shape(mesh, P("data"), 8, 8))


@added()
def matmul_with_sharded_weights(mesh):
    """What is called FSDP: the partitioner gathers the weights."""

    def fn(x, w):
        return jnp.tanh(x * 2) @ jnp.tanh(w)  # <-- here

    return fn, (shape(mesh, P("data"), 256, 8), shape(mesh, P("data"), 8, 8))


@added()
def two_layers(mesh):
    def fn(x, a, b):
        hidden = jax.nn.relu(x @ a)
        return hidden @ b  # <-- here

    specs = P("data"), P(None, "model"), P("model")
    return fn, tuple(shape(mesh, spec, 8, 8) for spec in specs)


@added()
def partial_auto_matmul(mesh):
    """An explicit shard_map over one axis leaves the other to the partitioner."""

    def fn(x, w):
        return on(mesh, (P("data"), P()), P("data"), axis_names={"data"})(
            lambda x, w: x @ w  # <-- here
        )(x, w)

    return fn, (shape(mesh, P("data", "model"), 8, 8), shape(mesh, P("model"), 8, 8))


@added()
def partial_auto_sum(mesh):
    def fn(x):
        def body(x):
            return jnp.sin(x).sum(1)  # <-- here

        return on(mesh, P("data"), P("data"), axis_names={"data"})(body)(x)

    return fn, (shape(mesh, P("data", "model"), 8, 8),)


@added()
def convolution_halo(mesh):
    def fn(x, w):
        return lax.conv_general_dilated(  # <-- here
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    return fn, (shape(mesh, P(None, "data"), 1, 16, 4, 1), shape(mesh, P(), 3, 3, 1, 1))


@added()
def convolution_over_sharded_channels(mesh):
    def fn(x, w):
        return lax.conv_general_dilated(  # <-- here
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    args = shape(mesh, P(None, None, None, "model"), 2, 4, 4, 4)
    return fn, (args, shape(mesh, P(None, None, "model"), 3, 3, 4, 4))


@added()
def mean_of_a_batch(mesh):
    def fn(x):
        return x.mean()  # <-- here

    return fn, (shape(mesh, P("data"), 64),)


@added()
def softmax_over_a_sharded_dim(mesh):
    def fn(x):
        return jax.nn.softmax(x)  # <-- here

    return fn, (shape(mesh, P(None, "model"), 8, 8),)


@added()
def gradient_of_replicated_weights(mesh):
    def fn(w, x):
        def loss(w):
            return (jnp.sin(x @ w)).sum()  # <-- here

        return jax.grad(loss)(w)

    return fn, (shape(mesh, P(), 4, 4), shape(mesh, P("data"), 8, 4))


@added()
def beside_a_declared_psum(mesh):
    def fn(x):
        total = on(mesh, P("data"), P())(lambda x: lax.psum(x, "data"))(x)
        return total + jnp.sin(x).max(0)  # <-- here

    return fn, (shape(mesh, P("data"), 8, 8),)


@added()
def matmul_inside_a_scan(mesh):
    def fn(x, w):
        def step(carry, _):
            return jnp.tanh(carry @ w), None  # <-- here

        return lax.scan(step, x, None, length=5)[0]

    return fn, (shape(mesh, P("data"), 8, 8), shape(mesh, P("model"), 8, 8))


@added()
def loop_until_a_sharded_norm_is_small(mesh):
    def fn(x):
        def is_large(x):
            return jnp.sum(x * x) > 1.0  # <-- here

        return lax.while_loop(is_large, lambda x: x * 0.5, x)

    return fn, (shape(mesh, P("data"), 64),)


@added(eager=True)
def eager_matmul(mesh):
    def fn(x, w):
        return x @ w  # <-- here

    return fn, (shape(mesh, P(None, "data"), 8, 8), shape(mesh, P("data"), 8, 8))
