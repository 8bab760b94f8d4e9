"""A step that runs again takes no look-up; what differs from the last one is still seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.train import Position
from txcore.train.loop.progress import Progress
from txcore.train.steps.steps import Steps


def placed(engine, seed=1, size=16):
    return jax.device_put(toys.batch(size, seed), engine.mesh.sharding("data"))


@pytest.fixture
def looked_up(monkeypatch):
    """What was looked up in the table of compiled steps."""
    calls, inner = [], Steps.compile

    def counting(self, *args, **kwargs):
        calls.append(args)
        return inner(self, *args, **kwargs)

    monkeypatch.setattr(Steps, "compile", counting)
    return calls


def ran(engine, batches):
    """The losses of one step for each batch."""
    state, losses = engine.create_state(toys.params()), []
    for batch in batches:
        state, metrics = engine.run(toys.train_step, state, batch)
        losses.append(float(metrics["loss"]))
    return losses


@pytest.mark.parametrize("n", [1, 2])
def test_a_batch_on_the_mesh_is_looked_up_once(n, looked_up):
    engine = toys.engine(n)
    losses = ran(engine, [placed(engine, seed) for seed in range(5)])
    assert len(looked_up) == 1
    assert losses == ran(toys.engine(n), [toys.batch(seed=seed) for seed in range(5)])


def test_what_differs_is_looked_up_again():
    """Another shape, place, structure, or a batch of the host: as if it were the first."""
    engine = toys.engine(2)
    like = [placed(engine, seed) for seed in range(3)]
    others = [
        placed(engine, 3, size=8),
        toys.batch(seed=4),
        jax.device_put(toys.batch(seed=5), engine.mesh.sharding()),  # whole on every device
        jax.tree.map(jnp.asarray, toys.batch(seed=6)),  # on one device
        {**placed(engine, 7), "more": placed(engine, 7)["y"]},
        {**placed(engine, 8), "y": toys.batch(seed=8)["y"]},
        {**placed(engine, 9), "x": placed(engine, 9)["x"].astype(jnp.bfloat16)},
    ]
    mixed = [batch for other in others for batch in (like[0], other, like[1])]
    fresh = [jax.tree.map(np.asarray, batch) for batch in mixed]
    np.testing.assert_array_equal(ran(engine, mixed), ran(toys.engine(2), fresh))


def test_a_host_array_is_copied_though_the_last_batch_was_on_the_mesh():
    engine = toys.engine(1)
    buffer, state, losses = toys.batch(seed=0), engine.create_state(toys.params()), []
    state, _ = engine.run(toys.train_step, state, placed(engine))
    for seed in range(1, 6):
        for key, leaf in toys.batch(seed=seed).items():
            buffer[key][...] = leaf
        state, metrics = engine.run(toys.train_step, state, buffer)
        losses.append(metrics["loss"])
    want = ran(toys.engine(1), [toys.batch(seed=1), *(toys.batch(seed=s) for s in range(1, 6))])
    assert list(map(float, losses)) == want[1:]


def test_a_donated_state_is_still_named():
    engine = toys.engine(2)
    state = engine.create_state(toys.params())
    state, _ = engine.run(toys.train_step, state, placed(engine))
    old, (state, _) = state, engine.run(toys.train_step, state, placed(engine))
    for batch in (placed(engine), toys.batch()):
        with pytest.raises(ValueError, match="was donated to an earlier step"):
            engine.run(toys.train_step, old, batch)
    other = toys.engine(2)
    with pytest.raises(ValueError, match="states that its create_state made"):
        other.run(toys.train_step, state, placed(other))
    assert int(engine.run(toys.train_step, state, placed(engine))[0].step) == 3


def test_a_changed_state_runs_with_what_it_holds():
    engine = toys.engine(2)
    state = engine.create_state(toys.params())
    for _ in range(3):
        state, _ = engine.run(toys.train_step, state, placed(engine))
    params = toys.params(seed=9)
    changed = state.replace(stored_params=params)
    after, _ = engine.run(toys.train_step, changed, placed(engine))
    whole = toys.engine(2)
    want, _ = whole.run(toys.train_step, whole.create_state(params), toys.batch())
    jax.tree.map(np.testing.assert_array_equal, after.stored_params, want.stored_params)
    assert int(after.step) == 4


def test_a_batch_placed_by_another_spec_of_the_same_meaning():
    """With one device along the axis P("data") lies like P()."""
    engine = toys.engine(1)
    for spec in (P("data"), P(), P(None)):
        batch = jax.device_put(toys.batch(), NamedSharding(engine.mesh.mesh, spec))
        assert ran(engine, [batch] * 2) == ran(toys.engine(1), [toys.batch()] * 2)


def test_a_tracer_is_refused_after_a_step_that_ran():
    engine = toys.engine(1)
    state, _ = engine.run(toys.train_step, engine.create_state(toys.params()), placed(engine))
    with pytest.raises(TypeError, match="needs arrays, got"):
        jax.jit(lambda batch: engine.run(toys.train_step, state, batch))(placed(engine))


def test_last_words_are_those_of_the_step_that_ran():
    engine = toys.engine(1)

    @tx.step_fn
    def other(state, batch):
        return state.replace(step=state.step + 1), {}

    state = engine.create_state(toys.params())
    for step in (toys.train_step, toys.train_step, other, other, toys.train_step):
        state, _ = engine.run(step, state, placed(engine))
        assert engine.last_words.startswith(step.__name__)


@pytest.mark.parametrize(("seconds", "ahead"), [(1e-4, 64), (0.0021, 47), (0.008, 12), (0.5, 4)])
def test_short_steps_run_further_ahead_of_the_host_than_long_ones(seconds, ahead, monkeypatch):
    """On an accelerator; a simulated device shares the host's cores, and stays at one."""
    engine, told = toys.engine(1), []
    made = Progress(engine._steps, [told.append], 100, Position(), lambda done, metrics: None)
    assert made.run_ahead == 1
    made._on_cpu, clock = False, iter(np.arange(100) * seconds)
    monkeypatch.setattr(made, "_now", lambda: float(next(clock)))
    made.start_clock()
    for _ in range(80):
        made.add({"loss": jnp.float32(1)}, 16)
    assert made.run_ahead == ahead
    assert len(told) == 80 - ahead  # the newest ones are not waited for
    made.stop_clock()
    assert [record.step for record in told] == list(range(1, 81))
