"""`engine.audit(target=...)`: the engine's own step, plan and optimizer on other machines."""

import jax
import jax.numpy as jnp
import models
import numpy as np
import pytest
import train
from jax.sharding import PartitionSpec as P
from target_cases import available

import txcore as tx
from txcore.profiling import audit


def engine(**options):
    given = {"mesh": tx.MeshSpec(jax.devices()[:2]), "plan": tx.Plan(data_parallel=tx.DP("data"))}
    return tx.Engine(**{**given, "optimizer": tx.optim.sgd(0.1, momentum=0.9), **options})


def images(examples):
    return {
        "image": np.zeros((examples, 28, 28, 1), np.float32),
        "label": np.zeros(examples, np.int32),
        "mask": np.ones(examples, np.float32),
        "weight": np.ones(examples, np.float32),
    }


def mnist(model, **options):
    layers = models.layers_of(model, dropout=0)
    made = engine(**options)
    return made, train.make_steps(layers)[0], made.create_state(models.init(layers, 0))


@pytest.mark.parametrize(
    "target, devices, model",
    [
        ("cpu:8", 8, "mlp"),
        ("cuda:h100:8", 8, "cnn"),
        ("cuda:h100:64x8", 512, "cnn"),
        ("tpu:v5e:16x16", 256, "cnn"),
        ("tpu:v5p:16x16x16", 4096, "cnn"),
    ],
)
def test_the_mnist_step(target, devices, model):
    made, step, state = mnist(model)
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(state.stored_params))
    report = made.audit(step, state, images(32), target=available(target), mesh={"data": devices})
    assert report.exact, report
    assert (report.target, report.mesh) == (target, (("data", devices),))
    assert {(c.kind, c.axes, c.group_size) for c in report.collectives} == {
        ("all-reduce", ("data",), devices)
    }
    # The gradients and the loss.
    assert report.payload_bytes == parameters + 4
    sent = 2 * (devices - 1) / devices * report.payload_bytes
    assert report.wire_bytes == pytest.approx(sent, abs=len(report.collectives))


@pytest.mark.parametrize("target, devices", [("cuda:h100:8", 8), ("tpu:v5e:16x16", 256)])
def test_its_automatic_twin_is_flagged(target, devices):
    layers = models.layers_of("mlp")

    def build(mesh):
        def on(spec):
            def place(x):
                sharding = jax.sharding.NamedSharding(mesh, spec)
                return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

            return place

        def loss_of(params, batch):
            return jnp.mean(models.apply(layers, params, batch["image"]) ** 2)

        shapes = jax.eval_shape(lambda: models.init(layers, 0))
        batch = {"image": jax.ShapeDtypeStruct((4 * devices, 28, 28, 1), jnp.float32)}
        arguments = jax.tree.map(on(P()), shapes), jax.tree.map(on(P("data")), batch)
        return jax.value_and_grad(loss_of), arguments

    report = audit(build, target=available(target), mesh={"data": devices})
    assert not report.ok
    assert {c.origin for c in report.unexplained} == {"partitioner"}


@tx.step_fn
def step(state, batch):
    def loss_of(params):
        return tx.example_mean((batch["x"] @ params["w"]) ** 2, axis="data")

    loss, grads = tx.value_and_grad(loss_of)(state.params)
    grads = tx.pmean(grads, "data", name="grads")
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}


W = {"w": np.zeros(6, np.float32)}


def test_the_audit_here_and_for_as_many_devices_agree():
    made = engine(precision="bfloat16")
    state = made.create_state(W)
    here = made.audit(step, state, {"x": np.zeros((8, 6), np.float32)})
    there = made.audit(
        step, state, {"x": np.zeros((4, 6), np.float32)}, target="cpu:2", mesh={"data": 2}
    )
    assert here.to_json() == there.to_json()
    assert not state.step.is_deleted()


def test_the_batch_is_one_data_shard_and_may_be_shapes():
    seen = []

    @tx.step_fn
    def looks(state, batch):
        seen.append(jax.tree.map(lambda x: (x.shape, x.dtype.name), batch))
        return step.fn(state, batch)

    made = engine(
        mesh=tx.MeshSpec(jax.devices()[:2], ("data", "model"), (2, 1)),
        plan=tx.Plan(data_parallel=tx.DP("data"), batch={"table": P("model", "data")}),
    )
    shard = {"x": jax.ShapeDtypeStruct((4, 6), np.float32), "table": np.zeros((8, 3))}
    made.audit(looks, made.create_state(W), shard, target="cpu:8", mesh={"data": 4, "model": 2})
    # The table: 8 rows over 2 devices of "model"; 3 columns on each of 4 of "data".
    assert seen == [{"x": ((4, 6), "float32"), "table": ((4, 3), "float32")}]


MISUSED = {
    "no mesh": ({"target": "cpu:8"}, TypeError, "needs target= and mesh= together"),
    "no target": ({"mesh": {"data": 8}}, TypeError, "needs target= and mesh= together"),
    "no such target": ({"target": "cpu", "mesh": {"data": 8}}, ValueError, "a target needs to be"),
    "no such axis": (
        {"target": "cpu:8", "mesh": {"model": 8}}, ValueError,
        "Plan(data_parallel=DP(axis='data')) needs mesh axis 'data', but the mesh's axes are "
        "'model'",
    ),
    "too few": ({"target": "cpu:8", "mesh": {"data": 4}}, ValueError, "got data=4 = 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISUSED)
def test_misuse(name):
    options, kind, message = MISUSED[name]
    made = engine()
    with pytest.raises(kind) as error:
        made.audit(step, made.create_state(W), {"x": np.zeros((4, 6), np.float32)}, **options)
    assert message in str(error.value)


def test_a_shard_that_other_axes_cannot_share():
    made = engine(
        mesh=tx.MeshSpec(jax.devices()[:2], ("data", "model"), (2, 1)),
        plan=tx.Plan(data_parallel=tx.DP("data"), batch={"x": P("data", "model")}),
    )
    with pytest.raises(ValueError, match=r"batch\['x'\] has 5 in dim 1, which 2 devices along"):
        made.audit(
            step, made.create_state(W), {"x": np.zeros((4, 5))},
            target="cpu:8", mesh={"data": 4, "model": 2},
        )  # fmt: skip


def test_another_engine_s_state_is_refused():
    with pytest.raises(ValueError, match="states that its create_state made"):
        engine().audit(step, engine().create_state(W), {}, target="cpu:8", mesh={"data": 8})


def test_a_forgotten_reduction_is_an_error_there_too():
    @tx.step_fn
    def forgets(state, batch):
        loss, grads = tx.value_and_grad(lambda p: jnp.sum(batch["x"] @ p["w"]))(state.params)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    made = engine()
    with pytest.raises(ValueError, match="vari"):
        made.audit(
            forgets, made.create_state(W), {"x": np.zeros((4, 6), np.float32)},
            target="cpu:8", mesh={"data": 8},
        )  # fmt: skip
