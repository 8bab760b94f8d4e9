"""What a pipeline compiles to: its permutes, its memory, and what is refused before that."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P
from pipeline_models import Case, block, embed, losses_of

import txcore as tx
from txcore.parallel.pipeline.programs import trace_stage
from txcore.profiling import audit
from txcore.profiling.declared.divergence import find_divergences

WIDTH, ROWS = 128, 8


def temporary_bytes(name, m, block):
    """Compile two stages of two layers for m microbatches; return the bytes beside arguments."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("pipe",), axis_types=(AxisType.Auto,))
    schedule = tx.pipeline.make_schedule(name, stages=2, microbatches=m)

    def first(ends, batch):
        return batch

    def last(ends, x, batch):
        return jnp.mean(x * x, -1)

    def by_autodiff(params, batch):
        """GPipe as one would write it: a scan, which jax.grad goes through backwards."""
        index, parts = jax.lax.axis_index("pipe"), batch.reshape(m, ROWS, WIDTH)

        def tick(carry, t):
            x, loss = carry
            x = jnp.where(index == 0, parts[jnp.minimum(t, m - 1)], x)
            y = block({"w": w}, x, None, index)
            is_real = (index == 1) & (t >= 1)
            loss = loss + jnp.where(is_real, jnp.mean(last(None, y, None)), 0.0)
            return (tx.shift(y, "pipe", wrap=False), loss), None

        w = params["blocks"]["w"]
        start = tx.vary((jnp.zeros((ROWS, WIDTH)), jnp.zeros(())), "pipe")
        return jax.lax.scan(tick, start, jnp.arange(m + 1))[0][1] / m

    if name == "gpipe":

        def step(params, batch):
            loss, grads = jax.value_and_grad(by_autodiff)(params, batch)
            return tx.psum(loss, "pipe"), grads
    else:
        step = tx.pipeline.value_and_grad(first, block, last, schedule, axis="pipe")
    specs = {"blocks": {"w": P("pipe")}}
    params = {"blocks": {"w": jax.ShapeDtypeStruct((4, WIDTH, WIDTH), np.float32)}}
    batch = jax.ShapeDtypeStruct((m * ROWS, WIDTH), np.float32)
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(specs, P()), out_specs=(P(), specs))
    return jax.jit(mapped).lower(params, batch).compile().memory_analysis().temp_size_in_bytes


def tanh_layers(chunk, x, batch, stage):
    for i in range(2):
        x = jnp.tanh(x @ chunk["w"][i])
    return x


def test_memory_of_1f1b_does_not_grow_with_the_microbatches():
    microbatch = ROWS * WIDTH * 4
    few, many = (temporary_bytes("1f1b", m, tanh_layers) for m in (16, 32))
    # The batch in microbatches is a copy of the argument; nothing else depends on m.
    assert many - few <= 16 * microbatch + 4096
    few, many = (temporary_bytes("gpipe", m, tanh_layers) for m in (16, 32))
    assert many - few >= 16 * 3 * microbatch


@pytest.mark.parametrize(
    "case",
    [Case("1f1b", p=4, d=2, kind="again", masked=True), Case("zb-h1", p=2, d=2)],
    ids=str,
)
def test_permutes_alone_are_in_the_loops_and_all_is_proved(case):
    step, inputs = case.make_step(), case.inputs()
    text = step.lower(*inputs).compile().as_text()
    found = {}
    for body in re.split(r"\n(?=\S)", text):
        ops = re.findall(r" (collective-permute|all-reduce|all-gather)(?:-start)?\(", body)
        if ops:
            found["entry" if body.startswith("ENTRY") else body.split()[0]] = ops
    # A loop of one tick is written out.
    in_entry = set(found.pop("entry"))
    assert "all-reduce" in in_entry
    assert in_entry <= {"all-reduce", "collective-permute"}
    # Ramps have one permute, the steady state two; evaluation is a loop of its own.
    counts = [len(ops) for ops in found.values()]
    assert {op for ops in found.values() for op in ops} == {"collective-permute"}
    assert max(counts) == 2
    assert counts.count(2) == 1
    report = audit(step, *inputs)
    assert report.exact, str(report)
    assert {row.origin for row in report.collectives} == {"txcore"}
    assert find_divergences(jax.make_jaxpr(step)(*inputs)) == ()


def stash_shapes(block, split):
    x, chunk = jnp.zeros((3, 4)), {"w": jnp.zeros((2, 4, 4))}
    program = trace_stage(block, chunk, x, None, jnp.int32(0), split=split)
    return [[v.aval.shape for v in kept] for kept in (program.stash, program.held)]


def small_layers(chunk, x, batch, stage):
    for i in range(2):
        x = jnp.tanh(x @ chunk["w"][i].astype(jnp.float32))
    return x


def test_what_is_kept_is_what_is_used_again():
    """x and the two tanh; weights, cast or sliced, are at hand. Split: two gradients of a tanh."""
    assert stash_shapes(small_layers, split=False) == [[(3, 4)] * 3, []]
    assert stash_shapes(jax.checkpoint(small_layers), split=False) == [[(3, 4)], []]
    stash, held = stash_shapes(small_layers, split=True)
    assert (stash, held) == ([(3, 4)] * 3, [(3, 4)] * 2)


def test_a_split_pass_computes_nothing_twice():
    """Of the 6 matrix products of two layers, 2 are in each of the passes."""
    x, chunk = jnp.zeros((3, 4)), {"w": jnp.zeros((2, 4, 4))}
    for inner in (small_layers, jax.jit(small_layers)):
        program = trace_stage(inner, chunk, x, None, jnp.int32(0), split=True)
        products = {
            letter: sum(eqn.primitive.name == "dot_general" for eqn in one.program.eqns)
            for letter, one in program.passes.items()
        }
        assert products == {"F": 2, "B": 2, "W": 2}


def call(params=None, batch=None, *, functions=(embed, block, losses_of), **options):
    """Trace a pipeline of two stages with something wrong."""
    case = Case("1f1b")
    right, rows, _ = case.inputs()
    params, batch = params or right, batch or rows
    specs = options.pop("specs", {"embed": P(), "blocks": P("pipe")})
    schedule = options.pop("schedule", case.make_schedule())
    mask, batch_spec = options.pop("mask", None), options.pop("batch_spec", P("data"))
    first, layers, last = functions
    options = {"axis": "pipe", "data_axis": "data", **options}
    step = tx.pipeline.value_and_grad(first, layers, last, schedule, **options)
    devices = np.array(jax.devices()[:4]).reshape(2, 2)
    mesh = Mesh(devices, ("pipe", "data"), axis_types=(AxisType.Auto,) * 2)
    mapped = jax.shard_map(
        lambda p, b: step(p, b, mask=mask),
        mesh=mesh,
        in_specs=(specs, batch_spec),
        out_specs=P(),
        check_vma=True,
    )
    jax.eval_shape(mapped, params, batch)


def wider(chunk, x, batch, stage):
    return jnp.concatenate([x, x], -1)


def reduced(ends, x, batch):
    return tx.pmean(losses_of(ends, x, batch), "data")


def averaged(ends, x, batch):
    return jnp.mean(losses_of(ends, x, batch))


def talks(chunk, x, batch, stage):
    return tx.psum(x, "pipe")


BAD = {
    "stages": (
        {"schedule": tx.pipeline.make_schedule("1f1b", stages=4, microbatches=4)},
        "needs a schedule of as many stages as axis 'pipe' has devices, 2, got one of 4",
    ),
    "no blocks": (
        {"params": {"embed": np.ones((7, 4))}, "specs": P()},
        "needs params= a dict with 'blocks'",
    ),
    "integers": (
        {"params": {"blocks": np.ones((2, 3), int)}, "specs": P("pipe")},
        r"needs floating-point parameters, got int32 at params\['blocks'\]",
    ),
    "chunks": (
        {
            "params": {"blocks": np.ones((4, 2, 3))},
            "specs": P("pipe"),
            "schedule": tx.pipeline.make_schedule("gpipe", stages=2, microbatches=4, chunks=4),
        },
        r"needs params\['blocks'\] of shape \(4, layers of a chunk, ...\) on each device, "
        r"the layers of 4 chunks, got \(2, 2, 3\): give tx.pipeline.split_layers",
    ),
    "other layers": (
        {"params": {"blocks": [np.ones((2, 3)), np.ones((4, 3))]}, "specs": P("pipe")},
        r"needs as many layers in each leaf of params\['blocks'\], got \(1,\) at .* and \(2,\) at",
    ),
    "blocks everywhere": (
        {"params": {"blocks": np.ones((1, 3))}, "specs": P()},
        "needs the layers in params\\['blocks'\\] to be each device's own along axis 'pipe'",
    ),
    "rows": (
        {"batch": {"word": np.zeros(12, int), "next": np.zeros(12, int)}},
        r"needs batch\['next'\] with a multiple of 4 rows on each device.*got shape \(6,\)",
    ),
    "batch over pipe": (
        {"batch_spec": P("pipe"), "data_axis": ()},
        r"needs batch\['next'\] to be the same along axis 'pipe', since every stage reads it",
    ),
    "data axis": (
        {"data_axis": ()},
        r"needs data_axis= all axes that the batch is sharded over, got \(\): batch\['next'\] "
        "varies along 'data' too",
    ),
    "types": (
        {"functions": (embed, wider, losses_of)},
        r"needs first and block to return floating-point arrays of one structure.*"
        r"float32\[1, 4\] of first and float32\[1, 8\] of block",
    ),
    "reduced": (
        {"functions": (embed, block, reduced)},
        "they do not vary along data axis 'data': they are reduced already, and tx.pmean of the "
        "gradients would give 1/2 of the truth",
    ),
    "averaged": (
        {"functions": (embed, block, averaged)},
        r"needs last to return losses of shape \(1, ...\), one number for each example of the "
        r"microbatch, got \(\): the mean over the batch is taken here",
    ),
    "over pipe": (
        {"functions": (embed, talks, losses_of)},
        "needs block to communicate over other axes than 'pipe', got psum",
    ),
    "nobody says": (
        {"schedule": None},
        "needs schedule= and axis= outside a step decorated with @tx.step_fn",
    ),
    "scale": ({"loss_scale": "much"}, "needs loss_scale= state.loss_scale, or another"),
    "axis": ({"axis": "stage"}, "needs mesh axis 'stage', but the axes bound here are"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused_before_it_runs(what):
    given, text = BAD[what]
    with pytest.raises((ValueError, TypeError, NameError), match=text):
        call(**given)


def test_losses_are_floating_point():
    with pytest.raises(TypeError, match="needs last to return a floating-point array of losses"):
        call(functions=(embed, block, lambda ends, x, batch: (losses_of(ends, x, batch), 1)))


def test_what_is_beside_the_losses_is_averaged_as_they_are():
    """Also in evaluation, over the real examples of the global batch."""
    case = Case("1f1b", m=4, d=2, masked=True)
    params, batch, mask = case.inputs()

    def with_hits(ends, x, batch):
        hits = jnp.argmax(x @ ends["embed"].T, -1) == batch["next"]
        return losses_of(ends, x, batch), {"hits": hits, "word": batch["word"]}

    def step(params, batch, mask):
        first, block, _ = case.functions()
        options: Any = {"axis": "pipe", "data_axis": "data", "has_aux": True}
        functions = (first, block, with_hits, case.make_schedule())
        differentiate = tx.pipeline.value_and_grad(*functions, **options)
        (loss, aux), _ = differentiate(params, batch, mask=mask)
        evaluate = tx.pipeline.evaluate(*functions, **options)
        return tx.pmean((loss, aux, *evaluate(params, batch, mask=mask)), "data")

    specs = {"embed": P(), "blocks": P("pipe")}
    loss, aux, evaluated, aux_again = tx.testing.run_sharded(
        step,
        *(params, batch, mask),
        axes={"pipe": 2, "data": 2},
        in_specs=(specs, P("data"), P("data")),
        out_specs=P(),
    )
    real = mask != 0
    np.testing.assert_allclose(aux["word"], batch["word"][real].mean(), rtol=1e-6)
    assert 0 <= aux["hits"] <= 1
    np.testing.assert_allclose([loss, *aux.values()], [evaluated, *aux_again.values()], rtol=1e-6)


def test_gradients_add_up_in_float32_for_parameters_in_bfloat16():
    """512 microbatches of 1/512 each: a sum in bfloat16 would stop growing at 1/2."""
    m = 512
    schedule = tx.pipeline.make_schedule("1f1b", stages=1, microbatches=m)
    step = tx.pipeline.value_and_grad(
        lambda p, x: x,
        lambda p, x, batch, stage: x * p["w"],
        lambda p, x, batch: x,
        schedule,
        axis="pipe",
    )
    spec = {"blocks": {"w": P("pipe")}}
    params = {"blocks": {"w": jnp.ones(1, jnp.bfloat16)}}
    _, grads = tx.testing.run_sharded(
        step,
        *(params, np.ones(m, jnp.bfloat16)),
        axes={"pipe": 1},
        in_specs=(spec, P()),
        out_specs=(P(), spec),
    )
    assert grads["blocks"]["w"].dtype == jnp.bfloat16
    assert float(grads["blocks"]["w"][0]) == 1.0
