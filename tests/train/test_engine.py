"""The engine: right numbers on any number of devices, one compilation, nothing deleted."""

import gc
import io
import json
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys

import txcore as tx


@pytest.mark.parametrize("masked", [0, 5], ids=["whole", "masked"])
@pytest.mark.parametrize("n", [1, 2, 8])
def test_a_step_equals_float64_numpy(n, masked):
    engine = toys.engine(n)
    batch = toys.batch(masked=masked)
    state, metrics = toys.train_step(engine.create_state(toys.params()), batch)
    wanted, loss = toys.reference_step(toys.params(), batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    for key in wanted:
        np.testing.assert_allclose(state.params[key], wanted[key], rtol=1e-4, atol=1e-6)
    assert int(state.step) == 1


def test_loss_curves_agree_on_meshes_with_other_axes():
    curves = []
    for mesh in (
        toys.mesh(1),
        toys.mesh(4),
        toys.mesh(4, ("data", "model"), (2, 2)),
        toys.mesh(4, ("a", "data"), (1, 4)),
    ):
        engine = toys.engine(0, mesh=mesh)
        state, curve = engine.create_state(toys.params()), []
        for i in range(20):
            state, metrics = toys.train_step(state, toys.batch(seed=i, masked=i % 4))
            curve.append(float(metrics["loss"]))
        curves.append(curve)
    for curve in curves[1:]:
        np.testing.assert_allclose(curve, curves[0], rtol=1e-4)
    assert curves[0][-1] < curves[0][0] / 2


def test_batch_over_two_data_axes():
    plan = tx.Plan(data_parallel=tx.DP(axis=("host", "data")))
    engine = toys.engine(0, mesh=toys.mesh(8, ("host", "data"), (2, 4)), plan=plan)

    @tx.step_fn
    def step(state, batch):
        def loss_of(params):
            losses = toys.losses(params, batch)
            return tx.example_mean(losses, batch["mask"], axis=("host", "data"))

        loss, grads = tx.value_and_grad(loss_of)(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, ("host", "data"))}

    batch = toys.batch(masked=3)
    state, metrics = step(engine.create_state(toys.params()), batch)
    wanted, loss = toys.reference_step(toys.params(), batch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(state.params["w1"], wanted["w1"], rtol=1e-4)


def test_plan_may_shard_a_leaf_of_the_batch_otherwise():
    from jax.sharding import PartitionSpec as P

    plan = tx.Plan(data_parallel=tx.DP("data"), batch={"table": P(None, "data"), "all": P()})
    engine = toys.engine(2, plan=plan)

    @tx.step_fn
    def step(state, batch):
        assert batch["table"].shape == (3, 4)
        assert batch["all"].shape == (5,)
        total = tx.psum(batch["table"].sum(), "data") + batch["all"].sum()
        return state.replace(extra=state.extra + 1), {"total": total}

    batch = {"x": np.zeros(4), "table": np.ones((3, 8)), "all": np.ones(5)}
    state, metrics = step(engine.create_state(toys.params(), extra=jnp.zeros(())), batch)
    assert float(metrics["total"]) == 29
    assert float(state.extra) == 1


def test_nothing_of_the_callers_is_deleted():
    """create_state twice, a step, then params still alive and equal; one step, two engines."""
    params = jax.tree.map(jnp.asarray, toys.params())
    placed = jax.device_put(params, toys.mesh(2).sharding())
    one, two = toys.engine(1), toys.engine(2)
    a, b, c = one.create_state(params), one.create_state(params), two.create_state(placed)
    batch = jax.tree.map(jnp.asarray, toys.batch())
    a, _ = toys.train_step(a, batch)
    c, _ = toys.train_step(c, batch)
    b, _ = toys.train_step(b, batch)
    for key, value in toys.params().items():
        np.testing.assert_array_equal(params[key], value)
        np.testing.assert_array_equal(placed[key], value)
        np.testing.assert_array_equal(a.params[key], b.params[key])
        np.testing.assert_allclose(a.params[key], c.params[key], rtol=1e-5)
    np.testing.assert_array_equal(batch["x"], toys.batch()["x"])


def test_compiles_once_in_1000_steps_over_several_epochs():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: (
            compiled.append(event) if event.endswith("compile_duration") else None
        )
    )
    engine = toys.engine(2, optimizer=tx.optim.sgd(0.01, momentum=0.9))
    data = [toys.batch(seed=i) for i in range(9)] + [toys.batch(masked=7)]
    state = engine.create_state(toys.params())
    jax.block_until_ready(state)
    compiled.clear()
    state = engine.fit(toys.train_step, state, data, steps=1000)
    assert int(state.step) == 1000
    assert len([c for c in compiled if "backend_compile" in c]) == 1, compiled


def test_no_collective_in_the_program_of_one_device():
    engine = toys.engine(1)
    report = engine.audit(toys.train_step, engine.create_state(toys.params()), toys.batch())
    assert report.collectives == ()
    assert report.ok


def test_audit_accounts_for_every_byte():
    engine = toys.engine(2)
    report = engine.audit(toys.train_step, engine.create_state(toys.params()), toys.batch())
    assert report.ok
    assert report.exact
    assert {c.origin for c in report.collectives} == {"txcore"}
    gradients = sum(4 * p.size for p in toys.params().values())
    assert report.payload_bytes == gradients + 4 + 4  # the loss, the count of real examples


def test_evaluate_is_the_mean_over_real_examples():
    data = [toys.batch(seed=1), toys.batch(seed=2, masked=11)]
    values = [toys.reference_step(toys.params(), b)[1] for b in data]
    wanted = (16 * values[0] + 5 * values[1]) / 21
    for n in (1, 4):
        engine = toys.engine(n)
        state = engine.create_state(toys.params())
        for step in (toys.eval_step, tx.step_fn(toys.eval_step)):
            metrics = engine.evaluate(step, state, data)
            np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-5)
        assert not state.step.is_deleted()
    without_mask = engine.evaluate(
        lambda state, x: {"mean": tx.pmean(x.mean(), "data")}, state, [np.arange(8.0)]
    )
    assert without_mask == {"mean": 3.5}


def test_dropout_is_the_same_on_any_number_of_devices():
    @tx.step_fn
    def step(state, batch):
        keys = state.example_keys(batch)
        noise = jax.vmap(lambda key: jax.random.normal(key))(keys)
        return state.replace(step=state.step + 1), {
            "noise": tx.all_gather(noise, "data", invariant=True)
        }

    curves = []
    for n in (1, 2, 8):
        engine = toys.engine(n, seed=7)
        state = engine.create_state(toys.params())
        rows = []
        for _ in range(3):
            state, metrics = step(state, np.zeros(16, np.float32))
            rows.append(np.asarray(metrics["noise"]))
        curves.append(np.stack(rows))
    np.testing.assert_array_equal(curves[0], curves[1])
    np.testing.assert_array_equal(curves[0], curves[2])
    assert len(np.unique(curves[0])) == 48  # another number for each example and step
    other = toys.engine(1, seed=8)
    _, metrics = step(other.create_state(toys.params()), np.zeros(16, np.float32))
    assert not np.any(np.isin(metrics["noise"], curves[0]))


def test_bfloat16_computes_in_bfloat16_and_stores_and_sends_float32():
    @tx.step_fn
    def step(state, batch):
        def loss_of(params):
            cast = state.precision.cast(params)
            assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {jnp.dtype("bfloat16")}
            return toys.local_loss(cast, state.precision.cast(batch))

        loss, grads = tx.value_and_grad(loss_of)(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    engine = toys.engine(2, precision="bfloat16")
    state = engine.create_state(toys.params())
    report = engine.audit(step, state, toys.batch())
    assert {c.dtype for c in report.collectives} == {"float32"}
    state, _ = step(state, toys.batch())
    wanted, _ = toys.reference_step(toys.params(), toys.batch())
    assert state.params["w1"].dtype == jnp.float32
    np.testing.assert_allclose(state.params["w1"], wanted["w1"], rtol=0.1, atol=0.02)


def test_optax_gives_what_optax_gives():
    import optax

    engine = toys.engine(2, optimizer=optax.adam(1e-2))
    state = engine.create_state(toys.params())
    params = jax.tree.map(jnp.asarray, toys.params())
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(params)
    for i in range(5):
        batch = toys.batch(seed=i)
        state, _ = toys.train_step(state, batch)
        grads = jax.grad(lambda p, b=batch: jnp.mean(toys.losses(p, b)))(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), state.params, params)


def test_fit_tells_the_loggers(tmp_path):
    records, out = [], io.StringIO()
    path = tmp_path / "logs" / "train.jsonl"
    loggers = [records.append, tx.loggers.Basic(every=4, stream=out), tx.loggers.JSONL(path)]
    engine = toys.engine(2, loggers=loggers)
    state = engine.create_state(toys.params())
    data = [toys.batch(seed=i) for i in range(5)]
    state = engine.fit(
        toys.train_step,
        state,
        lambda epoch: data,
        steps=10,
        evaluate=lambda s: engine.evaluate(toys.eval_step, s, data),
        eval_every=5,
    )
    kinds = [r.kind for r in records]
    assert kinds == ["step"] * 5 + ["eval"] + ["step"] * 5 + ["eval", "end"]
    assert [r.step for r in records if r.kind == "step"] == list(range(1, 11))
    end = records[-1]
    times = [r.seconds for r in records]
    assert times == sorted(times)
    assert times[4] == times[5]  # evaluation is no training time
    assert end.examples == 160
    assert end.examples_per_second == 160 / end.seconds
    assert end.compile_seconds > 0
    lines = out.getvalue().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == [
        "1/10",
        "4/10",
        "8/10",
        "10/10",
    ]
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [w["kind"] for w in written] == kinds
    assert written[0]["metrics"]["loss"] == records[0].metrics["loss"]


def test_basic_draws_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    log = tx.loggers.Basic(every=100, stream=out)
    log(tx.loggers.Record("step", 50, 200, {"loss": 0.5}, 1.0, 100, 0.0))
    assert "[#####...............] step" in out.getvalue()
    assert "25.0%  loss 0.5000" in out.getvalue()
    assert not out.getvalue().endswith("\n")


def test_epochs_and_data_that_ends():
    engine = toys.engine(1)
    data = [toys.batch(seed=i) for i in range(3)]
    state = engine.fit(toys.train_step, engine.create_state(toys.params()), data, epochs=2)
    assert int(state.step) == 6
    text = "needs data for 4 steps, but the data ended after 3 batches: pass a list of batches"
    with pytest.raises(ValueError, match=text):
        engine.fit(toys.train_step, state, iter(data), steps=10)


def test_a_host_buffer_may_be_filled_anew_at_once():
    """fit reads ahead while steps are under way: it must not train on what comes later."""
    raw = np.zeros(512 * 512 + 16, np.float32)
    start = -raw.ctypes.data % 64 // 4  # jax uses aligned host memory without a copy
    buffer = raw[start : start + 512 * 512].reshape(512, 512)

    def data(epoch):
        for i in range(8):
            buffer[:] = i
            yield buffer

    @tx.step_fn
    def step(state, x):
        slow = jax.lax.fori_loop(0, 20, lambda _, y: y @ x * 0 + x, x)
        return state.replace(step=state.step + 1), {"mean": tx.pmean(slow.mean(), "data")}

    seen = []
    engine = toys.engine(1, loggers=[seen.append])
    engine.fit(step, engine.create_state(toys.params()), data, steps=8)
    assert [r.metrics["mean"] for r in seen[:-1]] == list(range(8))


def test_evaluate_finds_the_examples_and_the_mask():
    """A leaf in another layout is no example; a mask counts in a named tuple too."""
    from collections import namedtuple

    from jax.sharding import PartitionSpec as P

    plan = tx.Plan(data_parallel=tx.DP("data"), batch={"a": P()})
    engine = toys.engine(2, plan=plan)
    state = engine.create_state(toys.params())
    data = [{"a": np.zeros(3), "x": np.full(16, 0.0)}, {"a": np.zeros(3), "x": np.full(8, 1.0)}]
    metrics = engine.evaluate(
        lambda s, b: {"deep": {"mean": tx.pmean(b["x"].mean(), "data")}}, state, data
    )
    assert metrics == {"deep": {"mean": pytest.approx(1 / 3)}}

    Batch = namedtuple("Batch", ["x", "mask"])
    engine = toys.engine(2)
    state = engine.create_state(toys.params())
    nothing = Batch(np.full(8, np.nan), np.zeros(8))
    data = [Batch(np.full(8, 2.0), np.ones(8)), Batch(np.full(8, 9.0), np.eye(8)[0]), nothing]

    def mean(s, b):
        return {"mean": tx.pmean(tx.example_mean(b.x, b.mask, axis="data"), "data")}

    assert engine.evaluate(mean, state, data) == {"mean": pytest.approx((8 * 2 + 9) / 9)}


def test_gradients_of_microbatches_add_up():
    """Accumulation: the counts of the microbatches add up, by example_mean of the whole batch."""

    @tx.step_fn
    def step(state, batch):
        keys = state.example_keys(batch)
        assert len(keys) == len(batch["mask"])
        parts = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)

        def loss_of(params):
            losses = jax.lax.map(lambda part: toys.losses(params, part), parts)
            return tx.example_mean(losses.reshape(-1), batch["mask"], axis="data")

        loss, grads = tx.value_and_grad(loss_of)(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    batch = toys.batch(masked=5)
    wanted, _ = toys.reference_step(toys.params(), batch)
    engine = toys.engine(2)
    state, _ = step(engine.create_state(toys.params()), batch)
    np.testing.assert_allclose(state.params["w1"], wanted["w1"], rtol=1e-4, atol=1e-6)


def test_fit_evaluates_once_after_the_last_step():
    records = []
    engine = toys.engine(1, loggers=[records.append])
    data = [toys.batch()] * 4
    engine.fit(
        toys.train_step,
        engine.create_state(toys.params()),
        lambda epoch: data,
        epochs=1,
        evaluate=lambda state: {"v": jnp.float32(0.5)},
        eval_every=2,
    )
    assert [r.kind for r in records] == ["step"] * 2 + ["eval"] + ["step"] * 2 + ["eval", "end"]
    assert records[2].metrics == {"v": 0.5}


def test_jsonl_writes_null_for_nan(tmp_path):
    path = tmp_path / "log.jsonl"
    tx.loggers.JSONL(path)(
        tx.loggers.Record("step", 1, 2, {"a": {"b": [1.0, np.nan]}}, 1.0, 8, 0.0)
    )
    assert json.loads(path.read_text())["metrics"] == {"a": {"b": [1.0, None]}}


def test_an_engine_goes_when_its_owner_lets_it_go():
    engine = toys.engine(2)
    state, _ = toys.train_step(engine.create_state(toys.params()), toys.batch())
    engine.evaluate(toys.eval_step, state, [toys.batch()])
    gone = weakref.ref(engine)
    del engine, state
    gc.collect()
    assert gone() is None


def test_compiling_another_batch_shape_is_no_training_time():
    records = []
    engine = toys.engine(1, loggers=[records.append])
    data = [toys.batch()] * 4 + [toys.batch(size=24)] * 2
    state = engine.create_state(toys.params())
    started = time.perf_counter()
    engine.fit(toys.train_step, state, data, steps=6)
    wall = time.perf_counter() - started
    assert records[-1].compile_seconds > 0
    assert records[-1].seconds + records[-1].compile_seconds <= wall
