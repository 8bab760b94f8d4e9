"""Draw text from a trained model, on one device."""

from typing import Any

import jax
import jax.numpy as jnp
import model
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import txcore as tx


def gather(params: Any, mesh: tx.MeshSpec) -> Any:
    """Return parameters whole, on the host, as `model.init` does; every process has to come."""
    whole = jax.device_put(params, NamedSharding(mesh.mesh, P()))
    host = jax.tree.map(np.asarray, whole)
    norm = host["blocks"]["norm1"]
    layers = norm.size // norm.shape[-1]
    blocks = {
        name: leaf.reshape(layers, *leaf.shape[norm.ndim - 1 :])
        for name, leaf in host["blocks"].items()
    }
    return {**host, "blocks": blocks}


def draw(config: model.GPT, params: Any, prompt: np.ndarray, count: int, seed: int) -> str:
    """Return text that the model draws after a prompt.

    Args:
      config: the model.
      params: whole, as `gather` returns them.
      prompt: bytes; the last `config.length` of them count.
      count: bytes to draw.
      seed: of the draws.
    """
    device = jax.local_devices()[0]
    mesh = tx.MeshSpec([device], axes=model.AXES, shape=(1,) * len(model.AXES))

    def logits_of(params: Any, tokens: jax.Array) -> jax.Array:
        first, block, _ = model.functions(config, lambda tree: tree)
        batch = {"tokens": tokens}
        x = block(params["blocks"], first(params, batch), batch, 0)
        return model.head(config, params, x)

    @jax.jit
    def next_token(params: Any, tokens: jax.Array, last: Any, key: jax.Array) -> jax.Array:
        columns = P(None, None, "model")
        run = jax.shard_map(logits_of, mesh=mesh.mesh, in_specs=(P(), P()), out_specs=columns)
        return jax.random.categorical(key, run(params, tokens)[0, last])

    tokens = np.zeros(config.length, np.int32)
    held = min(len(prompt), config.length)
    tokens[:held] = prompt[len(prompt) - held :]
    params = jax.device_put(params, NamedSharding(mesh.mesh, P()))
    drawn = bytearray()
    for key in jax.random.split(jax.random.key(seed), count):
        token = int(next_token(params, jnp.asarray(tokens[None]), held - 1, key))
        drawn.append(token)
        if held == config.length:
            tokens = np.roll(tokens, -1)
            held -= 1
        tokens[held] = token
        held += 1
    return drawn.decode(errors="replace")
