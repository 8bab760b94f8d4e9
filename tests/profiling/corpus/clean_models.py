"""What people write: steps, layers and loops of real models."""

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape, vary
from corpus.corpus_moves import (
    GRID,
    LINE,
    clean,
    exchanged,
    gathered,
    per_device,
    permuted,
    reduced,
    scattered,
)
from jax import lax

import txcore as tx


@clean(reduced(2 * 16 * 4, "model"), axes=GRID)
def tensor_parallel_mlp(mesh):
    """Columns, then rows: one sum of (2, 16) numbers at the end."""

    def body(x, up, down):
        hidden = jax.nn.relu(x @ up)
        return tx.psum(hidden @ down, "model")

    specs = P("data"), P(None, "model"), P("model")
    args = shape(mesh, specs[0], 8, 16), shape(mesh, specs[1], 16, 32)
    return on(mesh, specs, P("data"))(body), (*args, shape(mesh, specs[2], 32, 16))


@clean(
    *[reduced(2 * 16 * 4, "model"), reduced(2 * 16 * 4, "model")],
    *[reduced(16 * 16 * 4, "data"), reduced(16 * 16 * 4, "data"), reduced(4, "data")],
    axes=GRID,
)
def tensor_parallel_mlp_training(mesh):
    """Backward the input's gradient is summed along model, the weights' along data."""

    def step(x, before, up, down):
        def loss(before, up, down):
            inputs = tx.vary(x * before, "model")
            out = tx.psum(jnp.sin(inputs @ up) @ down, "model")
            return jnp.sin(out).sum()

        weights = before, tx.vary(up, "data"), tx.vary(down, "data")
        value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(*weights)
        return tx.psum(value, "data"), grads[0], tx.psum(grads[1:], "data")

    specs = P("data"), P("data"), P(None, "model"), P("model")
    shapes = (8, 16), (8, 16), (16, 32), (32, 16)
    args = tuple(shape(mesh, s, *dims) for s, dims in zip(specs, shapes, strict=True))
    outs = P(), P("data"), (P(None, "model"), P("model"))
    return on(mesh, specs, outs)(step), args


@clean(permuted(64, "pipe", trips=6), axes={"pipe": 8})
def pipeline_of_ppermutes(mesh):
    def body(w, x):
        def tick(carry, x):
            stage = lax.axis_index("pipe")
            value = jnp.where(stage == 0, x, carry)
            out = jnp.tanh(value * w[0])
            return tx.shift(out, "pipe", wrap=False), out

        return lax.scan(tick, vary(jnp.zeros(16), "pipe"), vary(x, "pipe"))[1][None]

    args = shape(mesh, P("pipe"), 8, 16), shape(mesh, P(), 6, 16)
    return on(mesh, (P("pipe"), P()), P("pipe"))(body), args


@clean(permuted(2 * 64, "data", trips=8), axes=LINE)
def ring_attention(mesh):
    """Keys and values go around the ring together; the last turn brings them home."""

    def body(q, k, v):
        def turn(carry, _):
            out, norm, kv = carry
            k, v = kv
            weight = jnp.exp(q @ k.T)
            kv = tx.shift(jnp.concatenate([k, v]), "data")
            return (out + weight @ v, norm + weight.sum(1), (kv[:1], kv[1:])), None

        start = jnp.zeros_like(q), jnp.zeros_like(q[:, 0]), (k, v)
        (out, norm, _), _ = lax.scan(turn, start, None, length=8)
        return out / norm[:, None]

    return per_device(mesh, body, jnp.float32, jnp.float32, jnp.float32)


@clean(
    *[gathered(8 * 64, "data"), scattered(8 * 64, "data"), reduced(4, "data")],
    elsewhere={"tpu": (gathered(8 * 64, "data"), reduced(8 * 64, "data"), reduced(4, "data"))},
    axes=LINE,
)
def zero_step(mesh):
    """Weights in shards: gathered for use, their gradient scattered."""

    def body(w, x):
        def loss(w):
            return jnp.sin(x * tx.all_gather(w, "data")).sum()

        value, grad = jax.value_and_grad(loss)(w)
        return w - 0.1 * grad, tx.psum(value, "data")

    args = shape(mesh, P("data"), 8, 16), shape(mesh, P("data"), 8, 16)
    return on(mesh, (P("data"), P("data")), (P("data"), P()))(body), args


@clean(
    *[scattered(8 * 64, "data"), gathered(8 * 64, "data")],
    elsewhere={"tpu": (reduced(8 * 64, "data"), gathered(8 * 64, "data"))},
    axes=LINE,
)
def zero_one_update(mesh):
    """Whole weights: the gradient is scattered, the update of each shard gathered."""

    def body(w, x):
        grad = jax.grad(lambda w: jnp.sin(x * w).sum())(vary(w, "data"))
        mine = tx.reduce_scatter(grad, "data", mean=True)
        return w - tx.all_gather(0.1 * mine, "data", invariant=True)

    args = shape(mesh, P(), 8, 16), shape(mesh, P("data"), 8, 16)
    return on(mesh, (P(), P("data")), P())(body), args


@clean(exchanged(8 * 4 * 4, "data"), exchanged(8 * 4 * 4, "data"), axes=LINE)
def mixture_of_experts(mesh):
    """Tokens go to the device of their expert and come back."""

    def body(tokens, expert):
        sent = tx.all_to_all(tokens[0], "data", split_dim=0, concat_dim=0)
        return tx.all_to_all(jnp.tanh(sent @ expert[0]), "data", split_dim=0, concat_dim=0)[None]

    args = shape(mesh, P("data"), 8, 8, 4), shape(mesh, P("data"), 8, 4, 4)
    return on(mesh, (P("data"), P("data")), P("data"))(body), args


@clean(exchanged(2 * 4 * 8 * 4, "model"), exchanged(2 * 4 * 8 * 4, "model"), axes=GRID)
def ulysses_attention(mesh):
    """From a shard of the sequence to a shard of the heads, and back."""

    def body(x):  # on one device (2 batch, 4 sequence, 2 heads, 4 features)
        heads = tx.all_to_all(x, "model", split_dim=2, concat_dim=1)
        mixed = jnp.einsum("bshf,bthf->bsht", heads, heads)
        out = jnp.einsum("bsht,bthf->bshf", jax.nn.softmax(mixed), heads)
        return tx.all_to_all(out, "model", split_dim=1, concat_dim=2)

    spec = P("data", "model")
    return on(mesh, spec, spec)(body), (shape(mesh, spec, 8, 8, 2, 4),)


@clean(reduced(2 * 16 * 4, "data"), axes=LINE)
def synchronised_batch_statistics(mesh):
    """Mean and variance in one sum."""

    def body(x):
        total, squares = tx.pmean(jnp.stack([x[0], x[0] ** 2]), "data")
        return (x - total) * lax.rsqrt(squares - total**2 + 1e-5)

    return per_device(mesh, body)
