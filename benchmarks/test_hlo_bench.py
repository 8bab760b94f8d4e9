"""Time of reading a large module: a transformer unrolled layer by layer, 8 collectives of its own
and their transposes in each, none combined.

`TXCORE_BENCH_LAYERS=170` makes it more than 100,000 lines and 2,000 collectives, which takes a
minute and a half to compile; 12 layers by default.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from txcore.profiling import audit_text
from txcore.profiling.hlo import find_collectives

LAYERS = int(os.environ.get("TXCORE_BENCH_LAYERS", "12"))
WIDTH = 64
SPECS = {
    "q": P("data", "model"),
    "out": P("model", "data"),
    "up": P("data", "model"),
    "down": P("model", "data"),
    "scale": P(),
}
SHAPES = {
    "q": (WIDTH, WIDTH),
    "out": (WIDTH, WIDTH),
    "up": (WIDTH, 4 * WIDTH),
    "down": (4 * WIDTH, WIDTH),
    "scale": (WIDTH,),
}


def make_block(h, weights):
    q = lax.all_gather(weights["q"], "data", axis=0, tiled=True)
    out = lax.all_gather(weights["out"], "data", axis=1, tiled=True)
    normed = (h - h.mean(-1, keepdims=True)) * weights["scale"]
    keys = normed @ q
    h = h + lax.psum(jax.nn.softmax(keys @ keys.T) @ keys @ out, "model")
    up = lax.all_gather(weights["up"], "data", axis=0, tiled=True)
    down = lax.all_gather(weights["down"], "data", axis=1, tiled=True)
    return h + lax.psum(jax.nn.gelu(h @ up) @ down, "model")


def make_step(x, layers):
    def loss(layers):
        h = x
        for weights in layers:
            h = make_block(h, weights)
        return jnp.sum(h * h)

    value, grads = jax.value_and_grad(loss)(layers)
    updated = jax.tree.map(lambda w, g: w - 0.1 * g, layers, grads)
    return lax.psum(value, "data"), updated


@pytest.fixture(scope="module")
def model():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"), (AxisType.Auto,) * 2)
    specs = [SPECS] * LAYERS

    def shape(dims, spec):
        return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=NamedSharding(mesh, spec))

    fn = jax.shard_map(make_step, mesh=mesh, in_specs=(P("data"), specs), out_specs=(P(), specs))
    args = (
        shape((16, WIDTH), P("data")),
        [{name: shape(SHAPES[name], SPECS[name]) for name in SPECS} for _ in range(LAYERS)],
    )
    return mesh, jax.jit(fn).lower(*args).compile().as_text()


def note_size(benchmark, text, collectives):
    benchmark.extra_info |= {"lines": text.count("\n"), "collectives": collectives}
    assert collectives >= 12 * LAYERS


def test_reading(benchmark, model):
    _, text = model
    ops = benchmark.pedantic(find_collectives, (text,), rounds=3)
    note_size(benchmark, text, len(ops))


def test_audit_of_the_text(benchmark, model):
    mesh, text = model
    report = benchmark.pedantic(lambda: audit_text(text, mesh=mesh), rounds=3)
    note_size(benchmark, text, len(report.collectives))
