"""Plans that cannot be: each refused before anything compiles, with what to do instead.

A row has what is tried, then what its error says is needed, what was given, and what to write.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import txcore as tx

DP, TP = tx.DP("data"), tx.TP("model", rules={"*/up": -1, "*/down": -2})
PP = tx.PP("pipe", microbatches=2)
LAYERS = {"up": np.zeros((4, 6, 8), np.float32), "down": np.zeros((4, 8, 6), np.float32)}
PARAMS = {"blocks": LAYERS, "head": np.zeros((6, 5), np.float32)}


def plan(**kinds):
    return lambda: tx.Plan(**kinds)


def mesh(**sizes):
    devices = jax.devices()[: int(np.prod([*sizes.values()]))]
    return tx.MeshSpec(devices, axes=tuple(sizes), shape=tuple(sizes.values()))


def on(sizes, of=PARAMS, **kinds):
    """An engine on a mesh, and a state of these parameters."""

    def create():
        optimizer = kinds.pop("optimizer", tx.optim.sgd(0.1))
        engine = tx.Engine(mesh=mesh(**sizes), plan=tx.Plan(**kinds), optimizer=optimizer)
        engine.create_state(of)

    return create


def layouts(sizes, of, **kinds):
    """How parameters lie, in the shapes in which a plan stores them."""
    return lambda: tx.Plan(**kinds).layouts(of, mesh(**sizes))


def layers(number, chunks=None):
    shape = (number, 6, 8) if chunks is None else (chunks, number // chunks, 6, 8)
    return {"blocks": {"up": np.zeros(shape, np.float32)}}


def step(loss_of, sizes, batch, of, **kinds):
    """A step of a loss that uses the parameters as the plan lays them out."""

    def run():
        engine = tx.Engine(mesh=mesh(**sizes), plan=tx.Plan(**kinds), optimizer=tx.optim.sgd(0.1))

        @tx.step_fn
        def train_step(state, batch):
            _, grads = tx.value_and_grad(loss_of)(state.params, batch)
            grads, state = state.sync_gradients(grads)
            return state.apply_gradients(grads=grads), {}

        train_step(engine.create_state(of), batch)

    return run


def by_columns(params, batch):
    up = tx.tensor.column_dense(batch, params["head"], axis="model")
    return jnp.mean(tx.tensor.leave(jnp.sum(up, -1), "model"))


def in_microbatches(microbatches, rows):
    """A pipeline of two stages, on a batch of so many rows."""

    def run():
        plan = tx.Plan(pipeline=tx.PP("pipe", microbatches=microbatches))
        engine = tx.Engine(mesh=mesh(pipe=2), plan=plan, optimizer=tx.optim.sgd(0.1))

        @tx.step_fn
        def train_step(state, batch):
            both = tx.pipeline.value_and_grad(
                lambda params, batch: batch,
                lambda params, x, batch, stage: x * params["w"][0],
                lambda params, x, batch: x,
            )
            _, grads = both(state.params, batch)
            return state.apply_gradients(grads=grads), {}

        params = {"blocks": {"w": np.ones(2, np.float32)}}
        train_step(engine.create_state(params), np.ones(rows, np.float32))

    return run


def attention_of(heads, kv_heads, devices):
    return lambda: tx.tensor.check_heads(heads, kv_heads, devices)


ROWS = np.zeros((8, 6), np.float32)
DATA_MODEL = {"data": 2, "model": 2}

IMPOSSIBLE = {
    # ---- What would save nothing ---------------------------------------------------------------
    "gradients in shards, in stages": (
        on({"data": 2, "pipe": 2}, data_parallel=tx.DP("data", shard="gradients"), pipeline=PP),
        ["needs shard= 'optimizer'", "2 devices of 'pipe', got 'gradients'", "the same numbers"],
    ),
    # ---- An axis that means two things ---------------------------------------------------------
    "TP's axis in DP": (
        plan(data_parallel=tx.DP(("data", "model")), tensor_parallel=TP),
        ["needs tensor_parallel= an axis of its own", "'model', which data_parallel=", "MeshSpec("],
    ),
    "pipe axis in DP": (
        plan(data_parallel=tx.DP("pipe"), pipeline=PP),
        ["needs pipeline= an axis of its own", "'pipe', which data_parallel=", "MeshSpec("],
    ),
    "pipe axis in TP": (
        plan(tensor_parallel=tx.TP("pipe", rules={"*": -1}), pipeline=PP),
        ["needs pipeline= an axis of its own", "'pipe', which tensor_parallel=", "MeshSpec("],
    ),
    "context axis in DP": (
        plan(data_parallel=DP, context="data"),
        ["needs context= an axis of its own", "'data', which data_parallel=", "MeshSpec("],
    ),
    "context axis in TP": (
        plan(tensor_parallel=TP, context="model"),
        ["needs context= an axis of its own", "'model', which tensor_parallel=", "MeshSpec("],
    ),
    "context axis in PP": (
        plan(pipeline=PP, context="pipe"),
        ["needs context= an axis of its own", "'pipe', which pipeline=", "MeshSpec("],
    ),
    "data axis in params=": (
        plan(data_parallel=DP, params={"w": P("data")}),
        ["needs other axes than the data axes", "got 'data'", "another axis of the mesh"],
    ),
    "context axis in params=": (
        plan(context="context", params={"w": P("context")}),
        ["needs other axes than the data axes", "got 'context'", "another axis of the mesh"],
    ),
    "pipe axis in params=": (
        plan(pipeline=PP, params={"head": P("pipe")}),
        ["needs params= over other axes", "got 'pipe' for 'head'", "each stage has the other"],
    ),
    "pipe axis in batch=": (
        plan(data_parallel=DP, pipeline=PP, batch={"x": P("pipe")}),
        ["needs other axes than the pipeline's", "got 'pipe'", "Split it over a data axis"],
    ),
    "rows over TP's axis": (
        plan(data_parallel=DP, tensor_parallel=TP, batch={"x": P(("data", "model"))}),
        ["needs the rows of the batch split over data axes", "got 'model'", "Write P('data')"],
    ),
    "an axis twice in params=": (
        plan(params={"w": P("model", "model")}),
        ["needs each mesh axis once", "'w': P('model', 'model')", "leave one out"],
    ),
    "an axis twice in batch=": (
        plan(batch={"x": P("data", "data")}),
        ["needs each mesh axis once", "'x': P('data', 'data')", "leave one out"],
    ),
    "an axis twice in DP": (
        lambda: tx.DP(("data", "data")),
        ["needs axis=", "a tuple of different names", "got ('data', 'data')"],
    ),
    # ---- An axis that the mesh does not have ---------------------------------------------------
    "unknown axis of DP": (
        on(DATA_MODEL, data_parallel=tx.DP("date")),
        ["needs mesh axis 'date'", "the mesh's axes are 'data', 'model'", "use one of them"],
    ),
    "unknown axis of TP": (
        on({"data": 4}, data_parallel=DP, tensor_parallel=TP),
        ["Plan(tensor_parallel=TP(", "needs mesh axis 'model'", "name the axis in MeshSpec("],
    ),
    "unknown axis of PP": (
        on({"data": 4}, data_parallel=DP, pipeline=PP),
        ["Plan(pipeline=PP(", "needs mesh axis 'pipe'", "name the axis in MeshSpec("],
    ),
    "unknown axis of context": (
        on({"data": 4}, data_parallel=DP, context="context"),
        ["Plan(context='context')", "needs mesh axis 'context'", "name the axis in MeshSpec("],
    ),
    "unknown axis in params=": (
        on({"data": 4}, data_parallel=DP, params={"head": P("model")}),
        ["Plan(params={'head': ...})", "needs mesh axis 'model'", "use one of them"],
    ),
    "unknown axis in batch=": (
        on({"data": 4}, data_parallel=DP, batch={"x": P("data", "model")}),
        ["Plan(batch={'x': ...})", "needs mesh axis 'model'", "use one of them"],
    ),
    # ---- Layers that stages and chunks do not divide -------------------------------------------
    "3 stages for 2 blocks": (
        on({"pipe": 3}, layers(2), pipeline=PP),
        ["a number of layers that 3 stages divide", "got 2 in params['blocks']['up']", "make it 3"],
    ),
    "no blocks": (
        on({"pipe": 2}, {"head": np.zeros(3), "embed": np.zeros(3)}, pipeline=PP),
        ["needs params['blocks']", "got params with 'embed', 'head'", "write {'blocks':"],
    ),
    "a scalar in blocks": (
        on({"pipe": 2}, {"blocks": {"scale": np.float32(1)}}, pipeline=PP),
        ["params['blocks']['scale'] of shape (layers, ...)", "got ()", "stack the layers"],
    ),
    "leaves with other numbers of layers": (
        on({"pipe": 2}, {"blocks": {"a": np.zeros((4, 3)), "b": np.zeros(2)}}, pipeline=PP),
        ["as many layers in all", "got 2 in params['blocks']['b'] and 4", "beside 'blocks'"],
    ),
    "chunks that are not there": (
        layouts(
            {"pipe": 2},
            layers(8),
            pipeline=tx.PP("pipe", microbatches=2, schedule="interleaved", chunks=2),
        ),
        ["of shape (2, layers / 2, ...)", "got (8, 6, 8)", "reshape(2, -1, *x.shape[1:])"],
    ),
    "chunks that stages do not divide": (
        layouts(
            {"pipe": 2},
            layers(6, 2),
            pipeline=tx.PP("pipe", microbatches=2, schedule="gpipe", chunks=2),
        ),
        ["that 2 stages x 2 chunks divide", "got 6", "make it 8 layers, or use fewer stages"],
    ),
    "interleaved with one chunk": (
        lambda: tx.PP("pipe", microbatches=4, schedule="interleaved"),
        ["needs chunks= 2 or more", "got 1", "schedule='1f1b'"],
    ),
    "1f1b with two chunks": (
        lambda: tx.PP("pipe", microbatches=4, schedule="1f1b", chunks=2),
        ["needs schedule= 'interleaved' or 'gpipe' with chunks=2", "got '1f1b'", "one chunk"],
    ),
    "no microbatch": (
        lambda: tx.PP("pipe", microbatches=0),
        ["needs microbatches= a count from 1 on", "got 0"],
    ),
    "a layer by params=": (
        on({"pipe": 2, "model": 2}, pipeline=PP, params={"blocks/up": P(None, None, "model")}),
        [
            "needs other parameters than the layers of a pipeline",
            "got params['blocks']['up']",
            "name the dim in TP(rules=",
        ],
    ),
    # ---- Dims that tensor parallelism cannot split ---------------------------------------------
    "a rule that matches nothing": (
        on(DATA_MODEL, data_parallel=DP, tensor_parallel=tx.TP("model", rules={"mlp/up": -1})),
        ["TP(rules={'mlp/up': -1}) needs a parameter that it matches", "'blocks/up'", "the whole"],
    ),
    "a rule that another hides": (
        on(DATA_MODEL, tensor_parallel=tx.TP("model", rules={"*": -1, "head": -2})),
        ["'head': -2", "'head' goes to '*' before it", "put the narrower rule first"],
    ),
    "an indivisible dim": (
        on({"model": 4}, tensor_parallel=tx.TP("model", rules={"head": -1})),
        ["needs dim 1 of params['head'], shape (6, 5), divisible by the 4 devices", "make it 8"],
    ),
    "a dim that is not there": (
        on(DATA_MODEL, tensor_parallel=tx.TP("model", rules={"head": -3})),
        ["needs params['head'] to have that dim", "shape (6, 5)", "name another dim"],
    ),
    "the dim that a pipeline splits": (
        on(
            {"model": 2, "pipe": 2},
            pipeline=PP,
            tensor_parallel=tx.TP("model", rules={"blocks/up": -3}),
        ),
        ["needs params['blocks']['up'] to have that dim beside", "('pipe'", "name another dim"],
    ),
    "a dim counted from the front": (
        lambda: tx.TP("model", rules={"head": 1}),
        ["counted from the end, -1 for the last", "got 1 for 'head'"],
    ),
    "no rules": (
        lambda: tx.TP("model", rules={}),
        ["needs rules= a dict of dims by path", "got {}", "write rules={'*/up': -1"],
    ),
    "a whole parameter in a split layer": (
        step(by_columns, DATA_MODEL, ROWS, {"head": PARAMS["head"]}, data_parallel=DP),
        [
            "needs w this device's part along 'model'",
            "shape (6, 5)",
            "TP('model', rules={path: -1}",
        ],
    ),
    "heads that devices do not divide": (
        attention_of(6, 6, 4),
        ["needs heads that the devices", "heads=6, kv_heads=6 over 4 devices", "or 8 heads"],
    ),
    "heads of keys that devices do not divide": (
        attention_of(8, 2, 4),
        ["needs heads of keys and values", "kv_heads=2 over 4", "use 2 of them along that axis"],
    ),
    "heads of keys that do not divide those of queries": (
        attention_of(8, 3, 1),
        ["needs heads of keys that divide", "heads=8, kv_heads=3", "take kv_heads=2"],
    ),
    # ---- What needs whole gradients, or every step ---------------------------------------------
    "adasum with TP": (
        plan(data_parallel=tx.DP("data", reduction="adasum"), tensor_parallel=TP),
        ["needs parameters that are whole", "got tensor_parallel=TP(", "write reduction='mean'"],
    ),
    "adasum with PP": (
        plan(data_parallel=tx.DP("data", reduction="adasum"), pipeline=PP),
        ["needs parameters that are whole", "got pipeline=PP(", "write reduction='mean'"],
    ),
    "adasum with params=": (
        plan(data_parallel=tx.DP("data", reduction="adasum"), params={"w": P("model")}),
        ["needs parameters that are whole", "got params={'w'", "write reduction='mean'"],
    ),
    "adasum with context": (
        plan(data_parallel=tx.DP("data", reduction="adasum"), context="context"),
        ["averaged in each step with context=", "got DP(reduction='adasum')", "leave one"],
    ),
    "local SGD with context": (
        plan(data_parallel=tx.DP("data", sync_every=4), context="context"),
        ["averaged in each step with context=", "got DP(sync_every=4)", "leave one"],
    ),
    "adasum on 3 devices": (
        on({"data": 3}, data_parallel=tx.DP("data", reduction="adasum")),
        ["needs 1, 2, 4, 8, ... devices", "got 3", "take a power of two"],
    ),
    "optax's norms on parts": (
        on(
            DATA_MODEL,
            data_parallel=DP,
            tensor_parallel=TP,
            optimizer=tx.optim.Optimizer(lambda p: (), lambda g, s, p, *, step: (p, s)),
        ),
        ["the plan splits parameters over 'model'", "not known to be right", "Use tx.optim.sgd"],
    ),
    "shard_axis outside DP": (
        lambda: tx.DP("data", shard="optimizer", shard_axis="model"),
        ["needs shard_axis= some of its data axes ('data',)", "got 'model'"],
    ),
    "an exchange of parts by compression": (
        lambda: tx.DP("data", shard="parameters", compression="int8"),
        ["needs shard= 'optimizer' or None with compression=", "got 'parameters'"],
    ),
    # ---- Batches and sequences that do not fit ------------------------------------------------
    "rows that devices do not divide": (
        step(
            by_columns,
            DATA_MODEL,
            ROWS[:7],
            {"head": np.zeros((6, 4), np.float32)},
            data_parallel=DP,
            tensor_parallel=tx.TP("model", rules={"head": -1}),
        ),
        ["has 7 examples, which 2 devices along axis 'data' cannot share", "divisible by 2"],
    ),
    "microbatches that do not divide a device's batch": (
        in_microbatches(3, 8),
        ["multiple of 3 rows on each device", "3 microbatches", "got shape (8,)"],
    ),
    "a sequence that 2 x devices do not divide": (
        lambda: tx.context.split_chunks(np.zeros((1, 12)), 4),
        ["needs a sequence that 2 x 4 devices divide", "got 12 tokens", "pad it to 16"],
    ),
    # ---- What is no plan -----------------------------------------------------------------------
    "an axis for a TP": (
        plan(tensor_parallel="model"),
        ["needs tensor_parallel= a tx.TP", "got 'model'", "tx.TP(axis, rules=...)"],
    ),
    "an axis for a PP": (
        plan(pipeline="pipe"),
        ["needs pipeline= a tx.PP", "got 'pipe'", "tx.PP(axis, microbatches=...)"],
    ),
    "two axes for context": (
        plan(context=("a", "b")),
        ["needs context= a mesh axis name", "got ('a', 'b')", "tx.Plan(context='context'"],
    ),
}


@pytest.fixture(autouse=True)
def nothing_compiles(monkeypatch):
    def refuse(*_):
        raise AssertionError("a step was compiled")

    monkeypatch.setattr("txcore.profiling.program.compile_lowered", refuse)


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_it_is_refused_with_what_to_do(case):
    attempt, texts = IMPOSSIBLE[case]
    with pytest.raises((ValueError, TypeError)) as found:
        attempt()
    for text in texts:
        assert text in str(found.value)


def test_these_go_together():
    """What stands beside the refusals, and is right."""
    for kinds in (
        {"data_parallel": DP, "tensor_parallel": TP, "pipeline": PP, "context": "context"},
        {"data_parallel": tx.DP("data", sync_every=4), "tensor_parallel": TP},
        {"data_parallel": DP, "tensor_parallel": TP, "batch": {"classes": P("model")}},
        {"data_parallel": DP, "context": "context", "batch": {"x": P("data", "context")}},
    ):
        sizes = {"data": 2, "model": 2, "pipe": 2, "context": 1}
        tx.Plan(**kinds).layouts(PARAMS, mesh(**sizes))
