"""Several steps in one program: the same run as one by one, and the same proof."""

import signal
import threading

import jax
import numpy as np
import pytest
import toys

import txcore as tx

STEPS = 12


def batches(epoch, count=5):
    """Batches of which each is another one, some with padding."""
    return [toys.batch(seed=count * epoch + i, masked=i % 3) for i in range(count)]


def started(n, **options):
    engine = toys.engine(n, **options)
    return engine, engine.create_state(toys.params())


def equal(a, b):
    host = [jax.tree.map(np.asarray, state.arrays) for state in (a, b)]
    jax.tree.map(np.testing.assert_array_equal, *host)


PLANS = {
    "data": tx.DP("data"),
    "optimizer in shards": tx.DP("data", shard="optimizer"),
    "parameters in shards": tx.DP("data", shard="parameters"),
    "compressed": tx.DP("data", compression="int8"),
    "delayed": tx.DP("data", delay=1),
    "local": tx.DP("data", sync_every=4),
}


# XLA for CPU contracts products and sums of a shard's update otherwise in a loop: one rounding.
ROUNDS = {"optimizer in shards", "parameters in shards"}


@pytest.mark.parametrize("name", PLANS)
def test_the_curve_is_that_of_single_steps_to_the_last_bit(name):
    most = 3e-7 if name in ROUNDS else 0.0
    plan, optimizer = tx.Plan(data_parallel=PLANS[name]), tx.optim.sgd(0.1, momentum=0.9)
    engine, state = started(2, plan=plan, optimizer=optimizer)
    losses = []
    for batch in batches(0, 8):
        state, metrics = engine.run(toys.train_step, state, batch)
        losses.append(float(metrics["loss"]))
    other, many = started(2, plan=plan, optimizer=optimizer)
    for part in (batches(0, 8)[:4], batches(0, 8)[4:]):
        many, metrics = other.run_many(toys.train_step, many, part)
        np.testing.assert_allclose(metrics["loss"], losses[: len(part)], rtol=most)
        losses = losses[len(part) :]
    host = [jax.tree.map(np.asarray, s.arrays) for s in (many, state)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=10 * most, atol=most), *host)


def test_random_numbers_and_a_loss_scale_are_those_of_single_steps():
    @tx.step_fn
    def step(state, batch):
        def loss_of(params):
            keys = state.example_keys(batch)
            kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5))(keys)
            losses = toys.losses(params, batch) * kept
            return tx.example_mean(losses, batch["mask"], axis="data")

        loss, grads = tx.value_and_grad(loss_of, loss_scale=state.loss_scale)(state.params)
        grads, state = state.sync_gradients(grads)
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    for precision in ("float32", "float16"):
        (engine, state), (other, many) = (started(2, precision=precision) for _ in range(2))
        losses = []
        for batch in batches(0):
            state, metrics = engine.run(step, state, batch)
            losses.append(float(metrics["loss"]))
        many, metrics = other.run_many(step, many, batches(0))
        assert metrics["loss"].tolist() == losses
        equal(many, state)


@pytest.mark.parametrize("n", [1, 2])
def test_batches_of_the_mesh_and_of_the_host(n):
    """Those on the mesh are stacked there; an array of the caller's may be filled anew at once."""
    engine, state = started(n)
    want, _ = engine.run_many(toys.train_step, state, batches(0))
    engine, state = started(n)
    there = [jax.device_put(batch, engine.mesh.sharding("data")) for batch in batches(0)]
    found, _ = engine.run_many(toys.train_step, state, there)
    equal(found, want)


def test_the_audit_counts_the_steps():
    engine, state = started(2)
    one = engine.audit(toys.train_step, state, toys.batch())
    for report in (
        engine.audit(toys.train_step, state, toys.batch(), steps_per_call=7),
        engine.audit(
            toys.train_step,
            state,
            toys.batch(8),
            target="cpu:2",
            mesh={"data": 2},
            steps_per_call=7,
        ),
    ):
        assert report.exact, str(report)
        assert {row.trips for row in report.collectives} == {7}
        assert report.payload_bytes == 7 * one.payload_bytes
        assert [(line.what, line.found_bytes, line.times) for line in report.plan] == [
            (line.what, line.found_bytes, line.times) for line in one.plan
        ]


def test_a_step_that_is_refused_is_refused():
    @tx.step_fn
    def forgets(state, batch):
        _, grads = tx.value_and_grad(toys.local_loss)(state.params, batch)
        return state.apply_gradients(grads=grads), {}

    engine, state = started(2)
    with pytest.raises(ValueError, match="was never reduced there"):
        engine.run_many(forgets, state, batches(0))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ([], "at least one batch"),
        (toys.batch(), "got dict: write"),
        ([toys.batch(16), toys.batch(8)], "of one structure, shapes, dtypes and place"),
    ],
)
def test_wrong_batches_are_refused(given, text):
    engine, state = started(2)
    with pytest.raises(ValueError, match=text):
        engine.run_many(toys.train_step, state, given)


def curve(**options):
    """The records of a run, and its last state."""
    records = []
    engine, state = started(2, loggers=[records.append])
    state = engine.fit(toys.train_step, state, batches, **{"steps": STEPS, **options})
    return [(r.kind, r.step, r.metrics, r.examples) for r in records], state


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("count", [3, 5, 12, 100])
def test_fit_is_the_same_run(count, prefetch):
    """Groups go on over epochs; what is left over runs one by one."""
    want, state = curve()
    found, after = curve(steps_per_call=count, prefetch=prefetch)
    assert found == want
    equal(after, state)


def test_fit_compiles_two_programs_and_evaluates_at_its_boundaries():
    compiled, seen = [], []
    engine, state = started(2)
    inner = engine._steps._compile

    def compile_and_note(*args):
        compiled.append(args[-2])
        return inner(*args)

    def evaluate(state):
        seen.append(int(state.step))
        return {}

    engine._steps._compile = compile_and_note
    engine.fit(
        *(toys.train_step, state, batches),
        steps=14,
        steps_per_call=4,
        evaluate=evaluate,
        eval_every=8,
    )
    assert compiled == [True, False]
    assert seen == [8, 14]


def test_batches_that_are_not_alike_run_one_by_one():
    data = [toys.batch(16, seed=i) for i in range(3)] + [toys.batch(8, seed=3)]
    engine, state = started(2)
    want = engine.fit(toys.train_step, state, data, epochs=2)
    engine, state = started(2)
    equal(engine.fit(toys.train_step, state, data, epochs=2, steps_per_call=2), want)


def test_an_error_of_the_data_comes_after_the_batches_before_it():
    def data(epoch):
        yield from batches(0)[:3]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone") as caught:
        run_fit(data)
    assert int(caught.value.state.step) == 3


def run_fit(data):
    engine, state = started(2)
    engine.fit(toys.train_step, state, data, steps=STEPS, steps_per_call=2)


def test_a_buffer_that_the_loader_fills_anew():
    def data(epoch):
        buffer = toys.batch()
        for batch in batches(epoch):
            for key, leaf in batch.items():
                buffer[key][...] = leaf
            yield buffer

    _, state = curve()
    engine, start = started(2)
    equal(engine.fit(toys.train_step, start, data, steps=STEPS, steps_per_call=4), state)


def test_checkpoints_and_resuming_from_between_two_groups(tmp_path):
    """A signal, or a best evaluation, may save a run elsewhere: single steps lead back."""
    _, state = curve()

    def run(steps, count, **options):
        engine, start = started(2)
        with tx.Checkpoints(tmp_path, every=4, **options) as checkpoints:
            given = {"steps": steps, "checkpoints": checkpoints, "steps_per_call": count}
            return engine.fit(toys.train_step, start, batches, **given)

    run(5, 1)
    equal(run(STEPS, 4, resume="must"), state)


def test_a_signal_stops_between_two_programs():
    main = threading.main_thread().ident
    engine, state = started(2)
    engine.loggers = [lambda record: signal.pthread_kill(main, signal.SIGTERM)]
    with pytest.raises(SystemExit) as caught:
        engine.fit(toys.train_step, state, batches, steps=100, steps_per_call=4)
    made = int(caught.value.state.step)
    assert 0 < made < 100
    assert made % 4 == 0


def test_a_loss_that_is_not_finite_names_its_step():
    def data(epoch):
        for i, batch in enumerate(batches(epoch)):
            yield {**batch, "y": batch["y"] * (np.nan if i == 2 else 1)}

    with pytest.raises(FloatingPointError, match="the loss of step 3 is nan"):
        run_fit(data)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps_per_call": 0}, "steps_per_call= a count of steps from 1 on"),
        ({"steps_per_call": "4"}, "steps_per_call= a count of steps from 1 on"),
        (
            {"steps_per_call": 4, "evaluate": lambda state: {}, "eval_every": 6},
            "eval_every= a multiple of steps_per_call=4.*got 6: give eval_every=4, or "
            "steps_per_call=2",
        ),
        (
            {"steps_per_call": 4, "check_replicas_every": 3},
            "check_replicas_every= a multiple.*give check_replicas_every=4, or steps_per_call=1",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        curve(**options)
