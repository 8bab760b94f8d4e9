"""Less synchronisation on machines that are not here: exact, as predicted, and overlapping."""

import jax
import jax.numpy as jnp
import pytest
import toys
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from target_cases import available

import txcore as tx
from txcore.profiling import costs

DILOCO = tx.optim.sgd(0.7, momentum=0.9, nesterov=True)


@tx.step_fn
def in_parts(state, batch):
    loss, grads = tx.value_and_grad(toys.local_loss, microbatches=4)(state.params, batch)
    grads, state = state.sync_gradients(grads)
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}


@pytest.mark.parametrize("target", ["cpu:8", "cuda:h100:8", "tpu:v5e:2x4"])
@pytest.mark.parametrize(
    "options, what",
    [
        ({}, {"gradients": 160}),
        ({"sync_every": 8, "outer": DILOCO}, {"parameters": 160}),
        ({"delay": 1}, {"gradients": 160}),
        (
            {"reduction": "adasum"},
            {"halves of gradients": 140, "products of gradients": 576, "joined gradients": 160},
        ),
    ],
    ids=["accumulation", "local", "delayed", "adasum"],
)
def test_the_audit_is_exact_and_as_predicted(options, what, target):
    engine = toys.engine(1, plan=tx.Plan(data_parallel=tx.DP("data", **options)))
    state = engine.create_state(toys.params())
    there = {"target": available(target), "mesh": {"data": 8}}
    report = engine.audit(in_parts, state, toys.batch(8), **there)
    assert report.exact, report
    assert {row.trips for row in report.collectives} == {1}
    planned = [line for line in report.plan if line.payload_bytes]
    assert {line.what: line.payload_bytes for line in planned} == what
    assert {line.what: line.found_bytes for line in planned} == what
    beyond = {line.what for line in report.plan if not line.payload_bytes}
    assert beyond == {"pmean/loss", "psum/example_count"}


def test_delayed_gradients_are_sent_beside_matrix_products():
    """Undelayed, nothing is left to compute once the first layer's gradient is there."""

    def build(mesh):
        def loss_of(layers, x):
            for w in layers:
                x = jnp.tanh(x @ w)
            return jnp.mean(x**2)

        def step(layers, kept, x):
            _, grads = tx.value_and_grad(loss_of, axis="data")(layers, x)
            comm = {"delayed": kept}
            grads, comm = tx.sync_gradients(grads, "data", delay=1, comm_state=comm)
            return [w - 0.1 * g for w, g in zip(layers, grads, strict=True)], comm["delayed"]

        def shape(dims, *spec):
            sharding = NamedSharding(mesh, P(*spec))
            return jax.ShapeDtypeStruct(dims, jnp.float32, sharding=sharding)

        specs = P(), P("data"), P("data")
        mapped = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=specs[:2])
        layers = [shape((4096, 4096)) for _ in range(3)]
        kept = [shape((8, 4096, 4096), "data") for _ in layers]
        x = shape((32768, 4096), "data")
        return jax.jit(mapped, donate_argnums=(0, 1)), (layers, kept, x)

    found = costs(build, target=available("cuda:h100:8"), mesh={"data": 8}).schedule.overlaps
    assert [one.kind for one in found] == ["all-reduce"] * 3
    assert all(one.is_async and one.exposed_seconds == 0 for one in found)
    assert min(one.flops for one in found) >= 2 * 4096**3  # of each device's 4096 rows
