"""Steps and layers in the style of public training code: MaxText, levanter, flax, Megatron."""

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape, vary
from corpus.corpus_moves import exchanged, gathered, permuted, reduced, ring, scattered
from corpus.corpus_public import AS_COMPILED, GRID, public
from jax import lax
from jax.sharding import NamedSharding, reshard


def attend(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


@public("AI-Hypercomputer/maxtext decoder layer", AS_COMPILED, axes=GRID)
def decoder_layer_with_constraints(mesh):
    """Weights in shards of their dims (X) and heads (Y); activations by constraint."""

    def constrain(x, *names):
        return lax.with_sharding_constraint(x, NamedSharding(mesh, P(*names)))

    def loss(w, x):
        x = constrain(x, "X", None, None)
        q, k, v = (jnp.einsum("bse,ehd->bshd", x, w[name]) for name in ("q", "k", "v"))
        out = attend(constrain(q, "X", None, "Y", None), k, v)
        x = constrain(x + jnp.einsum("bshd,hde->bse", out, w["o"]), "X", None, None)
        hidden = constrain(jax.nn.silu(x @ w["up"]), "X", None, "Y")
        return jnp.mean(constrain(x + hidden @ w["down"], "X", None, None) ** 2)

    heads = shape(mesh, P("X", "Y", None), 8, 2, 4)
    w = {
        **{"q": heads, "k": heads, "v": heads, "o": shape(mesh, P("Y", None, "X"), 2, 4, 8)},
        **{"up": shape(mesh, P("X", "Y"), 8, 16), "down": shape(mesh, P("Y", "X"), 16, 8)},
    }
    return jax.value_and_grad(loss), (w, shape(mesh, P("X"), 8, 4, 8))


@public("AI-Hypercomputer/maxtext shard_mode: explicit", "proved", None, axes=GRID, explicit=True)
def feed_forward_with_its_shardings_written(mesh):
    """Weights are gathered by a reshard; the second product asks for its sum."""

    def layer(x, up, down):
        up, down = reshard(up, P(None, "Y")), reshard(down, P("Y", None))
        hidden = jax.nn.silu(jnp.einsum("be,ef->bf", x, up, out_sharding=P("X", "Y")))
        return x + jnp.einsum("bf,fe->be", hidden, down, out_sharding=P("X", None))

    args = shape(mesh, P("X", "Y"), 8, 16), shape(mesh, P("Y", "X"), 16, 8)
    return layer, (shape(mesh, P("X", None), 8, 8), *args)


@public("marin-community/levanter fsdp", AS_COMPILED)
def stacked_blocks_left_to_the_compiler(mesh):
    def loss(blocks, x):
        def block(x, w):
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        return jnp.mean(lax.scan(block, x, blocks)[0] ** 2)

    blocks = {
        "up": shape(mesh, P(None, "X"), 3, 8, 16),
        "down": shape(mesh, P(None, None, "X"), 3, 16, 8),
    }
    return jax.value_and_grad(loss), (blocks, shape(mesh, P("X"), 8, 8))


@public(
    *["marin-community/levanter fsdp", "proved"],
    *[gathered(8 * 16 * 4, "X", trips=3), gathered(16 * 8 * 4, "X", trips=3)],
)
def stacked_blocks_by_hand(mesh):
    @on(mesh, (P(None, "X"), P("X")), P("X"))
    def forward(blocks, x):
        def block(x, w):
            up = lax.all_gather(w["up"], "X", tiled=True)
            return x + jnp.tanh(x @ up) @ lax.all_gather(w["down"], "X", tiled=True), None

        return lax.scan(block, x, blocks)[0]

    blocks = {
        "up": shape(mesh, P(None, "X"), 3, 8, 16),
        "down": shape(mesh, P(None, "X"), 3, 16, 8),
    }
    return forward, (blocks, shape(mesh, P("X"), 8, 8))


@public("google/flax data parallel step", "proved", reduced(4, "X"), reduced((4 * 4 + 4) * 4, "X"))
def data_parallel_step_by_hand(mesh):
    @on(mesh, (P(), P("X"), P("X")), P())
    def step(params, x, y):
        def loss(params):
            return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)

        local = jax.tree.map(lambda p: vary(p, "X"), params)
        value, grads = jax.value_and_grad(loss)(local)
        grads = lax.pmean(grads, "X")
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), lax.pmean(value, "X")

    params = {"kernel": shape(mesh, P(), 4, 4), "bias": shape(mesh, P(), 4)}
    return step, (params, shape(mesh, P("X"), 16, 4), shape(mesh, P("X"), 16, 4))


@public("google/flax data parallel step", AS_COMPILED)
def data_parallel_step_left_to_the_compiler(mesh):
    def step(params, x, y):
        def loss(params):
            return jnp.mean((x @ params["kernel"] + params["bias"] - y) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), value

    params = {"kernel": shape(mesh, P(), 4, 4), "bias": shape(mesh, P(), 4)}
    return step, (params, shape(mesh, P("X"), 16, 4), shape(mesh, P("X"), 16, 4))


@public(
    *["NVIDIA/Megatron-LM sequence parallel", "proved"],
    *[gathered(4 * 8 * 4, "Y"), scattered(4 * 8 * 4, "Y")],
    axes=GRID,
)
def sequence_parallel_mlp(mesh):
    @on(mesh, (P("X", "Y"), P(None, "Y"), P("Y")), P("X", "Y"))
    def mlp(x, up, down):
        x = lax.all_gather(x, "Y", axis=1, tiled=True)
        out = jax.nn.gelu(x @ up) @ down
        return lax.psum_scatter(out, "Y", scatter_dimension=1, tiled=True)

    args = shape(mesh, P(None, "Y"), 8, 16), shape(mesh, P("Y"), 16, 8)
    return mlp, (shape(mesh, P("X", "Y"), 4, 4, 8), *args)


@public(
    *["marin-community/levanter 325", "proved"],
    *[gathered(16 * 4 * 4, "X"), scattered(16 * 4 * 4, "X"), reduced(4 * 4 * 4, "Y")],
    axes=GRID,
)
def hybrid_sharded_step(mesh):
    """Gradients are scattered within a group, and their shards summed across groups."""

    @on(mesh, (P("X"), P(("X", "Y"))), P("X"))
    def step(w, x):
        whole = vary(lax.all_gather(w, "X", tiled=True), "X", "Y")
        grads = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(whole)
        mine = lax.psum_scatter(grads, "X", tiled=True)
        return w - 0.1 * lax.psum(mine, "Y")

    return step, (shape(mesh, P("X"), 16, 4), shape(mesh, P(("X", "Y")), 8, 16))


@public("ring attention", "proved", permuted(2 * 2 * 4 * 4, "X", trips=8))
def ring_attention_in_a_loop(mesh):
    @on(mesh, (P("X"), P("X"), P("X")), P("X"))
    def attention(q, k, v):
        def turn(_, carry):
            out, kv = carry
            out = out + jax.nn.softmax(q @ kv[0].T) @ kv[1]
            return out, lax.ppermute(kv, "X", ring(8))

        return lax.fori_loop(0, 8, turn, (jnp.zeros_like(q), jnp.stack([k, v])))[0]

    return attention, (shape(mesh, P("X"), 16, 4),) * 3


@public("mixture of experts", "proved", exchanged(8 * 4 * 4, "X", trips=2))
def experts_by_hand(mesh):
    @on(mesh, (P("X"), P("X")), P("X"))
    def layer(tokens, expert):
        sent = lax.all_to_all(tokens, "X", 0, 0, tiled=True)
        return lax.all_to_all(jnp.tanh(sent @ expert[0]), "X", 0, 0, tiled=True)

    return layer, (shape(mesh, P("X"), 64, 4), shape(mesh, P("X"), 8, 4, 4))


@public("google-deepmind/optax global norm", "proved", reduced(4, "X"))
def global_norm_of_shards(mesh):
    @on(mesh, (P("X"), P("X")), (P("X"), P("X")))
    def clip(a, b):
        norm = jnp.sqrt(lax.psum(jnp.sum(a**2) + jnp.sum(b**2), "X"))
        return a / jnp.maximum(1.0, norm), b / jnp.maximum(1.0, norm)

    return clip, (shape(mesh, P("X"), 16), shape(mesh, P("X"), 8, 4))


@public("halo exchange", "proved", permuted(4 * 4, "X", trips=2))
def convolution_with_halos(mesh):
    down = [(i, i - 1) for i in range(1, 8)]
    up = [(i, i + 1) for i in range(7)]

    @on(mesh, P("X"), P("X"))
    def blur(x):
        above, below = lax.ppermute(x[-1:], "X", up), lax.ppermute(x[:1], "X", down)
        x = jnp.concatenate([above, x, below])
        return (x[:-2] + x[1:-1] + x[2:]) / 3

    return blur, (shape(mesh, P("X"), 32, 4),)


@public("local SGD", "proved", reduced(4 * 4, "X", trips=6))
def sum_every_third_step(mesh):
    @on(mesh, (P("X"), P("X")), P("X"))
    def steps(w, x):
        def step(w, i):
            w = w - 0.1 * jnp.sin(w * x[0])
            mean = lambda w: vary(lax.pmean(w, "X"), "X")  # noqa: E731
            return lax.cond(i % 3 == 2, mean, lambda w: w, w), None

        return lax.scan(step, w, jnp.arange(6))[0]

    return steps, (shape(mesh, P("X"), 8, 4), shape(mesh, P("X"), 8, 4))


@public(
    *["NVIDIA/Megatron-LM vocabulary parallel loss", "proved"],
    *[reduced(2 * 4, "Y"), reduced(2 * 4, "Y"), reduced(2 * 4, "Y")],
    axes=GRID,
)
def vocabulary_parallel_loss(mesh):
    @on(mesh, (P("X", "Y"), P("X")), P("X"))
    def loss(logits, target):
        most = lax.pmax(logits.max(-1), "Y")
        total = lax.psum(jnp.exp(logits - most[:, None]).sum(-1), "Y")
        mine = target - lax.axis_index("Y") * logits.shape[1]
        inside = (mine >= 0) & (mine < logits.shape[1])
        picked = jnp.take_along_axis(logits, jnp.clip(mine, 0, 7)[:, None], 1)[:, 0]
        return most + jnp.log(total) - lax.psum(jnp.where(inside, picked, 0.0), "Y")

    return loss, (shape(mesh, P("X", "Y"), 8, 16), shape(mesh, P("X"), 8, dtype=jnp.int32))


@public("partial-auto shard_map", "proved", reduced(4 * 4, "X"), axes=GRID)
def manual_over_one_axis(mesh):
    """The other axis is the compiler's: elementwise work takes nothing from it."""

    @jax.shard_map(mesh=mesh, in_specs=P("X"), out_specs=P(), axis_names={"X"})
    def mean(x):
        return lax.pmean(jnp.sin(x), "X")

    return mean, (shape(mesh, P("X"), 4, 4),)


@public("partial-auto shard_map", "failed", reduced(4, "X"), axes=GRID)
def manual_over_one_axis_with_a_product_over_the_other(mesh):
    @jax.shard_map(mesh=mesh, in_specs=(P("X"), P()), out_specs=P(), axis_names={"X"})
    def loss(x, w):
        out = x @ w  # <-- here
        return lax.psum(jnp.sin(out)[0, 0], "X")

    return loss, (shape(mesh, P("X", "Y"), 4, 8), shape(mesh, P("Y"), 8, 4))
