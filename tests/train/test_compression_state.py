"""What a compression keeps, as part of the train state: saved, resumed, resharded, skipped."""

import os
import pathlib
import signal
import subprocess
import sys

import checkpoint_cases as runs
import jax
import killed_compressed_run
import numpy as np
import pytest
import split_models as models
import toys

import txcore as tx

pytestmark = pytest.mark.sampled(2)

ALL = os.environ.get("TXCORE_ALL_PLANS") == "1"
COMPRESSIONS = killed_compressed_run.KINDS
STATEFUL = ["int8", "powersgd", "top-k"]


def plan(compression, **options):
    return tx.Plan(data_parallel=tx.DP("data", compression=compression), **options)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_run_resumes_bit_for_bit(tmp_path, name):
    """Stopped after 6 of 9 steps, in new objects: the curve and all that is kept are the same."""
    options = killed_compressed_run.options(name)
    whole, end = runs.train(None, **options)
    runs.train(tmp_path, **{**options, "steps": 6})
    rest, resumed = runs.train(tmp_path, resume="must", **options)
    runs.equal(end, resumed)
    assert rest.steps == {k: v for k, v in whole.steps.items() if k > 6}
    if name in STATEFUL:
        errors = jax.tree.leaves(end.comm_state["compression"]["errors"])
        assert any(np.any(np.asarray(e)) for e in errors)


@pytest.mark.parametrize("name", COMPRESSIONS if ALL else ["powersgd"])
def test_a_run_that_is_killed_goes_on_bit_for_bit(tmp_path, name):
    """By SIGKILL while it trains: what it resumes from is some checkpoint that is whole."""
    script = pathlib.Path(__file__).with_name("killed_compressed_run.py")
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    given = [sys.executable, str(script), str(tmp_path), name, "7"]
    killed = subprocess.run(given, env=environment, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert set(runs.saved(tmp_path)) & {"step_00000003", "step_00000006"}
    whole, end = runs.train(None, **killed_compressed_run.options(name))
    rest, resumed = runs.train(tmp_path, resume="must", **killed_compressed_run.options(name))
    runs.equal(end, resumed)
    assert rest.steps == {k: v for k, v in whole.steps.items() if k >= min(rest.steps)}


matrices = killed_compressed_run.params


def pending(state):
    errors = state.comm_state["compression"]["errors"]
    return {k: np.float64(np.asarray(e)) for k, e in errors.items()}


# Errors of any compression are put on other devices in one way: each kind takes some of them.
MOVES = [(4, 2), (2, 3), (3, 1), (1, 2)]
MOVED = {"int8": MOVES[:1], "powersgd": MOVES[1:2], "top-k": MOVES[2:]}


@pytest.mark.parametrize(
    "name, before, after",
    [(name, *move) for name in STATEFUL for move in (MOVES if ALL else MOVED[name])],
)
def test_other_devices_get_the_mean_of_what_is_pending(tmp_path, name, before, after):
    options = {"plan": plan(COMPRESSIONS[name]), "params": matrices()}
    batches = [toys.batch(size=12, seed=i) for i in range(6)]
    _, saved = runs.train(tmp_path, n=before, steps=3, data=batches, **options)
    engine = runs.engine(after, plan=options["plan"])
    with tx.Checkpoints(tmp_path, every=3, resume="must") as checkpoints:
        state, _ = checkpoints.restore(runs.start(engine, options["params"]))
    for key, one in pending(saved).items():
        assert one.shape[0] == before
        found = pending(state)[key]
        wanted = np.stack([one.mean(0)] * after)
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6 * np.abs(one).max())
    for field in ("stored_params", "opt_state", "step"):
        jax.tree.map(np.testing.assert_array_equal, saved.arrays[field], state.arrays[field])
    _, end = runs.train(tmp_path, n=after, steps=6, data=batches, resume="must", **options)
    assert int(end.step) == 6


@pytest.mark.parametrize("name", STATEFUL)
def test_parts_of_another_size_keep_what_is_pending(tmp_path, name):
    """Parameters in two parts go on in one, and back."""
    compression = COMPRESSIONS[name]

    def run(shape, steps, resume="auto"):
        engine = tx.Engine(
            mesh=models.mesh(*shape),
            plan=plan(compression, params=RULES),
            optimizer=tx.optim.sgd(0.05, momentum=0.9),
        )
        checkpoints = tx.Checkpoints(tmp_path, every=2, resume=resume)
        state = engine.create_state(wide())
        batches = [models.batch(seed=i) for i in range(6)]
        return engine.fit(models.train_step, state, batches, steps=steps, checkpoints=checkpoints)

    first = run((2, 2), 2)
    second = run((2, 1), 2, "must")
    for a, b in zip(errors_of(first), errors_of(second), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(run((4, 2), 4, "must").step) == 4


RULES = dict(list(models.RULES.items())[:2]) | {"mlp/w2": models.RULES["mlp/w2"]}


def wide():
    """Parameters of the split model with two matrices that stay large enough in two parts."""
    rng = np.random.default_rng(0)
    shapes = {"w1": (6, 64), "b1": (64,), "w2": (64, 3)}
    mlp = {name: (0.3 * rng.normal(size=s)).astype(np.float32) for name, s in shapes.items()}
    return {"mlp": mlp, "b2": np.zeros(3, np.float32), "scale": np.ones(6, np.float32)}


def errors_of(state):
    return list(map(np.asarray, jax.tree.leaves(state.comm_state["compression"]["errors"])))


def test_another_compression_is_another_run(tmp_path):
    runs.train(tmp_path, steps=3, plan=plan("int8"))
    text = r"is of another model, optimizer, .*comm_state\['compression'\]\['errors'\]\['w1'\]"
    with pytest.raises(tx.CheckpointError, match=text):
        runs.train(tmp_path, steps=6, plan=plan(None))
    with pytest.raises(tx.CheckpointError, match=r"\(float32\[copies, 4, 9\]\)|copies, 4, 9"):
        params = {"w1": np.ones((4, 9), np.float32), "w2": np.ones((9, 1), np.float32)}
        runs.train(tmp_path, steps=6, plan=plan("int8"), params=params)


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_skipped_step_leaves_it_as_it_was(name, precision):
    scale = {"loss_scale": 64.0} if precision == "float16" else {}
    engine = tx.Engine(
        mesh=models.mesh(4, 1),
        plan=plan(COMPRESSIONS[name], params=models.RULES),
        optimizer=tx.optim.sgd(0.05),
        precision=tx.Precision(precision, **scale),
        on_nonfinite="stop" if precision == "float16" else "skip",
    )
    state = engine.create_state(wide())
    for seed in range(3):
        state, _ = models.train_step(state, models.batch(seed))
    before = models.host(state.comm_state)
    bad = models.batch(7)
    bad["x"][3] = np.inf
    state, _ = models.train_step(state, bad)
    assert int(state.loss_scaling.skipped_steps) == 1
    jax.tree.map(np.testing.assert_array_equal, before, models.host(state.comm_state))
    state, metrics = models.train_step(state, models.batch(8))
    assert np.isfinite(metrics["loss"])
    assert int(state.step) == 4


@pytest.mark.parametrize("name", STATEFUL)
def test_copies_may_differ(name):
    """Those of the errors are each device's own; everything else is still compared."""
    engine = toys.engine(4, plan=plan(COMPRESSIONS[name]))
    state = engine.create_state(matrices())
    state = engine.fit(toys.train_step, state, [toys.batch()] * 4, steps=4, check_replicas_every=2)
    engine.check_replicas(state)
    errors = pending(state)["w1"]
    assert not np.array_equal(errors[0], errors[1])


def test_an_optimizer_of_whole_examples_is_refused():
    optimizer = tx.optim.from_optax(__import__("optax").sgd(0.1), per_example=True)
    with pytest.raises(ValueError, match="compression=None with an optimizer of per_example=True"):
        toys.engine(2, plan=plan("bf16"), optimizer=optimizer)
