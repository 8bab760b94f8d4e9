"""Ten parts of a transformer left to the compiler, and each with its reason's advice applied.

The replacement is proved and computes the same.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_cases import P, mesh_of, on
from jax import lax
from jax.sharding import NamedSharding

import txcore as tx
from txcore.profiling import audit
from txcore.profiling.report.why import explain_rows

pytestmark = pytest.mark.usefixtures("unoptimized")


@dataclass(frozen=True)
class Part:
    """A function of whole arrays, how they lie, and the same by hand: `shards` on each device."""

    whole: Any
    specs: tuple[Any, ...]
    out: Any
    shards: Any
    advice: str
    operation: str
    dims: tuple[tuple[int, ...], ...] = ((8, 16),)


ROWS, COLUMNS = P("data"), P(None, "data")


def softmax_by_hand(x):
    top = tx.pmax(lax.stop_gradient(x.max(-1, keepdims=True)), "data")
    parts = jnp.exp(x - top)
    return parts / tx.psum(parts.sum(-1, keepdims=True), "data")


def shifted(x):
    return jnp.concatenate([x[-1:], x[:-1]])


def turn(x):
    return lax.with_sharding_constraint(jnp.tanh(x), NamedSharding(mesh_of(data=8), COLUMNS)) * 2


PARTS = {
    "out_projection": Part(
        lambda x, w: x @ w, (COLUMNS, ROWS), P(),
        lambda x, w: tx.psum(x @ w, "data"),
        "tx.psum(y, 'data')", "dot_general", ((8, 16), (16, 8)),
    ),
    "mean_of_features": Part(
        lambda x: x - x.mean(-1, keepdims=True), (COLUMNS,), COLUMNS,
        lambda x: x - tx.pmean(x.mean(-1, keepdims=True), "data"),
        "tx.psum(y, 'data')", "reduce_sum",
    ),
    "norm_of_features": Part(
        lambda x: x * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True)), (COLUMNS,), COLUMNS,
        lambda x: x * lax.rsqrt(tx.psum(jnp.sum(x * x, -1, keepdims=True), "data")),
        "tx.psum(y, 'data')", "reduce_sum",
    ),
    "softmax_over_shards": Part(
        lambda x: jax.nn.softmax(x), (COLUMNS,), COLUMNS, softmax_by_hand,
        "tx.pmax(y, 'data')", "reduce_max",
    ),
    "smallest_score": Part(
        lambda x: x.min(-1), (COLUMNS,), P(), lambda x: tx.pmin(x.min(-1), "data"),
        "tx.pmin(y, 'data')", "reduce_min",
    ),
    "loss_of_the_batch": Part(
        lambda x: jnp.mean(x**2), (ROWS,), P(), lambda x: tx.pmean(jnp.mean(x**2), "data"),
        "tx.psum(y, 'data')", "reduce_sum",
    ),
    "gradient_of_weights": Part(
        lambda w, x: jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(w), (P(), ROWS), P(),
        lambda w, x: tx.psum(
            jax.grad(lambda w: jnp.sum(jnp.sin(x @ w)))(tx.vary(w, "data")), "data"
        ),
        "tx.pmean(grads, 'data') of the gradients", "dot_general", ((16, 4), (8, 16)),
    ),
    "ranks_of_tokens": Part(
        lambda x: jnp.sort(x, 0),
        (ROWS,),
        COLUMNS,
        lambda x: jnp.sort(tx.all_to_all(x, "data", split_dim=1, concat_dim=0), 0),
        "tx.all_to_all(x, 'data', ...)",
        "sort",
    ),
    "shifted_tokens": Part(
        lambda x: shifted(jnp.tanh(x)) * 2,
        (ROWS,),
        ROWS,
        lambda x: tx.shift(jnp.tanh(x), "data") * 2,
        "tx.shift(x, 'data', ...)",
        "",
    ),
    "heads_for_positions": Part(
        turn, (ROWS,), COLUMNS,
        lambda x: tx.all_to_all(jnp.tanh(x), "data", split_dim=1, concat_dim=0) * 2,
        "tx.all_to_all(x, 'data', ...)", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_the_advice_applied_is_proved_and_the_same(name):
    part, mesh = PARTS[name], mesh_of(data=8)
    draw = np.random.default_rng(0)
    args = tuple(
        jax.device_put(draw.normal(size=dims).astype(np.float32), NamedSharding(mesh, spec))
        for dims, spec in zip(part.dims, part.specs, strict=True)
    )
    kept = jax.jit(part.whole, out_shardings=NamedSharding(mesh, part.out))
    report = audit(kept, *args)
    assert report.status == "failed"
    reasons = explain_rows(report.collectives)
    assert any(why.instead.startswith(part.advice) for why in reasons), reasons
    assert any(part.operation in why.operations or not part.operation for why in reasons)
    assert all(why.place and why.reason and why.text for why in reasons)
    by_hand = jax.jit(on(mesh, part.specs, part.out)(part.shards))
    proof = audit(by_hand, *args)
    assert proof.status == "proved", proof
    got, wanted = np.asarray(by_hand(*args)), np.asarray(kept(*args))
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=1e-6)


def test_ten():
    assert len(PARTS) == 10
