"""A run goes on with another number of processes: the same curve within float tolerance."""

import numpy as np
import pytest
import runs

pytest.importorskip("orbax.checkpoint")

ARGS = ("--steps", 60, "--pause", 0)


def part(folder, world, devices, *args):
    ranks = runs.start(folder, world, *ARGS, *args, devices=devices)
    codes = runs.wait(ranks, runs.patience(runs.START_S))
    runs.stop(ranks)
    assert codes == [0] * world, runs.shown(runs.said(folder, world))


MORE_RANKS = pytest.param((3, 1), (2, 4), marks=pytest.mark.extra)


@pytest.mark.parametrize("before, after", [((1, 4), (2, 1)), ((2, 2), (1, 1)), MORE_RANKS], ids=str)
def test_processes_and_devices_may_change(before, after, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    whole.mkdir()
    halves.mkdir()
    part(whole, *before)
    part(halves, *before, "--until", 31)
    part(halves, *after, "--resume", "must")
    want, got = runs.losses(whole), runs.losses(halves)
    assert sorted(got) == list(range(1, 61))
    for step, metrics in got.items():
        exact = 0 if step <= 31 else 2e-5
        for name, value in metrics.items():
            np.testing.assert_allclose(value, want[step][name], rtol=exact, err_msg=f"step {step}")
