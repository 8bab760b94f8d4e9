"""A transformer block in flax and one in equinox, left to the compiler: every row is explained.

Each row has a line of this file with its text, an operation or an edge, a reason, a replacement,
and the types that the array has before and after, where the text shows them.
"""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from audit_cases import P, mesh_of, shape
from jax.sharding import NamedSharding

from txcore.profiling import audit
from txcore.profiling.report.why import explain_rows

pytestmark = pytest.mark.usefixtures("unoptimized")
HERE = pathlib.Path(__file__)
WIDTH, HEADS = 16, 4


def shard_by_rule(params, mesh):
    """Split matrices over model: what goes up by its columns, what comes down by its rows."""

    def place(path, leaf):
        name = jax.tree_util.keystr(path)
        spec = P()
        if leaf.ndim >= 2:
            down = "down" in name or "out" in name
            spec = P("model") if down else P(*(None,) * (leaf.ndim - 1), "model")
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, params)


def flax_step(mesh):
    pytest.importorskip("flax")
    from flax import linen

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            normed = linen.LayerNorm(name="norm1")(x)
            q, k, v = (linen.Dense(WIDTH, name=name)(normed) for name in ("q", "k", "v"))
            weights = jax.nn.softmax(q @ k.swapaxes(-1, -2))
            x = x + linen.Dense(WIDTH, name="out")(weights @ v)
            hidden = linen.gelu(linen.Dense(2 * WIDTH, name="up")(x))
            return x + linen.Dense(WIDTH, name="down")(hidden)

    block = Block()
    x = jnp.ones((4, 8, WIDTH))
    params = jax.eval_shape(block.init, jax.random.key(0), x)

    def step(params, x):
        return jax.value_and_grad(lambda p: jnp.mean(block.apply(p, x) ** 2))(params)

    return step, (shard_by_rule(params, mesh), shape(mesh, P("data"), 4, 8, WIDTH))


def equinox_step(mesh):
    pytest.importorskip("equinox")
    import equinox as eqx

    class Block(eqx.Module):
        q: eqx.nn.Linear
        k: eqx.nn.Linear
        v: eqx.nn.Linear
        out: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 5)
            made = [eqx.nn.Linear(WIDTH, WIDTH, key=one) for one in keys]
            self.q, self.k, self.v, self.out, self.down = made

        def __call__(self, x):
            q, k, v = (jax.vmap(layer)(x) for layer in (self.q, self.k, self.v))
            weights = jax.nn.softmax(q @ k.T)
            x = x + jax.vmap(self.out)(weights @ v)
            return x + jax.nn.gelu(jax.vmap(self.down)(x))

    params = eqx.filter_eval_shape(Block, jax.random.key(0))
    arrays, static = eqx.partition(params, lambda leaf: isinstance(leaf, jax.ShapeDtypeStruct))

    def step(arrays, x):
        def loss(arrays):
            return jnp.mean(jax.vmap(eqx.combine(arrays, static))(x) ** 2)

        return jax.value_and_grad(loss)(arrays)

    return step, (shard_by_rule(arrays, mesh), shape(mesh, P("data"), 4, 8, WIDTH))


@pytest.mark.parametrize("make", [flax_step, equinox_step])
def test_every_row_has_a_line_an_operation_a_reason_and_a_replacement(make):
    fn, args = make(mesh_of(data=2, model=4))
    report = audit(fn, *args)
    assert report.status == "failed"
    reasons = explain_rows(report.collectives)
    lines = HERE.read_text().splitlines()
    assert sum(why.arrays for why in reasons) == sum(
        len(row.parts) for row in report.collectives if not row.explained
    )
    assert len(reasons) >= 5
    for why in reasons:
        file, _, line = why.place.rpartition(":")
        assert file.endswith(HERE.name), why
        assert why.text == lines[int(line) - 1].strip()
        assert why.reason
        assert why.instead
        assert why.operations or "edge" in why.reason
        assert why.types or why.kind not in ("all-reduce", "all-gather", "reduce-scatter")
    assert {why.backward for why in reasons} == {True, False}
