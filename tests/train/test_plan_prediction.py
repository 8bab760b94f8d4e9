"""What a plan predicts of a step's communication, against the audit of the compiled step."""

import json
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax import lax

import txcore as tx
from txcore.parallel.predicted import Predicted
from txcore.profiling import Declared, Report
from txcore.profiling.matching.against_plan import against_plan
from txcore.profiling.report import Fate, PlanLine

DP = tx.Plan(data_parallel=tx.DP("data"))


def predicted(params, plan=DP, mesh=None):
    return [
        (p.what, p.kind, p.axes, p.dtype, p.elements, p.payload_bytes)
        for p in plan.predict(params, mesh or toys.mesh(2))
    ]


def test_the_gradients_of_every_leaf():
    params = {
        "a": np.zeros((3, 5), np.float32),
        "b": jax.ShapeDtypeStruct((7,), jnp.bfloat16),
        "c": [np.zeros(11, np.float64), 1.0],  # without x64 jax makes float32 of them
        "count": np.zeros(4, np.int32),
        "empty": np.zeros((0, 4), np.float32),
    }
    assert predicted(params) == [
        ("gradients", "all-reduce", ("data",), "float32", (15, 11, 1), 108),
        ("gradients", "all-reduce", ("data",), "bfloat16", (7,), 14),
    ]


def test_axes_of_one_device_and_no_data_axis_need_nothing():
    params = toys.params()
    assert predicted(params, mesh=toys.mesh(1)) == []
    assert predicted(params, tx.Plan()) == []
    plan = tx.Plan(data_parallel=tx.DP(("replica", "data")))
    axes = ("data", "replica")
    assert [p[2] for p in predicted(params, plan, toys.mesh(4, axes, (2, 2)))] == [
        ("replica", "data")
    ]
    assert [p[2] for p in predicted(params, plan, toys.mesh(4, axes, (4, 1)))] == [("data",)]


def test_an_axis_that_the_mesh_lacks_is_refused():
    with pytest.raises(ValueError, match="needs mesh axis 'data', but the mesh's axes are 'model'"):
        DP.predict(toys.params(), toys.mesh(2, ("model",)))


def audited(body, n=2, params=None, **options):
    """The audit of a step whose gradients are reduced by `body(grads)`."""

    @tx.step_fn
    def step(state, batch):
        loss, grads = tx.value_and_grad(toys.local_loss)(state.params, batch)
        loss = tx.pmean(loss, state.engine.plan.data_axes, name="loss")
        return state.apply_gradients(grads=body(grads)), {"loss": loss}

    engine = toys.engine(n, **options)
    return engine.audit(step, engine.create_state(params or toys.params()), toys.batch())


GRADIENTS = PlanLine("gradients", "all-reduce", ("data",), "float32", 160, 160, factor="mean")
COUNT = PlanLine("psum/example_count", "all-reduce", ("data",), "float32", 0, 4)
LOSS = PlanLine("pmean/loss", "all-reduce", ("data",), "float32", 0, 4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_does_as_the_plan_predicts(precision):
    report = audited(lambda g: tx.pmean(g, "data"), precision=precision)
    assert report.plan == (GRADIENTS, COUNT, LOSS)
    assert report.ok
    assert report.verdict() == (
        "proved: 2 collectives, 168 B payload a call, all declared (2 txcore), as the plan "
        "predicts and 8 B beyond; nothing was added"
    )
    plan = json.loads(report.to_json())["plan"]
    assert [line["found_bytes"] for line in plan] == [160, 4, 4]
    assert plan[0]["axes"] == ["data"]


def test_one_device():
    report = audited(lambda g: g, n=1)
    assert report.plan == ()
    assert report.verdict() == "proved: no collective in the program"


def in_a_bucket(grads):
    flat = jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)] + [jnp.zeros(24)])
    flat = tx.pmean(flat, "data", name="bucket")  # padded to 64 elements
    return {"w1": flat[:32].reshape(4, 8), "w2": flat[32:40].reshape(8, 1)}


def row_by_row(grads):
    rows = lax.map(lambda row: tx.pmean(row, "data", name="row"), grads["w1"])
    return {"w1": rows, "w2": tx.pmean(grads["w2"], "data")}


def in_two_halves(grads):
    halves = [tx.pmean(half, "data", name="half") for half in jnp.split(grads["w1"], 2)]
    return {"w1": jnp.concatenate(halves), "w2": tx.pmean(grads["w2"], "data")}


def several_times(grads):
    def again(total, _):
        return jax.tree.map(lambda t, g: t + tx.pmean(g, "data") / 4, total, grads), None

    return lax.scan(again, jax.tree.map(jnp.zeros_like, toys.params()), None, length=4)[0]


@pytest.mark.parametrize(
    "body",
    [
        lambda g: jax.tree.map(lambda x: lax.pmean(x, "data"), g),
        in_a_bucket,
        row_by_row,
        in_two_halves,
        several_times,
    ],
    ids=["plain jax", "bucket", "rows", "halves", "four times"],
)
def test_however_the_gradients_are_reduced(body):
    report = audited(body)
    times = 4 if body is several_times else 1
    assert report.plan[0] == replace(GRADIENTS, times=times)
    assert report.ok


@pytest.mark.parametrize(
    "body",
    [
        lambda g: tx.pmean(g, ("replica", "data")),
        lambda g: tx.pmean(tx.pmean(g, "data"), "replica"),
    ],
    ids=["together", "axis by axis"],
)
def test_two_data_axes(body):
    plan = tx.Plan(data_parallel=tx.DP(("replica", "data")))
    mesh = toys.mesh(4, ("replica", "data"), (2, 2))
    loss = lambda p, b: tx.example_mean(toys.losses(p, b), axis=("replica", "data"))  # noqa: E731

    @tx.step_fn
    def step(state, batch):
        grads = tx.grad(loss)(state.params, batch)
        return state.apply_gradients(grads=body(grads)), {}

    engine = toys.engine(4, mesh=mesh, plan=plan)
    report = engine.audit(step, engine.create_state(toys.params()), toys.batch())
    (line,) = report.plan
    assert (line.axes, line.payload_bytes, line.found_bytes) == (("replica", "data"), 160, 160)
    assert report.ok


def test_an_axis_of_one_device_may_be_named():
    mesh = toys.mesh(2, ("replica", "data"), (1, 2))
    plan = tx.Plan(data_parallel=tx.DP(("replica", "data")))
    report = audited(lambda g: tx.pmean(g, ("replica", "data")), mesh=mesh, plan=plan)
    assert (report.plan[0].axes, report.plan[0].found_bytes) == (("data",), 160)
    assert report.ok


def test_without_a_prediction_the_verdict_names_no_plan():
    @tx.step_fn
    def step(state, batch):
        return state, {"sum": tx.psum(tx.vary(batch["x"].sum(), "model"), "model", name="sum")}

    engine = toys.engine(2, mesh=toys.mesh(2, ("model",)), plan=tx.Plan())
    report = engine.audit(step, engine.create_state(toys.params()), toys.batch())
    assert report.plan == (PlanLine("psum/sum", "all-reduce", ("model",), "float32", 0, 4),)
    assert report.verdict().endswith("all declared (1 txcore); nothing was added")


def test_a_reduction_in_another_dtype_is_short_of_the_plan():
    def body(grads):
        small = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)
        return jax.tree.map(lambda g: g.astype(jnp.float32), tx.pmean(small, "data"))

    report = audited(body)
    assert not report.ok
    text = "the plan predicts 160 B of gradients (float32 all-reduce over data), found 0 B"
    assert report.verdict() == f"failed: {text}"
    assert {(line.what, line.dtype, line.found_bytes) for line in report.plan[1:]} == {
        ("pmean/w1", "bfloat16", 64),
        ("pmean/w2", "bfloat16", 16),
        ("pmean/loss", "float32", 4),
        ("psum/example_count", "float32", 4),
    }


def test_a_leaf_that_is_not_trained_is_short_of_the_plan_and_belongs_in_extra():
    @tx.step_fn
    def head(state, batch):
        frozen = {"w1": tx.vary(state.extra, "data")} if state.extra is not None else state.params
        trained = {"w2": state.params["w2"]}
        loss = lambda p: toys.local_loss({**frozen, **p}, batch)  # noqa: E731
        grads = tx.pmean(tx.grad(loss)(trained), "data")
        zeros = jax.tree.map(jnp.zeros_like, state.stored_params)
        return state.apply_gradients(grads={**zeros, **grads}), {}

    engine, params = toys.engine(2), toys.params()
    report = engine.audit(head, engine.create_state(params), toys.batch())
    assert "predicts 160 B of gradients (float32 all-reduce over data), found 32 B" in str(report)
    state = engine.create_state({"w2": params["w2"]}, extra=params["w1"])
    report = engine.audit(head, state, toys.batch())
    assert report.ok
    assert report.plan[0].payload_bytes == report.plan[0].found_bytes == 32


def test_a_parameter_that_the_loss_does_not_use():
    """Its gradient is constant: whether the compiler sends it or not, the plan is fulfilled."""
    params = {**toys.params(), "unused": np.ones(100, np.float32)}
    report = audited(lambda g: tx.pmean(g, "data"), params=params)
    line = report.plan[0]
    assert (line.payload_bytes, line.found_bytes + line.eliminated_bytes) == (560, 560)
    assert report.ok


def reported(*declared, fate="kept"):
    """A report of declared all-reduces: (elements, trips, axes, dtype)."""
    rows = [
        Declared(*("all-reduce", "psum", axes, 2, dtype), 4 * n, trips, None, "", False, n)
        for n, trips, axes, dtype in declared
    ]
    return Report((), fates=tuple(Fate(d, (fate,)) for d in rows))


def found(report, *sizes, axes=("data",)):
    wanted = Predicted("gradients", "all-reduce", axes, "float32", sizes)
    line = against_plan(report, [wanted]).plan[0]
    assert line.payload_bytes == 4 * sum(sizes)
    return line.found_bytes // 4, line.eliminated_bytes // 4


def one(elements, trips=1, axes=("data",), dtype="float32"):
    return elements, trips, axes, dtype


@pytest.mark.parametrize(
    "declared, sizes, covered",
    [
        ([one(10), one(20)], [20, 10], 30),
        ([one(10), one(10)], [10, 10, 10], 20),
        ([one(20)], [20, 20], 20),  # 20 elements once do not stand for two arrays of them
        ([one(30)], [20, 10], 30),
        ([one(64)], [20, 10], 30),  # a padded bucket
        ([one(20), one(1)], [20, 10], 20),  # the loss is no part of a gradient of 10
        ([one(5), one(5)], [10], 10),
        ([one(5, trips=4)], [20], 20),
        ([one(20, trips=4)], [20], 20),
        ([one(5, trips=4), one(5)], [5, 20], 25),
        ([one(20, axes=("model",))], [20], 0),
        ([one(20, axes=("data", "model"))], [20], 20),
        ([one(20, dtype="bfloat16")], [20], 0),
        ([], [20], 0),
    ],
)
def test_by_hand(declared, sizes, covered):
    assert found(reported(*declared), *sizes) == (covered, 0)
    assert found(reported(*declared, fate="eliminated"), *sizes) == (0, covered)
    assert found(reported(*declared, fate="missing"), *sizes) == (0, 0)


def test_of_several_axes_each_must_be_reduced():
    axes = ("replica", "data")
    by_one = [one(20, axes=("data",)), one(20, axes=("replica",))]
    assert found(reported(*by_one), 20, axes=axes) == (20, 0)
    assert found(reported(by_one[0]), 20, axes=axes) == (0, 0)


def test_what_was_not_traced_is_refused():
    text = "against_plan needs a report of a program that was traced, but got one with checked="
    with pytest.raises(ValueError, match=re.escape(text)):
        against_plan(Report((), checked=False), [])
