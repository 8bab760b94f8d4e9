"""The format of checkpoints: those of earlier versions restore, and plain orbax reads new ones."""

import pathlib
import zipfile

import jax
import numpy as np
import pytest

import txcore as tx

ocp = pytest.importorskip("orbax.checkpoint")

# Written by `Checkpoints.save` when orbax's own checkpointer still committed what it wrote.
OLD = pathlib.Path(__file__).parent / "fixtures" / "checkpoint_of_version_0_1.zip"
W = np.arange(6, dtype=np.float32).reshape(2, 3)


def create_state(w, key, mean):
    """Return a state like that of the old checkpoint: an array without elements, keys, `extra`."""
    engine = tx.Engine(
        mesh=tx.MeshSpec(jax.devices()[:2]),
        plan=tx.Plan(data_parallel=tx.DP("data")),
        optimizer=tx.optim.adamw(0.1),
    )
    extra = {"key": jax.random.key(key), "mean": np.full(2, mean, np.float32)}
    return engine.create_state({"w": w, "b": np.zeros(0, np.float32)}, extra)


def test_a_checkpoint_of_an_earlier_version_restores(tmp_path):
    with zipfile.ZipFile(OLD) as archive:
        archive.extractall(tmp_path)
    with tx.Checkpoints(tmp_path, every=1, resume="must") as checkpoints:
        state, position = checkpoints.restore(create_state(np.zeros_like(W), key=0, mean=0))
    assert position == tx.train.Position(steps=7, batch=7, rows=7)
    np.testing.assert_array_equal(state.params["w"], W)
    np.testing.assert_array_equal(state.extra["mean"], np.ones(2))
    assert jax.random.key_data(state.extra["key"]).tolist() == [0, 3]
    loaded = tx.load_params(tmp_path, {"w": np.zeros_like(W)})
    np.testing.assert_array_equal(loaded["w"], W)


@pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")
@pytest.mark.parametrize("checkpointer", ["PyTreeCheckpointer", "StandardCheckpointer"])
def test_plain_orbax_reads_a_new_checkpoint(tmp_path, checkpointer):
    state = create_state(W, key=3, mean=1)
    with tx.Checkpoints(tmp_path, every=1) as checkpoints:
        checkpoints.save(state, tx.train.Position(steps=7))
    arrays = getattr(ocp, checkpointer)().restore(tmp_path / "step_00000007")
    found = [np.asarray(array) for _, array in sorted(arrays.items())]
    leaves = [
        jax.random.key_data(x) if x is state.extra["key"] else x
        for x in jax.tree.leaves(state.arrays)
    ]
    wanted = [np.asarray(x) for x in leaves if x.size]  # arrays without elements are not written
    assert len(found) == len(wanted)
    for array, leaf in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(array, leaf)
