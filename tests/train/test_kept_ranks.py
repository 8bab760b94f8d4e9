"""Two ranks: the best is decided alike, keys are saved, and an error has the state on its rank."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import toys
from checkpoint_cases import saved
from processes import finish, start_ranks

pytest.importorskip("orbax.checkpoint")

WORKER = pathlib.Path(__file__).with_name("kept_run.py")


def after(steps):
    """The weights after steps of one process on one device."""
    state = toys.engine(1).create_state(toys.params())
    for i in steps:
        state, _ = toys.train_step(state, toys.batch(seed=i))
    return np.asarray(state.stored_params["w2"]).ravel()


def test_two_ranks(tmp_path):
    ranks = start_ranks(WORKER, tmp_path)
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
