"""Saving and resuming: the curve goes on bit for bit, on any number of devices within tolerance."""

import itertools
import json
import os
import re
import signal
from collections import OrderedDict

import checkpoint_cases as cases
import jax
import numpy as np
import pytest
import toys
from checkpoint_cases import EVERY, STEPS, saved, train

import txcore as tx
from txcore.train.checkpoints import manifest
from txcore.train.loop import fit
from txcore.train.loop.interrupt import interrupts

pytest.importorskip("orbax.checkpoint")


def says(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


@pytest.fixture(scope="module")
def whole():
    """The uninterrupted run."""
    return train(None)


@pytest.mark.parametrize("until", [1, 3, 4, 5, 8, 13, STEPS])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(until, whole, tmp_path):
    curve, _ = train(tmp_path, steps=until)
    assert curve.steps == {k: v for k, v in whole[0].steps.items() if k <= until}
    curve, state = train(tmp_path)
    assert curve.steps == {k: v for k, v in whole[0].steps.items() if k > until}
    assert curve.ends == whole[0].ends, "steps and examples go on counting"
    cases.equal(state, whole[1])


@pytest.mark.parametrize("n", [1, 2, 8])
def test_saved_on_4_devices_it_resumes_on_others(n, whole, tmp_path):
    train(tmp_path, n=4, steps=7)
    curve, state = train(tmp_path, n=n)
    assert sorted(curve.steps) == list(range(8, STEPS + 1))
    for k, values in curve.steps.items():
        np.testing.assert_allclose(values, whole[0].steps[k], rtol=1e-5)
    assert state.stored_params["w1"].sharding.num_devices == n


def test_those_beyond_keep_are_deleted_the_oldest_first(tmp_path):
    train(tmp_path, keep=2)
    assert saved(tmp_path) == ["step_00000012", "step_00000014"]
    assert not list(tmp_path.glob("*orbax-checkpoint-tmp*"))


@pytest.mark.parametrize(
    "options, steps",
    [
        ({"precision": tx.Precision("float32")}, 6),
        ({"on_nonfinite": "skip"}, 6),
        ({"optimizer": tx.optim.adamw(1e-2)}, 6),
    ],
    ids=["plain", "skip", "adamw"],
)
def test_every_kind_of_state_comes_back(options, steps, tmp_path):
    _, whole = train(None, steps=10, **options)
    train(tmp_path, steps=steps, **options)
    _, state = train(tmp_path, steps=10, **options)
    cases.equal(state, whole)


def test_optax_and_float16_come_back(tmp_path):
    import float16_steps as f16
    import optax

    def run(directory, steps):
        engine = f16.engine(2, optimizer=optax.adam(1e-2), precision=f16.policy(initial=256))
        checkpoints = directory and tx.Checkpoints(directory, every=2)
        data = [toys.batch(seed=i) for i in range(6)]
        data[1] = f16.huge(data[1], 3)
        state = engine.create_state(toys.params())
        state = engine.fit(f16.train_step, state, data, steps=steps, checkpoints=checkpoints)
        return state

    whole = run(None, 6)
    assert int(whole.loss_scaling.skipped_steps) == 1
    run(tmp_path, 3)
    cases.equal(run(tmp_path, 6), whole)


def test_a_finished_run_is_not_trained_any_further(tmp_path):
    _, first = train(tmp_path)
    curve, state = train(tmp_path)
    assert curve.steps == {}
    assert [steps for steps, _ in curve.ends] == [STEPS]
    cases.equal(state, first)


def test_a_run_that_is_to_be_shorter_than_it_is_already(tmp_path):
    train(tmp_path, steps=6)
    text = (
        f"{tmp_path / 'step_00000006'} is after 6 steps, but the run is to make 4: give steps= (or "
        "epochs=) at least as large, or another folder"
    )
    with says(tx.CheckpointError, text):
        train(tmp_path, steps=4)
    engine, data = cases.engine(), cases.batches(0)
    with says(tx.CheckpointError, text):
        checkpoints = tx.Checkpoints(tmp_path, every=3)
        engine.fit(cases.step, cases.start(engine), data, epochs=1, checkpoints=checkpoints)
    train(tmp_path, steps=6)


def test_no_batch_comes_after_the_last_step():
    at = tx.train.Position(steps=6)
    made = fit.read_batches(cases.batches, fit.Length(4, None), at, None, lambda batch: 16)
    assert list(itertools.islice(made, 9)) == []


def test_arrays_are_restored_by_their_names(tmp_path):
    """Two arrays of one shape, filled in in another order than when they were saved."""
    params = OrderedDict(a=np.float32([1, 2]), b=np.float32([3, 4]))
    engine = toys.engine(1)
    with tx.Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(engine.create_state(params), tx.train.Position(steps=1))
    params.move_to_end("a")
    with tx.Checkpoints(tmp_path, every=1) as checkpoints:
        state, _ = checkpoints.restore(engine.create_state(params))
    assert list(state.stored_params) == ["b", "a"]
    assert {name: x.tolist() for name, x in state.stored_params.items()} == {
        "a": [1, 2],
        "b": [3, 4],
    }


def test_arrays_are_copied_before_the_next_step_is_given_their_buffers(tmp_path):
    engine = cases.engine()
    state = cases.start(engine)
    checkpoints = tx.Checkpoints(tmp_path, every=1, keep=100)
    want = {}
    data = cases.batches(0) * 5
    for i, batch in enumerate(data):
        want[i] = np.array(state.stored_params["w1"])
        checkpoints.save(state, tx.train.Position(steps=i))
        state, _ = cases.step(state, batch)  # donates what is being written
    checkpoints.close()
    for i in (0, 7, 19):
        for name in saved(tmp_path)[i + 1 :]:
            os.rename(tmp_path / name, tmp_path / f"later-{name}")
        found = tx.Checkpoints(tmp_path, every=1, keep=100)
        got, position = found.restore(cases.start(engine))
        found.close()
        assert position.steps == i
        np.testing.assert_array_equal(got.stored_params["w1"], want[i])
        for path in tmp_path.glob("later-*"):
            path.rename(tmp_path / path.name.removeprefix("later-"))


def test_a_signal_saves_and_ends_as_it_would(tmp_path, whole):
    for number, error, code in (
        (signal.SIGTERM, SystemExit, 143),
        (signal.SIGINT, KeyboardInterrupt, None),
    ):
        handler = signal.getsignal(number)
        folder = tmp_path / number.name

        def data(epoch, number=number):
            for i, batch in enumerate(cases.batches(epoch)):
                if (epoch, i) == (1, 1):
                    signal.raise_signal(number)
                yield batch

        with pytest.raises(error) as ended:
            train(folder, data=data, prefetch=0)
        assert getattr(ended.value, "code", None) == code
        assert signal.getsignal(number) is handler
        assert saved(folder)[-1] == "step_00000005"
        manifest.verify_files(
            folder / "step_00000005", manifest.read_manifest(folder / "step_00000005")
        )


def test_resumed_after_a_signal_it_is_the_uninterrupted_run(tmp_path, whole):
    def data(epoch):
        for i, batch in enumerate(cases.batches(epoch)):
            if (epoch, i) == (1, 2):
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with pytest.raises(SystemExit):
        train(tmp_path, data=data, prefetch=0)
    curve, state = train(tmp_path, resume="must")
    assert min(curve.steps) == 7
    cases.equal(state, whole[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_step_ends_it_too(number, tmp_path, caplog):
    def evaluate(state):
        signal.raise_signal(number)
        return {}

    engine = cases.engine()
    state, checkpoints = cases.start(engine), tx.Checkpoints(tmp_path, every=3)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        engine.fit(
            *(cases.step, state, cases.batches(0)),
            **{"steps": 4, "evaluate": evaluate, "checkpoints": checkpoints},
        )
    assert getattr(ended.value, "code", None) == (143 if number == signal.SIGTERM else None)
    assert saved(tmp_path) == ["step_00000003", "step_00000004"]
    assert toys.messages(caplog) == [f"txcore: {number.name}: stopped after 4 steps, all saved"]


def test_only_a_second_sigint_ends_at_once():
    with interrupts() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.asked == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts() as interrupt:
            signal.raise_signal(signal.SIGINT)
            assert interrupt.asked is None
            signal.raise_signal(signal.SIGTERM)
            assert interrupt.asked == signal.SIGTERM
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_others_are_told_once_all_is_saved_and_while_signals_are_noted(tmp_path, monkeypatch):
    told = []

    def failed(error):
        signal.raise_signal(signal.SIGTERM)  # would end this process
        told.append((str(error), saved(tmp_path)))

    def data(epoch):
        yield from cases.batches(epoch)[:3]
        raise ValueError("batch 3 is damaged")

    monkeypatch.setattr(fit.watch, "failed", failed)
    with pytest.raises(ValueError, match=r"^batch 3 is damaged$"):
        train(tmp_path, data=data)
    assert told == [("batch 3 is damaged", ["step_00000003"])]


class TestResume:
    def test_never(self, tmp_path):
        train(tmp_path, steps=4)
        text = (
            f"{tmp_path} has checkpoints already, the newest step_00000004: resume from it "
            "(resume='auto'), or give another folder"
        )
        with says(tx.CheckpointError, text):
            train(tmp_path, resume="never")
        assert saved(tmp_path) == ["step_00000003", "step_00000004"]

    def test_never_in_a_new_folder(self, tmp_path):
        curve, _ = train(tmp_path / "a" / "b", steps=2, resume="never")
        assert sorted(curve.steps) == [1, 2]

    def test_must(self, tmp_path):
        with says(tx.CheckpointError, f"resume='must' needs a checkpoint, and {tmp_path} has none"):
            train(tmp_path, resume="must")

    def test_the_error_of_one_in_use(self, tmp_path):
        first = tx.Checkpoints(tmp_path, every=1)
        state = cases.start(cases.engine())
        first.restore(state)
        text = f"{tmp_path} is in use by another run: end that one, or give another folder"
        with says(tx.CheckpointError, text):
            tx.Checkpoints(tmp_path, every=1).restore(state)
        first.close()
        second = tx.Checkpoints(tmp_path, every=1)
        second.restore(state)
        second.close()


@pytest.mark.parametrize(
    "given, text",
    [
        ({"every": 0}, "Checkpoints needs every= a count from 1 on, got 0"),
        ({"every": 1, "keep": True}, "Checkpoints needs keep= a count from 1 on, got True"),
        (
            {"every": 1, "resume": "yes"},
            "Checkpoints needs resume= 'auto', 'never' or 'must', got 'yes'",
        ),
        (
            {"every": 1, "directory": "gs://bucket/run"},
            "Checkpoints needs a folder of a file system, got 'gs://bucket/run': mount the bucket "
            "and give the path where it lies",
        ),
    ],
)
def test_bad_arguments(given, text):
    with says(ValueError, text):
        tx.Checkpoints(**{"directory": "runs", **given})


class TestAnotherRun:
    """A checkpoint that is whole, but not of this run."""

    def refuses(self, tmp_path, difference, **options):
        train(tmp_path, steps=3)
        text = (
            f"{tmp_path / 'step_00000003'} is of another model, optimizer, precision or seed: "
            f"{difference}. Make the state that it was saved from, or give another folder"
        )
        with says(tx.CheckpointError, text):
            train(tmp_path, **options)
        assert saved(tmp_path) == ["step_00000003"]

    def test_another_model(self, tmp_path):
        params = {"w1": np.ones((4, 9), np.float32), "w2": np.ones((9, 1), np.float32)}
        differs = (
            "opt_state['velocity']['w1'] is float32[4, 8] in it and float32[4, 9] in this state; "
            "opt_state['velocity']['w2'] is float32[8, 1] in it and float32[9, 1] in this state; "
            "stored_params['w1'] is float32[4, 8] in it and float32[4, 9] in this state; "
            "stored_params['w2'] is float32[8, 1] in it and float32[9, 1] in this state"
        )
        self.refuses(tmp_path, differs, params=params)

    def test_a_model_with_more_layers(self, tmp_path):
        more = {name: np.zeros(8, np.float32) for name in ("b1", "b2", "b3")}
        params = {**toys.params(), **more}
        train(tmp_path, steps=3)
        with pytest.raises(tx.CheckpointError) as refused:
            train(tmp_path, params=params)
        assert "seed: opt_state['velocity']['b1'] (float32[8]) is not in it; " in str(refused.value)
        assert "; and 3 more. Make" in str(refused.value)

    def test_another_optimizer(self, tmp_path):
        train(tmp_path, steps=3)
        with pytest.raises(tx.CheckpointError, match=r"opt_state.* is not in this state"):
            train(tmp_path, optimizer=tx.optim.adamw(0.1))

    def test_another_precision(self, tmp_path):
        differs = "precision is float32 in it and {} in this state"
        for precision in ("bfloat16", "float16"):
            self.refuses(tmp_path, differs.format(precision), precision=precision)

    def test_another_seed(self, tmp_path):
        self.refuses(tmp_path, "seed is uint32[] 0 in it and uint32[] 1 in this state", seed=1)

    def test_another_batch_size(self, tmp_path):
        train(tmp_path, steps=5)
        text = (
            "fit resumes epoch 1 after 1 batches of 16 examples, but they are 1 of 32 now: use the "
            "data and the global batch size that the checkpoint was made with"
        )
        with says(ValueError, text):
            train(tmp_path, data=lambda epoch: [toys.batch(32)] * 3)

    def test_data_that_shrank(self, tmp_path):
        train(tmp_path, steps=7)
        text = (
            "fit resumes epoch 1 after 3 batches of 48 examples, but they are 2 of 32 now: use the "
            "data and the global batch size that the checkpoint was made with"
        )
        with says(ValueError, text):
            train(tmp_path, data=lambda epoch: cases.batches(epoch)[:2])


@pytest.mark.parametrize("first, then", [("stop", "skip"), ("skip", "stop")])
def test_steps_may_be_skipped_from_now_on_or_no_more(first, then, tmp_path):
    train(tmp_path, steps=6, on_nonfinite=first)
    curve, state = train(tmp_path, on_nonfinite=then)
    assert min(curve.steps) == 7
    if then == "skip":
        assert int(state.loss_scaling.good_steps) == STEPS - 6
    else:
        assert state.loss_scaling is None
    _, whole = train(None, on_nonfinite=then)
    for name, x in whole.stored_params.items():  # the two programs round otherwise
        np.testing.assert_allclose(state.stored_params[name], x, rtol=1e-5)


def test_the_manifest_says_what_it_is(tmp_path):
    train(tmp_path, steps=EVERY)
    text = (tmp_path / "step_00000003" / manifest.NAME).read_text().partition("\n")[2]
    data = json.loads(text)
    assert (data["format"], data["version"]) == ("txcore-checkpoint", 1)
    assert data["position"]["steps"] == 3
    assert data["position"]["rows"] == 48
    assert data["precision"] == "float32"
    assert ["stored_params['w1']", "float32[4, 8]"] in data["leaves"]
    assert set(data["versions"]) == {"txcore", "jax", "orbax-checkpoint"}
    assert data["versions"]["jax"] == jax.__version__
