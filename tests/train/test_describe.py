"""What a plan says of itself before anything compiles, against what was compiled then."""

import xml.etree.ElementTree as ET
from fractions import Fraction

import described_models as models
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from target_cases import available

import txcore as tx
from txcore.plan.drawing import Held, draw_mesh

PP = tx.PP("pipe", microbatches=4)
# Of one of 4 microbatches of 16 rows over two data shards.
ACTIVATION = jax.ShapeDtypeStruct((2, models.WIDTH), np.float32)
ADAMW = tx.optim.adamw(0.01, clip_norm=1.0)
PLANS = {
    "TP": ((1, 4, 1), tx.Plan(data_parallel=tx.DP("data"), tensor_parallel=models.TP)),
    "DP x TP": ((2, 2, 1), tx.Plan(data_parallel=tx.DP("data"), tensor_parallel=models.TP)),
    "all three": (
        (2, 2, 2),
        tx.Plan(data_parallel=tx.DP("data"), tensor_parallel=models.TP, pipeline=PP),
    ),
}
for shard in ("optimizer", "gradients", "parameters"):
    sharded = tx.DP("data", shard=shard)
    PLANS[f"{shard} x TP"] = (
        (2, 2, 1),
        tx.Plan(data_parallel=sharded, tensor_parallel=models.TP),
    )
PLANS["compressed"] = (
    (2, 2, 1),
    tx.Plan(data_parallel=tx.DP("data", compression="int8"), tensor_parallel=models.TP),
)


def engine_on(shape, plan, optimizer=ADAMW):
    return tx.Engine(mesh=models.mesh(*shape), plan=plan, optimizer=optimizer)


def bytes_of(tree):
    return sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))


def compile_step(engine, state, batch, **target):
    """Return a step's memory as its compiler sees it, and the report."""
    report = engine.audit(models.step, state, batch, **target)
    return report.program.compiled.memory_analysis(), report


def check_figures(described, memory, report, state, batch):
    """Compare arguments and collectives: what a device is given, and what it sends."""
    rest = {n: x for n, x in state.arrays.items() if n not in KEPT}
    lying = ("parameters", "optimizer state", "communication state")
    given = sum(described.memory.get(name, 0) for name in lying)
    assert memory.argument_size_in_bytes == given + bytes_of(rest) + batch
    lines = [line for line in report.plan if line.payload_bytes]
    assert [line.what for line in lines] == [one.what for one in described.collectives]
    for line, one in zip(lines, described.collectives, strict=True):
        assert line.payload_bytes == one.payload_bytes
        assert line.found_bytes == one.payload_bytes or one.at_most
    assert report.exact


KEPT = ("stored_params", "opt_state", "comm_state")


# What is sharded less than in others, over the same axes.
PLAIN = ("TP", "gradients x TP")


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.extra if c in PLAIN else ()) for c in PLANS]
)
def test_the_figures_are_those_of_the_compiled_step(case):
    shape, plan = PLANS[case]
    engine, batch = engine_on(shape, plan), models.batch()
    state = engine.create_state(models.params())
    described = plan.describe(models.params(), engine.mesh, optimizer=ADAMW, activation=ACTIVATION)
    memory, report = compile_step(engine, state, batch)
    check_figures(described, memory, report, state, bytes_of(batch) // shape[0])


@pytest.mark.parametrize("case", ["optimizer x TP", "all three"])
def test_they_are_those_of_a_step_for_eight_h100(case):
    target, sizes = available("cuda:h100:8"), {"data": 2, "model": 2, "pipe": 2}
    engine = engine_on((1, 1, 1), PLANS[case][1])
    state = engine.create_state(models.params())
    shard = models.batch(8)
    memory, report = compile_step(engine, state, shard, target=target, mesh=sizes)
    described = PLANS[case][1].describe(
        models.params(), models.mesh(2, 2, 2), optimizer=ADAMW, activation=ACTIVATION
    )
    check_figures(described, memory, report, state, bytes_of(shard))


def test_a_row_says_how_a_parameter_lies():
    shape, plan = PLANS["all three"]
    rows = {row.path: row for row in plan.describe(models.params(), models.mesh(*shape)).parameters}
    up = rows["blocks/up"]
    assert (up.shape, up.spec, up.part) == ((4, 32, 64), P("pipe", None, "model"), (2, 32, 32))
    assert up.gradient == "mean over data"
    assert (rows["embed"].part, rows["embed"].gradient) == (
        (16, 32),
        "sum over pipe; mean over data",
    )
    sharded = PLANS["optimizer x TP"][1].describe(models.params(), models.mesh(2, 2, 1)).parameters
    assert sharded[-1].gradient == "mean over data; a part of dim 1 along data is kept"
    local = tx.Plan(data_parallel=tx.DP("data", sync_every=4))
    kept = local.describe(models.params(), models.mesh(2, 1, 1)).parameters
    assert kept[0].gradient == "stays; parameters are averaged over data"


def test_the_layers_of_chunks_are_described_as_a_state_stores_them():
    pp = tx.PP("pipe", microbatches=4, schedule="interleaved", chunks=2)
    activation = jax.ShapeDtypeStruct((2, models.WIDTH), np.float32)
    mesh = models.mesh(1, 1, 2)
    described = tx.Plan(pipeline=pp).describe(models.params(), mesh, activation=activation)
    up = next(row for row in described.parameters if row.path == "blocks/up")
    assert (up.shape, up.spec, up.part) == ((2, 2, 32, 64), P(None, "pipe"), (2, 1, 32, 64))
    assert [held.lines[1] for held in described.held] == ["layers 0, 2", "layers 1, 3"]
    assert {one.kind for one in described.collectives} == {"collective-permute", "all-reduce"}


def test_gradients_are_what_a_step_holds_of_them():
    """All of a device's gradient before its exchange; of microbatches in parts, the parts."""

    def step(state, batch):
        def loss_of(params, batch):
            x = first(params, batch)
            return tx.example_mean(losses(params, x, batch), axis="data")

        loss, grads = tx.value_and_grad(loss_of, microbatches=2)(state.params, batch)
        seen.append(sum(g.size * g.dtype.itemsize for g in jax.tree.leaves(grads)))
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    def first(params, batch):
        return models.block(params["blocks"], models.first(params, batch), batch, 0)

    losses = models.last
    for case in ("DP x TP", "optimizer x TP", "gradients x TP", "parameters x TP"):
        shape, plan = PLANS[case]
        seen = []
        engine = engine_on(shape, plan)
        engine.run(tx.step_fn(step), engine.create_state(models.params()), models.batch())
        described = plan.describe(models.params(), engine.mesh, optimizer=ADAMW)
        assert seen == [described.memory["gradients"]] * len(seen), case


@pytest.mark.parametrize("schedule", [pytest.param("gpipe", marks=pytest.mark.extra), "1f1b"])
def test_slots_of_a_pipeline_are_the_memory_that_more_microbatches_take(schedule):
    """All that GPipe keeps of them, with layers that are computed again; nothing of 1F1B's."""
    measured, told = [], []
    activation = jax.ShapeDtypeStruct((256, models.WIDTH), np.float32)
    for microbatches in (8, 16):
        pp = tx.PP("pipe", microbatches=microbatches, schedule=schedule)
        engine = engine_on((1, 1, 2), tx.Plan(pipeline=pp), tx.optim.sgd(0.1))
        batch = models.batch(microbatches * 256)
        memory, _ = compile_step(engine, engine.create_state(models.params()), batch)
        described = engine.plan.describe(models.params(), engine.mesh, activation=activation)
        told.append(sum(described.memory[f"pipeline's {of}"] for of in ("messages", "inputs")))
        measured.append(memory.temp_size_in_bytes)
        assert described.bubble == Fraction(1, microbatches + 1)
    slots = 8 if schedule == "gpipe" else 0
    assert told[1] - told[0] >= slots * 256 * models.WIDTH * 4
    assert measured[1] - measured[0] == pytest.approx(told[1] - told[0], rel=0.02, abs=20_000)


def test_it_is_printed_and_drawn():
    shape, plan = PLANS["all three"]
    described = plan.describe(models.params(), models.mesh(*shape), optimizer=ADAMW)
    text = str(described)
    for line in (
        "mesh data=2, model=2, pipe=2: 8 x cpu",
        "blocks/up    float32  (4, 32, 64)  pipe, -, model  (2, 32, 32)  mean over data",
        "embed        float32  (16, 32)     whole           (16, 32)     sum over pipe; mean over",
        "gradients               all-reduce  data         float32  18.7 kB",
        "ends' gradients         all-reduce  pipe         float32  2.05 kB",
        "optimizer state     37,376 B  37.4 kB",
        "pipeline 1f1b: 2 stages, 4 microbatches, 6 ticks, bubble 1/5",
    ):
        assert line in text, text
    assert "<svg" in described._repr_html_()
    assert "pipe, -, model" in described._repr_html_()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (8, 1, 1), (1, 2, 4)])
def test_a_drawing_has_a_box_for_each_device(shape):
    described = PLANS["all three"][1].describe(models.params(), models.mesh(*shape))
    drawing = ET.fromstring(described.to_svg())
    tag = "{http://www.w3.org/2000/svg}"
    boxes = drawing.findall(f"{tag}rect")
    corners = [tuple(int(box.get(of)) for of in ("x", "y", "width", "height")) for box in boxes]
    for i, (x, y, width, height) in enumerate(corners):
        assert x + width <= int(drawing.get("width"))
        assert y + height <= int(drawing.get("height"))
        for left, top, wide, high in corners[:i]:
            assert x >= left + wide or left >= x + width or y >= top + high or top >= y + height
    assert len(boxes) == np.prod(shape)
    assert len({box.get("fill") for box in boxes}) == shape[1] * shape[2]
    texts = ["".join(text.itertext()) for text in drawing.findall(f"{tag}text")]
    assert sum(text.startswith("device ") for text in texts) == np.prod(shape)
    if shape == (2, 2, 2):
        assert texts.count("layers 2-3") == texts.count("rows 2 of 2") == 4


def test_a_drawing_of_512_devices_shows_the_first_along_each_axis():
    sizes = {"data": 8, "model": 8, "pipe": 8}
    held = [Held((f"n {i}",), (i % 64,)) for i in range(512)]
    drawing = draw_mesh(sizes, held)
    assert drawing.count("<rect") == 64
    assert "448 devices more" in drawing
    assert "device 0<" in drawing
    assert "device 219<" in drawing  # data 3, model 3, pipe 3
