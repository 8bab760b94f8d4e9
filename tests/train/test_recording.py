"""record: activations by name, under whatever jax traces, and nothing where nobody records."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.parity.operations import Side, find_first_difference
from txcore.parity.recording import Recording, recording

record = tx.testing.record
X = np.arange(12, dtype=np.float32).reshape(4, 3)
W = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float32)


def layers(x, w):
    """Two layers in a scan, recomputed, called by name, and each example by itself."""

    @jax.jit
    def layer(x, w):
        return record(jnp.tanh(x @ w), "layer", P(None, "model"))

    x = record(x, "in")
    x, _ = jax.lax.scan(jax.checkpoint(lambda x, w: (layer(x, w), None)), x, w)
    return jax.vmap(lambda row: record(2 * row, "each"))(x)


def run(data, model):
    def f(x, w):
        loss, grads = tx.value_and_grad(lambda w: layers(x, w).mean(), axis="data")(w)
        return tx.pmean((loss, grads), "data")

    axes = {"data": data, "model": model}
    return tx.testing.run_sharded(f, X, W, axes=axes, in_specs=(P("data"), P()), out_specs=P())


def test_it_records_what_numpy_computes():
    plain = run(2, 1)
    with recording() as made:
        found = run(2, 1)
    jax.tree.map(np.testing.assert_array_equal, found, plain)
    wide, layer = X.astype(np.float64), []
    for w in W.astype(np.float64):
        wide = np.tanh(wide @ w)
        layer.append(wide)
    values = {name: [c for c in made.calls if c.name == name] for name in made.names}
    assert list(values) == ["in", "layer", "each"]
    for call in values["each"]:
        rows = slice(2 * call.place["data"], 2 * call.place["data"] + 2)
        np.testing.assert_allclose(call.value, 2 * layer[1][rows], rtol=1e-5)
    assert len(values["each"]) == 2
    firsts = [c for c in values["layer"] if c.place["data"] == 0][:2]
    for call, expected in zip(firsts, layer, strict=True):
        np.testing.assert_allclose(call.value, expected[:2], rtol=1e-5)


def test_without_recording_the_program_is_the_same():
    def plain(x):
        return jnp.tanh(x) * 2

    def named(x):
        return record(jnp.tanh(x), "x") * 2

    texts = [jax.jit(f).lower(X).as_text() for f in (plain, named)]
    assert texts[0].replace("plain", "named") == texts[1]
    with recording() as made:
        jax.jit(named)(X)
    assert len(made.calls) == 1
    jax.jit(named)(X)  # as compiled before
    assert len(made.calls) == 1


def test_a_wrong_call_is_refused():
    with recording():
        with pytest.raises(TypeError, match="a name and a PartitionSpec"):
            record(X, 3)
        text = r"needs 'x' with the examples in dim 0 and a dim for each entry of .*, got shape"
        for value, spec in ((np.float32(1), None), (X, P(None, None, "model"))):
            with pytest.raises(ValueError, match=text):
                record(value, "x", spec)


def record_runs(*functions):
    sides = []
    for f in functions:
        with recording() as made:
            jax.block_until_ready(jax.jit(f)(X))
        sides.append(Side(made))
    return find_first_difference(*sides, factors={2: "devices"}, rtol=1e-4)


def test_what_is_said_of_two_runs():
    def f(x):
        return record(record(x, "a") * 3, "b")

    assert record_runs(f, f).startswith("all recorded operations agree ('a', 'b'): ")
    twice = record_runs(f, lambda x: record(2 * record(x, "a") * 3, "b"))
    assert twice.startswith(
        "the first recorded operation that differs is 'b': 4 of 4 examples, 2 times the "
        "reference's = N for N = 2 devices: "
    )
    alone = record_runs(f, lambda x: record(x, "a"))
    assert alone.endswith("'b': the second run does not record it")
    assert "an example has shape (3,) in the first run and (2,) in the second" in record_runs(
        f, lambda x: record(x[:, :2], "a")
    )
    assert "not finite" in record_runs(f, lambda x: record(record(x, "a") / 0, "b"))
    assert find_first_difference(
        Side(Recording()), Side(Recording()), factors={}, rtol=1e-4
    ).startswith("tx.testing.record(x, name) in the model shows")


def test_a_plan_that_parts_is_told_where():
    """Inside of an engine's step; two layers share a name, and the second one goes wrong."""

    @tx.step_fn
    def step(state, batch):
        def loss_of(params):
            x = record(batch["x"], "x")
            for i in range(2):
                x = record(jnp.tanh(x @ params["w1"] @ params["w1"].T), "layer")
                x = x * (1 + i * 0.5 * (tx.axis_size("data") - 1))
            return tx.example_mean(record(x, "end").mean(1), batch["mask"], axis="data")

        loss, grads = tx.value_and_grad(loss_of)(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    params = {"w1": toys.params()["w1"]}
    with pytest.raises(AssertionError) as found:
        tx.testing.assert_plans_agree(
            step, params, [toys.batch()], engines=(toys.engine(1), toys.engine(2))
        )
    lines = str(found.value).splitlines()
    assert lines[0].startswith("step 0: metrics['loss'] differs between the plans: ")
    assert lines[1].startswith(
        "the first recorded operation that differs is 'end': 16 of 16 examples, 1.5 times the "
        "reference's"
    )
