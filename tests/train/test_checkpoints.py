"""Saving and resuming: the curve goes on bit for bit, on any number of devices within tolerance."""

import json
import os
import re
import signal

import checkpoint_cases as cases
import jax
import numpy as np
import pytest
import toys
from checkpoint_cases import EVERY, STEPS, saved, train

import txcore as tx
from txcore.train import manifest

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
            train(folder, data=data)
        assert getattr(ended.value, "code", None) == code
        assert signal.getsignal(number) is handler
        assert saved(folder)[-1] == "step_00000005"
        manifest.verify(folder / "step_00000005", manifest.read(folder / "step_00000005"))


def test_resumed_after_a_signal_it_is_the_uninterrupted_run(tmp_path, whole):
    def data(epoch):
        for i, batch in enumerate(cases.batches(epoch)):
            if (epoch, i) == (1, 2):
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with pytest.raises(SystemExit):
        train(tmp_path, data=data)
    curve, state = train(tmp_path, resume="must")
    assert min(curve.steps) == 7
    cases.equal(state, whole[1])


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
        self.refuses(
            tmp_path,
            "loss_scaling.scale (float32[]) is not in it; loss_scaling.good_steps (int32[]) is not "
            "in it; loss_scaling.skipped_steps (int32[]) is not in it; loss_scaling.culprit "
            "(int32[]) is not in it",
            on_nonfinite="skip",
        )

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


def test_the_manifest_says_what_it_is(tmp_path):
    train(tmp_path, steps=EVERY)
    text = (tmp_path / "step_00000003" / manifest.NAME).read_text().partition("\n")[2]
    data = json.loads(text)
    assert (data["format"], data["version"]) == ("txcore-checkpoint", 1)
    assert data["position"]["steps"] == 3
    assert data["position"]["rows"] == 48
    assert ["stored_params['w1']", "float32[4, 8]"] in data["leaves"]
    assert set(data["versions"]) == {"txcore", "jax", "orbax-checkpoint"}
    assert data["versions"]["jax"] == jax.__version__
