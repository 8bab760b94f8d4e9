"""DP(reduction="adasum"): gradients joined in pairs, as in float64 NumPy."""

import re

import jax
import numpy as np
import pytest
import toys
from jax.sharding import PartitionSpec as P
from local_sgd_oracle import adasum as in_float64
from local_sgd_oracle import gradient, share, widen

import txcore as tx
from txcore.parallel.gradients.adasum import adasum
from txcore.profiling.report import PlanLine
from txcore.testing import run_sharded

PLAN = tx.Plan(data_parallel=tx.DP("data", reduction="adasum"))


def joined(gradients, axes=None, **options):
    axes = axes or {"data": len(gradients)}
    names = tuple(axes)

    def f(x):
        return adasum(jax.tree.map(lambda a: a[0], x), names)

    stacked = jax.tree.map(lambda *rows: np.stack(rows), *gradients)
    return run_sharded(f, stacked, axes=axes, out_specs=P(), **options)


def gradients_of(n, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w": (3, 5), "b": (7,), "scale": ()}
    common = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    return [
        {name: (x + rng.normal(size=x.shape)).astype(dtype) for name, x in common.items()}
        for _ in range(n)
    ]


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_as_in_float64(n):
    given = gradients_of(n)
    found = joined(given)
    for name in given[0]:
        wanted = in_float64([g[name] for g in given])
        np.testing.assert_allclose(found[name], wanted, rtol=2e-5, atol=1e-6)


def test_over_two_axes_and_where_jax_does_not_track():
    given = gradients_of(8, seed=1)
    found = joined(given, {"replica": 2, "data": 4})
    plain = joined(given, check_vma=False)
    for name in given[0]:
        wanted = in_float64([g[name] for g in given])
        np.testing.assert_allclose(found[name], wanted, rtol=2e-5, atol=1e-6)
        np.testing.assert_array_equal(found[name], plain[name])


def test_what_is_orthogonal_is_added_and_what_is_equal_averaged():
    rows = np.eye(4, dtype=np.float32)
    np.testing.assert_array_equal(joined(list(rows)), np.ones(4))
    np.testing.assert_allclose(joined([rows[1] * 3] * 4), rows[1] * 3, rtol=1e-6)
    np.testing.assert_array_equal(joined([rows[0] * 0, rows[1]]), rows[1])
    np.testing.assert_array_equal(joined([rows[0] * 0] * 2), rows[0] * 0)


def test_halves_are_computed_in_float32():
    given = gradients_of(4, dtype=jax.numpy.bfloat16)
    found = joined(given)
    for name in given[0]:
        wanted = in_float64([np.asarray(g[name], np.float64) for g in given])
        assert found[name].dtype == jax.numpy.bfloat16
        np.testing.assert_allclose(np.float64(found[name]), wanted, rtol=2**-8, atol=1e-4)


def test_training():
    engine = toys.engine(4, plan=PLAN, optimizer=tx.optim.sgd(0.01))
    state, params = engine.create_state(toys.params()), widen(toys.params())
    for seed in range(3):
        batch = toys.batch(16, seed=seed)
        state, _ = toys.train_step(state, batch)
        each = [gradient(params, share(batch, i, 4))[0] for i in range(4)]
        params = {
            name: x - 0.01 * in_float64([grads[name] for grads in each])
            for name, x in params.items()
        }
        for name, wanted in params.items():
            np.testing.assert_allclose(state.stored_params[name], wanted, rtol=1e-4, atol=1e-5)
    engine.check_replicas(state)


@pytest.mark.parametrize("n", [2, 8])
def test_the_audit_is_exact_and_as_predicted(n):
    engine = toys.engine(n, plan=PLAN)
    state = engine.create_state(toys.params())
    report = engine.audit(toys.train_step, state, toys.batch(2 * n))
    assert report.exact, report
    halves = 4 * sum(40 >> level for level in range(1, n.bit_length()))
    products = 4 * 3 * n * 2 * (n.bit_length() - 1)
    line = lambda what, kind, sent: PlanLine(what, kind, ("data",), "float32", sent, sent)  # noqa: E731
    assert report.plan[:3] == (
        line("halves of gradients", "collective-permute", halves),
        line("products of gradients", "all-gather", products),
        line("joined gradients", "all-gather", 160),
    )
    assert {line.what for line in report.plan[3:]} == {"pmean/loss", "psum/example_count"}


def test_refused():
    text = "DP(reduction='adasum') needs 1, 2, 4, 8, ... devices over its axes, which it joins in"
    with pytest.raises(ValueError, match=re.escape(text)):
        toys.engine(6, plan=PLAN)
    with pytest.raises(
        ValueError, match=r"adasum needs 1, 2, 4, 8, ... devices over 'data', got 3"
    ):
        joined([np.ones(2, np.float32)] * 3)
    with pytest.raises(
        TypeError, match=r"adasum needs floating-point gradients, got int32 at \['n"
    ):
        joined([{"n": np.ones(2, np.int32)}] * 2)
    with pytest.raises(ValueError, match="DP needs reduction= 'mean' or 'adasum', got 'sum'"):
        tx.DP("data", reduction="sum")
    text = "DP needs shard=None with reduction='adasum', got 'optimizer': it has an exchange of its"
    with pytest.raises(ValueError, match=re.escape(text)):
        tx.DP("data", reduction="adasum", shard="optimizer")
    text = (
        r"Plan needs parameters that are whole with DP\(reduction='adasum'\), which takes the pro"
    )
    with pytest.raises(ValueError, match=text):
        tx.Plan(data_parallel=tx.DP("data", reduction="adasum"), params={"w1": P("model")})


def test_with_a_delay():
    plan = tx.Plan(data_parallel=tx.DP("data", reduction="adasum", delay=1))
    engine = toys.engine(2, plan=plan, optimizer=tx.optim.sgd(0.01))
    state, params = engine.create_state(toys.params()), widen(toys.params())
    for seed in (0, 1):
        state, _ = toys.train_step(state, toys.batch(seed=seed))
    each = [gradient(params, share(toys.batch(seed=0), i, 2))[0] for i in (0, 1)]
    for name, x in params.items():
        wanted = x - 0.01 * in_float64([grads[name] for grads in each])
        np.testing.assert_allclose(state.stored_params[name], wanted, rtol=1e-4, atol=1e-5)
