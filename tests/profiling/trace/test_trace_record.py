"""`tx.profile`: which steps it records, where, and what it refuses."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import txcore as tx
from txcore import step_events
from txcore.profiling.trace.record import Recording
from txcore.profiling.trace.trace import read_trace


@pytest.fixture
def training():
    mesh = tx.MeshSpec(jax.devices()[:2], ("data",))
    plan = tx.Plan(data_parallel=tx.DP("data"))
    engine = tx.Engine(mesh=mesh, plan=plan, optimizer=tx.optim.sgd(0.1))

    @tx.step_fn
    def step(state, batch):
        def loss_of(params, batch):
            return jnp.mean((batch @ params["w"]) ** 2)

        loss, grads = tx.value_and_grad(loss_of)(state.params, batch)
        grads = tx.pmean(grads, "data", name="grads")
        return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data")}

    state = engine.create_state({"w": np.ones((16, 8), np.float32)})
    batches = [np.ones((8, 16), np.float32)] * 6
    return engine, step, state, batches


def test_an_engines_steps_count_by_themselves(training, tmp_path):
    engine, step, state, batches = training
    with tx.profile(tmp_path / "trace", steps=range(2, 5)) as recording:
        engine.fit(step, state, batches, steps=6)
    assert (recording.count, recording.recorded) == (6, 3)
    trace = read_trace(tmp_path / "trace")
    assert trace.program == "jit_step"
    assert {s.number for s in trace.steps} == {0, 1, 2}
    assert trace.checked
    assert trace.ok
    assert trace.joined[0] == trace.joined[1]
    assert {c.calls for c in trace.collectives} == {6}
    assert trace.notes == ()
    assert any(w.what == "input" for w in trace.work[0])
    assert step_events.listener is None


def test_a_number_of_steps_leaves_out_the_first(training, tmp_path):
    engine, step, state, batches = training
    with tx.profile(tmp_path, steps=2) as recording:
        for batch in batches:
            state, _ = engine.run(step, state, batch)
    assert recording.recorded == 2
    assert len({s.number for s in read_trace(tmp_path).steps}) == 2


def test_any_loop_of_jax_is_recorded(tmp_path):
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(jnp.arange(8.0), rows)
    sum_up = jax.jit(lambda x: jnp.sin(x).sum())
    sum_up(x).block_until_ready()
    with tx.profile(tmp_path) as recording:
        for _ in range(3):
            with recording.step():
                y = sum_up(x)
        y.block_until_ready()
    assert recording.recorded == 3
    trace = read_trace(tmp_path)
    (found,) = trace.undeclared  # the partitioner's own
    assert (found.row.kind, found.calls) == ("all-reduce", 6)
    assert not trace.checked


def test_a_run_that_ends_early_is_said(training, tmp_path):
    engine, step, state, batches = training
    with tx.profile(tmp_path, steps=range(2, 50)):
        engine.fit(step, state, batches, steps=6)
    (note,) = [n for n in read_trace(tmp_path).notes if "cut off" in n]
    assert note == "rank 0: the trace is cut off after 4 of 48 steps: training ended first"
    with (
        pytest.raises(
            ValueError, match=r"needs more than 50 steps in its block for steps=.* ran 1"
        ),
        tx.profile(tmp_path, steps=range(50, 60)) as recording,
        recording.step(),
    ):
        pass


def test_an_error_leaves_a_whole_trace(training, tmp_path):
    engine, step, state, batches = training

    def run_and_fail():
        for batch in batches:
            nonlocal state
            state, _ = engine.run(step, state, batch)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), tx.profile(tmp_path):
        run_and_fail()
    assert read_trace(tmp_path).steps
    assert step_events.listener is None
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_later_profile_replaces_an_earlier_one(tmp_path):
    stale = tmp_path / "rank7.xplane.pb"
    stale.write_bytes(b"of a larger run")
    with tx.profile(tmp_path):
        jnp.ones(3).block_until_ready()
    assert not stale.exists()
    assert json.loads((tmp_path / "rank0.json").read_text())["processes"] == 1


@pytest.mark.parametrize("steps", [0, -1, True, range(0), range(1, 9, 2), range(-1, 2), "3"])
def test_steps_that_are_none_are_refused(tmp_path, steps):
    with (
        pytest.raises(ValueError, match=r"needs a number of steps .* write steps=5 or steps=range"),
        tx.profile(tmp_path, steps=steps),
    ):
        pass


def test_other_peoples_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"holds thesis.tex: name another"):
        Recording(tmp_path, None)
    with pytest.raises(ValueError, match="is a file: name another"):
        Recording(tmp_path / "thesis.tex", None)


def test_one_profile_at_a_time(tmp_path):
    with tx.profile(tmp_path / "a", steps=1) as recording:
        for _ in range(2):
            with recording.step():
                pass
        with (
            pytest.raises(RuntimeError, match="one trace at a time, but a profile is active"),
            tx.profile(tmp_path / "b"),
        ):
            pass
        assert not pathlib.Path(tmp_path / "b").exists()


def test_a_profile_of_jaxs_own_is_left_alone(tmp_path):
    jax.profiler.start_trace(str(tmp_path / "theirs"))
    try:
        with pytest.raises(RuntimeError), tx.profile(tmp_path / "mine"):
            pass
        assert list((tmp_path / "mine").iterdir()) == []
        assert step_events.listener is None
    finally:
        jax.profiler.stop_trace()
    assert list((tmp_path / "theirs").rglob("*.xplane.pb"))


def test_on_gpu_steps_are_compiled_without_command_buffers(training, tmp_path):
    recording = Recording(tmp_path, None)
    assert recording.compiler_options("cpu") == {}
    assert recording.compiler_options("gpu") == {"xla_gpu_enable_command_buffer": ""}
    engine, step, state, batches = training
    steps = engine._steps
    steps._platform = "gpu"  # the option is known to every compiler, and does nothing here
    state, _ = engine.run(step, state, batches[0])
    with tx.profile(tmp_path) as recording:
        state, _ = engine.run(step, state, batches[0])
        state, _ = engine.run(step, state, batches[0])
    options = [compiled.program.options for compiled in steps._compiled.values()]
    assert ["xla_gpu_enable_command_buffer" in each for each in options] == [False, True]
    engine.run(step, state, batches[0])
    assert len(steps._compiled) == 2
