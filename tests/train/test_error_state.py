"""What leaves `fit` as an exception brings the newest state: alive, and what its steps give."""

import dataclasses
import errno
import functools
import random
import re
import signal
import sys
import threading
import time

import checkpoint_cases as cases
import jax
import numpy as np
import pytest
import toys

import txcore as tx
from txcore.train.checkpoints import folder
from txcore.train.steps.steps import Steps

MANY = 20_000  # steps, more than are made


@functools.cache
def after(steps, n):
    """The state's arrays after so many steps of a loop without fit."""
    state = cases.start(engine_of(n))
    for batch in batches(0)[:steps]:
        state, _ = cases.step(state, batch)
    return jax.tree.map(np.asarray, state.arrays)


@functools.cache
def _batches():
    return [toys.batch(seed=i, masked=i % 3) for i in range(12)]


def batches(epoch):
    return _batches()


@functools.cache
def engine_of(n, on_nonfinite="stop"):
    """An engine for all tests, whose step is compiled once."""
    return cases.engine(n, on_nonfinite=on_nonfinite)


def fails(error, *, data=batches, step=cases.step, directory=None, logger=None, n=2, **options):
    """Run fit, and return the exception that leaves it."""
    engine = engine_of(n)
    engine.loggers = (logger,) if logger else ()
    state = cases.start(engine)
    checkpoints = directory and tx.Checkpoints(directory, every=3)
    with pytest.raises(error) as caught:
        engine.fit(step, state, data, **{"steps": 8, "checkpoints": checkpoints, **options})
    return caught.value


def holds(error, steps, n=2):
    """Check that the state of an exception is that after so many steps."""
    assert int(error.state.step) == steps
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.tree.map(np.asarray, error.state.arrays),
        after(steps, n),
    )


def raising(error, at):
    def data(epoch):
        yield from batches(epoch)[:at]
        raise error

    return data


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_of_the_data(error, n):
    for at in (0, 1, 5):
        holds(fails(error, data=raising(error(), at), n=n), at, n)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_of_a_logger(error):
    def logger(record):
        if record.step == 3:
            raise error

    made = fails(error, logger=logger)
    holds(made, int(made.state.step))
    assert int(made.state.step) in (3, 4), "a step is under way where the third is told"


def test_of_evaluate():
    def evaluate(state):
        raise OSError(errno.EIO, "the test set is gone")

    holds(fails(OSError, evaluate=evaluate, eval_every=4), 4)


def test_of_a_batch_that_the_step_refuses():
    def data(epoch):
        yield from batches(epoch)[:3]
        yield {"x": np.ones((16, 5), np.float32), **{k: batches(0)[0][k] for k in ("y", "mask")}}

    holds(fails(TypeError, data=data), 3)


def test_of_a_batch_that_cannot_be_shared():
    def data(epoch):
        yield from batches(epoch)[:3]
        yield jax.tree.map(lambda x: x[:15], batches(0)[0])

    holds(fails(ValueError, data=data), 3)


def test_of_a_loss_that_is_not_finite():
    made = batches(0)[:]
    made[4] = {**made[4], "y": made[4]["y"] * np.nan}
    error = fails(FloatingPointError, data=made)
    state = cases.start(engine_of(2))
    for batch in made[: int(error.state.step)]:
        state, _ = cases.step(state, batch)
    cases.equal(error.state, state)
    assert int(error.state.step) in (5, 6), "one step may be under way"


def test_of_arguments():
    error = fails(ValueError, steps=1, epochs=1)
    holds(error, 0)


def test_of_data_that_ends():
    holds(fails(ValueError, data=iter(batches(0)[:5])), 5)


class TestCheckpoints:
    @pytest.fixture(autouse=True)
    def _orbax(self):
        pytest.importorskip("orbax.checkpoint")

    def test_that_cannot_be_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(folder, "describe_shortage", lambda directory, need: "it is full")
        error = fails(tx.CheckpointError, directory=tmp_path)
        assert str(error).endswith("was not saved: it is full. There is no checkpoint yet")
        holds(error, 8)

    def test_parameters_that_are_not_finite(self, tmp_path):
        @tx.step_fn
        def step(state, batch):
            bad = jax.numpy.where(state.step == 5, jax.numpy.nan, 0)
            grads = {**state.stored_params, "w2": state.stored_params["w2"] + bad}
            return state.apply_gradients(grads=grads), {}

        error = fails(FloatingPointError, step=step, directory=tmp_path)
        assert int(error.state.step) == 6
        assert np.isnan(error.state.stored_params["w2"]).all()

    def test_the_state_is_the_one_that_was_resumed(self, tmp_path):
        holds(fails(ValueError, data=raising(ValueError(), 5), directory=tmp_path), 5)
        error = fails(ValueError, data=raising(ValueError(), 7), directory=tmp_path)
        holds(error, 7)
        holds(fails(tx.CheckpointError, steps=2, directory=tmp_path), 6)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal(self, number, tmp_path):
        def data(epoch):
            for i, batch in enumerate(batches(epoch)):
                if i == 4:
                    signal.raise_signal(number)
                yield batch

        error = fails((KeyboardInterrupt, SystemExit), data=data, directory=tmp_path, prefetch=0)
        holds(error, 4)
        assert cases.saved(tmp_path)[-1] == "step_00000004"

    def test_a_step_that_fails_while_it_runs(self, tmp_path):
        error = fails(jax.errors.JaxRuntimeError, step=failing, directory=tmp_path, n=1)
        assert error.state is None, "a step uses up what it is given"
        newest = tmp_path / "step_00000003"
        assert error.__notes__[-1] == (
            "txcore: error.state is None: the step that failed or was cut short had been given the "
            f"state, and a step uses up what it is given. The newest checkpoint is {newest}"
        )


@tx.step_fn
def failing(state, batch):
    """Fails on the host at its fifth step."""

    def host(step):
        if step == 4:
            raise ValueError("the host says no")
        return np.float32(step)

    seen = jax.pure_callback(host, jax.ShapeDtypeStruct((), np.float32), state.step)
    return state.replace(step=state.step + 1, extra={"mean": seen}), {}


def test_a_step_that_fails_while_it_runs():
    error = fails(jax.errors.JaxRuntimeError, step=failing, n=1)
    assert error.state is None
    assert error.__notes__[-1].endswith("a step uses up what it is given")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_without_checkpoints(number, caplog):
    def data(epoch):
        for i, batch in enumerate(batches(epoch)):
            if i == 4:
                signal.raise_signal(number)
            yield batch

    handler = signal.getsignal(number)
    error = fails((KeyboardInterrupt, SystemExit), data=data, prefetch=0)
    assert getattr(error, "code", None) == (143 if number == signal.SIGTERM else None)
    assert signal.getsignal(number) is handler
    holds(error, 4)
    assert toys.messages(caplog) == [
        f"txcore: {number.name}: stopped after 4 steps; nothing is saved without checkpoints= (the "
        "exception has the state)"
    ]


def test_a_second_sigint_between_a_steps_call_and_its_result(monkeypatch):
    run = Steps.run
    after(3, 2)  # by the plain one

    def interrupted(self, step, state, batch):
        made = run(self, step, state, batch)
        if int(made[0].step) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return made

    monkeypatch.setattr(Steps, "run", interrupted)
    holds(fails(KeyboardInterrupt), 3)


def test_a_second_sigint_ends_at_once():
    def data(epoch):
        yield from batches(epoch)[:2]
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it goes on")

    holds(fails(KeyboardInterrupt, data=data, prefetch=0), 2)


def test_sigint_at_any_time():
    """Two of them at moments of the kernel's choice, wherever the loop is."""
    rng = random.Random(0)
    engine = engine_of(2)
    engine.loggers = ()
    main, threads, taken = threading.main_thread().ident, [], set()

    def data(epoch):
        threads.append(threading.Thread(target=send))
        threads[-1].start()
        for i in range(MANY):
            yield batches(0)[i % 12]

    def send():
        time.sleep(rng.uniform(0.001, 0.06))
        for _ in range(2):
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(rng.uniform(0, 0.0005))

    after(12, 2)  # compiled
    handler = signal.signal(signal.SIGINT, lambda *_: None)  # for one that comes too late
    try:
        for _ in range(40):
            with pytest.raises(KeyboardInterrupt) as caught:
                engine.fit(cases.step, cases.start(engine), data, steps=MANY)
            threads[-1].join()
            made = int(caught.value.state.step)
            if made <= 12:
                holds(caught.value, made)
            assert not any(x.is_deleted() for x in jax.tree.leaves(caught.value.state.arrays))
            taken.add(made)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(taken) > 5, taken


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Slots(Exception):
    __slots__ = ("code",)


class Refuses(Exception):
    def __setattr__(self, name, value):
        raise AttributeError("read only")


class Own(Exception):
    state = "closed"


class Property(Exception):
    @property
    def state(self):
        raise RuntimeError("not connected")


@pytest.mark.parametrize("error", [Frozen(1), Slots(), Refuses()], ids=lambda e: type(e).__name__)
def test_exceptions_that_refuse_attributes(error):
    holds(fails(type(error), data=raising(error, 2)), 2)


@pytest.mark.parametrize("error", [Own(), Property()], ids=lambda e: type(e).__name__)
def test_exceptions_that_have_a_state(error):
    made = fails(type(error), data=raising(error, 2))
    assert int(made.train_state.step) == 2
    assert made.__notes__ == [
        "txcore: this exception has a state of its own; the train state is error.train_state"
    ]
    if isinstance(error, Own):
        assert made.state == "closed"


def test_of_a_fit_within_a_fit():
    """The exception has the state of the fit that it left last."""

    def evaluate(state):
        inner = engine_of(1)
        inner.fit(cases.step, cases.start(inner), raising(ValueError("inner"), 1), steps=2)

    holds(fails(ValueError, evaluate=evaluate, eval_every=4), 4)


class TestWhatIsKnownBeforeTheFirstStep:
    """A run that could not be saved makes no step."""

    @pytest.fixture(autouse=True)
    def _orbax(self):
        pytest.importorskip("orbax.checkpoint")

    def refused(self, text, directory, **options):
        def logger(record):
            pytest.fail("a step was made")

        error = fails(tx.CheckpointError, directory=directory, logger=logger, **options)
        assert re.fullmatch(text, str(error)), str(error)
        holds(error, 0) if not options else None

    def test_no_orbax(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
        self.refused(
            r"checkpoints need the package orbax-checkpoint: pip install 'txcore\[checkpoints\]'",
            tmp_path,
        )

    def test_a_folder_that_takes_no_files(self, tmp_path, monkeypatch):
        def mkdtemp(prefix, dir):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(folder.tempfile, "mkdtemp", mkdtemp)
        self.refused(
            f"the checkpoint folder {tmp_path} cannot be used: Read-only file sys.*", tmp_path
        )

    def test_an_array_that_cannot_be_saved(self, tmp_path):
        engine = toys.engine(1)
        extra = {"codes": np.zeros(4, jax.numpy.uint4)}
        state = engine.create_state(toys.params(), extra=extra)
        text = (
            "extra['codes'] (uint4[4]) cannot be saved: orbax does not store uint4. Keep it in "
            "another dtype, or train without checkpoints="
        )
        with pytest.raises(tx.CheckpointError, match=f"^{re.escape(text)}$") as caught:
            checkpoints = tx.Checkpoints(tmp_path, every=1)
            engine.fit(toys.train_step, state, batches, steps=1, checkpoints=checkpoints)
        assert caught.value.state is state
        assert cases.saved(tmp_path) == []

    def test_the_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        assert tx.Checkpoints("~/run", every=1).directory == tmp_path / "run"
        assert tx.Checkpoints("./~/run", every=1).directory.parent.name == "~"
        tx.loggers.JSONL("~/log.jsonl")(tx.loggers.Record("step", 1, 2, {}, 1.0, 64, 0.0))
        assert (tmp_path / "log.jsonl").exists()
        with pytest.raises(ValueError, match=r"^'~nobody-here/x' begins with '~', and no home of"):
            tx.Checkpoints("~nobody-here/x", every=1)
