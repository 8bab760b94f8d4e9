"""A decoder's training step, its communication written out, and its automatically sharded twin.

Heads, hidden features and vocabulary are sharded over `model`, and between the layers the sequence
is (Korthikanti et al., Reducing Activation Recomputation, 2022); the batch is sharded over `data`,
and so is the momentum (ZeRO 1). Further axes hold replicas of all that. Along `model` the
collectives are txcore's, since autodiff transposes them, along `data` plain jax's.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from audit_cases import P, on, shape
from jax import lax
from jax.sharding import NamedSharding

import txcore as tx

LEARNING_RATE, DECAY = 0.1, 0.9


@dataclass(frozen=True)
class Sizes:
    """batch is that of one data shard; the rest is the whole model's."""

    layers: int
    batch: int
    sequence: int
    features: int
    heads: int
    head: int
    hidden: int
    vocabulary: int
    dtype: str = "bfloat16"


# Each weight's features, which ZeRO shards, are dim 1; scales are whole on every device.
WHOLE = {"scales": P(), "scale": P()}
SPECS = WHOLE | {
    "qkv": P(None, None, None, "model"),
    "out": P(None, None, "model"),
    "up": P(None, None, "model"),
    "down": P(None, None, "model"),
    "head": P("model"),
}
MOMENTUM_SPECS = WHOLE | {
    "qkv": P(None, "data", None, "model"),
    "out": P(None, "data", "model"),
    "up": P(None, "data", "model"),
    "down": P(None, "data", "model"),
    "head": P("model", "data"),
}
SHARDED = ("qkv", "out", "up", "down", "head")
STACKED = ("scales", "qkv", "out", "up", "down")


def dims_of(s):
    return {
        "scales": (s.layers, 2, s.features),
        "scale": (s.features,),
        "qkv": (s.layers, s.features, 3, s.heads, s.head),
        "out": (s.layers, s.features, s.heads, s.head),
        "up": (s.layers, s.features, s.hidden),
        "down": (s.layers, s.features, s.hidden),
        "head": (s.vocabulary, s.features),
    }


def norm(x, scale):
    x32 = x.astype(jnp.float32)
    return (x32 * lax.rsqrt((x32**2).mean(-1, keepdims=True) + 1e-6) * scale).astype(x.dtype)


def attention(x, qkv, out):
    """Return what these heads contribute; x is (batch, sequence, features)."""
    q, k, v = jnp.einsum("bsf,fchk->cbshk", x, qkv.astype(x.dtype))
    scores = jnp.einsum("bshk,bthk->bhst", q, k).astype(jnp.float32) / q.shape[-1] ** 0.5
    at = jnp.arange(x.shape[1])
    weights = jax.nn.softmax(jnp.where(at[:, None] >= at, scores, -1e30)).astype(x.dtype)
    mixed = jnp.einsum("bhst,bthk->bshk", weights, v)
    return jnp.einsum("bshk,fhk->bsf", mixed, out.astype(x.dtype))


def mlp(x, up, down):
    """Return what these hidden features contribute."""
    hidden = jax.nn.gelu(jnp.einsum("bsf,fg->bsg", x, up.astype(x.dtype)))
    return jnp.einsum("bsg,fg->bsf", hidden, down.astype(x.dtype))


def logits_of(x, head):
    head = head.astype(x.dtype)
    return jnp.einsum("bsf,vf->bsv", x, head, preferred_element_type=jnp.float32)


def layer(x, w, plain_mlp):
    """Run a layer on this device's part of the sequence."""
    whole = tx.all_gather(norm(x, w["scales"][0]), "model", dim=1, name="attention")
    part = attention(whole, w["qkv"], w["out"])
    x = x + tx.reduce_scatter(part, "model", dim=1, name="attention")
    if plain_mlp:
        whole = lax.all_gather(norm(x, w["scales"][1]), "model", axis=1, tiled=True)
        part = mlp(whole, w["up"], w["down"])
        return x + lax.psum_scatter(part, "model", scatter_dimension=1, tiled=True)
    whole = tx.all_gather(norm(x, w["scales"][1]), "model", dim=1, name="mlp")
    part = mlp(whole, w["up"], w["down"])
    return x + tx.reduce_scatter(part, "model", dim=1, name="mlp")


def cross_entropy(logits, labels):
    """Return the mean loss of logits (batch, sequence, part of the vocabulary)."""
    top = lax.pmax(lax.stop_gradient(logits.max(-1)), "model")
    shifted = logits - top[..., None]
    first = lax.axis_index("model") * logits.shape[-1]
    is_label = labels[..., None] == first + jnp.arange(logits.shape[-1])
    sums = jnp.exp(shifted).sum(-1), jnp.where(is_label, shifted, 0).sum(-1)
    total, label = tx.psum(sums, "model", name="loss")
    return (jnp.log(total) - label).mean()


def local_loss(params, batch, plain_mlp):
    layers = {name: params[name] for name in STACKED}
    x = lax.scan(lambda x, w: (layer(x, w, plain_mlp), None), batch["x"], layers)[0]
    whole = tx.all_gather(norm(x, params["scale"]), "model", dim=1, name="head")
    return cross_entropy(logits_of(whole, params["head"]), batch["labels"])


def sync(grads, replicas):
    """Average over the data shards: this device's part of each weight's gradient."""
    size, mine = lax.axis_size("data"), {}
    for name in SHARDED:
        part = lax.psum_scatter(grads[name], "data", scatter_dimension=1, tiled=True)
        mine[name] = part / size
    if replicas:
        mine = tx.pmean(mine, replicas, name="grads")
    count = size * lax.axis_size(replicas)
    for name in WHOLE:
        mine[name] = lax.psum(grads[name], (*replicas, "data", "model")) / count
    return mine


def gather_update(momentum):
    """Put each weight's update together again from the data shards."""
    whole = {name: momentum[name] for name in WHOLE}
    for name in SHARDED:
        whole[name] = lax.all_gather(momentum[name], "data", axis=1, tiled=True, to="invarying")
    return whole


def build(sizes, *, plain_mlp=False):
    """Return build(mesh) of the explicit step: (params, momentum, batch) -> the same and loss."""

    def loss_of(params, batch):
        return local_loss(params, batch, plain_mlp)

    def build_on(mesh):
        replicas = tuple(a for a in mesh.axis_names if a not in ("data", "model"))

        def step(params, momentum, batch):
            local = params | {name: tx.vary(params[name], "model") for name in WHOLE}
            loss, grads = tx.value_and_grad(loss_of, axis=(*replicas, "data"))(local, batch)
            grads = sync(grads, replicas)
            momentum = jax.tree.map(lambda m, g: DECAY * m + g, momentum, grads)
            update = gather_update(momentum)
            params = jax.tree.map(lambda p, u: p - LEARNING_RATE * u, params, update)
            return params, momentum, lax.pmean(loss, (*replicas, "data"))

        state = SPECS, MOMENTUM_SPECS
        specs = (*state, batch_specs(mesh))
        return on(mesh, specs, (*state, P()))(step), arguments(sizes, mesh)

    return build_on


def batch_specs(mesh):
    data = tuple(a for a in mesh.axis_names if a != "model")
    return {"x": P(data, "model"), "labels": P(data)}


def arguments(s, mesh):
    specs = batch_specs(mesh)
    rows = s.batch * mesh.size // mesh.shape["model"]
    x = shape(mesh, specs["x"], rows, s.sequence, s.features, dtype=jnp.dtype(s.dtype))
    labels = shape(mesh, specs["labels"], rows, s.sequence, dtype=jnp.int32)
    params, momentum = (
        {name: shape(mesh, of[name], *dims) for name, dims in dims_of(s).items()}
        for of in (SPECS, MOMENTUM_SPECS)
    )
    return params, momentum, {"x": x, "labels": labels}


def whole_loss(params, batch):
    """Compute the same loss on whole arrays."""

    def run(x, w):
        x = x + attention(norm(x, w["scales"][0]), w["qkv"], w["out"])
        return x + mlp(norm(x, w["scales"][1]), w["up"], w["down"]), None

    x = lax.scan(run, batch["x"], {name: params[name] for name in STACKED})[0]
    logits = logits_of(norm(x, params["scale"]), params["head"])
    label = jnp.take_along_axis(logits, batch["labels"][..., None], -1)[..., 0]
    return (jax.nn.logsumexp(logits, -1) - label).mean()


def whole_step(params, momentum, batch):
    loss, grads = jax.value_and_grad(whole_loss)(params, batch)
    momentum = jax.tree.map(lambda m, g: DECAY * m + g, momentum, grads)
    return jax.tree.map(lambda p, m: p - LEARNING_RATE * m, params, momentum), momentum, loss


def build_twin(sizes):
    """Return build(mesh) of the same step with the communication left to the partitioner."""

    def build_on(mesh):
        def place(specs):
            return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

        outs = place(SPECS), place(MOMENTUM_SPECS), place(P())
        return jax.jit(whole_step, out_shardings=outs), arguments(sizes, mesh)

    return build_on
