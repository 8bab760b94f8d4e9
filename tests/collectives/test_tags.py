"""Tags: in the compiled operation's path of scopes, and in its transpose's."""

import re

import jax
import jax.numpy as jnp
import pytest
from cases import CASES, sharded, shards

import txcore as tx


def tags(f, x):
    text = jax.jit(f).lower(x).compile().as_text()
    return sorted(re.findall(r"txcore\[([^\]]*)\]", text))


@pytest.mark.parametrize("case", [c for c in CASES if "vary" not in c.op], ids=str)
def test_every_operation_carries_its_tag(case):
    f = sharded(lambda x: case.call({"w": [x]}, "data"), {"data": 4})
    op = "reduce_scatter" if case.op == "psum_scatter" else case.op
    assert f"{op}/w.0" in tags(f, shards({"data": 4}))


def test_name_labels_the_tag():
    f = sharded(lambda x: tx.psum({"a b": x}, "data", name="grads/v1"), {"data": 4})
    assert set(tags(f, shards({"data": 4}))) == {"psum/grads/v1.a_b"}
    bare = sharded(lambda x: tx.psum(x, "data"), {"data": 4})
    assert set(tags(bare, shards({"data": 4}))) == {"psum"}


def test_the_transpose_carries_the_tag():
    def f(x):
        w = jnp.ones(8)
        return jax.grad(lambda w: jnp.sum(tx.vary(w, "data", name="w") * x))(w)

    assert set(tags(sharded(f, {"data": 4}), shards({"data": 4}, (8,)))) == {"vary/w"}
