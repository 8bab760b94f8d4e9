"""What layers in parts send, what they hold, and what they refuse."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.profiling import audit

VOCABULARY, FEATURES, HIDDEN = 96, 8, 16


def program(f, shapes, specs, out_specs, n=4):
    mesh = jax.make_mesh((n,), ("model",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])
    mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out_specs)
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for (shape, dtype), spec in zip(shapes, specs, strict=True)
    ]
    return jax.jit(mapped), args


def two_layers(**options):
    def loss_of(w1, w2, x):
        column = {"gather_dim": 1, **options} if options else {}
        row = {"scatter_dim": 1, **options} if options else {}
        inner = jax.nn.relu(tx.tensor.column_dense(x, w1, axis="model", **column))
        out = tx.tensor.row_dense(inner, w2, axis="model", **row)
        return jnp.sum(out**2)

    sequence = P(None, "model") if options else P()
    specs = (P(None, "model"), P("model"), sequence)
    shapes = [((FEATURES, HIDDEN), "float32"), ((HIDDEN, FEATURES), "float32")]
    shapes.append(((2, 8, FEATURES), "float32"))
    return program(jax.grad(loss_of, argnums=(0, 1, 2)), shapes, specs, specs)


def kinds(report):
    assert report.exact, str(report)
    found = {}
    for c in report.collectives:
        found[c.kind] = found.get(c.kind, 0) + c.trips
    return found


def test_a_pair_of_layers_is_two_sums():
    """One forward, one backward. The forward one is dead here only if its value is not used."""
    f, args = two_layers()
    assert kinds(audit(f, *args)) == {"all-reduce": 2}


def test_sequence_parallel_layers_gather_and_scatter():
    """Forward a gather and a scatter, backward a scatter and a gather; the input is gathered again
    for the gradient of the weights only if it was not kept."""
    f, args = two_layers(overlap=False)
    assert kinds(audit(f, *args)) == {"all-gather": 2, "reduce-scatter": 2}


def test_rings_are_permutes_alone():
    f, args = two_layers(overlap=True)
    found = kinds(audit(f, *args))
    # 4 devices: 3 shards arrive in a gather; 2 halves make 3 exchanges each in a scatter.
    assert found == {"collective-permute": 3 + 6 + 3 + 6}


def loss_program(split):
    def loss_of(x, w, labels):
        if split:
            logits = tx.tensor.column_dense(x, w, axis="model", name="logits")
            return jnp.sum(tx.tensor.cross_entropy(logits, labels, axis="model"))
        whole = tx.all_gather(w, "model", dim=1, invariant=True)
        picked = jnp.take_along_axis(jax.nn.log_softmax(x @ whole), labels[:, None], 1)
        return -jnp.sum(picked)

    specs = (P(), P(None, "model"), P())
    shapes = [((6, FEATURES), "float32"), ((FEATURES, VOCABULARY), "float32"), ((6,), "int32")]
    return program(jax.grad(loss_of, argnums=(0, 1)), shapes, specs, (P(), P(None, "model")))


@pytest.mark.parametrize("split", [True, False])
def test_no_device_ever_holds_whole_logits(split):
    """The sizes are such that nothing else has rows of the whole vocabulary."""
    f, args = loss_program(split)
    text = f.lower(*args).compile().as_text()
    whole = re.search(rf"f32\[6,{VOCABULARY}\]", text)
    assert bool(whole) is not split
    if split:
        assert kinds(audit(f, *args)) == {
            "all-reduce": 3
        }  # maximum, sums, and the input's gradient


REFUSED = {
    "w is whole": (
        lambda x, w: tx.tensor.column_dense(x, w * 0 + 1, axis="model"),
        (P(), P()),
        "tensor.column_dense needs w this device's part along 'model', got the same array on every "
        "device, shape (8, 8): store it in parts, by TP('model', rules={path: -1}) in the plan, or "
        "PartitionSpec(None, 'model') in in_specs=",
    ),
    "rows are whole": (
        lambda x, w: tx.tensor.row_dense(x, w, axis="model"),
        (P(None, "model"), P()),
        "tensor.row_dense needs w this device's part along 'model', got the same array on every "
        "device, shape (8, 8): store it in parts, by TP('model', rules={path: -2}) in the plan, or "
        "PartitionSpec('model') in in_specs=",
    ),
    "the features are gathered": (
        lambda x, w: tx.tensor.column_dense(x, w, axis="model", gather_dim=-1),
        (P(), P(None, "model")),
        "tensor.column_dense needs gather_dim= a dim of x before its features, got -1 for shape "
        "(8, 8)",
    ),
    "overlap of nothing": (
        lambda x, w: tx.tensor.column_dense(x, w, axis="model", overlap=True),
        (P(), P(None, "model")),
        "tensor.column_dense needs gather_dim= the sequence's dim with overlap=True, got None: a "
        "ring sends shards of it",
    ),
    "the devices do not divide it": (
        lambda x, w: tx.tensor.row_dense(x[:6], w, axis="model", scatter_dim=0, overlap=True),
        (P(None, "model"), P("model")),
        "tensor.row_dense needs scatter_dim=0 of x divisible by the 4 devices of 'model', got "
        "shape (6, 2): pad it to 8",
    ),
    "labels of floats": (
        lambda x, w: tx.tensor.cross_entropy(w, x[:, 0], axis="model"),
        (P(), P(None, "model")),
        "tensor.cross_entropy needs labels to be integers, got float32: cast them first",
    ),
    "labels of another shape": (
        lambda x, w: tx.tensor.cross_entropy(w, jnp.zeros(3, jnp.int32), axis="model"),
        (P(), P(None, "model")),
        "tensor.cross_entropy needs labels of the shape of logits without their last dim, (8,), "
        "got (3,)",
    ),
    "too much smoothing": (
        lambda x, w: tx.tensor.cross_entropy(
            w, jnp.zeros(8, jnp.int32), axis="model", label_smoothing=1.0
        ),
        (P(), P(None, "model")),
        "tensor.cross_entropy needs label_smoothing= from 0 to below 1, got 1.0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    f, specs, text = REFUSED[case]
    x = np.ones((8, 8), np.float32)
    with pytest.raises((ValueError, TypeError)) as found:
        tx.testing.run_sharded(f, x, x, axes={"model": 4}, in_specs=specs, out_specs=P("model"))
    assert str(found.value) == text


def test_in_a_step_without_a_split_the_layers_are_whole():
    """The engine leaves axes of one device out: the same step runs on it."""
    rng = np.random.default_rng(0)
    params = {
        "w1": rng.normal(size=(4, 8)).astype(np.float32),
        "b1": np.zeros(8, np.float32),
        "w2": rng.normal(size=(8, 16)).astype(np.float32),
    }
    batch = {"x": rng.normal(size=(8, 4)).astype(np.float32), "y": rng.integers(0, 16, 8)}
    rules = {"w1": P(None, "model"), "b1": P("model"), "w2": P("model")}

    def loss_of(params, batch):
        inner = tx.tensor.column_dense(batch["x"], params["w1"], params["b1"], axis="model")
        logits = tx.tensor.row_dense(jnp.tanh(inner), params["w2"], axis="model")
        one_hot = jax.nn.one_hot(batch["y"], 16)
        return -jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(logits), -1))

    @tx.step_fn
    def step(state, batch):
        loss, grads = tx.value_and_grad(loss_of)(state.params, batch)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data", name="loss")}

    curves = []
    for data, model in ((1, 1), (1, 4), (2, 2), (4, 2)):
        engine = tx.Engine(
            mesh=tx.MeshSpec(jax.devices()[: data * model], ("data", "model"), (data, model)),
            plan=tx.Plan(data_parallel=tx.DP("data"), params=rules),
            optimizer=tx.optim.sgd(0.1),
        )
        state, curve = engine.create_state(params), []
        for _ in range(5):
            state, metrics = engine.run(step, state, batch)
            curve.append(float(metrics["loss"]))
        assert engine.audit(step, state, batch).exact
        curves.append(curve)
    np.testing.assert_allclose(curves, [curves[0]] * 4, rtol=1e-5)
    assert curves[0][-1] < curves[0][0]
