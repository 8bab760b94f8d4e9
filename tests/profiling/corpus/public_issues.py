"""What people reported and asked: small programs in the style of public issues."""

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape
from corpus.corpus_moves import exchanged, reduced
from corpus.corpus_public import AS_COMPILED, GRID, asked, public
from jax import lax
from jax.sharding import NamedSharding, reshard


@public("jax-ml/jax 20381", AS_COMPILED)
def rows_shuffled_each_by_itself(mesh):
    def fn(key, rows):
        keys = jax.random.split(key, rows.shape[0])
        return jax.vmap(jax.random.permutation)(keys, rows)

    key = jax.eval_shape(lambda: jax.random.key(0))
    return fn, (key, shape(mesh, P("X"), 8, 16, 4))


@public("jax-ml/jax 23052", AS_COMPILED)
def static_rows_set(mesh):
    args = shape(mesh, P("X"), 16, 4), shape(mesh, P(), 3, 4)
    return lambda x, new: x.at[0:3].set(new), args


@public("jax-ml/jax 23052", AS_COMPILED)
def indexed_rows_set(mesh):
    args = shape(mesh, P("X"), 16, 4), shape(mesh, P(), 3, dtype=jnp.int32), shape(mesh, P(), 3, 4)
    return lambda x, at, new: x.at[at].set(new), args


@public("jax-ml/jax 24576", AS_COMPILED)
def concatenated_shards(mesh):
    args = shape(mesh, P("X"), 8), shape(mesh, P("X"), 24)
    return lambda a, b: jnp.concatenate([a, b]), args


@public("jax-ml/jax 25010", AS_COMPILED, axes=GRID)
def rematerialized_layer_left_to_the_compiler(mesh):
    @jax.checkpoint
    def layer(x, up, down):
        return jax.nn.relu(x @ up) @ down

    def loss(up, down, x):
        return jnp.sum(layer(x, up, down) ** 2)

    args = shape(mesh, P("X", "Y"), 16, 32), shape(mesh, P("Y", "X"), 32, 16)
    return jax.grad(loss, argnums=(0, 1)), (*args, shape(mesh, P("X"), 8, 16))


@public("jax-ml/jax 36886", "not proved", None)
def gradients_of_closed_over_weights(mesh):
    """The weights are equal on all devices, so that autodiff sums their gradients."""

    def fn(weights, samples):
        def of_one(x):
            return jax.grad(lambda p: jnp.sin(jnp.dot(p, x)))(weights)

        return jax.vmap(of_one)(samples)

    return on(mesh, (P(), P("X")), P("X"))(fn), (shape(mesh, P(), 2), shape(mesh, P("X"), 16, 2))


@public("jax-ml/jax 3970", "not proved", None)
def gradient_of_a_summed_loss(mesh):
    def fn(w, data):
        return jax.value_and_grad(lambda w: lax.psum(jnp.sum((w**2 + 1) * data), "X"))(w)

    return on(mesh, (P(), P("X")), P())(fn), (shape(mesh, P()), shape(mesh, P("X"), 16))


@public("jax-ml/jax 15982", "not proved", None)
def gradient_of_an_exchange(mesh):
    @on(mesh, (P("X", None),), P(None, "X"))
    def turn(x):
        return lax.all_to_all(x, "X", split_axis=1, concat_axis=0, tiled=True)

    return jax.grad(lambda x: jnp.sin(turn(x)).sum()), (shape(mesh, P("X", None), 16, 16),)


@public("jax-ml/jax 19601", "proved", reduced(8 * 4, "X", "Y"), axes=GRID)
def collective_over_two_axes(mesh):
    body = on(mesh, P(("X", "Y")), P())(lambda x: lax.psum(x, ("X", "Y")))
    return body, (shape(mesh, P(("X", "Y")), 64),)


@public("jax-ml/jax 19709", "proved", None)
def scatter_in_groups_of_an_axis(mesh):
    @on(mesh, P(None, "X"), P(None, "X"), check_vma=False)
    def fn(x):
        groups = ((0, 2, 4, 6), (1, 3, 5, 7))
        return lax.psum_scatter(x, "X", axis_index_groups=groups, tiled=True)

    return fn, (shape(mesh, P(None, "X"), 8, 8),)


@public("jax-ml/jax 34249", "proved", reduced(2 * 8 * 4, "X"))
def vmap_of_a_sum_by_hand(mesh):
    count = on(mesh, P("X"), P(None))(lambda x: lax.psum(x, "X"))
    return jax.vmap(count), (shape(mesh, P(None, "X"), 2, 64),)


@public("jax-ml/jax 29162", "not proved", None, explicit=True)
def gradients_of_samples_under_an_explicit_mesh(mesh):
    def per_sample(w, x):
        return jax.vmap(jax.grad(lambda w, x: jnp.sum(jnp.sin(w * x))), in_axes=(None, 0))(w, x)

    args = shape(mesh, P(), 3), shape(mesh, P("X", None), 16, 3)
    return on(mesh, (P(), P("X", None)), P("X", None))(per_sample), args


@public("jax-ml/jax 28334")
def argmax_by_hand(mesh):
    body = on(mesh, P("X", None), P("X", None))(lambda x: x.argmax(-1, keepdims=True))
    return body, (shape(mesh, P("X", None), 16, 16),)


@public("marin-community/marin 6470", AS_COMPILED)
def foreign_call_left_to_the_compiler(mesh):
    """A factorization is a foreign call, whose batch is split."""
    return jnp.linalg.cholesky, (shape(mesh, P("X", None, None), 8, 4, 4),)


@public("marin-community/marin 6470")
def foreign_call_by_hand(mesh):
    body = on(mesh, P("X"), P("X"))(jnp.linalg.cholesky)
    return body, (shape(mesh, P("X", None, None), 8, 4, 4),)


def weights_of(mesh):
    return shape(mesh, P(None, None, reduced={"X"}), 4, 4), shape(mesh, P("X", None), 8, 4)


@public("AI-Hypercomputer/maxtext 5099", explicit=True)
def microbatch_of_deferred_gradients(mesh):
    """A program by itself: the sum of the gradients is another's."""
    total = shape(mesh, P(None, None, unreduced={"X"}), 4, 4)

    def microbatch(total, w, x):
        return total + jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w)

    return microbatch, (total, *weights_of(mesh))


@public("AI-Hypercomputer/maxtext 5099", "proved", asked(4 * 4 * 4, "X"), explicit=True)
def update_from_deferred_gradients(mesh):
    total = shape(mesh, P(None, None, unreduced={"X"}), 4, 4)

    def update(total, w):
        return reshard(w, P(None, None)) - 0.1 * reshard(total, P(None, None))

    return update, (total, weights_of(mesh)[0])


@public("AI-Hypercomputer/maxtext 5104", AS_COMPILED)
def sharded_optimizer_with_accumulation(mesh):
    def step(w, moment, batches):
        def microbatch(total, x):
            return total + jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w), None

        grads = lax.scan(microbatch, jnp.zeros_like(w), batches)[0]
        shards = NamedSharding(mesh, P("X"))
        moment = 0.9 * moment + lax.with_sharding_constraint(grads, shards)
        return w - lax.with_sharding_constraint(moment, NamedSharding(mesh, P())), moment

    args = shape(mesh, P(), 8, 8), shape(mesh, P("X"), 8, 8), shape(mesh, P(None, "X"), 3, 8, 8)
    return step, args


@public("openxla/xla 42481", AS_COMPILED, axes=GRID)
def embedding_gradient_left_to_the_compiler(mesh):
    def loss(table, tokens, w):
        return jnp.sum(jnp.sin(table[tokens] @ w))

    args = shape(mesh, P("Y", None), 16, 8), shape(mesh, P("X", None), 8, 4, dtype=jnp.int32)
    return jax.grad(loss), (*args, shape(mesh, P(None, "Y"), 8, 8))


@public("jax-ml/jax 25844", "not proved", None)
def gradient_of_a_mean_by_hand(mesh):
    mean = on(mesh, P("X"), P("X"))(lambda x: lax.pmean(x, "X") * x)
    return jax.grad(lambda x: jnp.sum(jnp.sin(mean(x)))), (shape(mesh, P("X"), 16),)


@public("jax-ml/jax 19175", "not proved", reduced(4 * 4 * 4, "X"))
def sum_in_a_backward_rule(mesh):
    """The rule's author wrote the sum; jax's names tell it from autodiff's only if it has a tag."""

    @jax.custom_vjp
    def product(w, x):
        return x @ w

    def backward(kept, out):
        w, x = kept
        return lax.psum(x.T @ out, "X"), out @ w.T

    product.defvjp(lambda w, x: (x @ w, (w, x)), backward)

    def fn(w, x):
        return jax.grad(lambda w: jnp.sum(product(w, x) ** 2))(w)

    args = shape(mesh, P(), 4, 4), shape(mesh, P("X"), 16, 4)
    return on(mesh, (P(), P("X")), P())(fn), args


@public("jax-ml/jax 19663", "proved", exchanged(2 * 8 * 4, "X"), axes=GRID)
def exchange_along_one_axis_of_two(mesh):
    body = on(mesh, P("X", "Y"), P("X", "Y"))(lambda x: lax.all_to_all(x, "X", 1, 0, tiled=True))
    return body, (shape(mesh, P("X", "Y"), 8, 16),)
