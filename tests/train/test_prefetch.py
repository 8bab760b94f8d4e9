"""Batches that are read while the step runs: the same run, in order, and nothing left behind."""

import signal
import threading
import time
import traceback
import types

import jax
import numpy as np
import pytest
import toys

import txcore as tx
from txcore.launch import watch
from txcore.train import Position
from txcore.train.loop import prefetch
from txcore.train.loop.arguments import Length
from txcore.train.loop.feed import read_batches

STEPS = 12


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "txcore-prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not threads()


def curve(data, *, n=2, steps=STEPS, **options):
    """The losses of a run over data, and its last state."""
    losses = []
    engine = toys.engine(n, loggers=[lambda record: losses.append(record.metrics.get("loss"))])
    state = engine.fit(
        toys.train_step, engine.create_state(toys.params()), data, steps=steps, **options
    )
    return losses[:-1], jax.tree.map(np.asarray, state.arrays)


def in_order(epoch):
    """Batches of which each is another one, five an epoch."""
    return [toys.batch(seed=5 * epoch + i, masked=i % 3) for i in range(5)]


@pytest.mark.parametrize("ahead", [1, 2, 7])
def test_the_run_is_that_without_a_thread_to_the_last_bit(ahead):
    losses, state = curve(in_order, prefetch=0)
    found, after = curve(lambda epoch: iter(in_order(epoch)), prefetch=ahead)
    assert found == losses
    jax.tree.map(np.testing.assert_array_equal, after, state)


def test_it_reads_while_the_step_runs_and_never_further_than_it_may():
    read, most = [], []
    engine = toys.engine(1, loggers=[lambda record: most.append(len(read) - record.step)])

    def data(epoch):
        assert threading.current_thread() in threads()
        for i in range(9):
            read.append(i)
            yield toys.batch(seed=i)

    def slow(state):
        time.sleep(0.2)  # the thread has time for all that it may read
        return {}

    engine.fit(
        *(toys.train_step, engine.create_state(toys.params()), data),
        steps=9,
        evaluate=slow,
        eval_every=4,
        prefetch=3,
    )
    # Of the steps that were logged some may wait to be; of the batches three are ready.
    assert max(most) <= 3 + 1 + 1
    assert len(read) == 9


def test_no_batch_beyond_the_run_is_read():
    batches = (toys.batch(seed=i) for i in range(100))
    engine = toys.engine(1)
    state = engine.create_state(toys.params())
    for steps in (4, 10):  # the second fit goes on where the first one ended
        state = engine.fit(toys.train_step, state, batches, steps=steps)
    assert len(list(batches)) == 90


def test_an_exception_surfaces_at_its_batch_with_its_traceback():
    def read_a_file():
        raise OSError("the disk is gone")

    def data(epoch):
        yield from in_order(0)[:3]
        read_a_file()

    with pytest.raises(OSError, match="the disk is gone") as caught:
        curve(data)
    assert "read_a_file" in [f.name for f in traceback.extract_tb(caught.value.__traceback__)]
    assert int(caught.value.state.step) == 3


def test_a_batch_that_cannot_be_placed_is_refused_at_its_step():
    with pytest.raises(ValueError, match="cannot share equally") as caught:
        curve([*in_order(0)[:2], toys.batch(5)])
    assert int(caught.value.state.step) == 2


def test_an_error_of_the_run_ends_the_thread_and_closes_the_data():
    closed = []

    def data(epoch):
        try:
            while True:
                yield toys.batch()
        finally:
            closed.append(threading.current_thread().name)

    def fails(state):
        raise RuntimeError("no test set")

    with pytest.raises(RuntimeError, match="no test set"):
        curve(data, evaluate=fails, eval_every=3)
    assert closed == ["txcore-prefetch"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_that_waits_for_its_data(number):
    """A loader that hangs is what one presses Ctrl-C for."""
    begun, go_on = threading.Event(), threading.Event()
    main = threading.main_thread().ident

    def data(epoch):
        yield from in_order(0)[:2]
        begun.wait(60)
        time.sleep(0.3)  # the second step is dispatched
        signal.pthread_kill(main, number)
        threading.Timer(0.5, go_on.set).start()  # close waits for the batch
        assert go_on.wait(60)
        yield toys.batch()

    engine = toys.engine(1, loggers=[lambda record: begun.set()])
    with pytest.raises((KeyboardInterrupt, SystemExit)) as caught:
        engine.fit(toys.train_step, engine.create_state(toys.params()), data, steps=9)
    assert int(caught.value.state.step) == 2  # and not three: it did not wait for the batch


def test_data_that_never_return_are_left_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(prefetch, "ENDS_S", 0.05)
    hangs, go_on = threading.Event(), threading.Event()

    def data(epoch):
        yield from in_order(0)[:3]
        hangs.set()
        go_on.wait()

    def fails(record):
        hangs.wait()
        raise KeyboardInterrupt

    engine = toys.engine(1, loggers=[fails])
    with pytest.raises(KeyboardInterrupt):
        engine.fit(toys.train_step, engine.create_state(toys.params()), data, steps=9)
    assert "have not returned the batch" in toys.messages(caplog)[-1]
    (left,) = threads()
    go_on.set()
    left.join()


def test_contexts_of_the_calling_thread_hold():
    """jax's contexts hold for one thread: a batch of float64 stays one."""
    seen, where = [], []

    @tx.step_fn
    def step(state, batch):
        seen.append(batch.dtype)
        return state.replace(step=state.step + 1), {}

    def data(epoch):
        where.append(threading.current_thread())
        yield np.ones(4)

    engine = toys.engine(1)
    with jax.enable_x64(True):
        engine.fit(step, engine.create_state(toys.params()), data, steps=1)
    assert seen[0] == np.float64
    assert where == [threading.main_thread()]


def test_a_checkpoint_has_the_position_of_what_was_consumed(tmp_path):
    """The thread has read further than the run; a run that goes on reads that again."""
    whole, _ = curve(in_order, n=2)

    def stops(state):
        raise RuntimeError("killed")

    engine = toys.engine(2)
    for options in ({"evaluate": stops, "eval_every": 8}, {}):
        losses = []
        engine.loggers = [lambda record, kept=losses: kept.append(record.metrics.get("loss"))]
        with tx.Checkpoints(tmp_path, every=3) as checkpoints:
            try:
                engine.fit(
                    *(toys.train_step, engine.create_state(toys.params()), in_order),
                    steps=STEPS,
                    checkpoints=checkpoints,
                    prefetch=6,
                    **options,
                )
            except RuntimeError:
                continue
    assert losses[:-1] == whole[6:]


def test_several_processes_begin_an_epoch_where_they_are_asked():
    """What ranks exchange there has one order on all of them."""
    here, places = [], []

    def data(epoch):
        here.append((threading.current_thread(), len(places)))
        return iter(in_order(epoch))

    ready = types.SimpleNamespace(rows=16)
    made = read_batches(data, Length(12, None), Position(), lambda host: ready, lambda host: 16)
    with prefetch.Reader(made, 4, begins_here=True) as batches:
        for after, _ in batches:
            places.append(after.steps)
    assert places == list(range(1, 13))
    main = threading.main_thread()
    assert here == [(main, 0), (main, 5), (main, 10)]  # never before the epoch is over


def test_batches_on_the_devices_need_no_thread():
    engine = toys.engine(2)
    on_mesh = jax.device_put(toys.batch(), engine.mesh.sharding("data"))
    found = []

    def look(record):
        found.extend(threads())

    engine.loggers = [look]
    engine.fit(toys.train_step, engine.create_state(toys.params()), [on_mesh] * 4, epochs=1)
    assert not found


@pytest.mark.parametrize("value", [-1, 1.5, "2", None])
def test_a_wrong_count_is_refused(value):
    with pytest.raises(ValueError, match="prefetch= a count of batches"):
        curve(in_order, prefetch=value)


class Tensor:
    """What torch's tensors show of themselves: a shape, a dtype of their own, `__array__`."""

    def __init__(self, values):
        self._values = values
        self.shape, self.dtype = values.shape, ("torch", values.dtype.name)

    def __array__(self, dtype=None):  # without numpy's copy=, which is a warning where it is given
        return self._values if dtype is None else self._values.astype(dtype)


class TorchLoader:
    """What torch's DataLoader is: a length, and a new iterator for each epoch, of its tensors."""

    def __len__(self):
        return 5

    def __iter__(self):
        return iter([{k: Tensor(v) for k, v in batch.items()} for batch in in_order(0)])


class GrainIterator:
    """What grain's iterators are: `__next__`, and a state of their own that fit does not need."""

    def __init__(self, batches):
        self._batches, self._next = batches, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self._next == len(self._batches):
            raise StopIteration
        self._next += 1
        return self._batches[self._next - 1]

    def get_state(self):
        return {"next_index": self._next}

    def set_state(self, state):
        self._next = state["next_index"]


def test_torch_loaders_and_grain_iterators():
    """Ten steps, two epochs of the same five batches."""
    losses, state = curve(lambda epoch: in_order(0), steps=10, prefetch=0)
    for data in (TorchLoader(), lambda epoch: GrainIterator(in_order(0))):
        found, after = curve(data, steps=10)
        assert found == losses
        jax.tree.map(np.testing.assert_array_equal, after, state)


def test_the_watch_is_told_of_no_event_of_the_thread(monkeypatch):
    """Only the calling thread's are compared between ranks."""
    noted = []
    monkeypatch.setattr(
        watch, "at", lambda *args, **kwargs: noted.append(threading.current_thread())
    )
    curve(in_order)
    assert {*noted} == {threading.main_thread()}
