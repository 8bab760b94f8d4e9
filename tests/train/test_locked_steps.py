"""An engine with a lock file trains with the locked step alone, and its checkpoints say so."""

import json
import logging

import pytest
import toys

import txcore as tx
from txcore.profiling.lock.attest import AttestationError
from txcore.train.checkpoints.manifest import read_manifest


@tx.step_fn
def other_step(state, batch):
    loss, grads = tx.value_and_grad(toys.local_loss)(state.params, batch)
    grads, state = state.sync_gradients(grads)
    again = tx.pmean(2 * loss, "data", name="again")
    return state.apply_gradients(grads=grads), {"loss": tx.pmean(loss, "data"), "again": again}


def train(file, monkeypatch, step=toys.train_step, update=False, checkpoints=None, **options):
    with monkeypatch.context() as changed:
        if update:
            changed.setenv("TXCORE_LOCK_UPDATE", "1")
        engine = toys.engine(2, lock=file, **options)
        state = engine.create_state(toys.params())
        data = [toys.batch()] * 2
        engine.fit(step, state, data, steps=2, checkpoints=checkpoints)
    return engine


def test_the_locked_step_trains_and_the_log_and_the_checkpoint_say_so(
    tmp_path, monkeypatch, caplog
):
    pytest.importorskip("orbax.checkpoint")
    file = tmp_path / "step.lock.json"
    train(file, monkeypatch, update=True)
    checkpoints = tx.Checkpoints(tmp_path / "run", every=2)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="txcore.profiling.lock"):
        engine = train(file, monkeypatch, checkpoints=checkpoints)
    assert engine.proof.startswith(f"jit(train_step) is the program of {file}: cpu:2 data=2, sha")
    assert [r.getMessage() for r in caplog.records] == [engine.proof]
    manifest = read_manifest(tmp_path / "run" / "step_00000002")
    assert manifest.versions["proof"] == engine.proof
    # What is not the training step is not held to it.
    engine.evaluate(toys.eval_step, engine.create_state(toys.params()), [toys.batch()])


@pytest.mark.parametrize("by_run", [False, True], ids=["engine", "run"])
def test_another_step_is_refused_before_it_runs(by_run, tmp_path, monkeypatch):
    file = tmp_path / "step.lock.json"
    train(file, monkeypatch, update=True)
    if by_run:
        monkeypatch.setenv("TXCORE_LOCK", str(file))
    with pytest.raises(AttestationError, match="all-reduce  data  float32") as error:
        train(None if by_run else file, monkeypatch, other_step)
    assert int(error.value.state.step) == 0
    assert "jit(other_step) is another" in str(error.value)
    with pytest.raises(AttestationError, match="it is for cpu:2 data=2, and the file has none"):
        file.write_text(json.dumps({"format": "txcore-lock", "version": 1, "targets": {}}))
        train(file, monkeypatch)


def test_several_steps_in_one_program_are_refused(tmp_path):
    engine = toys.engine(2, lock=tmp_path / "step.lock.json")
    state = engine.create_state(toys.params())
    with pytest.raises(ValueError, match="needs its one locked step, got several steps in one pro"):
        engine.fit(toys.train_step, state, [toys.batch()] * 4, steps=4, steps_per_call=2)


def test_without_a_lock_there_is_no_proof(monkeypatch):
    assert train(None, monkeypatch).proof == ""
