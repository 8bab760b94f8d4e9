"""Two ranks: the best is decided alike, keys are saved, and an error has the state on its rank."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import toys
from checkpoint_cases import saved
from processes import finish, free_port

pytest.importorskip("orbax.checkpoint")

ROOT = pathlib.Path(__file__).parents[2]
WORKER = pathlib.Path(__file__).with_name("kept_run.py")


def after(steps):
    """The weights after steps of one process on one device."""
    state = toys.engine(1).create_state(toys.params())
    for i in steps:
        state, _ = toys.train_step(state, toys.batch(seed=i))
    return np.asarray(state.stored_params["w2"]).ravel()


def test_two_ranks(tmp_path):
    coordinator = f"127.0.0.1:{free_port()}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, coordinator, str(rank), tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    _, outputs, errors = zip(*finish(*ranks, deadline_s=120), strict=True)
    assert "shard 7 is gone" in errors[1], errors
    first, second = (json.loads(out.splitlines()[-1]) for out in outputs)
    assert {name: second[name] for name in first} == first
    assert first["best"] == "step_00000004"
    assert saved(tmp_path) == ["step_00000004", "step_00000006"]
    assert first["step"] == 6
    assert first["alike"] == ["ValueError", "FloatingPointError", 6]
    assert first["key"] == jax.random.key_data(jax.random.key(7)).tolist()
    assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    assert_close(first["best_w2"], after(range(4)))
    assert_close(first["w2"], after(range(6)))
    assert second["left"] == 9
    assert_close(second["left_w2"], after([*range(6), 0, 1, 2]))
