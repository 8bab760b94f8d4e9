"""Checkpoints of sharded state: they hold whole arrays, and resume under any other layout."""

import os
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import sharded_models as models
import sharded_run
from processes import rank_environment

import txcore as tx

KINDS = [None, *models.KINDS]
ALL = os.environ.get("TXCORE_ALL_GUARDS") == "1"
SHAPES = [((1, 1), None), ((1, 2), None), ((1, 4), None), ((2, 2), "data"), ((2, 4), None)]


def whole(state):
    return {"params": models.host(state.stored_params), "moments": models.host(state.opt_state)}


@pytest.mark.parametrize("shard", models.KINDS if ALL else ["optimizer", "parameters"])
def test_killed_and_resumed_bit_by_bit(shard, tmp_path):
    command = [sys.executable, sharded_run.__file__, tmp_path / "killed", shard, "6", "5"]
    ended = subprocess.run(command, env=rank_environment(), capture_output=True, timeout=200)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert list((tmp_path / "killed").glob("step_0000000[24]"))  # the last may be half written
    resumed = sharded_run.fit(tmp_path / "killed", shard, 6)
    straight = sharded_run.fit(tmp_path / "straight", shard, 6)
    jax.tree.map(np.testing.assert_array_equal, whole(resumed), whole(straight))


@pytest.mark.parametrize("before", KINDS if ALL else ["parameters"])
def test_resumed_under_every_other_layout(before, tmp_path):
    """Saved after two steps under one kind, and gone on with under all: as without a stop."""
    straight = whole(sharded_run.fit(tmp_path / "straight", None, 4, shape=(1, 1), axis=None))
    sharded_run.fit(tmp_path / "run", before, 2)
    for after in KINDS:
        for shape, axis in SHAPES if ALL else [SHAPES[-1]]:
            folder = tmp_path / f"{after} on {shape}"
            shutil.copytree(tmp_path / "run", folder)
            state = sharded_run.fit(folder, after, 4, shape=shape, axis=axis)
            assert int(state.step) == 4
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
                whole(state),
                straight,
            )
            loaded = tx.load_params(folder, models.params())
            jax.tree.map(np.testing.assert_array_equal, loaded, whole(state)["params"])
