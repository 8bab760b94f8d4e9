"""jax's page "Manual parallelism with shard_map": its collectives, products and networks."""

import functools
import itertools

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape
from corpus.corpus_moves import exchanged, gathered, permuted, reduced, ring, scattered
from corpus.corpus_public import GRID, public
from jax import lax

PAGE = "201/shard-map"
DOWN = [(i, (i - 1) % 8) for i in range(8)]


@public(PAGE, "proved", reduced(2 * 4 * 4, "Y"), axes=GRID, explicit=True)
def product_summed_over_one_axis(mesh):
    @on(mesh, (P("X", "Y"), P("Y", None)), P("X", None))
    def matmul(a, b):
        return lax.psum(jnp.dot(a, b), "Y")

    return matmul, (shape(mesh, P("X", "Y"), 8, 16), shape(mesh, P("Y", None), 16, 4))


@public(PAGE, "proved", reduced(3 * 6 * 4, "Y"), axes=GRID)
def sum_that_untiles_one_axis(mesh):
    body = on(mesh, P("X", "Y"), P("X", None))(lambda x: lax.psum(x, "Y"))
    return body, (shape(mesh, P("X", "Y"), 12, 12),)


@public(PAGE, "proved", reduced(3 * 6 * 4, "X", "Y"), axes=GRID)
def sum_over_both_axes(mesh):
    body = on(mesh, P("X", "Y"), P(None, None))(lambda x: lax.psum(x, ("X", "Y")))
    return body, (shape(mesh, P("X", "Y"), 12, 12),)


@public(PAGE, "proved", reduced(3 * 6 * 4, "X", "Y"), axes=GRID)
def argument_that_is_whole_everywhere(mesh):
    """Splitting what every device has takes nothing from anybody."""
    body = on(mesh, P("X", "Y"), P(None, None))(lambda x: lax.psum(x, ("X", "Y")))
    return body, (shape(mesh, P(), 12, 12),)


@public(PAGE)
def swapped_carry(mesh):
    @on(mesh, (P("X"), P()), P("X"))
    def fn(x, y):
        y = lax.pcast(y, "X", to="varying")
        swap = lambda carry, _: ((carry[1], carry[0]), ())  # noqa: E731
        return lax.scan(swap, (x, y), (), length=2)[0]

    return fn, (shape(mesh, P("X"), 16), shape(mesh, P(), 2))


def alone(mesh, body, dims=(64,)):
    return on(mesh, P("X"), P("X"))(body), (shape(mesh, P("X"), *dims),)


@public(PAGE, "proved", gathered(64 * 4, "X"))
def all_gather_page(mesh):
    return alone(mesh, lambda x: lax.all_gather(x, "X", tiled=True))


@public(PAGE, "proved", gathered(64 * 4, "X"))
def all_gather_stacked_page(mesh):
    return alone(mesh, lambda x: lax.all_gather(x, "X", tiled=False))


@public(PAGE, "proved", scattered(8 * 4, "X"))
def psum_scatter_page(mesh):
    return alone(mesh, lambda x: lax.psum_scatter(x, "X", tiled=True))


@public(PAGE, "proved", permuted(8 * 4, "X"))
def ppermute_page(mesh):
    return alone(mesh, lambda x: lax.ppermute(x, "X", ring(8)))


@public(PAGE, "proved", exchanged(8 * 4, "X"))
def all_to_all_page(mesh):
    return alone(mesh, lambda x: lax.all_to_all(x, "X", 0, 0, tiled=True))


@public(PAGE, "proved", permuted(4, "X", trips=7))
def scatter_by_permutes(mesh):
    def body(x):
        idx = lax.axis_index("X")
        x = x.reshape(8, -1)
        for i in range(1, 8):
            update = lax.ppermute(x[(idx + i) % 8], "X", DOWN)
            x = x.at[(idx + i + 1) % 8].add(update)
        return x[idx]

    return alone(mesh, body)


def rows_rows(mesh):
    return shape(mesh, P("X", None), 16, 16), shape(mesh, P("X", None), 16, 4)


def columns_rows(mesh):
    return shape(mesh, P(None, "X"), 16, 16), shape(mesh, P("X", None), 16, 4)


ROWS = P("X", None)


@public(PAGE, "proved", gathered(16 * 4 * 4, "X"))
def product_gathered_first(mesh):
    body = on(mesh, (ROWS, ROWS), ROWS)(lambda a, b: a @ lax.all_gather(b, "X", tiled=True))
    return body, rows_rows(mesh)


@public(PAGE, "proved", permuted(2 * 4 * 4, "X", trips=7))
def product_gathered_on_the_way(mesh):
    @on(mesh, (ROWS, ROWS), ROWS)
    def matmul(lhs, rhs):
        idx = lax.axis_index("X")
        block = lambda i: lax.dynamic_slice_in_dim(lhs, i * 2, 2, 1)  # noqa: E731
        out = block(idx) @ rhs
        for i in range(1, 8):
            rhs = lax.ppermute(rhs, "X", ring(8))
            out += block((idx - i) % 8) @ rhs
        return out

    return matmul, rows_rows(mesh)


@public(PAGE, "proved", permuted(4 * 4, "X", trips=14))
def product_gathered_both_ways(mesh):
    @on(mesh, (ROWS, ROWS), ROWS)
    def matmul(lhs, rhs):
        idx = lax.axis_index("X")
        block = lambda i, hi: lax.dynamic_slice_in_dim(lhs, 2 * i + hi, 1, 1)  # noqa: E731
        lo, hi = jnp.split(rhs, 2, axis=0)
        out = block(idx, 0) @ lo + block(idx, 1) @ hi
        for i in range(1, 8):
            lo, hi = lax.ppermute(lo, "X", ring(8)), lax.ppermute(hi, "X", DOWN)
            out += block((idx - i) % 8, 0) @ lo + block((idx + i) % 8, 1) @ hi
        return out

    return matmul, rows_rows(mesh)


@public(PAGE, "proved", scattered(16 * 4 * 4, "X"))
def product_scattered(mesh):
    body = on(mesh, (P(None, "X"), ROWS), ROWS)(
        lambda a, b: lax.psum_scatter(a @ b, "X", tiled=True)
    )
    return body, columns_rows(mesh)


@public(PAGE, "proved", permuted(2 * 4 * 4, "X", trips=7))
def product_scattered_on_the_way(mesh):
    @on(mesh, (P(None, "X"), ROWS), ROWS)
    def matmul(lhs, rhs):
        idx = lax.axis_index("X")
        lhs = lhs.reshape(8, -1, lhs.shape[1])
        out = lhs[(idx + 1) % 8] @ rhs
        for i in range(1, 8):
            out = lax.ppermute(out, "X", DOWN)
            out += lhs[(idx + i + 1) % 8] @ rhs
        return out

    return matmul, columns_rows(mesh)


# Networks

SIZES = (16, 16, 16, 8)


def predict(params, inputs):
    for w, b in params:
        outputs = jnp.dot(inputs, w) + b
        inputs = jax.nn.relu(outputs)
    return outputs


def layers(mesh, w, b):
    return [(shape(mesh, w, n, m), shape(mesh, b, m)) for n, m in itertools.pairwise(SIZES)]


def batch(mesh, spec):
    return shape(mesh, spec, 16, 16), shape(mesh, spec, 16, 8)


def data_parallel_loss(mesh):
    @on(mesh, (P(), P("X")), P())
    def loss(params, batch):
        inputs, targets = batch
        return lax.pmean(jnp.mean(jnp.sum((predict(params, inputs) - targets) ** 2, -1)), "X")

    return loss


@public(PAGE, "proved", reduced(4, "X"))
def data_parallel_value(mesh):
    return data_parallel_loss(mesh), (layers(mesh, P(), P()), batch(mesh, P("X")))


@public(PAGE, "not proved", None)
def data_parallel_gradients(mesh):
    """The sums of the gradients are autodiff's."""
    args = layers(mesh, P(), P()), batch(mesh, P("X"))
    return jax.value_and_grad(data_parallel_loss(mesh)), args


def fully_sharded_loss(mesh):
    @functools.partial(jax.remat, policy=lambda op, *_, **__: str(op) != "all_gather")
    def predict(params, inputs):
        for w, b in params:
            w = lax.all_gather(w, "X", tiled=True)
            b = lax.all_gather(b, "X", tiled=True)
            outputs = jnp.dot(inputs, w) + b
            inputs = jax.nn.relu(outputs)
        return outputs

    @on(mesh, (P("X"), P("X")), P())
    def loss(params, batch):
        inputs, targets = batch
        return lax.pmean(jnp.mean(jnp.sum((predict(params, inputs) - targets) ** 2, -1)), "X")

    return loss


GATHERS = [gathered(n * m * 4, "X") for n, m in itertools.pairwise(SIZES)]
BIASES = [gathered(m * 4, "X") for m in SIZES[1:]]


@public(PAGE, "proved", *GATHERS, *BIASES, reduced(4, "X"))
def fully_sharded_value(mesh):
    return fully_sharded_loss(mesh), (layers(mesh, P("X"), P("X")), batch(mesh, P("X")))


@public(PAGE, "not proved", None)
def fully_sharded_gradients(mesh):
    """The gathers' transposes are autodiff's."""
    args = layers(mesh, P("X"), P("X")), batch(mesh, P("X"))
    return jax.value_and_grad(fully_sharded_loss(mesh)), args


@public(PAGE, "failed", *[scattered(16 * m * 4, "X") for m in SIZES[1:]])
def tensor_parallel_value(mesh):
    @on(mesh, (P(None, "X"), P("X", None), P("X")), P(None, "X"))
    def gemm(inputs, w, b):
        return lax.psum_scatter(jnp.dot(inputs, w), "X", scatter_dimension=1, tiled=True) + b

    def loss(params, batch):
        inputs, targets = batch
        for w, b in params:
            outputs = gemm(inputs, w, b)
            inputs = jax.nn.relu(outputs)
        return jnp.mean(jnp.sum((outputs - targets) ** 2, axis=-1))  # <-- here

    spec = P(None, "X")
    return loss, (layers(mesh, P("X"), P("X")), batch(mesh, spec))


@public(
    *[PAGE, "proved"],
    *[gathered(n * m * 4 // 2, "X") for n, m in itertools.pairwise(SIZES)],
    *[gathered(m * 4 // 2, "X") for m in SIZES[1:]],
    *[scattered(4 * m * 4, "Y") for m in SIZES[1:]],
    *[reduced(4 * 4, "Y"), reduced(4, "X")],
    axes=GRID,
)
def fully_sharded_and_tensor_parallel(mesh):
    @on(mesh, (P(("Y", "X")), P("X", "Y")), P())
    def loss(params, batch):
        inputs, targets = batch
        for w, b in params:
            w = lax.all_gather(w, "X", tiled=True)
            b = lax.all_gather(b, "X", tiled=True)
            part = lax.psum_scatter(jnp.dot(inputs, w), "Y", scatter_dimension=1, tiled=True)
            outputs = part + b
            inputs = jax.nn.relu(outputs)
        error = lax.psum(jnp.sum((outputs - targets) ** 2, axis=-1), "Y")
        return lax.pmean(jnp.mean(error), "X")

    spec = P(("Y", "X"))
    return loss, (layers(mesh, spec, spec), batch(mesh, P("X", "Y")))


@public(PAGE, "proved", permuted(2 * 4 * 4, "X", trips=11), permuted(2 * 4 * 4, "X", trips=11))
def pipeline_of_stages(mesh):
    """4 microbatches through 8 stages: 11 ticks, results travel back as well."""

    @on(mesh, (P("X"), P()), P("X"))
    def fn(w, inputs):
        stage = lax.axis_index("X")

        def tick(carry, t):
            state, outputs = carry
            state = jnp.where(stage == 0, inputs[t % 4], state)
            state = jnp.tanh(state @ w[0])
            outputs = lax.ppermute(jnp.where(stage == 7, state, outputs), "X", DOWN)
            return (lax.ppermute(state, "X", ring(8)), outputs), None

        start = lax.pcast(jnp.zeros((2, 4)), "X", to="varying")
        return lax.scan(tick, (start, start), jnp.arange(11))[0][1]

    return fn, (shape(mesh, P("X"), 8, 4, 4), shape(mesh, P(), 4, 2, 4))
