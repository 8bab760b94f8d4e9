"""A GPT's training step by hand, for a search: rows over "data", heads and hidden units over
"model", layers in a scan that keeps what a policy says."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import txcore as tx

POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def build(
    mesh, batch=8, remat="none", *, layers=2, width=64, heads=8, length=32, vocabulary=128
):  # fmt: skip
    """Return the step and its arguments: shapes.

    Raises:
      ValueError: the mesh's sizes do not divide the batch or the heads.
    """
    sizes = dict(mesh.shape)
    if batch % sizes["data"] or heads % sizes["model"]:
        raise ValueError(f"{batch} rows and {heads} heads do not divide by the mesh {sizes}")
    features = width // heads

    def attend(x, w):
        q, k, v = jnp.moveaxis(jnp.einsum("bse,cehd->cbshd", x, w), 0, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / features**0.5
        mask = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9))
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v)

    def layer(x, w):
        inside = tx.vary(x, "model")
        out = jnp.einsum("bshd,hde->bse", attend(inside, w["qkv"]), w["out"])
        x = x + tx.psum(out, "model", name="attention")
        inside = tx.vary(x, "model")
        out = jax.nn.gelu(inside @ w["up"]) @ w["down"]
        return x + tx.psum(out, "model", name="mlp"), None

    def step(params, tokens):
        def loss(params):
            cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
            kept = functools.partial(jax.checkpoint, policy=POLICIES[remat])
            x = lax.scan(kept(layer), cast["embedding"][tokens], cast["blocks"])[0]
            logits = (x @ cast["head"]).astype(jnp.float32)
            return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 0])

        value, grads = tx.value_and_grad(loss, axis="data")(tx.vary(params, "data"))
        grads = tx.pmean(grads, "data", name="grads")
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return params, tx.pmean(value, "data", name="loss")

    specs = {
        "embedding": P(),
        "head": P(),
        "blocks": {
            "qkv": P(None, None, None, "model"),
            "out": P(None, "model"),
            "up": P(None, None, "model"),
            "down": P(None, "model"),
        },
    }
    shapes = {
        "embedding": (vocabulary, width),
        "head": (width, vocabulary),
        "blocks": {
            "qkv": (layers, 3, width, heads, features),
            "out": (layers, heads, features, width),
            "up": (layers, width, 4 * width),
            "down": (layers, 4 * width, width),
        },
    }
    is_leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(
        lambda dims, spec: jax.ShapeDtypeStruct(
            dims, jnp.float32, sharding=NamedSharding(mesh, spec)
        ),
        shapes,
        specs,
        is_leaf=is_leaf,
    )
    rows = NamedSharding(mesh, P("data"))
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32, sharding=rows)
    fn = jax.shard_map(step, mesh=mesh, in_specs=(specs, P("data")), out_specs=(specs, P()))
    return jax.jit(fn, donate_argnums=0), (params, tokens)


def build_large(mesh, batch=64, remat="none"):
    """Return 16 layers of width 4096: 3.5 billion parameters, which fill an H100's memory."""
    return build(mesh, batch, remat, layers=16, width=4096, heads=32, length=2048, vocabulary=32768)
